"""The remembered results of one task: looked up, made, refreshed and forgotten.

A result is made by one run at a time, under the cache's lease. A run that ends in no result (a retry, an ignored or
rejected run, the end of its time) passes the cache by: nothing is remembered of it and no stale result covers it. A run
whose result the cache cannot keep is not lost: its task completes with it.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery, Task

from ..cachelib import MISS, Cache, connect
from ..cachelib.counters import Counters
from ..cachelib.errors import ValueNotCacheable
from ..cachelib.policy import Policy, early_due
from .memo_keys import Call, MemoKeys
from .memo_options import NO_RESULTS, MemoOptions
from .memo_refresh import TaskRefresher

logger = logging.getLogger(__name__)

COUNTS = ("hits", "joins", "runs", "failures", "refreshes", "answered")

_LONGEST_WAIT_S = 3_600  # for another's run, where no time limit says how long one may take
_caches: "WeakKeyDictionary[Celery, Cache]" = WeakKeyDictionary()


class Memo:
    """How the results of one task are kept, and what came of it in this process."""

    def __init__(self, task: Task, options: MemoOptions, keys: MemoKeys) -> None:
        self._task = task
        self.options = options
        self._keys = keys
        self._counters = Counters()
        self._known_policy: tuple[Cache, Policy] | None = None

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.stats().items() if count)
        return f"<Memo of {self.name} by {self._keys.text}{f' [{counts}]' if counts else ''}>"

    @property
    def name(self) -> str:
        """The task's."""
        return str(self._task.name)

    @property
    def cache(self) -> Cache:
        """Where results are kept; if none was given, one per app, made on first use: importing connects to nothing."""
        return self.options.cache or _cache_of(self._task.app)

    def stats(self) -> Mapping[str, int]:
        """Counts of this process.

        ``hits`` were answered at once; ``joins`` waited for another's run; ``runs`` ran the body; ``failures`` raised a
        remembered one; ``refreshes`` were sent; ``answered`` were sent and needed no broker.
        """
        counts = self._counters.read()
        return {name: counts.get(name, 0) for name in COUNTS}

    def call(self, arguments: Any, keywords: Any) -> Call:
        """One call. Raises ``TypeError`` for arguments that make no key."""
        return self._keys.call(self.name, arguments, keywords)

    def lead_or_wait(self, call: Call, run: Callable[[], Any]) -> Any:
        """The result of a call: remembered, or made here, or by another who is waited for in this slot.

        One round trip for a result that is there, two for one that is made here.
        """
        cache, policy = self._policy()
        made = _Made(run)
        # Waiting for another's run is known by the cache's counts alone: about, where threads wait at once.
        waited = _waits(cache)
        try:
            value = cache.call(call.key, made, policy, call.tags, (call.arguments, call.keywords))
        except _NoResult as no:
            self._counters.add("runs")
            said = no.said
        except Exception as error:
            self._counters.add("runs" if made.began else "failures")
            if isinstance(error, ValueNotCacheable) and made.ended:
                return self._kept_by_nobody(made, error)
            raise
        else:
            self._counters.add("runs" if made.began else "joins" if _waits(cache) > waited else "hits")
            return value
        raise said

    def look(self, call: Call) -> Any:
        """The result of a call, if there is one; ``MISS`` if it is to be made, or is being made. Raises a remembered
        failure. What is stale is returned, and a refresh of it sent.
        """
        cache, policy = self._policy()
        policy = replace(policy, wait_ms=0)

        def nothing() -> Any:
            raise _NoResult(_Nothing())

        try:
            value = cache.call(call.key, nothing, policy, call.tags, (call.arguments, call.keywords))
        except _NoResult:
            return MISS
        except Exception:
            self._counters.add("failures")
            raise
        self._counters.add("hits")
        return value

    def refresh(self, call: Call, run: Callable[[], Any], token: str, *, again: bool) -> Any:
        """Make the result of a call anew; ``MISS`` when that is somebody else's by now, or Redis is away.

        A retry is sent before the attempt that asks for it gives its lease back, and one that is parked may be woken
        before: it waits for that, no longer than a lease, which is over then if nobody renews it.
        """
        cache, policy = self._policy()
        made = _Made(run)
        wait_ms = cache.lease_ms if again else 0
        try:
            cache.refresh_call(call.key, made, policy, call.tags, unless_fresh_for=0, token=token, wait_ms=wait_ms)
        except _NoResult as no:
            said = no.said
        except ValueNotCacheable as error:
            if not made.ended:
                raise
            return self._kept_by_nobody(made, error)
        else:
            return made.value if made.ended else MISS
        finally:
            if made.began:
                self._counters.add("runs")
        raise said

    def peek(self, call: Call) -> Any:
        """The remembered result, fresh or stale; ``MISS`` when there is none."""
        return self.cache.get(call.key, MISS)

    def fresh(self, call: Call) -> Any:
        """The remembered result if it is fresh and no refresh of it is due; ``MISS`` otherwise."""
        cache, policy = self._policy()
        if policy.stale_ms or isinstance(policy.early, float):
            left_s = cache.ttl(call.key)
            if not left_s or (
                isinstance(policy.early, float)
                and early_due(
                    policy.early, fresh_left_ms=int(left_s * 1_000), ttl_ms=policy.ttl_ms, load_ms=0, chance=0
                )
            ):
                return MISS
        return cache.get(call.key, MISS)

    def forget(self, call: Call) -> None:
        """Remove the result of a call, and void a run of it that is under way."""
        self.cache.delete(call.key)

    def count(self, name: str) -> None:
        """Add one to a count."""
        self._counters.add(name)

    def _policy(self) -> tuple[Cache, Policy]:
        if self._known_policy is None:
            cache, task = self.cache, self._task
            said = cache.policies.of({**self.options.policy, "exceptions": dict(self.options.failures)})
            # The task's own time limits end a run, in the thread that was given the request; never the cache's. And a
            # run that has a limit is waited for until it has surely ended, and its lease with it.
            longest_s = task.time_limit or task.app.conf.task_time_limit or _LONGEST_WAIT_S
            policy = replace(
                said,
                refresh=TaskRefresher(task, cache.lease_ms / 1_000, lambda: self._counters.add("refreshes")),
                hard_timeout_ms=None,
                soft_timeout_ms=None,
                type=Any,
                wait_ms=int(longest_s * 1_000) + 2 * cache.lease_ms,
            )
            self._known_policy = cache, policy
        return self._known_policy

    def _kept_by_nobody(self, made: "_Made", error: ValueNotCacheable) -> Any:
        logger.warning("a result of %s is not remembered: %s", self.name, error)
        return made.value


class _Made:
    """A run, as the loader of the cache."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self.began = False
        self.ended = False
        self.value: Any = None

    def __call__(self) -> Any:
        self.began = True
        try:
            self.value = self._run()
        except NO_RESULTS as said:
            raise _NoResult(said) from None
        self.ended = True
        return self.value


class _NoResult(BaseException):
    """Carries what is neither a result nor a failure past the cache."""

    def __init__(self, said: BaseException) -> None:
        self.said = said


class _Nothing(Exception):
    """There is no result."""


def _waits(cache: Cache) -> int:
    stats = cache.stats()
    return stats.waits + stats.joins


def _cache_of(app: Celery) -> Cache:
    cache = _caches.get(app)
    return cache or _caches.setdefault(app, Cache(connect(), namespace=app.main or "tasks"))
