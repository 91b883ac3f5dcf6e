"""The listener: what changes in Redis leaves the near cache, and while nothing is heard, nothing is served.

The times that are compared here are promises, kept by the order of events: a busy machine makes nothing of it fail.
What must come some time is waited for.
"""

import bisect
import gc
import logging
import os
import random
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from petiole.cachelib import Settings, connect
from petiole.cachelib.embedded import find_program, free_port
from petiole.cachelib.guarded import GuardedProcess
from petiole.cachelib.listener import THREAD_NAME, Listener
from petiole.cachelib.near import ABSENT, Near, NearStore

MAY_TAKE_S = 30
HEARTBEAT_S = 1.5  # more than a busy machine holds up an answer: what is lost here is lost on purpose


def until(condition, what="it did not happen"):
    """Wait for what must happen some time."""
    deadline = time.monotonic() + MAY_TAKE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.002)
    return found


def connected(url, protocol):
    return connect(settings=Settings(url=f"{url}?protocol={protocol}", cache_timeout=2))


def entry(name, key):
    return f"petiole:1:cache:{{{name}:{key}}}"


def tag(name, of=""):
    return f"petiole:1:tag:{{{name}:{of}}}"


def a_store(listener, name, **options):
    return NearStore(
        Near(**options), entry_prefix=entry(name, "")[:-1], tag_prefix=tag(name)[:-1], watch=listener.watch
    )


def switched_on(store):
    """Have it watched, and wait until it may serve."""
    store.begin("any")
    until(lambda: store.valid, "the listener did not come up")
    return store


def keep(store, key, payload=b"v", tags=()):
    """As a reader does that was told to be quick: again, if the near cache was off for a moment."""
    until(lambda: store.put(key, store.begin(key), payload, tags=tags, ttl_ms=60_000, size=1))


def heard_after(client, store, name):
    """Wait until all that was written before now has been heard: something that is written later is."""
    keep(store, "heard")
    client.execute_command("SET", entry(name, "heard"), "now", "EX", 60)
    until(lambda: store.get("heard") is ABSENT, "nothing is heard")


def listeners_of(client):
    return [int(one["id"]) for one in client.client_list() if one["name"] == THREAD_NAME]


def our_threads():
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.fixture(params=[pytest.param(2, marks=pytest.mark.storm), 3], ids=["RESP2", "RESP3"])
def protocol(request):
    return request.param


@pytest.fixture
def connections(redis_server, protocol):
    with connected(redis_server.url, protocol) as connections:
        yield connections


@pytest.fixture
def listener(connections):
    listener = Listener(connections, heartbeat_s=HEARTBEAT_S)
    yield listener
    listener.close()
    assert our_threads() == []
    assert listeners_of(connections.coordination) == []


@pytest.fixture
def store(listener, name):
    return switched_on(a_store(listener, name))


@pytest.fixture
def client(connections):
    return connections.coordination


# --- what is heard ------------------------------------------------------------------------------------------------

CHANGES = {
    "SET": lambda client, key: client.execute_command("SET", key, "new", "EX", 60),
    "DEL": lambda client, key: client.delete(key),
    "EXPIRE": lambda client, key: client.expire(key, 50),
    "expiry": lambda client, key: client.pexpire(key, 1),
    "FLUSHDB": lambda client, key: client.flushdb(),
    "FLUSHALL": lambda client, key: client.flushall(),
}


def test_whatever_changes_a_key_is_heard(own_server, protocol, name):
    """By a client that knows nothing of near caches."""
    server = own_server()
    with connected(server.url, protocol) as connections, connect(server.url) as foreign:
        listener = Listener(connections, heartbeat_s=HEARTBEAT_S)
        store = switched_on(a_store(listener, name))
        for what, change in CHANGES.items():
            foreign.coordination.set(entry(name, "k"), "old", ex=60)
            heard_after(foreign.coordination, store, name)
            keep(store, "k")
            change(foreign.coordination, entry(name, "k"))

            until(lambda: store.get("k") is ABSENT, f"not heard: {what}")
        listener.close()


