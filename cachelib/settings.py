"""Settings: arguments first, then the environment, then defaults. Read once, checked, frozen, passed down.

Here a URL is taken apart too, and shown without its password.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from .durations import Duration, milliseconds


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where Redis is, and how long things are kept.

    >>> Settings(url="redis://cache.internal:6379/2", ttl_short="30s").ttl_short
    '30s'

    Arguments:
        url: of the Redis server; see ``connect`` for the schemes.
        ttl_short, ttl_medium, ttl_long, ttl_day: the four TTL classes. Seconds, ``timedelta`` or text.
        cache_timeout: how long a cache call may wait for Redis.

    Raises ``ValueError`` for a duration that is none.
    """

    url: str = "redis://localhost:6379/0"
    ttl_short: Duration = 60
    ttl_medium: Duration = 300
    ttl_long: Duration = 3_600
    ttl_day: Duration = 86_400
    cache_timeout: Duration = 0.05

    def __post_init__(self) -> None:
        for name in ("ttl_short", "ttl_medium", "ttl_long", "ttl_day", "cache_timeout"):
            milliseconds(getattr(self, name), name)

    def __repr__(self) -> str:
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "url")
        return f"Settings(url={without_password(self.url)!r}, {', '.join(shown)})"

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None, **arguments: Any) -> Self:
        """Settings from arguments, then from the environment, then defaults.

        The environment: ``REDIS_URL``, or ``REDIS_HOST``, ``REDIS_PORT``, ``REDIS_PASSWORD`` and ``REDIS_DB``;
        ``CACHE_TTL_SHORT``, ``CACHE_TTL_MEDIUM``, ``CACHE_TTL_LONG`` and ``CACHE_TTL_DAY`` in seconds or as
        text with units; ``CACHE_TIMEOUT`` likewise.

        Raises ``TypeError`` for an unknown argument, with the nearest known one, and ``ValueError`` for a
        value that does not fit, with the name of its variable.
        """
        known = [field.name for field in fields(cls)]
        for name in arguments.keys() - set(known):
            near = get_close_matches(name, known, n=1)
            raise TypeError(
                f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {known}")
            )
        environment = os.environ if environment is None else environment
        found: dict[str, Any] = {}
        if url := _url(environment):
            found["url"] = url
        for variable, name in _VARIABLES.items():
            if text := environment.get(variable):
                found[name] = _duration(text, variable)
        return cls(**(found | arguments))


_VARIABLES = {
    "CACHE_TTL_SHORT": "ttl_short",
    "CACHE_TTL_MEDIUM": "ttl_medium",
    "CACHE_TTL_LONG": "ttl_long",
    "CACHE_TTL_DAY": "ttl_day",
    "CACHE_TIMEOUT": "cache_timeout",
}


def _duration(text: str, variable: str) -> Duration:
    try:
        duration: Duration = float(text)
    except ValueError:
        duration = text
    milliseconds(duration, variable)
    return duration


def _url(environment: Mapping[str, str]) -> str | None:
    if url := environment.get("REDIS_URL"):
        return url
    host = environment.get("REDIS_HOST")
    if not host:
        return None
    port, database = environment.get("REDIS_PORT") or "6379", environment.get("REDIS_DB") or "0"
    for variable, text in (("REDIS_PORT", port), ("REDIS_DB", database)):
        if not text.isdecimal():
            raise ValueError(f"{variable}={text!r} is not a whole number")
    password = quote(environment.get("REDIS_PASSWORD") or "", safe="")
    if ":" in host:  # IPv6
        host = f"[{host}]"
    return f"redis://:{password}@{host}:{port}/{database}" if password else f"redis://{host}:{port}/{database}"


