"""Refreshes of memoized tasks: the very task, sent under the lease of the reader who noticed."""

from collections.abc import Callable, Iterator
from queue import Empty, Queue
from typing import Any

import pytest
from celery import Celery, Task, signals
from celery.worker import WorkController

from petiole import MISS, Cache, memoized_task
from petiole.cachelib.keys import lease
from petiole.coordination import MemoizedTask
from petiole.coordination.memo_refresh import header

PATIENCE_S = 20.0


class Runs:
    """Notes each run of a task's body: with which arguments, and as which message."""

    def __init__(self) -> None:
        self.calls: Queue[Any] = Queue()
        self.count = 0

    def __call__(self, task: Task, call: Any) -> int:
        self.count += 1
        self.calls.put((call, task.request.called_directly))
        return self.count


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture
def declare(cache: Cache, name: str, runs: Runs) -> Callable[..., MemoizedTask]:
    """A memoized task of an app, whose result is served stale for long."""

    def make(app: Celery, body: Callable[[Task, str], Any] | None = None, **options: Any) -> MemoizedTask:
        @memoized_task(app=app, bind=True, **{"cache": cache, "name": f"{name}.report", "stale": 600, **options})
        def report(self: Task, region: str, year: int = 2024) -> Any:
            return runs(self, region) if body is None else body(self, region)

        return report

    return make


@pytest.fixture
def messages(name: str) -> Callable[[Celery], list[Any]]:
    """Takes the messages from an app's queue."""

    def take(app: Celery) -> list[Any]:
        taken = []
        with app.connection_for_read() as connection:
            queue = connection.SimpleQueue(name)
            while True:
                try:
                    taken.append(queue.get(block=False))
                except Empty:
                    break
                taken[-1].ack()
            queue.close()
        return taken

    return take


@pytest.fixture
def states(name: str) -> Iterator["Queue[str]"]:
    """In which state each run of this test's tasks ended."""
    queue: Queue[str] = Queue()

    def note(sender: Any = None, state: str = "", **_: Any) -> None:
        if sender.name.startswith(name):
            queue.put(state)

    signals.task_postrun.connect(note, weak=False)
    yield queue
    signals.task_postrun.disconnect(note)


def make_stale(task: MemoizedTask, *arguments: Any) -> None:
    """As if its TTL had passed."""
    assert task.memo is not None
    assert task.memo.cache.expire(task.key(*arguments))


def work_off(task: MemoizedTask, message: Any) -> Any:
    """What a worker does with a message, as far as the body and its request go."""
    arguments, keywords, _ = message.payload
    return task.apply(arguments, keywords, headers=message.headers, throw=True).get()


def test_a_stale_result_is_returned_at_once_and_a_worker_makes_a_new_one(
    worker_app: Celery, worker: WorkController, declare: Callable[..., MemoizedTask], runs: Runs, until: Any
) -> None:
    """The one who notices does not wait."""
    task = declare(worker_app)
    worker.reload()
    assert task("north") == 1
    make_stale(task, "north")

    assert task.delay("north").get(timeout=PATIENCE_S) == 1
    until(lambda: task.peek("north") == 2)
    assert [runs.calls.get(timeout=PATIENCE_S) for _ in range(2)] == [("north", True), ("north", False)]
    assert task.delay("north").get(timeout=PATIENCE_S) == 2
    assert {name: count for name, count in task.memo_stats().items() if count} == {"runs": 2, "hits": 2, "refreshes": 1}


def test_however_many_notice_one_refresh_is_sent(
    app: Celery, declare: Callable[..., MemoizedTask], messages: Callable[[Celery], list[Any]], runs: Runs
) -> None:
    """Whoever has the lease sends; the message is one of the task itself, and expires with the lease."""
    task = declare(app, time_limit=77)
    task("north")
    make_stale(task, "north")

    assert [task("north") for _ in range(5)] == [1] * 5
    (message,) = messages(app)
    assert message.headers["task"] == task.name
    assert message.headers["expires"] is not None
    assert message.headers["ignore_result"] is True
    assert runs.count == 1
    work_off(task, message)
    assert (task.peek("north"), task("north"), runs.count) == (2, 2, 2)


@pytest.mark.parametrize("when", ["before the worker", "during the run"])
def test_an_invalidation_wins_over_a_refresh(
    app: Celery, declare: Callable[..., MemoizedTask], messages: Callable[[Celery], list[Any]], when: str
) -> None:
    """What was asked for before it is not remembered, however late it comes."""
    ran: list[str] = []

    def body(self: Task, region: str) -> int:
        ran.append(region)
        if len(ran) == 2:
            task.invalidate(region)
        return len(ran)

    task = declare(app, body)
    task("north")
    make_stale(task, "north")
    task("north")
    (message,) = messages(app)
    if when == "before the worker":
        task.invalidate("north")
    work_off(task, message)

    assert len(ran) == (1 if when == "before the worker" else 2)
    assert task.peek("north") is MISS


