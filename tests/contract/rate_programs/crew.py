"""Workers as processes, with a broker and a server of limits of their own, and what their tasks have noted."""

import json
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from local_nodes import eventually

from petiole import connect
from petiole.cachelib import EmbeddedServer
from petiole.cachelib.guarded import GuardedProcess

HERE = Path(__file__).parent
POOLS = ["prefork", pytest.param("solo", marks=pytest.mark.storm), *(["gevent"] if find_spec("gevent") else [])]


class Crew:
    """Workers of ``limited_worker.py``, each with two places in its pool."""

    def __init__(
        self, folder: Path, broker: EmbeddedServer, limits: EmbeddedServer, rate: str, pool: str, **config: Any
    ) -> None:
        self.folder = folder
        self.pool = pool
        self.redis = connect(broker.url)
        self.environment = {
            "BROKER_URL": broker.url,
            "LIMITS_URL": limits.url,
            "RATE": rate,
            "CONFIG": json.dumps(config),
            "PYTHONPATH": str(HERE),
        }
        self.app = Celery("limited", broker=broker.url)
        self.app.conf.update(task_default_queue="limited", task_ignore_result=True)
        self.workers: dict[str, GuardedProcess] = {}

    def send(self, count: int, task: str = "limited", *, first: int = 0, **options: Any) -> None:
        """So many messages, numbered."""
        with self.app.producer_or_acquire() as producer:
            for number in range(first, first + count):
                self.app.send_task(task, (number,), producer=producer, **options)

    def start(self, *names: str, environment: Mapping[str, str] | None = None) -> None:
        """Start workers, and wait until all are ready."""
        seen = {name: len(self.log(name)) for name in names}
        for name in names:
            options = ["-P", self.pool, "-c", "2", "-n", f"{name}@crew", "-l", "INFO", "--without-mingle"]
            self.workers[name] = GuardedProcess(
                [sys.executable, "-m", "celery", "-A", "limited_worker", "worker", *options],
                output=self.folder / f"{name}.log",
                environment={**os.environ, **self.environment, **(environment or {})},
                folder=self.folder,
            )
        for name in names:
            eventually(
                lambda name=name: self._is_ready(name, seen[name]) or not self.workers[name].running, f"{name} starts"
            )
            assert self._is_ready(name, seen[name]), self.log(name)[-2000:]

    def _is_ready(self, name: str, seen: int) -> bool:
        return " ready." in self.log(name)[seen:]

    def end(self) -> None:
        """Ask all workers to end, as one does, and wait."""
        for worker in self.workers.values():
            worker.stop(within_s=60)
        self.workers.clear()

    def close(self) -> None:
        """Leave nothing behind."""
        for worker in self.workers.values():
            worker.kill()
        self.app.close()
        self.redis.close()

    def log(self, name: str) -> str:
        """What a worker has said."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def runs(self, task: str = "limited") -> list[dict[str, Any]]:
        """What the runs of a task have noted, in their order."""
        return [json.loads(note) for note in self.redis.coordination.lrange(f"noted:{task}", 0, -1)]

    def order(self) -> list[str]:
        """The names of the tasks that ran, in their order."""
        return [name.decode() for name in self.redis.coordination.lrange("noted:all", 0, -1)]

    def until_ran(self, count: int, task: str = "limited", within_s: float = 60.0) -> list[dict[str, Any]]:
        """Wait until a task has run so often."""
        length = self.redis.coordination.llen
        eventually(lambda: length(f"noted:{task}") >= count, f"{task} ran {count} times", within_s)
        return self.runs(task)

    def in_the_broker(self) -> tuple[int, int]:
        """How many messages wait in the queue, and how many are with workers."""
        client = self.redis.coordination
        return client.llen("limited"), client.hlen("unacked")

    def tell(self, name: str, rate: str, task: str = "limited") -> dict[str, Any]:
        """Send Celery's own command to one worker; its answer."""
        (answer,) = self.app.control.rate_limit(task, rate, destination=[f"{name}@crew"], reply=True, timeout=10)
        return dict(answer[f"{name}@crew"])

    def limit(self, name: str) -> dict[str, Any]:
        """What a worker shows in ``inspect stats`` of the limited task."""
        tasks: dict[str, Any] = self.stats(name)["global_rate_limit"]["tasks"]
        return tasks.get("limited", {})

    def stats(self, name: str) -> dict[str, Any]:
        """What ``inspect stats`` shows of a worker."""
        return dict(self.app.control.inspect([f"{name}@crew"], timeout=10).stats()[f"{name}@crew"])
