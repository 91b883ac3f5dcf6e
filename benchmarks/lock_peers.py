"""Who is measured holding locks: each library as its own documentation sets it up, behind ``with``.

A maker opens a client for the process, and gives what makes a lock of a name. Every lock is a lease of ten seconds,
is used again and again, and waits until it has it. Each thread has a lock object of its own, since not every
library's may be shared.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from typing import Any

from petiole import Lock, connect
from petiole.cachelib import Settings

from .peers import PETIOLE, Server

LEASE_S = 10

MakeLock = Callable[[str], AbstractContextManager[Any]]
LockPeer = Callable[[ExitStack, Server], MakeLock]


def _petiole(stack: ExitStack, server: Server) -> MakeLock:
    redis = stack.enter_context(connect(settings=Settings(url=server.url)))
    return lambda name: Lock(redis, name, ttl=LEASE_S)


def _redis_py(stack: ExitStack, server: Server, **options: float) -> MakeLock:
    client = _client(stack, server)
    return lambda name: client.lock(f"redis-py:{name}", timeout=LEASE_S, **options)


def _python_redis_lock(stack: ExitStack, server: Server) -> MakeLock:
    module, client = importlib.import_module("redis_lock"), _client(stack, server)
    return lambda name: module.Lock(client, name, expire=LEASE_S)


def _pottery(stack: ExitStack, server: Server) -> MakeLock:
    module, client = importlib.import_module("pottery"), _client(stack, server)
    return lambda name: module.Redlock(key=name, masters={client}, auto_release_time=LEASE_S)


def _sherlock(stack: ExitStack, server: Server) -> MakeLock:
    module, client = importlib.import_module("sherlock"), _client(stack, server)
    return lambda name: module.RedisLock(f"sherlock:{name}", client=client, expire=LEASE_S)


def _client(stack: ExitStack, server: Server) -> Any:
    redis = importlib.import_module("redis")
    return stack.enter_context(closing(redis.Redis(server.host, server.port)))


LOCKS: dict[str, LockPeer] = {
    PETIOLE: _petiole,
    "redis-py Lock": _redis_py,
    "redis-py Lock, sleep=0.001": partial(_redis_py, sleep=0.001),
    "python-redis-lock": _python_redis_lock,
    "pottery Redlock, 1 master": _pottery,
    "sherlock": _sherlock,
}
UNCONTENDED = tuple(who for who in LOCKS if who != "redis-py Lock, sleep=0.001")  # who does not wait does not sleep
CONTENDED = tuple(who for who in LOCKS if who != "sherlock")  # asks every 0.1 s, as redis-py's does