def test_a_result_is_refreshed_early(
    app: Celery, declare: Callable[..., MemoizedTask], messages: Callable[[Celery], list[Any]], cache: Cache
) -> None:
    """Once the share of its TTL has passed, the fresh result is returned and a refresh is sent."""
    task = declare(app, ttl=1_000, stale=0, early=0.5)
    task("north")
    assert task("north") == 1
    assert messages(app) == []
    cache.redis.coordination.pexpire(cache.keys.entry(task.key("north")), 400_000)

    assert [task("north"), task("north")] == [1, 1]
    (message,) = messages(app)
    work_off(task, message)
    assert task.peek("north") == 2


def test_a_broker_that_is_away_costs_one_try_per_lease(
    make_app: Callable[..., Celery],
    declare: Callable[..., MemoizedTask],
    cache: Cache,
    runs: Runs,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who reads within the lease is returned the stale result alone; who reads after it asks the broker again."""
    task = declare(make_app(broker_url="redis://127.0.0.1:1/0"))
    task("north")
    make_stale(task, "north")
    with caplog.at_level("WARNING", "petiole"):
        assert [task("north") for _ in range(3)] == [1, 1, 1]
        assert caplog.text.count("was not sent") == 1
        cache.redis.coordination.unlink(lease(cache.keys.entry(task.key("north"))))
        assert task("north") == 1

    assert caplog.text.count("was not sent") == 2
    assert (runs.count, task.memo_stats()["refreshes"]) == (1, 0)


def test_refresh_sends_the_task_and_its_result_is_the_new_one(
    worker_app: Celery, worker: WorkController, declare: Callable[..., MemoizedTask]
) -> None:
    """Also where there is a fresh one, and where there is none."""
    task = declare(worker_app, key="{region}")
    worker.reload()

    assert [task.refresh("north").get(timeout=PATIENCE_S) for _ in range(2)] == [1, 2]
    assert task.refresh(region="north").get(timeout=PATIENCE_S) == 3
    assert task.delay("north").get(timeout=PATIENCE_S) == 3


def test_a_refresh_that_is_retried_goes_on_as_one(
    worker_app: Celery, worker: WorkController, declare: Callable[..., MemoizedTask], states: "Queue[str]", until: Any
) -> None:
    """The lease has gone back with the retry; the next attempt takes one of its own."""
    ran: list[str] = []

    def body(self: Task, region: str) -> str:
        ran.append(region)
        if len(ran) == 2:
            raise self.retry(countdown=0)
        return ["old", "", "new"][len(ran) - 1]

    task = declare(worker_app, body)
    worker.reload()
    task("north")
    make_stale(task, "north")

    assert task.delay("north").get(timeout=PATIENCE_S) == "old"
    until(lambda: task.peek("north") == "new")
    assert sorted(states.get(timeout=PATIENCE_S) for _ in range(3)) == ["RETRY", "SUCCESS", "SUCCESS"]


def test_a_retry_that_is_faster_than_its_attempt_waits_for_the_lease(
    worker_app: Celery, worker: WorkController, declare: Callable[..., MemoizedTask], cache: Cache, until: Any
) -> None:
    """It is sent before the attempt ends, and another thread or process may have it at once."""
    ran: list[str] = []

    def body(self: Task, region: str) -> str:
        ran.append(region)
        if len(ran) == 2:
            retry = self.retry(countdown=0, throw=False)
            held = lease(cache.keys.entry(task.key(region)))
            until(lambda: int(cache.redis.coordination.hget(held, "waiting") or 0) > 0)
            raise retry
        return ["old", "", "new"][len(ran) - 1]

    task = declare(worker_app, body)
    worker.reload()
    task("north")
    make_stale(task, "north")

    assert task.delay("north").get(timeout=PATIENCE_S) == "old"
    until(lambda: task.peek("north") == "new")
    assert len(ran) == 3


def test_the_header_of_another_task_means_nothing(app: Celery, declare: Callable[..., MemoizedTask]) -> None:
    """Whoever hands headers on from task to task makes no refreshes."""
    task = declare(app)

    assert task.apply(("north",), headers=header("another", "x" * 16)).get() == 1
    assert task.apply(("north",), headers=header("another")).get() == 1


def test_a_refresh_that_is_replaced_stores_nothing(
    worker_app: Celery,
    worker: WorkController,
    declare: Callable[..., MemoizedTask],
    cache: Cache,
    name: str,
    states: "Queue[str]",
) -> None:
    """It ends as that other task, which is no refresh."""
    ran: list[str] = []

    @memoized_task(app=worker_app, cache=cache, name=f"{name}.other")
    def other(region: str) -> str:
        return f"{region} of the other"

    def body(self: Task, region: str) -> str:
        ran.append(region)
        if len(ran) > 1:
            raise self.replace(other.si("x"))
        return "old"

    task = declare(worker_app, body)
    worker.reload()
    task("north")
    make_stale(task, "north")
    assert task.delay("north").get(timeout=PATIENCE_S) == "old"

    assert sorted(states.get(timeout=PATIENCE_S) for _ in range(3)) == ["IGNORED", "SUCCESS", "SUCCESS"]
    assert task.peek("north") == "old"
    assert other.peek("x") == "x of the other"
