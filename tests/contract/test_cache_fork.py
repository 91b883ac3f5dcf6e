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
    [lambda c: c.redis._lock, lambda c: c._counters._lock, lambda c: c._waiting._lock],
    ids=["connections", "counters", "waiting"],
)
def test_a_lock_that_another_thread_held_does_not_stop_the_child(redis, name, lock_of, monkeypatch):
    """At the moment of a fork any lock may be held; in the child nobody is there to release it."""
    monkeypatch.setattr(f"{__name__}.CHILD_MAY_TAKE_S", 5)
    cache = Cache(redis, namespace=name)
    held, release = threading.Event(), threading.Event()

    def hold():
        with lock_of(cache):
            held.set()
            release.wait(30)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        assert held.wait(10)

        def work():
            cache.get("k")
            cache._waiting.wait(cache.keys.entry("k"), 0.01)
            return cache.get_or_set("k", lambda: 1) == 1

        pid = in_child(work)
        release.set()

        assert succeeded(pid)


def test_a_child_waits_for_itself_where_its_parent_was_waiting(redis, name):
    """A thread of the parent that waited for a key does not exist in the child, which must not wait for it."""
    cache = Cache(redis, namespace=name, lease="2m")
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
        first = pool.submit(cache.get_or_set, "k", lambda: entered.set() or (go.wait(60) and "value"))
        assert entered.wait(10)
        second = pool.submit(cache.get_or_set, "k", lambda: "other")
        assert comes_to(1)
        pid = in_child(lambda: cache.get_or_set("k", lambda: "other") == "value")
        child_waits_in_redis = comes_to(2)
        go.set()
        values = [first.result(30), second.result(30)]
        if not child_waits_in_redis:
            os.kill(pid, signal.SIGKILL)

        assert values == ["value", "value"]
        assert succeeded(pid)
        assert child_waits_in_redis
