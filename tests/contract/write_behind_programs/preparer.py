"""Creates the positions table when told to, and says whether that went well."""

import sys

import sqlalchemy as sa

from petiole.cachelib.write_behind import SqlSink

engine = sa.create_engine(sys.argv[1])
sink = SqlSink(engine, sa.Table("rows", sa.MetaData(), sa.Column("n", sa.Integer)), mode="append")
engine.connect().close()
sys.stdout.write("ready\n")
sys.stdout.flush()
sys.stdin.readline()
sys.stdout.write(f"{sink.prepare()}\n")
sys.stdout.flush()
