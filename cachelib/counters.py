"""Counters: in one process, and shared by all.

What happens on every request is counted in the process; what happens seldom (a flush, a warming, an
invalidation) is counted in Redis, where every process and Flower can read it.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from threading import Lock, Thread, current_thread
from weakref import ref

from . import keys
from .connections import UNAVAILABLE, Connections
from .forks import renew_after_fork
from .scripts import load

logger = logging.getLogger(__name__)

_KEPT_MS = 7 * 86_400_000  # counters that nobody touched for a week say nothing any more

_ADD = load(__package__, "counters_add", int)


class _Mine(threading.local):
    """The counts of one thread, which it alone changes; so counting needs no lock."""

    def __init__(self, join: "Callable[[dict[str, int]], None]") -> None:
        self.counts: dict[str, int] = {}
        join(self.counts)


class Counters:
    """Named counts of this process. Threads may add at once."""

    _MANY_THREADS = 64

    def __init__(self) -> None:
        self._everyone: list[tuple[ref[Thread], dict[str, int]]] = []
        self._ended: Counter[str] = Counter()
        self._lock = Lock()
        self._mine = _Mine(self._join)
        renew_after_fork(self)

    def add(self, name: str, amount: int = 1) -> None:
        """Add to one count."""
        counts = self._mine.counts
        counts[name] = counts.get(name, 0) + amount

    def renew_after_fork(self) -> None:
        """Make the lock anew. The counts go on from the parent's."""
        self._lock = Lock()

    def read(self) -> dict[str, int]:
        """All counts so far."""
        with self._lock:
            total = self._ended.copy()
            for _, counts in list(self._everyone):
                total.update(dict(counts))
            return dict(total)

    def _join(self, counts: dict[str, int]) -> None:
        """Note the counts of a thread that begins; add up those of threads that have ended, when they are many."""
        with self._lock:
            if len(self._everyone) >= self._MANY_THREADS:
                for pair in list(self._everyone):
                    thread = pair[0]()
                    if thread is None or not thread.is_alive():
                        self._ended.update(pair[1])
                        self._everyone.remove(pair)
            self._everyone.append((ref(current_thread()), counts))


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
