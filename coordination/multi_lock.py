"""``MultiLock``: several names, all or none.

Made of plain locks: each name is the ``Lock`` of that name, so both kinds of callers exclude one another. The invariant
that keeps any two callers from waiting for each other: names are acquired in one order, the same in all processes, so
whoever holds the highest name that anybody wants never waits for somebody who waits for it.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from ..cachelib.connections import Connections
from ..cachelib.durations import Duration, milliseconds
from .entered import Entered
from .errors import LockTimeout
from .hold import Busy, Hold
from .lock import Lock


class MultiHold:
    """Leases on several locks, as one. Made by ``MultiLock.acquire``; true as a condition.

    >>> with MultiLock(redis, ["account:7", "account:9"]) as hold:
    ...     transfer(fences=hold.fences)
    ...     hold.raise_if_lost()

    It is lost when any of its locks is; the others stay held until ``release``. Promises and non-promises of each are
    those of ``Hold``.
    """

    def __init__(self, holds: Mapping[str, Hold]) -> None:
        self.holds = holds
        """The hold of each name."""

    def __repr__(self) -> str:
        state = "lost" if self.lost else "held" if self.held else "released"
        return f"<MultiHold {list(self.holds)} [{state}]>"

    def __bool__(self) -> bool:
        return True

    @property
    def fences(self) -> dict[str, int]:
        """The fence of each name: above that of every earlier hold of that name."""
        return {name: hold.fence for name, hold in self.holds.items()}

    @property
    def deadline(self) -> float:
        """Until when all are held for certain, by ``time.monotonic()``; renewals move it."""
        return min(hold.deadline for hold in self.holds.values())

    @property
    def lost(self) -> bool:
        """Whether somebody else may hold one of them by now. Asks nobody but the clock."""
        return any(hold.lost for hold in self.holds.values())

    @property
    def held(self) -> bool:
        """Whether all are held: none was lost, and none released."""
        return all(hold.held for hold in self.holds.values())

    def raise_if_lost(self) -> None:
        """Raise ``LockLost``, with the name, when somebody else may hold one of them by now. Costs no round trip."""
        for hold in self.holds.values():
            hold.raise_if_lost()

    def on_lost(self, callback: Callable[["MultiHold"], None]) -> None:
        """Have a function called with this hold, once, when the first of its locks is lost; in a thread of its own.

        At once where one is lost already. Not called when it is released. What it raises is logged.
        """
        first = threading.Lock()

        def one_lost(_: Hold) -> None:
            if first.acquire(blocking=False):
                callback(self)

        for hold in self.holds.values():
            hold.on_lost(one_lost)

    def release(self) -> bool:
        """Give all of them back, the last first. May be repeated, and never raises because Redis is away.

        Returns whether all were held until now.
        """
        released: list[bool] = []
        with ExitStack() as rest:  # which goes on with the others when one is interrupted
            for hold in self.holds.values():
                rest.callback(lambda one: released.append(one.release()), hold)
        return all(released)

    def abandon(self) -> None:
        """Give all back soon: nobody will come back to it."""
        for hold in self.holds.values():
            hold.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release all. Raises ``LockLost`` when one was lost meanwhile and nothing else is being raised."""
        if not self.release() and error is None:
            self.raise_if_lost()


class MultiLock:
    """Several names, all or none, for all processes.

    >>> with MultiLock(redis, ["account:7", "account:9"], ttl=10) as hold:
    ...     transfer(fences=hold.fences)

    Promises: while its leases are valid, nobody else holds any of the names, by ``MultiLock`` or by the ``Lock`` of
    that name. Callers of ``MultiLock`` never wait for each other in a circle, whatever their names and their order:
    names are acquired in one order, without duplicates. When one is not had in time, or anything is raised, all are
    given back. For each name first come is first served.

    Non-promises: it is not had in one moment. It costs a round trip for each name, and while it waits for one name it
    keeps those before it from others. (On one server one script could take all at once; on a Cluster names are in
    different slots, which no script reaches together, and a lock that works in one place only would be a trap.) Whoever
    holds one ``Lock`` and then acquires others, in an order of its own, may wait in a circle.

    Safe to share between threads; a forked child holds nothing of what its parent holds.

    Arguments:
        redis: from ``connect``.
        names: what is locked.
        ttl, max_hold, owner: as for ``Lock``, for each of them.
    """

    def __init__(
        self,
        redis: Connections,
        names: Iterable[str],
        *,
        ttl: Duration = 30,
        max_hold: Duration | None = None,
        owner: str | None = None,
    ) -> None:
        self.names = _in_order(names)
        """Without duplicates, in the order in which they are acquired."""
        self._redis = redis
        self._locks = {name: Lock(redis, name, ttl=ttl, max_hold=max_hold, owner=owner) for name in self.names}
        self._entered: Entered[MultiHold] = Entered()

    def __repr__(self) -> str:
        return f"<MultiLock {list(self.names)} at {self._redis.address}>"

    def acquire(self, timeout: Duration | None = None) -> MultiHold:
        """Hold all of them, waiting for them if need be.

        Arguments:
            timeout: how long to wait at most, for all together. Default: for ever.

        Raises ``LockTimeout``, with the name that was not free in time, ``LockReentered`` when this thread holds one of
        them already, ``LockUnavailable`` when Redis does not answer. Then none is held.
        """
        timeout_s = None if timeout is None else milliseconds(timeout, "timeout") / 1_000
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            held = self._acquire(until, timeout_s)
            if held is not None:
                return held

    def try_acquire(self) -> MultiHold | Busy:
        """Hold all of them if they are free now, in a round trip for each. Never overtakes those who wait.

        Raises ``LockUnavailable`` when Redis does not answer.
        """
        holds: dict[str, Hold] = {}
        with ExitStack() as undo:
            for name, lock in self._locks.items():
                hold = lock.try_acquire()
                if isinstance(hold, Busy):
                    return hold
                undo.callback(hold.release)
                holds[name] = hold
            undo.pop_all()
        return MultiHold(holds)

    def __enter__(self) -> MultiHold:
        return self._entered.enter(self.acquire)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release all. Raises ``LockLost`` when one was lost meanwhile and nothing else is being raised."""
        self._entered.leave(kind, error, trace)

    def _acquire(self, until: float | None, timeout_s: float | None) -> MultiHold | None:
        """One round. None when one was lost while others were waited for: then none is held, and the round is void."""
        holds: dict[str, Hold] = {}
        with ExitStack() as undo:
            for name, lock in self._locks.items():
                left_s = None if until is None else max(0.0, until - time.monotonic())
                try:
                    hold = lock.acquire_units(1, left_s)
                except LockTimeout as error:
                    raise LockTimeout(error.what, timeout_s or 0.0) from None
                undo.callback(hold.release)
                holds[name] = hold
            every = MultiHold(holds)
            if not every.held:
                return None
            undo.pop_all()
        return every


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    """The names in the order of all processes. Raises ``ValueError`` and ``TypeError`` for what are no names."""
    if isinstance(names, str | bytes):
        raise TypeError(f"names={names!r} must be several names: write [{names!r}], or use Lock")
    several = list(names)
    for name in several:
        if not isinstance(name, str):
            raise TypeError(f"a name must be text, not {type(name).__name__}: {name!r}")
    if not several:
        raise ValueError("names are empty: there is nothing to lock")
    return tuple(sorted({str.__str__(name) for name in several}))
