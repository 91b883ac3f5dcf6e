"""Floor 3: what Celery runs: flushes, warmings, invalidations; and the command line.

``celery -A petiole.tasks`` names an app with the reference settings of ``petiole.celeryconfig``, for trying things
out and for ``celery petiole``; an application makes its own app, and what it declares brings its own tasks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery import Celery

    from .cluster_rate_limit import global_rate_limit
    from .invalidation import CommitInvalidation, invalidate_on_commit
    from .warming import WarmedFunction, warmed
    from .write_behind import WriteBehind, WriteBehindStats

    app: Celery

__all__ = [
    "CommitInvalidation",
    "WarmedFunction",
    "WriteBehind",
    "WriteBehindStats",
    "app",
    "global_rate_limit",
    "invalidate_on_commit",
    "warmed",
]

_LATER = {
    "CommitInvalidation": ".invalidation",
    "WarmedFunction": ".warming",
    "WriteBehind": ".write_behind",
    "WriteBehindStats": ".write_behind",
    "app": ".app",
    "global_rate_limit": ".cluster_rate_limit",
    "invalidate_on_commit": ".invalidation",
    "warmed": ".warming",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LATER[name], __name__)
    value = getattr(module, name)
    globals()[name] = value  # a name of a module of ours (app) must give what it holds, not the module
    return value
