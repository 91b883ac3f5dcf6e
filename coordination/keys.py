"""The only place in this package that spells the names of Redis keys. Pure. Form: see ``cachelib.keys``."""

from collections.abc import Sequence

from ..cachelib.keys import LAYOUT, escaped, escaped_name


def rate(limiter: str, key: str, limits: Sequence[str]) -> list[str]:
    """The states of one caller under several limits: when each will have been paid off, in microseconds."""
    name = f"{LAYOUT}:rate:{{{escaped_name(limiter, 'limiter')}:{escaped(key)}}}"
    return [f"{name}:{limit}" for limit in limits]
