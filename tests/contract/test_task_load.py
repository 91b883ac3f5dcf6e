"""Coordinated tasks under load: real workers, a real broker, and many more tasks than may run.

What is proved is proved by counts and by order: by the moments for which a rate has admitted its tasks, by the fences
of permits, which rise in the order in which they are handed out, and by the positions of starts among others. A body
begins when its process gets round to it, which a busy machine may delay: it is only asked that none begins too early.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from shutil import copytree
from statistics import median
from typing import Any
from uuid import uuid4

import pytest

from petiole import RateLimit
from petiole.cachelib import EmbeddedServer
from petiole.coordination import keys
from petiole.coordination.gates import EVERYBODY
from petiole.coordination.lock import Lock
from petiole.coordination.rate_limiter import RateLimiter
from petiole.coordination.semaphore import Semaphore
from tests.contract.task_programs.load_app import FOLDER, RATES
from tests.contract.task_programs.load_crew import SHORT_VISIBILITY, Crew, Watch, server_that_may_be_restarted

PATIENCE_S = 60
CHILDREN = 4
PREFETCHED = 2 * CHILDREN * 4
"""What two workers have taken from the broker at most."""
MAY_GROW_BYTES = 20_000_000


@pytest.fixture(scope="module")
def hired(tmp_path_factory: Any) -> Iterator[Crew]:
    """Two workers, with a broker that delivers again what is not acknowledged in five seconds."""
    server = EmbeddedServer.start("--hz", "100")
    crew = Crew(tmp_path_factory.mktemp("workers"), server.url, broker_transport_options=SHORT_VISIBILITY)
    try:
        crew.start("ann", "bob", concurrency=CHILDREN)
        yield crew
    finally:
        crew.close()
        server.stop()


@pytest.fixture
def crew(hired: Crew) -> Crew:
    """The same, for one test."""
    hired.notes.forget()
    return hired


def once_each(runs: list[dict[str, Any]], count: int) -> bool:
    """Whether all ran, and none twice."""
    return Counter(run["number"] for run in runs) == Counter(range(count))


def above_the_bound(limit: RateLimit, starts_us: list[int]) -> list[tuple[int, int]]:
    """Windows of time that saw more starts than the limit admits: how many, and in what time."""
    return [
        (more + 1, last - first)
        for more in (1, 2, 3, 5, 10, 30, 100, 300, 1_000)
        for first, last in zip(starts_us, starts_us[more:], strict=False)
        if more + 1 > limit.bound_us(last - first + 1)
    ]


def all_parked(crew: Crew, count: int, within_s: float = 60.0) -> None:
    """Wait until so many are parked."""
    waits = crew.lot.keys.waits
    crew.until(lambda: crew.gates.hlen(waits) >= count, f"{count} are parked", within_s)


def in_line(crew: Crew, kind: str, name: str) -> list[str]:
    """The ids of those that wait at a gate, in the order in which they will go."""
    return list(crew.gates.zrange(crew.lot.keys.line(keys.turn(kind, name)), 0, -1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "count", "longer_by"),
    [("rated", 300, inf), pytest.param("sparse", 10_000, 0.02, marks=pytest.mark.storm)],
)
def test_a_backlog_runs_at_the_rate_and_costs_nobody_else_anything(
    crew: Crew, task: str, count: int, longer_by: float
) -> None:
    """Each once, though the broker delivers again what is not acknowledged in five seconds.

    That it takes no longer than its ideal is asked of the long run only: a short one is at the mercy of the machine.

    The rate is closed until all are parked, so that its ideal is known: then they wait for it, and for nothing else.
    """
    limit = RATES[task]
    limiter = RateLimiter(crew.lot.redis, task, [limit])
    limiter.block(EVERYBODY, "1h")
    mains = [crew.main(name) for name in crew.workers]
    before: list[int] = []

    def look() -> tuple[int, ...]:
        before.append(crew.ran(task))
        if before[-1] < count:
            crew.send("free", [(len(before) - 1,)])
        return crew.gates.hlen("unacked"), *(main.memory_info().rss for main in mains)  # type: ignore[return-value]

    crew.send(task, [(number,) for number in range(count)])
    with Watch(look) as watch:
        all_parked(crew, count, within_s=count / 10)
        limiter.unblock(EVERYBODY)
        crew.lot.redis.coordination.execute_command("ZADD", crew.lot.keys.due, 0, *line_of(crew))
        runs = crew.until_ran(count, task, within_s=count / 10)
    unrelated = crew.until_ran(sum(ran < count for ran in before), "free")

    starts_us = sorted(run["start_us"] for run in runs)
    assert once_each(runs, count)
    assert above_the_bound(limit, starts_us) == []
    assert all(run["at_us"] >= run["start_us"] - 1_000 for run in runs)
    ideal_s = (count - 1) * limit.period_us / limit.count / 1e6
    assert (starts_us[-1] - starts_us[0]) / 1e6 <= (1 + longer_by) * ideal_s
    assert max(unacked for unacked, *_ in watch.seen) <= PREFETCHED
    for rss in list(zip(*watch.seen, strict=True))[1:]:
        warm = rss[len(rss) // 5 :]
        assert max(warm) - warm[0] < MAY_GROW_BYTES
    bodies_us = sorted(run["at_us"] for run in runs)
    passed = [sum(at_us < one["at_us"] for at_us in bodies_us) - before[one["number"]] for one in unrelated]
    assert median(passed) <= limit.count / 4
    crew.nothing_left()


def line_of(crew: Crew) -> list[str]:
    """The lines in which any wait."""
    return [line for line, _ in crew.lot.lines()]


@pytest.mark.parametrize("count", [60, pytest.param(1_000, marks=pytest.mark.storm)])
def test_never_more_than_five_are_inside_and_a_long_line_does_not_starve_a_short_one(crew: Crew, count: int) -> None:
    """Within a key they are handed permits in the order of their line, between keys in turns."""
    few = count // 10
    permits = Semaphore(crew.lot.redis, "crowded", permits=5)
    held = [permits.acquire(timeout=10) for _ in range(5)]
    sent = crew.send("crowded", [(number, "many", 0.02) for number in range(count)])
    all_parked(crew, count)
    sent += crew.send("crowded", [(count + number, "few", 0.02) for number in range(few)])
    all_parked(crew, count + few)
    numbers = {result.id: number for number, result in enumerate(sent)}
    line = [numbers[id] for id in in_line(crew, "semaphore", "crowded")]

    for hold in held:
        hold.release()
    runs = crew.until_ran(count + few, "crowded")

    assert once_each(runs, count + few)
    assert max(run["inside"] for run in runs) <= 5
    handed = [run["number"] for run in sorted(runs, key=lambda run: run["fence"])]
    assert handed == line
    begun = [run["key"] for run in runs]
    last = max(place for place, key in enumerate(begun) if key == "few")
    assert last < 2 * few + 20  # every second one, and as many as may be on their way beside them
    crew.nothing_left()


@pytest.mark.parametrize("count", [120, pytest.param(1_000, marks=pytest.mark.storm)])
def test_a_lock_is_handed_on_in_the_order_of_its_line(crew: Crew, count: int) -> None:
    """One at a time of each of two keys; the bodies begin in that very order."""
    locks = {key: Lock(crew.lot.redis, f"load:{key}").acquire(timeout=10) for key in ("many", "few")}
    few = count // 10
    sent = crew.send("locked", [(number, "many" if number % 11 else "few") for number in range(count)])
    all_parked(crew, count)
    numbers = {result.id: number for number, result in enumerate(sent)}
    lines = {key: [numbers[id] for id in in_line(crew, "lock", f"load:{key}")] for key in locks}

    for hold in locks.values():
        hold.release()
    runs = crew.until_ran(count, "locked")

    assert once_each(runs, count)
    assert {run["inside"] for run in runs} == {1}
    for key, line in lines.items():
        assert [run["number"] for run in runs if run["key"] == key] == line
    begun = [run["key"] for run in runs]
    assert max(place for place, key in enumerate(begun) if key == "few") < 5 * few + 20
    crew.nothing_left()


@pytest.mark.storm
@pytest.mark.parametrize("count", [120, 500])
def test_nothing_is_lost_when_workers_and_their_broker_are_restarted(
    own_server: Callable[..., EmbeddedServer], tmp_path: Path, count: int
) -> None:
    """With a lock, permits per tenant and two rates.

    Nothing is asked of what a worker was taking, or had, as the broker went: kombu takes a message from Redis by one
    command and writes by another one that it has it, so what is between the two is lost with the connection. A task
    that was parked is sent again when it has not come within an hour.
    """
    (tmp_path / "kept").mkdir()
    server = server_that_may_be_restarted(tmp_path / "kept")
    crew = Crew(tmp_path, server.url, notes=own_server().url, broker_transport_options=SHORT_VISIBILITY)
    try:
        crew.start("ann", "bob")
        calls = [(number, f"tenant {number % 4}", 0.01) for number in range(count)]
        third, begun = count // 3, count // 12

        sent = crew.send("mixed", calls[:third])
        crew.until_ran(begun, "mixed")
        crew.restart("ann")

        sent += crew.send("mixed", calls[third : 2 * third])
        crew.until_ran(third + begun, "mixed")
        server.stop()
        before = {run["number"] for run in crew.notes.of("mixed")}
        copytree(tmp_path / "kept", tmp_path / "seen")
        settled = crew.settled(tmp_path / "seen")
        server = server_that_may_be_restarted(tmp_path / "kept", server.port)

        crew.until_ran(third + 2 * begun, "mixed")
        sent += crew.send("mixed", calls[2 * third :])
        crew.restart("bob")
        numbers = {result.id: number for number, result in enumerate(sent)}
        undisturbed = {numbers[id] for id in settled} | set(range(2 * third, count))
        must_run = undisturbed | before
        crew.until(lambda: must_run <= {run["number"] for run in crew.notes.of("mixed")}, "all ran")
        crew.an_hour_later()
        crew.nothing_left()

        times = Counter(run["number"] for run in crew.notes.of("mixed"))
        assert settled
        assert {number: times[number] for number in undisturbed if times[number] != 1} == {}
    finally:
        crew.close()
        server.stop()


def test_of_200_calls_from_8_processes_one_completes_a_run_although_the_leader_is_killed(crew: Crew) -> None:
    """Those that follow it are parked; all 200 have the one result."""
    tag = uuid4().hex
    senders = [
        subprocess.Popen([sys.executable, str(FOLDER / "load_sender.py"), tag, "25"], env=crew.environment, stdout=-1)
        for _ in range(8)
    ]
    crew.until(lambda: crew.gates.hlen(crew.lot.keys.waits) >= 200 - 1, "all but one are parked")
    (leader,) = crew.notes.client.lrange(f"runs:{tag}", 0, -1)
    os.kill(int(leader), signal.SIGKILL)
    values = [value for sender in senders for value in json.loads(sender.communicate(timeout=PATIENCE_S)[0])]

    assert len(values) == 200
    assert all(value == values[0] for value in values)
    assert (values[0]["run"], crew.notes.client.get(f"completed:{tag}")) == (2, "1")
    crew.nothing_left()


@pytest.mark.storm
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # of SQLAlchemy, at kombu
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_the_broker_need_not_be_redis(
    own_server: Callable[..., EmbeddedServer], tmp_path: Path, database_url: str
) -> None:
    """Here it is PostgreSQL: tasks are parked, and sent again, and nobody is lost or runs beside another."""
    crew = Crew(tmp_path, own_server().url, broker=f"sqla+{database_url}")
    try:
        hold = Lock(crew.lot.redis, "load:one").acquire(timeout=10)
        crew.start("ann")  # one after the other, for the first makes the transport's tables
        crew.start("bob")
        crew.send("locked", [(number, "one") for number in range(8)])
        all_parked(crew, 8)
        hold.release()
        runs = crew.until_ran(8, "locked")

        assert once_each(runs, 8)
        assert {run["inside"] for run in runs} == {1}
        crew.nothing_left()
    finally:
        crew.close()
