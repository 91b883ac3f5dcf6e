"""``Flusher``: a flush may end at any point, be repeated at any point, and run beside itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from redis.exceptions import ConnectionError as RedisConnectionError

from petiole.cachelib import Connections, EmbeddedServer, connect
from petiole.cachelib.write_behind import Buffer, Flusher, SqlSink
from petiole.cachelib.write_behind.buffer import Batch
from petiole.cachelib.write_behind.position import Position


class Crash(Exception):
    """What stands for the end of a process."""


@pytest.fixture
def log(engine: sa.Engine) -> sa.Table:
    """A table that takes every row, also twice."""
    table = sa.Table("log", sa.MetaData(), sa.Column("n", sa.Integer, nullable=False))
    table.create(engine)
    return table


@pytest.fixture
def sink(engine: sa.Engine, log: sa.Table) -> SqlSink:
    return SqlSink(engine, log, mode="append")


@pytest.fixture
def buffer(redis: Connections, name: str) -> Buffer:
    return Buffer(redis, name, partitions=1, batch_size=3)


def put(buffer: Buffer, sink: SqlSink, *numbers: int, partition: int = 0) -> None:
    for number in numbers:
        buffer.put(partition, sink.format.pack({"n": number}).payload)


def written(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.execute(sa.text("SELECT n FROM log")).scalars().all())


class CrashingBuffer(Buffer):
    """Ends at a trim, the given number of times."""

    crashes = 1

    def trim(self, partition: int, batch: Batch) -> int:
        if self.crashes:
            self.crashes -= 1
            raise Crash
        return super().trim(partition, batch)


class Between(SqlSink):
    """Lets something happen between the decision and the transaction."""

    happens: Callable[[], object] | None = None

    def apply(
        self, buffer: str, partition: int, partitions: int, old: Position, new: Position, rows: Sequence[dict[str, Any]]
    ) -> bool:
        happens, self.happens = self.happens, None
        if happens:
            happens()
        return super().apply(buffer, partition, partitions, old, new, rows)


def test_a_flush_writes_every_row_in_order_and_leaves_nothing(buffer: Buffer, sink: SqlSink) -> None:
    """It says how many rows, in how many batches, and that nothing is left."""
    put(buffer, sink, *range(8))
    flushed = Flusher(buffer, sink).flush(0)

    assert written(sink.engine) == list(range(8))
    assert buffer.lengths() == [0]
    assert (flushed.rows, flushed.batches, flushed.more) == (8, 3, False)
    assert flushed.lag_ms >= 0


def test_an_empty_partition_is_flushed_without_a_word(buffer: Buffer, sink: SqlSink) -> None:
    """Beat does so all day."""
    flushed = Flusher(buffer, sink).flush(0)

    assert (flushed.rows, flushed.batches, flushed.lag_ms, flushed.more) == (0, 0, 0, False)


def test_a_flush_ends_after_so_many_batches_and_says_that_rows_are_left(buffer: Buffer, sink: SqlSink) -> None:
    """One task must not run for ever."""
    put(buffer, sink, *range(8))
    flushed = Flusher(buffer, sink).flush(0, most_batches=2)

    assert (flushed.rows, flushed.batches, flushed.more) == (6, 2, True)
    assert written(sink.engine) == list(range(6))


@pytest.mark.parametrize("partition", [-1, 1])
def test_a_partition_that_there_is_not_is_refused(partition: int, buffer: Buffer, sink: SqlSink) -> None:
    """A typing error must not look like an empty partition."""
    with pytest.raises(ValueError, match=f"has no partition {partition}"):
        Flusher(buffer, sink).flush(partition)


@pytest.mark.parametrize("flushed_before", [False, True], ids=["first batch", "later batch"])
def test_an_end_between_commit_and_trim_repeats_nothing(
    flushed_before: bool, redis: Connections, name: str, buffer: Buffer, sink: SqlSink
) -> None:
    """The entries are read again, dropped, and trimmed."""
    if flushed_before:
        put(buffer, sink, 0)
        Flusher(buffer, sink).flush(0)
    before = len(written(sink.engine))
    put(buffer, sink, 1, 2)
    with pytest.raises(Crash):
        Flusher(CrashingBuffer(redis, name, partitions=1), sink).flush(0)
    assert buffer.lengths() == [2]

    flushed = Flusher(buffer, sink).flush(0)

    assert flushed.rows == 0
    assert written(sink.engine)[before:] == [1, 2]
    assert buffer.lengths() == [0]


def test_rows_that_came_after_the_end_are_told_from_those_before(
    redis: Connections, name: str, buffer: Buffer, sink: SqlSink
) -> None:
    """One batch may hold both applied and unapplied entries."""
    put(buffer, sink, 1, 2)
    with pytest.raises(Crash):
        Flusher(CrashingBuffer(redis, name, partitions=1), sink).flush(0)
    put(buffer, sink, 3)

    assert Flusher(buffer, sink).flush(0).rows == 1
    assert written(sink.engine) == [1, 2, 3]


def test_an_end_before_the_commit_writes_nothing_and_loses_nothing(buffer: Buffer, sink: SqlSink) -> None:
    """Position and rows are one transaction: neither is there."""
    flusher = Flusher(buffer, sink)
    flusher.flush(0)
    put(buffer, sink, 1, 2)

    def crash(*_: object) -> None:
        raise Crash

    sa.event.listen(sink.engine, "commit", crash)
    with pytest.raises(Crash):
        flusher.flush(0)
    sa.event.remove(sink.engine, "commit", crash)
    assert written(sink.engine) == []
    assert buffer.lengths() == [2]

    assert flusher.flush(0).rows == 2
    assert written(sink.engine) == [1, 2]


@pytest.mark.parametrize("flushed_before", [False, True], ids=["first batch", "later batch"])
def test_a_commit_whose_reply_was_lost_is_not_repeated(flushed_before: bool, buffer: Buffer, sink: SqlSink) -> None:
    """Nobody knows whether it happened; the position, read again, tells."""
    flusher = Flusher(buffer, sink)
    if flushed_before:
        put(buffer, sink, 0)
    flusher.flush(0)
    before = len(written(sink.engine))
    put(buffer, sink, 1, 2, 3, 4)
    dialect = sink.engine.dialect
    commit = dialect.do_commit

    def commit_and_lose_the_reply(connection: Any) -> None:
        dialect.do_commit = commit  # type: ignore[method-assign]
        commit(connection)
        raise sa.exc.OperationalError("COMMIT", {}, Crash("the connection was lost"))

    dialect.do_commit = commit_and_lose_the_reply  # type: ignore[method-assign]
    with pytest.raises(sa.exc.OperationalError):
        flusher.flush(0)
    assert written(sink.engine)[before:] == [1, 2, 3]
    assert buffer.lengths() == [4]

    assert flusher.flush(0).rows == 1
    assert written(sink.engine)[before:] == [1, 2, 3, 4]
    assert buffer.lengths() == [0]


@pytest.mark.parametrize("flushed_before", [False, True], ids=["first batch", "later batch"])
def test_a_flusher_that_was_overtaken_before_its_transaction_starts_over(
    flushed_before: bool, engine: sa.Engine, log: sa.Table, buffer: Buffer, sink: SqlSink
) -> None:
    """The position is moved from the version that the decision was made from, or nothing is applied."""
    if flushed_before:
        put(buffer, sink, 0)
        Flusher(buffer, sink).flush(0)
    before = len(written(engine))
    put(buffer, sink, 1, 2, 3, 4)
    slow = Between(engine, log, mode="append")
    fast = Flusher(buffer, sink)
    slow.happens = lambda: fast.flush(0, most_batches=1)

    assert Flusher(buffer, slow).flush(0).rows == 1
    assert written(engine)[before:] == [1, 2, 3, 4]
    assert buffer.lengths() == [0]


def test_a_flusher_that_is_overtaken_between_its_own_batches_starts_over(
    engine: sa.Engine, log: sa.Table, buffer: Buffer, sink: SqlSink
) -> None:
    """A position that is known from the last commit is only a guess."""
    slow = Between(engine, log, mode="append")
    flusher, overtaker = Flusher(buffer, slow), Flusher(buffer, sink)
    flusher.flush(0)
    overtaker.flush(0)
    put(buffer, sink, *range(9))

    def later() -> None:
        slow.happens = lambda: overtaker.flush(0, most_batches=1)

    sa.event.listen(engine, "commit", lambda _: later(), once=True)

    assert flusher.flush(0).rows == 6
    assert written(engine) == list(range(9))


def test_the_fence_refuses_an_old_version_and_applies_nothing(buffer: Buffer, sink: SqlSink) -> None:
    """``apply`` answers False when the position is not where it was decided from."""
    put(buffer, sink, 1)
    sink.prepare()
    old = sink.position(buffer.name, 0, 1)
    new = old.after(buffer.read(0).entries, now_ms=0)

    assert sink.apply(buffer.name, 0, 1, old, new, [{"n": 1}])
    assert not sink.apply(buffer.name, 0, 1, old, new, [{"n": 1}])
    assert sink.apply(buffer.name, 0, 1, new, new.after([], 0), [])
    assert not sink.apply(buffer.name, 0, 1, new, new.after([], 0), [{"n": 1}])
    assert written(sink.engine) == [1]


def test_a_flusher_that_is_overtaken_every_time_leaves_the_partition_to_the_other(
    engine: sa.Engine, log: sa.Table, buffer: Buffer, sink: SqlSink
) -> None:
    """It ends instead of running for ever; the other one writes."""

    class AlwaysOvertaken(SqlSink):
        def apply(self, *arguments: Any) -> bool:
            return False

    put(buffer, sink, 1)
    flushed = Flusher(buffer, AlwaysOvertaken(engine, log, mode="append")).flush(0)

    assert (flushed.rows, flushed.more) == (0, True)
    assert buffer.lengths() == [1]


def test_entries_that_come_back_in_the_same_run_are_dropped(
    redis: Connections, name: str, buffer: Buffer, sink: SqlSink
) -> None:
    """A stream that is restored from an older dump holds what is applied already, and what is not."""
    client = redis.coordination
    stream = f"petiole:1:buffer:{{{name}:0/1}}"
    put(buffer, sink, 1, 2)
    older = client.dump(stream)
    assert older is not None
    Flusher(buffer, sink).flush(0)
    client.restore(stream, 0, older, replace=True)
    put(buffer, sink, 3)
    assert buffer.lengths() == [3]

    Flusher(buffer, sink).flush(0)

    assert written(sink.engine) == [1, 2, 3]
    assert buffer.lengths() == [0]


def test_a_server_that_is_restarted_from_a_snapshot_repeats_nothing(
    own_server: Callable[..., EmbeddedServer], tmp_path: Path, name: str, sink: SqlSink
) -> None:
    """Trimmed entries are there again, under another run; what was put since is written, what was not applied too."""
    first = own_server("--dir", str(tmp_path), "--dbfilename", "dump.rdb")
    with connect(first.url) as redis:
        buffer = Buffer(redis, name, partitions=1)
        put(buffer, sink, 1, 2)
        Flusher(buffer, sink).flush(0, most_batches=1)
        put(buffer, sink, 3, 4)
        redis.coordination.save()
        Flusher(buffer, sink).flush(0)
        put(buffer, sink, 5)  # lost with the server: nobody can help that
    first.stop()
    with connect(own_server("--dir", str(tmp_path), "--dbfilename", "dump.rdb").url) as redis:
        buffer = Buffer(redis, name, partitions=1)
        assert buffer.lengths() == [2]
        put(buffer, sink, 6)

        assert Flusher(buffer, sink).flush(0).rows == 1
        assert buffer.lengths() == [0]
    assert written(sink.engine) == [1, 2, 3, 4, 6]


def test_a_server_that_is_restarted_in_the_middle_of_a_flush_repeats_and_loses_nothing(
    own_server: Callable[..., EmbeddedServer], tmp_path: Path, name: str, engine: sa.Engine, log: sa.Table
) -> None:
    """The commit happened, the trim finds nobody; the next flush drops what is applied."""
    first = own_server("--dir", str(tmp_path), "--dbfilename", "dump.rdb")
    sink = Between(engine, log, mode="append")
    with connect(first.url) as redis:
        buffer = Buffer(redis, name, partitions=1)
        put(buffer, sink, 1, 2)
        redis.coordination.save()
        sink.happens = first.stop
        with pytest.raises((RedisConnectionError, OSError)):
            Flusher(buffer, sink).flush(0)
    with connect(own_server("--dir", str(tmp_path), "--dbfilename", "dump.rdb").url) as redis:
        buffer = Buffer(redis, name, partitions=1)
        put(buffer, sink, 3)
        Flusher(buffer, sink).flush(0)

    assert written(engine) == [1, 2, 3]


def test_ids_that_went_back_in_a_new_run_are_not_dropped(
    redis: Connections, own_server: Callable[..., EmbeddedServer], name: str, buffer: Buffer, sink: SqlSink
) -> None:
    """The tail was lost and the clock is behind: such rows are new, although their ids are lower."""
    put(buffer, sink, 1)
    Flusher(buffer, sink).flush(0)
    with connect(own_server().url) as other:
        behind = Buffer(other, name, partitions=1)
        payload = sink.format.pack({"n": 2}).payload
        other.coordination.xadd(f"petiole:1:buffer:{{{name}:0/1}}", {"r": "fedcba987654", "d": payload}, id="1-1")
        assert Flusher(behind, sink).flush(0).rows == 1
    put(buffer, sink, 3)
    Flusher(buffer, sink).flush(0)

    assert written(sink.engine) == [1, 2, 3]


def test_scripts_that_are_forgotten_in_the_middle_of_a_flush_change_nothing(
    redis: Connections, engine: sa.Engine, log: sa.Table, buffer: Buffer
) -> None:
    """SCRIPT FLUSH between the read and the trim."""
    sink = Between(engine, log, mode="append")
    put(buffer, sink, *range(7))
    sink.happens = redis.coordination.script_flush

    assert Flusher(buffer, sink).flush(0).rows == 7
    assert written(engine) == list(range(7))


def test_rows_in_partitions_of_another_number_are_found_and_flushed(
    redis: Connections, name: str, sink: SqlSink
) -> None:
    """Whether the old number was ever flushed or not; each number has positions of its own."""
    four, two = Buffer(redis, name, partitions=4), Buffer(redis, name, partitions=2)
    put(four, sink, 1, partition=0)
    Flusher(four, sink).flush(0)
    put(four, sink, 2, 3, partition=3)
    put(two, sink, 4, partition=1)
    new = Flusher(two, sink)
    (old,) = new.left_over()

    assert old.buffer.lengths() == [0, 0, 0, 2]
    assert old.flush(3).rows == 2
    assert new.flush(1).rows == 1
    assert new.left_over() == []
    assert sorted(written(sink.engine)) == [1, 2, 3, 4]


def test_rows_that_went_to_the_new_partitions_early_are_not_dropped(
    redis: Connections, name: str, sink: SqlSink
) -> None:
    """While a new release is rolled out, some put under the new number before the old one is drained."""
    four = Buffer(redis, name, partitions=4)
    two = Buffer(redis, name, partitions=2)
    put(two, sink, 1)
    put(four, sink, 2)
    Flusher(four, sink).flush(0)
    Flusher(two, sink).flush(0)

    assert sorted(written(sink.engine)) == [1, 2]


def test_two_buffers_in_one_database_do_not_know_each_other(redis: Connections, name: str, sink: SqlSink) -> None:
    """The position is that of a buffer, not of a table."""
    one, other = Buffer(redis, name, partitions=1), Buffer(redis, f"{name}-other", partitions=1)
    put(other, sink, 1)
    put(one, sink, 2)
    Flusher(one, sink).flush(0)
    Flusher(other, sink).flush(0)

    assert sorted(written(sink.engine)) == [1, 2]


def test_a_row_that_the_database_refuses_stops_its_partition_and_loses_nothing(
    redis: Connections, name: str, engine: sa.Engine
) -> None:
    """A check constraint is known to the database alone. Position and buffer stay; other partitions go on."""
    table = sa.Table("log", sa.MetaData(), sa.Column("n", sa.Integer), sa.CheckConstraint("n < 100"))
    table.create(engine)
    sink = SqlSink(engine, table, mode="append")
    buffer = Buffer(redis, name, partitions=2)
    put(buffer, sink, 1, 100, 2)
    put(buffer, sink, 3, partition=1)
    flusher = Flusher(buffer, sink)
    sink.prepare()
    before = sink.position(name, 0, 2)

    for _ in range(2):
        with pytest.raises(sa.exc.IntegrityError):
            flusher.flush(0)
    assert sink.position(name, 0, 2) == before
    assert buffer.lengths() == [3, 1]
    assert flusher.flush(1).rows == 1
    assert written(engine) == [3]


def test_rows_wait_while_the_database_is_away_and_are_caught_up_with(
    engine: sa.Engine, log: sa.Table, buffer: Buffer, sink: SqlSink, tmp_path: Path
) -> None:
    """The flush raises, the buffer stays as it is."""
    away = sa.create_engine(
        f"sqlite:///{tmp_path}/no such folder/db"
        if engine.dialect.name == "sqlite"
        else "postgresql+psycopg://user:secret@127.0.0.1:1/db"
    )
    put(buffer, sink, 1, 2)

    with pytest.raises(sa.exc.OperationalError):
        Flusher(buffer, SqlSink(away, log, mode="append")).flush(0)
    assert buffer.lengths() == [2]
    assert Flusher(buffer, sink).flush(0).rows == 2
    assert written(engine) == [1, 2]


def test_a_database_that_went_away_in_the_middle_is_caught_up_with(
    engine: sa.Engine, log: sa.Table, buffer: Buffer
) -> None:
    """The same flusher goes on once the table is there again."""
    sink = SqlSink(engine, log, mode="append")
    flusher = Flusher(buffer, sink)
    put(buffer, sink, 1)
    flusher.flush(0)
    put(buffer, sink, 2)
    log.drop(engine)
    with pytest.raises((sa.exc.OperationalError, sa.exc.ProgrammingError)):
        flusher.flush(0)
    log.create(engine)

    assert flusher.flush(0).rows == 1
    assert written(engine) == [2]


def test_sums_are_exact_over_batches_and_partitions(redis: Connections, name: str, engine: sa.Engine) -> None:
    """Every amount is added once, into the row of its key, whatever batch it is in."""
    table = sa.Table(
        "hits",
        sa.MetaData(),
        sa.Column("path", sa.String(20), primary_key=True),
        sa.Column("hits", sa.Integer, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"),
    )
    table.create(engine)
    sink = SqlSink(engine, table, mode="sum")
    buffer = Buffer(redis, name, partitions=2, batch_size=7)
    for number in range(200):
        packed = sink.format.pack({"path": f"/{number % 5}", "hits": 1, "bytes": number})
        buffer.put(buffer.partition_of(packed.identity), packed.payload)
    flusher = Flusher(buffer, sink)
    rows = [flusher.flush(partition).rows for partition in range(2)]

    with engine.connect() as connection:
        stored = {row.path: (row.hits, row.bytes) for row in connection.execute(sa.select(table))}
    assert stored == {f"/{k}": (40, sum(range(k, 200, 5))) for k in range(5)}
    assert sum(rows) == 200
