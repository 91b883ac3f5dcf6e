"""Workers of the load app as processes, and what the tests ask of them while they work."""

import gc
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from typing import Any
from unittest.mock import patch

import psutil
from celery import Celery
from local_nodes import eventually
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from petiole.cachelib import EmbeddedServer
from petiole.cachelib.guarded import GuardedProcess

from .load_app import FOLDER, Notes, make_app

EVERY_S = 0.05
"""So often a watch looks."""
SHORT_VISIBILITY = {"visibility_timeout": 5, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}


class Crew:
    """Two workers, or more, of one app; their servers; and the app in this process."""

    def __init__(self, folder: Path, url: str, *, broker: str = "", notes: str = "", **settings: Any) -> None:
        self.folder = folder
        self.url = url
        given = {"broker": broker or url, "gates": url, "notes": notes or url, **settings}
        self.environment = {
            **os.environ, "PYTHONPATH": str(FOLDER), "LOAD_TEST": json.dumps(given), "C_FORCE_ROOT": "1",
        }  # fmt: skip
        self.app: Celery = make_app(**given)
        self.notes = Notes(given["notes"])
        patient = Retry(ConstantBackoff(0.1), 100)  # a test may restart the server
        self.gates: Redis = Redis.from_url(given["gates"], protocol=2, decode_responses=True, retry=patient)
        self.lot = self.app.tasks["rated"].lot
        self.workers: dict[str, GuardedProcess] = {}

    def send(self, task: str, calls: list[tuple[Any, ...]], **options: Any) -> list[Any]:
        """Send calls, in this order."""
        with self.app.producer_or_acquire() as producer:
            return [self.app.tasks[task].apply_async(call, producer=producer, **options) for call in calls]

    def start(self, *names: str, concurrency: int = 2, queues: str = "celery") -> None:
        """Start workers, and wait until all of them consume."""
        ready = {name: f"ready:{name}@here" for name in names}
        before = {name: self.notes.client.get(ready[name]) for name in names}
        for name in names:
            self.workers[name] = GuardedProcess(
                [sys.executable, "-m", "celery", "-A", "load_app:app", "worker", f"--concurrency={concurrency}",
                 f"--hostname={name}@here", f"--queues={queues}", "--loglevel=WARNING", "--without-gossip",
                 "--without-mingle", "--without-heartbeat"],
                output=self.folder / f"{name}.log",
                environment=self.environment,
                folder=self.folder,
            )  # fmt: skip
        for name in names:
            self.until(
                lambda name=name: self.notes.client.get(ready[name]) != before[name] or not self.workers[name].running,
                f"{name} consumes",
            )
            assert self.workers[name].running, self.log(name)[-2_000:]

    def restart(self, name: str, *, concurrency: int = 2) -> None:
        """A warm one."""
        self.end(name)
        self.start(name, concurrency=concurrency)

    def log(self, name: str) -> str:
        """What a worker has said."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        """The ends of what the workers have said."""
        return " ".join(self.log(name)[-1_000:] for name in self.workers)

    def main(self, name: str) -> psutil.Process:
        """The main process of a worker."""
        (found,) = [
            child for child in psutil.Process(self.workers[name].group).children() if "python" in child.cmdline()[0]
        ]
        return found

    def ran(self, task: str) -> int:
        """How many bodies of a task have begun."""
        return int(self.notes.client.llen(f"notes:{task}"))  # type: ignore[arg-type]

    def until(self, holds: Callable[[], Any], what: str, within_s: float = 60.0) -> None:
        """Wait until something has happened; fail with all that is known when it does not."""
        try:
            eventually(holds, what, within_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.state()}; {self.logs()}") from None

    def until_ran(self, count: int, task: str, within_s: float = 60.0) -> list[dict[str, Any]]:
        """Wait until so many bodies have begun. What they noted, in their order."""
        self.until(lambda: self.ran(task) >= count, f"{count} {task!r} ran", within_s)
        return self.notes.of(task)

    def state(self) -> dict[str, Any]:
        """Where the tasks are, for who must find out why they do not run."""
        said = {**self.lot.counts(), "queued": self.gates.llen("celery"), "unacked": self.gates.hlen("unacked")}
        for line, _ in self.lot.lines():
            held = self.lot.keys.state_of(line)
            turn = self.gates.hgetall(held) if self.gates.type(held) == "hash" else self.gates.get(held)
            said[line] = (self.gates.zscore(self.lot.keys.due, line), turn)
        return {**said, "time": self.notes.client.time()}

    def left(self) -> list[str]:
        """What should not be in Redis when all has ended: anything of parked tasks, and permits that are held."""
        leads = f"petiole:1:turn:{{parking:{self.lot.keys.namespace}}}"
        keys = [key for key in self.gates.scan_iter("petiole:*", count=10_000) if not key.startswith(leads)]
        looks = self.gates.pipeline(transaction=False)
        for key in keys:
            looks.type(key)
            looks.pttl(key)
        answers = looks.execute()
        wrong = [key for key in keys if ":parked" in key or ":order" in key or self._runs(key)]
        for key, kind, left_ms in zip(keys, answers[::2], answers[1::2], strict=True):
            if key.startswith("petiole:1:turn:") and kind == "hash":
                used, waiting = self.gates.hmget(key, "used", "waiting")  # type: ignore[misc]
                wrong += [key] if int(used or 0) or int(waiting or 0) else []
            if left_ms == -1 and key not in wrong:
                wrong.append(key)
        return wrong

    def _runs(self, key: str) -> bool:
        """Whether it says that a task runs; of some it is known for a while that they have ended."""
        return key.startswith("petiole:1:run:") and self.gates.get(key) not in (None, "ended")

    def nothing_left(self) -> None:
        """Neither in our keys nor in the broker."""
        try:
            eventually(lambda: not self.left() and not self.gates.exists("unacked", "celery"), "")
        except AssertionError:
            raise AssertionError(f"left behind: {self.left()}, {self.state()}") from None

    def an_hour_later(self) -> None:
        """Whatever was woken, and was lost on its way, is sent once more."""
        for one in self.lot.waiting():
            self.gates.zadd(self.lot.keys.due, {f"={one.id}": 1}, xx=True)

    def settled(self, folder: Path) -> set[str]:
        """The ids of tasks that were in no worker's hands when a server ended: in its queue, or parked.

        Seen by another server that begins with a copy of what it kept: to hold the server itself would lose messages,
        as kombu takes a message by one command, and writes by another one that it has it.
        """
        server = server_that_may_be_restarted(folder)
        try:
            with Redis.from_url(server.url, protocol=2, decode_responses=True) as seen:
                eventually(lambda: not seen.info("persistence")["loading"], "it has read all")
                queued = {json.loads(message)["headers"]["id"] for message in seen.lrange("celery", 0, -1)}
                known = seen.hgetall(self.lot.keys.waits)
        finally:
            server.stop()
        return queued | {id for id, text in known.items() if text.startswith("q ")}

    def end(self, *names: str) -> None:
        """A warm shutdown: what runs is finished. Of several at once."""
        with ThreadPoolExecutor() as each:
            list(each.map(lambda name: self.workers.pop(name).stop(within_s=60), names or list(self.workers)))

    def close(self) -> None:
        self.end()
        gc.collect()
        self.app.backend.result_consumer.subscribed_to.clear()  # it would unsubscribe from a server that is gone
        self.app.close()
        self.lot.redis.close()
        self.notes.client.close()
        self.gates.close()


class Watch:
    """Looks at something again and again, in a thread of its own, while a test does something else."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self.seen: list[Any] = []
        self._look = look
        self._done = Event()
        self._thread = Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(EVERY_S):
            self.seen.append(self._look())


def server_that_may_be_restarted(folder: Path, port: int = 0) -> EmbeddedServer:
    """One that keeps all that it is told; the next one of the folder begins with it, where clients look for it."""
    kept = ("--appendonly", "yes", "--appendfsync", "always", "--dir", str(folder), "--hz", "100")
    if not port:
        return EmbeddedServer.start(*kept)
    with patch("petiole.cachelib.embedded.free_port", return_value=port):
        return EmbeddedServer.start(*kept)
