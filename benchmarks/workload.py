"""What is done: the operations, and the values that they are done with, the same for everybody."""

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

KEY = "user:1234"
SMALL = {"id": 1234, "name": "somebody", "email": "somebody@example.org", "tags": ["a", "b"], "text": "x" * 110}
"""About 200 bytes as JSON."""
LARGE = {
    "rows": [{"id": n, "name": f"name {n}", "price": n / 7, "on": n % 2 == 0, "text": "x" * 30} for n in range(120)]
}
"""About 10 KB as JSON."""
TTL_S = 300

MANY = [f"many:{n}" for n in range(100)]
WARM = [f"warm:{n}" for n in range(1_000)]
TAG = "tag"
TAGGED = [f"tagged:{n}" for n in range(1_000)]


class Operation(Enum):
    """Each with the words that are shown for it."""

    GET = "get"
    GET_OR_SET = "get_or_set, a hit"
    CACHED = "decorated function, a hit"
    GET_TAGGED = "get_or_set, a hit with one tag"
    GET_LARGE = "get, 10 KB"
    MISS = "get, a miss"
    SET = "set"
    SET_TAGGED = "set with one tag"
    GET_MANY = "get_many of 100, per key"
    SET_MANY = "set_many of 100, per key"
    WARM = "set_many of 1,000, per key"
    INVALIDATE = "invalidate a tag of 1,000 keys"
    NEAR_COPY = "near cache, a hit, own copy"
    NEAR_SHARED = "near cache, a hit, shared object"

    @property
    def items(self) -> int:
        """Keys that one call handles, where times are shown per key."""
        return {Operation.GET_MANY: len(MANY), Operation.SET_MANY: len(MANY), Operation.WARM: len(WARM)}.get(self, 1)


def check(operation: Operation, who: str, answer: Any) -> None:
    """Who answers something else is measured doing something else. Raises ``RuntimeError``."""
    expected: Any
    if operation is Operation.GET_LARGE:
        expected = LARGE
    elif operation is Operation.GET_MANY:
        answer = list(answer.values()) if isinstance(answer, Mapping) else list(answer)
        expected = [SMALL] * len(MANY)
    elif operation.name.startswith(("GET", "CACHED", "NEAR")):
        expected = SMALL
    else:
        return
    if answer != expected:
        raise RuntimeError(f"{who} answered {operation.value!r} with {str(answer)[:80]!r}, not with what was stored")


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]
