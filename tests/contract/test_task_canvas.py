"""Coordinated tasks in worker processes: whatever Celery does around a task, each ends, with the right value.

Every test has a tag of its own, by which its gates are keyed. After each nothing is parked, held or running.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, chain, chord, group
from celery.canvas import StampingVisitor
from celery.exceptions import ChordError, TaskRevokedError, TimeLimitExceeded
from celery.result import GroupResult
from local_nodes import eventually

from petiole import Lock
from petiole.cachelib import EmbeddedServer
from petiole.coordination.errors import DuplicateTask, TooManyParked
from petiole.coordination.gates import Served
from petiole.coordination.parking import Attempt, Parked, ParkingLot, Running
from tests.contract.task_programs.canvas_app import OTHER_QUEUE, PATIENCE_S, Order
from tests.contract.task_programs.canvas_crew import Crew, worker

# What gives each call its own turn or its own result: every one ends with the value of its body.
RUNNING = ["locked", "paired", "rated", "everything", "join", "join_end", "join_for", "late"]
RUNNING += ["odd task. name: {not} a template \u00e9 \n%s", "long" * 60]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    """Broker, results, gates and notes of this file."""
    server = EmbeddedServer.start("--hz", "100")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def workers(server: EmbeddedServer, tmp_path_factory: Any) -> Iterator[Crew]:
    """A worker with four processes, one of another queue, and the app here."""
    folders = [tmp_path_factory.mktemp(name) for name in ("worker", "other")]
    other = ("--pool=solo", "-Q", OTHER_QUEUE, "-n", "other@%h")
    with (
        worker(server.url, folders[0], "--pool=prefork", "--concurrency=4", "-Q", "celery"),
        worker(server.url, folders[1], *other),
    ):
        crew = Crew(server.url)
        yield crew
        crew.close()


@pytest.fixture
def crew(workers: Crew) -> Iterator[Crew]:
    """The crew; after the test nothing is left."""
    yield workers
    try:
        workers.nothing_left()
    except AssertionError:
        workers.forget_all()  # the next test would look at it, too
        raise


@pytest.fixture
def tag() -> str:
    """What tells the calls of one test from those of another."""
    return uuid4().hex


def get(result: Any) -> Any:
    return result.get(timeout=PATIENCE_S)


def failed(result: Any) -> BaseException:
    error = result.get(timeout=PATIENCE_S, propagate=False)
    assert isinstance(error, BaseException), error
    return error


def hooks(crew: Crew, tag: str) -> list[str]:
    return [hook for hook in crew.notes.lrange(f"hooks:{tag}", 0, -1) if hook != "before_start"]


def ended(result: Any, state: str) -> None:
    eventually(lambda: result.state == state, f"{result.id} is {state}, not {result.state}", PATIENCE_S)


# Canvas


@pytest.mark.parametrize("task", RUNNING)
def test_every_canvas_of_gated_tasks_ends_with_its_values(crew: Crew, tag: str, task: str) -> None:
    """Chain, group, chord and each nested in another, with duplicates inside and across, all at once."""
    double, total, flat = crew[task], crew["total"], crew["flat"]
    inner = chord([double.s(1, tag), double.s(1, tag)], total.s())
    sent = {
        "chain": (chain(double.s(1, tag), double.s(tag), double.s(tag)), 8),
        "group": (group(double.s(number, tag) for number in (1, 2, 1, 3)), [2, 4, 2, 6]),
        "chord": (chord([double.s(number, tag) for number in (1, 1, 1, 2)], total.s()), 10),
        "same chord": (chord([double.s(number, tag) for number in (1, 1, 1, 2)], total.s()), 10),
        "gated body": (chord([total.si([1]), total.si([2])], double.si(4, tag)), 8),
        "chord in chain": (chain(double.s(2, tag), group(double.s(tag), double.s(tag)), total.s(), double.s(tag)), 32),
        "group in chord": (chord([group(double.s(1, tag), double.s(2, tag)), double.s(1, tag)], total.s()), 8),
        "chain in group": (group(chain(double.s(1, tag), double.s(tag)), chain(double.s(1, tag), flat.s())), [4, 2]),
        "chord in group": (group(inner, inner, double.s(8, tag)), [4, 4, 16]),
    }
    results = {name: canvas.apply_async() for name, (canvas, _) in sent.items()}

    assert {name: get(result) for name, result in results.items()} == {name: value for name, (_, value) in sent.items()}
    if task in ("locked", "late"):
        assert crew.most(tag) == 1


@pytest.mark.parametrize("task", ["drop", "drop_end", "drop_start", "drop_for", "paused"])
def test_a_canvas_with_calls_that_are_dropped_ends_too(crew: Crew, tag: str, task: str) -> None:
    """Those end with None, for whoever waits for them."""
    crew.hold(tag)
    double, total = crew[task], crew["total"]
    whole = chord([double.s(1, tag) for _ in range(5)], total.s()).delay()
    linked = chain(double.si(1, tag), crew["flat"].s()).delay()
    several = group(double.s(1, tag) for _ in range(3)).delay()
    crew.begun(tag)
    crew.let_go(tag)
    values = get(several)

    assert get(whole) in range(0, 11, 2)
    assert get(linked) in (None, 2)
    assert set(values) <= {None, 2}
    assert crew.runs(tag) >= 1


@pytest.mark.parametrize("task", ["raise", "raise_end", "raise_for"])
def test_a_chord_with_a_duplicate_that_raises_fails_and_does_not_hang(crew: Crew, tag: str, task: str) -> None:
    """Where nobody can be told, it is the failure of the task; the first one runs."""
    crew.hold(tag)
    heads = [crew[task].s(1, tag), crew[task].s(1, tag)]
    result = chord(heads, crew["total"].s()).delay()
    crew.begun(tag)
    states = {head.id: head for head in result.parent.results}
    eventually(lambda: any(head.state == "FAILURE" for head in states.values()), "one fails", PATIENCE_S)
    crew.let_go(tag)

    with pytest.raises((ChordError, DuplicateTask)):
        get(result)
    ended(result, "FAILURE")
    (error,) = [error for error in map(failed_or_value, states.values()) if isinstance(error, BaseException)]
    assert isinstance(error, DuplicateTask)
    assert error.task == task
    assert sorted(str(head.state) for head in states.values()) == ["FAILURE", "SUCCESS"]
    assert crew.runs(tag) == 1


def failed_or_value(result: Any) -> Any:
    return result.get(timeout=PATIENCE_S, propagate=False)


@pytest.mark.parametrize("task", ["replace", "replace_start", "replace_end"])
def test_of_calls_that_replace_each_other_the_first_and_the_newest_run(crew: Crew, tag: str, task: str) -> None:
    """Of five in a chord those between end with None, and the chord ends."""
    crew.hold(tag)
    first = crew[task].delay(1, tag)
    crew.begun(tag)
    results = []
    for number in range(2, 6):
        results.append(crew[task].delay(number, tag))
        if task != "replace_start":
            eventually(
                lambda newest=results[-1]: newest.id in {one.id for one in crew.lot.waiting() if not one.woken},
                "the newest waits", PATIENCE_S,
            )  # fmt: skip
    crew.let_go(tag)

    assert get(first) == 2
    values = [get(result) for result in results]
    assert values[-1] == 10
    if task != "replace_start":
        assert values[:-1] == [None] * 3
        assert crew.runs(tag) == 2


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # by Celery
def test_group_results_keep_their_order_and_can_be_restored(crew: Crew, tag: str) -> None:
    """Whatever the order in which their tasks ran."""
    result = group(crew["locked"].s(number, tag) for number in range(12)).apply_async()
    result.save()
    restored = GroupResult.restore(result.id, app=crew.app)

    assert get(restored) == [number * 2 for number in range(12)]
    assert restored.successful()
    assert crew.runs(tag) == 12


def test_callbacks_and_errbacks_fire_after_parking(crew: Crew, tag: str) -> None:
    """Once each."""
    crew.hold(tag)
    hear = crew["hear"]
    first = crew["locked"].delay(1, tag)
    crew.begun(tag)
    linked = crew["locked"].apply_async((2, tag), link=[hear.s("first", tag), hear.s("second", tag)])
    erred = crew["failing"].apply_async((2, tag), link_error=hear.si("failed", tag))
    crew.parked(2)
    crew.let_go(tag)

    assert (get(first), get(linked)) == (2, 4)
    assert isinstance(failed(erred), LookupError)
    assert sorted(crew.heard(tag) for _ in range(3)) == ["4", "4", "failed"]


def test_a_callback_may_be_a_canvas_of_gated_tasks(crew: Crew, tag: str) -> None:
    """Of a task that was parked: a chain, a group and a chord."""
    double, hear = crew["locked"], crew["hear"]
    with Lock(crew.app.redis, f"canvas:{tag}"):
        links = [chain(double.s(tag), hear.s(tag)), group(chain(double.s(tag), hear.s(tag)), hear.s(tag))]
        links += [chord([double.si(1, tag), double.si(2, tag)], chain(crew["total"].s(), hear.s(tag)))]
        result = double.apply_async((1, tag), link=links)
        crew.parked(1)

    assert get(result) == 2
    assert sorted(crew.heard(tag) for _ in range(4)) == ["2", "4", "4", "6"]


def test_chunks_and_maps_of_a_gated_task_ask_its_gates_in_place(crew: Crew, tag: str) -> None:
    """They call it as a function."""
    double = crew["locked"]
    chunks = double.chunks([(number, tag) for number in range(5)], 2).apply_async()
    starmap = double.starmap([(number, tag) for number in range(3)]).apply_async()

    assert get(chunks) == [[0, 2], [4, 6], [8]]
    assert get(starmap) == [0, 2, 4]
    assert crew.most(tag) == 1


def test_a_parked_member_that_fails_fails_its_chord(crew: Crew, tag: str) -> None:
    """And the errback of its body is told."""
    crew.hold(tag)
    body = crew["total"].s().on_error(crew["hear"].si("chord", tag))
    result = chord([crew["locked"].s(1, tag), crew["failing"].s(1, tag)], body).delay()
    crew.parked(1)
    crew.let_go(tag)

    with pytest.raises((ChordError, LookupError), match="1 fails"):
        get(result)
    ended(result, "FAILURE")
    assert crew.heard(tag) == "chord"


# Retries and replacement


@pytest.mark.parametrize(("task", "number", "runs"), [("retried", 1, 2), ("flaky", 2, 3), ("flaky_joined", 1, 3)])
def test_a_task_that_was_parked_can_retry(crew: Crew, tag: str, task: str, number: int, runs: int) -> None:
    """By hand and automatic, again and again, alone and in a chord; a lock is free in between."""
    crew.hold(tag)
    sent = [crew[task].delay(number, tag)]
    crew.begun(tag)
    sent += [crew[task].delay(number, tag) for _ in range(2)]
    whole = chord([crew[task].s(number, tag) for _ in range(2)], crew["total"].s()).delay()
    crew.parked(4)
    crew.let_go(tag)

    assert [get(result) for result in sent] == [number * 2] * 3
    assert get(whole) == number * 4
    assert crew.runs(tag) in ([runs] if task == "flaky_joined" else [runs * 5])


def test_parking_uses_up_no_retry(crew: Crew, tag: str) -> None:
    """Not of a task that may have none: ten wait for one lock, by turns with another gate."""
    results = [crew["never_retried"].delay(number, tag) for number in range(10)]

    assert [get(result) for result in results] == [0] * 10
    assert crew.runs(tag) == 10


def test_retries_that_are_used_up_end_a_task_that_was_parked(crew: Crew, tag: str) -> None:
    """As of any task."""
    crew.hold(tag)
    first = crew["locked"].delay(1, tag)
    crew.begun(tag)
    result = crew["flaky"].delay(9, tag)
    crew.parked(1)
    crew.let_go(tag)

    assert isinstance(failed(result), ConnectionResetError)
    assert get(first) == 2
    assert crew.runs(tag) == 5
    ends = ["after_return FAILURE", "on_failure", *["on_retry"] * 3]  # the next run may end before the hook of one does
    eventually(lambda: sorted(hooks(crew, tag)) == ends, "its hooks run", PATIENCE_S)


@pytest.mark.parametrize("task", ["replaced", "replaced_by_itself"])
def test_a_replaced_task_completes_as_the_one_in_its_place(crew: Crew, tag: str, task: str) -> None:
    """Which has its id, and waits for the same lock."""
    results = [crew[task].delay(0 if task == "replaced_by_itself" else 1, tag) for _ in range(3)]
    whole = chord([crew[task].s(1, tag) for _ in range(2)], crew["total"].s()).delay()

    assert [get(result) for result in results] == [2, 2, 2]
    assert get(whole) == 4


# Revoked, expired, too slow


def test_a_parked_task_that_is_revoked_ends_so_and_the_others_go_on(crew: Crew, tag: str) -> None:
    """Also the chord that it is a part of, which fails."""
    crew.hold(tag)
    first = crew["locked"].delay(1, tag)
    crew.begun(tag)
    victim, last = crew["locked"].delay(2, tag), crew["locked"].delay(3, tag)
    whole = chord([crew["locked"].s(4, tag), crew["locked"].s(5, tag)], crew["total"].s()).delay()
    crew.parked(4)
    for one in (victim, whole.parent.results[0]):
        one.revoke()
    for one in (victim, whole.parent.results[0]):
        assert isinstance(failed(one), TaskRevokedError)
        assert one.state == "REVOKED"
    crew.parked(2)  # it is not only said so by who has revoked them
    assert not first.ready()
    crew.let_go(tag)

    assert (get(first), get(last), get(whole.parent.results[1])) == (2, 6, 10)
    with pytest.raises((ChordError, TaskRevokedError)):
        get(whole)
    ended(whole, "FAILURE")
    assert crew.runs(tag) == 3


def test_a_call_that_was_revoked_before_it_came_never_runs(crew: Crew, tag: str) -> None:
    """Nor is it parked."""
    revoked = uuid4().hex
    crew.app.control.broadcast("revoke", arguments={"task_id": [revoked]}, reply=True, limit=2, timeout=PATIENCE_S)

    assert isinstance(failed(crew["locked"].apply_async((1, tag), task_id=revoked)), TaskRevokedError)
    assert crew.runs(tag) == 0


@pytest.mark.parametrize("task", ["locked", "join_end", "drop_end"])
def test_a_unique_or_locked_task_that_is_terminated_lets_the_next_one_run(crew: Crew, tag: str, task: str) -> None:
    """At once: not when a lease has ended."""
    crew.hold(tag)
    first = crew[task].delay(1, tag)
    crew.begun(tag)
    second = crew[task].delay(1, tag) if task != "drop_end" else None
    if second is not None:
        crew.parked(1)
    first.revoke(terminate=True, signal="SIGKILL")
    assert isinstance(failed(first), TaskRevokedError)
    crew.notes.delete(f"hold:{tag}")

    assert get(second or crew[task].apply_async((1, tag), task_id=uuid4().hex)) in (2, None)


def test_a_task_that_expires_while_it_is_parked_ends_as_revoked(crew: Crew, tag: str) -> None:
    """When its time has come, not when its turn has; whether given as seconds or as a date."""
    crew.hold(tag)
    first = crew["locked"].delay(1, tag)
    crew.begun(tag)
    at = datetime.now(UTC) + timedelta(seconds=1)
    expiring = [crew["locked"].apply_async((2, tag), expires=expires) for expires in (1, at)]
    lasting = crew["locked"].apply_async((3, tag), expires=600)
    crew.parked(3)
    for one in expiring:
        assert isinstance(failed(one), TaskRevokedError)
    assert not first.ready()
    crew.let_go(tag)

    assert (get(first), get(lasting)) == (2, 6)
    assert crew.runs(tag) == 2


def test_time_limits_count_from_the_start_of_the_body_and_free_the_lock(crew: Crew, tag: str) -> None:
    """Soft ones can be caught; a hard one kills, and the next task runs."""
    ways = {task: (f"{tag}:{task}", []) for task in ("slow", "killed")}
    for task, (name, sent) in ways.items():
        crew.hold(name)
        sent.append(crew[task].delay(1, name))
    for name, _ in ways.values():
        crew.begun(name)
    for name, sent in ways.values():
        sent += [crew["locked"].delay(4, name), crew["slow"].delay(2, name)]
    crew.parked(4)
    for name, _ in ways.values():
        crew.notes.delete(f"hold:{name}")

    assert [get(result) for result in ways["slow"][1]] == ["too slow", 8, "done"]
    assert isinstance(failed(ways["killed"][1][0]), TimeLimitExceeded)
    assert [get(result) for result in ways["killed"][1][1:]] == [8, "done"]


def test_the_time_limits_of_a_call_are_kept_over_parking(crew: Crew, tag: str) -> None:
    """Those of the call, not of the task."""
    crew.hold(tag)
    first = crew["tell"].delay(1, tag)
    crew.begun(tag)
    second = crew["tell"].apply_async((2, tag), time_limit=19, soft_time_limit=17)
    crew.parked(1)
    crew.let_go(tag)

    assert get(first)["timelimit"] == [None, None]
    assert get(second)["timelimit"] == [19, 17]


# Ways to send, and what a message carries


def test_countdown_and_eta_are_waited_for_before_the_gates_are_asked(crew: Crew, tag: str) -> None:
    """A task whose time has not come holds nothing."""
    later = crew["locked"].apply_async((1, tag), countdown=1)
    dated = crew["locked"].apply_async((2, tag), eta=datetime.now(UTC) + timedelta(seconds=1))

    assert get(crew["locked"].delay(3, tag)) == 6
    assert crew.runs(tag) == 1
    assert (get(later), get(dated)) == (2, 4)


def test_a_task_is_sent_by_name_from_an_app_that_does_not_know_it(crew: Crew, tag: str) -> None:
    """By keyword or not, as beat does it, too; what the function does not take fails at once."""
    stranger = Celery("stranger", broker=crew.url, backend=crew.url, set_as_current=False)
    try:
        crew.hold(tag)
        first = stranger.send_task("locked", (1, tag))
        crew.begun(tag)
        results = [
            stranger.send_task("locked", kwargs={"tag": tag, "number": 2}),
            stranger.send_task("locked", (3,), {"tag": tag}, headers={"celery_beat_task": True}),
            stranger.send_task("shared", (4, tag)),
            crew.app.send_task("locked", (5, tag)),
        ]
        crew.parked(4)
        wrong = stranger.send_task("locked", (6,))
        assert isinstance(failed(wrong), TypeError)
        crew.let_go(tag)
        assert [get(result) for result in (first, *results)] == [2, 4, 6, 8, 10]
        stranger.backend.result_consumer.subscribed_to.clear()
    finally:
        stranger.close()


def test_a_call_without_a_result_is_parked_and_runs_without_one(crew: Crew, tag: str) -> None:
    """Whether the task says so, or the call."""
    crew.hold(tag)
    first = crew["tell"].delay(1, tag)
    crew.begun(tag)
    silent = [crew["forgotten"].delay(2, tag), crew["locked"].apply_async((3, tag), ignore_result=True)]
    loud = crew["forgotten"].apply_async((4, tag), ignore_result=False)
    crew.parked(3)
    crew.let_go(tag)

    assert get(first)["number"] == 1
    assert get(loud) == 8
    crew.begun(tag, 4)
    crew.nothing_left()
    assert not any(crew.notes.exists(f"celery-task-meta-{result.id}") for result in silent)


def test_what_a_message_carries_is_kept_over_parking(crew: Crew, tag: str) -> None:
    """Id, root, parent, priority, headers, shadow, origin; and the task is bound to its own request."""
    crew.hold(tag)
    first = crew["tell"].delay(1, tag)
    crew.begun(tag)
    id, root, parent = (uuid4().hex for _ in range(3))
    kept = crew["tell"].apply_async(
        (2, tag), task_id=id, priority=3, headers={"tenant": "acme", "nested": {"a": [1]}}, shadow="shade",
        root_id=root, parent_id=parent,
    )  # fmt: skip
    crew.parked(1)
    crew.let_go(tag)
    told = get(kept)

    assert (told["id"], told["root_id"], told["parent_id"], told["retries"]) == (id, root, parent, 0)
    assert (told["priority"], told["shadow"], told["routing_key"]) == (3, "shade", "celery")
    assert (told["headers"]["tenant"], told["headers"]["nested"]) == ("acme", {"a": [1]})
    assert told["origin"] == get(first)["origin"]
    assert told["fence"] > get(first)["fence"]
    assert (told["lost"], told["holds"]) == (False, ["canvas:{tag}"])


def test_the_ids_of_a_chain_are_kept_over_parking(crew: Crew, tag: str) -> None:
    """Each link has the root of the chain, and the one before it as its parent."""
    crew.hold(tag)
    blocker = crew["tell"].delay(0, tag)
    crew.begun(tag)
    links = chain(crew["tell"].si(1, tag), crew["tell"].si(2, tag)).apply_async()
    crew.parked(1)
    crew.let_go(tag)
    get(blocker)
    last, first = get(links), get(links.parent)

    assert first["root_id"] == first["id"] == links.parent.id
    assert (last["root_id"], last["parent_id"]) == (first["id"], first["id"])


def test_stamps_are_kept_over_parking(crew: Crew, tag: str) -> None:
    """And so are the names of those that a call has."""

    class Stamps(StampingVisitor):
        def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
            return {"by": "accounting", "stamped_headers": ["by"]}

    crew.hold(tag)
    blocker = crew["tell"].delay(0, tag)
    crew.begun(tag)
    calls = [crew["tell"].si(1, name) for name in (tag, f"{tag}:free")]
    for call in calls:
        call.stamp(Stamps())
    stamped, free = [call.apply_async() for call in calls]
    crew.parked(1)
    crew.let_go(tag)
    get(blocker)

    assert get(stamped)["stamps"] == get(free)["stamps"] == {"by": "accounting"}
    assert get(stamped)["stamped_headers"] == get(free)["stamped_headers"] == ["by"]


def test_a_parked_task_comes_back_to_the_queue_it_came_from(crew: Crew, tag: str) -> None:
    """Whether the app routes it there, or the call says so."""
    crew.hold(tag)
    blocker = crew["tell"].delay(0, tag)
    crew.begun(tag)
    routed = crew["routed"].delay(1, tag)
    chosen = crew["tell"].apply_async((2, tag), queue=OTHER_QUEUE)
    against = crew["routed"].apply_async((3, tag), queue="celery")
    crew.parked(3)
    crew.let_go(tag)
    get(blocker)

    assert [get(result)["routing_key"] for result in (routed, chosen, against)] == [OTHER_QUEUE, OTHER_QUEUE, "celery"]


def test_what_cannot_be_parked_is_not_lost_and_not_changed(crew: Crew, tag: str) -> None:
    """What JSON would change, and what is too large, the broker keeps; it comes again, without using up a retry."""
    values = [{1, 2}, (1, (2, 3)), {1: "a"}, "x" * 1_100_000]
    with ExitStack() as held:
        for number in range(5):
            held.enter_context(Lock(crew.app.redis, f"canvas:{tag}:{number}"))
        results = [crew["pickled"].delay(value, f"{tag}:{number}") for number, value in enumerate(values)]
        results += [crew["pickled_by_call"].apply_async(((1, {2: 3}), f"{tag}:4"), serializer="pickle")]
        for result in results:
            ended(result, "RETRY")

    assert [get(result) for result in results] == [*map(repr, values), "(1, {2: 3})"]


def test_what_was_pickled_and_json_carries_too_is_parked(crew: Crew, tag: str) -> None:
    """It comes back as it was."""
    crew.hold(tag)
    blocker = crew["locked"].delay(0, tag)
    crew.begun(tag)
    values = [[1, {"a": None}], Decimal("1.50"), datetime(2026, 1, 2, tzinfo=UTC), b"\0\xff"]
    results = [crew["pickled"].delay(value, tag) for value in values]
    crew.parked(len(values))
    crew.let_go(tag)

    assert get(blocker) == 0
    assert [get(result) for result in results] == [repr(value) for value in values]


# Feedback, and lines that are full


def test_a_task_that_is_told_to_wait_pauses_its_key_for_all(crew: Crew, tag: str) -> None:
    """It comes again without using up a retry; those after it wait with it."""
    first = crew["told_to_wait"].delay(1, tag)
    crew.begun(tag)
    crew.parked(1)
    others = [crew["told_to_wait"].delay(number, tag) for number in (2, 3)]
    values = [get(result) for result in (first, *others)]
    told, *later = [float(at) / 1e9 for at in crew.notes.lrange(f"runs:{tag}", 0, -1)]

    assert [value[:2] for value in values] == [[1, 0], [2, 0], [3, 0]]
    assert crew.runs(tag) == 4
    assert min(later) - told >= 0.45


def test_a_task_that_is_told_to_wait_without_a_rate_comes_again_alone(crew: Crew, tag: str) -> None:
    """And so it does in a chord, and after it was parked."""
    crew.hold(tag)
    blocker = crew["locked"].delay(0, tag)
    crew.begun(tag)
    crew.notes.delete(f"runs:{tag}")
    whole = chord([crew["told_without_rate"].s(1, tag), crew["total"].s([2])], crew["flat"].s()).delay()
    crew.parked(1)
    crew.let_go(tag)

    assert get(blocker) == 0
    assert get(whole) == [[1, 0], 2]


def test_what_a_call_has_cost_replaces_what_was_charged(crew: Crew, tag: str) -> None:
    """Ten a day: nine are charged, one was used; so nine more may come, and then none."""
    assert get(crew["costly"].delay(9, tag, 1)) == 9
    assert get(crew["costly"].delay(9, tag, 9)) == 9
    third = crew["costly"].delay(9, tag, 9)
    crew.parked(1)
    third.revoke()

    assert isinstance(failed(third), TaskRevokedError)
    assert crew.runs(tag) == 2


@pytest.mark.parametrize(
    ("task", "expected"),
    [("full_reject", [4, "full", "full"]), ("full_oldest", [None, None, 8]), ("full_newest", [4, None, None])],
)
def test_a_call_for_which_the_line_is_full_ends_as_its_policy_says(
    crew: Crew, tag: str, task: str, expected: list[Any]
) -> None:
    """Also one that is turned away much later; and what failed can be read."""
    crew.hold(tag)
    first = crew[task].delay(1, tag)
    crew.begun(tag)
    results = []
    for number in (2, 3, 4):
        results.append(crew[task].delay(number, tag))
        if number == 2:
            crew.parked(1)
        elif task == "full_oldest":
            assert get(results[-2]) is None
        else:
            failed_or_value(results[-1])
    crew.let_go(tag)
    values = [failed_or_value(result) for result in results]

    assert get(first) == 2
    assert ["full" if isinstance(value, TooManyParked) else value for value in values] == expected
    for value in values:
        if isinstance(value, TooManyParked):
            assert (value.task, value.most) == (task, 1)
            assert tag in value.gate


def test_a_call_that_raises_for_its_caller_names_the_other_one(crew: Crew, tag: str) -> None:
    """Where it is sent; a dropped one has the result of the other."""
    crew.hold(tag)
    first = crew["raise_end"].delay(1, tag)
    with pytest.raises(DuplicateTask) as raised:
        crew["raise_end"].delay(1, tag)
    dropped = crew["drop_end"].delay(1, tag)
    assert crew["drop_end"].delay(1, tag).id == dropped.id
    crew.begun(tag, 2)
    crew.let_go(tag)

    assert raised.value.other == first.id
    assert (get(first), get(dropped)) == (2, 2)


def test_the_failure_of_one_does_not_fail_those_that_joined_it(crew: Crew, tag: str) -> None:
    """The next one runs, and the others have its result."""
    crew.hold(tag)
    results = [crew["failing_joined"].delay(1, tag)]
    crew.begun(tag)
    results += [crew["failing_joined"].delay(1, tag) for _ in range(4)]
    crew.parked(4)
    crew.let_go(tag)

    assert [str(failed_or_value(result)) for result in results] == ["the first one fails", "7", "7", "7", "7"]
    assert crew.runs(tag) == 2


def test_calls_that_pause_run_once_with_the_newest_arguments(crew: Crew, tag: str) -> None:
    """Those before it end with None."""
    results = [crew["paused"].delay(number, tag) for number in range(5)]
    values = [get(result) for result in results]

    assert values.count(None) == 4
    assert crew.runs(tag) == 1


# Where it was called


def test_a_task_runs_where_it_is_called_and_waits_for_its_gates_there(crew: Crew, tag: str) -> None:
    """Directly, by apply(), or in an eager app; and gives back what it held."""
    assert crew["locked"](1, tag) == 2
    assert crew["locked"].apply((2, tag)).get() == 4
    assert crew["tell"].apply((3, tag)).get()["holds"] == ["canvas:{tag}"]
    assert crew["retried"].apply((4, tag)).get() == 8
    assert crew["everything"](number=5, tag=tag) == 10
    crew.app.conf.task_always_eager = True
    try:
        assert crew["locked"].delay(6, tag).get() == 12
        assert chain(crew["locked"].s(7, tag), crew["join"].s(tag)).delay().get() == 28
        assert chord([crew["locked"].s(1, tag), crew["join_end"].s(1, tag)], crew["total"].s()).delay().get() == 4
        assert crew["drop_end"].delay(8, tag).get() == 16
    finally:
        crew.app.conf.task_always_eager = False
    with pytest.raises(LookupError):
        _ = crew["locked"].admission


def test_a_task_may_call_others_and_itself_as_functions(crew: Crew, tag: str) -> None:
    """In a worker, too, where the inner call asks its own gates, and the outer one goes on."""
    assert get(crew["returns"].delay(3, tag)) == 6
    assert get(crew["recursive"].delay(3, tag)) == 6
    assert crew["recursive"](3, tag) == 6
    assert get(crew["fibonacci"].delay(6, f"{tag}:memo")) == 8
    assert crew.runs(f"{tag}:memo") == 7


# Ways to declare, and odd arguments


@pytest.mark.parametrize("task", ["by_base", "by_class", "annotated"])
def test_tasks_made_in_other_ways_wait_for_their_gates(crew: Crew, tag: str, task: str) -> None:
    """By a base class, as a class, by the app's annotations."""
    results = [crew[task].delay(number, tag) for number in range(5)]

    assert [get(result) for result in results] == [0, 2, 4, 6, 8]
    assert crew.most(tag) == 1


