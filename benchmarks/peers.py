"""Who is measured: each library as its own documentation sets it up, behind one small shape.

A peer is a name and one call per operation that it has; an operation that is missing is shown as missing. Calls of
an asyncio library are coroutine functions, and the peer names the loop that awaits them. Every peer keeps its own
keys, stores the same values for the same time, and serialises them as it does by default (redis-py and aiocache,
which leave that to the caller, with json).
"""

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from petiole import Cache, cached, connect
from petiole import cachelib as petiole_cachelib
from petiole.cachelib import Connections, Settings

from .measure import Call, Slice, awaited, repeated
from .workload import KEY, LARGE, MANY, SMALL, TAG, TAGGED, TTL_S, WARM, Operation

PETIOLE = "Petiole"


@dataclass(frozen=True)
class Server:
    """Where Redis is."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"


@dataclass(frozen=True)
class Peer:
    """One library, ready to be measured."""

    name: str
    calls: Mapping[Operation, Call]
    fill: Call
    """Stores what the calls that read will find."""
    close: Call
    loop: asyncio.AbstractEventLoop | None = None
    """What awaits the calls; None where they are plain functions."""
    prepare: Mapping[Operation, Call] = field(default_factory=dict)
    """What has to be done before each call of an operation, outside the time taken."""

    decodes: bool = True
    """Whether reading gives the value, or only its bytes."""

    def run(self, call: Call) -> Any:
        """Make one call."""
        return call() if self.loop is None else self.loop.run_until_complete(call())

    def slice(self, operation: Operation) -> Slice:
        """The operation, to be timed."""
        call, prepare = self.calls[operation], self.prepare.get(operation)
        return repeated(call, prepare) if self.loop is None else awaited(self.loop, call, prepare)


def petiole(server: Server) -> Peer:
    """Petiole's own cache, as ``connect`` and ``Cache`` make it."""
    redis = connect(settings=Settings(url=server.url))
    cache = Cache(redis, namespace="bench")
    many, warm = dict.fromkeys(MANY, SMALL), dict.fromkeys(WARM, SMALL)

    @cached(cache, "function:{number}", ttl=TTL_S)
    def function(number: int) -> Any:  # noqa: ARG001
        return SMALL

    def fill() -> None:
        cache.set(KEY, SMALL, ttl=TTL_S)
        cache.set("large", LARGE, ttl=TTL_S)
        cache.set("tagged", SMALL, ttl=TTL_S, tags=["other"])
        cache.set_many(many, ttl=TTL_S)

    return Peer(
        PETIOLE,
        {
            Operation.GET: lambda: cache.get(KEY),
            Operation.GET_OR_SET: lambda: cache.get_or_set(KEY, dict),
            Operation.CACHED: lambda: function(7),
            Operation.GET_TAGGED: lambda: cache.get_or_set("tagged", dict, tags=["other"]),
            Operation.GET_LARGE: lambda: cache.get("large"),
            Operation.MISS: lambda: cache.get("absent"),
            Operation.SET: lambda: cache.set("set", SMALL, ttl=TTL_S),
            Operation.SET_TAGGED: lambda: cache.set("set tagged", SMALL, ttl=TTL_S, tags=["other"]),
            Operation.GET_MANY: lambda: cache.get_many(MANY),
            Operation.SET_MANY: lambda: cache.set_many(many, ttl=TTL_S),
            Operation.WARM: lambda: cache.set_many(warm, ttl=TTL_S),
            Operation.INVALIDATE: lambda: cache.invalidate(tags=[TAG]),
        },
        fill,
        redis.close,
        prepare={
            Operation.INVALIDATE: lambda: cache.set_many(dict.fromkeys(TAGGED, SMALL), ttl=TTL_S, tags=[TAG]),
        },
    )


