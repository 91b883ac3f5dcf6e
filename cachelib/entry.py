"""What an entry is, and whether it may be served. Pure: no client, no clock, no chance.

Age is told by Redis's own clock alone: an entry is stored for ``ttl + stale`` and carries its ``stale``
window, so it is fresh exactly while more than that window is left of its time to live. No process ever
compares its own clock with another's.
"""

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import msgspec

FORMAT = 1  # of the envelope; another number is read as a miss, never guessed at


class Envelope(msgspec.Struct, array_like=True, frozen=True):
    """How an entry stands in Redis, as one MessagePack array."""

    format: int
    created_ms: int
    """Wall clock of the writer. For people who look, never for a decision."""
    stale_ms: int
    """How long before it is gone the entry stops being fresh."""
    load_ms: int
    """What the value cost to load."""
    tags: dict[str, str]
    """Version of each tag, as read before the load."""
    value: msgspec.Raw


class Freshness(Enum):
    """What may be done with an entry."""

    FRESH = "fresh"
    STALE = "stale"
    """Past its soft TTL but still stored: serve it, and load a new one."""
    GONE = "gone"
    """Not stored, or one of its tags has been invalidated: never to be served."""


_decode_envelope = msgspec.msgpack.Decoder(Envelope).decode
_decode_value = msgspec.msgpack.Decoder().decode
_encode = msgspec.msgpack.Encoder().encode

_COUNTER_START = frozenset(b"-0123456789")
_COUNTER = re.compile(rb"0|-?[1-9][0-9]{0,18}")
_COUNTER_RANGE = range(-(2**63), 2**63)


class Undecodable(Exception):
    """What Redis holds under a key is not an entry of this format."""


def encode(value: object, *, created_ms: int, stale_ms: int, load_ms: int, tags: Mapping[str, str]) -> bytes:
    """The stored form of a value.

    A whole number without tags and stale window is stored as decimal text, which is what INCRBY reads.
    Everything else is an envelope. An envelope starts with a byte that no decimal text starts with.
    """
    if type(value) is int and not stale_ms and not tags and value in _COUNTER_RANGE:
        return str(value).encode()
    return _encode(Envelope(FORMAT, created_ms, stale_ms, load_ms, dict(tags), msgspec.Raw(_encode(value))))


def decode(stored: bytes) -> tuple[Envelope | None, Any]:
    """The envelope (None for a bare counter) and the value. Raises ``Undecodable``, never anything else."""
    if stored[:1] and stored[0] in _COUNTER_START:
        if _COUNTER.fullmatch(stored) and (number := int(stored)) in _COUNTER_RANGE:
            return None, number
        raise Undecodable("neither a counter nor an envelope")
    try:
        envelope = _decode_envelope(stored)
        if envelope.format != FORMAT:
            raise Undecodable(f"format {envelope.format}, not {FORMAT}")
        return envelope, _decode_value(envelope.value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise Undecodable(str(error)) from None


def judge(envelope: Envelope | None, left_ms: int, tag_versions: Mapping[str, str | None]) -> Freshness:
    """Whether an entry is fresh, stale or gone.

    Arguments:
        envelope: of the entry; None for a bare counter, which has neither tags nor a stale window.
        left_ms: what Redis says is left of its time to live; negative when it has none.
        tag_versions: the versions that the tags have now. A tag that is missing here, or has no version,
            counts as invalidated: an evicted version must never make an old entry valid again.
    """
    if envelope is None:
        return Freshness.FRESH
    for tag, version in envelope.tags.items():
        if tag_versions.get(tag) != version:
            return Freshness.GONE
    if 0 <= left_ms <= envelope.stale_ms and envelope.stale_ms:
        return Freshness.STALE
    return Freshness.FRESH


def fresh_left_ms(envelope: Envelope | None, left_ms: int) -> int:
    """How much longer an entry stays fresh; 0 when it no longer is."""
    return max(0, left_ms - (envelope.stale_ms if envelope else 0))


def jittered(ttl_ms: int, chance: float) -> int:
    """A TTL shortened by up to a tenth, so that what was written together does not expire together.

    ``chance`` is uniform in [0, 1). Never longer than asked for: a TTL is an upper bound on staleness.
    """
    return max(1, ttl_ms - int(ttl_ms * 0.1 * chance))


def missing_tags(wanted: Sequence[str], envelope: Envelope | None) -> list[str]:
    """The tags of an entry whose versions have not been asked for."""
    return [tag for tag in envelope.tags if tag not in wanted] if envelope else []
