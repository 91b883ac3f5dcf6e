"""``@cached``: a function whose results are kept in a cache."""

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import (
    Any,
    Concatenate,
    Generic,
    ParamSpec,
    TypeVar,
    Union,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from .cache import Cache
from .durations import Duration
from .loading import checked_tags
from .missing import MISS
from .policy import Options
from .templates import CallName, Fingerprint, Template, signature_of

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")


class CachedFunction(Generic[P, T]):
    """A function that answers from the cache. Made by ``cached``; call it as the function itself.

    In a class it is a method: each instance's calls are told apart by what the key's template names of ``self``
    (``"{self.id}"``), or, where the key is made of all arguments, by the other arguments alone.
    """

    def __init__(
        self,
        function: Callable[P, T],
        cache: Cache,
        key: str | CallName | None,
        *,
        tags: Sequence[str] = (),
        **options: Unpack[Options],
    ) -> None:
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__qualname__} is async, which is not supported yet; cache what it awaits")
        functools.update_wrapper(self, function)
        self.original = function
        self.cache = cache
        self._signature = signature_of(function)
        if key is None:
            first = next(iter(self._signature.parameters), "") if _is_in_class(function) else ""
            self._key: CallName = Fingerprint(
                self._signature,
                prefix=f"{function.__module__}.{function.__qualname__}:",
                without=[first] if first in ("self", "cls") else [],
            )
        else:
            self._key = Template(key, self._signature) if isinstance(key, str) else key
        self._tags = [Template(tag, self._signature) for tag in tags]
        if "type" not in options and (returned := _returned(function)) is not None:
            options["type"] = returned
            try:
                self.policy = cache.policies.of(options)
            except TypeError:  # the annotation is no type that a value could be restored as
                del options["type"]
        self.policy = cache.policies.of(options)

    def __repr__(self) -> str:
        return f"<cached {self.original.__qualname__} as {self._key.text!r} in {self.cache.namespace!r}>"

    def __call__(self, *arguments: P.args, **keywords: P.kwargs) -> T:
        return self.cache.call(
            self._key.fill(arguments, keywords),
            functools.partial(self.original, *arguments, **keywords),
            self.policy,
            self.tags(*arguments, **keywords) if self._tags else (),
            (arguments, keywords),
        )

    @overload
    def __get__(self, instance: None, owner: type) -> "CachedFunction[P, T]": ...
    @overload
    def __get__(
        self: "CachedFunction[Concatenate[S, P], T]", instance: S, owner: type | None = None
    ) -> "CachedMethod[P, T]": ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else CachedMethod(self, instance)

    def key(self, *arguments: P.args, **keywords: P.kwargs) -> str:
        """The key of this call."""
        return self._key.fill(arguments, keywords)

    def tags(self, *arguments: P.args, **keywords: P.kwargs) -> Sequence[str]:
        """The tags of this call."""
        return checked_tags([tag.fill(arguments, keywords) for tag in self._tags], self.cache.keys)

    def get(self, *arguments: P.args, **keywords: P.kwargs) -> Any:
        """What is cached for this call; ``MISS`` when nothing is. Never loads."""
        return self.cache.get(self.key(*arguments, **keywords), MISS, type=self.policy.type)

    def set(self, value: T, *arguments: P.args, **keywords: P.kwargs) -> bool:
        """Cache a value for this call, as if the function had returned it just now. See ``Cache.set``."""
        ttl_ms, stale_ms = self.policy.ttls_ms(value)
        return self.cache.set(
            self.key(*arguments, **keywords),
            value,
            ttl=ttl_ms / 1_000,
            stale=stale_ms / 1_000,
            tags=self.tags(*arguments, **keywords),
            type=self.policy.type,
        )

    def invalidate(self, *arguments: P.args, **keywords: P.kwargs) -> None:
        """Remove what is cached for this call, and void a load of it that is under way."""
        self.cache.delete(self.key(*arguments, **keywords))

    def refresh(self, *arguments: P.args, **keywords: P.kwargs) -> bool:
        """Load this call anew and cache it. Returns whether that was done; see ``Cache.refresh``."""
        return self.refresh_call(arguments, keywords)

    def refresh_call(
        self,
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        *,
        unless_fresh_for: Duration = 0,
        token: str = "",
    ) -> bool:
        """As ``refresh``, with the arguments as values.

        Arguments:
            unless_fresh_for: spare an entry that stays fresh for longer.
            token: of the lease that a ``Refresh`` carries, to go on with it.
        """
        return self.cache.refresh_call(
            self._key.fill(arguments, keywords),
            functools.partial(self.original, *arguments, **keywords),
            self.policy,
            [tag.fill(arguments, keywords) for tag in self._tags],
            unless_fresh_for=unless_fresh_for,
            token=token,
        )