def test_a_write_of_redis_cli_drops_its_key_and_no_other(redis_server, client, store, listener, name):
    """No writer has to publish anything: a few bytes on a socket will do."""
    keep(store, "k%")
    keep(store, "other")
    subprocess.run(
        ["/bin/bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{redis_server.port}; cat >&3; head -1 <&3"],
        input=f'SET "{entry(name, "k%25")}" new EX 60\r\n'.encode(),
        check=True,
        capture_output=True,
    )

    until(lambda: store.get("k%") is ABSENT)
    assert store.get("other") == b"v"


def test_a_tag_that_changes_drops_what_names_it_and_the_empty_one_drops_all(client, store, name):
    """Tags are keys too."""
    keep(store, "tagged", tags=["t"])
    keep(store, "plain")
    client.set(tag(name, "t"), "new", ex=60)
    until(lambda: store.get("tagged") is ABSENT)
    assert store.get("plain") == b"v"

    client.set(tag(name), "new", ex=60)
    until(lambda: store.get("plain") is ABSENT)


def test_each_store_hears_of_its_own_keys(client, listener, store, name):
    """Namespaces that come later are heard too; two stores of one namespace both hear."""
    other = switched_on(a_store(listener, f"{name}-other"))
    twin = switched_on(a_store(listener, name))
    until(lambda: store.valid)
    for one in (store, other, twin):
        keep(one, "k")
    client.set(entry(name, "k"), "new", ex=60)

    until(lambda: store.get("k") is ABSENT)
    until(lambda: twin.get("k") is ABSENT)
    assert other.get("k") == b"v"
    client.set(entry(f"{name}-other", "k"), "new", ex=60)
    until(lambda: other.get("k") is ABSENT)
    assert len(listeners_of(client)) == len(our_threads()) == 1


def test_what_was_begun_before_a_store_is_told_of_changes_is_not_kept(client, listener, store, name):
    """A second store of a namespace that is tracked already: it did not hear what the first one heard."""
    late = a_store(listener, name)
    late.valid_until = float("inf")  # so that it begins at once, as it might have before it was cleared
    marker = late.begin("k")
    late.valid_until = 0.0
    late.begin("k")
    until(lambda: late.valid)

    assert not late.put("k", marker, b"old", ttl_ms=60_000, size=1)


# --- what is not heard --------------------------------------------------------------------------------------------


def test_a_connection_that_is_cut_empties_the_store_and_is_made_anew(client, store, listener, name, caplog):
    """Told in two lines. What changed while nothing was heard is not served."""
    caplog.set_level(logging.INFO, logger="petiole")
    keep(store, "k")
    (connection,) = listeners_of(client)
    client.client_kill_filter(_id=connection)
    until(lambda: store.get("k") is ABSENT)
    until(lambda: store.valid, "it did not come back")

    assert listeners_of(client) != [connection]
    assert store.get("k") is ABSENT
    keep(store, "k")
    client.set(entry(name, "k"), "new", ex=60)
    until(lambda: store.get("k") is ABSENT)
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("listener")]
    assert [line.split(":")[0] for line in lines] == [
        "near caches are off, reads go to Redis",
        "near caches are on again",
    ]


def test_a_server_that_is_paused_is_not_believed_for_longer_than_a_heartbeat(own_server, protocol, name):
    """Validity ends by itself, though no connection broke. When the server goes on, so does the near cache: empty."""
    server = own_server()
    with connected(server.url, protocol) as connections:
        listener = Listener(connections, heartbeat_s=HEARTBEAT_S)
        store = switched_on(a_store(listener, name))
        keep(store, "k")
        process = psutil.Process(connections.coordination.info("server")["process_id"])
        process.suspend()
        try:
            until(lambda: process.status() == psutil.STATUS_STOPPED)
            stopped = time.monotonic()
            last = store.valid_until
            until(lambda: not store.valid)
            assert store.get("k") is ABSENT
            assert store.begin("k") is None
            until(lambda: not listener.up)
            assert last <= stopped + listener.heartbeat_s
            assert store.valid_until == 0.0
        finally:
            process.resume()
        until(lambda: store.valid, "it did not come back")
        assert store.get("k") is ABSENT
        keep(store, "k")
        connections.coordination.set(entry(name, "k"), "new", ex=60)
        until(lambda: store.get("k") is ABSENT)
        listener.close()


