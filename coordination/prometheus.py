"""The counts of locks and limiters, for Prometheus. Needs ``prometheus_client``, which Flower brings too."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

_HELP = {
    "holds": "Acquired.",
    "waits": "Acquires that had to wait.",
    "timeouts": "Acquires that were given up.",
    "losses": "Holds that were lost before they were released.",
    "overages": "Releases of what had been lost.",
    "wait_s": "Time spent waiting.",
    "hold_s": "Time held.",
    "allowed": "Calls that were allowed.",
    "limited": "Calls that were refused by a limit.",
    "reserved": "Calls that were given a time.",
    "blocked": "Calls that were refused because their caller was blocked.",
    "errors": "Calls that Redis did not answer.",
}


class Counted(Protocol):
    """A lock, a semaphore, a side of a read-write lock, a limiter."""

    @property
    def name(self) -> str:
        """What tells it from others of its kind."""

    def stats(self) -> Mapping[str, float]:
        """Counts of this process."""


class CoordinationCollector(Collector):
    """Reads the ``stats()`` of locks and limiters whenever Prometheus asks; costs nothing in between.

    >>> prometheus_client.REGISTRY.register(CoordinationCollector(lock, semaphore, limiter))

    Metrics are ``petiole_lock_holds_total``, ``petiole_semaphore_wait_seconds_total``,
    ``petiole_ratelimiter_limited_total`` and so on, with the label ``name``. They count what *this process* did.

    Arguments:
        counted: whose counts are told; those of one kind and name are added up. Names are labels: locks that are called
            after orders or users would make too many.
    """

    def __init__(self, *counted: Counted) -> None:
        self._counted = counted

    def describe(self) -> Iterator[Any]:
        """Nothing: so that registering it asks nobody."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        """The metrics as they are now."""
        totals: dict[tuple[str, str], dict[str, float]] = {}
        for one in self._counted:
            kind = type(one).__name__.lower()
            for name, count in one.stats().items():
                metric = f"petiole_{kind}_{name.removesuffix('_s') + '_seconds' if name.endswith('_s') else name}"
                by_name = totals.setdefault((metric, name), {})
                by_name[one.name] = by_name.get(one.name, 0) + count
        for (metric, name), by_name in totals.items():
            family = CounterMetricFamily(metric, _HELP.get(name, name), labels=["name"])
            for label, total in by_name.items():
                family.add_metric([label], total)
            yield family
