"""What is not the cache: a rate decision, a write-behind put, a flush."""

import statistics
import time
from uuid import uuid4

import sqlalchemy as sa

from petiole import RateLimit, RateLimiter, SqlSink
from petiole.cachelib import Connections, Settings, connect
from petiole.cachelib.write_behind import Buffer, Flusher

from .floor import Floor
from .measure import Entrant, Measured, interleave, repeated
from .peers import PETIOLE, Server

ROW = {"path": "/news/2026/11/a-page-like-any-other", "client": "10.0.0.1", "status": 200}
_ROWS = 5_000
_FLUSHES = 5


def measure_writes(server: Server) -> list[Measured]:
    """Measure the round trips."""
    with connect(settings=Settings(url=server.url)) as redis:
        name = uuid4().hex
        limiter = RateLimiter(redis, name, [RateLimit("10000/s")])
        sink = SqlSink(sa.create_engine("sqlite://"), _table(), mode="append")
        buffer = Buffer(redis, name, partitions=1, max_length=10_000_000)
        floor = Floor(server.host, server.port)
        add = floor.call("XADD", f"floor:{name}", "*", "d", b"x" * 80)
        found = interleave(
            [
                Entrant(
                    "rate decision",
                    PETIOLE,
                    repeated(lambda: limiter.hit("user")),
                    repeated(floor.call("EVAL", "return 1", "0")),
                    1,
                ),
                Entrant(
                    "write-behind put",
                    PETIOLE,
                    repeated(lambda: buffer.put(0, sink.format.pack(ROW).payload)),
                    repeated(add),
                    1,
                ),
            ]
        )
        floor.close()
        return found


def measure_flush(server: Server) -> float:
    """Rows per second into SQLite in memory, in batches of 1,000."""
    with connect(settings=Settings(url=server.url)) as redis:
        return statistics.median(_flush_rates(redis))


def _flush_rates(redis: Connections) -> list[float]:
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    table = _table()
    table.metadata.create_all(engine)
    sink = SqlSink(engine, table, mode="append")
    buffer = Buffer(redis, uuid4().hex, partitions=1, batch_size=1_000)
    flusher = Flusher(buffer, sink)
    rates = []
    for _ in range(_FLUSHES):
        for _ in range(_ROWS):
            buffer.put(0, sink.format.pack(ROW).payload)
        started = time.perf_counter()
        flusher.flush(0)
        rates.append(_ROWS / (time.perf_counter() - started))
    return rates


def _table() -> sa.Table:
    return sa.Table(
        "views",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("path", sa.String(200), nullable=False),
        sa.Column("client", sa.String(50), nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
    )
