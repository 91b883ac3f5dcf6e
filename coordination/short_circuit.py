"""Answering a call of a memoized task where it is sent, without the broker.

Only a bare call is: one that nobody holds the id of, and that nothing follows. Groups, chains and chords freeze ids
before they send, and count on callbacks that a worker fires; so whatever names a task's id or its place in a canvas
goes to the broker. The answer is stored under an id of its own, as a worker would, so any process can read it.
"""

import logging
from collections.abc import Mapping
from typing import Any

from celery import Task, states
from celery.app.task import Context
from celery.backends.base import BaseKeyValueStoreBackend, DisabledBackend
from celery.backends.redis import RedisBackend
from celery.backends.rpc import RPCBackend
from celery.result import AsyncResult
from kombu.utils.uuid import uuid

from ..cachelib import MISS
from .memo_keys import Call
from .memo_results import Memo

logger = logging.getLogger(__name__)

_HOW_IT_IS_SENT = frozenset(
    {
        "queue", "exchange", "routing_key", "priority", "serializer", "compression", "retry", "retry_policy",
        "connection", "delivery_mode", "mandatory", "immediate", "expires", "time_limit", "soft_time_limit",
        "ignore_result", "argsrepr", "kwargsrepr",
    }
)  # fmt: skip
"""What a call may say and still be bare: it concerns a message or a run, and there will be none."""


class Answered(AsyncResult):  # type: ignore[misc]  # Celery has no types
    """The result of a call that was answered where it was sent: complete from the beginning."""

    def then(self, callback: Any, on_error: Any = None, weak: bool = False) -> Any:  # noqa: ARG002 - as inherited
        """Call back at once."""
        if not self.on_ready.ready:
            self.on_ready(self)
        return self.on_ready.then(callback, on_error)

    def __del__(self) -> None:
        """Nothing to unsubscribe from, which would be a command."""


def is_bare(options: Mapping[str, Any]) -> bool:
    """Whether a call says nothing that only a worker can see to."""
    return all(value is None or name in _HOW_IT_IS_SENT for name, value in options.items())


def answered(task: Task, memo: Memo, call: Call, options: Mapping[str, Any]) -> AsyncResult | None:
    """The result of a bare call that is remembered and fresh, already complete; None where the broker is needed."""
    app = task.app
    if app.conf.task_always_eager or not is_bare(options):
        return None
    ignored = options.get("ignore_result")
    ignored = task.ignore_result if ignored is None else ignored
    backend = task.backend
    if not ignored and isinstance(backend, RPCBackend):
        return None  # its results are messages to one process
    value = memo.fresh(call)
    if value is MISS:
        return None
    result = Answered(uuid(), backend=backend, task_name=task.name, app=app)
    result.ignored = bool(ignored)
    if not ignored and not isinstance(backend, DisabledBackend):
        try:
            _store(task, result, value, call)
        except Exception as error:  # noqa: BLE001 - a worker may have more luck
            logger.warning("a result of %s could not be stored (%s); the task is sent", task.name, error)
            return None
    memo.count("answered")
    return result


def _store(task: Task, result: AsyncResult, value: Any, call: Call) -> None:
    """Store a result as a worker would, and tell it to the one who asks now, for whom that saves reading it back."""
    backend = task.backend
    if not isinstance(backend, BaseKeyValueStoreBackend):
        request = Context(id=result.id, task=task.name, args=call.arguments, kwargs=call.keywords, ignore_result=False)
        backend.store_result(result.id, value, states.SUCCESS, request=request)
        return
    meta = {
        "status": states.SUCCESS,
        "result": value,
        "traceback": None,
        "children": [],
        "date_done": task.app.now().isoformat(),
        "task_id": result.id,
    }
    if task.app.conf.result_extended:
        meta |= {"name": task.name, "args": call.arguments, "kwargs": call.keywords}
        meta |= {"worker": None, "retries": 0, "queue": None}
    packed = backend.encode(meta)
    name = backend.get_key_for_task(result.id)
    # Of an id that nobody has heard of there is no earlier result to look for, as store_result would, and nobody waits
    # to be told, whom the Redis backend's own set would publish it for: one command in place of six.
    if isinstance(backend, RedisBackend):
        backend.client.set(name, packed, ex=backend.expires or None)
    else:
        backend.set(name, packed)
    result._set_cache(backend.meta_from_decoded(backend.decode_result(packed)))
