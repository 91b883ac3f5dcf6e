"""What a call costs: round trips, counted by the server, and commands that are sent once."""

import pytest

from petiole.cachelib import Cache, EmbeddedServer, Settings, connect


@pytest.fixture(scope="module")
def quiet_server():
    """A server that nobody else talks to."""
    server = EmbeddedServer.start()
    yield server
    server.stop()


@pytest.fixture
def counted(quiet_server, name):
    """A cache on the quiet server, with its connections made and its scripts known."""
    server = quiet_server
    with connect(settings=Settings(url=server.url, cache_timeout=2)) as redis:
        cache = Cache(redis, namespace=name)
        cache.set("warm", 1, tags=["warm"])
        cache.get_or_set("up", lambda: 1, tags=["warm"])
        cache.incr("n")
        cache.touch("warm")
        cache.expire("warm")
        cache.getdel("warm")
        cache.delete("warm")
        cache.get("warm")
        cache.get_many(["warm", "up"])
        cache.invalidate(tags=["warm"])
        yield cache


def make_stale(cache):
    cache.set_many(dict.fromkeys([*KEYS, "stale"], 1), stale=600, tags=["t"])
    for key in [*KEYS, "stale"]:
        cache.expire(key)


KEYS = [f"k{i}" for i in range(50)]


def round_trips(cache, call):
    """How often the server read from a connection while a call ran. The question itself is one."""
    client = cache.redis.coordination
    before = client.info("stats")["total_reads_processed"]
    call()
    return client.info("stats")["total_reads_processed"] - before - 1


def loaded(keys):
    return dict.fromkeys(keys, 1)


@pytest.mark.parametrize(
    ("expected", "call"),
    [
        (1, lambda c: c.get("plain")),
        (2, lambda c: c.get("tagged")),
        (1, lambda c: c.get("absent")),
        (1, lambda c: c.get_many(KEYS)),
        (2, lambda c: c.get_many([*KEYS, "tagged", "tagged2"])),
        (0, lambda c: c.get_many([])),
        (1, lambda c: c.exists("plain")),
        (1, lambda c: c.get_or_set("plain", lambda: 1)),
        (1, lambda c: c.get_or_set("tagged", lambda: 1, tags=["t"])),
        (2, lambda c: c.get_or_set("tagged", lambda: 1)),
        (2, lambda c: c.get_or_set("absent", lambda: 1)),
        (2, lambda c: c.get_or_set("absent", lambda: 1, tags=["t", "u"])),
        (1, lambda c: c.set("new", 1)),
        (1, lambda c: c.set("new", 1, tags=["t", "u"])),
        (1, lambda c: c.set_many(dict.fromkeys(KEYS, 1))),
        (1, lambda c: c.set_many(dict.fromkeys(KEYS, 1), tags=["t"])),
        (0, lambda c: c.set_many({})),
        (1, lambda c: c.incr("n")),
        (1, lambda c: c.expire("plain")),
        (1, lambda c: c.touch("plain", 5)),
        (2, lambda c: c.touch("tagged", 5)),
        (1, lambda c: c.getex("plain", 5)),
        (2, lambda c: c.getex("tagged", 5)),
        (1, lambda c: c.getdel("plain")),
        (1, lambda c: c.ttl("plain")),
        (1, lambda c: c.get_versioned("plain")),
        (1, lambda c: c.add("absent", 1)),
        (2, lambda c: c.replace("plain", 1)),
        (2, lambda c: c.compare_and_set("plain", 1, c.version_of_plain)),
        (2, lambda c: c.refresh("plain", lambda: 1)),
        (1, lambda c: c.get_or_set_many(KEYS, loaded)),
        (2, lambda c: c.get_or_set_many([*KEYS, "absent", "absent2"], loaded, tags=["t"])),
        (0, lambda c: c.get_or_set_many([], loaded)),
        (2, lambda c: c.explain("plain")),
        (1, lambda c: c.clear()),
        (1, lambda c: c.delete(*KEYS)),
        (0, lambda c: c.delete()),
        (1, lambda c: c.invalidate(keys=KEYS)),
        (1, lambda c: c.invalidate(tags=["t", "u", "v"])),
    ],
    ids=range(39),
)
def test_a_call_costs_the_round_trips_that_it_promises(counted, expected, call):
    """As many keys as there are, a call is one round trip, and one more where tags or a load need it."""
    counted.set_many(dict.fromkeys(KEYS, 1))
    counted.set("plain", "value")
    counted.set_many({"tagged": 1, "tagged2": 2}, tags=["t"])
    counted.delete("absent", "absent2")
    counted.version_of_plain = counted.get_versioned("plain").version

    assert round_trips(counted, lambda: call(counted)) == expected


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.get_or_set("stale", lambda: 1, tags=["t"]),
        lambda c: c.get_or_set_many([*KEYS, "stale"], loaded, tags=["t"]),
    ],
    ids=["one", "many"],
)
@pytest.mark.parametrize("why", ["stale", "invalidated"])
def test_what_is_stored_but_not_fresh_costs_one_round_trip_more(counted, why, call):
    """Look, look again with the lease, store; however many there are."""
    make_stale(counted)
    if why == "invalidated":
        counted.invalidate(tags=["t"])

    assert round_trips(counted, lambda: call(counted)) == 3


def test_a_script_that_the_server_forgot_is_sent_again(counted):
    """After SCRIPT FLUSH, a restart or a failover every call still works, and the text is sent once."""
    counted.redis.coordination.script_flush()

    assert counted.get_or_set("a", lambda: 1, tags=["t"]) == 1
    assert counted.set("b", 2, tags=["t"])
    assert counted.incr("c") == 1
    assert counted.delete("b") == 1
    assert counted.get("a") == 1
    assert counted.touch("a", 60)
    assert counted.invalidate(tags=["t"]) == 1
    assert counted.get("a") is None
    assert round_trips(counted, lambda: counted.set("d", 1)) == 1


def test_nothing_looks_at_all_keys_but_a_pattern(counted):
    """SCAN runs for ``matching`` alone, and KEYS never."""
    counted.redis.coordination.config_resetstat()
    counted.set("k", 1, tags=["t"])
    counted.get_or_set("l", lambda: 1, tags=["t"])
    counted.invalidate(keys=["k"], tags=["t"])
    counted.delete("l")
    client = counted.redis.coordination
    before = client.info("commandstats")
    counted.invalidate(matching="*")
    after = client.info("commandstats")

    assert "cmdstat_scan" not in before
    assert "cmdstat_scan" in after
    assert "cmdstat_keys" not in after
