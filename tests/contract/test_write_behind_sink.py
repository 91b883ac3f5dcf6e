"""``SqlSink``: which tables serve which mode, and that values arrive in the database as they were put."""

import enum
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from petiole.cachelib import Connections
from petiole.cachelib.errors import RowRefused, SinkUnfit
from petiole.cachelib.write_behind import Buffer, Flusher, SqlSink, positions_table

NOWHERE = sa.create_engine("sqlite://")


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


def written(redis: Connections, name: str, sink: SqlSink, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    """What is in the table once these rows went through a buffer."""
    buffer = Buffer(redis, name, partitions=1)
    for row in rows:
        buffer.put(0, sink.format.pack(row).payload)
    assert not Flusher(buffer, sink).flush(0).more
    with sink.engine.connect() as connection:
        return [dict(row._mapping) for row in connection.execute(sa.select(sink.table))]


def created(engine: sa.Engine, *parts: Any) -> sa.Table:
    table = sa.Table("things", sa.MetaData(), *parts)
    table.create(engine)
    return table


VALUES: dict[str, tuple[Callable[[], Any], Any]] = {
    "integer": (lambda: sa.Integer, -(2**31)),
    "big integer": (lambda: sa.BigInteger, 2**63 - 1),
    "text": (lambda: sa.Text, "naïve ☕ 'quoted' %s :x"),
    "string": (lambda: sa.String(3), "äöü"),
    "boolean": (lambda: sa.Boolean, True),
    "float": (lambda: sa.Double, 0.1),
    "decimal": (lambda: sa.Numeric(10, 2), Decimal("12345678.90")),
    "enum of a class": (lambda: sa.Enum(Colour), Colour.BLUE),
    "enum of words": (lambda: sa.Enum("one", "two", name="word"), "two"),
    "bytes": (lambda: sa.LargeBinary, bytes(range(256))),
    "json": (lambda: sa.JSON, {"a": [1, None, {"b": "c"}], "d": 1.5}),
    "uuid": (lambda: sa.Uuid, UUID(int=2**127)),
    "date": (lambda: sa.Date, date(2024, 2, 29)),
    "time": (lambda: sa.Time, time(1, 2, 3, 4)),
    "naive datetime": (lambda: sa.DateTime, datetime(2024, 2, 29, 1, 2, 3, 4)),  # noqa: DTZ001
    "interval": (lambda: sa.Interval, timedelta(days=1, microseconds=5)),
}


@pytest.mark.filterwarnings("ignore:Dialect sqlite.* does .not. support Decimal:sqlalchemy.exc.SAWarning")
@pytest.mark.parametrize(("kind", "value"), VALUES.values(), ids=VALUES)
def test_a_value_arrives_as_it_was_put(
    kind: Callable[[], Any], value: Any, redis: Connections, name: str, engine: sa.Engine
) -> None:
    """Also None, and a value that was left out."""
    table = created(engine, sa.Column("id", sa.Integer, primary_key=True), sa.Column("c", kind()))
    sink = SqlSink(engine, table, mode="append")
    rows = written(redis, name, sink, {"id": 1, "c": value}, {"id": 2, "c": None}, {"id": 3})

    assert rows == [{"id": 1, "c": value}, {"id": 2, "c": None}, {"id": 3, "c": None}]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_aware_datetime_is_the_same_moment(redis: Connections, name: str, engine: sa.Engine) -> None:
    """PostgreSQL gives it back in a zone of its own."""
    sink = SqlSink(engine, created(engine, sa.Column("at", sa.DateTime(timezone=True))), mode="append")
    moment = datetime(2024, 2, 29, 12, 0, 0, 1, UTC)

    assert written(redis, name, sink, {"at": moment}) == [{"at": moment}]


def test_what_a_row_leaves_out_is_filled_by_its_default(redis: Connections, name: str, engine: sa.Engine) -> None:
    """Of Python, of the server, by autoincrement or by computing; rows that name different columns may alternate."""
    table = created(
        engine,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("n", sa.Integer, nullable=False),
        sa.Column("python", sa.Integer, nullable=False, default=lambda: 7),
        sa.Column("server", sa.Integer, nullable=False, server_default="8"),
        sa.Column("twice", sa.Integer, sa.Computed("n * 2", persisted=True)),
    )
    rows = written(
        redis,
        name,
        SqlSink(engine, table, mode="append"),
        {"n": 1},
        {"n": 2, "python": 0, "server": 0},
        {"n": 3, "server": 1},
        {"n": 4},
    )

    assert rows == [
        {"id": 1, "n": 1, "python": 7, "server": 8, "twice": 2},
        {"id": 2, "n": 2, "python": 0, "server": 0, "twice": 4},
        {"id": 3, "n": 3, "python": 7, "server": 1, "twice": 6},
        {"id": 4, "n": 4, "python": 7, "server": 8, "twice": 8},
    ]


def test_rows_that_leave_out_everything_are_rows(redis: Connections, name: str, engine: sa.Engine) -> None:
    """A row of defaults alone."""
    table = created(engine, sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer, default=1))

    assert written(redis, name, SqlSink(engine, table, mode="append"), {}, {}) == [
        {"id": 1, "n": 1},
        {"id": 2, "n": 1},
    ]


