"""``explain``: why a key is served or is not, in numbers and in a sentence; and what a cache shows of itself."""

import logging
import threading
import time

import pytest
from local_nodes import eventually

from petiole.cachelib import MISS, Cache, Near, Pickle, Settings, connect
from petiole.cachelib.keys import lease

LONG_S = 60


def fails():
    raise OSError("the database is away")


def age(cache, key, *, left):
    assert cache.redis.coordination.pexpire(cache.keys.entry(key), int(left * 1_000))


def test_a_key_that_is_not_there(cache):
    """Nothing is known but its name in Redis."""
    told = cache.explain("k")

    assert told.state == "absent"
    assert told.note == "'k': nothing is stored under this key."
    assert told.name == f"petiole:1:cache:{{{cache.namespace}:k}}"
    assert (told.size_bytes, told.fresh_left_ms, told.left_ms, told.age_ms, told.ttl_ms) == (0, 0, 0, None, None)
    assert (told.tags, told.near, told.loading, told.lease_left_ms, told.unsent) == ({}, False, False, 0, False)


def test_a_fresh_value(cache):
    """How long it was to be fresh, how long it still is, what it cost, and that its tags are what they were."""
    cache.get_or_set("k", lambda: time.sleep(0.01) or "v", ttl=60, stale=600, tags=["t", "u"])
    told = cache.explain("k")

    assert told.state == "fresh"
    assert told.note == "'k': it is served."
    assert told.key == "k"
    assert told.size_bytes == cache.redis.coordination.strlen(told.name)
    assert 50_000 < told.fresh_left_ms <= told.ttl_ms <= 60_000
    assert told.left_ms == told.fresh_left_ms + told.stale_ms
    assert told.stale_ms == 600_000
    assert 0 <= told.age_ms < 60_000
    assert 10 <= told.load_ms < 60_000
    assert told.how == "msgpack"
    assert told.tags == {"": True, "t": True, "u": True}
    assert (told.loading, told.lease_left_ms, told.unsent) == (False, 0, False)


def test_a_stale_value(cache):
    """It says that it is served all the same."""
    cache.set("k", "v", ttl=60, stale=600)
    age(cache, "k", left=300)
    told = cache.explain("k")

    assert told.state == "stale"
    assert told.note == "'k': its TTL is over; it is served while somebody loads a new one."
    assert told.fresh_left_ms == 0
    assert 200_000 < told.left_ms <= 300_000


@pytest.mark.parametrize(
    ("invalidate", "tags", "who"),
    [
        (lambda c: c.invalidate(tags=["t"]), {"": True, "t": False, "u": True}, "'t'"),
        (lambda c: c.invalidate(tags=["t", "u"]), {"": True, "t": False, "u": False}, "'t', 'u'"),
        (lambda c: c.clear(), {"": False, "t": True, "u": True}, "the namespace"),
        (lambda c: c.redis.coordination.delete(c.keys.tag("u")), {"": True, "t": True, "u": False}, "'u'"),
    ],
    ids=["tag", "tags", "clear", "evicted"],
)
def test_an_invalidated_value(cache, invalidate, tags, who):
    """It is stored, and says which of its tags is no longer what it was."""
    cache.set("k", "v", ttl=60, tags=["t", "u"])
    invalidate(cache)
    told = cache.explain("k")

    assert told.state == "invalidated"
    assert told.tags == tags
    assert told.note == f"'k': stored, but {who} was invalidated or evicted since, so it is not served."
    assert told.left_ms > 0
    assert cache.get("k", MISS) is MISS


def test_a_value_that_cannot_be_read(cache):
    """The reason, without what is stored."""
    cache.redis.coordination.set(cache.keys.entry("k"), b"s3cret", px=60_000)
    told = cache.explain("k")

    assert told.state == "undecodable"
    assert told.note == "'k': what is stored cannot be read (it does not begin like an entry), which counts as a miss."
    assert told.size_bytes == 6
    assert "s3cret" not in repr(told)


def test_a_counter(cache):
    """It says so; it has no price."""
    cache.incr("n", ttl=60)
    told = cache.explain("n")

    assert (told.state, told.how, told.tags) == ("fresh", "counter", {"": True})
    assert (told.age_ms, told.ttl_ms, told.load_ms) == (None, None, None)
    assert 0 < told.fresh_left_ms <= 60_000


def test_a_cached_exception(cache):
    """It is told apart from a value, because ``get`` calls it a miss; and what it says is not shown."""
    with pytest.raises(OSError, match="away"):
        cache.get_or_set("k", fails, exceptions={OSError: 30})
    told = cache.explain("k")

    assert told.how == "exception"
    assert 0 < told.fresh_left_ms <= 30_000
    assert "the database" not in repr(told)
    assert "exception" in told.note


@pytest.mark.parametrize(("format", "how"), [("msgpack", "msgpack"), ("json", "json"), (Pickle(b"x" * 16), "pickle")])
def test_how_a_value_is_packed(redis, name, format, how):
    """And how it is compressed."""
    cache = Cache(redis, namespace=name, format=format)
    cache.set_many({"short": "v", "long": "v" * 100_000})

    assert cache.explain("short").how == how
    assert cache.explain("long").how in (f"{how}+zlib", "zlib")
    assert cache.explain("long").size_bytes < 10_000


