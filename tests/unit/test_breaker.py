"""The circuit breaker: when it opens, who may try, and how long it waits. Time is an argument here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petiole.cachelib.breaker import Breaker, Change, Pass

CALL, PROBE, REFUSED = Pass.CALL, Pass.PROBE, Pass.REFUSED


def opened(at_ms: float = 0, **numbers: int) -> Breaker:
    """A breaker that has opened at a moment."""
    breaker = Breaker(**{"threshold": 1, "span_ms": 0} | numbers)
    assert breaker.failed(CALL, at_ms) is Change.OPENED
    return breaker


def test_it_is_closed_at_first_and_lets_every_call_through() -> None:
    """Nothing is in trouble."""
    breaker = Breaker()

    assert [breaker.ask(now_ms) for now_ms in (0, 0, 1_000)] == [CALL] * 3
    assert breaker.state(0) == "closed"
    assert not breaker.troubled


def test_it_opens_with_the_failure_that_makes_the_row_long_enough() -> None:
    """Not before, and it says so once."""
    breaker = Breaker(threshold=3, span_ms=100)

    assert [breaker.failed(CALL, now_ms) for now_ms in (0, 60, 120)] == [Change.NONE, Change.NONE, Change.OPENED]
    assert breaker.ask(121) is REFUSED
    assert breaker.state(121) == "open"
    assert breaker.failed(CALL, 121) is Change.NONE


def test_a_success_ends_the_row() -> None:
    """Two of three fail for ever, and it stays closed."""
    breaker = Breaker(threshold=3, span_ms=0)
    for now_ms in range(0, 1_000, 10):
        assert breaker.failed(CALL, now_ms) is Change.NONE
        assert breaker.failed(CALL, now_ms + 1) is Change.NONE
        assert breaker.troubled
        assert breaker.succeeded(CALL) is Change.NONE
        assert not breaker.troubled


def test_one_pause_that_fails_many_threads_at_once_is_no_outage() -> None:
    """The failures have to last for a while, too."""
    breaker = Breaker(threshold=5, span_ms=100)

    assert {breaker.failed(CALL, 50 + number / 100) for number in range(1_000)} == {Change.NONE}
    assert breaker.failed(CALL, 150) is Change.OPENED


def test_after_its_time_one_call_tries_and_the_others_wait_for_what_it_finds() -> None:
    """Half-open: one probe at a time."""
    breaker = opened(open_ms=500)

    assert breaker.ask(499) is REFUSED
    assert breaker.state(500) == "half-open"
    assert [breaker.ask(500) for _ in range(4)] == [PROBE, REFUSED, REFUSED, REFUSED]
    assert breaker.state(501) == "half-open"


def test_a_probe_that_succeeds_closes_it() -> None:
    """And the next outage begins with the first open time again."""
    breaker = opened(open_ms=500)
    breaker.failed(breaker.ask(500), 500)

    assert breaker.succeeded(breaker.ask(1_500)) is Change.CLOSED
    assert breaker.ask(1_500) is CALL
    assert not breaker.troubled
    assert breaker.failed(CALL, 2_000) is Change.OPENED
    assert breaker.ask(2_500) is PROBE


def test_each_probe_that_fails_doubles_the_wait_up_to_a_bound() -> None:
    """500 ms, 1 s, 2 s, and no more than the longest."""
    breaker, now_ms, waits = opened(open_ms=500, longest_open_ms=3_000), 0, []
    for _ in range(5):
        wait_ms = next(ms for ms in range(0, 20_000, 100) if breaker.state(now_ms + ms) == "half-open")
        waits.append(wait_ms)
        now_ms += wait_ms
        assert breaker.failed(breaker.ask(now_ms), now_ms) is Change.STAYED_OPEN

    assert waits == [500, 1_000, 2_000, 3_000, 3_000]


def test_what_was_sent_before_it_opened_changes_nothing_any_more() -> None:
    """Late failures do not lengthen the wait, and a late answer does not close it."""
    breaker = opened(open_ms=500)
    for _ in range(10):
        assert breaker.failed(CALL, 100) is Change.NONE
        assert breaker.succeeded(CALL) is Change.NONE

    assert breaker.state(499) == "open"
    assert breaker.ask(500) is PROBE


def test_a_probe_that_broke_off_makes_way_for_the_next_at_once() -> None:
    """A signal that ends it says nothing about the server."""
    breaker = opened(open_ms=500)
    breaker.broke_off(breaker.ask(500))

    assert breaker.ask(501) is PROBE


def test_a_probe_that_never_tells_does_not_keep_it_open_for_ever() -> None:
    """Its thread may be gone."""
    breaker = opened(open_ms=500, probe_ms=1_000)
    assert breaker.ask(500) is PROBE

    assert breaker.ask(1_499) is REFUSED
    assert breaker.ask(1_500) is PROBE


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ({"threshold": 0}, "threshold=0"),
        ({"span_ms": -1}, "span_ms=-1"),
        ({"open_ms": 0}, "open_ms=0"),
        ({"probe_ms": 0}, "probe_ms=0"),
        ({"open_ms": 500, "longest_open_ms": 499}, "longest_open_ms=499"),
    ],
)
def test_numbers_that_fit_no_breaker_are_refused_by_name(numbers: dict[str, int], named: str) -> None:
    """When it is made, not when it is needed."""
    with pytest.raises(ValueError, match=named):
        Breaker(**numbers)


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(["ok", "fails", "broke off", "lost"])), max_size=200))
def test_whatever_happens_a_call_goes_through_before_long(steps: list[tuple[int, str]]) -> None:
    """Never two probes within one probe's time, and never a wait beyond the longest."""
    breaker = Breaker(threshold=2, span_ms=10, open_ms=50, longest_open_ms=200, probe_ms=100)
    now_ms, refused_since_ms = 0, None
    probes: list[int] = []
    for passed_ms, result in steps:
        now_ms += passed_ms
        passed = breaker.ask(now_ms)
        if passed is REFUSED:
            refused_since_ms = now_ms if refused_since_ms is None else refused_since_ms
            assert now_ms - refused_since_ms < 200
            continue
        refused_since_ms = None
        if passed is PROBE:
            probes.append(now_ms)
        if result == "ok":
            breaker.succeeded(passed)
            assert breaker.state(now_ms) == "closed"
        elif result == "fails":
            breaker.failed(passed, now_ms)
        elif result == "broke off":
            breaker.broke_off(passed)
