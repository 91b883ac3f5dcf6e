"""``WriteBehind``: put, flush and stats, in this process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery, signals

from petiole.cachelib import Connections, EmbeddedServer, connect
from petiole.cachelib.errors import BufferFull, RowRefused, ServerUnavailable
from petiole.cachelib.write_behind import SqlSink
from petiole.tasks.write_behind import WriteBehind


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app of this test's own, with a broker in memory."""
    app = Celery("test", broker="memory://", set_as_current=False)
    yield app
    app.close()


@pytest.fixture
def log(engine: sa.Engine) -> sa.Table:
    table = sa.Table("log", sa.MetaData(), sa.Column("k", sa.Integer, nullable=False), sa.Column("n", sa.Integer))
    table.create(engine)
    return table


@pytest.fixture
def sink(engine: sa.Engine, log: sa.Table) -> SqlSink:
    return SqlSink(engine, log, mode="append")


@pytest.fixture
def kicks() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Every task message that is sent: the task's name and its arguments."""
    sent: list[tuple[str, tuple[Any, ...]]] = []

    def note(sender: str, body: Any, **_: Any) -> None:
        sent.append((sender, tuple(body[0])))

    signals.after_task_publish.connect(note)
    yield sent
    signals.after_task_publish.disconnect(note)


def written(engine: sa.Engine) -> list[tuple[int, int]]:
    with engine.connect() as connection:
        return [(row.k, row.n) for row in connection.execute(sa.text("SELECT k, n FROM log"))]


def test_what_was_put_is_written_by_a_flush(redis: Connections, name: str, app: Celery, sink: SqlSink) -> None:
    """``flush`` says how many rows; a second one has nothing to do."""
    views = WriteBehind(redis, name, sink, app=app)
    for number in range(20):
        views.put({"k": number, "n": 1})

    assert views.flush() == 20
    assert sorted(written(sink.engine)) == [(number, 1) for number in range(20)]
    assert views.flush() == 0


def test_a_flush_writes_many_batches_of_many_partitions(
    redis: Connections, name: str, app: Celery, sink: SqlSink
) -> None:
    """Until every partition is empty."""
    views = WriteBehind(redis, name, sink, app=app, partitions=3, batch_size=4)
    for number in range(50):
        views.put({"k": number, "n": 1})

    assert views.flush() == 50
    assert views.buffer.lengths() == [0, 0, 0]


def test_a_row_that_is_refused_never_enters_the_buffer(
    redis: Connections, name: str, app: Celery, sink: SqlSink
) -> None:
    """The one who made the mistake is told, and nothing is written."""
    views = WriteBehind(redis, name, sink, app=app, partitions=1)
    refused: list[Any] = [{"k": "x"}, {"n": 1}, {"k": 1, "x": 2}, {"k": None}, None]
    for row in refused:
        with pytest.raises(RowRefused):
            views.put(row)

    assert redis.coordination.xlen(f"petiole:1:buffer:{{{name}:0/1}}") == 0
    assert views.flush() == 0


def test_rows_of_one_key_are_in_one_partition_in_the_order_of_their_puts(
    redis: Connections, name: str, app: Celery, engine: sa.Engine
) -> None:
    """Other keys are in others."""
    table = sa.Table("hits", sa.MetaData(), sa.Column("k", sa.Text, primary_key=True), sa.Column("n", sa.Integer))
    table.create(engine)
    sink = SqlSink(engine, table, mode="sum")
    hits = WriteBehind(redis, name, sink, app=app, partitions=8)
    for number in range(40):
        hits.put({"k": "one", "n": number})
        hits.put({"k": f"other {number}", "n": 1})
    rows = [
        [sink.format.unpack(entry.payload) for entry in hits.buffer.read(partition).entries] for partition in range(8)
    ]

    ours = [[row["n"] for row in partition if row["k"] == "one"] for partition in rows]
    assert sorted(ours, key=len) == [[]] * 7 + [list(range(40))]
    assert all(rows)


def test_a_worker_is_asked_exactly_when_a_batch_is_full(
    redis: Connections, name: str, app: Celery, sink: SqlSink, kicks: list[tuple[str, tuple[Any, ...]]]
) -> None:
    """One message per ``batch_size`` rows, which names the partition."""
    views = WriteBehind(redis, name, sink, app=app, partitions=1, batch_size=3)
    asked_after = []
    for number in range(1, 8):
        views.put({"k": number})
        asked_after.append(len(kicks))

    assert asked_after == [0, 0, 1, 1, 1, 2, 2]
    assert kicks == [(f"petiole.flush.{name}", (0,))] * 2


