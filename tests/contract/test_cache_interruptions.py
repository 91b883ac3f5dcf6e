"""What comes in between costs the moment that it takes, and no more: nothing is lost for good, or held for ever.

A system without threads, a server that stops for a moment, is full, or forbids a command, a signal at any point of a
miss: afterwards keys are loaded, leases renewed and invalidations sent as ever.
"""

import gc
import os
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from local_nodes import eventually

import petiole.cachelib
from petiole.cachelib import Cache, Near, Settings, connect
from petiole.cachelib.connections import Profile
from petiole.cachelib.errors import LoadTimedOut, ServerUnavailable
from petiole.cachelib.keys import lease
from petiole.cachelib.remembered import Remembered, Unsent

LONG_S = 60
LEASES = "petiole-leases"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    """Between two tries to send what is remembered."""
    monkeypatch.setattr("petiole.cachelib.remembered._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("petiole.cachelib.remembered._LONGEST_PAUSE_S", 0.05)


@contextmanager
def no_thread_starts():
    """The system has no threads for this process."""

    def start(thread):
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        yield


def threads(name):
    return {thread for thread in threading.enumerate() if thread.name == name}


def lease_of(cache, key):
    return lease(cache.keys.entry(key))


def lease_left_ms(cache, key):
    """What is left of a lease; -2 where there is none."""
    return cache.redis.coordination.pttl(lease_of(cache, key))


@contextmanager
def connected(server, cache_timeout_s=2.0):
    with connect(settings=Settings(url=server.url, cache_timeout=cache_timeout_s)) as redis:
        yield redis


# Threads that cannot start


def is_renewed(cache, key):
    """Called by a loader: whether its lease gets more time before it runs out."""
    left_ms = lease_left_ms(cache, key)
    while left_ms > 0:
        threading.Event().wait(0.005)
        before_ms, left_ms = left_ms, lease_left_ms(cache, key)
        if left_ms > before_ms:
            return True
    return False


def test_a_load_goes_on_without_a_thread_and_later_loads_are_renewed(redis, name, caplog):
    cache = Cache(redis, namespace=name, lease=1.5)
    with no_thread_starts():
        assert cache.get_or_set("k", lambda: 1) == 1
        assert cache.get("k") == 1
        assert cache.get_or_set_many(["m", "n"], lambda keys: dict.fromkeys(keys, 2)) == {"m": 2, "n": 2}
        with cache.guard(["g"]) as guard:
            assert cache.set_many({"g": 3}, guard=guard)
    assert "no thread to renew leases with" in caplog.text
    assert cache.get_or_set("long", lambda: is_renewed(cache, "long"))
    assert cache.get("long")


def test_what_is_remembered_without_a_thread_is_sent_when_there_is_one(own_server, name, caplog):
    with connected(own_server()) as redis, connected_again(redis) as elsewhere:
        cache, other = Cache(redis, namespace=name), Cache(elsewhere, namespace=name)
        cache.set_many({"a": 1, "b": 2, "c": 3})
        refuse(redis, "unlink")
        with no_thread_starts():
            assert cache.delete("a") == 0
            assert cache.delete("b") == 0
            assert (cache.stats().unsent, cache.get_many(["a", "b", "c"])) == (2, {"c": 3})
        assert "no thread to send invalidations with" in caplog.text
        assert cache.delete("c") == 0
        allow(redis)
        eventually(lambda: cache.stats().unsent == 0, "all are sent")
        assert other.get_many(["a", "b", "c"]) == {}


def connected_again(redis):
    """As another process would be."""
    return connect(settings=Settings(url=redis.address, cache_timeout=2))


def refuse(redis, *commands):
    """From now on the server forbids some commands to everybody."""
    redis.coordination.execute_command("ACL", "SETUSER", "default", *[f"-{command}" for command in commands])


def allow(redis):
    redis.coordination.execute_command("ACL", "SETUSER", "default", "+@all")


def test_a_load_with_a_time_limit_and_without_a_thread_is_over_at_once(redis, name):
    cache = Cache(redis, namespace=name, lease=2)
    with no_thread_starts(), pytest.raises(LoadTimedOut):
        cache.get_or_set("k", lambda: 1, hard_timeout=LONG_S)
    assert lease_left_ms(cache, "k") == -2
    assert cache.get_or_set("k", lambda: 2, hard_timeout=LONG_S) == 2
    assert cache.get("k") == 2
    stats = cache.stats()
    assert (stats.joins, stats.waits) == (0, 0)


@pytest.mark.parametrize("options", [{"refresh": "thread"}, {"soft_timeout": 9}, {"hard_timeout": 9}], ids=str)
def test_without_a_thread_a_stale_value_is_served_and_refreshed_later(cache, options):
    cache.set("k", "old", stale=LONG_S)
    cache.expire("k")
    with no_thread_starts():
        assert cache.get_or_set("k", lambda: "new", stale=LONG_S, **options) == "old"
    assert lease_left_ms(cache, "k") == -2
    cache.get_or_set("k", lambda: "new", stale=LONG_S, **options)
    eventually(lambda: cache.get("k") == "new", "it is refreshed")


def test_the_thread_that_renews_ends_when_nothing_is_held(redis, name):
    before = threads(LEASES)
    caches = [Cache(redis, namespace=f"{name}{number}", lease=0.1) for number in range(10)]
    for _ in range(2):  # and there is one again when there is something again
        seen = [cache.get_or_set("k", lambda: len(threads(LEASES) - before)) for cache in caches]
        assert min(seen) > 0
        for cache in caches:
            cache.delete("k")
        eventually(lambda: threads(LEASES) <= before, "the threads end")


# A server that stops for a moment


def stop(redis):
    """The server stands still. Returns what lets it go on."""
    pid = redis.coordination.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    return lambda: os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    "ask",
    [
        lambda cache: cache.get_or_set("k", lambda: 1) == 1,
        lambda cache: cache.get_or_set("k", lambda: 1, tags=["t"]) == 1,
        lambda cache: cache.get_or_set_many(["k", "n"], lambda keys: dict.fromkeys(keys, 1)) == {"k": 1, "n": 1},
        lambda cache: not cache.refresh("k", lambda: 1),
    ],
    ids=["get_or_set", "with-tags", "get_or_set_many", "refresh"],
)
def test_a_look_that_timed_out_holds_no_lease_when_the_server_goes_on(own_server, name, monkeypatch, ask):
    monkeypatch.setattr("petiole.cachelib.connections.COORDINATION", Profile("coordination", 0.3, 0.3))
    with connected(own_server(), 0.05) as redis:
        cache = Cache(redis, namespace=name, lease=30)

        def taken():
            return int(redis.coordination.info("commandstats").get("cmdstat_hset", {}).get("calls", 0))

        eventually(lambda: cache.set("warm", 1), "the connections and the scripts are there")
        eventually(lambda: cache.get_or_set("warm", lambda: 1) == 1 and not cache.delete("none"), "also to look")
        before, go_on = taken(), stop(redis)
        try:
            assert ask(cache)
        finally:
            go_on()
        eventually(lambda: taken() > before, "the server has carried out the look that timed out")
        # Well before it would run out, and also where the first try to give it back came before the look.
        eventually(lambda: lease_left_ms(cache, "k") == -2, "the lease is given back", within_s=20)
        eventually(lambda: lease_left_ms(cache, "n") == -2, "the lease is given back", within_s=20)
        eventually(lambda: cache.get_or_set("k", lambda: 2) == 2 and cache.get("k") == 2, "it is loaded and kept")
        assert cache.stats().waits == 0


