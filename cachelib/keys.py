"""The only place in this package that spells the names of Redis keys. Pure.

Form: ``petiole:1:<kind>:{<name>}[:<part>]``. The ``1`` is the version of the layout, so that old and new
workers can run beside each other during a deploy. The braces put all parts of one thing into one Cluster
slot; text from users is escaped so that it cannot close them.
"""

import re
from collections.abc import Sequence

LAYOUT = "petiole:1"

LONGEST_NAME_BYTES = 1_024  # a key is stored with every entry and sent with every call

_ESCAPED = {ord(c): f"%{ord(c):02X}" for c in "%{}\x7f"} | {code: f"%{code:02X}" for code in range(0x20)}
_ESCAPED_WITH_COLON = _ESCAPED | {ord(":"): "%3A"}
_HEX = re.compile("%([0-9A-F]{2})")
_GLOB_SPECIAL = re.compile(r"([*?\[\]\\^])")


_NEEDS_ESCAPING = re.compile("[%{}\x00-\x1f\x7f]").search  # ten times as fast as to escape what needs none


def _checked(text: str, what: str) -> str:
    if type(text) is not str:
        if not isinstance(text, str):
            raise TypeError(f"{what} must be text, not {type(text).__name__}: {text!r}")
        text = str.__str__(text)  # of a text that is an enum too, what it equals, not what it is called
    if not text:
        raise ValueError(f"{what} must not be empty")
    if len(text) <= LONGEST_NAME_BYTES and text.isascii():
        return text
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} {text!r} is not valid Unicode: {error.reason}") from None
    if size > LONGEST_NAME_BYTES:
        raise ValueError(f"{what} has {size} bytes, more than {LONGEST_NAME_BYTES}: {text[:60]!r}...; hash it first")
    return text


def escaped(text: str, what: str = "key") -> str:
    """User text as it may stand between the braces of a key."""
    checked = _checked(text, what)
    return checked.translate(_ESCAPED) if _NEEDS_ESCAPING(checked) else checked


def escaped_name(text: str, what: str = "name") -> str:
    """User text that is followed by more: the colon is escaped too, so that no two names meet."""
    return _checked(text, what).translate(_ESCAPED_WITH_COLON)


def unescaped(text: str) -> str:
    """What ``escaped`` was given."""
    return _HEX.sub(lambda found: chr(int(found[1], 16)), text)


class CacheKeys:
    """The keys of one cache namespace."""

    __slots__ = ("_parts", "_popular", "entry_prefix", "namespace", "sequence", "tag_prefix", "whole")

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        name = escaped_name(namespace, "namespace")
        self.entry_prefix = f"{_ENTRY}{{{name}:"
        """What the names of all entries begin with."""
        self.tag_prefix = f"{LAYOUT}:tag:{{{name}:"
        """What the names of all versions of tags begin with."""
        self.whole = f"{self.tag_prefix}}}"
        """The version of the namespace itself: that of the tag without a name, which every entry has."""
        self.sequence = f"{LAYOUT}:sequence:{{{name}}}"
        """The number of the last invalidation of a tag in this namespace."""
        self._parts = f":{{{name}:"
        self._popular = f"{LAYOUT}:popular:{{{name}:"

    def entry(self, key: str) -> str:
        """The entry itself; see ``entry.py``."""
        return f"{self.entry_prefix}{escaped(key)}}}"

    def tag(self, tag: str) -> str:
        """The version of a tag: opaque text. A missing one makes every entry that names the tag invalid."""
        return f"{self.tag_prefix}{escaped(tag, 'tag')}}}"

    def popular(self, function: str) -> str:
        """How often each call of a warmed function was asked for: a sorted set of calls."""
        return f"{self._popular}{escaped(function, 'function')}}}"

    def matching(self, pattern: str) -> str:
        """A pattern for SCAN. ``*``, ``?`` and ``[...]`` in ``pattern`` match; the namespace is literal.

        It finds the entries and their leases: a lease that is left behind would let a load that began before the
        deletion put its value back. It finds other kinds too, which ``entry_of`` tells apart.
        """
        return f"{LAYOUT}:*{_literal(self._parts)}{escaped(pattern, 'pattern')}}}"


def _literal(text: str) -> str:
    return _GLOB_SPECIAL.sub(r"\\\1", text)


_ENTRY = f"{LAYOUT}:cache:"
_LEASE = f"{LAYOUT}:lease:"
_WAKE = f"{LAYOUT}:wake:"


def lease(entry: str) -> str:
    """Who may fill this entry, and how many wait for that: a hash, while the load runs.

    A kind of its own, and not a part of the entry: near caches are told of every change below an entry's prefix.
    """
    return f"{_LEASE}{entry[len(_ENTRY) :]}"


def wake(entry: str, token: str) -> str:
    """A list on which those who wait for one load of this entry, told by its lease's token, are woken."""
    return f"{_WAKE}{entry[len(_ENTRY) :]}:{token}"


def entry_of(name: str) -> str | None:
    """The entry that a key is, or is the lease of. None for other kinds."""
    for prefix in (_ENTRY, _LEASE):
        if name.startswith(prefix):
            return f"{_ENTRY}{name[len(prefix) :]}"
    return None


def counters(kind: str, name: str) -> str:
    """A hash of counters that all processes share."""
    return f"{LAYOUT}:counters:{{{escaped_name(kind, 'kind')}:{escaped(name, 'name')}}}"


def stream(buffer: str, partition: int, partitions: int) -> str:
    """One partition of a write-behind buffer: a stream. It has no TTL, because it holds unflushed writes."""
    return f"{LAYOUT}:buffer:{{{escaped_name(buffer, 'buffer')}:{partition}/{partitions}}}"


def streams(buffer: str, partitions: int) -> Sequence[str]:
    """All partitions of a buffer, in order."""
    return [stream(buffer, partition, partitions) for partition in range(partitions)]


def partition_counts(buffer: str) -> str:
    """With how many partitions processes put rows into a buffer: a set of numbers."""
    return f"{LAYOUT}:partitions:{{{escaped(buffer, 'buffer')}}}"
