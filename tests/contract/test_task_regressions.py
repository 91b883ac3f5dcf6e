"""What a review of coordinated tasks has found: one test for each way in which a task was lost, ran twice or too early.

Here a worker is Celery's own tracer in this process, its broker a queue that nobody else reads, and the pump is asked
for one round. So each test decides in which order messages come, which is what nearly all of these were about.
"""

import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from threading import Event, Thread
from types import SimpleNamespace
from unittest.mock import patch
from uuid import uuid4

import pytest
from amqp.exceptions import MessageNacked
from celery import Celery
from celery.app.trace import build_tracer
from celery.signals import task_postrun
from celery.worker import state as worker_state
from kombu import Connection
from local_nodes import eventually
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from petiole import Lock, RateLimit, RateLimiter, Semaphore, memoized_task
from petiole.cachelib import Cache, Settings, connect
from petiole.cachelib.embedded import find_program, free_port
from petiole.cachelib.guarded import GuardedProcess
from petiole.cachelib.keys import lease
from petiole.coordination import guarded, parked_messages, passing
from petiole.coordination.coordinated import CoordinatedTask, coordinated_task
from petiole.coordination.errors import DuplicateTask, LockLost, LockReentered, RateLimited, TooManyParked
from petiole.coordination.gates import Concurrency, Rate, Unique
from petiole.coordination.hold import Busy, Hold
from petiole.coordination.parking import Attempt, Parked, ParkingLot, Refused, Running
from petiole.tasks import pump as pump_module
from petiole.tasks.guard import Guard
from petiole.tasks.pump import Pump
from tests.contract.test_parking import Yard, ids_of


class Desk:
    """An app, the worker that runs its tasks one by one when it is told to, and the pump of its namespace."""

    def __init__(self, url, redis, name, **settings):
        self.redis, self.name = redis, name
        self.lot = ParkingLot(redis, name)
        self.app = self.app_at(url, **settings)
        self.pump = Pump(self.app, self.lot)

    def app_at(self, url, **settings):
        app = Celery(self.name, broker=url, backend="cache+memory://", set_as_current=False)
        app.conf.update(task_default_queue=self.name, **settings)
        return app

    def task(self, function, app=None, **options):
        """A coordinated task of this test's own."""
        function.__name__ = "work" if function.__name__ == "<lambda>" else function.__name__
        name = f"{self.name}.{function.__name__}"
        return coordinated_task(app=app or self.app, redis=self.redis, name=name, **options)(function)

    def lock(self, name="a"):
        return Lock(self.redis, f"{self.name}:{name}")

    def messages(self):
        """What lies in the broker, what was sent before what was woken; it is taken out."""
        return [
            message for queue in (self.name, parked_messages.woken_queue(self.name)) for message in self._all(queue)
        ]

    def _all(self, queue):
        with (
            self.app.connection_for_read() as connection,
            connection.SimpleQueue(queue, accept=["json", "pickle"]) as taken,
        ):
            while True:
                try:
                    message = taken.get(block=False)
                except taken.Empty:
                    return
                message.ack()
                yield message

    def deliver(self, message, app=None, *, guarded_here=True, redelivered=False):
        """Run what was sent, as a worker does; what became of it."""
        app = app or self.app
        arguments, keywords, _ = message.payload
        task = app.tasks[message.headers["task"]]
        if guarded_here and hasattr(task, "lot"):
            guarded.guard([(task.name, task.lot.redis.address)])
        request = {
            **message.headers, "args": arguments, "kwargs": keywords, "hostname": "here",
            "delivery_info": {"exchange": "", "routing_key": self.name, "redelivered": redelivered},
        }  # fmt: skip
        id = message.headers["id"]
        if not redelivered:
            app.backend.forget(id)
        build_tracer(task.name, task, app=app, hostname="here")(id, arguments, keywords, request)
        result = app.AsyncResult(id)
        return result.state, result.result

    def send(self, task, *arguments, id=None, **options):
        """Send a call; the message."""
        task.apply_async(arguments, task_id=id or uuid4().hex, **options)
        (message,) = self.messages()
        return message

    def run(self, task, *arguments, id=None, **options):
        """Send a call, and have it delivered at once."""
        return self.deliver(self.send(task, *arguments, id=id, **options))

    def pumped(self, expected=1):
        """What the pump sends, when its time has come."""
        found = []

        def sent():
            self.pump.once()
            found.extend(self.messages())
            return len(found) >= expected

        eventually(sent, f"{expected} are sent")
        return found

    def come(self, expected=1, **options):
        """Deliver what the pump sends."""
        return [self.deliver(message, **options) for message in self.pumped(expected)]

    def an_hour_later(self):
        """What was sent, and has not come, is due once more."""
        for id in [one.id for one in self.lot.waiting()]:
            self.redis.coordination.zadd(self.lot.keys.due, {f"={id}": 1}, xx=True)

    def parked(self):
        return self.lot.counts()["parked"]

    def close(self):
        with self.app.connection_for_write() as connection, connection.channel() as channel:
            for queue in (self.name, self.name + parked_messages.WOKEN):
                channel.client.delete(queue, f"_kombu.binding.{queue}")
        self.app.close()


class RequestOf(SimpleNamespace):
    """What a guard sees of the request of a running task."""

    __hash__ = object.__hash__  # they are kept in a set


def noting(ran):
    """The body of a task that notes what it is given."""

    def work(number):
        ran.append(number)

    return work


def forget_what_is_left(redis, name):
    keys = list(redis.coordination.scan_iter(f"petiole:*{name}*", count=10_000))
    if keys:
        redis.coordination.unlink(*keys)


@pytest.fixture(autouse=True)
def _nothing_is_guarded_afterwards(monkeypatch):
    monkeypatch.setattr(guarded, "_guarded", set())
    monkeypatch.setattr(passing, "_refused_lately", set())
    monkeypatch.setenv("PETIOLE_GUARDED", "[]")


@pytest.fixture
def desk(redis, redis_server, name):
    desk = Desk(redis_server.url, redis, name)
    yield desk
    desk.close()
    forget_what_is_left(redis, name)


@pytest.fixture
def yard(redis, name):
    yard = Yard(redis, name)
    yield yard
    yard.ears.disconnect()
    forget_what_is_left(redis, name)


# What was woken, and is long on its way


def test_who_comes_when_its_lease_is_over_runs_with_the_permit_that_is_kept_for_another_on_its_way(yard):
    """F1: behind a backlog that is longer than a lease, none ever found its permit."""
    gates = yard.gates(lock="a")
    first = yard.run("a", gates, lease_ms=200)
    for id in "bcd":
        yard.park(id, gates, lease_ms=200)
    yard.lot.end(first)
    (for_b,) = yard.pumped()
    (for_c,) = yard.patiently()
    assert ids_of([for_b, for_c]) == ["b", "c"], "c was woken because b did not come"

    running = yard.come(for_b, gates)
    assert isinstance(running, Running)
    assert isinstance(yard.come(for_c, gates), Parked), "there is one permit"
    yard.lot.end(running)
    assert yard.drain(lambda _: gates) == ["c", "d"]


