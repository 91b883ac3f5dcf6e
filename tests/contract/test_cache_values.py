"""What a cache keeps: values, counters, times to live - and what it refuses."""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from uuid import UUID

import msgspec
import pytest

from petiole.cachelib import MISS, Cache
from petiole.cachelib.errors import EntryNotCounter, LoaderRecursion, ValueNotCacheable
from petiole.cachelib.keys import lease


def never():
    pytest.fail("the loader was called")


def left_ms(cache, key):
    return cache.redis.coordination.pttl(cache.keys.entry(key))


def leases(cache):
    return list(cache.redis.coordination.scan_iter(match=lease(cache.keys.entry("*")), count=10_000))


# Values


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 0.1),
        *("", "text é", b"\x00bytes", [], {}, [1, [2, None]], {"a": {"b": [1]}}),
        datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
    ],
    ids=repr,
)
def test_a_value_comes_back(cache, value):
    """Each way of storing and each way of reading give the same value, of the same type."""
    cache.set("set", value)
    cache.set("tagged", value, stale=5, tags=["t"])
    loaded = cache.get_or_set("loaded", lambda: value)
    found = [*cache.get_many(["set", "tagged", "loaded"]).values(), cache.get("set", MISS), loaded]
    found.append(cache.get_or_set("set", never))

    assert found == [value] * 6
    assert {type(one) for one in found} == {type(value)}


@dataclass
class Point:
    x: int
    y: int


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ((1, 2), [1, 2]),
        (Decimal("1.50"), "1.50"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Point(1, 2), {"x": 1, "y": 2}),
        ({1}, [1]),
    ],
)
def test_a_value_comes_back_as_messagepack_has_it(cache, value, form):
    """What MessagePack has no type for comes back in the form that the docstring of ``Cache`` names."""
    cache.set("k", value)

    assert cache.get("k") == form


def test_none_is_a_value(cache):
    """A cached ``None`` is a hit: it is served, found by every read, and not loaded again."""
    loads = []
    first = cache.get_or_set("k", lambda: loads.append(1))
    second = cache.get_or_set("k", lambda: loads.append(2))

    assert (first, second, loads) == (None, None, [1])
    assert cache.get("k", MISS) is None
    assert cache.get_many(["k"]) == {"k": None}
    assert cache.exists("k")


def test_what_is_not_cached_is_the_default(cache):
    """``None`` where nothing is said, and ``MISS`` to tell a cached ``None`` from nothing."""
    assert cache.get("k") is None
    assert cache.get("k", 7) == 7
    assert cache.get("k", MISS) is MISS
    assert not MISS
    assert repr(MISS) == "MISS"


def test_many_keys_are_read_and_those_that_are_missing_left_out(cache):
    """The answer holds what is cached, once for each key."""
    cache.set_many({"a": 1, "b": None})

    assert cache.get_many(["a", "b", "c", "a"]) == {"a": 1, "b": None}
    assert cache.get_many(iter(["a"])) == {"a": 1}
    assert cache.get_many([]) == {}


def test_nothing_is_set_where_nothing_is_given(cache):
    """An empty mapping is stored without a word to Redis."""
    assert cache.set_many({}) is True


def test_set_many_stores_all_or_none(cache):
    """One value without a form keeps the others out too."""
    with pytest.raises(ValueNotCacheable):
        cache.set_many({"a": 1, "b": object()})

    assert cache.get_many(["a", "b"]) == {}


def test_the_last_set_counts(cache):
    """A value is replaced, with its time to live, its stale window and its tags."""
    cache.set("k", 1, ttl=1_000, stale=500, tags=["t"])
    cache.set("k", 2, ttl=10)
    cache.invalidate(tags=["t"])

    assert cache.get("k") == 2
    assert left_ms(cache, "k") <= 10_000


