"""Tags: groups of entries that are gone together, whatever becomes of the version that holds them."""

import pytest

from petiole.cachelib import MISS, Cache


@pytest.fixture
def tagged(cache):
    """A cache with an entry of one tag, one of two, and one of none, all with a stale window."""
    cache.set("t", 1, stale=60, tags=["t"])
    cache.set("tu", 2, stale=60, tags=["t", "u"])
    cache.set("none", 3, stale=60)
    return cache


ALL = ["t", "tu", "none"]


def version(cache, tag):
    return cache.redis.coordination.get(cache.keys.tag(tag))


def test_an_invalidated_tag_takes_its_entries_along(tagged):
    """Every entry that names it is gone, and no other."""
    assert tagged.invalidate(tags=["t"]) == 1
    assert tagged.get_many(ALL) == {"none": 3}
    assert tagged.get("t", MISS) is MISS


def test_an_entry_stands_with_all_of_its_tags(tagged):
    """One of two is enough to make it go."""
    tagged.invalidate(tags=["u"])

    assert tagged.get_many(ALL) == {"t": 1, "none": 3}


def test_an_invalidated_entry_is_not_served_stale(tagged):
    """A stale window is for age, never for what was invalidated: the loader's failure reaches the caller."""
    tagged.invalidate(tags=["t"])

    def fails():
        raise OSError("the database is away")

    with pytest.raises(OSError, match="away"):
        tagged.get_or_set("t", fails, stale=60, tags=["t"])
    assert tagged.get("t", MISS) is MISS


@pytest.mark.parametrize("age", ["fresh", "stale"])
def test_an_invalidated_entry_is_loaded_anew(tagged, age):
    """Also by a caller that names no tags or others than the entry carries."""
    if age == "stale":
        tagged.redis.coordination.pexpire(tagged.keys.entry("t"), 10_000)
        tagged.redis.coordination.pexpire(tagged.keys.entry("tu"), 10_000)
    tagged.invalidate(tags=["t"])

    assert tagged.get_or_set("t", lambda: "new") == "new"
    assert tagged.get_or_set("tu", lambda: "new", tags=["u"]) == "new"
    assert tagged.get_many(ALL) == {"t": "new", "tu": "new", "none": 3}


def test_a_version_that_was_evicted_makes_its_entries_invalid(tagged):
    """A lost version cannot tell whether it was bumped, so it counts as bumped."""
    tagged.redis.coordination.delete(tagged.keys.tag("t"))

    assert tagged.get_many(ALL) == {"none": 3}


@pytest.mark.parametrize("revive", ["set", "set_many", "get_or_set", "refresh"])
def test_a_new_version_does_not_make_old_entries_valid_again(tagged, revive):
    """A tag that is used again after it was lost gets a version that no old entry carries."""
    tagged.redis.coordination.delete(tagged.keys.tag("t"))
    {
        "set": lambda: tagged.set("new", 9, tags=["t"]),
        "set_many": lambda: tagged.set_many({"new": 9}, tags=["t"]),
        "get_or_set": lambda: tagged.get_or_set("new", lambda: 9, tags=["t"]),
        "refresh": lambda: tagged.refresh("new", lambda: 9, tags=["t"]),
    }[revive]()

    assert version(tagged, "t") is not None
    assert tagged.get_many([*ALL, "new"]) == {"none": 3, "new": 9}


def test_a_read_makes_no_version(tagged):
    """Looking at an invalid entry does not touch what made it so, be it another version or none."""
    tagged.invalidate(tags=["t"])
    made = version(tagged, "t")
    tagged.get("t")
    tagged.get_many(ALL)
    assert version(tagged, "t") == made

    tagged.redis.coordination.delete(tagged.keys.tag("t"))
    tagged.get("t")
    tagged.get_many(ALL)
    assert tagged.exists("t") is False
    assert version(tagged, "t") is None


