"""A lease lasts as long as its load, and no longer than its process."""

from itertools import pairwise
from threading import Event, Thread, enumerate

import pytest
from local_nodes import eventually

from petiole.cachelib import Cache
from petiole.cachelib import keys as key_names

LEASE_S = 1.2
LONG_LEASE_S = 3.0  # renewed each third of it, which a busy machine must manage


@pytest.fixture
def quick(redis, name):
    """A cache whose leases are short."""
    return Cache(redis, namespace=name, lease=LEASE_S)


def _voided(cache, key):
    return not cache.redis.coordination.exists(key_names.lease(cache.keys.entry(key)))


def test_a_load_that_outlasts_its_lease_is_stored_and_nobody_else_loads(redis, name):
    """The lease is renewed while the load runs; others wait for it."""
    quick = Cache(redis, namespace=name, lease=LONG_LEASE_S)
    loading = Event()
    loads = []

    def slow():
        loads.append("slow")
        loading.set()
        left_ms, lease = [], key_names.lease(quick.keys.entry("k"))

        def longer():
            left_ms.append(redis.coordination.pttl(lease))
            return sum(later > before for before, later in pairwise(left_ms)) >= 4  # at a third of it, each

        eventually(longer, "it is renewed for longer than it lasts")
        return "slow"

    def never():
        loads.append("another")
        return "another"

    other = Cache(redis, namespace=name, lease=LONG_LEASE_S)
    found = []
    holder = Thread(target=lambda: found.append(quick.get_or_set("k", slow)))
    holder.start()
    assert loading.wait(10)
    waiter = Thread(target=lambda: found.append(other.get_or_set("k", never, wait=30)))
    waiter.start()
    holder.join(30)
    waiter.join(30)

    assert loads == ["slow"]
    assert found == ["slow", "slow"]
    assert quick.get("k") == "slow"
    assert quick.stats().refused == 0


def test_a_lease_that_was_voided_is_not_taken_again(quick):
    """However long the load still runs: what was invalidated stays away."""
    voided = []

    def slow():
        quick.delete("k")
        Event().wait(LEASE_S * 1.5)
        voided.append(_voided(quick, "k"))
        return "old"

    assert quick.get_or_set("k", slow) == "old"
    assert voided == [True]
    assert quick.get("k") is None
    assert quick.stats().refused == 1


def test_who_will_not_wait_loads_for_itself(quick, redis, name):
    """``wait`` is the caller's patience; what it then loads is not stored."""
    other = Cache(redis, namespace=name, lease=LEASE_S)

    def slow():
        assert other.get_or_set("k", lambda: "impatient", wait=0) == "impatient"
        return "patient"

    assert quick.get_or_set("k", slow) == "patient"
    assert quick.get("k") == "patient"


def test_one_thread_renews_for_a_whole_cache(quick):
    """However many loads there are; and it forgets those that are over."""
    before = enumerate()
    for number in range(20):
        quick.get_or_set(f"k{number}", lambda: 1)
    quick.get_or_set_many(["a", "b"], lambda keys: dict.fromkeys(keys, 1))
    with quick.guard(["c", "d"]) as guard:
        quick.set_many({"c": 1}, guard=guard)

    assert [thread.name for thread in enumerate() if thread not in before] == ["petiole-leases"]
    assert repr(quick._loading.keeper) == "<LeaseKeeper [0 held]>"


@pytest.mark.parametrize("left_ms", [1, 60_000])
def test_the_tags_of_a_long_load_live_as_long_as_its_value_needs_them(redis, name, left_ms):
    """A version that is lost meanwhile is made anew: a value is not born invalid because it took long to load."""
    cache = Cache(redis, namespace=name, ttl="1h")
    tag = cache.keys.tag("t")

    def slow():
        redis.coordination.pexpire(tag, left_ms)
        eventually(lambda: left_ms > 1 or not redis.coordination.exists(tag), "it is over")
        return "slow"

    assert cache.get_or_set("k", slow, tags=["t"]) == "slow"
    assert cache.get("k") == "slow"
    assert redis.coordination.pttl(tag) >= redis.coordination.pttl(cache.keys.entry("k"))