def test_namespaces_are_apart(redis, name):
    """The same key in another namespace is another entry."""
    one, other = Cache(redis, namespace=f"{name}:a"), Cache(redis, namespace=name)
    one.set("k", 1)
    other.set("a:k", 2)

    assert (one.get("k"), other.get("a:k"), other.get("k", MISS)) == (1, 2, MISS)


@pytest.mark.parametrize("key", ["a{b}c", "}", "{", "%7D", "a b", "*", "é" * 512, "\n", "a:b:lease", "\x00"])
def test_any_text_is_a_key(cache, key):
    """Braces, stars, control characters and colons are kept apart from everything else."""
    cache.set(key, key)

    assert cache.get(key) == key
    assert cache.get_or_set(key, never) == key
    assert cache.delete(key) == 1
    assert not cache.exists(key)


def test_delete_tells_how_many_there_were(cache):
    """Keys that were not stored do not count."""
    cache.set_many({"a": 1, "b": 2})

    assert cache.delete("a", "b", "c") == 2
    assert cache.delete("a") == 0
    assert cache.delete() == 0
    assert cache.get_many(["a", "b"]) == {}


def test_invalidate_takes_keys_tags_and_a_pattern_at_once(cache):
    """Each way removes what it names, and the answer counts keys and tags."""
    cache.set_many({"key": 1, "list:1": 2, "list:2": 3, "other": 4})
    cache.set("tagged", 5, tags=["t"])
    removed = cache.invalidate(keys=["key", "absent"], tags=["t", "unknown"], matching="list:*")

    assert removed == 4
    assert cache.get_many(["key", "list:1", "list:2", "other", "tagged"]) == {"other": 4}
    assert cache.invalidate() == 0


def test_exists_looks_without_reading(cache):
    """True for what is stored, False for what is not, and no hit or miss counted."""
    cache.set("k", 1)

    assert cache.exists("k")
    assert not cache.exists("other")
    assert (cache.stats().hits, cache.stats().misses) == (0, 0)


# Counters


def test_a_counter_starts_at_zero(cache):
    """The first call creates it, later ones add, also negative amounts."""
    assert [cache.incr("n"), cache.incr("n", 5), cache.incr("n", -7), cache.incr("n", 0)] == [1, 6, -1, -1]
    assert cache.get("n") == -1


def test_a_counter_keeps_its_first_ttl(cache):
    """Adding does not keep a counter alive for ever: a window that is counted in must end."""
    cache.incr("n", ttl=100)
    cache.redis.coordination.pexpire(cache.keys.entry("n"), 5_000)
    cache.incr("n", ttl=100)

    assert 0 < left_ms(cache, "n") <= 5_000


def test_a_counter_gets_the_ttl_of_the_call_or_the_cache(redis, name):
    """A new counter lives for what was asked, else for what the cache says."""
    cache = Cache(redis, namespace=name, ttl=50)
    cache.incr("a", ttl=10)
    cache.incr("b")

    assert 5_000 < left_ms(cache, "a") <= 10_000
    assert 45_000 < left_ms(cache, "b") <= 50_000


@pytest.mark.parametrize("start", [2**53, 2**63 - 2, -(2**63)])
def test_a_counter_is_exact_to_64_bits(cache, start):
    """No digit is lost where a float would lose it."""
    cache.set("n", start)

    assert cache.incr("n") == start + 1
    assert cache.get("n") == start + 1


def test_set_starts_a_counter_elsewhere(cache):
    """A whole number that was set or loaded can be added to."""
    cache.set("set", 10)
    cache.get_or_set("loaded", lambda: 20)

    assert cache.incr("set") == 11
    assert cache.incr("loaded") == 21


@pytest.mark.parametrize("value", ["text", True, 1.5, None, [1], 2**63])
def test_what_is_no_counter_is_not_added_to(cache, value):
    """Adding to something else is an error that names the key, and changes nothing."""
    cache.set("k", value)

    with pytest.raises(EntryNotCounter, match="'k'") as caught:
        cache.incr("k")
    assert caught.value.key == "k"
    assert cache.get("k") == value


