"""Rows of one table: checked where they are made, packed for the stream, read back with their types.

A row that the database will refuse must be refused at the producer, while the one who made the mistake is
still there. What a table's definition tells is checked: columns, required ones, types, lengths, ranges. What
only the database knows (foreign keys, unique and check constraints, triggers) is not.
"""

import enum
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import sqlalchemy as sa

from ..errors import RowRefused

Row = Mapping[str, Any]

_INTEGER_BITS = ((sa.SmallInteger, 16), (sa.BigInteger, 64), (sa.Integer, 32))
_FIELD = re.compile(r"\$\.([^`\[]+)|field `([^`]+)`")


class Packed(NamedTuple):
    """A row as it goes into a stream."""

    payload: bytes
    identity: bytes
    """The same for rows with the same key, which must stay in order; the whole row where there is no key."""


class RowFormat:
    """The rows of one table, as they stand in a stream: one MessagePack map each.

    Arguments:
        table: whose rows these are.
        columns: those that a row may name. Default: all that the database does not compute.
        key: those that tell rows apart: a row must name them, and they must not be None.
        optional: those that a row may leave out although the table requires them, but not give as None.
        wide_integers: whether the database stores 64 bits in every integer column, as SQLite does.
    """

    def __init__(
        self,
        table: sa.Table,
        *,
        columns: frozenset[str] | None = None,
        key: Sequence[str] = (),
        optional: frozenset[str] = frozenset(),
        wide_integers: bool = False,
    ) -> None:
        self.table = table
        self._json = frozenset(c.key for c in table.columns if isinstance(c.type, sa.JSON))
        self._decimals = {
            c.key: 10 ** (c.type.precision - (c.type.scale or 0))
            for c in table.columns
            if isinstance(c.type, sa.Numeric) and c.type.asdecimal and c.type.precision
        }
        fields: list[Any] = []
        for index, column in enumerate(table.columns):
            if column.computed is not None:
                continue  # the database fills it, and takes no value for it
            if columns is not None and column.key not in columns:
                continue
            kind: Any = _type_of(column, wide_integers)
            if column.nullable and column.key not in {*key, *optional}:
                kind = kind | None
            needed = column.key in key or (is_required(column) and column.key not in optional)
            fields.append((f"c{index}", kind) if needed else (f"c{index}", kind | msgspec.UnsetType, msgspec.UNSET))
        names = {f"c{index}": str(column.key) for index, column in enumerate(table.columns)}
        self._struct = msgspec.defstruct(
            "Row", fields, rename=lambda field: names[field], kw_only=True, forbid_unknown_fields=True
        )
        self._decode = msgspec.msgpack.Decoder(self._struct).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._names = [(field, names[field]) for field in self._struct.__struct_fields__]
        self._key_fields = [field for field, name in self._names if name in key]

    def pack(self, row: Row) -> Packed:
        """The stored form of a row. Raises ``RowRefused``, with the column, for one that does not fit."""
        if not isinstance(row, Mapping):
            raise RowRefused(self.table.name, None, f"a row is a mapping of columns, not {type(row).__name__}")
        try:
            checked = msgspec.convert(self._plain(row), self._struct)
            packed = self._encode(checked)
        except msgspec.ValidationError as error:
            raise self._refusal(error) from None
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RowRefused(self.table.name, None, str(error)) from None
        self._refuse_what_types_do_not_tell(checked)
        if not self._key_fields:
            return Packed(packed, packed)
        return Packed(packed, self._encode([getattr(checked, field) for field in self._key_fields]))

    def unpack(self, payload: bytes) -> dict[str, Any]:
        """A row as it was put, without the columns that it left out. Raises msgspec's errors."""
        stored = self._decode(payload)
        return {name: value for field, name in self._names if (value := getattr(stored, field)) is not msgspec.UNSET}

    def _plain(self, row: Row) -> Row:
        if not self._json & row.keys():
            return row
        return {k: msgspec.to_builtins(v) if k in self._json else v for k, v in row.items()}

    def _refuse_what_types_do_not_tell(self, checked: Any) -> None:
        for field, name in self._names:
            value = getattr(checked, field)
            if isinstance(value, str) and "\0" in value:
                raise RowRefused(self.table.name, name, "text with a NUL character, which SQL text cannot hold")
            if isinstance(value, float | Decimal) and not math.isfinite(value):
                raise RowRefused(self.table.name, name, f"{value} is not a finite number")
            if name in self._decimals and isinstance(value, Decimal) and abs(value) >= self._decimals[name]:
                raise RowRefused(self.table.name, name, f"{value} has too many digits for {self.table.c[name].type}")

    def _refusal(self, error: msgspec.ValidationError) -> RowRefused:
        text = str(error)
        found = _FIELD.search(text)
        column = (found.group(1) or found.group(2)) if found else None
        if "unknown field" in text:
            known = ", ".join(name for _, name in self._names)
            return RowRefused(self.table.name, column, f"there is no such column; there are {known}")
        if "missing required field" in text:
            return RowRefused(self.table.name, column, "the row leaves it out, and it has no default")
        return RowRefused(self.table.name, column, text.partition(" - at ")[0])


def is_required(column: "sa.Column[Any]") -> bool:
    """Whether an insert must name the column."""
    filled_by_database = (
        column.default is not None
        or column.server_default is not None
        or column.identity is not None
        or column is column.table.autoincrement_column
    )
    return not column.nullable and not filled_by_database


def _type_of(column: "sa.Column[Any]", wide_integers: bool) -> Any:
    kind = column.type
    if isinstance(kind, sa.Enum):
        return kind.enum_class if kind.enum_class and issubclass(kind.enum_class, enum.Enum) else Literal[*kind.enums]
    if isinstance(kind, sa.JSON):
        return Any
    if isinstance(kind, sa.Integer):
        bits = 64 if wide_integers else next(bits for base, bits in _INTEGER_BITS if isinstance(kind, base))
        return Annotated[int, msgspec.Meta(ge=-(2 ** (bits - 1)), le=2 ** (bits - 1) - 1)]
    if isinstance(kind, sa.String) and kind.length:
        return Annotated[str, msgspec.Meta(max_length=kind.length)]
    if isinstance(kind, sa.DateTime):
        return Annotated[datetime, msgspec.Meta(tz=bool(kind.timezone))]
    try:
        return kind.python_type
    except NotImplementedError:
        return Any
