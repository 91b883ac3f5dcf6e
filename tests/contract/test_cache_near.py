"""A cache with a near cache, end to end: a process sees its own changes at once, and others' within a heartbeat.

What the listener hears, and what the store keeps, have tests of their own. Here the promise of the whole is kept: no
read that begins a heartbeat after an invalidation has returned gives the old value, whatever happens to the connection,
the server or the process; and in the process that invalidates, no read after it.
"""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from petiole.cachelib import MISS, Cache, Loaded, Near, Settings, cached, connect
from petiole.cachelib.listener import THREAD_NAME

MAY_TAKE_S = 30
HEARTBEAT_S = 1.0


def until(condition, what="it did not come to be"):
    """Wait for what must happen some time."""
    deadline = time.monotonic() + MAY_TAKE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.002)
    return found


def connected(url, protocol=3):
    separator = "&" if "?" in url else "?"
    return connect(settings=Settings(url=f"{url}{separator}protocol={protocol}", cache_timeout=2))


def served_near(cache, key):
    """Read a key until its value comes from this process's memory. That value."""

    def served():
        before = cache.stats().near_hits
        value = cache.get(key, MISS)
        return cache.stats().near_hits > before and (value,)

    return until(served, "the near cache does not serve")[0]


@pytest.fixture(scope="module", autouse=True)
def _nobody_listens_in_the_end():
    """A listener ends soon after its connections were closed; not each test waits for that."""
    yield
    until(lambda: not [one for one in threading.enumerate() if one.name == THREAD_NAME], "a listener is left")


@pytest.fixture(params=[pytest.param(2, marks=pytest.mark.storm), 3], ids=["RESP2", "RESP3"])
def redis(redis_server, request):
    """Connections with each protocol."""
    with connected(redis_server.url, request.param) as connections:
        yield connections


@pytest.fixture
def cache(redis, name):
    return Cache(redis, namespace=name, near=Near(), ttl=600)


@pytest.fixture
def other(redis_server, name):
    """The same cache in another process, as far as anybody can tell, without a near cache."""
    with connected(redis_server.url) as connections:
        yield Cache(connections, namespace=name, ttl=600)


CHANGES = {
    "delete": (lambda cache: cache.delete("k"), MISS),
    "key": (lambda cache: cache.invalidate(keys=["k"]), MISS),
    "tag": (lambda cache: cache.invalidate(tags=["t"]), MISS),
    "pattern": (lambda cache: cache.invalidate(matching="k*"), MISS),
    "namespace": (lambda cache: cache.clear(), MISS),
    "getdel": (lambda cache: cache.getdel("k"), MISS),
    "set": (lambda cache: cache.set("k", "new"), "new"),
    "set_many": (lambda cache: cache.set_many({"k": "new"}), "new"),
    "replace": (lambda cache: cache.replace("k", "new"), "new"),
    "compare_and_set": (lambda cache: cache.compare_and_set("k", "new", cache.get_versioned("k").version), "new"),
    "refresh": (lambda cache: cache.refresh("k", lambda: "new"), "new"),
}
by_every_change = pytest.mark.parametrize("change", CHANGES)


# --- what it is for ---------------------------------------------------------------------------------------------------


def test_a_hit_in_memory_asks_nobody(cache):
    """Also from ``get_many``, ``get_or_set`` and a cached function; each is given a value of its own."""
    cache.set("k", {"a": [1]}, tags=["t"])
    served_near(cache, "k")["a"].append(2)
    function = cached(cache, "k")(lambda: pytest.fail("loaded"))
    before = cache.redis.coordination.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)
    for _ in range(50):
        values = [cache.get("k"), cache.get_many(["k"])["k"], cache.get_or_set("k", lambda: pytest.fail("loaded"))]
        values.append(cache.get_or_set_many(["k"], lambda keys: pytest.fail("loaded"))["k"])
        values.append(function())

        assert values == [{"a": [1]}] * 5
    after = cache.redis.coordination.info("commandstats")["cmdstat_evalsha"]["calls"]

    assert after - before < 50  # others may use the server; 250 calls were made here
    assert cache.stats().near_entries == 1


