"""The application survives Redis: away, hung, full or read-only, a cache answers, and remembers what to remove."""

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
from petiole.cachelib.entry_store import EntryStore
from petiole.cachelib.errors import ServerUnavailable
from petiole.cachelib.remembered import Remembered, Unsent

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


def wait_for(condition, *, at_most_s=HANGS_S):
    """Look until something is so."""
    deadline = time.monotonic() + at_most_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        threading.Event().wait(0.005)


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
    """Every call answers as if nothing were cached, within its timeout; it is counted, and not told at every call."""
    started = time.monotonic()
    with caplog.at_level(logging.DEBUG, "petiole"):
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
            "touch": away.touch("k", 5),
            "ttl": away.ttl("k"),
            "getex": away.getex("k", 5, MISS),
            "getdel": away.getdel("k", MISS),
            "add": away.add("k", 1),
            "replace": away.replace("k", 1),
            "compare_and_set": away.compare_and_set("k", 1, "version"),
            "get_versioned": away.get_versioned("k"),
            "get_or_set_many": away.get_or_set_many(["k", "n"], lambda keys: dict.fromkeys(keys, "loaded")),
        }
        with away.guard(["k"]) as guard:
            answers["set_many guarded"] = away.set_many({"k": 1}, guard=guard)

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
        "touch": False,
        "ttl": None,
        "getex": MISS,
        "getdel": MISS,
        "add": False,
        "replace": False,
        "compare_and_set": False,
        "get_versioned": None,
        "get_or_set_many": {"k": "loaded", "n": "loaded"},
        "set_many guarded": False,
    }
    assert away.stats().errors >= len(answers)
    assert away.stats().misses >= 5
    assert away.stats().unsent == 1, "what was set holds something else now"
    assert "went on without Redis" in caplog.text
    told = [record.getMessage() for record in caplog.records if record.name == "petiole.cachelib.circuit"]
    assert len(told) <= 1, "the breaker tells it once"
    assert "s3cret" not in caplog.text


REMOVERS = {
    "delete": lambda cache, **how: cache.delete("k", **how),
    "key": lambda cache, **how: cache.invalidate(keys=["k"], **how),
    "tag": lambda cache, **how: cache.invalidate(tags=["t"], **how),
    "pattern": lambda cache, **how: cache.invalidate(matching="*", **how),
    "clear": lambda cache, **how: cache.clear(**how),
}
by_every_remover = pytest.mark.parametrize("remove", REMOVERS.values(), ids=REMOVERS)


@by_every_remover
def test_what_could_not_be_removed_is_raised_where_that_was_asked_for(away, remove):
    """Nobody would know of the stale entry; the error says where and what to do, without a password."""
    with pytest.raises(ServerUnavailable, match="Check that the server runs there") as caught:
        remove(away, strict=True)

    assert caught.value.address == away.redis.address
    assert caught.value.address in str(caught.value)
    assert caught.value.doing
    assert "s3cret" not in f"{caught.value} {caught.value!r}"
    assert away.stats().errors > 0
    assert (away.stats().remembered, away.stats().unsent) == (0, 0)


@by_every_remover
def test_what_could_not_be_removed_is_remembered(away, caplog, remove):
    """The caller goes on; how much is not sent is shown, and told once, without a password."""
    with caplog.at_level(logging.DEBUG, "petiole"):
        assert not remove(away)
        remove(away)

    assert away.stats().errors == 2
    assert away.stats().remembered == 2
    assert away.stats().unsent in (1, 2)  # the first may be on its way when the second comes
    assert "invalidations not sent" in repr(away)
    told = [record.getMessage() for record in caplog.records if "it is remembered" in record.getMessage()]
    assert len(told) == 1
    assert away.namespace in told[0]
    assert "s3cret" not in f"{caplog.text} {away!r}"


