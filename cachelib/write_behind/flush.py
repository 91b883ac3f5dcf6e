"""Moving one batch of one partition into the sink: the thin shell around ``position.py``.

Read the oldest entries; drop what the position says is applied; apply the rest and move the position in one
transaction; trim. It may end at any point, be repeated at any point, and run anywhere beside itself:

- before the commit: nothing happened, the entries are read again;
- after the commit, before the trim: they are read again, dropped, and trimmed;
- during the commit (the reply is lost): the position, read again, tells which of the two it was;
- two at once: the position moves from one version to the next only once, the other starts over.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from .buffer import Buffer
from .position import Position
from .rows import RowFormat

_MOST_FENCED = 20  # another flusher was faster so often: it is at work, leave the partition to it


class Sink(Protocol):
    """Where a buffer is flushed to. ``SqlSink`` is one."""

    format: RowFormat

    def prepare(self) -> None:
        """Make ready; called once per process."""

    def position(self, buffer: str, partition: int, partitions: int) -> Position:
        """How far a partition has come."""

    def apply(
        self,
        buffer: str,
        partition: int,
        partitions: int,
        old: Position,
        new: Position,
        rows: list[dict[str, Any]],
    ) -> bool:
        """Apply rows and move the position from old to new, both or neither; False when it is not at old."""


@dataclass(frozen=True, slots=True)
class Flushed:
    """What one flush of a partition did."""

    rows: int
    batches: int
    lag_ms: int
    """Age of the oldest row when it was committed."""
    more: bool
    """Whether rows are left."""


class Flusher:
    """Flushes one buffer into one sink."""

    def __init__(self, buffer: Buffer, sink: Sink) -> None:
        self.buffer = buffer
        self.sink = sink
        self._prepared = False

    def __repr__(self) -> str:
        return f"<Flusher {self.buffer!r} -> {self.sink!r}>"

    def flush(self, partition: int, *, most_batches: int = 50) -> Flushed:
        """Flush a partition until it is empty, or ``most_batches`` are done.

        Raises SQLAlchemy's and redis-py's errors; whatever is raised, no row is lost, and none is applied twice.
        """
        if not 0 <= partition < self.buffer.partitions:
            raise ValueError(f"{self.buffer!r} has no partition {partition}")
        if not self._prepared:
            self.sink.prepare()
            self._prepared = True
        rows = batches = lag_ms = fenced = 0
        position: Position | None = None  # known from our own last commit, so that it is read only once
        while batches < most_batches and fenced < _MOST_FENCED:
            batch = self.buffer.read(partition)
            if not batch.entries:
                return Flushed(rows, batches, lag_ms, more=False)
            if position is None:
                position = self.sink.position(self.buffer.name, partition, self.buffer.partitions)
            entries = position.unapplied(batch.entries)
            if entries:
                new = position.after(entries, batch.now_ms)
                unpacked = [self.sink.format.unpack(entry.payload) for entry in entries]
                if not self.sink.apply(self.buffer.name, partition, self.buffer.partitions, position, new, unpacked):
                    position = None
                    fenced += 1
                    continue
                position = new
                rows += len(entries)
                lag_ms = max(lag_ms, new.lag_ms)
            self.buffer.trim(partition, batch)
            batches += 1
        return Flushed(rows, batches, lag_ms, more=True)

    def left_over(self) -> "list[Flusher]":
        """Flushers for the partitions of other numbers that hold rows: from before the number was changed.

        Positions are kept per number, so they may flush beside this one. Raises redis-py's errors.
        """
        self.buffer.announce()
        others = [self.buffer.with_partitions(count) for count in self.buffer.partition_counts()]
        return [Flusher(buffer, self.sink) for buffer in others if any(buffer.lengths())]
