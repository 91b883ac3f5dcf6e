"""A task whose hold is lost while it runs is stopped (``on_lost="terminate"``), as by a soft time limit.

The invariant: it is stopped in its body or not at all. The signal is sent and handled while the body runs, never while
Celery stores a result or begins the next task; so it is this process that sends it to itself, for only it knows.
"""

import signal
import time
from collections.abc import Callable
from threading import Lock, current_thread, get_ident, main_thread
from types import FrameType, TracebackType
from typing import Any, Self

from .admitted import Admitted
from .errors import LockLost
from .hold import Hold

_SIGNAL = getattr(signal, "SIGUSR1", None)
_SHORT_S, _ENOUGH_S = 0.001, 1.0

Handler = Callable[[int, FrameType | None], Any]


def run_until_lost(admitted: Admitted, body: Callable[[], Any]) -> Any:
    """Run a task's body, and stop it when what it holds is lost: ``LockLost`` is raised where it is.

    Only where soft time limits work, in a process of a pool. Elsewhere the task looks for itself.
    """
    soft_limit = _handler_of_soft_limits()
    if soft_limit is None:
        return body()
    with _Stopping(admitted, soft_limit):
        return body()


def _handler_of_soft_limits() -> Handler | None:
    """None in a thread, and in the main process of a worker."""
    if _SIGNAL is None or current_thread() is not main_thread():
        return None
    from billiard.pool import soft_timeout_sighandler

    found: Handler = soft_timeout_sighandler
    return found if signal.getsignal(_SIGNAL) is found else None


class _Stopping:
    """Around the body: the signal of soft time limits also says that a hold is lost."""

    def __init__(self, admitted: Admitted, soft_limit: Handler) -> None:
        self._admitted = admitted
        self._soft_limit = soft_limit
        self._thread = get_ident()
        self._lock = Lock()
        self._in_body = True
        self._lost: Hold | None = None
        self._told = False

    def __enter__(self) -> Self:
        signal.signal(_SIGNAL or 0, self._handle)
        for hold in self._admitted.every_hold():
            hold.on_lost(self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._lock:
                self._in_body = False
            waited_s = 0.0
            while self._lost is not None and not self._told and waited_s < _ENOUGH_S:
                time.sleep(_SHORT_S)  # the signal is on its way: it must not meet what comes after the body
                waited_s += _SHORT_S
        finally:
            signal.signal(_SIGNAL or 0, self._soft_limit)

    def _stop(self, hold: Hold) -> None:
        """In another thread, when a hold is lost."""
        with self._lock:
            if self._in_body and self._lost is None:
                self._lost = hold
                signal.pthread_kill(self._thread, _SIGNAL or 0)  # a call that blocks is interrupted too

    def _handle(self, number: int, frame: FrameType | None) -> None:
        lost = self._lost
        if lost is None or self._told:
            self._soft_limit(number, frame)
            return
        self._told = True
        raise LockLost(lost.what, lost.fence, "it was lost while the task ran, which was stopped (on_lost='terminate')")
