"""Answering a call of a memoized task without the broker."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task, chain, chord, group
from celery.result import AsyncResult
from celery.worker import WorkController

from petiole import Cache, memoized_task
from petiole.coordination import MemoizedTask

PATIENCE_S = 20.0


@pytest.fixture
def declare(cache: Cache, name: str) -> Callable[..., MemoizedTask]:
    """A task that answers where it is sent."""

    def make(app: Celery, **options: Any) -> MemoizedTask:
        @memoized_task(app=app, **{"cache": cache, "name": f"{name}.double", "short_circuit": True, **options})
        def double(number: int) -> int:
            return number * 2

        return double

    return make


@pytest.fixture
def queued(name: str) -> Callable[[Celery], int]:
    """How many messages wait in an app's queue."""

    def count(app: Celery) -> int:
        with app.connection_for_read() as connection:
            return int(connection.default_channel.client.llen(name))

    return count


def test_a_fresh_result_is_the_answer_and_nothing_is_sent(
    app: Celery, declare: Callable[..., MemoizedTask], queued: Callable[[Celery], int]
) -> None:
    """The result has an id of its own, and any process can read it; no worker is there."""
    task = declare(app)
    task(21)
    results = [task.delay(21), task.apply_async((21,), queue="elsewhere", expires=5), task.s(21).delay()]

    assert [result.get(timeout=PATIENCE_S) for result in results] == [42] * 3
    assert len({result.id for result in results}) == 3
    assert [AsyncResult(result.id, app=app).get(timeout=PATIENCE_S) for result in results] == [42] * 3
    results[0].forget()
    assert AsyncResult(results[1].id, app=app).state == "SUCCESS"
    assert queued(app) == 0
    assert task.memo_stats()["answered"] == 3
    assert 0 < app.backend.client.ttl(app.backend.get_key_for_task(results[1].id)) <= app.backend.expires
    gc.collect()


