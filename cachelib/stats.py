"""What a cache tells about itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of this process since the cache was made, and how things stand."""

    near_hits: int
    """Served from this process's memory."""
    hits: int
    """Served fresh from Redis."""
    stale: int
    """Served past the soft TTL, while somebody loads."""
    misses: int
    loads: int
    load_ms: int
    """Time spent in loaders."""
    load_errors: int
    """Loaders that raised."""
    load_timeouts: int
    """Loads that were not waited for to their end."""
    waits: int
    """Reads that waited for another process's load."""
    joins: int
    """Reads that waited for a load of this process."""
    refreshes: int
    """Loads of what was stale, or fresh and soon no longer."""
    refused: int
    """Loaded values that were not stored, because the key was invalidated or set meanwhile."""
    invalidations: int
    """Keys, tags, patterns and namespaces invalidated by this process."""
    remembered: int
    """Of those: not sent to Redis at once."""
    undecodable: int
    """Entries that could not be read: of another format, damaged, or tampered with."""
    errors: int
    """Calls that Redis did not answer."""
    unsent: int
    """Invalidations that Redis has not been told of yet."""
    near_entries: int
    near_bytes: int
    breaker: str
    """``"closed"``, ``"open"`` (Redis is not asked) or ``"half-open"``."""

    @property
    def hit_ratio(self) -> float:
        """Served from the cache, of all reads; 0 when there were none."""
        served = self.near_hits + self.hits + self.stale
        reads = served + self.misses
        return served / reads if reads else 0.0


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is known of one key, for a person who asks why."""

    key: str
    state: str
    """``"fresh"``, ``"stale"``, ``"invalidated"`` (stored, but a tag or the namespace was invalidated), ``"absent"`` or
    ``"undecodable"``."""
    name: str
    """Of the key in Redis."""
    size_bytes: int
    fresh_left_ms: int
    """How much longer it is fresh."""
    left_ms: int
    """How much longer it is stored."""
    age_ms: int | None
    """Since it was stored, by the clock of the process that did."""
    ttl_ms: int | None
    stale_ms: int
    load_ms: int | None
    """What it cost to load."""
    how: str
    """How it is packed: ``"msgpack"``, ``"json"``, ``"zlib"`` ..., ``"counter"``, or ``"exception"``."""
    tags: dict[str, bool]
    """Whether each of its tags, and ``""`` for the namespace, is still what it was when the value was loaded."""
    near: bool
    """Whether this process holds it in its memory."""
    loading: bool
    """Whether somebody is loading it."""
    lease_left_ms: int
    """How long that load is still waited for if its process has died."""
    unsent: bool
    """Whether an invalidation of it waits in this process for Redis to answer."""
    note: str
    """In a sentence."""
