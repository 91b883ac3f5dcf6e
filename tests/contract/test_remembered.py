"""Invalidations that Redis did not hear of: remembered, not served by this process, sent when Redis hears again.

A server that refuses the commands of invalidations, and no others, shows what becomes of the values meanwhile.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from local_nodes import eventually

from petiole.cachelib import MISS, Cache, EmbeddedServer, Loaded, Settings, connect
from petiole.cachelib.connections import Profile
from petiole.cachelib.errors import ServerUnavailable
from petiole.cachelib.keys import lease
from petiole.cachelib.remembered import MOST, Remembered, Unsent

LONG_S = 60
ONLY_INVALIDATIONS_USE = ("unlink", "incr", "getrange", "scan")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    """Between two tries; and no thread is left that would try."""
    monkeypatch.setattr("petiole.cachelib.remembered._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("petiole.cachelib.remembered._LONGEST_PAUSE_S", 0.05)
    before = set(senders())
    yield
    eventually(lambda: set(senders()) <= before, "the threads that send have ended")


def senders():
    return [thread for thread in threading.enumerate() if thread.name == "petiole-invalidations"]


@pytest.fixture(scope="module")
def own():
    """A server whose users may be changed."""
    server = EmbeddedServer.start()
    yield server
    server.stop()


@pytest.fixture
def redis(own):
    with connect(settings=Settings(url=own.url, cache_timeout=2)) as redis:
        yield redis


def refuse(redis):
    redis.waiting.execute_command("ACL", "SETUSER", "default", *(f"-{name}" for name in ONLY_INVALIDATIONS_USE))


def allow(redis):
    redis.waiting.execute_command("ACL", "SETUSER", "default", "+@all")


@contextmanager
def refused(redis):
    """Invalidations are refused; everything else goes on."""
    refuse(redis)
    try:
        yield
    finally:
        allow(redis)


def all_sent(cache):
    eventually(lambda: cache.stats().unsent == 0, "Redis has been told")


def never(*_):
    pytest.fail("the loader was called")


INVALIDATIONS = {
    "delete": (lambda c: c.delete("k"), 0),
    "key": (lambda c: c.invalidate(keys=["k"]), 0),
    "tag": (lambda c: c.invalidate(tags=["t"]), 0),
    "pattern": (lambda c: c.invalidate(matching="k*"), 0),
    "clear": (lambda c: c.clear(), None),
    "expire": (lambda c: c.expire("k"), False),
}
each_invalidation = pytest.mark.parametrize(("invalidate", "answer"), INVALIDATIONS.values(), ids=INVALIDATIONS)


# Redis is away


@pytest.fixture(params=["refused", "hung", "stopped"])
def server_away(request, own_server, tmp_path, name, monkeypatch):
    """A cache with a value, and a switch: its server goes away, and comes back."""
    monkeypatch.setattr("petiole.cachelib.connections.COORDINATION", Profile("coordination", 0.2, 0.2))
    socket = ("--unixsocket", str(tmp_path / "redis.sock"))
    server = own_server(*socket)
    with connect(settings=Settings(url=f"unix://{socket[1]}", cache_timeout=0.2)) as redis:
        cache = Cache(redis, namespace=name)
        while not cache.set("k", "old", tags=["t"]):
            pass
        pid = redis.coordination.info("server")["process_id"]

        @contextmanager
        def away():
            if request.param == "refused":
                refuse(redis)
            elif request.param == "hung":
                os.kill(pid, signal.SIGSTOP)
            else:
                server.stop()
            try:
                yield
            finally:
                if request.param == "refused":
                    allow(redis)
                elif request.param == "hung":
                    os.kill(pid, signal.SIGCONT)
                else:
                    own_server(*socket)

        yield cache, away


@each_invalidation
def test_an_invalidation_returns_and_is_sent_when_redis_is_back(server_away, invalidate, answer):
    """In whatever way Redis was away; then nothing is left of it, and values are served again."""
    cache, away = server_away
    with away():
        assert invalidate(cache) == answer
        assert cache.stats().unsent == cache.stats().remembered == 1
        assert cache.get("k", MISS) is MISS
    all_sent(cache)

    assert Cache(cache.redis, namespace=cache.namespace).get("k", MISS) is MISS
    eventually(lambda: cache.set("k", "new", tags=["t"]) and cache.get("k") == "new", "values are served again")
    assert (cache.stats().remembered, cache.stats().unsent) == (1, 0)


def test_it_is_told_once_that_redis_was_not_told_and_once_that_it_is(redis, name, caplog):
    """And not with every key, nor with every try."""
    cache = Cache(redis, namespace=name)
    with caplog.at_level(logging.WARNING, "petiole"):
        with refused(redis):
            for number in range(20):
                cache.delete(f"k{number}")
            assert cache.stats().unsent == 20
        all_sent(cache)
        eventually(lambda: not senders(), "the thread has ended")

    assert caplog.text.count("Redis was not told of an invalidation") == 1
    assert caplog.text.count("Redis has been told of all invalidations now") == 1
    assert name in caplog.text


# What is not served meanwhile


def reads(cache, key):
    """Every way in which a process reads a key."""
    return {
        "get": cache.get(key, MISS),
        "get_many": cache.get_many([key]).get(key, MISS),
        "get_versioned": cache.get_versioned(key) or MISS,
        "exists": cache.exists(key) or MISS,
        "ttl": cache.ttl(key) or MISS,
        "getex": cache.getex(key, 60, MISS),
        "touch": cache.touch(key, 60) or MISS,
        "replace": cache.replace(key, "replaced") or MISS,
        "compare_and_set": cache.compare_and_set(key, "swapped", "0" * 16) or MISS,
    }


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@each_invalidation
def test_this_process_serves_nothing_of_it_until_it_is_sent(redis, name, invalidate, answer, stale):
    """It reads past it, loads, and stores nothing; another process still has the old value, until Redis is told."""
    cache, other = Cache(redis, namespace=name), Cache(redis, namespace=name)
    cache.set("k", "old", ttl=60, stale=600, tags=["t"])
    if stale:
        redis.coordination.pexpire(cache.keys.entry("k"), 300_000)
    with refused(redis):
        invalidate(cache)

        assert set(reads(cache, "k").values()) == {MISS}
        assert cache.get_or_set("k", lambda: "loaded", tags=["t"]) == "loaded"
        assert cache.get_or_set("k", lambda: "again", tags=["t"], stale=60) == "again"
        assert cache.get_or_set_many(["k"], lambda keys: {"k": "many"}, tags=["t"]) == {"k": "many"}
        assert cache.refresh("k", lambda: "refreshed", tags=["t"]) is False
        with cache.guard(["k"], tags=["t"]) as guard:
            assert cache.set_many({"k": "guarded"}, guard=guard) is False
        assert other.get("k") == "old"
        assert not redis.coordination.exists(lease(cache.keys.entry("k")))
    all_sent(cache)

    for one in (cache, other):
        assert one.get("k", MISS) in ((MISS, "old") if invalidate is INVALIDATIONS["expire"][0] else (MISS,))
    assert other.ttl("k") in (None, 0.0)
    assert cache.get_or_set("k", lambda: "new", tags=["t"]) == "new"
    assert other.get_or_set("k", never, tags=["t"]) == "new"


def test_what_is_not_meant_is_served_as_ever(redis, name):
    """A key, a tag and a stale one mean no other; only a pattern, or all, may mean any."""
    cache = Cache(redis, namespace=name)
    cache.set_many({"a": 1, "b": 2, "c": 3})
    cache.set("d", 4, tags=["t"])
    cache.set("e", 5, tags=["u"])
    with refused(redis):
        cache.delete("a")
        cache.expire("b")
        cache.invalidate(tags=["t"])

        assert cache.get_many(list("abcde")) == {"c": 3, "e": 5}
        assert cache.get_or_set("f", lambda: 6, tags=["u"]) == 6
        assert cache.get_or_set("f", never, tags=["u"]) == 6
        cache.invalidate(matching="zzz*")
        assert cache.get_many(list("abcdef")) == {}
    all_sent(cache)
    assert cache.get_many(list("abcdef")) == {"c": 3, "e": 5, "f": 6}


@each_invalidation
def test_a_load_that_began_before_puts_nothing_back(redis, name, invalidate, answer):
    """Whether Redis is told before it ends or after."""
    cache, other = Cache(redis, namespace=name), Cache(redis, namespace=name)

    def loader(told):
        with refused(redis):
            invalidate(cache)
        if told:
            all_sent(cache)
        return "old"

    for told in (False, True):
        assert cache.get_or_set("k", lambda told=told: loader(told), tags=["t"]) == "old"
        all_sent(cache)
        assert other.get("k", MISS) is MISS
        assert cache.get("k", MISS) is MISS


def test_a_tag_that_a_loader_names_is_looked_at_too(redis, name):
    """What it loaded belongs to a group that is out of date."""
    cache = Cache(redis, namespace=name)
    with refused(redis):
        cache.invalidate(tags=["t"])
        assert cache.get_or_set("k", lambda: Loaded(1, tags=["t"])) == 1
        assert cache.get_or_set("l", lambda: Loaded(2, tags=["u"])) == 2
        assert cache.get_many(["k", "l"]) == {"l": 2}
    all_sent(cache)
    assert cache.get_many(["k", "l"]) == {"l": 2}


# How much is remembered


def test_what_is_too_much_is_the_whole_namespace(redis, name, monkeypatch):
    """One thing instead of many; another namespace is not meant."""
    monkeypatch.setattr("petiole.cachelib.remembered.MOST", 5)
    cache, other = Cache(redis, namespace=name), Cache(redis, namespace=f"{name}:other")
    for one in (cache, other):
        one.set("bystander", 1)
    with refused(redis):
        for number in range(5):
            cache.delete(f"k{number}")
        assert cache.stats().unsent == 5
        assert cache.get("bystander") == 1
        cache.invalidate(tags=["t"])

        assert cache.stats().unsent == 1
        assert cache.get("bystander", MISS) is MISS
        cache.delete("k")
        assert cache.stats().unsent == 2
    all_sent(cache)
    assert cache.get("bystander", MISS) is MISS
    assert other.get("bystander") == 1


def test_there_is_a_bound():
    """However it is reached."""
    unsent = Unsent()
    unsent.add(Unsent(keys=dict.fromkeys(map(str, range(MOST)))))
    assert len(unsent) == MOST
    assert not unsent.covers("other", [])
    unsent.add(Unsent(keys={"0": None}))
    assert len(unsent) == MOST
    unsent.add(Unsent(expired={"0": None}))
    assert len(unsent) == 1
    assert unsent.everything
    assert unsent.covers("other", [])


def test_the_same_twice_is_remembered_once(redis, name):
    """It is the same to send."""
    cache = Cache(redis, namespace=name)
    with refused(redis):
        for _ in range(3):
            cache.invalidate(keys=["a", "a"], tags=["t"], matching="p*")
            cache.clear()
        assert cache.stats().unsent == 4
    all_sent(cache)


# Strict


@each_invalidation
def test_a_strict_cache_raises_and_remembers_nothing(redis, name, invalidate, answer):
    """Who wants to know is told, and has to see to it."""
    cache = Cache(redis, namespace=name, strict=True)
    cache.set("k", "old", tags=["t"])
    with refused(redis):
        with pytest.raises(ServerUnavailable, match="did not answer") as caught:
            invalidate(cache)
        assert caught.value.address == redis.address
        assert (cache.stats().unsent, cache.stats().remembered) == (0, 0)
        assert senders() == []
        assert cache.get("k") == "old"
    assert Cache(redis, namespace=name).get("k") == "old"


def test_a_call_may_be_strict_or_not_for_itself(redis, name):
    """As it says, whatever the cache is."""
    cache, strict = Cache(redis, namespace=name), Cache(redis, namespace=name, strict=True)
    with refused(redis):
        for call in (
            lambda c, strict: c.delete("k", strict=strict),
            lambda c, strict: c.invalidate(tags=["t"], strict=strict),
            lambda c, strict: c.clear(strict=strict),
        ):
            with pytest.raises(ServerUnavailable):
                call(cache, True)
            call(strict, False)
        assert cache.stats().unsent == 0
        assert strict.stats().unsent == 3
    all_sent(strict)


# Sending


@pytest.fixture
def sending(redis):
    """What is sent, and gates: the first sending stops until it is let go."""

    class Sending:
        def __init__(self):
            self.sent = []
            self.entered, self.go = threading.Event(), threading.Event()
            self.failures = 0

        def __call__(self, unsent):
            self.entered.set()
            assert self.go.wait(LONG_S)
            if self.failures:
                self.failures -= 1
                raise ConnectionError("away")
            self.sent += [*unsent.keys, *unsent.tags]

    return Sending()


def remember(remembered, *keys):
    remembered.add(Unsent(keys=dict.fromkeys(keys)), ConnectionError("away"))


@pytest.mark.parametrize("failures", [0, 3])
def test_what_is_added_while_others_are_sent_is_not_lost(redis, sending, failures):
    """Redis may have heard of its key a moment too early; until it is sent, it is not served either."""
    remembered = Remembered(redis, sending, "cache 'x'")
    sending.failures = failures
    remember(remembered, "a")
    assert sending.entered.wait(LONG_S)
    remember(remembered, "a", "b")

    assert remembered.any
    assert remembered.covers("a")
    assert remembered.covers("b")
    assert len(remembered) == 2, "though one of them is on its way, too"
    sending.go.set()
    eventually(lambda: len(remembered) == 0, "all is sent")
    assert sending.sent == (["a", "b"] if failures else ["a", "a", "b"])
    assert not remembered.any
    assert not remembered.covers("a")


def test_what_is_added_when_all_seems_to_be_sent_is_not_lost(redis, sending):
    """Between the last look of the thread that sends and its end, too."""
    remembered, late = Remembered(redis, sending, "cache 'x'"), threading.Event()
    sending.go.set()

    class Adds(logging.Handler):
        def emit(self, record):
            if "has been told of all" in record.getMessage() and not late.is_set():
                late.set()
                remember(remembered, "late")

    logger, adds = logging.getLogger("petiole.cachelib.remembered"), Adds()
    logger.addHandler(adds)
    try:
        remember(remembered, "early")
        assert late.wait(LONG_S)
        eventually(lambda: "late" in sending.sent, "what came late is sent", within_s=10)
    finally:
        logger.removeHandler(adds)
        remembered.send()


def test_many_threads_that_add_while_others_are_sent_lose_nothing(redis, sending):
    """In whatever order they come."""
    remembered = Remembered(redis, sending, "cache 'x'")
    sending.go.set()
    keys = [f"{thread}:{number}" for thread in range(8) for number in range(300)]
    together = threading.Barrier(8)

    def add(thread):
        together.wait(LONG_S)
        for number in range(300):
            remember(remembered, f"{thread}:{number}")

    threads = [threading.Thread(target=add, args=[thread]) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        eventually(lambda: len(remembered) == 0, "all is sent", within_s=10)
    finally:
        remembered.send()
    assert set(sending.sent) == set(keys)


def test_one_that_redis_never_takes_does_not_hold_up_the_others(redis, name):
    """Somebody else's list under the name of a key cannot be made stale; it must not keep a tag from being sent."""
    cache, other = Cache(redis, namespace=name), Cache(redis, namespace=name)
    redis.coordination.rpush(cache.keys.entry("list"), "somebody's")
    redis.coordination.expire(cache.keys.entry("list"), LONG_S)
    other.set("k", "old", tags=["t"])
    with refused(redis):
        cache.expire("list")
        cache.invalidate(tags=["t"])
    try:
        eventually(lambda: cache.stats().unsent == 0, "Redis has been told", within_s=5)
        assert other.get("k", MISS) is MISS
    finally:
        redis.coordination.delete(cache.keys.entry("list"))
        all_sent(cache)