def test_each_invalidation_makes_a_version_that_was_never_there(tagged):
    """Entries of long ago do not come back, however often a tag is invalidated."""
    seen = [version(tagged, "t")]
    for _ in range(20):
        tagged.invalidate(tags=["t"])
        seen.append(version(tagged, "t"))

    assert len(set(seen)) == 21
    assert seen == sorted(seen)


@pytest.mark.parametrize("lost", ["version", "number", "both"])
def test_an_invalidation_is_not_forgotten_when_its_version_is_lost(tagged, lost):
    """A load that began before it is refused, although nothing in Redis names it any more."""
    client = tagged.redis.coordination

    def loader():
        tagged.invalidate(tags=["t"])
        if lost != "number":
            client.delete(tagged.keys.tag("t"))
        if lost != "version":
            client.delete(tagged.keys.sequence)
        return "overtaken"

    assert tagged.get_or_set("new", loader, tags=["t"]) == "overtaken"
    assert tagged.get("new", MISS) is MISS
    assert tagged.stats().refused == 1


def test_a_tag_is_shared_by_loads_and_sets(cache):
    """The second entry of a tag takes the version of the first, so that both stand."""
    cache.set("a", 1, tags=["t"])
    cache.get_or_set("b", lambda: 2, tags=["t"])
    cache.set("c", 3, tags=["t"])
    cache.refresh("d", lambda: 4, tags=["t"])

    assert cache.get_many(list("abcd")) == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert cache.invalidate(tags=["t"]) == 1
    assert cache.get_many(list("abcd")) == {}


@pytest.mark.parametrize("how", ["set", "get_or_set", "refresh"])
def test_a_version_outlives_every_entry_that_carries_it(cache, how):
    """A later entry with a longer life prolongs the version; one with a shorter life does not cut it."""
    store = {
        "set": lambda key, **kw: cache.set(key, 1, **kw),
        "get_or_set": lambda key, **kw: cache.get_or_set(key, lambda: 1, **kw),
        "refresh": lambda key, **kw: cache.refresh(key, lambda: 1, **kw),
    }[how]
    client = cache.redis.coordination
    lefts = []
    for key, ttl, stale in (("a", 10, 0), ("b", 10_000, 90_000), ("c", 10, 0)):
        store(key, ttl=ttl, stale=stale, tags=["t"])
        lefts.append(client.pttl(cache.keys.tag("t")))

    assert 3_500_000 < lefts[0] <= 7_200_000  # an hour at least, so that it outlives the loads that began with it
    assert client.pttl(cache.keys.entry("b")) <= lefts[1] <= 200_000_000
    assert client.pttl(cache.keys.entry("b")) <= lefts[2] <= lefts[1]
    assert client.pttl(cache.keys.entry("b")) <= client.pttl(cache.keys.whole)


def test_tags_of_another_namespace_are_other_tags(redis, name):
    """An invalidation reaches its own namespace only."""
    one, other = Cache(redis, namespace=name), Cache(redis, namespace=f"{name}x")
    one.set("k", 1, tags=["t"])
    other.set("k", 2, tags=["t"])
    one.invalidate(tags=["t"])

    assert one.get("k", MISS) is MISS
    assert other.get("k") == 2


def test_a_tag_that_is_named_twice_is_one_tag(cache):
    """Repeating oneself is no mistake."""
    cache.set("a", 1, tags=["t", "t"])
    cache.get_or_set("b", lambda: 2, tags=["t", "t"])

    assert cache.get_many(list("ab")) == {"a": 1, "b": 2}


def test_a_tag_and_a_key_of_one_name_are_two_things(cache):
    """Removing the key leaves the tag, and the other way round."""
    cache.set("x", 1)
    cache.set("y", 2, tags=["x"])
    cache.delete("x")

    assert cache.get_many(list("xy")) == {"y": 2}
    cache.set("x", 1)
    cache.invalidate(tags=["x"])
    assert cache.get_many(list("xy")) == {"x": 1}