def test_without_copy_all_get_the_same_value(redis, name):
    """That is faster, and then it must not be changed."""
    cache = Cache(redis, namespace=name, near=Near(copy=False))
    cache.set("k", ["value"])
    served_near(cache, "k")

    assert cache.get("k") is cache.get("k")


def test_a_value_is_kept_for_no_longer_than_it_is_fresh(cache):
    """Then Redis is asked, which knows whether it is stale or gone."""
    cache.set("k", "old", ttl=0.3)
    until(lambda: cache.get("k", MISS) is MISS)

    assert cache.get("k", MISS) is MISS
    assert cache.get_or_set("k", lambda: "new") == "new"


# --- its own process --------------------------------------------------------------------------------------------------


@by_every_change
def test_a_process_sees_its_own_change_at_once(cache, change):
    """With the next read, however it reads; and it stays so when the near cache has filled again."""
    make, expected = CHANGES[change]
    for _ in range(10):
        cache.set("k", "old", tags=["t"])
        assert served_near(cache, "k") == "old"
        make(cache)

        assert cache.get("k", MISS) == expected
        assert cache.get_many(["k"]).get("k", MISS) == expected
        assert cache.get_or_set("k", lambda: "new") == "new"
        assert served_near(cache, "k") == "new"


def test_a_count_is_never_old(cache, other):
    """Who counts wants to know the count: it is not kept."""
    for number in range(1, 20):
        assert cache.incr("n") == 2 * number - 1
        assert other.incr("n") == 2 * number
        assert cache.get("n") == 2 * number


@by_every_change
def test_a_read_that_redis_answered_before_the_change_does_not_fill_the_near_cache_after_it(cache, change, monkeypatch):
    """The answer is on its way while the same process changes the key: it may be returned, and must not be kept."""
    make, expected = CHANGES[change]
    cache.set("k", "old", tags=["t"])
    served_near(cache, "k")
    cache._near.drop("k")
    read, changed = cache._store.read, []

    def answered(*arguments):
        looks = read(*arguments)
        if not changed:
            changed.append(True)
            make(cache)
        return looks

    with monkeypatch.context() as patch:
        patch.setattr(cache._store, "read", answered)
        assert cache.get("k", MISS) in ("old", expected)

    assert changed
    for _ in range(5):
        assert cache.get("k", MISS) == expected


# --- other processes --------------------------------------------------------------------------------------------------


@by_every_change
def test_another_process_sees_a_change_within_a_heartbeat(cache, other, change):
    """Usually within a millisecond: whoever reads on is served the old value for a moment, and then never again."""
    make, expected = CHANGES[change]
    other.set("k", "old", tags=["t"])
    assert served_near(cache, "k") == "old"
    make(other)
    changed = time.monotonic()

    def heard():
        began = time.monotonic()
        value = cache.get("k", MISS)
        assert value == expected or began <= changed + HEARTBEAT_S
        return value == expected

    until(heard)
    assert [cache.get("k", MISS) for _ in range(100)] == [expected] * 100
    assert cache.get_or_set("k", lambda: "new") == "new"


def test_a_tag_that_the_loader_named_is_heard_of(cache, other):
    """The near cache keeps the tags of the entry, not those of the call."""
    cache.get_or_set("k", lambda: Loaded("old", tags=["of-loader"]))
    assert served_near(cache, "k") == "old"
    other.invalidate(tags=["of-loader"])

    until(lambda: cache.get("k", MISS) is MISS)


def test_a_cache_in_a_forked_child_hears_for_itself(cache, other):
    """It starts with nothing, and its parent goes on."""
    cache.set("k", "old")
    served_near(cache, "k")
    there, here = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        status = 1
        try:
            kept = cache.stats().near_entries
            served_near(cache, "k")
            here.sendall(b".")
            until(lambda: cache.get("k", MISS) == "new")
            status = 0 if kept == 0 and served_near(cache, "k") == "new" else 2
        finally:
            os._exit(status)
    try:
        there.settimeout(MAY_TAKE_S)
        there.recv(1)
        other.set("k", "new")
        until(lambda: cache.get("k") == "new")
        assert served_near(cache, "k") == "new"
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        there.close()
        here.close()
    assert status == 0


