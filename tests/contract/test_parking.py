"""What Redis is told of tasks that may not run yet: who runs, who waits where, who is woken, what is left at the end.

No Celery here: a worker is a call of ``admit``, the pump is ``pumped``, and a message is what it returns.
"""

import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from local_nodes import eventually

from petiole import Lock, RateLimit, RateLimiter, Semaphore
from petiole.cachelib import Settings, connect
from petiole.cachelib.pushes import listening_connection
from petiole.coordination import keys, parking
from petiole.coordination.gates import Concurrency, Gates, Pause, Rate, Served, Unique
from petiole.coordination.hold import Busy
from petiole.coordination.parking import Attempt, Full, Parked, ParkingLot, Refused, Running, Stale, Verdict, Woken

HOUR_US = 3_600_000_000
HAMMER = Path(__file__).parent / "parking_programs" / "hammer.py"


def call(key="k", tenant="t", cost=1):
    """The task of these tests, as gates see it."""


SIGNATURE = inspect.signature(call)


class Yard:
    """A lot, gates with names of this test's own, and what a worker and the pump do."""

    def __init__(self, redis, name):
        self.redis, self.name = redis, name
        self.lot = ParkingLot(redis, name)
        self.client = redis.coordination
        self.ears = listening_connection(self.client, "yard", 10)
        self.ears.connect()
        self.ears.send_command("SUBSCRIBE", self.lot.keys.channel)
        self.ears.read_response(push_request=True)

    def gates(self, *arguments, **options):
        """The gates of one call of a task that declares these."""
        if "lock" in options:
            names = [options["lock"]] if isinstance(options["lock"], str) else options["lock"]
            options["lock"] = [f"{self.name}:{one}" for one in names]
        if "unique" in options:
            options["unique_key"] = lambda given, _: str((*given, "k")[0])
        return Gates(f"{self.name}.task", SIGNATURE, namespace=self.name, **options).of(arguments, {})

    def ask(self, id, gates, generation=0, *, retries=0, record=b"{}", **options):
        return self.lot.admit(Attempt(id, retries, generation, "task"), gates, record=record, **options)

    def come(self, message, gates, **options):
        """Deliver what was sent."""
        id, _, retries = message.token.rpartition(".")
        assert unquote(id) == message.id
        return self.ask(message.id, gates, message.generation, retries=int(retries), **options)

    def run(self, id, gates, **options):
        running = self.ask(id, gates, **options)
        assert isinstance(running, Running), running
        return running

    def park(self, id, gates, generation=0, **options):
        parked = self.ask(id, gates, generation, **options)
        assert isinstance(parked, Parked), parked
        return parked

    def pumped(self):
        """Do what is to be done now, as the pump does. What it has sent."""
        sent = []
        for _ in range(10_000):
            while self.ears.can_read(timeout=0):  # what was granted to a line
                line = self.ears.read_response(push_request=True, disable_decoding=True)[2].decode().rsplit(" ", 2)[0]
                self.serve(line)
            due = self.lot.next()
            for line, definition in due.lines:
                self.lot.serve(line, Served.read(definition))
            for id in due.tasks:
                self.lot.wake(id, "=")
            self.lot.sent(due.woken, forget=[one.verdict == "x" for one in due.woken])
            sent += due.woken
            if not (due.lines or due.tasks or due.woken):
                return sent
        raise AssertionError(f"there is always something to do: {due}")

    def patiently(self, expected=1):
        """What is sent when its time has come."""
        sent = []
        eventually(lambda: sent.extend(self.pumped()) or len(sent) >= expected, f"{expected} are woken")
        return sent

    def serve(self, line):
        """Serve a line, when anybody waits in it."""
        definition = self.lot.definition(line)
        if definition is not None:
            self.lot.serve(line, Served.read(definition))

    def drain(self, gates_of):
        """Let all run that wait, one after the other. The ids, in the order in which they ran."""
        ran = []
        while messages := self.pumped():
            for message in messages:
                outcome = self.come(message, gates_of(message.id))
                if isinstance(outcome, Running):
                    ran.append(message.id)
                    self.lot.end(outcome)
        return ran

    def crashed(self, token):
        """The process of an attempt has died: what its worker's main process does."""
        found = self.lot.running([token]).get(token)
        return found is not None and found.is_of(os.getpid()) and self.lot.crashed(token, found)

    def lock(self, name):
        return Lock(self.redis, f"{self.name}:{name}")

    def is_free(self, name):
        hold = self.lock(name).try_acquire()
        if isinstance(hold, Busy):
            return False
        return hold.release()

    def left(self):
        """What is left of those who wait."""
        return sorted(
            key.decode()
            for key in self.client.scan_iter(f"petiole:*{self.name}*", count=10_000)
            if b":parked" in key or b":order" in key or b":run:" in key
        )


def ids_of(messages):
    return [message.id for message in messages]


@pytest.fixture
def yard(redis, name):
    yard = Yard(redis, name)
    yield yard
    yard.ears.disconnect()
    left = yard.left()
    if left:
        yard.client.unlink(*left)


@pytest.fixture
def all_end(yard):
    """Nothing is left of any task of this test."""
    yield
    assert yard.left() == []


# Locks and permits


def test_who_is_admitted_holds_the_very_lock(yard, all_end):
    gates = yard.gates(lock="a")
    running = yard.run("one", gates)
    ((fence, ends_us),) = running.given

    (seen,) = yard.lock("a").inspect().holders
    assert seen.fence == fence > 0
    assert ends_us - running.now_us == parking.LEASE_MS * 1_000
    assert isinstance(yard.lock("a").try_acquire(), Busy)
    assert yard.lot.end(running)
    assert yard.is_free("a")