# A signal at any point of a miss


class Interrupted(BaseException):
    """As a signal's handler raises it."""


HERE = str(Path(petiole.cachelib.__file__).resolve().parent)


class At:
    """Raises where a miss enters its ``point``-th function of this package, or goes on in its generator."""

    def __init__(self, point):
        self.point, self.seen = point, 0

    def __call__(self, frame, event, argument):
        if event == "call" and Path(frame.f_code.co_filename).resolve().parent.as_posix() == HERE:
            self.seen += 1
            if self.seen == self.point:
                raise Interrupted(f"at point {self.point}, {frame.f_code.co_qualname}")


def traced(call, trace):
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(before)


def one(keys, cache, value, **options):
    return {keys[0]: cache.get_or_set(keys[0], lambda: value, **options)}


def many(keys, cache, value, **options):
    return cache.get_or_set_many(keys, lambda wanted: dict.fromkeys(wanted, value), **options)


@pytest.mark.parametrize(
    ("ask", "options"),
    [(one, {}), (one, {"hard_timeout": LONG_S}), (one, {"tags": ["t"]}), (many, {})],
    ids=["get_or_set", "with-hard_timeout", "with-tags", "get_or_set_many"],
)
def test_a_signal_at_any_point_of_a_miss_delays_the_next_by_one_lease_at_most(redis, name, ask, options):
    cache = Cache(redis, namespace=name, lease=0.3)
    for keys in (["warm", "warm too"], ["warmer", "warmer too"]):
        ask(keys, cache, "first", **options)
    all_points = At(0)
    traced(lambda: ask(["none", "none too"], cache, "first", **options), all_points)
    points = {point: [f"k{point}", f"n{point}"] for point in range(1, all_points.seen + 1)}
    interrupted = 0
    for point, keys in points.items():
        at = At(point)
        try:
            traced(lambda keys=keys, at=at: ask(keys, cache, "first", **options), at)
        except Interrupted:
            interrupted += 1
    assert interrupted > len(points) / 2 > 10
    for point, keys in points.items():
        for key in keys:
            gone = f"the lease of {key} runs out, and is renewed by nobody, after an interruption at point {point}"
            eventually(lambda key=key: lease_left_ms(cache, key) == -2, gone, within_s=20)
    patient = Cache(redis, namespace=name, lease=LONG_S)  # a slow machine is no reason to lose the lease of the next
    before = patient.stats()
    for point, keys in points.items():
        kept = ask(keys, patient, "next", **options)
        assert patient.get_many(kept) == kept, f"not stored, after an interruption at point {point}"
        after = patient.stats()
        assert (after.joins, after.waits) == (before.joins, before.waits), f"held up, after one at point {point}"


