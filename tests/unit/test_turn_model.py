"""The queue of ``lua/_turns.lua`` as a model in plain Python, and what every schedule of it keeps.

``tests/contract/test_turn_scripts.py`` sees to it that the scripts do the same.
"""

from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

START_US = 1_700_000_000_000_000
LEASES_MS = (100, 1_000, 3_600_000)
CHANNELS = ("here", "there", "elsewhere")


@dataclass(frozen=True)
class Held:
    units: int
    lease_ms: int
    fence: int
    ends_us: int


@dataclass(frozen=True)
class Place:
    token: str
    units: int
    lease_ms: int
    channel: str


@dataclass
class Turns:
    """So many units, those who hold some, those who wait, and what was told to whom."""

    made_with: int
    now_us: int = START_US
    fence: int = 0
    set_capacity: int | None = None
    holds: dict[str, Held] = field(default_factory=dict)
    queue: list[Place] = field(default_factory=list)
    alive: set[str] = field(default_factory=lambda: set(CHANNELS))
    told: list[tuple[str, str, int, int]] = field(default_factory=list)
    granted: list[tuple[str, int]] = field(default_factory=list)

    @property
    def capacity(self):
        return self.set_capacity or self.made_with

    @property
    def used(self):
        return sum(held.units for held in self.holds.values())

    def take(self, token, units, lease_ms, channel):
        """Returns (state, fence, end, how many wait before it, whether it had its place before)."""
        self.settle()
        held = self.holds.get(token)
        if held:
            return 1, held.fence, held.ends_us, 0, False
        if units > self.capacity:
            return -1, 0, 0, 0, False
        if not self.queue and self.used + units <= self.capacity:
            held = self.begin(token, units, lease_ms)
            return 1, held.fence, held.ends_us, 0, False
        tokens = [place.token for place in self.queue]
        ahead = tokens.index(token) if token in tokens else len(tokens)
        if channel and token in tokens:  # in its place, perhaps with another channel
            self.queue[ahead] = Place(token, units, lease_ms, channel)
        elif channel:
            self.queue.append(Place(token, units, lease_ms, channel))
        return 0, 0, self.first_end_us(), ahead, token in tokens

    def give(self, token):
        """Returns whether it held."""
        held = self.holds.pop(token, None)
        self.queue = [place for place in self.queue if place.token != token]
        self.settle()
        return bool(held and held.ends_us > self.now_us)

    def renew(self, token, lease_ms):
        """Returns whether it was still held. Changes nothing else."""
        held = self.holds.get(token)
        if not held or held.ends_us <= self.now_us:
            return False
        self.holds[token] = replace(held, ends_us=self.now_us + lease_ms * 1_000)
        return True

    def shrink(self, token, units):
        """Returns 1 if it is held, with so many units or fewer."""
        self.settle()
        held = self.holds.get(token)
        if not held:
            return 0
        self.holds[token] = replace(held, units=min(units, held.units))
        self.settle()
        return 1

    def resize(self, units):
        """Returns how many are in use."""
        self.set_capacity = units
        self.settle()
        return self.used

    def clear(self):
        """Returns how many held."""
        count, self.holds = sum(held.ends_us > self.now_us for held in self.holds.values()), {}
        self.fence = max(self.fence + 1, self.now_us)
        self.settle()
        return count

    def settle(self):
        """End what has run out; grant what is free, in order."""
        self.holds = {token: held for token, held in self.holds.items() if held.ends_us > self.now_us}
        while self.queue and self.used < self.capacity:
            place = self.queue[0]
            if self.used + place.units > self.capacity >= place.units:
                return
            self.queue.pop(0)
            if place.channel not in self.alive:
                continue
            if place.units > self.capacity:
                self.told.append((place.channel, place.token, 0, 0))
                continue
            held = self.begin(place.token, place.units, place.lease_ms)
            self.told.append((place.channel, place.token, held.fence, held.ends_us))

    def begin(self, token, units, lease_ms):
        self.fence = max(self.fence + 1, self.now_us)
        self.holds[token] = held = Held(units, lease_ms, self.fence, self.now_us + lease_ms * 1_000)
        self.granted.append((token, self.fence))
        return held

    def first_end_us(self):
        return min((held.ends_us for held in self.holds.values()), default=0)

    def lose_all(self):
        """Redis has evicted the state."""
        self.holds, self.queue, self.fence, self.set_capacity = {}, [], 0, None
        self.now_us += 1_000_000  # nothing else is lost within the same microsecond


