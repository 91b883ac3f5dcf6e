"""A cluster: each command to the node that has its key, also while slots move and nodes hang, die or succeed others."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest
from local_nodes import eventually
from redis.exceptions import ResponseError

from petiole.cachelib import Settings, connect
from petiole.cachelib.circuit import CircuitOpen
from petiole.cachelib.connections import UNAVAILABLE
from petiole.cachelib.errors import ServerUnavailable
from petiole.cachelib.scripts import Script

TIMEOUT_S = 0.05
HELD_S = 20.0
"""What five calls may take together that wait for a node that hangs: far more than they do on a slow machine, and less
than with redis-py's own timeout, which is five seconds each."""

ECHO = Script("echo_key", "-- KEYS: key\n-- ARGV: value\nreturn {KEYS[1], ARGV[1]}", list)


def fast(cluster):
    return connect(settings=Settings(url=cluster.url, cache_timeout=TIMEOUT_S))


def keys_of(redis, cluster, node, count, name):
    """Keys whose slots a node was given."""
    names = (f"{name}:{number}" for number in range(100_000))
    found = (key for key in names if cluster.owner(redis.slot(key)) is node)
    return [next(found) for _ in range(count)]


@contextmanager
def hung(cluster, *nodes):
    """The processes of nodes stand still."""
    pids = [int(cluster.run(node, "INFO", "server").split(b"process_id:")[1].split()[0]) for node in nodes]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def moving(cluster, slot, source, target):
    """A slot that is on its way from one node to another; afterwards it is back, and empty."""
    source_id, target_id = cluster.run(source, "CLUSTER", "MYID"), cluster.run(target, "CLUSTER", "MYID")
    cluster.run(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
    cluster.run(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)

    def finish():
        while keys := cluster.run(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            cluster.run(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)
        for node in (target, source):
            cluster.run(node, "CLUSTER", "SETSLOT", slot, "NODE", target_id)

    try:
        yield finish
    finally:
        finish()
        for key in cluster.run(target, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            cluster.run(target, "UNLINK", key)
        for node in (source, *(node for node in cluster.nodes if node is not source)):
            cluster.run(node, "CLUSTER", "SETSLOT", slot, "NODE", source_id)


def test_it_is_known_as_a_cluster(clustered, redis):
    """And a single server as none, where all keys are in one place."""
    assert clustered.is_cluster
    assert not redis.is_cluster
    assert redis.slot("anything") == 0


def test_slots_are_those_of_the_cluster(clustered, cluster):
    """As its nodes compute them, braces and all."""
    for key in ("foo", "{user}:1", "a{user}b", "{}x", "käse", ""):
        assert clustered.slot(key) == cluster.run(cluster.nodes[0], "CLUSTER", "KEYSLOT", key)


def test_each_command_reaches_the_node_that_has_its_key(clustered, name):
    """Of all profiles: a value, a script with and without its text known, a list that is waited for, many at once."""
    client = clustered.coordination
    client.script_flush()
    for number in range(60):
        key = f"{{{name}:{number}}}"
        assert client.set(key, number, px=60_000)
        assert clustered.cache.get(key) == str(number).encode()
        assert clustered.cache.mget(key, key + "x") == [str(number).encode(), None]
        assert clustered.cache.exists(key) == 1
        assert clustered.cache.pexpire(key, 50_000)
        assert ECHO(clustered.cache, key=key, value="v") == [key.encode(), b"v"]
        client.rpush(key + "list", "x")
        assert clustered.waiting.execute_command("BLPOP", key + "list", "1.000")[1] == b"x"
        assert client.unlink(key) == 1
    assert client.ping()


def test_keys_of_two_slots_are_refused_by_the_server(clustered, name):
    """Rather than half carried out."""
    with pytest.raises(ResponseError, match="slot"):
        clustered.coordination.mget(*(f"{name}:{number}" for number in range(50)))


def test_a_scan_goes_over_every_primary(clustered, cluster, name):
    """Each key once or more, and none of another name."""
    wanted = {f"{name}:{number}".encode() for number in range(300)}
    for key in wanted:
        clustered.coordination.set(key, 1, px=60_000)

    assert set(clustered.scan(f"{name}:*", 10)) == wanted
    assert set(clustered.scan(f"{name}:1?", 10)) == {f"{name}:{number}".encode() for number in range(10, 20)}
    assert all(any(cluster.owner(clustered.slot(key.decode())) is node for key in wanted) for node in cluster.nodes)


def test_a_pipeline_is_parted_and_its_replies_are_in_order(clustered, name):
    """A transaction is of one slot."""
    client = clustered.coordination
    pipeline = client.pipeline(transaction=False)
    for number in range(100):
        pipeline.set(f"{name}:{number}", number, px=60_000)
        pipeline.get(f"{name}:{number}")
    assert pipeline.execute() == [reply for number in range(100) for reply in (True, str(number).encode())]

    transaction = client.pipeline()
    transaction.incr(f"{{{name}}}:n")
    transaction.pexpire(f"{{{name}}}:n", 60_000)
    assert transaction.execute() == [1, True]
    transaction.get(f"{name}:1")
    transaction.get(f"{name}:2")
    with pytest.raises(ResponseError):
        transaction.execute()


def test_what_is_published_anywhere_is_heard(clustered, name):
    """A cluster hands it on."""
    with clustered.blocking.pubsub() as pubsub:
        pubsub.subscribe(name)
        assert pubsub.get_message(timeout=10)["type"] == "subscribe"

        def heard():
            clustered.coordination.publish(name, "x")
            message = pubsub.get_message(timeout=0.2)
            return message and message["data"] == b"x"

        for _ in range(9):  # at whichever node; a cluster that has just come together may lose some
            eventually(heard, "what was published is heard")


def test_threads_share_a_client(clustered, name):
    """Each has connections of its own."""

    def count(worker):
        for number in range(200):
            key = f"{name}:{worker}:{number}"
            clustered.cache.set(key, number, px=60_000)
            assert clustered.cache.get(key) == str(number).encode()

    with ThreadPoolExecutor(8) as pool:
        for counted in [pool.submit(count, worker) for worker in range(8)]:
            counted.result(60)


def test_a_child_makes_connections_of_its_own(clustered, name):
    """Parent and child go on at once, and nobody reads the other's replies."""
    clustered.coordination.set(f"{name}:0", "0", px=60_000)
    pid = os.fork()
    who = "parent" if pid else "child"
    status = 1
    try:
        for number in range(300):
            key = f"{name}:{who}:{number}"
            clustered.coordination.set(key, f"{who}{number}", px=60_000)
            assert clustered.coordination.get(key) == f"{who}{number}".encode()
        status = 0
    finally:
        if not pid:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_health_tells_of_every_primary(clustered, cluster):
    """One that may evict is enough for a warning."""
    assert clustered.health().warnings == ()
    cluster.run(cluster.nodes[1], "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        health = clustered.health()
    finally:
        cluster.run(cluster.nodes[1], "CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert health.eviction == "allkeys-lru, noeviction"
    assert len(health.warnings) == 1


def test_a_server_that_is_no_cluster_is_told_apart(redis_server):
    """The error says so."""
    url = f"redis+cluster://127.0.0.1:{redis_server.port}"
    with connect(url) as redis, pytest.raises(ServerUnavailable, match="cluster support disabled"):
        redis.health()


def test_one_seed_that_is_there_is_enough(cluster):
    """The others may be gone."""
    with connect(f"redis+cluster://127.0.0.1:1,127.0.0.1:{cluster.nodes[2].port}") as redis:
        assert redis.coordination.ping()


# Slots that move


def test_a_slot_that_has_moved_is_followed_and_remembered(cluster, clustered, name):
    """The first command is redirected, the next goes straight there."""
    source, target = cluster.nodes[:2]
    key = keys_of(clustered, cluster, source, 1, name)[0]
    client = clustered.coordination
    client.set(key, "before", px=60_000)
    with moving(cluster, clustered.slot(key), source, target) as finish:
        finish()
        assert client.get(key) == b"before"
        assert client.set(key, "after", px=60_000)
        sent = _calls(cluster, source, "get")
        assert [client.get(key) for _ in range(5)] == [b"after"] * 5
        assert _calls(cluster, source, "get") == sent


def _calls(cluster, node, command):
    """How often a node was asked for something, also where it sent the client away."""
    found = cluster.run(node, "INFO", "commandstats").split(b"cmdstat_" + command.encode() + b":calls=")
    rejected = found[1].split(b"rejected_calls=")[1].split(b",")[0] if len(found) > 1 else b"0"
    return (int(found[1].split(b",")[0]) if len(found) > 1 else 0) + int(rejected)


def test_a_key_that_is_on_its_way_is_asked_for_at_both_ends(cluster, clustered, name):
    """What is there already is answered by the old node, what is not by the new one; scripts too."""
    source, target = cluster.nodes[:2]
    key = "{" + keys_of(clustered, cluster, source, 1, name)[0] + "}"
    client = clustered.coordination
    client.set(key + "old", "1", px=60_000)
    with moving(cluster, clustered.slot(key), source, target):
        assert client.get(key + "old") == b"1"
        assert client.get(key + "none") is None
        assert client.set(key + "new", "2", px=60_000)
        assert client.get(key + "new") == b"2"
        assert ECHO(client, key=key + "other", value="v") == [(key + "other").encode(), b"v"]
        with pytest.raises(UNAVAILABLE):  # one here, one there: TRYAGAIN
            client.mget(key + "old", key + "new")


# Nodes that fail


def test_a_node_that_hangs_holds_up_nobody_for_long(cluster, name):
    """A call to it ends after the timeout, and calls to the others are answered."""
    with fast(cluster) as redis:
        lost, *others = cluster.nodes
        lost_keys, other_keys = (keys_of(redis, cluster, node, 5, name) for node in (lost, others[0]))
        for key in (*lost_keys, *other_keys):
            redis.coordination.set(key, "v", px=60_000)
            eventually(lambda key=key: _value(redis, key), "every node has been met")
        with hung(cluster, lost):
            started = time.monotonic()
            for key in lost_keys:
                with pytest.raises(UNAVAILABLE):
                    redis.cache.get(key)
            assert time.monotonic() - started < HELD_S
            for key in other_keys:
                eventually(lambda key=key: _value(redis, key), "the others answer")


def _value(redis, key):
    try:
        return redis.cache.get(key)
    except UNAVAILABLE:
        return None


def test_only_the_node_that_hangs_is_left_alone(cluster, name):
    """It has a circuit of its own."""
    with fast(cluster) as redis:
        lost, other = cluster.nodes[:2]
        (lost_key,), (other_key,) = (keys_of(redis, cluster, node, 1, name) for node in (lost, other))
        redis.coordination.set(other_key, "v", px=60_000)
        redis.cache.get(lost_key)
        with hung(cluster, lost):

            def refused():
                try:
                    redis.cache.get(lost_key)
                except CircuitOpen:
                    return True
                except UNAVAILABLE:
                    return False

            eventually(refused, "the circuit opens")
            assert redis.breaker.state in ("open", "half-open")
            answers = 0
            while answers < 20:
                try:
                    answers += redis.cache.get(other_key) == b"v"
                except CircuitOpen:  # which the other never is
                    raise
                except UNAVAILABLE:  # on a busy machine; but it is asked every time
                    continue
                refused()
        eventually(lambda: _value(redis, lost_key) is None and redis.breaker.state == "closed", "it is found again")


def test_a_cluster_that_hangs_altogether_holds_up_nobody_for_long(cluster):
    """Not even threads that have never met it before."""
    with fast(cluster) as redis, hung(cluster, *cluster.nodes):

        def ask():
            started = time.monotonic()
            with pytest.raises(UNAVAILABLE):
                redis.cache.get("k")
            return time.monotonic() - started

        with ThreadPoolExecutor(8) as pool:
            took_s = [asked.result(60) for asked in [pool.submit(ask) for _ in range(8)]]
        assert max(took_s) < HELD_S / 2  # each has asked three nodes


def test_nobody_stands_in_line_behind_another_who_asks_a_cluster_that_hangs(cluster):
    """Threads that have never met it ask it all at once, each over a connection of its own."""
    ports, patient = {node.port for node in cluster.nodes}, Settings(url=cluster.url, cache_timeout=60)

    def open_connections():
        mine = psutil.Process().net_connections("tcp")
        return sum(bool(one.raddr) and one.raddr.port in ports and one.status == "ESTABLISHED" for one in mine)

    with connect(settings=patient) as redis, ThreadPoolExecutor(8) as pool:
        before = open_connections()
        with hung(cluster, *cluster.nodes):
            asked = [pool.submit(redis.cache.get, "k") for _ in range(8)]
            eventually(lambda: open_connections() == before + 8, "all of them ask", within_s=30)
        assert [one.result(60) for one in asked] == [None] * 8


def test_a_replica_that_succeeds_its_primary_is_found(own_cluster, name):
    """After the primary was killed, without a word from anybody to this client."""
    cluster = own_cluster(1, replicas=1)
    with fast(cluster) as redis:
        key = keys_of(redis, cluster, cluster.nodes[0], 1, name)[0]
        client = redis.coordination
        client.set(key, "v", px=60_000)
        client.execute_command("WAIT", 1, 5_000)
        eventually(lambda: _value(redis, key), "the cache has met the node")
        cluster.nodes[0].stop()
        with pytest.raises(UNAVAILABLE):
            client.get(key)
        cluster.run(cluster.replicas[0], "CLUSTER", "FAILOVER", "TAKEOVER")

        def written():
            try:
                return client.set(key, "after", px=60_000)
            except UNAVAILABLE:
                return False

        eventually(written, "the new primary is written to")
        eventually(lambda: _value(redis, key) == b"after", "the cache finds it too")
        assert cluster.run(cluster.replicas[0], "INFO", "keyspace").count(b"keys=")