@pytest.mark.parametrize("where", ["store", "pack"])
def test_a_signal_while_a_loaded_value_is_stored_gives_the_lease_back(cache, monkeypatch, where):
    def interrupted(*_, **__):
        monkeypatch.undo()
        raise Interrupted

    name = {
        "store": "petiole.cachelib.entry_store.EntryStore.fill",
        "pack": "petiole.cachelib.loading.Loading.body",
    }[where]
    monkeypatch.setattr(name, interrupted)
    with pytest.raises(Interrupted):
        cache.get_or_set("k", lambda: 1)
    assert lease_left_ms(cache, "k") == -2
    assert cache.get_or_set("k", lambda: 2) == cache.get("k") == 2


# A server that refuses


@pytest.fixture
def filled(own_server, name):
    """A cache, another as in another process, and what fills the server so that it takes nothing more."""
    with connected(own_server("--maxmemory-policy", "noeviction")) as redis, connected_again(redis) as elsewhere:
        cache, other = Cache(redis, namespace=name), Cache(elsewhere, namespace=name)
        cache.set("warm", 1)
        other.get("warm")

        def fill(full=True):
            redis.coordination.config_set("maxmemory", 1 if full else 0)

        yield cache, other, fill
        fill(False)
        eventually(lambda: cache.stats().unsent == 0, "all is sent")


def test_a_full_server_still_forgets_keys_and_is_told_of_tags_later(filled):
    cache, other, fill = filled
    cache.set("price", 1)
    cache.set("tagged", 2, tags=["t"])
    fill()
    cache.invalidate(keys=["price"], tags=["t"])
    assert other.get("price") is None
    assert cache.get("tagged") is None
    assert cache.stats().unsent > 0
    fill(False)
    eventually(lambda: cache.stats().unsent == 0, "the tags are sent")
    assert other.get("tagged") is None


def test_tags_that_a_full_server_refuses_hold_up_no_pattern(filled):
    cache, other, fill = filled
    cache.set_many({"page:1": 1, "k": 2})
    fill()
    cache.invalidate(tags=["t"], matching="page:*")
    assert cache.stats().unsent > 0
    assert other.get_many(["page:1", "k"]) == {"k": 2}


def test_one_part_that_is_refused_holds_up_no_other(filled):
    cache, other, fill = filled
    cache.set_many({"a": 1, "b": 2, "page:1": 3, "expiring": 4}, stale=LONG_S)
    refuse(cache.redis, "scan")
    fill()
    cache.invalidate(keys=["a"], matching="page:*")
    cache.delete("b")
    assert other.get_many(["a", "b"]) == {}
    assert cache.get("page:1") is None
    allow(cache.redis)
    fill(False)
    eventually(lambda: cache.stats().unsent == 0, "the pattern is sent")
    assert other.get_many(["page:1", "expiring"]) == {"expiring": 4}


