"""How often each call of a function is asked for, over all processes: what a warmer decides by.

Counted in the process and sent in bundles, so that a request pays next to nothing. The ranking halves with
each warming: what was popular an hour ago and is not any more fades out by itself.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import msgspec

from .calls import is_plain
from .connections import UNAVAILABLE, Connections
from .forks import renew_after_fork
from .scripts import load

logger = logging.getLogger(__name__)

_SEND_AFTER_CALLS = 64
_SEND_AFTER_S = 1.0
_KEPT_MS = 86_400_000  # a ranking that nobody added to for a day
_LONGEST_CALL_BYTES = 1_024
_RANKED = 10  # times what is warmed: what stands below may still rise

_ADD = load(__package__, "popularity_add", int)
_TAKE = load(__package__, "popularity_take", list)

Call = tuple[list[Any], dict[str, Any]]


class Popularity:
    """The ranking of the calls of one function.

    Calls whose arguments are not all text, numbers, booleans or None are not ranked: they could not be
    repeated from what Redis holds. Informs the warmer only; what cannot be sent is dropped.
    """

    def __init__(self, redis: Connections, key: str, *, top: int) -> None:
        self._redis = redis
        self._key = key
        self.top = top
        self._calls: Counter[bytes] = Counter()
        self._noted = 0
        self._sent_at = time.monotonic()
        self._lock = Lock()
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"<Popularity {self._key} [{self._noted} not sent]>"

    def note(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Count one call; now and then send what was counted."""
        call = _call(arguments, keywords)
        if call is None:
            return
        now = time.monotonic()
        with self._lock:
            self._calls[call] += 1
            self._noted += 1
            if self._noted < _SEND_AFTER_CALLS and now - self._sent_at < _SEND_AFTER_S:
                return
            calls, self._calls, self._noted, self._sent_at = self._calls, Counter(), 0, now
        self._send(calls)

    def send(self) -> None:
        """Send what was counted now."""
        with self._lock:
            calls, self._calls, self._noted = self._calls, Counter(), 0
        if calls:
            self._send(calls)

    def take(self) -> list[Call]:
        """The most requested calls, most requested first, and halve the ranking. Raises redis-py's errors."""
        found = _TAKE(self._redis.coordination, ranking=self._key, top=self.top, kept=self.top * _RANKED)
        calls = []
        for raw in found:
            try:
                calls.append(msgspec.json.decode(raw, type=tuple[list[Any], dict[str, Any]]))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                logger.warning("%s holds %r, which is no call; skipped", self._key, raw[:80])
        return calls

    def renew_after_fork(self) -> None:
        """Make the lock anew; what the parent has counted, the parent sends."""
        self._lock = Lock()
        self._calls, self._noted = Counter(), 0

    def _send(self, calls: Mapping[bytes, int]) -> None:
        try:
            _ADD(
                self._redis.cache,
                ranking=self._key,
                ttl_ms=_KEPT_MS,
                calls=list(calls),
                counts=list(calls.values()),
            )
        except UNAVAILABLE as error:
            logger.warning("ranking %s not sent: %s", self._key, error)


def _call(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bytes | None:
    """A call as it is ranked; None when it could not be repeated from that."""
    if not all(is_plain(value) for value in (*arguments, *keywords.values())):
        return None
    try:
        call = msgspec.json.encode([list(arguments), dict(keywords)], order="sorted")
    except (TypeError, ValueError, OverflowError):  # lone surrogates
        return None
    return call if len(call) <= _LONGEST_CALL_BYTES else None
