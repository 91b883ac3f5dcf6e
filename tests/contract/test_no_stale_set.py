"""Never stale: after an invalidation has returned, nothing that was read before it is served or stored.

A *load* is three steps: it misses (or finds what is stale), it reads the database, it ends. An *invalidation* is two:
the database changes, Redis is told. Every order of these steps is played, for every way of loading and every kind of
invalidation. Loads stand still at gates until it is their turn, so that time decides nothing. Then several processes
do the same at random, and a checker looks at what they noted.
"""

import json
import mmap
import os
import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from petiole.cachelib import MISS, Cache, Loaded, Near, Settings, cached, connect
from petiole.cachelib.connections import Profile
from petiole.cachelib.keys import lease

MAY_TAKE_S = 20
TAGS = ["t", "u"]
LOADING_THREAD = "petiole-load"


def until(condition, what="it did not come to be"):
    """Wait for what must happen some time."""
    deadline = time.monotonic() + MAY_TAKE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.002)
    return found


def interleavings(first, second):
    """Every order of the steps of two who each keep to their own order."""
    count = len(first) + len(second)
    for places in combinations(range(count), len(first)):
        ours, theirs = iter(first), iter(second)
        yield [next(ours) if place in places else next(theirs) for place in range(count)]


class Database:
    """One row."""

    def __init__(self):
        self.value = "old"

    def commit(self):
        self.value = "new"


class Load:
    """A load of one key in a thread of its own, which stands still before it reads the row, and after."""

    def __init__(self, pool, database):
        self._pool = pool
        self._database = database
        self._at_gate = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._calls = []

    def loader(self):
        self._stop()
        value = self._database.value
        self._stop()
        return value

    def begin(self, call):
        """Start it. It comes to its first gate, or it is over, because there was nothing to load."""
        self._calls.append(self._pool.submit(call))
        self._settle()

    def go_on(self):
        """To the next gate, or to the end, whatever is stored then is stored. Does nothing once it is over."""
        if not self._is_over():
            self._go.release()
            self._settle()

    def end(self):
        """To the end, through all gates. What the calls returned."""
        while not self._is_over():
            self.go_on()
        return [call.result(MAY_TAKE_S) for call in self._calls]

    def _stop(self):
        self._at_gate.release()
        assert self._go.acquire(timeout=MAY_TAKE_S), "nobody let it go on"

    def _settle(self):
        until(lambda: self._at_gate.acquire(timeout=0.001) or self._is_over(), "it neither stops nor ends")

    def _is_over(self):
        loading = any(thread.name == LOADING_THREAD for thread in threading.enumerate())
        return all(call.done() for call in self._calls) and not loading


def stop_all(loads):
    for load in loads:
        load.end()


# --- ways of loading, kinds of invalidation ---------------------------------------------------------------------------


def guarded(cache, key, load):
    with cache.guard([key, f"{key}:other"], tags=TAGS) as guard:
        return cache.set_many({key: load.loader(), f"{key}:other": 1}, guard=guard)


def many(cache, key, load):
    return cache.get_or_set_many([f"{key}:other", key], lambda keys: dict.fromkeys(keys, load.loader()), tags=TAGS)


def many_with_tags_of_the_loader(cache, key, load):
    return cache.get_or_set_many([key], lambda keys: {key: Loaded(load.loader(), tags=TAGS)})


WAYS = {
    "inline": lambda cache, key, load: cache.get_or_set(key, load.loader, tags=TAGS),
    "tags-of-the-loader": lambda cache, key, load: cache.get_or_set(key, lambda: Loaded(load.loader(), tags=TAGS)),
    "one-tag-of-the-loader": lambda cache, key, load: cache.get_or_set(
        key, lambda: Loaded(load.loader(), tags=["t"]), tags=["u"]
    ),
    "with-a-time-limit": lambda cache, key, load: cache.get_or_set(key, load.loader, tags=TAGS, hard_timeout=60),
    "many": many,
    "many-with-tags-of-the-loader": many_with_tags_of_the_loader,
    "refresh": lambda cache, key, load: cache.refresh(key, load.loader, tags=TAGS),
    "guard": guarded,
    "stale-inline": lambda cache, key, load: cache.get_or_set(key, load.loader, tags=TAGS, stale=600),
    "stale-many": many,
    "stale-soft-timeout": lambda cache, key, load: cache.get_or_set(
        key, load.loader, tags=TAGS, stale=600, soft_timeout=0.001
    ),
    "stale-thread": lambda cache, key, load: cache.get_or_set(key, load.loader, tags=TAGS, stale=600, refresh="thread"),
    "early-inline": lambda cache, key, load: cache.get_or_set(key, load.loader, tags=TAGS, early=1e-9),
    "early-thread": lambda cache, key, load: cache.get_or_set(
        key, load.loader, tags=TAGS, early=1e-9, refresh="thread"
    ),
}
REFRESHERS = ("stale-refresher", "early-refresher")

