"""Where this package touches a Celery app: its tasks, its beat entries, its worker's end. Nowhere else.

Without an app, what is wired here goes to every app, as ``shared_task`` does it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from celery import Celery, Task, shared_task, signals
from celery._state import _get_active_apps, connect_on_app_finalize  # what shared_task itself is built on
from kombu.exceptions import OperationalError as BrokerUnavailable

from ..cachelib.connections import UNAVAILABLE

SEND_FAILURES = (BrokerUnavailable, *UNAVAILABLE)
"""What sending raises when the broker did not take a message."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def checked_name(name: str, what: str) -> str:
    """A name as it may stand in the name of a task. Raises ``ValueError`` for another."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} {name!r} becomes part of a task's name: use letters, digits, '_', '.' and '-', 100 at most"
        )
    return name


def add_task(app: Celery | None, name: str, function: Callable[..., Any], **options: Any) -> Task:
    """Register a function as a task of an app, or of all. A plain function: Celery asks callers for a method's self."""
    if app is None:
        return shared_task(name=name, **options)(function)
    return app.task(name=name, shared=False, **options)(function)  # Celery's default would give it to every app


def send_at_once(
    task: Task, arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None, **options: Any
) -> None:
    """Send a task, or raise at once: for callers that have something better to do than to wait for a broker.

    Over a connection of its own, because the app's pool would try for seconds to reach a broker that is away.
    Raises ``BrokerUnavailable`` or what the transport raises: ``SEND_FAILURES``.
    """
    with task.app.connection_for_write(transport_options={"max_retries": 0}) as connection:
        task.apply_async(tuple(arguments), dict(keywords or {}), connection=connection, retry=False, **options)


def add_beat_entry(app: Celery | None, name: str, *, every_ms: int, task: str) -> None:
    """Have beat send a task, unless the app's own schedule already has an entry of that name.

    A message that nobody took until the next one is due expires: a worker that was away finds one, not a heap.
    """

    def add(sender: Celery, **_: Any) -> None:
        if name in sender.conf.beat_schedule:
            return
        every = timedelta(milliseconds=every_ms)
        # An expiry below a second would let a busy worker drop every one of them.
        options = {"expires": max(1.0, every.total_seconds())}
        sender.add_periodic_task(every, sender.signature(task), name=name, **options)

    def add_when_ready(to: Celery) -> None:
        if to.finalized:
            add(to)
        else:
            to.on_after_finalize.connect(add, weak=False)

    if app is not None:
        add_when_ready(app)
        return
    connect_on_app_finalize(lambda to: to.on_after_finalize.connect(add, weak=False))
    for ready in _get_active_apps():
        if ready.finalized:
            add(ready)


def at_worker_end(app: Celery | None, function: Callable[[], None]) -> None:
    """Call a function in the main process of a worker, once its pool has ended."""

    def end(sender: Any = None, **_: Any) -> None:
        if app is None or getattr(sender, "app", None) is app:
            function()

    signals.worker_shutdown.connect(end, weak=False)
