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


@pytest.fixture
def another(slow_lease):
    """Makes caches like ``slow_lease`` that know nothing of its loads, as in another process."""
    return lambda: Cache(slow_lease.redis, namespace=slow_lease.namespace, lease="2m")


def test_twenty_threads_that_miss_one_key_load_once(slow_lease, patient):
    """All get the value of the one load."""
    cache, loads, barrier = slow_lease, [], threading.Barrier(20)

    def loader():
        loads.append(1)
        wait_for(lambda: cache.stats().joins + cache.stats().waits >= 19)
        return "value"

    def ask():
        barrier.wait(20)
        return cache.get_or_set("k", loader)

    with ThreadPoolExecutor(20) as pool:
        values = [asked.result(30) for asked in [pool.submit(ask) for _ in range(20)]]

    assert values == ["value"] * 20
    assert loads == [1]
    assert (cache.stats().loads, cache.stats().misses) == (1, 1)


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


@pytest.fixture(params=["thread", "process"])
def one_loads_one_waits(request, slow_lease, another, patient):
    """The first caller stands in its loader until the second waits for it, in the same process or in another.

    Returns what each came back with.
    """
    cache = slow_lease
    other_cache = cache if request.param == "thread" else another()

    def waits():
        if request.param == "thread":
            return cache.stats().joins == 1
        return cache.redis.coordination.info("clients")["blocked_clients"] == 1

    def run(first, second):
        entered = threading.Event()

        def loader():
            entered.set()
            wait_for(waits)
            return first()

        def ask(cache, loader):
            try:
                return cache.get_or_set("k", loader)
            except OSError as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(ask, cache, loader)
            assert entered.wait(20)
            other = pool.submit(ask, other_cache, second)
            return one.result(30), other.result(30)

    return run


def test_who_waits_is_woken_by_the_value(one_loads_one_waits):
    """And does not load."""
    assert one_loads_one_waits(lambda: 1, lambda: 2) == (1, 1)


def test_who_waits_gets_a_value_of_its_own(one_loads_one_waits):
    """What one caller changes in it is not seen by the other."""
    one, other = one_loads_one_waits(lambda: {"a": [1]}, lambda: 2)

    assert one == other == {"a": [1]}
    assert one is not other
    assert one["a"] is not other["a"]


def test_who_waits_is_woken_by_a_failure_and_loads_itself(one_loads_one_waits, slow_lease):
    """A failed load is over; the next one begins at once, not after the lease."""

    def fails():
        raise OSError("the database is away")

    error, value = one_loads_one_waits(fails, lambda: 2)

    assert isinstance(error, OSError)
    assert value == 2
    assert slow_lease.get("k") == 2


def test_who_waits_is_woken_by_a_refusal_and_loads_itself(one_loads_one_waits, slow_lease):
    """A load whose key was deleted meanwhile is no use to those who asked afterwards."""
    values = one_loads_one_waits(lambda: slow_lease.delete("k") or "overtaken", lambda: "new")

    assert values == ("overtaken", "new")
    assert slow_lease.get("k") == "new"