def test_hooks_of_an_own_base_run_once_for_a_task_that_was_parked(crew: Crew, tag: str) -> None:
    """But for before_start, which runs for each delivery."""
    crew.hold(tag)
    blocker = crew["locked"].delay(0, tag)
    crew.begun(tag)
    result = crew["flaky"].delay(0, tag)
    crew.parked(1)
    crew.let_go(tag)

    assert (get(blocker), get(result)) == (0, 0)
    eventually(lambda: "after_return SUCCESS" in crew.notes.lrange(f"hooks:{tag}", 0, -1), "it returns", PATIENCE_S)
    assert crew.notes.lrange(f"hooks:{tag}", 0, -1) == ["before_start"] * 2 + ["on_success", "after_return SUCCESS"]


def test_a_model_is_parked_as_what_it_was_sent_as(crew: Crew, tag: str) -> None:
    """And a template sees the model, in the worker and where it is called."""
    order = Order(number=2, tag=tag, of=datetime(2026, 1, 2, tzinfo=UTC))
    crew.hold(tag)
    blocker = crew["locked"].delay(0, tag)
    crew.begun(tag)
    parked = [crew["modelled"].delay(order), crew["modelled"].delay(order=order.model_dump(mode="json"))]
    crew.parked(2)
    crew.let_go(tag)

    assert get(blocker) == 0
    expected = order.model_copy(update={"number": 4}).model_dump(mode="json")
    assert [Order(**get(result)).model_dump(mode="json") for result in parked] == [expected] * 2
    assert crew["modelled"](order)["number"] == 4
    assert crew["modelled"].apply((order,)).get()["number"] == 4


