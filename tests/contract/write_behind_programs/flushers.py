"""Starts flushers that flush for ever and say each step that they take, until they are killed.

One is forked for each line of input; what they say is ``<process id> <step>``. Forked, so that a new one is at
work in milliseconds, and a hundred can be killed in a test.
"""

import os
import random
import signal
import sys
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from petiole.cachelib import connect
from petiole.cachelib.write_behind import Buffer, Flusher, SqlSink
from petiole.cachelib.write_behind.buffer import Batch


def say(step: str) -> None:
    os.write(1, f"{os.getpid()} {step}\n".encode())


class LoudBuffer(Buffer):
    def read(self, partition: int) -> Batch:
        batch = super().read(partition)
        say("read" if batch.entries else "idle")
        return batch

    def trim(self, partition: int, batch: Batch) -> int:
        say("trim")
        return super().trim(partition, batch)


def flush_for_ever(redis_url: str, database_url: str, name: str, partitions: int, batch_size: int) -> None:
    random.seed()
    engine = sa.create_engine(database_url)
    sa.event.listen(engine, "before_cursor_execute", lambda *_: say("execute"))
    sa.event.listen(engine, "commit", lambda *_: say("commit"))
    tables = sa.MetaData()
    redis = connect(redis_url)
    flushers = []
    with engine.connect() as connection:
        for mode in ("append", "sum"):
            table = sa.Table(f"{name}_{mode}", tables, autoload_with=connection)
            options: Any = {"mode": mode}
            buffer = LoudBuffer(redis, f"{name}-{mode}", partitions=partitions, batch_size=batch_size)
            flushers.append(Flusher(buffer, SqlSink(engine, table, **options)))
    say("started")
    while True:
        try:
            random.choice(flushers).flush(random.randrange(partitions), most_batches=2)
        except OperationalError as error:  # SQLite: the database is locked for too long
            say(f"raised {type(error.orig).__name__}")


def main() -> None:
    redis_url, database_url, name, partitions, batch_size = sys.argv[1:]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the killed leave no zombies
    while sys.stdin.buffer.raw.read(1):  # type: ignore[attr-defined]
        if os.fork() == 0:
            os.close(0)
            try:
                flush_for_ever(redis_url, database_url, name, int(partitions), int(batch_size))
            except BaseException as error:
                say(f"died {error!r:.500}")
                raise


main()