INVALIDATIONS = {
    "key": lambda cache, key: cache.invalidate(keys=[key]),
    "delete": lambda cache, key: cache.delete(key),
    "tag": lambda cache, key: cache.invalidate(tags=["t"]),
    "other-tag": lambda cache, key: cache.invalidate(tags=["u"]),
    "namespace": lambda cache, key: cache.clear(),
    "pattern": lambda cache, key: cache.invalidate(matching=f"{key}*"),
    "getdel": lambda cache, key: cache.getdel(key),
    "set": lambda cache, key: cache.set(key, "new", tags=TAGS),
    "set_many": lambda cache, key: cache.set_many({key: "new", f"{key}:other": 1}),
}
KEY_TAG_NAMESPACE = ("key", "tag", "namespace")


def prepared(cache, key, way):
    """What stands there before: nothing, something stale, or something fresh that is to be refreshed early."""
    if way.startswith("stale"):
        cache.set(key, "old", stale=600, tags=TAGS)
        assert cache.expire(key)
    elif way.startswith("early"):
        cache.set(key, "old", tags=TAGS)
        at_first = cache.ttl(key)
        until(lambda: cache.ttl(key) < at_first)  # a millisecond is the least that passes
    elif way == "refresh":
        cache.set(key, "old", tags=TAGS)


def loading(cache, key, way, pool, database):
    """The steps of a load, by name."""
    load = Load(pool, database)
    prepared(cache, key, way)
    steps = {"read": load.go_on, "end": load.end}
    if way in REFRESHERS:  # as with Celery: the refresh is handed over at one time, and runs at another, elsewhere
        handed = []
        early = 1e-9 if way.startswith("early") else None
        function = cached(cache, key, tags=TAGS, stale=600, early=early, refresh=lambda one: not handed.append(one))(
            load.loader
        )

        def call(refresh):
            return lambda: function.refresh_call(refresh.arguments, refresh.keywords, token=refresh.token)

        def run():
            for refresh in handed:
                load.begin(call(refresh))

        return load, {"hand over": lambda: load.begin(function), "begin": run, **steps}
    return load, {"begin": lambda: load.begin(lambda: WAYS[way](cache, key, load)), **steps}


@pytest.fixture(params=["single", "near", "cluster"])
def redis_of(request):
    """Connections to each kind of server; ``near`` is the single one, with a near cache."""
    return request.getfixturevalue("clustered" if request.param == "cluster" else "redis"), request.param == "near"


@pytest.fixture
def caches(redis_of, name):
    """The cache of one process, and that of another; with a near cache one and the same, which sees its own changes."""
    redis, near = redis_of
    cache = Cache(redis, namespace=name, near=Near() if near else None)
    if not near:
        return cache, Cache(redis, namespace=name)
    warm(cache)
    return cache, cache


def warm(cache):
    """Wait until the near cache serves."""
    cache.set("warm", "value")

    def served():
        cache.get("warm")
        return cache.stats().near_hits

    until(served, "the near cache does not come on")


def reads(cache, key):
    """What each way of reading without loading gives; twice, so that a near cache gets its chance."""
    versioned = cache.get_versioned(key)
    found = [cache.get(key, MISS), cache.get_many([key]).get(key, MISS), cache.get(key, MISS)]
    return [*found, versioned.value if versioned else MISS]