def test_a_lock_that_is_held_by_others_parks_a_task_and_its_release_wakes_it(yard, all_end):
    gates = yard.gates(lock="a")
    hold = yard.lock("a").try_acquire()
    parked = yard.park("one", gates, record=b'{"task": "t"}')

    assert parked.by == gates[0]
    assert yard.pumped() == []
    hold.release()
    (message,) = yard.patiently()
    assert message == Woken("one", 1, "one.0", "-", False, b'{"task": "t"}')
    assert not yard.is_free("a"), "it is handed to the one that was woken, and nobody comes in between"
    running = yard.come(message, gates)
    assert isinstance(running, Running)
    yard.lot.end(running)


def test_a_permit_is_handed_on_in_the_order_in_which_they_came(yard, all_end):
    gates = yard.gates(concurrency=2)
    first, second = yard.run("a", gates), yard.run("b", gates)
    for id in "cdefg":
        yard.park(id, gates)

    assert yard.pumped() == []
    yard.lot.end(first)
    (message,) = yard.pumped()
    assert message.id == "c"
    assert yard.pumped() == [], "one permit wakes one"
    third = yard.come(message, gates)
    yard.lot.end(third)
    messages = yard.pumped()
    assert ids_of(messages) == ["d"]
    yard.lot.end(second)
    more = yard.pumped()
    assert ids_of(more) == ["e"]
    for message in [*messages, *more]:
        yard.lot.end(yard.come(message, gates))
    assert yard.drain(lambda _: gates) == ["f", "g"]


def test_a_newcomer_does_not_overtake_those_who_wait(yard, all_end):
    """Also while the permit lies there, because no pump listens."""
    yard.ears.disconnect()
    yard.ears.can_read = lambda timeout: False
    eventually(lambda: yard.client.pubsub_numsub(yard.lot.keys.channel)[0][1] == 0, "nobody listens")
    gates = yard.gates(lock="a")
    running = yard.run("a", gates)
    yard.park("b", gates)
    yard.lot.end(running)

    yard.park("c", gates)
    assert yard.drain(lambda _: gates) == ["b", "c"]


def test_between_keys_they_go_by_turns_and_within_a_key_as_they_came(yard, all_end):
    """A tenant that sends a hundred does not keep one that sends two waiting for a hundred."""

    def gates(tenant):
        return yard.gates("k", tenant, lock="a", fair="{tenant}")

    running = yard.run("first", gates("none"))
    sent = [("big", n) for n in range(20)] + [("small", n) for n in range(3)] + [("other", n) for n in range(2)]
    for tenant, n in sent:
        yard.park(f"{tenant}-{n:02}", gates(tenant))
    yard.lot.end(running)
    ran = [id.split("-") for id in yard.drain(lambda id: gates(id.split("-")[0]))]

    assert len(ran) == len(sent)
    for tenant in ("big", "small", "other"):
        own = [n for who, n in ran if who == tenant]
        assert own == sorted(own)
    assert max(place for place, (who, _) in enumerate(ran) if who != "big") < 3 + 3 + 2
    for turn in range(2):
        assert {who for who, _ in ran[3 * turn : 3 * turn + 3]} == {"big", "small", "other"}


def test_a_key_that_comes_late_begins_with_the_others_and_not_before_them(yard, all_end):
    """What a key did not use while it was away is not saved up."""

    def gates(tenant):
        return yard.gates("k", tenant, lock="a", fair="{tenant}")

    running = yard.run("first", gates("none"))
    for n in range(10):
        yard.park(f"old-{n}", gates("old"))
    yard.lot.end(running)
    ran = []
    for _ in range(5):
        (message,) = yard.pumped()
        running = yard.come(message, gates("old"))
        ran.append(message.id)
        yard.lot.end(running)
    for n in range(3):
        yard.park(f"new-{n}", gates("new"))
    ran += yard.drain(lambda id: gates(id.split("-")[0]))

    places = [ran.index(f"new-{n}") for n in range(3)]
    assert places == sorted(places)
    assert places[0] >= 5
    assert places[2] - places[0] >= 4, "they take turns with the others"


def test_several_locks_are_held_all_or_none(yard, all_end):
    both = yard.gates(lock=["a", "b"])
    holder = yard.run("holder", yard.gates(lock="b"))
    parked = yard.park("both", both)

    assert parked.by == both[1]
    assert yard.is_free("a")
    yard.lot.end(holder)
    assert yard.drain(lambda _: both) == ["both"]


def test_who_was_handed_one_lock_gives_it_back_while_it_waits_for_the_other(yard, all_end):
    """Or two tasks would hold one each, and wait for the other one for ever."""
    ab, ba = yard.gates(lock=["a", "b"]), yard.gates(lock=["b", "a"])
    on_a, on_b = yard.run("on a", yard.gates(lock="a")), yard.run("on b", yard.gates(lock="b"))
    yard.park("ab", ab)
    yard.park("ba", ba)
    yard.lot.end(on_a)
    (message,) = yard.pumped()
    again = yard.come(message, ab)

    assert again == Parked(ab[1], again.wait_s)
    assert yard.is_free("a")
    yard.lot.end(on_b)
    assert sorted(yard.drain(lambda id: {"ab": ab, "ba": ba}[id])) == ["ab", "ba"]


def test_who_was_parked_anew_waits_in_front_of_who_never_ran(yard, all_end):
    ab, b = yard.gates(lock=["a", "b"]), yard.gates(lock="b")
    on_a, on_b = yard.run("on a", yard.gates(lock="a")), yard.run("on b", b)
    yard.park("ab", ab)
    yard.park("newer 1", b)
    yard.park("newer 2", b)
    yard.lot.end(on_a)
    (message,) = yard.pumped()
    assert isinstance(yard.come(message, ab), Parked)
    yard.lot.end(on_b)

    assert yard.drain(lambda id: ab if id == "ab" else b) == ["ab", "newer 1", "newer 2"]


