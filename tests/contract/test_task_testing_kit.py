"""``petiole.testing`` against a server: time that a test moves, and tasks that are parked, seen, sent and forgotten.

What a worker would do with a message is done here, in the test's own thread: so a test says when.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from queue import Empty
from threading import Event
from typing import Any

import pytest
from celery import Celery, Task
from celery.contrib.testing.worker import start_worker
from celery.worker.request import Request
from click.testing import CliRunner

from petiole import (
    MISS,
    Cache,
    Connections,
    Lock,
    RateLimit,
    RateLimiter,
    Semaphore,
    Settings,
    Unique,
    connect,
    coordinated_task,
    memoized_task,
)
from petiole.cachelib import EmbeddedServer
from petiole.coordination import DuplicateTask, memoize, passing
from petiole.coordination import Pause as Pausing
from petiole.tasks.cli import petiole
from petiole.testing import Waiting, clear, closed_gates, moving_clock, no_memo, open_gates, parked, pump

PATIENCE_S = 20.0


@pytest.fixture
def app(name: str, redis: Connections) -> Iterator[Celery]:
    """An app whose broker is the memory of this process. What its tasks leave behind is forgotten."""
    app = Celery(name, set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.task_default_queue = name
    yield app
    clear(app)
    app.close()


@pytest.fixture
def work(app: Celery, name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Does what a worker does with the messages that are there: how many they were."""
    # as a worker that wakes what it parks
    monkeypatch.setattr(passing, "is_guarded", lambda *_: True)
    monkeypatch.setattr(memoize, "is_guarded", lambda *_: True)

    def work() -> int:
        done = 0
        with app.connection_for_read() as connection:
            for place in (name, f"{name}.woken"):
                queue = connection.SimpleQueue(place)
                with suppress(Empty):
                    while True:
                        message = queue.get(block=False)
                        Request(message, app=app, on_ack=lambda *_: None).execute()
                        message.ack()
                        done += 1
                queue.close()
        return done

    return work


@pytest.fixture
def ran() -> list[Any]:
    """What the bodies of tasks have noted."""
    return []


@pytest.fixture
def locked(app: Celery, redis: Connections, ran: list[Any], name: str) -> Task:
    """A task that needs a lock."""

    @coordinated_task(app=app, redis=redis, lock=name + ":{account}")
    def charge(account: int, how: str = "") -> None:
        ran.append(account)

    return charge


def declare(app: Celery, redis: Connections, ran: list[Any], **options: Any) -> Task:
    @coordinated_task(app=app, redis=redis, **options)
    def note(what: int = 0) -> None:
        ran.append(what)

    return note


# The clock

LIMITS = [
    RateLimit("10/d"),
    RateLimit("10/d", burst=1),
    RateLimit("10/d").of_calls(),
    RateLimit.at_most("10/d"),
    RateLimit.exact("10/d"),
    RateLimit.bucketed("10/d"),
    RateLimit.fixed("10/d"),
    RateLimit.fixed("10/d", aligned=False),
    RateLimit.concurrent(10, lease="1h"),
]


def until_refused(limiter: RateLimiter) -> float:
    for _ in range(20):
        answer = limiter.hit("7")
        if not answer:
            return float(answer.retry_after)  # type: ignore[union-attr]
    raise AssertionError("nothing refuses")


@pytest.mark.parametrize("limit", LIMITS, ids=repr)
def test_a_limit_that_is_exhausted_admits_again_when_its_time_has_been_advanced(
    redis: Connections, name: str, limit: RateLimit
) -> None:
    limiter = RateLimiter(redis, name, [limit])

    with moving_clock(redis) as clock:
        clock.advance(86_401 - clock.now().timestamp() % 86_400)  # a day begins
        retry_after = until_refused(limiter)
        clock.advance(retry_after / 2)
        short = limiter.hit("7")
        clock.advance("1d")
        after = limiter.hit("7")

    assert not short
    assert after


