"""What the cache says to Redis, and what it hears: one method per operation, one script call wherever keys may meet.

Knows keys, scripts and leases, and decides nothing: whether an entry may be served, and what to do when Redis does not
answer, is for others. Every method raises redis-py's errors.

On a single server one script sees entries, leases and tags together. On a Cluster an entry and its lease share a slot,
and each tag has its own; then the tags are asked for apart, in the order that keeps the promises: the number of the
last invalidation and the versions *before* a load begins, the versions again before the value is stored under them. A
tag that is invalidated between that and the SET leaves an entry with an old version, which is an invalid one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from . import keys as key_names
from .connections import Connections
from .entry import WHOLE, Entry, invalidated_since
from .scripts import HOLE, Prepared, Script, load
from .tokens import Tokens

if TYPE_CHECKING:
    import redis

_SCAN_COUNT = 500  # keys looked at per call: large enough to be quick, small enough that others get their turn
_WAKE_TTL_MS = 10_000  # a wake-up that nobody took is worth nothing after this
_VERSION_TTL_MS = 3_600_000  # of the versions of tags, at least: longer than any load that is not lost


ANYTHING: Final = "*"
NOTHING: Final = ""
"""What a conditional write expects, where it is no token of an entry."""


class Take(IntEnum):
    """What a look at an entry is to do about its lease. The numbers are those of ``lua/entries_look.lua``."""

    IF_GONE = 1
    """Take it if there is no entry; the caller will wait if another holds it."""
    ALWAYS = 2
    """Take it although there is an entry; the caller will not wait."""
    OR_WAIT = 3
    """Take it although there is an entry; the caller will wait if another holds it."""
    GO_ON = 4
    """Go on with a lease that was taken before."""


class Look(NamedTuple):
    """What one look at an entry showed."""

    stored: bytes | None
    left_ms: int
    """What is left of its time to live."""
    versions: Mapping[str, bytes | None]
    """Of the namespace and of the tags that were asked about, as they were at this look: before any load."""
    lease: int = 0
    """1: ours; 0: not asked for; -n: another holds it for n more milliseconds."""
    holder: str = ""
    """The token of the load under way, when another holds the lease."""
    token: str = ""
    """Ours."""
    since: bytes = b""
    """The number of the last invalidation of a tag, when the lease is ours."""


@dataclass(frozen=True, slots=True)
class Write:
    """Bodies to be stored, all with the same tags."""

    bodies: Mapping[str, bytes]
    """By the name of the entry. An empty one ends a load that gave nothing."""
    ttls_ms: Sequence[int]
    """Until they are gone; in the order of the bodies."""
    stale_ms: int = 0
    tags: Sequence[str] = ()
    keys: Sequence[str] = ()
    """What the caller calls them."""
    raised: bool = False
    """Whether they are exceptions that the loader raised."""


_READ: Script[list[Any]] = load(__package__, "entries_read", list)
_LOOK: Script[list[Any]] = load(__package__, "entries_look", list)
_FILL: Script[list[int]] = load(__package__, "entries_fill", list)
_SET = load(__package__, "entries_set", bool)
_DELETE = load(__package__, "entries_delete", int)
_EXPIRE = load(__package__, "entry_expire", bool)
_TOUCH: Script[list[Any]] = load(__package__, "entry_touch", list)
_TAKE: Script[list[Any]] = load(__package__, "entry_take", list)
_ADD = load(__package__, "counter_add", int)
_DROP = load(__package__, "tags_drop", int)
_TAGS: Script[list[bytes]] = load(__package__, "tags_read", list)
_SEQUENCE: Script[bytes] = load(__package__, "sequence_read", bytes)
_RENEW = load(__package__, "leases_renew", int)
_RAISE = load(__package__, "tag_raise", int)
_VOID = load(__package__, "leases_void", int)


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
        self._split = redis.is_cluster
        self._reads: dict[int, Prepared[list[Any]]] = {}  # by the number of tags
        self._sets: dict[int, Prepared[bool]] = {}
        self._looks: dict[tuple[int, Take], Prepared[list[Any]]] = {}

    # Reading

    def read(self, names: Sequence[str], tags: Sequence[str] = ()) -> list[Look]:
        """Entries, and the versions of tags; no lease is taken."""
        tags = (WHOLE, *tags)
        if not self._split:
            raws, flat = _READ(self._redis.cache, tags=self._tag_keys(tags), entries=names)
            known = dict(zip(tags, raws, strict=True))
            return [Look(stored, left_ms, known) for stored, left_ms in zip(flat[::2], flat[1::2], strict=True)]
        found: dict[str, tuple[bytes | None, int]] = {}
        for group in self._groups(names):
            _, flat = _READ(self._redis.cache, tags=(), entries=group)
            found.update(zip(group, zip(flat[::2], flat[1::2], strict=True), strict=True))
        versions = self.versions(tags)
        return [Look(*found[name], versions) for name in names]

    def read_one(self, name: str, tags: Sequence[str] = ()) -> tuple[bytes | None, int, list[bytes | None]]:
        """One entry, what is left of its time, and the versions of the namespace and of tags. Not on a Cluster."""
        prepared = self._reads.get(len(tags))
        if prepared is None:
            holes = [HOLE] * len(tags)
            prepared = self._reads[len(tags)] = _READ.prepared(tags=[self._keys.whole, *holes], entries=[HOLE])
        client: Any = self._redis.cache
        versions, (stored, left_ms) = prepared(client, *[self._keys.tag(tag).encode() for tag in tags], name.encode())
        return stored, left_ms, versions

    def look_one(self, name: str, tags: Sequence[str], take: Take, token: str) -> list[Any]:
        """As ``look``, of one entry: the reply as it is. Not on a Cluster."""
        prepared = self._looks.get((len(tags), take))
        if prepared is None:
            prepared = self._looks[len(tags), take] = _LOOK.prepared(
                sequence=self._keys.sequence,
                tags=[self._keys.whole, *[HOLE] * len(tags)],
                entries=[HOLE],
                leases=[HOLE],
                take=int(take),
                token=HOLE,
                lease_ms=self._lease_ms,
                version_ttl_ms=_VERSION_TTL_MS,
            )
        client: Any = self._redis.cache
        holes = [self._keys.tag(tag).encode() for tag in tags] if tags else ()
        lease = key_names.lease(name)
        return prepared(client, *holes, name.encode(), lease.encode(), token.encode())

    @property
    def split(self) -> bool:
        """Whether the keys are spread over a Cluster."""
        return self._split

    def look(self, names: Sequence[str], tags: Sequence[str], take: Take, token: str) -> list[Look]:
        """Read entries and the versions of tags, and take leases where asked, all with one token.

        Arguments:
            token: a new one, or that of the lease to go on with.
        """
        tags = (WHOLE, *tags)
        found: dict[str, Sequence[Any]] = {}
        since, raws = b"", []
        for group in self._groups(names):
            leases = [key_names.lease(name) for name in group]
            since, raws, flat = _LOOK(
                self._redis.cache,
                sequence=leases[0] if self._split else self._keys.sequence,
                tags=() if self._split else self._tag_keys(tags),
                entries=group,
                leases=leases,
                take=int(take),
                token=token,
                lease_ms=self._lease_ms,
                version_ttl_ms=_VERSION_TTL_MS,
            )
            found.update(zip(group, zip(*[iter(flat)] * 4, strict=True), strict=True))
        if not self._split:
            versions: Mapping[str, bytes | None] = dict(zip(tags, raws, strict=True))
        elif any(lease == 1 for _, _, lease, _ in found.values()):
            since, versions = self._made_versions(tags, 0)
        else:
            versions = self.versions(tags)
        return [
            Look(stored, left_ms, versions, lease, holder.decode("ascii", "replace"), token, since)
            for stored, left_ms, lease, holder in (found[name] for name in names)
        ]

    def versions(self, tags: Sequence[str]) -> dict[str, bytes | None]:
        """The versions of tags as they are; None where there is none."""
        if not tags:
            return {}
        found: dict[str, bytes | None] = {}
        for group in self._groups(self._tag_keys(tags)):
            found.update(zip(group, self._redis.cache.execute_command("MGET", *group), strict=True))
        return {tag: found[self._tag_key(tag)] for tag in tags}

    def take_out(self, name: str, tags: Sequence[str] = ()) -> Look:
        """Delete an entry, and return what it was."""
        tags = (WHOLE, *tags)
        versions: dict[str, bytes | None] = self.versions(tags) if self._split else {}
        stored, left_ms, raws = _TAKE(
            self._redis.cache,
            tags=() if self._split else self._tag_keys(tags),
            entry=name,
            lease=key_names.lease(name),
        )
        return Look(stored, left_ms, versions or dict(zip(tags, raws, strict=True)))

    def touch(self, name: str, ttl_ms: int, tags: Sequence[str]) -> tuple[Look, bool]:
        """Give a fresh entry that has exactly these tags a new time until it is stale. Also returns whether it was."""
        tags = (WHOLE, *tags)
        version_ttl_ms = max(ttl_ms, _VERSION_TTL_MS)
        made = self._made_versions(tags, version_ttl_ms)[1] if self._split else {}
        stored, left_ms, raws, touched = _TOUCH(
            self._redis.cache,
            tags=() if self._split else self._tag_keys(tags),
            entry=name,
            ttl_ms=ttl_ms,
            version_ttl_ms=version_ttl_ms,
            versions=b"".join(made.values()),
        )
        return Look(stored, left_ms, made or (dict(zip(tags, raws, strict=True)) if raws else {})), bool(touched)

    # Loads

    def fill(self, write: Write, look: Look, *, pause_ms: int = 0) -> dict[str, bool]:
        """End loads: store what they gave, give the leases back, wake who waits. Returns what was stored.

        Arguments:
            look: the one that took the leases.
            pause_ms: keep those away for so long who have a stale value to serve.
        """
        tags = (WHOLE, *write.tags)
        version_ttl_ms = self._version_ttl_ms(write)
        versions, invalidated = b"", False
        if self._split:
            _, made = self._made_versions(tags, version_ttl_ms)
            versions = b"".join(made.values())
            invalidated = invalidated_since(versions, look.since)
        stored: dict[str, bool] = {}
        ttls_ms = dict(zip(write.bodies, write.ttls_ms, strict=True))
        for group in self._groups(list(write.bodies)):
            leases = [key_names.lease(name) for name in group]
            outcome = _FILL(
                self._redis.cache,
                sequence=leases[0] if self._split else self._keys.sequence,
                tags=() if self._split else self._tag_keys(tags),
                entries=group,
                leases=leases,
                wakes=[key_names.wake(name, look.token) for name in group],
                token=look.token,
                since=look.since,
                stale=f"{write.stale_ms:010x}",
                version_ttl_ms=version_ttl_ms,
                wake_ttl_ms=_WAKE_TTL_MS,
                pause_ms=pause_ms,
                versions=versions,
                kind="x" if write.raised else "1",
                ttls_ms=[ttls_ms[name] for name in group],
                bodies=[b"" if invalidated else write.bodies[name] for name in group],
            )
            stored.update(zip(group, map(bool, outcome), strict=True))
        return stored

    def give_back(self, names: Sequence[str], look: Look, *, pause_ms: int = 0) -> None:
        """End loads that gave nothing."""
        self.fill(Write(dict.fromkeys(names, b""), [1] * len(names)), look, pause_ms=pause_ms)

    def renew(self, names: Sequence[str], token: str) -> int:
        """Keep the leases of loads that are still running. Returns how many are still ours."""
        return sum(
            _RENEW(
                self._redis.coordination,
                leases=[key_names.lease(name) for name in group],
                token=token,
                lease_ms=self._lease_ms,
            )
            for group in self._groups(names)
        )

    def void(self, names: Sequence[str], token: str) -> int:
        """Give back leases that were taken for nobody. Returns how many there were."""
        return sum(
            _VOID(self._redis.coordination, leases=[key_names.lease(name) for name in group], token=token)
            for group in self._groups(names)
        )

    def next_token(self) -> str:
        """For a look that takes leases."""
        return self._tokens.next()

    # Writing

    def set(self, write: Write, *, expected: str = ANYTHING, valid: Entry | None = None) -> bool:
        """Store entries, and void the loads of them. All or none, on a single server.

        Arguments:
            expected: ``ANYTHING``; or ``NOTHING``, only where there is nothing; or only over the entry with this token.
            valid: the entry that is expected, if none of its tags may have been invalidated.
        """
        olds: Sequence[str] = ()
        carried = b""
        if valid is not None:
            olds, carried = (WHOLE, *valid.tags), valid.versions
        elif len(write.bodies) == 1 and not self._split:
            return self._set_one(write, expected)
        tags = (WHOLE, *write.tags)
        version_ttl_ms = self._version_ttl_ms(write)
        versions = b""
        if self._split:
            _, made = self._made_versions(tags, version_ttl_ms)
            versions = b"".join(made.values())
            # In this order: a tag of both that is invalidated from now on makes the new entry invalid too.
            if olds and b"".join(version or b"" for version in self.versions(olds).values()) != carried:
                return False
        ttls_ms = dict(zip(write.bodies, write.ttls_ms, strict=True))
        stored = True
        for group in self._groups(list(write.bodies)):
            leases = [key_names.lease(name) for name in group]
            stored &= _SET(
                self._redis.cache,
                sequence=leases[0] if self._split else self._keys.sequence,
                tags=() if self._split else self._tag_keys(tags),
                entries=group,
                leases=leases,
                olds=() if self._split else self._tag_keys(olds),
                carried=b"" if self._split else carried,
                token=self._tokens.next(),
                expected=expected,
                stale=f"{write.stale_ms:010x}",
                version_ttl_ms=version_ttl_ms,
                versions=versions,
                ttls_ms=[ttls_ms[name] for name in group],
                bodies=[write.bodies[name] for name in group],
            )
        return stored

    def _set_one(self, write: Write, expected: str) -> bool:
        prepared = self._sets.get(len(write.tags))
        if prepared is None:
            prepared = self._sets[len(write.tags)] = _SET.prepared(
                sequence=self._keys.sequence,
                tags=[self._keys.whole, *[HOLE] * len(write.tags)],
                entries=[HOLE],
                leases=[HOLE],
                olds=(),
                carried="",
                token=HOLE,
                expected=HOLE,
                stale=HOLE,
                version_ttl_ms=HOLE,
                versions="",
                ttls_ms=[HOLE],
                bodies=[HOLE],
            )
        (name, body), ttl_ms = next(iter(write.bodies.items())), write.ttls_ms[0]
        client: Any = self._redis.cache
        return prepared(
            client,
            *[self._keys.tag(tag).encode() for tag in write.tags],
            name.encode(),
            key_names.lease(name).encode(),
            self._tokens.next().encode(),
            expected.encode(),
            b"%010x" % write.stale_ms,
            b"%d" % max(ttl_ms, _VERSION_TTL_MS),
            b"%d" % ttl_ms,
            body,
        )

    def add(self, name: str, amount: int, ttl_ms: int) -> int:
        """Add to a counter."""
        version_ttl_ms = max(ttl_ms, _VERSION_TTL_MS)
        versions = b""
        if self._split:
            _, made = self._made_versions((WHOLE,), version_ttl_ms)
            versions = b"".join(made.values())
        lease = key_names.lease(name)
        return _ADD(
            self._redis.cache,
            sequence=lease if self._split else self._keys.sequence,
            tags=() if self._split else self._tag_keys((WHOLE,)),
            entry=name,
            lease=lease,
            amount=amount,
            ttl_ms=ttl_ms,
            token=self._tokens.next(),
            version_ttl_ms=version_ttl_ms,
            versions=versions,
        )

    # Removing

    def delete(self, names: Sequence[str], client: "redis.Redis") -> int:
        """Remove entries, and void the loads of them. Returns how many there were."""
        return sum(
            _DELETE(client, entries=group, leases=[key_names.lease(name) for name in group])
            for group in self._groups(names)
        )

    def expire(self, name: str, client: "redis.Redis") -> bool:
        """Make an entry stale, and void the load of it. Returns whether there was one."""
        return _EXPIRE(client, entry=name, lease=key_names.lease(name))

    def drop(self, tags: Iterable[str], client: "redis.Redis") -> int:
        """Invalidate every entry that names one of the tags. Returns how many tags had a version."""
        names = self._tag_keys(list(tags))
        token = self._tokens.next()
        if not self._split:
            return _DROP(client, sequence=self._keys.sequence, tags=names, token=token, version_ttl_ms=_VERSION_TTL_MS)
        # The number first: a load that began with the old one must find a higher one at its end.
        number = _SEQUENCE(client, sequence=self._keys.sequence, rise=1, ttl_ms=_VERSION_TTL_MS)
        version = number + token[-7:].encode()
        return sum(_RAISE(client, tag=name, version=version, ttl_ms=_VERSION_TTL_MS) for name in names)

    def matching(self, pattern: str) -> Iterator[list[str]]:
        """The names of entries that match, or whose leases do, in batches: at least what is there all the time."""
        found: set[str] = set()
        for raw in self._redis.scan(pattern, _SCAN_COUNT):
            if name := key_names.entry_of(raw.decode("utf-8", "replace")):
                found.add(name)
            if len(found) >= _SCAN_COUNT:
                yield sorted(found)
                found.clear()
        if found:
            yield sorted(found)

    # Inside

    def _groups(self, names: Sequence[str]) -> Iterable[Sequence[str]]:
        """Names that one script may touch together."""
        if not self._split:
            return (names,)
        groups: dict[int, list[str]] = {}
        for name in names:
            groups.setdefault(self._redis.slot(name), []).append(name)
        return groups.values()

    def _tag_key(self, tag: str) -> str:
        return self._keys.tag(tag) if tag else self._keys.whole

    def _tag_keys(self, tags: Sequence[str]) -> list[str]:
        return [self._tag_key(tag) for tag in tags]

    def _made_versions(self, tags: Sequence[str], ttl_ms: int) -> tuple[bytes, dict[str, bytes]]:
        """The number of the last invalidation, then the versions of tags, made where there are none."""
        ttl_ms = max(ttl_ms, _VERSION_TTL_MS)
        since = _SEQUENCE(self._redis.cache, sequence=self._keys.sequence, rise=0, ttl_ms=ttl_ms)
        found: dict[str, bytes] = {}
        for group in self._groups(self._tag_keys(tags)):
            made = _TAGS(
                self._redis.cache, tags=group, sequence=since, token=self._tokens.next(), version_ttl_ms=ttl_ms
            )
            found.update(zip(group, made, strict=True))
        return since, {tag: found[self._tag_key(tag)] for tag in tags}

    def _version_ttl_ms(self, write: Write) -> int:
        return max(_VERSION_TTL_MS, *write.ttls_ms)
