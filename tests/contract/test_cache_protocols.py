"""Every operation over each way to a server: RESP2 and RESP3, a Unix socket, a Cluster; and on other server programs.

A short tour rather than a proof: what an operation means is proved elsewhere, and here that it means the same. Then
what must hold for each protocol when the server hangs. Servers are Valkey, and Redis where it is on PATH.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from petiole.cachelib import MISS, Cache, Loaded, Near, Settings, cached, connect
from petiole.cachelib.embedded import EmbeddedServer, find_program

MAY_TAKE_S = 20


def until(condition, what="it did not come to be"):
    """Wait for what must happen some time."""
    deadline = time.monotonic() + MAY_TAKE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.002)
    return found


def other_programs():
    """Server programs on PATH, beside the one that tests use anyway."""
    usual = Path(find_program()).resolve()
    found = [shutil.which(name) for name in ("redis-server", "valkey-server")]
    return sorted({program for program in found if program and Path(program).resolve() != usual})


def kind_of(program):
    """Such as ``Redis 7.0``: what a program says of itself."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return f"{said.split()[0]} {said.split('v=')[1].split()[0].rpartition('.')[0]}"


SERVERS = {"usual": None, **{kind_of(program): program for program in other_programs()}}


@pytest.fixture(scope="module", params=SERVERS.values(), ids=SERVERS.keys())
def server(request, _no_process_is_left_behind):
    """A server of each program, which listens on a Unix socket too."""
    with tempfile.TemporaryDirectory(prefix="petiole-") as folder:
        socket = f"{folder}/redis.sock"
        with pytest.MonkeyPatch.context() as patch:
            if request.param:
                patch.setattr("petiole.cachelib.embedded.find_program", lambda: request.param)
            server = EmbeddedServer.start("--unixsocket", socket, "--dir", folder)
        yield server, socket
        server.stop()


@pytest.fixture(params=["RESP2", "RESP3", "socket", "socket, RESP2"])
def redis(request, server):
    """Connections to a server, in each way; afterwards every key has a TTL."""
    running, socket = server
    url = f"unix://{socket}?db=0" if request.param.startswith("socket") else f"{running.url}?"
    url += "&protocol=2" if request.param.endswith("RESP2") else "&protocol=3"
    with connect(settings=Settings(url=url.replace("?&", "?"), cache_timeout=2)) as connections:
        yield connections
        client = connections.coordination
        assert [key for key in client.scan_iter("petiole:*", count=10_000) if client.pttl(key) == -1] == []


@pytest.fixture(params=[2, 3], ids=["RESP2", "RESP3"])
def redis_cluster(request, cluster):
    """Connections to the cluster."""
    with connect(settings=Settings(url=f"{cluster.url}?protocol={request.param}", cache_timeout=2)) as connections:
        yield connections


def tour(cache):
    """Each operation once, at least."""
    # reading and writing
    assert cache.get("k", MISS) is MISS
    assert cache.set("k", {"a": [1, None, "ä", b"\x00\xff", 1.5]}, tags=["t"])
    assert cache.get("k") == {"a": [1, None, "ä", b"\x00\xff", 1.5]}
    assert cache.set_many({"a": "1", "b": None, "c": True})
    assert cache.get_many(["a", "b", "c", "d"]) == {"a": "1", "b": None, "c": True}
    assert cache.exists("a")
    assert not cache.exists("d")
    assert 0 < cache.ttl("a") <= 300
    assert cache.ttl("d") is None
    # conditions
    assert cache.add("added", "1")
    assert not cache.add("added", "2")
    assert cache.replace("added", "3")
    assert not cache.replace("d", "3")
    version = cache.get_versioned("added").version
    assert cache.compare_and_set("added", "4", version, tags=["t"])
    assert not cache.compare_and_set("added", "5", version)
    assert cache.getex("added", 100) == "4"
    assert cache.ttl("added") <= 100
    assert cache.touch("added", 200)
    assert cache.ttl("added") > 100
    assert cache.getdel("added") == "4"
    assert cache.getdel("added", MISS) is MISS
    # counting
    assert [cache.incr("n"), cache.incr("n", 5), cache.decr("n", 2), cache.get("n")] == [1, 6, 4, 4]
    # loading
    assert cache.get_or_set("loaded", lambda: Loaded("1", tags=["u"]), tags=["t"], stale=60) == "1"
    assert cache.get_or_set("loaded", lambda: pytest.fail("loaded"), tags=["t"]) == "1"
    assert cache.expire("loaded")
    assert cache.ttl("loaded") == 0
    assert cache.get("loaded") == "1"
    assert cache.get_or_set("loaded", lambda: "2", tags=["t"], stale=60) == "2"
    assert cache.refresh("loaded", lambda: "3", tags=["t"])
    assert cache.get_or_set_many(["loaded", "m1", "m2"], lambda keys: {key: key for key in keys}, tags=["t"]) == {
        "loaded": "3",
        "m1": "m1",
        "m2": "m2",
    }
    with cache.guard(["g1", "g2"], tags=["t"]) as guard:
        assert cache.set_many({"g1": "1", "g2": "2"}, guard=guard)
    with cache.guard(["g1"], tags=["t"]) as guard:
        cache.delete("g1")
        assert not cache.set_many({"g1": "old"}, guard=guard)
    function = cached(cache, "f:{number}", tags=["t"])(lambda number: f"f{number}")
    assert [function(1), function(1), function.get(1)] == ["f1"] * 3
    assert function.refresh(1)
    function.invalidate(1)
    assert function.get(1) is MISS
    # a load that is overtaken
    for remove in (
        lambda: cache.delete("o"),
        lambda: cache.invalidate(tags=["t"]),
        lambda: cache.invalidate(matching="o*"),
        cache.clear,
    ):
        assert cache.get_or_set("o", lambda remove=remove: str(remove()) and "old", tags=["t"]) == "old"
        assert cache.get("o", MISS) is MISS
    # removing
    assert cache.get_many(["k", "loaded", "m1", "g2", "a", "n"]) == {}
    cache.set_many({"a": "1", "b": "2", "c": "3", "x1": "4", "x2": "5"}, tags=["t"])
    assert cache.delete("a", "nothing") == 1
    assert cache.invalidate(matching="x*") == 2
    assert sorted(cache.get_many(["a", "b", "c", "x1", "x2"])) == ["b", "c"]
    assert cache.invalidate(keys=["b"], tags=["t"]) == 2
    assert cache.get_many(["b", "c"]) == {}
    # looking at it
    assert cache.set("k", "value", tags=["t"])
    assert cache.explain("k").state == "fresh"
    assert cache.explain("nothing").state == "absent"
    assert cache.stats().errors == 0
    assert cache.stats().undecodable == 0