def loads_for_itself(cache, key, database):
    """What readers get who load and do not wait for others."""
    return [
        cache.get_or_set(key, lambda: database.value, wait=0, tags=TAGS),
        cache.get_or_set_many([key], lambda keys: dict.fromkeys(keys, database.value), wait=0, tags=TAGS)[key],
    ]


def evict_versions(cache):
    """As a server does that has no memory left."""
    names = [cache.keys.tag("t"), cache.keys.tag("u"), cache.keys.whole, cache.keys.sequence]
    for name in names:
        cache.redis.coordination.delete(name)


def play(caches, key, way, invalidate, order, pool, *, load_too):
    """One order. What was read after the invalidation, and what the load left."""
    cache, other = caches
    database = Database()
    load, steps = loading(cache, key, way, pool, database)
    steps |= {
        "commit": database.commit,
        "invalidate": lambda: invalidate(other, key),
        "evict": lambda: evict_versions(other),
    }
    seen, invalidated = [], False
    try:
        for step in order:
            steps[step]()
            invalidated = invalidated or step == "invalidate"
            if invalidated:
                seen += [cache.get(key, MISS), other.get(key, MISS)]
                if load_too:
                    seen += [*loads_for_itself(other, key, database), *loads_for_itself(cache, key, database)]
    finally:
        load.end()
    left = cache.get(key, MISS)
    seen += [left, *loads_for_itself(other, key, database), *reads(cache, key), other.get(key, MISS)]
    return seen, left


def steps_of(way):
    return ["hand over", "begin", "read", "end"] if way in REFRESHERS else ["begin", "read", "end"]


# --- every order ------------------------------------------------------------------------------------------------------


def every_order(caches, way, kinds):
    with ThreadPoolExecutor(2) as pool:
        for number, order in enumerate(interleavings(steps_of(way), ["commit", "invalidate"])):
            for kind in kinds(number):
                seen, _ = play(caches, f"{kind}{number}", way, INVALIDATIONS[kind], order, pool, load_too=False)

                assert "old" not in seen, (kind, order)
                assert "new" in seen, (kind, order)


@pytest.mark.parametrize("way", [*WAYS, *REFRESHERS])
def test_in_no_order_is_the_old_value_read_after_the_invalidation(caches, way):
    """Readers look after each step; what they may see is the new value, or none."""
    is_plain = caches[0] is not caches[1] and not caches[0].redis.is_cluster
    if is_plain and way in ("inline", "many", "guard"):
        every_order(caches, way, lambda _: INVALIDATIONS)
    elif is_plain:
        every_order(caches, way, lambda _: KEY_TAG_NAMESPACE)
    else:  # the kinds in turn
        every_order(caches, way, lambda number: [KEY_TAG_NAMESPACE[number % len(KEY_TAG_NAMESPACE)]])


@pytest.mark.storm
@pytest.mark.parametrize("way", [*WAYS, *REFRESHERS])
def test_in_no_order_and_by_no_kind_of_invalidation_is_the_old_value_read_after_it(caches, way):
    """Every kind in every order, on every kind of server."""
    every_order(caches, way, lambda _: INVALIDATIONS)


@pytest.mark.parametrize("way", [*WAYS, *REFRESHERS])
def test_readers_who_load_for_themselves_meanwhile_bring_nothing_old_back(redis, name, way):
    """They load after each step, and what they store stands between those steps."""
    caches = Cache(redis, namespace=name), Cache(redis, namespace=name)
    with ThreadPoolExecutor(2) as pool:
        for number, order in enumerate(interleavings(steps_of(way), ["commit", "invalidate"])):
            kind = list(INVALIDATIONS)[number % len(INVALIDATIONS)]
            seen, _ = play(caches, f"k{number}", way, INVALIDATIONS[kind], order, pool, load_too=True)

            assert "old" not in seen, (kind, order)


@pytest.mark.parametrize("way", [*WAYS, *REFRESHERS])
def test_a_load_that_began_after_the_invalidation_is_stored(caches, way):
    """Otherwise nothing would ever be stale, because nothing would ever be cached."""
    order = ["commit", "invalidate", *steps_of(way)]
    with ThreadPoolExecutor(2) as pool:
        for kind in INVALIDATIONS:
            _, left = play(caches, kind, way, INVALIDATIONS[kind], order, pool, load_too=False)

            assert left == "new", kind


