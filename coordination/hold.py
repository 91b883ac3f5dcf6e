"""What a successful acquire returns: a lease on something, which knows by its own clock when it may be over.

The invariant: ``lost`` is false only while the lease is known to be valid: it was confirmed by the server, and since
the moment before the confirmed request was sent less time has passed than the lease has (less one hundredth, by which
two clocks may differ in speed). So a holder that was stopped, starved or cut off finds out without asking anybody. What
was lost once stays lost.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from ..cachelib.circuit import UNAVAILABLE
from ..cachelib.counters import Counters
from ..cachelib.durations import Duration, milliseconds
from .entered import calling_frame
from .errors import LockLost, LockTimeout

if TYPE_CHECKING:
    from .keeper import Keeper
    from .turn_store import TurnStore

logger = logging.getLogger(__name__)

_CLOCKS_DIFFER = 0.01


SHORTEST_LEASE_MS, LONGEST_LEASE_MS = 100, 3_600_000

NOT_OURS = "the server says that its lease is over"
_NOT_CONFIRMED = "no renewal was confirmed in time"


def lease_of(ttl: Duration, name: str = "ttl") -> int:
    """A lease in milliseconds, of an option of that name.

    Raises ``ValueError`` for one that is too short to be renewed, or too long, and ``TypeError`` for what is none.
    """
    lease_ms = milliseconds(ttl, name)
    if not SHORTEST_LEASE_MS <= lease_ms <= LONGEST_LEASE_MS:
        raise ValueError(
            f"{name}={ttl!r}: a lease is from 0.1 s to an hour. It says how soon after a crash others go on; "
            "while the holder lives it is renewed, however long that is"
        )
    return lease_ms


def valid_for_s(lease_ms: float) -> float:
    """How long a lease may be relied on, from the moment before it was asked for."""
    return lease_ms * (1 - _CLOCKS_DIFFER) / 1_000


@dataclass(frozen=True, slots=True)
class Busy:
    """It is not free. False as a condition."""

    retry_after: float
    """Seconds until the first lease runs out, if its holder is dead; a living one may keep it longer, or give it back
    at any moment."""
    ahead: int
    """How many wait."""
    what: str = "it"
    """What is not free, for people: such as ``lock 'invoice:42'``."""

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> NoReturn:
        """Raise ``LockTimeout``: what is inside ``with lock.try_acquire():`` is for who holds it."""
        raise LockTimeout(self.what, 0.0)

    def __exit__(self, *_: object) -> None:
        """Never reached."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How long something is held, and how it is kept."""

    lease_ms: int
    renew: bool = True
    max_hold_ms: int | None = None


