"""Work beside the caller, in threads that are few and keep nobody from ending.

Used for refreshes, and for loads with a time limit. A thread that hangs in a loader cannot be stopped in Python; what
can be done is to bound how many there are. The threads are daemons: a process that ends does not wait for them, and a
lease that one of them held runs out.
"""

import contextvars
import logging
from collections.abc import Callable
from threading import Event, Lock, Thread
from typing import Generic, TypeVar

from .forks import renew_after_fork

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Job(Generic[T]):
    """A call that runs in a thread."""

    def __init__(self) -> None:
        self._done = Event()
        self._value: T | None = None
        self._error: BaseException | None = None
        self._abandoned: str | None = None
        self._lock = Lock()

    def wait(self, most_s: float | None) -> bool:
        """Wait for its end. Returns whether it came in time."""
        return self._done.wait(most_s)

    def result(self) -> T:
        """What it returned; raises what it raised. Only once it has ended."""
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def abandon(self, what: str) -> None:
        """Nobody will ask for the result: if it fails, it is logged."""
        with self._lock:
            self._abandoned = what
            if self._error is not None:
                self._log()

    def run(self, call: Callable[[], T]) -> None:
        """Run it here."""
        try:
            self._value = call()
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            with self._lock:
                self._error = error
                if self._abandoned is not None:
                    self._log()
        finally:
            self._done.set()

    def _log(self) -> None:
        logger.warning("%s, which nobody waited for any more, failed", self._abandoned, exc_info=self._error)


class Background:
    """A bounded number of threads.

    Arguments:
        most: how many may run at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._running = 0
        self._lock = Lock()
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"<Background [{self._running} of {self._most} threads]>"

    def start(self, call: Callable[[], T]) -> Job[T] | None:
        """Run a call in a thread of its own, in the caller's context. None when there is no thread to be had."""
        with self._lock:
            if self._running >= self._most:
                return None
            self._running += 1
        job: Job[T] = Job()
        context = contextvars.copy_context()
        generation = self._lock  # a forked child has another, and its count does not know this thread

        def run() -> None:
            try:
                context.run(job.run, call)
            finally:
                with generation:
                    if generation is self._lock:
                        self._running -= 1

        try:
            Thread(target=run, name="petiole-load", daemon=True).start()
        except BaseException as error:
            with self._lock:
                self._running -= 1
            if isinstance(error, RuntimeError):  # the system has no thread for us either
                return None
            raise
        return job

    def renew_after_fork(self) -> None:
        """Forget the parent's threads."""
        self._lock = Lock()
        self._running = 0
