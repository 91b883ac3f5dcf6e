"""Connections: URLs, profiles, health, and a close that leaves nothing."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
import redis as redis_py
from celery import Celery

from petiole import (
    Barrier,
    Cache,
    Debounce,
    Leader,
    Lock,
    MultiLock,
    RateLimit,
    RateLimiter,
    ReadWriteLock,
    Redlock,
    Semaphore,
    SignalBridge,
    SingleFlight,
    Throttle,
    coordinated_task,
    global_rate_limit,
)
from petiole.cachelib import Connections, Settings, connect
from petiole.cachelib.connections import Health
from petiole.cachelib.errors import CachelibError, ServerUnavailable
from petiole.cachelib.write_behind.buffer import Buffer
from petiole.coordination import CoordinatedTask
from petiole.coordination.fencing import FencedStore

PASSWORD = "s3cret/pa:ss@word"


def names_of_clients(redis):
    return sorted(client["name"] for client in redis.coordination.client_list())


def test_a_url_is_enough(redis_server):
    """What it names is reached."""
    with connect(redis_server.url) as redis:
        assert redis.coordination.ping()
        assert redis.address == redis_server.url


def test_settings_name_the_server_too(redis_server, monkeypatch):
    """Arguments, the environment, and an argument above settings."""
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    with connect() as redis:
        assert redis.coordination.ping()
    with connect(settings=Settings(url="redis://elsewhere", ttl_short=7)) as redis:
        assert redis.url == "redis://elsewhere"
    with connect(redis_server.url, settings=Settings(url="redis://elsewhere", ttl_short=7)) as redis:
        assert redis.coordination.ping()
        assert redis.settings.ttl_short == 7


@pytest.mark.parametrize("url", ["", "localhost", "localhost:6379", "http://h", "redis:/h", "REDIS", "://h"])
def test_what_is_no_url_of_redis_is_refused_with_those_that_are(url):
    """The message lists the schemes."""
    with pytest.raises(ValueError, match="redis://, rediss://, unix://, embedded://"):
        connect(url)


@pytest.mark.parametrize("url", ["redis://h:port", "redis://h:99999", "redis://[::1"])
def test_a_url_with_a_bad_address_is_refused(url):
    """Before a command would fail for it."""
    with pytest.raises(ValueError, match=r"is not a Redis URL|Invalid"):
        connect(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cret@h:port",
        "http://user:s3cret@h",
        "redis://:s3cret/x@h:6379",
        "redis://:s3cret?x@h:6379",
        "redis://:s3cret#x@h:6379",
        "user:s3cret@h:6379",
    ],
)
def test_a_bad_url_is_refused_without_its_password(url):
    """Neither in the message nor in what is shown with it; an unquoted password is the usual reason."""
    with pytest.raises(ValueError, match="is not a Redis URL") as caught:
        connect(url)

    shown = [str(caught.value), *(str(e) for e in (caught.value.__cause__,) if e)]
    assert not any("s3cret" in text for text in shown)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://h/0?protocl=2", "unknown option 'protocl'; did you mean 'protocol'"),
        ("redis+cluster://h?protocl=2", "unknown option 'protocl'; did you mean 'protocol'"),
        ("redis+sentinel://h/main?sentinel_pasword=x", "unknown option 'sentinel_pasword'; did you mean"),
        ("redis://h/0?sentinel_password=x", "unknown option 'sentinel_password'"),
        ("redis://h/0?ssl_ca_certs=/ca.pem", "unknown option 'ssl_ca_certs'; ssl_ options go with rediss://"),
        ("rediss://h/0?zzz=/ca.pem", "unknown option 'zzz'; redis-py's connections take no such option"),
        ("redis://h/0?protocol=two", "Invalid value for 'protocol'"),
        ("redis://h/0?protocol=4", "protocol must be either 2 or 3"),
        ("rediss://h/0?ssl_cert_reqs=sometimes", "(?i)ssl certificate requirements"),
        ("redis://h/0?decode_responses=true", "decode_responses"),
    ],
)
def test_an_option_that_no_connection_takes_is_refused_at_once(url, message):
    """With its name, and the nearest known one, rather than by the first command."""
    with pytest.raises(ValueError, match=message):
        connect(url)


@pytest.mark.parametrize("protocol", [2, 3])
def test_both_protocols_are_spoken(redis_server, name, protocol):
    """Replies are the same."""
    with connect(f"{redis_server.url}?protocol={protocol}") as redis:
        client = redis.coordination
        assert client.execute_command("CLIENT INFO").get("resp") in (str(protocol), None)
        assert client.set(name, "v", px=60_000) is True
        assert (client.get(name), client.exists(name), client.get(name + "x")) == (b"v", 1, None)
        client.hset(name + "h", mapping={"a": 1})
        client.pexpire(name + "h", 60_000)
        assert client.execute_command("HGETALL", name + "h") == {b"a": b"1"}
        assert client.execute_command("EVAL", "return {1, false, 'x'}", 0) == [1, None, b"x"]


def test_a_connection_that_the_server_closed_while_it_was_idle_fails_nobody(redis_server):
    """It is looked at before it is used, unless it was used a moment ago."""
    with connect(redis_server.url) as redis, connect(redis_server.url) as other:
        for client in (redis.cache, redis.coordination):
            for _ in range(5):
                id_before = client.client_id()
                other.coordination.client_kill_filter(_id=id_before)
                time.sleep(0.03)
                assert client.client_id() != id_before


def test_keys_are_scanned_for_by_pattern(redis, name):
    """All of them, and no others."""
    wanted = {f"{name}:{number}".encode() for number in range(50)}
    for key in wanted:
        redis.coordination.set(key, 1, px=60_000)

    assert set(redis.scan(f"{name}:*", 7)) == wanted
    assert list(redis.scan(f"{name}x*")) == []


def test_nothing_is_sent_before_the_first_command(own_server):
    """Connecting only makes the object."""
    server = own_server()
    with connect(server.url) as watch, connect(server.url) as redis:
        watch.coordination.ping()
        before = watch.coordination.info("stats")["total_connections_received"]
        clients = [redis.cache, redis.coordination, redis.blocking]

        assert len(clients) == 3
        assert watch.coordination.info("stats")["total_connections_received"] == before
        redis.coordination.ping()
        assert watch.coordination.info("stats")["total_connections_received"] == before + 1


def test_each_profile_has_a_client_of_its_own(own_server):
    """The same one each time, with a name that shows in CLIENT LIST."""
    with connect(own_server().url) as redis:
        for client in (redis.cache, redis.coordination, redis.blocking):
            client.ping()

        assert redis.cache is redis.cache
        assert len({id(redis.cache), id(redis.coordination), id(redis.blocking)}) == 3
        assert names_of_clients(redis) == ["petiole-blocking", "petiole-cache", "petiole-coordination"]
        assert repr(redis) == f"<Connections {redis.address} [3 clients]>"


def test_threads_that_ask_at_once_get_one_client(redis_server):
    """Two clients for one profile would be two pools."""
    with connect(redis_server.url) as redis, ThreadPoolExecutor(16) as pool:
        barrier = threading.Barrier(16)

        def ask():
            barrier.wait(10)
            return redis.cache

        assert len({id(asked.result(10)) for asked in [pool.submit(ask) for _ in range(16)]}) == 1


def test_a_closed_server_is_not_reached_again(own_server):
    """Close may be called twice, ends every connection, and what is asked afterwards is told so."""
    server = own_server()
    redis = connect(server.url)
    redis.blocking.ping(), redis.coordination.ping()
    redis.close()
    redis.close()

    assert "closed" in repr(redis)
    for ask in (lambda: redis.cache, lambda: redis.coordination, lambda: redis.blocking, redis.health):
        with pytest.raises(RuntimeError, match="was closed; connect again"):
            ask()
    with connect(server.url) as watch:
        assert names_of_clients(watch) == ["petiole-coordination"]


def test_a_unix_socket_is_reached(own_server, tmp_path):
    """For a server on the same machine."""
    path = tmp_path / "r.sock"
    own_server("--unixsocket", str(path))
    with connect(f"unix://{path}") as redis:
        redis.coordination.set("k", "v", px=1_000)

        assert redis.coordination.get("k") == b"v"
        assert redis.health().server
        assert redis.address == f"unix://{path}"


def test_an_embedded_server_comes_and_goes_with_its_connections():
    """Each is given its own."""
    with connect("embedded://") as one, connect("embedded://") as other:
        one.coordination.set("k", "v", px=60_000)
        url = one.url

        assert other.coordination.get("k") is None
        assert one.url != other.url
    with connect(url) as redis, pytest.raises(ServerUnavailable):
        redis.health()


def test_each_database_is_apart(redis_server):
    """The number in the URL counts."""
    with connect(redis_server.url) as zero, connect(redis_server.url.removesuffix("0") + "5") as five:
        five.coordination.set("only-in-five", 1, px=10_000)

        assert zero.coordination.exists("only-in-five") == 0


# Health


def test_health_tells_who_answers_and_how_fast(redis_server):
    """Server, version, latency and eviction policy, and no warnings for one that keeps what it is given."""
    with connect(redis_server.url) as redis:
        health = redis.health()

    assert health.server.startswith(("valkey ", "redis "))
    assert health.latency_ms >= 0
    assert health.eviction == "noeviction"
    assert health.warnings == ()
    assert health.address == redis_server.url


@pytest.mark.parametrize(
    ("policy", "lost"),
    [
        ("allkeys-lru", ["buffers", "locks"]),
        ("allkeys-random", ["buffers", "locks"]),
        ("volatile-ttl", ["locks"]),
        ("noeviction", []),
    ],
)
def test_health_warns_of_a_server_that_evicts_what_is_no_cache(own_server, policy, lost):
    """In a sentence that names the policy, what it may drop, and what to do; all but buffers have a TTL."""
    with connect(own_server("--maxmemory-policy", policy).url) as redis:
        health = redis.health()

    assert health.eviction == policy
    assert [policy in warning and "noeviction" in warning for warning in health.warnings] == [True] * bool(lost)
    for what in ("buffers", "locks"):
        assert any(what in warning for warning in health.warnings) == (what in lost)


def test_health_without_a_server_says_what_was_tried():
    """One of our errors, with the address, the cause and the next step."""
    message = r"health check: Redis at .*127\.0\.0\.1:1.*REDIS_URL"
    with connect("redis://:s3cret@127.0.0.1:1/0") as redis, pytest.raises(ServerUnavailable, match=message) as caught:
        redis.health()

    assert isinstance(caught.value, CachelibError)
    assert caught.value.doing == "health check"
    assert "s3cret" not in f"{caught.value}{caught.value!r}{caught.value.address}"


def test_a_password_is_used_and_never_shown(own_server):
    """It opens the server, and stands in no repr, no error and no health report, right or wrong."""
    server = own_server()
    with connect(server.url) as redis:
        redis.coordination.config_set("requirepass", PASSWORD)
        address = server.url.removeprefix("redis://")
        right = f"redis://:{quote(PASSWORD, safe='')}@{address}"
        wrong = f"redis://:{quote(PASSWORD + 'x', safe='')}@{address}"
        with connect(right) as known, connect(wrong) as unknown, connect(server.url) as silent:
            health = known.health()
            errors = []
            for refused in (unknown, silent):
                with pytest.raises(ServerUnavailable) as caught:
                    refused.health()
                errors.append(caught.value)
            shown = [*map(repr, (known, unknown, known.settings, health, *errors)), *map(str, errors), health.address]

    assert isinstance(health, Health)
    for text in shown:
        assert PASSWORD not in text
        assert "s3cret" not in text


def test_connections_are_made_by_settings_alone():
    """What ``connect`` does more is checking."""
    with Connections(Settings(url="redis://h:1/2", cache_timeout="250ms")) as redis:
        assert redis.cache_profile.answer_s == redis.cache_profile.connect_s == 0.25
        assert repr(redis) == "<Connections redis://h:1/2 [0 clients]>"


def test_the_connection_of_a_thread_ends_with_the_thread(redis_server):
    """Without waiting for the garbage collector."""
    import gc
    from threading import Thread

    with connect(redis_server.url) as redis:
        redis.coordination.client_setname("watcher")

        def connections() -> int:
            return sum(client["name"] == "petiole-coordination" for client in redis.coordination.client_list())

        before = connections()
        gc.disable()
        try:
            for _ in range(5):
                thread = Thread(target=redis.coordination.ping)
                thread.start()
                thread.join()
            left = connections()
        finally:
            gc.enable()

    assert left == before


def test_a_command_that_a_signal_breaks_off_spoils_no_other(redis_server):
    """The connection is closed, because nobody knows what is still to come on it."""
    import signal
    from contextlib import suppress

    class BrokenOff(Exception):
        pass

    def break_off(*_: object) -> None:
        raise BrokenOff

    before = signal.signal(signal.SIGALRM, break_off)
    try:
        with connect(redis_server.url) as redis:
            client = redis.coordination
            for number in range(300):
                with suppress(BrokenOff):
                    signal.setitimer(signal.ITIMER_REAL, 0.00005 + number % 20 * 0.00001)
                    for _ in range(20):
                        client.echo("old")
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert client.echo(f"new {number}") == f"new {number}".encode()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


MADE_WITH_CONNECTIONS = {
    "Cache": lambda redis: Cache(redis, namespace="shop"),
    "Buffer": lambda redis: Buffer(redis, "hits"),
    "Lock": lambda redis: Lock(redis, "report"),
    "MultiLock": lambda redis: MultiLock(redis, ["one", "two"]),
    "Semaphore": lambda redis: Semaphore(redis, "report", permits=2),
    "ReadWriteLock": lambda redis: ReadWriteLock(redis, "report"),
    "Leader": lambda redis: Leader(redis, "report"),
    "Barrier": lambda redis: Barrier(redis, "report", 2),
    "FencedStore": lambda redis: FencedStore(redis, "reports"),
    "RateLimiter": lambda redis: RateLimiter(redis, "api", [RateLimit("10/s")]),
    "Throttle": lambda redis: Throttle(redis, "report", every="5m"),
    "Debounce": lambda redis: Debounce(redis, "report", wait="5s"),
    "SingleFlight": lambda redis: SingleFlight(redis, "report"),
    "SignalBridge": lambda redis: SignalBridge(Celery(set_as_current=False), redis),
    "global_rate_limit": lambda redis: global_rate_limit(Celery(set_as_current=False), redis),
    "coordinated_task": lambda redis: coordinated_task(redis=redis, lock="report"),
}


@pytest.mark.parametrize("make", MADE_WITH_CONNECTIONS.values(), ids=MADE_WITH_CONNECTIONS)
@pytest.mark.parametrize("given", ["redis://:s3cret@db:6379/0", redis_py.Redis(password="s3cret")])
def test_what_does_not_come_from_connect_is_refused_at_once_and_not_shown(make, given):
    """A URL has a password; and it would fail at its first use, which may be in a worker."""
    says = rf"^redis must be from connect\(\), not a {type(given).__name__}; write redis=connect\('redis://\.\.\.'\)$"
    with pytest.raises(TypeError, match=says):
        make(given)


def test_of_several_servers_the_one_is_named_that_does_not_come_from_connect():
    with pytest.raises(TypeError, match=r"^servers\[0\] must be from connect\(\), not a str"):
        Redlock(["redis://one", "redis://two", "redis://three"], "report")


def test_an_attribute_of_a_task_class_is_looked_at_when_the_task_is_made():
    def charge(): ...

    app = Celery(set_as_current=False)
    task = app.task(base=CoordinatedTask, shared=False, gate_redis="redis://:s3cret@db", gate_lock="a")(charge)

    with pytest.raises(TypeError, match=r"^gate_redis must be from connect\(\), not a str; write gate_redis="):
        _ = task.name
