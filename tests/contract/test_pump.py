"""The pump: of all workers one sends what may run, another goes on when it ends or dies, and nothing is lost meanwhile.

The broker is a queue that no worker reads, so what was sent can be looked at. A worker is a call of ``admit``.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from celery import Celery
from celery.worker import state as worker_state
from local_nodes import eventually

from petiole import RateLimit
from petiole.cachelib import Settings, connect
from petiole.cachelib.embedded import find_program
from petiole.cachelib.guarded import GuardedProcess
from petiole.coordination import parking
from petiole.coordination.gates import Rate
from petiole.coordination.hold import Busy
from petiole.coordination.parking import Running
from petiole.tasks import pump as module
from petiole.tasks.pump import Pump
from tests.contract.test_parking import Yard

LEADER = Path(__file__).parent / "parking_programs" / "leader.py"


def record(name, *, task="shop.charge", **options):
    """What is written down of a task that goes to the queue of this test."""
    return json.dumps(
        {"task": task, "args": [name], "kwargs": {}, "options": {"queue": name, **options}, "headers": {"petiole": {}}}
    ).encode()


class Office(Yard):
    """A yard with a broker."""

    def __init__(self, redis, name, broker_url):
        super().__init__(redis, name)
        self.ears.disconnect()
        self.app = Celery(name, broker=broker_url, set_as_current=False)
        self.app.conf.update(task_default_queue=name, broker_transport_options={"socket_timeout": 5})
        self.pumps = []

    def park(self, id, gates, generation=0, **options):
        return super().park(id, gates, generation, **{"record": record(self.name), **options})

    def start(self, lot=None):
        self.pumps.append(Pump(self.app, lot or self.lot))
        self.pumps[-1].start()
        return self.pumps[-1]

    def leads(self):
        """Wait until one pump leads."""
        pump = self.start()
        eventually(lambda: pump.leads, "it leads")
        return pump

    def stop(self):
        for pump in self.pumps:
            pump.stop()
        assert [pump for pump in self.pumps if pump._thread.is_alive()] == []
        self.app.close()

    def messages(self):
        """What lies in the broker: (id, generation, whether it is sent as revoked), the oldest first."""
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            client = channel.client
            raw = client.lrange(self.name, 0, -1) + client.lrange(f"{self.name}.woken", 0, -1)
        headers = [json.loads(one)["headers"] for one in reversed(raw)]
        return [(one["id"], one["petiole"]["generation"], bool(one["expires"])) for one in headers]

    def ids(self):
        return [id for id, _, _ in self.messages()]

    def arrives(self, *ids):
        """Wait until these lie in the broker, and nothing else."""
        eventually(lambda: len(self.messages()) >= len(ids), f"{ids} are sent")
        assert self.ids() == list(ids)

    def take(self, gates_of, count):
        """A worker that takes so many from the queue, one after the other. The ids that ran."""
        ran = []
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            while len(ran) < count:
                (_, raw) = channel.client.brpop(f"{self.name}.woken", 60)
                headers = json.loads(raw)["headers"]
                outcome = self.ask(
                    headers["id"], gates_of(headers["id"]), headers["petiole"]["generation"], record=record(self.name)
                )
                if isinstance(outcome, Running):
                    ran.append(headers["id"])
                    self.lot.end(outcome)
        return ran


@pytest.fixture(autouse=True)
def _pumps_end_soon(monkeypatch):
    """So often a pump that sleeps looks whether it is to end."""
    monkeypatch.setattr(module, "_LONGEST_SLEEP_S", 0.05)


def forget_queue(office):
    with office.app.connection_for_write() as connection, connection.channel() as channel:
        for queue in (office.name, f"{office.name}.woken"):
            channel.client.delete(queue, f"_kombu.binding.{queue}")


@pytest.fixture
def office(redis, name, redis_server):
    office = Office(redis, name, redis_server.url)
    yield office
    office.stop()
    forget_queue(office)
    left = office.left()
    if left:
        office.client.unlink(*left)


@contextmanager
def office_at(server, name, broker_url=None):
    """An office at a server of its own, which may be stopped."""
    with connect(settings=Settings(url=server.url)) as redis:
        office = Office(redis, name, broker_url or server.url)
        try:
            yield office
        finally:
            office.stop()


# One leads


def test_what_may_run_is_sent_with_its_id_and_generation(office):
    gates = office.gates(lock="a")
    running = office.run("a", gates)
    office.park("b", gates)
    pump = office.leads()
    assert office.messages() == []
    office.lot.end(running)

    office.arrives("b")
    assert office.messages() == [("b", 1, False)]
    assert office.take(lambda _: gates, 1) == ["b"]
    assert pump.sent == 1
    assert "leads, 1 sent" in repr(pump)
    assert office.left() == []


def test_of_two_pumps_one_leads_and_each_task_is_sent_once(office):
    first = office.leads()
    second = office.start()
    gates = office.gates(lock="a")
    running = office.run("a", gates)
    for n in range(20):
        office.park(f"{n:02}", gates)
    office.lot.end(running)

    assert office.take(lambda _: gates, 20) == [f"{n:02}" for n in range(20)]
    assert (first.leads, second.leads) == (True, False)
    eventually(lambda: first.sent == 20, "it has counted the last, which came before that")
    assert second.sent == 0
    assert office.messages() == []
    assert "stands by" in repr(second)
    assert office.left() == []


def test_when_the_leader_stops_the_other_one_goes_on(office):
    first = office.leads()
    second = office.start()
    gates = office.gates(lock="a")
    running = office.run("a", gates)
    office.park("b", gates)
    first.stop()
    office.lot.end(running)

    assert office.take(lambda _: gates, 1) == ["b"]
    assert second.leads
    assert not first.leads
    assert office.left() == []


def test_when_the_leader_is_killed_the_other_one_goes_on_after_its_lease(office, redis_server):
    """Also with what was given back in between, when nobody heard of it."""
    command = [sys.executable, str(LEADER), redis_server.url, office.name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout.readline() == "leads\n"
        second = office.start()
        hold = office.lock("a").try_acquire()
        gates = office.gates(lock="a")
        office.park("b", gates)
        process.send_signal(signal.SIGSTOP)  # it hears nothing from now on, and Redis believes that it listens
        hold.release()
        office.lot.end(office.run("other", office.gates(lock="other")))
        process.kill()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

    assert office.take(lambda _: gates, 1) == ["b"]
    assert second.leads
    assert office.left() == []


def test_what_was_given_back_while_no_pump_ran_is_handed_on_by_the_first(office):
    gates = office.gates(lock="a")
    hold = office.lock("a").try_acquire()
    for id in "bcd":
        office.park(id, gates)
    hold.release()
    office.start()

    assert office.take(lambda _: gates, 3) == ["b", "c", "d"]
    assert office.left() == []


# What wakes


def test_the_release_of_a_plain_lock_wakes_a_task(office):
    """The pump hears of it from the release itself: it asks nothing until then."""
    office.leads()
    gates = office.gates(lock="a")
    hold = office.lock("a").try_acquire()
    office.park("b", gates)
    hold.release()

    office.arrives("b")
    assert isinstance(office.lock("a").try_acquire(), Busy), "it is the task's, on its way"
    assert office.take(lambda _: gates, 1) == ["b"]
    assert office.left() == []


def test_plain_waiters_and_tasks_take_turns(office):
    """The line stands in the lock's own queue for the first of those in it: nobody is passed over."""
    office.leads()
    gates = office.gates(lock="a")
    order, threads = [], []
    hold = office.lock("a").try_acquire()

    def wait(who):
        with office.lock("a"):
            order.append(who)

    def waiters(count):
        eventually(lambda: len(office.lock("a").inspect().waiting) == count, f"{count} wait")

    office.park("task 1", gates)
    waiters(1)
    threads.append(Thread(target=wait, args=("plain 1",)))
    threads[-1].start()
    waiters(2)
    office.park("task 2", gates)
    office.park("task 3", gates)
    threads.append(Thread(target=wait, args=("plain 2",)))
    threads[-1].start()
    waiters(3)
    hold.release()
    worker = Thread(target=lambda: take_noting(office, gates, order, 3))
    worker.start()
    for thread in [*threads, worker]:
        thread.join(60)

    assert order == ["task 1", "plain 1", "task 2", "plain 2", "task 3"] or order == [
        "task 1", "plain 1", "plain 2", "task 2", "task 3",
    ]  # fmt: skip
    assert office.left() == []


