"""Lua scripts as typed callables: one file per atomic operation, called by the names in its header.

A file opens with what it does and then states its contract::

    -- KEYS: entry, lease, tags...
    -- ARGV: token, lease_ms
    -- RETURNS: ...

The loader reads the names; a call that does not fit them fails before anything is sent. A name that ends in
``...`` takes a sequence; several such names in one line take sequences of equal length. EVALSHA first; a
server that does not know the script (a restart, a failover, SCRIPT FLUSH) is sent its text.
"""

import re
from collections.abc import Callable, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any, Generic, TypeVar

import redis
from redis.exceptions import NoScriptError

T = TypeVar("T")
Argument = str | bytes | int

_HEADER = re.compile(r"^-- (KEYS|ARGV):[ ]*(.*)$", re.MULTILINE)


class Script(Generic[T]):
    """One atomic operation. ``script(client, entry=..., tags=[...], token=...)`` returns what ``decode`` reads."""

    def __init__(self, name: str, text: str, decode: Callable[[Any], T]) -> None:
        self.name = name
        self.text = text
        self.decode = decode
        self.sha = sha1(text.encode(), usedforsecurity=False).hexdigest()
        header = dict(_HEADER.findall(text))
        if set(header) != {"KEYS", "ARGV"}:
            raise ValueError(f"{name}.lua does not open with its KEYS and ARGV")
        self.keys = _names(header["KEYS"])
        self.arguments = _names(header["ARGV"])
        self._names = frozenset(name for name, _ in (*self.keys, *self.arguments))

    def __repr__(self) -> str:
        return f"<Script {self.name}({', '.join(sorted(self._names))})>"

    def __call__(self, client: "redis.Redis", **values: Argument | Sequence[Argument]) -> T:
        if values.keys() != self._names:
            wrong = sorted(values.keys() ^ self._names)
            raise TypeError(f"{self.name}.lua takes {sorted(self._names)}; missing or unknown: {wrong}")
        keys = _flattened(self.keys, values)
        request = (len(keys), *keys, *_flattened(self.arguments, values))
        try:
            reply = client.execute_command("EVALSHA", self.sha, *request)
        except NoScriptError:
            reply = client.execute_command("EVAL", self.text, *request)
        return self.decode(reply)


def load(package: str, name: str, decode: Callable[[Any], T]) -> Script[T]:
    """The script ``lua/<name>.lua`` of a package."""
    text = files(package).joinpath("lua", f"{name}.lua").read_text("utf-8")
    return Script(name, text, decode)


def _names(line: str) -> tuple[tuple[str, bool], ...]:
    names = [part.strip() for part in line.split(",") if part.strip() not in ("", "none")]
    return tuple((name.removesuffix("..."), name.endswith("...")) for name in names)


def _flattened(names: tuple[tuple[str, bool], ...], values: dict[str, Any]) -> list[Argument]:
    flat: list[Argument] = []
    length = None
    for name, many in names:
        value = values[name]
        if not many:
            flat.append(value)
            continue
        if length is not None and len(value) != length:
            raise ValueError(f"{', '.join(name for name, many in names if many)} must be equally long")
        length = len(value)
        flat.extend(value)
    return flat