def test_the_clock_says_how_far_it_was_moved(redis: Connections) -> None:
    with moving_clock(redis) as clock:
        before = clock.now()
        clock.advance("1d")
        clock.advance(0.5)
        passed = clock.now() - before
        same = moving_clock(redis)
        with same as other:
            other.advance("1h")
        later = clock.now() - before
    with moving_clock(redis) as again:
        put_back = again.now() - before

    assert timedelta(days=1, seconds=0.5) <= passed < timedelta(days=1, minutes=5)
    assert later >= passed + timedelta(hours=1)
    assert put_back < timedelta(minutes=5)


def test_a_clock_is_put_back_after_an_exception_and_moves_no_more(redis: Connections, name: str) -> None:
    limiter = RateLimiter(redis, name, [RateLimit("1/h")])

    with suppress(KeyError), moving_clock(redis) as clock:
        clock.advance("2h")
        assert limiter.hit("7")
        raise KeyError

    assert until_refused(limiter) > 2 * 3_600, "what was written is two hours ahead"
    with pytest.raises(RuntimeError, match="put back"):
        clock.advance(1)
    assert redis.coordination.keys("petiole:*testing*") == []


@pytest.mark.parametrize("by", [0, -1, "soon"])
def test_time_goes_forward_or_not_at_all(redis: Connections, by: Any) -> None:
    with moving_clock(redis) as clock, pytest.raises(ValueError, match="by="):
        clock.advance(by)


def test_what_was_made_before_sees_the_moved_time_and_what_was_made_in_it_the_servers_afterwards(
    redis: Connections, name: str
) -> None:
    """A limiter keeps its script packed."""
    before = RateLimiter(redis, name, [RateLimit("1/h")])
    assert before.hit("7")

    with moving_clock(redis) as clock:
        during = RateLimiter(redis, name, [RateLimit("1/h")])
        assert not before.hit("7")
        assert not during.hit("7")
        clock.advance("1h")
        assert before.hit("7")
        retry_after = until_refused(during)
    behind = [until_refused(limiter) for limiter in (before, during)]

    assert all(left > retry_after + 3_000 for left in behind), "their time is an hour ahead of the server's"


def test_the_lease_of_a_lock_runs_out(redis: Connections, name: str) -> None:
    with moving_clock(redis) as clock:
        held = Lock(redis, name, ttl="10m").acquire()
        assert not Lock(redis, name, ttl="10m").try_acquire()
        clock.advance("10m")
        successor = Lock(redis, name, ttl="10m").try_acquire()
        assert successor
        assert successor.fence > held.fence
        assert not held.release()
        successor.release()


def test_a_cached_value_goes_stale_and_ends(redis: Connections, name: str) -> None:
    cache = Cache(redis, namespace=name)
    versions = iter(range(10))

    def read() -> int:
        return int(cache.get_or_set("key", lambda: next(versions), ttl="1m", stale="1m", refresh="inline"))

    with moving_clock(redis) as clock:
        assert (read(), read()) == (0, 0)
        clock.advance("30s")
        left_s = cache.ttl("key")
        assert left_s is not None
        assert left_s <= 30
        clock.advance("31s")
        assert cache.get("key") == 0
        assert (read(), read()) == (1, 1)
        clock.advance("2m")
        assert cache.get("key") is None


def test_only_keys_of_ours_that_have_a_ttl_end_sooner(redis: Connections, name: str) -> None:
    client = redis.coordination
    theirs, without = f"{name}:theirs", f"petiole:1:buffer:{{{name}}}"
    client.set(theirs, "x", ex=60)
    client.set(without, "x")
    try:
        with moving_clock(redis) as clock:
            clock.advance("1h")
        assert client.ttl(theirs) > 0
        assert client.ttl(without) == -1
    finally:
        client.delete(theirs, without)


def test_the_time_of_a_cluster_is_not_moved() -> None:
    """Nobody is asked for that."""
    with (
        connect(settings=Settings(url="redis+cluster://127.0.0.1:1")) as clustered,
        pytest.raises(ValueError, match="Cluster"),
        moving_clock(clustered),
    ):
        pytest.fail("it has no time of its own")