@pytest.mark.parametrize("holder", ["a web process", "a task"])
def test_a_newcomer_takes_nothing_that_is_held(yard, holder):
    """F13."""
    gates = yard.gates(lock="a")
    held = yard.lock("a").try_acquire() if holder == "a web process" else yard.run("held", gates)
    for id in ("one", "two"):
        assert isinstance(yard.ask(id, gates, record=None), Refused)
    assert held.release() if holder == "a web process" else yard.lot.end(held)


@pytest.mark.parametrize("permits", [1, 2])
def test_who_has_come_back_takes_nothing_from_one_that_runs(yard, permits):
    """F13: only from one that is on its way."""
    gates = yard.gates(concurrency=permits)
    others = [yard.run(f"other {number}", gates) for number in range(permits - 1)]
    first = yard.run("a", gates, lease_ms=200)
    for id in "bc":
        yard.park(id, gates, lease_ms=200)
    yard.lot.end(first)
    (for_b,) = yard.pumped()
    (for_c,) = yard.patiently()
    running = yard.come(for_c, gates)

    assert isinstance(running, Running)
    assert isinstance(yard.come(for_b, gates), Parked)
    for one in [running, *others]:
        assert yard.lot.end(one)
    assert yard.drain(lambda _: gates) == ["b"]


def test_a_task_that_waits_long_for_a_rate_gives_its_lock_back(yard):
    """F10: the lock was idle for an hour."""
    gates = yard.gates("k", "t", lock="a", rate=Rate("1/h", key="{tenant}", name=f"{yard.name}.r"))
    other = yard.gates("k", "t", lock="other", rate=Rate("1/h", key="{tenant}", name=f"{yard.name}.r"))
    held = yard.lock("a").try_acquire()
    yard.park("waits", gates)
    yard.lot.end(yard.run("uses it up", other))
    held.release()
    (message,) = yard.patiently()
    again = yard.come(message, gates)

    assert isinstance(again, Parked)
    assert again.by == gates[1]
    assert yard.is_free("a")


# Deploys


@pytest.mark.parametrize("becomes", ["plain", "without gates", "with another signature"])
def test_a_parked_call_of_a_task_that_has_lost_its_gates_runs_once(desk, redis_server, becomes):
    """F2: it was sent again each hour."""
    hold, ran = desk.lock().try_acquire(), []

    def work(number):
        ran.append(number)

    desk.run(desk.task(work, lock=f"{desk.name}:a"), 7)
    assert desk.parked() == 1
    newer = desk.app_at(redis_server.url)
    if becomes == "plain":
        newer.task(name=f"{desk.name}.work", shared=False)(work)
    elif becomes == "without gates":
        desk.task(work, app=newer)
    else:

        def work(other, more):
            ran.append(other)

        desk.task(work, app=newer, lock=f"{desk.name}:a:{{more}}")
    hold.release()
    desk.pump = Pump(newer, desk.lot)
    outcomes = desk.come(app=newer)
    assert desk.parked() == (1 if becomes == "plain" else 0), "a plain task tells nobody; the pump finds out"
    for _ in range(3):
        desk.an_hour_later()
        desk.pump.once()
        outcomes += [desk.deliver(message, app=newer) for message in desk.messages()]

    assert [state for state, _ in outcomes] == ["FAILURE" if becomes == "with another signature" else "SUCCESS"]
    assert ran == ([] if becomes == "with another signature" else [7])
    assert desk.parked() == 0
    newer.close()


def test_a_pump_that_knows_the_task_without_gates_does_not_forget_what_a_new_worker_has_parked(desk, redis_server):
    """F26: a rolling deploy that adds gates."""
    older, ran = desk.app_at(redis_server.url), []

    def work(number):
        ran.append(number)

    older.task(name=f"{desk.name}.work", shared=False)(work)
    hold = desk.lock().try_acquire()
    desk.run(desk.task(work, lock=f"{desk.name}:a"), 7)
    hold.release()
    desk.pump = Pump(older, desk.lot)

    assert [state for state, _ in desk.come()] == ["SUCCESS"]
    assert ran == [7]
    assert desk.parked() == 0
    older.close()


# Messages


def test_a_woken_task_is_written_so_that_workers_accept_it(redis, redis_server, name):
    """F3: it was JSON."""
    accepted = {"accept_content": ["pickle"], "task_serializer": "pickle", "result_accept_content": ["json"]}
    desk = Desk(redis_server.url, redis, name, **accepted)
    try:
        hold, ran = desk.lock().try_acquire(), []
        desk.run(desk.task(noting(ran), lock=f"{name}:a"), 7)
        hold.release()
        (message,) = desk.pumped()
        assert message.content_type == "application/x-python-serialize"
        assert desk.deliver(message)[0] == "SUCCESS"
        assert ran == [7]
    finally:
        desk.close()


@pytest.mark.parametrize("id", ["report 7", "rate%5", "a\tb\n%20"])
def test_an_id_may_be_any_text(desk, id):
    """F4."""
    hold, ran = desk.lock().try_acquire(), []
    work = desk.task(noting(ran), lock=f"{desk.name}:a")
    desk.run(work, 7, id=id)
    hold.release()

    assert [state for state, _ in desk.come()] == ["SUCCESS"]
    assert ran == [7]
    assert desk.parked() == 0
    assert desk.lock().try_acquire().release()


def test_what_runs_under_an_id_with_a_space_is_renewed(desk):
    """F4: its lock was lost after one lease."""
    work = desk.task(lambda number: None, lock=f"{desk.name}:a", lease=2)
    running = desk.lot.admit(Attempt("report 7", 0), work.gates.of((7,), {}), record=None, lease_ms=2_000)
    run_key = desk.lot.keys.run(running.attempt.token)
    request = RequestOf(id="report 7", task=work, request_dict={}, worker_pid=None, args=(7,), kwargs={})
    guard = Guard(desk.app, [work.lot], processes=False)
    lowest_ms = 2_000

    def has_risen():
        nonlocal lowest_ms
        left_ms = desk.redis.coordination.pttl(run_key)
        assert left_ms > 0, "nobody has renewed it"
        lowest_ms, before_ms = min(lowest_ms, left_ms), lowest_ms
        return left_ms > before_ms

    worker_state.active_requests.add(request)
    guard.start()
    try:
        guard.accepted(request)
        eventually(has_risen, "it is renewed")
    finally:
        worker_state.active_requests.discard(request)
        guard.stop()
    desk.lot.end(running)


