"""At most one call per period and key, among all processes: the first runs, the others are told to wait.

It is a limiter of one call per period without a burst, and keeps its promise by the limiter's script. (The other edge,
the last call of several, is in ``debounce.py``.)
"""

import functools
import inspect
import math
from collections.abc import Callable
from enum import Enum
from typing import Any, Final, Literal, ParamSpec, TypeVar, overload

from ..cachelib.connections import Connections
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.templates import Template, signature_of
from . import keys
from .rate_limit import Allowed, Limited, RateLimit
from .rate_limiter import OnError, RateLimiter

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")


class Skipped(Enum):
    """The type of ``SKIPPED``."""

    SKIPPED = "SKIPPED"

    def __repr__(self) -> str:
        return "SKIPPED"

    def __bool__(self) -> bool:
        return False


SKIPPED: Final = Skipped.SKIPPED
"""What a throttled function returns when it did not run, unless it was told something else."""


class Throttle:
    """Admits the first call of a key, and no other until the period is over.

    >>> throttle = Throttle(redis, "report", every="5m")
    >>> if throttle.hit("user:7"): ...
    >>> @throttle.calls("{user_id}")
    ... def report(user_id: int) -> None: ...

    Promises: never two calls of one key less than ``every`` apart, from any number of processes, whatever their clocks
    say. One round trip per call. A call that is refused changes nothing: the period is not prolonged.

    Non-promises: it is the *beginning* of calls that is apart; a long one may still run when the next is admitted. One
    that fails counts as well. What Redis forgets (a restart without persistence, an eviction) is admitted again.

    Arguments:
        redis: from ``connect``.
        name: keeps the keys of several throttles apart.
        every: the period; above a day, rounded up to whole seconds. When it is changed, the one that runs goes on.
        on_error: when Redis does not answer: ``raise`` (``LimiterUnavailable``), ``allow`` or ``deny``.

    Raises ``ValueError`` or ``TypeError`` for what cannot be meant.
    """

    def __init__(self, redis: Connections, name: str, *, every: Duration, on_error: OnError = "raise") -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"a throttle needs a name, which keeps its keys apart from others', not {name!r}")
        self.name = name
        self.every_ms = milliseconds(every, "every")
        limit = RateLimit(_rate(self.every_ms), burst=1, name="every")
        self._limiter = RateLimiter(redis, keys.throttle_limiter(name), [limit], on_error=on_error)

    def __repr__(self) -> str:
        return f"<Throttle {self.name!r} [one per {self.every_ms / 1_000:g} s]>"

    def hit(self, key: str) -> Allowed | Limited:
        """Ask for a call. Of ``Limited``, ``retry_after`` says when the next would be admitted."""
        return self._limiter.hit(key)

    @overload
    def calls(self, key: str) -> Callable[[Callable[P, T]], Callable[P, T | Literal[Skipped.SKIPPED]]]: ...
    @overload
    def calls(self, key: str, *, otherwise: S) -> Callable[[Callable[P, T]], Callable[P, T | S]]: ...
    def calls(self, key: str, *, otherwise: Any = SKIPPED) -> Any:
        """Make a function, or a method, one that runs at most once per period and key.

        Arguments:
            key: text with the function's arguments in braces, such as ``"{user_id}"``; without braces, all calls are
                one key. Functions with the same text share the period.
            otherwise: what it returns when it does not run. ``SKIPPED`` is false, and nothing that a function returns.

        Raises ``ValueError`` for a template that names what is no argument.
        """

        def decorate(function: Callable[P, T]) -> Callable[P, T | Any]:
            if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
                raise TypeError(f"{function.__qualname__} is async, which is not supported; ask hit() in a thread")
            template = Template(key, signature_of(function))

            @functools.wraps(function)
            def throttled(*arguments: P.args, **keywords: P.kwargs) -> T | Any:
                if self.hit(template.fill(arguments, keywords)):
                    return function(*arguments, **keywords)
                return otherwise

            return throttled

        return decorate


def _rate(every_ms: int) -> str:
    """One call per period, in a form that counts whole seconds: 250 ms are four a second, of which none at once."""
    if every_ms > 86_400_000:
        every_ms = -(-every_ms // 1_000) * 1_000
    shared = math.gcd(1_000, every_ms)
    return f"{1_000 // shared}/{every_ms // shared}s"