@pytest.mark.parametrize("way", ["inline", "tags-of-the-loader", "stale-refresher"])
@pytest.mark.parametrize("server", ["redis", pytest.param("clustered", marks=pytest.mark.storm)])
def test_versions_that_are_evicted_after_the_invalidation_make_nothing_valid_again(request, name, way, server):
    """Redis may evict the number of the last invalidation and the versions of tags, at any moment."""
    redis = request.getfixturevalue(server)
    caches = Cache(redis, namespace=name), Cache(redis, namespace=name)
    with ThreadPoolExecutor(2) as pool:
        for number, order in enumerate(interleavings(steps_of(way), ["commit", "invalidate", "evict"])):
            for kind in ("tag", "namespace"):
                seen, _ = play(caches, f"{kind}{number}", way, INVALIDATIONS[kind], order, pool, load_too=False)

                assert "old" not in seen, (kind, order)


def test_an_entry_whose_version_was_evicted_is_a_miss(cache):
    """Of a tag, and of the namespace: a version that is not known is not the one it was."""
    for evicted in (cache.keys.tag("t"), cache.keys.whole):
        cache.set("k", "value", tags=["t"])
        assert cache.get("k") == "value"
        cache.redis.coordination.delete(evicted)

        assert cache.get("k", MISS) is MISS
        assert cache.get_or_set("k", lambda: "again", tags=["t"]) == "again"
        assert cache.get("k") == "again"


def test_a_lease_that_was_evicted_voids_its_load(cache):
    """What guards a load may be evicted too; then its value is for its caller alone."""
    held = lease(cache.keys.entry("k"))

    assert cache.get_or_set("k", lambda: cache.redis.coordination.delete(held) and "value") == "value"
    assert cache.get("k", MISS) is MISS


# --- those who join a load --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KEY_TAG_NAMESPACE, "pattern", "getdel"])
@pytest.mark.parametrize("way", ["inline", "tags-of-the-loader", "with-a-time-limit"])
def test_who_joins_a_load_after_the_invalidation_does_not_get_what_it_read_before(cache, way, kind):
    """A thread that finds a load of its own process under way waits for it, and must not take its old value."""
    database = Database()
    with ThreadPoolExecutor(4) as pool:
        load, steps = loading(cache, "k", way, pool, database)
        steps["begin"]()
        steps["read"]()
        before = pool.submit(cache.get_or_set, "k", lambda: database.value, tags=TAGS)
        until(lambda: cache.stats().joins == 1)
        database.commit()
        INVALIDATIONS[kind](Cache(cache.redis, namespace=cache.namespace), "k")
        after = pool.submit(cache.get_or_set, "k", lambda: database.value, tags=TAGS)
        until(lambda: cache.stats().joins == 2 or after.done())
        returned = load.end()

        assert returned == ["old"]
        assert before.result(MAY_TAKE_S) in ("old", "new")
        assert after.result(MAY_TAKE_S) == "new"
    assert cache.get("k") == "new"


@pytest.mark.parametrize("kind", KEY_TAG_NAMESPACE)
def test_who_waits_for_another_process_does_not_get_what_was_read_before_the_invalidation(redis, name, kind):
    """Nor do the threads that wait with it."""
    holder, cache = Cache(redis, namespace=name), Cache(redis, namespace=name)
    database = Database()
    with ThreadPoolExecutor(6) as pool:
        load, steps = loading(holder, "k", "inline", pool, database)
        steps["begin"]()
        steps["read"]()
        early = pool.submit(cache.get_or_set, "k", lambda: database.value, tags=TAGS)
        until(lambda: cache.stats().waits >= 1)
        database.commit()
        INVALIDATIONS[kind](Cache(redis, namespace=name), "k")
        after = [pool.submit(cache.get_or_set, "k", lambda: database.value, tags=TAGS) for _ in range(3)]
        until(lambda: all(one.done() for one in after) or cache.stats().joins >= 3)
        load.end()

        assert [one.result(MAY_TAKE_S) for one in after] == ["new"] * 3
        assert early.result(MAY_TAKE_S) in ("old", "new")
    assert cache.get("k") == "new"


# --- two processes ----------------------------------------------------------------------------------------------------


