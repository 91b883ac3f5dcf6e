"""What the canvas tests do with workers and Redis: start, hold a tag, look what is parked and what was left behind."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery
from local_nodes import eventually
from redis import Redis

from petiole.cachelib.guarded import GuardedProcess

from .canvas_app import FOLDER, PATIENCE_S, make_app


@contextmanager
def worker(url: str, folder: Path, *options: str) -> Iterator[GuardedProcess]:
    """A worker process of the canvas app, that has begun to consume."""
    log = folder / "worker.log"
    process = GuardedProcess(
        [sys.executable, "-m", "celery", "-A", "canvas_app:app", "worker", "--loglevel=info", "--without-gossip",
         "--without-mingle", *options],
        output=log,
        environment={
            **os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]),
            "CANVAS_TEST_URL": url, "REDIS_URL": url, "C_FORCE_ROOT": "1",  # for pickle
        },
        folder=folder,
    )  # fmt: skip
    process.log = log  # type: ignore[attr-defined]
    try:
        eventually(lambda: " ready." in log.read_text() or not process.running, f"the worker starts: {log}")
        assert process.running, log.read_text()[-2_000:]
        yield process
    finally:
        process.stop(within_s=30)


class Crew:
    """The app in the process of the tests, and what they ask of it."""

    def __init__(self, url: str, pool: str = "prefork") -> None:
        self.url = url
        self.pool = pool
        self.app: Celery = make_app(url)
        self.notes: Redis = self.app.notes
        self.lot = self.app.tasks["locked"].lot

    def __getitem__(self, task: str) -> Any:
        return self.app.tasks[task]

    def runs(self, tag: str) -> int:
        """How often a body has begun."""
        return int(self.notes.llen(f"runs:{tag}"))

    def most(self, tag: str) -> int:
        """How many bodies ran at once."""
        return int(self.notes.get(f"most:{tag}") or 0)

    def heard(self, tag: str) -> str:
        """What a callback noted."""
        found: Any = self.notes.blpop([f"heard:{tag}"], timeout=PATIENCE_S)
        return str(found and found[1])

    def hold(self, tag: str) -> None:
        """Bodies stop once they have begun."""
        self.notes.set(f"hold:{tag}", 1)

    def begun(self, tag: str, count: int = 1) -> None:
        eventually(lambda: self.runs(tag) >= count, f"{count} have begun", PATIENCE_S)

    def let_go(self, tag: str) -> None:
        """Bodies stop no more, nor do those to come."""
        self.notes.delete(f"hold:{tag}")
        self.notes.rpush(f"go:{tag}", *range(20))

    def parked(self, count: int) -> None:
        """Wait until so many are parked."""
        eventually(lambda: self.waiting() == count, f"{count} are parked, not {self.waiting()}", PATIENCE_S)

    def waiting(self) -> int:
        return sum(not one.woken for one in self.lot.waiting())

    def left(self) -> list[str]:
        """What should not be in Redis when all has ended. Claims, rates, turns and ends may, with a TTL."""
        leads = f"petiole:1:turn:{{parking:{self.lot.keys.namespace}}}"
        keys = [key for key in self.notes.scan_iter("petiole:*", count=1_000) if not key.startswith(leads)]
        wrong = [key for key in keys if ":parked" in key or ":order" in key]
        for key in keys:
            if key.startswith("petiole:1:run:") and self.notes.get(key) not in ("ended", None):
                wrong.append(key)
            if key.startswith("petiole:1:turn:") and self.notes.type(key) == "hash":
                wrong += [key] if int(self.notes.hget(key, "used") or 0) else []
            if self.notes.pttl(key) == -1 and key not in wrong:
                wrong.append(key)
        return wrong + [key for key in ("unacked", "celery", "other") if self.notes.exists(key)]

    def nothing_left(self) -> None:
        """Of a claim that lasts for a period nothing is asked but its TTL."""
        try:
            eventually(lambda: not self.left(), "nothing is left", PATIENCE_S)
        except AssertionError as error:
            raise AssertionError(f"{error}, but {self.left()}") from None

    def forget_all(self) -> None:
        for key in [*self.notes.scan_iter("petiole:*", count=1_000), "unacked", "unacked_index", "celery", "other"]:
            self.notes.delete(key)

    def close(self) -> None:
        gc.collect()
        self.app.backend.result_consumer.subscribed_to.clear()  # it would try to unsubscribe from a server that is gone
        self.app.close()
        self.app.redis.close()
        self.notes.close()