def test_what_was_hidden_of_the_arguments_stays_hidden(desk):
    """F23."""
    hold = desk.lock().try_acquire()
    work = desk.task(lambda secret: None, lock=f"{desk.name}:a")
    desk.run(work, "password=hunter2", argsrepr="('***',)", kwargsrepr="{}")
    hold.release()
    (message,) = desk.pumped()

    assert (message.headers["argsrepr"], message.headers["kwargsrepr"]) == ("('***',)", "{}")
    assert "hunter2" not in json.dumps(message.headers)
    desk.deliver(message)


@pytest.mark.parametrize("poison", [1, 2])
def test_what_the_broker_does_not_take_keeps_nobody_else_waiting(desk, monkeypatch, poison):
    """F20: two of them stopped all."""
    monkeypatch.setattr(pump_module, "_PAUSE_S", 0.01)
    ran = []
    work = desk.task(noting(ran), concurrency=9)
    gates, real = work.gates.of((0,), {}), parked_messages.send
    holds = [desk.lot.admit(Attempt(f"h{number}", 0), gates, record=None) for number in range(9)]
    for number in range(poison + 3):
        desk.run(work, number)

    def send(app, producer, woken, **options):
        if json.loads(woken.record)["args"][0] < poison:
            raise MessageNacked("the queue is full")
        real(app, producer, woken, **options)

    monkeypatch.setattr(parked_messages, "send", send)
    for hold in holds:
        desk.lot.end(hold)
    desk.come(3)
    assert ran == [*range(poison, poison + 3)]

    monkeypatch.setattr(parked_messages, "send", real)
    desk.come(poison)
    assert sorted(ran) == [*range(poison + 3)]


# What its own gate holds


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_task_that_takes_what_its_gate_holds_is_told_where_the_hold_is(desk, reentrant):
    """And not to make it reentrant, which would not help. What it holds beside that is its own affair."""

    def work(self):
        with Lock(desk.redis, f"{desk.name}:mine") as mine, pytest.raises(LockReentered, match="make it reentrant"):
            Lock(desk.redis, f"{desk.name}:mine").acquire(60)
        assert not mine.lost
        Lock(desk.redis, f"{desk.name}:a", reentrant=reentrant).acquire(60)

    task = desk.task(work, bind=True, lock=f"{desk.name}:a")
    state, error = desk.run(task)
    assert state == "FAILURE"
    rebuilt = type(error)(*error.args)
    for one in (error, rebuilt):
        assert isinstance(one, LockReentered)
        assert one.by_task
        assert f"lock '{desk.name}:a' is held by the task that runs here" in str(one)
        assert "self.admission.hold" in str(one)
        assert "reentrant" not in str(one)
    with pytest.raises(LockReentered, match=r"self\.admission\.hold"):
        task()


# Told to come later


@pytest.mark.parametrize("options", [{}, {"dont_autoretry_for": (KeyError,)}], ids=["any", "but some"])
@pytest.mark.parametrize("made", ["by the decorator", "by its base"])
def test_rate_limited_uses_up_no_retry_of_a_task_that_retries_by_itself(desk, made, options):
    """F5, F29."""
    told = []

    def work(self):
        told.append(self.request.retries)
        if len(told) == 1:
            raise RateLimited(0.05)

    options = {"bind": True, "autoretry_for": (Exception,), "max_retries": 2, **options}
    if made == "by the decorator":
        task = desk.task(work, rate="1000/s", **options)
    else:
        options |= {"base": CoordinatedTask, "gate_redis": desk.redis, "gate_rate": "1000/s"}
        task = desk.app.task(name=f"{desk.name}.work", shared=False, **options)(work)
    desk.run(task)
    assert desk.parked() == 1
    assert [state for state, _ in desk.come()] == ["SUCCESS"]
    assert told == [0, 0]


def test_rate_limited_parks_the_call_also_where_no_more_may_wait(desk):
    """F8: it was admitted; the newcomer is turned away."""
    told, outcomes = [], []

    def work(self, number):
        told.append(number)
        if told == [1]:
            self.admission.block(2, None)
            outcomes.append(desk.run(task, 2))
            outcomes.append(desk.run(task, 3))
            raise RateLimited(2)

    task = desk.task(work, bind=True, rate="1000/s", max_parked=1)
    assert desk.run(task, 1)[0] == "PENDING"
    assert outcomes[0][0] == "PENDING"
    assert outcomes[1][0] == "FAILURE"
    assert isinstance(outcomes[1][1], TooManyParked)
    assert desk.parked() == 2
    assert [state for state, _ in desk.come(2)] == ["SUCCESS"] * 2
    assert sorted(told) == [1, 1, 2]


@pytest.mark.parametrize(
    ("rate", "known"),
    [("{tenant}: 1000/s", "the keys of its rates are '{tenant}'"), (None, "it has no rate")],
    ids=["another key", "no rate"],
)
def test_rate_limited_with_a_key_that_no_rate_has_says_which_there_are(desk, caplog, rate, known):
    told = []

    def work(tenant):
        told.append(tenant)
        if len(told) == 1:
            raise RateLimited(0.01, key="tenant")

    task = desk.task(work, rate=rate, lock=f"{desk.name}:a")
    desk.run(task, "acme")
    (said,) = [one.getMessage() for one in caplog.records if "pauses nothing" in one.getMessage()]
    assert said == f"{task.name}: RateLimited(key='tenant') pauses nothing: {known}"


@pytest.mark.parametrize("on_conflict", ["raise", "drop"])
def test_a_unique_call_that_comes_later_is_still_the_only_one(desk, on_conflict):
    """F9: it failed, because another one was sent meanwhile."""
    told = []

    def work(self, key):
        told.append(self.request.id)
        if len(told) == 1:
            raise RateLimited(0.05)

    task = desk.task(work, bind=True, rate="1000/s", unique=Unique("{key}", until="end", on_conflict=on_conflict))
    desk.run(task, "x", id="first")
    if on_conflict == "raise":
        with pytest.raises(DuplicateTask):
            task.delay("x")
    else:
        assert task.delay("x").id == "first"
    assert desk.messages() == []
    assert [state for state, _ in desk.come()] == ["SUCCESS"]
    assert told == ["first", "first"]
    assert desk.run(task, "x")[0] == "SUCCESS", "it has ended: another one may come"