def test_a_listener_whose_thread_gets_no_turn_extends_nothing(store, listener, monkeypatch):
    """The time counts from before the PING: an answer that is read late extends nothing past its heartbeat."""
    keep(store, "k")
    held, release = [], threading.Event()
    extended = []
    hear, extend = listener._hear, listener._extend

    def slow(connection, deadline, *, until_pong):
        if until_pong and not held:
            held.append(time.monotonic())  # the PING has been sent
            release.wait(MAY_TAKE_S)
        return hear(connection, deadline, until_pong=until_pong)

    def noted(until):
        extended.append(until)
        extend(until)

    monkeypatch.setattr(listener, "_hear", slow)
    until(lambda: held)
    monkeypatch.setattr(listener, "_extend", noted)
    until(lambda: not store.valid)
    assert store.get("k") is ABSENT

    release.set()
    until(lambda: store.valid, "it did not go on")
    assert extended[0] <= held[0] + listener.heartbeat_s
    assert store.get("k") == b"v"  # the same connection: nothing was lost, and what was there may be served again


def test_a_server_that_restarts_is_heard_again(protocol, name, caplog):
    """And what it had before is not served. While it is away, one line is logged, whatever the number of attempts."""
    port = free_port()

    def started():
        process = GuardedProcess([find_program(), "--port", str(port), "--save", "", "--bind", "127.0.0.1"])
        with connect(f"redis://127.0.0.1:{port}") as probe:
            until(lambda: answers(probe))
        return process

    def answers(probe):
        try:
            return probe.coordination.ping()
        except Exception:  # noqa: BLE001 - it does not answer yet
            return False

    server = started()
    try:
        with connected(f"redis://127.0.0.1:{port}", protocol) as connections:
            listener = Listener(connections, heartbeat_s=HEARTBEAT_S)
            store = switched_on(a_store(listener, name))
            keep(store, "k")
            server.stop()
            until(lambda: not listener.up)
            assert store.get("k") is ABSENT
            time.sleep(HEARTBEAT_S)  # for some attempts that fail
            server = started()
            until(lambda: store.valid, "it did not come back")
            assert store.get("k") is ABSENT
            keep(store, "k")
            connections.coordination.set(entry(name, "k"), "new", ex=60)
            until(lambda: store.get("k") is ABSENT)
            listener.close()
    finally:
        server.stop()
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("listener")]
    assert len(lines) == 2


def test_a_server_that_refuses_is_named_and_the_near_cache_stays_off(own_server, protocol, name, caplog):
    """A user who may do anything but be told. The password is not in the log."""
    server = own_server()
    with connect(server.url) as admin:
        admin.coordination.execute_command("ACL", "SETUSER", "app", "on", ">geheim", "~*", "+@all", "-client|tracking")
    with connected(server.url.replace("redis://", "redis://app:geheim@"), protocol) as connections:
        listener = Listener(connections, heartbeat_s=HEARTBEAT_S)
        store = a_store(listener, name)
        assert store.begin("k") is None
        (line,) = until(lambda: [r.getMessage() for r in caplog.records if r.name.endswith("listener")])
        assert "tracking" in line
        assert "geheim" not in line + repr(listener) + repr(store)
        assert not store.valid
        listener.close()


