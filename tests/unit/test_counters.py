"""Counts of this process: exact, however many threads add, and bounded, however many have been."""

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from petiole.cachelib.counters import Counters

EACH = 3_000


@pytest.fixture
def often_switched():
    """Threads take turns as often as the interpreter can have them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_counts_begin_at_nothing():
    """What was never counted is not there."""
    counters = Counters()
    assert counters.read() == {}
    counters.add("hits")
    counters.add("hits", 2)
    counters.add("misses", 5)

    assert counters.read() == {"hits": 3, "misses": 5}


def test_what_is_read_is_a_copy():
    """Whoever changes it changes no count."""
    counters = Counters()
    counters.add("hits")
    counters.read()["hits"] = 100

    assert counters.read() == {"hits": 1}


def test_threads_that_count_at_once_lose_nothing(often_switched):
    """Nor what others read meanwhile: it only grows."""
    counters, going = Counters(), threading.Event()
    going.set()
    seen = []

    def read():
        while going.is_set():
            seen.append(counters.read().get("hits", 0))

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(lambda: [counters.add("hits") for _ in range(EACH)])
    going.clear()
    reader.join()

    assert counters.read() == {"hits": 8 * EACH}
    assert seen == sorted(seen)


def test_what_threads_counted_that_have_ended_is_kept_in_one_place():
    """A server that starts a thread for each request must not keep the counts of each for ever."""
    counters = Counters()
    kept = set()
    for number in range(500):
        in_thread(lambda number=number: (counters.add("hits"), counters.add("load_ms", number)))
        kept.add(len(counters._everyone))

    assert counters.read() == {"hits": 500, "load_ms": sum(range(500))}
    assert max(kept) <= 65


def test_a_thread_that_still_counts_is_not_added_up():
    """Or it would be counted twice, or no more."""
    counters = Counters()
    turn, done = threading.Barrier(2), threading.Barrier(2)

    def count_on():
        with suppress(threading.BrokenBarrierError):
            for _ in range(3):
                turn.wait(60)
                counters.add("alive")
                done.wait(60)

    thread = threading.Thread(target=count_on)
    thread.start()
    try:
        for round_ in range(1, 4):
            turn.wait(60)
            done.wait(60)
            for _ in range(70):
                in_thread(lambda: counters.add("ended"))
            assert counters.read() == {"alive": round_, "ended": 70 * round_}
    finally:
        turn.abort()
        thread.join()


def test_two_counters_have_nothing_in_common():
    """Also in the same thread."""
    one, other = Counters(), Counters()
    one.add("hits")

    assert other.read() == {}


def test_a_forked_child_counts_on_for_itself():
    """From the parent's counts; the lock that a thread of the parent held does not stop it."""
    counters = Counters()
    counters.add("hits", 5)
    with counters._lock:
        pid = os.fork()
        if not pid:
            signal.alarm(30)
            try:
                counters.add("hits")
                in_thread(lambda: counters.add("hits"))
                os._exit(counters.read()["hits"])
            finally:
                os._exit(99)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert status == 7
    assert counters.read() == {"hits": 5}