def test_a_number_with_tags_is_no_counter(cache):
    """A counter has no room for tags."""
    cache.set("k", 1, tags=["t"])

    with pytest.raises(EntryNotCounter):
        cache.incr("k")


@pytest.mark.parametrize("by", [1.5, "1", None, True])
def test_only_whole_numbers_are_added(cache, by):
    """A flag or a float is a mistake."""
    with pytest.raises(TypeError, match="whole number"):
        cache.incr("k", by)

    assert not cache.exists("k")


def test_a_counter_with_a_stale_window_is_added_to(cache):
    """It keeps its time and its window."""
    cache.set("n", 5, ttl=60, stale=600)
    cache.redis.coordination.pexpire(cache.keys.entry("n"), 300_000)

    assert cache.incr("n") == 6
    assert cache.ttl("n") == 0.0
    assert left_ms(cache, "n") <= 300_000


@pytest.mark.parametrize("how", [lambda cache: cache.clear(), lambda cache: cache.delete("n")], ids=["clear", "delete"])
def test_a_counter_that_was_removed_starts_anew(cache, how):
    """At zero, and with a new time."""
    cache.incr("n", 7, ttl=10)
    how(cache)

    assert cache.get("n", MISS) is MISS
    assert cache.incr("n", ttl=1_000) == 1
    assert left_ms(cache, "n") > 500_000


def test_a_refused_amount_leaves_the_counter_as_it_was(cache):
    """Its value, and the time that it has left."""
    cache.set("n", 2**63 - 1, ttl=100)

    with pytest.raises(EntryNotCounter):
        cache.incr("n")
    assert cache.get("n") == 2**63 - 1
    assert 50_000 < left_ms(cache, "n") <= 100_000


# Times to live


