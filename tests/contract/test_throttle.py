"""What ``Throttle`` promises: the first call runs, and no other before the period is over."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from local_nodes import eventually

from petiole.cachelib import Connections, EmbeddedServer, Settings, connect
from petiole.coordination.errors import LimiterUnavailable
from petiole.coordination.rate_limit import Allowed, Limited
from petiole.coordination.throttle import SKIPPED, Throttle


def test_only_the_first_call_of_a_period_is_admitted(redis: Connections, name: str) -> None:
    """The others are told how long to wait; other keys have periods of their own."""
    throttle = Throttle(redis, name, every="5m")

    assert isinstance(throttle.hit("k"), Allowed)
    second, other = throttle.hit("k"), throttle.hit("other")
    assert isinstance(second, Limited)
    assert 0 < second.retry_after <= 300
    assert isinstance(other, Allowed)


def test_of_many_threads_one_is_admitted(redis: Connections, name: str) -> None:
    """Each asks through a throttle of its own, as a process does."""
    begin = threading.Barrier(8)

    def ask(number: int) -> int:
        throttle = Throttle(redis, name, every="5m")
        begin.wait(20)
        return sum(bool(throttle.hit("k")) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 1


PROCESS = """
import sys
from petiole.cachelib import connect
from petiole.coordination.throttle import Throttle

with connect(sys.argv[1]) as redis:
    throttle = Throttle(redis, sys.argv[2], every="5m")
    print(sum(bool(throttle.hit("k")) for _ in range(50)))
"""


def test_of_many_processes_one_is_admitted(redis: Connections, name: str) -> None:
    """All of them ask fifty times."""
    command = [sys.executable, "-c", PROCESS, redis.url, name]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        said = [int(process.communicate(timeout=60)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()

    assert sum(said) == 1


@pytest.mark.parametrize("every_ms", [7, 40, 250])
def test_two_calls_are_never_less_than_a_period_apart(redis: Connections, name: str, every_ms: int) -> None:
    """Also where the period is no whole number of seconds. A caller sees it at least as long as it is."""
    throttle, asked, admitted = Throttle(redis, name, every=every_ms / 1_000), [], []

    def ask() -> bool:
        before = time.monotonic()
        if throttle.hit("k"):
            asked.append(before)
            admitted.append(time.monotonic())
        return len(admitted) == 4

    while not ask():
        pass

    # From before one was asked for to after the next was admitted: never shorter than between the two decisions.
    gaps = [after - before for before, after in zip(asked, admitted[1:], strict=False)]
    assert min(gaps) >= every_ms / 1_000


def test_what_is_refused_does_not_prolong_the_period(redis: Connections, name: str) -> None:
    """However often somebody asks, the next is admitted in time."""
    throttle = Throttle(redis, name, every="300ms")
    throttle.hit("k")

    eventually(lambda: throttle.hit("k"), "it is admitted, although it is asked for all the time")


@pytest.mark.parametrize(
    ("every", "rounded_up_us"),
    [("1ms", 0), ("250ms", 0), ("1.5s", 0), (7, 0), ("1h", 0), ("40d", 0), ("3000d1ms", 999_000)],
)
def test_any_period_admits_one_call_in_it_and_two_in_a_longer_one(
    redis: Connections, name: str, every: float | str, rounded_up_us: int
) -> None:
    """The limit that it asks says so itself."""
    throttle = Throttle(redis, name, every=every)
    (limit,) = throttle._limiter.limits
    period_us = throttle.every_ms * 1_000 + rounded_up_us

    assert limit.bound_us(period_us) == 1
    assert limit.bound_us(period_us + 1) == 2


def test_a_throttled_function_runs_once_per_key_and_period(redis: Connections, name: str) -> None:
    """Otherwise it returns ``SKIPPED``, which is false."""
    ran: list[int] = []

    @Throttle(redis, name, every="5m").calls("{user_id}")
    def report(user_id: int) -> str:
        """Report."""
        ran.append(user_id)
        return "report"

    assert [report(1), report(user_id=1), report(2)] == ["report", SKIPPED, "report"]
    assert (ran, bool(SKIPPED), repr(SKIPPED), report.__doc__) == ([1, 2], False, "SKIPPED", "Report.")


def test_a_throttled_function_may_return_something_else_otherwise(redis: Connections, name: str) -> None:
    """And a template without braces makes all calls one key."""

    class Reports:
        @Throttle(redis, name, every="5m").calls("all", otherwise=None)
        def report(self, user_id: int) -> str:
            return f"report {user_id}"

    assert [Reports().report(1), Reports().report(2)] == ["report 1", None]


def test_a_failed_call_counts(redis: Connections, name: str) -> None:
    """What fails must not be tried all the time."""

    @Throttle(redis, name, every="5m").calls("all")
    def fails() -> None:
        raise ValueError("no report")

    with pytest.raises(ValueError, match="no report"):
        fails()
    assert fails() is SKIPPED


def test_without_redis_it_does_as_it_was_told(own_server: Callable[..., EmbeddedServer]) -> None:
    """It raises, unless told to allow or to deny."""
    server = own_server()
    with connect(settings=Settings(url=server.url)) as redis:
        throttles = {
            how: Throttle(redis, "report", every=1, on_error=how)  # type: ignore[arg-type]
            for how in ("raise", "allow", "deny")
        }
        server.stop()
        with pytest.raises(LimiterUnavailable, match="throttle:report"):
            throttles["raise"].hit("k")
        assert throttles["allow"].hit("k")
        assert not throttles["deny"].hit("k")


async def awaited() -> None:
    """What is not supported."""


def test_what_cannot_be_meant_is_refused(redis: Connections, name: str) -> None:
    """With the value in the message."""
    wrong: list[tuple[Any, str]] = [(0, "every=0 must be"), (-1, "every=-1"), (float("nan"), "every=nan"), ("5x", "5x")]
    for every, message in wrong:
        with pytest.raises(ValueError, match=message):
            Throttle(redis, name, every=every)
    with pytest.raises(ValueError, match="needs a name"):
        Throttle(redis, "", every=1)
    with pytest.raises(ValueError, match="on_error"):
        Throttle(redis, name, every=1, on_error="ignore")  # type: ignore[arg-type]
    throttle = Throttle(redis, name, every=1)
    with pytest.raises(TypeError, match="is async"):
        throttle.calls("k")(awaited)
    with pytest.raises(ValueError, match="names 'user_id', which is no argument"):
        throttle.calls("{user_id}")(lambda: None)
    assert repr(throttle) == f"<Throttle {name!r} [one per 1 s]>"
