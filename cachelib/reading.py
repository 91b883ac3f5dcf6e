"""Reading entries: what is stored, what it means now, and what it is when Redis does not answer.

The invariant: a value leaves here only if its versions are the current ones, and no invalidation of it waits in this
process to be sent. Everything else is a miss, and counted.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from . import entry as entries
from .circuit import LOST, CircuitOpen
from .connections import UNAVAILABLE, Connections
from .counters import Counters
from .entry import Entry, Freshness
from .entry_store import EntryStore, Look, Take
from .errors import ServerUnavailable
from .formats import Codec, Undecodable
from .keys import CacheKeys
from .leases import LeaseKeeper
from .missing import MISS
from .near import ABSENT, Marker, NearStore
from .remembered import Remembered, Unsent

logger = logging.getLogger(__name__)

_SEEN = Look(None, 0, {})


class Reading(NamedTuple):
    """A look at an entry, and what it means."""

    key: str
    name: str
    freshness: Freshness
    entry: Entry | None
    """None for what is not stored, or cannot be read."""
    look: Look
    marker: Marker | None = None
    """Lets the near cache keep it, if nothing has dropped it since before it was asked for."""
    value: Any = MISS
    """Unpacked already, when it was as simple as it mostly is; then it is fresh, and the rest says nothing."""

    @property
    def leased(self) -> bool:
        """Whether the lease to load it is ours."""
        return self.look.lease == 1

    @property
    def raised(self) -> bool:
        """Whether it is a cached exception."""
        return self.entry is not None and self.entry.raised


class Reader:
    """Reads the entries of one cache."""

    def __init__(
        self,
        redis: Connections,
        keys: CacheKeys,
        store: EntryStore,
        codec: Codec,
        counters: Counters,
        remembered: Remembered,
        near: NearStore | None,
        keeper: LeaseKeeper,
        *,
        strict: bool,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._store = store
        self._codec = codec
        self._counters = counters
        self._remembered = remembered
        self._near = near
        self._keeper = keeper
        self._strict = strict

    def read(self, keys: Sequence[str], tags: Sequence[str] = (), *, near: bool = True) -> list[Reading] | None:
        """What is stored, without taking leases. None when Redis does not answer.

        Arguments:
            near: whether the values will be asked for, so that the near cache may keep them.
        """
        names = [self._keys.entry(key) for key in keys]
        return self._readings(keys, names, lambda: self._store.read(names, tags), "get", near=near)

    def read_many(self, keys: Sequence[str], *, plain: bool) -> tuple[dict[str, Any], Sequence[Reading]]:
        """As ``read``: the values of what is as simple as it mostly is, and what is stored otherwise.

        Arguments:
            plain: the values are wanted as the format has them.
        """
        if not plain or self._near is not None or self._remembered.any:
            return {}, self.read(keys) or ()
        names = [self._keys.entry(key) for key in keys]
        found: dict[str, Any] = {}
        unsure: list[int] = []
        try:
            looks = self._store.read(names)
            whole = (looks[0].versions[entries.WHOLE],)
            for i, look in enumerate(looks):
                if look.stored is None:
                    continue
                value = entries.fresh_value(look.stored, look.left_ms, whole, ())
                if value is entries.UNSURE:
                    unsure.append(i)
                else:
                    found[keys[i]] = value
            if self._remembered.any:  # since we looked
                found, unsure = {}, list(range(len(looks)))
            if not unsure:
                return found, ()
            return found, self._judged(
                [keys[i] for i in unsure], [names[i] for i in unsure], [looks[i] for i in unsure], None
            )
        except UNAVAILABLE as error:
            self.degraded("get", error)
            return {}, ()

    def look(
        self,
        keys: Sequence[str],
        names: Sequence[str],
        tags: Sequence[str],
        take: Take,
        token: str = "",
        *,
        near: bool = True,
    ) -> list[Reading] | None:
        """What is stored, taking leases as asked. None when Redis does not answer."""
        new = "" if token else self._store.next_token()
        ask = partial(self._store.look, names, tags, take, token or new)
        return self._readings(keys, names, ask, "get_or_set", near=near, token=new)

    def read_one(self, key: str, *, plain: bool) -> Reading | None:
        """As ``read``, for one key. ``plain``: the value is wanted as the format has it."""
        if self._near is not None or self._store.split:
            readings = self.read([key])
            return readings[0] if readings else None
        name = self._keys.entry(key)
        unsent = self._remembered.seen()
        try:
            stored, left_ms, versions = self._store.read_one(name)
            if plain and stored is not None and unsent is None and not self._remembered.any:
                value = entries.fresh_value(stored, left_ms, versions, ())
                if value is not entries.UNSURE:
                    return Reading(key, name, Freshness.FRESH, None, _SEEN, None, value)
            return self.judged(key, name, Look(stored, left_ms, {entries.WHOLE: versions[0]}), unsent)
        except UNAVAILABLE as error:
            self.degraded("get", error)
            return None

    def look_one(
        self, key: str, name: str, tags: Sequence[str], take: Take, *, plain: bool, near: bool = True
    ) -> Reading | None:
        """As ``look``, for one key. ``plain``: the value is wanted as the format has it."""
        if self._near is not None or self._store.split:
            readings = self.look([key], [name], tags, take, near=near)
            return readings[0] if readings else None
        unsent = self._remembered.seen()
        token = self._store.next_token()
        try:
            reply = self._store.look_one(name, tags, take, token)
            since, versions, (stored, left_ms, lease, holder) = reply
            if plain and lease == 0 and unsent is None and not self._remembered.any:
                value = entries.fresh_value(stored, left_ms, versions, tags)
                if value is not entries.UNSURE:
                    return Reading(key, name, Freshness.FRESH, None, _SEEN, None, value)
            known = dict(zip((entries.WHOLE, *tags), versions, strict=True))
            look = Look(stored, left_ms, known, lease, holder.decode("ascii", "replace"), token, since)
            return self.judged(key, name, look, unsent)
        except UNAVAILABLE as error:
            self._lost([name], token, error)
            self.degraded("get_or_set", error)
            return None

    def judged(self, key: str, name: str, look: Look, unsent: Unsent | None) -> Reading:
        """What a look means. Raises redis-py's errors, when more has to be asked.

        Arguments:
            unsent: what Redis had not heard of when it was asked.
        """
        return self._judged([key], [name], [look], unsent)[0]

    def value(self, reading: Reading, type: Any = Any, *, early_ms: int = 0) -> Any:
        """Unpack, and let the near cache keep it. Raises ``Undecodable``, which is counted.

        Arguments:
            early_ms: how long before it is stale somebody is to look at it in Redis again, to refresh it.
        """
        if reading.value is not MISS:
            return reading.value
        entry = reading.entry
        if entry is None:
            raise Undecodable("there is no entry")
        try:
            if entry.body is None:  # not kept near: who counts wants to know the count
                if type is Any or type is int:
                    return entry.counter
                return self._codec.unpack(*self._codec.pack(entry.counter, reading.name), reading.name, type)
            packed = entries.packed_value(entry.body)
            value = self._codec.unpack(entry.body.how, packed, reading.name, type)
        except Undecodable as error:
            if self._near is not None:
                self._near.abandon(reading.key, reading.marker)
            self.undecodable(reading.key, error)
            raise
        if self._near is not None and reading.marker is not None:
            kept = (entry.body.how, bytes(packed), reading.name) if self._near.options.copy else (type, value)
            self._near.put(
                reading.key,
                reading.marker,
                kept,
                tags=entry.body.tags,
                ttl_ms=entries.fresh_left_ms(entry, reading.look.left_ms) - early_ms,
                size=len(packed),
            )
        return value

    def near_value(self, key: str, type: Any) -> Any:
        """What this process keeps of a key; ``MISS`` when it does not."""
        near = self._near
        if near is None:
            return MISS
        kept = near.get(key)
        if kept is ABSENT:
            return MISS
        if near.options.copy:
            how, packed, name = kept
            try:
                value = self._codec.unpack(how, packed, name, type)
            except Undecodable:  # as this type; Redis is asked, and counts it
                return MISS
        else:
            kept_type, value = kept
            if kept_type is not type:
                return MISS
        self._counters.add("near_hits")
        return value

    def undecodable(self, key: str, error: Undecodable) -> None:
        """Count what cannot be read."""
        self._counters.add("undecodable")
        logger.warning("the entry of %r cannot be read (%s) and counts as a miss", key, error)

    def changed(self, keys: Iterable[str], tags: Iterable[str] = (), *, everything: bool = False) -> None:
        """Forget what this process keeps of what it has changed, once Redis has replied.

        Not before: what was read there before would come in here behind our back.
        """
        if self._near is None:
            return
        if everything:
            self._near.clear()
        for key in keys:
            self._near.drop(key)
        for tag in tags:
            self._near.drop_tag(tag)

    def degraded(self, doing: str, error: BaseException) -> None:
        """Go on without Redis: counted, and raised in a strict cache."""
        self._counters.add("errors")
        if self._strict:
            raise ServerUnavailable(self._redis.address, error, doing=doing) from error
        # At debug: while Redis is away this comes with every call. That it is away is told once, by the breaker.
        logger.debug("cache %r: %s went on without Redis: %s", self._keys.namespace, doing, error)

    def _readings(
        self,
        keys: Sequence[str],
        names: Sequence[str],
        ask: Callable[[], list[Look]],
        doing: str,
        *,
        near: bool = True,
        token: str = "",
    ) -> list[Reading] | None:
        store = self._near if near else None
        markers = [] if store is None else [store.begin(key) for key in keys]
        kept = 0
        unsent = self._remembered.seen()
        try:
            readings = self._judged(keys, names, ask(), unsent, markers)
            kept = len(readings)
            return readings
        except UNAVAILABLE as error:
            self._lost(names, token, error)
            self.degraded(doing, error)
            return None
        finally:
            if store is not None and not kept:
                for key, marker in zip(keys, markers, strict=True):
                    store.abandon(key, marker)

    def _lost(self, names: Sequence[str], token: str, error: BaseException) -> None:
        """No reply came: the server may take the leases all the same, when it goes on."""
        if token and isinstance(error, LOST) and not isinstance(error, CircuitOpen):
            self._keeper.orphaned(names, token)

    def _judged(
        self,
        keys: Sequence[str],
        names: Sequence[str],
        looks: Sequence[Look],
        unsent: Unsent | None,
        markers: Sequence[Marker | None] = (),
    ) -> list[Reading]:
        opened = [self._opened(key, look) for key, look in zip(keys, looks, strict=True)]
        versions = looks[0].versions if looks else {}
        if more := _tags_beyond(versions, opened):
            versions = {**versions, **self._store.versions(more)}
        readings = []
        for i, (key, entry, look) in enumerate(zip(keys, opened, looks, strict=True)):
            freshness = Freshness.GONE if entry is None else entries.judge(entry, look.left_ms, versions)
            if entry is not None and (
                # Both: it may have been sent since Redis was asked, or added.
                (unsent is not None and unsent.covers(key, entry.tags))
                or (self._remembered.any and self._remembered.covers(key, entry.tags))
            ):
                freshness = Freshness.GONE
            reading = Reading(key, names[i], freshness, entry, look, markers[i] if markers else None)
            if reading.marker is not None and (freshness is not Freshness.FRESH or reading.raised or not entry.body):  # type: ignore[union-attr]
                self._near.abandon(key, reading.marker)  # type: ignore[union-attr]
                reading = reading._replace(marker=None)
            readings.append(reading)
        return readings

    def _opened(self, key: str, look: Look) -> Entry | None:
        if look.stored is None:
            return None
        try:
            return entries.decode(look.stored)
        except Undecodable as error:
            self.undecodable(key, error)
            return None


def _tags_beyond(versions: Any, opened: Iterable[Entry | None]) -> list[str]:
    """The tags of entries that were not asked about."""
    return sorted({tag for entry in opened if entry and entry.tags for tag in entry.tags if tag not in versions})
