"""An app whose tasks note, by the server's clock, when and where they ran. What the tests set is in the environment."""

import json
import os
from typing import Any

from celery import Celery
from redis import Redis

from petiole import connect
from petiole.tasks import cluster_rate_limit as module

NOTED = "noted:"
"""What the names of the lists begin with, in which runs are noted."""

app = Celery("limited", broker=os.environ["BROKER_URL"])
app.conf.update(
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
    worker_cancel_long_running_tasks_on_connection_loss=True,
    task_default_queue="limited",
    **json.loads(os.environ.get("CONFIG", "{}")),
)
module.READ_AGAIN_S = float(os.environ.get("READ_AGAIN_S", module.READ_AGAIN_S))
module.global_rate_limit(app, connect(os.environ["LIMITS_URL"]))

_client = Redis.from_url(os.environ["BROKER_URL"])


def _note(task: Any, number: int) -> None:
    seconds, microseconds = _client.time()
    note = {"at_us": seconds * 1_000_000 + microseconds, "number": number, "where": task.request.hostname}
    pipeline = _client.pipeline()
    pipeline.rpush(NOTED + task.name, json.dumps(note))
    pipeline.rpush(NOTED + "all", task.name)
    pipeline.execute()


@app.task(bind=True, name="limited", rate_limit=os.environ.get("RATE", "20/s"))
def limited(self: Any, number: int) -> None:
    """As often as it may."""
    _note(self, number)


@app.task(bind=True, name="free")
def free(self: Any, number: int) -> None:
    """Whenever it comes."""
    _note(self, number)
