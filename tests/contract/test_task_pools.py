"""Coordinated tasks in pools of threads, and in one that runs a task at a time: the same as in a pool of processes."""

from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

import pytest
from celery import chain, chord, group
from celery.exceptions import TaskRevokedError

from petiole import Lock
from petiole.cachelib import EmbeddedServer
from tests.contract.task_programs.canvas_app import PATIENCE_S
from tests.contract.task_programs.canvas_crew import Crew, worker

POOLS = ["threads", pytest.param("solo", marks=pytest.mark.storm), *(["gevent"] if find_spec("gevent") else [])]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    """Broker, results, gates and notes of this file."""
    server = EmbeddedServer.start("--hz", "100")
    yield server
    server.stop()


@pytest.fixture(scope="module", params=POOLS)
def workers(request: pytest.FixtureRequest, server: EmbeddedServer, tmp_path_factory: Any) -> Iterator[Crew]:
    """A worker of each pool, one after the other, and the app here."""
    with worker(server.url, tmp_path_factory.mktemp("worker"), f"--pool={request.param}", "--concurrency=4"):
        crew = Crew(server.url, request.param)
        yield crew
        crew.close()


@pytest.fixture
def crew(workers: Crew) -> Iterator[Crew]:
    """The crew; after the test nothing is left."""
    yield workers
    workers.nothing_left()


@pytest.fixture
def tag() -> str:
    """What tells the calls of one test from those of another."""
    return uuid4().hex


def get(result: Any) -> Any:
    return result.get(timeout=PATIENCE_S)


@pytest.mark.parametrize("task", ["locked", "rated", "everything", "join_end"])
def test_every_canvas_of_gated_tasks_ends_with_its_values(crew: Crew, tag: str, task: str) -> None:
    """With duplicates inside and across."""
    double, total = crew[task], crew["total"]
    inner = chord([double.s(1, tag), double.s(1, tag)], total.s())
    sent = [
        chain(double.s(2, tag), group(double.s(tag), double.s(tag)), total.s(), double.s(tag)).apply_async(),
        group(inner, chain(double.s(1, tag), double.s(tag)), double.s(1, tag)).apply_async(),
        inner.apply_async(),
    ]

    assert [get(result) for result in sent] == [32, [4, 4, 2], 4]
    if task == "locked":
        assert crew.most(tag) == 1


def test_what_is_parked_comes_back_and_retries_and_can_be_revoked(crew: Crew, tag: str) -> None:
    """Several times, behind a lock that somebody holds who is no task."""
    with Lock(crew.app.redis, f"canvas:{tag}"):
        results = [crew[task].delay(1, tag) for task in ("locked", "retried", "flaky", "replaced", "tell")]
        victim = crew["locked"].delay(2, tag)
        crew.parked(6)
        victim.revoke()
        with pytest.raises(TaskRevokedError):
            get(victim)
    values = [get(result) for result in results]

    assert values[:4] == [2, 2, 2, 2]
    assert (values[4]["retries"], values[4]["lost"]) == (0, False)


def test_a_task_that_is_told_to_wait_comes_again(crew: Crew, tag: str) -> None:
    """Without using up a retry."""
    assert get(crew["told_to_wait"].delay(1, tag)) == [1, 0, 2]


def test_others_run_while_many_are_parked(crew: Crew, tag: str) -> None:
    """They take up no thread; and each of them runs once."""
    with ExitStack() as held:
        held.enter_context(Lock(crew.app.redis, f"canvas:{tag}"))
        parked = [crew["locked"].delay(number, tag) for number in range(30)]
        crew.parked(30)
        assert get(crew["plain"].delay(21, tag)) == 42

    assert [get(result) for result in parked] == [number * 2 for number in range(30)]
    assert (crew.runs(tag), crew.most(tag)) == (30, 1)


def test_calls_that_pause_or_are_unique_end_alone(crew: Crew, tag: str) -> None:
    """Of five one runs, the others end with None or with its result."""
    paused = [crew["paused"].delay(number, tag) for number in range(5)]
    with Lock(crew.app.redis, f"canvas:{tag}"):
        joined = [crew["join_key"].delay(4, tag) for _ in range(5)]

    assert [get(result) for result in paused].count(None) == 4
    assert [get(result) for result in joined] == [8] * 5