def test_resizing_the_semaphore_wakes_those_who_fit(yard, all_end):
    gates = yard.gates(concurrency=Concurrency(1, name=f"{yard.name}:s"))
    running = [yard.run("a", gates)]
    for id in "bcd":
        yard.park(id, gates)
    Semaphore(yard.redis, f"{yard.name}:s", permits=1).resize(3)
    messages = yard.patiently(2)
    assert ids_of(messages) == ["b", "c"]
    running += [yard.come(message, gates) for message in messages]
    assert all(isinstance(one, Running) for one in running)
    for one in running:
        yard.lot.end(one)
    assert yard.drain(lambda _: gates) == ["d"]


def test_what_is_handed_to_a_task_that_never_comes_is_handed_on_after_its_lease(yard):
    """Its message was lost. Nobody waits for it longer than for a process that died."""
    gates = yard.gates(lock="a")
    running = yard.run("a", gates, lease_ms=200)
    yard.park("lost", gates, lease_ms=200)
    yard.park("next", gates, lease_ms=200)
    yard.lot.end(running)
    assert ids_of(yard.pumped()) == ["lost"]

    (message,) = yard.patiently()
    assert message.id == "next"
    yard.lot.end(yard.come(message, gates))


# Rates


def test_who_is_refused_is_charged_nothing(yard, all_end):
    """Permits are asked before tokens, and nothing is taken unless all agree."""
    rate = Rate(RateLimit("5/h", burst=5), name=f"{yard.name}.r")
    gates = yard.gates(lock="a", rate=rate)
    hold = yard.lock("a").try_acquire()
    for id in "abc":
        yard.park(id, gates)

    assert yard.client.exists(gates[1].state) == 0
    hold.release()
    (message,) = yard.patiently()
    yard.lot.end(yard.come(message, gates))
    assert yard.drain(lambda _: gates) == ["b", "c"]
    left = RateLimiter(yard.redis, f"{yard.name}.r", [rate.limit]).peek("all")
    assert left.remaining == 2


def test_a_rate_that_refuses_takes_no_permit(yard):
    gates = yard.gates(lock="a", rate="1/h")
    running = yard.run("a", gates)
    yard.lot.end(running)
    parked = yard.park("b", gates)

    assert parked.by == gates[1]
    assert 3_500 < parked.wait_s <= 3_600
    assert yard.is_free("a")


def test_a_rate_wakes_each_when_its_token_is_there(yard, all_end):
    """Not earlier, so that no token is missing when they come, and in their order."""
    gates = yard.gates(rate=Rate(RateLimit("4/s", burst=1)))
    starts = [yard.run("0", gates).now_us]
    for n in range(1, 4):
        yard.park(str(n), gates)
    order = []
    while len(order) < 3:
        for message in yard.patiently():
            running = yard.come(message, gates)
            assert isinstance(running, Running)
            starts.append(running.now_us + int(running.wait_s * 1e6))
            order.append(message.id)
            yard.lot.end(running)

    yard.lot.end(Running(Attempt("0", 0), "-", tuple(gates), 0, 0, (), 0, 0))
    assert yard.crashed("0.0")
    assert order == [str(n) for n in range(1, 4)]
    assert all(after - before >= 250_000 for before, after in pairwise(starts))


def test_a_task_that_may_run_in_a_moment_waits_in_its_worker(yard, all_end):
    """To park it would take as long."""
    gates = yard.gates(rate=Rate(RateLimit("100/s", burst=1)))
    running = [yard.run("a", gates), yard.run("b", gates)]

    assert 0 <= running[1].wait_s <= 0.01
    for one in running:
        yard.lot.end(one)


def test_a_cost_counts_in_the_line_too(yard, all_end):
    """Who is first and costs much is not overtaken by who costs little."""

    def gates(cost):
        return yard.gates("k", "t", cost, rate=Rate(RateLimit("100/s", burst=10), cost="{cost}"))

    yard.lot.end(yard.run("all", gates(10)))
    yard.park("dear", gates(10))
    yard.park("cheap", gates(1))
    messages = yard.patiently(2)
    assert ids_of(messages) == ["dear", "cheap"]
    for message, cost in zip(messages, (10, 1), strict=True):
        yard.lot.end(yard.come(message, gates(cost)))


def test_a_rate_that_is_blocked_wakes_nobody_until_it_is_not(yard, all_end):
    rate = Rate(RateLimit("100/s"), name=f"{yard.name}.r")
    gates = yard.gates(rate=rate)
    limiter = RateLimiter(yard.redis, f"{yard.name}.r", [rate.limit])
    limiter.block("all", 0.2)
    parked = yard.park("a", gates)

    assert 0.0 < parked.wait_s <= 0.2
    (message,) = yard.patiently()
    running = yard.come(message, gates)
    assert isinstance(running, Running)
    assert running.wait_s <= 0.025
    yard.lot.end(running)


def test_who_waits_for_a_time_keeps_the_lock_that_it_was_handed(yard):
    """It is the next one in any case; and a lock that it gave back it would have to wait for anew."""
    rate = Rate(RateLimit("3/m", burst=1))
    gates = yard.gates(lock="a", rate=rate)
    hold = yard.lock("a").try_acquire()
    yard.park("a", gates)
    yard.lot.end(yard.run("other", yard.gates(rate=rate)))
    hold.release()
    (message,) = yard.patiently()
    parked = yard.come(message, gates)

    assert parked.by == gates[1]
    assert not yard.is_free("a")
    (seen,) = yard.lock("a").inspect().holders
    assert seen.lease_left > 40


def test_who_waits_for_longer_than_a_lease_keeps_no_lock(yard):
    """Others, web processes among them, would wait for hours for somebody who does nothing."""
    gates = yard.gates(lock="a", rate="1/h")
    hold = yard.lock("a").try_acquire()
    yard.park("a", gates)
    yard.lot.end(yard.run("other", yard.gates(rate="1/h")))
    hold.release()
    (message,) = yard.patiently()
    parked = yard.come(message, gates)

    assert parked.by == gates[1]
    assert yard.is_free("a")


