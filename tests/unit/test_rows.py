"""``rows.py``: what fits the table comes back as it was put; what does not is refused by the name of its column."""

import enum
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from petiole.cachelib.errors import RowRefused
from petiole.cachelib.write_behind.rows import RowFormat


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


def table(*columns: sa.Column[Any]) -> sa.Table:
    return sa.Table("things", sa.MetaData(), *columns)


EVERYTHING = table(
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("small", sa.SmallInteger),
    sa.Column("number", sa.Integer),
    sa.Column("text", sa.Text),
    sa.Column("short", sa.String(5)),
    sa.Column("flag", sa.Boolean),
    sa.Column("real", sa.Float),
    sa.Column("price", sa.Numeric(8, 2)),
    sa.Column("any_price", sa.Numeric),
    sa.Column("quick_price", sa.Numeric(5, 2, asdecimal=False)),
    sa.Column("colour", sa.Enum(Colour)),
    sa.Column("level", sa.Enum(Level)),
    sa.Column("word", sa.Enum("one", "two", name="word")),
    sa.Column("data", sa.LargeBinary),
    sa.Column("json", sa.JSON),
    sa.Column("uuid", sa.Uuid),
    sa.Column("day", sa.Date),
    sa.Column("hour", sa.Time),
    sa.Column("naive", sa.DateTime),
    sa.Column("aware", sa.DateTime(timezone=True)),
    sa.Column("span", sa.Interval),
    sa.Column("needed", sa.Integer, nullable=False, default=0),
)
FORMAT = RowFormat(EVERYTHING)

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "small": st.integers(-(2**15), 2**15 - 1),
    "number": st.integers(-(2**31), 2**31 - 1),
    "text": words,
    "short": words.filter(lambda text: len(text) <= 5),
    "flag": st.booleans(),
    "real": st.floats(allow_nan=False, allow_infinity=False),
    "price": st.decimals(-999_999, 999_999, places=2),
    "any_price": st.decimals(allow_nan=False, allow_infinity=False),
    "colour": st.sampled_from(Colour),
    "level": st.sampled_from(Level),
    "word": st.sampled_from(["one", "two"]),
    "data": st.binary(),
    "json": json_values,
    "uuid": st.uuids(),
    "day": st.dates(),
    "hour": st.times(),
    "naive": st.datetimes(),
    "aware": st.datetimes(timezones=st.just(UTC)),
    "span": st.timedeltas(),
}
row_strategy = st.fixed_dictionaries(
    {"id": st.integers(-(2**63), 2**63 - 1)}, optional={name: st.none() | values for name, values in VALUES.items()}
)


@settings(deadline=None)
@given(row_strategy)
def test_a_row_comes_back_as_it_was_put(row: dict[str, Any]) -> None:
    """Every value with its type, and no column that the row left out."""
    back = FORMAT.unpack(FORMAT.pack(row).payload)

    assert back == row
    assert {name: type(value) for name, value in back.items()} == {name: type(value) for name, value in row.items()}


def test_any_mapping_is_a_row() -> None:
    """A row need not be a dict."""
    assert FORMAT.unpack(FORMAT.pack(MappingProxyType({"id": 1})).payload) == {"id": 1}


