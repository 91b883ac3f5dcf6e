"""Tasks that wait for one thing: parked in Redis; or, as a mark, asking for it again and again."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import redis
from celery import Celery

from petiole import connect, coordinated_task
from petiole.cachelib import Connections, Settings

from .task_peers import AT_ONCE

RUNS = "bench:runs"
"""On the broker's server: how many bodies have run."""
REFUSED = "bench:refused"
"""There, too: how often a task that asks again and again was refused."""
LOCK, PERMITS = "bench:one", "some"
POLL_S = 1


class WaitingPeers(NamedTuple):
    """An app, and its tasks; each is called with a number."""

    app: Celery
    redis: Connections
    parked: dict[str, Any]
    """By what they wait for."""
    polling: Any
    """Waits for a lock of redis-py, by Celery's own retry."""


def waiting_peers(stack: ExitStack, broker: str, gates: str) -> WaitingPeers:
    """Declare the tasks. What they wait for is on a server of its own, so that its commands can be counted."""
    server = stack.enter_context(connect(settings=Settings(url=gates)))
    app = stack.enter_context(closing(Celery("bench", broker=broker, set_as_current=False)))
    app.conf.update(broker_connection_retry_on_startup=True, task_ignore_result=True, worker_hijack_root_logger=False)
    runs = stack.enter_context(closing(redis.Redis.from_url(broker)))
    asked = stack.enter_context(closing(redis.Redis.from_url(gates)))

    def body() -> Callable[[int], None]:
        def count(number: int) -> None:  # noqa: ARG001 - tells calls apart
            runs.incr(RUNS)

        return count

    def poll(self: Any, number: int) -> None:  # noqa: ARG001
        lock = asked.lock(LOCK, timeout=30)
        if not lock.acquire(blocking=False):
            runs.incr(REFUSED)
            raise self.retry(countdown=POLL_S)
        try:
            runs.incr(RUNS)
        finally:
            lock.release()

    parked = {
        "a lock": coordinated_task(app=app, redis=server, name="one", lock=LOCK)(body()),
        f"{AT_ONCE} permits": coordinated_task(app=app, redis=server, name=PERMITS, concurrency=AT_ONCE)(body()),
    }
    return WaitingPeers(app, server, parked, app.task(name="polling", bind=True, max_retries=None)(poll))
