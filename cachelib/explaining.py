"""What is known of one key, put together for a person who asks why it is served or is not."""

import time

from . import entry as entries
from . import keys as key_names
from .connections import Connections
from .entry import Entry, Freshness
from .entry_store import EntryStore
from .formats import Codec, Undecodable
from .near import ABSENT, NearStore
from .remembered import Remembered
from .stats import Explanation


def explained(
    key: str,
    *,
    keys: key_names.CacheKeys,
    store: EntryStore,
    redis: Connections,
    codec: Codec,
    near: NearStore | None,
    remembered: Remembered,
) -> Explanation:
    """Look at everything that decides about a key. Raises redis-py's errors."""
    name = keys.entry(key)
    look = store.read([name])[0]
    lease = key_names.lease(name)
    lease_left_ms = max(0, int(redis.cache.pttl(lease)))
    loading = bool(lease_left_ms) and redis.cache.execute_command("HGET", lease, "token") != b""
    entry: Entry | None = None
    state, why = "absent", "nothing is stored under this key"
    valid: dict[str, bool] = {}
    if look.stored is not None:
        try:
            entry = entries.decode(look.stored)
        except Undecodable as error:
            state, why = "undecodable", f"what is stored cannot be read ({error}), which counts as a miss"
    if entry is not None:
        current = {**look.versions, **store.versions(entry.tags)}
        valid = {tag: current.get(tag) == version for tag, version in entries.versions_of(entry).items()}
        freshness = entries.judge(entry, look.left_ms, current)
        state = freshness.value
        unreadable = ""
        try:
            if entry.body is not None:
                codec.unpack(entry.body.how, entries.packed_value(entry.body), name)
        except Undecodable as error:
            unreadable = str(error)
        if unreadable and freshness is not Freshness.GONE:
            state, why = "undecodable", f"its value cannot be read ({unreadable}), which counts as a miss"
        elif freshness is Freshness.FRESH:
            why = "it is served" if not entry.raised else "it is an exception, raised for callers that name its class"
        elif freshness is Freshness.STALE:
            why = "its TTL is over; it is served while somebody loads a new one"
        else:
            state = "invalidated"
            dead = [
                "the namespace" if tag == entries.WHOLE else repr(tag)
                for tag, is_valid in valid.items()
                if not is_valid
            ]
            why = f"stored, but {', '.join(dead)} was invalidated or evicted since, so it is not served"
    unsent = remembered.any and remembered.covers(key, entry.tags if entry else ())
    if unsent:
        why += "; an invalidation of it waits for Redis to answer, so this process does not serve it"
    if lease_left_ms and not loading:
        why += "; its loader failed a moment ago and is left alone"
    body = entry.body if entry else None
    return Explanation(
        key=key,
        state=state,
        name=name,
        size_bytes=len(look.stored or b""),
        fresh_left_ms=entries.fresh_left_ms(entry, look.left_ms),
        left_ms=max(0, look.left_ms),
        age_ms=max(0, int(time.time() * 1_000) - body.created_ms) if body else None,
        ttl_ms=body.ttl_ms if body else None,
        stale_ms=entry.stale_ms if entry else 0,
        load_ms=body.load_ms if body else None,
        how=_how(entry),
        tags=valid,
        near=near is not None and near.get(key) is not ABSENT,
        loading=loading,
        lease_left_ms=lease_left_ms,
        unsent=unsent,
        note=f"{key!r}: {why}.",
    )


def _how(entry: Entry | None) -> str:
    if entry is None:
        return ""
    if entry.raised:
        return "exception"
    return "counter" if entry.body is None else entry.body.how or "msgpack"