def take_noting(office, gates, order, count):
    """As ``Office.take``, and notes who runs while it holds the lock."""
    with office.app.connection_for_read() as connection, connection.channel() as channel:
        while count:
            (_, raw) = channel.client.brpop(f"{office.name}.woken", 60)
            headers = json.loads(raw)["headers"]
            outcome = office.ask(headers["id"], gates, headers["petiole"]["generation"])
            if isinstance(outcome, Running):
                order.append(headers["id"])
                count -= 1
                office.lot.end(outcome)


def test_a_rate_sends_each_when_its_token_is_there(office):
    office.leads()
    gates = office.gates(rate=Rate(RateLimit("20/s", burst=1)))
    office.lot.end(office.run("0", gates))
    for n in range(1, 10):
        office.park(str(n), gates)

    assert office.take(lambda _: gates, 9) == [str(n) for n in range(1, 10)]
    assert office.left() == []


def test_a_pump_that_has_nothing_to_do_asks_next_to_nothing(own_server, name, monkeypatch):
    """Half a second goes by between two looks; nothing is asked of each line."""
    monkeypatch.setattr(module, "_LONGEST_SLEEP_S", 0.5)
    server = own_server()
    with office_at(server, name) as office:
        gates = office.gates(lock="a")
        running = office.run("a", gates)
        office.leads()
        for n in range(200):
            office.park(f"{n:03}", gates)

        def looks():
            return office.client.info("commandstats")["cmdstat_hget"]["calls"]

        eventually(lambda: office.lot.next().lines == [], "all is quiet")
        before, asked = looks(), Counter()
        eventually(lambda: asked.update(n=1) or asked["n"] > 20, "twenty looks of ours")
        assert looks() - before <= 40
        office.lot.end(running)