tokens = st.sampled_from("abcdefgh")
operations = st.one_of(
    st.tuples(st.just("take"), tokens, st.integers(1, 4), st.sampled_from(LEASES_MS), st.sampled_from(CHANNELS)),
    st.tuples(st.just("take"), tokens, st.integers(1, 4), st.sampled_from(LEASES_MS), st.sampled_from(("", *CHANNELS))),
    st.tuples(st.just("give"), tokens),
    st.tuples(st.just("renew"), tokens, st.sampled_from(LEASES_MS)),
    st.tuples(st.just("shrink"), tokens, st.integers(1, 3)),
    st.tuples(st.just("resize"), st.one_of(st.none(), st.integers(1, 6))),
    st.tuples(st.just("clear")),
    st.tuples(st.just("advance"), st.one_of(st.integers(0, 3), st.integers(0, 200_000), st.integers(0, 4_000_000_000))),
    st.tuples(st.just("die"), st.sampled_from(CHANNELS)),
    st.tuples(st.just("live"), st.sampled_from(CHANNELS)),
    st.tuples(st.just("lose_all")),
)
schedules = st.lists(operations, min_size=1, max_size=40)


def play(turns, operation):
    """Carry out one operation on the model. Returns its answer."""
    match operation:
        case "advance", by_us:
            turns.now_us += by_us
        case "die", channel:
            turns.alive.discard(channel)
        case "live", channel:
            turns.alive.add(channel)
        case what, *arguments:
            return getattr(turns, what)(*arguments)
    return None


@given(made_with=st.integers(1, 4), schedule=schedules)
def test_every_schedule_keeps_the_bound_the_order_and_the_fences(made_with, schedule):
    turns = Turns(made_with)
    for operation in schedule:
        used, capacity, waited = turns.used, turns.capacity, list(turns.queue)
        told, granted = len(turns.told), len(turns.granted)
        play(turns, operation)
        assert turns.used <= max(turns.capacity, used), "more than there are"
        if operation[0] not in ("lose_all", "resize"):
            assert turns.capacity == capacity
        # Who was told is who stood first, one after another; nobody was granted past one that waits.
        served = [token for _, token, _, _ in turns.told[told:]]
        living = [place.token for place in waited if place.channel in turns.alive]
        assert served == [token for token in living if token in served]
        if operation[0] != "give":
            assert served == living[: len(served)]
        newcomers = [token for token, _ in turns.granted[granted:] if token not in served]
        assert not newcomers or not turns.queue
        if turns.queue and operation[0] in ("take", "give", "clear", "resize"):
            assert turns.used + turns.queue[0].units > turns.capacity, "it is free while somebody waits"
    fences = [fence for _, fence in turns.granted]
    assert fences == sorted(set(fences)), "a fence that does not rise"
    for token in "abcdefgh":
        turns.give(token)
    assert not turns.holds
    assert not turns.queue


def test_one_that_waits_is_granted_when_a_lease_has_run_out_and_somebody_looks():
    turns = Turns(1)
    assert turns.take("a", 1, 100, "")[0] == 1
    assert turns.take("b", 1, 100, "here") == (0, 0, START_US + 100_000, 0, False)
    turns.now_us += 100_000
    assert turns.take("b", 1, 100, "here")[:2] == (1, START_US + 100_000)
    assert [token for token, _ in turns.granted] == ["a", "b"]
    assert not turns.renew("a", 100)


def test_who_asks_for_much_is_not_overtaken_by_those_who_ask_for_little():
    turns = Turns(3)
    for token, units in [("a", 2), ("large", 3), ("small", 1)]:
        turns.take(token, units, 100, "here")
    assert (turns.used, [place.token for place in turns.queue]) == (2, ["large", "small"])
    turns.give("a")
    assert (turns.used, [place.token for place in turns.queue]) == (3, ["small"])
