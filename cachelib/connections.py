"""Connections to Redis: one URL, a client per profile, health, and a close that leaves nothing behind.

A cache must fail fast, a listener must wait for ever, and a write must be sent once: three different
settings of one client, and redis-py's defaults suit none of them (against a server that hangs they block
for a minute, and repeat what was sent). Hence the profiles. No profile retries: who may repeat a command
knows it, and does it.
"""

import time
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from .client import ThreadClient
from .durations import milliseconds
from .embedded import EmbeddedServer
from .errors import ServerUnavailable
from .forks import renew_after_fork
from .settings import Settings, without_password

UNAVAILABLE = (RedisError, OSError)
"""What redis-py raises when the server is away or hangs, the connection broke, or the server refuses: it has no memory
left, is a replica, cannot persist, is loading."""

_SCHEMES = ("redis", "rediss", "unix", "embedded")
_EVICTION_SAFE = ("noeviction", "volatile-")


@dataclass(frozen=True)
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


class Connections:
    """A Redis server, as the parts of Petiole reach it. Made by ``connect``; safe to share between threads.

    Connects on the first command, not before. Usable after a fork: the child makes connections of its own.
    Closing it ends every client that it gave out, and the embedded server if it started one.
    """

    def __init__(self, settings: Settings, server: EmbeddedServer | None = None) -> None:
        self.settings = settings
        self.url = server.url if server else settings.url
        self.address = without_password(self.url)
        self.cache_profile = Profile(
            "cache",
            answer_s=milliseconds(settings.cache_timeout, "cache_timeout") / 1_000,
            connect_s=milliseconds(settings.cache_timeout, "cache_timeout") / 1_000,
        )
        self._server = server
        self._clients: dict[Profile, redis.Redis] = {}
        self._lock = Lock()
        self._closed = False
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
                self._clients[profile] = ThreadClient.from_url(
                    self.url,
                    socket_timeout=profile.answer_s,
                    socket_connect_timeout=profile.connect_s,
                    **({} if self.url.startswith("unix:") else {"socket_keepalive": True}),
                    health_check_interval=profile.health_check_s,
                    retry=Retry(NoBackoff(), 0),
                    client_name=f"petiole-{profile.name}",
                )
            return self._clients[profile]

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
        """Ask the server how it is, in two round trips.

        Raises ``ServerUnavailable``, with the address that was tried, when it does not answer.
        """
        client = self.coordination
        try:
            started = time.perf_counter()
            client.ping()
            latency_ms = (time.perf_counter() - started) * 1_000
            facts: dict[str, Any] = client.info()
        except UNAVAILABLE as error:
            raise ServerUnavailable(self.address, error, doing="health check") from None
        valkey = facts.get("valkey_version")
        eviction = str(facts.get("maxmemory_policy", "unknown"))
        warnings = []
        if not eviction.startswith(_EVICTION_SAFE):
            warnings.append(
                f"maxmemory-policy is {eviction}: Redis may evict buffers that hold unflushed writes; "
                "use noeviction for them, and a server of its own for a cache that is to be evicted"
            )
        return Health(
            address=self.address,
            server=f"valkey {valkey}" if valkey else f"redis {facts.get('redis_version', 'unknown')}",
            latency_ms=round(latency_ms, 3),
            eviction=eviction,
            warnings=tuple(warnings),
        )

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Close every client, and stop the embedded server if there is one. May be called twice."""
        with self._lock:
            self._closed = True
            clients, self._clients = list(self._clients.values()), {}
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


def connect(url: str | None = None, *, settings: Settings | None = None) -> Connections:
    """Reach a Redis or Valkey server.

    >>> redis = connect("redis://localhost:6379/0")

    Arguments:
        url: ``redis://``, ``rediss://`` (TLS), ``unix://`` (socket) or ``embedded://``, which starts a server
            for this process alone, gone with it. Default: what ``Settings.read()`` finds.
        settings: instead of what ``Settings.read()`` finds.

    Nothing is sent before the first command; ``connect(...).health()`` tells at once whether a server is
    there. Raises ``ValueError`` for a URL that cannot be one, and ``ServerNotFound`` when ``embedded://`` finds
    no server program. A runner that starts several processes starts one embedded server and hands them
    its ``url``; each process that is given ``embedded://`` gets a server of its own.
    """
    settings = settings or Settings.read()
    if url is not None:
        settings = Settings(**{**settings.__dict__, "url": url})
    scheme, separator, _ = settings.url.partition("://")
    if not separator or scheme not in _SCHEMES:
        raise ValueError(
            f"{without_password(settings.url)!r} is not a Redis URL; "
            f"it starts with one of {', '.join(f'{s}://' for s in _SCHEMES)}"
        )
    if scheme == "embedded":
        return Connections(settings, EmbeddedServer.start())
    try:
        urlsplit(settings.url).port  # noqa: B018 - reading it is what checks it
    except ValueError:  # whose text may hold a part of the password
        raise ValueError(
            f"{without_password(settings.url)!r} is not a Redis URL: the port is no number; "
            "in a password, write / ? # @ : as %2F %3F %23 %40 %3A"
        ) from None
    return Connections(settings)