# --- when it is in trouble --------------------------------------------------------------------------------------------


def watched(cache, changed_at, expected):
    """Read until the value is the expected one: no read may be old that began a heartbeat after the change."""

    def heard():
        began = time.monotonic()
        value = cache.get("k", MISS)
        assert value in (expected, MISS) or began <= changed_at + HEARTBEAT_S, f"stale: {value}"
        return value == expected

    until(heard)


def test_a_listener_that_is_disconnected_serves_nothing_old_and_comes_back(cache, other):
    """What it was about to be told is lost with the connection, so all that it keeps goes."""
    for number in range(3):
        other.set("k", f"old{number}")
        until(lambda old=f"old{number}": served_near(cache, "k") == old)
        for one in other.redis.coordination.client_list():
            if one["name"] == THREAD_NAME:
                other.redis.coordination.client_kill_filter(_id=one["id"])
        other.set("k", f"new{number}")
        changed = time.monotonic()
        watched(cache, changed, f"new{number}")

        assert served_near(cache, "k") == f"new{number}"


def test_a_process_that_was_paused_serves_nothing_old_when_it_goes_on(redis_server, name, other):
    """While it stood still it heard nothing; its time has run out, and it knows."""
    there, here = socket.socketpair()
    other.set("k", "old")
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        status = 1
        try:
            with connected(redis_server.url) as connections:
                cache = Cache(connections, namespace=name, near=True)
                served_near(cache, "k")
                here.sendall(b".")
                value = None
                while value != "new":
                    began = time.monotonic()
                    value = cache.get("k", MISS)
                    here.sendall(f"{began} {value}\n".encode())
                    time.sleep(0.001)
            status = 0
        finally:
            os._exit(status)
    here.close()
    told = []
    drain = threading.Thread(target=lambda: told.append(b"".join(iter(lambda: there.recv(65_536), b""))))
    try:
        there.settimeout(MAY_TAKE_S)
        assert there.recv(1) == b"."
        drain.start()
        os.kill(pid, signal.SIGSTOP)
        other.set("k", "new")
        changed = time.monotonic()
        until(lambda: time.monotonic() > changed + HEARTBEAT_S)  # the promise itself is a time
        os.kill(pid, signal.SIGCONT)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        drain.join(MAY_TAKE_S)
    finally:
        there.close()
    reads = [line.split() for line in told[0].decode().splitlines()]

    assert status == 0
    assert reads[-1][1] == "new"
    assert [value for began, value in reads if float(began) > changed + HEARTBEAT_S and value == "old"] == []


def test_a_server_that_was_paused_makes_nothing_old_be_served(own_server, name):
    """Nothing is served from memory once the server has been silent for a heartbeat, and the right value after it."""
    server = own_server()
    with connected(server.url) as connections, connected(server.url) as elsewhere:
        cache, other = Cache(connections, namespace=name, near=True), Cache(elsewhere, namespace=name)
        other.set("k", "old")
        assert served_near(cache, "k") == "old"
        pid = elsewhere.coordination.info("server")["process_id"]
        os.kill(pid, signal.SIGSTOP)
        try:
            until(lambda: not cache._near.valid, "it trusts a silent server")
            hits = cache.stats().near_hits
            assert cache.get("k", MISS) is MISS
            assert cache.stats().near_hits == hits
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: other.set("k", "new"))
        changed = time.monotonic()
        watched(cache, changed, "new")
        until(lambda: served_near(cache, "k") == "new")


