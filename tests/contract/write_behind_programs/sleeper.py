"""Flushes one partition once, and stops itself (SIGSTOP) between moving the position and writing the rows."""

import os
import signal
import sys
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from petiole.cachelib import connect
from petiole.cachelib.write_behind import Buffer, Flusher, SqlSink, sql_sink

redis_url, database_url, name = sys.argv[1:]
sql_sink._LIMITS = sql_sink._LIMITS.replace("'30s'", "'200ms'")
engine = sa.create_engine(database_url)
with engine.connect() as connection:
    table = sa.Table(name, sa.MetaData(), autoload_with=connection)


@sa.event.listens_for(engine, "before_cursor_execute")
def stop(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
    if statement.startswith(f"INSERT INTO {name}"):
        os.kill(os.getpid(), signal.SIGSTOP)


flusher = Flusher(Buffer(connect(redis_url), name, partitions=1), SqlSink(engine, table, mode="append"))
try:
    sys.stdout.write(f"{flusher.flush(0).rows}\n")
except DBAPIError as error:
    sys.stdout.write(f"{type(error.orig).__name__}\n")
