"""The counts of locks and limiters, as Prometheus reads them."""

from prometheus_client import CollectorRegistry, generate_latest

from petiole import Connections, Lock, RateLimit, RateLimiter, ReadWriteLock, Semaphore, connect
from petiole.coordination.prometheus import CoordinationCollector


def test_every_count_is_told_with_its_name(redis: Connections, name: str) -> None:
    """What ``stats`` counts, under names that a dashboard can use, each kind with its own."""
    lock, other = Lock(redis, name), Lock(redis, f"{name}-other")
    semaphore, both = Semaphore(redis, name, permits=2), ReadWriteLock(redis, name)
    limiter = RateLimiter(redis, name, [RateLimit("1/m")])
    registry = CollectorRegistry()
    registry.register(CoordinationCollector(lock, other, semaphore, both.read, limiter))
    with lock, both.read:
        lock.try_acquire()
    limiter.hit("a"), limiter.hit("a")

    def told(metric: str, label: str = name) -> float | None:
        return registry.get_sample_value(metric, {"name": label})

    assert told("petiole_lock_holds_total") == 1
    assert told("petiole_lock_holds_total", other.name) == 0
    assert (told("petiole_lock_hold_seconds_total") or 0) > 0
    assert told("petiole_lock_losses_total") == 0
    assert told("petiole_semaphore_holds_total") == 0
    assert told("petiole_side_holds_total", f"read lock {name!r}") == 1
    assert told("petiole_ratelimiter_allowed_total") == 1
    assert told("petiole_ratelimiter_limited_total") == 1


def test_what_has_one_name_is_told_as_one(redis: Connections, name: str) -> None:
    """A lock that is made wherever it is used; a scrape with the same sample twice is refused."""
    locks = [Lock(redis, name), Lock(redis, name)]
    registry = CollectorRegistry()
    registry.register(CoordinationCollector(*locks))
    for lock in (*locks, locks[0]):
        with lock:
            pass

    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    samples = [line.rpartition(" ")[0] for line in lines]
    assert len(samples) == len(set(samples))
    assert registry.get_sample_value("petiole_lock_holds_total", {"name": name}) == 3


def test_registering_asks_nobody() -> None:
    """Not even a server that is away."""
    with connect("redis://127.0.0.1:1/0") as redis:
        registry = CollectorRegistry()
        registry.register(CoordinationCollector(Lock(redis, "n")))

        assert "petiole_lock_holds_total" in generate_latest(registry).decode()
