"""``Lock``: one holder at a time, for all processes.

One round trip to acquire, one to release. Who waits stands in a queue in Redis and is granted the lock by the release
before it, in the same script (``lua/_turns.lua``); it hears of that without asking (``wakeups.py``). The lease is
renewed for as long as the process lives (``keeper.py``), and the holder knows by its own clock when it may be lost
(``hold.py``).
"""

from ..cachelib.connections import Connections
from ..cachelib.durations import Duration, milliseconds
from .acquiring import Acquirable
from .hold import Terms, lease_of
from .inspecting import Inspected, inspect
from .turn_store import TurnStore

KIND = "lock"


def terms_of(ttl: Duration, renew: bool, max_hold: Duration | None) -> Terms:
    """The terms of a hold. Raises ``ValueError`` for those that make no sense."""
    lease_ms = lease_of(ttl)
    if not isinstance(renew, bool):
        raise TypeError(f"renew={renew!r} must be True or False")
    if max_hold is None:
        return Terms(lease_ms, renew)
    max_hold_ms = milliseconds(max_hold, "max_hold")
    if not renew:
        raise ValueError("max_hold ends renewals; with renew=False there are none, and ttl is the longest hold")
    if max_hold_ms < lease_ms:
        raise ValueError(f"max_hold={max_hold!r} is shorter than the lease, ttl={ttl!r}; make ttl shorter")
    return Terms(lease_ms, renew, max_hold_ms)


class Lock(Acquirable):
    """One holder at a time, for all processes.

    >>> with Lock(redis, "invoice:42", ttl=10) as hold:
    ...     charge(fence=hold.fence)
    >>> match Lock(redis, "report").try_acquire():
    ...     case Busy(retry_after): ...
    ...     case hold: ...

    Promises:

    - While its lease is valid, nobody else holds it. The lease is renewed every third of ``ttl`` as long as this
      process lives; when the process dies, the next one holds it within ``ttl``.
    - First come, first served. Who waits is woken within milliseconds, one for each release; a process that has died is
      passed over. While it waits it asks nothing, except once per lease whether the holder is still alive.
    - The holder learns of a loss (``hold.lost``, ``hold.on_lost``, ``hold.raise_if_lost``; the ``with`` block raises
      ``LockLost`` at its end) from its own clock, also when Redis does not answer. A lease that is gone is not made
      anew.
    - ``hold.fence`` rises with every hold, also after Redis has lost its keys, for it is at least the server's time in
      microseconds. Only the holder releases it. Without Redis nothing runs: ``LockUnavailable``.

    Non-promises: no lease can keep a process from going on after it was stopped for longer than ``ttl`` and before it
    looked at ``hold.lost``; what must not be done twice is checked by the fence (``hold.guard``, ``FencedStore``). What
    Redis forgets (a failover before a replica had it, an eviction, ``FLUSHALL``) is free at once, while the holder
    learns of it with its next renewal. A server whose clock is set back by more than two hours, or whose successor's
    clock is behind, may give a lower fence; one whose clock is set forward ends leases early.

    Safe to share between threads; a forked child holds nothing of what its parent holds.

    Arguments:
        redis: from ``connect``.
        name: what is locked.
        ttl: the lease: how soon others go on after a holder has died. From 0.1 s to an hour. All that lock one name had
            best use the same: who waits looks after the holder when the first lease that it knows of is over.
        renew: whether the lease is renewed; if not, the hold ends after ``ttl``.
        max_hold: how long it is renewed at most: a task that hangs holds nothing for ever.
        reentrant: whether the thread that holds it may acquire it again, by this very object; each acquire wants its
            release. Not for threads that serve several calls in turns while it is held (``asyncio.to_thread``). Without
            it, to wait inside of a ``with`` block that holds it is a ``LockReentered``, and not a wait without end.
        replicas: how many replicas must have confirmed an acquire (WAIT, for a second). It makes it less likely that a
            failover loses the lock, not impossible: the replica that is promoted may be another one.
        owner: who holds it, for those who look. Default: host and process id.
    """

    def __init__(
        self,
        redis: Connections,
        name: str,
        *,
        ttl: Duration = 30,
        renew: bool = True,
        max_hold: Duration | None = None,
        reentrant: bool = False,
        replicas: int = 0,
        owner: str | None = None,
    ) -> None:
        store = TurnStore(redis, KIND, name, capacity=1)
        super().__init__(
            store,
            f"lock {name!r}",
            1,
            terms_of(ttl, renew, max_hold),
            owner=owner,
            reentrant=reentrant,
            replicas=replicas,
        )
        self.name = name

    def __repr__(self) -> str:
        return f"<Lock {self.name!r} at {self._redis.address} ttl={self._terms.lease_ms / 1_000:g}s>"

    def inspect(self) -> Inspected:
        """Who holds it and who waits, since when, in one round trip. Raises redis-py's errors."""
        return inspect(self._store)

    def force_release(self) -> int:
        """Take it from whoever holds it; the next in the queue holds it at once, with a higher fence.

        For people who know that the holder is dead or does no harm. A holder that lives learns of it with its next
        renewal; what it writes until then only the fence can refuse. Returns how many held it. Raises redis-py's
        errors.
        """
        return self._store.clear()