class Child:
    """A forked process that loads as it is told, byte by byte: ``b`` begin, ``g`` go on. It shares the row."""

    def __init__(self, cache, way):
        self._row = mmap.mmap(-1, 1)
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(MAY_TAKE_S)
        self.pid = os.fork()
        if self.pid == 0:
            signal.alarm(120)
            try:
                self._socket.close()
                self._work(Cache(cache.redis, namespace=cache.namespace), way, theirs)
            finally:
                os._exit(1)
        theirs.close()

    @property
    def value(self):
        return "new" if self._row[0] else "old"

    def commit(self):
        self._row[0] = 1

    def roll_back(self):
        self._row[0] = 0

    def tell(self, byte):
        """Have it go on; ``s``: it stands at a gate, ``o``: it is over."""
        self._socket.sendall(byte)
        return self._socket.recv(1)

    def stop(self):
        self._socket.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._row.close()

    def _work(self, cache, way, line):
        outer = self

        class Here:
            @staticmethod
            def loader():
                Here.stop()
                value = outer.value
                Here.stop()
                return value

            @staticmethod
            def stop():
                line.sendall(b"s")
                line.recv(1)

        number = 0
        while line.recv(1):
            WAYS[way](cache, f"k{number}", Here)
            number += 1
            line.sendall(b"o")


@pytest.mark.parametrize("way", ["inline", "tags-of-the-loader", "many", "guard", "refresh", "stale-inline"])
def test_a_load_in_another_process_is_voided_in_every_order(cache, way):
    """The same orders, with the load in one process and the invalidation in another."""
    child = Child(cache, way)
    kinds = [kind for kind in INVALIDATIONS if not kind.startswith("set")]
    try:
        number = 0
        for kind in kinds:
            for order in interleavings(["begin", "read", "end"], ["commit", "invalidate"]):
                child.roll_back()
                key, seen, invalidated, said = f"k{number}", [], False, b""
                prepared(cache, key, way)
                for step in order:
                    if step == "commit":
                        child.commit()
                    elif step == "invalidate":
                        INVALIDATIONS[kind](cache, key)
                        invalidated = True
                    elif step == "begin":
                        said = child.tell(b"b")
                    elif said == b"s":
                        said = child.tell(b"g")
                    if invalidated:
                        seen += reads(cache, key)
                assert said == b"o", "the load is over"
                number += 1

                assert "old" not in seen, (kind, order)
                assert loads_for_itself(cache, key, child) == ["new", "new"]
    finally:
        child.stop()


