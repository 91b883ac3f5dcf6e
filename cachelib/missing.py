"""``MISS``: the one value that is never cached, so that ``None`` can be."""

from enum import Enum
from typing import Final


class Miss(Enum):
    """The type of ``MISS``."""

    MISS = "MISS"

    def __repr__(self) -> str:
        return "MISS"

    def __bool__(self) -> bool:
        return False


MISS: Final = Miss.MISS
"""What ``get`` returns for what is not cached."""
