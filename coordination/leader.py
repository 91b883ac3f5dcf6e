"""``Leader``: of all processes that are candidates, one leads. When it ends, another does.

A thread that stands in the queue of a lock, and tells when it leads and when it does not any more. The invariant: every
``on_elected`` is followed by one ``on_lost``, in one thread, so never are two of them at work at once. Whether this
process leads is told by the hold's own clock, at any moment, and waits for no thread.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Condition, Event, Lock, Thread, get_ident
from types import TracebackType
from typing import Self

from ..cachelib.connections import UNAVAILABLE, Connections
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.forks import renew_after_fork
from .acquiring import Acquirable
from .errors import LockError
from .hold import Hold, Terms
from .inspecting import Inspected, inspect
from .lock import terms_of
from .turn_store import Taken, TurnStore, node_of
from .wakeups import wakeups_of

logger = logging.getLogger(__name__)

KIND = "leader"

_PAUSE_S = 1.0
"""So long at most a candidate waits before it tries again a server that is away."""


class _Stopped(Exception):
    """The candidate does not want to lead any more."""


class _Candidacy(TurnStore):
    """What the candidate says to Redis, until it is told to stop: the next question is not asked."""

    def __init__(self, redis: Connections, name: str) -> None:
        super().__init__(redis, KIND, name, capacity=1)
        self.stopping = False
        self._asking = 0
        self._told_at: tuple[str, str] | None = None

    @property
    def slot(self) -> int:
        """As of a ``TurnStore``. Raises ``_Stopped`` in the candidate's thread, which wants to know whom to ask."""
        if self.stopping and get_ident() == self._asking:
            raise _Stopped
        return super().slot

    def take(self, token: str, units: int, lease_ms: int, channel: str, label: str, least_fence: int = 0) -> Taken:
        """As a ``TurnStore``. Raises ``_Stopped``."""
        self._asking, self._told_at = get_ident(), (channel, token) if channel else None
        if self.stopping:
            raise _Stopped
        return super().take(token, units, lease_ms, channel, label, least_fence)

    def stop(self) -> None:
        """Ask nothing any more; who waits for an answer is told to ask, and so sees that it is over."""
        self.stopping = True
        if self._told_at is None:
            return
        (channel, token), slot = self._told_at, self.redis.slot(self.name)  # not ours, which raises in a callback
        with suppress(RuntimeError):  # the connections are closed: nobody waits any more
            try:
                node_of(self.redis, slot).publish(channel, f"{token} 0 0")
            except UNAVAILABLE:
                with suppress(*UNAVAILABLE):
                    wakeups_of(self.redis).line(slot).close()


class _Campaign:
    """One thread's life, from ``start`` to ``stop``."""

    def __init__(self, redis: Connections, name: str, terms: Terms, owner: str | None) -> None:
        self.store = _Candidacy(redis, name)
        self.lock = Acquirable(self.store, f"leadership {name!r}", 1, terms, owner=owner)
        self.wake = Event()
        self.thread: Thread | None = None


