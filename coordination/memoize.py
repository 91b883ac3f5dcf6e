"""``@memoized_task``: a Celery task whose body is skipped when its result is known.

The memo is asked in the worker, where the body would run (``Task.__call__``), and not where the task is sent:
so chains, groups, chords and callbacks see a task that runs as any other, only faster.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from celery import Celery, Task, shared_task
from celery.exceptions import SoftTimeLimitExceeded, TaskPredicate

from ..cachelib import MISS, Cache, connect
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.templates import CallName, Fingerprint, Template, signature_of

_LONGEST_WAIT_S = 3_600  # for another's run, where no time limit says how long one may take


class Memo:
    """How the results of one task are kept."""

    def __init__(
        self,
        cache: Cache | None,
        key: CallName,
        ttl: Duration | None,
        stale: Duration,
        tags: Sequence[CallName],
    ) -> None:
        self._cache = cache
        self._key = key
        self._ttl = ttl
        self._stale = stale
        self._tags = tags

    def __repr__(self) -> str:
        return f"<Memo by {self._key.text}>"

    def cache(self, app: Celery) -> Cache:
        """The cache; made on first use where none was given, so that importing tasks connects to nothing."""
        if self._cache is None:
            self._cache = Cache(connect(), namespace=app.main or "tasks")
        return self._cache

    def key(self, task: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> str:
        """The key of one call."""
        return f"{task}:{self._key.fill(arguments, keywords)}"

    def call(self, task: Task, arguments: Sequence[Any], keywords: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """The result of one call: remembered, or by running the body."""
        try:
            return self.cache(task.app).get_or_set(
                self.key(task.name, arguments, keywords),
                lambda: _run(run),
                ttl=self._ttl,
                stale=self._stale,
                tags=[tag.fill(arguments, keywords) for tag in self._tags],
                wait=task.time_limit or task.app.conf.task_time_limit or _LONGEST_WAIT_S,
            )
        except _NoOutcome as error:
            raise error.said from None


class _NoOutcome(BaseException):
    """Carries a retry, an ignored or rejected run, or the end of its time past the cache: a stale value covers none."""

    def __init__(self, said: Exception) -> None:
        self.said = said


def _run(body: Callable[[], Any]) -> Any:
    try:
        return body()
    except (TaskPredicate, SoftTimeLimitExceeded) as said:
        raise _NoOutcome(said) from None


class MemoizedTask(Task):
    """The base of memoized tasks. ``task(...)``, ``delay`` and ``apply_async`` are as ever; ``run`` always runs."""

    abstract = True
    memo: Memo

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.memo.call(
            self, arguments, keywords, lambda: super(MemoizedTask, self).__call__(*arguments, **keywords)
        )

    def peek(self, *arguments: Any, **keywords: Any) -> Any:
        """The remembered result of a call; ``MISS`` when there is none. Never runs the task."""
        return self.memo.cache(self.app).get(self.memo.key(self.name, arguments, keywords), MISS)

    def invalidate(self, *arguments: Any, **keywords: Any) -> None:
        """Forget the result of a call; a run of it that is under way will not be remembered.

        When Redis does not answer it is remembered, and sent when it does; see ``Cache.invalidate``.
        """
        self.memo.cache(self.app).delete(self.memo.key(self.name, arguments, keywords))


def memoized_task(
    *,
    app: Celery | None = None,
    cache: Cache | None = None,
    key: str | None = None,
    ttl: Duration | None = None,
    stale: Duration = 0,
    tags: Sequence[str] = (),
    base: type[Task] | None = None,
    **options: Any,
) -> Callable[[Callable[..., Any]], MemoizedTask]:
    """Make a task whose result is remembered.

    >>> @memoized_task(app=app, key="{region}", ttl=300, stale=60, tags=["sales"])
    ... def sales_report(region: str) -> dict: ...
    >>> sales_report.delay("north"); sales_report.invalidate("north")

    Promises: on a hit the body does not run, and the task completes with the remembered value as any task, so
    chains go on and chords count. Of all workers that need one result at once, one runs the body. A failure,
    a retry or an ignored run is not remembered. Without Redis the body runs.

    Not yet: those that need a result that is being made wait for it in their worker's slot, for the time limit of the
    task at most; a crash of the one that makes it delays them by the cache's lease; nothing is answered without the
    broker.

    Arguments:
        app: the Celery app; without one, as ``shared_task``.
        cache: where results are kept. Default: one of its own at ``Settings.read().url``.
        key: what tells calls apart, such as ``"{region}"``. Default: all arguments, by value and type.
        ttl, stale, tags: as for ``Cache.get_or_set``; tags may name arguments.
        base: a task class to build on. Default: the app's.
        options: for ``app.task``.

    Results are kept as MessagePack; what JSON results lose (tuples become lists) is lost here too.
    """
    if ttl is not None:
        milliseconds(ttl, "ttl")
    milliseconds(stale, "stale", zero_allowed=True)

    def decorate(function: Callable[..., Any]) -> MemoizedTask:
        signature = signature_of(function, without_first=bool(options.get("bind")))
        name: CallName = Fingerprint(signature, by_type=False) if key is None else Template(key, signature)
        memo = Memo(cache, name, ttl, stale, [Template(tag, signature) for tag in tags])
        parent = base or (app.Task if app is not None else Task)
        kind = type("MemoizedTask", (MemoizedTask, parent), {"abstract": True, "memo": memo})
        if app is None:
            return cast("MemoizedTask", shared_task(base=kind, **options)(function))
        return cast("MemoizedTask", app.task(base=kind, **{"shared": False, **options})(function))

    return decorate
