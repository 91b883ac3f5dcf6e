"""What a rate limit is, and what an answer is. Pure.

A limit is a value: what may be admitted, and by which algorithm it is counted (``rate_algorithms`` has each as a
model). An answer is a value too; what it needs to be taken back is a receipt that it carries along unseen.

The invariant that all algorithms keep: whatever comes when, no window of time sees more than ``RateLimit.bound`` of it.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, NoReturn, Self

from ..cachelib.durations import Duration, milliseconds
from . import keys
from .errors import LimitExceeded

LONGEST_BURST_US = 4 * 10**15  # added to the time of day it stays below 2^53, where Lua still counts exactly
FARTHEST_US = 3 * 10**14  # nine years: nobody reserves, or owes, further ahead than this
MOST_LOGGED = 10_000
MOST_BUCKETS = 100
LARGEST_PRODUCT = 2**52  # of integers in a script; what is divided there stays below, so that the remainder is exact

Kind = Literal["g", "l", "b", "f", "w", "c"]
"""Smooth (GCRA), log, buckets, fixed window aligned to the clock, window from the first call, at once (concurrent)."""

_UNIT_US = {"s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_RATE = re.compile(r"([0-9]{1,16})/([0-9]{0,16})(s|m|h|d)")


@dataclass(frozen=True, slots=True, init=False)
class RateLimit:
    """So many calls per time, with a burst.

    >>> RateLimit("100/m")
    >>> RateLimit("10/30s", burst=3)
    >>> RateLimit.at_most("100/m")
    >>> RateLimit.concurrent(5, lease="60s")

    This constructor makes a smooth limit (GCRA, the generic cell rate algorithm of ITU-T I.371): one number per
    caller says when everything admitted so far will be paid off at the steady rate; a call may come while that is not
    further ahead than the burst allows. The others are ``at_most``, ``exact``, ``bucketed``, ``fixed`` and
    ``concurrent``.

    Worst case in any window of W: ``burst`` and what the steady rate makes of W; so up to ``2 * count - 1`` in one
    period when the burst is left at ``count``. Memory: one key per caller, 70 to 110 bytes. Cost: a GET, a SET.

    Arguments:
        rate: ``"count/period"``; the period is s, m, h or d, with a number before it if need be.
        burst: how many may come at once. Default: ``count``.
        name: tells the limit's state apart, where two limits of a limiter have the same kind and period.

    A limit may be changed while it is in use: its state is found by its name, or by kind and period, and never by
    count or burst. A smooth limit then keeps how long it takes until all is paid off (so who has used half of a burst
    has half of the new one left), a log and buckets keep the calls, a fixed window what was used in it. In the moment
    of a change a window of time may see what both limits together admit.

    Raises ``ValueError`` for a rate that cannot be read, is zero, or is above one call a microsecond.
    """

    rate: str
    count: int
    period_us: int
    """Of a concurrent limit: the lease."""
    burst: int
    """The most that one call may cost."""
    name: str | None
    kind: Kind
    pace: tuple[int, int]
    """The steady rate: calls, and microseconds for them, in lowest terms. Of a smooth limit."""
    buckets: int
    offset_us: int
    by_call: bool
    """Whether a call counts as one, whatever it costs."""
    part: str
    """What the names of its keys end in."""

    def __init__(self, rate: str, *, burst: int | None = None, name: str | None = None) -> None:
        count, period_us = _read(rate)
        _check_burst(burst)
        self._fill("g", rate, count, period_us, burst or count, name, (count, period_us))

    @classmethod
    def at_most(cls, rate: str, *, burst: int | None = None, name: str | None = None) -> Self:
        """Never more than so many in any window of one period, both of its ends included.

        >>> RateLimit.at_most("100/m")

        Smooth, with a burst b and a steady rate of N - b + 1 in a period and a microsecond: what comes at once and
        what comes after it together are never more than N. Worst case in any window of W = the period: N. After a
        pause b come at once; a caller who never pauses gets N - b + 1 per period. Memory and cost as ``RateLimit``.

        Arguments:
            burst: 1 to N. Default: a tenth of N, at least 1.
        """
        count, period_us = _read(rate)
        _check_burst(burst)
        burst = max(1, count // 10) if burst is None else burst
        if burst > count:
            raise ValueError(
                f"burst={burst} at once is more than the {count} that {rate!r} admits; write at most {count}"
            )
        limit = object.__new__(cls)
        limit._fill("g", rate, count, period_us, burst, name, (count - burst + 1, period_us + 1))
        return limit

    @classmethod
    def exact(cls, rate: str, *, name: str | None = None) -> Self:
        """Exactly so many in any window of one period: the last N calls are remembered, to the microsecond.

        Worst case in any window of one period: N, and all of them may come at once. Memory: one key per caller, 80
        bytes and 8 to 16 for each of the N calls. Cost: a handful of reads of 8 bytes, their number growing as log N,
        and two writes. N is at most 10,000.
        """
        count, period_us = _read(rate)
        if count > MOST_LOGGED:
            raise ValueError(
                f"rate {rate!r} would remember {count} calls of every caller, more than {MOST_LOGGED}; "
                f"write RateLimit.bucketed({rate!r}) or RateLimit.at_most({rate!r})"
            )
        limit = object.__new__(cls)
        limit._fill("l", rate, count, period_us, count, name)
        return limit

    @classmethod
    def bucketed(cls, rate: str, *, buckets: int = 10, name: str | None = None) -> Self:
        """So many in any window of one period, counted in buckets; the one that is partly over counts in full.

        Worst case in any window of one period: N. A caller who never pauses gets N in a period and a bucket, so at
        least ``k / (k + 1)`` of N per period with k buckets. Memory: one key per caller, about 100 bytes. Cost:
        one GET, one SET.

        Arguments:
            buckets: 2 to 100.
        """
        count, period_us = _read(rate)
        if type(buckets) is not int or not 2 <= buckets <= MOST_BUCKETS:
            raise ValueError(f"buckets must be a whole number from 2 to {MOST_BUCKETS}, not {buckets!r}")
        limit = object.__new__(cls)
        limit._fill("b", rate, count, period_us, count, name, buckets=buckets)
        return limit

    @classmethod
    def fixed(cls, rate: str, *, aligned: bool = True, offset: Duration = 0, name: str | None = None) -> Self:
        """So many from one stroke of the clock to the next; or, not aligned, within a period from the first call.

        >>> RateLimit.fixed("5000/d", offset="2h")   # a provider whose days begin at two o'clock UTC

        Worst case in any window of one period: 2 N, at the seam of two windows. It is exact only as the mirror of
        somebody who counts so too. Memory: one key per caller, about 100 bytes. Cost: one GET, one SET.

        Arguments:
            aligned: whether windows begin at multiples of the period since 1970 (UTC, the server's clock).
            offset: by how much later they begin; less than the period.
        """
        count, period_us = _read(rate)
        if not isinstance(aligned, bool):
            raise ValueError(f"aligned must be True or False, not {aligned!r}")
        offset_us = milliseconds(offset, "offset", zero_allowed=True) * 1_000
        if offset_us and not aligned:
            raise ValueError(
                f"offset={offset!r} means nothing for a window that begins at the first call; leave it out"
            )
        if offset_us >= period_us:
            raise ValueError(f"offset={offset!r} is not shorter than the period of {rate!r}")
        limit = object.__new__(cls)
        limit._fill("f" if aligned else "w", rate, count, period_us, count, name, offset_us=offset_us)
        return limit

    @classmethod
    def concurrent(cls, count: int, *, lease: Duration = 60, name: str | None = None) -> Self:
        """At most so many at once. Each call has a permit until ``decision.release()``, or until its lease has run out.

        Whatever its cost, a call takes one permit. Worst case: ``count`` permits at any moment; a holder that goes on
        beyond its lease is not counted any more. Memory: one key per caller, 80 bytes and 28 for each
        permit; about 95 for each where there are more than 128. Cost: one count of a sorted set, two writes.

        Arguments:
            lease: longer than any call takes.
        """
        if type(count) is not int or not 1 <= count <= 1_000_000:
            raise ValueError(f"concurrent takes a whole number from 1 to 1000000, not {count!r}")
        limit = object.__new__(cls)
        limit._fill("c", f"{count} at once", count, milliseconds(lease, "lease") * 1_000, count, name)
        return limit

    def of_calls(self) -> Self:
        """The same limit, which counts every call as one, whatever it costs.

        >>> provider = RateLimiter(redis, "provider", [RateLimit("60/m").of_calls(), RateLimit("90000/m")])
        >>> provider.hit("key", cost=1_500)  # one request, of so many tokens

        ``settle`` leaves it alone. Its state is another than that of the limit that counts costs.
        """
        limit = copy(self)
        object.__setattr__(limit, "by_call", self.kind != "c")
        object.__setattr__(limit, "part", keys.rate_part(limit.code, self.period_us, self.name))
        return limit

    @property
    def code(self) -> str:
        """The kind, as the scripts are told it: in capitals where calls are counted."""
        return self.kind.upper() if self.by_call else self.kind

    def __str__(self) -> str:
        return self.rate

    def __repr__(self) -> str:
        how = {
            "g": f"{self.rate!r}, burst={self.burst}",
            "l": f"exact {self.rate!r}",
            "b": f"bucketed {self.rate!r}, buckets={self.buckets}",
            "f": f"fixed {self.rate!r}, offset={self.offset_us / 1e6:g}s",
            "w": f"fixed {self.rate!r} from the first call",
            "c": f"concurrent {self.count}, lease={self.period_us / 1e6:g}s",
        }[self.kind]
        if self.kind == "g" and self.pace != _lowest(self.count, self.period_us):
            how = f"at most {how}"
        calls = " of calls" if self.by_call else ""
        return f"<RateLimit {how}{calls}{f', name={self.name!r}' if self.name else ''}>"

    def bound(self, window: Duration) -> int:
        """The most that can be admitted in any window of that length, of which one end is included.

        Raises ``ValueError`` for a concurrent limit: it bounds how many there are at once, not how many per time.
        """
        if isinstance(window, timedelta):
            window_us = window // timedelta(microseconds=1)
        else:
            window_us = milliseconds(window, "window") * 1_000
        return self.bound_us(window_us)

    def bound_us(self, window_us: int) -> int:
        """As ``bound``, of whole microseconds."""
        if window_us < 1:
            raise ValueError(f"a window of {window_us} microseconds is none")
        match self.kind:
            case "c":
                raise ValueError(f"{self!r} has no bound per time: those {self.count} may be done at once")
            case "g":
                count, period_us = self.pace
                return self.burst + (window_us - 1) * count // period_us
            case "l" | "b":
                return self.count * -(-window_us // self.period_us)
            case _:
                return self.count * (-(-(window_us - 1) // self.period_us) + 1)

    @property
    def interval_us(self) -> tuple[int, int, int]:
        """Time between two calls at the steady rate: whole microseconds, and how many of how many parts of one."""
        count, period_us = self.pace
        return period_us // count, period_us % count, count

    @property
    def policy(self) -> str:
        """As in the header RateLimit-Policy: count and seconds. Empty for a concurrent limit, which has no period."""
        return "" if self.kind == "c" else f"{self.count};w={_whole_seconds(self.period_us / 1e6)}"

    def arguments(self) -> tuple[str, int, int, int, int]:
        """What the scripts are told: kind, count, span in microseconds, rest, parts."""
        match self.kind:
            case "g":
                whole, rest, parts = self.interval_us
                return self.code, self.burst, whole, rest, parts
            case "b":
                return self.code, self.count, -(-self.period_us // self.buckets), 0, self.buckets
            case _:
                return self.code, self.count, self.period_us, self.offset_us, 1

    def _fill(
        self,
        kind: Kind,
        rate: str,
        count: int,
        period_us: int,
        burst: int,
        name: str | None,
        pace: tuple[int, int] = (1, 1),
        *,
        buckets: int = 0,
        offset_us: int = 0,
    ) -> None:
        if name is not None and (not isinstance(name, str) or not 0 < len(name) <= 64):
            raise ValueError(f"the name of a limit is text of 1 to 64 characters, not {name!r}")
        pace = _lowest(*pace)
        if burst * pace[1] > LONGEST_BURST_US * pace[0] or period_us > LONGEST_BURST_US:
            raise ValueError(
                f"a burst of {burst} at {rate!r} takes more than a century to pay off; write a smaller one"
            )
        if burst * pace[0] >= LARGEST_PRODUCT or burst > LARGEST_PRODUCT:
            raise ValueError(f"a burst of {burst} at {rate!r} is beyond exact arithmetic; write a smaller burst")
        for field_name, value in (
            ("rate", rate),
            ("count", count),
            ("period_us", period_us),
            ("burst", burst),
            ("name", name),
            ("kind", kind),
            ("pace", pace),
            ("buckets", buckets),
            ("offset_us", offset_us),
            ("by_call", False),
            ("part", keys.rate_part(kind, period_us, name)),
        ):
            object.__setattr__(self, field_name, value)


class Receipt:
    """What a charge can be taken back by. Private to the limiter."""

    __slots__ = ("cost", "key", "leased_until_us", "limiter", "limits", "marks", "permit", "release", "unused")

    def __init__(
        self,
        limiter: str,
        key: str,
        cost: int,
        limits: tuple[RateLimit, ...],
        marks: list[int],
        permit: str,
        release: Callable[[str, str], None] | None,
        leased_until_us: int = 0,
    ) -> None:
        self.limiter = limiter
        self.key = key
        self.cost = cost
        self.limits = limits
        self.marks = marks
        """Two for each limit; see ``lua/_rate.lua``."""
        self.permit = permit
        self.release = release
        """Gives the permit back. None where there is none."""
        self.leased_until_us = leased_until_us
        """Until when the lease lasts that it is from, on the process's clock; 0 where it was charged by itself."""
        self.unused = [True]
        """Emptied by the first who takes the charge back: of several threads, one can."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """The call may go ahead; it has been charged."""

    remaining: int
    """How many more calls of cost 1 would be admitted at once."""
    reset_after: float
    """Seconds until all that was charged to ``limit`` is paid off."""
    limit: RateLimit | None = None
    """The limit that leaves the least; None when Redis did not answer and the limiter allows then."""
    limits: tuple[RateLimit, ...] = field(default=(), repr=False)
    receipt: Receipt | None = field(default=None, repr=False, compare=False)

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give back the permit of a concurrent limit, once; without one, nothing happens."""
        receipt = self.receipt
        if receipt is not None and receipt.release is not None:
            give_back, receipt.release = receipt.release, None
            give_back(receipt.key, receipt.permit)

    def headers(self) -> list[tuple[str, str]]:
        """What an HTTP response says of it."""
        return _headers(self.limit, self.limits, self.remaining, self.reset_after)


Reason = Literal["limit", "blocked", "unavailable", "stopped"]


@dataclass(frozen=True, slots=True)
class Limited:
    """The call may not go ahead; it has not been charged."""

    retry_after: float
    """Seconds until the same call would be admitted, if nobody else comes first."""
    by: RateLimit | None
    """The limit that refused: of several, the one that asks for the longest wait. None if it was none of them."""
    reason: Reason = "limit"
    remaining: int = 0
    """How many calls of cost 1 the limit would admit at once: not 0 when a larger cost was refused."""
    reset_after: float = 0.0
    """Seconds until all that was charged to the limit is paid off."""
    limits: tuple[RateLimit, ...] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> NoReturn:
        """Raise ``LimitExceeded``: what is inside ``with limiter.hit(key):`` is for calls that were allowed."""
        raise LimitExceeded(self.retry_after, repr(self.by) if self.by else self.reason)

    def __exit__(self, *_: object) -> None:
        """Never reached."""

    def headers(self) -> list[tuple[str, str]]:
        """What an HTTP response (429) says of it."""
        found = _headers(self.by, self.limits, self.remaining, self.reset_after)
        return [*found, ("Retry-After", str(max(1, _whole_seconds(self.retry_after))))]


@dataclass(frozen=True, slots=True)
class Reserved:
    """The call may go ahead, but not before ``start_after`` seconds from now; it has been charged."""

    start_after: float
    remaining: int = 0
    reset_after: float = 0.0
    limit: RateLimit | None = None
    """The limit that leaves the least; None when Redis did not answer and the limiter allows then."""
    limits: tuple[RateLimit, ...] = field(default=(), repr=False)
    receipt: Receipt | None = field(default=None, repr=False, compare=False)

    def __bool__(self) -> bool:
        return True


Decision = Allowed | Limited


@dataclass(frozen=True, slots=True)
class LimitState:
    """What one limit would say to a caller now."""

    limit: RateLimit
    remaining: int
    reset_after: float


@dataclass(frozen=True, slots=True)
class CallerState:
    """All that is known of a caller, for people."""

    blocked_for: float
    """Seconds; 0 for a caller who is not blocked."""
    limits: tuple[LimitState, ...]


def limits_of(given: Sequence[RateLimit]) -> tuple[RateLimit, ...]:
    """What a limiter was given. Raises ``ValueError`` unless there are limits, each with a state of its own."""
    if isinstance(given, str | RateLimit) or not isinstance(given, Iterable):
        instead = f"RateLimit({given!r})" if isinstance(given, str) else 'RateLimit("100/m")'
        raise ValueError(f"limits={given!r} is no list; write [{instead}], with as many as there are")
    limits = tuple(given)
    if not limits:
        raise ValueError("a limiter needs at least one RateLimit")
    seen: dict[str, RateLimit] = {}
    for limit in limits:
        if not isinstance(limit, RateLimit):
            raise ValueError(f"a limit is a RateLimit, not {limit!r}; write RateLimit({limit!r})")
        if limit.part in seen:
            raise ValueError(
                f"{seen[limit.part]!r} and {limit!r} would share one state; give one of them a name of its own: "
                f"RateLimit({limit.rate!r}, name=...)"
            )
        seen[limit.part] = limit
    return limits


def highest_cost(limits: tuple[RateLimit, ...]) -> int:
    """The most that one call may cost under all of them. A permit is one, whatever a call costs."""
    return min((limit.burst for limit in limits if limit.kind != "c" and not limit.by_call), default=LARGEST_PRODUCT)


def check_cost(cost: int, highest: int, who: object) -> None:
    """Raise ``ValueError`` for a cost that is none, or could never pass."""
    if type(cost) is not int or not 1 <= cost <= highest:
        raise ValueError(f"cost {cost!r} can never pass {who!r}: it must be a whole number from 1 to {highest}")


def _headers(
    limit: RateLimit | None, limits: tuple[RateLimit, ...], remaining: int, reset_after: float
) -> list[tuple[str, str]]:
    found = []
    if limit is not None:
        found = [
            ("RateLimit-Limit", str(limit.count)),
            ("RateLimit-Remaining", str(remaining)),
            ("RateLimit-Reset", str(_whole_seconds(reset_after))),
        ]
    policies = ", ".join(filter(None, (one.policy for one in limits)))
    return [*found, ("RateLimit-Policy", policies)] if policies else found


def _whole_seconds(seconds: float) -> int:
    return math.ceil(round(seconds, 6))


def _read(rate: str) -> tuple[int, int]:
    match = _RATE.fullmatch(rate) if isinstance(rate, str) else None
    if not match:
        raise ValueError(f'rate {rate!r} cannot be read; write for example "100/m", "10/30s" or "5000/d"')
    count, period_us = int(match[1]), int(match[2] or 1) * _UNIT_US[match[3]]
    if count < 1 or period_us < 1:
        raise ValueError(f'rate {rate!r} would never admit a call; write for example "1/d"')
    if count > period_us:
        raise ValueError(f"rate {rate!r} is above 1,000,000 calls a second, which microseconds cannot pace")
    return count, period_us


def _check_burst(burst: int | None) -> None:
    if burst is not None and (type(burst) is not int or burst < 1):
        raise ValueError(f"burst must be a whole number of at least 1, not {burst!r}")


def _lowest(count: int, period_us: int) -> tuple[int, int]:
    divisor = math.gcd(count, period_us)
    return count // divisor, period_us // divisor
