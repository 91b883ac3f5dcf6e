"""Floor 1: values in Redis. Knows redis-py, and nothing of Celery."""

from .cache import MISS, Cache
from .connections import Connections, Health, connect
from .decorators import CachedFunction, cached
from .embedded import EmbeddedServer
from .settings import Settings
from .stats import Stats

__all__ = [
    "MISS",
    "Cache",
    "CachedFunction",
    "Connections",
    "EmbeddedServer",
    "Health",
    "Settings",
    "Stats",
    "cached",
    "connect",
]
