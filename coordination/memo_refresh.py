"""Refreshes of memoized tasks: the very task, marked by a header.

It is the same task, so its routes, limits and time limits hold for its refreshes too. The reader who notices that a
result is stale takes the cache's lease and sends its token; the worker goes on with that lease. So one refresh of a
call runs at a time, and it stores nothing that was invalidated since the reader noticed.
"""

import logging
from collections.abc import Mapping
from typing import Any

from celery import Task

from ..cachelib.policy import Refresh
from . import parked_messages

logger = logging.getLogger(__name__)

_HEADER = "petiole_memo_refresh"


def header(task: str, token: str = "") -> dict[str, str]:
    """The header that makes a message of a task a refresh.

    Arguments:
        token: of the lease to go on with; none: the refresh takes one of its own.
    """
    return {_HEADER: f"{task} {token}"}


def is_header(task: str, headers: Any) -> bool:
    """Whether a message with these headers is a refresh of a task."""
    return isinstance(headers, Mapping) and str(headers.get(_HEADER, "")).partition(" ")[0] == task


def token_in(task: Task) -> str | None:
    """The token that the message which is being worked on carries; None for one that is no refresh.

    The name of the task is part of it, so that in headers that somebody hands on to another task it means nothing. A
    retry, or one that was parked, comes after the lease was given back, so it carries none.
    """
    request = task.request
    if request.called_directly or not request.headers:
        return None
    name, _, token = str(request.headers.get(_HEADER, "")).partition(" ")
    if name != task.name:
        return None
    return "" if comes_again(task) else token


def comes_again(task: Task) -> bool:
    """Whether an earlier delivery of the message may have had the lease, and may be about to give it back."""
    return bool(task.request.retries or parked_messages.generation_of(task.request))


class TaskRefresher:
    """Sends the refreshes of a task. A ``Refresher`` that always takes them over.

    When the broker does not take one, the reader has a result to go on with all the same; its lease runs out, and who
    reads after that sends another: once per lease, and not per reader.
    """

    def __init__(self, task: Task, expires_s: float, sent: Any) -> None:
        self._task = task
        self._expires_s = expires_s
        self._sent = sent

    def __repr__(self) -> str:
        return f"<refreshed by {self._task.name}>"

    def __call__(self, refresh: Refresh) -> bool:
        """Send it, or log why it was not."""
        options: dict[str, Any] = {
            "headers": header(self._task.name, refresh.token),
            "expires": self._expires_s,
            "ignore_result": True,
            "add_to_parent": False,
        }
        try:
            if self._task.app.conf.task_always_eager:
                self._task.apply_async(refresh.arguments, dict(refresh.keywords), **options)
            else:
                # A connection of its own: the app's pool would try for seconds to reach a broker that is away.
                with self._task.app.connection_for_write(transport_options={"max_retries": 0}) as connection:
                    self._task.apply_async(
                        refresh.arguments, dict(refresh.keywords), connection=connection, retry=False, **options
                    )
        except Exception as error:  # noqa: BLE001 - whatever it was, there is a result to go on with
            logger.warning(
                "the refresh of %s was not sent (%s: %s); its stale result is served, and the next reader after the "
                "lease tries again",
                self._task.name,
                type(error).__name__,
                error,
            )
        else:
            self._sent()
        return True