def test_a_claim_ends_when_its_time_has_been_advanced(app: Celery, redis: Connections, ran: list[Any]) -> None:
    note = declare(app, redis, ran, unique=Unique(until="10m", on_conflict="raise"))

    with moving_clock(redis) as clock:
        note.delay(1)
        with pytest.raises(DuplicateTask):
            note.delay(1)
        clock.advance("10m")
        note.delay(1)


def test_a_parked_task_gets_due(app: Celery, redis: Connections, work: Callable[[], int], ran: list[Any]) -> None:
    note = declare(app, redis, ran, rate="1/m")

    with moving_clock(redis) as clock:
        for what in range(3):
            note.delay(what)
        work()
        assert ran == [0]
        assert [(one.args, one.gate[:8]) for one in parked(app)] == [((1,), "rate 1/m"), ((2,), "rate 1/m")]
        clock.advance("30s")
        assert pump(app) == 0
        clock.advance("30s")
        assert pump(app) == 1
        assert work() == 1
        clock.advance("1m")
        assert (pump(app), work()) == (1, 1)

    assert ran == [0, 1, 2]
    assert parked(app) == []


def test_a_pause_ends(app: Celery, redis: Connections, work: Callable[[], int], ran: list[Any]) -> None:
    note = declare(app, redis, ran, debounce=Pausing("5m"))

    with moving_clock(redis) as clock:
        note.delay(1)
        note.delay(2)
        work()
        clock.advance("4m")
        pump(app), work()  # the first one ends, with nothing
        assert ran == []
        clock.advance("1m")
        pump(app), work()

    assert ran == [2]


@pytest.fixture
def embedded(app: Celery) -> Iterator[Callable[[], Any]]:
    """Starts a worker in threads of this process, and stops it."""

    workers: list[Any] = []

    def start() -> Any:
        workers.append(start_worker(app, pool="threads", concurrency=2, perform_ping_check=False))
        return workers[-1].__enter__()

    yield start
    for worker in reversed(workers):
        worker.__exit__(None, None, None)


def test_a_running_pump_looks_at_once_when_the_clock_is_moved(
    app: Celery, redis: Connections, embedded: Callable[[], Any]
) -> None:
    started: list[int] = []
    each = Event()

    @coordinated_task(app=app, redis=redis, rate="1/h")
    def note(what: int) -> None:
        started.append(what)
        each.set()

    with moving_clock(redis) as clock:
        embedded()
        note.delay(0)
        note.delay(1)
        assert each.wait(PATIENCE_S)
        pause = Event()
        assert any(parked(app) or pause.wait(0.01) for _ in range(int(PATIENCE_S / 0.01)))
        each.clear()
        clock.advance("1h")
        assert each.wait(PATIENCE_S)

    assert sorted(started) == [0, 1]


def test_pumps_are_told_when_the_clock_is_moved(app: Celery, redis: Connections, locked: Task) -> None:
    with redis.coordination.pubsub() as listener, moving_clock(redis) as clock:
        listener.subscribe(locked.lot.keys.channel)
        assert listener.get_message(timeout=PATIENCE_S)["type"] == "subscribe"
        clock.advance("1h")
        assert listener.get_message(timeout=PATIENCE_S)["data"] == b"due"


# The page


def test_the_examples_of_the_page_run_as_they_stand(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "test_page.py").write_text("\n".join(blocks), "utf-8")

    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_page.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout
    assert f"{page.count('def test_')} passed" in done.stdout


# Gates


def test_an_embedded_worker_finds_the_gates_open(app: Celery, redis: Connections, embedded: Callable[[], Any]) -> None:
    done = Event()

    @coordinated_task(app=app, redis=redis, bind=True, lock="a:{a}")
    def look(self: Any, a: int) -> None:
        self.admission.raise_if_lost()
        done.set()

    with Lock(redis, "a:1"), open_gates() as gates:
        embedded()
        look.delay(1)
        assert done.wait(PATIENCE_S)

    assert [call.gates for call in gates.of(look)] == [["lock 'a:1'"]]


