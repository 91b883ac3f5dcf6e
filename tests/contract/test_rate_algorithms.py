"""The scripts that count in Redis and the models of ``rate_algorithms`` say the same, on every schedule."""

from copy import copy
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petiole.cachelib import Connections
from petiole.cachelib.scripts import Script
from petiole.coordination import RateLimit
from petiole.coordination import rate_limiter as module
from petiole.coordination.keys import RateKeys
from petiole.coordination.rate_algorithms import Caller
from petiole.coordination.rate_limit import FARTHEST_US

CLOCK = 'local time = redis.call("TIME")\nlocal now = time[1] * 1000000 + time[2]\n'
EXPIRY = "math.ceil(us / 1000)"


def with_our_clock(script: Script[Any]) -> Script[Any]:
    """The same script on a clock that the test turns; states are kept longer, for they expire on the server's."""
    text = script.text
    for old, new in [(CLOCK, "local now = tonumber(ARGV[#ARGV])\n"), (EXPIRY, f"600000 + {EXPIRY}")]:
        assert text.count(old) == 1, f"the script has no {old!r} any more"
        text = text.replace(old, new)
    header = next(line for line in text.splitlines() if line.startswith("-- ARGV: "))
    return Script(f"{script.name}_with_our_clock", text.replace(header, f"{header}, now_us"), script.decode)


HIT_AT = with_our_clock(module._HIT)
REFUND_AT = with_our_clock(module._REFUND)

periods = st.sampled_from([1, 2, 3, 7, 60])
counts = st.one_of(st.integers(1, 6), st.integers(1, 40))
KINDS = {
    "smooth": st.builds(lambda n, s, b: RateLimit(f"{n}/{s}s", burst=b), counts, periods, counts),
    "fast": st.builds(
        lambda n, b: RateLimit(f"{n}/s", burst=b), st.integers(900_000, 1_000_000), st.integers(1, 10_000)
    ),
    "at_most": st.builds(lambda n, s: RateLimit.at_most(f"{n}/{s}s"), counts, periods),
    "exact": st.builds(lambda n, s: RateLimit.exact(f"{n}/{s}s"), counts, periods),
    "bucketed": st.builds(
        lambda n, s, k: RateLimit.bucketed(f"{n}/{s}s", buckets=k), counts, periods, st.integers(2, 7)
    ),
    "fixed": st.builds(
        lambda n, s, o: RateLimit.fixed(f"{n}/{s}s", offset=o % (s * 1000) / 1000),
        counts,
        periods,
        st.integers(0, 9999),
    ),
    "first": st.builds(lambda n, s: RateLimit.fixed(f"{n}/{s}s", aligned=False), counts, periods),
    "concurrent": st.builds(lambda n, s: RateLimit.concurrent(n, lease=s), st.integers(1, 4), periods),
}
some = st.one_of(*KINDS.values())
sets_of_limits = st.lists(
    st.one_of(some, some, some.map(RateLimit.of_calls)), min_size=1, max_size=4, unique_by=lambda limit: limit.part
)
advances_us = st.one_of(
    st.just(0),
    st.integers(0, 2_000),
    st.integers(0, 1_500_000),
    st.sampled_from([1_000_000, 999_999, 3_000_000, 60_000_000]),
    st.integers(0, 100_000_000),
)
steps = st.lists(
    st.tuples(
        st.sampled_from(["hit", "hit", "hit", "reserve", "refund", "less", "owe", "change", "peek"]),
        advances_us,
        st.integers(1, 45),
    ),
    min_size=1,
    max_size=30,
)


def replace_by_cost(limit: RateLimit) -> RateLimit:
    """The limit of costs that a limit of calls was made of."""
    other = copy(limit)
    object.__setattr__(other, "by_call", False)
    return other


def changed(limit: RateLimit, number: int) -> RateLimit:
    """The same limit with another count, another burst or other buckets; of the same kind and period."""
    if limit.by_call:
        return changed(replace_by_cost(limit), number).of_calls()
    seconds = limit.period_us // 1_000_000
    rate = f"{number}/{seconds}s"
    match limit.kind:
        case "g":
            return RateLimit(rate, burst=number % 9 + 1)
        case "l":
            return RateLimit.exact(rate)
        case "b":
            return RateLimit.bucketed(rate, buckets=number % 6 + 2)
        case "f":
            return RateLimit.fixed(rate, offset=number % seconds)
        case "w":
            return RateLimit.fixed(rate, aligned=False)
        case _:
            return RateLimit.concurrent(number, lease=seconds)


def columns(limits: tuple[RateLimit, ...]) -> dict[str, Any]:
    """What the scripts are told of the limits, by the names of their headers."""
    told = zip(*[limit.arguments() for limit in limits], strict=True)
    return dict(zip(("kinds", "counts", "spans_us", "rests", "parts"), told, strict=True))


