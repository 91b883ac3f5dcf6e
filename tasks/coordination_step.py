"""What a worker's main process does for coordinated tasks: it sends what is parked, and keeps what its tasks hold."""

from typing import Any

from celery import bootsteps

from ..coordination import passing
from ..coordination.coordinated_task import CoordinatedTask
from ..coordination.parking import ParkingLot
from .pump import Pump


class CoordinationStep(bootsteps.StartStopStep):  # type: ignore[misc]  # which Celery does not type
    """A step of the worker. Loaded by name, by apps that have coordinated tasks."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._lots = _lots_of(worker.app)
        self._pumps: list[Pump] = []
        for lot in self._lots:
            passing.guarded.add(lot.keys.namespace)  # before the pool forks

    def start(self, worker: Any) -> None:
        """Once the pool has been started, so that no child inherits a thread's half of something."""
        self._pumps = [Pump(worker.app, lot) for lot in self._lots]
        for pump in self._pumps:
            pump.start()

    def stop(self, worker: Any) -> None:
        """Let another worker go on."""
        for pump in self._pumps:
            pump.stop()
        self._pumps = []

    def info(self, worker: Any) -> dict[str, Any]:
        """For ``inspect stats``, and Flower's page of the worker."""
        return {"petiole": {"parking": [repr(pump) for pump in self._pumps]}}


def _lots_of(app: Any) -> list[ParkingLot]:
    tasks = [task for task in app.tasks.values() if isinstance(task, CoordinatedTask) and task.is_coordinated]
    return list(dict.fromkeys(task.lot for task in tasks))