@contextmanager
def proxy_that_can_cut_off_listeners(port):
    """The port of a proxy, and an event: once it is set, what the server tells to who asked for tracking is dropped."""
    listening, cut, open_sockets = socket.create_server(("127.0.0.1", 0)), threading.Event(), []

    def pass_on(source, target, tracking):
        with suppress(OSError):
            while data := source.recv(65_536):
                if b"TRACKING" in data:
                    tracking.set()
                target.sendall(data)
        close(target)

    def answer(source, target, tracking):
        with suppress(OSError):
            while data := source.recv(65_536):
                if not (tracking.is_set() and cut.is_set()):
                    target.sendall(data)
        close(target)

    def close(one):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)

    def run():
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", port))
            open_sockets.extend([client, server])
            tracking = threading.Event()
            for work in ((pass_on, client, server, tracking), (answer, server, client, tracking)):
                threads.append(threading.Thread(target=work[0], args=work[1:], daemon=True))
                threads[-1].start()

    threads = [threading.Thread(target=run, daemon=True)]
    threads[0].start()
    try:
        yield listening.getsockname()[1], cut
    finally:
        close(listening)
        listening.close()
        for one in open_sockets:
            close(one)
        for thread in threads:
            thread.join(MAY_TAKE_S)
        for one in open_sockets:
            one.close()


def test_a_listener_that_is_cut_off_without_a_word_serves_nothing_old_after_a_heartbeat(redis_server, name, other):
    """Commands are answered as ever, and only what is told about changes does not arrive."""
    with (
        proxy_that_can_cut_off_listeners(redis_server.port) as (port, cut),
        connected(f"redis://127.0.0.1:{port}/0") as connections,
    ):
        cache = Cache(connections, namespace=name, near=True)
        other.set("k", "old")
        assert served_near(cache, "k") == "old"
        cut.set()
        other.set("k", "new")
        changed = time.monotonic()
        watched(cache, changed, "new")
        until(lambda: not cache._near.valid, "it trusts what it does not hear")
        hits = cache.stats().near_hits
        assert [cache.get("k") for _ in range(20)] == ["new"] * 20
        assert cache.stats().near_hits == hits
        cut.clear()

        assert served_near(cache, "k") == "new"


def test_what_was_invalidated_while_redis_hung_is_not_served_from_memory(own_server, name, monkeypatch):
    """It goes from memory at once, and nothing old comes back to it: neither before Redis was told, nor after."""
    server = own_server()
    with connect(settings=Settings(url=server.url, cache_timeout=0.1)) as connections:
        cache = Cache(connections, namespace=name, near=True)
        until(lambda: cache.set("k", "old", tags=["t"]))
        assert served_near(cache, "k") == "old"
        pid = connections.coordination.info("server")["process_id"]
        os.kill(pid, signal.SIGSTOP)
        try:
            cache.invalidate(tags=["t"])
            seen = [cache.get("k", MISS) for _ in range(5)]
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: seen.append(cache.get("k", MISS)) or not cache.stats().unsent)
        seen.append(cache.get("k", MISS))

        assert set(seen) == {MISS}
        until(lambda: cache.get_or_set("k", lambda: "new") == cache.get("k") == "new")
        assert served_near(cache, "k") == "new"


def test_many_threads_that_read_and_change_see_their_own_process_s_changes_at_once(cache):
    """Whoever reads after a change has returned gets that version, or a later one."""
    newest, stop, wrong = [0], threading.Event(), []

    def reader():
        while not stop.is_set():
            at_least = newest[0]
            value = cache.get_or_set("k", lambda: str(committed[0]), tags=["t"])
            if int(value) < at_least:
                wrong.append((at_least, value))

    committed = [0]
    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(reader) for _ in range(4)]
        for number in range(1, 200):
            committed[0] = number
            [cache.delete, lambda key: cache.invalidate(tags=["t"]), lambda key: cache.clear()][number % 3]("k")
            newest[0] = number
        stop.set()
        for one in readers:
            one.result(MAY_TAKE_S)

    assert wrong == []
    cache.get_or_set("k", lambda: str(committed[0]), tags=["t"])  # the last load may have been refused
    assert served_near(cache, "k") == str(committed[0])
