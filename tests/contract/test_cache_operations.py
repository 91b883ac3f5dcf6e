"""What each operation promises: its answer, what it leaves in Redis, what it voids, what it costs.

Age is made by telling Redis how long an entry still has to live. Another process is another ``Cache`` of the same
namespace, where it need not be one that dies.
"""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from local_nodes import eventually

from petiole.cachelib import MISS, Cache, EmbeddedServer, Loaded, Settings, connect
from petiole.cachelib.connections import Profile
from petiole.cachelib.errors import EntryNotCounter, LoaderRecursion, ServerUnavailable, ValueNotCacheable

LONG_S = 60


def never(*_):
    pytest.fail("the loader was called")


def fails(*_):
    raise OSError("the database is away")


def age(cache, key, *, left):
    """Make an entry so old that so many seconds are left of it."""
    assert cache.redis.coordination.pexpire(cache.keys.entry(key), int(left * 1_000))


def left_ms(cache, key):
    return cache.redis.coordination.pttl(cache.keys.entry(key))


def leases(cache):
    """What is being loaded, by anybody."""
    return list(cache.redis.coordination.scan_iter(f"petiole:1:lease:{{{cache.namespace}:*", count=10_000))


def another(cache, **options):
    """The same namespace, as another process has it."""
    return Cache(cache.redis, namespace=cache.namespace, **options)


