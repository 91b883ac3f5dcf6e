"""Soft and hard TTL: what is served past its time, to whom, and who loads meanwhile.

Age is made by telling Redis how long an entry still has to live, never by waiting.
"""

import pytest

from petiole.cachelib import MISS, Cache
from petiole.cachelib.errors import ValueNotCacheable
from petiole.cachelib.keys import lease


def never():
    pytest.fail("the loader was called")


def fails():
    raise OSError("the database is away")


def age(cache, key, *, left):
    """Make an entry so old that so many seconds are left of it."""
    assert cache.redis.coordination.pexpire(cache.keys.entry(key), int(left * 1_000))


@pytest.fixture
def stale(cache):
    """A cache with an entry that is past its soft TTL, and has half of its stale window left."""
    cache.set("k", "old", ttl=60, stale=600)
    age(cache, "k", left=300)
    return cache


def test_an_entry_is_fresh_before_its_stale_window(cache):
    """Until the soft TTL nobody loads."""
    cache.set("k", "old", ttl=60, stale=600)
    age(cache, "k", left=605)

    assert cache.get_or_set("k", never) == "old"
    assert (cache.stats().hits, cache.stats().stale) == (1, 0)


def test_a_stale_entry_is_read_and_counted_as_stale(stale):
    """``get`` never loads, so it serves what there is."""
    assert stale.get("k") == "old"
    assert stale.get_many(["k"]) == {"k": "old"}
    assert (stale.stats().hits, stale.stats().stale) == (0, 2)


def test_one_caller_loads_a_stale_entry_anew(stale):
    """The one who finds it stale waits for the new value and stores it."""
    assert stale.get_or_set("k", lambda: "new", ttl=60, stale=600) == "new"
    assert stale.get_or_set("k", never) == "new"
    assert (stale.stats().stale, stale.stats().hits, stale.stats().loads) == (1, 1, 1)


def test_others_are_served_the_stale_value_while_one_loads(stale):
    """They neither wait nor load, also in the thread of the loader itself."""
    other = Cache(stale.redis, namespace=stale.namespace)
    seen = []

    def loader():
        seen.append(other.get_or_set("k", never))
        seen.append(stale.get_or_set("k", never))
        seen.append(other.get("k"))
        return "new"

    stale.get_or_set("k", loader)

    assert seen == ["old", "old", "old"]
    assert other.stats().waits == 0
    assert other.get("k") == "new"


def test_a_loader_that_fails_leaves_the_stale_value(stale):
    """It is served, and where no pause is wanted the lease is free for the next try."""
    assert stale.get_or_set("k", fails, retry_after=0) == "old"
    assert not stale.redis.coordination.exists(lease(stale.keys.entry("k")))
    assert stale.get_or_set("k", lambda: "new") == "new"


def held_ms(cache, key):
    return cache.redis.coordination.pttl(lease(cache.keys.entry(key)))


def test_a_loader_that_fails_is_left_alone_for_a_while(stale):
    """Whoever has the stale value meanwhile does not ask it; the pause ends by itself."""
    other = Cache(stale.redis, namespace=stale.namespace)

    assert stale.get_or_set("k", fails, retry_after="1h") == "old"
    assert stale.get_or_set("k", never) == "old"
    assert other.get_or_set("k", never) == "old"
    assert 3_000_000 < held_ms(stale, "k") <= 3_600_000
    stale.redis.coordination.delete(lease(stale.keys.entry("k")))  # as when its time has run out
    assert other.get_or_set("k", lambda: "new") == "new"


def test_the_pause_after_a_failure_is_five_seconds_where_nothing_is_said(stale):
    """Long enough for a database to breathe, and short enough that nobody waits for it."""
    stale.get_or_set("k", fails)

    assert 0 < held_ms(stale, "k") <= 5_000


@pytest.mark.parametrize("gone", ["deleted", "invalidated", "expired"])
def test_the_pause_after_a_failure_holds_up_nobody_who_has_nothing_to_serve(cache, gone):
    """It spares the loader as long as there is a value; a miss has to load, and does not wait."""
    cache.set("k", "old", stale=600, tags=["t"])
    age(cache, "k", left=300)
    cache.get_or_set("k", fails, retry_after="1h")
    if gone == "deleted":
        cache.delete("k")
    elif gone == "invalidated":
        cache.invalidate(tags=["t"])
    else:
        cache.redis.coordination.delete(cache.keys.entry("k"))

    assert cache.get_or_set("k", lambda: "new", wait=60) == "new"
    assert cache.get("k") == "new"
    assert cache.stats().waits == 0


def test_a_loader_that_is_told_to_end_is_not_held_up(stale):
    """A stale value is no answer to Ctrl-C."""

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stale.get_or_set("k", interrupted)
    assert stale.get("k") == "old"


def test_a_loader_that_fails_for_a_fresh_window_raises_where_nothing_is_left(cache):
    """Without a stale value there is nothing to serve instead."""
    with pytest.raises(OSError, match="away"):
        cache.get_or_set("k", fails, stale=600)


def test_a_value_without_a_form_leaves_the_stale_one(stale):
    """The mistake is raised, and what was stored stays."""
    with pytest.raises(ValueNotCacheable):
        stale.get_or_set("k", object)
    assert stale.get("k") == "old"