REFUSED: list[tuple[str, str | None, Any]] = [
    ("an unknown column", "nobody", {"id": 1, "nobody": 2}),
    ("a missing column", "id", {"number": 1}),
    ("None for a column that must not be NULL", "id", {"id": None}),
    ("None for a column that has a default and must not be NULL", "needed", {"id": 1, "needed": None}),
    ("text for a number", "number", {"id": 1, "number": "x"}),
    ("a fraction for a whole number", "number", {"id": 1, "number": 1.5}),
    ("a bool for a whole number", "number", {"id": 1, "number": True}),
    ("a number for a bool", "flag", {"id": 1, "flag": 1}),
    ("an object of no SQL type", "number", {"id": 1, "number": object()}),
    ("text that is too long", "short", {"id": 1, "short": "123456"}),
    ("a NUL in text", "text", {"id": 1, "text": "a\0b"}),
    ("a whole number beyond 16 bits", "small", {"id": 1, "small": 2**15}),
    ("a whole number beyond 32 bits", "number", {"id": 1, "number": -(2**31) - 1}),
    ("a whole number beyond 64 bits", "id", {"id": 2**63}),
    ("a whole number beyond all bits", "id", {"id": 2**80}),
    ("an infinite float", "real", {"id": 1, "real": float("inf")}),
    ("a float that is no number", "real", {"id": 1, "real": float("nan")}),
    ("a whole number too large for a float", "real", {"id": 1, "real": 10**400}),
    ("an infinite Decimal", "any_price", {"id": 1, "any_price": Decimal("-Infinity")}),
    ("a Decimal that is no number", "price", {"id": 1, "price": Decimal("NaN")}),
    ("a Decimal that signals", "price", {"id": 1, "price": Decimal("sNaN")}),
    ("too many digits", "price", {"id": 1, "price": Decimal(1_000_000)}),
    ("too many digits once rounded", "price", {"id": 1, "price": Decimal("999999.995")}),
    ("too many digits in a numeric of floats", "quick_price", {"id": 1, "quick_price": 1000.0}),
    ("an aware datetime for a naive column", "naive", {"id": 1, "naive": datetime(2024, 1, 1, tzinfo=UTC)}),
    ("a naive datetime for an aware column", "aware", {"id": 1, "aware": datetime(2024, 1, 1)}),  # noqa: DTZ001
    ("a datetime for a date", "day", {"id": 1, "day": datetime(2024, 1, 1)}),  # noqa: DTZ001
    ("text that is no UUID", "uuid", {"id": 1, "uuid": "x"}),
    ("text for bytes", "data", {"id": 1, "data": "abcd"}),
    ("a word that the Enum does not have", "word", {"id": 1, "word": "three"}),
    ("a word that reads like a path", "word", {"id": 1, "word": "$.three"}),
    ("a word that reads like an error", "word", {"id": 1, "word": "unknown field `three`"}),
    ("a member that the Enum does not have", "colour", {"id": 1, "colour": "green"}),
    ("half of a surrogate pair", "text", {"id": 1, "text": "\ud800"}),
    ("half of a surrogate pair in JSON", "json", {"id": 1, "json": ["\ud800"]}),
    ("an object that JSON has no form for", "json", {"id": 1, "json": object()}),
    ("JSON that is not a number", "json", {"id": 1, "json": {"x": [float("nan")]}}),
    ("JSON that is not finite", "json", {"id": 1, "json": {"x": [float("inf")]}}),
    ("a whole number in JSON beyond 64 bits", "json", {"id": 1, "json": 2**70}),
    ("a column whose name is no text", None, {1: 2}),
    ("a list", None, [("id", 1)]),
    ("None", None, None),
    ("text", None, "id"),
]


