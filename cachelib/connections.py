"""Connections to Redis: one URL, a client per profile, health, and a close that leaves nothing behind.

A cache must fail fast, a listener must wait for ever, and a write must be sent once: three different
settings of one client, and redis-py's defaults suit none of them (against a server that hangs they block
for a minute, and repeat what was sent). Hence the profiles. No profile retries: who may repeat a command
knows it, and does it.
"""

import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from threading import Lock
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import parse_qsl, urlsplit
from weakref import WeakSet

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.exceptions import RedisError
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool

from .breaker import Breaker
from .circuit import UNAVAILABLE as UNAVAILABLE
from .circuit import Circuit, Circuits
from .client import ThreadClient
from .cluster import ClusterClient, Node, SlotMap, named, slot_of_key
from .durations import milliseconds
from .embedded import EmbeddedServer
from .errors import ServerUnavailable
from .forks import renew_after_fork
from .settings import Address, Settings, without_password

_SENTINEL_OPTIONS = {"sentinel_username": "username", "sentinel_password": "password"}


@dataclass(frozen=True, eq=False)  # told apart by identity: every command looks its client up by it
class Profile:
    """How long one kind of call may wait. ``None`` waits for ever."""

    name: str
    answer_s: float | None
    connect_s: float
    health_check_s: int = 0
    """Ping a connection that was idle for so long before it is used; 0: never."""


COORDINATION = Profile("coordination", answer_s=2.0, connect_s=2.0)
"""For what must be known to have happened: buffers, limiters, invalidations."""

WAITING = Profile("waiting", answer_s=2.0, connect_s=0.5)
"""For those who wait a second to be woken."""

BLOCKING = Profile("blocking", answer_s=None, connect_s=2.0, health_check_s=10)
"""For listeners."""


@dataclass(frozen=True)
class Health:
    """What a look at the server showed."""

    address: str
    server: str
    """Name and version, such as ``"valkey 8.1.8"``."""
    latency_ms: float
    eviction: str
    warnings: tuple[str, ...]
    """What would lose data, in sentences. Empty when all is well."""


class Closeable(Protocol):
    """Something that ends with the connections."""

    def closing(self) -> None:
        """The connections are going to be closed: the last moment to say something."""

    def close(self) -> None:
        """The connections are closed: close what is open besides."""


