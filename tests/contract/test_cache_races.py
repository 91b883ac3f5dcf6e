"""No stale set: what a load brings back that began before an invalidation is never served after it.

The loads are stopped inside their loaders, so every ordering is played exactly, and time plays no part.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from threading import Event

import pytest

from petiole.cachelib import MISS, Cache
from petiole.cachelib.keys import lease

REMOVERS = {
    "delete": lambda cache, value: cache.delete("k"),
    "key": lambda cache, value: cache.invalidate(keys=["k"]),
    "tag": lambda cache, value: cache.invalidate(tags=["t"]),
    "other-tag": lambda cache, value: cache.invalidate(tags=["u"]),
    "pattern": lambda cache, value: cache.invalidate(matching="k*"),
    "set": lambda cache, value: cache.set("k", value),
    "set-tagged": lambda cache, value: cache.set("k", value, tags=["t"]),
    "set-many": lambda cache, value: cache.set_many({"k": value, "other": 1}),
}
TAGS = ["t", "u"]

by_every_remover = pytest.mark.parametrize("remover", REMOVERS)


def after(remover, value):
    """What may be read once a remover is through: a setter leaves its value, a remover leaves nothing."""
    return value if remover.startswith("set") else MISS


@by_every_remover
@pytest.mark.parametrize("before", ["gone", "fresh", "stale", "invalid"])
def test_a_load_that_was_overtaken_is_not_stored(redis, cache, before, remover):
    """The removal happens while the loader runs, whatever stood there before, and is stronger."""
    other = Cache(redis, namespace=cache.namespace)
    if before != "gone":
        cache.set("k", "older", stale=600, tags=TAGS)
    if before == "stale":
        redis.coordination.pexpire(cache.keys.entry("k"), 300_000)
    if before == "invalid":
        cache.invalidate(tags=["t"])

    def loader():
        REMOVERS[remover](other, "new")
        return "overtaken"

    if before == "fresh":
        cache.refresh("k", loader, stale=600, tags=TAGS)
        returned = "overtaken"
    else:
        returned = cache.get_or_set("k", loader, stale=600, tags=TAGS)

    assert returned == "overtaken"
    assert cache.get("k", MISS) == after(remover, "new")
    assert cache.get_or_set("k", lambda: "new", tags=TAGS) == "new"
    assert cache.get("k") == "new"


@by_every_remover
def test_a_load_that_began_after_the_removal_is_stored(cache, remover):
    """A removal does not keep out what it is not about."""
    REMOVERS[remover](cache, "set")
    cache.delete("k")
    cache.get_or_set("k", lambda: "new", tags=TAGS)

    assert cache.get("k") == "new"


@by_every_remover
def test_a_load_inside_an_overtaken_load_stands(redis, cache, remover):
    """The second load began after the removal, so its value is the one that stays."""
    other = Cache(redis, namespace=cache.namespace)

    def loader():
        REMOVERS[remover](other, "new")
        other.refresh("k", lambda: "newer", tags=TAGS)
        return "overtaken"

    cache.get_or_set("k", loader, tags=TAGS)
    # The first load still had the lease when only its tags were invalidated: then nothing is stored.
    expected = MISS if remover in ("tag", "other-tag") else "newer"

    assert cache.get("k", MISS) == expected


@pytest.mark.parametrize("remover", sorted(REMOVERS.keys() - {"tag", "other-tag"}))  # a tag leaves the lease
def test_an_overtaken_load_does_not_end_the_load_that_came_after(redis, cache, remover):
    """The first loader returns while the second one still runs; it takes neither the lease nor the place."""
    other = Cache(redis, namespace=cache.namespace)
    seen = []

    def second():
        first.release()
        seen.append(cache.get("k", MISS))
        seen.append(redis.coordination.exists(lease(cache.keys.entry("k"))))
        return "second"

    with ThreadPoolExecutor(1) as pool:
        first = Stopped(pool, cache, lambda: "first")
        REMOVERS[remover](other, "new")
        other.refresh("k", second, tags=TAGS)

    assert seen == [after(remover, "new"), 1]
    assert cache.get("k") == "second"


def test_a_load_that_outlived_its_lease_is_returned_but_not_stored(redis, name):
    """Nobody knows what happened since the lease ended, so the value is for the caller alone."""
    cache = Cache(redis, namespace=name)
    client, held = redis.coordination, lease(cache.keys.entry("k"))
    returned = cache.get_or_set("k", lambda: client.delete(held) and "late")

    assert returned == "late"
    assert cache.get("k", MISS) is MISS
    assert cache.stats().refused == 1


def test_a_load_does_not_end_a_lease_that_passed_to_another(redis, name):
    """The first holder's time ran out and the second loads; the first cannot store, the second can."""
    cache, other = Cache(redis, namespace=name), Cache(redis, namespace=name)
    client, held = redis.coordination, lease(cache.keys.entry("k"))
    with ThreadPoolExecutor(1) as pool:
        first = Stopped(pool, cache, lambda: "first")
        client.delete(held)  # as when its time has run out
        seen = []

        def second():
            first.release()
            seen.append(client.exists(held))
            return "second"

        other.get_or_set("k", second)

    assert seen == [1]
    assert cache.get("k") == "second"