def petiole_near(server: Server) -> Peer | None:
    """Petiole with a near cache, once with a copy per reader and once shared. None where there is no near cache."""
    near: Any = getattr(petiole_cachelib, "Near", None)
    if near is None:
        return None
    make: Any = Cache  # the argument `near` may not be there yet
    redis = connect(settings=Settings(url=server.url))
    copying = make(redis, namespace="bench near copy", near=near(copy=True))
    sharing = make(redis, namespace="bench near shared", near=near(copy=False))

    def fill() -> None:
        for cache in (copying, sharing):
            cache.set(KEY, SMALL, ttl=TTL_S)
            _wait_until_near(redis, partial(cache.get, KEY))

    return Peer(
        PETIOLE,
        {
            Operation.NEAR_COPY: lambda: copying.get(KEY),
            Operation.NEAR_SHARED: lambda: sharing.get(KEY),
        },
        fill,
        redis.close,
    )


def _wait_until_near(redis: Connections, read: Call) -> None:
    """Raises ``RuntimeError`` when reads go on to reach the server."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        before = redis.coordination.info("stats")["total_commands_processed"]
        for _ in range(100):
            read()
        if redis.coordination.info("stats")["total_commands_processed"] - before < 50:
            return
        time.sleep(0.05)
    raise RuntimeError("the near cache did not answer within 5 s: each read still reached the server")


def bare_redis_py(server: Server) -> Peer:
    """redis-py alone: bytes in, bytes out. What the others stand on."""
    redis = importlib.import_module("redis")
    client = redis.Redis(server.host, server.port)
    payload = json.dumps(SMALL)
    keys = [f"bare:{key}" for key in MANY]
    return Peer(
        "redis-py, bytes",
        {
            Operation.GET: lambda: client.get("bare"),
            Operation.MISS: lambda: client.get("bare:absent"),
            Operation.SET: lambda: client.set("bare:set", payload, ex=TTL_S),
            Operation.GET_MANY: lambda: client.mget(keys),
        },
        lambda: client.mset({"bare": payload} | dict.fromkeys(keys, payload)),
        client.close,
        decodes=False,
    )


def redis_py_json(server: Server) -> Peer:
    """redis-py and json, written by hand, as most people begin."""
    redis = importlib.import_module("redis")
    client = redis.Redis(server.host, server.port)
    many, warm, tagged = ([f"json:{key}" for key in keys] for keys in (MANY, WARM, TAGGED))

    def read(key: str) -> Any:
        found = client.get(key)
        return None if found is None else json.loads(found)

    def store(key: str, value: object) -> None:
        client.set(key, json.dumps(value), ex=TTL_S)

    def store_many(keys: list[str]) -> None:
        with client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.set(key, json.dumps(SMALL), ex=TTL_S)
            pipeline.execute()

    def fill() -> None:
        store("json:user", SMALL)
        store("json:large", LARGE)
        store_many(many)

    return Peer(
        "redis-py + json",
        {
            Operation.GET: lambda: read("json:user"),
            Operation.GET_LARGE: lambda: read("json:large"),
            Operation.MISS: lambda: read("json:absent"),
            Operation.SET: lambda: store("json:set", SMALL),
            Operation.GET_MANY: lambda: [json.loads(found) for found in client.mget(many)],
            Operation.SET_MANY: lambda: store_many(many),
            Operation.WARM: lambda: store_many(warm),
            Operation.INVALIDATE: lambda: client.unlink(*tagged),  # knows its keys: no tags needed, if one can
        },
        fill,
        client.close,
        prepare={Operation.INVALIDATE: lambda: store_many(tagged)},
    )


def dogpile(server: Server) -> Peer:
    """dogpile.cache with its Redis backend and the lock between processes."""
    region = importlib.import_module("dogpile.cache").make_region(key_mangler=lambda key: f"dogpile:{key}")
    region.configure(
        "dogpile.cache.redis",
        expiration_time=TTL_S,
        arguments={
            "url": server.url,
            "redis_expiration_time": TTL_S * 2,
            "distributed_lock": True,
            "thread_local_lock": False,
        },
    )
    many, warm = dict.fromkeys(MANY, SMALL), dict.fromkeys(WARM, SMALL)

    @region.cache_on_arguments()  # type: ignore[untyped-decorator, unused-ignore]
    def function(number: int) -> Any:  # noqa: ARG001
        return SMALL

    def fill() -> None:
        region.set(KEY, SMALL)
        region.set("large", LARGE)
        region.set_multi(many)

    return Peer(
        "dogpile.cache",
        {
            Operation.GET: lambda: region.get(KEY),
            Operation.GET_OR_SET: lambda: region.get_or_create(KEY, dict),
            Operation.CACHED: lambda: function(7),
            Operation.GET_LARGE: lambda: region.get("large"),
            Operation.MISS: lambda: region.get("absent"),
            Operation.SET: lambda: region.set("set", SMALL),
            Operation.GET_MANY: lambda: region.get_multi(MANY),
            Operation.SET_MANY: lambda: region.set_multi(many),
            Operation.WARM: lambda: region.set_multi(warm),
        },
        fill,
        region.backend.writer_client.close,
    )


def django(server: Server) -> Peer:
    """Django's own Redis backend, without a project around it."""
    settings = importlib.import_module("django.conf").settings
    if not settings.configured:
        settings.configure()
    cache = importlib.import_module("django.core.cache.backends.redis").RedisCache(server.url, {"TIMEOUT": TTL_S})
    many, warm = dict.fromkeys(MANY, SMALL), dict.fromkeys(WARM, SMALL)

    def fill() -> None:
        cache.set(KEY, SMALL)
        cache.set("large", LARGE)
        cache.set_many(many)

    def close() -> None:
        for pool in cache._cache._pools.values():
            pool.disconnect()

    return Peer(
        "Django",
        {
            Operation.GET: lambda: cache.get(KEY),
            Operation.GET_OR_SET: lambda: cache.get_or_set(KEY, dict),
            Operation.GET_LARGE: lambda: cache.get("large"),
            Operation.MISS: lambda: cache.get("absent"),
            Operation.SET: lambda: cache.set("set", SMALL),
            Operation.GET_MANY: lambda: cache.get_many(MANY),
            Operation.SET_MANY: lambda: cache.set_many(many),
            Operation.WARM: lambda: cache.set_many(warm),
        },
        fill,
        close,
    )