def test_what_comes_to_a_closed_gate_is_parked_until_it_is_open(
    app: Celery, redis: Connections, locked: Task, work: Callable[[], int], ran: list[Any], name: str
) -> None:
    with closed_gates("lock *") as gates:
        sent = [locked.delay(7), locked.delay(account=7, how="fast"), locked.delay(7), locked.delay(7), locked.delay(8)]
        assert work() == 5
        assert pump(app) == 0
        waiting = parked(app)
        assert {one.gate for one in waiting} == {f"lock '{name}:7'", f"lock '{name}:8'"}
        assert Waiting(sent[1].id, locked.name, (), {"account": 7, "how": "fast"}, f"lock '{name}:7'", False) in waiting
        with Lock(redis, f"{name}:7").try_acquire() as held:
            assert held, "the lock itself is free"
    assert ran == []

    assert pump(app) == 5
    assert work() == 5
    assert sorted(ran) == [7, 7, 7, 7, 8]
    assert len(gates.calls) == 5
    assert parked(app) == []


def test_gates_that_are_closed_again_refuse_those_who_were_let_go(
    app: Celery, locked: Task, work: Callable[[], int], ran: list[Any]
) -> None:
    with closed_gates():
        locked.delay(7)
        work()
    with closed_gates():
        assert pump(app) == 1
        assert work() == 1
        assert (ran, len(parked(app))) == ([], 1)
    assert (pump(app), work(), ran) == (1, 1, [7])


def test_a_closed_rate_does_not_use_it_up(
    app: Celery, redis: Connections, work: Callable[[], int], ran: list[Any]
) -> None:
    note = declare(app, redis, ran, rate="1/h")

    with closed_gates("rate *"):
        note.delay(1)
        work()
    assert (pump(app), work(), ran) == (1, 1, [1])


def test_a_line_of_a_closed_gate_is_as_long_as_the_task_says(
    app: Celery, redis: Connections, work: Callable[[], int], ran: list[Any]
) -> None:
    note = declare(app, redis, ran, concurrency=9, max_parked=1, when_full="drop_oldest")

    with closed_gates():
        note.delay(1)
        note.delay(2)
        work()
    pump(app), work()

    assert ran == [2]


def test_a_gate_that_was_not_named_is_asked_as_ever(
    app: Celery, redis: Connections, locked: Task, work: Callable[[], int], ran: list[Any], name: str
) -> None:
    with closed_gates("rate *") as gates, Lock(redis, f"{name}:7"):
        locked.delay(7)
        locked.delay(8)
        work()
        assert [one.args for one in parked(app)] == [(7,)]

    assert ran == [8]
    assert gates.calls == []


def test_a_delivered_call_without_its_memo_runs_always(
    app: Celery, redis: Connections, work: Callable[[], int], ran: list[Any], name: str
) -> None:
    @memoized_task(app=app, cache=Cache(redis, namespace=name), ttl="5m")
    def report(region: str) -> str:
        ran.append(region)
        return region

    with no_memo():
        report.delay("north"), report.delay("north")
        assert work() == 2
    assert ran == ["north"] * 2
    assert report.peek("north") is MISS
    report.delay("north"), report.delay("north")
    assert work() == 2
    assert ran == ["north"] * 3


# What is parked


def test_a_pass_sends_what_may_run_and_no_more(
    app: Celery, redis: Connections, locked: Task, work: Callable[[], int], ran: list[Any], name: str
) -> None:
    with Lock(redis, f"{name}:7"):
        for _ in range(3):
            locked.delay(7)
        work()
        assert pump(app) == 0
    passes = [(pump(app), work()) for _ in range(4)]

    assert passes == [(1, 1), (1, 1), (1, 1), (0, 0)]
    assert ran == [7, 7, 7]


