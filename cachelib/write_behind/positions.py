"""The table that holds how far each partition has come, in the database of the sink.

One row per partition: the fence between flushers. Partition 0 of 2 is another than partition 0 of 4: their streams
are, and so must their positions be. Alembic users add ``positions_table(metadata)`` to their
metadata; otherwise it is created when a sink is first flushed.
"""

import secrets
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from .position import START, Position, marks_from_text, marks_to_text

NAME = "petiole_positions"


def positions_table(metadata: sa.MetaData) -> sa.Table:
    """The definition of the table, for migrations."""
    return sa.Table(
        NAME,
        metadata,
        sa.Column("buffer", sa.String(255), primary_key=True),
        sa.Column("partitions", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("marks", sa.Text, nullable=False),
        sa.Column("rows_applied", sa.BigInteger, nullable=False),
        sa.Column("lag_ms", sa.BigInteger, nullable=False),
    )


_TABLE = positions_table(sa.MetaData())


def create(engine: sa.Engine) -> None:
    """Create the table unless it is there. Two processes may do so at once."""
    try:
        _TABLE.create(engine, checkfirst=True)
    except DBAPIError:
        if not sa.inspect(engine).has_table(NAME):
            raise


def keeps_transactions(engine: sa.Engine) -> bool:
    """Whether what is rolled back is gone. Not so where every statement commits by itself."""
    probe = {"buffer": "", "partitions": 0, "partition": -secrets.randbelow(2**31), "version": 0, "marks": "[]"}
    is_it = sa.and_(_TABLE.c.buffer == "", _TABLE.c.partition == probe["partition"])
    with engine.connect() as connection:
        transaction = connection.begin()
        connection.execute(sa.insert(_TABLE).values(**probe, rows_applied=0, lag_ms=0))
        transaction.rollback()
    with engine.begin() as connection:
        return connection.execute(sa.delete(_TABLE).where(is_it)).rowcount == 0


def read(connection: sa.Connection, buffer: str, partition: int, partitions: int) -> Position:
    """The position of a partition; ``START`` for one that was never flushed."""
    row = connection.execute(_where(sa.select(_TABLE), buffer, partition, partitions)).one_or_none()
    if row is None:
        return START
    return Position(row.version, marks_from_text(row.marks), row.rows_applied, row.lag_ms)


def move(connection: sa.Connection, buffer: str, partition: int, partitions: int, old: Position, new: Position) -> bool:
    """Move a position inside the transaction that applies its rows, before them. False: another flusher has.

    This is the fence. A second flusher waits here for the first one's commit (the row is locked, and under
    SQLite the database is), and then finds another version than the one it decided from.
    """
    values: dict[str, Any] = {
        "version": new.version,
        "marks": marks_to_text(new.marks),
        "rows_applied": new.rows_applied,
        "lag_ms": new.lag_ms,
    }
    if old.version == START.version:
        inserted = sa.insert(_TABLE).values(buffer=buffer, partition=partition, partitions=partitions, **values)
        try:
            connection.execute(inserted)
        except IntegrityError:
            return False
        return True
    known = _where(sa.update(_TABLE), buffer, partition, partitions).where(_TABLE.c.version == old.version)
    return connection.execute(known.values(**values)).rowcount == 1


def rows_applied(engine: sa.Engine, buffer: str) -> int:
    """How many rows of a buffer have been applied; 0 when it was never flushed."""
    if not sa.inspect(engine).has_table(NAME):
        return 0
    with engine.connect() as connection:
        total = connection.scalar(sa.select(sa.func.sum(_TABLE.c.rows_applied)).where(_TABLE.c.buffer == buffer))
    return int(total or 0)


def _where(statement: Any, buffer: str, partition: int, partitions: int) -> Any:
    return statement.where(
        _TABLE.c.buffer == buffer, _TABLE.c.partitions == partitions, _TABLE.c.partition == partition
    )
