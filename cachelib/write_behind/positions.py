"""The table that holds how far each partition has come, in the database of the sink.

One row per partition: the fence between flushers. Alembic users add ``positions_table(metadata)`` to their
metadata; otherwise it is created when a sink is first flushed.
"""

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
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("partitions", sa.Integer, nullable=False),
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


def read(connection: sa.Connection, buffer: str, partition: int) -> Position:
    """The position of a partition; ``START`` for one that was never flushed."""
    row = connection.execute(_where(sa.select(_TABLE), buffer, partition)).one_or_none()
    if row is None:
        return START
    return Position(row.version, marks_from_text(row.marks), row.rows_applied, row.lag_ms)


def move(connection: sa.Connection, buffer: str, partition: int, partitions: int, old: Position, new: Position) -> bool:
    """Move a position inside the transaction that applies its rows, before them. False: another flusher has.

    This is the fence. A second flusher waits here for the first one's commit (the row is locked, and under
    SQLite the database is), and then finds another version than the one it decided from.
    """
    values: dict[str, Any] = {
        "partitions": partitions,
        "version": new.version,
        "marks": marks_to_text(new.marks),
        "rows_applied": new.rows_applied,
        "lag_ms": new.lag_ms,
    }
    if old.version == START.version:
        inserted = sa.insert(_TABLE).values(buffer=buffer, partition=partition, **values)
        try:
            connection.execute(inserted)
        except IntegrityError:
            return False
        return True
    update = _where(sa.update(_TABLE), buffer, partition).where(_TABLE.c.version == old.version).values(**values)
    return connection.execute(update).rowcount == 1


def stored_partitions(connection: sa.Connection, buffer: str) -> int | None:
    """How many partitions the buffer was last flushed with; None when it never was."""
    return connection.execute(sa.select(sa.func.max(_TABLE.c.partitions)).where(_TABLE.c.buffer == buffer)).scalar()


def repartition(connection: sa.Connection, buffer: str, wanted: int) -> None:
    """Note that the buffer, which is empty, has another number of partitions now."""
    connection.execute(sa.update(_TABLE).where(_TABLE.c.buffer == buffer).values(partitions=wanted))


def read_all(engine: sa.Engine, buffer: str) -> list[Position]:
    """The positions of every partition that was ever flushed. Empty when none was."""
    if not sa.inspect(engine).has_table(NAME):
        return []
    with engine.connect() as connection:
        rows = connection.execute(sa.select(_TABLE).where(_TABLE.c.buffer == buffer)).all()
    return [Position(row.version, marks_from_text(row.marks), row.rows_applied, row.lag_ms) for row in rows]


def _where(statement: Any, buffer: str, partition: int) -> Any:
    return statement.where(_TABLE.c.buffer == buffer, _TABLE.c.partition == partition)
