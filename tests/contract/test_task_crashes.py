"""What a task held whose process has died is given back; what one holds that lives is kept, however busy it is.

Leases are of a minute where something else than their end must free a lock: who waits for that would not see the test
succeed. They are short where something must be kept beyond them.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.exceptions import TaskRevokedError, TimeLimitExceeded, WorkerLostError
from celery.result import AsyncResult
from local_nodes import eventually

from petiole.cachelib import Connections, EmbeddedServer, Settings, connect
from petiole.cachelib.guarded import GuardedProcess
from petiole.coordination.coordinated import add_steps
from petiole.coordination.errors import LockError
from petiole.coordination.gates import Gates, Served
from petiole.coordination.lock import Lock
from petiole.coordination.parking import Admission, Attempt, Parked, ParkingLot, Running, Woken
from petiole.tasks.guard import Guard
from tests.contract.task_programs.crash_app import FOLDER, Notes, make_app

PATIENCE_S = 40
"""Less than the leases of a minute: who starts within it has not waited for the end of one."""


class Crew:
    """The app in this process, and what tests ask of its workers."""

    def __init__(self, server: EmbeddedServer, gates: EmbeddedServer, **settings: Any) -> None:
        self.server = server
        self.gates = gates
        self.settings = settings
        self.app: Celery = make_app(server.url, gates.url, **settings)
        self.notes = Notes(server.url)
        self.redis: Connections = connect(settings=Settings(url=gates.url))
        self.lot: ParkingLot = self.app.tasks["early"].lot

    def __getitem__(self, task: str) -> Any:
        return self.app.tasks[task]

    @contextmanager
    def worker(self, folder: Path, name: str = "worker", *options: str) -> Iterator[GuardedProcess]:
        """A worker process that has begun to consume."""
        log = folder / f"{name}.log"
        process = GuardedProcess(
            [sys.executable, "-m", "celery", "-A", "crash_app:app", "worker", "--concurrency=3", "--loglevel=info",
             "--without-gossip", "--without-mingle", f"--hostname={name}@here", *options],
            output=log,
            environment={
                **os.environ, "PYTHONPATH": str(FOLDER), "C_FORCE_ROOT": "1", "CRASH_TEST_URL": self.server.url,
                "CRASH_TEST_GATES": self.gates.url, "CRASH_TEST_SETTINGS": json.dumps(self.settings),
            },
            folder=folder,
        )  # fmt: skip
        try:
            eventually(lambda: " ready." in log.read_text() or not process.running, f"the worker starts: {log}")
            assert process.running, log.read_text()[-2_000:]
            yield process
        finally:
            process.stop(within_s=20)

    def noted(self, tag: str, what: str) -> list[dict[str, Any]]:
        """Notes of one thing, in the order in which they were made."""
        return [one for one in self.notes.of(tag) if one["what"] == what]

    def wait_for(self, tag: str, what: str, times: int = 1) -> dict[str, Any]:
        """Wait until something was noted so often. The last note."""
        eventually(lambda: len(self.noted(tag, what)) >= times, f"{what!r}, {times} times", PATIENCE_S)
        return self.noted(tag, what)[times - 1]

    def wait_parked(self, result: AsyncResult, line: str | None = None) -> None:
        """Wait until a call is parked; in that line, if one is named."""
        eventually(
            lambda: any(one.id == result.id and line in (None, one.line) for one in self.lot.waiting()), "parked"
        )

    def wait_us(self, since_us: int, for_us: int) -> None:
        """Wait until so much of the server's time has passed."""
        eventually(lambda: self.notes.now_us() > since_us + for_us, "time passes")

    def holders(self, tag: str) -> list[int]:
        """The fences of those who hold the lock of a tag."""
        return [one.fence for one in Lock(self.redis, tag).inspect().holders if one.lease_left > 0]

    def losses(self) -> int:
        """How many tasks have lost something, as the worker tells."""
        (stats,) = (self.app.control.inspect(timeout=PATIENCE_S, limit=1).stats() or {}).values()
        return int(stats["petiole"]["guard"].partition(" lost]")[0].rpartition(" ")[2])

    def close(self) -> None:
        gc.collect()
        self.app.backend.result_consumer.subscribed_to.clear()  # it would unsubscribe from a server that is gone
        self.app.close()
        self.redis.close()
        self.notes.client.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[EmbeddedServer, EmbeddedServer]]:
    """Broker, results and notes; and the gates."""
    pair = EmbeddedServer.start("--hz", "100"), EmbeddedServer.start("--hz", "100")
    yield pair
    for server in pair:
        server.stop()


@pytest.fixture(scope="module")
def crew(servers: tuple[EmbeddedServer, EmbeddedServer], tmp_path_factory: Any) -> Iterator[Crew]:
    """With a worker whose pool processes may be killed."""
    crew = Crew(*servers)
    with crew.worker(tmp_path_factory.mktemp("worker")):
        yield crew
    crew.close()