def test_columns_are_called_by_their_key(redis: Connections, name: str, engine: sa.Engine) -> None:
    """A column may have another name in the database than in Python, in both modes."""
    table = created(
        engine, sa.Column("Path", sa.Text, key="path", primary_key=True), sa.Column("N hits", sa.Integer, key="n")
    )
    written(redis, f"{name}-append", SqlSink(engine, table, mode="append"), {"path": "/", "n": 1})
    rows = written(redis, f"{name}-sum", SqlSink(engine, table, mode="sum"), {"path": "/", "n": 2})

    assert [tuple(row.values()) for row in rows] == [("/", 3)]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Decimal("999.999"), lambda: sa.Numeric(5, 2)),
        (1e9, lambda: sa.Numeric(5, 2, asdecimal=False)),
        ({"x": float("nan")}, lambda: sa.JSON),
    ],
    ids=["rounded up to too many digits", "too many digits as a float", "JSON that is not a number"],
)
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_what_postgresql_would_refuse_is_refused_at_the_put(
    value: Any, kind: Callable[[], Any], redis: Connections, name: str, engine: sa.Engine
) -> None:
    """A row that fits the check and not the database would stop its partition for ever."""
    sink = SqlSink(engine, created(engine, sa.Column("c", kind())), mode="append")

    with pytest.raises(RowRefused):
        written(redis, name, sink, {"c": value})


UNIQUE: dict[str, tuple[Callable[[], list[Any]], Any]] = {
    "the primary key": (lambda: [sa.Column("k", sa.Text, primary_key=True)], None),
    "a unique column beside a surrogate id": (
        lambda: [sa.Column("id", sa.Integer, primary_key=True), sa.Column("k", sa.Text, unique=True)],
        "k",
    ),
    "a unique constraint": (
        lambda: [sa.Column("id", sa.Integer, primary_key=True), sa.Column("k", sa.Text), sa.UniqueConstraint("k")],
        ["k"],
    ),
    "a unique index": (
        lambda: [sa.Column("id", sa.Integer, primary_key=True), sa.Column("k", sa.Text, index=True, unique=True)],
        ("k",),
    ),
}


@pytest.mark.parametrize(("columns", "key"), UNIQUE.values(), ids=UNIQUE)
def test_rows_are_summed_by_whatever_makes_them_unique(
    columns: Callable[[], list[Any]], key: Any, redis: Connections, name: str, engine: sa.Engine
) -> None:
    """The key tells the rows apart; the id, which the database gives, is no amount. NULL counts as nothing."""
    table = created(engine, *columns(), sa.Column("n", sa.Integer), sa.Column("m", sa.Integer))
    with engine.begin() as connection:
        connection.execute(sa.insert(table).values(k="b", n=None, m=5))
    rows = written(
        redis,
        name,
        SqlSink(engine, table, mode="sum", key=key),
        {"k": "b", "n": 1},
        {"k": "a", "n": 2, "m": 3},
        {"k": "b", "n": 4},
    )

    assert {row["k"]: (row["n"], row["m"]) for row in rows} == {"a": (2, 3), "b": (5, 5)}