@pytest.mark.parametrize("verdict", ["x", "d"])
def test_who_is_told_to_end_while_it_keeps_a_lock_gives_it_back(yard, verdict):
    """Revoked, expired or dropped: nobody waits an hour for who does not come."""
    gates = yard.gates(lock="a", rate="1/h", max_parked=1, when_full="drop_oldest")
    only_rate = yard.gates(rate="1/h", max_parked=1, when_full="drop_oldest")
    hold = yard.lock("a").try_acquire()
    yard.park("a", gates)
    yard.lot.end(yard.run("other", only_rate))
    hold.release()
    (message,) = yard.patiently()
    assert isinstance(yard.come(message, gates), Parked)
    if verdict == "x":
        assert yard.lot.wake("a", "x")
    else:
        yard.park("newer", only_rate)

    (message,) = yard.patiently()
    assert message.verdict == verdict
    if verdict == "d":
        assert yard.come(message, gates) == Verdict("d")
    else:
        yard.lot.revoked(Attempt("a", 0), gates)  # by the worker that got it
    assert yard.is_free("a")


# Deliveries that come twice, late or never


def test_a_second_delivery_waits_until_the_first_has_ended_and_is_no_more_then(yard, all_end):
    """The broker delivered it anew, while it runs: it does not run beside itself."""
    gates = yard.gates(lock="a")
    running = yard.run("a", gates)
    twin = yard.park("a", gates)

    assert twin.by is None
    assert isinstance(yard.ask("a", gates), Stale), "one twin is enough"
    assert yard.pumped() == []
    assert yard.lot.end(running)
    assert yard.pumped() == []
    assert yard.is_free("a")


def test_a_second_delivery_runs_when_the_first_has_died(yard, all_end):
    gates = yard.gates(lock="a")
    yard.run("a", gates)
    yard.park("a", gates)
    assert yard.crashed("a.0")

    (message,) = yard.pumped()
    running = yard.come(message, gates)
    assert isinstance(running, Running)
    yard.lot.end(running)


def test_a_second_delivery_runs_when_nobody_renews_the_first(yard, all_end):
    """The whole worker has died: after its lease."""
    gates = yard.gates(lock="a")
    yard.run("a", gates, lease_ms=150)
    yard.park("a", gates, lease_ms=150)

    (message,) = yard.patiently()
    running = yard.come(message, gates)
    assert isinstance(running, Running)
    yard.lot.end(running)


def test_a_second_delivery_that_may_not_be_parked_is_refused(yard, all_end):
    gates = yard.gates(lock="a")
    running = yard.run("a", gates)

    refused = yard.ask("a", gates, record=None)
    assert refused == Refused(None, refused.retry_after)
    assert refused.retry_after > 0
    yard.lot.end(running)


def test_who_waits_is_not_parked_twice(yard, all_end):
    """The reply was lost, or the broker delivered it anew: it keeps its place, and one message is sent."""
    gates = yard.gates(lock="a")
    running = yard.run("a", gates)
    for id in "bc":
        yard.park(id, gates)

    assert yard.ask("b", gates) == Stale()
    yard.lot.end(running)
    assert yard.drain(lambda _: gates) == ["b", "c"]


def test_an_admission_whose_reply_was_lost_does_not_run_beside_the_next_attempt_to_ask(yard, all_end):
    """Nobody runs it: so the second one runs when the lease of the first is over."""
    gates = yard.gates(lock="a", rate="2/h")
    lost = yard.run("a", gates, lease_ms=150)
    assert yard.ask("a", gates, lease_ms=150) == Parked(None, 0.0)

    (message,) = yard.patiently()
    running = yard.come(message, gates)
    assert isinstance(running, Running)
    assert not yard.lot.end(lost), "what it holds now is another one's"
    assert not yard.is_free("a")
    assert yard.lot.end(running)


def test_a_message_is_good_for_one_admission(yard, all_end):
    """The broker may deliver it twice, or after it was parked anew."""
    ab = yard.gates(lock=["a", "b"])
    on_a, on_b = yard.run("on a", yard.gates(lock="a")), yard.run("on b", yard.gates(lock="b"))
    yard.park("it", ab)
    yard.lot.end(on_a)
    (first,) = yard.pumped()
    assert isinstance(yard.come(first, ab), Parked)

    assert yard.come(first, ab) == Stale()
    yard.lot.end(on_b)
    (second,) = yard.pumped()
    assert second.generation == first.generation + 1
    assert yard.come(first, ab) == Stale()
    running = yard.come(second, ab)
    assert isinstance(running, Running)
    assert yard.come(second, ab) == Stale()
    yard.lot.end(running)
    assert yard.come(second, ab) == Stale()


def test_a_message_that_was_made_up_finds_nothing(yard, all_end):
    assert yard.ask("nobody", yard.gates(lock="a"), generation=3) == Stale()
    assert yard.is_free("a")


def test_a_retry_is_another_attempt(yard, all_end):
    gates = yard.gates(lock="a")
    running = yard.run("a", gates)
    retried = yard.park("a", gates, retries=1)

    assert retried.by == gates[0], "it waits for the lock like any other, not for its twin"
    yard.lot.end(running)
    (message,) = yard.pumped()
    assert message.token == "a.1"
    yard.lot.end(yard.come(message, gates))


@pytest.mark.parametrize("id", ["report 7", " ", "a\tb\nc", "50%", "%20", "=x", "- -", "ü", "a.b.1"])
def test_an_id_may_be_any_text(yard, all_end, id):
    """Celery takes any; none is lost for its name."""
    gates, same = yard.gates(lock="a"), yard.gates(unique=Unique())
    running = yard.run("first", gates)
    yard.park(id, gates)
    yard.lot.end(running)
    assert [one.id for one in yard.lot.waiting()] == [id]
    (message,) = yard.pumped()
    running = yard.come(message, gates)
    assert running.attempt.id == message.id == id
    yard.lot.end(running)

    running = yard.run(id, same)
    yard.park("follows", same)
    yard.lot.end(running, verdict=f"j{id}")
    (message,) = yard.pumped()
    assert yard.come(message, same) == Verdict(f"j{id}")
    running = yard.run(id, gates)
    yard.park(id, gates)
    assert yard.crashed(running.attempt.token)
    assert yard.drain(lambda _: gates) == [id]


