"""A write-behind buffer: ordered partitions in Redis, each one stream, without a consumer group.

What is acknowledged is in a stream; it leaves the stream only after the sink has committed it. The position
of the reader is in the sink's database, so a group would add nothing to safety, and cost a round trip.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from zlib import crc32

from redis.exceptions import OutOfMemoryError

from .. import keys
from ..connections import UNAVAILABLE, Connections, require_connections
from ..errors import BufferFull, ServerFull, ServerUnavailable
from ..scripts import load
from .position import Entry, EntryId


class _Put(NamedTuple):
    id: bytes | None
    length: int
    kick: bool


def _put_reply(reply: list[Any]) -> _Put:
    return _Put(reply[0], reply[1], bool(reply[2]))


@dataclass(frozen=True, slots=True)
class Batch:
    """The oldest entries of a partition, as of one moment."""

    run: str
    now_ms: int
    entries: Sequence[Entry]


def _read_reply(reply: list[Any]) -> Batch:
    run, now_ms, raw = reply
    return Batch(run.decode(), int(now_ms), [_entry(id_, fields) for id_, fields in raw])


def _entry(id_: bytes, fields: list[bytes]) -> Entry:
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    return Entry(EntryId.parse(id_.decode()), named.get(b"r", b"").decode(), named.get(b"d", b""))


_ANNOUNCE_EVERY_S = 60.0
_ANNOUNCED_MS = 90 * 86_400_000  # rows that are older than this are not left over from a deployment

_PUT = load(__package__, "buffer_put", _put_reply)
_READ = load(__package__, "buffer_read", _read_reply)
_TRIM = load(__package__, "buffer_trim", int)


class Buffer:
    """The streams of one buffer.

    Promises: a row whose ``put`` returned is in its partition, behind every row that was put there before; a
    partition never holds more than ``max_length`` rows.

    Non-promises: what Redis itself loses is lost (set ``appendonly yes``, and ``noeviction``). A ``put`` that
    raised ``ServerUnavailable`` may have happened: repeating it may put the row twice.

    Arguments:
        redis: from ``connect``.
        name: of the buffer; the same in every process.
        partitions: how many flush beside each other. The same in every process; when the number changes, what is left
            in the old ones is flushed too, but then not in order with what comes after.
        batch_size: rows per flush; a partition that reaches a multiple of it asks to be flushed.
        max_length: rows per partition that may wait. At about 150 bytes each, the default is 150 MB.
    """

    def __init__(
        self,
        redis: Connections,
        name: str,
        *,
        partitions: int = 4,
        batch_size: int = 1_000,
        max_length: int = 1_000_000,
    ) -> None:
        require_connections(redis)
        for argument, value in (
            ("partitions", partitions),
            ("batch_size", batch_size),
            ("max_length", max_length),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{argument} must be a whole number of at least 1, not {value!r}")
        self.redis = redis
        self.name = name
        self.partitions = partitions
        self.batch_size = batch_size
        self.max_length = max_length
        self._streams = keys.streams(name, partitions)
        self._counts = keys.partition_counts(name)
        self._announce_at = 0.0

    def __repr__(self) -> str:
        return f"<Buffer {self.name!r} [{self.partitions} partitions] at {self.redis.address}>"

    def partition_of(self, identity: bytes) -> int:
        """Where the rows of one key go: the same partition in every process, so that they stay in order."""
        return crc32(identity) % self.partitions

    def put(self, partition: int, payload: bytes) -> bool:
        """Append one row, in one round trip (once a minute two). Returns whether a batch has just become full.

        Raises ``BufferFull``; ``ServerFull`` when Redis has no memory for the row; ``ServerUnavailable`` when nobody
        knows whether it is in the buffer.
        """
        try:
            if time.monotonic() >= self._announce_at:
                self.announce()
            put = _PUT(
                self.redis.coordination,
                stream=self._streams[partition],
                payload=payload,
                max_length=self.max_length,
                batch_size=self.batch_size,
            )
        except OutOfMemoryError as error:
            raise ServerFull(self.redis.address, self.name) from error
        except UNAVAILABLE as error:
            raise ServerUnavailable(self.redis.address, error, doing=f"put into buffer {self.name!r}") from error
        if put.id is None:
            raise BufferFull(self.name, partition, put.length)
        return put.kick

    def read(self, partition: int) -> Batch:
        """The oldest batch of a partition. Takes nothing away. Raises redis-py's errors."""
        return _READ(self.redis.coordination, stream=self._streams[partition], count=self.batch_size)

    def trim(self, partition: int, batch: Batch) -> int:
        """Remove a batch that the sink has committed. Raises redis-py's errors."""
        last = max(entry.id for entry in batch.entries)
        return _TRIM(
            self.redis.coordination,
            stream=self._streams[partition],
            run=batch.run,
            min_id=str(last.following()),
        )

    def lengths(self) -> list[int]:
        """How many rows wait in each partition, in one round trip. Raises redis-py's errors."""
        pipeline = self.redis.coordination.pipeline(transaction=False)
        for stream in self._streams:
            pipeline.xlen(stream)
        return [int(length) for length in pipeline.execute()]

    def partition_counts(self) -> set[int]:
        """The other numbers of partitions that any process has lately put rows into. Raises redis-py's errors."""
        counts: set[bytes] = self.redis.coordination.execute_command("SMEMBERS", self._counts)
        return {int(count) for count in counts if count.isdigit() and int(count) > 0} - {self.partitions}

    def with_partitions(self, partitions: int) -> "Buffer":
        """The same buffer, as it is where it has another number of partitions."""
        return Buffer(
            self.redis, self.name, partitions=partitions, batch_size=self.batch_size, max_length=self.max_length
        )

    def announce(self) -> None:
        """Say in Redis how many partitions this buffer has here. Raises redis-py's errors.

        Done before a process's first row, every minute after that (Redis may have been emptied), and by whoever
        looks for rows that are left over.

        A worker that is given another number learns from it where else there are rows to flush.
        """
        pipeline = self.redis.coordination.pipeline(transaction=True)
        pipeline.sadd(self._counts, self.partitions)
        pipeline.pexpire(self._counts, _ANNOUNCED_MS)
        pipeline.execute()
        self._announce_at = time.monotonic() + _ANNOUNCE_EVERY_S