def test_a_failed_load_does_not_end_a_lease_that_passed_to_another(redis, name):
    """Giving back what one no longer has gives back nothing."""
    cache = Cache(redis, namespace=name)
    held = lease(cache.keys.entry("k"))

    def first():
        cache.delete("k")
        redis.coordination.hset(held, mapping={"token": "somebody", "waiting": 0})
        redis.coordination.pexpire(held, 10_000)
        raise OSError("the database is away")

    with pytest.raises(OSError, match="away"):
        cache.get_or_set("k", first)
    assert redis.coordination.hget(held, "token") == b"somebody"


class Stopped:
    """A load that stands inside its loader until it is released. A load that got no lease is over at once."""

    def __init__(self, pool, cache, read, key="k"):
        self._entered, self._go = Event(), Event()
        self._read = read
        self._done = pool.submit(cache.refresh, key, self._loader, tags=TAGS)
        self._done.add_done_callback(lambda _: self._entered.set())
        assert self._entered.wait(60)

    def _loader(self):
        value = self._read()
        self._entered.set()
        assert self._go.wait(60)
        return value

    def release(self):
        """Let the load end, and wait until it has."""
        self._go.set()
        return self._done.result(60)


ORDERS = sorted({order for order in permutations("AABBI") if order.index("A") < order.index("B")})  # A, B: alike


@by_every_remover
def test_no_order_of_two_loads_and_a_removal_leaves_the_old_value(redis, name, remover):
    """A and B begin and end, I changes the database and removes: after I, "old" is never read again."""
    with ThreadPoolExecutor(2) as pool:
        for order in ORDERS:
            cache = Cache(redis, namespace=f"{name}{''.join(order)}")
            database = ["old"]
            loads = {}
            seen = []
            for step in order:
                if step == "I":
                    database[0] = "new"
                    REMOVERS[remover](cache, "new")
                elif step in loads:
                    loads[step].release()
                else:
                    loads[step] = Stopped(pool, cache, lambda database=database: database[0])
                if database == ["new"]:
                    seen.append(cache.get("k", MISS))

            assert "old" not in seen, order
            if remover.startswith("set"):
                assert set(seen) == {"new"}, order
            assert cache.get_or_set("k", lambda: "new", tags=TAGS) == "new"


def test_a_removal_by_pattern_finds_loads_that_end_while_it_looks(redis, cache):
    """Half way through the first pass all loads end: of some the entry's place was passed, and the lease's not yet."""
    cache.set_many({f"filler{i}": 0 for i in range(1_500)})
    client = redis.coordination
    execute, half, scans = client.execute_command, client.dbsize() // 500 // 2, []
    keys = [f"k{i}" for i in range(24)]

    with ThreadPoolExecutor(len(keys)) as pool:
        loads = [Stopped(pool, cache, lambda: "overtaken", key) for key in keys]

        def watched(*command, **options):
            if command[0] == "SCAN":
                scans.append(command)
                if len(scans) == half + 1:
                    for load in loads:
                        load.release()
            return execute(*command, **options)

        client.execute_command = watched
        try:
            cache.invalidate(matching="k*")
        finally:
            del client.execute_command
            for load in loads:
                load.release()
    left = cache.get_many(keys)
    cache.invalidate(matching="filler*")

    assert len(scans) > half + 1 > 1
    assert left == {}
