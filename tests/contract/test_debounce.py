"""What ``Debounce`` promises: of calls that come close together exactly one runs, the newest, wherever it came from."""

import contextvars
import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_nodes import eventually

from petiole.cachelib import Connections, EmbeddedServer, Settings, connect
from petiole.cachelib.errors import ServerUnavailable
from petiole.cachelib.scripts import Script
from petiole.coordination import debounce as module
from petiole.coordination import keys as key_names
from petiole.coordination.debounce import Debounce

CLOCK = 'local time = redis.call("TIME")\nlocal now = time[1] * 1000000 + time[2]\n'


def with_our_clock(script: Script[tuple[str, int, bool]]) -> Script[tuple[str, int, bool]]:
    """The same script on a clock that the test turns."""
    text = script.text
    header = "-- ARGV: token, previous, wait_ms, max_wait_ms, kept_ms"
    for old, new in [(CLOCK, "local now = tonumber(ARGV[#ARGV])\n"), (header, f"{header}, now_us")]:
        assert text.count(old) == 1, f"the script has no {old!r} any more"
        text = text.replace(old, new)
    return Script("debounce_register_with_our_clock", text, script.decode)


REGISTER_AT = with_our_clock(module._REGISTER)
NOON_US = 1_767_225_600_123_456


@pytest.fixture
def make(redis: Connections, name: str) -> Iterator[Callable[..., Debounce]]:
    """Makes debounces of one name: each as another process would have it. They wait for as long as any test."""
    made: list[Debounce] = []

    def debounce(**times: object) -> Debounce:
        made.append(Debounce(redis, name, **({"wait": "5m"} | times)))
        return made[-1]

    yield debounce
    for one in made:
        one.close(run=False)
    eventually(lambda: "petiole-debounce-timers" not in _threads() or module._timers._heap, "its thread ends")


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


# Which one runs


def test_of_many_calls_only_the_newest_runs(make: Callable[..., Debounce]) -> None:
    """In one process."""
    debounce, ran = make(), []
    for number in range(20):
        debounce.call("k", ran.append, number)
    debounce.call("another key", ran.append, "another")

    assert ran == []
    assert debounce.close()
    assert ran == [19, "another"]
    stats = debounce.stats()
    assert (stats.calls, stats.runs, stats.superseded, stats.pending, stats.alone) == (21, 2, 19, 0, 0)


def test_of_several_processes_calls_only_the_newest_runs(make: Callable[..., Debounce]) -> None:
    """Each has the claim of its own newest; all but one were taken away."""
    processes, ran = [make() for _ in range(4)], []
    for number in range(20):
        processes[number % 4].call("k", ran.append, number)

    for one in processes:
        one.close()

    assert ran == [19]


def test_threads_that_call_at_once_run_one(make: Callable[..., Debounce]) -> None:
    """Whichever registered last."""
    debounce, ran, begin = make(), [], threading.Barrier(8)

    def ask(number: int) -> None:
        begin.wait(20)
        for i in range(20):
            debounce.call("k", ran.append, (number, i))

    with ThreadPoolExecutor(8) as pool:
        for asked in [pool.submit(ask, number) for number in range(8)]:
            asked.result(60)
    debounce.close()

    assert len(ran) == 1
    assert ran[0][1] == 19


PROCESS = """
import sys
from petiole.cachelib import Cache, connect
from petiole.coordination.debounce import Debounce

url, name, number = sys.argv[1:]
with connect(url) as redis:
    cache = Cache(redis, namespace=name)
    debounce = Debounce(redis, name, wait="5m")
    for i in range(50):
        debounce.call("k", print, f"{number}:{i}")
    print("ready", flush=True)
    sys.stdin.readline()
    debounce.close()
"""


