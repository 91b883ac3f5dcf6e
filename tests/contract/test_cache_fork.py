"""A cache across a fork, as a prefork worker has it: made in the parent, used on both sides."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from petiole.cachelib import Cache
from petiole.cachelib.connections import Profile

CHILD_MAY_TAKE_S = 30


def in_child(work):
    """Start work in a forked child; it ends with status 0 when the work returned True."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(CHILD_MAY_TAKE_S)  # a child that hangs is ended by the system
    status = 1
    try:
        status = 0 if work() else 2
    finally:
        os._exit(status)


def succeeded(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def use(cache, who):
    """Many calls of all kinds; true when each got its own answer."""
    for i in range(100):
        key = f"{who}:{i}"
        if not cache.set(key, key) or cache.get(key) != key or cache.get_or_set(f"{key}:l", lambda k=key: k) != key:
            return False
    return cache.delete(f"{who}:0") == 1 and cache.invalidate(matching=f"{who}:*") == 199


def test_both_sides_work_after_a_fork(cache):
    """Connections that the parent used are not used by the child: no answer reaches the wrong one."""
    cache.set("before", "parent")
    cache.get("before")
    cache.delete("nothing")
    children = [in_child(lambda i=i: cache.get("before") == "parent" and use(cache, f"child{i}")) for i in range(3)]
    parent = use(cache, "parent")

    assert [succeeded(pid) for pid in children] == [True] * 3
    assert parent
    assert cache.get("before") == "parent"


def test_a_cache_that_was_never_used_works_in_the_child(redis, name):
    """What connects first is the child."""
    cache = Cache(redis, namespace=name)

    assert succeeded(in_child(lambda: use(cache, "child")))
    assert use(cache, "parent")


@pytest.mark.parametrize(
    "lock_of",
    [
        lambda c: c.redis._lock,
        lambda c: c._counters._lock,
        lambda c: c._remembered._lock,
        lambda c: c._loading._flights._lock,
        lambda c: c._loading.keeper._lock,
        lambda c: c._loading._refreshing._lock,
        lambda c: c._loading._timed._lock,
    ],
    ids=["connections", "counters", "remembered", "flights", "leases", "refreshes", "loads-with-a-limit"],
)
def test_a_lock_that_another_thread_held_does_not_stop_the_child(redis, name, lock_of, monkeypatch):
    """At the moment of a fork any lock may be held; in the child nobody is there to release it."""
    monkeypatch.setattr(f"{__name__}.CHILD_MAY_TAKE_S", 5)
    cache = Cache(redis, namespace=name)
    cache.set("stale", "old", stale=600)
    redis.coordination.pexpire(cache.keys.entry("stale"), 300_000)
    held, release = threading.Event(), threading.Event()

    def hold():
        with lock_of(cache):
            held.set()
            release.wait(30)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        assert held.wait(10)

        def work():
            cache._remembered.covers("k")
            return (
                cache.get("k"),
                cache.get_or_set("k", lambda: 1),
                cache.get_or_set("limited", lambda: 2, hard_timeout=60),
                cache.get_or_set("stale", lambda: "new", refresh="thread"),
            ) == (None, 1, 2, "old")

        pid = in_child(work)
        release.set()

        assert succeeded(pid)


@pytest.mark.parametrize("parent", ["loads", "waits"])
def test_a_child_waits_for_itself_where_its_parent_was_busy(redis, name, parent):
    """A thread of the parent that loads a key, or waits for it, does not exist in the child, which must not join it."""
    cache, other = (Cache(redis, namespace=name, lease="2m") for _ in range(2))
    entered, go = threading.Event(), threading.Event()

    def blocked():
        return redis.coordination.info("clients")["blocked_clients"]

    def comes_to(count):
        deadline = time.monotonic() + 10
        while blocked() != count and time.monotonic() < deadline:
            threading.Event().wait(0.005)
        return blocked() == count

    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr("petiole.cachelib.waiting._LOOK_AGAIN_S", 60.0)
        patch.setattr("petiole.cachelib.connections.WAITING", Profile("waiting", answer_s=90.0, connect_s=5.0))
        loads = cache if parent == "loads" else other
        first = pool.submit(loads.get_or_set, "k", lambda: entered.set() or (go.wait(60) and "value"))
        assert entered.wait(10)
        second = pool.submit(cache.get_or_set, "k", lambda: "other")
        waiting = 0 if parent == "loads" else 1  # a thread that joins a load of its process asks nobody
        assert comes_to(waiting)
        pid = in_child(lambda: cache.get_or_set("k", lambda: "other") == "value")
        child_waits_in_redis = comes_to(waiting + 1)
        go.set()
        values = [first.result(30), second.result(30)]
        if not child_waits_in_redis:
            os.kill(pid, signal.SIGKILL)

        assert values == ["value", "value"]
        assert succeeded(pid)
        assert child_waits_in_redis