def test_an_entry_without_a_stale_window_is_fresh_to_its_end(cache):
    """The soft TTL is the hard one where nothing is said."""
    cache.set("k", ["old"], ttl=60)
    age(cache, "k", left=0.9)

    assert cache.get_or_set("k", never) == ["old"]
    assert cache.stats().hits == 1


def test_touch_moves_the_stale_window_along(cache):
    """A fresh entry gets the new time, and after it the whole window that it was stored with."""
    cache.set("k", "old", ttl=60, stale=600)

    assert cache.touch("k", 900)
    assert 850 < cache.ttl("k") <= 900
    assert 1_450_000 < cache.redis.coordination.pttl(cache.keys.entry("k")) <= 1_500_000
    age(cache, "k", left=605)
    assert cache.get_or_set("k", never) == "old"
    age(cache, "k", left=595)
    assert cache.get_or_set("k", lambda: "new") == "new"


def test_touch_does_not_make_a_stale_entry_fresh(stale):
    """Only a loader can."""
    assert not stale.touch("k", 900)
    assert stale.ttl("k") == 0.0
    assert stale.redis.coordination.pttl(stale.keys.entry("k")) <= 300_000
    assert stale.get_or_set("k", lambda: "new") == "new"


def test_expire_makes_an_entry_stale_and_keeps_it_for_its_window(cache):
    """The next caller loads, and is served the old value where that fails; no time is added by saying it twice."""
    cache.set("k", "old", ttl=60, stale=600)

    assert cache.expire("k")
    assert cache.ttl("k") == 0.0
    assert cache.get("k") == "old"
    assert cache.get_or_set("k", fails, retry_after=0) == "old"
    age(cache, "k", left=300)
    assert cache.expire("k")
    assert cache.redis.coordination.pttl(cache.keys.entry("k")) <= 300_000
    assert cache.get_or_set("k", lambda: "new", stale=600) == "new"


def test_expire_deletes_what_has_no_stale_window(cache):
    """There is no time in which it might be served."""
    cache.set("k", "old")

    assert cache.expire("k")
    assert cache.get("k", MISS) is MISS
    assert not cache.expire("k")


def test_expire_voids_a_load_that_is_under_way(cache):
    """What it brings is as old as what was expired."""
    cache.set("k", "old", stale=600)

    assert not cache.refresh("k", lambda: cache.expire("k") and "overtaken", stale=600)
    assert cache.get("k") == "old"
    assert cache.get_or_set("k", lambda: "new") == "new"


# Refreshing


def test_refresh_loads_what_is_still_fresh(cache):
    """Without a condition it always does, and for the whole new time."""
    cache.set("k", "old", ttl=60)

    assert cache.refresh("k", lambda: "new", ttl=600)
    assert cache.get("k") == "new"
    assert cache.redis.coordination.pttl(cache.keys.entry("k")) > 500_000


def test_refresh_loads_what_is_not_there(cache):
    """A key that nobody has asked for yet is warmed too."""
    assert cache.refresh("a", lambda: 1)
    assert cache.refresh("b", lambda: 2, unless_fresh_for=60)
    assert cache.get_many(list("ab")) == {"a": 1, "b": 2}


def test_refresh_spares_what_stays_fresh_for_long_enough(cache):
    """The stale window does not count as fresh."""
    cache.set("k", "old", ttl=60, stale=600)
    age(cache, "k", left=640)

    assert not cache.refresh("k", never, unless_fresh_for=30)
    assert cache.refresh("k", lambda: "new", unless_fresh_for=50)
    assert cache.get("k") == "new"


def test_refresh_does_not_spare_what_was_invalidated(cache):
    """An invalid entry is not fresh at all."""
    cache.set("k", "old", ttl=600, tags=["t"])
    cache.invalidate(tags=["t"])

    assert cache.refresh("k", lambda: "new", tags=["t"], unless_fresh_for=1)
    assert cache.get("k") == "new"


@pytest.mark.parametrize("unless", [0, 1])
@pytest.mark.parametrize("state", ["gone", "stale"])
def test_refresh_leaves_a_key_that_somebody_loads(cache, state, unless):
    """It neither waits nor loads twice."""
    if state == "stale":
        cache.set("k", "old", stale=600)
        age(cache, "k", left=300)
    refreshed = []
    cache.get_or_set("k", lambda: refreshed.append(cache.refresh("k", never, unless_fresh_for=unless)) or "new")

    assert refreshed == [False]
    assert cache.get("k") == "new"


def test_refresh_tells_that_its_value_was_refused(cache):
    """A deletion during the load is stronger."""
    assert not cache.refresh("k", lambda: cache.delete("k"))
    assert cache.get("k", MISS) is MISS
    assert cache.stats().refused == 1


def test_refresh_raises_what_its_loader_raises(stale):
    """Whoever refreshes wants to know; the old value stays, and the lease is free."""
    with pytest.raises(OSError, match="away"):
        stale.refresh("k", fails)
    assert stale.get("k") == "old"
    assert stale.refresh("k", lambda: "new")
