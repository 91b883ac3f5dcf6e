"""A parked task as a message: what is written down of it, and how it is sent again.

It keeps its id, its place in a chain, group or chord, its retries, its time limits and its queue. The record is JSON,
whatever the task's serializer is: nothing that comes out of Redis is unpickled.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from celery import Celery, Task
from kombu.utils import json as kombu_json

from .parking import LARGEST_RECORD_BYTES, Woken

_to_json: Callable[[Any], str] = kombu_json.dumps  # which are not typed
_from_json: Callable[[bytes], Any] = kombu_json.loads

HEADER = "petiole"
"""The message header of ours: a mapping. ``generation``: of the parking that the message was sent from."""

_ADDRESS = ("queue", "exchange", "routing_key", "priority")
_LONG_AGO = "2000-01-01T00:00:00+00:00"


def generation_of(request: Any) -> int:
    """Of the parking from which a delivery was woken; 0 for any other."""
    found = header_of(request).get("generation", 0)
    return found if type(found) is int and found > 0 else 0


def header_of(request: Any) -> dict[str, Any]:
    """What our header says; empty when there is none."""
    found = (request.headers or {}).get(HEADER)
    return found if isinstance(found, dict) else {}


def record_of(task: Task, arguments: Any, keywords: Any) -> bytes:
    """What is written down of the running delivery of a task.

    Raises ``TypeError`` where JSON does not carry the arguments, and ``ValueError`` where they are too large.
    """
    options = dict(task.signature_from_request(task.request, arguments, keywords).options)
    headers = {name: value for name, value in (options.pop("headers", None) or {}).items() if name != HEADER}
    followed = {key: value for key, value in header_of(task.request).items() if key != "generation"}
    for unwanted in ("redelivered", "consumer_tag", "delivery_tag"):
        options.pop(unwanted, None)
    record = _to_json(
        {
            "task": task.name,
            "args": list(arguments),
            "kwargs": dict(keywords),
            "options": {name: value for name, value in options.items() if value is not None},
            "headers": {**headers, HEADER: followed},
        }
    ).encode()
    if len(record) > LARGEST_RECORD_BYTES:
        raise ValueError(f"{task.name}: a call of {len(record)} bytes is too large to be parked; pass a reference")
    return bytes(record)


def expires_in_us(request: Any) -> int:
    """In what time a delivery expires; 0: never."""
    expires = request.expires
    if not expires:
        return 0
    try:
        at = expires if isinstance(expires, datetime) else datetime.fromisoformat(expires)
    except (TypeError, ValueError):
        return 0
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max(1, int((at - datetime.now(UTC)).total_seconds() * 1_000_000))


def send(app: Celery, producer: Any, woken: Woken, *, revoked: bool) -> None:
    """Send a woken task. Raises what the broker's transport raises, and ``ValueError`` for a record that is none.

    Arguments:
        revoked: send it as one that has expired: whichever worker takes it marks it as revoked, with all that follows.
    """
    read = _from_json(woken.record)
    if not isinstance(read, dict) or not isinstance(read.get("task"), str):
        raise ValueError(f"the record of {woken.id} is none")
    name, arguments, keywords = read["task"], read["args"], read["kwargs"]
    options = dict(read["options"])
    address = {name: options.pop(name) for name in _ADDRESS if name in options}
    headers = dict(read["headers"])
    headers[HEADER] = {**headers.get(HEADER, {}), "generation": woken.generation}
    if revoked:
        options["expires"] = _LONG_AGO
    options.setdefault("task_id", woken.id)
    message = app.amqp.create_task_message(
        options.pop("task_id"),
        name,
        arguments,
        keywords,
        callbacks=_signatures(app, options.pop("link", None)),
        errbacks=_signatures(app, options.pop("link_error", None)),
        **options,
    )
    routed = app.amqp.router.route(address, name, arguments, keywords)
    app.amqp.send_task_message(producer, name, message, headers=headers, serializer="json", **routed)


def _signatures(app: Celery, links: Any) -> Any:
    if not links:
        return None
    return [app.signature(link) for link in (links if isinstance(links, list) else [links])]


def shown(record: bytes) -> dict[str, Any]:
    """A record for people."""
    found = json.loads(record)
    return found if isinstance(found, dict) else {}
