"""The key of a task's call: the same wherever it is computed, and however the call travelled. Pure.

A call is made directly, or goes through a broker, which changes it: a tuple arrives as a list, a number that was a key
as text, a model as a dict. So a key is made of what *would arrive*, as kombu's JSON has it: the same for who sends,
for the worker that runs, and for who peeks or invalidates. What JSON tells apart is told apart: ``1``, ``True``,
``1.0`` and ``"1"`` are four calls. What it does not carry at all (a set, an enum) cannot have been changed by it, and
is told apart by its type and value.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from hashlib import blake2b
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints
from uuid import UUID

import msgspec
from kombu.utils import json

from ..cachelib.templates import Template, key_template, signature_of
from .gates import bound_to

_OF_A_TYPE = 1  # code of the MessagePack extension that holds what is told by its type's name too
_LONGEST_TEXT_BYTES = 512  # of a filled template; a longer one is digested, so that a key always fits
_to_json: Callable[[Any], str] = json.dumps  # which are not typed
_from_json: Callable[[str], Any] = json.loads
_encode = msgspec.msgpack.Encoder(order="sorted").encode


class Call(NamedTuple):
    """One call of a task."""

    key: str
    tags: tuple[str, ...]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


class MemoKeys:
    """Turns calls of a task into keys and tags.

    Arguments:
        function: the function of the task.
        bound: whether its first argument is the task itself.
        key: a template such as ``"{region}"``; None: all arguments.
        tags: templates.
        version: part of every key.
        what: what the key is called in messages.
        restores_models: whether arguments that are annotated as pydantic models reach the function as such.

    Raises ``ValueError`` for a template that names what is no argument, and for a key that is the bare name of one.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        bound: bool,
        key: str | None,
        tags: Sequence[str],
        version: str,
        what: str = "",
        restores_models: bool = False,
    ) -> None:
        self._signature = signature_of(function, without_first=bound)
        named = function.__qualname__.rpartition("<locals>.")[2]
        self._key = None if key is None else key_template(key, self._signature, what or f"key= of {named}")
        self._tags = [Template(tag, self._signature, f"tags= of {named}") for tag in tags]
        self._version = f"@{version}" if version else ""
        self._models = _models_of(function) if restores_models else {}

    @property
    def text(self) -> str:
        """What a person sees of it."""
        return self._key.text if self._key else "(all arguments)"

    def call(self, task: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Call:
        """One call of the task of a name.

        Raises ``TypeError`` for arguments that the function does not take, or that cannot be told from others.
        """
        values = bound_to(self._signature, task, arguments, keywords)
        for name, model in self._models.items():
            if isinstance(values.get(name), Mapping):
                values[name] = _restored(model, values[name])
        try:
            if self._key is None:
                text = blake2b(_encode(_listed(task, values)), digest_size=16).hexdigest()
            else:
                text = _short(self._filled(task, self._key, values))
            tags = tuple([self._filled(task, tag, values) for tag in self._tags])
        except RecursionError:
            raise TypeError(f"the arguments of {task} are nested too deeply to make a key of them") from None
        return Call(f"{task}{self._version}:{text}", tags, tuple(arguments), keywords)

    @staticmethod
    def _filled(task: str, template: Template, values: Mapping[str, Any]) -> str:
        try:
            return template.text.format(**{name: arriving(value) for name, value in values.items()})
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise TypeError(f"{template.text!r} cannot be filled from this call of {task}: {error}") from None


def arriving(value: Any) -> Any:
    """A value as a message brings it, for a template. What no message carries stays as it is."""
    if isinstance(value, list | tuple):
        return [arriving(item) for item in value]
    if isinstance(value, dict):
        return {_key_text(key): arriving(item) for key, item in value.items()}
    return _scalar(value)


def canonical(value: Any) -> Any:
    """A value as something that MessagePack tells from every other. Raises ``TypeError`` for what has no such form."""
    value = _scalar(value)
    kind = type(value)
    if kind is int:
        return value if -(2**63) <= value < 2**64 else _of_type(int, str(value))
    if kind is float:
        return value if math.isfinite(value) else _of_type(float, repr(value))
    if value is None or kind in (bool, str, bytes):
        return value
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, dict):
        items = {_key_text(key): canonical(item) for key, item in value.items()}
        if len(items) != len(value):
            raise TypeError("two keys of a dict are the same text in a message")
        return items
    return _canonical_object(value)