def test_a_key_that_is_being_loaded(cache):
    """Whatever is stored meanwhile; and how long others wait if the loader dies."""
    seen = []
    cache.get_or_set("k", lambda: seen.append(cache.explain("k")))
    cache.set("s", "old", stale=600)
    age(cache, "s", left=300)
    cache.get_or_set("s", lambda: seen.append(cache.explain("s")))

    assert [told.state for told in seen] == ["absent", "stale"]
    assert all(told.loading and 0 < told.lease_left_ms <= 10_000 for told in seen)
    assert not cache.explain("k").loading
    assert cache.explain("k").lease_left_ms == 0


def test_a_key_whose_loader_failed_a_moment_ago(cache):
    """The stale value is served, and nobody loads."""
    cache.set("k", "old", stale=600)
    age(cache, "k", left=300)
    assert cache.get_or_set("k", fails) == "old"
    told = cache.explain("k")

    assert told.state == "stale"
    assert not told.loading
    assert 0 < told.lease_left_ms <= 5_000
    assert told.note.endswith("; its loader failed a moment ago and is left alone.")


@pytest.fixture
def unsent(cache, monkeypatch):
    """A cache that cannot send what it remembers, until it is let."""
    go = threading.Event()
    monkeypatch.setattr("petiole.cachelib.remembered._FIRST_PAUSE_S", 0.01)
    send = cache._remembered._send

    def send_later(what):
        assert go.wait(LONG_S)
        return send(what)

    cache._remembered._send = send_later
    yield cache
    go.set()
    eventually(lambda: cache.stats().unsent == 0, "it is sent")
    eventually(
        lambda: all(thread.name != "petiole-invalidations" for thread in threading.enumerate()), "the thread has ended"
    )


@pytest.mark.parametrize(
    "invalidate",
    [
        lambda c: c.delete("k"),
        lambda c: c.expire("k"),
        lambda c: c.invalidate(tags=["t"]),
        lambda c: c.invalidate(matching="k*"),
        lambda c: c.clear(),
    ],
    ids=["key", "expire", "tag", "pattern", "clear"],
)
def test_a_key_whose_invalidation_was_not_sent_yet(unsent, invalidate):
    """This process does not serve it, although nothing in Redis tells so."""
    unsent.set("k", "v", stale=60, tags=["t"])
    client = unsent.redis.coordination
    denied = ("unlink", "incr", "getrange", "scan")
    client.execute_command("ACL", "SETUSER", "default", *(f"-{name}" for name in denied))
    try:
        invalidate(unsent)
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+@all")
    told = unsent.explain("k")

    assert unsent.get("k", MISS) is MISS
    assert told.state == "fresh"
    assert told.unsent
    assert told.note.endswith("; an invalidation of it waits for Redis to answer, so this process does not serve it.")
    assert not Cache(unsent.redis, namespace=unsent.namespace).explain("k").unsent


def test_a_key_in_the_memory_of_this_process(redis, name):
    """And not in that of another."""
    with_near, without = Cache(redis, namespace=name, near=Near()), Cache(redis, namespace=name)
    without.set("k", "v")

    assert not with_near.explain("k").near
    eventually(lambda: with_near.get("k") == "v" and with_near.explain("k").near, "it is kept near")
    assert not without.explain("k").near


def test_to_explain_changes_nothing(cache):
    """No lease is taken, nothing is counted, no time is given, nothing is stored."""
    cache.set("k", "v", stale=600, tags=["t"])
    age(cache, "k", left=300)
    client = cache.redis.coordination
    before, keys = cache.stats(), sorted(client.scan_iter(f"*{cache.namespace}*"))
    for key in ("k", "absent"):
        cache.explain(key)

    assert cache.stats() == before
    assert sorted(client.scan_iter(f"*{cache.namespace}*")) == keys
    assert client.pttl(cache.keys.entry("k")) <= 300_000
    assert not client.exists(lease(cache.keys.entry("k")), lease(cache.keys.entry("absent")))


def test_what_is_no_key_is_not_explained(cache):
    """As everywhere."""
    with pytest.raises(ValueError, match="must not be empty"):
        cache.explain("")


# A cache as text


def test_a_cache_shows_its_name_its_server_and_how_good_it_is(cache, redis):
    """In one line."""
    assert repr(cache) == f"<Cache {cache.namespace!r} at {redis.address} [hit ratio 0%]>"
    cache.get_or_set("k", lambda: 1)
    for _ in range(3):
        cache.get("k")
    assert repr(cache) == f"<Cache {cache.namespace!r} at {redis.address} [hit ratio 75%]>"


def test_a_cache_shows_what_is_not_sent(unsent):
    """As long as it is not."""
    client = unsent.redis.coordination
    client.execute_command("ACL", "SETUSER", "default", "-unlink")
    try:
        unsent.delete("a", "b")
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+@all")

    assert repr(unsent).endswith("[hit ratio 0%, 2 invalidations not sent]>")


def test_a_cache_shows_no_password_and_that_redis_is_away(name, caplog):
    """Neither in its text, nor in the log."""
    url = "redis://user:s3cret@127.0.0.1:1/0"
    with connect(settings=Settings(url=url, cache_timeout=0.05)) as redis, caplog.at_level(logging.DEBUG, "petiole"):
        cache = Cache(redis, namespace=name)
        eventually(lambda: cache.get("k", MISS) is MISS and cache.stats().breaker != "closed", "the breaker opens")

        assert "s3cret" not in f"{cache!r} {cache.stats()!r} {caplog.text}"
        assert "127.0.0.1:1" in repr(cache)
        assert "breaker " in repr(cache)