@pytest.fixture
def few_at_once(monkeypatch):
    """So many are told by one script."""
    monkeypatch.setattr(parking, "_MOST_TOLD", 3)
    monkeypatch.setattr(parking, "_MOST_AT_ONCE", 2)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 11])
def test_all_who_wait_for_a_result_have_it_however_many_they_are(yard, all_end, few_at_once, count):
    """No script tells more than some, so that none holds the server up."""
    gates = yard.gates(unique=Unique())
    running = yard.run("first", gates)
    ids = [f"{number:02}" for number in range(count)]
    for id in ids:
        yard.park(id, gates)
    yard.lot.end(running, verdict="jfirst")

    told = []
    while len(told) < count:
        woken = yard.pumped()
        assert woken
        told += [(one.id, yard.come(one, gates)) for one in woken]
    assert told == [(id, Verdict("jfirst")) for id in ids]


def test_one_who_comes_while_many_are_told_is_told_nothing_and_runs(yard, all_end, few_at_once):
    """He was sent when the result was there: it may be too old for him."""
    gates = yard.gates(unique=Unique())
    running = yard.run("first", gates)
    for id in "abcdefg":
        yard.park(id, gates)
    yard.lot.end(running, verdict="jfirst")
    yard.park("late", gates)
    yard.park("later", gates)

    told = {}
    while len(told) < 8:
        told |= {one.id: yard.come(one, gates) for one in yard.pumped()}
    late = told.pop("late")
    assert told == dict.fromkeys("abcdefg", Verdict("jfirst"))
    assert isinstance(late, Running)
    yard.lot.end(late, verdict="jlate")
    (message,) = yard.pumped()
    assert (message.id, yard.come(message, gates)) == ("later", Verdict("jlate"))


def test_who_was_sent_and_never_came_is_sent_again(yard, all_end, monkeypatch):
    monkeypatch.setattr(parking, "_SEND_AGAIN_MS", 20)
    gates = yard.gates(lock="a")
    running = yard.run("a", gates)
    yard.park("b", gates)
    yard.lot.end(running)
    (message,) = yard.pumped()

    (again,) = yard.patiently()
    assert again == message._replace(again=True)
    running = yard.come(again, gates)
    assert isinstance(running, Running)
    assert yard.come(message, gates) == Stale()
    yard.lot.end(running)


def test_who_was_sent_came_and_was_parked_anew_is_not_taken_for_one_that_has_expired(yard, all_end, monkeypatch):
    """The time after which it would be sent again is not the time at which it expires."""
    monkeypatch.setattr(parking, "_SEND_AGAIN_MS", 20)
    ab = yard.gates(lock=["a", "b"])
    on_a, on_b = yard.run("on a", yard.gates(lock="a")), yard.run("on b", yard.gates(lock="b"))
    yard.park("it", ab)
    yard.lot.end(on_a)
    (first,) = yard.pumped()
    assert isinstance(yard.come(first, ab), Parked)

    assert yard.client.zscore(yard.lot.keys.due, "=it") is None
    yard.lot.end(on_b)
    (second,) = yard.pumped()
    assert second.verdict == "-"
    yard.lot.end(yard.come(second, ab))


def test_what_is_noted_as_sent_is_what_was_sent_and_nothing_newer(yard, all_end):
    """It came, and was parked anew, before the pump could note it."""
    ab = yard.gates(lock=["a", "b"])
    on_a, on_b = yard.run("on a", yard.gates(lock="a")), yard.run("on b", yard.gates(lock="b"))
    yard.park("it", ab)
    yard.lot.end(on_a)
    for line, definition in yard.lot.next().lines:
        yard.lot.serve(line, Served.read(definition))
    (woken,) = yard.lot.next().woken
    assert isinstance(yard.come(woken, ab), Parked)
    yard.lot.end(on_b)
    for line, definition in yard.lot.next().lines:
        yard.lot.serve(line, Served.read(definition))
    yard.lot.sent([woken], forget=[True])

    assert [(one.id, one.woken) for one in yard.lot.waiting()] == [("it", True)]
    assert yard.drain(lambda _: ab) == ["it"]


# Verdicts


def test_a_task_that_expires_in_its_line_is_woken_to_be_told_so(yard, all_end):
    gates = yard.gates(lock="a")
    running = yard.run("a", gates)
    yard.park("b", gates, expires_us=30_000)
    yard.park("c", gates, expires_us=HOUR_US)

    (message,) = yard.patiently()
    assert (message.id, message.verdict) == ("b", "x")
    assert [one.id for one in yard.lot.waiting()] == ["c"]
    yard.lot.end(running)
    assert yard.drain(lambda _: gates) == ["c"]


def test_a_task_is_revoked_out_of_its_turn(yard, all_end):
    gates = yard.gates(lock="a")
    running = yard.run("a", gates)
    for id in "bcd":
        yard.park(id, gates)

    assert yard.lot.wake("c", "x")
    assert not yard.lot.wake("nobody", "x")
    (message,) = yard.pumped()
    assert (message.id, message.verdict) == ("c", "x")
    assert yard.come(message, gates) == Stale()
    yard.lot.end(running)
    assert yard.drain(lambda _: gates) == ["b", "d"]


def test_the_last_of_a_line_may_be_revoked(yard, all_end):
    """The line has no place any more in the queue of the lock, and a holder that waits gets it."""
    gates = yard.gates(lock="a")
    running = yard.run("a", gates)
    yard.park("b", gates)
    assert yard.lot.wake("b", "x")
    assert [one.verdict for one in yard.pumped()] == ["x"]

    assert yard.lock("a").inspect().waiting == ()
    yard.lot.end(running)
    assert yard.is_free("a")


