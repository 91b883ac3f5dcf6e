"""A table as the sink of a buffer: a batch and its position in one transaction.

The effect is exactly once because of three facts: the position row is moved in the transaction that applies
the rows; it is moved from the version that the decision was made from, or nothing is applied; rows leave
Redis only after the commit. Nothing else is relied on: no lock in Redis, no single worker, no clock.
"""

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from ..errors import SinkUnfit
from ..settings import without_password
from . import merge, positions
from .columns import is_filled_by_database, is_number, is_required
from .position import Position
from .rows import RowFormat

Mode = Literal["append", "sum"]

# PostgreSQL only. A flusher that is stopped in the middle of a batch (a paused machine, a debugger) holds the
# row of its partition; after this long the server ends its transaction, and another flusher goes on.
_LIMITS = (
    "SELECT set_config('idle_in_transaction_session_timeout', '30s', true), "
    "set_config('lock_timeout', '10s', true), set_config('statement_timeout', '60s', true)"
)


class SqlSink:
    """Rows that end in a SQL table.

    >>> sink = SqlSink(engine, PageView.__table__, mode="append")
    >>> sink = SqlSink(engine, Hit.__table__, key="path", mode="sum")

    Promises: each batch is in the table exactly once, or not at all, whatever is killed, however many flush.

    Not yet: the modes ``upsert`` and ``max``, deletes, dead letters (a row that the database refuses, although
    it fits the table's definition, or a sum that leaves its column's range, stops its partition: nothing is lost,
    and nothing behind it is written), COPY for large batches.

    Arguments:
        engine: a SQLAlchemy engine for SQLite or PostgreSQL. After a fork the child makes connections of its own.
        table: where the rows go.
        mode: ``append`` inserts every row. ``sum`` adds every number that is not part of the key to the row
            with the same key, or inserts it; other columns get their defaults.
        key: the columns that tell rows apart, for ``sum``; the table's primary key, or columns with a unique
            constraint or index. Default: the primary key.

    Raises ``SinkUnfit`` at once when the table cannot serve the mode.
    """

    def __init__(
        self, engine: sa.Engine, table: sa.FromClause, *, mode: Mode, key: str | Sequence[str] | None = None
    ) -> None:
        if not isinstance(table, sa.Table):
            raise TypeError(f"table must be a sqlalchemy Table such as Model.__table__, not {table!r}")
        if mode not in get_args(Mode):
            raise SinkUnfit(f"mode {mode!r} is unknown; there are {', '.join(get_args(Mode))}")
        if engine.dialect.name not in _INSERTS:
            raise SinkUnfit(f"a sink needs SQLite or PostgreSQL, not {engine.dialect.name}")
        if mode == "append" and key is not None:
            raise SinkUnfit("append inserts every row and has no use for a key; did you mean mode='sum'?")
        self.engine = engine
        self.table = table
        self.mode = mode
        self.key: tuple[str, ...] = _key_of(table, key) if mode == "sum" else ()
        self._amounts = _amounts_of(table, self.key) if mode == "sum" else []
        self.format = RowFormat(
            table,
            columns=frozenset(self.key) | frozenset(self._amounts) if mode == "sum" else None,
            key=self.key,
            optional=frozenset(self._amounts),
            wide_integers=engine.dialect.name == "sqlite",
        )
        self._owner = os.getpid()

    def __repr__(self) -> str:
        key = f" by {', '.join(self.key)}" if self.key else ""
        return (
            f"<SqlSink {self.table.name} ({self.mode}{key}) in {without_password(self.engine.url.render_as_string())}>"
        )

    def prepare(self) -> None:
        """Create the positions table where there is none. Raises ``SinkUnfit`` for an engine without transactions."""
        engine = self._engine()
        positions.create(engine)
        if not positions.keeps_transactions(engine):
            raise SinkUnfit(
                f"{self!r} commits every statement by itself (AUTOCOMMIT), so rows and their position cannot move "
                "together; give an engine with transactions"
            )

    def position(self, buffer: str, partition: int, partitions: int) -> Position:
        """How far a partition has come."""
        with self._engine().connect() as connection:
            return positions.read(connection, buffer, partition, partitions)

    def rows_applied(self, buffer: str) -> int:
        """How many rows of a buffer have been applied, as counted in the transactions that did it."""
        return positions.rows_applied(self._engine(), buffer)

    def apply(
        self,
        buffer: str,
        partition: int,
        partitions: int,
        old: Position,
        new: Position,
        rows: Sequence[dict[str, Any]],
    ) -> bool:
        """Apply rows and move the position, in one transaction. False, and nothing applied, when fenced off.

        Raises SQLAlchemy's errors. After one from the commit itself nobody knows whether it happened; the
        position, read again, tells.
        """
        with self._engine().connect() as connection, connection.begin() as transaction:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(_LIMITS)
            if not positions.move(connection, buffer, partition, partitions, old, new):
                transaction.rollback()
                return False
            for statement, values in self._statements(rows):
                connection.execute(statement, values)
        return True

    def _statements(self, rows: Sequence[dict[str, Any]]) -> list[tuple[sa.Insert, list[dict[str, Any]]]]:
        insert = _INSERTS[self.engine.dialect.name](self.table)
        if self.mode == "append":
            return [(insert, [dict(row) for row in run]) for run in merge.alike(rows)]
        added = {n: sa.func.coalesce(self.table.c[n], 0) + insert.excluded[n] for n in self._amounts}
        upsert = insert.on_conflict_do_update(index_elements=[self.table.c[name] for name in self.key], set_=added)
        return [(upsert, merge.summed(rows, self.key, self._amounts))]

    def _engine(self) -> sa.Engine:
        if os.getpid() != self._owner:
            self.engine.dispose(close=False)  # the parent's connections are the parent's
            self._owner = os.getpid()
        return self.engine