def test_a_put_succeeds_at_once_although_nobody_can_be_told_that_a_batch_is_full(
    redis: Connections, name: str, sink: SqlSink, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beat asks again; the row is taken, and the put does not wait for a broker that is away."""
    waits: list[float] = []
    monkeypatch.setattr("kombu.utils.functional.sleep", waits.append)
    app = Celery("test", broker="redis://127.0.0.1:1/0", set_as_current=False)
    views = WriteBehind(redis, name, sink, app=app, partitions=1, batch_size=1)
    views.put({"k": 1})
    app.close()

    assert "beat will" in caplog.text
    assert views.flush() == 1
    assert waits == []


def test_a_full_buffer_refuses_the_row_and_keeps_the_others(
    redis: Connections, name: str, app: Celery, sink: SqlSink
) -> None:
    """And takes rows again once it is flushed."""
    views = WriteBehind(redis, name, sink, app=app, partitions=1, max_length=2)
    views.put({"k": 1, "n": 0})
    views.put({"k": 2, "n": 0})
    with pytest.raises(BufferFull):
        views.put({"k": 3, "n": 0})
    assert views.flush() == 2
    views.put({"k": 4, "n": 0})
    views.flush()

    assert written(sink.engine) == [(1, 0), (2, 0), (4, 0)]


def test_a_put_without_redis_raises(
    own_server: Callable[..., EmbeddedServer], name: str, app: Celery, sink: SqlSink
) -> None:
    """A row that nobody has must not look as if it were taken."""
    server = own_server()
    with connect(server.url) as redis:
        views = WriteBehind(redis, name, sink, app=app)
        server.stop()

        with pytest.raises(ServerUnavailable):
            views.put({"k": 1})


def test_a_row_that_does_not_fit_is_refused_without_redis_too(name: str, app: Celery, sink: SqlSink) -> None:
    """The check comes first."""
    with connect("redis://127.0.0.1:1/0") as redis, pytest.raises(RowRefused):
        WriteBehind(redis, name, sink, app=app).put({"k": "x"})


def test_the_stats_of_a_new_buffer_are_zeros(redis: Connections, name: str, app: Celery, sink: SqlSink) -> None:
    """Also while the database has no positions yet."""
    stats = WriteBehind(redis, name, sink, app=app).stats()

    assert (stats.waiting, stats.rows_applied, stats.lag_ms) == (0, 0, 0)


def test_the_stats_tell_what_waits_and_what_is_written(
    redis: Connections, name: str, app: Celery, sink: SqlSink
) -> None:
    """Rows are counted in the transactions that write them."""
    views = WriteBehind(redis, name, sink, app=app)
    for number in range(10):
        views.put({"k": number})
    assert views.stats().waiting == 10
    views.flush()
    views.put({"k": 10})
    stats = views.stats()

    assert (stats.waiting, stats.rows_applied) == (1, 10)
    assert stats.lag_ms >= 0


@pytest.mark.parametrize("bad", ["", "a b", "a/b", "-a", "ä", "a" * 101, "a\n", None, 7])
def test_a_name_that_cannot_be_part_of_a_task_name_is_refused(
    bad: Any, redis: Connections, app: Celery, sink: SqlSink
) -> None:
    """It says what a name is made of."""
    with pytest.raises(ValueError, match="use letters, digits"):
        WriteBehind(redis, bad, sink, app=app)


def test_a_write_behind_says_what_it_is_and_no_password(redis: Connections, name: str, app: Celery) -> None:
    """A repr ends in logs."""
    engine = sa.create_engine("postgresql+psycopg://user:hush@127.0.0.1:1/db")
    table = sa.Table("log", sa.MetaData(), sa.Column("k", sa.Integer))
    shown = repr(WriteBehind(redis, name, SqlSink(engine, table, mode="append"), app=app))

    assert name in shown
    assert "log (append)" in shown
    assert "hush" not in shown


def test_changing_the_number_of_partitions_strands_no_row(
    redis: Connections, name: str, app: Celery, sink: SqlSink
) -> None:
    """A release with another number flushes what the last one left behind: on its own, and when beat asks."""
    before = WriteBehind(redis, name, sink, app=app, partitions=3)
    for k in range(6):
        before.put({"k": k, "n": 0})
    after = WriteBehind(redis, name, sink, app=Celery("after", set_as_current=False), partitions=2)

    after.task.run()

    assert sorted(written(sink.engine)) == [(k, 0) for k in range(6)]
    assert before.stats().waiting == 0


def test_a_number_of_partitions_that_redis_forgot_is_told_again(
    redis: Connections, name: str, app: Celery, sink: SqlSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis may be emptied while a producer goes on; its rows are found all the same."""
    monkeypatch.setattr("petiole.cachelib.write_behind.buffer._ANNOUNCE_EVERY_S", 0.0)
    producer = WriteBehind(redis, name, sink, app=app, partitions=1)
    producer.put({"k": 1, "n": 0})
    redis.coordination.delete(*redis.coordination.keys(f"petiole:*{name}*"))
    producer.put({"k": 2, "n": 0})
    producer.put({"k": 3, "n": 0})
    after = WriteBehind(redis, name, sink, app=Celery("after", set_as_current=False), partitions=2)

    assert after.flush() == 2


def test_a_row_that_stops_one_partition_stops_no_other(
    redis: Connections, name: str, app: Celery, engine: sa.Engine
) -> None:
    """Neither when beat asks, nor when a worker drains; the error is raised all the same."""
    table = sa.Table(
        "log", sa.MetaData(), sa.Column("k", sa.Integer), sa.Column("n", sa.Integer), sa.CheckConstraint("n < 9")
    )
    table.create(engine)
    sink = SqlSink(engine, table, mode="append")
    before = WriteBehind(redis, name, sink, app=app, partitions=1)
    before.put({"k": 0, "n": 100})
    after = WriteBehind(redis, name, sink, app=Celery("after", set_as_current=False), partitions=2)
    for k in range(1, 7):
        after.put({"k": k, "n": 0})

    with pytest.raises(sa.exc.IntegrityError):
        after.flush()
    assert sorted(written(engine)) == [(k, 0) for k in range(1, 7)]
    assert before.stats().waiting == 1