class Connections:
    """A Redis server, as the parts of Petiole reach it. Made by ``connect``; safe to share between threads.

    Connects on the first command, not before. Usable after a fork: the child makes connections of its own.
    Closing it ends every client that it gave out, and the embedded server if it started one.
    """

    def __init__(self, settings: Settings, server: EmbeddedServer | None = None) -> None:
        self.settings = settings
        self.url = server.url if server else settings.url
        self.address = without_password(self.url)
        timeout_ms = milliseconds(settings.cache_timeout, "cache_timeout")
        self.cache_profile = Profile("cache", answer_s=timeout_ms / 1_000, connect_s=timeout_ms / 1_000)
        self.breaker = Circuits(lambda: Breaker(probe_ms=max(1_000, 4 * timeout_ms)))
        """Leaves servers alone that do not answer: the client of the cache asks it, the others do not.
        ``breaker.state`` is ``"closed"``, ``"open"`` or ``"half-open"``."""
        self._where = Address.read(self.url)
        self.is_cluster = self._where.kind == "cluster"
        """Whether the keys are spread over the nodes of a cluster."""
        self._slots = SlotMap(self._where.nodes) if self.is_cluster else None
        self._options = _options(self._where, self.address)
        self._server = server
        self._clients: dict[Profile, redis.Redis] = {}
        self._owned: WeakSet[Closeable] = WeakSet()
        self._lock = Lock()
        self._closing = self._closed = False
        renew_after_fork(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._clients)} clients"
        return f"<Connections {self.address} [{state}]>"

    def client(self, profile: Profile) -> "redis.Redis":
        """The client of a profile. Raises ``RuntimeError`` once closed."""
        client = self._clients.get(profile)
        if client is not None:
            return client
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self!r} was closed; connect again")
            if profile not in self._clients:
                self._clients[profile] = self._new_client(profile)
            return self._clients[profile]

    def _new_client(self, profile: Profile) -> "redis.Redis":
        circuits = self.breaker if profile == self.cache_profile else None
        options = _times(profile) | {"client_name": f"petiole-{profile.name}"} | self._options
        if options.get("connection_class") is not UnixDomainSocketConnection:
            options.setdefault("socket_keepalive", True)
        if self._slots is not None:
            return ClusterClient(self._slots, lambda node: _node_client(node, options, circuits), circuits)
        circuit = circuits.of(self.address) if circuits else None
        if self._where.kind == "sentinel":
            return _sentinel_client(self._where, options, profile, circuit)
        return _owned(ConnectionPool(**options), circuit)

    def slot(self, name: str) -> int:
        """The cluster's slot of a key; 0 where there is no cluster, for there all keys are in one place."""
        return slot_of_key(name) if self.is_cluster else 0

    def node(self, slot: int) -> Node | None:
        """The node of a cluster that has a slot, as far as is known; ``None`` without a cluster. Asks nobody."""
        return self._slots.owner(slot) if self._slots is not None and self._slots.known else None

    def scan(self, pattern: str, count: int = 1_000) -> Iterator[bytes]:
        """The keys that match a pattern, of every primary where there are several, by SCAN.

        A key may come twice, and one that is made meanwhile may be left out; so may one whose slot is moved to
        another node meanwhile.

        Arguments:
            pattern: as SCAN takes it.
            count: how many keys the server looks at per round trip.
        """
        yield from self.coordination.scan_iter(match=pattern, count=count)

    @property
    def cache(self) -> "redis.Redis":
        """The client that fails fast."""
        return self.client(self.cache_profile)

    @property
    def coordination(self) -> "redis.Redis":
        """The client for what must be known to have happened."""
        return self.client(COORDINATION)

    @property
    def waiting(self) -> "redis.Redis":
        """The client for blocking commands of up to a second."""
        return self.client(WAITING)

    @property
    def blocking(self) -> "redis.Redis":
        """The client that may wait for ever."""
        return self.client(BLOCKING)

    def health(self) -> Health:
        """Ask the server how it is, in two round trips; of a cluster, every primary.

        Raises ``ServerUnavailable``, with the address that was tried, when it does not answer.
        """
        client = self.coordination
        try:
            asked = client.primaries() if isinstance(client, ClusterClient) else [client]
            started = time.perf_counter()
            asked[0].ping()
            latency_ms = (time.perf_counter() - started) * 1_000
            all_facts: list[dict[str, Any]] = [one.info() for one in asked]
        except UNAVAILABLE as error:
            raise ServerUnavailable(self.address, error, doing="health check") from None
        facts = all_facts[0]
        valkey = facts.get("valkey_version")
        policies = sorted({str(one.get("maxmemory_policy", "unknown")) for one in all_facts})
        warnings = [
            f"maxmemory-policy is {policy}: Redis may evict {_at_risk(policy)}; "
            "use noeviction for them, and a server of its own for a cache that is to be evicted"
            for policy in policies
            if policy != "noeviction"
        ]
        return Health(
            address=self.address,
            server=f"valkey {valkey}" if valkey else f"redis {facts.get('redis_version', 'unknown')}",
            latency_ms=round(latency_ms, 3),
            eviction=", ".join(policies),
            warnings=tuple(warnings),
        )

    def own(self, what: "Closeable") -> None:
        """Have something closed with these connections, if it is still there."""
        self._owned.add(what)

    @property
    def closed(self) -> bool:
        """Whether it was closed, or is being closed."""
        return self._closing

    def close(self) -> None:
        """Close every client, and stop the embedded server if there is one. May be called twice."""
        if not self._closing:
            self._closing = True
            for owned in list(self._owned):
                owned.closing()
        with self._lock:
            self._closed = True
            clients, self._clients = list(self._clients.values()), {}
        for owned in list(self._owned):
            owned.close()
        for client in clients:
            client.close()
        if self._server:
            self._server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def renew_after_fork(self) -> None:
        """Make the lock anew; the clients see to themselves."""
        self._lock = Lock()


def require_connections(redis: object, name: str = "redis") -> None:
    """Raise ``TypeError`` for what does not come from ``connect``: a URL, or redis-py's client.

    They would fail where they are used at first, maybe in a worker. What it is is not shown: a URL has a password.
    """
    if not isinstance(redis, Connections):
        raise TypeError(
            f"{name} must be from connect(), not a {type(redis).__name__}; write {name}=connect('redis://...')"
        )


def connect(url: str | None = None, *, settings: Settings | None = None) -> Connections:
    """Reach a Redis or Valkey server, a cluster, or the primary that sentinels name.

    >>> redis = connect("redis://localhost:6379/0")

    Arguments:
        url: one of these. Default: what ``Settings.read()`` finds.

            - ``redis://user:password@host:6379/0``, or ``rediss://`` with TLS
            - ``unix:///path/to/socket?db=0``
            - ``redis+cluster://user:password@host1:7000,host2:7001``: nodes to ask first
            - ``redis+sentinel://user:password@host1:26379,host2:26379/mymaster/0``: the sentinels, the name of the
              primary, the database; ``sentinel_username`` and ``sentinel_password`` in the query, if they want any
            - ``rediss+cluster://`` and ``rediss+sentinel://``: with TLS, to sentinels and servers alike
            - ``embedded://``: starts a server for this process alone, gone with it

            Options of redis-py's connections stand in the query: ``?protocol=2``, ``?ssl_ca_certs=/path/ca.pem``,
            ``?ssl_certfile=...&ssl_keyfile=...``. What is said there about times counts for every profile.
        settings: instead of what ``Settings.read()`` finds.

    Nothing is sent before the first command; ``connect(...).health()`` tells at once whether a server is
    there. Raises ``ValueError`` for a URL that cannot be one, and ``ServerNotFound`` when ``embedded://`` finds
    no server program. A runner that starts several processes starts one embedded server and hands them
    its ``url``; each process that is given ``embedded://`` gets a server of its own.
    """
    settings = settings or Settings.read()
    if url is not None:
        settings = Settings(**{**settings.__dict__, "url": url})
    if Address.read(settings.url).kind == "embedded":
        return Connections(settings, EmbeddedServer.start())
    return Connections(settings)


