"""``WriteBehind``: rows taken by Redis now, flushed to SQL by Celery soon."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery import Celery

from ..cachelib.connections import Connections
from ..cachelib.counters import SharedCounters
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.write_behind import Buffer, Flushed, Flusher, SqlSink
from . import wiring

logger = logging.getLogger(__name__)

_KICK_AGAIN_S = 10.0  # after a kick that the broker did not take; beat kicks meanwhile
_DRAIN_S = 30.0  # how long a worker that ends may go on flushing; the rest stays in Redis, for the next worker


@dataclass(frozen=True, slots=True)
class WriteBehindStats:
    """How a buffer stands."""

    waiting: int
    """Rows in Redis that are not in SQL yet (or are, and not trimmed)."""
    rows_applied: int
    """Rows in SQL, counted in the transactions that wrote them."""
    lag_ms: int
    """Mean age of the oldest row of a batch when it was committed."""


class WriteBehind:
    """A table that is written behind: ``put`` returns when Redis has the row, Celery writes it to SQL.

    >>> views = WriteBehind(redis, "page_views", SqlSink(engine, PageView.__table__, mode="append"))
    >>> views.put({"path": "/", "at": now})

    It brings its Celery task, ``petiole.flush.<name>``, and its beat entry, ``petiole: flush <name>``: a module of
    the app's ``include`` that makes it is all that workers and beat need.

    Promises: a row whose ``put`` returned is in SQL exactly once, for all that Redis did not lose: whatever
    worker is killed whenever, however many flush at once, whether a commit's reply was lost or Redis came
    back from an older snapshot. The rows of one key are applied in the order of their puts. Memory in Redis
    is bounded by ``max_length``. A database that is away is caught up with when it is back.

    Non-promises: what Redis loses is lost. A ``put`` that raised ``ServerUnavailable`` may have happened.

    Not yet: reads that see what is not flushed; see ``SqlSink`` for the modes and the rows that a database refuses.

    Arguments:
        redis: from ``connect``; ``noeviction`` and ``appendonly yes`` for rows that matter.
        name: of the buffer: letters, digits, ``_``, ``.``, ``-``. The same in every process.
        sink: where the rows go.
        app: the Celery app; without one, as ``shared_task``.
        partitions: how many flush beside each other; see ``Buffer``.
        batch_size: rows per transaction; a full batch is flushed at once.
        max_delay: how long a row waits at most for its flush to begin, while beat and a worker run.
        max_length: rows per partition that may wait before ``put`` raises ``BufferFull``.
    """

    def __init__(
        self,
        redis: Connections,
        name: str,
        sink: SqlSink,
        *,
        app: Celery | None = None,
        partitions: int = 4,
        batch_size: int = 1_000,
        max_delay: Duration = 1.0,
        max_length: int = 1_000_000,
    ) -> None:
        self.name = wiring.checked_name(name, "buffer name")
        self.sink = sink
        self.buffer = Buffer(redis, name, partitions=partitions, batch_size=batch_size, max_length=max_length)
        self.flusher = Flusher(self.buffer, sink)
        self._counters = SharedCounters(redis, "buffer", name)
        self._no_kick_before = 0.0
        task_name = f"petiole.flush.{name}"

        def flush(partition: int | None = None) -> dict[str, int]:
            return self._run(partition)

        self.task = wiring.add_task(app, task_name, flush, ignore_result=True)
        wiring.add_beat_entry(
            app, f"petiole: flush {name}", every_ms=milliseconds(max_delay, "max_delay"), task=task_name
        )
        wiring.at_worker_end(app, self._drain)

    def __repr__(self) -> str:
        return f"<WriteBehind {self.name!r} -> {self.sink!r}>"

    def put(self, row: Mapping[str, Any]) -> None:
        """Take a row, in one round trip.

        Arguments:
            row: a value per column. Columns with a default may be left out.

        Raises ``RowRefused`` for a row that does not fit the table, before anything is written; ``BufferFull``;
        and ``ServerUnavailable`` when nobody knows whether Redis has the row.
        """
        packed = self.sink.format.pack(row)
        partition = self.buffer.partition_of(packed.identity)
        if self.buffer.put(partition, packed.payload):
            self._kick(partition)

    def flush(self, *, within: Duration = _DRAIN_S) -> int:
        """Flush every partition in this process, now. Returns how many rows it wrote.

        Arguments:
            within: begin no further batch after this long.

        Raises the first of SQLAlchemy's and redis-py's errors, after every partition had its turn; no row is lost.
        """
        deadline = time.monotonic() + milliseconds(within, "within") / 1_000
        written = 0
        failures: list[Exception] = []
        for flusher in (self.flusher, *self.flusher.left_over()):
            for partition in range(flusher.buffer.partitions):
                try:
                    more = True
                    while more and time.monotonic() < deadline:
                        flushed = self._flush(partition, flusher, most_batches=1)
                        written += flushed.rows
                        more = flushed.more
                except Exception as error:  # noqa: BLE001 - raised below, after the other partitions had their turn
                    failures.append(error)
        if failures:
            raise failures[0]
        return written

    def stats(self) -> WriteBehindStats:
        """How the buffer stands, from Redis and the database. Raises their errors."""
        counts = self._counters.read()
        return WriteBehindStats(
            waiting=sum(self.buffer.lengths()),
            rows_applied=self.sink.rows_applied(self.name),
            lag_ms=counts.get("lag_ms", 0) // max(1, counts.get("flushes", 0)),
        )

    def _run(self, partition: int | None = None) -> dict[str, int]:
        """The task: one partition, or, from beat, all that hold rows; also those of a number that was changed.

        Its result is what Flower shows.
        """
        if partition is not None:
            return self._flush_partition(partition)
        waiting = [p for p, length in enumerate(self.buffer.lengths()) if length]
        for other in waiting[1:]:
            self._kick(other)
        flushed = self._flush_partition(waiting[0]) if waiting else {"rows": 0}
        for flusher in self.flusher.left_over():
            for old in range(flusher.buffer.partitions):
                self._flush(old, flusher)
        return flushed

    def _flush_partition(self, partition: int) -> dict[str, int]:
        flushed = self._flush(partition, self.flusher)
        if flushed.more:
            self._kick(partition)
        return {"partition": partition, "rows": flushed.rows, "batches": flushed.batches, "lag_ms": flushed.lag_ms}

    def _flush(self, partition: int, flusher: Flusher, most_batches: int = 50) -> Flushed:
        flushed = flusher.flush(partition, most_batches=most_batches)
        if flushed.rows:
            self._counters.add(flushes=1, rows=flushed.rows, lag_ms=flushed.lag_ms)
        return flushed

    def _kick(self, partition: int) -> None:
        """Ask a worker to flush a partition now. May fail: beat asks again."""
        if time.monotonic() < self._no_kick_before:
            return
        try:
            wiring.send_at_once(self.task, (partition,), expires=60)
        except wiring.SEND_FAILURES as error:
            # A broker that hangs holds a connect for seconds; the puts that follow are not to wait, each of them.
            self._no_kick_before = time.monotonic() + _KICK_AGAIN_S
            logger.warning("buffer %r: nobody was told that a batch is full (%s); beat will", self.name, error)

    def _drain(self) -> None:
        """What a worker does at its end: leave nothing for the next one, if there is time."""
        try:
            written = self.flush()
        except Exception:
            logger.exception("buffer %r was not drained; its rows stay in Redis", self.name)
        else:
            logger.info("buffer %r drained: %d rows", self.name, written)