@dataclass(frozen=True)
class Address:
    """Where a URL points, taken apart and checked."""

    kind: Literal["embedded", "server", "cluster", "sentinel"]
    nodes: tuple[tuple[str, int], ...] = ()
    """Hosts and ports of a cluster's nodes or of sentinels, to ask first."""
    service: str = ""
    """What the sentinels call the primary."""
    url: str = field(default="", repr=False)
    """A URL that redis-py reads, with all that is common to the connections; the host is the first node's."""

    @classmethod
    def read(cls, url: str) -> Self:
        """Take a URL apart. Raises ``ValueError``, without the password, for one that cannot be."""
        scheme, separator, rest = url.partition("://")
        if not separator or scheme not in SCHEMES:
            raise ValueError(
                f"{without_password(url)!r} is not a Redis URL; it starts with one of "
                + ", ".join(f"{known}://" for known in SCHEMES)
            )
        if scheme == "embedded":
            return cls("embedded")
        first, plus, kind = scheme.partition("+")
        if not plus:
            _port(url, url)
            return cls("server", url=url)
        place, *_ = re.split(r"[/?#]", rest, maxsplit=1)
        who, at, where = place.rpartition("@")
        path, _, query = rest[len(place) :].partition("?")
        default_port = 6379 if kind == "cluster" else 26379
        nodes = tuple(_node(text, default_port, url) for text in where.split(","))
        service, database = "", path.strip("/") or "0"
        if kind == "sentinel":
            service, _, database = path.strip("/").partition("/")
            if not service:
                raise ValueError(
                    f"{without_password(url)!r} does not say which primary: "
                    "give its name as the sentinels know it, such as redis+sentinel://host:26379/mymaster/0"
                )
        options = dict(parse_qsl(query, keep_blank_values=True))
        for text in (database or "0", options.get("db", "0")):
            if not text.isdecimal():
                raise ValueError(f"{without_password(url)!r} is not a Redis URL: the database is no number")
            if kind == "cluster" and int(text):
                raise ValueError(f"{without_password(url)!r}: a cluster has no databases but 0; leave the number out")
        host, port = nodes[0]
        shown = f"[{host}]" if ":" in host else host
        return cls(
            "cluster" if kind == "cluster" else "sentinel",
            nodes,
            unquote(service),
            f"{first}://{who}{at}{shown}:{port}/{database or 0}" + (f"?{query}" if query else ""),
        )


SCHEMES = (
    *("redis", "rediss", "unix", "embedded"),
    *("redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel"),
)


def _node(text: str, default_port: int, url: str) -> tuple[str, int]:
    if not re.fullmatch(r"(?:[^\s:/?#@\[\]]+|\[[0-9A-Fa-f:.]+\])(?::\d+)?", text):
        raise ValueError(
            f"{without_password(url)!r} is not a Redis URL: hosts are written host:port, with commas between; "
            "in a password, write / ? # @ : as %2F %3F %23 %40 %3A"
        )
    host, port = _port(f"//{text}", url)
    return unquote(host), port if port is not None else default_port


def _port(text: str, url: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(text)
        return parts.hostname or "", parts.port
    except ValueError:  # whose text may hold a part of the password
        raise ValueError(
            f"{without_password(url)!r} is not a Redis URL: the port is no number up to 65535; "
            "in a password, write / ? # @ : as %2F %3F %23 %40 %3A"
        ) from None


_HOST = r"(?:[^\s:/?#@\[\],]*|\[[0-9A-Fa-f:.]+\])(?::\d*)?"
_SHOWABLE = re.compile(rf"{_HOST}(?:,{_HOST})*(?:/[^?#@]*)?(?:\?[^#@]*)?")
_SECRET = re.compile(r"(?i)([?&][^=&]*(?:passw|secret|token|user|%)[^=&]*)=[^&]*")


def without_password(url: str) -> str:
    """A URL as it may be shown: without the password, wherever it stands, and also where it broke the URL."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    who, at, where = rest.rpartition("@")
    if not _SHOWABLE.fullmatch(where):
        return f"{scheme}{separator}***"
    user = who.partition(":")[0]
    shown = f"{user}:***@" if ":" in who else f"{who}@" if at else ""
    if re.search(r"[/?#\s]", user) or (at and not separator):
        shown = "***@"
    return scheme + separator + shown + _SECRET.sub(r"\1=***", where)