def test_rate_limited_while_redis_does_not_answer_is_sent_again_by_the_broker(desk, monkeypatch):
    """F15: it failed."""
    told, real = [], ParkingLot.admit

    def away(*arguments, **options):
        raise RedisTimeoutError("no answer")

    def work():
        told.append(1)
        if len(told) == 1:
            monkeypatch.setattr(ParkingLot, "admit", away)
            raise RateLimited(0.01)

    task = desk.task(work, rate="1000/s")
    assert desk.run(task)[0] == "RETRY"
    monkeypatch.setattr(ParkingLot, "admit", real)
    (message,) = desk.messages()
    assert message.headers["retries"] == 0
    eventually(lambda: desk.redis.coordination.exists(*task_blocks(task)) == 0, "the pause is over")
    assert desk.deliver(message)[0] == "SUCCESS"


def task_blocks(task):
    return [gate.second for gate in task.gates.of((), {})]


# The newest


def test_a_retry_of_an_older_call_is_not_paused_and_drops_nobody(desk):
    """F6: debounce."""
    ran = []

    def work(self, text):
        ran.append(text)
        if ran == ["old"]:
            raise self.retry(countdown=0)

    task = desk.task(work, bind=True, debounce=0.05, max_retries=2)
    desk.run(task, "old")
    (message,) = desk.pumped()
    assert desk.deliver(message)[0] == "RETRY"
    (retry,) = desk.messages()
    desk.run(task, "NEW")
    assert desk.deliver(retry)[0] == "SUCCESS"
    assert desk.come() == [("SUCCESS", None)]
    assert ran == ["old", "old", "NEW"]


def test_a_retry_of_an_older_call_does_not_take_the_place_of_the_newest_that_waits(desk):
    """F7: A retries, B runs, C waits."""
    ran, retries = [], []

    def work(self, text):
        ran.append(text)
        if ran == ["A"]:
            raise self.retry(countdown=0)
        if text == "B":
            desk.run(task, "C")
            retries.append(desk.deliver(retry_of_a))

    task = desk.task(work, bind=True, unique=Unique("all", on_conflict="replace"), max_retries=2)
    assert desk.run(task, "A")[0] == "RETRY"
    (retry_of_a,) = desk.messages()
    assert desk.run(task, "B")[0] == "SUCCESS"
    assert retries == [("SUCCESS", None)], "the older one ends"
    assert desk.come() == [("SUCCESS", None)]
    assert ran == ["A", "B", "C"]
    assert desk.parked() == 0


def test_a_full_line_loses_no_retry(yard):
    """F13, second half: where the oldest is dropped for a newcomer, a retry has its place."""
    gates = yard.gates(lock="a", max_parked=1, when_full="drop_oldest")
    running = yard.run("a", gates)
    yard.park("b", gates)

    outcome = yard.lot.admit(Attempt("retried", 1, 0, "task", again=True), gates, record=b"{}")
    assert isinstance(outcome, Parked)
    yard.lot.end(running)
    assert yard.drain(lambda _: gates) == ["b", "retried"]


@pytest.mark.parametrize("until", ["start", "end"])
def test_the_newest_call_takes_the_claim_of_one_that_waits(desk, until):
    """F27: the script failed, and the oldest ran."""
    hold, ran = desk.lock().try_acquire(), []
    unique = Unique("{key}", until=until, on_conflict="replace")
    task = desk.task(lambda key, text: ran.append(text), lock=f"{desk.name}:a", unique=unique)
    desk.run(task, "k", "oldest")
    desk.run(task, "k", "NEWEST")
    hold.release()
    while desk.parked():
        desk.come()
    assert ran == ["NEWEST"]


@pytest.mark.parametrize("until", ["start", "end"])
def test_a_retry_of_an_older_call_does_not_take_the_claim_back(desk, until):
    """F27."""
    ran = []

    def work(self, key, text):
        ran.append(text)
        if ran == ["old"]:
            desk_messages.append(desk.send(task, key, "NEW"))
            raise self.retry(countdown=0)

    desk_messages = []
    unique = Unique("{key}", until=until, on_conflict="replace")
    task = desk.task(work, bind=True, unique=unique, max_retries=3)
    assert desk.run(task, "k", "old")[0] == "RETRY"
    (retry,) = desk.messages()
    assert [desk.deliver(message)[0] for message in [*desk_messages, retry]] == ["SUCCESS"] * 2
    assert "NEW" in ran


def test_a_script_that_fails_is_no_server_that_is_away(desk, monkeypatch):
    """F27: the task was sent again for ever."""

    def wrong(*arguments, **options):
        raise ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")

    task = desk.task(lambda: None, lock=f"{desk.name}:a")
    message = desk.send(task)
    monkeypatch.setattr(ParkingLot, "admit", wrong)
    state, error = desk.deliver(message)
    assert state == "FAILURE"
    assert "WRONGTYPE" in str(error)
    assert desk.messages() == []


@pytest.mark.parametrize("due", ["eta", "countdown"])
@pytest.mark.parametrize("until", ["start", "end"])
def test_a_claim_lasts_until_the_call_is_due(desk, due, until):
    """F28: an hour."""
    task = desk.task(lambda key: None, unique=Unique("{key}", until=until, on_conflict="drop"))
    five_hours = {"eta": datetime.now(UTC) + timedelta(hours=5)} if due == "eta" else {"countdown": 5 * 3_600}
    desk.send(task, "k", **five_hours)
    (claim,) = [gate.state for gate in task.gates.of(("k",), {}) if gate.kind == "c"]
    assert desk.redis.coordination.ttl(claim) > 5 * 3_600


# Servers that do not answer


@pytest.mark.parametrize("first", ["woken", "postponed"])
def test_a_call_that_was_parked_and_postponed_because_the_answer_was_lost_runs_once(desk, monkeypatch, first):
    """F16: twice."""
    hold, ran, real = desk.lock().try_acquire(), [], ParkingLot.admit

    def answer_is_lost(self, *arguments, record, **options):
        outcome = real(self, *arguments, record=record, **options)
        if record is not None:
            raise RedisTimeoutError(f"the answer was {outcome!r}")
        return outcome

    task = desk.task(noting(ran), lock=f"{desk.name}:a")
    message = desk.send(task, 7)
    monkeypatch.setattr(ParkingLot, "admit", answer_is_lost)
    assert desk.deliver(message)[0] == "RETRY"
    monkeypatch.setattr(ParkingLot, "admit", real)
    postponed = desk.messages()
    assert len(postponed) == desk.parked() == 1
    hold.release()
    woken = desk.pumped()
    for message in [*woken, *postponed] if first == "woken" else [*postponed, *woken]:
        desk.deliver(message)

    assert ran == [7]
    assert desk.parked() == 0
    assert desk.lock().try_acquire().release()


