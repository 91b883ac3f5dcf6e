"""Invalidations that Redis has not heard of yet.

What could not be removed would be served when Redis is back. So it is remembered here, and sent by a thread until
Redis has it; as long as it is not sent, this process serves nothing of it. What is remembered is bounded: beyond that,
the whole namespace is remembered instead, which is one thing. It lives in this process alone: other processes may serve
the old value until it is sent, and it is lost with the process (said in the log). Who needs more sends a Celery task.
"""

import atexit
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from weakref import WeakSet

from .connections import UNAVAILABLE, Connections
from .forks import renew_after_fork

logger = logging.getLogger(__name__)

MOST = 10_000
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


@dataclass(slots=True)
class Unsent:
    """What is to be invalidated. The dicts keep an order and no doubles."""

    keys: dict[str, None] = field(default_factory=dict)
    tags: dict[str, None] = field(default_factory=dict)
    expired: dict[str, None] = field(default_factory=dict)
    """Keys whose entries are to become stale."""
    patterns: dict[str, None] = field(default_factory=dict)
    everything: bool = False

    def __len__(self) -> int:
        return len(self.keys) + len(self.tags) + len(self.expired) + len(self.patterns) + self.everything

    def add(self, other: "Unsent") -> None:
        """Remember more; the whole namespace when it becomes too much."""
        self.keys |= other.keys
        self.tags |= other.tags
        self.expired |= other.expired
        self.patterns |= other.patterns
        self.everything |= other.everything
        if len(self) > MOST:
            self.keys, self.tags, self.expired, self.patterns, self.everything = {}, {}, {}, {}, True

    def covers(self, key: str, tags: Iterable[str]) -> bool:
        """Whether an entry may be one of those. A pattern may mean any."""
        if self.everything or self.patterns:
            return True
        return key in self.keys or key in self.expired or not self.tags.keys().isdisjoint(tags)


class Remembered:
    """The unsent invalidations of one cache in this process.

    Arguments:
        send: tells Redis of some; raises redis-py's errors. Telling twice does no harm.
        what: the cache, for the log.
    """

    def __init__(self, redis: Connections, send: Callable[[Unsent], object], what: str) -> None:
        self._redis = redis
        self._send = send
        self._what = what
        self._unsent = Unsent()
        self._sending = Unsent()
        self._sender = Lock()
        self._all_sent = Event()
        self._thread: Thread | None = None
        self._lock = Lock()
        self.any = False
        """Whether there are any: cheap enough to ask at each read."""
        renew_after_fork(self)
        _known.add(self)

    def __repr__(self) -> str:
        return f"<Remembered of {self._what} [{len(self)} not sent]>"

    def __len__(self) -> int:
        seen = self.seen()  # one may be in both: invalidated once more while it is sent
        return 0 if seen is None else len(seen)

    def covers(self, key: str, tags: Iterable[str] = ()) -> bool:
        """Whether an entry may be out of date because of what is not sent."""
        with self._lock:
            return self._unsent.covers(key, tags) or self._sending.covers(key, tags)

    def add(self, unsent: Unsent, error: BaseException) -> None:
        """Remember, and keep trying."""
        with self._lock:
            first = not self.any
            self._all_sent.clear()
            self._unsent.add(unsent)
            self.any = True
            if self._thread is None:
                thread = Thread(target=self._run, name="petiole-invalidations", daemon=True)
                try:
                    thread.start()
                    self._thread = thread
                except RuntimeError as none:  # the system has none for us; the next one tries again
                    logger.error("%s: no thread to send invalidations with: %s", self._what, none)
        if first:
            logger.warning("%s: Redis was not told of an invalidation (%s); it is remembered", self._what, error)

    def send(self) -> bool:
        """Tell Redis now. Returns whether nothing is left; raises redis-py's errors."""
        with self._sender:
            with self._lock:
                # Apart from what is added from now on, which this sending may come too early for; and still there for
                # ``covers``, because whoever reads meanwhile must not be served it.
                self._sending.add(self._unsent)
                self._unsent = Unsent()
            self._send(self._sending)
            with self._lock:
                self._sending = Unsent()
                self.any = bool(self._unsent)
                if not self.any:
                    self._all_sent.set()  # the thread need not wait for its next try
                return not self.any

    def seen(self) -> Unsent | None:
        """What Redis has not heard of at this moment; None when there is nothing."""
        if not self.any:
            return None
        with self._lock:
            seen = Unsent()
            seen.add(self._sending)
            seen.add(self._unsent)
            return seen

    def renew_after_fork(self) -> None:
        """What the parent remembers, the parent sends."""
        self._lock, self._sender, self._all_sent = Lock(), Lock(), Event()
        self._unsent, self._sending, self._thread, self.any = Unsent(), Unsent(), None, False

    def at_exit(self) -> None:
        """Try once more, or say what is lost."""
        if self.any and not self._redis.closed:
            with suppress(*UNAVAILABLE, RuntimeError):
                self.send()
        self._say_what_is_lost()

    def _run(self) -> None:
        pause_s, all_sent = _FIRST_PAUSE_S, self._all_sent
        while not self._redis.closed:
            all_sent.wait(pause_s)
            try:
                self.send()
            except (*UNAVAILABLE, RuntimeError):  # RuntimeError: closed between the two lines
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)
                continue
            except Exception:
                logger.exception("%s: %s cannot be sent, and is given up", self._what, _told(self._sending))
                with self._lock:
                    self._sending = Unsent()
                    self.any = bool(self._unsent)
            with self._lock:
                if not self.any:  # under the lock in which another would see that there is a thread
                    self._thread = None
                    break
        else:
            self._say_what_is_lost()
            return
        logger.warning("%s: Redis has been told of all invalidations now", self._what)

    def _say_what_is_lost(self) -> None:
        if self.any:
            left = Unsent()
            left.add(self._sending)
            left.add(self._unsent)
            logger.error("%s: Redis was never told of %d invalidations: %s", self._what, len(left), _told(left))


def _told(unsent: Unsent) -> str:
    """The first few, for the log."""
    some = [*unsent.tags, *unsent.keys, *unsent.expired, *unsent.patterns]
    return "everything" if unsent.everything else ", ".join(map(repr, some[:5])) + (", ..." if len(some) > 5 else "")


_known: "WeakSet[Remembered]" = WeakSet()


@atexit.register
def _at_exit() -> None:
    for remembered in list(_known):
        remembered.at_exit()
