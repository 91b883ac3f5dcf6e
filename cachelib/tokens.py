"""Tokens that no other process, and no later moment, will have again."""

import os
import secrets
from itertools import count


class Tokens:
    """A random start per process, then a number: as unique as 96 random bits, at a tenth of their price.

    They tell loads apart; they keep no secret.
    """

    def __init__(self) -> None:
        self._renew()

    def next(self) -> str:
        """Another one. Threads may ask at once; a forked child has a start of its own."""
        if self._process != os.getpid():
            self._renew()
        return f"{self._start}-{next(self._numbers):x}"

    def _renew(self) -> None:
        self._start, self._numbers, self._process = secrets.token_hex(12), count(1), os.getpid()
