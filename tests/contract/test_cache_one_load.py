"""One load: of all that miss one key one loads, and the others are woken when it is over, however it ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from petiole.cachelib import MISS, Cache
from petiole.cachelib.connections import Profile
from petiole.cachelib.keys import lease


def wait_for(condition, *, at_most_s=20):
    """Look until something is so."""
    deadline = time.monotonic() + at_most_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        threading.Event().wait(0.005)


def count_waiters(cache, key="k"):
    return int(cache.redis.coordination.hget(lease(cache.keys.entry(key)), "waiting") or 0)


@pytest.fixture
def patient(monkeypatch):
    """Those who wait do not look again by themselves: who is not woken hangs."""
    monkeypatch.setattr("petiole.cachelib.waiting._LOOK_AGAIN_S", 60.0)
    monkeypatch.setattr("petiole.cachelib.connections.WAITING", Profile("waiting", answer_s=90.0, connect_s=5.0))


@pytest.fixture
def slow_lease(redis, name):
    """A cache whose leases outlast any test."""
    return Cache(redis, namespace=name, lease="2m")


def test_twenty_threads_that_miss_one_key_load_once(slow_lease, patient):
    """All get the value of the one load."""
    cache, loads, barrier = slow_lease, [], threading.Barrier(20)

    def loader():
        loads.append(1)
        wait_for(lambda: count_waiters(cache) >= 19)
        return "value"

    def ask():
        barrier.wait(20)
        return cache.get_or_set("k", loader)

    with ThreadPoolExecutor(20) as pool:
        values = [asked.result(30) for asked in [pool.submit(ask) for _ in range(20)]]

    assert values == ["value"] * 20
    assert loads == [1]
    assert (cache.stats().loads, cache.stats().misses, cache.stats().waits) == (1, 1, 19)


CHILD = """
import sys, time
from petiole.cachelib import Cache, Settings, connect
from petiole.cachelib.keys import lease

url, name = sys.argv[1:]
with connect(settings=Settings(url=url, cache_timeout=10)) as redis:
    cache = Cache(redis, namespace=name, lease="2m")

    def loader():
        cache.incr("loads")
        while int(redis.coordination.hget(lease(cache.keys.entry("k")), "waiting") or 0) < 7:
            time.sleep(0.01)
        return "value"

    cache.incr("ready")
    while cache.get("go") is None:
        time.sleep(0.005)
    print(cache.get_or_set("k", loader))
"""


def test_eight_processes_that_miss_one_key_load_once(redis, cache):
    """The lease is in Redis, so it holds between processes."""
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, redis.url, cache.namespace], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    try:
        wait_for(lambda: cache.get("ready") == 8, at_most_s=60)
        cache.set("go", True)
        said = [child.communicate(timeout=60)[0].strip() for child in children]
    finally:
        for child in children:
            child.kill()

    assert said == ["value"] * 8
    assert cache.get("loads") == 1


def one_loads_one_waits(cache, first, second):
    """The first caller stands in its loader until the second waits for it. What each came back with."""
    entered = threading.Event()

    def loader():
        entered.set()
        wait_for(lambda: cache.redis.coordination.info("clients")["blocked_clients"] >= 1)
        return first()

    def ask(loader):
        try:
            return cache.get_or_set("k", loader)
        except OSError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(ask, loader)
        assert entered.wait(20)
        other = pool.submit(ask, second)
        return one.result(30), other.result(30)


def test_who_waits_is_woken_by_the_value(slow_lease, patient):
    """And does not load."""
    assert one_loads_one_waits(slow_lease, lambda: 1, lambda: 2) == (1, 1)


def test_who_waits_is_woken_by_a_failure_and_loads_itself(slow_lease, patient):
    """A failed load is over; the next one begins at once, not after the lease."""

    def fails():
        raise OSError("the database is away")

    error, value = one_loads_one_waits(slow_lease, fails, lambda: 2)

    assert isinstance(error, OSError)
    assert value == 2
    assert slow_lease.get("k") == 2


def test_who_waits_is_woken_by_a_refusal_and_loads_itself(slow_lease, patient):
    """A load whose key was deleted meanwhile is no use to those who asked afterwards."""
    values = one_loads_one_waits(slow_lease, lambda: slow_lease.delete("k") or "overtaken", lambda: "new")

    assert values == ("overtaken", "new")
    assert slow_lease.get("k") == "new"


def test_many_threads_that_wait_are_all_woken(slow_lease, patient):
    """One of them blocks in Redis for all of its process; each gets the value."""
    cache, entered = slow_lease, threading.Event()

    def loader():
        entered.set()
        wait_for(lambda: count_waiters(cache) >= 10)
        return "value"

    with ThreadPoolExecutor(11) as pool:
        first = pool.submit(cache.get_or_set, "k", loader)
        assert entered.wait(20)
        others = [pool.submit(cache.get_or_set, "k", lambda: "other") for _ in range(10)]
        values = [asked.result(30) for asked in (first, *others)]

    assert values == ["value"] * 11


def test_who_waits_for_one_key_does_not_hold_up_another(slow_lease, patient):
    """Two keys are two loads at the same time."""
    cache, entered, go = slow_lease, threading.Event(), threading.Event()

    def loader():
        entered.set()
        assert go.wait(20)
        return 1

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(cache.get_or_set, "k", loader)
        assert entered.wait(20)
        waiting = pool.submit(cache.get_or_set, "k", lambda: 2)
        other = cache.get_or_set("other", lambda: 3)
        go.set()

        assert (other, one.result(20), waiting.result(20)) == (3, 1, 1)


HOLDER = """
import sys, threading
from petiole.cachelib import Cache, Settings, connect