def test_a_user_without_channels_is_told_by_pushes(own_server, name):
    """Under RESP3 no channel is needed."""
    server = own_server()
    with connect(server.url) as admin:
        admin.coordination.execute_command("ACL", "SETUSER", "app", "on", ">p", "~*", "+@all", "resetchannels")
    with connected(server.url.replace("redis://", "redis://app:p@"), 3) as connections:
        listener = Listener(connections, heartbeat_s=HEARTBEAT_S)
        store = switched_on(a_store(listener, name))
        keep(store, "k")
        connections.coordination.set(entry(name, "k"), "new", ex=60)
        until(lambda: store.get("k") is ABSENT)
        listener.close()


def test_a_subscriber_that_raises_is_off_and_the_others_are_heard(client, listener, store, name, caplog):
    """What cannot be told must not serve; and it takes nobody along."""

    class Broken:
        valid_until = 0.0
        fails = True

        def dropped(self, names):
            if self.fails and names:
                raise RuntimeError("broken")

    broken = Broken()
    listener.watch([entry(f"{name}-broken", "")[:-1]], broken)
    until(lambda: broken.valid_until)
    until(lambda: store.valid)
    client.set(entry(f"{name}-broken", "k"), "new", ex=60)
    until(lambda: broken.valid_until == 0.0)
    assert "did not take" in caplog.text
    keep(store, "k")
    client.set(entry(name, "k"), "new", ex=60)
    until(lambda: store.get("k") is ABSENT)
    heard_after(client, store, name)
    assert broken.valid_until == 0.0

    broken.fails = False
    listener.watch([entry(f"{name}-broken", "")[:-1]], broken)
    until(lambda: broken.valid_until)


def test_what_others_publish_on_the_channel_drops_everything_and_breaks_nothing(client, store):
    """Anybody may publish there."""
    keep(store, "k")
    (connection,) = listeners_of(client)
    client.publish("__redis__:invalidate", "petiole")

    until(lambda: store.get("k") is ABSENT)
    assert listeners_of(client) == [connection]


# --- life and death -----------------------------------------------------------------------------------------------


def test_nothing_happens_before_a_store_is_used(connections, client, name):
    """No thread, no connection."""
    listener = Listener(connections)
    a_store(listener, name)

    assert our_threads() == []
    assert listeners_of(client) == []


def test_the_thread_ends_with_the_connections(redis_server, protocol, name):
    """Nobody has to close the listener."""
    with connected(redis_server.url, protocol) as connections:
        listener = Listener(connections, heartbeat_s=HEARTBEAT_S)
        store = switched_on(a_store(listener, name))
        keep(store, "k")
    until(lambda: our_threads() == [])

    assert store.get("k") is ABSENT
    assert store.begin("k") is None
    assert our_threads() == []


def test_the_thread_ends_with_the_last_store_and_begins_with_the_next(client, listener, name):
    """Stores are held weakly."""
    store = switched_on(a_store(listener, name))
    del store
    gc.collect()
    until(lambda: our_threads() == [])
    until(lambda: listeners_of(client) == [])

    switched_on(a_store(listener, name))
    assert len(our_threads()) == 1


def test_a_closed_listener_stays_closed(client, listener, store):
    """And what it told is off and empty."""
    keep(store, "k")
    listener.close()
    listener.close()

    assert our_threads() == []
    assert store.get("k") is ABSENT
    assert store.begin("k") is None
    assert our_threads() == []


def test_a_cluster_and_an_empty_prefix_are_refused(connections, name):
    """With words that say what to do."""
    listener = Listener(connections)
    with pytest.raises(ValueError, match="empty"):
        listener.watch([""], a_store(listener, name))
    with pytest.raises(ValueError, match="heartbeat_s=0"):
        Listener(connections, heartbeat_s=0)
    connections.is_cluster = True
    with pytest.raises(ValueError, match="Cluster"):
        a_store(Listener(connections), name).begin("k")
    assert our_threads() == []