def test_what_is_parked_is_told_in_the_order_in_which_it_may_go(
    app: Celery, redis: Connections, work: Callable[[], int], ran: list[Any]
) -> None:
    note = declare(app, redis, ran, concurrency=1)

    with Semaphore(redis, note.name, permits=1).acquire():
        for what in range(10):
            note.delay(what)
        work()
        assert [one.args for one in parked(app)] == [(what,) for what in range(10)]


def told(redis_server: EmbeddedServer, *arguments: str) -> list[str]:
    """What ``petiole parked`` prints."""
    done = CliRunner().invoke(petiole, ["parked", "--url", redis_server.url, *arguments])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_the_command_tells_of_parked_calls_what_they_wait_for_and_their_arguments(
    app: Celery, redis: Connections, redis_server: EmbeddedServer, locked: Task, work: Callable[[], int], name: str
) -> None:
    assert told(redis_server) == [f"nothing is parked at {redis_server.url}"]
    with Lock(redis, f"{name}:7").acquire() as held:
        sent = [locked.delay(7), locked.delay(account=7, how="x" * 500)]
        hidden = locked.apply_async([7], argsrepr="(***)\n\x1b", kwargsrepr="{}")
        assert work() == 3
        found = told(redis_server)
        assert told(redis_server, name) == found
        assert told(redis_server, f"{name}x") == [f"{name}x: nothing is parked; of {name} there is"]
        arguments = {"account": 7, "how": "x" * 500}
        long = f"{locked.name} {arguments}"[:120]
        waits = f"retry 0, waits for lock '{name}:7'"
        assert found[:2] == [f"{name}: 3 parked", f"       3 at lock '{name}:7'"]
        assert sorted(found[2:]) == sorted(
            [
                f"  {sent[0].id}: {locked.name} (7,), {waits}",
                f"  {sent[1].id}: {long} ..., {waits}",
                f"  {hidden.id}: {locked.name} (***) ?, {waits}",
            ]
        )
        held.release()
    assert pump(app) == 1
    assert [line for line in told(redis_server, name) if line.endswith("retry 0, is on its way to a worker")]


def test_nothing_is_left_of_an_app_that_was_cleared(
    app: Celery, redis: Connections, locked: Task, work: Callable[[], int], ran: list[Any], name: str
) -> None:
    note = declare(app, redis, ran, unique=Unique(until="end", on_conflict="drop"))
    note.delay(1)
    held = Lock(redis, f"{name}:7").acquire()
    for _ in range(2):
        locked.delay(7)
    work()
    held.release()
    assert pump(app) == 1  # to whom the lock was handed
    left_alone = Lock(redis, f"{name}:8").acquire()
    assert not Lock(redis, f"{name}:7").try_acquire()

    clear(app)

    assert parked(app) == []
    assert not left_alone.lost
    assert left_alone.release()
    with Lock(redis, f"{name}:7").try_acquire() as free:
        assert free
    work()
    assert ran == [1], "what lay in the broker is stale"
    leftover = redis.coordination.keys(f"petiole:1:parked:*{name}*")
    assert leftover == []
    assert note.delay(1).id != note.delay(1).id or work()


def test_a_claim_of_an_app_that_was_cleared_is_free(app: Celery, redis: Connections, ran: list[Any]) -> None:
    note = declare(app, redis, ran, unique=Unique(until="end", on_conflict="raise"))
    note.delay(1)

    clear(app)

    note.delay(1)
    with pytest.raises(DuplicateTask):
        note.delay(1)


def test_what_a_task_held_that_never_ended_is_free_when_its_app_was_cleared(
    app: Celery, redis: Connections, name: str
) -> None:
    """As after a test whose worker was killed."""

    @coordinated_task(app=app, redis=redis, lock=name)
    def never() -> None: ...

    from petiole.coordination.parking import Attempt, Running

    running = never.lot.admit(Attempt("an id", 0), never.gates.of((), {}), record=None)
    assert isinstance(running, Running)
    assert not Lock(redis, name).try_acquire()

    clear(app)

    with Lock(redis, name).try_acquire() as free:
        assert free
