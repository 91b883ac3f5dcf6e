"""Which calls can be made again elsewhere, from what a message or Redis holds of them. Pure."""

import math


def is_plain(value: object) -> bool:
    """Whether JSON gives back the very same argument: not for NaN, nor for subclasses such as enums."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is int:
        return -(2**63) <= value < 2**64
    return value is None or type(value) in (str, bool)