def test_a_task_that_comes_while_broker_and_gates_are_away_ends_well(name, tmp_path, monkeypatch):
    """F14: it failed within a second."""
    monkeypatch.setattr(passing, "_PAUSE_S", 0.05)
    port, ran = free_port(), []
    url = f"redis://127.0.0.1:{port}/0"

    def server():
        return GuardedProcess(
            [find_program(), "--port", str(port), "--save", "", "--bind", "127.0.0.1"], folder=tmp_path
        )

    def answers():
        try:
            with Connection(url) as connection:
                connection.ensure_connection(max_retries=1)
        except OSError:
            return False
        return True

    running = server()
    try:
        eventually(answers, "the server answers")
        with connect(settings=Settings(url=url)) as redis:
            desk = Desk(url, redis, name)
            task = desk.task(noting(ran), lock=f"{name}:a")
            message, outcomes = desk.send(task, 7), []
            running.stop()
            worker = Thread(target=lambda: outcomes.append(desk.deliver(message)))
            worker.start()
            worker.join(1.5)
            assert worker.is_alive() or outcomes[0][0] == "RETRY"
            running = server()
            worker.join(60)
            assert [state for state, _ in outcomes] == ["RETRY"]
            (again,) = desk.messages()
            assert desk.deliver(again)[0] == "SUCCESS"
            assert ran == [7]
            desk.app.close()
    finally:
        running.stop()


# Results of others


def test_an_id_that_is_used_again_gives_nobody_the_result_of_the_earlier_call(desk):
    """F17: Tuesday's follower was given the report of Monday."""
    task = desk.task(lambda key: f"report of {key}", unique=Unique("{key}", until="end"))
    assert desk.run(task, "monday", id="nightly") == ("SUCCESS", "report of monday")
    desk.send(task, "tuesday", id="nightly")
    follower = desk.send(task, "tuesday")
    assert follower.headers["petiole"]["follows"] == "nightly"
    assert desk.deliver(follower) != ("SUCCESS", "report of monday")


def test_a_verdict_that_comes_to_a_worker_that_parks_nothing_is_heeded(desk):
    """F19: the task failed, and was forgotten."""
    task = desk.task(lambda key: f"report of {key}", unique=Unique("{key}"))
    gates = task.gates.of(("x",), {})
    leader = desk.lot.admit(Attempt("leads", 0), gates, record=None)
    desk.run(task, "x")
    assert desk.parked() == 1
    desk.lot.end(leader, verdict="jnobody knows")
    guarded._guarded.clear()
    assert desk.come(guarded_here=False) == [("SUCCESS", "report of x")]
    assert desk.parked() == 0


def test_what_nobody_renews_for_it_a_task_renews_itself(desk):
    """F22: it was declared after its worker had begun, where others are guarded."""
    guarded.guard([(f"{desk.name}.other", desk.redis.address)])
    holds = []

    def work():
        lowest_s, seen = 2.0, desk.lock()

        def has_risen():
            nonlocal lowest_s
            ((left_s),) = [holder.lease_left for holder in seen.inspect().holders]
            before_s, lowest_s = lowest_s, min(lowest_s, left_s)
            return left_s > before_s

        eventually(has_risen, "it is renewed")
        holds.append(isinstance(desk.lock().try_acquire(), Busy))

    task = desk.task(work, lock=f"{desk.name}:a", lease=2)
    assert desk.deliver(desk.send(task), guarded_here=False)[0] == "SUCCESS"
    assert holds == [True]


@pytest.mark.parametrize("because", ["it is forgotten", "it cannot be kept"])
def test_those_that_wait_for_a_result_that_is_not_kept_are_woken_one_by_one(desk, because):
    """F25: all were woken each time: half the square of their number."""
    ran, numbers = [], count()
    cache = Cache(desk.redis, namespace=desk.name)

    @memoized_task(app=desk.app, cache=cache, name=f"{desk.name}.made", ttl=60, ignore_result=True)
    def made():
        ran.append(next(numbers))
        if len(ran) == 1:
            others = Thread(target=lambda: [desk.run(made) for _ in range(4)])  # in this one it asks for itself
            others.start()
            others.join()
        if because == "it is forgotten":
            made.invalidate()
        return object() if because == "it cannot be kept" else 7

    desk.run(made)
    assert desk.parked() == 4
    for left in range(4, 0, -1):
        (message,) = desk.pumped()
        desk.deliver(message)
        assert desk.parked() == left - 1
    assert len(ran) == 5


# What is sent before what it depends on has ended


def test_a_late_task_that_died_before_celery_kept_its_result_runs_again(desk):
    """Its gates had noted that it had ended: nothing was left to run it, or to send what follows."""
    ran = []
    task = desk.task(noting(ran), acks_late=True, lock=f"{desk.name}:a")
    message = desk.send(task, 1)
    with patch.object(ParkingLot, "over", lambda *_, **__: False):  # its process dies before
        desk.deliver(message)
    assert isinstance(desk.lock().try_acquire(), Hold), "what it held is given back"

    desk.deliver(message, redelivered=True)
    assert (ran, desk.parked()) == ([1], 1), "it may be alive"
    token = Attempt(message.headers["id"], 0).token
    assert desk.lot.crashed(token, desk.lot.running([token])[token])
    desk.lock().force_release()
    desk.come()
    assert ran == [1, 1]

    desk.deliver(message, redelivered=True)
    assert (ran, desk.parked()) == ([1, 1], 0), "and then it is known to have ended"


def test_a_delivery_that_waits_for_one_that_dies_before_its_result_is_kept_runs(desk):
    ran = []

    def work(number):
        ran.append(number)
        if len(ran) == 1:
            again = Thread(target=desk.deliver, args=(message,), kwargs={"redelivered": True})
            again.start()
            again.join()

    task = desk.task(work, acks_late=True, lock=f"{desk.name}:a")
    message = desk.send(task, 1)
    with patch.object(ParkingLot, "over", lambda *_, **__: False):  # its process dies before
        desk.deliver(message)
    assert (ran, desk.parked()) == ([1], 1)
    token = Attempt(message.headers["id"], 0).token
    assert desk.lot.crashed(token, desk.lot.running([token])[token])
    desk.come()
    assert (ran, desk.parked()) == ([1, 1], 0)


@pytest.mark.parametrize("until", ["start", "end"])
def test_a_call_that_waits_in_its_slot_claims_nothing_when_it_has_ended(desk, until):
    """In a worker that parks nothing of this task."""
    ran = []
    task = desk.task(noting(ran), unique=Unique("{number}", until=until, on_conflict="drop"))
    for _ in range(2):
        task.delay(1)  # which is not sent where the claim of another is there
        (message,) = desk.messages()
        desk.deliver(message, guarded_here=False)
    assert ran == [1, 1]


