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
        cache.delete("warm")
        cache.get("warm")
        yield cache


def round_trips(cache, call):
    """How often the server read from a connection while a call ran. The question itself is one."""
    client = cache.redis.coordination
    before = client.info("stats")["total_reads_processed"]
    call()
    return client.info("stats")["total_reads_processed"] - before - 1


KEYS = [f"k{i}" for i in range(50)]


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
        (2, lambda c: c.set("new", 1, tags=["t", "u"])),
        (1, lambda c: c.set_many(dict.fromkeys(KEYS, 1))),
        (2, lambda c: c.set_many(dict.fromkeys(KEYS, 1), tags=["t"])),
        (0, lambda c: c.set_many({})),
        (1, lambda c: c.incr("n")),
        (1, lambda c: c.expire("plain", 5)),
        (1, lambda c: c.delete(*KEYS)),
        (0, lambda c: c.delete()),
        (1, lambda c: c.invalidate(keys=KEYS)),
        (1, lambda c: c.invalidate(tags=["t", "u", "v"])),
    ],
    ids=range(23),
)
def test_a_call_costs_the_round_trips_that_it_promises(counted, expected, call):
    """As many keys as there are, a call is one round trip, and one more where tags or a load need it."""
    counted.set_many(dict.fromkeys(KEYS, 1))
    counted.set("plain", "value")
    counted.set_many({"tagged": 1, "tagged2": 2}, tags=["t"])

    assert round_trips(counted, lambda: call(counted)) == expected


def test_a_script_that_the_server_forgot_is_sent_again(counted):
    """After SCRIPT FLUSH, a restart or a failover every call still works, and the text is sent once."""
    counted.redis.coordination.script_flush()

    assert counted.get_or_set("a", lambda: 1, tags=["t"]) == 1
    assert counted.set("b", 2, tags=["t"])
    assert counted.incr("c") == 1
    assert counted.delete("b") == 1
    assert counted.get("a") == 1
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