class CachedMethod(Generic[P, T]):
    """A cached function, bound to an instance."""

    def __init__(self, function: "CachedFunction[..., T]", instance: object) -> None:
        functools.update_wrapper(self, function.original)
        self._function = function
        self._instance = instance
        self.cache = function.cache
        self.original = functools.partial(function.original, instance)

    def __repr__(self) -> str:
        return f"<bound {self._function!r} of {self._instance!r}>"

    def __call__(self, *arguments: P.args, **keywords: P.kwargs) -> T:
        return self._function(self._instance, *arguments, **keywords)

    def key(self, *arguments: P.args, **keywords: P.kwargs) -> str:
        """The key of this call."""
        return self._function.key(self._instance, *arguments, **keywords)

    def tags(self, *arguments: P.args, **keywords: P.kwargs) -> Sequence[str]:
        """The tags of this call."""
        return self._function.tags(self._instance, *arguments, **keywords)

    def get(self, *arguments: P.args, **keywords: P.kwargs) -> Any:
        """What is cached for this call; ``MISS`` when nothing is."""
        return self._function.get(self._instance, *arguments, **keywords)

    def set(self, value: T, *arguments: P.args, **keywords: P.kwargs) -> bool:
        """Cache a value for this call."""
        return self._function.set(value, self._instance, *arguments, **keywords)

    def invalidate(self, *arguments: P.args, **keywords: P.kwargs) -> None:
        """Remove what is cached for this call."""
        self._function.invalidate(self._instance, *arguments, **keywords)

    def refresh(self, *arguments: P.args, **keywords: P.kwargs) -> bool:
        """Load this call anew and cache it."""
        return self._function.refresh(self._instance, *arguments, **keywords)


def cached(
    cache: Cache, key: str | None = None, *, tags: Sequence[str] = (), **options: Unpack[Options]
) -> Callable[[Callable[P, T]], CachedFunction[P, T]]:
    """Keep the results of a function, or of a method, in a cache.

    >>> @cached(cache, "user:{user_id}", ttl="5m", tags=["user:{user_id}"])
    ... def user(user_id: int) -> User: ...
    >>> user(7); user.invalidate(7); user.refresh(7); user.key(7); user.get(7); user.set(ada, 7); user.original(7)

    Arguments:
        cache: where to keep them.
        key, tags: text with the function's arguments in braces, also ``{user.id}``. What two calls have in common there
            they share: ``1`` and ``"1"`` make the same text. Without a key: the function's name and a digest of all
            arguments, by value and type (``self`` and ``cls`` are left out), so that ``1``, ``True`` and ``"1"``
            differ.
        options: as for ``Cache.get_or_set``; those of the cache where not given. The ``type`` is what the function's
            annotation says it returns: a hit is restored as that. A value that is not of that type is not cached.

    Raises ``ValueError`` at once for a template that names what is no argument, and for options that cannot be meant.
    """

    def decorate(function: Callable[P, T]) -> CachedFunction[P, T]:
        return CachedFunction(function, cache, key, tags=tags, **options)

    return decorate


def _is_in_class(function: Callable[..., object]) -> bool:
    around = function.__qualname__.rpartition(".")[0]
    return bool(around) and not around.endswith("<locals>")


def _returned(function: Callable[..., object]) -> Any:
    """What a function says it returns, where that tells more than the stored value does by itself."""
    try:
        returned = get_type_hints(function, include_extras=True).get("return")
    except Exception as error:  # noqa: BLE001 - annotations may be any code
        if "return" in getattr(function, "__annotations__", {}):
            logger.warning(
                "what %s returns cannot be found out (%s), so hits come back as plain values; give type=...",
                getattr(function, "__qualname__", function),
                error,
            )
        return None
    return None if _comes_back_by_itself(returned) else returned


_PLAIN = (None, type(None), Any, object, dict, list, str, int, float, bool, bytes)
_PLAIN_AROUND = (dict, list, Mapping, Sequence, Union, UnionType, None)


def _comes_back_by_itself(kind: Any) -> bool:
    """Whether MessagePack has this kind of value: then a value of another is no mistake worth a miss."""
    if isinstance(kind, TypeVar) or any(kind is plain for plain in _PLAIN):
        return True
    origin, arguments = get_origin(kind), get_args(kind)
    return bool(arguments) and origin in _PLAIN_AROUND and all(map(_comes_back_by_itself, arguments))