def test_those_who_wait_for_a_result_are_told_when_it_is_there(yard, all_end):
    gates = yard.gates(unique=Unique())
    running = yard.run("a", gates)
    for id in "bcd":
        yard.park(id, gates)
    yard.lot.end(running, verdict="ja")

    messages = yard.pumped()
    assert sorted(ids_of(messages)) == ["b", "c", "d"]
    assert [yard.come(message, gates) for message in messages] == [Verdict("ja")] * 3
    yard.lot.end(yard.run("e", gates))  # the next call is a call of its own


def test_where_the_first_one_fails_the_next_one_runs(yard, all_end):
    gates = yard.gates(unique=Unique())
    running = yard.run("a", gates)
    for id in "bc":
        yard.park(id, gates)
    yard.lot.end(running)

    (message,) = yard.pumped()
    second = yard.come(message, gates)
    assert isinstance(second, Running)
    assert message.id == "b"
    yard.lot.end(second, verdict="jb")
    (message,) = yard.pumped()
    assert yard.come(message, gates) == Verdict("jb")


def test_who_was_woken_to_run_is_not_told_a_result(yard, all_end):
    """A permit that was handed to it is its own; it runs, or is told by the one after it."""
    gates = yard.gates(unique=Unique())
    running = yard.run("a", gates)
    yard.park("b", gates)
    yard.lot.end(running)
    (message,) = yard.pumped()
    assert not yard.lot.end(running, verdict="ja")

    running = yard.come(message, gates)
    assert isinstance(running, Running)
    yard.lot.end(running)


# Full lines


@pytest.mark.parametrize(("when_full", "dropped"), [("reject", False), ("drop_newest", True)])
def test_one_more_than_may_wait_is_turned_away(yard, all_end, when_full, dropped):
    gates = yard.gates(lock="a", max_parked=2, when_full=when_full)
    running = yard.run("a", gates)
    for id in "bc":
        yard.park(id, gates)

    assert yard.ask("d", gates) == Full(gates[0], dropped)
    yard.lot.end(running)
    assert yard.drain(lambda _: gates) == ["b", "c"]


def test_the_oldest_is_dropped_for_one_more(yard, all_end):
    gates = yard.gates(lock="a", max_parked=2, when_full="drop_oldest")
    running = yard.run("a", gates)
    for id in "bcde":
        yard.park(id, gates)

    told = yard.pumped()
    assert [(message.id, message.verdict) for message in told] == [("b", "d"), ("c", "d")]
    assert [yard.come(message, gates) for message in told] == [Verdict("d")] * 2
    yard.lot.end(running)
    assert yard.drain(lambda _: gates) == ["d", "e"]


def test_who_comes_back_is_not_turned_away(yard, all_end):
    """It was let in once, and has its place."""
    ab, b = yard.gates(lock=["a", "b"], max_parked=1), yard.gates(lock="b", max_parked=1)
    on_a, on_b = yard.run("on a", yard.gates(lock="a")), yard.run("on b", b)
    yard.park("ab", ab)
    yard.park("b", b)
    yard.lot.end(on_a)
    (message,) = yard.pumped()

    assert isinstance(yard.come(message, ab), Parked)
    yard.lot.end(on_b)
    assert yard.drain(lambda id: ab if id == "ab" else b) == ["ab", "b"]


@pytest.mark.parametrize(("on_conflict", "dropped"), [("drop", True), ("raise", False)])
def test_where_none_may_wait_a_second_one_is_told_at_once(yard, all_end, on_conflict, dropped):
    gates = yard.gates(unique=Unique(on_conflict=on_conflict))
    running = yard.run("a", gates)

    assert yard.ask("b", gates) == Full(gates[0], dropped)
    yard.lot.end(running)


def test_one_runs_and_the_newest_waits(yard, all_end):
    gates = yard.gates(unique=Unique(on_conflict="replace"))
    running = yard.run("a", gates)
    for id in "bcd":
        yard.park(id, gates)

    told = yard.pumped()
    assert [(message.id, message.verdict) for message in told] == [("b", "d"), ("c", "d")]
    assert [yard.come(message, gates) for message in told] == [Verdict("d")] * 2
    yard.lot.end(running)
    assert yard.drain(lambda _: gates) == ["d"]


def test_who_may_not_be_parked_is_refused_and_leaves_nothing(yard, all_end):
    gates = yard.gates(lock="a")
    running = yard.run("a", gates)

    refused = yard.ask("b", gates, record=None)
    assert refused == Refused(gates[0], refused.retry_after)
    assert 0 < refused.retry_after <= 30
    assert [one.id for one in yard.lot.waiting()] == []
    yard.lot.end(running)


# Claims


def claim_of(yard, gates):
    (claim,) = [gate for gate in gates if gate.kind == "c"]
    permits = [gate for gate in gates if gate.lock and gate.lock[0] == "unique"]
    return {"claim": claim.state, "state": permits[0].state if permits else keys.turn("unique", yard.name)}


def test_a_claim_is_one_call_s(yard):
    gates = yard.gates(unique=Unique(until="end"))
    claim = claim_of(yard, gates)

    assert yard.lot.claim(**claim, id="a", ttl_ms=60_000, replace=False) == ""
    assert yard.lot.claim(**claim, id="a", ttl_ms=60_000, replace=False) == "", "it may ask again"
    assert yard.lot.claim(**claim, id="b", ttl_ms=60_000, replace=False) == "a"
    assert not yard.lot.unclaim(claim["claim"], "b")
    assert yard.lot.unclaim(claim["claim"], "a")
    assert yard.lot.claim(**claim, id="b", ttl_ms=60_000, replace=False) == ""
    assert yard.lot.unclaim(claim["claim"], "b")


def test_who_runs_has_the_claim_until_it_has_ended(yard, all_end):
    gates = yard.gates(unique=Unique(until="end", on_conflict="drop"))
    claim = claim_of(yard, gates)
    yard.lot.claim(**claim, id="a", ttl_ms=60_000, replace=False)
    running = yard.run("a", gates)

    assert yard.lot.claim(**claim, id="b", ttl_ms=60_000, replace=False) == "a"
    yard.lot.end(running)
    assert yard.lot.claim(**claim, id="b", ttl_ms=60_000, replace=False) == ""
    yard.lot.unclaim(claim["claim"], "b")