def test_both_sides_of_a_fork_hear_for_themselves(client, connections, listener, store, name):
    """The child begins with nothing, on a connection of its own, and leaves the parent's alone."""
    keep(store, "k", b"parent")
    (connection,) = listeners_of(client)

    def child():
        assert store.get("k") is ABSENT
        assert store.begin("k") is None
        until(lambda: store.valid)
        keep(store, "k", b"child")
        connections.coordination.set(entry(name, "k"), "new", ex=60)
        until(lambda: store.get("k") is ABSENT)
        listener.close()
        return True

    pid = os.fork()
    if not pid:
        signal.alarm(2 * MAY_TAKE_S)
        status = 1
        try:
            status = 0 if child() else 2
        finally:
            os._exit(status)
    until(lambda: store.get("k") is ABSENT, "the parent did not hear what the child wrote")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    heard_after(client, store, name)
    keep(store, "k")
    client.set(entry(name, "k"), "newer", ex=60)
    until(lambda: store.get("k") is ABSENT)
    assert listeners_of(client) == [connection]  # it was never cut


# --- all of it at once --------------------------------------------------------------------------------------------

KEYS, READERS, WRITERS = 60, 8, 3
SHORT_HEARTBEAT_S = 0.3  # here it may be lost at any time


@pytest.mark.parametrize("stress_s", [1.5, pytest.param(10, marks=pytest.mark.storm)])
def test_under_fire_nothing_is_served_past_its_heartbeat_and_in_the_end_nothing_is_stale(
    connections, client, name, stress_s
):
    """Eight readers, three writers, and a listener whose connection is killed again and again.

    Each writer notes when Redis had confirmed a value. Whatever a reader is served must be at least what was
    confirmed a heartbeat before it asked.
    """
    listener = Listener(connections, heartbeat_s=SHORT_HEARTBEAT_S)
    store = switched_on(a_store(listener, name))
    confirmed = [[] for _ in range(KEYS)]  # per key: the time at which each value, counted from 0, was confirmed
    over = threading.Event()
    wrong, served, kept = [], [0] * READERS, [0] * READERS

    def write(writer):
        chance = random.Random(writer)
        mine = [number for number in range(KEYS) if number % WRITERS == writer]
        while not over.is_set():
            number = chance.choice(mine)
            client.execute_command("SET", entry(name, number), len(confirmed[number]), "EX", 60)
            confirmed[number].append(time.monotonic())
            over.wait(0.001)

    def read(reader):
        chance = random.Random(reader)
        while not over.is_set():
            number = chance.randrange(KEYS)
            key, asked = str(number), time.monotonic()
            found = store.get(key)
            if found is not ABSENT:
                served[reader] += 1
                least = bisect.bisect_left(confirmed[number], asked - listener.heartbeat_s) - 1
                if int(found) < least:
                    wrong.append((key, found, least))
                continue
            marker = store.begin(key)
            value = client.execute_command("GET", entry(name, number))
            if value is None:
                store.abandon(key, marker)
            else:
                kept[reader] += store.put(key, marker, value, ttl_ms=60_000, size=len(value))

    kills = 0
    with ThreadPoolExecutor(READERS + WRITERS) as pool:
        running = [pool.submit(write, n) for n in range(WRITERS)] + [pool.submit(read, n) for n in range(READERS)]
        try:
            end = time.monotonic() + stress_s
            while time.monotonic() < end:
                time.sleep(0.3)
                for connection in listeners_of(client):
                    client.client_kill_filter(_id=connection)
                    kills += 1
        finally:
            over.set()
        for one in running:
            one.result()
    heard_after(client, store, name)

    held = {number: found for number in range(KEYS) if (found := store.get(str(number))) is not ABSENT}
    stale = {n: found for n, found in held.items() if found != client.execute_command("GET", entry(name, n))}
    assert stale == {}
    assert wrong == []
    assert kills > 0
    assert min(sum(served), sum(kept)) > 0
    assert len(store._markers) == 0
    listener.close()