def test_any_signature_and_any_arguments_wait_and_run(crew: Crew, tag: str) -> None:
    """Keywords only, stars, defaults; braces, newlines, dates and other scripts in what names a lock."""
    values = ["{x}", "a\nb\r\n\0", "\u96ea \U0001f40d", "", "%s %(a)s", None, 1.5, [1, {"{": "}"}], "y" * 900]
    crew.hold(tag)
    blocker = crew["locked"].delay(0, tag)
    crew.begun(tag)
    several = [crew["keyword_only"].delay(tag=tag), crew["keyword_only"].delay(tag=tag, number=5)]
    crew.parked(2)
    several += [crew["starred"].delay(1, 2, tag=f"{tag}:other", more=1) for _ in range(3)]
    odd = [crew["braces"].delay(value, f"{tag}:odd") for value in values for _ in range(2)]
    crew.let_go(tag)

    assert get(blocker) == 0
    assert [get(result) for result in several] == [8, 10, 3, 3, 3]
    assert [get(result) for result in odd] == [value for value in values for _ in range(2)]


def test_a_task_that_was_parked_runs_again_when_its_process_dies(crew: Crew, tag: str) -> None:
    """Delivered again, or retried: what comes is not taken for a message that came twice."""
    with ExitStack() as held:
        for task in ("dying", "dying_retried"):
            held.enter_context(Lock(crew.app.redis, f"canvas:{tag}:{task}"))
        results = [crew[task].delay(2, f"{tag}:{task}") for task in ("dying", "dying_retried")]
        crew.parked(2)

    assert [get(result) for result in results] == [2, 2]


def test_two_apps_that_share_a_lock_lose_no_task_of_each_other(crew: Crew, tag: str) -> None:
    """Each has its own parked tasks; whoever serves its own leaves those of the other in their line."""
    gates = crew["locked"].gates.of((1, tag), {})
    lots = [ParkingLot(crew.app.redis, f"{tag}-{number}") for number in range(2)]
    with Lock(crew.app.redis, f"canvas:{tag}"):
        for lot in lots:
            assert isinstance(lot.admit(Attempt(f"{tag}-{lot.keys.namespace}", 0), gates, record=b"{}"), Parked)
    for _ in range(2):
        for lot in lots:
            for line, definition in lot.lines():
                lot.serve(line, Served.read(definition))
            for one in lot.waiting():
                if one.woken:
                    running = lot.admit(Attempt(one.id, 0, 1), gates, record=b"{}")
                    assert isinstance(running, Running)
                    lot.end(running)

    assert [lot.waiting() for lot in lots] == [[], []]
