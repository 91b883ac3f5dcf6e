"""What is refused where a task is declared, because Celery would take it and nobody would notice.

Celery makes attributes of the task of all options that it is given. So a lock that is misspelt would be no lock: what
is another decorator's option, or nearly one of ours, is refused. It also takes a function that is async, and what that
returns would never run.
"""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from .memo_options import DEFAULTS, PREFIX

GATES = (
    "redis", "lock", "concurrency", "rate", "unique", "debounce", "fair", "max_parked", "when_full", "lease", "on_lost",
)  # fmt: skip
MEMO = tuple(DEFAULTS)
_NEAR = 0.75  # two letters that have changed places, in a word of four


def check_coordinated(options: Mapping[str, Any], base: type) -> None:
    """Raises ``TypeError`` for what ``coordinated_task`` is given for Celery, and was meant for us.

    Arguments:
        base: the class of the task. What is its attribute is nobody's mistake, except an option's very name.
    """
    for name in options:
        plain = name.removeprefix(PREFIX)
        if name in MEMO or (plain in MEMO and not hasattr(base, name)):
            raise TypeError(
                f"{name} is no option of coordinated_task; a task that is memoized and has gates is written "
                f"@memoized_task(app=app, {plain}=..., gate_lock=...)"
            )
        near = _near(name, base)
        if near:
            meant = repr(near) if near in GATES else f"{near!r}, of memoized_task"
            raise TypeError(f"coordinated_task has no option {name!r}; did you mean {meant}? {_OWN}")


def check_memoized(options: Mapping[str, Any], base: type) -> None:
    """Raises ``TypeError`` for what ``memoized_task`` is given for Celery, and was meant for us."""
    for name in options:
        if name in GATES:
            raise TypeError(
                f"{name} is no option of memoized_task; write gate_{name}=..., as in "
                "@memoized_task(app=app, ttl='5m', gate_lock='account:{account_id}')"
            )
        near = _near(name, base)
        if near:
            meant = f"gate_{near}" if near in GATES else near
            raise TypeError(f"memoized_task has no option {name!r}; did you mean {meant!r}? {_OWN}")


def refuse_async(function: Callable[..., object]) -> None:
    """Raises ``TypeError`` for a function that returns what somebody would have to await."""
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"{function.__qualname__} is async, which is not supported; write a plain def that calls asyncio.run(...)"
        )


_OWN = "(An attribute of your own that is called so is declared in a base class.)"


def _near(name: str, base: type) -> str | None:
    """The option of ours that is meant by what is none."""
    if hasattr(base, name):
        return None
    alike = [option for option in (*GATES, *MEMO) if option[:1] == name[:1]]  # "late" is no "rate"
    return next(iter(get_close_matches(name, alike, n=1, cutoff=_NEAR)), None)
