"""Calling those who want to know, beside the thread that found out: a few threads, and a queue when all are busy."""

import logging
from collections import deque
from collections.abc import Callable
from threading import Lock, Thread

from ..cachelib.forks import renew_after_fork

logger = logging.getLogger(__name__)

_THREADS = 8

Call = Callable[[], object]


class CallingBack:
    """Every call is made once; so many at a time. What one raises is logged, and stops nobody."""

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()
        self._running = 0
        self._lock = Lock()
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"<CallingBack [{self._running} threads, {len(self._calls)} calls wait]>"

    def renew_after_fork(self) -> None:
        """The parent makes its calls itself."""
        self._calls, self._running, self._lock = deque(), 0, Lock()

    def start(self, call: Call) -> None:
        """Have it called soon. Where the system has no thread left, it is called here."""
        with self._lock:
            self._calls.append(call)
            if self._running >= _THREADS:
                return
            self._running += 1
        try:
            Thread(target=self._run, name="petiole-calls", daemon=True).start()
        except RuntimeError:
            self._run()

    def _run(self) -> None:
        while True:
            with self._lock:  # under which another sees whether it must start a thread
                if not self._calls:
                    self._running -= 1
                    return
                call = self._calls.popleft()
            try:
                call()
            except BaseException:  # sys.exit() too: the next one is to be called all the same
                logger.exception("%r failed", call)
