"""The application under test: everything that a worker runs, in one small shop.

Made by ``make`` from what it is told, so that the test process and the worker processes have the same one; a
worker imports ``shop_worker``, which makes it from the environment.
"""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from celery import Celery
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from petiole import Cache, SignalBridge, SqlSink, WriteBehind, connect, invalidate_on_commit, memoized_task, warmed
from petiole.cachelib import Connections, Settings
from petiole.cachelib.counters import SharedCounters

BATCH = 10


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "articles"
    id: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[int]


class Sale(Base):
    __tablename__ = "sales"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


class Total(Base):
    __tablename__ = "totals"
    article: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    sold: Mapped[int]


@dataclass
class Shop:
    app: Celery
    redis: Connections
    cache: Cache
    engine: sa.Engine
    session: sessionmaker[Any]
    sales: WriteBehind
    totals: WriteBehind
    article: Any
    report: Any
    bridge: SignalBridge
    counters: SharedCounters

    def count(self) -> int:
        with self.engine.connect() as connection:
            return connection.scalar(sa.text("SELECT count(*) FROM sales")) or 0

    def close(self) -> None:
        self.engine.dispose()
        self.redis.close()


def make(redis_url: str, database_url: str, name: str) -> Shop:
    redis = connect(settings=Settings(url=redis_url, cache_timeout=2))
    app = Celery(name)
    app.config_from_object("petiole.celeryconfig")
    app.conf.update(broker_url=redis_url, result_backend=redis_url, task_default_queue=name)
    cache = Cache(redis, namespace=name)
    engine = sa.create_engine(database_url)
    session = sessionmaker(engine)
    counters = SharedCounters(redis, "shop", name)

    sales = WriteBehind(
        redis,
        f"{name}.sales",
        SqlSink(engine, Sale.__table__, mode="append"),
        app=app,
        partitions=2,
        batch_size=BATCH,
    )
    totals = WriteBehind(
        redis,
        f"{name}.totals",
        SqlSink(engine, Total.__table__, mode="sum", key="article"),
        app=app,
        partitions=2,
        batch_size=BATCH,
    )

    @warmed(cache, "article:{article_id}", every=1, ttl=2, top=10, app=app, name="article")
    def article(article_id: int) -> int | None:
        counters.add(loads=1)
        with session() as opened:
            found = opened.get(Article, article_id)
            return found.price if found else None

    invalidate_on_commit(session, cache, keys={Article: "article:{id}"}, app=app)

    @memoized_task(app=app, cache=cache, key="{year}", name="report", ignore_result=False)
    def report(year: int) -> int:
        counters.add(runs=1)
        return year * 2

    bridge = SignalBridge(app, redis)

    def on_message(**_: Any) -> None:
        counters.add(messages=1)

    bridge.signal(f"{name}:*").connect(on_message, weak=False)
    return Shop(app, redis, cache, engine, session, sales, totals, article, report, bridge, counters)