class Hold:
    """A lease on a lock, or on permits of a semaphore. Made by ``acquire``; true as a condition.

    >>> with Lock(redis, "invoice:42") as hold:
    ...     charge(fence=hold.fence)
    ...     hold.raise_if_lost()

    Promises: while ``lost`` is false, the lease was valid when it was asked (see the module); ``fence`` is above that
    of every earlier hold of the same lock. ``release`` frees nothing that somebody else holds, however late it comes.

    Non-promises: between a look at ``lost`` and the next line time may pass, any amount of it. What must never be done
    twice is checked where it is written, by the fence: ``guard``, ``FencedStore``.
    """

    def __init__(
        self,
        store: "TurnStore",
        keeper: "Keeper",
        what: str,
        token: str,
        fence: int,
        deadline: float,
        terms: Terms,
        counters: Counters,
        units: int = 1,
    ) -> None:
        self.what = what
        """What is held, for people: such as ``lock 'invoice:42'``."""
        self.token = token
        """Tells this hold from all others."""
        self.fence = fence
        """A number above that of every earlier hold of the same thing."""
        self.units = units
        """How many permits."""
        self.frame: FrameType | None = None
        """The function whose ``with`` block holds it, while it does."""
        self.began = time.monotonic()
        self.renewal_due = 0.0
        self.store = store
        self._keeper = keeper
        self._terms = terms
        self._counters = counters
        self._deadline = deadline
        self._reason: str | None = None
        self._released = False
        self._entered = 1
        self._callbacks: list[Callable[[Hold], None]] = []
        self._plan_renewal(terms.lease_ms)
        keeper.keep(self)

    def __repr__(self) -> str:
        state = "lost" if self._reason else "released" if self._released else f"{self.remaining:.1f} s"
        return f"<Hold {self.what} fence={self.fence} [{state}]>"

    def __bool__(self) -> bool:
        return True

    @property
    def deadline(self) -> float:
        """Until when it is held for certain, by ``time.monotonic()``; each renewal moves it."""
        return self._deadline

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; 0 when it is not held any more."""
        return 0.0 if self.lost or self._released else max(0.0, self._deadline - time.monotonic())

    @property
    def lost(self) -> bool:
        """Whether somebody else may hold it by now. Asks nobody but the clock. Not of one that was released."""
        if self._reason is not None:
            return True
        if self._released or time.monotonic() < self._deadline:
            return False
        self.lose(_NOT_CONFIRMED)  # another thread may be in the middle of it: the clock has said it all the same
        return True

    @property
    def held(self) -> bool:
        """Whether it is held: neither lost nor released."""
        return not self._released and not self.lost

    def raise_if_lost(self) -> None:
        """Raise ``LockLost`` when somebody else may hold it by now. Costs no round trip."""
        if self.lost:
            raise LockLost(self.what, self.fence, self._reason or _NOT_CONFIRMED)

    def on_lost(self, callback: Callable[["Hold"], None]) -> None:
        """Have a function called with this hold, once, when it is lost; in a thread of its own.

        At once where it is lost already. Not called when it is released. What it raises is logged.
        """
        self._callbacks.append(callback)
        if self._reason is not None:
            self._call_back()

    def extend(self, ttl: Duration | None = None) -> None:
        """Begin the lease anew, now; with one that is renewed by itself there is no need.

        Arguments:
            ttl: how long from now, ``max_hold`` at most. Default: the lease it was acquired with.

        Raises ``LockLost`` when it is not held any more, and ``LockUnavailable`` when Redis does not answer.
        """
        lease_ms = self._terms.lease_ms if ttl is None else lease_of(ttl)
        self.raise_if_not_held()
        self._keeper.extend(self, min(lease_ms, self._most_ms(time.monotonic())))
        self.raise_if_not_held()

    def release(self) -> bool:
        """Give it back. May be repeated, and never raises because Redis is away.

        Returns whether it was held until now; false when it was lost, or released before. Where Redis does not answer
        it is given back as soon as it does, or ends with its lease.
        """
        try:
            if self._released:
                return False
            if self._entered > 1 and not self.lost:
                self._entered -= 1
                return True
            return self._release()
        except BaseException:  # out of a signal handler, say: nobody may come back to it
            self.abandon()
            raise

    def _release(self) -> bool:
        was_valid = not self.lost
        self._counters.add("hold_us", int((time.monotonic() - self.began) * 1_000_000))
        if not self._keeper.let_go(self):
            self._released = True
            self._counters.add("overages")
            return False
        self._released, self.frame = True, None
        try:
            held = self.store.give(self.token)
        except (*UNAVAILABLE, RuntimeError) as error:  # RuntimeError: the connections were closed
            logger.debug("%s is given back later: %s", self.what, error)
            self._give_back()
            return was_valid
        if not held:
            self._was_lost(NOT_OURS)
        return held

    def __enter__(self) -> Self:
        self.frame = self.frame or calling_frame()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it. Raises ``LockLost`` when it was lost meanwhile and nothing else is being raised."""
        try:
            was_lost = not (self._released and self._reason is None) and not self.release()
        except BaseException:
            self.abandon()
            raise
        if was_lost and error is None:
            raise LockLost(self.what, self.fence, self._reason or _NOT_CONFIRMED)

    def guard(self, connection: Any) -> None:
        """See to it, at the beginning of a SQL transaction, that no later hold has written before it.

        >>> with engine.begin() as connection:
        ...     hold.guard(connection)
        ...     connection.execute(update(invoices).values(paid=True))

        Arguments:
            connection: SQLAlchemy's, in a transaction; or a session.

        Promise: of two transactions that are guarded by holds of one lock, that of the earlier hold does not commit
        after that of the later one. See ``fencing.py``, also for columns of your own and for Redis.

        Raises ``StaleFence`` when a later hold was here.
        """
        from .fencing import guard

        guard(connection, self.store.name, self.fence)

    # What follows is for the modules beside this one.

    def reenter(self) -> Self:
        """The same thread has acquired it once more."""
        self._entered += 1
        return self

    def raise_if_not_held(self) -> None:
        """Raise ``LockLost`` when it was lost or given back."""
        self.raise_if_lost()
        if self._released:
            raise LockLost(self.what, self.fence, "it was given back")

    def _plan_renewal(self, lease_ms: int) -> None:
        """When it is to be renewed next: when a third of its lease has gone; never, if it is not."""
        due = self._deadline - min(lease_ms, self._terms.lease_ms) * 2 / 3_000
        last_one = self._ends_at is not None and self._deadline >= self._ends_at - 0.05
        self.renewal_due = due if self._terms.renew and not last_one else self._deadline

    @property
    def _ends_at(self) -> float | None:
        """When it is renewed no more."""
        return None if self._terms.max_hold_ms is None else self.began + self._terms.max_hold_ms / 1_000

    def postpone_renewal(self, now: float) -> None:
        """A renewal was not answered."""
        self.renewal_due = min(now + max(0.02, self._terms.lease_ms / 20_000), self._deadline)

    def next_lease_ms(self, now: float) -> int:
        """For how long it is to be renewed at this moment, never for less than is left; 0 when it is not."""
        if not self._terms.renew:
            return 0
        return min(max(self._terms.lease_ms, int((self._deadline - now) * 1_000)), self._most_ms(now))

    def _most_ms(self, now: float) -> int:
        """How much longer it may be held."""
        return LONGEST_LEASE_MS if self._ends_at is None else max(0, int((self._ends_at - now) * 1_000))

    def _give_back(self) -> None:
        """Have the keeper give it back, as long as the server may think that it is held."""
        self.frame = None
        left_ms = int((self._deadline - time.monotonic()) * 1_000)
        self._keeper.give_back(self.store, self.token, max(self._terms.lease_ms, left_ms))

    @property
    def full_lease_ms(self) -> int:
        """The lease it was acquired with."""
        return self._terms.lease_ms

    def expect_until(self, deadline: float) -> None:
        """A request is sent that ends it then, or earlier than it would: from now on it may not be relied on longer."""
        self._deadline = min(self._deadline, deadline)

    def renewed(self, deadline: float, lease_ms: int) -> None:
        """The server has confirmed it until then."""
        self._deadline = deadline
        self._plan_renewal(lease_ms)

    def lose(self, reason: str) -> None:
        """It is not held any more, and was not released."""
        if self._keeper.let_go(self):
            if self._ends_at is not None and self._deadline >= self._ends_at - 0.05 - self._terms.lease_ms / 50_000:
                reason = f"it was held for max_hold ({(self._terms.max_hold_ms or 0) / 1_000:g} s)"
            self._give_back()
            self._was_lost(reason)

    def _was_lost(self, reason: str) -> None:
        self._reason = reason
        self._counters.add("losses")
        logger.warning("%s (fence %d) was lost: %s", self.what, self.fence, reason)
        self._call_back()

    def abandon(self) -> None:
        """Renew it no more, and give it back soon: nobody will release it."""
        self._keeper.let_go(self)
        if self._reason is None:
            self._released = True
            self._give_back()

    def given_back(self) -> None:
        """Somebody else has told the server that it is held no more."""
        if self._keeper.let_go(self):
            self._released, self.frame = True, None

    def forked(self) -> None:
        """This is a child's copy: the parent holds it."""
        self._reason = "this process was forked; its parent holds it"
        self._callbacks = []

    def _call_back(self) -> None:
        while self._callbacks:
            try:
                callback = self._callbacks.pop(0)
            except IndexError:  # another thread was first
                return
            self._keeper.calling_back.start(partial(callback, self))
