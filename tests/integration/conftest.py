"""Celery in this process: a worker that the tests of this directory share, and apps that have none.

The shared worker runs its tasks in threads of this process, so a test can hold a task's body at an event and look
at what it did. Apps without a worker use a database and a queue of their own: what is sent stays there, and can be
looked at.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from threading import Event, Semaphore
from typing import Any

import pytest
from celery import Celery, _state, signals
from celery.contrib.testing.app import TestApp as AppForTests
from celery.contrib.testing.app import setup_default_app
from celery.worker import WorkController

from petiole.cachelib import EmbeddedServer

PATIENCE_S = 20.0  # for what has to happen; a test that waits so long has failed

# Celery 5.7 stores results with a call that redis-py 8.1 deprecates. In a thread of the worker it would be an error.
CELERYS_OWN_WARNING = "ignore:Call to deprecated setex:DeprecationWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here may have a worker's threads beside it."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(CELERYS_OWN_WARNING))


@pytest.fixture(scope="session")
def celery_config(redis_server: EmbeddedServer, _logging_is_left_alone: None) -> dict[str, Any]:
    """Broker and results on the server that the tests share."""
    return {
        "broker_url": redis_server.url,
        "result_backend": redis_server.url,
        "broker_connection_retry_on_startup": True,
        "worker_hijack_root_logger": False,
        "result_expires": 300,
    }


@pytest.fixture(scope="session")
def celery_includes() -> list[str]:
    """The task by which the worker is asked whether it is there."""
    return ["celery.contrib.testing.tasks"]


@pytest.fixture(scope="session")
def celery_worker_pool() -> str:
    """Threads: several tasks at once, and all of them in sight."""
    return "threads"


@pytest.fixture(scope="session")
def celery_worker_parameters() -> dict[str, Any]:
    """Four at once."""
    return {"concurrency": 4}


@pytest.fixture
def worker(celery_session_worker: WorkController) -> WorkController:
    """The worker that the tests share; ``worker.reload()`` tells it of tasks that a test has declared."""
    return celery_session_worker


@pytest.fixture(scope="session")
def _results_are_let_go(celery_session_app: Celery) -> Iterator[None]:
    """A result that is collected after its server has stopped would try to unsubscribe, for twenty seconds."""
    yield
    gc.collect()
    celery_session_app.backend.result_consumer.subscribed_to.clear()


@pytest.fixture
def worker_app(celery_session_app: Celery, _results_are_let_go: None) -> Iterator[Celery]:
    """The app of the shared worker. What a test declared for every app is forgotten afterwards."""
    finalizers, schedule = set(_state._on_app_finalizers), dict(celery_session_app.conf.beat_schedule)
    yield celery_session_app
    _state._on_app_finalizers = finalizers
    celery_session_app.conf.beat_schedule = schedule


@pytest.fixture
def make_app(redis_server: EmbeddedServer, name: str) -> Iterator[Callable[..., Celery]]:
    """Makes apps that no worker serves, with a queue of the test's own."""
    url = redis_server.url.removesuffix("/0") + "/1"

    made: list[Celery] = []

    def make(**config: Any) -> Celery:
        config = {"broker_url": url, "result_backend": url, "task_default_queue": name, **config}
        made.append(AppForTests(set_as_current=False, config=config))
        return made[-1]

    anchor = AppForTests(set_as_current=False, config={"broker_url": url})
    with setup_default_app(anchor):  # puts back afterwards what apps and shared tasks change for all
        yield make
    for app in made:
        app.close()


@pytest.fixture
def app(make_app: Callable[..., Celery]) -> Celery:
    """An app that no worker serves."""
    return make_app()


@pytest.fixture
def sent(name: str) -> Callable[[Celery], list[dict[str, Any]]]:
    """Takes the messages from an app's queue: the keyword arguments of each, in the order of their sending."""

    def take(app: Celery) -> list[dict[str, Any]]:
        taken = []
        with app.connection_for_read() as connection:
            queue = connection.SimpleQueue(name)
            while True:
                try:
                    message = queue.get(block=False)
                except Empty:
                    break
                message.ack()
                taken.append(message.payload[1])
            queue.close()
        return taken

    return take


@pytest.fixture
def ended() -> Iterator[Callable[[str], Semaphore]]:
    """Semaphores that count the runs of a task that have ended, however they did."""
    semaphores: dict[str, Semaphore] = {}

    def release(sender: Any = None, **_: Any) -> None:
        if sender.name in semaphores:
            semaphores[sender.name].release()

    signals.task_postrun.connect(release, weak=False)
    yield lambda task: semaphores.setdefault(task, Semaphore(0))
    signals.task_postrun.disconnect(release)


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Waits for something that no event tells of, and fails when it does not come."""

    def wait(holds: Callable[[], object]) -> None:
        looks = int(PATIENCE_S / 0.01)
        pause = Event()
        assert any(holds() or pause.wait(0.01) for _ in range(looks)), "it did not happen"

    return wait