def test_of_real_processes_one_runs_once(redis: Connections, name: str) -> None:
    """Four processes call fifty times each, and end when all have called."""
    command = [sys.executable, "-c", PROCESS, redis.url, name]
    processes = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        said = [process.communicate("end\n", timeout=60)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()

    ran = [line for lines in said for line in lines]
    assert len(ran) == 1
    assert ran[0].endswith(":49")


@given(
    gaps_ms=st.lists(st.one_of(st.integers(0, 30), st.integers(0, 300)), min_size=1, max_size=25),
    wait_ms=st.integers(1, 50),
    longer_ms=st.one_of(st.none(), st.integers(0, 150)),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_script_decides_as_the_promise_says(
    redis: Connections, gaps_ms: list[int], wait_ms: int, longer_ms: int | None
) -> None:
    """On any schedule: the newest of each series runs, ``wait`` after it came, and ``max_wait`` after the first."""
    claims = key_names.debounced("model", uuid4().hex)
    max_wait_ms = 0 if longer_ms is None else wait_ms + longer_ms
    expected: list[tuple[int, int]] = []  # number of the call, when it is due
    first_ms, now_ms = 0, 0
    told = []
    for number, gap_ms in enumerate(gaps_ms):
        now_ms += gap_ms
        if expected and now_ms < expected[-1][1]:
            expected.pop()
        else:
            first_ms = now_ms
        due_ms = now_ms + wait_ms
        expected.append((number, min(due_ms, first_ms + max_wait_ms) if max_wait_ms else due_ms))
        claim, due_in_ms, gone = REGISTER_AT(
            redis.coordination,
            claims=claims,
            token=str(number),
            previous=told[-1][0] if told else "",
            wait_ms=wait_ms,
            max_wait_ms=max_wait_ms,
            kept_ms=600_000,
            now_us=NOON_US + now_ms * 1_000,
        )
        assert gone == (bool(told) and (len(expected) < 2 or expected[-2][0] != number - 1))
        told.append((claim, now_ms + due_in_ms))
    taken = [module._TAKE(redis.coordination, claims=claims, claim=claim) for claim, _ in told]
    again = [module._TAKE(redis.coordination, claims=claims, claim=claim) for claim, _ in told]

    assert [(number, told[number][1]) for number, took in enumerate(taken) if took == 1] == expected
    assert set(again) == {0}
    redis.coordination.delete(claims)


def test_a_call_that_is_due_cannot_be_put_off(
    redis: Connections, make: Callable[..., Debounce], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise calls that come faster than a thread wakes would put the run off for ever, whatever max_wait says."""
    first, second, ran = make(wait="1ms", max_wait="1ms"), make(), []
    with monkeypatch.context() as patch:
        patch.setattr(first, "_start_ready", lambda: None)  # all threads are busy
        first.call("k", ran.append, "due")
        eventually(lambda: _due(redis, first, "k") and first._ready, "it is due, and nobody has taken it")
        second.call("k", ran.append, "later")
    first._start_ready()

    eventually(lambda: ran == ["due"], "the first runs")
    assert second.stats().pending == 1
    second.close()
    assert ran == ["due", "later"]


def _due(redis: Connections, debounce: Debounce, key: str) -> bool:
    seconds, us = redis.coordination.time()
    (claim,) = redis.coordination.zrange(key_names.debounced(debounce.name, key), -1, -1, withscores=True)
    return seconds * 1_000_000 + us > claim[1] > 0


# When it runs


def test_it_runs_once_calls_have_ceased_for_as_long_as_said(make: Callable[..., Debounce]) -> None:
    """Not earlier; in a thread of its own, with its arguments."""
    debounce, ran, done = make(wait="150ms"), [], threading.Event()

    def function(*arguments: object, **keywords: object) -> None:
        ran.append((time.monotonic(), arguments, keywords, threading.current_thread().name))
        done.set()

    called = time.monotonic()
    debounce.call("k", function, 1, two=2)

    assert done.wait(60)
    ((at, arguments, keywords, thread),) = ran
    assert at - called >= 0.15
    assert (arguments, keywords) == ((1,), {"two": 2})
    assert thread == "petiole-load"


def test_each_call_puts_the_run_off(make: Callable[..., Debounce]) -> None:
    """The timer of the first rings in vain."""
    debounce, ran, done = make(wait="200ms"), [], threading.Event()
    last = 0.0
    for number in range(10):
        last = time.monotonic()
        debounce.call("k", lambda number=number: ran.append((number, time.monotonic())) or done.set())
        threading.Event().wait(0.04)

    assert done.wait(60)
    eventually(lambda: debounce.stats().pending == 0, "all have run")
    assert ran[-1][0] == 9
    assert ran[-1][1] - last >= 0.2


def test_a_run_is_not_put_off_for_longer_than_max_wait(make: Callable[..., Debounce]) -> None:
    """Although calls keep coming."""
    debounce, done = make(max_wait="5m"), threading.Event()
    debounce._wait_ms, debounce._max_wait_ms = 300_000, 200
    begun = time.monotonic()

    def call_again() -> bool:
        debounce.call("k", done.set)
        return done.is_set()

    eventually(call_again, "one of the calls runs")
    assert time.monotonic() - begun >= 0.2


def test_it_runs_in_the_context_of_its_caller(make: Callable[..., Debounce]) -> None:
    """Of the newest call."""
    debounce, seen = make(wait="1ms"), []
    who = contextvars.ContextVar("who", default="nobody")
    done = threading.Event()
    token = who.set("ada")
    debounce.call("k", lambda: seen.append(who.get()) or done.set())
    who.reset(token)

    assert done.wait(60)
    assert seen == ["ada"]


def test_no_more_run_at_once_than_there_are_threads(make: Callable[..., Debounce]) -> None:
    """Those that are due wait for one, and each gets its turn."""
    debounce, go, lock = make(wait="1ms", threads=2), threading.Event(), threading.Lock()
    running, most, ran = 0, 0, []

    def function(number: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        go.wait(60)
        with lock:
            running -= 1
            ran.append(number)

    for number in range(8):
        debounce.call(f"k{number}", function, number)
    eventually(lambda: len(debounce._ready) == 6 and running == 2, "two run and six are due")
    go.set()

    eventually(lambda: sorted(ran) == list(range(8)), "all have run")
    assert most == 2


def test_one_thread_keeps_the_time_of_all(make: Callable[..., Debounce]) -> None:
    """However many debounces and calls there are; it ends with the last."""
    for debounce in (make(), make(), make()):
        for number in range(10):
            debounce.call(f"{id(debounce)}:{number}", print)

    assert [thread.name for thread in threading.enumerate()].count("petiole-debounce-timers") == 1


def test_calls_for_one_key_need_one_timer(make: Callable[..., Debounce]) -> None:
    """A key that is asked for a thousand times a second must not fill the memory."""
    debounce, other = make(), make()
    before = len(module._timers._heap)
    for _ in range(50):
        debounce.call("k", print)
        other.call("k", print)

    assert len(module._timers._heap) - before == 2
    assert (debounce.stats().pending, other.stats().pending) == (1, 1)


# What goes wrong


def test_an_exception_is_logged_and_counted_and_the_next_call_runs(
    make: Callable[..., Debounce], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody else would hear of it."""
    debounce, done = make(wait="1ms", threads=1), threading.Event()

    def fails(kind: type[BaseException]) -> None:
        raise kind("no index")

    debounce.call("exception", fails, ValueError)
    debounce.call("exit", fails, SystemExit)
    eventually(lambda: debounce.stats().failures == 2, "both have failed")
    debounce.call("k", done.set)

    assert done.wait(60)
    assert [record.exc_info is not None for record in caplog.records if "failed" in record.message] == [True, True]
    assert "the call for 'exception' failed" in caplog.text


def test_without_redis_each_process_debounces_for_itself(
    own_server: Callable[..., EmbeddedServer], caplog: pytest.LogCaptureFixture
) -> None:
    """Its newest call runs, and a warning tells."""
    server, ran = own_server(), []
    with connect(settings=Settings(url=server.url)) as redis:
        debounce = Debounce(redis, "reindex", wait="5m", max_wait="10m")
        debounce.call("k", ran.append, "before")
        server.stop()
        for number in range(5):
            debounce.call("k", ran.append, number)
        with pytest.raises(ServerUnavailable, match="cancelling 'k2'"):
            debounce.cancel("k2")
        assert debounce.stats().pending == 1
        debounce.close()

    assert ran == [4]
    assert "so this process debounces for itself" in caplog.text
    assert len(caplog.records) == 1
    assert debounce.stats().alone == 5


def test_alone_it_keeps_to_max_wait_too(own_server: Callable[..., EmbeddedServer]) -> None:
    """The process counts from its own first call."""
    server, done = own_server(), threading.Event()
    with connect(settings=Settings(url=server.url)) as redis:
        debounce = Debounce(redis, "reindex", wait="500ms", max_wait="700ms")
        server.stop()

        def call_again() -> bool:
            debounce.call("k", done.set)
            return done.is_set()

        eventually(call_again, "one of the calls runs")
        debounce.close(run=False)


def test_a_call_whose_taking_is_not_answered_runs(
    own_server: Callable[..., EmbeddedServer], caplog: pytest.LogCaptureFixture
) -> None:
    """It may have been superseded; to lose it would be worse."""
    server, ran = own_server(), []
    with connect(settings=Settings(url=server.url)) as redis:
        debounce = Debounce(redis, "reindex", wait="5m")
        debounce.call("k", ran.append, 1)
        server.stop()
        debounce.close()

    assert ran == [1]
    assert "although a newer one may run too" in caplog.text


def test_a_call_that_redis_has_lost_runs(
    own_server: Callable[..., EmbeddedServer], caplog: pytest.LogCaptureFixture
) -> None:
    """Superseded and lost are told apart: the first is silent, the second warned of."""
    server, ran = own_server(), []
    with connect(server.url) as redis:
        older, newer = Debounce(redis, "reindex", wait="5m"), Debounce(redis, "reindex", wait="5m")
        older.call("k", ran.append, "older")
        newer.call("k", ran.append, "newer")
        newer.close()
        older.close()
        assert (ran, caplog.text) == (["newer"], "")

        debounce = Debounce(redis, "reindex", wait="5m")
        debounce.call("k", ran.append, "lost")
        redis.coordination.flushall()
        debounce.close()

    assert ran == ["newer", "lost"]
    assert "Redis has lost it" in caplog.text


def test_claims_of_the_dead_do_not_pile_up(redis: Connections, make: Callable[..., Debounce]) -> None:
    """A key that is never quiet would keep them for ever."""
    debounce = make()
    claims = key_names.debounced(debounce.name, "k")
    for number in range(3):
        redis.coordination.zadd(claims, {f"1:dead{number}": 1_000_000 + number})
    debounce.call("k", print)

    assert redis.coordination.zcard(claims) == 2  # the new claim, and what keeps the key
    assert 0 < redis.coordination.pttl(claims) <= 900_000


def test_a_forked_child_leaves_the_calls_to_its_parent(make: Callable[..., Debounce]) -> None:
    """And has a timer of its own."""
    debounce, ran = make(wait="5m"), []
    debounce.call("k", ran.append, "parent")
    pid = os.fork()
    if not pid:
        status = 1
        try:
            done = threading.Event()
            own = make(wait="1ms")
            own.call("child", done.set)
            status = 0 if done.wait(30) and debounce.stats().pending == 0 and debounce.close() and not ran else 2
        finally:
            os._exit(status)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    debounce.close()
    assert ran == ["parent"]


ENDS = """
import sys
from petiole.cachelib import connect
from petiole.coordination.debounce import Debounce

redis = connect(sys.argv[1])
debounce = Debounce(redis, sys.argv[2], wait="5m")
debounce.call("k", print, "ran")
"""


def test_a_process_that_ends_with_calls_pending_says_so(redis: Connections, name: str) -> None:
    """It does not wait for them: that could be long."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::ResourceWarning", "-c", ENDS, redis.url, name],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert ended.stdout == ""
    assert "1 calls are lost; close() runs them" in ended.stderr


# Ending


def test_what_was_cancelled_does_not_run_in_any_process(make: Callable[..., Debounce]) -> None:
    """Whoever asked for it, and whoever cancels."""
    one, two, ran = make(), make(), []
    one.call("k", ran.append, 1)
    one.call("another key", ran.append, "another")

    assert two.cancel("k") is True
    assert two.cancel("k") is False
    one.call("k2", ran.append, 2)
    assert one.cancel("k2") is True
    one.close()
    assert ran == ["another"]


def test_a_call_after_a_cancelled_one_runs(make: Callable[..., Debounce]) -> None:
    """Nothing of the cancelled series is left."""
    debounce, ran = make(), []
    debounce.call("k", ran.append, 1)
    debounce.cancel("k")
    debounce.call("k", ran.append, 2)
    debounce.close()

    assert ran == [2]


def test_closing_waits_for_what_runs_and_takes_no_more(make: Callable[..., Debounce]) -> None:
    """What is closed cannot be asked any more."""
    debounce, entered, go = make(wait="1ms"), threading.Event(), threading.Event()
    debounce.call("k", lambda: entered.set() or go.wait(60))
    assert entered.wait(60)

    assert debounce.close(timeout=0) is False
    go.set()
    assert debounce.close() is True
    with pytest.raises(RuntimeError, match="takes no more calls"):
        debounce.call("k", print)


def test_closing_can_drop_what_is_pending(make: Callable[..., Debounce], caplog: pytest.LogCaptureFixture) -> None:
    """It says how many."""
    debounce, ran = make(), []
    debounce.call("k1", ran.append, 1)
    debounce.call("k2", ran.append, 2)
    debounce.close(run=False)

    assert ran == []
    assert "2 pending calls were dropped" in caplog.text
    assert debounce.stats().dropped == 2


def test_a_block_runs_what_is_pending_at_its_end(redis: Connections, name: str) -> None:
    """A script that ends loses nothing."""
    ran: list[int] = []
    with Debounce(redis, name, wait="5m") as debounce:
        debounce.call("k", ran.append, 1)
        assert repr(debounce) == f"<Debounce {name!r} [1 pending, 0 running]>"

    assert ran == [1]
    assert repr(debounce) == f"<Debounce {name!r} [closed]>"


def test_a_debounce_that_nobody_holds_keeps_its_word(redis: Connections, name: str) -> None:
    """What is pending does not depend on who keeps the object."""
    done = threading.Event()
    Debounce(redis, name, wait="100ms").call("k", done.set)
    gc.collect()

    assert done.wait(60)


# Its other face, and bad input


def test_a_debounced_function_is_told_apart_by_its_arguments(make: Callable[..., Debounce]) -> None:
    """It returns None at once; the newest call of each key runs."""
    debounce, ran = make(), []

    @debounce.calls("product:{product_id}")
    def reindex(product_id: int, reason: str = "") -> str:
        """Index it."""
        ran.append((product_id, reason))
        return "indexed"

    assert [reindex(1, "old"), reindex(2), reindex(product_id=1, reason="new")] == [None, None, None]
    assert reindex.__doc__ == "Index it."
    debounce.close()
    assert ran == [(2, ""), (1, "new")]


async def awaited() -> None:
    """What a thread cannot run."""


@pytest.mark.parametrize("wrong", [awaited, 7], ids=["async", "a number"])
def test_what_cannot_be_called_is_refused(make: Callable[..., Debounce], wrong: Callable[[], None]) -> None:
    """Before it is too late to tell the caller."""
    with pytest.raises(TypeError, match=r"is async|cannot be called"):
        make().call("k", wrong)
    with pytest.raises(TypeError, match=r"is async|cannot be called"):
        make().calls("k")(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"wait": 0}, "wait=0 must be more than zero"),
        ({"wait": float("inf")}, "wait=inf"),
        ({"wait": 2, "max_wait": 1}, "max_wait=1 is shorter than wait=2"),
        ({"wait": 1, "max_wait": -1}, "max_wait=-1"),
        ({"wait": 1, "threads": 0}, "threads=0"),
    ],
)
def test_times_that_cannot_be_meant_are_refused(redis: Connections, name: str, wrong: dict, message: str) -> None:
    """With the value in the message."""
    with pytest.raises(ValueError, match=message):
        Debounce(redis, name, **wrong)


def test_names_are_text(redis: Connections, make: Callable[..., Debounce]) -> None:
    """Of the debounce and of the key; braces and newlines are escaped."""
    with pytest.raises(ValueError, match="debounce must not be empty"):
        Debounce(redis, "", wait=1)
    with pytest.raises(ValueError, match="key must not be empty"):
        make().call("", print)
    debounce, ran = make(), []
    debounce.call("}{\n:", ran.append, 1)
    debounce.close()
    assert ran == [1]


def test_a_late_look_is_told_from_a_superseded_call(
    make: Callable[..., Debounce], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that was stopped for longer than claims are kept cannot know; it runs, and says so."""
    late, ran = make(wait="1ms"), []
    monkeypatch.setattr(module._timers, "at", lambda due_s, callback: None)
    late.call("k", ran.append, "late")
    late._redis.coordination.zremrangebyscore(key_names.debounced(late.name, "k"), 1, "+inf")
    monkeypatch.setattr(module, "_KEPT_MS", -1)
    with caplog.at_level(logging.WARNING):
        late.close()

    assert ran == ["late"]
    assert "it was looked at" in caplog.text


def test_it_works_on_a_cluster(clustered: Connections, name: str) -> None:
    """All of a key is in one slot."""
    ran: list[int] = []
    with Debounce(clustered, name, wait="5m") as debounce:
        for number in range(3):
            debounce.call("k", ran.append, number)
        debounce.call("cancelled", ran.append, 9)
        assert debounce.cancel("cancelled")

    assert ran == [2]