class InRedis:
    """One caller, as the scripts have it, on our clock."""

    def __init__(self, redis: Connections) -> None:
        self.client = redis.coordination
        self.keys = uuid4().hex
        self.permits = 0

    def ask(self, mode: str, limits: tuple[RateLimit, ...], now_us: int, cost: int, amount: int = 0) -> list[int]:
        block, *states = RateKeys("model", [limit.part for limit in limits]).of(self.keys)
        self.permits += 1
        reply: list[int] = HIT_AT(
            self.client,
            block=block,
            states=states,
            mode=mode,
            cost=cost,
            amount=amount,
            permit=f"permit {self.permits}",
            now_us=now_us,
            **columns(limits),
        )
        return reply

    def refund(self, limits: tuple[RateLimit, ...], now_us: int, cost: int, marks: list[tuple[int, int]]) -> None:
        REFUND_AT(
            self.client,
            states=RateKeys("model", [limit.part for limit in limits]).of(self.keys)[1:],
            cost=cost,
            permit="",
            firsts=[first for first, _ in marks],
            seconds=[second for _, second in marks],
            now_us=now_us,
            **columns(limits),
        )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(limits=sets_of_limits, schedule=steps, start_us=st.integers(1_600_000_000_000_000, 2_500_000_000_000_000))
def test_the_scripts_agree_with_the_models_on_every_schedule(
    redis: Connections, limits: list[RateLimit], schedule: list[tuple[str, int, int]], start_us: int
) -> None:
    """Calls, reservations, refunds, debts and changed limits: every answer is the same, to the microsecond."""
    follow(InRedis(redis), tuple(limits), schedule, start_us)


@pytest.mark.parametrize("kind", KINDS)
def test_each_script_agrees_with_its_model(redis: Connections, kind: str) -> None:
    """As above, of each algorithm alone."""

    @settings(deadline=None, max_examples=30)
    @given(limit=KINDS[kind], schedule=steps, start_us=st.integers(1_600_000_000_000_000, 2_500_000_000_000_000))
    def search(limit: RateLimit, schedule: list[tuple[str, int, int]], start_us: int) -> None:
        follow(InRedis(redis), (limit,), schedule, start_us)

    search()


in_step = st.lists(
    st.tuples(
        st.sampled_from(["hit", "hit", "reserve", "refund", "refund", "less", "change"]),
        st.sampled_from([0, 0, 1, 2, 3]).map(lambda steps: 100_000 * steps),
        st.integers(1, 4),
    ),
    min_size=4,
    max_size=20,
)


limits_in_step = st.sampled_from(
    [
        RateLimit("10/s", burst=2),
        RateLimit("30/s", burst=4),
        RateLimit("7/s", burst=3),
        RateLimit.exact("3/s"),
        RateLimit.bucketed("3/s", buckets=2),
    ]
)


@pytest.mark.parametrize("examples", [75, pytest.param(1_000, marks=pytest.mark.storm)])
def test_the_scripts_agree_with_the_models_on_calls_in_step(redis: Connections, examples: int) -> None:
    """Refunds among reservations, at times when what is paid off and what is given back meet to the microsecond."""

    @settings(deadline=None, max_examples=examples)
    @given(limit=limits_in_step, schedule=in_step)
    def search(limit: RateLimit, schedule: list[tuple[str, int, int]]) -> None:
        follow(InRedis(redis), (limit,), schedule, 1_700_000_000_000_000)

    search()


def follow(there: InRedis, limits: tuple[RateLimit, ...], schedule: list[tuple[str, int, int]], now_us: int) -> None:
    """Take every step in Redis and in the model, and compare what is said."""
    here = Caller()
    charged: list[tuple[tuple[RateLimit, ...], int, list[tuple[int, int]]]] = []
    for what, advance_us, number in schedule:
        now_us += advance_us
        highest = min((limit.burst for limit in limits if limit.kind != "c"), default=45)
        cost = min(number, highest)
        reserving = what == "reserve" and all(limit.kind != "c" for limit in limits)
        if what in ("hit", "reserve"):
            within_us = number * 200_000 if reserving else 0
            expected = here.ask(limits, now_us, cost, within_us)
            said = there.ask("reserve" if reserving else "hit", limits, now_us, cost, within_us)
            marks = [mark for pair in expected.marks for mark in pair]
            assert said == [
                expected.refusing,
                expected.wait_us,
                expected.tightest,
                expected.remaining,
                expected.reset_us,
                cost,
                *marks,
            ]
            if not expected.refusing:
                charged.append((limits, cost, expected.marks))
        elif what in ("refund", "less") and charged:
            then, paid, marks = charged.pop(number % len(charged))
            back = paid if what == "refund" else max(1, paid // 2)
            here.refund(then, now_us, back, marks)
            there.refund(then, now_us, back, marks)
        elif what == "owe":
            here.owe(limits, now_us, number)
            there.ask("owe", limits, now_us, number, FARTHEST_US)
        elif what == "change":
            at = number % len(limits)
            limits = (*limits[:at], changed(limits[at], number), *limits[at + 1 :])
        lefts = [here._of(limit).left(limit, now_us) for limit in limits]
        assert there.ask("peek", limits, now_us, 1)[6:] == [part for left in lefts for part in left]
