"""Floor 2: agreements between processes. Locks and limiters know no Celery; what faces tasks and signals does.

What needs Celery is imported when it is asked for, so that a web process that only limits does without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .hold import Busy, Hold
from .lock import Lock
from .rate_limit import Allowed, Decision, Limited, RateLimit
from .rate_limiter import RateLimiter
from .read_write_lock import ReadWriteLock
from .semaphore import Semaphore

if TYPE_CHECKING:
    from .memoize import MemoizedTask, memoized_task
    from .signals import SignalBridge

__all__ = [
    "Allowed",
    "Busy",
    "Decision",
    "Hold",
    "Limited",
    "Lock",
    "MemoizedTask",
    "RateLimit",
    "RateLimiter",
    "ReadWriteLock",
    "Semaphore",
    "SignalBridge",
    "memoized_task",
]

_LATER = {"MemoizedTask": ".memoize", "memoized_task": ".memoize", "SignalBridge": ".signals"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)