def pallets_cachelib(server: Server) -> Peer:
    """cachelib, which Flask-Caching and Flask-Session stand on."""
    with _without_this_folder():
        pallets = importlib.import_module("cachelib")
    cache = pallets.RedisCache(server.host, server.port, default_timeout=TTL_S, key_prefix="pallets:")
    many, warm = dict.fromkeys(MANY, SMALL), dict.fromkeys(WARM, SMALL)

    def fill() -> None:
        cache.set(KEY, SMALL)
        cache.set("large", LARGE)
        cache.set_many(many)

    return Peer(
        "cachelib (Pallets)",
        {
            Operation.GET: lambda: cache.get(KEY),
            Operation.GET_LARGE: lambda: cache.get("large"),
            Operation.MISS: lambda: cache.get("absent"),
            Operation.SET: lambda: cache.set("set", SMALL),
            Operation.GET_MANY: lambda: cache.get_many(*MANY),
            Operation.SET_MANY: lambda: cache.set_many(many),
            Operation.WARM: lambda: cache.set_many(warm),
        },
        fill,
        cache._write_client.close,
    )


def cashews(server: Server, loop: asyncio.AbstractEventLoop) -> Peer:
    """cashews on Redis, with tags. asyncio."""
    cache = importlib.import_module("cashews").Cache()
    cache.setup(server.url, client_side=False)
    cache.register_tag("other", "tagged other")
    cache.register_tag("other", "set tagged")
    cache.register_tag(TAG, "tagged:{number}")
    many, warm = dict.fromkeys(MANY, SMALL), dict.fromkeys(WARM, SMALL)

    @cache(ttl=TTL_S, key="function:{number}")  # type: ignore[untyped-decorator, unused-ignore]
    async def function(number: int) -> Any:  # noqa: ARG001
        return SMALL

    async def fill() -> None:
        await cache.set(KEY, SMALL, expire=TTL_S)
        await cache.set("large", LARGE, expire=TTL_S)
        await cache.set("tagged other", SMALL, expire=TTL_S, tags=["other"])
        await cache.set_many(many, expire=TTL_S)

    async def tag_all() -> None:
        for key in TAGGED:
            await cache.set(key, SMALL, expire=TTL_S, tags=[TAG])

    return Peer(
        "cashews",
        {
            Operation.GET: lambda: cache.get(KEY),
            Operation.GET_OR_SET: lambda: cache.get_or_set(KEY, dict, expire=TTL_S),
            Operation.CACHED: lambda: function(7),
            Operation.GET_TAGGED: lambda: cache.get_or_set("tagged other", dict, expire=TTL_S),
            Operation.GET_LARGE: lambda: cache.get("large"),
            Operation.MISS: lambda: cache.get("absent"),
            Operation.SET: lambda: cache.set("set", SMALL, expire=TTL_S),
            Operation.SET_TAGGED: lambda: cache.set("set tagged", SMALL, expire=TTL_S, tags=["other"]),
            Operation.GET_MANY: lambda: cache.get_many(*MANY),
            Operation.SET_MANY: lambda: cache.set_many(many, expire=TTL_S),
            Operation.WARM: lambda: cache.set_many(warm, expire=TTL_S),
            Operation.INVALIDATE: lambda: cache.delete_tags(TAG),
        },
        fill,
        cache.close,
        loop,
        {Operation.INVALIDATE: tag_all},
    )