class Leader:
    """A candidate, and the leader when it is elected.

    >>> leader = Leader(redis, "scheduler", on_elected=start_scheduling, on_lost=stop_scheduling)
    >>> with leader:
    ...     serve()
    >>> if leader.is_leader:
    ...     tick(fence=leader.fence)

    Promises:

    - While its lease is valid, no other process leads. ``is_leader`` is told by this process's own clock, at once, also
      when Redis does not answer and when a callback is still at work.
    - Who is elected next stands in a queue: when the leader resigns, the first of those that live leads within
      milliseconds; when the leader dies, within ``ttl``. Candidates ask nothing but whether the leader lives, once per
      lease.
    - ``on_elected(hold)`` and ``on_lost(hold)`` are called in turns, by one thread, never both at once; what they raise
      is logged. ``on_lost`` comes after every end: a loss, ``resign`` and ``stop``.
    - After a loss, and when Redis is back, it is a candidate again. ``stop`` leaves no thread behind, and no place in
      the queue.

    Non-promises: those of ``Lock``. A process that was stopped for longer than ``ttl`` goes on where it was, until it
    looks at ``is_leader``: what must not be done twice is checked by the fence. ``on_lost`` is called after the loss,
    not before it, and waits for an ``on_elected`` that has not returned: begin work there, do not do it there.

    Safe to share between threads. A forked child is no candidate; it may ``start``.

    Arguments:
        redis: from ``connect``.
        name: of the office; candidates of one name compete. It is no ``Lock`` of that name.
        ttl: the lease: how soon another leads after the leader has died. From 0.1 s to an hour.
        on_elected, on_lost: called with the hold.
        owner: who leads, for those who look. Default: host and process id.
    """

    def __init__(
        self,
        redis: Connections,
        name: str,
        *,
        ttl: Duration = 10,
        on_elected: Callable[[Hold], None] | None = None,
        on_lost: Callable[[Hold], None] | None = None,
        owner: str | None = None,
    ) -> None:
        self.name = name
        self._redis = redis
        self._terms = terms_of(ttl, True, None)
        self._owner = owner
        self._on_elected = on_elected
        self._on_lost = on_lost
        self._campaign = self._new_campaign()
        self._ending: Thread | None = None
        self._hold: Hold | None = None
        self._ended = Event()
        self._starting = Lock()
        self._elected = Condition()
        renew_after_fork(self)

    def __repr__(self) -> str:
        state = "leads" if self.is_leader else "stopped" if self._campaign.thread is None else "candidate"
        return f"<Leader {self.name!r} at {self._redis.address} [{state}]>"

    @property
    def hold(self) -> Hold | None:
        """The hold of the office, while this process leads."""
        hold = self._hold
        return hold if hold is not None and hold.held else None

    @property
    def is_leader(self) -> bool:
        """Whether this process leads. Asks nobody but the clock."""
        return self.hold is not None

    @property
    def fence(self) -> int | None:
        """A number above that of every earlier leader, while this process leads."""
        hold = self.hold
        return None if hold is None else hold.fence

    def start(self) -> Self:
        """Become a candidate. Once more, it does nothing."""
        with self._starting:
            campaign, before = self._campaign, self._ending
            if campaign.thread is None:
                thread = Thread(target=self._run, args=(campaign, before), name="petiole-leader", daemon=True)
                thread.start()
                campaign.thread = thread
        return self

    def stop(self) -> None:
        """Lead no more, be no candidate any more, and wait for the callbacks that are at work. May be repeated.

        Where Redis hangs it takes some seconds.
        """
        with self._starting:
            campaign, runs = self._campaign, self._campaign.thread is not None
            if runs:
                self._campaign, self._ending = self._new_campaign(), campaign.thread
            ending = self._ending
        if runs:
            campaign.store.stop()
            self.resign()
            campaign.wake.set()
        if ending is not None and ending is not threading.current_thread():  # a callback does not wait for itself
            ending.join()

    def resign(self) -> bool:
        """Give up the office at once; the next candidate leads. This one stands at the end of the queue then.

        Work that must not go on beside the next leader is ended before. Returns whether this process led.
        """
        hold = self.hold
        if hold is None:
            return False
        released = hold.release()
        self._ended.set()
        return released

    def wait(self, timeout: Duration | None = None) -> bool:
        """Wait until this process leads. Returns whether it does.

        Arguments:
            timeout: how long at most. Default: for ever.
        """
        timeout_s = None if timeout is None else milliseconds(timeout, "timeout", zero_allowed=True) / 1_000
        with self._elected:
            return self._elected.wait_for(lambda: self.is_leader, timeout_s)

    def inspect(self) -> Inspected:
        """Who leads and who are the candidates, in one round trip. Raises redis-py's errors."""
        return inspect(self._campaign.store)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def renew_after_fork(self) -> None:
        """A child is no candidate."""
        self._starting, self._elected = Lock(), Condition()
        self._campaign, self._ending = self._new_campaign(), None
        self._hold = None

    def _new_campaign(self) -> _Campaign:
        return _Campaign(self._redis, self.name, self._terms, self._owner)

    def _run(self, campaign: _Campaign, before: Thread | None) -> None:
        if before is not None:  # a campaign that was stopped, from a callback perhaps that is still at work
            before.join()
        while not campaign.store.stopping:
            try:
                hold = campaign.lock.acquire()
            except _Stopped:
                return
            except (LockError, *UNAVAILABLE) as error:
                if self._redis.closed:
                    return
                logger.warning("%s", error)
            else:
                self._lead(campaign, hold)
                continue
            campaign.wake.wait(random.uniform(_PAUSE_S / 4, _PAUSE_S))
            campaign.wake.clear()

    def _lead(self, campaign: _Campaign, hold: Hold) -> None:
        """From the election to the end of it."""
        campaign.wake.clear()
        hold.on_lost(lambda _: campaign.wake.set())
        with self._elected:
            self._hold, self._ended = hold, campaign.wake
            self._elected.notify_all()
        if campaign.store.stopping:  # before the hold was to be seen
            hold.release()
            return
        logger.info("%s: elected, fence %d", campaign.lock.what, hold.fence)
        self._call(self._on_elected, hold)
        while hold.held:
            campaign.wake.wait(max(0.0, hold.deadline - time.monotonic()))
            campaign.wake.clear()
        self._call(self._on_lost, hold)

    def _call(self, callback: Callable[[Hold], None] | None, hold: Hold) -> None:
        if callback is None:
            return
        try:
            callback(hold)
        except Exception:
            logger.exception("leadership %r: a callback failed", self.name)
