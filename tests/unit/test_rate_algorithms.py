"""No schedule, however contrived, gets more out of a limit than its bound; and nobody waits longer than he is told."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petiole.coordination import RateLimit
from petiole.coordination.rate_algorithms import Caller

counts = st.integers(1, 6)
periods = st.sampled_from([1, 2])
KINDS = {
    "smooth": st.builds(lambda n, s, b: RateLimit(f"{n}/{s}s", burst=b), counts, periods, counts),
    "at_most": st.builds(
        lambda n, s, b: RateLimit.at_most(f"{n}/{s}s", burst=min(n, b)), st.integers(1, 12), periods, counts
    ),
    "exact": st.builds(lambda n, s: RateLimit.exact(f"{n}/{s}s"), counts, periods),
    "bucketed": st.builds(
        lambda n, s, k: RateLimit.bucketed(f"{n}/{s}s", buckets=k), counts, periods, st.integers(2, 4)
    ),
    "fixed": st.builds(lambda n, s: RateLimit.fixed(f"{n}/{s}s", offset=0.25), counts, periods),
    "first": st.builds(lambda n, s: RateLimit.fixed(f"{n}/{s}s", aligned=False), counts, periods),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
sets_of_limits = st.lists(st.one_of(*KINDS.values()), min_size=1, max_size=3, unique_by=lambda limit: limit.part)
advances_us = st.one_of(
    st.just(0),
    st.sampled_from([1, 250_000, 333_334, 500_000, 999_999, 1_000_000, 1_000_001, 2_000_000]),
    st.integers(0, 400_000),
    st.integers(0, 2_500_000),
)
steps = st.lists(
    st.tuples(
        st.sampled_from(["hit", "hit", "hit", "reserve", "refund", "less", "owe", "change"]),
        advances_us,
        st.integers(1, 6),
    ),
    min_size=2,
    max_size=40,
)
Schedule = Iterable[tuple[str, int, int]]
START_US = 1_700_000_000_000_000


def recount(limit: RateLimit, count: int) -> RateLimit:
    """The same limit with another count; a smooth one stays, for its bound is in its burst and pace."""
    rate = f"{count}/{limit.period_us // 1_000_000}s"
    match limit.kind:
        case "l":
            return RateLimit.exact(rate)
        case "b":
            return RateLimit.bucketed(rate, buckets=count % 3 + 2)
        case "f":
            return RateLimit.fixed(rate, offset=0.25)
        case "w":
            return RateLimit.fixed(rate, aligned=False)
    return limit


def admitted(limits: tuple[RateLimit, ...], schedule: Schedule) -> tuple[list[list[int]], list[RateLimit]]:
    """When calls began and what they cost in the end; and for each limit the most generous one that it ever was."""
    caller, now_us = Caller(), START_US
    events: list[list[int]] = []  # begin, cost
    charged = []
    widest = list(limits)
    for what, advance_us, number in schedule:
        now_us += advance_us
        cost = min(number, *(limit.burst for limit in limits))
        if what in ("hit", "reserve"):
            answer = caller.ask(limits, now_us, cost, number * 500_000 if what == "reserve" else 0)
            if not answer.refusing:
                events.append([now_us + answer.wait_us, cost])
                charged.append((limits, cost, answer.marks, events[-1]))
        elif what in ("refund", "less") and charged:
            then, paid, marks, event = charged.pop(number % len(charged))
            back = paid if what == "refund" else paid // 2
            if back:
                caller.refund(then, now_us, back, marks)
                event[1] -= back
        elif what == "owe":
            caller.owe(limits, now_us, number)
        elif what == "change":
            at = number % len(limits)
            limits = (*limits[:at], recount(limits[at], number), *limits[at + 1 :])
            widest[at] = max(widest[at], limits[at], key=lambda limit: limit.count)
    return sorted(events), widest


def check_bound(events: list[list[int]], limit: RateLimit) -> None:
    for first, (from_us, _) in enumerate(events):
        total = 0
        for until_us, cost in events[first:]:
            total += cost
            assert total <= limit.bound_us(until_us - from_us + 1), (from_us, until_us, limit)


@EVERY
def test_no_schedule_gets_more_than_the_bound_in_any_window(kind: str) -> None:
    """Bursts after pauses, edges of windows, mixed costs, reservations, refunds, debts, changed counts."""

    @settings(max_examples=150, deadline=None)
    @given(limit=KINDS[kind], schedule=steps)
    def search(limit: RateLimit, schedule: list[tuple[str, int, int]]) -> None:
        events, (widest,) = admitted((limit,), schedule)
        check_bound(events, widest)

    search()


@settings(max_examples=150, deadline=None)
@given(limits=sets_of_limits, schedule=steps)
def test_of_several_limits_each_keeps_its_bound(limits: list[RateLimit], schedule: list[tuple[str, int, int]]) -> None:
    """Also where one makes a reservation wait for longer than another asks."""
    events, widest = admitted(tuple(limits), schedule)
    for limit in widest:
        check_bound(events, limit)


@given(limit=KINDS["at_most"], schedule=steps)
def test_at_most_holds_in_closed_windows(limit: RateLimit, schedule: list[tuple[str, int, int]]) -> None:
    """N in one period, counting a call at each end."""
    events, _ = admitted((limit,), schedule)
    for from_us, _ in events:
        assert sum(cost for at_us, cost in events if from_us <= at_us <= from_us + limit.period_us) <= limit.count


@EVERY
def test_the_wait_is_exact(kind: str) -> None:
    """Whoever is refused is admitted after exactly the wait that was named, and not a microsecond before."""

    @settings(deadline=None)
    @given(limit=KINDS[kind], schedule=steps, cost=counts)
    def search(limit: RateLimit, schedule: list[tuple[str, int, int]], cost: int) -> None:
        cost = min(cost, limit.burst)
        caller, now_us = Caller(), START_US
        for what, advance_us, number in schedule:
            now_us += advance_us
            answer = caller.ask((limit,), now_us, min(number, limit.burst), 1_500_000 if what == "reserve" else 0)
            model = caller.models[limit.part]
            at_us = model.earliest(limit, now_us, cost)
            assert model.earliest(limit, at_us, cost) == at_us
            assert model.earliest(limit, max(now_us, at_us - 1), cost) == at_us
            if answer.refusing:
                assert answer.wait_us > 0

    search()


@EVERY
def test_what_remains_is_what_would_be_admitted(kind: str) -> None:
    """So many calls of cost 1 fit now, and one more does not."""

    @settings(deadline=None)
    @given(limit=KINDS[kind], schedule=steps)
    def search(limit: RateLimit, schedule: list[tuple[str, int, int]]) -> None:
        caller, now_us = Caller(), START_US
        for _, advance_us, number in schedule:
            now_us += advance_us
            caller.ask((limit,), now_us, min(number, limit.burst))
            model = caller.models[limit.part]
            remaining, _ = model.left(limit, now_us)
            if remaining:
                assert model.earliest(limit, now_us, remaining) == now_us
            if remaining < limit.burst:
                assert model.earliest(limit, now_us, remaining + 1) > now_us

    search()


@EVERY
def test_a_call_that_is_given_back_at_once_leaves_no_trace(kind: str) -> None:
    """Hit and refund, again and again, is as if nobody had come: but for the parts of a microsecond, one later."""

    @given(limit=KINDS[kind], cost=counts)
    def search(limit: RateLimit, cost: int) -> None:
        caller, cost = Caller(), min(cost, limit.burst)
        for now_us in range(START_US, START_US + 20):
            answer = caller.ask((limit,), now_us, cost)
            assert answer.refusing == 0
            caller.refund((limit,), now_us, cost, answer.marks)
        assert caller.models[limit.part].left(limit, START_US + 20)[0] == limit.burst

    search()


@EVERY
def test_reservations_are_served_in_the_order_in_which_they_were_made(kind: str) -> None:
    """Of equal costs, each gets a later place or the same; and a call that asks now does not overtake."""

    @given(limit=KINDS[kind], cost=counts, times=st.integers(2, 20))
    def search(limit: RateLimit, cost: int, times: int) -> None:
        caller, cost = Caller(), min(cost, limit.burst)
        waits = [caller.ask((limit,), START_US, cost, 10**12).wait_us for _ in range(times)]
        assert waits == sorted(waits)
        assert caller.ask((limit,), START_US, cost).wait_us >= waits[-1]

    search()


@EVERY
def test_what_is_owed_is_waited_for(kind: str) -> None:
    """A debt of three times what is admitted at once keeps later callers waiting for longer than one period's worth."""

    @given(limit=KINDS[kind])
    def search(limit: RateLimit) -> None:
        caller = Caller()
        caller.owe((limit,), START_US, 3 * limit.burst)
        count, period_us = limit.pace if limit.kind == "g" else (limit.count, limit.period_us)
        least_us = 2 * limit.burst * period_us // count - (period_us if limit.kind == "f" else 0)
        assert caller.ask((limit,), START_US, limit.burst).wait_us >= least_us

    search()


