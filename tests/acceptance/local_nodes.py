"""Local processes as the nodes of pytest-celery, which knows containers.

A node asks its container for a name, a status, logs, and to be killed and restarted; a process can do all that.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event

from petiole.cachelib import EmbeddedServer
from petiole.cachelib.guarded import GuardedProcess

START_S = 60.0
_NEVER = Event()

HERE = Path(__file__).parent


def eventually(holds: Callable[[], object], what: str, within_s: float = 60.0) -> None:
    """Wait until something that another process does has happened; fail, with its name, when it does not."""
    waited_s, pause_s = 0.0, 0.002  # by what was waited, not by the clock: a machine that is slow gets more of it
    while waited_s < within_s:
        if holds():
            return
        _NEVER.wait(pause_s)
        waited_s, pause_s = waited_s + pause_s, min(pause_s * 2, 0.05)
    raise AssertionError(f"not within {within_s:.0f} s: {what}")


class LocalServer:
    """An embedded Redis server, as broker and as result backend."""

    def __init__(self, server: EmbeddedServer) -> None:
        self.server = server
        self.name = self.id = f"redis-{server.port}"

    @property
    def celeryconfig(self) -> dict[str, str]:
        return {"url": self.server.url, "host_url": self.server.url, "local_url": self.server.url}

    def ready(self) -> bool:
        return True

    def logs(self) -> str:
        return ""

    def teardown(self) -> None:
        """Whoever started the server stops it."""


class LocalCelery:
    """A ``celery`` process of the shop: a worker or beat. In a group of its own, so that a kill takes it whole."""

    def __init__(self, command: str, *arguments: str, environment: Mapping[str, str], folder: Path, ready: str) -> None:
        self.name = self.id = f"{command}-{folder.name}"
        self._command = [sys.executable, "-m", "celery", "-A", "shop_worker", command, *arguments]
        self._environment = {**os.environ, "PYTHONPATH": str(HERE), **environment}
        self._log = folder / f"{command}.log"
        self._ready = ready
        self._seen = 0
        self._process: GuardedProcess | None = None
        self.start()

    @property
    def status(self) -> str:
        return "running" if self._process is not None and self._process.running else "exited"

    @property
    def celeryconfig(self) -> dict[str, str]:
        return {}

    def start(self) -> None:
        self._seen = len(self.logs())
        self._process = GuardedProcess(
            self._command, output=self._log, environment=self._environment, folder=self._log.parent
        )

    def ready(self) -> bool:
        eventually(
            lambda: self._ready in self.logs()[self._seen :] or self.status != "running",
            f"{self.name} says {self._ready!r}; its log: {self.logs()[-2000:]}",
            START_S,
        )
        assert self.status == "running", self.logs()[-2000:]
        return True

    def logs(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def kill(self, signal: str | int = "SIGKILL") -> None:
        assert self._process is not None
        if signal == "SIGKILL":
            self._process.kill()
        elif signal == "SIGTERM":
            self._process.stop(within_s=60)  # one SIGTERM, and time: a second one would cut its end short
        else:
            raise ValueError(f"a local process is ended with SIGKILL or SIGTERM, not {signal}")

    def restart(self, timeout: float = START_S) -> None:
        if self.status == "running":
            self.kill("SIGTERM")
        self.start()
        self.ready()

    def reload(self) -> None:
        """A container's view of itself may be old; a process's is not."""

    def teardown(self) -> None:
        if self._process is not None:
            self._process.stop(within_s=30)
