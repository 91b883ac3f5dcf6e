"""``@cached``: a function whose results are kept in a cache."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

from .cache import MISS, Cache
from .durations import Duration, milliseconds
from .templates import CallName, Template, signature_of

P = ParamSpec("P")
T = TypeVar("T")


class CachedFunction(Generic[P, T]):
    """A function that answers from the cache. Made by ``cached``; call it as the function itself."""

    def __init__(
        self,
        function: Callable[P, T],
        cache: Cache,
        key: str | CallName,
        *,
        ttl: Duration | None = None,
        stale: Duration = 0,
        tags: Sequence[str] = (),
    ) -> None:
        if ttl is not None:
            milliseconds(ttl, "ttl")
        milliseconds(stale, "stale", zero_allowed=True)
        functools.update_wrapper(self, function)
        self.original = function
        self.cache = cache
        self._signature = signature_of(function)
        self._key: CallName = Template(key, self._signature) if isinstance(key, str) else key
        self._tags = [Template(tag, self._signature) for tag in tags]
        self._ttl = ttl
        self._stale = stale

    def __repr__(self) -> str:
        return f"<cached {self.original.__qualname__} as {self._key.text!r} in {self.cache.namespace!r}>"

    def __call__(self, *arguments: P.args, **keywords: P.kwargs) -> T:
        return self.cache.get_or_set(
            self._key.fill(arguments, keywords),
            lambda: self.original(*arguments, **keywords),
            ttl=self._ttl,
            stale=self._stale,
            tags=[tag.fill(arguments, keywords) for tag in self._tags],
        )

    def key(self, *arguments: P.args, **keywords: P.kwargs) -> str:
        """The key of this call."""
        return self._key.fill(arguments, keywords)

    def get(self, *arguments: P.args, **keywords: P.kwargs) -> Any:
        """What is cached for this call; ``MISS`` when nothing is. Never loads."""
        return self.cache.get(self.key(*arguments, **keywords), MISS)

    def invalidate(self, *arguments: P.args, **keywords: P.kwargs) -> None:
        """Remove what is cached for this call. Raises ``ServerUnavailable`` when Redis does not answer."""
        self.cache.delete(self.key(*arguments, **keywords))

    def refresh(self, *arguments: P.args, **keywords: P.kwargs) -> bool:
        """Load this call anew and cache it. Returns whether that was done; see ``Cache.refresh``."""
        return self.refresh_call(arguments, keywords)

    def refresh_call(
        self, arguments: Sequence[Any], keywords: Mapping[str, Any], *, unless_fresh_for: Duration = 0
    ) -> bool:
        """As ``refresh``, with the arguments as values, and sparing an entry that stays fresh for longer."""
        return self.cache.refresh(
            self._key.fill(arguments, keywords),
            lambda: self.original(*arguments, **keywords),
            ttl=self._ttl,
            stale=self._stale,
            tags=[tag.fill(arguments, keywords) for tag in self._tags],
            unless_fresh_for=unless_fresh_for,
        )


def cached(
    cache: Cache,
    key: str,
    *,
    ttl: Duration | None = None,
    stale: Duration = 0,
    tags: Sequence[str] = (),
) -> Callable[[Callable[P, T]], CachedFunction[P, T]]:
    """Keep the results of a function in a cache.

    >>> @cached(cache, "user:{user_id}", ttl="5m", tags=["user:{user_id}"])
    ... def user(user_id: int) -> dict: ...
    >>> user(7); user.invalidate(7); user.refresh(7); user.key(7)

    Arguments:
        cache: where to keep them.
        key, tags: text with the function's arguments in braces. What two calls have in common there they
            share: ``1`` and ``"1"`` make the same text.
        ttl, stale: as for ``Cache.get_or_set``.

    Raises ``ValueError`` at once for a template that names what is no argument, and for a duration that is none.
    """

    def decorate(function: Callable[P, T]) -> CachedFunction[P, T]:
        return CachedFunction(function, cache, key, ttl=ttl, stale=stale, tags=tags)

    return decorate