@pytest.fixture
def lone(own_server: Callable[..., EmbeddedServer]) -> Iterator[Callable[..., Crew]]:
    """Crews on a server of their own, without a worker yet."""
    crews: list[Crew] = []

    def make(**settings: Any) -> Crew:
        server = own_server()
        crews.append(Crew(server, server, **settings))
        return crews[-1]

    yield make
    for crew in crews:
        crew.close()


@pytest.fixture
def tag() -> str:
    """What tells the calls of one test from those of another."""
    return uuid4().hex


def first_and_second(crew: Crew, tag: str, task: str) -> tuple[AsyncResult, dict[str, Any], AsyncResult]:
    """One that runs, what it noted, and one that waits for its lock."""
    first = crew[task].delay(tag, "first")
    began = crew.wait_for(tag, "first began")
    second = crew["early"].delay(tag, "second")
    crew.wait_parked(second)
    return first, began, second


def ours_running() -> set[str]:
    """The threads of a worker's main process that run in this one."""
    return {"petiole-guard", "petiole-pump"} & {thread.name for thread in threading.enumerate()}


# A process of the pool dies


@pytest.mark.parametrize("task", ["early", "late", "several"])
def test_the_next_in_line_starts_when_a_process_is_killed(crew: Crew, tag: str, task: str) -> None:
    """Whatever it held, and whenever its message is acknowledged; the task itself has failed, as Celery says."""
    first, began, second = first_and_second(crew, tag, task)
    os.kill(began["pid"], signal.SIGKILL)

    assert second.get(timeout=PATIENCE_S) == 1
    if task == "late":  # Celery looks every five seconds
        with pytest.raises(WorkerLostError):
            first.get(timeout=PATIENCE_S)
    assert len(crew.noted(tag, "first began")) == 1


def test_the_next_in_line_starts_when_a_task_hits_its_hard_time_limit(crew: Crew, tag: str) -> None:
    """Its process is killed by the worker."""
    first, _, second = first_and_second(crew, tag, "limited")

    assert second.get(timeout=PATIENCE_S) == 1
    with pytest.raises(TimeLimitExceeded):
        first.get(timeout=PATIENCE_S)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_the_next_in_line_starts_when_a_running_task_is_revoked(crew: Crew, tag: str, how: str) -> None:
    """Its process is told to end, or killed."""
    first, _, second = first_and_second(crew, tag, "early")
    first.revoke(terminate=True, signal=how)

    assert second.get(timeout=PATIENCE_S) == 1
    with pytest.raises(TaskRevokedError):
        first.get(timeout=PATIENCE_S)


def test_a_task_whose_process_was_killed_before_its_result_was_kept_runs_again(crew: Crew, tag: str) -> None:
    """Its body had ended, and its lock was given back."""
    assert crew["die_with_the_result"].delay(tag).get(timeout=PATIENCE_S) == 2
    assert len(crew.noted(tag, "began")) == 2


@pytest.mark.parametrize("task", ["rejected", pytest.param("retried", marks=pytest.mark.storm)])
def test_a_task_that_comes_again_after_its_process_was_killed_runs_again(crew: Crew, tag: str, task: str) -> None:
    """It finds nothing of its first attempt in its way; and the one that waited for it runs too, not beside it."""
    first, began, second = first_and_second(crew, tag, task)
    os.kill(began["pid"], signal.SIGKILL)

    assert first.get(timeout=PATIENCE_S) == 2
    assert second.get(timeout=PATIENCE_S) == 1
    order = [one["what"] for one in crew.notes.of(tag)]
    again = [order[i : i + 2] for i in (1, 3)]
    assert sorted(again) == [["first began", "first ended"], ["second began", "second ended"]]


def test_what_a_dead_task_held_is_given_back_when_redis_is_there_again(crew: Crew, tag: str) -> None:
    """Redis does not answer when its process is killed: the main process asks again."""
    _, _, second = first_and_second(crew, tag, "limited")
    crew.redis.coordination.execute_command("CLIENT", "PAUSE", 2_500, "ALL")

    assert second.get(timeout=PATIENCE_S) == 1


class Delivery:
    """As much of Celery's request as the guard looks at."""

    def __init__(self, id: str, task: Any, worker_pid: int) -> None:
        self.id = id
        self.task = task
        self.worker_pid = worker_pid
        self.request_dict = {"retries": 0}


