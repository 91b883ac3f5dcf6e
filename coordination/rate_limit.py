"""What a rate limit is, and what an answer is. Pure.

The algorithm is GCRA, the generic cell rate algorithm of ATM (ITU-T I.371, as a virtual schedule): one number
per caller, the theoretical arrival time (TAT), says when everything admitted so far will be paid off at the
steady rate. A call may come while the TAT is not further ahead than the burst allows.
"""

import re
from dataclasses import dataclass

LONGEST_BURST_US = 4 * 10**15  # added to the time of day it stays below 2^53, where Lua still counts exactly

_UNIT_US = {"s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_RATE = re.compile(r"(\d+)/(\d*)(s|m|h|d)")


@dataclass(frozen=True, slots=True, init=False)
class RateLimit:
    """So many calls per time, with a burst.

    >>> RateLimit("100/m")
    >>> RateLimit("10/30s", burst=3)

    Worst case in any window of W seconds: ``burst + count * W / period`` calls, so up to twice ``count`` in
    one period when the burst is left at ``count``. The steady rate is rounded down to whole microseconds
    between calls. Memory: one key of about 100 bytes per caller.

    Arguments:
        rate: ``"count/period"``; the period is s, m, h or d, with a number before it if need be.
        burst: how many may come at once. Default: ``count``.

    Raises ``ValueError`` for a rate that cannot be read, is zero, or is above 10,000 a second, where whole
    microseconds would be off by more than a hundredth.
    """

    rate: str
    count: int
    period_us: int
    burst: int

    def __init__(self, rate: str, *, burst: int | None = None) -> None:
        match = _RATE.fullmatch(rate) if isinstance(rate, str) else None
        if not match:
            raise ValueError(f'rate {rate!r} cannot be read; write for example "100/m", "10/30s" or "5000/d"')
        count, period_us = int(match[1]), int(match[2] or 1) * _UNIT_US[match[3]]
        if count < 1 or period_us < 1:
            raise ValueError(f"rate {rate!r} would never admit a call")
        if count * 100 > period_us:
            raise ValueError(f"rate {rate!r} is above 10,000 calls a second, which whole microseconds cannot pace")
        if burst is not None and (not isinstance(burst, int) or isinstance(burst, bool) or burst < 1):
            raise ValueError(f"burst must be a whole number of at least 1, not {burst!r}")
        if (burst or count) * -(-period_us // count) > LONGEST_BURST_US:
            raise ValueError(f"a burst of {burst or count} at {rate!r} takes more than a century to pay off")
        for name, value in (
            ("rate", rate),
            ("count", count),
            ("period_us", period_us),
            ("burst", burst or count),
        ):
            object.__setattr__(self, name, value)

    @property
    def interval_us(self) -> int:
        """Time between two calls at the steady rate. Rounded up, so that the rate is never exceeded."""
        return -(-self.period_us // self.count)

    @property
    def key(self) -> str:
        """Tells the states of different limits apart: changing a limit starts a new state."""
        return f"{self.count}/{self.period_us}/{self.burst}"


@dataclass(frozen=True, slots=True)
class Allowed:
    """The call may go ahead; it has been charged."""

    remaining: int
    """How many more calls of cost 1 would be admitted at once."""
    reset_after: float
    """Seconds until everything is paid off and the whole burst is there again."""

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Limited:
    """The call may not go ahead; it has not been charged."""

    retry_after: float
    """Seconds until the same call would be admitted, if nobody else comes first."""
    by: RateLimit | None
    """The limit that refused; None when Redis did not answer and the limiter denies then."""

    def __bool__(self) -> bool:
        return False


Decision = Allowed | Limited


@dataclass(frozen=True, slots=True)
class Verdict:
    """One limit's answer, in microseconds."""

    tat_us: int
    """The TAT if the call is admitted."""
    wait_us: int
    """How long to wait before it can be; 0 when it can be now."""


def decide(tat_us: int | None, now_us: int, interval_us: int, burst: int, cost: int) -> Verdict:
    """GCRA. What ``lua/rate_hit.lua`` computes in Redis; kept here as the model that it is tested against.

    Arguments:
        tat_us: the stored TAT, None for a caller that was not seen lately.
        now_us: server time.
        interval_us, burst: of the limit.
        cost: how many calls this one counts for.
    """
    tat_us = now_us if tat_us is None else max(tat_us, now_us)
    new_us = tat_us + cost * interval_us
    return Verdict(new_us, max(0, new_us - now_us - burst * interval_us))