def in_child(work):
    """Run work in a forked child; whether it returned True."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_clock_that_is_an_hour_off_changes_nothing(redis, name):
    """Age is told by Redis alone: what a process with a wrong clock stores, loads or removes is as good as any."""
    cache = Cache(redis, namespace=name, ttl=600)
    right = time.time
    for off_s in (3_600, -3_600):
        key = f"k{off_s}"
        cache.set(f"{key}:ours", "ours", tags=["t"])

        def work(key=key, off_s=off_s):
            time.time = lambda: right() + off_s
            ours = cache.get(f"{key}:ours"), cache.get_or_set(f"{key}:ours", lambda: "again", tags=["t"], early=0.5)
            cache.get_or_set(key, lambda: "theirs", ttl=60, stale=60, tags=["u"], early=0.5)
            return ours == ("ours", "ours") and cache.invalidate(tags=["t"]) == 1

        assert in_child(work)
        assert cache.get(f"{key}:ours", MISS) is MISS
        assert cache.get(key) == "theirs"
        assert 0 < cache.ttl(key) <= 60
        assert cache.get_or_set(key, lambda: "again", early=0.01, tags=["u"]) in ("theirs", "again")
        cache.invalidate(tags=["u"])
        assert cache.get(key, MISS) is MISS


def test_a_load_of_the_parent_is_not_joined_by_the_child_that_is_forked_meanwhile(cache):
    """The thread that would end it does not run in the child; and the child's invalidation voids the parent's load."""
    database = Database()
    with ThreadPoolExecutor(2) as pool:
        load, steps = loading(cache, "k", "inline", pool, database)
        steps["begin"]()
        steps["read"]()
        database.commit()

        assert in_child(lambda: cache.delete("k") == 0 and cache.get_or_set("k", lambda: "new", tags=TAGS) == "new")
        load.end()
    assert cache.get("k") == "new"


# --- while Redis does not answer --------------------------------------------------------------------------------------


@contextmanager
def stopped(server):
    """The server's process stands still, and goes on when it is told to, or at the end."""
    with connect(server.url) as redis:
        pid = redis.coordination.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield lambda: os.kill(pid, signal.SIGCONT)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_what_was_invalidated_while_redis_hung_is_not_served_here_and_later_nowhere(own_server, name, monkeypatch):
    """Loads of every kind end before, between and after the steps of an invalidation that Redis does not take."""
    monkeypatch.setattr("petiole.cachelib.connections.COORDINATION", Profile("coordination", 0.3, 0.3))
    server, database = own_server(), Database()
    kinds = [*KEY_TAG_NAMESPACE, "pattern"]
    places = ["never", "hung", "commit", "invalidate", "again"]
    with (
        connect(settings=Settings(url=server.url, cache_timeout=0.2)) as redis,
        ThreadPoolExecutor(len(kinds) * len(places)) as pool,
    ):
        caches = {kind: Cache(redis, namespace=f"{name}-{kind}") for kind in kinds}
        loads = {}
        for kind in kinds:
            for place in places:
                load = loads[kind, place] = Load(pool, database)
                key = f"k-{place}"
                load.begin(lambda c=caches[kind], k=key, one=load: c.get_or_set(k, one.loader, tags=TAGS))
                load.go_on()
            caches[kind].set("k-stored", "old", tags=TAGS)
        keys = [f"k-{place}" for place in (*places, "stored")]
        seen = []

        def ends(place):
            for kind in kinds:
                loads[kind, place].end()

        def look():
            for kind in kinds:
                seen.extend(caches[kind].get_many(keys).values())

        ends("never")
        with stopped(server) as go_on:
            ends("hung")
            database.commit()
            ends("commit")
            caches["key"].invalidate(keys=keys)
            for kind in ("tag", "namespace", "pattern"):
                INVALIDATIONS[kind](caches[kind], "k")
            look()
            ends("invalidate")
            look()
            assert all(cache.stats().unsent for cache in caches.values())
            go_on()
            ends("again")
            until(lambda: look() or not any(cache.stats().unsent for cache in caches.values()))
        look()
        with connect(settings=Settings(url=server.url, cache_timeout=2)) as elsewhere:
            for kind in kinds:
                seen.extend(Cache(elsewhere, namespace=f"{name}-{kind}").get_many(keys).values())
                until(lambda c=caches[kind]: c.get_or_set("k-stored", lambda: "new") == c.get("k-stored") == "new")

    assert "old" not in seen


def away(*_, **__):
    """Tells Redis of nothing."""
    raise RedisConnectionError("Redis is away")


@pytest.mark.parametrize("kind", [*KEY_TAG_NAMESPACE, "pattern"])
def test_who_joins_a_load_after_an_invalidation_that_is_only_remembered_does_not_get_what_it_read_before(
    cache, monkeypatch, kind
):
    """The lease of the load is still good in Redis, which was not told; this process knows better."""
    monkeypatch.setattr("petiole.cachelib.remembered._FIRST_PAUSE_S", 3_600.0)
    database = Database()
    with ThreadPoolExecutor(2) as pool:
        load, steps = loading(cache, "k", "inline", pool, database)
        steps["begin"]()
        steps["read"]()
        database.commit()
        with monkeypatch.context() as patch:
            patch.setattr("petiole.cachelib.cache._send", away)
            INVALIDATIONS[kind](cache, "k")
        joined = pool.submit(cache.get_or_set, "k", lambda: database.value, tags=TAGS)
        until(lambda: cache.stats().joins == 1)

        assert load.end() == ["old"]
        assert joined.result(MAY_TAKE_S) == "new"
    assert cache.get("k", MISS) is MISS
    cache._remembered.send()
    assert cache.get("k", MISS) is MISS


