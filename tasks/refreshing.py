"""``refreshed_in_worker``: what is stale, or soon will be, is loaded anew by a Celery worker.

The reader who notices takes the lease, sends its token in a task, and returns the value that there is. The worker goes
on with that lease: so one refresh runs at a time, and it stores nothing that was invalidated since the reader noticed.
A task that nobody takes before the lease runs out expires, and the next reader sends another.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from celery import Celery

from ..cachelib.calls import is_plain
from ..cachelib.decorators import CachedFunction
from ..cachelib.policy import Refresh
from . import wiring

P = ParamSpec("P")
T = TypeVar("T")


class _WorkerRefresher:
    """Sends refreshes to a task. A ``Refresher``."""

    def __init__(self, task: Any, expires_s: float) -> None:
        self._task = task
        self._expires_s = expires_s

    def __repr__(self) -> str:
        return f"<refreshed by {self._task.name}>"

    def __call__(self, refresh: Refresh) -> bool:
        """Send it. False for arguments that a message would change: then a thread of this process loads."""
        if not all(is_plain(value) for value in (*refresh.arguments, *refresh.keywords.values())):
            return False
        wiring.send_at_once(
            self._task,
            keywords={
                "arguments": list(refresh.arguments),
                "keywords": dict(refresh.keywords),
                "token": refresh.token,
            },
            expires=self._expires_s,
        )
        return True


def refreshed_in_worker(
    *, app: Celery | None = None, name: str | None = None, **task_options: Any
) -> Callable[[CachedFunction[P, T]], CachedFunction[P, T]]:
    """Have a Celery worker load anew what a cached function has stale, or nearly so.

    >>> @refreshed_in_worker(app=app)
    ... @cached(cache, "report:{region}", ttl=60, stale="1h", early=0.8)
    ... def report(region: str) -> dict: ...

    It brings its Celery task, ``petiole.refresh.<name>``. What is missing altogether is still loaded by the caller.

    Promises: one refresh of a key at a time, however many readers notice; it stores nothing that was invalidated after
    the first of them did. When the broker does not take the task, or an argument is not text, a number, a boolean or
    None, a thread of the reader's process loads instead. Non-promise: that a worker takes the task before the lease of
    the cache runs out; if none does, the next reader after that sends another.

    Arguments:
        app: the Celery app; without one, as ``shared_task``.
        name: in the task's name. Default: module and function.
        task_options: for the task, such as ``queue``, ``priority`` or ``soft_time_limit``.
    """

    def decorate(function: CachedFunction[P, T]) -> CachedFunction[P, T]:
        if not isinstance(function, CachedFunction):
            raise TypeError(f"{function!r} is not cached: write @refreshed_in_worker() above @cached(...)")
        original = function.original
        chosen = wiring.checked_name(name or f"{original.__module__}.{original.__name__}", "name")

        def refresh(arguments: Sequence[Any], keywords: Mapping[str, Any], token: str) -> bool:
            return function.refresh_call(arguments, keywords, token=token)

        task = wiring.add_task(app, f"petiole.refresh.{chosen}", refresh, ignore_result=True, **task_options)
        refresher = _WorkerRefresher(task, expires_s=function.cache.lease_ms / 1_000)
        function.policy = replace(function.policy, refresh=refresher)
        return function

    return decorate
