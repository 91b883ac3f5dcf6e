"""Tokens that this process has been charged for and hands out itself, and refusals that it need not ask for again.

Invariant: a token is handed out at most ``lease_us`` after it was charged. It is charged after the moment that the
caller names when it puts it here, so that moment counts. Together with a burst that is smaller by what the steady rate
makes of ``lease_us``, no window of time sees more than the limit's bound: what is used in a window was charged in one
that begins earlier by ``lease_us``.

Knows no Redis and no clock: all moments are given, in microseconds of a clock that never goes back.
"""

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

from ..cachelib.forks import renew_after_fork
from .rate_limit import Allowed, Limited, RateLimit

LONGEST_US = 1_000_000
_SHORTEST_US = 1_000  # a lease that is shorter is over before it is used
_MOST_KEYS = 10_000


def lease_us(limits: tuple[RateLimit, ...], tokens: int) -> int:
    """How long a lease may last: a second, or what a quarter of the smallest burst takes at the steady rate.

    Raises ``ValueError`` where a lease of so many tokens could exceed a bound.
    """
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"lease_tokens={tokens!r} must be a whole number, 0 for none")
    shortest_us = LONGEST_US
    for limit in limits:
        if limit.kind != "g" or limit.by_call:
            raise ValueError(
                f"tokens of {limit!r} cannot be handed out later than they are charged; "
                "with lease_tokens write RateLimit(rate) or RateLimit.at_most(rate)"
            )
        count, period_us = limit.pace
        shortest_us = min(shortest_us, limit.burst * period_us // (4 * count))
    for limit in limits:
        left = burst_besides(limit, shortest_us)
        if shortest_us < _SHORTEST_US or left < tokens:
            count, period_us = limit.pace
            enough = max(-(-4 * _SHORTEST_US * count // period_us), (4 * tokens + 7) // 3 + 1)
            raise ValueError(
                f"lease_tokens={tokens} does not fit {limit!r}: beside what may be used late its burst leaves {left}; "
                f"write for example burst={enough}, or a smaller lease_tokens"
            )
    return shortest_us


def burst_besides(limit: RateLimit, late_us: int) -> int:
    """The burst that may be charged where tokens are used up to so much later."""
    count, period_us = limit.pace
    return limit.burst - -(-late_us * count // period_us)


@dataclass(slots=True)
class _Lease:
    tokens: int
    until_us: int
    answer: Allowed
    """What was said when it was charged; of this key and limiter."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    cost: int
    from_us: int
    until_us: int
    answer: Limited


class TokenLeases:
    """The leases and refusals of many callers: the least recently used are forgotten when they are too many."""

    def __init__(self, lasting_us: int, most_keys: int = _MOST_KEYS) -> None:
        self.lasting_us = lasting_us
        self._most_keys = most_keys
        self._known: OrderedDict[str, _Lease | _Refusal] = OrderedDict()
        self._lock = Lock()
        renew_after_fork(self)

    def __len__(self) -> int:
        return len(self._known)

    def renew_after_fork(self) -> None:
        """What the parent was charged for is the parent's."""
        self._known, self._lock = OrderedDict(), Lock()

    def take(self, key: str, cost: int, now_us: int) -> tuple[Allowed, int, int] | Limited | None:
        """The answer for a caller, with what is left of the lease and until when it lasts; None if it must be asked."""
        with self._lock:
            known = self._known.get(key)
            if known is None:
                return None
            if now_us >= known.until_us:
                del self._known[key]
                return None
            if isinstance(known, _Lease):
                if known.tokens < cost:
                    return None
                known.tokens -= cost
                return known.answer, known.tokens, known.until_us
            return _later(known, now_us) if cost >= known.cost else None

    def put(self, key: str, tokens: int, asked_us: int, answer: Allowed) -> int:
        """Keep what was charged, by a call that began at ``asked_us``. Returns until when it lasts."""
        until_us = asked_us + self.lasting_us
        with self._lock:
            known = self._known.get(key)
            if isinstance(known, _Lease) and known.until_us > asked_us:  # another thread has asked too
                known.tokens += tokens
                known.until_us = min(known.until_us, until_us)
                return known.until_us
            self._keep(key, _Lease(tokens, until_us, answer))
        return until_us

    def refuse(self, key: str, cost: int, asked_us: int, answer: Limited) -> None:
        """Remember a refusal, until it is over or for a second."""
        until_us = asked_us + min(LONGEST_US, int(answer.retry_after * 1e6))
        with self._lock:
            known = self._known.get(key)
            if not isinstance(known, _Lease) or not known.tokens:
                self._keep(key, _Refusal(cost, asked_us, until_us, answer))

    def give_back(self, key: str, cost: int, until_us: int) -> None:
        """Tokens that were not needed, if the lease that they came from is still here."""
        with self._lock:
            known = self._known.get(key)
            if isinstance(known, _Lease) and known.until_us == until_us:
                known.tokens += cost

    def forget(self, key: str) -> None:
        """Ask Redis the next time."""
        with self._lock:
            self._known.pop(key, None)

    def _keep(self, key: str, known: _Lease | _Refusal) -> None:
        self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > self._most_keys:
            self._known.popitem(last=False)


def _later(refusal: _Refusal, now_us: int) -> Limited:
    """A refusal as it reads some time after it was given."""
    gone, answer = (now_us - refusal.from_us) / 1e6, refusal.answer
    return Limited(
        max(0.0, answer.retry_after - gone),
        answer.by,
        answer.reason,
        answer.remaining,
        max(0.0, answer.reset_after - gone),
        answer.limits,
    )
