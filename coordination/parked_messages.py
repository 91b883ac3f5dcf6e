"""A parked task as a message: what is written down of it, and how it is sent again.

It keeps its id, its place in a chain, group or chord, its retries, its time limits and its queue. The record is JSON,
whatever the task's serializer is: nothing that comes out of Redis is unpickled.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from types import NoneType
from typing import Any

from celery import Celery, Task
from kombu import entity
from kombu.exceptions import DecodeError, EncodeError, SerializerNotInstalled
from kombu.serialization import registry
from kombu.utils import json as kombu_json

from .parking import LARGEST_RECORD_BYTES, Attempt, Woken

_to_json: Callable[[Any], str] = kombu_json.dumps  # which are not typed
_from_json: Callable[[bytes], Any] = kombu_json.loads
_serializers: Any = registry
_entity: Any = entity

WOKEN = ".woken"
"""What the names of queues end in from which woken tasks are taken."""
HEADER = "petiole"
"""The message header of ours: a mapping. ``generation``: of the parking that the message was sent from, and ``of``
which attempt that was; ``follows``: the id of the call with whose result it may end."""

_ADDRESS = ("queue", "exchange", "routing_key", "priority")
_LONG_AGO = "2000-01-01T00:00:00+00:00"


def generation_of(request: Any) -> int:
    """Of the parking from which a delivery was woken; 0 for any other."""
    header = header_of(request)
    found = header.get("generation", 0)
    if type(found) is not int or found < 1 or header.get("of") != Attempt(request.id, request.retries or 0).token:
        return 0  # a retry carries the header of the delivery that it retries
    return found


def forget_generation(request: Any) -> None:
    """The running delivery was admitted: what is sent with its headers is no message from that parking."""
    if "generation" in header_of(request):
        request.headers = {**request.headers, HEADER: _lasting(request)}


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
    for unwanted in ("redelivered", "consumer_tag", "delivery_tag"):
        options.pop(unwanted, None)
    record = _to_json(
        {
            "task": task.name,
            "args": list(arguments),
            "kwargs": dict(keywords),
            "options": {name: value for name, value in options.items() if value is not None} | _hidden(task.request),
            "headers": {**headers, HEADER: _lasting(task.request)},
        }
    ).encode()
    if not all(map(_plain, (*arguments, *keywords.values()))):
        back = _from_json(record)
        if not (_same(list(arguments), back["args"]) and _same(dict(keywords), back["kwargs"])):
            raise TypeError(f"{task.name}: the arguments of a call would come back from JSON as others")
    if len(record) > LARGEST_RECORD_BYTES:
        raise ValueError(f"{task.name}: a call of {len(record)} bytes is too large to be parked; pass a reference")
    return bytes(record)


def serializer_of(task: Task, arguments: Any, keywords: Any) -> str | None:
    """One that carries the arguments of a delivery, which does not say how it was written; None: the default."""
    sent = [list(arguments), dict(keywords)]
    accepted = [_serializers.type_to_name.get(name, name) for name in task.app.conf.accept_content]
    for name in dict.fromkeys([task.serializer or task.app.conf.task_serializer, *accepted]):
        try:
            content_type, encoding, data = _serializers.dumps(sent, name)
            if _same(sent, _serializers.loads(data, content_type, encoding, accept=[content_type])):
                return str(name)
        except (SerializerNotInstalled, EncodeError, DecodeError):
            continue
    return None


def _hidden(request: Any) -> dict[str, str]:
    """How the arguments are shown, which may be chosen so that secrets are not."""
    shown = {name: getattr(request, name, None) for name in ("argsrepr", "kwargsrepr")}
    return {name: text for name, text in shown.items() if isinstance(text, str)}


def _lasting(request: Any) -> dict[str, Any]:
    """Our header, without what is said of one parking."""
    return {key: value for key, value in header_of(request).items() if key not in ("generation", "of")}


def _plain(value: Any) -> bool:
    """Whether JSON brings a value back as it was, for sure."""
    kind = type(value)
    if kind is list:
        return all(map(_plain, value))
    if kind is dict:
        return "__type__" not in value and all(type(key) is str and _plain(item) for key, item in value.items())
    return kind in (str, int, float, bool, NoneType)


def _same(value: Any, back: Any) -> bool:
    if type(value) is not type(back):
        return False
    if isinstance(value, list):
        return len(value) == len(back) and all(map(_same, value, back))
    if isinstance(value, dict):
        return value.keys() == back.keys() and all(_same(item, back[key]) for key, item in value.items())
    return bool(value == back)


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


def task_of(woken: Woken) -> str:
    """The name of a woken task. Raises ``ValueError`` for a record that is none."""
    return str(_read(woken)["task"])


def send(app: Celery, producer: Any, woken: Woken, *, revoked: bool) -> None:
    """Send a woken task. Raises what the broker's transport raises, and ``ValueError`` for a record that is none.

    Arguments:
        revoked: send it as one that has expired: whichever worker takes it marks it as revoked, with all that follows.
    """
    read = _read(woken)
    name, arguments, keywords = read["task"], read["args"], read["kwargs"]
    options = dict(read["options"])
    address = {name: options.pop(name) for name in _ADDRESS if name in options}
    headers = dict(read["headers"])
    headers[HEADER] = {**headers.get(HEADER, {}), "generation": woken.generation, "of": woken.token}
    if revoked:
        options["expires"] = _LONG_AGO
    options.setdefault("task_id", woken.id)
    accepted = [_serializers.type_to_name.get(name, name) for name in app.conf.accept_content]
    serializer = "json" if "json" in accepted else app.conf.task_serializer
    message = app.amqp.create_task_message(
        options.pop("task_id"),
        name,
        arguments,
        keywords,
        callbacks=_signatures(app, options.pop("link", None)),
        errbacks=_signatures(app, options.pop("link_error", None)),
        **options,
    )
    routed = app.amqp.router.route(_place(address, woken), name, arguments, keywords)
    app.amqp.send_task_message(producer, name, message, headers=headers, serializer=serializer, **routed)


def woken_queue(queue: str) -> Any:
    """Where what was parked by those who take from a queue comes back to them: not behind all that lies there."""
    name = f"{queue}{WOKEN}"
    return _entity.Queue(name, _entity.Exchange(name, type="direct"), routing_key=name)


def restore_address(request: Any) -> None:
    """Make a woken delivery look as if it had come from where it came first: a retry of it goes there."""
    address = getattr(request, "delivery_info", None) or {}
    key = address.get("routing_key")
    if isinstance(key, str) and key.endswith(WOKEN):
        request.delivery_info = {**address, "exchange": "", "routing_key": key.removesuffix(WOKEN)}


def _place(address: dict[str, Any], woken: Woken) -> dict[str, Any]:
    """Where a woken task goes. One that was lost before goes where it came from: perhaps nobody takes from ours."""
    queue = address.get("queue")
    if woken.again or not isinstance(queue, str) or queue.endswith(WOKEN):
        return address
    return {**address, "queue": woken_queue(queue)}


def _read(woken: Woken) -> dict[str, Any]:
    read = _from_json(woken.record)
    if not isinstance(read, dict) or not isinstance(read.get("task"), str):
        raise ValueError(f"the record of {woken.id} is none")
    return read


def _signatures(app: Celery, links: Any) -> Any:
    if not links:
        return None
    return [app.signature(link) for link in (links if isinstance(links, list) else [links])]
