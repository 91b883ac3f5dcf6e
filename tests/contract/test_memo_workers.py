"""Memoized tasks in worker processes: every canvas ends with the right values, and a killed leader is succeeded.

This file is also what the workers import: the app that the environment names.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import local_nodes
import pytest
from celery import Celery, Task, chain, chord, group
from celery.exceptions import Reject, TaskRevokedError, TimeLimitExceeded
from local_nodes import eventually
from redis import Redis

from petiole import MISS, Cache, Settings, connect, memoized_task
from petiole.cachelib import EmbeddedServer
from petiole.cachelib.guarded import GuardedProcess

LEASE_S = 3.0
FOLDERS = [str(Path(__file__).parent), str(Path(local_nodes.__file__).parent)]
PATIENCE_S = 60.0


def make_app(url: str) -> Celery:
    """The app as workers and senders have it. Each call has a tag, under which its runs are noted in Redis."""
    app = Celery(
        "memos",
        broker=url,
        backend=url,
        set_as_current=False,
        broker_connection_retry_on_startup=True,
        worker_prefetch_multiplier=1,
    )
    notes = Redis.from_url(url, protocol=2, socket_timeout=None)  # a leader waits for ever
    cache = Cache(connect(settings=Settings(url=url, cache_timeout=2)), namespace="memos", lease=LEASE_S)

    def memoized(name: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        return memoized_task(app=app, name=name, cache=cache, bind=True, **options)

    def begin(tag: str) -> int:
        """Note a run; the first one of a tag that is told to stops here, until it is killed."""
        run = int(notes.rpush(f"runs:{tag}", os.getpid()))
        if run == 1 and notes.exists(f"hold:{tag}"):
            notes.blpop(f"never:{tag}")
        return run

    @memoized("double", failures={KeyError: 60})
    def double(self: Task, number: int, tag: str) -> int:
        begin(tag)
        return number * 2

    @memoized("safe", acks_late=True, reject_on_worker_lost=True)
    def safe(self: Task, tag: str) -> dict[str, Any]:
        run = begin(tag)
        notes.incr(f"completed:{tag}")
        return {"run": run, "by": uuid4().hex}

    @memoized("limited", time_limit=1)
    def limited(self: Task, tag: str) -> int:
        return begin(tag)

    @memoized("flaky", autoretry_for=(ConnectionError,), retry_kwargs={"countdown": 0, "max_retries": 5})
    def flaky(self: Task, tag: str) -> int:
        run = begin(tag)
        if run < 3:
            raise ConnectionResetError("not yet")
        return run

    @memoized("retried")
    def retried(self: Task, tag: str) -> int:
        run = begin(tag)
        if run < 3:
            raise self.retry(countdown=0)
        return run

    @memoized("replaced")
    def replaced(self: Task, tag: str) -> None:
        begin(tag)
        raise self.replace(double.si(21, f"{tag}:other"))

    @memoized("failing")
    def failing(self: Task, tag: str) -> int:
        if begin(tag) == 1:
            raise LookupError("the first one fails")
        return 7

    @memoized("rejected", acks_late=True)
    def rejected(self: Task, tag: str) -> int:
        if begin(tag) == 1:
            raise Reject("not this one", requeue=False)
        return 7

    @app.task(name="total", shared=False)
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @app.task(name="hear", shared=False)
    def hear(*heard: Any) -> None:
        notes.rpush(f"heard:{heard[-1]}", str(heard[0]))

    return app


if "MEMO_TEST_URL" in os.environ:
    app = make_app(os.environ["MEMO_TEST_URL"])


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    """Broker, results, memos and notes of this file."""
    server = EmbeddedServer.start("--hz", "100")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def notes(server: EmbeddedServer) -> Iterator[Redis]:
    """What the bodies have noted."""
    with Redis.from_url(server.url, protocol=2, decode_responses=True, socket_timeout=None) as client:
        yield client


@pytest.fixture(scope="module", params=["prefork", pytest.param("solo", marks=pytest.mark.storm)])
def sender(request: pytest.FixtureRequest, server: EmbeddedServer, notes: Redis, tmp_path_factory: Any) -> Any:
    """The app in this process, with a worker process of each pool."""
    log: Path = tmp_path_factory.mktemp("worker") / "worker.log"
    worker = GuardedProcess(
        [sys.executable, "-m", "celery", "-A", "test_memo_workers:app", "worker", f"--pool={request.param}",
         "--concurrency=4", "--loglevel=info", "--without-gossip", "--without-mingle"],
        output=log,
        environment={**os.environ, "PYTHONPATH": os.pathsep.join(FOLDERS), "MEMO_TEST_URL": server.url},
        folder=log.parent,
    )  # fmt: skip
    app = make_app(server.url)
    app.pool_kind = request.param
    try:
        eventually(lambda: " ready." in log.read_text() or not worker.running, f"the worker starts: {log}")
        assert worker.running, log.read_text()[-2_000:]
        yield app
    finally:
        worker.stop(within_s=20)
        gc.collect()
        app.backend.result_consumer.subscribed_to.clear()  # it would try to unsubscribe from a server that is gone
        app.close()
        notes.flushall()


@pytest.fixture
def tag() -> str:
    """What tells the calls of one test from those of another."""
    return uuid4().hex


@pytest.fixture
def runs(notes: Redis) -> Callable[[str], int]:
    """How often the body ran for a tag."""
    return lambda tag: int(notes.llen(f"runs:{tag}"))


Runs = Callable[[str], int]


def test_a_chain_with_duplicates_ends(sender: Celery, tag: str, runs: Runs) -> None:
    """Each link has the value of the one before it, and so has the same chain again."""
    double = sender.tasks["double"]
    links = chain(double.s(2, tag), double.s(tag), double.s(tag), double.si(2, tag))

    assert [links.delay().get(timeout=PATIENCE_S) for _ in range(2)] == [4, 4]
    assert runs(tag) == 3


def test_groups_and_chords_with_duplicates_inside_and_across_end(sender: Celery, tag: str, runs: Runs) -> None:
    """celery-singleton hangs here."""
    double, total = sender.tasks["double"], sender.tasks["total"]
    groups = [group(double.s(n, tag) for n in (1, 2, 1, 1)).delay() for _ in range(2)]
    chords = [chord([double.s(n, tag) for n in (1, 1, 2, 3)], total.s()).delay() for _ in range(2)]
    memoized_body = chord([total.si([1]), total.si([2])], sender.tasks["failing"].si(f"{tag}:never"))

    assert [result.get(timeout=PATIENCE_S) for result in groups] == [[2, 4, 2, 2]] * 2
    assert [result.get(timeout=PATIENCE_S) for result in chords] == [14, 14]
    with pytest.raises(LookupError):
        memoized_body.delay().get(timeout=PATIENCE_S)
    assert memoized_body.delay().get(timeout=PATIENCE_S) == 7
    assert runs(tag) == 3


def test_a_nested_canvas_ends(sender: Celery, tag: str, runs: Runs) -> None:
    """A group in a chain, whose links are remembered or not, and a chord within a group."""
    double, total = sender.tasks["double"], sender.tasks["total"]
    inner = chord([double.s(1, tag), double.s(1, tag)], total.s())
    canvas = chain(double.s(1, tag), group(double.s(tag), double.s(tag)), total.s(), double.s(tag))

    assert canvas.delay().get(timeout=PATIENCE_S) == 16
    assert group(inner, inner, double.s(8, tag)).delay().get(timeout=PATIENCE_S) == [4, 4, 16]
    assert runs(tag) == 3


def test_callbacks_and_errbacks_fire_for_what_is_remembered(sender: Celery, tag: str, notes: Redis) -> None:
    """As after any task."""
    double, hear = sender.tasks["double"], sender.tasks["hear"]
    for _ in range(2):
        double.apply_async((2, tag), link=hear.s(tag)).get(timeout=PATIENCE_S)
    with pytest.raises(LookupError):
        sender.tasks["failing"].apply_async((f"{tag}:first",), link_error=hear.si("failed", tag)).get(
            timeout=PATIENCE_S
        )

    heard = [notes.blpop([f"heard:{tag}"], timeout=int(PATIENCE_S)) for _ in range(3)]
    assert sorted(value for _, value in heard) == ["4", "4", "failed"]


@pytest.mark.parametrize("task", ["flaky", "retried"])
def test_retries_run_and_what_they_end_in_is_remembered(sender: Celery, tag: str, runs: Runs, task: str) -> None:
    """By hand and automatic."""
    results = [sender.tasks[task].delay(tag) for _ in range(3)]

    assert [result.get(timeout=PATIENCE_S) for result in results] == [3, 3, 3]
    assert runs(tag) == 3


def test_a_replaced_task_completes_as_the_one_in_its_place(sender: Celery, tag: str, runs: Runs) -> None:
    """It has no result of its own to remember; that of the other is."""
    assert [sender.tasks["replaced"].delay(tag).get(timeout=PATIENCE_S) for _ in range(2)] == [42, 42]
    assert (runs(tag), runs(f"{tag}:other")) == (2, 1)


def test_a_rejected_run_is_not_remembered(sender: Celery, tag: str, runs: Runs) -> None:
    """The next one runs."""
    task = sender.tasks["rejected"]
    with pytest.raises(Reject):
        task.delay(tag).get(timeout=PATIENCE_S)

    assert task.delay(tag).get(timeout=PATIENCE_S) == 7


def test_expired_and_revoked_calls_leave_the_others_alone(sender: Celery, tag: str, runs: Runs) -> None:
    """They do not run, nothing is remembered of them, and the next call runs."""
    double, revoked = sender.tasks["double"], uuid4().hex
    expired = double.apply_async((1, tag), expires=datetime(2020, 1, 1, tzinfo=UTC))
    sender.control.broadcast("revoke", arguments={"task_id": [revoked]}, reply=True, limit=1, timeout=PATIENCE_S)
    for result in (expired, double.apply_async((1, tag), task_id=revoked)):
        with pytest.raises(TaskRevokedError):
            result.get(timeout=PATIENCE_S)

    assert (runs(tag), double.peek(1, tag)) == (0, MISS)
    assert double.delay(1, tag).get(timeout=PATIENCE_S) == 2


def test_a_task_that_is_sent_by_name_shares_the_memo(sender: Celery, tag: str, runs: Runs) -> None:
    """By who knows nothing but the name, with arguments of his own making."""
    values = [sender.send_task("double", kwargs={"tag": tag, "number": 4}), sender.tasks["double"].delay(4, tag)]

    assert [result.get(timeout=PATIENCE_S) for result in values] == [8, 8]
    with pytest.raises(TypeError, match="missing a required argument: 'tag'"):
        sender.send_task("double", (1,)).get(timeout=PATIENCE_S)
    assert runs(tag) == 1


def test_the_failure_of_a_leader_does_not_fail_its_followers(sender: Celery, tag: str, runs: Runs) -> None:
    """One of them runs, and the others have its result."""
    results = [sender.tasks["failing"].delay(tag) for _ in range(8)]
    values = [result.get(timeout=PATIENCE_S, propagate=False) for result in results]

    assert sorted(map(str, values)) == ["7"] * 7 + ["the first one fails"]
    assert runs(tag) == 2


# What follows kills a child of the worker, as only one pool has them.
of_prefork = pytest.mark.parametrize("sender", ["prefork"], indirect=True)


@of_prefork
@pytest.mark.parametrize("how", ["time limit", "revoked"])
def test_a_leader_that_is_ended_is_succeeded(sender: Celery, tag: str, notes: Redis, runs: Runs, how: str) -> None:
    """Its own task ends as told; a follower runs, after the cache's lease at most."""
    notes.set(f"hold:{tag}", 1)
    task = sender.tasks["limited" if how == "time limit" else "safe"]
    leader = task.delay(tag)
    eventually(lambda: runs(tag), "the leader has begun")
    follower = task.delay(tag)
    if how == "revoked":
        sender.control.revoke(leader.id, terminate=True, signal="SIGKILL")
    with pytest.raises(TimeLimitExceeded if how == "time limit" else TaskRevokedError):
        leader.get(timeout=PATIENCE_S)

    if how == "revoked":
        assert follower.get(timeout=PATIENCE_S)["run"] == 2
    else:  # which may have been told to end as well, while it waited
        values = [task.delay(tag).get(timeout=PATIENCE_S, propagate=False) for _ in range(3)]
        assert values[-1] == runs(tag) > 1
