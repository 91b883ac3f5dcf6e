"""Flushers that are killed at any moment, or stopped and resumed: each row is in the database once."""

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from petiole.cachelib import Connections
from petiole.cachelib.write_behind import Buffer, Flusher, SqlSink

PROGRAMS = Path(__file__).parent / "write_behind_programs"

FLUSHERS = 3
PARTITIONS = 4
BATCH_SIZE = 20
KEYS = 50


class Flushers:
    """Flushers in processes of their own, and what they said last."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        self.alive: set[int] = set()
        self.steps: Counter[str] = Counter()

    def start_one(self) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"+")
        self.process.stdin.flush()

    def next_step(self) -> tuple[int, str]:
        """Wait until one of them takes a step. The last words of the killed are passed over."""
        assert self.process.stdout
        while line := self.process.stdout.readline():
            pid, step = line.decode().split(maxsplit=1)
            if step.strip() == "started":
                self.alive.add(int(pid))
            assert not step.startswith("died"), step
            if int(pid) in self.alive:
                self.steps[step.strip()] += 1
                return int(pid), step.strip()
        raise AssertionError("the flushers ended")

    def kill(self, pid: int) -> None:
        self.alive.remove(pid)
        os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the whole group at once, so that none is missed that is being started. Their pipe ends with them."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@contextmanager
def flushers(*arguments: str) -> Iterator[Flushers]:
    process = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "flushers.py"), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    started = Flushers(process)
    try:
        for _ in range(FLUSHERS):
            started.start_one()
        yield started
    finally:
        started.end()


@pytest.mark.parametrize(("rows", "kills"), [(1_500, 6), pytest.param(12_000, 50, marks=pytest.mark.storm)])
def test_flushers_that_are_killed_at_any_moment_apply_each_row_once(
    redis: Connections, engine: sa.Engine, database_url: str, name: str, rows: int, kills: int
) -> None:
    """Three flushers compete for all partitions and are killed in all steps; neither effect can be repeated."""
    metadata = sa.MetaData()
    log = sa.Table(f"{name}_append", metadata, sa.Column("number", sa.Integer, nullable=False))
    totals = sa.Table(
        f"{name}_sum",
        metadata,
        sa.Column("key", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("total", sa.Integer, nullable=False),
    )
    metadata.create_all(engine)
    sinks = [SqlSink(engine, log, mode="append"), SqlSink(engine, totals, mode="sum")]
    buffers = [Buffer(redis, f"{name}-{sink.mode}", partitions=PARTITIONS) for sink in sinks]
    expected: Counter[int] = Counter()

    def put(number: int) -> None:
        both = [{"number": number}, {"key": number % KEYS, "total": number}]
        for sink, buffer, row in zip(sinks, buffers, both, strict=True):
            packed = sink.format.pack(row)
            buffer.put(buffer.partition_of(packed.identity), packed.payload)
        expected[number % KEYS] += number

    chance = random.Random(7)
    killed: Counter[str] = Counter()
    until_kill = chance.randint(20, 80)
    put_so_far = 0
    with flushers(redis.url, database_url, name, str(PARTITIONS), str(BATCH_SIZE)) as running:
        while put_so_far < rows or killed.total() < kills:
            pid, step = running.next_step()
            for _ in range(4):
                put(put_so_far)
                put_so_far += 1
            until_kill -= step != "idle"
            if until_kill <= 0 and step != "idle":
                running.kill(pid)
                running.start_one()
                killed[step.split()[0]] += 1
                until_kill = chance.randint(20, 80)
    for sink, buffer in zip(sinks, buffers, strict=True):
        for partition in range(PARTITIONS):
            assert not Flusher(buffer, sink).flush(partition, most_batches=10_000).more
    with engine.connect() as connection:
        numbers = Counter(connection.execute(sa.select(log.c.number)).scalars().all())
        summed = {row.key: row.total for row in connection.execute(sa.select(totals))}

    assert [number for number, times in numbers.items() if times > 1] == []
    assert set(range(put_so_far)) - numbers.keys() == set()
    assert summed == dict(expected)
    assert killed.total() >= kills


def _stopped(process: "subprocess.Popen[str]") -> bool:
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    return os.WIFSTOPPED(status)


@contextmanager
def sleeper(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "sleeper.py"), *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def _resumed(process: "subprocess.Popen[str]") -> str:
    process.send_signal(signal.SIGCONT)
    return process.communicate()[0].strip()


def _one_row_waits(redis: Connections, engine: sa.Engine, name: str) -> tuple[Flusher, sa.Table, bytes]:
    table = sa.Table(name, sa.MetaData(), sa.Column("n", sa.Integer, nullable=False))
    table.create(engine)
    flusher = Flusher(Buffer(redis, name, partitions=1), SqlSink(engine, table, mode="append"))
    row = flusher.sink.format.pack({"n": 1}).payload
    return flusher, table, row


def test_a_flusher_that_is_stopped_before_its_first_batch_is_overtaken(
    redis: Connections, engine: sa.Engine, database_url: str, name: str
) -> None:
    """PostgreSQL ends its transaction after the limit, and another goes on; under SQLite the other raises. Resumed,
    it writes nothing twice."""
    flusher, table, row = _one_row_waits(redis, engine, name)
    flusher.buffer.put(0, row)
    _sleeper_is_overtaken(redis, engine, database_url, name, flusher)

    with engine.connect() as connection:
        assert connection.execute(sa.select(table.c.n)).scalars().all() == [1]
    assert flusher.buffer.lengths() == [0]


def test_a_flusher_that_is_stopped_in_a_later_batch_is_overtaken(
    redis: Connections, engine: sa.Engine, database_url: str, name: str
) -> None:
    """The same, where the position is a row already that both want to move."""
    flusher, table, row = _one_row_waits(redis, engine, name)
    flusher.buffer.put(0, row)
    flusher.flush(0)
    flusher.buffer.put(0, row)
    _sleeper_is_overtaken(redis, engine, database_url, name, flusher)

    with engine.connect() as connection:
        assert connection.execute(sa.select(table.c.n)).scalars().all() == [1, 1]
    assert flusher.buffer.lengths() == [0]


def _sleeper_is_overtaken(
    redis: Connections, engine: sa.Engine, database_url: str, name: str, flusher: Flusher
) -> None:
    flusher.sink.prepare()
    with sleeper(redis.url, database_url, name) as process:
        assert _stopped(process)
        if engine.dialect.name == "postgresql":
            assert flusher.flush(0).rows == 1
            assert _resumed(process) == "IdleInTransactionSessionTimeout"
        else:
            impatient = sa.create_engine(database_url, connect_args={"timeout": 0.1})
            try:
                Flusher(flusher.buffer, SqlSink(impatient, flusher.sink.table, mode="append")).flush(0)
            except sa.exc.OperationalError as error:
                assert "locked" in str(error)  # noqa: PT017
            else:
                raise AssertionError("two wrote at once")
            impatient.dispose()
            assert _resumed(process) == "1"
            assert flusher.flush(0).rows == 0


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_two_processes_may_create_the_positions_table_at_once(engine: sa.Engine) -> None:
    """The one that comes second finds it there."""
    url = engine.url.render_as_string(hide_password=False)
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAMS / "preparer.py"), url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()

    assert [process.communicate()[0] for process in processes] == ["None\n"] * 2
    assert [process.returncode for process in processes] == [0] * 2