def test_a_task_that_has_given_back_what_it_held_has_not_lost_it(desk):
    """While Celery keeps its result, the guard looks after it still."""
    task = desk.task(noting([]), lock=f"{desk.name}:a", lease=30)
    running = desk.lot.admit(Attempt("A", 0), task.gates.of((1,), {}), record=None)
    request = RequestOf(id="A", task=task, request_dict={}, worker_pid=None, args=(1,), kwargs={})
    guard = Guard(desk.app, [task.lot], processes=False)
    worker_state.active_requests.add(request)
    try:
        for end in (lambda: None, lambda: desk.lot.end(running, over=False)):
            guard.accepted(request)
            end()
            for one in guard._running.values():
                one.due = 0.0
            guard._look()
        assert (guard.lost, desk.lot.renew(desk.lot.running(["A.0"]))) == (0, [])
    finally:
        worker_state.active_requests.discard(request)


def test_a_worker_says_once_that_what_it_runs_is_not_renewed_and_once_that_it_is(desk, caplog):
    caplog.set_level("INFO", logger="petiole.tasks.guard")
    task = desk.task(noting([]), lock=f"{desk.name}:a", lease=30)
    desk.lot.admit(Attempt("A", 0), task.gates.of((1,), {}), record=None)
    request = RequestOf(id="A", task=task, request_dict={}, worker_pid=None, args=(1,), kwargs={})
    guard = Guard(desk.app, [task.lot], processes=False)
    worker_state.active_requests.add(request)

    def look():
        guard.accepted(request)
        for one in guard._running.values():
            one.due = 0.0
        guard._look()

    try:
        with patch.object(ParkingLot, "running", side_effect=RedisTimeoutError("away")):
            look()
            look()
        look()
        look()
    finally:
        worker_state.active_requests.discard(request)
    said = [record.getMessage() for record in caplog.records]
    address = desk.redis.address
    assert said == [
        f"1 running tasks are not renewed until Redis at {address} answers: away",
        f"Redis at {address} answers again: running tasks are renewed",
    ]


def test_a_delivery_that_waits_for_one_that_celery_is_done_with_is_no_more(desk):
    ran = []

    def work(number):
        ran.append(number)
        if len(ran) == 1:
            again = Thread(target=desk.deliver, args=(message,), kwargs={"redelivered": True})
            again.start()
            again.join()
            assert desk.parked() == 1

    task = desk.task(work, acks_late=True, lock=f"{desk.name}:a")
    message = desk.send(task, 1)
    desk.deliver(message)
    assert (ran, desk.parked()) == ([1], 0)


@pytest.mark.parametrize("until", ["start", "end"])
@pytest.mark.parametrize("ends", ["rejected", "newest dropped", "oldest dropped", "dropped while it waits"])
def test_a_call_that_ends_without_having_started_claims_nothing_any_more(desk, until, ends):
    """For an hour every later call of its key was dropped."""
    ran = []
    full = "reject" if ends == "rejected" else "drop_newest" if ends == "newest dropped" else "drop_oldest"
    unique = Unique("{number}", until=until, on_conflict="drop")
    task = desk.task(noting(ran), lock=f"{desk.name}:a", max_parked=1, when_full=full, unique=unique)
    with desk.lock():
        desk.run(task, 1)
        desk.run(task, 2)
        if full == "drop_oldest":
            desk.come()
    while desk.parked():
        desk.come()
    ended = 1 if full == "drop_oldest" else 2
    assert ran == [3 - ended]
    desk.run(task, ended)
    assert ran == [3 - ended, ended]


def test_a_call_that_ends_with_what_is_remembered_claims_nothing_any_more(desk):
    ran = []
    task = memoized_task(
        app=desk.app, cache=Cache(desk.redis, namespace=desk.name), name=f"{desk.name}.made", ttl="5m",
        gate_redis=desk.redis, gate_unique=Unique("{number}", until="end", on_conflict="drop"),
    )(noting(ran))  # fmt: skip
    for _ in range(3):
        desk.run(task, 1)
    assert ran == [1]
    task.invalidate(1)
    desk.run(task, 1)
    assert ran == [1, 1]


def test_what_is_remembered_is_returned_though_the_arguments_make_no_claim(desk):
    """Sent by somebody who does not have the task."""
    task = memoized_task(
        app=desk.app, cache=Cache(desk.redis, namespace=desk.name), name=f"{desk.name}.made", key="{number}", ttl="5m",
        gate_redis=desk.redis, gate_unique=Unique("{number.year}", until="end", on_conflict="drop"),
    )(noting([]))  # fmt: skip
    assert task.memo.cache.set(task.key(1), "remembered")
    desk.app.send_task(task.name, (1,))
    (message,) = desk.messages()
    assert desk.deliver(message) == ("SUCCESS", "remembered")


def test_the_refresh_of_a_call_that_is_unique_is_sent_while_another_call_has_the_claim(desk):
    ran = []
    task = memoized_task(
        app=desk.app, cache=Cache(desk.redis, namespace=desk.name), name=f"{desk.name}.made", ttl="5m", stale="5m",
        gate_redis=desk.redis, gate_unique=Unique("{number}", until="end", on_conflict="drop"),
    )(noting(ran))  # fmt: skip
    desk.run(task, 1)
    assert task.memo.cache.expire(task.key(1))
    desk.run(task, 1)  # which finds it stale
    (refresh,) = desk.messages()
    waits = desk.send(task, 1)
    desk.deliver(refresh)
    assert ran == [1, 1]
    desk.deliver(waits)
    assert ran == [1, 1]


@pytest.mark.parametrize("woken", ["later", "before the lease of its parking is given back"])
@pytest.mark.parametrize("sent_by", ["a reader", "refresh"])
def test_a_refresh_that_was_parked_runs(desk, monkeypatch, sent_by, woken):
    """It ended with nothing, and kept the lock that it was handed; or it saw the lease taken, and ended with that."""
    ran, came, cache = [], [], Cache(desk.redis, namespace=desk.name)

    @memoized_task(
        app=desk.app, cache=cache, name=f"{desk.name}.made", ttl="5m", stale="5m",
        gate_redis=desk.redis, gate_lock=f"{desk.name}:a",
    )  # fmt: skip
    def task(number):
        ran.append(len(ran))
        return ran[-1]

    desk.run(task, 1)
    held = desk.lock().acquire()
    if sent_by == "refresh":
        task.refresh(1)
    else:
        assert task.memo.cache.expire(task.key(1))
        desk.run(task, 1)
    (refresh,) = desk.messages()
    act_on, coming = passing.Passage._act_on, Thread(target=lambda: came.extend(desk.come()))

    def act_when_it_has_come(self, outcome):
        if isinstance(outcome, Parked):
            monkeypatch.setattr(passing.Passage, "_act_on", act_on)
            held.release()
            coming.start()
            state = lease(cache.keys.entry(task.key(1)))
            eventually(lambda: int(desk.redis.coordination.hget(state, "waiting") or 0) > 0, "it waits for the lease")
        return act_on(self, outcome)

    if woken != "later":
        monkeypatch.setattr(passing.Passage, "_act_on", act_when_it_has_come)
    desk.deliver(refresh)
    if woken == "later":
        held.release()
        coming.start()
    coming.join()
    assert (ran, len(came)) == ([0, 1], 1)
    assert task.peek(1) == 1
    assert isinstance(desk.lock().try_acquire(), Hold)


