"""Exceptions as values: described when a loader raises one to be cached, rebuilt for who expects its class. Pure.

Nothing is imported by the name that is stored: a class is found among those that the caller lists, and their
subclasses.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def described(error: BaseException) -> list[Any]:
    """The class and the arguments of an exception. Raises ``TypeError`` for one that these do not make again."""
    kind = type(error)
    try:
        again = kind(*error.args)
    except Exception as why:  # noqa: BLE001 - its own code, whatever that does
        raise TypeError(f"{kind.__qualname__} cannot be made from its args {error.args!r:.100}: {why}") from None
    if type(again) is not kind or (again.args, str(again), again.__dict__) != (error.args, str(error), _own(error)):
        raise TypeError(f"{kind.__qualname__} made from its args {error.args!r:.100} is another")
    return [_named(kind), list(error.args)]


def rebuilt(name: str, arguments: Sequence[Any], expected: Iterable[type[Exception]]) -> Exception | None:
    """The exception again, if its class is one of those expected, or below one; None otherwise."""
    for kind in _with_subclasses(expected):
        if _named(kind) == name:
            try:
                return kind(*arguments)
            except Exception:  # noqa: BLE001 - the class is another than the one that was stored
                return None
    return None


def _own(error: BaseException) -> dict[str, Any]:
    return {name: value for name, value in error.__dict__.items() if name != "__notes__"}


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _with_subclasses(kinds: Iterable[type[Exception]]) -> Iterator[type[Exception]]:
    seen: set[type[Exception]] = set()
    left = list(kinds)
    while left:
        kind = left.pop(0)
        if kind not in seen:
            seen.add(kind)
            left.extend(kind.__subclasses__())
            yield kind
