"""The counts of caches, for Prometheus. Needs ``prometheus_client``, which Flower brings too."""

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .cache import Cache

_READS = {
    "near_hits": "near",
    "hits": "redis",
    "stale": "stale",
    "misses": "miss",
}
_COUNTS = {
    "loads": "Loaders that returned a value.",
    "load_errors": "Loaders that raised.",
    "load_timeouts": "Loads that were not waited for to their end.",
    "waits": "Reads that waited for another process's load.",
    "joins": "Reads that waited for a load of this process.",
    "refreshes": "Loads of what was stale, or fresh and soon no longer.",
    "refused": "Loaded values that were not stored, because they were invalidated meanwhile.",
    "invalidations": "Keys, tags, patterns and namespaces invalidated by this process.",
    "undecodable": "Entries that could not be read.",
    "errors": "Calls that Redis did not answer.",
}
_BREAKER = {"closed": 0, "half-open": 1, "open": 2}


class CacheCollector(Collector):
    """Reads ``Cache.stats()`` whenever Prometheus asks; costs nothing in between.

    >>> prometheus_client.REGISTRY.register(CacheCollector(cache, other_cache))

    Every metric begins with ``petiole_cache_`` and has the label ``namespace``. They count what *this process* did:
    with several worker processes each must be asked, as with any metric of ``prometheus_client``.

    Arguments:
        caches: whose counts are told.
    """

    def __init__(self, *caches: Cache) -> None:
        self._caches = caches

    def describe(self) -> Iterator[Any]:
        """Nothing: so that registering it does not ask the caches."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        """The metrics as they are now."""
        stats = [(cache.namespace, cache.stats()) for cache in self._caches]
        reads = CounterMetricFamily(
            "petiole_cache_reads", "Reads, by where the value came from.", labels=["namespace", "source"]
        )
        for namespace, counts in stats:
            for name, source in _READS.items():
                reads.add_metric([namespace, source], getattr(counts, name))
        yield reads
        for name, text in _COUNTS.items():
            family = CounterMetricFamily(f"petiole_cache_{name}", text, labels=["namespace"])
            for namespace, counts in stats:
                family.add_metric([namespace], getattr(counts, name))
            yield family
        seconds = CounterMetricFamily(
            "petiole_cache_load_seconds", "Time spent in loaders that returned a value.", labels=["namespace"]
        )
        gauges = {
            "near_entries": GaugeMetricFamily(
                "petiole_cache_near_entries", "Entries in this process's memory.", labels=["namespace"]
            ),
            "near_bytes": GaugeMetricFamily("petiole_cache_near_bytes", "What they take, about.", labels=["namespace"]),
            "unsent": GaugeMetricFamily(
                "petiole_cache_unsent_invalidations",
                "Invalidations that Redis has not been told of yet.",
                labels=["namespace"],
            ),
        }
        breaker = GaugeMetricFamily(
            "petiole_cache_breaker", "Circuit breaker: 0 closed, 1 half-open, 2 open.", labels=["namespace"]
        )
        for namespace, counts in stats:
            seconds.add_metric([namespace], counts.load_ms / 1_000)
            breaker.add_metric([namespace], _BREAKER[counts.breaker])
            for name, gauge in gauges.items():
                gauge.add_metric([namespace], getattr(counts, name))
        yield from (seconds, breaker, *gauges.values())
