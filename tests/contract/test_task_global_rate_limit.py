"""``rate_limit`` for all workers together: real workers, a real broker, and the starts by the server's clock."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import psutil
import pytest
from celery import Celery
from local_nodes import eventually
from redis import Redis

from petiole import RateLimit
from petiole.cachelib import EmbeddedServer
from petiole.tasks.cluster_rate_limit import GlobalRateLimit, global_rate_limit
from tests.contract.rate_programs.crew import POOLS, Crew

SHORT_VISIBILITY = {"visibility_timeout": 5, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
MAY_BE_LATE_US = 500_000  # from the start that was reserved until the body has told the time

Hire = Callable[..., Crew]


@pytest.fixture
def limits(own_server: Callable[..., EmbeddedServer]) -> EmbeddedServer:
    """The server where the limits are counted, and nothing else is."""
    return own_server()


@pytest.fixture
def hire(own_server: Callable[..., EmbeddedServer], limits: EmbeddedServer, tmp_path: Path) -> Iterator[Hire]:
    """Makes the crew of a test."""
    crews: list[Crew] = []

    def make(rate: str, pool: str = "threads", **config: Any) -> Crew:
        crews.append(Crew(tmp_path, own_server(), limits, rate, pool, **config))
        return crews[-1]

    yield make
    for crew in crews:
        crew.close()


def most_in_a_second(runs: list[dict[str, Any]]) -> int:
    """The most starts in any window of a second."""
    times_us = sorted(run["at_us"] for run in runs)
    return max(sum(at_us <= other_us < at_us + 1_000_000 for other_us in times_us) for at_us in times_us)


def seconds(runs: list[dict[str, Any]]) -> float:
    """From the first start to the last."""
    times_us = sorted(run["at_us"] for run in runs)
    return (times_us[-1] - times_us[0]) / 1e6


def once_each(runs: list[dict[str, Any]]) -> bool:
    """Whether no message ran twice."""
    return max(Counter(run["number"] for run in runs).values()) == 1


def scripts_called(server: EmbeddedServer) -> int:
    """How many scripts a server has run."""
    with Redis.from_url(server.url) as client:
        return int(client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))


def keys_without_a_ttl(server: EmbeddedServer) -> list[bytes]:
    """What would stay for ever."""
    with Redis.from_url(server.url) as client:
        names = list(client.scan_iter("*"))
        assert names
        return [name for name in names if client.pttl(name) == -1]


@pytest.mark.parametrize("pool", POOLS)
def test_two_workers_share_one_limit_and_other_tasks_pass_the_backlog(
    hire: Hire, limits: EmbeddedServer, pool: str
) -> None:
    """Of 60 at 20/s that came before them, none keeps the unlimited ones waiting, though each worker prefetches 8."""
    crew = hire("20/s", pool)
    crew.send(60)
    crew.send(5, "free")

    crew.start("ann", "bob")
    runs = crew.until_ran(60)

    assert once_each(runs)
    assert most_in_a_second(runs) <= RateLimit("20/s", burst=1).bound_us(1_000_000 + MAY_BE_LATE_US)
    assert seconds(runs) < 1.5 * 59 / 20  # a limiter of Celery's own takes ten times as long, or half
    assert max(i for i, task in enumerate(crew.order()) if task == "free") < 40
    assert scripts_called(limits) <= 60 + 4  # one call each; a server that does not know a script is asked twice


def test_a_backlog_starts_exactly_at_the_rate_and_nothing_twice_when_the_broker_waits_five_seconds(hire: Hire) -> None:
    """300 messages for 7.5 seconds: what has waited for half of the visibility timeout goes back in time.

    A third of them has waited for an eta before, and then their prefetch slots too are given back once.
    """
    crew = hire("40/s", broker_transport_options=SHORT_VISIBILITY)
    crew.send(200)
    crew.send(100, first=200, countdown=1)

    crew.start("ann", "bob")
    runs = crew.until_ran(300)
    eventually(lambda: crew.in_the_broker() == (0, 0), "all is acknowledged")

    assert once_each(crew.runs())
    assert [crew.stats(name)["prefetch_count"] for name in ("ann", "bob")] == [8, 8]
    assert most_in_a_second(runs) <= RateLimit("40/s", burst=1).bound_us(1_000_000 + MAY_BE_LATE_US)
    assert seconds(runs) <= 2 * 299 / 40  # what is not given back in time waits for five seconds more, and again


def test_one_worker_that_is_told_tells_all_and_it_outlasts_them(hire: Hire, limits: EmbeddedServer) -> None:
    """The command goes to one, as Flower sends it; the other never reads by itself here."""
    crew = hire("1/h")
    crew.environment["READ_AGAIN_S"] = "3600"
    crew.send(20)
    crew.start("ann", "bob")
    eventually(lambda: sum(crew.limit(name)["held"] for name in ("ann", "bob")) == 19, "one ran, the others are held")

    assert "error" in crew.tell("ann", "10/d")
    assert "error" in crew.tell("ann", "-3/s")
    assert "error" in crew.tell("ann", "5/s", task="nobody")
    assert crew.limit("ann")["rate_limit"] == "1/h"

    assert "ok" in crew.tell("ann", "50/s")
    assert once_each(crew.until_ran(20))  # an hour each, if a slot of the old rate counted
    eventually(lambda: crew.limit("bob")["rate_limit"] == "50/s", "bob has heard of it")

    crew.send(4)
    crew.until_ran(24)
    assert "ok" in crew.tell("bob", "2/h")
    eventually(lambda: crew.limit("ann")["rate_limit"] == "2/h", "ann has heard of it")
    crew.send(6)
    eventually(lambda: crew.in_the_broker() == (0, 5), "one ran, the others are held")
    crew.end()
    assert crew.in_the_broker() == (5, 0)  # what was held is with the broker again

    crew.start("ann", "bob", environment={"RATE": "30/s"})
    assert crew.limit("ann")["rate_limit"] == crew.limit("bob")["rate_limit"] == "2/h"

    assert "ok" in crew.tell("ann", "default")
    eventually(lambda: crew.limit("bob").get("rate_limit") == "30/s", "bob goes by the code again")
    crew.until_ran(30)
    assert "ok" in crew.tell("ann", "0")
    eventually(lambda: crew.limit("bob") == {"rate_limit": None, "ordered": True, "held": 0}, "bob has no limit")
    assert keys_without_a_ttl(limits) == []


def test_without_redis_what_is_limited_waits_and_the_rest_goes_on(hire: Hire, limits: EmbeddedServer) -> None:
    """A server that hangs, which is worse than one that is gone."""
    crew = hire("50/s")
    crew.start("ann")
    with Redis.from_url(limits.url) as client:
        server = psutil.Process(client.info("server")["process_id"])
    server.suspend()
    try:
        crew.send(10)
        crew.send(10, "free")
        crew.until_ran(10, "free")
        assert crew.runs() == []
    finally:
        server.resume()

    assert once_each(crew.until_ran(10))
    assert crew.log("ann").count("Redis did not answer") == 1


@pytest.mark.parametrize("hold_at_most", [0, -1, 1.5, True, "many"])
def test_a_number_of_held_messages_that_is_none_is_refused(hold_at_most: Any) -> None:
    """Before anything is added."""
    app = Celery("refused")

    with pytest.raises(ValueError, match="hold_at_most"):
        global_rate_limit(app, hold_at_most=hold_at_most)

    assert not app.steps["consumer"]


def test_an_app_has_it_once() -> None:
    """Two steps would reserve twice."""
    app = Celery("once")
    global_rate_limit(app)

    with pytest.raises(ValueError, match="already"):
        global_rate_limit(app)


@pytest.mark.parametrize("kind", ["server", "cluster"])
def test_an_order_is_new_once(kind: str, request: pytest.FixtureRequest) -> None:
    """Or workers that are all told the same would tell each other for ever; and it is read with the others."""
    where = request.getfixturevalue("redis_server" if kind == "server" else "cluster")
    app = SimpleNamespace(tasks={name: SimpleNamespace(name=name, rate_limit=None) for name in ("a", "b.c", "d")})
    timer = SimpleNamespace(call_after=lambda *_: object(), cancel=lambda _: None)
    consumer = SimpleNamespace(app=app, timer=timer, qos=SimpleNamespace(value=0), task_consumer=None)
    consumer.reset_rate_limits = lambda: [consumer.bucket_for_task(task) for task in app.tasks.values()]
    step = type("Step", (GlobalRateLimit,), {"url": where.url, "group": uuid4().hex})(consumer)
    step.start(consumer)
    try:
        assert [step.order("b.c", "5/s"), step.order("b.c", "5/s"), step.order("b.c", "6/s")] == [True, False, True]
        step.reread()
        assert step.info(consumer)["global_rate_limit"]["tasks"] == {
            "b.c": {"rate_limit": "6/s", "ordered": True, "held": 0}
        }
        assert [step.order("b.c", None), step.order("b.c", None)] == [True, False]
    finally:
        step.shutdown(consumer)


@pytest.mark.storm
@pytest.mark.parametrize("pool", ["threads", *POOLS])
def test_the_rate_holds_to_one_percent_over_a_minute(hire: Hire, pool: str) -> None:
    """The longer proof of the same."""
    crew = hire("20/s", pool)
    crew.send(1_200)

    crew.start("ann", "bob")
    runs = crew.until_ran(1_200, within_s=120)

    assert once_each(runs)
    assert seconds(runs) == pytest.approx(1_199 / 20, rel=0.01)
