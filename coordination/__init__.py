"""Floor 2: agreements between processes. Locks and limiters know no Celery; what faces tasks and signals does.

What needs Celery is imported when it is asked for, so that a web process that only locks and limits does without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .barrier import Barrier
from .debounce import Debounce
from .errors import DuplicateTask, RateLimited, TaskRefused, TooManyParked
from .gates import Concurrency, Pause, Rate, Unique
from .hold import Busy, Hold
from .leader import Leader
from .lock import Lock
from .multi_lock import MultiHold, MultiLock
from .rate_limit import Allowed, Decision, Limited, RateLimit, Reserved
from .rate_limiter import RateLimiter
from .read_write_lock import ReadWriteLock
from .redlock import Redlock
from .semaphore import Semaphore
from .single_flight import SingleFlight
from .throttle import Throttle

if TYPE_CHECKING:
    from .coordinated import CoordinatedTask, coordinated_task
    from .memoize import MemoizedTask, memoized_task
    from .signals import SignalBridge

__all__ = [
    "Allowed",
    "Barrier",
    "Busy",
    "Concurrency",
    "CoordinatedTask",
    "Debounce",
    "Decision",
    "DuplicateTask",
    "Hold",
    "Leader",
    "Limited",
    "Lock",
    "MemoizedTask",
    "MultiHold",
    "MultiLock",
    "Pause",
    "Rate",
    "RateLimit",
    "RateLimited",
    "RateLimiter",
    "ReadWriteLock",
    "Redlock",
    "Reserved",
    "Semaphore",
    "SignalBridge",
    "SingleFlight",
    "TaskRefused",
    "Throttle",
    "TooManyParked",
    "Unique",
    "coordinated_task",
    "memoized_task",
]

_LATER = {
    "CoordinatedTask": ".coordinated",
    "coordinated_task": ".coordinated",
    "MemoizedTask": ".memoize",
    "memoized_task": ".memoize",
    "SignalBridge": ".signals",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)
