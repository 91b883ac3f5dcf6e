"""The app of the load tests: tasks that note when they began, and pass through every kind of gate.

Broker, gates and notes may be three servers: one that a test restarts must not take the notes along. Notes carry the
time of the server of notes, so those of several processes have one order.
"""

import json
import os
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery
from celery.signals import worker_ready
from redis import Redis

from petiole import Cache, RateLimit, Settings, connect, memoized_task
from petiole.coordination.coordinated import coordinated_task
from petiole.coordination.gates import Concurrency, Rate

FOLDER = Path(__file__).parent
RATES = {"rated": RateLimit("60/s", burst=1), "sparse": RateLimit("120/s", burst=1)}


class Notes:
    """What the bodies note: one list per task, and how many are inside of something."""

    def __init__(self, url: str) -> None:
        self.client: Redis = Redis.from_url(url, protocol=2, decode_responses=True, socket_timeout=None)  # some wait

    def enter(self, task: Any, number: int, key: str) -> None:
        """Note that a body has begun, and what its gates said of it.

        ``start_us`` is the moment for which a rate admitted it; the body is stamped later than that, by as much as a
        busy machine likes.
        """
        running = task.admission._running if hasattr(task, "gates") else None
        moment = self.client.pipeline(transaction=True)
        moment.time()
        moment.incr(f"inside:{task.name}:{key}")
        (seconds, micros), inside = moment.execute()
        note = {
            "number": number,
            "key": key,
            "at_us": seconds * 1_000_000 + micros,
            "inside": inside,
            "start_us": 0 if running is None else round(running.now_us + running.wait_s * 1e6),
            "fence": 0 if running is None else running.given[0][0],
            "parked": running is not None and running.attempt.generation,
        }
        self.client.rpush(f"notes:{task.name}", json.dumps(note))

    def leave(self, task: Any, key: str) -> None:
        """Note that a body ends."""
        self.client.decr(f"inside:{task.name}:{key}")

    def forget(self) -> None:
        """As if nothing had run."""
        if names := [*self.client.scan_iter("notes:*"), *self.client.scan_iter("inside:*")]:
            self.client.delete(*names)

    def of(self, task: str) -> list[dict[str, Any]]:
        """What the bodies of a task have noted, in their order."""
        return [json.loads(note) for note in self.client.lrange(f"notes:{task}", 0, -1)]  # type: ignore[union-attr]


def make_app(broker: str, gates: str, notes: str, **settings: Any) -> Celery:
    """The app as workers and senders have it."""
    app = Celery("load", broker=broker, backend=notes, set_as_current=False, broker_connection_retry_on_startup=True)
    app.conf.update(
        task_ignore_result=True, worker_hijack_root_logger=False, worker_prefetch_multiplier=4, result_expires=600,
        **settings,
    )  # fmt: skip
    redis = connect(settings=Settings(url=gates, cache_timeout=2))
    noted = Notes(notes)

    def body(self: Any, number: int, key: str = "all", lasts_s: float = 0) -> None:
        noted.enter(self, number, key)
        if lasts_s:
            time.sleep(lasts_s)
        noted.leave(self, key)

    def gated(name: str, **options: Any) -> None:
        coordinated_task(app=app, name=name, redis=redis, bind=True, **options)(body)

    app.task(name="free", shared=False, bind=True)(body)
    for name, limit in RATES.items():
        gated(name, rate=Rate(limit))
    gated("crowded", concurrency=5, fair="{key}")
    gated("fifty", concurrency=50)
    gated("locked", lock="load:{key}")
    gated(
        "mixed", lock="mixed:{number}", concurrency=Concurrency(2, key="{key}"), lease=3, acks_late=True,
        rate=[Rate(RateLimit("40/s", burst=4)), Rate(RateLimit("15/s", burst=2), key="{key}")],
    )  # fmt: skip

    @memoized_task(
        app=app, name="remembered", bind=True, ignore_result=False, acks_late=True, reject_on_worker_lost=True,
        cache=Cache(redis, namespace="load", lease=1),
    )  # fmt: skip
    def remembered(self: Any, tag: str) -> dict[str, Any]:
        run = noted.client.rpush(f"runs:{tag}", os.getpid())
        if run == 1:
            noted.client.blpop([f"never:{tag}"])
        noted.client.incr(f"completed:{tag}")
        return {"run": run, "by": uuid4().hex}

    return app


if "LOAD_TEST" in os.environ:
    given = json.loads(os.environ["LOAD_TEST"])
    app = make_app(**given)

    @worker_ready.connect(weak=False)
    def tell(sender: Any, **_: Any) -> None:
        """A worker has begun to consume."""
        Notes(given["notes"]).client.incr(f"ready:{sender.hostname}")