def _canonical_object(value: Any) -> Any:
    kind = type(value)
    if hasattr(kind, "model_dump"):
        return canonical(value.model_dump(mode="json"))
    if hasattr(kind, "__json__"):
        return canonical(value.__json__())
    for known in (datetime, date, time):
        if isinstance(value, known):
            return _of_type(known, value.isoformat())
    if isinstance(value, Decimal):
        return _of_type(Decimal, str(value))
    if isinstance(value, UUID):
        return _of_type(UUID, value.hex)
    if isinstance(value, timedelta):
        return _of_type(timedelta, [value.days, value.seconds, value.microseconds])
    if isinstance(value, Enum):
        return _of_type(kind, value.name)
    if isinstance(value, set | frozenset):
        return _of_type(kind, sorted(_encode(canonical(item)) for item in value))
    if dataclasses.is_dataclass(value):
        return _of_type(kind, [canonical(getattr(value, one.name)) for one in dataclasses.fields(value)])
    if isinstance(value, msgspec.Struct):
        return _of_type(kind, [canonical(getattr(value, one)) for one in value.__struct_fields__])
    return _as_json_shows_it(value)


def _as_json_shows_it(value: Any) -> Any:
    """A type that somebody has taught kombu. One that comes back as itself is told by its text."""
    try:
        text = _to_json(value)
        back = _from_json(text)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{error}; give a key template that names what tells calls apart") from None
    return _of_type(type(back), text) if type(back) is type(value) else canonical(back)


def _scalar(value: Any) -> Any:
    """Text and numbers of a subclass (an enum's members, too) as the plain ones that arrive."""
    if type(value) in (str, int, float, bool, NoneType):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, float) else value


def _key_text(key: Any) -> str:
    """What JSON makes of a key of a dict."""
    key = _scalar(key)
    if type(key) is str:
        return key
    if key is None or type(key) in (bool, int, float):
        return _to_json(key)
    raise TypeError(f"a {type(key).__name__} is the key of a dict, which no message carries; use text")


def _listed(task: str, values: Mapping[str, Any]) -> dict[str, Any]:
    forms = {}
    for name, value in values.items():
        try:
            forms[name] = canonical(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{task} cannot tell calls apart by {name}, a {type(value).__name__}: {error}") from None
    return forms


def _of_type(kind: type, parts: Any) -> Any:
    return msgspec.msgpack.Ext(_OF_A_TYPE, _encode([kind.__module__, kind.__qualname__, parts]))


def _short(text: str) -> str:
    packed = text.encode()
    return text if len(packed) <= _LONGEST_TEXT_BYTES else blake2b(packed, digest_size=16).hexdigest()


def restoring(function: Callable[..., Any]) -> Callable[[dict[str, Any]], None]:
    """What makes models of those arguments of a call that the function is given as models."""
    models = _models_of(function)

    def restore(values: dict[str, Any]) -> None:
        for name, model in models.items():
            if isinstance(values.get(name), Mapping):
                values[name] = _restored(model, values[name])

    return restore


def _models_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Which arguments are annotated as pydantic models, also as optional ones: those that Celery restores."""
    try:
        hints = get_type_hints(inspect.unwrap(function))
    except Exception:  # noqa: BLE001 - annotations may be any code; Celery leaves such arguments alone too
        return {}
    models = {}
    for name, hint in hints.items():
        kinds = [kind for kind in get_args(hint) if kind is not NoneType] or [hint]
        if name != "return" and len(kinds) == 1 and hasattr(kinds[0], "model_validate"):
            models[name] = kinds[0]
    return models


def _restored(model: Any, value: Mapping[str, Any]) -> Any:
    """The model that the function will be given, with its defaults; what it refuses stays, and fails in the task."""
    try:
        return model.model_validate(value)
    except ValueError:
        return value
