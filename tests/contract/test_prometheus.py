"""The counts of caches, as Prometheus reads them."""

from prometheus_client import CollectorRegistry, generate_latest

from petiole import Cache, connect
from petiole.cachelib.prometheus import CacheCollector


def test_every_count_is_told_with_its_namespace(redis, name):
    """What ``stats`` counts, under names that a dashboard can use."""
    first, second = Cache(redis, namespace=name), Cache(redis, namespace=f"{name}-other", near=True)
    registry = CollectorRegistry()
    registry.register(CacheCollector(first, second))
    first.get("nothing")
    first.get_or_set("k", lambda: "value")
    first.get("k")
    first.delete("k")

    def told(metric, **labels):
        return registry.get_sample_value(metric, labels)

    assert told("petiole_cache_reads_total", namespace=name, source="redis") == 1
    assert told("petiole_cache_reads_total", namespace=name, source="miss") == 2
    assert told("petiole_cache_loads_total", namespace=name) == 1
    assert told("petiole_cache_invalidations_total", namespace=name) == 1
    assert told("petiole_cache_breaker", namespace=name) == 0
    assert told("petiole_cache_unsent_invalidations", namespace=name) == 0
    assert told("petiole_cache_loads_total", namespace=second.namespace) == 0
    text = generate_latest(registry).decode()
    for count in ("load_errors", "load_timeouts", "waits", "joins", "refreshes", "refused", "undecodable", "errors"):
        assert f'petiole_cache_{count}_total{{namespace="{name}"}} 0.0' in text


def test_registering_asks_nobody():
    """Not even a server that is away."""
    with connect("redis://127.0.0.1:1/0") as redis:
        registry = CollectorRegistry()
        registry.register(CacheCollector(Cache(redis, namespace="n")))

        assert "petiole_cache_loads_total" in generate_latest(registry).decode()
