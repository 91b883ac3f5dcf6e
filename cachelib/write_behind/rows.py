"""Rows of one table: checked where they are made, packed for the stream, read back with their types.

A row that the database will refuse must be refused at the producer, while the one who made the mistake is
still there. What a table's definition tells is checked: columns, required ones, types, lengths, ranges. What
only the database knows (foreign keys, unique and check constraints, triggers) is not.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import sqlalchemy as sa

from ..errors import RowRefused
from . import columns as rules

Row = Mapping[str, Any]

_WRONG_FIELD = re.compile(r"^Object .*field `(.+)`$", re.DOTALL)
_WRONG_VALUE = re.compile(r"^(.*) - at `\$\.(.+?)(?:\[.*)?`$", re.DOTALL)

# Values of these types are taken as they are, and no text in their place: "abcd" is no bytes.
_AS_THEY_ARE = (bytes, bytearray, memoryview, datetime, date, time, timedelta, UUID, Decimal)


class Packed(NamedTuple):
    """A row as it goes into a stream."""

    payload: bytes
    identity: bytes
    """The same for rows with the same key, which must stay in order; the whole row where there is no key."""


class _Column(NamedTuple):
    """One column, as a field of the struct that rows are checked against."""

    field: str
    name: str
    takes_none: bool
    faults: list[rules.Fault]


class RowFormat:
    """The rows of one table, as they stand in a stream: one MessagePack map each.

    Arguments:
        table: whose rows these are.
        columns: those that a row may name. Default: all that the database does not fill by itself.
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
        self._columns: list[_Column] = []
        fields: list[Any] = []
        for column in table.columns:
            name = str(column.key)
            if rules.is_filled_by_database(column) or (columns is not None and name not in columns):
                continue
            field = f"c{len(fields)}"
            kind = rules.type_of(column, wide_integers)
            takes_none = not rules.refuses_none(column) and name not in {*key, *optional}
            needed = name in key or (rules.is_required(column) and name not in optional)
            kind = kind | None if takes_none else kind
            fields.append((field, kind) if needed else (field, kind | msgspec.UnsetType, msgspec.UNSET))
            self._columns.append(_Column(field, name, takes_none, rules.faults_of(column)))
        names = {column.field: column.name for column in self._columns}
        self._struct = msgspec.defstruct(
            "Row", fields, rename=lambda field: names[field], kw_only=True, forbid_unknown_fields=True
        )
        self._decode = msgspec.msgpack.Decoder(self._struct).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._key_fields = [column.field for column in self._columns if column.name in key]

    def pack(self, row: Row) -> Packed:
        """The stored form of a row. Raises ``RowRefused``, with the column, for one that does not fit."""
        if not isinstance(row, Mapping):
            raise RowRefused(self.table.name, None, f"a row is a mapping of columns, not {type(row).__name__}")
        try:
            checked = msgspec.convert(self._plain(row), self._struct, builtin_types=_AS_THEY_ARE)
        except msgspec.ValidationError as error:
            raise self._refusal(str(error)) from None
        self._refuse_what_types_do_not_tell(checked)
        try:
            packed = self._encode(checked)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RowRefused(self.table.name, self._unpackable(checked), str(error)) from None
        if not self._key_fields:
            return Packed(packed, packed)
        return Packed(packed, self._encode([getattr(checked, field) for field in self._key_fields]))

    def unpack(self, payload: bytes) -> dict[str, Any]:
        """A row as it was put, without the columns that it left out. Raises msgspec's errors."""
        stored = self._decode(payload)
        return {
            column.name: value
            for column in self._columns
            if (value := getattr(stored, column.field)) is not msgspec.UNSET
        }

    def _plain(self, row: Row) -> Row:
        """The row with what is in JSON columns made of JSON's own types."""
        if not self._json & row.keys():
            return row
        plain = dict(row)
        for name in self._json & row.keys():
            try:
                plain[name] = msgspec.to_builtins(row[name])
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                raise RowRefused(self.table.name, name, str(error)) from None
        return plain

    def _refuse_what_types_do_not_tell(self, checked: Any) -> None:
        for column in self._columns:
            value = getattr(checked, column.field)
            if value is msgspec.UNSET:
                continue
            if value is None:
                if not column.takes_none:
                    raise RowRefused(self.table.name, column.name, "None, in a column that is NOT NULL")
                continue
            for fault in column.faults:
                if why := fault(value):
                    raise RowRefused(self.table.name, column.name, why)

    def _unpackable(self, checked: Any) -> str | None:
        """Which column it is that has no stored form."""
        for column in self._columns:
            value = getattr(checked, column.field)
            try:
                self._encode(None if value is msgspec.UNSET else value)
            except (TypeError, ValueError, OverflowError, RecursionError):
                return column.name
        return None

    def _refusal(self, text: str) -> RowRefused:
        if found := _WRONG_FIELD.match(text):
            if "unknown" in text.partition("`")[0]:
                known = ", ".join(column.name for column in self._columns)
                return RowRefused(self.table.name, found[1], f"there is no such column; there are {known}")
            return RowRefused(self.table.name, found[1], "the row leaves it out, and it has no default")
        if found := _WRONG_VALUE.match(text):
            return RowRefused(self.table.name, found[2], found[1])
        return RowRefused(self.table.name, None, text)
