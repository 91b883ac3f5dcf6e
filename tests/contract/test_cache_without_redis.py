"""The application survives Redis: away, hung, full or read-only, a cache answers, and only a removal raises."""

import logging
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from petiole.cachelib import MISS, Cache, Settings, connect
from petiole.cachelib.connections import BLOCKING, COORDINATION, WAITING, Profile
from petiole.cachelib.errors import ServerUnavailable

HANGS_S = 20  # longer than any call may take by far, shorter than anybody would wait


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


@contextmanager
def black_hole():
    """The address of a socket that takes connections and never answers; and how many it took."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"redis://:s3cret@127.0.0.1:{listener.getsockname()[1]}/0", listener


@contextmanager
def connected(url):
    with connect(settings=Settings(url=url, cache_timeout=0.05)) as redis:
        yield redis


@pytest.fixture(params=["never-there", "stopped", "hung", "black-hole"])
def away(request, own_server, monkeypatch, name):
    """A cache whose server does not answer, in each way in which servers do not. Removals wait for less here."""
    monkeypatch.setattr("petiole.cachelib.connections.COORDINATION", Profile("coordination", 0.3, 0.3))
    if request.param == "never-there":
        with connected("redis://127.0.0.1:1/0") as redis:
            yield Cache(redis, namespace=name)
    elif request.param == "black-hole":
        with black_hole() as (url, _), connected(url) as redis:
            yield Cache(redis, namespace=name)
    else:
        server = own_server()
        with connected(server.url) as redis:
            cache = Cache(redis, namespace=name)
            while not cache.set_many({"k": 1, "n": 2}):
                pass
            if request.param == "stopped":
                server.stop()
                yield cache
            else:
                with hung(server):
                    yield cache


def test_reading_and_setting_go_on_without_redis(away, caplog):
    """Every call answers as if nothing were cached, within its timeout; it is counted and logged."""
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, "petiole"):
        answers = {
            "get": away.get("k", MISS),
            "get default": away.get("k", 7),
            "get_many": away.get_many(["k", "n"]),
            "exists": away.exists("k"),
            "get_or_set": away.get_or_set("k", lambda: "loaded"),
            "get_or_set tags": away.get_or_set("k", lambda: None, stale=5, tags=["t"]),
            "refresh": away.refresh("k", lambda: pytest.fail("loaded for nobody")),
            "set": away.set("k", 1),
            "set tags": away.set("k", 1, tags=["t"]),
            "set_many": away.set_many({"k": 1}),
            "incr": away.incr("n"),
            "expire": away.expire("k", 5),
        }

    assert time.monotonic() - started < HANGS_S
    assert answers == {
        "get": MISS,
        "get default": 7,
        "get_many": {},
        "exists": False,
        "get_or_set": "loaded",
        "get_or_set tags": None,
        "refresh": False,
        "set": False,
        "set tags": False,
        "set_many": False,
        "incr": None,
        "expire": False,
    }
    assert away.stats().errors >= len(answers)
    assert away.stats().misses >= 5
    assert "went on without Redis" in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    "remove",
    [
        lambda cache: cache.delete("k"),
        lambda cache: cache.invalidate(keys=["k"]),
        lambda cache: cache.invalidate(tags=["t"]),
        lambda cache: cache.invalidate(matching="*"),
    ],
    ids=["delete", "key", "tag", "pattern"],
)
def test_what_could_not_be_removed_is_raised(away, remove):
    """Nobody would know of the stale entry; the error says where and what to do, without a password."""
    with pytest.raises(ServerUnavailable, match="Check that the server runs there") as caught:
        remove(away)

    assert caught.value.address == away.redis.address
    assert caught.value.address in str(caught.value)
    assert caught.value.doing
    assert "s3cret" not in f"{caught.value} {caught.value!r}"
    assert away.stats().errors > 0


def test_what_a_loader_raises_is_raised_without_redis_too(away):
    """An error of the database is not mistaken for one of the cache."""

    def fails():
        raise OSError("the database is away")

    with pytest.raises(OSError, match="the database is away"):
        away.get_or_set("k", fails)


def test_mistakes_are_raised_without_redis_too(away):
    """Arguments are checked before anything is sent."""
    with pytest.raises(ValueError, match="must not be empty"):
        away.get("")
    with pytest.raises(ValueError, match="ttl="):
        away.set("k", 1, ttl=0)


def test_a_call_is_sent_once(name):
    """A cache does not try again behind its caller's back: one call, one connection, one timeout."""
    taken = []
    with black_hole() as (url, listener), connected(url) as redis:
        cache = Cache(redis, namespace=name)
        cache.get("k")
        cache.incr("n")
        listener.settimeout(0)
        with suppress(BlockingIOError):
            while True:
                taken.append(listener.accept()[0])
        for connection in taken:
            connection.close()

    assert len(taken) == 2


