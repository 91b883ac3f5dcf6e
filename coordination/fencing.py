"""Checking the fence of a hold where it matters: in the database or the key that is written.

A lease can end unnoticed, so two processes may believe for a moment that they hold a lock. What they write can be kept
in order all the same: each write names its hold's fence, and the place that is written remembers the highest and
refuses all below (Kleppmann, "How to do distributed locking"). Three places are ready: a table of fences for any SQL
transaction (``guard``), a column of one's own (``fenced``), and keys in Redis (``FencedStore``).
"""

from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol

from ..cachelib.connections import Connections, require_connections
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.scripts import load
from . import keys
from .errors import StaleFence

if TYPE_CHECKING:
    import sqlalchemy as sa

NAME = "petiole_fences"

_MOST_BYTES = 8 * 1024 * 1024


class HasFence(Protocol):
    """A hold."""

    fence: int


def fences_table(metadata: "sa.MetaData") -> "sa.Table":
    """The definition of the table of fences, for migrations: one row per lock that ever guarded a transaction."""
    import sqlalchemy as sa

    return sa.Table(
        NAME,
        metadata,
        sa.Column("lock", sa.String(64), primary_key=True),  # a digest: names may be longer than keys of tables
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
    )


def create_fences(engine: "sa.Engine") -> None:
    """Create the table of fences unless it is there. Two processes may do so at once."""
    import sqlalchemy as sa
    from sqlalchemy.exc import DBAPIError

    try:
        fences_table(sa.MetaData()).create(engine, checkfirst=True)
    except DBAPIError:
        if not sa.inspect(engine).has_table(NAME):
            raise


def guard(connection: Any, name: str, fence: int) -> None:
    """Refuse a transaction whose hold is out of date; what ``Hold.guard`` does.

    The row of the lock is raised to the fence, and stays locked until the commit: of two transactions that guard
    themselves by one lock the second waits for the first, and is refused if its fence is the lower one. Call it before
    what is to be guarded, in the same transaction.

    Arguments:
        connection: SQLAlchemy's connection or session, in a transaction.
        name: of what is locked: ``hold.store.name``.
        fence: of the hold.

    Raises ``StaleFence``; roll the transaction back then. One statement, three for the first hold of a lock.
    """
    import sqlalchemy as sa
    from sqlalchemy.exc import IntegrityError

    table = fences_table(sa.MetaData())
    lock = sha256(name.encode()).hexdigest()
    raised = sa.update(table).where(table.c.lock == lock, table.c.fence <= fence).values(fence=fence)
    if connection.execute(raised).rowcount:
        return
    known = connection.scalar(sa.select(table.c.fence).where(table.c.lock == lock))
    if known is None:
        try:
            with connection.begin_nested():
                connection.execute(sa.insert(table).values(lock=lock, fence=fence, name=name))
            return
        except IntegrityError:  # another transaction was first
            if connection.execute(raised).rowcount:
                return
    raise StaleFence(name, fence)


def fenced(statement: Any, column: Any, hold: HasFence) -> Any:
    """An UPDATE that changes only rows which no later hold has changed, and marks them with this one.

    >>> done = connection.execute(fenced(update(invoices).where(invoices.c.id == 7), invoices.c.fence, hold))
    >>> done.rowcount  # 0: a later hold was here

    Arguments:
        statement: SQLAlchemy's ``update(...)``.
        column: of the same table, a BIGINT that may be null.
        hold: whose fence counts.
    """
    import sqlalchemy as sa

    return statement.where(sa.or_(column.is_(None), column <= hold.fence)).values({column: hold.fence})


_SET = load(__package__, "fenced_set", int)


class FencedStore:
    """Values in Redis that only the latest hold can change.

    >>> reports = FencedStore(redis, "reports", ttl="1d")
    >>> with Lock(redis, "report") as hold:
    ...     reports.set("north", b"...", hold)

    Promise: once a value was set with a fence, no lower fence changes it, in one round trip each. Non-promise: what has
    expired or was lost has forgotten its fence.

    Arguments:
        redis: from ``connect``.
        name: keeps the keys of several stores apart.
        ttl: how long a value, and its fence, is kept after it was set.
    """

    def __init__(self, redis: Connections, name: str, *, ttl: Duration = "1d") -> None:
        require_connections(redis)
        self.name = name
        self._redis = redis
        self._ttl_ms = milliseconds(ttl, "ttl")
        keys.fenced(name, "x")  # a name that cannot be one is refused here

    def __repr__(self) -> str:
        return f"<FencedStore {self.name!r} at {self._redis.address}>"

    def set(self, key: str, value: bytes | str, hold: HasFence) -> None:
        """Set a value. Raises ``StaleFence`` when a later hold has set it, and redis-py's errors."""
        raw = value.encode() if isinstance(value, str) else value
        if not isinstance(raw, bytes):
            raise TypeError(f"the value for {key!r} must be bytes or text, not {type(value).__name__}")
        if len(raw) > _MOST_BYTES:
            raise ValueError(f"the value for {key!r} has {len(raw)} bytes, more than {_MOST_BYTES}")
        taken = _SET(
            self._redis.coordination,
            entry=keys.fenced(self.name, key),
            fence=hold.fence,
            ttl_ms=self._ttl_ms,
            value=raw,
        )
        if not taken:
            raise StaleFence(f"{self.name}: {key}", hold.fence)

    def get(self, key: str) -> bytes | None:
        """The value, None where there is none. Raises redis-py's errors."""
        value: bytes | None = self._redis.coordination.execute_command("HGET", keys.fenced(self.name, key), "value")
        return value