def test_threads_that_miss_what_their_process_loads_ask_nobody(slow_lease, patient):
    """They join the load: not one command, and each gets the value."""
    cache, client, entered = slow_lease, slow_lease.redis.coordination, threading.Event()
    cache.get_or_set("warm", lambda: 1)

    def calls():
        stats = client.info("commandstats")
        return sum(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"] for command in ("evalsha", "eval", "blpop"))

    def loader():
        before.append(calls())
        entered.set()
        wait_for(lambda: cache.stats().joins >= 10)
        return "value"

    before = []
    with ThreadPoolExecutor(11) as pool:
        first = pool.submit(cache.get_or_set, "k", loader)
        assert entered.wait(20)
        others = [pool.submit(cache.get_or_set, "k", lambda: "other") for _ in range(10)]
        values = [asked.result(30) for asked in (first, *others)]

    assert values == ["value"] * 11
    assert (cache.stats().joins, cache.stats().waits) == (10, 0)
    assert calls() - before[0] == 1  # the one that stored it


def test_many_threads_that_wait_for_another_process_are_all_woken(slow_lease, another, patient):
    """One of them blocks in Redis for all of its process; each gets the value."""
    cache, waiting, entered = slow_lease, another(), threading.Event()

    def blocked():
        return cache.redis.coordination.info("clients")["blocked_clients"]

    def loader():
        entered.set()
        wait_for(lambda: waiting.stats().joins >= 9)
        seen.append(blocked())
        return "value"

    seen = []
    with ThreadPoolExecutor(11) as pool:
        first = pool.submit(cache.get_or_set, "k", loader)
        assert entered.wait(20)
        others = [pool.submit(waiting.get_or_set, "k", lambda: "other")]
        wait_for(lambda: blocked() == 1)
        others += [pool.submit(waiting.get_or_set, "k", lambda: "other") for _ in range(9)]
        values = [asked.result(30) for asked in (first, *others)]

    assert values == ["value"] * 11
    assert seen == [1]
    assert (waiting.stats().waits, waiting.stats().joins, waiting.stats().hits) == (1, 9, 1)


def test_who_joins_a_wait_that_ends_in_a_failure_looks_again(slow_lease, another, patient):
    """The wait brought nothing, so of those who joined one loads, and the others join that load."""
    cache, waiting, entered, loads = slow_lease, another(), threading.Event(), []

    def fails():
        entered.set()
        wait_for(lambda: waiting.stats().joins >= 3)
        raise OSError("the database is away")

    def loader():
        loads.append(1)
        return "value"

    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(cache.get_or_set, "k", fails)
        assert entered.wait(20)
        others = [pool.submit(waiting.get_or_set, "k", loader)]
        wait_for(lambda: cache.redis.coordination.info("clients")["blocked_clients"] == 1)
        others += [pool.submit(waiting.get_or_set, "k", loader) for _ in range(3)]

        assert [asked.result(30) for asked in others] == ["value"] * 4
        assert isinstance(first.exception(30), OSError)
    assert loads == [1]


@pytest.mark.parametrize("where", ["thread", "process"])
def test_who_waits_for_one_key_does_not_hold_up_another(slow_lease, another, patient, where):
    """Two keys are two loads at the same time."""
    cache, entered, go = slow_lease, threading.Event(), threading.Event()

    def loader():
        entered.set()
        assert go.wait(20)
        return 1

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(cache.get_or_set, "k", loader)
        assert entered.wait(20)
        waiting = pool.submit((cache if where == "thread" else another()).get_or_set, "k", lambda: 2)
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
    processes = [Cache(redis, namespace=name, lease="1.5s") for _ in range(3)]
    loads = []

    def wait_all():
        return all(one.stats().waits and one.stats().waits + one.stats().joins >= 3 for one in processes)

    def loader():
        loads.append(1)
        time.sleep(0.5)  # a load that takes a while, so that the others have to wait for it
        return "value"

    holder = subprocess.Popen([sys.executable, "-c", HOLDER, redis.url, name], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "loading\n"
        with ThreadPoolExecutor(9) as pool:
            asked = [pool.submit(process.get_or_set, "k", loader) for process in processes for _ in range(3)]
            wait_for(wait_all)
            os.kill(holder.pid, signal.SIGKILL)
            values = [one.result(30) for one in asked]
    finally:
        holder.kill()
        holder.communicate()

    assert values == ["value"] * 9
    assert processes[0].get("k") == "value"
    assert loads == [1]


def test_waiting_costs_few_commands(slow_lease, another):
    """Wake-ups that nobody took are not left to the next load, whose waiters would spin on them."""
    cache, client = slow_lease, slow_lease.redis.coordination
    threads, rounds = 8, 6
    waiting = [another() for _ in range(threads - 1)]

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
            others = [pool.submit(process.get_or_set, "k", lambda: "other") for process in waiting]
            wait_for(lambda: count_waiters(cache) >= threads - 1)
            wait_for(lambda: client.info("clients")["blocked_clients"] == threads - 1)
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
