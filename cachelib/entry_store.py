"""What the cache says to Redis, and what it hears: one method per round trip.

Knows keys, scripts and leases, and decides nothing: whether an entry may be served, and what to do when Redis does not
answer, is for ``Cache``. Every method raises redis-py's errors.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from . import keys as key_names
from .connections import Connections
from .scripts import Script, load
from .tokens import Tokens

_SCAN_COUNT = 500  # keys looked at per call: large enough to be quick, small enough that others get their turn
_WAKE_TTL_MS = 10_000  # a wake-up that nobody took is worth nothing after this


class Take(IntEnum):
    """What a look at an entry is to do about its lease. The numbers are those of ``lua/entry_read.lua``."""

    NOTHING = 0
    IF_GONE = 1
    """Take it if there is no entry; the caller will wait if another holds it."""
    ALWAYS = 2
    """Take it although there is an entry; the caller will not wait."""
    OR_WAIT = 3
    """Take it although there is an entry; the caller will wait if another holds it."""


class Look(NamedTuple):
    """What one look at an entry showed."""

    stored: bytes | None
    left_ms: int
    """What is left of its time to live."""
    lease: int
    """1: ours; 0: not asked for; -n: another holds it for n more milliseconds."""
    tag_versions: Mapping[str, str | None]
    """Of the tags that were asked about, as they were at this look: before any load."""
    holder: str
    """The token of the load under way, when another holds the lease."""
    token: str
    """Ours."""


def _look_reply(reply: list[Any]) -> tuple[bytes | None, int, int, list[bytes | None], str]:
    stored, left_ms, lease, versions, holder = reply
    return stored, left_ms, lease, versions, holder.decode("ascii", "replace")


_READ = load(__package__, "entry_read", _look_reply)
_READ_MANY: Script[list[tuple[bytes | None, int]]] = load(__package__, "entries_read", list)
_FILL = load(__package__, "entry_fill", bool)
_SET = load(__package__, "entry_set", int)
_DELETE = load(__package__, "entry_delete", int)
_ADD = load(__package__, "counter_add", int)
_TAGS: Script[list[bytes]] = load(__package__, "tags_read", list)


class EntryStore:
    """The entries of one namespace, in Redis. ``name`` is always the full name of an entry's key.

    Arguments:
        redis: from ``connect``.
        keys: of the namespace.
        lease_ms: how long a lease lasts that nobody renews.
    """

    def __init__(self, redis: Connections, keys: key_names.CacheKeys, lease_ms: int) -> None:
        self._redis = redis
        self._keys = keys
        self._lease_ms = lease_ms
        self._tokens = Tokens()

    def look(self, name: str, tags: Sequence[str], stored_ms: int, take: Take) -> Look:
        """Read an entry and the versions of tags; take its lease where asked.

        Arguments:
            stored_ms: how long the entry will be stored; versions that are made under the lease outlive it.
        """
        token = self._tokens.next()
        stored, left_ms, lease, raws, holder = _READ(
            self._redis.cache,
            entry=name,
            lease=key_names.lease(name),
            tags=[self._keys.tag(tag) for tag in tags],
            take=int(take),
            token=token,
            lease_ms=self._lease_ms,
            tag_ttl_ms=self._lease_ms + stored_ms,
        )
        versions = dict(zip(tags, map(_text, raws), strict=True)) if tags else {}
        return Look(stored, left_ms, lease, versions, holder, token)

    def read_many(self, names: Sequence[str]) -> list[tuple[bytes | None, int]]:
        """Entries, each with what is left of its time to live."""
        return _READ_MANY(self._redis.cache, entries=names)

    def fill(self, name: str, token: str, payload: bytes, ttl_ms: int) -> bool:
        """End a load: store what it gave, give the lease back, wake who waits. False: the lease was voided."""
        return _FILL(
            self._redis.cache,
            entry=name,
            lease=key_names.lease(name),
            wake=key_names.wake(name, token),
            token=token,
            payload=payload,
            ttl_ms=ttl_ms,
            wake_ttl_ms=_WAKE_TTL_MS,
        )

    def give_back(self, name: str, token: str) -> None:
        """End a load that gave nothing."""
        self.fill(name, token, b"", 1)

    def set_many(self, names: Sequence[str], payloads: Sequence[bytes], ttls_ms: Sequence[int]) -> None:
        """Store entries, and void the loads of them."""
        leases = [key_names.lease(name) for name in names]
        _SET(self._redis.cache, entries=names, leases=leases, payloads=payloads, ttls_ms=ttls_ms)

    def add(self, name: str, amount: int, ttl_ms: int) -> int:
        """Add to a counter."""
        return _ADD(self._redis.cache, entry=name, amount=amount, ttl_ms=ttl_ms)

    def delete(self, names: Sequence[str]) -> int:
        """Remove entries, and void the loads of them. Returns how many there were."""
        leases = [key_names.lease(name) for name in names]
        return _DELETE(self._redis.coordination, entries=names, leases=leases)

    def matching(self, pattern: str) -> Iterator[list[str]]:
        """The names of entries that match, or whose parts do, in batches: at least what is there all the time."""
        found: set[str] = set()
        for raw in self._redis.coordination.scan_iter(match=pattern, count=_SCAN_COUNT):
            found.add(key_names.entry_of(raw.decode()))
            if len(found) >= _SCAN_COUNT:
                yield sorted(found)
                found.clear()
        if found:
            yield sorted(found)

    def tag_versions(self, tags: Sequence[str]) -> dict[str, str | None]:
        """The versions of tags as they are; None where there is none."""
        if not tags:
            return {}
        raws: list[bytes | None] = self._redis.cache.execute_command("MGET", *map(self._keys.tag, tags))
        return dict(zip(tags, map(_text, raws), strict=True))

    def make_tag_versions(self, tags: Sequence[str], stored_ms: int) -> dict[str, str]:
        """The versions of tags, made where there are none; they outlive an entry stored for ``stored_ms``."""
        if not tags:
            return {}
        raws = _TAGS(
            self._redis.cache,
            tags=[self._keys.tag(tag) for tag in tags],
            token=self._tokens.next(),
            tag_ttl_ms=self._lease_ms + stored_ms,
        )
        return {tag: raw.decode("utf-8", "replace") for tag, raw in zip(tags, raws, strict=True)}

    def drop_tags(self, tags: Sequence[str]) -> int:
        """Invalidate every entry that names one of the tags. Returns how many tags had a version."""
        return int(self._redis.coordination.unlink(*[self._keys.tag(tag) for tag in tags]))


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode("utf-8", "replace")