def test_every_operation_means_the_same_over_every_way_to_a_server(redis, name):
    """Protocols differ in how they answer, and programs in what they allow scripts."""
    tour(Cache(redis, namespace=name))


def test_every_operation_means_the_same_on_a_cluster(redis_cluster, name):
    """Where the keys of one operation have slots of their own."""
    tour(Cache(redis_cluster, namespace=name))


def test_every_operation_means_the_same_with_a_near_cache(redis, name):
    """What this process changes it sees at once."""
    cache = Cache(redis, namespace=name, near=Near())
    cache.set("warm", "value")
    until(lambda: cache.get("warm") and cache.stats().near_hits, "the near cache does not come on")
    tour(cache)


@pytest.mark.parametrize("shown", ["{", "}", "a:b", "%7B", "ä€😀", " ", "*?[x]", "\\", "\r\n", "x" * 1_024])
def test_any_text_is_a_key_a_tag_and_a_namespace(redis, name, shown):
    """Nothing in it is taken for more than text."""
    cache = Cache(redis, namespace=f"{name}{shown}"[:300])
    cache.set(shown, "value", tags=[shown])
    cache.set(f"not {shown}"[:1_000], "other")

    assert cache.get_or_set(shown, lambda: pytest.fail("loaded"), tags=[shown]) == "value"
    assert cache.invalidate(tags=[shown]) == 1
    assert cache.get(shown, MISS) is MISS
    assert cache.get(f"not {shown}"[:1_000]) == "other"
    cache.clear()


# --- a server that hangs ----------------------------------------------------------------------------------------------


@contextmanager
def hung(server):
    """The process of a server stands still: connections are taken, and nothing is answered."""
    with connect(server.url) as redis:
        pid = redis.coordination.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_hung_server_holds_up_a_read_for_the_timeout_and_later_not_at_all(own_server, name, protocol):
    """Until the breaker opens each read may take the timeout; then they take nothing, but for a probe now and then."""
    server, timeout_s = own_server(), 0.05
    with connect(settings=Settings(url=f"{server.url}?protocol={protocol}", cache_timeout=timeout_s)) as redis:
        cache = Cache(redis, namespace=name)
        until(lambda: cache.set("k", "value"))
        with hung(server):
            took_s = []
            while cache.stats().breaker == "closed":
                started = time.monotonic()
                assert cache.get("k", MISS) is MISS
                took_s.append(time.monotonic() - started)
                assert len(took_s) < 100, "the breaker does not open"
            started = time.monotonic()
            for _ in range(1_000):
                assert cache.get("k", MISS) is MISS
                assert cache.get_or_set("k", lambda: "loaded") == "loaded"
            at_once_s = time.monotonic() - started
        until(lambda: cache.get("k") == "value", "it does not ask again")

    # Generous: with redis-py's own timeout they would take 25 s, and 2,000 that wait for ours 100 s.
    assert sum(took_s) < MAY_TAKE_S
    assert at_once_s < 2_000 * timeout_s / 2


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_server_that_comes_back_is_used_again(own_server, name, protocol):
    """Also what it was not told in the meantime."""
    server = own_server()
    with connect(settings=Settings(url=f"{server.url}?protocol={protocol}", cache_timeout=0.5)) as redis:
        cache = Cache(redis, namespace=name)
        until(lambda: cache.set_many({"k": "old", "other": "value"}))
        with hung(server):
            cache.delete("k")
            assert cache.stats().unsent == 1
            assert cache.get("k", MISS) is MISS
        until(lambda: not cache.stats().unsent, "Redis is not told")

        assert cache.get("k", MISS) is MISS
        until(lambda: cache.get("other") == "value")