_INSERTS: dict[str, Any] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}


def _key_of(table: sa.Table, key: str | Sequence[str] | None) -> tuple[str, ...]:
    primary = tuple(column.key for column in table.primary_key)
    names = primary if key is None else (key,) if isinstance(key, str) else tuple(key)
    if not names:
        raise SinkUnfit(f"{table.name} has no primary key; name the columns of a unique constraint as key=")
    for name in names:
        if name not in table.columns:
            raise SinkUnfit(f"{table.name} has no column {name!r}; it has {', '.join(table.columns.keys())}")
    if json := next((name for name in names if isinstance(table.c[name].type, sa.JSON)), None):
        raise SinkUnfit(f"{table.name}.{json} holds JSON, by which rows cannot be told apart")
    unique = [set(primary)]
    unique += [
        {c.key for c in u.columns}
        for u in table.constraints
        if isinstance(u, sa.UniqueConstraint) and not u.deferrable  # ON CONFLICT cannot go by one that waits
    ]
    unique += [{c.key for c in i.columns} for i in table.indexes if i.unique and _covers_every_row(i)]
    unique += [{c.key} for c in table.columns if c.unique]
    if set(names) not in unique:
        raise SinkUnfit(
            f"mode 'sum' needs a primary key, unique constraint or unique index on exactly "
            f"({', '.join(names)}) of {table.name}, so that the database can find the row to add to"
        )
    return names


def _covers_every_row(index: sa.Index) -> bool:
    """Whether an index is one of plain columns over the whole table, which ON CONFLICT can go by."""
    partial = any(index.dialect_options[dialect].get("where") is not None for dialect in _INSERTS)
    return not partial and all(isinstance(expression, sa.Column) for expression in index.expressions)


def _amounts_of(table: sa.Table, key: Sequence[str]) -> list[str]:
    amounts = []
    for column in table.columns:
        numbered = column is table.autoincrement_column or column.identity is not None
        if column.key in key or numbered or is_filled_by_database(column):
            continue
        if is_number(column):
            amounts.append(column.key)
        elif is_required(column):
            raise SinkUnfit(
                f"mode 'sum' can only add numbers; {table.name}.{column.key} is {column.type} "
                "and has no default: make it part of the key, or give it one"
            )
    if not amounts:
        raise SinkUnfit(f"{table.name} has no number to add to beside its key ({', '.join(key)})")
    return amounts