READS = {
    "get": lambda cache, key: cache.get(key, MISS),
    "get_many": lambda cache, key: cache.get_many([key]).get(key, MISS),
    "get_versioned": lambda cache, key: cache.get_versioned(key) or MISS,
    "get_or_set": lambda cache, key: cache.get_or_set(key, lambda: "new", tags=TAGS),
    "get_or_set_many": lambda cache, key: cache.get_or_set_many([key], lambda keys: {key: "new"}, tags=TAGS)[key],
}


@pytest.mark.parametrize("near", [None, Near()], ids=["plain", "near"])
@pytest.mark.parametrize("kind", [*KEY_TAG_NAMESPACE, "pattern"])
def test_a_read_that_redis_answered_before_it_was_told_does_not_serve_what_was_invalidated(
    redis, name, monkeypatch, kind, near
):
    """The invalidation has returned and waits here; the read begins; Redis answers it; only then Redis is told."""
    monkeypatch.setattr("petiole.cachelib.remembered._FIRST_PAUSE_S", 3_600.0)  # it is told when the test says so
    served = []
    for read, reads_it in READS.items():
        cache = Cache(redis, namespace=f"{name}-{read}", near=near)
        if near:
            warm(cache)
        cache.set("k", "old", tags=TAGS)
        with monkeypatch.context() as patch:
            patch.setattr("petiole.cachelib.cache._send", away)
            INVALIDATIONS[kind](cache, "k")
        assert cache.stats().unsent == 1
        judged = cache._reader._judged

        def told_meanwhile(*arguments, cache=cache, judged=judged, **keywords):
            cache._remembered.send()
            return judged(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(cache._reader, "_judged", told_meanwhile)
            if reads_it(cache, "k") not in ("new", MISS):
                served.append(read)

    assert served == []


# --- at random --------------------------------------------------------------------------------------------------------


class Versions:
    """Rows that several processes share: each holds the number of its last commit. One writer for each."""

    def __init__(self, count):
        self._memory = mmap.mmap(-1, 8 * count)

    def __getitem__(self, row):
        return int.from_bytes(self._memory[8 * row : 8 * row + 8], "little")

    def commit(self, row):
        number = self[row] + 1
        self._memory[8 * row : 8 * row + 8] = number.to_bytes(8, "little")
        return number


def too_old(reads_, invalidations):
    """The reads that began after the invalidation of a version had returned, and gave an older one.

    Arguments:
        reads_: (row, when it began, the version that it gave).
        invalidations: (row, when it had returned, the version that was committed before it).
    """
    events = sorted(
        [(returned, 1, row, version) for row, returned, version in invalidations]
        + [(began, 0, row, version) for row, began, version in reads_]
    )
    newest, wrong = {}, []
    for at, is_invalidation, row, version in events:
        if is_invalidation:
            newest[row] = max(version, newest.get(row, 0))
        elif version < newest.get(row, 0):
            wrong.append((row, at, version, newest[row]))
    return wrong


def test_the_checker_finds_what_is_too_old():
    """And nothing else: a read that began before the invalidation had returned may give the old value."""
    assert too_old([(0, 5, 1)], [(0, 4, 2)]) == [(0, 5, 1, 2)]
    assert too_old([(0, 3, 1), (0, 4, 1), (0, 5, 2), (1, 5, 1)], [(0, 4, 2)]) == []
    assert too_old([(0, 9, 2)], [(0, 4, 3), (0, 8, 2)]) == [(0, 9, 2, 3)]


ROWS, WRITERS = 4, 2
RUNS_S = float(os.environ.get("PETIOLE_STORM_SECONDS", "1"))
"""Of a history of chance: more of them for a longer proof."""


def read_somehow(cache, row, versions, chance):
    """One read in one of the ways, with a loader that takes its time now and then."""

    def load():
        value = versions[row]
        if chance.random() < 0.3:
            time.sleep(chance.random() * 0.003)
        return value

    key, tags, way = f"row{row}", [f"tag{row}", "all"], chance.randrange(9)
    if way == 0:
        return cache.get(key, MISS)
    if way == 1:
        return cache.get_many([key]).get(key, MISS)
    if way == 2:
        return cache.get_or_set_many([key], lambda keys: dict.fromkeys(keys, load()), tags=tags)[key]
    if way == 3:
        cache.refresh(key, load, tags=tags, stale=600)
        return MISS
    if way == 4:
        with cache.guard([key], tags=tags) as guard:
            cache.set_many({key: load()}, guard=guard)
        return MISS
    if way == 5:
        return cache.get_or_set(key, load, tags=tags, stale=600, early=0.9999, refresh="thread")
    if way == 6:
        return cache.get_or_set(key, load, tags=tags, early="xfetch", hard_timeout=60)
    if way == 7:
        return cache.get_or_set(key, lambda: Loaded(load(), tags=tags))
    return cache.get_or_set(key, load, tags=tags, ttl=0.05, stale=0.05)


def remove_somehow(cache, row, chance):
    kind = chance.randrange(5)
    if kind == 0:
        cache.invalidate(keys=[f"row{row}"])
    elif kind == 1:
        cache.invalidate(tags=[f"tag{row}"])
    elif kind == 2:
        cache.invalidate(tags=["all"])
    elif kind == 3:
        cache.clear()
    else:
        cache.delete(f"row{row}")


def history_of(redis, name, near, number, versions, seed):
    """What one process with several threads read and removed: ([read...], [invalidation...])."""
    cache = Cache(redis, namespace=name, lease=5, near=near)
    noted_reads, noted_removals, until_ns = [], [], time.monotonic_ns() + int(RUNS_S * 1e9)

    def reader(seed):
        chance = random.Random(seed)
        while (began := time.monotonic_ns()) < until_ns:
            row = chance.randrange(ROWS)
            value = read_somehow(cache, row, versions, chance)
            if value is not MISS:
                noted_reads.append((row, began, value))

    def writer(seed):
        chance = random.Random(seed)
        while time.monotonic_ns() < until_ns:
            row = chance.randrange(ROWS // WRITERS) * WRITERS + number
            version = versions.commit(row)
            remove_somehow(cache, row, chance)
            noted_removals.append((row, time.monotonic_ns(), version))
            time.sleep(chance.random() * 0.005)

    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(reader, f"{seed}r{n}") for n in range(3)]
        if number < WRITERS:
            work.append(pool.submit(writer, f"{seed}w"))
        for one in work:
            one.result()
    return noted_reads, noted_removals


def histories(url, name, near, seed, processes=3):
    """Those of several processes that run at the same time."""
    versions = Versions(ROWS)
    pipes = []
    for number in range(processes):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(120)
            try:
                os.close(reading)
                with connect(settings=Settings(url=url, cache_timeout=5)) as redis:
                    noted = history_of(redis, name, near, number, versions, f"{seed}{number}")
                with os.fdopen(writing, "w") as out:
                    json.dump(noted, out)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writing)
        pipes.append((pid, reading))
    told = []
    for pid, reading in pipes:
        with os.fdopen(reading) as noted:
            text = noted.read()
        assert os.waitpid(pid, 0)[1] == 0, "a process failed; what it said is above"
        told.append(json.loads(text))
    return told


