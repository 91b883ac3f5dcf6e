"""What a column takes, as far as its definition tells. Pure.

``type_of`` says it as a type, which msgspec checks; ``faults_of`` is what a type cannot say.
"""

import enum
import math
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated, Any, Literal

import msgspec
import sqlalchemy as sa

Fault = Callable[[Any], str | None]
"""Why a value that has the column's type is refused all the same; None when it is not."""

_INTEGER_BITS = ((sa.SmallInteger, 16), (sa.BigInteger, 64), (sa.Integer, 32))


def is_filled_by_database(column: "sa.Column[Any]") -> bool:
    """Whether the database computes the column, and takes no value for it."""
    return column.computed is not None or (column.identity is not None and bool(column.identity.always))


def is_required(column: "sa.Column[Any]") -> bool:
    """Whether an insert must name the column."""
    has_default = (
        column.default is not None
        or column.server_default is not None
        or column.identity is not None
        or column is column.table.autoincrement_column
    )
    return not column.nullable and not has_default


def is_number(column: "sa.Column[Any]") -> bool:
    """Whether values of the column can be added up."""
    return isinstance(column.type, sa.Integer | sa.Numeric | sa.Float)


def type_of(column: "sa.Column[Any]", wide_integers: bool) -> Any:
    """The type of the column's values.

    Arguments:
        wide_integers: whether the database stores 64 bits in every integer column, as SQLite does.
    """
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


def faults_of(column: "sa.Column[Any]") -> list[Fault]:
    """The checks of a column, over its type. They are given no None, but by ``refuses_none``."""
    kind = column.type
    if isinstance(kind, sa.JSON):
        return [_json_fault]
    faults: list[Fault] = []
    if isinstance(kind, sa.String) or not isinstance(kind, sa.Enum):
        faults.append(_text_fault)
    if isinstance(kind, sa.Numeric | sa.Float):
        faults.append(_number_fault)
    if isinstance(kind, sa.Numeric) and kind.precision:
        faults.append(_digits_fault(kind.precision, kind.scale or 0, str(kind)))
    return faults


def refuses_none(column: "sa.Column[Any]") -> bool:
    """Whether None, which a column of any type would take, is no value of this one."""
    json_null = isinstance(column.type, sa.JSON) and not column.type.none_as_null
    return not column.nullable and not json_null


def _text_fault(value: Any) -> str | None:
    if isinstance(value, str) and "\0" in value:
        return "text with a NUL character, which SQL text cannot hold"
    return None


def _number_fault(value: Any) -> str | None:
    finite = value.is_finite() if isinstance(value, Decimal) else math.isfinite(value)
    return None if finite else f"{value} is not a finite number"


def _digits_fault(precision: int, scale: int, shown: str) -> Fault:
    limit, step = Decimal(10) ** (precision - scale), Decimal(1).scaleb(-scale)

    def fault(value: Any) -> str | None:
        number = value if isinstance(value, Decimal) else Decimal(repr(value))
        if not number.is_finite() or abs(number) < limit - step:
            return None
        # Databases round to the scale first: 999.996 is 1000.00 in NUMERIC(5, 2), and does not fit.
        if abs(number) >= limit or abs(number).quantize(step, ROUND_HALF_UP) >= limit:
            return f"{value} has too many digits for {shown}"
        return None

    return fault


def _json_fault(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return next((why for item in (*value, *value.values()) if (why := _json_fault(item))), None)
    if isinstance(value, list):
        return next((why for item in value if (why := _json_fault(item))), None)
    if isinstance(value, float):
        return _number_fault(value)
    return _text_fault(value)
