"""The scripts of parked tasks against a small model, on a clock that the test turns, by any schedule.

The model knows permits: who runs, who waits in which line in what order, whom each change wakes. Rates are held against
what they promise: their bound, tokens only for who runs, first come first served, and that all run at last.
"""

import inspect
from dataclasses import dataclass, field
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from redis.exceptions import NoScriptError

from petiole.cachelib import EmbeddedServer, Settings, connect
from petiole.cachelib.scripts import HOLE, Script
from petiole.coordination import RateLimit, parking
from petiole.coordination.gates import Gates, Rate, Served
from petiole.coordination.parking import Attempt, Full, Parked, ParkingLot, Running, Stale, Verdict

CLOCKS = (
    'local time = redis.call("TIME")\n    return time[1] * 1000000 + time[2]',
    'local time = redis.call("TIME")\nlocal now = time[1] * 1000000 + time[2]\n',
)
OUR_CLOCKS = ("return tonumber(ARGV[#ARGV])", "local now = tonumber(ARGV[#ARGV])\n")
EXPIRY = "math.ceil(us / 1000)"
START_US = 1_700_000_000_000_000
LEASE_MS = 3_600_000
MICRO = 1_000_000


class OurScript(Script):
    """The same script on a clock that the test turns; rates are kept longer, for they expire on the server's."""

    def __init__(self, script, clock):
        text = script.text
        for theirs, own in zip(CLOCKS, OUR_CLOCKS, strict=True):
            text = text.replace(theirs, own)
        assert '"TIME"' not in text, "the scripts ask for the time in another way"
        # What stands behind the arguments that are counted would shift them.
        text = text.replace(EXPIRY, f"600000 + {EXPIRY}").replace("#ARGV /", "(#ARGV - 1) /")
        super().__init__(script.name, text, script.decode)
        self._clock = clock

    def request(self, values):
        return (*super().request(values), self._clock.now_us)

    def prepared(self, **values):
        request = self.request(values)[:-1]

        def filled(client, *holes):
            left = iter(holes)
            command = [next(left) if argument is HOLE else argument for argument in request]
            try:
                reply = client.execute_command("EVALSHA", self.sha, *command, self._clock.now_us)
            except NoScriptError:
                reply = client.execute_command("EVAL", self.text, *command, self._clock.now_us)
            return self.decode(reply)

        return filled


class Clock:
    now_us = START_US


@pytest.fixture(scope="module")
def clock():
    """All scripts go by it."""
    clock, patch = Clock(), pytest.MonkeyPatch()
    for name in ("_ADMIT", "_END", "_SERVE", "_NEXT", "_SENT", "_WAKE"):
        patch.setattr(parking, name, OurScript(getattr(parking, name), clock))
    yield clock
    patch.undo()


@pytest.fixture(scope="module")
def connections(redis_server: EmbeddedServer):
    with connect(settings=Settings(url=redis_server.url)) as connections:
        yield connections


def pumped(lot):
    """Do what is to be done now, as the pump does. What it has sent."""
    sent = []
    for _ in range(1_000):
        due = lot.next()
        for line, definition in due.lines:
            lot.serve(line, Served.read(definition))
        for id in due.tasks:
            lot.wake(id, "=")
        lot.sent(due.woken, forget=[one.verdict == "x" for one in due.woken])
        sent += due.woken
        if not (due.lines or due.tasks or due.woken):
            return sent
    raise AssertionError(f"there is always something to do: {due}")


def left(client, name):
    found = client.scan_iter(f"petiole:*{name}*", count=10_000)
    return sorted(key for key in found if b":parked" in key or b":order" in key or b":run:" in key)


# Permits: a model