def test_a_strict_cache_raises_where_others_go_on(name):
    """For who would rather fail than serve without a cache; a call may say otherwise."""
    with connected("redis://:s3cret@127.0.0.1:1/0") as redis:
        cache = Cache(redis, namespace=name, strict=True)
        calls = [
            lambda: cache.get("k"),
            lambda: cache.get_many(["k"]),
            lambda: cache.exists("k"),
            lambda: cache.get_or_set("k", lambda: 1),
            lambda: cache.get_or_set_many(["k"], lambda keys: dict.fromkeys(keys, 1)),
            lambda: cache.refresh("k", lambda: 1),
            lambda: cache.set("k", 1),
            lambda: cache.add("k", 1),
            lambda: cache.incr("k"),
            lambda: cache.touch("k"),
            lambda: cache.expire("k"),
            lambda: cache.delete("k"),
            cache.clear,
        ]
        for call in calls:
            with pytest.raises(ServerUnavailable) as caught:
                call()
            assert "s3cret" not in str(caught.value)

        assert cache.stats().unsent == 0
        assert cache.delete("k", strict=False) == 0
        assert cache.stats().unsent == 1


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
        cache, other = (Cache(redis, namespace=name, lease=2) for _ in range(2))
        client, entered, go = redis.coordination, threading.Event(), threading.Event()
        holder = pool.submit(cache.get_or_set, "k", lambda: entered.set() or (go.wait(60) and "first"))
        assert entered.wait(10)
        waiter = pool.submit(other.get_or_set, "k", lambda: "second")
        try:
            wait_for(lambda: client.info("clients")["blocked_clients"] == 1)
        except AssertionError:
            go.set()
            raise
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


@by_every_remover
def test_what_a_read_only_server_did_not_remove_is_remembered_and_sent_when_it_takes_it(own_server, name, remove):
    """A refused removal is one that did not happen: until it has, this process does not serve what it was about."""
    server = own_server()
    with connect(settings=Settings(url=server.url, cache_timeout=2)) as redis:
        cache, other = (Cache(redis, namespace=name) for _ in range(2))
        cache.set("k", "old", tags=["t"])
        cache.set("kept", "kept")
        redis.coordination.replicaof("127.0.0.1", 1)

        with pytest.raises(ServerUnavailable, match="read only replica"):
            remove(cache, strict=True)
        assert not remove(cache)
        assert cache.stats().unsent == 1
        assert cache.get("k", MISS) is MISS
        assert cache.get_many(["k"]) == {}
        assert not cache.exists("k")
        assert cache.get_or_set("k", lambda: "new", tags=["t"]) == "new"
        assert other.get("k") == "old"  # what is remembered is remembered by one process

        redis.coordination.replicaof("no", "one")
        wait_for(lambda: cache.stats().unsent == 0)

        assert other.get("k", MISS) is MISS
        assert cache.get_or_set("k", lambda: "new", tags=["t"]) == "new"
        assert cache.get("k") == "new"


def test_what_is_remembered_while_the_last_was_sent_is_sent_too(redis):
    """The thread that sends may be about to end, and nobody else would."""
    sent = []
    remembered = Remembered(redis, lambda unsent: sent.extend(unsent.keys), "cache 'test'")

    class Ending(logging.Handler):
        def emit(self, record):
            if "has been told of all" in record.getMessage() and sent == ["first"]:
                remembered.add(Unsent(keys={"second": None}), TimeoutError())

    logger = logging.getLogger("petiole.cachelib.remembered")
    handler = Ending()
    logger.addHandler(handler)
    try:
        remembered.add(Unsent(keys={"first": None}), TimeoutError())
        wait_for(lambda: sent == ["first", "second"])
        wait_for(lambda: not remembered.any)
    finally:
        logger.removeHandler(handler)


def test_what_must_have_happened_has_a_timeout_too():
    """Removals wait longer than reads, and not for ever."""
    assert 0 < COORDINATION.answer_s < 10
    assert 0 < COORDINATION.connect_s < 10
    assert 0 < WAITING.answer_s < 10
    assert 0 < BLOCKING.connect_s < 10


def test_an_invalidation_waits_no_longer_than_a_read(redis, cache, monkeypatch):
    """It is sent as reads are, which a circuit breaker guards; only a strict one is patient."""
    clients = []
    for name in ("delete", "drop", "expire"):
        sends = getattr(EntryStore, name)

        def sent(store, what, client, sends=sends):
            clients.append(client)
            return sends(store, what, client)

        monkeypatch.setattr(EntryStore, name, sent)
    cache.delete("k")
    cache.invalidate(tags=["t"])
    cache.expire("k")
    assert clients == [redis.cache] * 3
    cache.delete("k", strict=True)
    assert clients[3:] == [redis.coordination]
