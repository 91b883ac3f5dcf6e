"""Sentinels: they name the primary, and after a failover the next calls reach the new one."""

import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
from local_nodes import eventually
from redis.connection import Connection
from redis.exceptions import ReadOnlyError, ResponseError

from petiole.cachelib import Settings, connect
from petiole.cachelib.connections import UNAVAILABLE
from petiole.cachelib.errors import ServerUnavailable

TIMEOUT_S = 0.05
HELD_S = 20.0
"""What six calls may take together that wait for what hangs: far more than they do on a slow machine, and less than
with redis-py's own timeout, which is five seconds each."""
PASSWORD = "s3cret"


def run(port, *command, **options):
    """One command to one process, with the bare reply."""
    connection = Connection(host="127.0.0.1", port=port, protocol=2, socket_timeout=10, **options)
    try:
        connection.send_command(*command)
        return connection.read_response()
    finally:
        connection.disconnect()


@contextmanager
def black_hole():
    """A socket that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def visitors(hole):
    """How many have come to a black hole since they were counted last."""
    hole.setblocking(False)
    count = 0
    with suppress(BlockingIOError):
        while True:
            hole.accept()[0].close()
            count += 1
    return count


@contextmanager
def hung(port):
    pid = int(run(port, "INFO", "server").split(b"process_id:")[1].split()[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture
def watched(own_server, sentinel):
    """A primary, a replica that follows it, and a sentinel that knows both."""
    primary = own_server("--repl-diskless-sync-delay", "0")
    replica = own_server("--replicaof", "127.0.0.1", str(primary.port))
    eventually(lambda: b"master_link_status:up" in run(replica.port, "INFO"), "the replica follows")
    port = sentinel(primary.port)

    def ready():
        told = run(port, "SENTINEL", "MASTER", "mymaster")
        return told[told.index(b"num-slaves") + 1] == b"1"

    eventually(ready, "the sentinel knows the replica")
    return SimpleNamespace(primary=primary, replica=replica, sentinel=port)


def url(*ports, tail="mymaster/0"):
    return "redis+sentinel://" + ",".join(f"127.0.0.1:{port}" for port in ports) + f"/{tail}"


def fast(*ports):
    return connect(settings=Settings(url=url(*ports), cache_timeout=TIMEOUT_S))


def test_the_primary_is_reached_by_its_name(watched):
    """With all profiles, in the database of the URL; it is no cluster."""
    with connect(url(watched.sentinel, tail="mymaster/3")) as redis:
        for client in (redis.cache, redis.coordination, redis.waiting, redis.blocking):
            eventually(lambda client=client: _pings(client), "it answers")
        redis.coordination.set("k", "v", px=60_000)

        assert not redis.is_cluster
        assert redis.slot("k") == 0
        assert list(redis.scan("k")) == [b"k"]
        assert redis.health().server
        assert redis.coordination.pipeline().get("k").execute() == [b"v"]
    with connect(f"{watched.primary.url.removesuffix('0')}3") as direct:
        assert direct.coordination.get("k") == b"v"


def _pings(client):
    try:
        return client.ping()
    except UNAVAILABLE:
        return False


def test_sentinels_that_are_away_or_hang_are_passed_over(watched):
    """And the one that answered is asked first from then on."""
    with black_hole() as hole, fast(1, hole.getsockname()[1], watched.sentinel) as redis:
        eventually(lambda: _pings(redis.cache), "it answers", within_s=HELD_S)
        assert visitors(hole)
        answers = []
        for _ in range(5):
            thread = threading.Thread(target=lambda: answers.append(_pings(redis.cache)))  # has no connection yet
            thread.start()
            thread.join(20)
        assert any(answers)
        assert visitors(hole) < 5  # and none, but that a busy machine may let the one that answers look silent too


def test_a_name_that_no_sentinel_knows_is_told(watched):
    """With the name."""
    with connect(url(watched.sentinel, tail="other")) as redis, pytest.raises(ServerUnavailable, match="'other'"):
        redis.health()


def test_sentinels_with_a_password_are_asked_with_it(own_server, sentinel):
    """It is another one than the server's, and neither is shown."""
    primary = own_server()
    run(primary.port, "CONFIG", "SET", "requirepass", PASSWORD + "1")
    port = sentinel(primary.port, f"requirepass {PASSWORD}2", f"sentinel auth-pass mymaster {PASSWORD}1")
    right = f"redis+sentinel://:{PASSWORD}1@127.0.0.1:{port}/mymaster/0?sentinel_password={PASSWORD}2"
    wrong = right[:-1] + "3"
    with connect(right) as redis:
        eventually(lambda: _pings(redis.coordination), "it answers")
        assert PASSWORD not in f"{redis!r} {redis.address} {redis.settings!r} {redis.breaker!r} {redis.health()}"
    with connect(wrong) as redis, pytest.raises(ServerUnavailable) as caught:
        redis.health()
    assert PASSWORD not in str(caught.value)
    assert PASSWORD not in repr(caught.value)


