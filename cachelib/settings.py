"""Settings: arguments first, then the environment, then defaults. Read once, checked, frozen, passed down."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Self
from urllib.parse import quote

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


_SHOWABLE = re.compile(r"(?:[^\s:/?#@\[\]]*|\[[0-9A-Fa-f:.]+\])(?::\d*)?(?:/[^?#@]*)?(?:\?[^#@]*)?")
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
