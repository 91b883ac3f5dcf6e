"""Lua scripts as typed callables: one file per atomic operation, called by the names in its header.

A file opens with what it does and then states its contract::

    -- KEYS: entry, lease, tags...
    -- ARGV: token, lease_ms
    -- RETURNS: ...

A list that ends in a comma goes on in the next line. The loader reads the names; a call that does not fit them fails
before anything is sent. A name that ends in ``...`` takes a sequence; several such names take sequences of equal
length, except ``tags...`` where ARGV names ``tag_count``, which the loader fills in. ``-- USES: _versions`` puts the
text of ``_versions.lua`` before the script's. EVALSHA first; a server that does not know the script (a restart, a
failover, SCRIPT FLUSH) is sent its text.
"""

import re
from collections.abc import Callable, Sequence
from enum import Enum
from hashlib import sha1
from importlib.resources import files
from threading import Lock
from typing import Any, Final, Generic, TypeVar
from weakref import WeakSet

import redis
from redis.exceptions import NoScriptError

T = TypeVar("T")
Argument = str | bytes | int

_USES = re.compile(r"^-- USES: (\w+)$", re.MULTILINE)
_HEADER = re.compile(r"^-- (KEYS|ARGV):[ ]*(.*(?:(?<=,)\n-- .*)*)$", re.MULTILINE)


class Script(Generic[T]):
    """One atomic operation. ``script(client, entry=..., tags=[...], token=...)`` returns what ``decode`` reads."""

    def __init__(self, name: str, text: str, decode: Callable[[Any], T]) -> None:
        self.name = name
        self.decode = decode
        self.text = self.written = text
        self.sha = _sha(text)
        header = dict(_HEADER.findall(text))
        if set(header) != {"KEYS", "ARGV"}:
            raise ValueError(f"{name}.lua does not open with its KEYS and ARGV")
        self.keys = _names(header["KEYS"])
        self.arguments = _names(header["ARGV"])
        counted = {name.removesuffix("_count") + "s" for name, _ in self.arguments if name.endswith("_count")}
        self._counted = tuple(counted)
        self._uncounted = [name for name, many in (*self.keys, *self.arguments) if many and name not in counted]
        self._names = frozenset(
            name for name, _ in (*self.keys, *self.arguments) if name.removesuffix("_count") + "s" not in counted
        )
        _texts.add(self)

    def __repr__(self) -> str:
        return f"<Script {self.name}({', '.join(sorted(self._names))})>"

    def __call__(self, client: "redis.Redis", **values: Argument | Sequence[Argument]) -> T:
        request = self.request(values)
        try:
            reply = client.execute_command("EVALSHA", self.sha, *request)
        except NoScriptError:
            reply = client.execute_command("EVAL", self.text, *request)
        return self.decode(reply)

    def prepared(self, **values: "Argument | Hole | Sequence[Argument | Hole]") -> "Prepared[T]":
        """The same script for a path where microseconds count: all is packed beforehand, except what is a ``HOLE``."""
        return Prepared(self, values)

    def request(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """What follows the script in EVALSHA: the number of keys, the keys, the arguments."""
        if values.keys() != self._names:
            wrong = sorted(values.keys() ^ self._names)
            raise TypeError(f"{self.name}.lua takes {sorted(self._names)}; missing or unknown: {wrong}")
        for name in self._counted:
            values[f"{name[:-1]}_count"] = len(values[name])
        if len(self._uncounted) > 1 and len({len(values[name]) for name in self._uncounted}) > 1:
            raise ValueError(f"{', '.join(self._uncounted)} must be equally long")
        keys = _flattened(self.keys, values)
        return (len(keys), *keys, *_flattened(self.arguments, values))


class Hole(Enum):
    """The type of ``HOLE``."""

    HOLE = "HOLE"


HOLE: Final = Hole.HOLE
"""Stands for what differs from call to call."""


class Prepared(Generic[T]):
    """A script that is packed but for a few arguments. ``prepared(client, first, second)`` fills the holes in order."""

    def __init__(self, script: Script[T], values: dict[str, Any]) -> None:
        self._script = script
        self._request = script.request(values)
        self._decode: Callable[[Any], T] = script.decode
        self._pack()

    def _pack(self) -> None:
        sha = self._script.sha
        command = [b"EVALSHA", sha, *self._request]
        parts = [b"*%d\r\n" % len(command)]
        for argument in command:
            if argument is HOLE:
                parts.append(b"$%d\r\n%b\r\n")
            else:
                raw = argument if isinstance(argument, bytes) else str(argument).encode()
                parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw.replace(b"%", b"%%")))
        self._template, self._sha = b"".join(parts), sha

    def __repr__(self) -> str:
        return f"<Prepared {self._script.name}>"

    def __call__(self, client: "redis.Redis", *holes: bytes) -> T:
        if self._sha is not self._script.sha:  # its text was rewritten
            self._pack()
        if len(holes) == 1:
            sized: tuple[Any, ...] = (len(holes[0]), holes[0])
        else:
            sized = tuple([part for hole in holes for part in (len(hole), hole)])
        try:
            execute_packed = client.execute_packed  # type: ignore[attr-defined]
        except AttributeError:  # a cluster's, which must see the keys
            reply = self._unpacked(client, holes)
        else:
            try:
                reply = execute_packed(self._template % sized)
            except NoScriptError:
                reply = client.execute_command("EVAL", self._script.text, *self._filled(holes))
        return reply if self._decode is list else self._decode(reply)

    def _filled(self, holes: tuple[bytes, ...]) -> list[Any]:
        left = iter(holes)
        return [next(left) if argument is HOLE else argument for argument in self._request]

    def _unpacked(self, client: "redis.Redis", holes: tuple[bytes, ...]) -> Any:
        request = self._filled(holes)
        try:
            return client.execute_command("EVALSHA", self._script.sha, *request)
        except NoScriptError:
            return client.execute_command("EVAL", self._script.text, *request)