@pytest.mark.parametrize("comes", ["later", "before its attempt has ended"])
def test_those_that_wait_to_end_with_a_call_wait_for_its_retries_too(desk, comes):
    """The permit went to them while it waited for its next attempt, and they ran."""
    ran = []

    def work(self, number):
        ran.append((self.request.id, self.request.retries))
        if len(ran) == 1:
            desk.deliver(waits)
            retry = self.retry(countdown=1, throw=False)
            if comes != "later":
                early = Thread(target=lambda: [desk.deliver(message) for message in desk.messages()])
                early.start()
                early.join()
            raise retry
        return "made"

    task = desk.task(work, bind=True, unique=Unique("{number}", until="end"))
    first, waits = desk.send(task, 1, id="Z"), desk.send(task, 1, id="B")
    desk.deliver(first)
    if comes == "later":
        desk.pump.once()
        (retry,) = desk.messages()
        desk.deliver(desk.send(task, 1, id="C"))
        assert desk.parked() == 2
        desk.deliver(retry)
        ended = desk.come(2)
    else:
        assert desk.parked() == 2
        desk.come()
        assert ran == [("Z", 0), ("Z", 1)], "the retry goes first"
        ended = desk.come()
    assert ran == [("Z", 0), ("Z", 1)]
    assert set(ended) == {("SUCCESS", "made")}


@pytest.mark.parametrize("waits", [True, False])
def test_a_permit_is_kept_for_the_retry_of_an_attempt_that_outlasted_its_lease(yard, waits):
    """What is in use is counted anew then."""
    gates = yard.gates(unique=Unique(until="end"))
    (permit,) = [gate for gate in gates if gate.is_unique]
    running = yard.run("a", gates, lease_ms=200)
    held = yard.lot.running([running.attempt.token])[running.attempt.token]
    assert yard.lot.renew({running.attempt.token: held._replace(lease_ms=600_000)}) == []
    if waits:
        yard.park("b", gates)
    client = yard.lot.redis.coordination

    def is_over():
        seconds, micros = client.time()
        return seconds * 1_000_000 + micros > running.now_us + 200_000

    eventually(is_over, "the lease that it began with is over")
    yard.lot.end(running, retried_ms=60_000)
    assert yard.pumped() == []
    assert client.hget(permit.state, "used") == b"1"
    assert isinstance(yard.ask("c", gates, record=None), Refused)
    retry = yard.ask("a", gates, retries=1)
    assert isinstance(retry, Running)
    yard.lot.end(retry)
    assert [one.id for one in yard.pumped()] == (["b"] if waits else [])


def test_a_retry_for_other_arguments_leaves_nothing_behind(desk):
    ran = []

    def work(self, number):
        ran.append(number)
        if len(ran) == 1:
            raise self.retry(args=(2,), countdown=0)
        return number

    task = desk.task(work, bind=True, unique=Unique("{number}", until="end"))
    desk.run(task, 1)
    desk.messages()
    assert desk.run(task, 1) == ("SUCCESS", 1)
    assert ran == [1, 1]


def test_a_retry_at_a_time_that_is_text_is_a_retry(desk):
    def work(self, number):
        raise self.retry(eta=(datetime.now(UTC) + timedelta(hours=1)).isoformat())

    task = desk.task(work, bind=True, unique=Unique("{number}", until="end"))
    assert desk.run(task, 1, id="A")[0] == "RETRY"
    permit = next(gate for gate in task.gates.of((1,), {}) if gate.is_unique)
    lease_ms = int(desk.redis.coordination.hget(permit.state, "hA.1").split()[1])
    assert 3_500_000 < lease_ms <= 3_632_000


def test_a_late_task_whose_process_is_told_to_end_runs_again(desk):
    """Celery sends ``task_postrun`` then too, and keeps no result."""
    ran = []

    def work(number):
        ran.append(number)
        if len(ran) == 1:
            raise SystemExit

    task = desk.task(work, acks_late=True, lock=f"{desk.name}:a")
    message = desk.send(task, 1)
    with pytest.raises(SystemExit):
        desk.deliver(message)
    token = Attempt(message.headers["id"], 0).token
    assert desk.lot.crashed(token, desk.lot.running([token])[token])
    desk.deliver(message, redelivered=True)
    assert ran == [1, 1]


def test_that_a_late_task_has_ended_is_known_where_all_are_only_memoized(desk):
    ran = []

    def work(number):
        ran.append(number)
        raise KeyError(number)

    with patch.object(task_postrun, "receivers", []):
        task = memoized_task(
            app=desk.app,
            cache=Cache(desk.redis, namespace=desk.name),
            name=f"{desk.name}.made",
            ttl="5m",
            acks_late=True,
        )(work)
        message = desk.send(task, 1)
        for redelivered in (False, True):
            desk.deliver(message, redelivered=redelivered)
    assert (ran, desk.parked()) == ([1], 0)


def test_a_refresh_that_is_rate_limited_claims_nothing(desk):
    ran = []

    def work(self, number):
        ran.append(number)
        if len(ran) == 2:
            raise RateLimited(0.1)

    task = memoized_task(
        app=desk.app, cache=Cache(desk.redis, namespace=desk.name), name=f"{desk.name}.made", ttl="5m", bind=True,
        gate_redis=desk.redis, gate_rate="100/s", gate_unique=Unique("{number}", until="end", on_conflict="drop"),
    )(work)  # fmt: skip
    desk.run(task, 1)
    task.refresh(1)
    (refresh,) = desk.messages()
    desk.deliver(refresh)
    desk.come()
    assert ran == [1, 1, 1]
    task.invalidate(1)
    desk.run(task, 1)
    assert ran == [1, 1, 1, 1]


def test_a_refresh_gives_back_the_permit_that_it_was_handed_for_the_result(desk):
    ran, came = [], []

    def work(number):
        ran.append(number)
        if len(ran) == 1:
            coming = Thread(target=lambda: came.append(desk.deliver(refresh)))
            coming.start()
            coming.join()
            raise KeyError(number)
        return "made"

    task = memoized_task(
        app=desk.app, cache=Cache(desk.redis, namespace=desk.name), name=f"{desk.name}.made", ttl="5m",
        gate_redis=desk.redis,
    )(work)  # fmt: skip
    task.refresh(1)
    (refresh,) = desk.messages()
    assert desk.run(task, 1)[0] == "FAILURE"
    assert [value for _, value in desk.come()] == ["made"]
    task.invalidate(1)
    assert desk.run(task, 1) == ("SUCCESS", "made")
    assert (len(ran), desk.parked()) == (3, 0)