def test_a_server_that_ends_during_a_load_does_not_lose_the_value(own_server, name):
    """It is returned; only the storing of it failed."""
    server = own_server()
    with connect(settings=Settings(url=server.url, cache_timeout=2)) as redis:
        cache = Cache(redis, namespace=name)
        value = cache.get_or_set("k", lambda: server.stop() or "loaded")

        assert value == "loaded"
        assert cache.stats().errors == 1


def test_a_loader_that_fails_while_the_server_ends_raises_its_own_error(own_server, name):
    """What cannot be given back is not what the caller asked about."""
    server = own_server()
    with connect(settings=Settings(url=server.url, cache_timeout=2)) as redis:

        def fails():
            server.stop()
            raise LookupError("no such user")

        with pytest.raises(LookupError, match="no such user"):
            Cache(redis, namespace=name).get_or_set("k", fails)


def test_answers_are_not_mixed_up_after_a_hang(own_server, name):
    """What a timed-out call was to be answered is never taken for the answer of the next one."""
    server = own_server()
    with connected(server.url) as redis:
        cache = Cache(redis, namespace=name)
        keys = [f"k{i}" for i in range(20)]
        with connect(settings=Settings(url=server.url, cache_timeout=5)) as patient:
            Cache(patient, namespace=name).set_many({key: key for key in keys})
        cache.get("k0")
        with hung(server):
            timed_out = [cache.get(key, MISS) for key in keys[:3]]
        deadline = time.monotonic() + HANGS_S
        answers = {}
        while len(answers) < len(keys):
            assert time.monotonic() < deadline
            answers |= {key: value for key in keys if (value := cache.get(key, MISS)) is not MISS}

    assert timed_out == [MISS] * 3
    assert answers == {key: key for key in keys}


def test_who_waits_for_a_load_is_not_held_by_a_server_that_hangs(own_server, name):
    """The one who waits in Redis has a timeout too: when it has passed, the loader is called without Redis."""
    server = own_server()
    with connect(settings=Settings(url=server.url, cache_timeout=0.2)) as redis, ThreadPoolExecutor(2) as pool:
        cache = Cache(redis, namespace=name, lease=2)
        client, entered, go = redis.coordination, threading.Event(), threading.Event()
        holder = pool.submit(cache.get_or_set, "k", lambda: entered.set() or (go.wait(60) and "first"))
        assert entered.wait(10)
        waiter = pool.submit(cache.get_or_set, "k", lambda: "second")
        while not client.info("clients")["blocked_clients"]:
            pass
        with hung(server):
            try:
                value = waiter.result(HANGS_S)
            except TimeoutError:
                value = "still waiting"
            go.set()
            first = holder.result(HANGS_S)
        waiter.result(HANGS_S)

    assert (first, value) == ("first", "second")


@pytest.mark.parametrize("why", ["full", "read-only"])
def test_a_server_that_refuses_writes_does_not_take_the_application_down(own_server, name, why):
    """At its memory limit, or turned into a replica by a failover, it is as good as away: loads go on."""
    server = own_server()
    with connect(settings=Settings(url=server.url, cache_timeout=2)) as redis:
        cache = Cache(redis, namespace=name)
        cache.set("k", "old")
        if why == "full":
            redis.coordination.config_set("maxmemory", 1)
        else:
            redis.coordination.replicaof("127.0.0.1", 1)

        assert cache.get("k") == "old"
        assert cache.get_or_set("k", lambda: "new") == "old"
        assert cache.get_or_set("other", lambda: "loaded") == "loaded"
        assert cache.set("k", "new") is False
        assert cache.incr("n") is None
        assert cache.refresh("k", lambda: "new") is False
        assert cache.stats().errors >= 4


def test_what_a_read_only_server_did_not_remove_is_raised(own_server, name):
    """A refused removal is one that did not happen."""
    server = own_server()
    with connect(settings=Settings(url=server.url, cache_timeout=2)) as redis:
        cache = Cache(redis, namespace=name)
        cache.set("k", "old")
        redis.coordination.replicaof("127.0.0.1", 1)

        for remove in (lambda: cache.delete("k"), lambda: cache.invalidate(tags=["t"])):
            with pytest.raises(Exception, match="read only replica"):
                remove()


def test_what_must_have_happened_has_a_timeout_too():
    """Removals wait longer than reads, and not for ever."""
    assert 0 < COORDINATION.answer_s < 10
    assert 0 < COORDINATION.connect_s < 10
    assert 0 < WAITING.answer_s < 10
    assert 0 < BLOCKING.connect_s < 10
