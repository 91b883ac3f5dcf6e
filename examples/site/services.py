"""The processes of the demo: a worker, beat and Flower, each a real one."""

import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from petiole.cachelib.embedded import free_port
from petiole.cachelib.guarded import GuardedProcess

START_S = 60.0


class ServiceFailed(Exception):
    """A process that did not come up, with the end of its log."""


class Services:
    """Starts the processes of the site, and ends them.

    Arguments:
        folder: for logs and beat's schedule.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._flower_port = free_port()
        self._processes: dict[str, GuardedProcess] = {}
        self._workers = 0

    @property
    def flower_url(self) -> str:
        """Where Flower shows what goes on."""
        return f"http://127.0.0.1:{self._flower_port}"

    def start(self) -> None:
        """Start all, and wait until they answer. Raises ``ServiceFailed``."""
        self.start_worker()
        self._start("beat", "beat", "--schedule", str(self.folder / "beat-schedule"), "--loglevel", "info")
        self._start("flower", "flower", "--address=127.0.0.1", f"--port={self._flower_port}", "--loglevel=warning")
        self.wait_for_worker()
        self._wait("flower", lambda: _answers(f"{self.flower_url}/healthcheck"))

    def start_worker(self) -> None:
        """Start a worker with two processes."""
        self._workers += 1
        host = f"worker{self._workers}@demo"  # a name of its own: the one that was killed says no goodbye
        self._start("worker", "worker", "--concurrency", "2", "--hostname", host, "--loglevel", "info")

    def wait_for_worker(self) -> None:
        """Wait until the worker takes tasks."""
        from .app import app

        self._wait("worker", lambda: bool(app.control.ping(destination=[f"worker{self._workers}@demo"], timeout=0.5)))

    def kill_worker(self) -> None:
        """SIGKILL for the worker and its processes, wherever they are."""
        self._processes["worker"].kill()

    def stop(self) -> None:
        """End all, each in its own good time: the worker drains the buffers."""
        for process in self._processes.values():
            process.stop(within_s=30)
        self._processes.clear()

    def log(self, name: str) -> str:
        """The end of a process's log."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace")[-2_000:] if path.exists() else "(no log)"

    def _start(self, name: str, *arguments: str) -> None:
        self._processes[name] = GuardedProcess(
            [sys.executable, "-m", "celery", "-A", "examples.site.app", *arguments],
            output=self.folder / f"{name}.log",
            environment={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not ready():
            if not self._processes[name].running or time.monotonic() > deadline:
                raise ServiceFailed(f"{name} did not come up; the end of its log:\n{self.log(name)}")
            time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