class _Texts:
    """All scripts of this process, and how their texts are rewritten at the moment."""

    def __init__(self) -> None:
        self._scripts: WeakSet[Script[Any]] = WeakSet()
        self._change: Callable[[str], str] | None = None
        self._lock = Lock()

    def add(self, script: Script[Any]) -> None:
        with self._lock:
            self._scripts.add(script)
            if self._change is not None:
                self._apply(script)

    def rewrite(self, change: Callable[[str], str] | None) -> None:
        with self._lock:
            self._change = change
            for script in self._scripts:
                self._apply(script)

    def _apply(self, script: Script[Any]) -> None:
        script.text = script.written if self._change is None else self._change(script.written)
        script.sha = _sha(script.text)


_texts = _Texts()


def rewrite(change: Callable[[str], str] | None) -> None:
    """Rewrite the texts of all scripts of this process, also of those that are yet to be loaded. For tests.

    Arguments:
        change: makes the new text of the one that was written; None puts those back.
    """
    _texts.rewrite(change)


def load(package: str, name: str, decode: Callable[[Any], T]) -> Script[T]:
    """The script ``lua/<name>.lua`` of a package."""
    folder = files(package).joinpath("lua")
    text = folder.joinpath(f"{name}.lua").read_text("utf-8")
    shared = [folder.joinpath(f"{used}.lua").read_text("utf-8") for used in _USES.findall(text)]
    return Script(name, "\n".join([*shared, text]), decode)


def _sha(text: str) -> str:
    return sha1(text.encode(), usedforsecurity=False).hexdigest()


def _names(line: str) -> tuple[tuple[str, bool], ...]:
    names = [part.strip() for part in line.replace("\n--", "").split(",") if part.strip() not in ("", "none")]
    return tuple((name.removesuffix("..."), name.endswith("...")) for name in names)


def _flattened(names: tuple[tuple[str, bool], ...], values: dict[str, Any]) -> list[Argument]:
    flat: list[Argument] = []
    for name, many in names:
        if many:
            flat.extend(values[name])
        else:
            flat.append(values[name])
    return flat
