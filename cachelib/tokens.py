"""Tokens that no other process, and no later moment, will have again. They tell loads apart; they keep no secret."""

import os
import secrets
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

_COUNTED = 16**6


class _Series(NamedTuple):
    start: str
    numbers: Iterator[int]
    process: int


class Tokens:
    """16 characters: ten of chance per process, then a number. As good as chance, at a tenth of its price."""

    def __init__(self) -> None:
        self._series = _new_series()

    def next(self) -> str:
        """Another one. Threads may ask at once; a forked child has a start of its own."""
        series = self._series  # replaced as a whole, so that no start ever meets the numbers of another
        number = next(series.numbers)
        if number >= _COUNTED or series.process != os.getpid():
            series = self._series = _new_series()
            number = next(series.numbers)
        return f"{series.start}{number:06x}"


def _new_series() -> _Series:
    return _Series(secrets.token_urlsafe(8)[:10], count(0), os.getpid())