def test_a_dead_delivery_gives_back_nothing_that_another_one_holds(
    own_server: Callable[..., EmbeddedServer],
) -> None:
    """The same task runs in two processes (its message came twice), and one of them dies: not the one that holds."""
    server = own_server()
    app = make_app(server.url, server.url)
    task = app.tasks["early"]
    running = task.lot.admit(Attempt("a", 0), task.gates.of(("t", "first"), {}), record=None, lease_ms=60_000)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    guard = Guard(app, [task.lot])
    guard.start()
    try:
        guard.accepted(Delivery("a", task, dead.pid), dying=True)
        eventually(lambda: not guard._running and not guard._dead, "the guard has seen that it is dead")
        assert task.lot.running(["a.0"])["a.0"].nonce == running.nonce
        assert guard.crashed == 0
    finally:
        guard.stop()
        dead.wait()
        task.lot.redis.close()
        app.close()


# What lives is kept


def test_a_task_that_holds_the_interpreter_keeps_its_lock(crew: Crew, tag: str) -> None:
    """Its process renews nothing for two leases; the main process does, and the task need not believe otherwise."""
    first = crew["hold_the_interpreter"].delay(tag, "first")
    crew.wait_for(tag, "first began")
    second = crew["early"].delay(tag, "second")

    assert first.get(timeout=PATIENCE_S) is False
    assert second.get(timeout=PATIENCE_S) == 1
    assert crew.noted(tag, "second began")[0]["at"] > crew.noted(tag, "first ended")[0]["at"]


def test_a_task_whose_process_is_stopped_keeps_its_lock(crew: Crew, tag: str) -> None:
    """Its main process goes on, and knows that it has not ended."""
    first, began, second = first_and_second(crew, tag, "short")
    os.kill(began["pid"], signal.SIGSTOP)
    try:
        crew.wait_us(crew.notes.now_us(), 3_000_000)
        assert crew.noted(tag, "second began") == []
    finally:
        os.kill(began["pid"], signal.SIGCONT)
    crew.notes.go(tag, "first")

    assert [first.get(timeout=PATIENCE_S), second.get(timeout=PATIENCE_S)] == [1, 1]


@pytest.mark.parametrize("pool", [pytest.param("solo", marks=pytest.mark.storm), "threads"])
def test_a_worker_in_this_process_renews_too_and_leaves_no_thread(lone: Any, tag: str, pool: str) -> None:
    """Where tasks run in threads."""
    crew = lone()
    with start_worker(crew.app, pool=pool, concurrency=2, perform_ping_check=False, shutdown_timeout=30):
        crew["short"].apply_async((tag, "first"), ignore_result=True)
        began = crew.wait_for(tag, "first began")
        held = crew.holders(tag)
        crew.wait_us(began["at"], 2_500_000)
        assert crew.holders(tag) == held != []
        crew.notes.go(tag, "first")
        crew.wait_for(tag, "first ended")
        assert ours_running() == {"petiole-guard", "petiole-pump"}
    eventually(lambda: not ours_running(), "they end")


def test_a_worker_without_coordinated_tasks_has_no_guard(own_server: Callable[..., EmbeddedServer]) -> None:
    """Nor a pump; the step is there, for another app has put it there."""
    server = own_server()
    app = Celery("plain", broker=server.url, backend=server.url, set_as_current=False)
    add_steps(app)
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        assert not ours_running()
    app.close()


# What is lost


def test_a_task_is_stopped_when_its_lock_is_taken_away(crew: Crew, tag: str) -> None:
    """``on_lost="terminate"``: in its body, where it may tidy up; and its process lives on."""
    first = crew["be_stopped"].delay(tag, "first")
    began = crew.wait_for(tag, "first began")
    Lock(crew.redis, tag).force_release()

    with pytest.raises(LockError, match="was lost"):
        first.get(timeout=PATIENCE_S)
    assert crew.noted(tag, "first was stopped")[0]["pid"] == began["pid"]
    os.kill(began["pid"], 0)


def test_a_task_is_told_when_its_lock_is_taken_away(crew: Crew, tag: str) -> None:
    """``on_lost="mark"``: it goes on, and may look; the worker counts it."""
    before = crew.losses()
    first = crew["look"].delay(tag, "first")
    crew.wait_for(tag, "first began")
    Lock(crew.redis, tag).force_release()

    eventually(lambda: crew.losses() > before, "the worker has counted it")
    crew.notes.go(tag, "first")
    assert first.get(timeout=PATIENCE_S) is True


# What is revoked, or comes twice


def test_a_call_that_was_revoked_before_it_started_is_waited_for_no_more(crew: Crew, tag: str) -> None:
    """It was to be the only one; another one may be sent."""
    first = crew["once"].apply_async((tag,), expires=0.000_001)
    with pytest.raises(TaskRevokedError):
        first.get(timeout=PATIENCE_S)

    eventually(lambda: crew["once"].delay(tag).id != first.id, "another call is sent")