def in_child(work):
    """Start work in a forked process; it ends with status 0 when the work returned True."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(LONG_S)
    status = 1
    try:
        status = 0 if work() else 2
    finally:
        os._exit(status)


def succeeded(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@contextmanager
def waiting_in_redis(cache, call):
    """Run a call in a thread; inside, it waits in Redis. Afterwards it has to end."""
    with ThreadPoolExecutor(1) as pool:
        before = cache.redis.coordination.info("clients")["blocked_clients"]
        future = pool.submit(call)
        eventually(lambda: cache.redis.coordination.info("clients")["blocked_clients"] > before, "it waits")
        yield future


@pytest.fixture(params=["plain", "tagged"])
def tags(request):
    """Everything holds for entries with tags as well."""
    return ["t", "u"] if request.param == "tagged" else []


@pytest.fixture
def stale(cache, tags):
    """A cache with an entry that is past its soft TTL, and has half of its stale window left."""
    cache.set("k", "old", ttl=60, stale=600, tags=tags)
    age(cache, "k", left=300)
    return cache


# add, replace


def test_add_stores_where_there_is_nothing(cache, tags):
    """And nowhere else."""
    assert cache.add("k", "first", ttl=60, stale=600, tags=tags)
    assert not cache.add("k", "second", tags=tags)
    assert cache.get("k") == "first"
    assert 640_000 < left_ms(cache, "k") <= 660_000


def test_add_leaves_what_is_stale(stale):
    """It may still be served."""
    assert not stale.add("k", "new")
    assert stale.get("k") == "old"


@pytest.mark.parametrize("invalidate", ["tag", "clear"])
def test_add_stores_over_what_was_invalidated(cache, invalidate):
    """An invalid entry is as good as none."""
    cache.set("k", "old", tags=["t"])
    cache.invalidate(tags=["t"]) if invalidate == "tag" else cache.clear()

    assert cache.add("k", "new", tags=["u"])
    assert cache.get("k") == "new"
    cache.invalidate(tags=["t"])
    assert cache.get("k") == "new"


@pytest.mark.parametrize("there", ["nothing", "invalidated"])
def test_of_several_who_add_one_is_told_so(cache, there):
    """Whichever it was, its value is there."""
    for round_ in range(10):
        key = f"k{round_}"
        if there == "invalidated":
            cache.set(key, "old", tags=["t"])
            cache.invalidate(tags=["t"])
        together = threading.Barrier(8)

        def add(number, key=key, together=together):
            together.wait(LONG_S)
            return cache.add(key, number, tags=["t"]) and number

        with ThreadPoolExecutor(8) as pool:
            added = [number for number in pool.map(add, range(8)) if number is not False]
        assert added == [cache.get(key)]


@pytest.mark.parametrize("write", ["add", "replace", "compare_and_set", "set_many"])
def test_a_write_voids_the_load_that_is_under_way(cache, tags, write):
    """What the loader read may be older than what was written."""

    def loader():
        if write == "add":
            assert cache.add("k", "written", tags=tags)
        elif write == "set_many":
            assert cache.set_many({"k": "written"}, tags=tags)
        else:
            cache.set("k", "between", tags=tags)
            held = cache.get_versioned("k")
            assert cache.redis.coordination.hset(f"petiole:1:lease:{{{cache.namespace}:k}}", "token", "x")
            cache.redis.coordination.pexpire(f"petiole:1:lease:{{{cache.namespace}:k}}", 60_000)
            if write == "replace":
                assert cache.replace("k", "written", tags=tags)
            else:
                assert cache.compare_and_set("k", "written", held.version, tags=tags)
            assert leases(cache) == []
        return "loaded"

    assert cache.get_or_set("k", loader, tags=tags) == "loaded"
    assert cache.get("k") == "written"
    assert cache.stats().refused == 1


def test_replace_stores_where_there_is_something(cache, tags):
    """And nowhere else; what was invalidated is nothing."""
    assert not cache.replace("k", "new", tags=tags)
    assert cache.get("k", MISS) is MISS
    cache.set("k", "old", tags=["t"])
    assert cache.replace("k", "new", tags=tags)
    assert cache.get("k") == "new"
    cache.set("k", "old", tags=["t"])
    cache.invalidate(tags=["t"])
    assert not cache.replace("k", "new", tags=tags)
    assert cache.get("k", MISS) is MISS


def test_replace_stores_over_what_is_stale(stale):
    """Then it is fresh."""
    assert stale.replace("k", "new")
    assert stale.get_or_set("k", never) == "new"
    assert stale.stats().hits == 1


# get_versioned, compare_and_set


def test_a_value_is_replaced_by_who_knows_its_version(cache, tags):
    """Each write has a version of its own, also one of the same value."""
    assert cache.get_versioned("k") is None
    cache.set("k", [1], tags=tags)
    first = cache.get_versioned("k")

    assert first.value == [1]
    assert cache.compare_and_set("k", [1], first.version, tags=tags)
    second = cache.get_versioned("k")
    assert second.value == [1]
    assert second.version != first.version
    assert not cache.compare_and_set("k", [2], first.version, tags=tags)
    assert cache.get("k") == [1]


@pytest.mark.parametrize("value", [7, "text", None, {"a": [1]}], ids=repr)
def test_any_value_has_a_version(cache, value):
    """Also a counter and nothing; counting changes the version."""
    cache.set("k", value)
    held = cache.get_versioned("k")

    assert held.value == value
    if value == 7:
        cache.incr("k")
        assert not cache.compare_and_set("k", 0, held.version)
        held = cache.get_versioned("k")
    assert cache.compare_and_set("k", "new", held.version)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.set("k", "old", tags=["t"]),
        lambda c: c.delete("k"),
        lambda c: c.getdel("k"),
        lambda c: c.invalidate(tags=["t"]),
        lambda c: c.clear(),
        lambda c: c.delete("k") and c.set("k", "old", tags=["t"]),
        lambda c: c.refresh("k", lambda: "old", tags=["t"]),
        lambda c: c.set_many({"k": "old"}),
    ],
    ids=["set", "delete", "getdel", "tag", "clear", "deleted and set", "refresh", "set_many"],
)
@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_value_that_was_changed_since_is_not_replaced(cache, monkeypatch, change, moment):
    """Neither before the call, nor between its two steps: what it was made of is no longer true."""
    cache.set("k", "old", tags=["t"])
    held, other = cache.get_versioned("k"), another(cache)
    if moment == "before":
        change(other)
    else:
        set_ = cache._store.set

        def set_after_the_change(*arguments, **keywords):
            change(other)
            return set_(*arguments, **keywords)

        monkeypatch.setattr(cache._store, "set", set_after_the_change)

    assert not cache.compare_and_set("k", "made of the old one", held.version, tags=["t"])
    assert cache.get("k", "old") == "old"


def test_a_stale_value_has_a_version_too(stale):
    """Whoever replaces it makes it fresh."""
    held = stale.get_versioned("k")

    assert held.value == "old"
    assert stale.compare_and_set("k", "new", held.version, ttl=60)
    assert stale.ttl("k") > 0


def append(cache, who, times):
    """Append to a list, each time as long as somebody else was quicker."""
    for number in range(times):
        while True:
            held = cache.get_versioned("list")
            if cache.compare_and_set("list", [*held.value, f"{who}:{number}"], held.version, tags=["t"]):
                break
    return True


def test_no_update_is_lost_between_threads_and_processes(cache):
    """Sixteen threads and three processes append to one list: everything is in it, once."""
    cache.set("list", [], tags=["t"])
    children = [in_child(lambda i=i: append(cache, f"process{i}", 10)) for i in range(3)]
    with ThreadPoolExecutor(16) as pool:
        threads = [pool.submit(append, cache, f"thread{i}", 4) for i in range(16)]
        assert all(thread.result(LONG_S) for thread in threads)
    assert [succeeded(pid) for pid in children] == [True] * 3

    expected = {f"process{i}:{n}" for i in range(3) for n in range(10)}
    expected |= {f"thread{i}:{n}" for i in range(16) for n in range(4)}
    assert sorted(cache.get("list")) == sorted(expected)


# touch, ttl, getex


def test_touch_gives_a_fresh_value_its_time_anew(cache, tags):
    """The stale window stays as long as it was; without a time it is that of the cache."""
    cache.set("k", "v", ttl=60, stale=600, tags=tags)

    assert cache.touch("k", 1_000)
    assert 1_500_000 < left_ms(cache, "k") <= 1_600_000
    assert 900 < cache.ttl("k") <= 1_000
    assert cache.touch("k")
    assert 800_000 < left_ms(cache, "k") <= 900_000
    assert cache.get("k") == "v"


def test_what_was_touched_does_not_outlive_the_versions_of_its_tags(cache, tags):
    """Or the entry would be invalid before its time."""
    cache.set("k", "v", stale=60, tags=tags)
    assert cache.touch("k", "1d")
    client = cache.redis.coordination
    entry = left_ms(cache, "k")

    assert entry > 80_000_000
    for name in (cache.keys.whole, *map(cache.keys.tag, tags)):
        assert client.pttl(name) >= entry - 5_000


def test_touch_leaves_what_is_stale_as_it_is(stale):
    """To touch it must not make it fresh."""
    assert not stale.touch("k", 1_000)
    assert left_ms(stale, "k") <= 300_000
    assert stale.ttl("k") == 0.0
    assert stale.get("k") == "old"


@pytest.mark.parametrize("how", ["absent", "tag", "clear", "clear of what has no tags"])
def test_touch_brings_nothing_back(cache, how):
    """What is not there, or not valid, is not touched."""
    if how != "absent":
        cache.set("k", "v", ttl=60, tags=["t"] if how in ("tag", "clear") else [])
        cache.invalidate(tags=["t"]) if how == "tag" else cache.clear()

    assert not cache.touch("k", 1_000)
    assert cache.getex("k", 1_000, MISS) is MISS
    assert left_ms(cache, "k") <= 60_000
    assert cache.get("k", MISS) is MISS


def test_ttl_tells_how_long_a_value_stays_fresh(cache, tags):
    """The stale window is no part of it; None: nothing is there."""
    assert cache.ttl("k") is None
    cache.set("k", "v", ttl=60, stale=600, tags=tags)
    assert 50 < cache.ttl("k") <= 60
    age(cache, "k", left=625)
    assert 5 < cache.ttl("k") <= 25
    age(cache, "k", left=599)
    assert cache.ttl("k") == 0.0
    cache.clear()
    assert cache.ttl("k") is None


def test_getex_reads_and_gives_more_time(cache, tags):
    """A session that is used lives on."""
    assert cache.getex("k", 60, MISS) is MISS
    cache.set("k", None, ttl=60, tags=tags)

    assert cache.getex("k", 1_000, MISS) is None
    assert 900 < cache.ttl("k") <= 1_000
    assert cache.getex("k", default=MISS) is None
    assert 200 < cache.ttl("k") <= 300
    assert (cache.stats().hits, cache.stats().misses) == (2, 1)


def test_getex_serves_what_is_stale_and_leaves_it_stale(stale):
    """As ``get`` would."""
    assert stale.getex("k", 1_000) == "old"
    assert left_ms(stale, "k") <= 300_000
    assert stale.stats().stale == 1


def test_a_cached_exception_is_not_given_more_time(cache):
    """``get`` tells that it is a miss; to ask for it must not keep it beyond its own time."""
    with pytest.raises(OSError, match="away"):
        cache.get_or_set("k", fails, exceptions={OSError: 30})

    assert cache.getex("k", 1_000, MISS) is MISS
    assert not cache.touch("k", 1_000)
    assert left_ms(cache, "k") <= 30_000


def test_a_cached_exception_is_no_value(cache):
    """What ``get`` tells is a miss is one for all who ask for the value."""
    with pytest.raises(OSError, match="away"):
        cache.get_or_set("k", fails, exceptions={OSError: 30})

    assert cache.get("k", MISS) is MISS
    assert cache.get_many(["k"]) == {}
    assert cache.get_versioned("k") is None
    assert not cache.exists("k")
    assert cache.ttl("k") is None
    assert not cache.replace("k", "new")
    assert cache.add("k", "new")
    assert cache.get("k") == "new"


# getdel


def test_getdel_takes_a_value_out(cache, tags):
    """Once."""
    cache.set("k", "v", tags=tags)

    assert cache.getdel("k") == "v"
    assert cache.getdel("k", MISS) is MISS
    assert not cache.redis.coordination.exists(cache.keys.entry("k"))


def test_getdel_tells_nothing_from_a_miss(cache, tags):
    """None may be a value."""
    cache.set("k", None, tags=tags)

    assert cache.getdel("k", MISS) is None
    assert cache.getdel("k", MISS) is MISS


def test_getdel_takes_what_is_stale(stale):
    """It may still be served."""
    assert stale.getdel("k") == "old"
    assert stale.stats().stale == 1


@pytest.mark.parametrize("how", ["tag", "clear"])
def test_getdel_does_not_give_what_was_invalidated(cache, how):
    """Nor leave it there."""
    cache.set("k", "v", tags=["t"])
    cache.invalidate(tags=["t"]) if how == "tag" else cache.clear()

    assert cache.getdel("k", MISS) is MISS
    assert not cache.redis.coordination.exists(cache.keys.entry("k"))


def test_of_several_who_take_a_value_one_gets_it(cache, tags):
    """Such as a token that may be used once."""
    for round_ in range(10):
        key, together = f"k{round_}", threading.Barrier(8)
        cache.set(key, "token", tags=tags)

        def take(_, key=key, together=together):
            together.wait(LONG_S)
            return cache.getdel(key)

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(take, range(8)), key=str) == [None] * 7 + ["token"]


def test_getdel_voids_the_load_that_is_under_way(cache, tags):
    """Or what was taken out would be there again."""
    assert cache.get_or_set("k", lambda: cache.getdel("k", "nothing") + " loaded", tags=tags) == "nothing loaded"
    assert cache.get("k", MISS) is MISS
    assert cache.stats().refused == 1


# expire


def test_what_was_expired_is_stale_and_kept(cache, tags):
    """It is served when no new one can be loaded, for as long as it was to be served stale."""
    cache.set("k", "old", ttl=3_600, stale=600, tags=tags)

    assert cache.expire("k")
    assert 0 < left_ms(cache, "k") <= 600_000
    assert cache.get("k") == "old"
    assert cache.stats().stale == 1
    assert cache.get_or_set("k", fails, tags=tags) == "old"
    assert another(cache).get_or_set("k", never) == "old"  # left alone for a moment after a failure
    assert cache.invalidate(keys=["k"]) == 1


def test_what_was_expired_is_loaded_anew(cache, tags):
    """By the next who asks."""
    cache.set("k", "old", ttl=3_600, stale=600, tags=tags)
    cache.expire("k")

    assert cache.get_or_set("k", lambda: "new", tags=tags) == "new"
    assert cache.get_or_set("k", never, tags=tags) == "new"


def test_expire_does_not_keep_what_is_stale_any_longer(stale):
    """It only ever takes time away."""
    assert stale.expire("k")
    assert left_ms(stale, "k") <= 300_000


def test_expire_removes_what_was_never_to_be_served_stale(cache, tags):
    """And tells whether there was something."""
    cache.set("k", "old", tags=tags)

    assert cache.expire("k")
    assert cache.get("k", MISS) is MISS
    assert not cache.expire("k")


def test_expire_voids_the_load_that_is_under_way(cache, tags):
    """What the loader read may be what was expired."""
    cache.set("k", "old", ttl=60, stale=600, tags=tags)
    assert cache.refresh("k", lambda: cache.expire("k") and "loaded", tags=tags) is False
    assert cache.get("k") == "old"
    assert cache.ttl("k") == 0.0
    cache.delete("k")
    assert cache.get_or_set("k", lambda: cache.expire("k"), tags=tags) is False
    assert cache.get("k", MISS) is MISS
    assert cache.stats().refused == 2


# incr, decr


def test_decr_takes_from_a_number_that_others_add_to(cache):
    """Below nothing, too; a new one starts at nothing, and has a TTL from the first step."""
    assert cache.decr("n", ttl=60) == -1
    assert 0 < left_ms(cache, "n") <= 60_000
    assert cache.decr("n", 4) == -5
    assert cache.incr("n", 7) == 2
    assert cache.decr("n", -1) == 3
    assert cache.get("n") == 3
    cache.set("n", 10)
    assert cache.decr("n") == 9


@pytest.mark.parametrize("by", [True, 1.5, "1", None])
def test_only_whole_numbers_are_counted(cache, by):
    """Both ways."""
    for count in (cache.incr, cache.decr):
        with pytest.raises(TypeError, match="by must be a whole number"):
            count("n", by)
    assert cache.get("n", MISS) is MISS


@pytest.mark.parametrize("by", [2**63, -(2**63) - 1, 10**30])
def test_what_is_beyond_64_bits_is_refused(cache, by):
    """Before anything is sent."""
    with pytest.raises(ValueError, match="64 bits"):
        cache.incr("n", by)
    with pytest.raises(ValueError, match="64 bits"):
        cache.decr("n", -by)


def test_a_count_that_would_overflow_stays_as_it_was(cache):
    """With its time."""
    cache.set("n", 2**63 - 1, ttl=60)

    with pytest.raises(EntryNotCounter, match="'n'"):
        cache.incr("n")
    assert cache.get("n") == 2**63 - 1
    assert 0 < left_ms(cache, "n") <= 60_000


def test_counts_of_processes_and_threads_are_added_up(cache):
    """Each is told a number of its own."""
    children = [in_child(lambda: len({cache.incr("n") for _ in range(50)}) == 50) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda _: cache.incr("n"), range(100)))
    assert [succeeded(pid) for pid in children] == [True] * 2

    assert len(set(told)) == 100
    assert cache.get("n") == 200


# clear


def test_clear_takes_everything_of_its_namespace_and_nothing_else(cache, redis, name):
    """Values, stale ones, those with tags, counters."""
    other = Cache(redis, namespace=f"{name}:other")
    for one in (cache, other):
        one.set_many({"a": 1, "b": 2})
        one.set("tagged", 3, tags=["t"])
        one.set("stale", 4, stale=600)
        age(one, "stale", left=300)
        one.incr("n", 7)
    keys = ["a", "b", "tagged", "stale", "n"]
    cache.clear()

    assert cache.get_many(keys) == {}
    assert [cache.exists(key) for key in keys] == [False] * 5
    assert cache.incr("n") == 1
    assert other.get_many(keys) == {"a": 1, "b": 2, "tagged": 3, "stale": 4, "n": 7}


def test_what_is_written_after_clear_is_there(cache, tags):
    """The namespace is as good as new."""
    cache.clear()
    cache.set("k", 1, tags=tags)
    cache.clear()
    cache.set("k", 2, tags=tags)

    assert cache.get("k") == 2
    assert cache.get_or_set("l", lambda: 3, tags=tags) == 3
    assert cache.get_or_set("l", never, tags=tags) == 3


def test_clear_voids_the_loads_that_are_under_way(cache, tags):
    """However many there are, in whatever way they began; nothing has to be known of them."""

    def cleared(value):
        another(cache).clear()
        return value

    assert cache.get_or_set("a", lambda: cleared(1), tags=tags) == 1
    assert not cache.refresh("b", lambda: cleared(2), tags=tags)
    assert cache.get_or_set_many(["c", "d"], lambda keys: cleared(dict.fromkeys(keys, 3)), tags=tags) == {
        "c": 3,
        "d": 3,
    }
    with cache.guard(["e"], tags=tags) as guard:
        assert not cache.set_many({"e": cleared(4)}, guard=guard)
    assert cache.get_many(list("abcde")) == {}
    assert leases(cache) == []
    assert cache.stats().refused == 5


# get_or_set_many


def test_what_is_missing_is_loaded_in_one_call(cache, tags):
    """In the order in which it was asked for; what is there is not loaded, and comes in its place."""
    cache.set("b", "there", tags=tags)
    asked = []

    def loader(keys):
        asked.append(keys)
        return {key: f"loaded {key}" for key in keys}

    values = cache.get_or_set_many(list("dbca"), loader, ttl=60, stale=600, tags=tags)

    assert list(values.items()) == [("d", "loaded d"), ("b", "there"), ("c", "loaded c"), ("a", "loaded a")]
    assert asked == [["d", "c", "a"]]
    assert cache.get_or_set_many(list("abcd"), never, tags=tags) == values
    assert 600_000 < left_ms(cache, "d") <= 660_000
    assert leases(cache) == []
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.loads) == (5, 3, 1)


def test_no_keys_are_no_load(cache):
    """Nothing is asked, nothing is sent."""
    assert cache.get_or_set_many([], never) == {}
    assert cache.get_or_set_many(iter(()), never) == {}


def test_a_key_that_is_asked_for_twice_counts_once(cache):
    """In the question to the loader, and in the answer."""
    values = cache.get_or_set_many(iter("aab"), lambda keys: {key: len(keys) for key in keys})

    assert values == {"a": 2, "b": 2}


def test_a_text_in_place_of_keys_is_refused(cache):
    """It would be taken apart letter by letter."""
    for call in (
        lambda: cache.get_or_set_many("abc", never),
        lambda: cache.get_many("abc"),
        lambda: cache.guard("abc").__enter__(),
        lambda: cache.invalidate(tags="abc"),
        lambda: cache.set("k", 1, tags="abc"),
        lambda: cache.add("k", 1, tags="abc"),
        lambda: cache.get_or_set("k", never, tags="abc"),
    ):
        with pytest.raises(TypeError, match=r"must be several, such as \['abc'\]"):
            call()


@pytest.mark.parametrize(
    "tags", [[""], [None], ["t", 7], [f"t{i}" for i in range(255)]], ids=["empty", "none", "7", "255"]
)
def test_tags_that_are_none_or_too_many_are_refused_everywhere(cache, tags):
    """Before a loader is called, and before anything is stored."""
    for call in (
        lambda: cache.set("k", 1, tags=tags),
        lambda: cache.set_many({"k": 1}, tags=tags),
        lambda: cache.add("k", 1, tags=tags),
        lambda: cache.get_or_set("k", never, tags=tags),
        lambda: cache.refresh("k", never, tags=tags),
        lambda: cache.get_or_set_many(["k"], never, tags=tags),
        lambda: cache.guard(["k"], tags=tags).__enter__(),
    ):
        with pytest.raises((TypeError, ValueError), match="tag"):
            call()
    assert leases(cache) == []


def test_a_key_that_the_loader_leaves_out_is_left_out(cache):
    """And not cached; who comes next asks again, without waiting for a lease."""
    assert cache.get_or_set_many(list("ab"), lambda keys: {"a": 1}) == {"a": 1}
    assert leases(cache) == []
    assert cache.get_or_set_many(list("ab"), lambda keys: dict.fromkeys(keys, 2)) == {"a": 1, "b": 2}


def test_keys_that_nobody_asked_the_loader_for_are_not_cached(cache):
    """There is no lease of theirs: they may be out of date."""
    values = cache.get_or_set_many(["a"], lambda keys: {"a": 1, "stranger": 2})

    assert values == {"a": 1}
    assert cache.get("stranger", MISS) is MISS


@pytest.mark.parametrize("answer", [None, [1, 2], "ab", 7], ids=repr)
def test_a_loader_that_gives_no_dict_is_told_so(cache, answer):
    """And the leases are free."""
    with pytest.raises(TypeError, match="must return a dict"):
        cache.get_or_set_many(list("ab"), lambda keys: answer)
    assert leases(cache) == []


def test_what_the_loader_of_many_raises_is_raised(cache):
    """What is there is lost to this caller, as a part of the values would be a wrong answer; the leases are free."""
    cache.set("a", 1)
    with pytest.raises(OSError, match="away"):
        cache.get_or_set_many(list("ab"), fails)
    assert leases(cache) == []
    assert cache.get("a") == 1
    assert cache.stats().load_errors == 1


def test_one_value_without_a_form_does_not_hold_up_the_others(cache):
    """The mistake is raised; the others are stored, and no lease is left behind that somebody would wait for."""
    with pytest.raises(ValueNotCacheable, match="'b'"):
        cache.get_or_set_many(list("abc"), lambda keys: {"a": 1, "b": object(), "c": 3})

    assert leases(cache) == []
    assert cache.get_many(list("abc")) == {"a": 1, "c": 3}
    with cache.guard(list("abc")) as guard, pytest.raises(ValueNotCacheable, match="'b'"):
        cache.set_many({"a": 4, "b": object(), "c": 5}, guard=guard)
    assert leases(cache) == []


@pytest.mark.parametrize("wrong", ["missing", "stale", "invalidated"])
def test_one_value_without_a_form_leaves_no_lease_of_any_kind(cache, wrong):
    """Whether its key was missing, stale or invalidated, as the others are."""
    cache.set("stale", "old", stale=600)
    age(cache, "stale", left=300)
    cache.set("invalidated", "old", tags=["t"])
    cache.invalidate(tags=["t"])
    with pytest.raises(ValueNotCacheable, match=wrong):
        cache.get_or_set_many(
            ["missing", "stale", "invalidated"], lambda keys: {key: object() if key == wrong else "new" for key in keys}
        )

    assert leases(cache) == []
    left = {"missing", "stale", "invalidated"} - {wrong}
    assert {key: cache.get(key) for key in left} == dict.fromkeys(left, "new")


def test_values_may_say_more_of_themselves(cache):
    """Each its TTL, its stale window, its tags besides those of the call, and that it is not to be stored."""

    def loader(keys):
        return {
            "a": Loaded(1, ttl=10, tags=["one"]),
            "b": Loaded(2, ttl=1_000, stale=1_000, tags=["two"]),
            "c": Loaded(3, store=False),
            "d": 4,
        }

    assert cache.get_or_set_many(list("abcd"), loader, tags=["all"]) == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert cache.get_many(list("abcd")) == {"a": 1, "b": 2, "d": 4}
    assert left_ms(cache, "a") <= 10_000
    assert 1_800_000 < left_ms(cache, "b") <= 2_000_000
    assert leases(cache) == []
    cache.invalidate(tags=["one"])
    assert cache.get_many(list("abcd")) == {"b": 2, "d": 4}
    cache.invalidate(tags=["all"])
    assert cache.get_many(list("abcd")) == {}


def test_tags_of_a_loaded_value_are_several(cache):
    """A text would be taken apart letter by letter."""
    with pytest.raises(TypeError, match="users"):
        cache.get_or_set("k", lambda: Loaded(1, tags="users"))
    assert leases(cache) == []


def test_of_many_the_stale_are_loaded_with_the_missing(stale, tags):
    """In the same call."""
    asked = []
    values = stale.get_or_set_many(
        ["k", "missing"], lambda keys: asked.append(sorted(keys)) or dict.fromkeys(keys, "new"), tags=tags
    )

    assert values == {"k": "new", "missing": "new"}
    assert asked == [["k", "missing"]]
    assert stale.get_or_set_many(["k", "missing"], never, tags=tags) == values


def test_a_loader_that_fails_leaves_the_stale_ones_where_nothing_is_missing(stale, tags):
    """It is left alone for a moment; where something is missing, there is no whole answer, and it raises."""
    assert stale.get_or_set_many(["k"], fails, tags=tags) == {"k": "old"}
    assert stale.get_or_set_many(["k"], never, tags=tags) == {"k": "old"}
    with pytest.raises(OSError, match="away"):
        stale.get_or_set_many(["k", "missing"], fails, tags=tags)
    assert stale.get("k") == "old"


def test_of_many_the_invalidated_are_loaded_anew(cache):
    """As if they were not there."""
    cache.set_many({"a": "old", "b": "old"}, tags=["t"])
    cache.set("c", "there")
    cache.invalidate(tags=["t"])

    assert cache.get_or_set_many(list("abc"), lambda keys: dict.fromkeys(keys, "new")) == {
        "a": "new",
        "b": "new",
        "c": "there",
    }
    assert cache.get_many(list("abc")) == {"a": "new", "b": "new", "c": "there"}


def test_of_many_one_that_was_invalidated_meanwhile_is_not_stored(cache, tags):
    """The others are; the caller has them all."""

    def loader(keys):
        another(cache).delete("b")
        return dict.fromkeys(keys, "old")

    assert cache.get_or_set_many(list("abc"), loader, tags=tags) == dict.fromkeys("abc", "old")
    assert cache.get_many(list("abc")) == {"a": "old", "c": "old"}


@pytest.mark.parametrize("of", ["get_or_set", "get_or_set_many"])
def test_what_another_loads_is_waited_for_after_ours_is_stored(cache, tags, of):
    """It is not loaded twice; and who waits for us is not kept waiting while we wait."""
    first, second = another(cache, lease=60), another(cache, lease=60)
    entered, go = threading.Event(), threading.Event()

    def slow(*keys):
        entered.set()
        assert go.wait(LONG_S)
        return {"a": "theirs"} if keys else "theirs"

    def theirs():
        return first.get_or_set("a", slow, tags=tags) if of == "get_or_set" else first.get_or_set_many(["a"], slow)

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(theirs)
        assert entered.wait(LONG_S)
        asked = []

        def ours():
            return second.get_or_set_many(list("ab"), lambda keys: asked.append(keys) or dict.fromkeys(keys, "ours"))

        with waiting_in_redis(cache, ours) as answer:
            assert cache.get("b") == "ours"
            go.set()
            assert answer.result(LONG_S) == {"a": "theirs", "b": "ours"}
        loading.result(LONG_S)
    assert asked == [["b"]]
    assert second.stats().waits >= 1


def test_when_another_loads_in_vain_we_load_for_ourselves(cache):
    """A failure elsewhere is not ours; the loader is called once more, for what is left."""
    first, second = another(cache, lease=60), another(cache, lease=60)
    entered, go, asked = threading.Event(), threading.Event(), []

    def slow():
        entered.set()
        assert go.wait(LONG_S)
        raise OSError("away")

    def quick(keys):
        asked.append(keys)
        return dict.fromkeys(keys, "ours")

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(first.get_or_set, "a", slow)
        assert entered.wait(LONG_S)
        with waiting_in_redis(cache, lambda: second.get_or_set_many(list("ab"), quick)) as answer:
            go.set()
            assert answer.result(LONG_S) == {"a": "ours", "b": "ours"}
        assert isinstance(loading.exception(LONG_S), OSError)
    assert asked == [["b"], ["a"]]
    assert cache.get("a") == "ours"


def ask_in_rounds(cache, who, backwards):
    """Ask for the same keys as somebody else, in another order, at the same moment, thirty times."""
    for round_ in range(30):
        keys = [f"{round_}:{i}" for i in range(6)]
        cache.incr(f"ready:{round_}")
        while cache.get(f"ready:{round_}") < 2:
            pass
        shared = keys[::-1] if backwards else keys
        mine = shared[1:] if round_ % 2 else shared

        def loader(wanted):
            for key in wanted:
                cache.incr(f"loads:{key}")
            return {key: f"{who} {key}" for key in wanted}

        values = cache.get_or_set_many(mine, loader, tags=["t"])
        if list(values) != mine or any(value.split()[1] != key for key, value in values.items()):
            return False
    return True


def test_two_processes_that_ask_in_opposite_orders_never_wait_for_each_other(cache):
    """Each key is loaded once, by one of them, and nobody waits for a lease to run out."""
    patient = another(cache, lease=50)
    child = in_child(lambda: ask_in_rounds(patient, "child", backwards=True))
    assert ask_in_rounds(patient, "parent", backwards=False)
    assert succeeded(child)

    asked = [f"{round_}:{i}" for round_ in range(30) for i in range(6)]
    loads = [cache.getdel(f"loads:{key}") for key in asked]
    assert loads == [1] * 180
    cache.delete(*asked, *(f"ready:{round_}" for round_ in range(30)))  # later tests look at every key


def test_a_loader_of_many_that_asks_for_one_of_them_is_refused(cache):
    """It would wait for itself."""
    for inner in (
        lambda: cache.get_or_set("b", never),
        lambda: cache.get_or_set_many(["c", "b"], lambda keys: dict.fromkeys(keys, 0)),
    ):
        with pytest.raises(LoaderRecursion, match="'b'"):
            cache.get_or_set_many(list("ab"), lambda keys, inner=inner: inner())
        assert leases(cache) == []


# guard, set_many


def test_what_was_read_under_a_guard_is_stored(cache, tags):
    """With its tags, and those of the call."""
    with cache.guard(list("ab"), tags=tags) as guard:
        assert cache.set_many({"a": 1, "b": 2}, ttl=60, stale=600, tags=["more"], guard=guard)
    assert cache.get_many(list("ab")) == {"a": 1, "b": 2}
    assert 600_000 < left_ms(cache, "a") <= 660_000
    assert leases(cache) == []
    for tag in (*tags, "more"):
        assert cache.get_many(list("ab")) == {"a": 1, "b": 2}
        cache.invalidate(tags=[tag])
        assert cache.get_many(list("ab")) == {}
        cache.set_many({"a": 1, "b": 2}, tags=[*tags, "more"])


@pytest.mark.parametrize(
    ("invalidate", "left"),
    [
        (lambda c: c.delete("a"), {"b": 2}),
        (lambda c: c.set("a", "newer") and c.delete("a"), {"b": 2}),
        (lambda c: c.invalidate(matching="a*"), {"b": 2}),
        (lambda c: c.invalidate(tags=["t"]), {}),
        (lambda c: c.invalidate(tags=["u"]), {}),
        (lambda c: c.clear(), {}),
    ],
    ids=["key", "set", "pattern", "tag", "tag of the write", "clear"],
)
def test_what_was_invalidated_since_the_guard_is_not_stored(cache, invalidate, left):
    """Only that; the answer tells that not all was."""
    with cache.guard(list("ab"), tags=["t"]) as guard:
        invalidate(another(cache))
        assert not cache.set_many({"a": 1, "b": 2}, tags=["u"], guard=guard)
    assert cache.get_many(list("ab")) == left
    assert leases(cache) == []


def test_a_guard_that_has_ended_stores_nothing(cache):
    """Nor does one that was used, a second time."""
    with cache.guard(["a"]) as guard:
        assert cache.set_many({"a": 1}, guard=guard)
        assert not cache.set_many({"a": 2}, guard=guard)
    with cache.guard(["b"]) as late:
        pass
    assert not cache.set_many({"b": 1}, guard=late)
    assert cache.get_many(list("ab")) == {"a": 1}


def test_keys_that_were_not_guarded_are_not_stored(cache):
    """Nothing is known of when they were read."""
    with cache.guard(["a"]) as guard:
        assert not cache.set_many({"a": 1, "b": 2}, guard=guard)
    with cache.guard([]) as nothing:
        assert not cache.set_many({"c": 1}, guard=nothing)
    assert cache.get_many(list("abc")) == {"a": 1}


def test_a_guard_that_ends_with_an_error_lets_others_load(cache, tags):
    """At once."""

    def fail_under_a_guard():
        with cache.guard(list("ab"), tags=tags):
            assert len(leases(cache)) == 2
            fails()

    with pytest.raises(OSError, match="away"):
        fail_under_a_guard()
    assert leases(cache) == []


def test_others_wait_for_what_is_guarded(cache, tags):
    """They need not read what is being read."""
    patient = another(cache, lease=60)
    with patient.guard(["a"], tags=tags) as guard:
        with waiting_in_redis(cache, lambda: another(patient, lease=60).get_or_set("a", never, tags=tags)) as answer:
            assert patient.set_many({"a": "read"}, guard=guard)
            assert answer.result(LONG_S) == "read"
        assert patient.stats().loads == 0


def test_what_somebody_else_loads_is_not_guarded(cache):
    """And not stored."""
    with cache.guard(["a"]) as first, another(cache).guard(list("ab")) as second:
        assert sorted(second.readings) == ["b"]
        assert not cache.set_many({"a": "second", "b": "second"}, guard=second)
        assert cache.set_many({"a": "first"}, guard=first)
    assert cache.get_many(list("ab")) == {"a": "first", "b": "second"}


def test_set_many_stores_all_or_none(cache, tags):
    """One value without a form, one key that is none: nothing is sent."""
    assert cache.set_many({"a": 1, "b": 2}, ttl=60, tags=tags)
    with pytest.raises(ValueNotCacheable, match="'b'"):
        cache.set_many({"a": 3, "b": object()}, tags=tags)
    with pytest.raises(ValueError, match="must not be empty"):
        cache.set_many({"a": 3, "": 4}, tags=tags)
    assert cache.get_many(list("ab")) == {"a": 1, "b": 2}
    assert left_ms(cache, "b") <= 60_000
    assert cache.set_many({})


# Without Redis


@pytest.fixture
def quick_senders(monkeypatch):
    """What sends remembered invalidations looks often, and so ends soon after its connections."""
    monkeypatch.setattr("petiole.cachelib.remembered._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("petiole.cachelib.remembered._LONGEST_PAUSE_S", 0.05)
    yield
    for thread in threading.enumerate():
        if thread.name == "petiole-invalidations":
            thread.join(LONG_S)
            assert not thread.is_alive()


@pytest.fixture(params=["never-there", "read-only", "hung"])
def away(request, own_server, name, quick_senders, monkeypatch):
    """Makes caches whose server does not answer, or refuses."""
    if request.param == "never-there":
        with connect(settings=Settings(url="redis://127.0.0.1:1/0", cache_timeout=0.05)) as redis:
            yield lambda **options: Cache(redis, namespace=name, **options)
        return
    server = own_server()
    with connect(settings=Settings(url=server.url, cache_timeout=0.05)) as redis:
        pid = redis.coordination.info("server")["process_id"]
        if request.param == "read-only":
            redis.coordination.replicaof("127.0.0.1", 1)
            yield lambda **options: Cache(redis, namespace=name, **options)
            return
        monkeypatch.setattr("petiole.cachelib.connections.COORDINATION", Profile("short", 0.1, 0.1))
        os.kill(pid, signal.SIGSTOP)
        try:
            yield lambda **options: Cache(redis, namespace=name, **options)
        finally:
            os.kill(pid, signal.SIGCONT)


def guarded(cache):
    with cache.guard(["k"], tags=["t"]) as guard:
        return cache.set_many({"k": 1}, guard=guard)


WITHOUT_REDIS = {
    "add": (lambda c: c.add("k", 1, tags=["t"]), False),
    "replace": (lambda c: c.replace("k", 1), False),
    "get_versioned": (lambda c: c.get_versioned("k"), None),
    "compare_and_set": (lambda c: c.compare_and_set("k", 1, "0" * 16), False),
    "touch": (lambda c: c.touch("k", 5), False),
    "ttl": (lambda c: c.ttl("k"), None),
    "getex": (lambda c: c.getex("k", 5, MISS), MISS),
    "getdel": (lambda c: c.getdel("k", MISS), MISS),
    "incr": (lambda c: c.incr("k"), None),
    "decr": (lambda c: c.decr("k"), None),
    "get_or_set_many": (
        lambda c: c.get_or_set_many(list("ab"), lambda keys: {key: Loaded(key) for key in keys}, tags=["t"]),
        {"a": "a", "b": "b"},
    ),
    "set_many": (lambda c: c.set_many({"k": 1}, tags=["t"]), False),
    "guard": (guarded, False),
    "expire": (lambda c: c.expire("k"), False),
    "clear": (lambda c: c.clear(), None),
    "delete": (lambda c: c.delete("k"), 0),
    "invalidate": (lambda c: c.invalidate(tags=["t"]), 0),
}
READS_ONLY = {"replace", "get_versioned", "compare_and_set", "ttl"}
"""These find nothing on a server that can be read, and so do not write either."""


def test_every_operation_goes_on_without_redis(away):
    """It answers as if nothing were cached, and the trouble is counted."""
    cache = away()
    answers, errors = {}, {}
    for operation, (call, _) in WITHOUT_REDIS.items():
        before = cache.stats().errors
        answers[operation] = call(cache)
        errors[operation] = cache.stats().errors > before

    assert answers == {operation: expected for operation, (_, expected) in WITHOUT_REDIS.items()}
    quiet = {operation for operation, counted in errors.items() if not counted}
    assert quiet <= READS_ONLY | {"touch", "getex"}
    assert cache.stats().unsent == 4
    assert cache.stats().remembered == 5, "the set and the deletion are of one key"


def test_a_strict_cache_raises_instead(away):
    """With the address, and what it was doing; nothing is remembered."""
    cache = away(strict=True)
    silent, told = [], []
    for operation, (call, _) in WITHOUT_REDIS.items():
        try:
            call(cache)
            silent.append(operation)
        except ServerUnavailable as error:
            told.append(error)

    assert {error.address for error in told} == {cache.redis.address}
    assert all("Check that the server runs there" in str(error) for error in told)
    assert set(silent) <= READS_ONLY | {"touch", "getex"}
    if "127.0.0.1:1/" in cache.redis.address:
        assert silent == []
    assert cache.stats().unsent == 0


def test_explain_raises_without_redis(name, quick_senders):
    """A person asks; there is nothing to tell."""
    with connect(settings=Settings(url="redis://127.0.0.1:1/0", cache_timeout=0.05)) as redis:
        cache = Cache(redis, namespace=name)
        with pytest.raises(ServerUnavailable, match="explain: Redis at"):
            cache.explain("k")


# What it costs


@pytest.fixture(scope="module")
def quiet_server():
    """A server that nobody else talks to."""
    server = EmbeddedServer.start()
    yield server
    server.stop()


@pytest.fixture
def counted(quiet_server, name):
    """A cache on the quiet server, with its connections made and its scripts known."""
    with connect(settings=Settings(url=quiet_server.url, cache_timeout=2)) as redis:
        cache = Cache(redis, namespace=name, lease=LONG_S)
        for tags in ([], ["warm"]):
            cache.set("warm", "up", stale=60, tags=tags)
            cache.get_or_set("loaded", lambda: 1, tags=tags)
            cache.get_or_set_many(["l", "m"], lambda keys: dict.fromkeys(keys, 1), tags=tags)
            cache.touch("warm")
            cache.expire("warm")
            cache.getdel("warm")
            cache.clear()
        cache.incr("n")
        cache.get("n")
        cache.delete("n")
        yield cache


def round_trips(cache, call):
    """How often the server read from a connection while a call ran. The question itself is one."""
    client = cache.redis.coordination
    before = client.info("stats")["total_reads_processed"]
    call()
    return client.info("stats")["total_reads_processed"] - before - 1


MANY = [f"k{i}" for i in range(50)]


def load_all(keys):
    return dict.fromkeys(keys, 1)


def guard_all(cache):
    with cache.guard(MANY, tags=["t"]) as guard:
        cache.set_many(dict.fromkeys(MANY, 1), guard=guard)


@pytest.mark.parametrize(
    ("operation", "expected", "call"),
    [
        ("get", 1, lambda c: c.get("plain")),
        ("get tagged", 2, lambda c: c.get("tagged")),
        ("get_many", 1, lambda c: c.get_many(MANY)),
        ("get_many tagged", 2, lambda c: c.get_many([*MANY, "tagged", "tagged2"])),
        ("get_versioned", 1, lambda c: c.get_versioned("plain")),
        ("ttl", 1, lambda c: c.ttl("plain")),
        ("exists", 1, lambda c: c.exists("plain")),
        ("get_or_set hit", 1, lambda c: c.get_or_set("plain", never)),
        ("get_or_set hit tagged", 1, lambda c: c.get_or_set("tagged", never, tags=["t"])),
        ("get_or_set miss", 2, lambda c: c.get_or_set("absent", lambda: 1, tags=["t"])),
        ("get_or_set stale", 3, lambda c: c.get_or_set("stale", lambda: 1)),
        ("get_or_set_many hits", 1, lambda c: c.get_or_set_many(["plain", "n"], never)),
        ("get_or_set_many misses", 2, lambda c: c.get_or_set_many(MANY, load_all, tags=["t"])),
        ("get_or_set_many stale", 3, lambda c: c.get_or_set_many(["stale", "plain"], load_all)),
        ("get_or_set_many none", 0, lambda c: c.get_or_set_many([], never)),
        ("set", 1, lambda c: c.set("new", 1, tags=["t", "u"])),
        ("set_many", 1, lambda c: c.set_many(dict.fromkeys(MANY, 1), tags=["t"])),
        ("set_many none", 0, lambda c: c.set_many({})),
        ("guard and set_many", 3, guard_all),
        ("add", 1, lambda c: c.add("new", 1, tags=["t"])),
        ("add in vain", 2, lambda c: c.add("plain", 1)),
        ("add over the cleared", 3, lambda c: c.add("cleared", 1, tags=["t"])),
        ("replace", 2, lambda c: c.replace("plain", 1, tags=["t"])),
        ("compare_and_set in vain", 1, lambda c: c.compare_and_set("plain", 1, "0" * 16)),
        ("incr", 1, lambda c: c.incr("n")),
        ("decr", 1, lambda c: c.decr("n")),
        ("touch", 1, lambda c: c.touch("plain")),
        ("getex", 1, lambda c: c.getex("plain")),
        ("getex tagged", 2, lambda c: c.getex("tagged")),
        ("getdel", 1, lambda c: c.getdel("plain")),
        ("expire", 1, lambda c: c.expire("plain")),
        ("delete", 1, lambda c: c.delete(*MANY)),
        ("delete none", 0, lambda c: c.delete()),
        ("invalidate", 1, lambda c: c.invalidate(tags=["t", "u", "v"])),
        ("clear", 1, lambda c: c.clear()),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_an_operation_costs_the_round_trips_that_it_promises(counted, operation, expected, call):
    """However many keys and tags there are."""
    counted.set("cleared", "value")
    counted.clear()
    counted.set("plain", "value")
    counted.set_many({"tagged": 1, "tagged2": 2}, tags=["t"])
    counted.set("stale", "old", stale=600)
    counted.set("n", 5)
    age(counted, "stale", left=300)
    if operation.startswith(("get_many", "delete")):
        counted.set_many(dict.fromkeys(MANY, 1))

    assert round_trips(counted, lambda: call(counted)) == expected


def test_a_compare_and_set_that_succeeds_costs_two_round_trips(counted):
    """It looks before it writes."""
    counted.set("k", 1)
    version = counted.get_versioned("k").version

    assert round_trips(counted, lambda: counted.compare_and_set("k", 2, version)) == 2
    assert counted.get("k") == 2


@pytest.mark.parametrize("entries", [10, 1_000])
def test_clear_is_one_write_however_much_there_is(counted, entries):
    """No key is looked for, none is deleted."""
    counted.set_many({f"k{i}": i for i in range(entries)})
    client = counted.redis.coordination
    client.config_resetstat()
    counted.clear()
    commands = {name.removeprefix("cmdstat_"): told["calls"] for name, told in client.info("commandstats").items()}

    assert commands["evalsha"] == 1
    assert not {"scan", "keys", "del", "unlink", "flushdb", "flushall"} & commands.keys()
    assert commands["set"] == 1
    assert sum(commands.values()) < 20
    assert counted.get_many([f"k{i}" for i in range(entries)]) == {}