@pytest.mark.parametrize("hangs", ["primary", "sentinel", "both"])
def test_what_hangs_holds_up_nobody_for_long(watched, hangs):
    """A call ends after the timeout, on a connection that is there and on a new one."""
    with fast(watched.sentinel, watched.sentinel, watched.sentinel) as redis:
        eventually(lambda: _pings(redis.cache), "it answers")
        ports = {"primary": [watched.primary.port], "sentinel": [watched.sentinel]}
        stopped = ports.get(hangs) or [watched.primary.port, watched.sentinel]
        took_s = []

        def ask():
            for _ in range(3):
                started = time.monotonic()
                _pings(redis.cache)
                took_s.append(time.monotonic() - started)

        with hung(stopped[0]), hung(stopped[-1]) if len(stopped) > 1 else black_hole():
            ask()
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join(60)
        assert len(took_s) == 6
        assert sum(took_s) < HELD_S


def test_after_a_failover_the_next_calls_reach_the_new_primary(watched):
    """The primary was killed; values that the replica had are there."""
    with fast(watched.sentinel) as redis:
        redis.coordination.set("k", "v", px=60_000)
        redis.coordination.execute_command("WAIT", 1, 5_000)
        eventually(lambda: _pings(redis.cache), "the cache has met the primary")
        watched.primary.stop()

        def written():
            try:
                return redis.coordination.set("after", "1", px=60_000)
            except UNAVAILABLE:
                return False

        eventually(written, "the new primary is written to")

        def read():
            try:
                return redis.cache.get("k")
            except UNAVAILABLE:
                return None

        eventually(lambda: read() == b"v", "the cache finds it too")
        assert run(watched.replica.port, "GET", "after") == b"1"


def test_a_connection_to_a_primary_that_became_a_replica_is_not_used_again(own_server):
    """READONLY is told, nothing is repeated, and the next command asks anew who the primary is."""
    primary, other = own_server(), own_server()
    with connect(primary.url) as redis:
        client = redis.coordination
        before = client.client_id()
        run(primary.port, "REPLICAOF", "127.0.0.1", other.port)
        with pytest.raises(ReadOnlyError):
            client.set("k", "v", px=60_000)
        assert client.client_id() != before
        with pytest.raises(UNAVAILABLE, match=r"read only|READONLY"):
            client.execute_command("EVAL", "return redis.call('SET', KEYS[1], 'v', 'PX', 60000)", 1, "k")


def _fails_over(port):
    try:
        return run(port, "SENTINEL", "FAILOVER", "mymaster")
    except ResponseError:  # it does not know yet how the replica is
        return False


def _is_primary(port):
    try:
        return b"role:master" in run(port, "INFO", "replication")
    except UNAVAILABLE:  # it closes all while its role changes
        return False


def test_a_demoted_primary_that_its_sentinels_replaced_is_left(watched):
    """Also where it forgot to close its connections: the first write that it refuses is the last it gets."""
    with connect(url(watched.sentinel)) as redis:
        client = redis.coordination
        client.set("k", "v", px=60_000)
        eventually(lambda: _fails_over(watched.sentinel), "the sentinel promotes the replica")
        eventually(lambda: _is_primary(watched.replica.port), "it is promoted")
        named = [b"127.0.0.1", str(watched.replica.port).encode()]
        told = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster")
        eventually(lambda: run(watched.sentinel, *told) == named, "the sentinel names it")
        run(watched.primary.port, "REPLICAOF", "127.0.0.1", watched.replica.port)  # the sentinel itself takes seconds
        refused = 0
        while refused < 3:
            try:
                client.set("after", "1", px=60_000)
                break
            except UNAVAILABLE:
                refused += 1
        assert 1 <= refused <= 2, "one that was refused, and one if the server closed its connections after all"
        assert run(watched.replica.port, "GET", "after") == b"1"