@given(st.lists(st.tuples(advances_us, st.booleans()), max_size=40), counts)
def test_there_are_never_more_permits_than_the_count(schedule: list[tuple[int, bool]], count: int) -> None:
    """At any moment, those who were admitted and whose lease lasts are at most so many."""
    limit, caller, now_us = RateLimit.concurrent(count, lease=1), Caller(), START_US
    begins: list[int] = []
    for advance_us, _ in schedule:
        now_us += advance_us
        if not caller.ask((limit,), now_us, 1).refusing:
            begins.append(now_us)
        assert sum(now_us < begin_us + 1_000_000 for begin_us in begins) <= count


in_step = st.lists(
    st.tuples(
        st.sampled_from(["hit", "hit", "reserve", "refund", "refund"]),
        st.sampled_from([0, 0, 1, 2, 3]),
        st.integers(1, 4),
    ),
    min_size=4,
    max_size=14,
)


@pytest.mark.parametrize("examples", [100, pytest.param(2_000, marks=pytest.mark.storm)])
@EVERY
def test_refunds_among_reservations_never_make_room_that_is_not_there(kind: str, examples: int) -> None:
    """Calls that come in step with the limit, where what is paid off and what is given back meet to the microsecond."""

    @settings(max_examples=examples, deadline=None)
    @given(burst=st.integers(1, 4), schedule=in_step)
    def search(burst: int, schedule: list[tuple[str, int, int]]) -> None:
        limit = {
            "smooth": RateLimit("10/s", burst=burst),
            "at_most": RateLimit.at_most("10/s", burst=burst),
            "exact": RateLimit.exact(f"{burst}/s"),
            "bucketed": RateLimit.bucketed(f"{burst}/s", buckets=2),
            "fixed": RateLimit.fixed(f"{burst}/s"),
            "first": RateLimit.fixed(f"{burst}/s", aligned=False),
        }[kind]
        step_us = 100_000 if kind in ("smooth", "at_most") else 500_000
        events, _ = admitted((limit,), [(what, steps * step_us, number) for what, steps, number in schedule])
        check_bound(events, limit)

    search()


