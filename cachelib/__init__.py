"""Floor 1: values in Redis. Knows redis-py, and nothing of Celery."""

from .cache import Cache, Guard, Versioned
from .connections import Connections, Health, connect
from .decorators import CachedFunction, cached
from .embedded import EmbeddedServer
from .formats import Codec, Pickle
from .missing import MISS
from .near import Near
from .policy import Loaded, Options, Refresh, Refresher
from .settings import Settings
from .stats import Explanation, Stats

__all__ = [
    "MISS",
    "Cache",
    "CachedFunction",
    "Codec",
    "Connections",
    "EmbeddedServer",
    "Explanation",
    "Guard",
    "Health",
    "Loaded",
    "Near",
    "Options",
    "Pickle",
    "Refresh",
    "Refresher",
    "Settings",
    "Stats",
    "Versioned",
    "cached",
    "connect",
]