@pytest.mark.parametrize(
    "options",
    [
        {"task_id": "mine"},
        {"link": True},
        {"link_error": True},
        {"countdown": 1},
        {"headers": {"x": 1}},
        {"group_id": "g"},
        {"chord": {}},
        {"chain": []},
        {"root_id": "r"},
        {"shadow": "other"},
        {"whatever_comes_next": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_call_that_is_not_bare_is_sent(
    app: Celery, declare: Callable[..., MemoizedTask], queued: Callable[[Celery], int], options: dict[str, Any]
) -> None:
    """Somebody holds its id, or waits for what a worker does after it."""
    task = declare(app)
    task(21)
    task.apply_async((21,), **{name: task.si(1) if value is True else value for name, value in options.items()})

    assert queued(app) == 1
    assert task.memo_stats()["answered"] == 0


def test_what_is_not_there_or_not_fresh_is_sent(
    app: Celery, declare: Callable[..., MemoizedTask], queued: Callable[[Celery], int], cache: Cache
) -> None:
    """A worker makes it, or serves it and has it refreshed."""
    task = declare(app, ttl=100, stale=100)
    task.delay(21)
    assert queued(app) == 1
    task(21)
    cache.expire(task.key(21))
    task.delay(21)
    assert queued(app) == 2


def test_a_result_that_is_due_for_an_early_refresh_is_sent(
    app: Celery, declare: Callable[..., MemoizedTask], queued: Callable[[Celery], int], cache: Cache
) -> None:
    """Otherwise a call that is always answered here would never be refreshed before it is gone."""
    task = declare(app, ttl=1_000, early=0.5)
    task(21)
    task.delay(21)
    assert queued(app) == 0
    cache.redis.coordination.pexpire(cache.keys.entry(task.key(21)), 400_000)
    task.delay(21)

    assert queued(app) == 1


def test_without_the_option_everything_is_sent(
    app: Celery, declare: Callable[..., MemoizedTask], queued: Callable[[Celery], int]
) -> None:
    """It is opt-in: no task events, no signals and no time limits are known of a call that no worker has seen."""
    task = declare(app, short_circuit=False)
    task(21)
    task.delay(21)

    assert queued(app) == 1


@pytest.mark.parametrize("how", ["task", "call"])
def test_an_ignored_result_is_not_stored(
    app: Celery, declare: Callable[..., MemoizedTask], queued: Callable[[Celery], int], how: str
) -> None:
    """As a worker would not store it."""
    task = declare(app, ignore_result=how == "task")
    task(21)
    result = task.apply_async((21,), **({"ignore_result": True} if how == "call" else {}))

    assert result.get(timeout=PATIENCE_S) is None
    assert app.backend.get(app.backend.get_key_for_task(result.id)) is None
    assert queued(app) == 0


def test_without_a_result_backend_it_answers_too(
    make_app: Callable[..., Celery], declare: Callable[..., MemoizedTask], queued: Callable[[Celery], int]
) -> None:
    """There is nobody who could ask for the result."""
    app = make_app(result_backend="disabled://")
    task = declare(app)
    task(21)
    task.delay(21)

    assert queued(app) == 0


def test_a_backend_that_is_away_leaves_it_to_the_worker(
    make_app: Callable[..., Celery],
    declare: Callable[..., MemoizedTask],
    queued: Callable[[Celery], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer could not be read."""
    app = make_app()
    task = declare(app)
    task(21)

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no result backend")

    monkeypatch.setattr(app.backend, "encode", refuse)
    task.delay(21)

    assert queued(app) == 1


def test_who_is_answered_is_told_at_once(app: Celery, declare: Callable[..., MemoizedTask]) -> None:
    """Nothing is asked of Redis, or listened to, for what is known; callbacks run."""
    task = declare(app)
    task(21)
    result = task.delay(21)
    app.backend.forget(result.id)
    told: list[int] = []
    result.then(lambda done: told.append(done.get()))

    assert (told, result.ready(), result.successful(), result.get()) == ([42], True, True, 42)
    assert app.backend.result_consumer.subscribed_to == set()
    result.forget()


@pytest.mark.parametrize("backend", ["redis", "database"])
def test_what_is_stored_is_what_a_worker_stores(
    make_app: Callable[..., Celery],
    declare: Callable[..., MemoizedTask],
    backend: str,
    tmp_path: Path,
) -> None:
    """In any backend, with the call where results are extended; who is answered reads the same as everyone."""
    config = {"result_backend": f"db+sqlite:///{tmp_path / 'results.sqlite3'}"} if backend == "database" else {}
    app = make_app(result_extended=True, **config)
    task = declare(app)
    task(21)
    answered = task.delay(21)
    read = AsyncResult(answered.id, app=app)

    for result in (answered, read):
        assert (result.get(timeout=PATIENCE_S), result.state, result.children or []) == (42, "SUCCESS", [])
        assert (result.name, list(result.args), dict(result.kwargs)) == (task.name, [21], {})
        assert result.date_done is not None
    gc.collect()


def test_a_canvas_of_remembered_tasks_ends(
    worker_app: Celery, worker: WorkController, declare: Callable[..., MemoizedTask], name: str
) -> None:
    """Its tasks have ids that somebody waits for, so a worker completes them."""
    task = declare(worker_app)

    @worker_app.task(name=f"{name}.total")
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    worker.reload()
    for number in (1, 2, 4, 8):
        task(number)

    assert chain(task.s(1), task.s(), task.s()).delay().get(timeout=PATIENCE_S) == 8
    assert group(task.s(1), task.s(1), task.s(2)).delay().get(timeout=PATIENCE_S) == [2, 2, 4]
    assert chord([task.s(1), task.s(1), task.s(4)], total.s()).delay().get(timeout=PATIENCE_S) == 12


def test_a_task_may_send_a_remembered_one(
    worker_app: Celery, worker: WorkController, declare: Callable[..., MemoizedTask], name: str
) -> None:
    """Inside a worker too; the answer is no child of the task that happens to run."""
    task = declare(worker_app)

    @worker_app.task(name=f"{name}.outer", bind=True)
    def outer(self: Task) -> str:
        leaf.delay()
        return str(task.delay(21).id)

    @worker_app.task(name=f"{name}.leaf")
    def leaf() -> None:
        """A child of the outer task."""

    worker.reload()
    task(21)
    inner = AsyncResult(outer.delay().get(timeout=PATIENCE_S), app=worker_app)

    assert (inner.get(timeout=PATIENCE_S), inner.children) == (42, [])