class _Sentinels(Sentinel):
    """redis-py's sentinels, each asked once, the one that answered last before the others.

    redis-py swaps them in place, which two threads cannot do at once, and asks for all that they know of all primaries.
    The question here is the one that Sentinel has for clients, and names a new primary earlier.
    """

    def discover_master(self, service_name: str) -> Node:
        """The address of the primary. Raises ``MasterNotFoundError`` when no sentinel tells."""
        failures = []
        sentinels = self.sentinels
        for sentinel in sentinels:
            try:
                found: Any = sentinel.sentinel_get_master_addr_by_name(service_name)
            except UNAVAILABLE as error:
                failures.append(f"{type(error).__name__}: {error}")
                continue
            if found:
                if sentinel is not sentinels[0]:
                    self.sentinels = [sentinel, *(other for other in sentinels if other is not sentinel)]
                host, port = found
                return host.decode() if isinstance(host, bytes) else str(host), int(port)
            failures.append("one does not know the name")
        raise MasterNotFoundError(f"no sentinel names the primary of {service_name!r} ({'; '.join(failures)})")


def _at_risk(eviction: str) -> str:
    """What a policy of eviction may drop that is no cache."""
    whatever_has_a_ttl = "locks that are held, and limits"
    return (
        whatever_has_a_ttl if eviction.startswith("volatile-") else f"buffers of unflushed writes, {whatever_has_a_ttl}"
    )


def _times(profile: Profile) -> dict[str, Any]:
    """What a connection of redis-py is told about waiting. It never retries."""
    return {
        "socket_timeout": profile.answer_s,
        "socket_connect_timeout": profile.connect_s,
        "health_check_interval": profile.health_check_s,
        "retry": Retry(NoBackoff(), 0),
    }


def _owned(pool: ConnectionPool, circuit: Circuit | None) -> ThreadClient:
    client = ThreadClient(connection_pool=pool, circuit=circuit)
    client.auto_close_connection_pool = True
    return client


def _node_client(node: Node, options: dict[str, Any], circuits: Circuits | None) -> ThreadClient:
    host, port = node
    pool = ConnectionPool(**(options | {"host": host, "port": port}))
    return _owned(pool, circuits.of(named(node)) if circuits else None)


def _sentinel_client(
    where: Address, options: dict[str, Any], profile: Profile, circuit: Circuit | None
) -> ThreadClient:
    common = {name: value for name, value in options.items() if name not in ("host", "port", *_SENTINEL_OPTIONS)}
    secure = common.pop("connection_class", Connection) is SSLConnection
    own = {theirs: options[ours] for ours, theirs in _SENTINEL_OPTIONS.items() if ours in options}
    lookup = {name: value for name, value in common.items() if name not in ("username", "password", "db")}
    lookup |= {"socket_timeout": lookup["socket_timeout"] or profile.connect_s, "ssl": secure} | own
    sentinels = _Sentinels(where.nodes, sentinel_kwargs=lookup)  # type: ignore[no-untyped-call]
    return _owned(SentinelConnectionPool(where.service, sentinels, ssl=secure, **common), circuit)


def _options(where: Address, shown: str) -> dict[str, Any]:
    """The options of a URL, as redis-py reads them. Raises ``ValueError`` for one that no connection takes."""
    options: dict[str, Any] = parse_url(where.url)
    kind = options.get("connection_class", Connection)
    extra = {"max_connections"} | (_SENTINEL_OPTIONS.keys() if where.kind == "sentinel" else set())
    known = {name for one in kind.__mro__ for name in inspect.signature(one.__init__).parameters}
    known = known - {"self", "args", "kwargs"} | extra
    for name, _ in parse_qsl(urlsplit(where.url).query, keep_blank_values=True):
        if name == "decode_responses":
            raise ValueError(f"{shown!r}: Petiole stores bytes and reads them itself; leave decode_responses out")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "redis-py's connections take no such option"
            if name.startswith("ssl_") and kind is not SSLConnection:
                hint = "ssl_ options go with rediss://"
            raise ValueError(f"{shown!r}: unknown option {name!r}; {hint}")
    try:
        kind(**{name: value for name, value in options.items() if name not in ("connection_class", *extra)})
    except RedisError as error:  # a value that the connection itself checks
        raise ValueError(f"{shown!r} is not a Redis URL: {error}") from None
    return options
