"""Keys and tags made of a call's arguments."""

import inspect
from collections.abc import Callable, Mapping, Sequence
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

    Raises ``ValueError`` where it names an argument that the function does not have. What two calls have in
    common in the text they share: ``1`` and ``"1"`` look alike.
    """

    def __init__(self, text: str, signature: inspect.Signature) -> None:
        self.text = text
        self._signature = signature
        known = dict.fromkeys(signature.parameters, _Anything())
        try:
            text.format(**known)
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"{text!r} names {error}, which is no argument here; there are: {', '.join(known) or 'none'}"
            ) from None

    def fill(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> str:
        return self.text.format(**_bound(self._signature, arguments, keywords).arguments)


class Fingerprint:
    """A digest of all arguments: defaults applied, order and keywords irrelevant, ``1``, ``"1"`` and ``True`` apart."""

    def __init__(self, signature: inspect.Signature, prefix: str = "") -> None:
        self.text = f"{prefix}(all arguments)"
        self._prefix = prefix
        self._signature = signature

    def fill(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> str:
        bound = _bound(self._signature, arguments, keywords).arguments
        try:
            packed = msgspec.msgpack.encode(bound, order="sorted")
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise TypeError(f"cannot tell calls apart by {bound!r}: {error}; give a key template") from None
        return self._prefix + blake2b(packed, digest_size=16).hexdigest()


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
