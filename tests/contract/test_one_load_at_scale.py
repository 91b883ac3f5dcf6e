"""One load at scale: a hundred processes miss one key at one moment, one of them loads, and waiting costs little.

All processes are forked from this one, stand still at a pipe, and go when it is closed. What they cost is read from the
server, which has no other clients.
"""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from petiole.cachelib import Cache, Settings, connect
from petiole.cachelib.connections import Profile
from petiole.cachelib.keys import lease

MAY_TAKE_S = 40
OF_ONE_LOAD = 20  # the holder's own commands, scripts that the server does not know yet, a look too early


def until(condition, what="it did not come to be"):
    """Wait for what must happen some time."""
    deadline = time.monotonic() + MAY_TAKE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.005)
    return found


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """Those who wait do not look again by themselves: who is not woken hangs, and who is woken costs what it costs."""
    monkeypatch.setattr("petiole.cachelib.waiting._LOOK_AGAIN_S", 90.0)
    monkeypatch.setattr("petiole.cachelib.connections.WAITING", Profile("waiting", answer_s=120.0, connect_s=10.0))


@pytest.fixture
def url(own_server):
    return own_server().url


def connected(url):
    return connect(settings=Settings(url=url, cache_timeout=30))


class Crowd:
    """Forked processes that do the same work, each with its number, at the same moment."""

    def __init__(self, count, work):
        self._wait_at, self._go = os.pipe()
        self._told, tell = os.pipe()
        self.pids = []
        for number in range(count):
            pid = os.fork()
            if pid == 0:
                signal.alarm(MAY_TAKE_S)
                status = 1
                try:
                    os.close(self._go)
                    os.read(self._wait_at, 1)  # returns when everybody has closed the other end
                    status = 0 if work(number, lambda: os.write(tell, b"l")) else 2
                finally:
                    os._exit(status)
            self.pids.append(pid)
        os.close(tell)
        os.close(self._wait_at)

    def go(self):
        os.close(self._go)

    def loads(self):
        """How many loads there were. Once all are through."""
        with os.fdopen(self._told, "rb") as told:
            return len(told.read())

    def statuses(self):
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]


def waiting(cache, key="k"):
    """How many wait for the load of a key, as its lease tells."""
    return int(cache.redis.coordination.hget(lease(cache.keys.entry(key)), "waiting") or 0)


def asked(redis, *commands):
    """How many commands the server has carried out, without those inside of scripts."""
    told = redis.coordination.info("commandstats")
    return sum(told.get(f"cmdstat_{command}", {}).get("calls", 0) for command in commands)


@pytest.mark.storm
def test_a_hundred_processes_that_miss_one_key_load_once_and_wait_for_three_commands_each(url, name):
    """A look, a wait in Redis, and a look when woken."""

    def work(number, note):
        with connected(url) as redis:
            cache = Cache(redis, namespace=name, lease="2m")

            def loader():
                note()
                until(lambda: waiting(cache) == 99)
                return "value"

            return cache.get_or_set("k", loader) == "value"

    crowd = Crowd(100, work)
    crowd.go()

    assert crowd.statuses() == [0] * 100
    assert crowd.loads() == 1
    with connected(url) as redis:
        assert asked(redis, "blpop") <= 99 + OF_ONE_LOAD
        assert asked(redis, "evalsha", "eval", "blpop") <= 3 * 99 + OF_ONE_LOAD


def test_fifty_threads_of_five_processes_load_once_and_wait_as_five(url, name):
    """Of a process one thread asks Redis; who comes while it waits does so without a command."""
    processes, threads = 5, 50
    here = [os.pipe() for _ in range(processes)]

    def work(number, note):
        with connected(url) as redis, ThreadPoolExecutor(threads) as pool:
            cache = Cache(redis, namespace=name, lease="2m")

            def loader():
                note()
                until(lambda: waiting(cache) == processes - 1)
                for reading, _ in here:
                    os.read(reading, 1)  # until each process's threads have all come
                return "value"

            first = pool.submit(cache.get_or_set, "k", loader)
            until(lambda: cache._loading._flights.get("k") is not None)
            others = [pool.submit(cache.get_or_set, "k", loader) for _ in range(threads - 1)]
            until(lambda: cache.stats().joins == threads - 1)
            os.write(here[number][1], b".")
            return {one.result(MAY_TAKE_S) for one in [first, *others]} == {"value"}

    crowd = Crowd(processes, work)
    crowd.go()

    assert crowd.statuses() == [0] * processes
    assert crowd.loads() == 1
    for pipe in here:
        os.close(pipe[0])
        os.close(pipe[1])
    with connected(url) as redis:
        assert asked(redis, "evalsha", "eval", "blpop") <= 3 * (processes - 1) + OF_ONE_LOAD


def test_threads_and_processes_that_all_come_at_once_load_once(url, name):
    """With no order among them at all."""

    def work(number, note):
        together = threading.Barrier(20)

        def ask():
            together.wait(MAY_TAKE_S)
            return cache.get_or_set("k", lambda: (note() and time.sleep(0.05)) or "value")

        with connected(url) as redis, ThreadPoolExecutor(20) as pool:
            cache = Cache(redis, namespace=name, lease="2m")
            return {one.result(MAY_TAKE_S) for one in [pool.submit(ask) for _ in range(20)]} == {"value"}

    crowd = Crowd(5, work)
    crowd.go()

    assert crowd.statuses() == [0] * 5
    assert crowd.loads() == 1


@pytest.mark.parametrize("ending", ["raises", "is voided"])
def test_a_load_of_twenty_that_gives_nothing_is_followed_by_one_other(url, name, ending):
    """All are woken, one of them loads, the others wait for that."""

    def work(number, note):
        with connected(url) as redis:
            cache = Cache(redis, namespace=name, lease="2m")

            def loader():
                note()
                tries = cache.incr("tries")
                until(lambda: waiting(cache) >= 20 - tries)
                if tries > 1:
                    return "value"
                if ending == "raises":
                    raise OSError("the database is away")
                cache.delete("k")
                return "overtaken"

            try:
                value = cache.get_or_set("k", loader)
            except OSError:
                return True
            return value in ("value", "overtaken")

    crowd = Crowd(20, work)
    crowd.go()

    assert crowd.statuses() == [0] * 20
    assert crowd.loads() == 2


def test_a_holder_that_is_killed_is_succeeded_by_one_within_its_lease(url, name, monkeypatch):
    """Nobody wakes those who wait, so they look again when the lease is over."""
    monkeypatch.setattr("petiole.cachelib.waiting._LOOK_AGAIN_S", 1.0)
    lease_s = 3

    def work(number, note):
        with connected(url) as redis:
            cache = Cache(redis, namespace=name, lease=lease_s)

            def loader():
                note()
                if cache.incr("tries") == 1:
                    cache.set("holder", number)
                    signal.pause()
                return "value"

            return cache.get_or_set("k", loader) == "value"

    crowd = Crowd(20, work)
    crowd.go()
    with connected(url) as redis:
        cache = Cache(redis, namespace=name, lease=lease_s)
        holder = until(lambda: cache.get("holder") is not None and (cache.get("holder"),))[0]
        until(lambda: waiting(cache) >= 19)
        os.kill(crowd.pids[holder], signal.SIGKILL)
        left_ms = redis.coordination.pttl(lease(cache.keys.entry("k")))
        statuses = crowd.statuses()

    assert left_ms <= lease_s * 1_000
    assert statuses == [-signal.SIGKILL if number == holder else 0 for number in range(20)]
    assert crowd.loads() == 2