def test_a_key_may_be_several_columns_in_any_order(redis: Connections, name: str, engine: sa.Engine) -> None:
    """Composite keys, and amounts with digits behind the point."""
    table = created(
        engine,
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("path", sa.Text, primary_key=True),
        sa.Column("n", sa.Integer),
        sa.Column("note", sa.Text, server_default="-"),
    )
    day = date(2024, 1, 1)
    rows = written(
        redis,
        name,
        SqlSink(engine, table, mode="sum", key=["path", "day"]),
        *({"day": day, "path": path, "n": 1} for path in "aba"),
    )

    assert {(row["day"], row["path"]): (row["n"], row["note"]) for row in rows} == {
        (day, "a"): (2, "-"),
        (day, "b"): (1, "-"),
    }


def test_floats_can_be_summed(redis: Connections, name: str, engine: sa.Engine) -> None:
    """A float is a number."""
    table = created(engine, sa.Column("k", sa.Text, primary_key=True), sa.Column("x", sa.Float, nullable=False))
    rows = written(redis, name, SqlSink(engine, table, mode="sum"), {"k": "a", "x": 0.5}, {"k": "a", "x": 0.25})

    assert rows == [{"k": "a", "x": 0.75}]


def test_a_member_of_an_enum_can_be_a_key(redis: Connections, name: str, engine: sa.Engine) -> None:
    """Members have no order, and are told apart all the same."""
    table = created(engine, sa.Column("k", sa.Enum(Colour), primary_key=True), sa.Column("n", sa.Integer))
    rows = written(
        redis,
        name,
        SqlSink(engine, table, mode="sum"),
        {"k": Colour.RED, "n": 1},
        {"k": Colour.BLUE, "n": 2},
        {"k": Colour.RED, "n": 3},
    )

    assert {row["k"]: row["n"] for row in rows} == {Colour.RED: 4, Colour.BLUE: 2}


def things(*parts: Any) -> sa.Table:
    return sa.Table("things", sa.MetaData(), *parts)


def _unique_where_positive() -> sa.Table:
    table = things(sa.Column("id", sa.Integer, primary_key=True), sa.Column("k", sa.Text), sa.Column("n", sa.Integer))
    sa.Index("partial", table.c.k, unique=True, sqlite_where=table.c.n > 0, postgresql_where=table.c.n > 0)
    return table


def _unique_in_lower_case() -> sa.Table:
    table = things(sa.Column("id", sa.Integer, primary_key=True), sa.Column("k", sa.Text), sa.Column("n", sa.Integer))
    sa.Index("functional", sa.func.lower(table.c.k), unique=True)
    return table


UNFIT: dict[str, tuple[Callable[[], sa.Table], dict[str, Any], str]] = {
    "no key at all": (lambda: things(sa.Column("n", sa.Integer)), {"mode": "sum"}, "has no primary key; name the"),
    "a key that there is not": (
        lambda: things(sa.Column("k", sa.Text, primary_key=True), sa.Column("n", sa.Integer)),
        {"mode": "sum", "key": "kk"},
        "has no column 'kk'; it has k, n",
    ),
    "a key that is not unique": (
        lambda: things(
            sa.Column("id", sa.Integer, primary_key=True), sa.Column("k", sa.Text), sa.Column("n", sa.Integer)
        ),
        {"mode": "sum", "key": "k"},
        "needs a primary key, unique constraint or unique index on exactly",
    ),
    "half of a composite key": (
        lambda: things(
            sa.Column("a", sa.Text, primary_key=True),
            sa.Column("b", sa.Text, primary_key=True),
            sa.Column("n", sa.Integer),
        ),
        {"mode": "sum", "key": "a"},
        "on exactly",
    ),
    "a key that is unique in some rows": (_unique_where_positive, {"mode": "sum", "key": "k"}, "on exactly"),
    "a key that is unique in lower case": (_unique_in_lower_case, {"mode": "sum", "key": "k"}, "on exactly"),
    "a required column that is no number": (
        lambda: things(
            sa.Column("k", sa.Text, primary_key=True),
            sa.Column("n", sa.Integer),
            sa.Column("title", sa.Text, nullable=False),
        ),
        {"mode": "sum"},
        r"can only add numbers; things\.title is TEXT",
    ),
    "nothing to add": (
        lambda: things(sa.Column("k", sa.Text, primary_key=True)),
        {"mode": "sum"},
        "has no number to add to beside its key",
    ),
    "append with a key": (
        lambda: things(sa.Column("k", sa.Text, primary_key=True)),
        {"mode": "append", "key": "k"},
        "has no use for a key; did you mean mode='sum'",
    ),
    "a mode that there is not": (
        lambda: things(sa.Column("k", sa.Text, primary_key=True)),
        {"mode": "upsert"},
        "mode 'upsert' is unknown; there are append, sum",
    ),
}


