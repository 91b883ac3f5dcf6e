"""The cache: values in Redis that are never left stale and never take the application down.

This file is its face. Reading is in ``reading.py``, loading under a lease in ``loading.py``, what is said to Redis in
``entry_store.py``, what an entry is in ``entry.py``.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar, Unpack

from . import entry as entries
from . import keys as key_names
from .connections import UNAVAILABLE, Connections, require_connections
from .counters import Counters
from .durations import Duration, milliseconds
from .entry import Entry, Freshness
from .entry_store import ANYTHING, NOTHING, EntryStore, Take, Write
from .errors import EntryNotCounter, ServerUnavailable, ValueNotCacheable
from .formats import Codec, Pickle, Undecodable
from .leases import LeaseKeeper
from .listener import listener_of
from .loading import Call, Loading, Request, checked_tags
from .missing import MISS
from .near import Near, NearStore
from .policy import Options, Policies, Policy
from .reading import Reader, Reading
from .remembered import Remembered, Unsent
from .stats import Explanation, Stats

T = TypeVar("T")

_NOT_COUNTABLE = ("not an integer", "WRONGTYPE", "would overflow")
_SHORTEST_LEASE_MS = 10
_MOST_TRIES = 3  # of a conditional write that others disturb


@dataclass(frozen=True, slots=True)
class Versioned(Generic[T]):
    """A value and what tells it from every other that the key may hold. See ``Cache.compare_and_set``."""

    value: T
    version: str


class Guard:
    """Leases of keys whose values are being read somewhere. Made by ``Cache.guard``."""

    def __init__(self, readings: Mapping[str, Reading], tags: Sequence[str]) -> None:
        self.readings = readings
        self.tags = tags

    def __repr__(self) -> str:
        return f"<Guard of {sorted(self.readings)}>"


class Cache:
    """Values in Redis, under one namespace, each with a TTL.

    >>> cache = Cache(connect(), namespace="shop", ttl="5m")
    >>> cache.get_or_set("user:1", load_user, ttl=60, stale=600, tags=["users"])

    Promises:
        - *Never stale.* After ``invalidate``, ``delete`` or ``clear`` returned, no load that began before can put its
          value back: not inline, in a thread, early, or in a worker, not through ``get_or_set_many`` or a ``guard``,
          and not into the near cache of this process. (A plain ``set`` says what the value is now: it has no load to
          check.)
        - *One load.* Of all processes that miss one key, one loads; the others are woken when it is there, and its
          threads wait without a command. A holder that dies delays the next load by ``lease`` at most. If a load
          fails, or is invalidated, the next of those who wait loads, at most a second later.
        - *The application survives Redis.* No call raises because Redis is slow or away: a read is a miss, within
          ``Settings.cache_timeout``, then at once while the circuit breaker is open; ``get_or_set`` loads. What could
          not be invalidated is remembered and sent when Redis is back, and until then not served by this process.
        - *Every entry expires*, up to a tenth earlier than asked for, so that they do not expire together.

    Non-promises: While Redis is away, other processes may serve what this one has invalidated, until it is told; what
    is remembered is lost with the process (a log line says so). A near cache of *another* process serves the old value
    for as long as the word takes to get there, usually below a millisecond, and at most a second. A loader that reads
    from a database replica that lags behind caches what the replica has.

    Arguments:
        redis: from ``connect``.
        namespace: keeps the keys of several caches apart. Any text.
        lease: how long a load is waited for whose process has died. A load that runs longer keeps its lease.
        near: keep what is read in this process's memory too: ``Near(max_entries=10_000)``, or True.
        format: "msgpack", "json", ``Pickle(secret)``, or a ``Codec`` that says more.
        strict: raise ``ServerUnavailable`` where otherwise the call would go on without Redis.
        options: how values are loaded and kept, where a call does not say; see ``Options``. TTL: 300 s.

    Raises ``ValueError`` or ``TypeError`` for what cannot be meant.
    """

    def __init__(
        self,
        redis: Connections,
        *,
        namespace: str,
        lease: Duration = 10,
        near: Near | bool | None = None,
        format: Literal["msgpack", "json"] | Pickle | Codec = "msgpack",
        strict: bool = False,
        **options: Unpack[Options],
    ) -> None:
        require_connections(redis)
        self.redis = redis
        self.namespace = namespace
        self.keys = key_names.CacheKeys(namespace)
        self.strict = strict
        self._codec = format if isinstance(format, Codec) else Codec(format)
        self.policies = Policies(Policy().changed(options), self._codec.check_type)
        self._counters = Counters()
        self.lease_ms = lease_ms = milliseconds(lease, "lease")
        if lease_ms < _SHORTEST_LEASE_MS:
            raise ValueError(
                f"lease={lease!r} is shorter than a round trip may take; give {_SHORTEST_LEASE_MS} ms or more"
            )
        self._store = EntryStore(redis, self.keys, lease_ms)
        self._remembered = Remembered(redis, _Sending(redis, self._store, self.keys), f"cache {namespace!r}")
        self._near: NearStore | None = None
        if near:
            if near is not True and not isinstance(near, Near):
                raise TypeError(f"near={near!r} must be True or Near(...)")
            if redis.is_cluster:
                raise ValueError(f"near caches are not supported on a Cluster ({redis.address}) yet; leave out near=")
            self._near = NearStore(
                Near() if near is True else near,
                entry_prefix=self.keys.entry_prefix,
                tag_prefix=self.keys.tag_prefix,
                watch=listener_of(redis).watch,
            )
        keeper = LeaseKeeper(redis, self._store, lease_ms)
        self._reader = Reader(
            redis,
            self.keys,
            self._store,
            self._codec,
            self._counters,
            self._remembered,
            self._near,
            keeper,
            strict=strict,
        )
        self._loading = Loading(
            redis, self.keys, self._store, self._codec, self._reader, self._counters, self._remembered, keeper, lease_ms
        )

    def __repr__(self) -> str:
        stats = self.stats()
        trouble = f", breaker {stats.breaker}" if stats.breaker != "closed" else ""
        trouble += f", {stats.unsent} invalidations not sent" if stats.unsent else ""
        return f"<Cache {self.namespace!r} at {self.redis.address} [hit ratio {stats.hit_ratio:.0%}{trouble}]>"

    @property
    def ttl_ms(self) -> int:
        """How long a value is fresh, where a call does not say."""
        return self.policies.default.ttl_ms

    # Reading

    def get(self, key: str, default: T | None = None, *, type: Any = Any) -> Any | T:
        """The value of a key, fresh or stale; ``default`` when it is not cached.

        One round trip, none from the near cache; two for an entry with tags, whose versions are looked up once the
        entry names them. Pass ``MISS`` as the default to tell a cached ``None`` from a miss. A cached exception is a
        miss here. ``type``: what the value is to be restored as; see ``Options``.
        """
        if self._near is not None and (value := self._reader.near_value(key, type)) is not MISS:
            return value
        reading = self._reader.read_one(key, plain=type is Any)
        if reading is None:
            self._counters.add("misses")
            return default
        if reading.value is not MISS:  # fresh, and unpacked already
            self._counters.add("hits")
            return reading.value
        return self._value_of(reading, default, type)

    def get_many(self, keys: Iterable[str], *, type: Any = Any) -> dict[str, Any]:
        """The values of those keys that are cached. One round trip, and one more if some have tags."""
        wanted = list(dict.fromkeys(_listed(keys, "keys")))
        found: dict[str, Any] = {}
        if self._near is not None:
            near = {key: self._reader.near_value(key, type) for key in wanted}
            found = {key: value for key, value in near.items() if value is not MISS}
        left = [key for key in wanted if key not in found]
        if left:
            found |= self._get_from_redis(left, type)
        return {key: found[key] for key in wanted if key in found}

    def get_versioned(self, key: str, *, type: Any = Any) -> Versioned[Any] | None:
        """The value of a key with its version, for ``compare_and_set``; None when it is not cached. Asks Redis."""
        reading = self._one(key)
        if reading is None or reading.entry is None:
            return None
        try:
            return Versioned(self._reader.value(reading, type), reading.entry.token)
        except Undecodable:
            return None

    def exists(self, key: str) -> bool:
        """Whether a key has a value that may be served, fresh or stale. False when Redis does not answer."""
        return self._one(key) is not None

    def ttl(self, key: str) -> float | None:
        """For how many seconds a key stays fresh; 0.0 for a stale one, None for one that is not cached."""
        reading = self._one(key)
        if reading is None:
            return None
        return entries.fresh_left_ms(reading.entry, reading.look.left_ms) / 1_000

    def get_or_set(
        self, key: str, loader: Callable[[], T], *, tags: Sequence[str] = (), **options: Unpack[Options]
    ) -> T:
        """The cached value, or that of ``loader``, which is then cached.

        >>> cache.get_or_set("user:1", lambda: load_user(1), ttl=60, stale=600, tags=["users"])

        Arguments:
            key: any text of up to 1,024 bytes.
            loader: called without arguments, by one process at a time; what it returns is cached, also None. It may
                return ``Loaded(value, ttl=..., tags=...)`` to say more. What it raises reaches the caller, unless there
                is a stale value to serve instead.
            tags: groups that the entry belongs to; invalidating one of them removes it.
            options: see ``Options``; those of the cache where not given.

        A hit costs one round trip (none from the near cache), a miss two; a stale or invalidated entry one more, and so
        does one with tags that are not named here (``Loaded``). Raises
        ``LoaderRecursion`` when the loader asks for the same key, ``LoadTimedOut`` after ``hard_timeout``, and
        ``ValueNotCacheable`` for a value that has no form in the cache's format.
        """
        policy = self.policies.of(options)
        if self._near is not None and (value := self._reader.near_value(key, policy.type)) is not MISS:
            return value  # type: ignore[no-any-return]
        return self._loading.value(Request(key, loader, policy, checked_tags(tags, self.keys)))  # type: ignore[no-any-return]

    def get_or_set_many(
        self,
        keys: Iterable[str],
        loader: Callable[[list[str]], Mapping[str, T]],
        *,
        tags: Sequence[str] = (),
        **options: Unpack[Options],
    ) -> dict[str, T]:
        """The cached values of several keys, and those of one call of ``loader`` for all that are missing.

        >>> cache.get_or_set_many(["user:1", "user:2"], load_users, tags=["users"])

        Arguments:
            loader: is given the keys that nobody has and nobody else is loading, and returns their values by key (each
                may be a ``Loaded``). A key that it leaves out is left out of the result, and not cached.
            tags, options: as for ``get_or_set``; the timeouts, ``early``, ``refresh`` and ``exceptions`` do not apply:
                what is stale is loaded with what is missing, in the caller.

        One round trip where all are there, two with misses, three with stale ones. What another is loading is waited
        for, after ours has been stored. Duplicate keys count once.
        """
        policy = self.policies.of(options)
        wanted = list(dict.fromkeys(_listed(keys, "keys")))
        found: dict[str, Any] = {}
        if self._near is not None:
            near = {key: self._reader.near_value(key, policy.type) for key in wanted}
            found = {key: value for key, value in near.items() if value is not MISS}
        left = [key for key in wanted if key not in found]
        found |= self._loading.values(left, loader, policy, checked_tags(tags, self.keys)) if left else {}
        return {key: found[key] for key in wanted if key in found}

    def refresh(
        self,
        key: str,
        loader: Callable[[], T],
        *,
        tags: Sequence[str] = (),
        unless_fresh_for: Duration = 0,
        token: str = "",
        **options: Unpack[Options],
    ) -> bool:
        """Load a key anew, under its lease, although it may still be fresh.

        Arguments: as for ``get_or_set``, and
            unless_fresh_for: leave an entry alone that stays fresh for longer than this. 0: always load.
                The timeouts, ``wait``, ``early`` and ``refresh`` mean nothing here: this call is the load.
            token: of the lease that a ``Refresh`` carries, to go on with it.

        Returns whether a value was loaded and stored. It is not when another process is loading the key,
        the entry is fresh enough, the key was invalidated meanwhile, or Redis does not answer.
        """
        request = Request(key, loader, self.policies.of(options), checked_tags(tags, self.keys))
        enough_ms = milliseconds(unless_fresh_for, "unless_fresh_for", zero_allowed=True)
        return self._loading.refresh(request, unless_fresh_for_ms=enough_ms, token=token, wait_ms=0)

    # Writing

    def set(
        self,
        key: str,
        value: object,
        *,
        ttl: Duration | None = None,
        stale: Duration | None = None,
        tags: Sequence[str] = (),
        type: Any = Any,
    ) -> bool:
        """Store a value; a load of the key that is under way will not overwrite it.

        Arguments: ``ttl``, ``stale`` and ``tags`` as for ``get_or_set``; with ``type``, a value of another type is
        refused with ``ValueNotCacheable``. Returns whether Redis has it: if not, what the key held is invalidated, as
        soon as Redis answers. One round trip. It says what the value *is*: for what was read from a database, and may
        be out of date already, use ``get_or_set``, ``refresh`` or ``guard``.
        """
        return self._set(self._write({key: value}, ttl, stale, tags, type))

    def set_many(
        self,
        values: Mapping[str, object],
        *,
        ttl: Duration | None = None,
        stale: Duration | None = None,
        tags: Sequence[str] = (),
        guard: Guard | None = None,
    ) -> bool:
        """Store several values in one round trip. All or none (on a Cluster: per slot); returns whether all are.

        With ``guard``, each only if nothing has invalidated it since the guard was taken.
        """
        if not values:
            return True
        if guard is None:
            return self._set(self._write(values, ttl, stale, tags))
        policy, tags = self._policy(ttl, stale), checked_tags(dict.fromkeys((*guard.tags, *tags)), self.keys)
        readings = [guard.readings[key] for key in values if key in guard.readings]
        stored = self._loading.fill_many(readings, values, policy, tags, 0) if readings else set()
        self._reader.changed(values)
        return len(stored) == len(values)

    @contextmanager
    def guard(self, keys: Iterable[str], *, tags: Sequence[str] = ()) -> Iterator[Guard]:
        """Take the leases of keys *before* their values are read, so that only what is still true is stored after.

        >>> with cache.guard(["user:1", "user:2"], tags=["users"]) as guard:
        ...     users = read_users([1, 2])
        ...     cache.set_many(users, guard=guard)

        While it is open, others who miss the keys wait for it; who asks for them inside it gets ``LoaderRecursion``.
        Keys that somebody else is loading are not guarded, and not stored.
        """
        wanted = list(dict.fromkeys(_listed(keys, "keys")))
        names = [self.keys.entry(key) for key in wanted]
        tags = checked_tags(tags, self.keys)
        readings = self._reader.look(wanted, names, tags, Take.ALWAYS, near=False) if wanted else []
        leased = [reading for reading in readings or [] if reading.leased]
        if not leased:
            yield Guard({}, tags)
            return
        try:
            with (
                self._loading.not_twice([reading.key for reading in leased]),
                self._loading.keeper.keeping([reading.name for reading in leased], leased[0].look.token),
            ):
                yield Guard({reading.key: reading for reading in leased}, tags)
        finally:
            try:  # those that were stored have no lease any more, and are not touched
                self._store.give_back([reading.name for reading in leased], leased[0].look)
            except UNAVAILABLE as error:
                self._reader.degraded("guard", error)

    def add(
        self,
        key: str,
        value: object,
        *,
        ttl: Duration | None = None,
        stale: Duration | None = None,
        tags: Sequence[str] = (),
    ) -> bool:
        """Store a value only where there is none. Of several who try, one is told True.

        One round trip; two where there is something already, three where that may not be served.
        """
        write = self._write({key: value}, ttl, stale, tags)
        if self._set(write, expected=NOTHING):
            return True
        for reading in self._looked_at(key):
            if reading.look.stored is None:
                done = self._set(write, expected=NOTHING)
            elif self._is_served(reading):
                return False
            elif reading.entry is not None:  # invalidated, or its value cannot be read: as good as nothing
                done = self._set(write, expected=reading.entry.token)
            else:
                done = self._set_over_rubbish(reading, write)
            if done:
                return True
        return False

    def replace(
        self,
        key: str,
        value: object,
        *,
        ttl: Duration | None = None,
        stale: Duration | None = None,
        tags: Sequence[str] = (),
    ) -> bool:
        """Store a value only where there is one that may be served. Returns whether it was. Two round trips."""
        write = self._write({key: value}, ttl, stale, tags)
        for reading in self._looked_at(key):
            if reading.entry is None or not self._is_served(reading):
                return False
            if self._set(write, expected=reading.entry.token, valid=reading.entry):
                return True
        return False

    def compare_and_set(
        self,
        key: str,
        value: object,
        version: str,
        *,
        ttl: Duration | None = None,
        stale: Duration | None = None,
        tags: Sequence[str] = (),
    ) -> bool:
        """Store a value only if the key still holds what ``get_versioned`` returned. Returns whether it was.

        Not if it was written, deleted or invalidated since. Two round trips. On a Cluster, a tag that only the old
        value had may be invalidated at the same moment without being noticed; name the same tags for the new one.
        """
        write = self._write({key: value}, ttl, stale, tags)
        reading = self._one(key)
        if reading is None or reading.entry is None or reading.entry.token != version:
            return False
        return self._set(write, expected=version, valid=reading.entry)

    def incr(self, key: str, by: int = 1, *, ttl: Duration | None = None) -> int | None:
        """Add to a whole number; a new one starts at 0 and gets the TTL in the same step.

        Returns the new value, or None when Redis does not answer (it may then have been added or not), or has not been
        told yet that the key was invalidated.
        ``get`` reads it, ``set`` with a whole number and no tags starts it elsewhere. Raises ``EntryNotCounter`` for a
        key that holds something else.
        """
        if not isinstance(by, int) or isinstance(by, bool):
            raise TypeError(f"by must be a whole number, not {by!r}")
        if not -(2**63) <= by < 2**63:
            raise ValueError(f"by={by} is beyond 64 bits, which is what Redis counts with")
        ttl_ms = self.ttl_ms if ttl is None else milliseconds(ttl, "ttl")
        name = self.keys.entry(key)
        try:
            if self._remembered.any and self._remembered.covers(key):
                return None  # it would go on from a count that is to be deleted, and be deleted with it
            return self._store.add(name, by, ttl_ms)
        except UNAVAILABLE as error:
            if any(why in str(error) for why in _NOT_COUNTABLE):
                raise EntryNotCounter(key, overflow="would overflow" in str(error)) from None
            self._reader.degraded("incr", error)
            return None
        finally:
            self._reader.changed([key])

    def decr(self, key: str, by: int = 1, *, ttl: Duration | None = None) -> int | None:
        """Take from a whole number; see ``incr``. It may become negative."""
        if not isinstance(by, int) or isinstance(by, bool):
            raise TypeError(f"by must be a whole number, not {by!r}")
        return self.incr(key, -by, ttl=ttl)

    def touch(self, key: str, ttl: Duration | None = None) -> bool:
        """Give a fresh value a new TTL from now. Returns whether there was one; a stale one stays as it is."""
        reading, touched = self._touched(key, ttl)
        return touched and reading is not None and reading.freshness is Freshness.FRESH

    def getex(self, key: str, ttl: Duration | None = None, default: T | None = None, *, type: Any = Any) -> Any | T:
        """The value of a key, giving it a new TTL from now if it is fresh. One round trip, two with tags."""
        reading, _ = self._touched(key, ttl)
        if reading is None:
            self._counters.add("misses")
            return default
        return self._value_of(reading, default, type)

    def getdel(self, key: str, default: T | None = None, *, type: Any = Any) -> Any | T:
        """Take a value out: of several who try, one gets it. Voids a load of the key that is under way.

        ``default`` when it is not cached, and when Redis does not answer; then it may be gone or not.
        """
        name = self.keys.entry(key)
        unsent = self._remembered.seen()
        try:
            reading = self._reader.judged(key, name, self._store.take_out(name), unsent)
        except UNAVAILABLE as error:
            self._reader.degraded("getdel", error)
            return default
        finally:
            self._reader.changed([key])
        return self._value_of(reading, default, type)

    # Removing

    def expire(self, key: str) -> bool:
        """Make a value stale, but keep it as long as it was to be served stale: for when a new one cannot be loaded.

        Voids a load of the key that is under way. One without a stale window is deleted. Returns whether there was one.
        """
        name = self.keys.entry(key)
        self._counters.add("invalidations")
        try:
            return self._store.expire(name, self.redis.cache)
        except UNAVAILABLE as error:
            self._remember(Unsent(expired={key: None}), error, "expire", self.strict)
            return False
        finally:
            self._reader.changed([key])

    def delete(self, *keys: str, strict: bool | None = None) -> int:
        """Remove keys, and void the loads of them that are under way. Returns how many were stored.

        One round trip. When Redis does not answer it is remembered and sent later, and 0 returned.
        """
        return self.invalidate(keys=keys, strict=strict) if keys else 0

    def invalidate(
        self,
        *,
        keys: Iterable[str] = (),
        tags: Iterable[str] = (),
        matching: str | None = None,
        strict: bool | None = None,
    ) -> int:
        """Remove what changed: by key, by tag, by pattern.

        >>> cache.invalidate(keys=["user:1"], tags=["users"], matching="post:list:*")

        Arguments:
            keys: removed, with the loads of them that are under way.
            tags: every entry that names one of them is gone at once, however many there are, and so is every load that
                is under way: one write for all of them.
            matching: a pattern with ``*``, ``?`` and ``[...]``. Found with SCAN and removed in batches, without
                blocking others; it looks at every key of the server, twice, so it is a tool for people and
                migrations. Prefer tags.
            strict: wait for Redis for 2 s, raise ``ServerUnavailable`` when it does not answer, and remember nothing.
                Default: the cache's.

        Returns how many keys and tags were removed; 0 when Redis does not answer: then it is remembered, and sent when
        it does.
        """
        unsent = Unsent(
            keys=dict.fromkeys(_listed(keys, "keys")),
            tags=dict.fromkeys(_listed(tags, "tags")),
            patterns={} if matching is None else {matching: None},
        )
        for key in unsent.keys:  # refuses what is none, before anything is removed
            self.keys.entry(key)
        for tag in unsent.tags:
            self.keys.tag(tag)
        for pattern in unsent.patterns:
            self.keys.matching(pattern)
        return self._invalidate(unsent, "invalidate", strict)

    def clear(self, *, strict: bool | None = None) -> None:
        """Invalidate everything in this namespace, and every load that is under way: one write, whatever its size.

        The memory is freed as the entries expire. Other namespaces are not touched.
        """
        self._invalidate(Unsent(everything=True), "clear", strict)

    # Looking at it

    def stats(self) -> Stats:
        """Counts of this process, and how things stand."""
        counts = self._counters.read()
        near = self._near.stats if self._near is not None else None
        now: dict[str, Any] = {
            "unsent": len(self._remembered),
            "near_entries": near.entries if near else 0,
            "near_bytes": near.bytes if near else 0,
            "breaker": self.redis.breaker.state,
        }
        known: dict[str, Any] = {name: counts.get(name, 0) for name in Stats.__slots__}
        return Stats(**known | now)

    def explain(self, key: str) -> Explanation:
        """Why a key is served or is not, for a person who asks. A few round trips; changes nothing.

        Raises ``ServerUnavailable`` when Redis does not answer.
        """
        from .explaining import explained

        try:
            return explained(
                key,
                keys=self.keys,
                store=self._store,
                redis=self.redis,
                codec=self._codec,
                near=self._near,
                remembered=self._remembered,
            )
        except UNAVAILABLE as error:
            raise ServerUnavailable(self.redis.address, error, doing="explain") from error

    # Inside

    def call(self, key: str, loader: Callable[[], T], policy: Policy, tags: Sequence[str], call: Call) -> T:
        """``get_or_set`` for a call that a refresher can make elsewhere, with options that were checked before."""
        if self._near is not None and (value := self._reader.near_value(key, policy.type)) is not MISS:
            return value  # type: ignore[no-any-return]
        return self._loading.value(Request(key, loader, policy, tags, call))  # type: ignore[no-any-return]

    def refresh_call(
        self,
        key: str,
        loader: Callable[[], Any],
        policy: Policy,
        tags: Sequence[str],
        *,
        unless_fresh_for: Duration,
        token: str,
        wait_ms: int = 0,
    ) -> bool:
        """``refresh`` with options that were checked before, which waits so long for a load that is under way."""
        enough_ms = milliseconds(unless_fresh_for, "unless_fresh_for", zero_allowed=True)
        request = Request(key, loader, policy, tags)
        return self._loading.refresh(request, unless_fresh_for_ms=enough_ms, token=token, wait_ms=wait_ms)

    def _one(self, key: str) -> Reading | None:
        """What may be served of a key; None where there is nothing, and when Redis does not answer."""
        readings = self._reader.read([key], near=False)
        return readings[0] if readings and self._is_served(readings[0]) else None

    def _looked_at(self, key: str) -> Iterator[Reading]:
        """What is stored under a key, now and, when others disturb, again."""
        for _ in range(_MOST_TRIES):
            readings = self._reader.read([key], near=False)
            if not readings:
                return
            yield readings[0]

    def _is_served(self, reading: Reading) -> bool:
        """Whether there is a value for readers: no exception, and none that cannot be read."""
        if reading.freshness is Freshness.GONE or reading.raised:
            return False
        try:
            self._reader.value(reading)
        except Undecodable:
            return False
        return True

    def _get_from_redis(self, keys: Sequence[str], type: Any) -> dict[str, Any]:
        found, others = self._reader.read_many(keys, plain=type is Any)
        if found:
            self._counters.add("hits", len(found))
        for reading in others:
            if reading.freshness is Freshness.GONE or reading.raised:
                continue
            try:
                found[reading.key] = self._reader.value(reading, type)
            except Undecodable:
                continue
            self._counters.add("hits" if reading.freshness is Freshness.FRESH else "stale")
        if len(found) < len(keys):
            self._counters.add("misses", len(keys) - len(found))
        return found

    def _value_of(self, reading: Reading, default: Any, type: Any) -> Any:
        if reading.freshness is not Freshness.GONE and not reading.raised:
            try:
                value = self._reader.value(reading, type)
            except Undecodable:
                return default
            self._counters.add("hits" if reading.freshness is Freshness.FRESH else "stale")
            return value
        self._counters.add("misses")
        return default

    def _policy(self, ttl: Duration | None, stale: Duration | None) -> Policy:
        given: dict[str, Any] = {name: value for name, value in (("ttl", ttl), ("stale", stale)) if value is not None}
        return self.policies.of(given)

    def _write(
        self,
        values: Mapping[str, object],
        ttl: Duration | None,
        stale: Duration | None,
        tags: Sequence[str],
        type: Any = Any,
    ) -> Write:
        """What is to be stored. Raises for what cannot be."""
        policy, tags = self._policy(ttl, stale), checked_tags(tags, self.keys)
        bodies: dict[str, bytes] = {}
        ttls_ms = []
        for key, value in values.items():
            name = self.keys.entry(key)
            ttl_ms = policy.ttl_ms if policy.ttl_of is None else policy.ttls_ms(value)[0]
            ttl_ms = entries.jittered(ttl_ms, random.random())
            try:
                bodies[name], _ = self._loading.body(key, name, value, tags, type, ttl_ms=ttl_ms)
            except Undecodable as error:
                raise ValueNotCacheable(key, value, error) from None
            ttls_ms.append(ttl_ms + policy.stale_ms)
        return Write(bodies, ttls_ms, policy.stale_ms, tags, list(values))

    def _set(self, write: Write, *, expected: str = ANYTHING, valid: Entry | None = None) -> bool:
        try:
            return self._store.set(write, expected=expected, valid=valid)
        except UNAVAILABLE as error:
            if expected != ANYTHING:
                self._reader.degraded("set", error)
            else:  # the caller says that the old value is not true any more
                self._remember(Unsent(keys=dict.fromkeys(write.keys)), error, "set", self.strict)
            return False
        finally:
            self._reader.changed(write.keys)

    def _set_over_rubbish(self, reading: Reading, write: Write) -> bool:
        """Store where there is something that is no entry at all, which no token tells from another."""
        try:
            self._store.take_out(reading.name)
        except UNAVAILABLE as error:
            self._reader.degraded("add", error)
            return False
        return self._set(write, expected=NOTHING)

    def _touched(self, key: str, ttl: Duration | None) -> tuple[Reading | None, bool]:
        """What is stored under a key, and whether it was given a new TTL; None when nothing is."""
        ttl_ms = self.ttl_ms if ttl is None else milliseconds(ttl, "ttl")
        name = self.keys.entry(key)
        unsent = self._remembered.seen()
        try:
            look, touched = self._store.touch(name, ttl_ms, ())
            if not touched and look.stored is not None and (tags := _tags_in(look.stored)):
                look, touched = self._store.touch(name, ttl_ms, tags)
            if look.stored is None:
                return None, False
            return self._reader.judged(key, name, look, unsent), touched
        except UNAVAILABLE as error:
            self._reader.degraded("touch", error)
            return None, False
        finally:
            self._reader.changed([key])

    def _invalidate(self, unsent: Unsent, doing: str, strict: bool | None) -> int:
        self._counters.add("invalidations", len(unsent))
        strict = self.strict if strict is None else strict
        try:
            return _send(self.redis, self._store, self.keys, unsent, patient=strict)
        except UNAVAILABLE as error:
            self._remember(unsent, error, doing, strict)
            return 0
        finally:
            everything = unsent.everything or bool(unsent.patterns)
            self._reader.changed(unsent.keys, unsent.tags, everything=everything)

    def _remember(self, unsent: Unsent, error: BaseException, doing: str, strict: bool) -> None:
        self._counters.add("errors")
        if strict:
            raise ServerUnavailable(self.redis.address, error, doing=doing) from error
        self._counters.add("remembered", len(unsent))
        self._remembered.add(unsent, error)


class _Sending:
    """Tells Redis of invalidations that were remembered, without keeping the cache alive."""

    def __init__(self, redis: Connections, store: EntryStore, keys: key_names.CacheKeys) -> None:
        self._redis = redis
        self._store = store
        self._keys = keys

    def __call__(self, unsent: Unsent) -> object:
        return _send(self._redis, self._store, self._keys, unsent, patient=True)


def _send(redis: Connections, store: EntryStore, keys: key_names.CacheKeys, unsent: Unsent, *, patient: bool) -> int:
    """Tell Redis of invalidations. Returns how many keys and tags were removed; raises redis-py's errors.

    Each part on its own, so that one which Redis does not take now (it may have no memory left for a version) does not
    hold up the others. The first error is raised in the end.
    """
    tags = [*unsent.tags, *([entries.WHOLE] if unsent.everything else [])]
    names = [keys.entry(key) for key in unsent.keys]
    client = redis.coordination if patient else redis.cache  # which asks the breaker, and waits no longer than a read
    parts: list[Callable[[], int]] = [partial(store.delete, names, client)] if names else []
    parts += [partial(store.expire, keys.entry(key), client) for key in unsent.expired]
    parts += [partial(store.drop, tags, client)] if tags else []
    # A load that is under way has a lease; if its lease is there during the whole first pass, it is found and voided;
    # if not, the load filled the entry during the first pass, and the second one finds it.
    for pattern in unsent.patterns:
        parts += [partial(_delete_matching, redis, store, keys.matching(pattern))] * 2
    removed, failure = 0, None
    for part in parts:
        try:
            removed += part()
        except UNAVAILABLE as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return removed


def _delete_matching(redis: Connections, store: EntryStore, pattern: str) -> int:
    return sum(store.delete(names, redis.coordination) for names in store.matching(pattern))


def _tags_in(stored: bytes) -> Sequence[str]:
    """The tags that an entry names."""
    try:
        return entries.decode(stored).tags
    except Undecodable:
        return ()


C = TypeVar("C", bound=Iterable[str])


def _listed(names: C, what: str) -> C:
    """Names as they were given; one text in their place would be taken apart letter by letter."""
    if isinstance(names, str):
        raise TypeError(f"{what} must be several, such as [{names!r}], not the text {names!r}")
    return names
