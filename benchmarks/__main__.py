"""``make bench``: the round trips of the first slice, as ratios to the floor."""

import os
import random
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from uuid import uuid4

import hiredis
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from petiole import Cache, RateLimit, RateLimiter, SqlSink, connect
from petiole.cachelib import Connections
from petiole.cachelib.write_behind import Buffer, Flusher

ROUNDS = 31
CALLS = 200
ROW = {"path": "/news/2026/11/a-page-like-any-other", "client": "10.0.0.1", "status": 200}
VALUE = {"id": 7, "name": "somebody", "tags": ["a", "b"], "text": "x" * 120}

Call = Callable[[], object]


class Floor:
    """One connection, one socket call each way, nothing else."""

    def __init__(self, redis: Connections) -> None:
        pool = redis.coordination.connection_pool.connection_kwargs
        self._socket = socket.create_connection((pool["host"], pool["port"]))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call(self, *command: str | bytes) -> Call:
        """A call that sends one command and reads its reply."""
        packed, reader, sock = hiredis.pack_command(command), hiredis.Reader(), self._socket

        def call() -> object:
            sock.sendall(packed)
            while True:
                reader.feed(sock.recv(65_536))
                reply = reader.gets()
                if reply is not False:
                    return reply

        return call


def main() -> None:
    """Measure and show."""
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before the server is started: it inherits this
    console = Console(highlight=False)
    with connect("embedded://") as redis:
        _show(console, "Round trips", _round_trips(redis))
        _show_flush(console, redis)


def _round_trips(redis: Connections) -> dict[str, tuple[float, float]]:
    name = uuid4().hex
    cache = Cache(redis, namespace=name)
    cache.set("hit", VALUE)
    cache.get_or_set("tagged", lambda: VALUE, tags=["t"])
    limiter = RateLimiter(redis, name, [RateLimit("10000/s")])
    sink = SqlSink(sa.create_engine("sqlite://"), _table(), mode="append")
    buffer = Buffer(redis, name, partitions=1, max_length=10_000_000)
    floor = Floor(redis)
    entry, stream = cache.keys.entry("hit"), f"floor:{name}"

    def put() -> None:
        buffer.put(0, sink.format.pack(ROW).payload)

    pairs: dict[str, tuple[Call, Call]] = {
        "cache hit, get_or_set": (lambda: cache.get_or_set("hit", dict), floor.call("GET", entry)),
        "cache hit, one tag": (lambda: cache.get_or_set("tagged", dict, tags=["t"]), floor.call("GET", entry)),
        "cache get": (lambda: cache.get("hit"), floor.call("GET", entry)),
        "redis-py GET alone": (lambda: redis.cache.get(entry), floor.call("GET", entry)),
        "cache set": (lambda: cache.set("set", VALUE), floor.call("SET", f"{name}:set", b"x" * 160, "PX", "60000")),
        "rate decision": (lambda: limiter.hit("user"), floor.call("EVAL", "return 1", "0")),
        "write-behind put": (put, floor.call("XADD", stream, "*", "d", b"x" * 80)),
    }
    ratios: dict[str, list[float]] = {what: [] for what in pairs}
    times: dict[str, list[float]] = {what: [] for what in pairs}
    for _ in range(ROUNDS):
        for what in random.sample(list(pairs), len(pairs)):
            ours, theirs = pairs[what]
            mine, least = _time(ours), _time(theirs)
            ratios[what].append(mine / least)
            times[what].append(mine / CALLS * 1e6)
    return {what: (statistics.median(ratios[what]), statistics.median(times[what])) for what in pairs}


def _show_flush(console: Console, redis: Connections) -> None:
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    table = _table()
    table.metadata.create_all(engine)
    sink = SqlSink(engine, table, mode="append")
    buffer = Buffer(redis, uuid4().hex, partitions=1, batch_size=1_000)
    flusher = Flusher(buffer, sink)
    rates = []
    for _ in range(5):
        for _ in range(5_000):
            buffer.put(0, sink.format.pack(ROW).payload)
        started = time.perf_counter()
        flusher.flush(0)
        rates.append(5_000 / (time.perf_counter() - started))
    console.print(f"Flush to SQLite in memory, batches of 1,000: {statistics.median(rates):,.0f} rows/s")


def _time(call: Call) -> float:
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    return time.perf_counter() - started


def _table() -> sa.Table:
    return sa.Table(
        "views",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("path", sa.String(200), nullable=False),
        sa.Column("client", sa.String(50), nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
    )


def _show(console: Console, title: str, found: dict[str, tuple[float, float]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("Operation")
    table.add_column("ratio to the floor", justify="right")
    table.add_column("µs", justify="right")
    for what, (ratio, us) in found.items():
        table.add_row(what, f"{ratio:.2f}", f"{us:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
