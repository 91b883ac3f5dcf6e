"""Keeps what this process holds: one thread renews the leases of all locks, in batches, and sees which are lost.

A renewal is due when a third of the lease has passed, so two may fail. A hold whose deadline has come is lost before it
is renewed, never after: what somebody else may have held meanwhile is not ours again. What cannot be given back because
Redis is away, and what may have been granted to somebody who has left, is given back from here.

The thread begins with the first hold and ends when there has been none for a while. Taking and giving back a lock
within a third of its lease wakes nobody.
"""

import logging
import math
import time
from itertools import groupby
from threading import Event, RLock, Thread
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary, ref

from ..cachelib.circuit import UNAVAILABLE
from ..cachelib.connections import Connections
from ..cachelib.forks import renew_after_fork
from .calling_back import CallingBack
from .entered import is_running
from .errors import LockUnavailable
from .hold import NOT_OURS, Hold, valid_for_s
from .turn_store import TurnStore, renew, server_of
from .wakeups import wakeups_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

logger = logging.getLogger(__name__)

_BATCH = 100
_IDLE_ROUNDS = 10
_TRY_AGAIN_S = 0.05
_GIVE_AGAIN_S = 0.5
_LONGEST_PAUSE_S = 5.0


_Held = tuple[str, str]
"""What is held, and by which token: all that a task holds it holds by one."""


class _Orphan(NamedTuple):
    """What nobody holds, and the server may think that somebody does."""

    store: TurnStore
    until: float
    """When its lease has run out by itself."""
    repeatedly: bool
    """Whether a request may still be on its way that would take it."""
    due: float = 0.0


