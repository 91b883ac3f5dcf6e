"""Petiole: caching, coordination and write-behind for Celery on Redis.

The face: every public name. Each is imported when it is first asked for, so that a web process that only
caches imports neither Celery nor SQLAlchemy. Importing connects to nothing and starts no thread.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cachelib import MISS, Cache, Codec, Connections, Loaded, Near, Pickle, Settings, cached, connect
    from .cachelib.write_behind import SqlSink
    from .coordination import (
        Allowed,
        Barrier,
        Busy,
        Concurrency,
        Debounce,
        DuplicateTask,
        Hold,
        Leader,
        Limited,
        Lock,
        MultiLock,
        Pause,
        Rate,
        RateLimit,
        RateLimited,
        RateLimiter,
        ReadWriteLock,
        Redlock,
        Reserved,
        Semaphore,
        SingleFlight,
        Throttle,
        TooManyParked,
        Unique,
    )
    from .coordination.coordinated import CoordinatedTask, coordinated_task
    from .coordination.memoize import MemoizedTask, memoized_task
    from .coordination.signals import SignalBridge
    from .tasks.cluster_rate_limit import global_rate_limit
    from .tasks.invalidation import invalidate_on_commit
    from .tasks.refreshing import refreshed_in_worker
    from .tasks.warming import warmed
    from .tasks.write_behind import WriteBehind

__all__ = [
    # Connecting
    "Connections",
    "Settings",
    "connect",
    # Caching
    "MISS",
    "Cache",
    "Codec",
    "Loaded",
    "Near",
    "Pickle",
    "cached",
    "invalidate_on_commit",
    "refreshed_in_worker",
    "warmed",
    # Writing behind
    "SqlSink",
    "WriteBehind",
    # Coordinating
    "Barrier",
    "Busy",
    "Hold",
    "Leader",
    "Lock",
    "MultiLock",
    "ReadWriteLock",
    "Redlock",
    "Semaphore",
    "SingleFlight",
    # Limiting
    "Allowed",
    "Debounce",
    "Limited",
    "RateLimit",
    "RateLimiter",
    "Reserved",
    "Throttle",
    # Tasks and signals
    "Concurrency",
    "CoordinatedTask",
    "DuplicateTask",
    "MemoizedTask",
    "Pause",
    "Rate",
    "RateLimited",
    "SignalBridge",
    "TooManyParked",
    "Unique",
    "coordinated_task",
    "global_rate_limit",
    "memoized_task",
]  # fmt: skip

_HOME = {
    "Connections": ".cachelib",
    "Settings": ".cachelib",
    "connect": ".cachelib",
    "MISS": ".cachelib",
    "Cache": ".cachelib",
    "Codec": ".cachelib",
    "Loaded": ".cachelib",
    "Near": ".cachelib",
    "Pickle": ".cachelib",
    "cached": ".cachelib",
    "invalidate_on_commit": ".tasks.invalidation",
    "refreshed_in_worker": ".tasks.refreshing",
    "warmed": ".tasks.warming",
    "SqlSink": ".cachelib.write_behind",
    "WriteBehind": ".tasks.write_behind",
    "Barrier": ".coordination",
    "Busy": ".coordination",
    "Hold": ".coordination",
    "Leader": ".coordination",
    "Lock": ".coordination",
    "MultiLock": ".coordination",
    "ReadWriteLock": ".coordination",
    "Redlock": ".coordination",
    "Semaphore": ".coordination",
    "SingleFlight": ".coordination",
    "Allowed": ".coordination",
    "Debounce": ".coordination",
    "Limited": ".coordination",
    "RateLimit": ".coordination",
    "RateLimiter": ".coordination",
    "Reserved": ".coordination",
    "Throttle": ".coordination",
    "Concurrency": ".coordination",
    "CoordinatedTask": ".coordination",
    "DuplicateTask": ".coordination",
    "MemoizedTask": ".coordination",
    "Pause": ".coordination",
    "Rate": ".coordination",
    "RateLimited": ".coordination",
    "SignalBridge": ".coordination",
    "TooManyParked": ".coordination",
    "Unique": ".coordination",
    "coordinated_task": ".coordination",
    "global_rate_limit": ".tasks.cluster_rate_limit",
    "memoized_task": ".coordination",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("petiole")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
