"""Counters: in one process, and shared by all.

What happens on every request is counted in the process; what happens seldom (a flush, a warming, an
invalidation) is counted in Redis, where every process and Flower can read it.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from threading import Lock

from . import keys
from .connections import UNAVAILABLE, Connections
from .forks import renew_after_fork
from .scripts import load

logger = logging.getLogger(__name__)

_KEPT_MS = 7 * 86_400_000  # counters that nobody touched for a week say nothing any more

_ADD = load(__package__, "counters_add", int)


class Counters:
    """Named counts of this process. Threads may add at once."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = Lock()
        renew_after_fork(self)

    def add(self, name: str, amount: int = 1) -> None:
        """Add to one count."""
        with self._lock:
            self._counts[name] += amount

    def renew_after_fork(self) -> None:
        """Make the lock anew. The counts go on from the parent's."""
        self._lock = Lock()

    def read(self) -> dict[str, int]:
        """All counts so far."""
        with self._lock:
            return dict(self._counts)


class SharedCounters:
    """Named counts that all processes share, kept in Redis for a week after the last change.

    They inform; nothing is decided by them. A count that cannot be sent is logged and lost.
    """

    def __init__(self, redis: Connections, kind: str, name: str) -> None:
        self._redis = redis
        self._key = keys.counters(kind, name)

    def __repr__(self) -> str:
        return f"<SharedCounters {self._key}>"

    def add(self, **amounts: int) -> None:
        """Add to several counts, in one round trip."""
        try:
            _ADD(
                self._redis.coordination,
                counters=self._key,
                ttl_ms=_KEPT_MS,
                fields=list(amounts),
                amounts=list(amounts.values()),
            )
        except UNAVAILABLE as error:
            logger.warning("counters %s were not sent: %s; lost: %s", self._key, error, amounts)

    def read(self) -> Mapping[str, int]:
        """All counts so far. Raises redis-py's errors."""
        stored: dict[bytes, bytes] = self._redis.coordination.execute_command("HGETALL", self._key)
        return {name.decode(): int(count) for name, count in stored.items()}
