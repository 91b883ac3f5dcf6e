"""``ReadWriteLock``: many readers or one writer. A reader takes one unit, a writer takes all that there are."""

from ..cachelib.connections import Connections
from ..cachelib.durations import Duration
from .acquiring import Acquirable
from .hold import Hold
from .inspecting import Inspected, inspect
from .lock import terms_of
from .turn_store import TurnStore

KIND = "readwrite"

MOST_READERS = 1_000_000


class Side(Acquirable):
    """One side of a ``ReadWriteLock``: acquired, released and waited for as a ``Lock``."""

    @property
    def name(self) -> str:
        """What is locked, and for what."""
        return self.what

    def __repr__(self) -> str:
        return f"<Side {self.what}>"


class ReadWriteLock:
    """Many readers at once, or one writer, for all processes.

    >>> catalogue = ReadWriteLock(redis, "catalogue")
    >>> with catalogue.read: ...
    >>> with catalogue.write as hold: ...

    Promises and non-promises are those of ``Lock``, for each side: while a writer's lease is valid nobody else's is;
    first come, first served, so readers that come after a waiting writer wait for it, and neither side starves. Each
    reader has a lease of its own. A reader that reads again while a writer waits would wait for it, and it for the
    reader: that is a ``LockReentered``.

    A writer may become a reader without letting another writer in between (``downgrade``). A reader cannot become a
    writer: two that tried would wait for each other.

    Arguments:
        redis, name, ttl, renew, max_hold, replicas, owner: as for ``Lock``.
    """

    def __init__(
        self,
        redis: Connections,
        name: str,
        *,
        ttl: Duration = 30,
        renew: bool = True,
        max_hold: Duration | None = None,
        replicas: int = 0,
        owner: str | None = None,
    ) -> None:
        self.name = name
        self._redis = redis
        self._store = TurnStore(redis, KIND, name, capacity=MOST_READERS)
        terms = terms_of(ttl, renew, max_hold)
        self.read = Side(self._store, f"read lock {name!r}", 1, terms, owner=owner, replicas=replicas)
        self.write = Side(self._store, f"write lock {name!r}", MOST_READERS, terms, owner=owner, replicas=replicas)

    def __repr__(self) -> str:
        return f"<ReadWriteLock {self.name!r} at {self._redis.address}>"

    def downgrade(self, hold: Hold) -> None:
        """Make a writer's hold a reader's: readers that wait come in, no writer does. It keeps its fence.

        Arguments:
            hold: what ``write`` gave.

        Raises ``ValueError`` for another lock's hold, ``LockLost`` when it was lost, ``LockUnavailable`` when Redis
        does not answer; then it may be repeated.
        """
        self.write.shrink(hold, 1)

    def inspect(self) -> Inspected:
        """Who holds it and who waits; a writer holds 1,000,000 permits, a reader one. Raises redis-py's errors."""
        return inspect(self._store)

    def force_release(self) -> int:
        """Take it from whoever holds it, readers and writer; see ``Lock.force_release``."""
        return self._store.clear()
