"""Durations at the edge: seconds, ``timedelta`` or text such as ``"5m"``; milliseconds inside. Pure."""

import math
import re
from datetime import timedelta

Duration = float | str | timedelta
"""Seconds, a ``timedelta``, or text: ``"250ms"``, ``"90s"``, ``"5m"``, ``"2h30m"``, ``"1d"``."""

_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_WHOLE = re.compile(rf"(?:{_PART.pattern})+")

LONGEST_MS = 10 * 366 * 86_400_000  # ten years: beyond it a TTL is a mistake in the unit


def milliseconds(duration: Duration, name: str, *, zero_allowed: bool = False) -> int:
    """Turn a duration into whole milliseconds.

    >>> milliseconds("1m30s", "ttl")
    90000

    Arguments:
        duration: seconds, a ``timedelta``, or text with units.
        name: what the caller calls it, for the message.
        zero_allowed: whether nothing at all is a duration here.

    Raises ``TypeError`` for another type and ``ValueError`` for one that is negative, zero (unless
    allowed), not finite, unreadable or longer than ten years. What is shorter than a millisecond
    counts as one.
    """
    if type(duration) is int and (0 < duration or (zero_allowed and duration == 0)) and duration * 1_000 <= LONGEST_MS:
        return duration * 1_000  # what nearly every call gives, on paths where microseconds count
    if isinstance(duration, str):
        if not _WHOLE.fullmatch(duration):
            raise ValueError(f'{name}={duration!r} is not a duration; write for example "30s", "5m" or "2h30m"')
        exact = sum(float(number) * _UNIT_MS[unit] for number, unit in _PART.findall(duration))
    elif isinstance(duration, timedelta):
        exact = duration / timedelta(milliseconds=1)
    elif isinstance(duration, int | float) and not isinstance(duration, bool):
        try:
            exact = duration * 1_000.0
        except OverflowError:
            exact = math.inf
    else:
        raise TypeError(f"{name} must be seconds, a timedelta or text such as '5m', not {duration!r}")
    if not math.isfinite(exact) or exact < 0 or (exact == 0 and not zero_allowed):
        least = "zero or more" if zero_allowed else "more than zero"
        raise ValueError(f"{name}={duration!r} must be {least}")
    if exact > LONGEST_MS:
        raise ValueError(f"{name}={duration!r} is longer than ten years; are these milliseconds?")
    return max(1, math.ceil(round(exact, 6))) if exact else 0  # 16.257 s are 16,257 ms, whatever floats make of it
