"""What a cache tells about itself."""

from dataclasses import dataclass


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