def test_the_thread_ends_when_all_is_sent_and_another_begins_when_it_must(redis, name):
    """Nobody pays for a thread while Redis answers."""
    cache = Cache(redis, namespace=name)
    for _ in range(3):
        with refused(redis):
            cache.delete("k")
            cache.delete("l")
            assert len(senders()) == 1
            assert senders()[0].daemon
        all_sent(cache)
        eventually(lambda: not senders(), "the thread has ended")


def test_what_is_left_when_the_connections_are_closed_is_told_in_the_log(own, name, caplog):
    """Nothing is lost without a word, and the thread ends."""
    with connect(own.url) as admin, refused(admin), caplog.at_level(logging.ERROR, "petiole"):
        with connect(own.url) as redis:
            Cache(redis, namespace=name).invalidate(keys=["the key"], tags=["the tag"])
        eventually(lambda: not senders(), "the thread has ended")

    assert "never told of 2 invalidations" in caplog.text
    assert "the key" in caplog.text
    assert "the tag" in caplog.text


# Processes


def test_a_forked_child_sends_nothing_of_its_parent(redis, name):
    """The parent does; what the child invalidates itself, it sends itself."""
    cache = Cache(redis, namespace=name)
    cache.set_many({"parents": 1, "childs": 2})
    ready_in, ready_out = os.pipe()
    with refused(redis):
        cache.delete("parents")
        pid = os.fork()
        if not pid:
            signal.alarm(LONG_S)
            try:
                inherited = cache.stats().unsent or senders()
                cache.delete("childs")
                os.write(ready_out, b"0" if inherited or cache.stats().unsent != 1 else b"1")
                all_sent(cache)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.read(ready_in, 1) == b"1"
        assert cache.stats().unsent == 1
        assert Cache(redis, namespace=name).get_many(["parents", "childs"]) == {"parents": 1, "childs": 2}
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(ready_in), os.close(ready_out)
    all_sent(cache)
    assert Cache(redis, namespace=name).get_many(["parents", "childs"]) == {}


ENDS = """
import sys
from petiole.cachelib import Cache, connect, remembered

remembered._FIRST_PAUSE_S = 3_600
cache = Cache(connect(sys.argv[1]), namespace=sys.argv[2])
cache.delete("k")
print(cache.stats().unsent, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("back", [True, False], ids=["back", "away"])
def test_a_process_that_ends_sends_what_is_left_or_says_what_is_lost(redis, name, back):
    """Before it ends, once; it does not wait for Redis to come back."""
    cache = Cache(redis, namespace=name)
    cache.set("k", "old")
    with refused(redis):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDS, redis.url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout.readline() == "1\n"
            if back:
                allow(redis)
            _, said = process.communicate("\n", timeout=LONG_S)
        finally:
            process.kill()
    assert process.returncode == 0
    if back:
        assert cache.get("k", MISS) is MISS
        assert "never told" not in said
    else:
        assert cache.get("k") == "old"
        assert "Redis was never told of 1 invalidations" in said
        assert "'k'" in said
