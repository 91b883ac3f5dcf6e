"""Keys and tags made of a call's arguments."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from hashlib import blake2b
from typing import Any, Protocol

import msgspec


class CallName(Protocol):
    """Turns a call into text: the same for the same call, however it is spelled."""

    text: str
    """What a person sees of it."""

    def fill(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> str:
        """The text for one call. Raises ``TypeError`` for arguments that the function does not take."""


def signature_of(function: Callable[..., object], *, without_first: bool = False) -> inspect.Signature:
    """The signature of a function as its caller sees it.

    Arguments:
        without_first: leave out the first argument, which the caller does not give (``self``).
    """
    signature = inspect.signature(function)
    if without_first:
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature


class Template:
    """Text with the arguments of a function in braces, such as ``"user:{user_id}"``.

    Arguments:
        what: whose template it is, for the message.

    Raises ``ValueError`` where it names an argument that the function does not have. What two calls have in
    common in the text they share: ``1`` and ``"1"`` look alike.
    """

    def __init__(self, text: str, signature: inspect.Signature, what: str = "") -> None:
        self.text = text
        self._signature = signature
        known = dict.fromkeys(signature.parameters, _Anything())
        said = f"{what}: {text!r}" if what else repr(text)
        there_are = f"which is no argument here; there are: {', '.join(known) or 'none'}"
        try:
            text.format(**known)
        except KeyError as error:
            raise ValueError(f"{said} names {error}, {there_are}") from None
        except IndexError:
            raise ValueError(f"{said} has braces without a name, {there_are}") from None
        except ValueError as error:
            raise ValueError(
                f"{said} is no template: {error}; write the name of an argument in braces, such as "
                f"'{{{next(iter(known), 'name')}}}', and twice each brace that is meant as text"
            ) from None

    def fill(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> str:
        return self.text.format(**_bound(self._signature, arguments, keywords).arguments)


def key_template(text: str, signature: inspect.Signature, what: str) -> Template:
    """A template that tells calls apart.

    Raises ``ValueError`` as ``Template``, and for the bare name of an argument: all calls would have that as their key.
    """
    if text in signature.parameters:
        raise ValueError(
            f"{what}: {text!r} is the same for all calls; write '{{{text}}}' for the argument of that name"
        )
    return Template(text, signature, what)


class Fingerprint:
    """A digest of all arguments: defaults applied, order and keywords irrelevant, ``1``, ``"1"`` and ``True`` apart.

    Arguments:
        prefix: what the text begins with.
        without: names of arguments that are left out.
        by_type: tell apart what a message would make the same: a tuple and a list, ``Decimal("1")`` and ``"1"``. Not
            for calls that go through a message somewhere, and through none elsewhere.
    """

    def __init__(
        self, signature: inspect.Signature, prefix: str = "", *, without: Sequence[str] = (), by_type: bool = True
    ) -> None:
        self.text = f"{prefix}(all arguments)"
        self._prefix = prefix
        self._signature = signature
        self._without = without
        self._by_type = by_type

    def fill(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> str:
        bound = _bound(self._signature, arguments, keywords).arguments
        for name in self._without:
            bound.pop(name, None)
        try:
            packed = _encode_sorted(_told_apart(bound) if self._by_type else bound)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise TypeError(f"cannot tell calls apart by {bound!r}: {error}; give a key template") from None
        return self._prefix + blake2b(packed, digest_size=16).hexdigest()


_encode_sorted = msgspec.msgpack.Encoder(order="sorted").encode
_BY_ITSELF = (str, int, float, bool, bytes, type(None))
_OF_A_TYPE = 1  # code of the MessagePack extension that holds what is told by its type's name too


def _told_apart(value: Any) -> Any:
    """A value in which everything that MessagePack does not tell apart by itself carries the name of its type."""
    kind = type(value)
    if kind in _BY_ITSELF:
        return value
    if kind is list:
        return [_told_apart(item) for item in value]
    if kind is dict and all(type(key) is str for key in value):
        return {key: _told_apart(item) for key, item in value.items()}
    parts: Any
    if isinstance(value, Mapping):
        parts = sorted(_encode_sorted([_told_apart(key), _told_apart(item)]) for key, item in value.items())
    elif isinstance(value, set | frozenset):
        parts = sorted(_encode_sorted(_told_apart(item)) for item in value)
    elif isinstance(value, list | tuple):
        parts = [_told_apart(item) for item in value]
    elif dataclasses.is_dataclass(value):
        parts = [_told_apart(getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, msgspec.Struct):
        parts = [_told_apart(getattr(value, field)) for field in value.__struct_fields__]
    elif isinstance(value, Enum):
        parts = value.name
    elif hasattr(value, "model_dump"):
        parts = _told_apart(value.model_dump())
    else:
        parts = msgspec.to_builtins(value)
    return msgspec.msgpack.Ext(_OF_A_TYPE, _encode_sorted([kind.__module__, kind.__qualname__, parts]))


def _bound(
    signature: inspect.Signature, arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> inspect.BoundArguments:
    bound = signature.bind(*arguments, **keywords)
    bound.apply_defaults()
    return bound


class _Anything:
    """Stands for any argument while a template is checked."""

    def __getattr__(self, name: str) -> "_Anything":
        return self

    def __getitem__(self, item: object) -> "_Anything":
        return self

    def __format__(self, how: str) -> str:
        return ""

    def __str__(self) -> str:
        return ""

    __repr__ = __str__