@pytest.mark.parametrize("kind", ["single", "cluster"])
def test_at_random_no_read_gives_what_was_invalidated_before_it_began(request, name, kind):
    """Three processes with three readers each, two writers."""
    server = request.getfixturevalue("cluster" if kind == "cluster" else "redis_server")
    seed = random.randrange(10**9)
    told = histories(server.url, name, None, seed)
    all_reads = [read for noted, _ in told for read in noted]
    all_removals = [removal for _, noted in told for removal in noted]

    assert too_old(all_reads, all_removals) == [], f"seed {seed}"
    assert len(all_reads) > 50  # or nothing was proved
    assert len(all_removals) > 5


HEARTBEAT_NS = 1_000_000_000


def test_at_random_a_near_cache_sees_its_own_process_at_once_and_others_within_a_heartbeat(redis_server, name):
    """For the reads of each process: its own invalidations count when they return, others' a heartbeat later."""
    seed = random.randrange(10**9)
    told = histories(redis_server.url, name, Near(), seed)
    for number, (noted, own) in enumerate(told):
        others = [
            (row, returned + HEARTBEAT_NS, version)
            for other, (_, removals) in enumerate(told)
            if other != number
            for row, returned, version in removals
        ]

        assert too_old(noted, [*own, *others]) == [], f"seed {seed}"
