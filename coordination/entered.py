"""Who holds a lock, as this process sees it: which ``with`` statements have begun, and who would wait for himself.

An *owner* is a thread in a context (``contextvars``); it may hold a reentrant lock twice. That somebody would wait for
himself is told by something else: the function whose ``with`` block holds the lock is still running, further up on the
very stack that is going to wait. Threads of a pool, generators and tasks that are suspended are not on it.
"""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from threading import RLock, current_thread
from types import FrameType, TracebackType
from typing import Generic, Protocol, TypeVar

from ..cachelib.forks import renew_after_fork
from .errors import LockLost

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


class Leavable(Protocol):
    """A hold, whose end is the end of a ``with`` block."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back."""

    def abandon(self) -> None:
        """Give it back soon: nobody will come back to it."""


T = TypeVar("T", bound=Leavable)


class Entered(Generic[T]):
    """What ``with`` statements of one lock have begun and not yet ended, the newest last."""

    def __init__(self) -> None:
        self._all: list[tuple[Owner, T]] = []
        self._lock = RLock()  # a signal handler may come in between
        renew_after_fork(self)

    def enter(self, acquire: Callable[[], T]) -> T:
        """A statement begins."""
        hold: T | None = None
        try:
            hold = acquire()
            self.push(hold)
            return hold
        except BaseException:  # out of a signal handler, between two lines
            if hold is not None:
                self.drop(hold)
                hold.abandon()
            raise

    def push(self, hold: T) -> None:
        """A statement has begun."""
        self._all.append((owner_here(), hold))

    def drop(self, hold: T) -> None:
        """A statement has ended, or has not begun after all."""
        with self._lock:
            for place in reversed(range(len(self._all))):
                if self._all[place][1] is hold:
                    del self._all[place]
                    return

    def leave(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """A statement ends: the newest of its owner, or of anybody, where it has moved to another thread."""
        hold: T | None = None
        try:
            hold = self._newest()
            hold.__exit__(kind, error, trace)
            self.drop(hold)
        except BaseException as failure:
            hold = hold or self._newest()
            self.drop(hold)
            if not isinstance(failure, LockLost):  # out of a signal handler: nobody else knows this hold
                hold.abandon()
            raise

    def _newest(self) -> T:
        owner, entered = owner_here(), self._all.copy()
        if not entered:
            raise RuntimeError("a with block was left that was not entered: __exit__ without its __enter__")
        for whose, hold in reversed(entered):
            if whose == owner:
                return hold
        return entered[-1][1]

    def renew_after_fork(self) -> None:
        """Make the lock anew."""
        self._lock = RLock()