@dataclass
class Line:
    """Those who wait for one permit: between keys by turns, within a key as they came; who came back in front."""

    scores: dict[str, int] = field(default_factory=dict)
    fairs: dict[str, str] = field(default_factory=dict)
    served: int = 0
    before: int = 0
    last: dict[str, int] = field(default_factory=dict)

    def join(self, id, fair, *, front):
        if front:
            self.before += 1
            self.scores[id] = self.served + self.before
        else:
            self.scores[id] = (max(self.served, self.last.get(fair, 0)) // MICRO + 1) * MICRO
            self.last[fair] = self.scores[id]
        self.fairs[id] = fair

    def leave(self, id, *, was_first):
        score, fair = self.scores.pop(id), self.fairs.pop(id)
        if not self.scores:
            self.__init__()
            return
        if self.last.get(fair) == score:
            del self.last[fair]
        if was_first:
            self.served = score

    @property
    def first(self):
        return min(self.scores, key=lambda id: (self.scores[id], id))


@dataclass
class Gate:
    capacity: int
    joins: bool
    most: int
    policy: str
    holders: dict[str, None] = field(default_factory=dict)  # in the order in which they were granted it
    line: Line = field(default_factory=Line)


@dataclass
class Known:
    mode: str
    generation: int
    gate: int | None
    verdict: str = "-"


class Model:
    """So many gates; who runs, and what is known of those who wait."""

    def __init__(self, gates):
        self.gates = gates
        self.waits = {}
        self.running = {}

    def admit(self, id, places, fair, generation):
        known = self.waits.get(id)
        if generation and not (known and known.generation == generation and known.mode != "q"):
            return "stale"
        if generation and known.verdict != "-":
            del self.waits[id]
            self.give_back(id)
            return known.verdict
        if not generation and known:
            return "stale"
        if id in self.running:
            self.waits[id] = Known("q", known.generation + 1 if known else 1, None)
            return "twin"
        refusing = next((place for place in places if not self.lets(place, id, generation)), None)
        if refusing is None:
            for place in places:
                gate = self.gates[place]
                if id not in gate.holders and len(gate.holders) >= gate.capacity:
                    del gate.holders[self.on_their_way(gate)[-1]]
                gate.holders.setdefault(id)
            self.running[id] = places
            self.waits.pop(id, None)
            return "runs"
        gate = self.gates[refusing]
        if not generation and 0 <= gate.most <= len(gate.line.scores):
            if gate.policy != "drop_oldest":
                return "full" if gate.policy == "reject" else "dropped"
            self.wake(gate.line.first, "d", was_first=True)
        self.give_back(id)
        gate.line.join(id, fair, front=bool(generation))
        self.waits[id] = Known("q", known.generation + 1 if known else 1, refusing)
        return f"parked at {refusing}"

    def on_their_way(self, gate):
        """Those that a permit is kept for."""
        return [id for id in gate.holders if id not in self.running]

    def lets(self, place, id, generation):
        gate = self.gates[place]
        free = len(gate.holders) < gate.capacity or bool(generation and self.on_their_way(gate))
        return id in gate.holders or (free and bool(generation or not gate.line.scores))

    def give_back(self, id):
        for gate in self.gates:
            gate.holders.pop(id, None)

    def wake(self, id, verdict, *, was_first):
        known = self.waits[id]
        if known.gate is not None:
            self.gates[known.gate].line.leave(id, was_first=was_first)
        known.mode, known.verdict = "w", verdict

    def end(self, id, told, *, crashed=False):
        for place in self.running.pop(id):
            gate = self.gates[place]
            gate.holders.pop(id, None)
            if gate.joins and told != "-" and not crashed:
                for follower in list(gate.line.scores):
                    self.wake(follower, told, was_first=False)
                gate.line = Line()
        twin = self.waits.get(id)
        if twin and twin.gate is None and twin.mode == "q":
            if crashed:
                twin.mode = "w"
            else:
                del self.waits[id]

    def revoke(self, id):
        known = self.waits.get(id)
        if known and known.mode == "q":
            self.wake(id, "x", was_first=False)

    def pump(self):
        """(id, generation, verdict) of each that is sent."""
        for gate in self.gates:
            while gate.line.scores and len(gate.holders) < gate.capacity:
                id = gate.line.first
                self.wake(id, "-", was_first=True)
                gate.holders.setdefault(id)
        sent = [(id, known.generation, known.verdict) for id, known in self.waits.items() if known.mode == "w"]
        for id, _, verdict in sent:
            if verdict == "x":
                del self.waits[id]
            else:
                self.waits[id].mode = "s"
        return sorted(sent)


def call(tenant):
    """The task."""


class Scripts:
    """The operations of the model, by the scripts."""

    def __init__(self, connections, gates):
        self.name = f"t{uuid4().hex[:12]}"
        self.lot = ParkingLot(connections, self.name)
        self.gates, self.running, self.gate_calls = gates, {}, {}

    def admit(self, id, places, fair, generation):
        outcome = self.lot.admit(Attempt(id, 0, generation), self.calls(places, fair), record=b"{}", lease_ms=LEASE_MS)
        match outcome:
            case Running():
                self.running[id] = outcome
                return "runs"
            case Parked(None):
                return "twin"
            case Parked(by):
                return f"parked at {by.lock[1].rpartition(':')[2]}"
            case Stale():
                return "stale"
            case Verdict(text):
                return text
            case Full(_, dropped):
                return "dropped" if dropped else "full"
        raise AssertionError(outcome)

    def calls(self, places, fair):
        calls = []
        for place in places:
            gate = self.gates[place]
            (one,) = Gates(
                f"{self.name}.task", inspect.signature(call), lock=f"{self.name}:{place}", fair="{tenant}",
                max_parked=None if gate.most < 0 else gate.most, when_full=gate.policy,
            ).of([fair], {})  # fmt: skip
            calls.append(replace(one, count=gate.capacity, joins=gate.joins))
        return calls

    def end(self, id, told, *, crashed=False):
        running = self.running.pop(id)
        if crashed:
            token = running.attempt.token
            assert self.lot.crashed(token, self.lot.running([token])[token])
        else:
            assert self.lot.end(running, verdict=told)

    def revoke(self, id):
        self.lot.wake(id, "x")

    def pump(self):
        return sorted((one.id, one.generation, one.verdict) for one in pumped(self.lot))

    def state(self):
        """What is known of those who wait, and how each line stands."""
        client, keys = self.lot.redis.coordination, self.lot.keys
        waits = {}
        for id, text in client.hgetall(keys.waits).items():
            mode, generation, _, _, _, verdict, line = text.decode().split(" ", 6)
            gate = None if line == "-" else int(self.lot.keys.state_of(line).removesuffix("}").rpartition(":")[2])
            waits[id.decode()] = Known(mode, int(generation), gate, verdict)
        lines = []
        for place in range(len(self.gates)):
            (one,) = self.calls([place], "t")
            lines.append([id.decode() for id in client.zrange(self.lot.keys.line(one.state), 0, -1)])
        return waits, lines


gates_of_a_model = st.lists(
    st.builds(
        Gate, st.integers(1, 2), st.booleans(), st.sampled_from([-1, -1, 1, 2]),
        st.sampled_from(["reject", "drop_oldest", "drop_newest"]),
    ),
    min_size=3, max_size=3,
)  # fmt: skip
some = st.integers(0, 1_000)
operations = st.one_of(
    st.tuples(
        st.just("send"), st.sampled_from([(0,), (0,), (0,), (1,), (0, 1), (1, 0), (0, 1, 2)]), st.sampled_from("xyz")
    ),
    st.tuples(st.just("send"), st.sampled_from([(0,), (0, 1)]), st.sampled_from("xyz")),
    st.tuples(st.just("end"), some, st.sampled_from(["-", "j"])),
    st.tuples(st.just("pump")),
    st.tuples(st.just("deliver"), some),
    st.tuples(st.just("again"), some),
    st.tuples(st.just("late"), some),
    st.tuples(st.just("crash"), some),
    st.tuples(st.just("revoke"), some),
    st.tuples(st.just("advance"), st.integers(0, MICRO)),
)


class Play:
    """One schedule, on both."""

    def __init__(self, connections, clock, gates):
        self.clock, self.gates = clock, gates
        self.model = Model([Gate(g.capacity, g.joins, g.most, g.policy) for g in gates])
        self.scripts = Scripts(connections, gates)
        self.tasks, self.post, self.delivered, self.ended = {}, [], [], {}

    def both(self, operation, *arguments, **keywords):
        expected = getattr(self.model, operation)(*arguments, **keywords)
        assert getattr(self.scripts, operation)(*arguments, **keywords) == expected, (operation, arguments)
        self.check()
        return expected

    def check(self):
        waits, lines = self.scripts.state()
        assert waits == self.model.waits
        ordered = [
            sorted(gate.line.scores, key=lambda id, g=gate: (g.line.scores[id], id)) for gate in self.model.gates
        ]
        assert lines == ordered
        for gate in self.model.gates:
            assert len(gate.holders) <= gate.capacity

    def arrive(self, id, generation):
        outcome = self.both("admit", id, *self.tasks[id], generation)
        if outcome in ("full", "dropped", "d", "j"):
            self.ended[id] = outcome

    def one_of(self, some, which):
        return sorted(some)[which % len(some)] if some else None

    def step(self, operation):
        match operation:
            case "send", places, fair:
                id = f"id-{len(self.tasks):03}"
                self.tasks[id] = (places, fair)
                self.arrive(id, 0)
            case "end", which, told:
                if id := self.one_of(self.model.running, which):
                    self.both("end", id, told)
                    assert id not in self.ended, "it has ended before"
                    self.ended[id] = "ran"
            case ("pump",):
                self.pump()
            case "deliver", which:
                if self.post:
                    message = self.post.pop(which % len(self.post))
                    self.delivered.append(message)
                    self.arrive(*message)
            case "again", which:  # by the broker, while it waits or runs
                if id := self.one_of({*self.model.waits, *self.model.running}, which):
                    self.arrive(id, 0)
            case "late", which:
                if self.delivered:
                    self.arrive(*self.delivered[which % len(self.delivered)])
            case "crash", which:
                if id := self.one_of(self.model.running, which):
                    if id not in self.model.waits:
                        self.arrive(id, 0)  # as the broker does, sooner or later
                    self.both("end", id, "-", crashed=True)
            case "revoke", which:
                if id := self.one_of(self.model.waits, which):
                    self.both("revoke", id)
            case "advance", by_us:
                self.clock.now_us += by_us

    def pump(self):
        for id, generation, verdict in self.both("pump"):
            if verdict == "x":
                if id not in self.model.running:
                    self.ended[id] = "revoked"
            else:
                self.post.append((id, generation))

    def finish(self):
        """Let all end. What was sent has run, or was told something."""
        for _ in range(10 * len(self.tasks) + 10):
            self.pump()
            while self.post:
                self.step(("deliver", 0))
            while self.model.running:
                self.step(("end", 0, "-"))
            if not self.model.waits:
                break
        assert self.model.waits == {}
        assert self.ended.keys() == self.tasks.keys(), "a task was lost"
        assert left(self.scripts.lot.redis.coordination, self.scripts.name) == []


def played(connections, clock, gates, schedule):
    play = Play(connections, clock, gates)
    try:
        for operation in schedule:
            play.step(operation)
        play.finish()
    finally:
        keys = list(connections.coordination.scan_iter(f"petiole:*{play.scripts.name}*", count=10_000))
        if keys:
            connections.coordination.unlink(*keys)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(gates=gates_of_a_model, schedule=st.lists(operations, max_size=40))
def test_permits_go_to_whom_the_model_says_in_its_order(connections, clock, gates, schedule):
    played(connections, clock, gates, schedule)


@pytest.mark.storm
@settings(max_examples=3_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(gates=gates_of_a_model, schedule=st.lists(operations, max_size=120))
def test_permits_go_to_whom_the_model_says_in_very_many_schedules(connections, clock, gates, schedule):
    played(connections, clock, gates, schedule)


# Rates: what they promise


LIMITS = [RateLimit("60/m", burst=1), RateLimit("60/m", burst=3), RateLimit("60/2m", burst=2)]
events = st.one_of(
    st.tuples(
        st.just("send"),
        st.sampled_from(["rate", "rate", "both", "two", "lock"]),
        st.sampled_from("xy"),
        st.integers(1, 3),
    ),
    st.tuples(st.just("end"), some),
    st.tuples(st.just("pump")),
    st.tuples(st.just("deliver"), some),
    st.tuples(st.just("advance"), st.sampled_from([1, 1_000, 20_000, 400_000, 1_000_000, 3_000_000])),
)


def rated(tenant, cost):
    """The task of the rates."""


class Rates:
    """Tasks with rates and a lock, and what is seen of them."""

    def __init__(self, connections, clock, limit, *, costs):
        self.name, self.clock, self.limit = f"t{uuid4().hex[:12]}", clock, limit
        self.lot, self.client = ParkingLot(connections, self.name), connections.coordination
        signature, cost = inspect.signature(rated), "{cost}" if costs else 1
        keyed, shared = Rate(limit, key="{tenant}", cost=cost), Rate(LIMITS[2], name=f"{self.name}.all")
        self.kinds = {
            "rate": Gates(f"{self.name}.a", signature, rate=keyed),
            "both": Gates(f"{self.name}.a", signature, rate=keyed, lock=f"{self.name}:l"),
            "two": Gates(f"{self.name}.a", signature, rate=[keyed, shared]),
            "lock": Gates(f"{self.name}.a", signature, lock=f"{self.name}:l"),
        }
        self.tasks, self.post, self.running, self.ran, self.woken, self.parked = {}, [], {}, [], [], {}
        self.paid_us, self.charges = {}, {}

    def arrive(self, id, generation):
        gates = self.tasks[id]
        outcome = self.lot.admit(Attempt(id, 0, generation), gates, record=b"{}", lease_ms=LEASE_MS)
        if isinstance(outcome, Running):
            assert id not in self.ran
            self.ran.append(id)
            self.running[id] = outcome
            start = self.clock.now_us + round(outcome.wait_s * MICRO)
            for gate in gates:
                if gate.kind == "g":
                    self.charges.setdefault(gate.state, (gate, []))[1].append((start, gate.amount))
                    self.paid_us[gate.state] = max(self.paid_us.get(gate.state, 0), start) + gate.amount * gate.span
        else:
            assert isinstance(outcome, Parked), outcome
            if not generation:
                self.parked.setdefault((outcome.by.state, outcome.by.fair), []).append(id)
        self.check()

    def check(self):
        """Tokens are charged to who runs, and to nobody else; at most one holds the lock."""
        for gates in self.tasks.values():
            for gate in gates:
                if gate.kind == "g":
                    stored = self.client.get(gate.state)
                    us = int(stored.split()[0]) if stored else 0
                    assert max(us, self.clock.now_us) == max(self.paid_us.get(gate.state, 0), self.clock.now_us)
        assert sum(any(gate.kind == "p" for gate in running.gates) for running in self.running.values()) <= 1

    def step(self, event):
        match event:
            case "send", kind, tenant, cost:
                id = f"id-{len(self.tasks):03}"
                self.tasks[id] = self.kinds[kind].of([tenant, min(cost, self.limit.burst)], {})
                self.arrive(id, 0)
            case "end", which:
                if self.running:
                    self.lot.end(self.running.pop(sorted(self.running)[which % len(self.running)]))
            case ("pump",):
                messages = pumped(self.lot)
                self.woken += [message.id for message in messages if message.generation == 1]
                self.post += [(message.id, message.generation) for message in messages]
            case "deliver", which:
                if self.post:
                    self.arrive(*self.post.pop(which % len(self.post)))
            case "advance", by_us:
                self.clock.now_us += by_us

    def finish(self):
        for _ in range(20 * len(self.tasks) + 20):
            self.step(("pump",))
            while self.post:
                self.step(("deliver", 0))
            while self.running:
                self.step(("end", 0))
            following = self.client.zrange(self.lot.keys.due, 0, 0, withscores=True)
            if following:
                self.clock.now_us = max(self.clock.now_us + 1_000, int(following[0][1]))
            if len(self.ran) == len(self.tasks):
                break
        assert sorted(self.ran) == sorted(self.tasks), "a task was lost"
        assert left(self.client, self.name) == []
        for waited in self.parked.values():
            first = [id for id in self.woken if id in waited]
            assert first == waited, "within a key first come first served"
        for gate, charges in self.charges.values():
            for begin, _ in charges:
                for end, _ in charges:
                    spent = sum(cost for start, cost in charges if begin <= start <= end)
                    assert end < begin or spent <= gate.limit.bound_us(end - begin + 1), "the rate was exceeded"


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(limit=st.sampled_from(LIMITS[:2]), costs=st.booleans(), schedule=st.lists(events, max_size=40))
def test_rates_charge_who_runs_and_wake_in_order_and_in_time(connections, clock, limit, costs, schedule):
    rates(connections, clock, limit, costs, schedule)


@pytest.mark.storm
@settings(max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(limit=st.sampled_from(LIMITS[:2]), costs=st.booleans(), schedule=st.lists(events, max_size=100))
def test_rates_charge_who_runs_in_very_many_schedules(connections, clock, limit, costs, schedule):
    rates(connections, clock, limit, costs, schedule)


def rates(connections, clock, limit, costs, schedule):
    world = Rates(connections, clock, limit, costs=costs)
    try:
        for event in schedule:
            world.step(event)
        world.finish()
    finally:
        keys = list(connections.coordination.scan_iter(f"petiole:*{world.name}*", count=10_000))
        if keys:
            connections.coordination.unlink(*keys)
