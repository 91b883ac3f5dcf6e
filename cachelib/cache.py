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
from enum import Enum
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from . import entry as entries
from . import keys as key_names
from .connections import UNAVAILABLE, Connections
from .counters import Counters
from .durations import Duration, milliseconds
from .entry import Envelope, Freshness, Undecodable
from .entry_store import EntryStore, Look, Take
from .errors import EntryNotCounter, LoaderRecursion, ServerUnavailable, ValueNotCacheable
from .leases import LeaseKeeper
from .stats import Stats
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
_MOST_LEASES = 4  # waited for another's load, before a caller loads for itself


class _Reading(NamedTuple):
    """A look at an entry, and what it means."""

    freshness: Freshness
    value: Any
    envelope: Envelope | None
    look: Look


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
        self._store = EntryStore(redis, self.keys, self._lease_ms)

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
            stored = self._store.read_many(list(names.values()))
            decoded = {
                key: (*self._decoded(key, raw), left_ms)
                for key, (raw, left_ms) in zip(names, stored, strict=True)
                if raw is not None
            }
            tags = sorted({tag for envelope, _, _ in decoded.values() if envelope for tag in envelope.tags})
            versions = self._store.tag_versions(tags)
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

        A hit costs one round trip, a miss two; a stale or invalidated entry costs one more. Raises
        ``LoaderRecursion`` when the loader asks for the same key, and ``ValueNotCacheable`` for a value without
        MessagePack form.
        """
        ttl_ms = self.ttl_ms if ttl is None else milliseconds(ttl, "ttl")
        stale_ms = milliseconds(stale, "stale", zero_allowed=True)
        tags = _listed(tags, "tags")
        name = self.keys.entry(key)
        wait_ms = self._lease_ms * _MOST_LEASES if wait is None else milliseconds(wait, "wait", zero_allowed=True)
        deadline = time.monotonic() + wait_ms / 1_000
        waited = False
        while True:
            reading = self._look(key, name, tags, ttl_ms + stale_ms, Take.IF_GONE)
            if reading is None:
                self._counters.add("misses")
                return self._load(key, loader)[0]
            if reading.freshness is Freshness.FRESH:
                self._counters.add("hits")
                return reading.value  # type: ignore[no-any-return]
            if reading.look.lease == 0:  # stale, or stored but invalidated: the lease was not asked for yet
                take = Take.ALWAYS if reading.freshness is Freshness.STALE else Take.OR_WAIT
                reading = self._look(key, name, tags, ttl_ms + stale_ms, take) or reading
                if reading.freshness is Freshness.FRESH:  # somebody filled it between the two looks
                    self._counters.add("hits")
                    if reading.look.lease == 1:
                        self._give_back(name, reading.look.token)
                    return reading.value  # type: ignore[no-any-return]
            if reading.look.lease == 1:
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
            look = reading.look
            self._waiting.wait(key_names.wake(name, look.holder), min(left_s, -look.lease / 1_000))

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
            reading = self._look(key, name, tags, ttl_ms + stale_ms, Take.NOTHING)
            if reading is None:
                return False
            fresh = reading.freshness is Freshness.FRESH
            if fresh and entries.fresh_left_ms(reading.envelope, reading.look.left_ms) > enough_ms:
                return False
        reading = self._look(key, name, tags, ttl_ms + stale_ms, Take.ALWAYS)
        if reading is None or reading.look.lease != 1:
            return False
        value, load_ms = self._load_under(key, name, loader, reading, ttl_ms + stale_ms)
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
            versions = self._store.make_tag_versions(tags, ttl_ms + stale_ms)
            payloads = [self._encoded(k, v, stale_ms, 0, versions) for k, v in values.items()]
            ttls_ms = [entries.jittered(ttl_ms, random.random()) + stale_ms for _ in names]
            self._store.set_many(names, payloads, ttls_ms)
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
            return self._store.add(name, by, ttl_ms)
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
        dropped = list(_listed(tags, "tags"))
        for tag in dropped:
            self.keys.tag(tag)  # refuses what is no tag, before anything is removed
        pattern = None if matching is None else self.keys.matching(matching)
        removed = self._remove(names) if names else 0
        if dropped:
            with self._raising("invalidate tags"):
                removed += self._store.drop_tags(dropped)
        if pattern is not None:
            removed += self._remove_matching(pattern)
        return removed

    # Looking at it

    def stats(self) -> Stats:
        """Counts of this process."""
        counts = self._counters.read()
        return Stats(**{name: counts.get(name, 0) for name in Stats.__slots__})

    # Inside

    def _look(self, key: str, name: str, tags: Sequence[str], stored_ms: int, take: Take) -> _Reading | None:
        """One look at an entry. None when Redis does not answer."""
        try:
            look = self._store.look(name, tags, stored_ms, take)
            if look.stored is None:
                return _Reading(Freshness.GONE, MISS, None, look)
            envelope, value = self._decoded(key, look.stored)
            if value is MISS:
                return _Reading(Freshness.GONE, MISS, None, look)
            versions = look.tag_versions
            if more := entries.missing_tags(tags, envelope):
                versions = {**versions, **self._store.tag_versions(more)}
        except UNAVAILABLE as error:
            self._degraded("get_or_set", error)
            return None
        return _Reading(entries.judge(envelope, look.left_ms, versions), value, envelope, look)

    def _load_and_fill(
        self, key: str, name: str, loader: Callable[[], T], reading: _Reading, ttl_ms: int, stale_ms: int
    ) -> T:
        try:
            value, load_ms = self._load_under(key, name, loader, reading, ttl_ms + stale_ms)
        except Exception:
            if reading.freshness is Freshness.STALE:
                logger.warning("loader of %r failed; the stale value is served", key, exc_info=True)
                return reading.value  # type: ignore[no-any-return]
            raise
        self._fill(key, name, reading, value, load_ms, ttl_ms, stale_ms)
        return value

    def _load_under(
        self, key: str, name: str, loader: Callable[[], T], reading: _Reading, stored_ms: int
    ) -> tuple[T, int]:
        """Load while holding the lease; give it back if that fails."""
        tags = [self.keys.tag(tag) for tag in reading.look.tag_versions]
        try:
            with self._keeper.keeping(key_names.lease(name), reading.look.token, tags, self._lease_ms + stored_ms):
                return self._load(key, loader)
        except BaseException:
            self._give_back(name, reading.look.token)
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
        look = reading.look
        guards = {tag: version for tag, version in look.tag_versions.items() if version is not None}
        try:
            payload = self._encoded(key, value, stale_ms, load_ms, guards)
        except ValueNotCacheable:
            self._give_back(name, look.token)
            raise
        try:
            stored = self._store.fill(name, look.token, payload, entries.jittered(ttl_ms, random.random()) + stale_ms)
        except UNAVAILABLE as error:
            self._degraded("fill", error)
            return False
        if not stored:
            self._counters.add("refused")
        return stored

    def _give_back(self, name: str, token: str) -> None:
        try:
            self._store.give_back(name, token)
        except UNAVAILABLE as error:
            self._degraded("give a lease back", error)

    def _remove(self, names: Sequence[str]) -> int:
        with self._raising("delete"):
            return self._store.delete(names)

    def _remove_matching(self, pattern: str) -> int:
        """Remove what matches now, and what a load puts back that began before now.

        A load that is under way has a lease; if its lease is there during the whole first pass, it is found and
        voided; if not, the load filled the entry during the first pass, and the entry is there during the whole
        second one.
        """
        with self._raising("invalidate by pattern"):
            return sum(self._store.delete(names) for _ in range(2) for names in self._store.matching(pattern))

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
