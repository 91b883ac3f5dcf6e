"""What ``SingleFlight`` promises: one runs, the others share, and nobody fails for another's failure."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from local_nodes import eventually

from petiole.cachelib import Connections, EmbeddedServer, Settings, connect
from petiole.cachelib.errors import LoaderRecursion
from petiole.cachelib.keys import lease
from petiole.coordination.single_flight import SingleFlight


@dataclasses.dataclass
class Price:
    """What is restored as what it was."""

    cents: int


@pytest.fixture
def flight(redis: Connections, name: str) -> SingleFlight:
    """A flight whose values linger for as long as any test."""
    return SingleFlight(redis, name, linger="5m", lease="2m")


@pytest.fixture
def elsewhere(flight: SingleFlight) -> SingleFlight:
    """The same flight as another process has it: the two share nothing but Redis."""
    return SingleFlight(flight.cache.redis, flight.name, linger="5m", lease="2m")


def waiting(flight: SingleFlight, key: str = "k") -> int:
    """How many processes wait for the run of a key."""
    found = flight.cache.redis.coordination.hget(lease(flight.cache.keys.entry(key)), "waiting")
    return int(found or 0)


def sharing(flight: SingleFlight) -> int:
    """How many callers of this process wait."""
    stats = flight.stats()
    return stats.joins + stats.waits


@pytest.mark.parametrize("value", ["value", None, 0, [1, {"two": None}]])
def test_of_many_threads_one_runs_and_all_have_its_value(flight: SingleFlight, value: object) -> None:
    """``None`` is a value as any other."""
    runs: list[int] = []

    def function() -> object:
        runs.append(1)
        eventually(lambda: sharing(flight) >= 9, "nine others wait")
        return value

    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(flight.do, "k", function) for _ in range(10)]
        assert [one.result(60) for one in asked] == [value] * 10

    assert runs == [1]


PROCESS = """
import sys, time
from petiole.cachelib import Settings, connect
from petiole.cachelib.keys import lease
from petiole.coordination.single_flight import SingleFlight

url, name, others = sys.argv[1:]
with connect(settings=Settings(url=url, cache_timeout=10)) as redis:
    flight = SingleFlight(redis, name, linger="5m", lease=LEASE)

    def function():
        flight.cache.incr("runs")
        while int(redis.coordination.hget(lease(flight.cache.keys.entry("k")), "waiting") or 0) < int(others):
            time.sleep(0.01)
        return None if others == "3" else time.sleep(600)

    print(flight.do("k", function))
