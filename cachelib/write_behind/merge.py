"""Which rows a batch becomes. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from itertools import groupby
from typing import Any

Row = Mapping[str, Any]


def summed(rows: Iterable[Row], key: Sequence[str], amounts: Sequence[str]) -> list[dict[str, Any]]:
    """One row per key, amounts added up, in the order of the keys.

    An upsert may not meet a key twice in one statement, and flushers that lock rows in one order do not
    deadlock. An amount that a row leaves out counts as nothing.

    >>> summed([{"path": "/b", "n": 1}, {"path": "/a", "n": 2}, {"path": "/b", "n": 3}], ["path"], ["n"])
    [{'path': '/a', 'n': 2}, {'path': '/b', 'n': 4}]
    """
    totals: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        identity = tuple(row[column] for column in key)
        total = totals.get(identity)
        if total is None:
            total = totals[identity] = dict(zip(key, identity, strict=True)) | dict.fromkeys(amounts, 0)
        for column in amounts:
            total[column] += row.get(column, 0)
    return [totals[identity] for identity in sorted(totals, key=_sortable)]


def alike(rows: Iterable[Row]) -> list[list[Row]]:
    """Runs of neighbouring rows that name the same columns, so that each run is one statement.

    >>> [len(run) for run in alike([{"a": 1}, {"a": 2}, {"a": 3, "b": 4}])]
    [2, 1]
    """
    return [list(run) for _, run in groupby(rows, key=frozenset)]


def _sortable(identity: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.name if isinstance(value, Enum) else value for value in identity)
