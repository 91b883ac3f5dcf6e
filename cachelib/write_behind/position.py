"""Which entries of a partition are in the sink, and which are not. Pure.

The idea is Kafka's: keep the position of the reader in the same store as what was read, and move both in one
transaction. The invariant: **an entry is applied if and only if its id is not above the mark of the run that
gave it its id.** Ids rise within one run of one Redis server and may go back in the next (a tail was lost, a
clock was set back), so each run has a mark of its own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

MOST_RUNS = 64  # marks kept; a stream that is restored from before the last 64 restarts is not recognised


class EntryId(NamedTuple):
    """The id of a stream entry; ordered as Redis orders them."""

    ms: int
    sequence: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``"1732310000000-5"``."""
        ms, _, sequence = text.partition("-")
        return cls(int(ms), int(sequence))

    def __str__(self) -> str:
        return f"{self.ms}-{self.sequence}"

    def following(self) -> "EntryId":
        """The smallest id above this one."""
        return EntryId(self.ms, self.sequence + 1)


class Entry(NamedTuple):
    """One row in a stream."""

    id: EntryId
    run: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Position:
    """How far one partition has come."""

    version: int
    """Rises by one with each batch; what the fence compares."""
    marks: Mapping[str, EntryId]
    """The last applied id of each run, the most recent run last."""
    rows_applied: int
    lag_ms: int
    """Age of the oldest row of the last batch when it was committed; what a dashboard shows."""

    def unapplied(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those entries that are not in the sink yet, in their order."""
        lowest = EntryId(-1, -1)
        return [entry for entry in entries if entry.id > self.marks.get(entry.run, lowest)]

    def after(self, entries: Sequence[Entry], now_ms: int) -> "Position":
        """The position once these entries, which must be unapplied, are in the sink."""
        marks = dict(self.marks)
        for entry in entries:
            mark = marks.pop(entry.run, None)
            marks[entry.run] = entry.id if mark is None else max(mark, entry.id)
        kept = list(marks.items())[-MOST_RUNS:]
        return replace(
            self,
            version=self.version + 1,
            marks=dict(kept),
            rows_applied=self.rows_applied + len(entries),
            lag_ms=max(0, now_ms - min((entry.id.ms for entry in entries), default=now_ms)),
        )


START = Position(version=0, marks={}, rows_applied=0, lag_ms=0)


def marks_to_text(marks: Mapping[str, EntryId]) -> str:
    """The marks as they stand in the database."""
    return json.dumps([[run, str(mark)] for run, mark in marks.items()])


def marks_from_text(text: str) -> dict[str, EntryId]:
    """The marks as they are decided with."""
    return {run: EntryId.parse(mark) for run, mark in json.loads(text)}