def test_a_result_that_came_while_it_was_looked_for_is_found(desk, monkeypatch):
    """Between the look for the other's result and the gates that one ended: both ran."""
    ran, go = [], passing.Passage.go

    def work(number):
        ran.append(number)
        return len(ran)

    task = desk.task(work, unique=Unique("{number}", until="end"))
    first, second = desk.send(task, 1), desk.send(task, 1)

    def go_when_the_first_has_ended(self):
        monkeypatch.setattr(passing.Passage, "go", go)
        other = Thread(target=desk.deliver, args=(first,))
        other.start()
        other.join()
        return go(self)

    monkeypatch.setattr(passing.Passage, "go", go_when_the_first_has_ended)
    assert desk.deliver(second) == ("SUCCESS", 1)
    assert ran == [1]
    third = desk.lot.admit(Attempt("third", 0), task.gates.of((1,), {}), record=None)
    assert isinstance(third, Running), "what it was admitted with is given back"


def test_that_an_attempt_was_sent_is_not_noted_of_its_retry(yard):
    """The pump was slow to note it; meanwhile it ran, was retried, parked, and woken. It was never sent."""
    gates = yard.gates(lock="a")
    first = yard.run("a", gates)
    yard.park("b", gates)
    yard.lot.end(first)
    (woken,) = yard.pumped()
    running = yard.come(woken, gates)
    yard.lot.end(running)
    other = yard.run("c", gates)
    retry = Attempt("b", 1, 0, "task", again=True)
    assert isinstance(yard.lot.admit(retry, gates, record=b"{}"), Parked)
    yard.lot.end(other)
    for line, _ in yard.lot.next().lines:
        yard.serve(line)
    yard.lot.sent([woken], forget=[False])
    assert [one.token for one in yard.lot.next().woken] == [retry.token]


def test_a_process_that_died_after_its_task_forgets_no_retry_of_it(desk):
    """Its retry was parked, woken and sent before the main process saw that."""
    ran = []

    def work(self):
        ran.append(self.request.retries)
        if not self.request.retries:
            raise self.retry(countdown=0)

    task = desk.task(work, bind=True, lock=f"{desk.name}:a")
    desk.run(task, id="A")
    (retry,) = desk.messages()
    with desk.lock():
        desk.deliver(retry)
    (woken,) = desk.pumped()
    desk.lot.died(Attempt("A", 0), task.gates.of((), {}))
    desk.deliver(woken)
    assert ran == [0, 1]


@pytest.mark.parametrize("on_conflict", ["drop", "raise"])
def test_a_retry_that_waits_in_its_slot_waits_for_its_own_attempt(desk, on_conflict):
    """In a worker that parks nothing of this task it was dropped as a second call."""
    ran, came, asked = [], [], Event()

    def work(self):
        ran.append(self.request.retries)
        if self.request.retries:
            return "made"
        retry = self.retry(countdown=0, throw=False)
        (message,) = desk.messages()
        coming.append(Thread(target=lambda: came.append(desk.deliver(message, guarded_here=False))))
        coming[0].start()
        assert asked.wait(30)
        raise retry

    coming = []
    task = desk.task(work, bind=True, unique=Unique(on_conflict=on_conflict))
    admit = desk.lot.admit

    def ask(attempt, *arguments, **keywords):
        outcome = admit(attempt, *arguments, **keywords)
        if attempt.retries:
            asked.set()
        return outcome

    with patch.object(task.lot, "admit", ask):
        desk.deliver(desk.send(task), guarded_here=False)
        coming[0].join()
    assert (ran, came) == ([0, 1], [("SUCCESS", "made")])


# What was declared, and meant another thing


def used_of(redis, limiter, limit):
    """How much of a limit is charged."""
    rates = RateLimiter(redis, limiter, [limit])
    return limit.burst - rates.peek("all").remaining


@pytest.mark.parametrize("key", [None, ""])
def test_what_a_call_has_cost_is_settled_with_the_rates_that_have_a_cost_alone(desk, key):
    """Else ten thousand tokens would be ten thousand calls."""
    calls, tokens = RateLimit("10/d"), RateLimit("1000/d")
    rates = [calls, Rate(tokens, name=f"{desk.name}.llm", cost="{estimate}")]

    def ask(task, estimate, actual):
        task.admission.settle(actual, key)

    task = desk.task(ask, bind=True, rate=rates)
    task(100, 500)

    assert used_of(desk.redis, task.name, calls) == 1
    assert used_of(desk.redis, f"{desk.name}.llm", tokens) == 500


def test_a_rate_without_a_cost_is_settled_when_it_is_named(desk):
    limit = RateLimit("10/d")

    def ask(task, tenant):
        task.admission.settle(3, "t:{tenant}")

    task = desk.task(ask, bind=True, rate=Rate(limit, key="t:{tenant}"))
    task("acme")

    assert RateLimiter(desk.redis, task.name, [limit]).peek("t:acme").remaining == 7


def test_a_cost_far_above_the_estimate_names_the_rate_and_settles_none(desk):
    small, large = RateLimit("10/d"), RateLimit("1000/d")
    rates = [Rate(large, name=f"{desk.name}.large", cost=1), Rate(small, name=f"{desk.name}.small", cost=1)]

    task = desk.task(lambda task: task.admission.settle(1_002), bind=True, rate=rates)

    with pytest.raises(ValueError, match=rf"1002 is more than 1000 above the 1 that rate 10/d of '{desk.name}.small'"):
        task()
    assert used_of(desk.redis, f"{desk.name}.large", large) == 1


def test_all_that_a_task_holds_is_found_and_every_loss_is_told(desk):
    """Permits without a key have no template to be told apart by."""
    database = f"{desk.name}.db"

    def work(task):
        names = list(task.admission.holds)
        Semaphore(desk.redis, database, permits=3).force_release()
        with suppress(LockLost):
            task.admission.holds[f"concurrency {database!r} (3)"].extend()
        lost = task.admission.lost
        with pytest.raises(LockLost, match=database):
            task.admission.raise_if_lost()
        return names, lost

    task = desk.task(work, bind=True, concurrency=[2, Concurrency(3, name=database)], lock="a", unique=True)
    names, lost = task()

    assert names[0].startswith("unique ")
    assert names[1:] == ["a", f"concurrency {task.name!r} (2)", f"concurrency {database!r} (3)"]
    assert lost
