"""What a worker's main process does for coordinated tasks: it sends what is parked, and keeps what its tasks hold."""

from typing import Any

from celery import bootsteps

from ..coordination import parked_messages
from ..coordination.coordinated import CoordinatedTask
from ..coordination.guarded import guard
from ..coordination.parking import ParkingLot
from .guard import Guard
from .pump import Pump


class CoordinationStep(bootsteps.StartStopStep):  # which Celery does not type
    """A step of the worker. Loaded by name, by apps that have coordinated tasks."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._lots = _lots_of(worker.app)
        self._pumps: list[Pump] = []
        self._guard: Guard | None = None
        guard((task.name, task.lot.redis.address) for task in _tasks_of(worker.app))  # before the pool forks

    def start(self, worker: Any) -> None:
        """Once the pool has been started, so that no child inherits a thread's half of something."""
        if not self._lots:
            return
        self._guard = Guard(worker.app, self._lots, processes=_has_processes(worker.pool))
        self._guard.start()
        _when_stopped(worker, self._guard)
        self._pumps = [Pump(worker.app, lot) for lot in self._lots]
        for pump in self._pumps:
            pump.start()

    def stop(self, _worker: Any) -> None:
        """Let another worker go on. The pool still runs: the guard goes on until it has ended."""
        for pump in self._pumps:
            pump.stop()
        self._pumps = []

    terminate = stop

    def info(self, _worker: Any) -> dict[str, Any]:
        """For ``inspect stats``, and Flower's page of the worker."""
        if self._guard is None:
            return {}
        return {"petiole": {"parking": [repr(pump) for pump in self._pumps], "guard": repr(self._guard)}}


class WokenQueues(bootsteps.StartStopStep):
    """A step of the consumer: beside each of its queues it takes from the one in which woken tasks come back.

    They do not wait behind all that lies in the queue: a task that was woken for a permit, or for a moment, has waited.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """On every connection."""
        if not _tasks_of(consumer.app):
            return
        for name in list(consumer.app.amqp.queues.consume_from):
            if not name.endswith(parked_messages.WOKEN):
                queue = parked_messages.woken_queue(name)
                consumer.add_task_queue(queue.name, queue.exchange.name, "direct", queue.routing_key)


def _lots_of(app: Any) -> list[ParkingLot]:
    return list(dict.fromkeys(task.lot for task in _tasks_of(app)))


def _tasks_of(app: Any) -> list[CoordinatedTask]:
    return [task for task in app.tasks.values() if isinstance(task, CoordinatedTask) and task.is_coordinated]


def _has_processes(pool: Any) -> bool:
    return any(base.__module__ == "celery.concurrency.prefork" for base in type(pool).__mro__)


def _when_stopped(worker: Any, guard: Guard) -> None:
    """Stop the guard when all steps have been, and so the pool."""
    stopped = worker.blueprint.on_stopped

    def on_stopped() -> None:
        try:
            guard.stop()
        finally:
            if stopped is not None:
                stopped()

    worker.blueprint.on_stopped = on_stopped
