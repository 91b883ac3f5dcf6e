"""What one process keeps of one namespace, so that a hit asks nobody: the near cache, as a store.

Three rules keep it right:

- **Nothing is served past** ``valid_until``, which the listener moves on while it hears the server (``listener.py``).
- **Nothing is stored that was dropped while it was fetched.** A reader leaves a marker before it sends its GET; a drop
  of the key takes the marker away, and what comes without its marker is refused. A tag has no list of what is being
  fetched, so any tag that drops refuses every entry with tags that was on its way; a drop of the namespace, or of
  everything, refuses all.
- **Bounded** by count and by bytes, by second chance: the oldest goes, unless it was hit since it was last looked at,
  in which case it becomes the youngest. A hit therefore sets one flag and takes no lock.

Changes are made under one lock. It is re-entrant, because a signal handler or a finaliser may use the cache in the
middle of a change, or end it by raising. So each step leaves the store whole; where two things must change together no
call stands between them, for that is where Python lets a handler in.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from threading import RLock
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from .durations import Duration, milliseconds
from .forks import renew_after_fork

ENTRY_COSTS_BYTES = 250
"""What the store itself takes for an entry, beside the text of its key and the payload; as measured."""
TAG_COSTS_BYTES = 130
"""And for each of its tags."""

_LARGEST_PART = 16  # an entry that would push out more than a sixteenth of the others is read from Redis instead
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})").search

_now = time.monotonic


@dataclass(frozen=True)
class Near:
    """How much of a cache a process keeps in its own memory.

    >>> Cache(redis, namespace="shop", near=Near(max_entries=1_000, ttl="10s"))

    Arguments:
        max_entries: how many entries are kept.
        max_bytes: how much memory they may take, about. An entry of more than a sixteenth of it is not kept.
        ttl: for how long an entry is kept without a look at Redis; never longer than it has left there.
        copy: whether each hit decodes a value of its own. Without it a hit is faster, and all who get a value get the
            same one: it must not be changed.

    Raises ``ValueError`` or ``TypeError`` for what cannot be meant.
    """

    max_entries: int = 10_000
    max_bytes: int = 64 * 1024 * 1024
    ttl: Duration = 60
    copy: bool = True

    def __post_init__(self) -> None:
        for name in ("max_entries", "max_bytes"):
            number = getattr(self, name)
            if type(number) is not int:
                raise TypeError(f"{name}={number!r} must be a whole number")
            if number < 1:
                raise ValueError(f"{name}={number!r} must be 1 or more; leave out near= to have no near cache")
        milliseconds(self.ttl, "ttl")


class Absent(Enum):
    """The type of ``ABSENT``."""

    ABSENT = "ABSENT"


ABSENT: Final = Absent.ABSENT
"""Nothing that may be served is kept for the key. No payload is this."""


@dataclass(frozen=True, slots=True)
class NearStats:
    """What a store holds, and how often something went before its time, since it was made in this process."""

    entries: int
    bytes: int
    drops: int
    """Entries that were dropped because they, their tag, or everything had changed."""
    evictions: int
    """Entries that made room for others."""


class Marker:
    """That somebody fetches a key, and when the first of them began. Goes when the key changes."""

    __slots__ = ("began", "tag_drops")

    def __init__(self, began: float, tag_drops: int) -> None:
        self.began = began
        self.tag_drops = tag_drops


class _Kept:
    __slots__ = ("bytes", "expires_at", "hit", "payload", "tags")

    def __init__(self, payload: Any, expires_at: float, tags: tuple[str, ...], bytes_: int) -> None:
        self.payload = payload
        self.expires_at = expires_at
        self.tags = tags
        self.bytes = bytes_
        self.hit = False


class NearStore:
    """The near cache of one namespace in this process. Threads may share it; a forked child starts with nothing.

    >>> payload = store.get(key)
    >>> if payload is ABSENT:
    ...     marker = store.begin(key)  # before Redis is asked
    ...     ...  # ask Redis
    ...     store.put(key, marker, payload, tags=(), ttl_ms=left_ms, size=len(payload))  # or abandon(key, marker)

    Promise: what was in Redis before a drop is not served after it. Whoever changes Redis from this process drops
    the key here too, after Redis has replied, so that the process reads its own writes at once.
    Non-promise: that what was put is there.

    Arguments:
        options: the bounds.
        entry_prefix: how the names of this namespace's entries begin in Redis, up to the key.
        tag_prefix: the same for the versions of tags.
        watch: called with the prefixes and this store while it is off, to have it told of changes and moved on:
            ``Listener.watch``. May be called often.
    """

    def __init__(
        self,
        options: Near,
        *,
        entry_prefix: str,
        tag_prefix: str,
        watch: Callable[[Sequence[str], "NearStore"], None] | None = None,
    ) -> None:
        self.options = options
        self.valid_until = 0.0
        """Until when, by ``time.monotonic()``, anything here may be served. The listener sets it."""
        self._prefixes = (entry_prefix, tag_prefix)
        self._entry_prefix = entry_prefix.encode()
        self._tag_prefix = tag_prefix.encode()
        self._watch = watch
        self._ttl_ms = milliseconds(options.ttl, "ttl")
        self._largest = max(1, options.max_bytes // _LARGEST_PART)
        self._begin_anew()
        renew_after_fork(self)

    def __repr__(self) -> str:
        state = "on" if self.valid else "off"
        return f"<NearStore {self._prefixes[0]} [{state}, {len(self._kept)} entries, {self._bytes} bytes]>"

    @property
    def valid(self) -> bool:
        """Whether what is kept may be served now."""
        return _now() < self.valid_until

    @property
    def stats(self) -> NearStats:
        """What it holds and has lost."""
        with self._lock:
            return NearStats(len(self._kept), self._bytes, self._drops, self._evictions)

    def get(self, key: str) -> Any:
        """What is kept for the key, or ``ABSENT``. Takes no lock: whoever is dropping it is either before or after."""
        kept = self._find(key)
        if kept is None:
            return ABSENT
        now = _now()
        if now < self.valid_until and now < kept.expires_at:
            kept.hit = True
            return kept.payload
        if now >= kept.expires_at:
            with self._lock:
                if self._kept.get(key) is kept:
                    self._remove(key)
        return ABSENT

    def begin(self, key: str) -> Marker | None:
        """Say that Redis is about to be asked for the key. ``None`` while the near cache is off; ``put`` refuses it."""
        now = _now()
        if now >= self.valid_until:
            if self._watch is not None:
                self._watch(self._prefixes, self)
            return None
        with self._lock:
            marker = self._markers.get(key)  # others' is as good: the key has not changed since they began either
            if marker is None:
                marker = self._markers[key] = Marker(now, self._tag_drops)
            return marker

    def put(
        self, key: str, marker: Marker | None, payload: Any, *, tags: Sequence[str] = (), ttl_ms: int, size: int
    ) -> bool:
        """Keep what Redis answered. Whether it was kept: not if it may have changed meanwhile, or is too big.

        Arguments:
            key: the key.
            marker: what ``begin`` returned.
            payload: anything; ``get`` returns this very object.
            tags: whose drop drops the entry.
            ttl_ms: how long the entry was fresh yet when Redis answered.
            size: how many bytes the payload takes.
        """
        if marker is None:
            return False
        cost = ENTRY_COSTS_BYTES + len(key) + size + sum(TAG_COSTS_BYTES + len(tag) for tag in tags)
        expires_at = marker.began + min(ttl_ms, self._ttl_ms) / 1_000
        kept = _Kept(payload, expires_at, tuple(tags), cost)
        with self._lock:
            if self._markers.get(key) is not marker:
                return False
            now = _now()
            self._remove(key)
            is_kept = (
                now < self.valid_until
                and now < expires_at
                and cost <= self._largest
                and (not kept.tags or marker.tag_drops == self._tag_drops)
            )
            if is_kept:
                self._make_room(cost, now)
                for tag in kept.tags:  # before it is kept: what is kept is always found by its tags
                    self._keys_of.setdefault(tag, set()).add(key)
            try:  # a last look, and no call from here on
                is_kept = is_kept and self._markers[key] is marker
                is_kept = is_kept and (not kept.tags or marker.tag_drops == self._tag_drops)
                if is_kept:
                    self._kept[key] = kept
                    self._bytes += cost
                del self._markers[key]
            except KeyError:  # a signal handler has dropped it
                return False
            return is_kept

    def abandon(self, key: str, marker: Marker | None) -> None:
        """Say that nothing will be put."""
        with self._lock:
            if marker is not None and self._markers.get(key) is marker:
                del self._markers[key]

    def drop(self, key: str) -> None:
        """The key has changed."""
        with self._lock:
            self._markers.pop(key, None)
            self._drops += self._remove(key)

    def drop_tag(self, tag: str) -> None:
        """Whatever names the tag has changed."""
        with self._lock:
            self._tag_drops += 1
            for key in self._keys_of.pop(tag, ()):
                self._drops += self._remove(key)

    def clear(self) -> None:
        """Anything may have changed."""
        with self._lock:
            self._markers.clear()
            for key in list(self._kept):
                self._drops += self._remove(key)
            self._keys_of.clear()

    def dropped(self, names: Sequence[bytes] | None) -> None:
        """These names have changed in Redis; ``None``: any may have. For the listener.

        A name that is none of ours clears everything: better to fetch again than to have misread it.
        """
        if names is None:
            self.clear()
            return
        with self._lock:
            for name in names:
                self._dropped(name)

    def renew_after_fork(self) -> None:
        """Start with nothing, and off."""
        self.valid_until = 0.0
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._lock = RLock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the oldest first
        self._find = self._kept.get
        self._markers: dict[str, Marker] = {}
        self._keys_of: dict[str, set[str]] = {}
        self._tag_drops = 0
        self._bytes = 0
        self._drops = 0
        self._evictions = 0

    def _dropped(self, name: bytes) -> None:
        if name.startswith(self._entry_prefix):
            key = _text(name, len(self._entry_prefix))
            if key:
                self.drop(key)
                return
        elif name.startswith(self._tag_prefix):
            tag = _text(name, len(self._tag_prefix))
            if tag:
                self.drop_tag(tag)
                return
        self.clear()  # the namespace's own tag, which is the empty one; or what we do not understand

    def _remove(self, key: str) -> bool:
        try:
            kept = self._kept[key]
            del self._kept[key]
            self._bytes -= kept.bytes
        except KeyError:
            return False
        for tag in kept.tags:
            keys = self._keys_of.get(tag)
            if keys is not None:
                keys.discard(key)
                if not keys:
                    self._keys_of.pop(tag, None)
        return True

    def _make_room(self, cost: int, now: float) -> None:
        """Let go of the oldest until one more of this cost fits; those that were hit get a second chance."""
        while self._kept:
            try:
                key, oldest = next(iter(self._kept.items()))
                is_over = oldest.expires_at <= now
                if not is_over and self._has_room(cost):
                    return
                if oldest.hit and not is_over:
                    oldest.hit = False
                    self._kept.move_to_end(key)
                    continue
            except (KeyError, RuntimeError, StopIteration):  # a signal handler has changed what we were looking at
                continue
            self._evictions += self._remove(key) and not is_over

    def _has_room(self, cost: int) -> bool:
        return len(self._kept) < self.options.max_entries and self._bytes + cost <= self.options.max_bytes


def _text(name: bytes, start: int) -> str | None:
    """The user's text in the name of a key: from ``start`` to the brace that ends it. ``None`` if it is not ours."""
    text = name[start:-1]
    if not name.endswith(b"}") or b"}" in text or _BAD_ESCAPE(text):
        return None
    try:
        return (unquote_to_bytes(text) if b"%" in text else text).decode()
    except UnicodeDecodeError:
        return None