def test_what_a_revoked_task_was_granted_on_its_way_is_handed_on(redis: Connections, name: str) -> None:
    """It was woken, sent, and revoked where it came: the next one does not wait for its lease to end."""
    lot = ParkingLot(redis, name)
    gates = Gates("t", signature(lambda: None), lock=name).of((), {})

    def ask(id: str, generation: int = 0) -> Admission:
        return lot.admit(Attempt(id, 0, generation), gates, record=b"{}", lease_ms=60_000)

    def serve() -> list[Woken]:
        for line, definition in lot.lines():
            lot.serve(line, Served.read(definition))
        return list(lot.next().woken)

    first = ask("first")
    assert isinstance(first, Running)
    assert isinstance(ask("revoked"), Parked)
    assert isinstance(ask("next"), Parked)
    lot.end(first)
    woken = serve()
    lot.sent(woken, forget=[False])
    assert [one.id for one in woken] == ["revoked"]
    assert serve() == []
    lot.revoked(Attempt("revoked", 0), gates)

    (woken_next,) = serve()
    last = ask(woken_next.id, woken_next.generation)
    assert isinstance(last, Running)
    assert woken_next.id == "next"
    lot.end(last)
    assert (serve(), lot.waiting()) == ([], [])


def test_a_message_that_comes_again_while_the_task_runs_does_not_run_beside_it(
    lone: Any, tag: str, tmp_path: Path
) -> None:
    """The broker believes that it was lost (visibility timeout). It runs when the first one's process dies."""
    options = {"visibility_timeout": 2, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    crew = lone(broker_transport_options=options)
    with crew.worker(tmp_path):
        first = crew["late"].delay(tag, "first")
        began = crew.wait_for(tag, "first began")
        crew.wait_parked(first, "-")
        assert len(crew.noted(tag, "first began")) == 1
        os.kill(began["pid"], signal.SIGKILL)
        crew.wait_for(tag, "first ended")

        assert len(crew.noted(tag, "first began")) == 2


# A whole worker ends


def test_a_worker_that_ends_keeps_what_its_tasks_hold_until_they_have_ended(
    lone: Any, tag: str, tmp_path: Path
) -> None:
    """A warm shutdown waits for them: for two leases here."""
    crew = lone()
    with crew.worker(tmp_path) as worker:
        first = crew["short"].delay(tag, "first")
        began = crew.wait_for(tag, "first began")
        held = crew.holders(tag)
        os.kill(began["main"], signal.SIGTERM)
        eventually(lambda: "Warm shutdown" in (tmp_path / "worker.log").read_text(), "it ends")
        crew.wait_us(crew.notes.now_us(), 3_000_000)
        held_on = crew.holders(tag)
        crew.notes.go(tag, "first")

        assert held_on == held != []
        assert first.get(timeout=PATIENCE_S) == 1
        eventually(lambda: not worker.running, "it has ended")
        assert crew.holders(tag) == []


def test_a_worker_that_ends_at_once_gives_back_what_its_tasks_held(lone: Any, tag: str, tmp_path: Path) -> None:
    """A cold shutdown kills them, and hangs nowhere."""
    crew = lone()
    with crew.worker(tmp_path) as worker:
        crew["early"].delay(tag, "first")
        began = crew.wait_for(tag, "first began")
        os.kill(began["main"], signal.SIGQUIT)
        eventually(lambda: not worker.running, "it has ended", PATIENCE_S)

        assert crew.holders(tag) == []


def test_another_worker_goes_on_when_a_whole_one_is_killed(lone: Any, tag: str, tmp_path: Path) -> None:
    """It sends what waits for the dead one, after one lease."""
    crew = lone()
    with crew.worker(tmp_path, "one") as one:
        _, _, second = first_and_second(crew, tag, "brief")
        with crew.worker(tmp_path, "two"):
            one.kill()
            assert second.get(timeout=PATIENCE_S) == 1


@pytest.mark.storm
def test_a_worker_that_was_stopped_and_goes_on_is_told_apart_by_the_fence(lone: Any, tag: str, tmp_path: Path) -> None:
    """For longer than its lease: another worker has gone on meanwhile, so what the first one writes is refused."""
    crew = lone()
    with crew.worker(tmp_path, "one") as one:
        first = crew["write"].delay(tag, "first")
        began = crew.wait_for(tag, "first began")
        with crew.worker(tmp_path, "two"):
            os.killpg(one.group, signal.SIGSTOP)
            try:
                for _ in range(4):  # the one that is stopped may have asked the broker for one before
                    crew["write"].delay(tag, "second")
                written = crew.wait_for(tag, "second written")
            finally:
                os.killpg(one.group, signal.SIGCONT)
            crew.notes.go(tag, "first")

            assert first.get(timeout=PATIENCE_S) == "refused"
    assert written["fence"] > began["fence"]
