"""On a Cluster a tag has a slot of its own, so some steps are not one script: what holds all the same."""

from threading import Event, Thread, current_thread

from petiole import Cache
from petiole.cachelib import entry_store
from petiole.cachelib.entry_store import EntryStore


def test_of_two_invalidations_at_once_the_later_one_counts(clustered, name, monkeypatch):
    """The first has its number, and its version arrives last: a load that began in between stores nothing."""
    cache, other = Cache(clustered, namespace=name), Cache(clustered, namespace=name)
    cache.set("k", "older", tags=["t"])
    has_number, may_go_on = Event(), Event()
    ask, first_thread = entry_store._SEQUENCE, []

    def held_up(client, **values):
        number = ask(client, **values)
        if current_thread() in first_thread:
            has_number.set()
            assert may_go_on.wait(20)
        return number

    monkeypatch.setattr(entry_store, "_SEQUENCE", held_up)
    first = Thread(target=cache.invalidate, kwargs={"tags": ["t"]})
    first_thread.append(first)
    first.start()
    assert has_number.wait(20)

    def load():
        other.invalidate(tags=["t"])
        may_go_on.set()
        first.join(20)
        return "old"

    assert cache.get_or_set("late", load, tags=["t"]) == "old"
    assert cache.get("late") is None
    assert cache.get("k") is None
    assert cache.stats().refused == 1


def test_a_version_never_goes_back(clustered, name):
    """An invalidation that comes late leaves the version of the later one."""
    cache = Cache(clustered, namespace=name)
    store = cache._store
    store.drop(["t"], clustered.coordination)
    newest = store.versions(["t"])["t"]

    assert entry_store._RAISE(clustered.coordination, tag=cache.keys.tag("t"), version="0" * 20, ttl_ms=60_000) == 1
    assert store.versions(["t"])["t"] == newest


def test_a_count_under_a_later_version_is_added_to(clustered, name, monkeypatch):
    """Who asked for the version before a clear must not start the count anew that others began after it."""
    first, second = Cache(clustered, namespace=name), Cache(clustered, namespace=name)
    first.incr("n")
    made = EntryStore._made_versions

    def overtaken(store, tags, ttl_ms):
        found = made(store, tags, ttl_ms)
        monkeypatch.undo()
        second.clear()
        assert [second.incr("n") for _ in range(3)] == [1, 2, 3]
        return found

    monkeypatch.setattr(EntryStore, "_made_versions", overtaken)
    assert first.incr("n") == 4
    assert second.get("n") == 4


def test_several_keys_are_read_and_written_wherever_they_are(clustered, name):
    """A call per slot, and one answer."""
    cache = Cache(clustered, namespace=name)
    keys = [f"key {number}" for number in range(40)]

    assert cache.set_many({key: key for key in keys}, tags=["a", "b"])
    assert cache.get_many(keys) == {key: key for key in keys}
    assert cache.get_or_set_many([*keys, "one more"], lambda missing: dict.fromkeys(missing, "loaded")) == {
        **{key: key for key in keys},
        "one more": "loaded",
    }
    assert cache.invalidate(keys=keys[:10], tags=["b"]) == 11
    assert cache.get_many(keys) == {}
    assert cache.get("one more") == "loaded"
    cache.clear()
    assert cache.get("one more") is None
