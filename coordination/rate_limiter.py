"""Rate limits that hold for all processes together: one script call per decision, on the server's clock."""

import logging
from collections.abc import Sequence
from typing import Any, Literal, get_args

from ..cachelib.connections import UNAVAILABLE, Connections
from ..cachelib.scripts import load
from . import keys
from .errors import LimiterUnavailable
from .rate_limit import Allowed, Decision, Limited, RateLimit

logger = logging.getLogger(__name__)

OnError = Literal["raise", "allow", "deny"]

_RETRY_WITHOUT_REDIS_S = 1.0


def _reply(reply: list[Any]) -> tuple[int, int, int, int]:
    refusing, wait_us, remaining, reset_us = (int(text) for text in reply)
    return refusing, wait_us, remaining, reset_us


_HIT = load(__package__, "rate_hit", _reply)


class RateLimiter:
    """Admits calls, per caller, while every one of its limits allows them.

    >>> limiter = RateLimiter(redis, "api", [RateLimit("100/m"), RateLimit("5000/d")])
    >>> match limiter.hit("user:7"):
    ...     case Allowed(remaining): ...
    ...     case Limited(retry_after): ...

    Promises: no limit's worst case (see ``RateLimit``) is exceeded, by any number of processes, whatever their
    clocks say. A refused call is charged to no limit. The answer names the limit that refused: of several,
    the one that asks for the longest wait.

    Non-promises: what Redis forgets (a restart without persistence, an eviction) is admitted again.

    Not yet: other algorithms than GCRA, ``peek``, ``reserve``, ``refund``; changing a limit starts a new state.

    Arguments:
        redis: from ``connect``.
        name: keeps the callers of several limiters apart.
        limits: all must agree.
        on_error: when Redis does not answer: ``raise`` (``LimiterUnavailable``), ``allow`` or ``deny``.
    """

    def __init__(
        self, redis: Connections, name: str, limits: Sequence[RateLimit], *, on_error: OnError = "raise"
    ) -> None:
        if not limits:
            raise ValueError("a limiter needs at least one RateLimit")
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error={on_error!r} is unknown; there are {', '.join(get_args(OnError))}")
        self._redis = redis
        self.name = name
        self.limits = tuple(limits)
        self._on_error = on_error
        self._parts = [limit.key for limit in limits]
        self._intervals_us = [limit.interval_us for limit in limits]
        self._bursts = [limit.burst for limit in limits]
        self._highest_cost = min(self._bursts)

    def __repr__(self) -> str:
        return f"<RateLimiter {self.name!r} [{', '.join(limit.rate for limit in self.limits)}]>"

    def hit(self, key: str, cost: int = 1) -> Decision:
        """Ask for one call, in one round trip.

        Arguments:
            key: who calls.
            cost: how many calls this one counts for.

        Raises ``ValueError`` for a cost above the smallest burst, which could never pass, and
        ``LimiterUnavailable`` as ``on_error`` says.
        """
        if not isinstance(cost, int) or isinstance(cost, bool) or not 1 <= cost <= self._highest_cost:
            raise ValueError(
                f"cost {cost!r} can never pass {self!r}: it must be a whole number from 1 to {self._highest_cost}"
            )
        try:
            refusing, wait_us, remaining, reset_us = _HIT(
                self._redis.coordination,
                states=keys.rate(self.name, key, self._parts),
                cost=cost,
                intervals_us=self._intervals_us,
                bursts=self._bursts,
            )
        except UNAVAILABLE as error:
            return self._without_redis(error)
        if refusing:
            return Limited(wait_us / 1e6, self.limits[refusing - 1])
        return Allowed(remaining, reset_us / 1e6)

    def _without_redis(self, error: BaseException) -> Decision:
        if self._on_error == "raise":
            raise LimiterUnavailable(self.name, self._redis.address, error) from error
        logger.warning("limiter %r: Redis did not answer (%s); on_error=%s", self.name, error, self._on_error)
        return Allowed(0, 0.0) if self._on_error == "allow" else Limited(_RETRY_WITHOUT_REDIS_S, None)