class Keeper:
    """Renews, and gives back, for one server."""

    def __init__(self, redis: Connections) -> None:
        self._redis = ref(redis)
        self._address = redis.address
        self._holds: dict[_Held, Hold] = {}  # whoever takes one out decides how it ended
        self._orphans: dict[_Held, _Orphan] = {}
        self.running_under: dict[str, FrameType] = {}
        """Of locks that another process renews for us: the functions that run under them."""
        self._thread: Thread | None = None
        self._wakes_at = math.inf
        self._pause_s = _LONGEST_PAUSE_S
        self._wake = Event()
        self._closed = False
        self._renewing = RLock()
        """Renewals, one after another: of two that cross each other the answers could come in another order."""
        self._lock = RLock()  # a signal handler may come in between
        self.calling_back = CallingBack()
        """Of those who want to know that something was lost."""
        redis.own(self)
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"<Keeper {self._address} [{len(self._holds)} held]>"

    def renew_after_fork(self) -> None:
        """What the parent holds, the parent holds: a child has none of it."""
        self._lock, self._renewing, self._wake = RLock(), RLock(), Event()
        self._thread, self._wakes_at = None, math.inf
        holds, self._holds, self._orphans, self.running_under = self._holds, {}, {}, {}
        for hold in holds.values():
            hold.forked()

    def keep(self, hold: Hold) -> None:
        """Renew a hold, and see when it is lost."""
        self._holds[hold.store.name, hold.token] = hold
        if hold.renewal_due < self._wakes_at:
            self._have_thread()

    def let_go(self, hold: Hold) -> bool:
        """Keep it no more. Whether it was kept: of several that ask, one is told so."""
        return self._holds.pop((hold.store.name, hold.token), None) is not None

    def waits_for_itself(self, store: TurnStore) -> bool:
        """Whether a function that is running on this very stack holds it."""
        for hold in list(self._holds.values()):
            if hold.store.name == store.name and (frame := hold.frame) is not None and is_running(frame):
                return True
        return self.runs_under(store)

    def runs_under(self, store: TurnStore) -> bool:
        """Whether a task whose gate holds it is running on this very stack."""
        frame = self.running_under.get(store.name)
        return frame is not None and is_running(frame)

    def undo(self, store: TurnStore, token: str, lease_ms: int, *, repeatedly: bool) -> None:
        """An acquire has ended with an exception: whatever came of it is nobody's."""
        hold = self._holds.get((store.name, token))
        if hold is not None:
            hold.abandon()
        self.give_back(store, token, lease_ms, repeatedly=repeatedly)

    def give_back(self, store: TurnStore, token: str, lease_ms: int, *, repeatedly: bool = False) -> None:
        """Give back what a token may hold, or its place in the queue, as soon as the server answers.

        Arguments:
            repeatedly: until its lease would be over: a request that takes it may still be on its way to a server
                that hangs.
        """
        known = self._orphans.get((store.name, token))
        repeatedly = repeatedly or (known is not None and known.repeatedly)
        self._orphans[store.name, token] = _Orphan(store, time.monotonic() + lease_ms / 1_000, repeatedly)
        self._have_thread()

    def closing(self) -> None:
        """The connections are going to be closed: all that is held is lost, and given back in one attempt."""
        self._closed = True
        redis = self._redis()
        if redis is not None:
            wakeups_of(redis).closing()  # first: nothing is to be granted to those who wait here
        for hold in list(self._holds.values()):
            hold.lose("its connections were closed")
        silent: set[object] = set()
        for held, orphan in list(self._orphans.items()):
            self._orphans.pop(held, None)
            server = server_of(redis, orphan.store.slot) if redis is not None else None
            if server not in silent:
                try:
                    orphan.store.give(held[1], briefly=True)
                except (*UNAVAILABLE, RuntimeError) as error:
                    logger.debug("%s ends with its lease: %s", orphan.store.name, error)
                    silent.add(server)

    def close(self) -> None:
        """The connections are closed: the thread ends."""
        self._orphans.clear()
        self._wake.set()

    def extend(self, hold: Hold, lease_ms: int) -> None:
        """Renew one hold at once, perhaps for longer."""
        redis = self._redis()
        if redis is None:
            raise RuntimeError("the connections are gone")
        with self._renewing:
            sent = time.monotonic()
            hold.expect_until(sent + valid_for_s(lease_ms))
            try:
                (held,) = renew(redis, [(hold.store.name, hold.token, lease_ms)])
            except UNAVAILABLE as error:
                raise LockUnavailable(hold.what, redis.address, error) from error
            self._answered(hold, held, sent, lease_ms)
        if hold.renewal_due < self._wakes_at:
            self._have_thread()

    def _have_thread(self) -> None:
        if self._closed:
            return
        with self._lock:
            self._wake.set()
            if self._thread is not None:
                return
            thread = Thread(target=self._run, args=(self._wake,), name="petiole-keeper", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError as error:  # the system has none for us: what is held ends with its lease
                logger.warning("no thread to renew leases with: %s", error)

    def _run(self, wake: Event) -> None:
        idle = 0
        while True:
            self._wakes_at = math.inf  # whoever comes from here on wakes us; all others are seen below
            wake_at = self._next_due()
            idle = 0 if self._holds or self._orphans else idle + 1
            if idle > _IDLE_ROUNDS and self._is_over():
                return
            self._wakes_at = wake_at
            wake.wait(max(0.0, wake_at - time.monotonic()))
            wake.clear()
            redis = self._redis()
            if redis is None or redis.closed:
                break
            silent: set[object] = set()  # servers that did not answer: one of them must not keep the others waiting
            self._renew_due(redis, silent)
            self._give_orphans_back(redis, silent)
            del redis
        self.closing()
        with self._lock:
            self._thread, self._wakes_at = None, math.inf

    def _is_over(self) -> bool:
        """Whether the thread may end. Under the lock under which another would see that there is one."""
        with self._lock:
            if self._holds or self._orphans:
                return False
            self._thread = None
            return True

    def _next_due(self) -> float:
        now = time.monotonic()
        holds = list(self._holds.values())
        if holds:
            self._pause_s = min(_LONGEST_PAUSE_S, *(hold.full_lease_ms / 3_000 for hold in holds))
        due = [min(hold.renewal_due, hold.deadline) for hold in holds]
        due += [orphan.due for orphan in list(self._orphans.values())]
        return min([*due, now + self._pause_s])

    def _give_orphans_back(self, redis: Connections, silent: set[object]) -> None:
        now = time.monotonic()
        for held, orphan in list(self._orphans.items()):
            server = server_of(redis, orphan.store.slot)
            if orphan.due > now or server in silent:
                continue
            try:
                orphan.store.give(held[1], briefly=True)
                again_s = _GIVE_AGAIN_S if orphan.repeatedly else math.inf
            except (*UNAVAILABLE, RuntimeError) as error:  # RuntimeError: closed meanwhile
                logger.debug("%s was not given back: %s", orphan.store.name, error)
                silent.add(server)
                again_s = _TRY_AGAIN_S
            if now + again_s < orphan.until:
                self._orphans[held] = orphan._replace(due=now + again_s)
            else:
                self._orphans.pop(held, None)

    def _renew_due(self, redis: Connections, silent: set[object]) -> None:
        now = time.monotonic()
        due: list[Hold] = []
        for hold in list(self._holds.values()):
            if hold.lost:  # which says so, and to whom it concerns
                continue
            if hold.renewal_due <= now + hold.full_lease_ms / 30_000:  # with those that are nearly due
                if hold.next_lease_ms(now):
                    due.append(hold)
                else:
                    hold.renewal_due = hold.deadline
        for batch in _batches(redis, due):
            server = server_of(redis, batch[0].store.slot)
            if server in silent:
                for hold in batch:
                    hold.postpone_renewal(time.monotonic())
                continue
            with self._renewing:
                if not self._renew(redis, batch):
                    silent.add(server)

    def _renew(self, redis: Connections, batch: "Sequence[Hold]") -> bool:
        """Renew several. Whether the server has answered."""
        sent = time.monotonic()
        leases_ms = [max(1, hold.next_lease_ms(sent)) for hold in batch]
        for hold, lease_ms in zip(batch, leases_ms, strict=True):
            hold.expect_until(sent + valid_for_s(lease_ms))
        try:
            wanted = [(hold.store.name, hold.token, ms) for hold, ms in zip(batch, leases_ms, strict=True)]
            answers = renew(redis, wanted)
        except (*UNAVAILABLE, RuntimeError) as error:
            logger.warning("%s and %d more were not renewed: %s", batch[0].what, len(batch) - 1, error)
            for hold in batch:
                hold.postpone_renewal(time.monotonic())
            return False
        for hold, lease_ms, held in zip(batch, leases_ms, answers, strict=True):
            self._answered(hold, held, sent, lease_ms)
        return True

    def _answered(self, hold: Hold, held: bool, sent: float, lease_ms: int) -> None:
        if (hold.store.name, hold.token) not in self._holds:
            return  # released or lost meanwhile
        if not held:
            hold.lose(NOT_OURS)
        elif not hold.lost:
            hold.renewed(sent + valid_for_s(lease_ms), lease_ms)


def _batches(redis: Connections, due: "Sequence[Hold]") -> "Iterator[Sequence[Hold]]":
    """So many at once, and on a Cluster only such as are in one slot."""
    by_slot = sorted(due, key=lambda hold: hold.store.slot) if redis.is_cluster else due
    for _, same_slot in groupby(by_slot, key=lambda hold: hold.store.slot):
        holds = list(same_slot)
        for start in range(0, len(holds), _BATCH):
            yield holds[start : start + _BATCH]


_keepers: "WeakKeyDictionary[Connections, Keeper]" = WeakKeyDictionary()


def keeper_of(redis: Connections) -> Keeper:
    """The keeper of a server in this process: one for all that is held there."""
    return _keepers.get(redis) or _keepers.setdefault(redis, Keeper(redis))
