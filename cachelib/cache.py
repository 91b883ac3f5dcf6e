"""The cache: values in Redis that are never left stale and never take the application down.

The life of a read: one script call returns the entry and the versions of its tags, and takes the lease when
there is no entry. The holder of the lease loads and fills; everybody else is served the stale value, or
waits to be woken. The invariant that all of it keeps: **a value is stored only by a load whose lease nobody
has voided since the load began** (leases: Nishtala et al., "Scaling Memcache at Facebook", NSDI 2013).
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from . import entry as entries
from . import keys as key_names
from .connections import UNAVAILABLE, Connections
from .counters import Counters
from .durations import Duration, milliseconds
from .entry import Envelope, Freshness, Undecodable
from .errors import EntryNotCounter, LoaderRecursion, ServerUnavailable, ValueNotCacheable
from .leases import LeaseKeeper
from .scripts import Script, load
from .tokens import Tokens
from .waiting import Waiting

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Miss(Enum):
    """The one value that is never cached."""

    MISS = "MISS"

    def __repr__(self) -> str:
        return "MISS"

    def __bool__(self) -> bool:
        return False


MISS: Final = Miss.MISS
"""What ``get`` returns for what is not cached. ``None`` is a value like any other."""

_NOT_COUNTABLE = ("not an integer", "WRONGTYPE", "would overflow")
_SCAN_COUNT = 500  # keys looked at per call: large enough to be quick, small enough that others get their turn
_MOST_LEASES = 4  # waited for another's load, before a caller loads for itself
_WAKE_TTL_MS = 10_000  # a wake-up that nobody took is worth nothing after this

_READ_ONLY, _LEASE_IF_GONE, _LEASE, _LEASE_OR_WAIT = 0, 1, 2, 3  # what lua/entry_read.lua calls "take"


def _read_reply(reply: list[Any]) -> tuple[bytes | None, int, int, list[bytes | None], str]:
    stored, left_ms, lease, versions, holder = reply
    return stored, left_ms, lease, versions, holder.decode("ascii", "replace")


_READ = load(__package__, "entry_read", _read_reply)
_READ_MANY: Script[list[tuple[bytes | None, int]]] = load(__package__, "entries_read", list)
_FILL = load(__package__, "entry_fill", bool)
_SET = load(__package__, "entry_set", int)
_DELETE = load(__package__, "entry_delete", int)
_ADD = load(__package__, "counter_add", int)
_TAGS: Script[list[bytes]] = load(__package__, "tags_read", list)


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of this process since the cache was made."""

    hits: int
    """Served fresh from Redis."""
    stale: int
    """Served past the soft TTL, while somebody loads."""
    misses: int
    loads: int
    load_ms: int
    """Time spent in loaders."""
    waits: int
    """Reads that waited for another's load."""
    refused: int
    """Loaded values that were not stored, because the key was invalidated or set meanwhile."""
    errors: int
    """Calls that Redis did not answer, and entries that could not be read."""

    @property
    def hit_ratio(self) -> float:
        """Served from the cache, of all reads; 0 when there were none."""
        reads = self.hits + self.stale + self.misses
        return (self.hits + self.stale) / reads if reads else 0.0


class _Reading(NamedTuple):
    """What one look at an entry showed."""

    freshness: Freshness
    value: Any
    envelope: Envelope | None
    left_ms: int
    token: str
    lease: int
    """1: ours; 0: not asked for; -n: another holds it for n more milliseconds."""
    guards: Mapping[str, str]
    """The versions of the caller's tags, as they were at this look: before any load."""
    holder: str
    """Whose load it is, when another holds the lease."""


