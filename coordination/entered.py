"""Who holds a lock, as this process sees it: which ``with`` statements have begun, and who would wait for himself.

An *owner* is a thread in a context (``contextvars``); it may hold a reentrant lock twice. That somebody would wait for
himself is told by something else, which is never wrong: the function that acquired the lock is still running, further
up on the very stack that is going to wait. Threads of a pool, generators and tasks that are suspended are not on it.
"""

import sys
from contextvars import ContextVar
from threading import RLock, current_thread
from types import FrameType
from typing import Generic, TypeVar

from ..cachelib.forks import renew_after_fork

T = TypeVar("T")

Owner = tuple[object, object]

_context: ContextVar[object] = ContextVar("petiole_owner")
_PACKAGE = __name__.rpartition(".")[0]


def owner_here() -> Owner:
    """Who runs this line. Compared by identity: numbers of threads are used again when they have ended."""
    try:
        context = _context.get()
    except LookupError:
        context = object()
        _context.set(context)
    return current_thread(), context


def calling_frame(at_least: int = 1) -> FrameType:
    """The function that called into this package.

    Arguments:
        at_least: how many of the innermost functions are known to be of this package: looking at one costs.
    """
    frame = sys._getframe(at_least + 1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame = frame.f_back
    return frame


def is_running(wanted: FrameType) -> bool:
    """Whether a function is on the stack of this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame is wanted:
            return True
        frame = frame.f_back
    return False


class Entered(Generic[T]):
    """What ``with`` statements of one lock have begun and not yet ended, the newest last."""

    def __init__(self) -> None:
        self._all: list[tuple[Owner, T]] = []
        self._lock = RLock()  # a signal handler may come in between
        renew_after_fork(self)

    def push(self, hold: T) -> None:
        """A statement has begun."""
        with self._lock:
            self._all.append((owner_here(), hold))

    def pop(self) -> T:
        """A statement ends: the newest of its owner, or of anybody, where it has moved to another thread."""
        owner = owner_here()
        with self._lock:
            for place in reversed(range(len(self._all))):
                if self._all[place][0] == owner:
                    return self._all.pop(place)[1]
            return self._all.pop()[1]

    def drop(self, hold: T) -> None:
        """A statement has not begun after all."""
        with self._lock:
            self._all = [pair for pair in self._all if pair[1] is not hold]

    def renew_after_fork(self) -> None:
        """Make the lock anew."""
        self._lock = RLock()