@pytest.mark.parametrize(("table", "options", "message"), UNFIT.values(), ids=UNFIT)
def test_a_table_that_cannot_serve_the_mode_is_refused_at_once(
    table: Callable[[], sa.Table], options: dict[str, Any], message: str
) -> None:
    """When the sink is made, not when the first batch fails; the message says the next step."""
    with pytest.raises(SinkUnfit, match=message):
        SqlSink(NOWHERE, table(), **options)


def test_a_database_of_another_kind_is_refused_at_once() -> None:
    """The upsert is a dialect's own."""
    other: Any = SimpleNamespace(dialect=mysql.dialect())

    with pytest.raises(SinkUnfit, match="a sink needs SQLite or PostgreSQL, not mysql"):
        SqlSink(other, things(sa.Column("n", sa.Integer)), mode="append")


def test_only_a_table_is_a_table() -> None:
    """A model is asked for its table."""

    class Model:
        __table__ = things(sa.Column("n", sa.Integer))

    with pytest.raises(TypeError, match=r"such as Model\.__table__"):
        SqlSink(NOWHERE, Model, mode="append")  # type: ignore[arg-type]


def test_a_password_is_never_shown() -> None:
    """A sink ends in logs."""
    engine = sa.create_engine("postgresql+psycopg://user:hush@127.0.0.1:1/db")

    assert "hush" not in repr(SqlSink(engine, things(sa.Column("n", sa.Integer)), mode="append"))


def test_a_password_among_the_options_is_never_shown() -> None:
    """A URL may name it there too."""
    engine = sa.create_engine("postgresql+psycopg://127.0.0.1:1/db?user=me&password=hush")

    assert "hush" not in repr(SqlSink(engine, things(sa.Column("n", sa.Integer)), mode="append"))


def test_the_positions_table_may_be_part_of_the_users_metadata(
    redis: Connections, name: str, engine: sa.Engine
) -> None:
    """Migrations create it, with all that the sink needs; preparing then finds it."""
    metadata = sa.MetaData()
    log = sa.Table("things", metadata, sa.Column("n", sa.Integer))
    positions = positions_table(metadata)
    metadata.create_all(engine)
    rows = written(redis, name, SqlSink(engine, log, mode="append"), {"n": 1}, {"n": 2})
    with engine.connect() as connection:
        position = connection.execute(sa.select(positions)).one()

    assert rows == [{"n": 1}, {"n": 2}]
    assert (position.buffer, position.partition, position.partitions) == (name, 0, 1)
    assert (position.version, position.rows_applied) == (1, 2)


def test_the_positions_table_is_created_where_there_is_none(engine: sa.Engine) -> None:
    """As often as asked."""
    sink = SqlSink(engine, created(engine, sa.Column("n", sa.Integer)), mode="append")
    sink.prepare()
    sink.prepare()

    assert sa.inspect(engine).has_table("petiole_positions")


def test_an_engine_that_commits_every_statement_is_refused(engine: sa.Engine) -> None:
    """Rows and position could not move together, and a row that fails would count as applied."""
    table = created(engine, sa.Column("n", sa.Integer))
    autocommit = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT")
    try:
        with pytest.raises(SinkUnfit, match="AUTOCOMMIT"):
            SqlSink(autocommit, table, mode="append").prepare()
    finally:
        autocommit.dispose()

    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM petiole_positions")) == 0
    SqlSink(engine, table, mode="append").prepare()