@pytest.mark.parametrize(("column", "row"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_row_that_does_not_fit_is_refused_by_the_name_of_its_column(column: str | None, row: Any) -> None:
    """Whoever made the mistake is told which column it was, and nothing but ``RowRefused`` is raised."""
    with pytest.raises(RowRefused) as caught:
        FORMAT.pack(row)

    assert (caught.value.table, caught.value.column) == ("things", column)
    assert f"things.{column}: " in str(caught.value) if column else "things: " in str(caught.value)


def test_a_list_that_contains_itself_is_refused() -> None:
    """JSON has no form for it."""
    endless: list[Any] = []
    endless.append(endless)

    with pytest.raises(RowRefused):
        FORMAT.pack({"id": 1, "json": endless})


def test_an_unknown_column_is_answered_with_those_that_there_are() -> None:
    """The message says the next step."""
    with pytest.raises(RowRefused, match="there is no such column; there are id, small, number"):
        FORMAT.pack({"id": 1, "numbr": 2})


def test_a_large_finite_decimal_fits_a_column_without_a_precision() -> None:
    """A Decimal is finite although no float is as large."""
    row = {"id": 1, "any_price": Decimal("1E+400")}

    assert FORMAT.unpack(FORMAT.pack(row).payload) == row


def test_integers_are_as_wide_as_the_database_stores_them() -> None:
    """SQLite stores 64 bits whatever the column is called."""
    wide = RowFormat(EVERYTHING, wide_integers=True)

    assert wide.unpack(wide.pack({"id": 1, "small": 2**62}).payload)["small"] == 2**62
    with pytest.raises(RowRefused, match=r"things\.small"):
        wide.pack({"id": 1, "small": 2**63})


OPTIONAL = {
    "nullable": lambda: sa.Column("c", sa.Integer),
    "a default of Python": lambda: sa.Column("c", sa.Integer, default=7, nullable=False),
    "a default of the server": lambda: sa.Column("c", sa.Integer, server_default="7", nullable=False),
    "autoincrement": lambda: sa.Column("c", sa.Integer, primary_key=True),
    "an identity": lambda: sa.Column("c", sa.Integer, sa.Identity(), primary_key=True),
}


@pytest.mark.parametrize("column", OPTIONAL.values(), ids=OPTIONAL)
def test_a_column_that_the_database_can_fill_may_be_left_out(column: Callable[[], sa.Column[Any]]) -> None:
    """Such a column is optional, and may be named all the same."""
    rows = RowFormat(table(column(), sa.Column("x", sa.Integer)))

    assert rows.unpack(rows.pack({"x": 1}).payload) == {"x": 1}
    assert rows.unpack(rows.pack({"x": 1, "c": 2}).payload) == {"x": 1, "c": 2}


FILLED_BY_DATABASE = {
    "computed": lambda: sa.Column("c", sa.Integer, sa.Computed("x * 2")),
    "always an identity": lambda: sa.Column("c", sa.Integer, sa.Identity(always=True), primary_key=True),
}


@pytest.mark.parametrize("column", FILLED_BY_DATABASE.values(), ids=FILLED_BY_DATABASE)
def test_a_column_that_takes_no_value_may_not_be_named(column: Callable[[], sa.Column[Any]]) -> None:
    """The database would refuse the row; so it is refused here."""
    rows = RowFormat(table(sa.Column("x", sa.Integer), column()))

    assert rows.unpack(rows.pack({"x": 1}).payload) == {"x": 1}
    with pytest.raises(RowRefused) as caught:
        rows.pack({"x": 1, "c": 2})
    assert caught.value.column == "c"


def test_json_that_must_not_be_null_takes_no_none_where_none_is_null() -> None:
    """With ``none_as_null`` the None would be written as SQL NULL."""
    rows = RowFormat(table(sa.Column("c", sa.JSON(none_as_null=True), nullable=False)))

    with pytest.raises(RowRefused, match=r"things\.c"):
        rows.pack({"c": None})


KEYED = RowFormat(
    table(
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("a", sa.Text),
        sa.Column("b", sa.Integer, nullable=False, default=1),
        sa.Column("n", sa.Integer, nullable=False),
    ),
    columns=frozenset("abn"),
    key=("a", "b"),
    optional=frozenset("n"),
)


def test_a_row_is_told_apart_by_its_key_alone() -> None:
    """Rows of one key have one identity, whatever else they hold; other keys have others."""
    one = KEYED.pack({"a": "x", "b": 1, "n": 5}).identity

    assert one == KEYED.pack({"n": 6, "b": 1, "a": "x"}).identity == KEYED.pack({"a": "x", "b": 1}).identity
    assert one != KEYED.pack({"a": "x", "b": 2}).identity
    assert one != KEYED.pack({"a": "y", "b": 1}).identity


@pytest.mark.parametrize(
    ("column", "row"),
    [
        ("a", {"b": 1}),
        ("b", {"a": "x"}),
        ("a", {"a": None, "b": 1}),
        ("n", {"a": "x", "b": 1, "n": None}),
        ("id", {"a": "x", "b": 1, "id": 3}),
    ],
    ids=["key left out", "key with a default left out", "key is None", "amount is None", "neither key nor amount"],
)
def test_a_row_with_a_key_names_all_of_it_and_nothing_but_amounts_beside(column: str, row: Mapping[str, Any]) -> None:
    """NULL is equal to nothing, not even to NULL: it cannot be a key, nor can it be added."""
    with pytest.raises(RowRefused) as caught:
        KEYED.pack(row)

    assert caught.value.column == column


def test_rows_without_a_key_are_told_apart_by_all_that_they_hold() -> None:
    """They spread over the partitions."""
    packed = FORMAT.pack({"id": 1, "number": 2})

    assert packed.identity == packed.payload


def test_values_keep_what_a_loose_format_would_lose() -> None:
    """Microseconds, digits, signs and bytes."""
    row = {
        "id": 1,
        "price": Decimal("1.10"),
        "hour": time(1, 2, 3, 4),
        "aware": datetime(2024, 2, 29, 12, 0, 0, 1, UTC),
        "span": -timedelta(microseconds=1),
        "data": bytes(range(256)),
        "uuid": UUID(int=7),
        "day": date(1, 1, 1),
    }
    back = FORMAT.unpack(FORMAT.pack(row).payload)

    assert back == row
    assert str(back["price"]) == "1.10"