def test_a_claim_until_the_start_ends_with_the_start(yard, all_end):
    gates = yard.gates(unique=Unique(until="start", on_conflict="drop"))
    claim = claim_of(yard, gates)
    yard.lot.claim(**claim, id="a", ttl_ms=60_000, replace=False)
    running = yard.run("a", gates)

    assert yard.lot.claim(**claim, id="b", ttl_ms=60_000, replace=False) == ""
    second = yard.run("b", gates)
    for one in (running, second):
        yard.lot.end(one)


@pytest.mark.parametrize(("on_conflict", "told"), [("join", "ja"), ("drop", None), ("raise", None), ("replace", None)])
def test_a_call_whose_claim_is_another_one_s_is_told_at_once(yard, all_end, on_conflict, told):
    gates = yard.gates(unique=Unique(until="10m", on_conflict=on_conflict))
    claim = claim_of(yard, gates)
    yard.lot.claim(**claim, id="a", ttl_ms=60_000, replace=False)

    outcome = yard.ask("b", gates)
    if told:
        assert outcome == Verdict(told)
    else:
        assert outcome == Full(gates[0], on_conflict != "raise")
    yard.lot.unclaim(claim["claim"], "a")


def test_a_call_that_was_replaced_while_it_waited_gives_back_what_it_was_handed(yard, all_end):
    """It has lost its claim; the lock that was handed to it is the next one's, at once."""
    gates = yard.gates(lock="a", unique=Unique(until="start", on_conflict="replace"))
    claim = claim_of(yard, gates)
    hold = yard.lock("a").try_acquire()
    yard.lot.claim(**claim, id="old", ttl_ms=60_000, replace=True)
    yard.park("old", gates)
    hold.release()
    (message,) = yard.patiently()
    assert not yard.is_free("a")
    yard.lot.claim(**claim, id="new", ttl_ms=60_000, replace=True)

    assert yard.come(message, gates) == Full(gates[0], dropped=True)
    assert yard.is_free("a")
    yard.lot.end(yard.run("new", gates))


# Pauses


def test_after_a_pause_the_newest_runs_and_the_others_end(yard, all_end):
    gates = yard.gates(debounce=0.1)
    for id in "abc":
        yard.park(id, gates)

    told = yard.patiently(3)
    assert [(message.id, message.verdict) for message in told] == [("a", "d"), ("b", "d"), ("c", "-")]
    assert [yard.come(message, gates) for message in told[:2]] == [Verdict("d")] * 2
    running = yard.come(told[2], gates)
    assert isinstance(running, Running)
    yard.lot.end(running)


def test_each_call_puts_the_pause_off_until_the_longest_is_over(yard, all_end):
    gates = yard.gates(debounce=Pause("1h", longest="90m"))
    yard.park("a", gates)
    (first,) = yard.client.zrange(yard.lot.keys.due, 0, -1, withscores=True)
    yard.park("b", gates)
    (second,) = yard.client.zrange(yard.lot.keys.due, 0, -1, withscores=True)
    assert second[1] > first[1]

    since_us = first[1] - HOUR_US
    yard.client.hset(
        yard.lot.keys.order(gates[0].state), "since", f"{since_us - HOUR_US * 5 / 4:.0f}"
    )  # it began long ago
    yard.park("c", gates)
    (third,) = yard.client.zrange(yard.lot.keys.due, 0, -1, withscores=True)
    assert third[1] == pytest.approx(since_us + HOUR_US / 4, abs=2)
    yard.client.zadd(yard.lot.keys.due, {yard.lot.keys.line(gates[0].state): 1})
    told = yard.pumped()
    assert [(message.id, message.verdict) for message in told] == [("a", "d"), ("b", "d"), ("c", "-")]
    for message in told:
        outcome = yard.come(message, gates)
        if isinstance(outcome, Running):
            yard.lot.end(outcome)


# Leases


def test_what_runs_is_renewed_with_all_that_it_holds(yard, all_end):
    gates = yard.gates(lock=["a", "b"], rate="9/s")
    running = yard.run("a", gates, lease_ms=300)
    found = yard.lot.running([running.attempt.token])
    assert (found["a.0"].pid, found["a.0"].nonce) == (os.getpid(), running.nonce)
    found["a.0"] = found["a.0"]._replace(lease_ms=600_000)

    assert yard.lot.renew(found) == []
    assert yard.client.pttl(yard.lot.keys.run("a.0")) > 500_000
    for lock in "ab":
        (seen,) = yard.lock(lock).inspect().holders
        assert seen.lease_left > 500
    yard.lot.end(running)


@pytest.mark.parametrize("lost", ["run", "lock"])
def test_an_attempt_that_has_lost_something_is_named(yard, lost):
    kept, other = yard.run("kept", yard.gates(lock="a")), yard.run("other", yard.gates(lock="b"))
    found = yard.lot.running(["kept.0", "other.0", "nobody.0"])
    assert found.keys() == {"kept.0", "other.0"}
    if lost == "run":
        yard.client.delete(yard.lot.keys.run("other.0"))
    else:
        yard.lock("b").force_release()

    assert yard.lot.renew(found) == ["other.0"]
    for one in (kept, other):
        yard.lot.end(one)
    assert yard.left() == []


def test_asking_for_nothing_asks_nobody(yard):
    assert yard.lot.running([]) == {}
    assert yard.lot.renew({}) == []


@pytest.mark.parametrize(
    "text", ["", "x", "n []", "n [1]", "n null", 'n ["h",1,1,[[1]]]', 'n ["h","p",1,[]]', "n {", "\xff"]
)
def test_what_was_not_written_by_us_is_no_running_attempt(yard, text):
    yard.client.set(yard.lot.keys.run("a.0"), text.encode("latin-1"), ex=60)

    assert yard.lot.running(["a.0"]) == {}
    assert not yard.crashed("a.0")


