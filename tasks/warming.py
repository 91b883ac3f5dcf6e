"""``@warmed``: a cached function whose most requested calls beat keeps fresh."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar, Unpack

from celery import Celery

from ..cachelib.cache import Cache
from ..cachelib.counters import SharedCounters
from ..cachelib.decorators import CachedFunction
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.policy import Options
from ..cachelib.popularity import Popularity
from ..cachelib.templates import CallName, Fingerprint, signature_of
from . import wiring

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_MARGIN = 1.5  # a warming may come half a period late without an entry running out before it


class WarmedFunction(CachedFunction[P, T]):
    """A cached function that counts its calls, and warms the popular ones. Made by ``warmed``."""

    def __init__(
        self,
        function: Callable[P, T],
        cache: Cache,
        key: str | CallName,
        *,
        every_ms: int,
        top: int,
        app: Celery | None,
        name: str,
        tags: Sequence[str],
        **options: Unpack[Options],
    ) -> None:
        super().__init__(function, cache, key, tags=tags, **options)
        self.popularity = Popularity(cache.redis, cache.keys.popular(name), top=top)
        self._every_s = every_ms / 1_000
        self._counters = SharedCounters(cache.redis, "cache", cache.namespace)

        def warm() -> dict[str, int]:
            return self.warm()

        self.task = wiring.add_task(app, f"petiole.warm.{name}", warm, ignore_result=True)
        wiring.add_beat_entry(app, f"petiole: warm {name}", every_ms=every_ms, task=f"petiole.warm.{name}")

    def __call__(self, *arguments: P.args, **keywords: P.kwargs) -> T:
        self.popularity.note(arguments, keywords)
        return super().__call__(*arguments, **keywords)

    def warm(self) -> dict[str, int]:
        """Refresh the most requested calls that would run out before the next warming.

        Stops when the next warming is due. A call whose loader fails is logged and counted, and stops no other.
        Returns how many were looked at, warmed and failed.
        """
        deadline = time.monotonic() + self._every_s
        looked_at = warmed = failed = 0
        for arguments, keywords in self.popularity.take():
            if time.monotonic() >= deadline:
                break
            looked_at += 1
            try:
                warmed += self.refresh_call(arguments, keywords, unless_fresh_for=self._every_s * _MARGIN)
            except Exception:
                failed += 1
                logger.warning("warming %r%r failed", self, tuple(arguments), exc_info=True)
        if looked_at:
            self._counters.add(warmed=warmed, warming_failed=failed)
        return {"looked_at": looked_at, "warmed": warmed, "failed": failed}


def warmed(
    cache: Cache,
    key: str | None = None,
    *,
    every: Duration,
    top: int = 100,
    tags: Sequence[str] = (),
    app: Celery | None = None,
    name: str | None = None,
    **options: Unpack[Options],
) -> Callable[[Callable[P, T]], WarmedFunction[P, T]]:
    """Cache a function, and have beat keep its most requested calls fresh.

    >>> @warmed(cache, every=60, top=100)
    ... def post(post_id: int) -> dict: ...

    It brings its Celery task, ``petiole.warm.<name>``, and its beat entry, ``petiole: warm <name>``.

    Promises: a warming never overwrites what was invalidated while it loaded; it takes the same lease as any
    load; two warmings at once do the work once. Non-promises: calls with arguments other than text, numbers,
    booleans and None are cached and not warmed.

    Not yet: what is warmed is decided by popularity alone, not by what a load costs.

    Arguments:
        cache: where results are kept.
        key: as for ``cached``. Default: ``name`` and all arguments, by value and type.
        every: how often beat warms; the TTL must be longer.
        top: how many calls are kept fresh.
        tags, options: as for ``cached``.
        app: the Celery app; without one, as ``shared_task``.
        name: in the task's name. Default: module and function.

    Raises ``ValueError`` when entries would run out between two warmings.
    """
    every_ms = milliseconds(every, "every")
    ttl_ms = cache.policies.of(options).ttl_ms
    if ttl_ms <= every_ms:
        raise ValueError(
            f"entries that live for {ttl_ms / 1_000:g} s run out between warmings every {every_ms / 1_000:g} s; "
            "warm more often, or give a longer ttl"
        )
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise ValueError(f"top must be a whole number of at least 1, not {top!r}")

    def decorate(function: Callable[P, T]) -> WarmedFunction[P, T]:
        chosen = wiring.checked_name(name or f"{function.__module__}.{function.__name__}", "name")
        calls = Fingerprint(signature_of(function), prefix=f"{chosen}:") if key is None else key
        return WarmedFunction(
            function,
            cache,
            calls,
            every_ms=every_ms,
            top=top,
            app=app,
            name=chosen,
            tags=tags,
            **options,
        )

    return decorate