url, name = sys.argv[1:]
cache = Cache(connect(settings=Settings(url=url, cache_timeout=10)), namespace=name, lease="1.5s")
cache.get_or_set("k", lambda: (print("loading", flush=True), threading.Event().wait()))
"""


def test_a_holder_that_is_killed_delays_the_next_load_by_its_lease_and_one_loads_then(redis, name):
    """Of those who waited for the dead one, one takes its place, and the others wait for that one."""
    cache = Cache(redis, namespace=name, lease="1.5s")
    loads = []

    def loader():
        loads.append(1)
        time.sleep(0.5)  # a load that takes a while, so that the others have to wait for it
        return "value"

    holder = subprocess.Popen([sys.executable, "-c", HOLDER, redis.url, name], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "loading\n"
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(cache.get_or_set, "k", loader) for _ in range(6)]
            wait_for(lambda: count_waiters(cache) >= 6)
            os.kill(holder.pid, signal.SIGKILL)
            values = [one.result(30) for one in asked]
    finally:
        holder.kill()
        holder.communicate()

    assert values == ["value"] * 6
    assert cache.get("k") == "value"
    assert loads == [1]


def test_waiting_costs_few_commands(slow_lease):
    """Wake-ups that nobody took are not left to the next load, whose waiters would spin on them."""
    cache, client = slow_lease, slow_lease.redis.coordination
    threads, rounds = 8, 6

    def calls():
        return client.info("commandstats")["cmdstat_blpop"]["calls"]

    per_round = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            entered, go = threading.Event(), threading.Event()

            def loader(entered=entered, go=go):
                entered.set()
                assert go.wait(20)
                return "value"

            first = pool.submit(cache.get_or_set, "k", loader)
            assert entered.wait(20)
            others = [pool.submit(cache.get_or_set, "k", lambda: "other") for _ in range(threads - 1)]
            wait_for(lambda: count_waiters(cache) >= threads - 1)
            wait_for(lambda: client.info("clients")["blocked_clients"] >= 1)
            go.set()
            assert [asked.result(20) for asked in (first, *others)] == ["value"] * threads
            per_round.append(calls())
            cache.delete("k")

    grown = [later - earlier for earlier, later in pairwise(per_round)]

    assert max(grown) <= 2 * threads, grown


def test_get_never_waits(cache):
    """Only ``get_or_set`` waits for another's load; a plain read is a miss."""
    seen = []
    cache.get_or_set("k", lambda: seen.extend([cache.get("k", MISS), cache.get_many(["k"])]) or 1)

    assert seen == [MISS, {}]