def test_every_entry_expires_and_jitter_never_lengthens(cache):
    """However it came in, an entry lives for nine tenths to all of what was asked, and not all for the same."""
    cache.set_many({f"s{i}": i for i in range(100)}, ttl=1_000)
    for i in range(20):
        cache.get_or_set(f"g{i}", lambda: "x", ttl=1_000)
        cache.refresh(f"r{i}", lambda: "x", ttl=1_000)
    lefts = [
        left_ms(cache, key) for key in (f"{k}{i}" for k, n in (("s", 100), ("g", 20), ("r", 20)) for i in range(n))
    ]
    cache.invalidate(matching="*")

    assert all(870_000 < left <= 1_000_000 for left in lefts)
    assert len({left // 1_000 for left in lefts[:100]}) > 10
    assert len({left // 1_000 for left in lefts[100:]}) > 3


def test_the_stale_window_is_kept_whole(cache):
    """Jitter shortens the fresh part; the stale window comes on top."""
    cache.set_many({f"k{i}": i for i in range(50)}, ttl=10, stale=1_000)
    lefts = [left_ms(cache, f"k{i}") for i in range(50)]

    assert all(1_005_000 < left <= 1_010_000 for left in lefts)


def test_the_ttl_of_the_cache_is_the_default(redis, name):
    """A call that says nothing gets what the cache was made with."""
    cache = Cache(redis, namespace=name, ttl="1m")
    cache.set("k", 1)

    assert 50_000 < left_ms(cache, "k") <= 60_000


def test_touch_gives_a_new_time(cache):
    """Longer or shorter than before, else the cache's; False where there is nothing to give it to."""
    cache.set("k", 1, ttl=10)

    assert cache.touch("k", "1h")
    assert 3_500_000 < left_ms(cache, "k") <= 3_600_000
    assert cache.touch("k")
    assert 200_000 < left_ms(cache, "k") <= 300_000
    assert cache.touch("k", 5)
    assert left_ms(cache, "k") <= 5_000
    assert not cache.touch("other", 5)


def test_touch_keeps_the_versions_of_the_tags_for_as_long(cache):
    """Or an entry with a longer time would be invalid before it has passed."""
    cache.set("k", 1, ttl=10, tags=["t"])
    client = cache.redis.coordination

    assert cache.touch("k", "7d")
    assert client.pttl(cache.keys.tag("t")) >= left_ms(cache, "k") > 6 * 86_400_000
    assert client.pttl(cache.keys.whole) >= left_ms(cache, "k")
    cache.invalidate(tags=["t"])
    assert not cache.touch("k", "8d")
    assert cache.get("k", MISS) is MISS


def test_an_entry_is_gone_after_its_time(redis, name):
    """Redis removes it; the next read loads."""
    cache = Cache(redis, namespace=name)
    cache.set("k", 1, ttl="1ms")

    def eventually():
        while cache.exists("k"):
            pass
        return cache.get("k", MISS)

    assert eventually() is MISS


# Refusals


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), "soon", "0s"])
def test_a_bad_ttl_is_refused_by_every_method(redis, name, cache, ttl):
    """Nothing is stored, loaded or changed."""
    cache.set("k", 1)
    calls = [
        lambda: Cache(redis, namespace=name, ttl=ttl),
        lambda: Cache(redis, namespace=name, lease=ttl),
        lambda: cache.set("k", 2, ttl=ttl),
        lambda: cache.set_many({"k": 2}, ttl=ttl),
        lambda: cache.get_or_set("new", never, ttl=ttl),
        lambda: cache.refresh("k", never, ttl=ttl),
        lambda: cache.incr("k", ttl=ttl),
        lambda: cache.touch("k", ttl),
        lambda: cache.getex("k", ttl),
        lambda: cache.add("new", 1, ttl=ttl),
        lambda: cache.replace("k", 2, ttl=ttl),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"ttl=|lease="):
            call()

    assert cache.get("k") == 1
    assert not cache.exists("new")


@pytest.mark.parametrize("stale", [-1, float("nan"), "soon"])
def test_a_bad_stale_window_is_refused_by_every_method(cache, stale):
    """Zero is allowed, and nothing less."""
    calls = [
        lambda: cache.set("k", 2, stale=stale),
        lambda: cache.set_many({"k": 2}, stale=stale),
        lambda: cache.get_or_set("k", never, stale=stale),
        lambda: cache.refresh("k", never, stale=stale),
        lambda: cache.refresh("k", never, unless_fresh_for=stale),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"stale=|unless_fresh_for="):
            call()

    assert not cache.exists("k")


@pytest.mark.parametrize(
    ("key", "error"),
    [("", ValueError), ("x" * 1_025, ValueError), ("\ud800", ValueError), (b"k", TypeError), (7, TypeError)],
)
def test_a_bad_key_is_refused_by_every_method(cache, key, error):
    """Empty, too long, not Unicode or not text."""
    calls = [
        lambda: cache.get(key),
        lambda: cache.get_many([key]),
        lambda: cache.exists(key),
        lambda: cache.get_or_set(key, never),
        lambda: cache.get_or_set("k", lambda: 1, tags=[key]),
        lambda: cache.refresh(key, never),
        lambda: cache.set(key, 1),
        lambda: cache.set_many({key: 1}),
        lambda: cache.set("k", 1, tags=[key]),
        lambda: cache.incr(key),
        lambda: cache.expire(key),
        lambda: cache.touch(key, 1),
        lambda: cache.getdel(key),
        lambda: cache.add(key, 1),
        lambda: cache.get_or_set_many([key], never),
        lambda: cache.delete(key),
        lambda: cache.invalidate(keys=[key]),
        lambda: cache.invalidate(tags=[key]),
        lambda: cache.invalidate(matching=key),
    ]
    for call in calls:
        with pytest.raises(error):
            call()


@pytest.mark.parametrize("value", [object(), 2**64, -(2**63) - 1, "\ud800", {object(): 1}, lambda: 0])
def test_a_value_without_a_form_is_refused(cache, value):
    """The error names the key and says what may be cached; another load may begin at once."""
    with pytest.raises(ValueNotCacheable, match=r"'k'.*give built-in types") as caught:
        cache.set("k", value)
    with pytest.raises(ValueNotCacheable):
        cache.get_or_set("k", lambda: value)
    with pytest.raises(ValueNotCacheable):
        cache.refresh("k", lambda: value)

    assert caught.value.key == "k"
    assert isinstance(caught.value, TypeError)
    assert leases(cache) == []
    assert cache.get_or_set("k", lambda: "good") == "good"


def test_a_value_that_nests_itself_is_refused(cache):
    """A circle has no form, and takes nothing down."""
    circle = []
    circle.append(circle)

    with pytest.raises(ValueNotCacheable):
        cache.set("k", circle)


def test_miss_is_never_cached(cache):
    """A loader that returns it has nothing to cache, and the caller gets it; a ``set`` of it is a mistake."""
    assert cache.get_or_set("k", lambda: MISS) is MISS
    assert not cache.refresh("k", lambda: MISS)
    with pytest.raises(ValueNotCacheable):
        cache.set("k", MISS)

    assert cache.get("k", MISS) is MISS
    assert leases(cache) == []


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_what_a_loader_raises_reaches_the_caller(cache, error):
    """Nothing is stored, and the lease is given back even when the process is told to end."""

    def fails():
        raise error

    for load in (cache.get_or_set, cache.refresh):
        with pytest.raises(type(error)) as caught:
            load("k", fails)

        assert caught.value is error
    assert not cache.exists("k")
    assert leases(cache) == []


def test_a_loader_that_asks_for_its_own_key_is_told_so(cache):
    """It would wait for itself; the message names the key, and the lease is free again."""
    with pytest.raises(LoaderRecursion, match="'k'") as caught:
        cache.get_or_set("k", lambda: cache.get_or_set("k", never))

    assert caught.value.key == "k"
    assert leases(cache) == []
    assert cache.get_or_set("k", lambda: 1) == 1


def test_a_loader_that_removes_its_own_key_and_asks_again_is_told_so(cache):
    """Also where the lease is free, a load inside its own load would have no end."""

    def loader():
        cache.delete("k")
        return cache.get_or_set("k", loader)

    with pytest.raises(LoaderRecursion):
        cache.get_or_set("k", loader)
    assert leases(cache) == []


def test_a_loader_may_ask_for_other_keys(cache):
    """Loads inside loads are fine while they are of other things."""
    value = cache.get_or_set("a", lambda: [cache.get_or_set("b", lambda: 1), cache.get("a", "missing")])

    assert value == [1, "missing"]
    assert cache.get_many(["a", "b"]) == {"a": [1, "missing"], "b": 1}


# What cannot be read

GARBAGE = {
    "empty": b"",
    "text": b"garbage",
    "pickle": b"\x80\x04N.",
    "a-bare-number": b"12",
    "old-format": msgspec.msgpack.encode([1, 0, 0, 0, {}, None]),
    "other-format": (b"\xc12", b"\x96\x01\x02\x03\x90\xa0\xc0"),
    "half-a-head": (b"\xc11", None),
    "old-shape": (b"\xc11", msgspec.msgpack.encode([1, 0])),
    "nearly-a-number": (b"\xc11", b"12x"),
    "deep": (b"\xc11", b"\x96\x01\x02\x03\x90\xa0" + b"\x91" * 100_000 + b"\xc0"),
    "no-utf8": (b"\xc11", b"\x96\x01\x02\x03\x90\xa0\xa1\xff"),
}


def stored_as(cache, garbage):
    """What is bare, or stands behind a head of the version that the namespace has now."""
    if isinstance(garbage, bytes):
        return garbage
    start, rest = garbage
    head = start + b"010000000000" + b"a_token-of-16-ch" + cache.redis.coordination.get(cache.keys.whole)
    return head + rest if rest else head[:40]


@pytest.mark.parametrize("stored", GARBAGE.values(), ids=GARBAGE)
def test_an_entry_that_cannot_be_read_is_a_miss(cache, caplog, stored):
    """It is counted, logged with its key, loaded anew and replaced - never raised, never guessed at."""
    cache.set("good", "old")
    cache.redis.coordination.set(cache.keys.entry("k"), stored_as(cache, stored), px=60_000)
    with caplog.at_level(logging.WARNING, "petiole"):
        found = [cache.get("k", MISS), cache.get_many(["k", "other"])]
    undecodable = cache.stats().undecodable
    loaded = cache.get_or_set("k", lambda: "new")

    assert found == [MISS, {}]
    assert undecodable == 2
    assert cache.stats().errors == 0
    assert "'k' cannot be read" in caplog.text
    assert cache.stats().hits == 0
    assert loaded == cache.get("k") == "new"


def test_an_entry_as_this_file_makes_it_can_be_read(cache):
    """Or the test before would refuse garbage for another reason than the one that it names."""
    cache.set("k", 1)
    for body, value in ((b"12", 12), (b"\x96\x01\x02\x03\x90\xa0\xa2ok", "ok")):
        cache.redis.coordination.set(cache.keys.entry("k"), stored_as(cache, (b"\xc11", body)), px=60_000)
        assert cache.get("k") == value


def test_an_entry_that_cannot_be_read_does_not_hide_others(cache):
    """One bad entry among many is one miss."""
    cache.set_many({"a": 1, "b": 2})
    cache.redis.coordination.set(cache.keys.entry("a"), b"garbage", px=60_000)

    assert cache.get_many(["a", "b"]) == {"b": 2}


# Counts


def test_a_cache_counts_what_it_did(cache):
    """Hits, misses and loads of this process, and the ratio of them."""
    cache.get_or_set("k", lambda: 1)
    cache.get_or_set("k", never)
    cache.get("k")
    cache.get_many(["k", "other"])
    stats = cache.stats()

    assert (stats.hits, stats.stale, stats.misses, stats.loads) == (3, 0, 2, 1)
    assert (stats.waits, stats.refused, stats.errors) == (0, 0, 0)
    assert stats.hit_ratio == 3 / 5


def test_a_new_cache_has_counted_nothing(cache):
    """No reads are a ratio of zero, not a division by it."""
    assert cache.stats().hit_ratio == 0.0
    assert repr(cache) == f"<Cache {cache.namespace!r} at {cache.redis.address} [hit ratio 0%]>"


def test_the_names_of_a_lease_and_an_entry_fit(cache):
    """While a load runs, its lease is there, with a time to live; afterwards it is not."""
    during = cache.get_or_set("k", lambda: cache.redis.coordination.pttl(lease(cache.keys.entry("k"))))

    assert 0 < during <= 10_000
    assert leases(cache) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.get_many("abc"),
        lambda cache: cache.invalidate(keys="user:1"),
        lambda cache: cache.invalidate(tags="users"),
        lambda cache: cache.get_or_set("k", dict, tags="users"),
        lambda cache: cache.set("k", 1, tags="users"),
        lambda cache: cache.refresh("k", dict, tags="users"),
    ],
)
def test_one_text_in_the_place_of_several_is_refused(cache, call):
    """It would be taken apart letter by letter, and nothing would say so."""
    with pytest.raises(TypeError, match="must be several"):
        call(cache)


def test_an_amount_beyond_64_bits_is_refused_as_an_argument(cache):
    """The entry is not to blame."""
    with pytest.raises(ValueError, match="beyond 64 bits"):
        cache.incr("k", 2**70)