class Cache:
    """Values in Redis, under one namespace, each with a TTL.

    >>> cache = Cache(connect(), namespace="shop", ttl="5m")
    >>> cache.get_or_set("user:1", load_user, ttl=60, stale=600, tags=["users"])

    Promises:
        - After ``invalidate`` or ``delete`` returned, no ``get_or_set`` that began to load before it can put its
          value back. (``set`` with tags has no such guard: it cannot know when its value was read.)
        - Of all processes that miss one key, one loads; the others are woken when it is there. A holder that
          dies delays the next load by ``lease`` at most.
        - Reading and setting never raise because Redis is slow or away: a read is a miss, within the timeout of
          ``Settings.cache_timeout``, and ``get_or_set`` loads. What could not be removed is raised, because a
          stale entry that nobody knows of is worse than an error.
        - Every entry expires, up to a tenth earlier than asked for, so that they do not expire together.

    Not yet: a near cache in the process, early refresh, refresh outside the caller, a circuit breaker (each
    call waits for its own timeout while Redis hangs), remembered invalidations, Cluster. Values come back as
    MessagePack has them: tuples and sets as lists, ``Decimal`` and ``UUID`` as text, dataclasses as dicts.

    Arguments:
        redis: from ``connect``.
        namespace: keeps the keys of several caches apart. Any text.
        ttl: how long an entry is fresh, where the call does not say. Seconds, ``timedelta`` or "5m".
        lease: how long a load is waited for whose process has died. A load that runs longer keeps its lease.
    """

    def __init__(self, redis: Connections, *, namespace: str, ttl: Duration = 300, lease: Duration = 10) -> None:
        self.redis = redis
        self.namespace = namespace
        self.keys = key_names.CacheKeys(namespace)
        self.ttl_ms = milliseconds(ttl, "ttl")
        self._lease_ms = milliseconds(lease, "lease")
        self._counters = Counters()
        self._waiting = Waiting(redis)
        self._keeper = LeaseKeeper(redis, self._lease_ms)
        self._loading = threading.local()
        self._tokens = Tokens()

    def __repr__(self) -> str:
        stats = self.stats()
        return f"<Cache {self.namespace!r} at {self.redis.address} [hit ratio {stats.hit_ratio:.0%}]>"

    # Reading

    def get(self, key: str, default: T | None = None) -> Any | T:
        """The value of a key, fresh or stale; ``default`` when it is not cached.

        One round trip; two for an entry with tags, whose versions are looked up once the entry names them.
        Pass ``MISS`` as the default to tell a cached ``None`` from a miss.
        """
        return self.get_many([key]).get(key, default)

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that are cached. One round trip, and one more if some have tags."""
        names = {key: self.keys.entry(key) for key in _listed(keys, "keys")}
        if not names:
            return {}
        try:
            stored = _READ_MANY(self.redis.cache, entries=list(names.values()))
            decoded = {
                key: (*self._decoded(key, raw), left_ms)
                for key, (raw, left_ms) in zip(names, stored, strict=True)
                if raw is not None
            }
            tags = sorted({tag for envelope, _, _ in decoded.values() if envelope for tag in envelope.tags})
            versions = self._tag_versions_now(tags)
        except UNAVAILABLE as error:
            self._degraded("get", error)
            self._counters.add("misses", len(names))
            return {}
        found = {}
        for key, (envelope, value, left_ms) in decoded.items():
            if value is MISS:
                continue
            freshness = entries.judge(envelope, left_ms, versions)
            if freshness is not Freshness.GONE:
                self._counters.add("hits" if freshness is Freshness.FRESH else "stale")
                found[key] = value
        self._counters.add("misses", len(names) - len(found))
        return found

    def exists(self, key: str) -> bool:
        """Whether a key is stored. Does not look at its tags; False when Redis does not answer."""
        name = self.keys.entry(key)
        try:
            return bool(self.redis.cache.exists(name))
        except UNAVAILABLE as error:
            self._degraded("exists", error)
            return False

    def get_or_set(
        self,
        key: str,
        loader: Callable[[], T],
        *,
        ttl: Duration | None = None,
        stale: Duration = 0,
        tags: Sequence[str] = (),
        wait: Duration | None = None,
    ) -> T:
        """The cached value, or that of ``loader``, which is then cached.

        >>> cache.get_or_set("user:1", lambda: load_user(1), ttl=60, stale=600, tags=["users"])

        Arguments:
            key: any text of up to 1,024 bytes.
            loader: called without arguments, by one process at a time; what it returns is cached, also None.
                What it raises reaches the caller, unless there is a stale value to serve instead.
            ttl: how long the value is fresh (the soft TTL).
            stale: how long after that it may still be served while one caller loads a new one; that caller
                waits for it. Stored for ``ttl + stale`` in all (the hard TTL).
            tags: groups that the entry belongs to; invalidating one of them removes it.
            wait: how long to wait for another's load; after that, this caller loads for itself, and what it
                loads is not stored. Default: four leases.

        A hit costs one round trip, a miss two. Raises ``LoaderRecursion`` when the loader asks for the same
        key, and ``ValueNotCacheable`` for a value without MessagePack form.
        """
        ttl_ms = self.ttl_ms if ttl is None else milliseconds(ttl, "ttl")
        stale_ms = milliseconds(stale, "stale", zero_allowed=True)
        tags = _listed(tags, "tags")
        name = self.keys.entry(key)
        wait_ms = self._lease_ms * _MOST_LEASES if wait is None else milliseconds(wait, "wait", zero_allowed=True)
        deadline = time.monotonic() + wait_ms / 1_000
        waited = False
        while True:
            reading = self._look(key, name, tags, ttl_ms + stale_ms, _LEASE_IF_GONE)
            if reading is None:
                self._counters.add("misses")
                return self._load(key, loader)[0]
            if reading.freshness is Freshness.FRESH:
                self._counters.add("hits")
                return reading.value  # type: ignore[no-any-return]
            if reading.lease == 0:  # stale, or stored but invalidated: the lease was not asked for yet
                take = _LEASE if reading.freshness is Freshness.STALE else _LEASE_OR_WAIT
                reading = self._look(key, name, tags, ttl_ms + stale_ms, take) or reading
                if reading.freshness is Freshness.FRESH:  # somebody filled it between the two looks
                    self._counters.add("hits")
                    if reading.lease == 1:
                        self._end_load(name, reading.token, b"", 1)
                    return reading.value  # type: ignore[no-any-return]
            if reading.lease == 1:
                self._counters.add("stale" if reading.freshness is Freshness.STALE else "misses")
                return self._load_and_fill(key, name, loader, reading, ttl_ms, stale_ms)
            if reading.freshness is Freshness.STALE:
                self._counters.add("stale")
                return reading.value  # type: ignore[no-any-return]
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                # Whoever loads is neither done nor dead. Do not hang with a loader that hangs.
                self._counters.add("misses")
                return self._load(key, loader)[0]
            self._refuse_recursion(key)
            if not waited:
                waited = True
                self._counters.add("waits")
            self._waiting.wait(key_names.wake(name, reading.holder), min(left_s, -reading.lease / 1_000))

    def refresh(
        self,
        key: str,
        loader: Callable[[], T],
        *,
        ttl: Duration | None = None,
        stale: Duration = 0,
        tags: Sequence[str] = (),
        unless_fresh_for: Duration = 0,
    ) -> bool:
        """Load a key anew, under its lease, although it may still be fresh.

        Arguments: as for ``get_or_set``, and
            unless_fresh_for: leave an entry alone that stays fresh for longer than this. 0: always load.

        Returns whether a value was loaded and stored. It is not when another process is loading the key,
        the entry is fresh enough, the key was invalidated meanwhile, or Redis does not answer.
        """
        ttl_ms = self.ttl_ms if ttl is None else milliseconds(ttl, "ttl")
        stale_ms = milliseconds(stale, "stale", zero_allowed=True)
        tags = _listed(tags, "tags")
        enough_ms = milliseconds(unless_fresh_for, "unless_fresh_for", zero_allowed=True)
        name = self.keys.entry(key)
        if enough_ms:
            reading = self._look(key, name, tags, ttl_ms + stale_ms, _READ_ONLY)
            if reading is None:
                return False
            fresh = reading.freshness is Freshness.FRESH
            if fresh and entries.fresh_left_ms(reading.envelope, reading.left_ms) > enough_ms:
                return False
        reading = self._look(key, name, tags, ttl_ms + stale_ms, _LEASE)
        if reading is None or reading.lease != 1:
            return False
        value, load_ms = self._load_under(key, name, loader, reading)
        return self._fill(key, name, reading, value, load_ms, ttl_ms, stale_ms)

    # Writing

    def set(
        self,
        key: str,
        value: object,
        *,
        ttl: Duration | None = None,
        stale: Duration = 0,
        tags: Sequence[str] = (),
    ) -> bool:
        """Store a value; a load of the key that is under way will not overwrite it.

        Arguments: as for ``get_or_set``. Returns whether Redis has it. One round trip, two with tags.
        """
        return self.set_many({key: value}, ttl=ttl, stale=stale, tags=tags)

    def set_many(
        self,
        values: Mapping[str, object],
        *,
        ttl: Duration | None = None,
        stale: Duration = 0,
        tags: Sequence[str] = (),
    ) -> bool:
        """Store several values in one round trip (two with tags). All or none; returns which."""
        ttl_ms = self.ttl_ms if ttl is None else milliseconds(ttl, "ttl")
        stale_ms = milliseconds(stale, "stale", zero_allowed=True)
        tags = _listed(tags, "tags")
        if not values:
            return True
        names = [self.keys.entry(key) for key in values]
        try:
            versions = self._tag_versions(tags, ttl_ms + stale_ms)
            payloads = [self._encoded(k, v, stale_ms, 0, versions) for k, v in values.items()]
            _SET(
                self.redis.cache,
                entries=names,
                leases=[key_names.lease(name) for name in names],
                payloads=payloads,
                ttls_ms=[entries.jittered(ttl_ms, random.random()) + stale_ms for _ in names],
            )
        except UNAVAILABLE as error:
            self._degraded("set", error)
            return False
        return True

    def incr(self, key: str, by: int = 1, *, ttl: Duration | None = None) -> int | None:
        """Add to a whole number; a new one starts at 0 and gets the TTL in the same step.

        Returns the new value, or None when Redis does not answer (it may then have been added or not).
        ``get`` reads it, ``set`` with a whole number starts it elsewhere. Raises ``EntryNotCounter`` for a key
        that holds something else.
        """
        if not isinstance(by, int) or isinstance(by, bool):
            raise TypeError(f"by must be a whole number, not {by!r}")
        if not -(2**63) <= by < 2**63:
            raise ValueError(f"by={by} is beyond 64 bits, which is what Redis counts with")
        ttl_ms = self.ttl_ms if ttl is None else milliseconds(ttl, "ttl")
        name = self.keys.entry(key)
        try:
            return _ADD(self.redis.cache, entry=name, amount=by, ttl_ms=ttl_ms)
        except UNAVAILABLE as error:
            if any(why in str(error) for why in _NOT_COUNTABLE):
                raise EntryNotCounter(key) from None
            self._degraded("incr", error)
            return None

    def expire(self, key: str, ttl: Duration) -> bool:
        """Give a stored entry a new time until it is gone. Returns whether there was one.

        A stale window that it was stored with counts backwards from there.
        """
        ttl_ms = milliseconds(ttl, "ttl")
        name = self.keys.entry(key)
        try:
            return bool(self.redis.cache.pexpire(name, ttl_ms))
        except UNAVAILABLE as error:
            self._degraded("expire", error)
            return False

    # Removing

    def delete(self, *keys: str) -> int:
        """Remove keys, and void the loads of them that are under way. Returns how many were stored.

        One round trip. Raises ``ServerUnavailable`` when Redis does not answer: what could not be removed would
        be served.
        """
        if not keys:
            return 0
        return self._remove([self.keys.entry(key) for key in keys])

    def invalidate(self, *, keys: Iterable[str] = (), tags: Iterable[str] = (), matching: str | None = None) -> int:
        """Remove what changed: by key, by tag, by pattern.

        >>> cache.invalidate(keys=["user:1"], tags=["users"], matching="post:list:*")

        Arguments:
            keys: removed, with the loads of them that are under way.
            tags: every entry that names one of them is gone at once, however many there are (their version
                is dropped; a missing version is an invalid one).
            matching: a pattern with ``*``, ``?`` and ``[...]``. Found with SCAN and removed in batches, without
                blocking others; it looks at every key of the server, twice, so it is a tool for people and
                migrations. Prefer tags.

        Returns how many keys and tags were removed. Raises ``ServerUnavailable`` when Redis does not answer.
        """
        names = [self.keys.entry(key) for key in _listed(keys, "keys")]
        tag_names = [self.keys.tag(tag) for tag in _listed(tags, "tags")]
        pattern = None if matching is None else self.keys.matching(matching)
        removed = self._remove(names) if names else 0
        if tag_names:
            with self._raising("invalidate tags"):
                removed += int(self.redis.coordination.unlink(*tag_names))
        if pattern is not None:
            removed += self._remove_matching(pattern)
        return removed

    # Looking at it

    def stats(self) -> Stats:
        """Counts of this process."""
        counts = self._counters.read()
        return Stats(**{name: counts.get(name, 0) for name in Stats.__slots__})

    # Inside

    def _look(self, key: str, name: str, tags: Sequence[str], stored_ms: int, take: int) -> _Reading | None:
        """One look at an entry. None when Redis does not answer."""
        token = self._tokens.next()
        try:
            stored, left_ms, lease, raws, holder = _READ(
                self.redis.cache,
                entry=name,
                lease=key_names.lease(name),
                tags=[self.keys.tag(tag) for tag in tags],
                take=take,
                token=token,
                lease_ms=self._lease_ms,
                tag_ttl_ms=self._lease_ms + stored_ms,
            )
            versions: dict[str, str | None] = dict(zip(tags, map(_text, raws), strict=True)) if tags else {}
            guards = {tag: version for tag, version in versions.items() if version is not None} if tags else {}
            envelope, value = self._decoded(key, stored) if stored is not None else (None, MISS)
            if envelope is not None and envelope.tags:
                versions |= self._tag_versions_now(entries.missing_tags(tags, envelope))
        except UNAVAILABLE as error:
            self._degraded("get_or_set", error)
            return None
        freshness = Freshness.GONE if value is MISS else entries.judge(envelope, left_ms, versions)
        return _Reading(freshness, value, envelope, left_ms, token, lease, guards, holder)

    def _load_and_fill(
        self, key: str, name: str, loader: Callable[[], T], reading: _Reading, ttl_ms: int, stale_ms: int
    ) -> T:
        try:
            value, load_ms = self._load_under(key, name, loader, reading)
        except Exception:
            if reading.freshness is Freshness.STALE:
                logger.warning("loader of %r failed; the stale value is served", key, exc_info=True)
                return reading.value  # type: ignore[no-any-return]
            raise
        self._fill(key, name, reading, value, load_ms, ttl_ms, stale_ms)
        return value

    def _load_under(self, key: str, name: str, loader: Callable[[], T], reading: _Reading) -> tuple[T, int]:
        """Load while holding the lease; give it back if that fails."""
        try:
            with self._keeper.keeping(key_names.lease(name), reading.token):
                return self._load(key, loader)
        except BaseException:
            self._end_load(name, reading.token, b"", 1)
            raise

    def _load(self, key: str, loader: Callable[[], T]) -> tuple[T, int]:
        """The loader's value, and how many milliseconds it took."""
        with self._not_twice(key):
            started = time.perf_counter()
            value = loader()
            load_ms = int((time.perf_counter() - started) * 1_000)
        self._counters.add("loads")
        self._counters.add("load_ms", load_ms)
        return value, load_ms

    def _fill(
        self, key: str, name: str, reading: _Reading, value: object, load_ms: int, ttl_ms: int, stale_ms: int
    ) -> bool:
        try:
            payload = self._encoded(key, value, stale_ms, load_ms, reading.guards)
        except ValueNotCacheable:
            self._end_load(name, reading.token, b"", 1)
            raise
        stored = self._end_load(name, reading.token, payload, entries.jittered(ttl_ms, random.random()) + stale_ms)
        if not stored:
            self._counters.add("refused")
        return stored

    def _end_load(self, name: str, token: str, payload: bytes, ttl_ms: int) -> bool:
        try:
            return _FILL(
                self.redis.cache,
                entry=name,
                lease=key_names.lease(name),
                wake=key_names.wake(name, token),
                token=token,
                payload=payload,
                ttl_ms=ttl_ms,
                wake_ttl_ms=_WAKE_TTL_MS,
            )
        except UNAVAILABLE as error:
            self._degraded("fill", error)
            return False

    def _tag_versions_now(self, tags: Sequence[str]) -> dict[str, str | None]:
        """The versions of tags as they are; None where there is none."""
        if not tags:
            return {}
        raws: list[bytes | None] = self.redis.cache.execute_command("MGET", *map(self.keys.tag, tags))
        return dict(zip(tags, map(_text, raws), strict=True))

    def _tag_versions(self, tags: Sequence[str], stored_ms: int) -> dict[str, str]:
        """The versions of tags, made where there are none; they outlive an entry stored for ``stored_ms``."""
        if not tags:
            return {}
        raws = _TAGS(
            self.redis.cache,
            tags=[self.keys.tag(tag) for tag in tags],
            token=self._tokens.next(),
            tag_ttl_ms=self._lease_ms + stored_ms,
        )
        return {tag: raw.decode() for tag, raw in zip(tags, raws, strict=True)}

    def _remove(self, names: Sequence[str]) -> int:
        with self._raising("delete"):
            return _DELETE(self.redis.coordination, entries=names, leases=[key_names.lease(name) for name in names])

    def _remove_matching(self, pattern: str) -> int:
        """Remove what matches now, and what a load puts back that began before now.

        SCAN returns what is there all the time. A load that is under way has a lease; if its lease is there
        during the whole first pass, it is found and voided; if not, the load filled the entry during the first
        pass, and the entry is there during the whole second one.
        """
        removed = 0
        with self._raising("invalidate by pattern"):
            for _ in range(2):
                found: list[str] = []
                for raw in self.redis.coordination.scan_iter(match=pattern, count=_SCAN_COUNT):
                    found.append(_entry_of(raw.decode()))
                    if len(found) == _SCAN_COUNT:
                        removed += self._remove(sorted(set(found)))
                        found.clear()
                if found:
                    removed += self._remove(sorted(set(found)))
        return removed

    def _encoded(self, key: str, value: object, stale_ms: int, load_ms: int, tags: Mapping[str, str]) -> bytes:
        created_ms = int(time.time() * 1_000)
        try:
            if value is MISS:
                raise TypeError("MISS stands for what is not cached")
            return entries.encode(value, created_ms=created_ms, stale_ms=stale_ms, load_ms=load_ms, tags=tags)
        except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            raise ValueNotCacheable(key, value, error) from None

    def _decoded(self, key: str, stored: bytes) -> tuple[Envelope | None, Any]:
        """Envelope and value; ``MISS`` for what cannot be read, which is counted and never raised."""
        try:
            return entries.decode(stored)
        except Undecodable as error:
            self._counters.add("errors")
            logger.warning("the entry of %r cannot be read (%s) and counts as a miss", key, error)
            return None, MISS

    @contextmanager
    def _not_twice(self, key: str) -> Iterator[None]:
        """Notes that this thread loads a key, and refuses to load it inside its own load."""
        self._refuse_recursion(key)
        loading: set[str] = self._loading.__dict__.setdefault("keys", set())
        loading.add(key)
        try:
            yield
        finally:
            loading.discard(key)

    def _refuse_recursion(self, key: str) -> None:
        if key in self._loading.__dict__.get("keys", ()):
            raise LoaderRecursion(key)

    @contextmanager
    def _raising(self, doing: str) -> Iterator[None]:
        try:
            yield
        except UNAVAILABLE as error:
            self._counters.add("errors")
            raise ServerUnavailable(self.redis.address, error, doing=doing) from error

    def _degraded(self, doing: str, error: BaseException) -> None:
        self._counters.add("errors")
        logger.warning("cache %r: %s went on without Redis at %s: %s", self.namespace, doing, self.redis.address, error)


C = TypeVar("C", bound=Iterable[str])


def _listed(names: C, what: str) -> C:
    """Names as they were given; one text in their place would be taken apart letter by letter."""
    if isinstance(names, str):
        raise TypeError(f"{what} must be several, such as [{names!r}], not the text {names!r}")
    return names


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode("utf-8", "replace")


def _entry_of(name: str) -> str:
    """The entry that a key is a part of. The brace that closes a name is the last one: user text has none."""
    return name[: name.rindex("}") + 1]