SMOOTH = RateLimit("1/s", burst=10)


def test_what_is_paid_off_sooner_because_of_a_refund_is_not_given_back_later() -> None:
    """A is given back, so B is paid off at five seconds and not at ten: giving B back then makes no room for more."""
    caller = Caller()
    a = caller.ask((SMOOTH,), START_US, 5)
    b = caller.ask((SMOOTH,), START_US, 5)
    caller.refund((SMOOTH,), START_US, 5, a.marks)
    later_us = START_US + 5_000_000
    caller.ask((SMOOTH,), later_us, 5)
    caller.refund((SMOOTH,), later_us, 5, b.marks)

    assert caller.models["g1s"].left(SMOOTH, later_us)[0] == 5


def test_a_refund_leaves_those_their_places_who_have_reserved() -> None:
    """With a burst of 1, A is given back at once, but B comes at one second: nobody else does."""
    limit = RateLimit("1/s", burst=1)
    caller = Caller()
    a = caller.ask((limit,), START_US, 1)
    b = caller.ask((limit,), START_US, 1, 10**7)
    caller.refund((limit,), START_US, 1, a.marks)

    assert b.wait_us == 1_000_000
    assert caller.ask((limit,), START_US, 1, 10**7).wait_us == 2_000_000


def test_a_reservation_that_is_given_back_is_free_for_the_next() -> None:
    """However often somebody reserves and thinks better of it; but not the place of one who came after him."""
    limit = RateLimit("1/s", burst=1)
    caller = Caller()
    caller.ask((limit,), START_US, 1)
    for _ in range(5):
        b = caller.ask((limit,), START_US, 1, 10**7)
        assert b.wait_us == 1_000_000
        caller.refund((limit,), START_US, 1, b.marks)
    b = caller.ask((limit,), START_US, 1, 10**7)
    caller.ask((limit,), START_US, 1, 10**7)
    caller.refund((limit,), START_US, 1, b.marks)

    assert caller.ask((limit,), START_US, 1, 10**7).wait_us == 3_000_000
