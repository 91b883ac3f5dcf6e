"""Where the parts of the site are wired together: Redis, SQL, Celery. Connects to nothing by itself.

The environment says where things are: ``REDIS_URL``, ``DATABASE_URL``, and ``SITE_NAME``, which keeps the keys of
one site apart from those of another on the same Redis.
"""

import os

import sqlalchemy as sa
from celery import Celery
from sqlalchemy.orm import sessionmaker

from petiole import Cache, SignalBridge, connect

NAME = os.environ.get("SITE_NAME", "site")
DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///site.sqlite3")

app = Celery(NAME, include=["examples.site.pages", "examples.site.statistics"])
app.config_from_object("petiole.celeryconfig")
app.conf.task_default_queue = NAME  # nobody else's tasks, on a Redis that others use too
app.conf.task_time_limit, app.conf.task_soft_time_limit = 20, 15
app.conf.broker_transport_options = {
    **app.conf.broker_transport_options,
    "visibility_timeout": 30,  # above the time limit; what a killed worker had taken comes back within a minute
    "unacked_restore_interval": 2,  # the transport looks for it every two seconds
    "unacked_restore_throttle": 1,
}

redis = connect()
cache = Cache(redis, namespace=NAME, ttl="1m")
bridge = SignalBridge(app, redis)

engine = sa.create_engine(DATABASE_URL)
Session = sessionmaker(engine)

if engine.dialect.name == "sqlite":

    @sa.event.listens_for(engine, "connect")
    def _let_readers_and_writers_work_together(connection: sa.engine.interfaces.DBAPIConnection, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA busy_timeout=15000")
        cursor.close()
