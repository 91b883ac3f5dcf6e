"""Where declarations touch a Celery app: tasks, beat entries, the worker's end."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery, signals

from petiole.tasks import wiring


def nothing() -> None:
    """A task's body."""


@pytest.mark.parametrize("name", ["views", "a", "0", "shop.page_views-2", "x" * 100])
def test_a_name_that_fits_a_task_is_taken(name: str) -> None:
    """Letters, digits, underscore, dot and dash."""
    assert wiring.checked_name(name, "name") == name


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a:b", "-a", ".a", "ä", "a\n", "a/b", "{a}", "x" * 101, None, 7, b"a"]
)
def test_a_name_that_does_not_fit_is_refused(name: object) -> None:
    """The message says what it is for, and what may stand in it."""
    with pytest.raises(ValueError, match=r"buffer name .* becomes part of a task's name: use letters"):
        wiring.checked_name(name, "buffer name")  # type: ignore[arg-type]


def test_a_beat_entry_is_in_the_schedule_once_the_app_is_ready(app: Celery, name: str) -> None:
    """It names its task and its period, and a message that nobody took expires when the next one is due."""
    wiring.add_task(app, f"{name}.task", nothing)
    wiring.add_beat_entry(app, f"{name} entry", every_ms=90_000, task=f"{name}.task")
    app.finalize()
    entry = app.conf.beat_schedule[f"{name} entry"]

    assert entry["task"] == f"{name}.task"
    assert entry["schedule"] == timedelta(seconds=90)
    assert entry["options"]["expires"] == 90


def test_a_quick_entry_does_not_expire_within_a_second(app: Celery, name: str) -> None:
    """A busy worker would drop every one of them."""
    wiring.add_beat_entry(app, name, every_ms=50, task="t")
    app.finalize()

    assert app.conf.beat_schedule[name]["options"]["expires"] == 1


@pytest.mark.parametrize("declared", ["before", "after"])
def test_an_entry_survives_a_schedule_that_is_set_as_a_whole(app: Celery, name: str, declared: str) -> None:
    """An application that says ``app.conf.beat_schedule = {...}`` has its entries and ours."""
    own = {f"{name} own": {"task": "own.task", "schedule": 5.0}}
    if declared == "before":
        wiring.add_beat_entry(app, name, every_ms=1_000, task="t")
        app.conf.beat_schedule = own
    else:
        app.conf.beat_schedule = own
        wiring.add_beat_entry(app, name, every_ms=1_000, task="t")
    app.finalize()

    assert {name, f"{name} own"} <= set(app.conf.beat_schedule)
    assert app.conf.beat_schedule[f"{name} own"] == {"task": "own.task", "schedule": 5.0}


def test_the_applications_own_entry_of_that_name_wins(app: Celery, name: str) -> None:
    """Whoever schedules it differently keeps that."""
    own = {"task": "own.task", "schedule": 5.0}
    app.conf.beat_schedule = {name: own}
    wiring.add_beat_entry(app, name, every_ms=1_000, task="t")
    app.finalize()

    assert app.conf.beat_schedule[name] == own


def test_an_app_that_is_ready_already_gets_the_entry_too(app: Celery, name: str) -> None:
    """A declaration that is imported late is scheduled."""
    app.finalize()
    wiring.add_beat_entry(app, name, every_ms=1_000, task="t")

    assert app.conf.beat_schedule[name]["task"] == "t"


def test_without_an_app_every_app_gets_task_and_entry(make_app: Callable[..., Celery], name: str) -> None:
    """As with shared_task: apps made before and after the declaration, each once."""
    before = make_app()
    wiring.add_task(None, f"{name}.task", nothing)
    wiring.add_beat_entry(None, f"{name} entry", every_ms=1_000, task=f"{name}.task")
    apps = [before, make_app()]
    for app in apps:
        app.finalize()

    for app in apps:
        assert f"{name}.task" in app.tasks
        assert [e["task"] for n, e in app.conf.beat_schedule.items() if name in n] == [f"{name}.task"]


def test_without_an_app_one_that_is_ready_already_gets_task_and_entry(app: Celery, name: str) -> None:
    """A task that an app got late, as shared_task gives it, is scheduled as well."""
    app.finalize()
    wiring.add_task(None, f"{name}.task", nothing)
    wiring.add_beat_entry(None, f"{name} entry", every_ms=1_000, task=f"{name}.task")

    assert f"{name}.task" in app.tasks
    assert f"{name} entry" in app.conf.beat_schedule


@pytest.fixture
def shutdowns() -> Iterator[Callable[[Celery], None]]:
    """Tells receivers that the worker of an app ends; what a test connected is disconnected afterwards."""
    before = list(signals.worker_shutdown.receivers or [])

    class Worker:
        def __init__(self, app: Celery) -> None:
            self.app = app

    def end(app: Celery) -> None:
        for key, receiver in list(signals.worker_shutdown.receivers or []):
            if (key, receiver) not in before:
                receiver(sender=Worker(app), signal=signals.worker_shutdown)

    yield end
    signals.worker_shutdown.receivers = before


@pytest.mark.parametrize("shared", [False, True])
def test_a_workers_end_is_told_to_those_of_its_app(
    make_app: Callable[..., Celery], shutdowns: Callable[[Celery], None], shared: bool
) -> None:
    """What belongs to an app is called when a worker of that app ends; what belongs to all, with each."""
    mine, other = make_app(), make_app()
    calls: list[Any] = []
    wiring.at_worker_end(None if shared else mine, lambda: calls.append("ended"))
    shutdowns(other)
    by_other = len(calls)
    shutdowns(mine)

    assert by_other == (1 if shared else 0)
    assert len(calls) == by_other + 1