def test_a_task_that_was_revoked_is_sent_as_revoked_out_of_its_turn(office, monkeypatch):
    """The worker that gets it marks it so, and whatever follows it learns of it."""
    monkeypatch.setattr(worker_state, "revoked", set())
    office.leads()
    gates = office.gates(lock="a")
    running = office.run("a", gates)
    for id in "bcd":
        office.park(id, gates)
    worker_state.revoked.add("c")

    office.arrives("c")
    assert office.messages() == [("c", 1, True)]
    assert sorted(one.id for one in office.lot.waiting()) == ["b", "d"]
    office.lot.end(running)
    assert office.take(lambda _: gates, 2) == ["b", "d"]
    assert office.left() == []


def test_a_revoked_task_is_seen_though_as_many_are_revoked_as_before(office, monkeypatch):
    """The set of Celery forgets the oldest."""
    monkeypatch.setattr(module, "_REVOKED_S", 0.05)
    monkeypatch.setattr(worker_state, "revoked", {"another"})
    office.leads()
    gates = office.gates(lock="a")
    running = office.run("a", gates)
    for id in "bc":
        office.park(id, gates)
    worker_state.revoked.add("b")
    office.arrives("b")
    monkeypatch.setattr(worker_state, "revoked", {"b", "c"})

    office.arrives("b", "c")
    assert office.messages() == [("b", 1, True), ("c", 1, True)]
    office.lot.end(running)


def test_a_task_that_expires_while_it_waits_is_sent_as_revoked(office):
    office.leads()
    gates = office.gates(lock="a")
    running = office.run("a", gates)
    office.park("b", gates, expires_us=50_000)

    office.arrives("b")
    assert office.messages() == [("b", 1, True)]
    office.lot.end(running)
    assert office.left() == []


def test_what_was_sent_and_never_came_is_sent_again(office, monkeypatch):
    """The broker lost it. What comes twice finds nothing the second time."""
    monkeypatch.setattr(parking, "_SEND_AGAIN_MS", 300)
    office.leads()
    gates = office.gates(lock="a")
    running = office.run("a", gates)
    office.park("b", gates)
    office.lot.end(running)

    eventually(lambda: len(office.messages()) >= 2, "it is sent again")
    assert set(office.messages()) == {("b", 1, False)}
    running = office.ask("b", gates, 1)
    assert isinstance(running, Running)
    office.lot.end(running)
    assert office.left() == []


