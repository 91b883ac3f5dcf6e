"""``Semaphore``: so many permits, each leased to one holder. Scripts, queue and renewal are those of ``Lock``."""

from types import TracebackType

from ..cachelib.connections import Connections
from ..cachelib.durations import Duration, milliseconds
from .acquiring import Acquirable
from .hold import Busy, Hold
from .inspecting import Inspected, inspect
from .lock import terms_of
from .turn_store import TurnStore

KIND = "semaphore"

MOST_PERMITS = 1_000_000


def permits_of(permits: int, what: str = "permits") -> int:
    """A number of permits. Raises ``ValueError`` for what is none."""
    if isinstance(permits, bool) or not isinstance(permits, int) or not 1 <= permits <= MOST_PERMITS:
        raise ValueError(f"{what}={permits!r} must be a whole number from 1 to {MOST_PERMITS}")
    return permits


class Semaphore:
    """At most so many at once, for all processes.

    >>> with Semaphore(redis, "exports", permits=5):
    ...     export()
    >>> hold = Semaphore(redis, "memory", permits=64).acquire(permits=16, timeout=5)

    Promises and non-promises are those of ``Lock``, for permits instead of the whole: never more are held, by valid
    leases, than there are; a holder that dies gives its permits back within ``ttl``, and who waits is woken then; first
    come, first served, also when a later one asks for less and could go on (so a large request never starves).

    ``resize`` changes the number for all processes while it is in use. Otherwise it is the number that each process was
    made with: during a deploy that changes it, each goes by its own.

    Arguments:
        redis, name, ttl, renew, max_hold, replicas, owner: as for ``Lock``.
        permits: how many there are.
    """

    def __init__(
        self,
        redis: Connections,
        name: str,
        *,
        permits: int,
        ttl: Duration = 30,
        renew: bool = True,
        max_hold: Duration | None = None,
        replicas: int = 0,
        owner: str | None = None,
    ) -> None:
        self.name = name
        self.permits = permits_of(permits)
        self._redis = redis
        self._store = TurnStore(redis, KIND, name, capacity=permits)
        self._acquirable = Acquirable(
            self._store,
            f"semaphore {name!r}",
            1,
            terms_of(ttl, renew, max_hold),
            owner=owner,
            replicas=replicas,
            alone=False,
        )

    def __repr__(self) -> str:
        return f"<Semaphore {self.name!r} at {self._redis.address} permits={self.permits}>"

    def acquire(self, timeout: Duration | None = None, *, permits: int = 1) -> Hold:
        """Hold so many permits, waiting for them if need be. All or none.

        Arguments:
            timeout: how long to wait at most. Default: for ever.
            permits: how many.

        Raises as ``Lock.acquire``, and ``PermitsExceeded`` when there are not so many. (A thread may hold permits and
        wait for more; that two do so crosswise and wait for ever, nobody sees.)
        """
        timeout_s = None if timeout is None else milliseconds(timeout, "timeout") / 1_000
        return self._acquirable.acquire_units(permits_of(permits), timeout_s)

    def try_acquire(self, *, permits: int = 1) -> Hold | Busy:
        """Hold so many permits if they are free now and nobody waits, in one round trip. Raises as ``acquire``."""
        return self._acquirable.try_acquire_units(permits_of(permits))

    def __enter__(self) -> Hold:
        return self._acquirable.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it. Raises ``LockLost`` when it was lost meanwhile and nothing else is being raised."""
        self._acquirable.__exit__(kind, error, trace)

    def resize(self, permits: int | None) -> int:
        """Set how many permits there are, for all processes, whatever they were made with; None: forget that.

        What is added is granted at once to those who wait; what is taken away is missing when it is given back. The
        number is forgotten when nobody uses the semaphore for a week. Returns how many are in use. Raises redis-py's
        errors.
        """
        return self._store.resize(0 if permits is None else permits_of(permits))

    def inspect(self) -> Inspected:
        """Who holds permits and who waits, since when, in one round trip. Raises redis-py's errors."""
        return inspect(self._store)

    def force_release(self) -> int:
        """Take all permits from whoever holds them; see ``Lock.force_release``."""
        return self._store.clear()

    def stats(self) -> dict[str, float]:
        """Counts of this object in this process; see ``Lock.stats``."""
        return self._acquirable.stats()