"""


def start(redis: Connections, name: str, others: int, lease_s: float) -> "subprocess.Popen[str]":
    program = PROCESS.replace("LEASE", str(lease_s))
    return subprocess.Popen(
        [sys.executable, "-c", program, redis.url, name, str(others)], stdout=subprocess.PIPE, text=True
    )


def test_of_four_processes_one_runs(redis: Connections, flight: SingleFlight) -> None:
    """The one that runs waits until the other three wait for it."""
    processes = [start(redis, flight.name, 3, 120) for _ in range(4)]
    try:
        said = [process.communicate(timeout=60)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()

    assert said == ["None"] * 4
    assert flight.cache.get("runs") == 1


def test_a_leader_that_is_killed_is_followed_by_one_of_those_who_wait(redis: Connections, name: str) -> None:
    """It never says that it has died; its lease runs out."""
    flight = SingleFlight(redis, name, linger="5m", lease=1)
    leader = start(redis, name, 1, 1)
    try:
        eventually(lambda: flight.cache.get("runs") == 1, "the leader runs")
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(flight.do, "k", lambda: "from a follower") for _ in range(2)]
            eventually(lambda: waiting(flight) >= 1, "this process waits for it")
            os.kill(leader.pid, signal.SIGKILL)
            assert [one.result(60) for one in asked] == ["from a follower"] * 2
    finally:
        leader.kill()
        leader.communicate()

    assert flight.stats().loads == 1


def test_a_leader_that_fails_does_not_fail_those_who_wait(flight: SingleFlight, elsewhere: SingleFlight) -> None:
    """Its exception is its own; one of the others runs, and here it fares better."""
    entered = threading.Event()

    def fails() -> str:
        entered.set()
        eventually(lambda: waiting(flight) >= 1, "another process waits")
        raise ConnectionError("of the leader")

    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(flight.do, "k", fails)
        assert entered.wait(20)
        follower = pool.submit(elsewhere.do, "k", lambda: "value")
        with pytest.raises(ConnectionError, match="of the leader"):
            leader.result(60)
        assert follower.result(60) == "value"


def test_where_all_fail_each_has_an_exception_of_its_own(flight: SingleFlight) -> None:
    """No exception is handed on, so each of them has run."""
    begin = threading.Barrier(4)

    def ask(number: int) -> None:
        def fails() -> None:
            raise ValueError(f"run {number}")

        begin.wait(20)
        flight.do("k", fails)

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, number) for number in range(4)]
        assert [str(one.exception(60)) for one in asked] == [f"run {number}" for number in range(4)]


def test_who_comes_within_linger_shares(flight: SingleFlight, elsewhere: SingleFlight) -> None:
    """A value is not made again for who comes a moment too late."""
    assert flight.do("k", lambda: 1) == 1
    assert elsewhere.do("k", lambda: 2) == 1
    assert flight.do("another key", lambda: 2) == 2


def test_after_linger_it_runs_again(redis: Connections, name: str) -> None:
    """A flight is no cache: what it made is soon forgotten."""
    flight = SingleFlight(redis, name, linger="50ms")
    runs: list[int] = []

    eventually(lambda: flight.do("k", lambda: runs.append(1) or len(runs)) == 3, "it has run three times")


def test_what_was_forgotten_is_made_again(flight: SingleFlight) -> None:
    """A run that began before does not count either."""
    made: list[str] = []

    def outdated() -> str:
        flight.forget("k")
        return "outdated"

    assert flight.do("k", outdated) == "outdated"
    assert flight.do("k", lambda: made.append("new") or "new") == "new"
    assert flight.do("k", lambda: "newer") == "new"


def test_values_come_back_as_their_type(flight: SingleFlight, elsewhere: SingleFlight) -> None:
    """Said by the call, or by the annotation."""
    assert flight.do("k", lambda: Price(250), type=Price) == Price(250)
    assert elsewhere.do("k", lambda: Price(0), type=Price) == Price(250)

    def price(symbol: str) -> Price:
        return Price(len(symbol))

    assert flight.shared("price:{symbol}")(price)("oil") == Price(3)
    assert elsewhere.shared("price:{symbol}")(lambda symbol: None)("oil") == {"cents": 3}
    assert elsewhere.shared("price:{symbol}")(price)("oil") == Price(3)


def test_calls_of_a_shared_function_are_told_apart_by_its_arguments(flight: SingleFlight) -> None:
    """However they are spelled."""
    runs: list[int] = []

    @flight.shared("user:{user_id}")
    def user(user_id: int) -> int:
        runs.append(user_id)
        return user_id

    assert [user(1), user(user_id=1), user(2)] == [1, 1, 2]
    assert runs == [1, 2]


def test_a_function_that_asks_for_its_own_key_is_refused(flight: SingleFlight) -> None:
    """It would wait for itself."""
    with pytest.raises(LoaderRecursion):
        flight.do("k", lambda: flight.do("k", lambda: 1))


def test_without_redis_everyone_runs(own_server: Callable[..., EmbeddedServer]) -> None:
    """Nobody waits for an agreement that cannot be had."""
    server = own_server()
    with connect(settings=Settings(url=server.url)) as redis:
        flight = SingleFlight(redis, "prices")
        assert flight.do("k", lambda: 1) == 1
        server.stop()
        assert [flight.do("k", lambda number=number: number) for number in (2, 3)] == [2, 3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"linger": 0}, "linger=0 must be more than zero"),
        ({"linger": "10ms"}, "linger='10ms' is shorter"),
        ({"linger": float("nan")}, "linger=nan"),
        ({"wait": -1}, "wait=-1"),
        ({"lease": "1ms"}, "lease='1ms'"),
    ],
)
def test_times_that_cannot_be_meant_are_refused(redis: Connections, name: str, wrong: dict, message: str) -> None:
    """With the value in the message."""
    with pytest.raises(ValueError, match=message):
        SingleFlight(redis, name, **wrong)


def test_a_flight_without_a_name_is_refused(redis: Connections) -> None:
    """Two of them would share."""
    with pytest.raises(ValueError, match="needs a name"):
        SingleFlight(redis, "")