# What is broken stops nobody else


@pytest.mark.parametrize(
    "broken",
    [
        b"", b"no json", b"[]", b"{}", b"null", b"\xff\xfe", b'{"task": 7}', b'{"task": "t"}',
        b'{"task": "t", "args": 5, "kwargs": {}, "options": {}, "headers": {}}',
        b'{"task": "t", "args": [], "kwargs": {}, "options": [1], "headers": {}}',
        b'{"task": "t", "args": [], "kwargs": {}, "options": {"eta": 5}, "headers": {}}',
        b'{"task": "t", "args": [], "kwargs": {}, "options": {"countdown": "x"}, "headers": {}}',
        b'{"task": "t", "args": [], "kwargs": {}, "options": {"queue": 5}, "headers": {}}',
        b'{"task": "t", "args": [], "kwargs": {}, "options": {}, "headers": {"petiole": 7}}',
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_sent_stops_no_other(office, broken, caplog):
    """Somebody wrote into Redis, or the record is of another version."""
    gates = {id: office.gates(lock=id) for id in "ab"}
    running = [office.run(f"on {id}", gates[id]) for id in "ab"]
    office.park("a", gates["a"], record=broken)
    office.park("b", gates["b"])
    with caplog.at_level(logging.WARNING):
        office.leads()
        for one in running:
            office.lot.end(one)
        eventually(lambda: "b" in office.ids(), "the other one is sent")

    assert "b" in office.ids()
    eventually(lambda: caplog.text, "it is told")


@pytest.mark.parametrize("definition", [b"", b"no json", b"[]", b"\xff", b'["p","l",1,2,3,4,5,6,7]'])
def test_a_line_whose_gate_cannot_be_read_stops_no_other(office, definition, caplog):
    gates = {id: office.gates(lock=id) for id in "ab"}
    running = {id: office.run(f"on {id}", gates[id]) for id in "ab"}
    for id in "ab":
        office.park(id, gates[id])
    office.client.hset(office.lot.keys.gates, office.lot.keys.line(gates["a"][0].state), definition)
    for one in running.values():
        office.lot.end(one)
    office.leads()

    office.arrives("b")
    eventually(lambda: office.lot.keys.line(gates["a"][0].state) in caplog.text, "it is told")
    office.park("c", gates["a"])  # the next one that comes tells anew what the gate is
    eventually(lambda: len(office.messages()) == 2, "and so those go on who wait there")
    assert office.ids() == ["b", "a"]


def test_a_line_that_redis_cannot_serve_stops_no_other(office, caplog):
    """Something else stands where the state of a lock should."""
    gates = {id: office.gates(lock=id) for id in "ab"}
    running = {id: office.run(f"on {id}", gates[id]) for id in "ab"}
    for id in "ab":
        office.park(id, gates[id])
    for one in running.values():
        office.lot.end(one)
    office.client.set(gates["a"][0].state, "something else", ex=600)
    office.leads()

    office.arrives("b")
    eventually(lambda: office.lot.keys.line(gates["a"][0].state) in caplog.text, "it is told")
    office.client.delete(gates["a"][0].state)


# What may happen to brokers and servers


def test_a_broker_that_is_away_loses_nothing(own_server, redis, name, caplog, tmp_path):
    server = own_server()
    office = Office(redis, name, server.url)
    office.app.conf.update(
        broker_connection_timeout=1, task_publish_retry_policy={"max_retries": 0},
        broker_transport_options={"socket_connect_timeout": 1},
    )  # fmt: skip
    gates = office.gates(lock="a")
    running = office.run("a", gates)
    for id in "bc":
        office.park(id, gates)
    server.stop()
    try:
        office.leads()
        office.lot.end(running)
        eventually(lambda: "the broker did not take 1 parked tasks" in caplog.text, "it has tried")
        with at_port(server.port, tmp_path):
            office.arrives("b")
            assert office.take(lambda _: gates, 2) == ["b", "c"]
            assert office.left() == []
            office.app.close()
    finally:
        office.stop()


@contextmanager
def at_port(port, folder, *options):
    """A server at the port of one that was stopped."""
    program = [find_program(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options]
    process = GuardedProcess(program, folder=folder)
    try:
        yield
    finally:
        process.stop()


def test_a_server_that_is_restarted_keeps_all(own_server, tmp_path, name):
    """With an append-only file. The pump goes on by itself, with what was parked before."""
    options = ("--dir", str(tmp_path), "--appendonly", "yes", "--appendfsync", "always")
    server = own_server(*options)
    with office_at(server, name) as office:
        gates = office.gates(lock="a")
        running = office.run("a", gates)
        for id in "bcd":
            office.park(id, gates)
        pump = office.leads()
        server.stop()
        eventually(lambda: not pump.leads, "it has noticed")
        with at_port(server.port, tmp_path, *options):
            eventually(lambda: pump.leads, "it leads again")
            assert office.lot.end(running)
            assert office.take(lambda _: gates, 3) == ["b", "c", "d"]
            assert office.left() == []
            pump.stop()


@pytest.fixture
def attempts(monkeypatch):
    """One for each time that a pump has asked whether it may lead; it asks again soon."""
    asked, real = [], module.Acquirable.acquire

    def acquire(self, timeout=None):
        asked.append(self)
        return real(self, timeout)

    monkeypatch.setattr(module.Acquirable, "acquire", acquire)
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    return asked


def said_by_pumps(caplog):
    return [(one.levelname, one.getMessage()) for one in caplog.records if one.name == module.logger.name]


def test_an_outage_is_told_once_and_its_end_too(own_server, tmp_path, name, attempts, caplog):
    caplog.set_level(logging.INFO, module.logger.name)
    server = own_server()
    with office_at(server, name) as office:
        pump = office.leads()
        server.stop()
        for told in (1, 3):
            before = len(attempts)
            eventually(lambda before=before: len(attempts) > before + 5, "it has tried again and again")
            assert [level for level, _ in said_by_pumps(caplog)] == ["WARNING", "INFO", "WARNING"][:told]
            with at_port(server.port, tmp_path):
                eventually(lambda told=told: len(said_by_pumps(caplog)) > told, "it says that Redis is back")
                assert said_by_pumps(caplog)[-1] == (
                    "INFO", f"Redis at {server.url} answers again: parked tasks are sent",
                )  # fmt: skip
                eventually(lambda: pump.leads, "it leads again")
        pump.stop()
    assert len(said_by_pumps(caplog)) <= 5  # the third outage is the end of the last server


def test_a_redis_that_is_not_there_is_told_with_what_to_do_and_without_its_password(name, attempts, caplog):
    app = Celery(name, broker="memory://", set_as_current=False)
    with connect("redis://:sesame@127.0.0.1:1/0") as redis:
        pump = Pump(app, parking.ParkingLot(redis, name))
        pump.start()
        eventually(lambda: len(attempts) > 5, "it has tried again and again")
        pump.stop()
    ((level, said),) = said_by_pumps(caplog)
    assert level == "WARNING"
    assert "until Redis at redis://" in said
    assert "@127.0.0.1:1/0 answers" in said
    assert "set REDIS_URL, or give redis=connect(...)" in said
    assert "sesame" not in said
    assert "lock" not in said.lower()


def test_a_server_that_has_forgotten_everything_stops_no_pump(own_server, name):
    """FLUSHALL: what was parked is lost, as all there is; what comes then is parked and woken as ever."""
    server = own_server()
    with office_at(server, name) as office:
        gates = office.gates(lock="a")
        running = office.run("a", gates)
        office.park("lost", gates)
        pump, other = office.leads(), office.start()
        office.client.flushall()
        assert not office.lot.end(running)
        office.client.script_flush()

        running = office.run("a", gates)
        office.park("b", gates)
        office.lot.end(running)
        assert office.take(lambda _: gates, 1) == ["b"]
        eventually(lambda: pump.leads != other.leads, "one leads again")
        assert office.left() == []
