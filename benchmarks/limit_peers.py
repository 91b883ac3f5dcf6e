"""Who is measured limiting rates: each library as its own documentation sets it up, behind "may this caller call?".

A maker opens a client for the process, and gives what answers for a caller. The names of the rows say the algorithm.
"""

import importlib
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

from petiole import RateLimit, RateLimiter, connect
from petiole.cachelib import Settings

from .peers import PETIOLE, Server


class Quota(NamedTuple):
    """So many calls in so many seconds."""

    calls: int
    seconds: int

    @property
    def interval_us(self) -> int:
        """Between two calls at the steady rate."""
        return self.seconds * 1_000_000 // self.calls


Hit = Callable[[str], bool]
"""Whether this caller may."""
LimitPeer = Callable[[ExitStack, Server, Quota], Hit]

GCRA = """
local time = redis.call("TIME")
local now = time[1] * 1000000 + time[2]
local interval = tonumber(ARGV[1])
local paid_off = math.max(tonumber(redis.call("GET", KEYS[1]) or now), now) + interval
local wait = paid_off - now - ARGV[2] * interval
if wait > 0 then return {0, wait} end
redis.call("SET", KEYS[1], string.format("%.0f", paid_off), "PX", math.ceil((paid_off - now) / 1000))
return {1, 0}
"""
"""The shortest script that decides: no checks, one limit. What the floor runs, and redis-py as a mark."""


def _petiole(
    stack: ExitStack, server: Server, quota: Quota, *, algorithm: str | None = None, lease_tokens: int | None = None
) -> Hit:
    make: Any = getattr(RateLimit, algorithm) if algorithm else RateLimit
    redis = stack.enter_context(connect(settings=Settings(url=server.url)))
    options: dict[str, Any] = {"lease_tokens": lease_tokens} if lease_tokens else {}
    name = f"bench {algorithm} {lease_tokens} {quota}"
    limiter = RateLimiter(redis, name, [make(f"{quota.calls}/{quota.seconds}s")], **options)
    return lambda key: bool(limiter.hit(key))


def _redis_py(stack: ExitStack, server: Server, quota: Quota) -> Hit:
    client = _client(stack, server)
    script = client.script_load(GCRA)
    return lambda key: client.evalsha(script, 1, f"mark:{quota}:{key}", quota.interval_us, quota.calls)[0] == 1


def _limits(stack: ExitStack, server: Server, quota: Quota, *, strategy: str) -> Hit:
    limits = importlib.import_module("limits")
    storage = importlib.import_module("limits.storage").RedisStorage(server.url)
    stack.callback(storage.storage.close)
    item = limits.parse(f"{quota.calls} per {quota.seconds} seconds")
    hit = getattr(importlib.import_module("limits.strategies"), strategy)(storage).hit
    return lambda key: bool(hit(item, strategy, key))


def _pyrate_limiter(stack: ExitStack, server: Server, quota: Quota) -> Hit:
    module, client = importlib.import_module("pyrate_limiter"), _client(stack, server)
    rates = [module.Rate(quota.calls, quota.seconds * module.Duration.SECOND)]
    limiters: dict[str, Any] = {}

    def hit(key: str) -> bool:
        limiter = limiters.get(key)
        if limiter is None:  # a bucket is one caller's
            bucket = module.RedisBucket.init(rates, client, f"pyrate:{quota}:{key}")
            limiter = limiters[key] = stack.enter_context(closing(module.Limiter(bucket)))
        return bool(limiter.try_acquire(key, blocking=False))

    return hit


def _throttled(stack: ExitStack, server: Server, quota: Quota, *, algorithm: str) -> Hit:
    module = importlib.import_module("throttled")
    store = module.RedisStore(server=server.url)
    stack.callback(store._backend.get_client().close)
    throttle = module.Throttled(
        using=algorithm, quota=module.per_duration(timedelta(seconds=quota.seconds), quota.calls), store=store
    )
    return lambda key: not throttle.limit(f"{quota}:{key}").limited


def _client(stack: ExitStack, server: Server) -> Any:
    redis = importlib.import_module("redis")
    return stack.enter_context(closing(redis.Redis(server.host, server.port)))


LIMITERS: dict[str, LimitPeer] = {
    PETIOLE: _petiole,
    f"{PETIOLE}, 16 leased": partial(_petiole, lease_tokens=16),
    f"{PETIOLE}, at_most": partial(_petiole, algorithm="at_most"),
    f"{PETIOLE}, exact": partial(_petiole, algorithm="exact"),
    f"{PETIOLE}, bucketed": partial(_petiole, algorithm="bucketed"),
    f"{PETIOLE}, fixed": partial(_petiole, algorithm="fixed"),
    "redis-py, evalsha by hand": _redis_py,
    "limits, fixed": partial(_limits, strategy="FixedWindowRateLimiter"),
    "limits, moving": partial(_limits, strategy="MovingWindowRateLimiter"),
    "limits, sliding": partial(_limits, strategy="SlidingWindowCounterRateLimiter"),
    "pyrate-limiter, RedisBucket": _pyrate_limiter,
    "throttled-py, gcra": partial(_throttled, algorithm="gcra"),
    "throttled-py, token bucket": partial(_throttled, algorithm="token_bucket"),
    "throttled-py, sliding": partial(_throttled, algorithm="sliding_window"),
}