def test_what_an_attempt_held_whose_process_died_is_handed_on_at_once(yard, all_end):
    """By a worker's main process, which knows only the id; and not twice."""
    gates = yard.gates(lock="a", concurrency=1)
    yard.run("a", gates)
    yard.park("b", gates)
    assert not yard.crashed("b.0"), "it does not run"
    assert not yard.crashed("a.1"), "another attempt"

    assert yard.crashed("a.0")
    assert not yard.crashed("a.0")
    assert yard.drain(lambda _: gates) == ["b"]


def test_an_end_that_is_repeated_takes_nothing_from_the_next(yard, all_end):
    gates = yard.gates(lock="a")
    first = yard.run("a", gates)
    assert yard.lot.end(first)
    second = yard.run("b", gates)

    assert not yard.lot.end(first)
    assert not yard.is_free("a")
    assert yard.lot.end(second)


def test_the_end_of_a_delivery_does_not_end_the_one_that_runs_now(yard, all_end):
    """It was thought dead, and comes back after its twin has begun: the same token, another nonce."""
    gates = yard.gates(lock="a")
    first = yard.run("a", gates)
    yard.client.delete(yard.lot.keys.run("a.0"))
    yard.lock("a").force_release()
    second = yard.run("a", gates)

    assert not yard.lot.end(first)
    assert not yard.is_free("a")
    assert yard.lot.end(second)


# Those who look; and what may happen to a server


def test_what_waits_can_be_looked_at(yard, all_end):
    gates = yard.gates(lock="a")
    running = yard.run("a", gates)
    yard.park("b", gates, record=json.dumps({"task": "shop.charge", "args": [1]}).encode())
    yard.park("c", gates, record=b"no json", retries=2)
    seen = {one.id: one for one in yard.lot.waiting()}

    assert (seen["b"].task, seen["b"].retries, seen["b"].woken, seen["b"].line) == (
        "shop.charge",
        0,
        False,
        yard.lot.keys.line(gates[0].state),
    )
    assert (seen["c"].task, seen["c"].retries, seen["c"].record) == ("?", 2, {})
    assert yard.lot.counts() == {"parked": 2, f"lock '{yard.name}:a'": 2}
    assert sorted(yard.lot.among(["b", "c", "d"])) == ["b", "c"]
    assert yard.lot.among([]) == []
    yard.lot.end(running)
    assert yard.drain(lambda _: gates) == ["b", "c"]


def test_a_server_that_forgets_its_scripts_is_sent_them_again(yard, all_end):
    gates = yard.gates(lock="a", rate="9/s")
    for step in range(3):
        yard.client.script_flush()
        running = yard.run(f"a{step}", gates)
        yard.client.script_flush()
        yard.park(f"b{step}", gates)
        yard.client.script_flush()
        yard.lot.renew(yard.lot.running([running.attempt.token]))
        yard.client.script_flush()
        yard.lot.end(running)
        yard.client.script_flush()
        assert yard.drain(lambda _: gates) == [f"b{step}"]


def commands_of(client, do):
    """How many commands a server has done for something, inside of scripts too."""

    def counts():
        return Counter({name: told["calls"] for name, told in client.info("commandstats").items()})

    before = counts()
    do()
    return sum(((counts() - before) - Counter({"cmdstat_info": 1})).values())


def test_what_a_line_costs_does_not_grow_with_its_length(own_server, name):
    """Five thousand wait. Counted are the commands that the scripts give: with ten as with thousands."""
    server = own_server()
    with connect(settings=Settings(url=server.url)) as redis:
        yard, costs = Yard(redis, name), []
        yard.ears.disconnect()
        yard.ears.can_read = lambda timeout: False
        gates = yard.gates(lock="a", rate="1000000/s")
        turn = yard.run("first", gates)
        for start, end in ((0, 10), (10, 5_000)):
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda n: yard.park(f"id-{n:05}", gates), range(start, end)))
            cost = [commands_of(yard.client, lambda at=end: yard.park(f"more-{at}", gates))]
            messages = []
            cost.append(commands_of(yard.client, lambda: yard.lot.end(turn)))  # noqa: B023
            cost.append(commands_of(yard.client, lambda: messages.extend(yard.pumped())))  # noqa: B023
            outcomes = []
            cost.append(commands_of(yard.client, lambda: outcomes.append(yard.come(messages[0], gates))))  # noqa: B023
            turn = outcomes[0]
            assert isinstance(turn, Running)
            cost.append(commands_of(yard.client, lambda: yard.lot.wake(yard.lot.waiting(1)[0].id, "x")))
            yard.pumped()
            costs.append(cost)

        few, many = costs
        assert all(more <= less + 4 for less, more in zip(few, many, strict=True)), (few, many)
        assert len(yard.lot.waiting(10_000)) == 5_000 + 2 - 2 - 2


def hammered(url, name, processes, calls):
    """So many processes admit, hold, end and pump at once. What each has seen."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, str(HAMMER), url, name, str(number), str(calls), str(calls * processes)],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for number in range(processes)
    ]  # fmt: skip
    try:
        return [json.loads(process.communicate(timeout=300)[0]) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.parametrize("processes", [4, pytest.param(16, marks=pytest.mark.storm)])
def test_processes_that_hammer_one_lot_run_each_task_once_and_never_too_many(own_server, name, processes):
    """Permits are never exceeded, all run exactly once, and nothing is left."""
    server, calls = own_server(), 60
    seen = hammered(server.url, name, processes, calls)
    ran = Counter(id for one in seen for id in one["ran"])

    assert len(ran) == processes * calls
    assert set(ran.values()) == {1}
    assert max(one["most"] for one in seen) <= 3
    assert max(one["most_of_lock"] for one in seen) == 1
    with connect(settings=Settings(url=server.url)) as redis:
        yard = Yard(redis, name)
        yard.ears.disconnect()
        assert yard.left() == []