@pytest.mark.parametrize("how", ["full", "forbidden"])
@pytest.mark.parametrize(
    "write",
    [
        lambda cache: cache.set("k", "new"),
        lambda cache: cache.set("k", "new", tags=["t"]),
        lambda cache: cache.set_many({"k": "new", "n": 1}),
    ],
    ids=["set", "with-tags", "set_many"],
)
def test_what_could_not_be_set_invalidates_what_was_there(filled, how, write):
    cache, other, fill = filled
    cache.set("k", "old")
    if how == "full":
        fill()
    else:
        refuse(cache.redis, "eval", "evalsha")
    assert write(cache) is False
    if how == "full":
        assert cache.get("k") is None
    allow(cache.redis)
    fill(False)
    eventually(lambda: cache.stats().unsent == 0, "the invalidation is sent")
    assert other.get("k") is cache.get("k") is None
    assert write(cache)
    assert other.get("k") == "new"


def test_what_was_only_to_be_stored_on_a_condition_invalidates_nothing(filled):
    cache, other, fill = filled
    cache.set("k", "old")
    version = other.get_versioned("k").version
    fill()
    assert not cache.add("k", "new")
    assert not cache.add("none", "new")
    assert not cache.replace("k", "new")
    assert not cache.compare_and_set("k", "new", version)
    assert (cache.stats().unsent, cache.get("k"), other.get("k")) == (0, "old", "old")


def test_a_strict_cache_says_that_a_value_was_not_set(filled):
    cache, _, fill = filled
    strict = Cache(cache.redis, namespace=cache.namespace, strict=True)
    fill()
    with pytest.raises(ServerUnavailable, match="set"):
        strict.set("k", "new")
    assert strict.stats().unsent == 0


def test_a_server_that_forbids_to_wait_is_not_asked_without_a_pause(own_server, name):
    begun, go_on = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert go_on.wait(LONG_S)
        return "value"

    with connected(own_server()) as redis, connected_again(redis) as elsewhere, ThreadPoolExecutor(2) as pool:
        cache, other = Cache(redis, namespace=name), Cache(elsewhere, namespace=name)
        refuse(redis, "blpop")
        try:
            loads = pool.submit(cache.get_or_set, "k", slow)
            assert begun.wait(LONG_S)
            started = time.monotonic()
            waits = pool.submit(other.get_or_set, "k", lambda: "not asked for")
            eventually(lambda: other.stats().waits >= 6, "it waits, and looks now and then")
            looked, passed_s = other.stats().waits, time.monotonic() - started
        finally:
            go_on.set()
        assert loads.result(LONG_S) == waits.result(LONG_S) == "value"
        assert looked <= passed_s / 0.05 + 2


# What is asked for


@pytest.mark.parametrize("option", ["when", "ttl", "refresh"])
def test_a_function_made_for_one_call_is_not_kept_with_what_it_holds(cache, option):
    class Request:
        """What a web framework makes for each request."""

    def handle(number):
        request = Request()
        made = {"when": lambda _: bool(request), "ttl": lambda _: 5 if request else 6, "refresh": lambda _: not request}
        assert cache.get_or_set(f"k{number}", lambda: number, **{option: made[option]}) == number
        return weakref.ref(request)

    handled = [handle(number) for number in range(5)]
    gc.collect()
    assert [one() for one in handled] == [None] * 5


def test_what_cannot_be_meant_is_refused(redis, name):
    with pytest.raises(TypeError, match=r"near=.*Near"):
        Cache(redis, namespace=name, near=Near)
    for lease_s in (0.0004, 0.009, "5ms"):
        with pytest.raises(ValueError, match="lease="):
            Cache(redis, namespace=name, lease=lease_s)
    assert Cache(redis, namespace=name, lease=0.01).lease_ms == 10


def test_a_remembered_invalidation_is_sent_by_the_next_thread_that_starts(redis):
    sent = []
    remembered = Remembered(redis, lambda unsent: sent.extend(unsent.keys), "cache 'c'")
    with no_thread_starts():
        remembered.add(Unsent(keys={"a": None}), OSError("away"))
    assert (sent, remembered.any, remembered.covers("a")) == ([], True, True)
    remembered.add(Unsent(keys={"b": None}), OSError("away"))
    eventually(lambda: not remembered.any, "both are sent")
    assert sorted(sent) == ["a", "b"]