def cashews_near(server: Server, loop: asyncio.AbstractEventLoop) -> Peer:
    """cashews with its client-side cache: over RESP2, because over RESP3 it hears of no change."""
    cache = importlib.import_module("cashews").Cache()
    cache.setup(f"{server.url}?protocol=2", client_side=True, client_side_prefix="near:")

    async def fill() -> None:
        await cache.set(KEY, SMALL, expire=TTL_S)
        await cache.get(KEY)

    return Peer("cashews", {Operation.NEAR_SHARED: lambda: cache.get(KEY)}, fill, cache.close, loop)


def aiocache(server: Server, loop: asyncio.AbstractEventLoop) -> Peer:
    """aiocache on Redis, with its JSON serializer. asyncio."""
    module = importlib.import_module("aiocache")
    serializers = importlib.import_module("aiocache.serializers")
    place = {"endpoint": server.host, "port": server.port, "namespace": "aiocache"}
    cache = module.RedisCache(serializer=serializers.JsonSerializer(), **place)
    many, warm = [(key, SMALL) for key in MANY], [(key, SMALL) for key in WARM]

    @module.cached(  # type: ignore[untyped-decorator, unused-ignore]
        ttl=TTL_S, cache=module.RedisCache, serializer=serializers.JsonSerializer(), **place
    )
    async def function(number: int) -> Any:  # noqa: ARG001
        return SMALL

    async def fill() -> None:
        await cache.set(KEY, SMALL, ttl=TTL_S)
        await cache.set("large", LARGE, ttl=TTL_S)
        await cache.multi_set(many, ttl=TTL_S)

    async def close() -> None:
        await cache.close()
        await function.cache.close()

    return Peer(
        "aiocache",
        {
            Operation.GET: lambda: cache.get(KEY),
            Operation.CACHED: lambda: function(7),
            Operation.GET_LARGE: lambda: cache.get("large"),
            Operation.MISS: lambda: cache.get("absent"),
            Operation.SET: lambda: cache.set("set", SMALL, ttl=TTL_S),
            Operation.GET_MANY: lambda: cache.multi_get(MANY),
            Operation.SET_MANY: lambda: cache.multi_set(many, ttl=TTL_S),
            Operation.WARM: lambda: cache.multi_set(warm, ttl=TTL_S),
        },
        fill,
        close,
        loop,
    )


@contextmanager
def _without_this_folder() -> Iterator[None]:
    """Imports inside do not find this project's folders, one of which is named as a library is."""
    saved = sys.path[:]
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:] = [path for path in saved if os.path.abspath(path or ".") != here]
    try:
        yield
    finally:
        sys.path[:] = saved


PLAIN: tuple[Callable[[Server], Peer], ...] = (petiole, bare_redis_py, redis_py_json, pallets_cachelib, dogpile, django)
AWAITED: tuple[Callable[[Server, asyncio.AbstractEventLoop], Peer], ...] = (cashews, aiocache)
