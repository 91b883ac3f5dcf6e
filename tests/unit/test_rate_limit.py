"""What a rate limit is: what can be written, what is refused, and what GCRA admits at most."""

from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petiole.coordination import Allowed, Limited, RateLimit
from petiole.coordination.rate_limit import decide


@pytest.mark.parametrize(
    ("rate", "count", "period_us"),
    [
        ("1/s", 1, 1_000_000),
        ("100/m", 100, 60_000_000),
        ("10/30s", 10, 30_000_000),
        ("5/2h", 5, 7_200_000_000),
        ("5000/d", 5_000, 86_400_000_000),
        ("10000/s", 10_000, 1_000_000),
    ],
)
def test_a_rate_is_a_count_per_period(rate: str, count: int, period_us: int) -> None:
    """A rate reads as count/period, with a number before the unit if need be; the burst is the count."""
    limit = RateLimit(rate)

    assert (limit.rate, limit.count, limit.period_us, limit.burst) == (rate, count, period_us, count)


@pytest.mark.parametrize(
    "rate",
    ["", "100", "100/", "/m", "100/w", "-1/s", "1.5/s", "100 / m", "100/m ", "100/m\n", "100/mm", "1e3/s", "100/-5s"],
)
def test_a_rate_that_cannot_be_read_is_refused_with_an_example(rate: str) -> None:
    """What cannot be read is refused at once, and the message shows what can."""
    with pytest.raises(ValueError, match=r'cannot be read; write for example "100/m"'):
        RateLimit(rate)


@pytest.mark.parametrize("rate", [100, None, b"100/m", ("100", "m")])
def test_a_rate_that_is_no_text_is_refused(rate: object) -> None:
    """A number alone says nothing about time."""
    with pytest.raises(ValueError, match="cannot be read"):
        RateLimit(rate)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", ["0/s", "0/5m", "1/0s", "00/d"])
def test_a_rate_of_nothing_is_refused(rate: str) -> None:
    """A limit that would never admit anything is a mistake."""
    with pytest.raises(ValueError, match="would never admit"):
        RateLimit(rate)


@pytest.mark.parametrize("rate", ["10001/s", "1000000/m"])
def test_a_rate_above_ten_thousand_a_second_is_refused(rate: str) -> None:
    """Above 10,000 a second, whole microseconds would be off by more than a hundredth."""
    with pytest.raises(ValueError, match=r"above 10,000 calls a second"):
        RateLimit(rate)


@pytest.mark.parametrize("burst", [0, -1, 1.0, "3", True, False])
def test_a_burst_that_is_no_positive_whole_number_is_refused(burst: object) -> None:
    """A burst is a whole number of at least 1."""
    with pytest.raises(ValueError, match="burst must be a whole number"):
        RateLimit("10/s", burst=burst)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rate", "burst"), [("1/d", 10**9), ("1/99999999d", None), ("1/36500d", 10_000)])
def test_a_limit_beyond_exact_arithmetic_is_refused(rate: str, burst: int | None) -> None:
    """Redis computes with doubles: what would pass 2^53 microseconds could admit too many, so it is refused."""
    with pytest.raises(ValueError, match=r"rate|burst"):
        RateLimit(rate, burst=burst)


def test_a_limit_cannot_be_changed() -> None:
    """A limit is a value."""
    limit = RateLimit("10/s")

    with pytest.raises(FrozenInstanceError):
        limit.count = 20  # type: ignore[misc]


def test_different_limits_have_different_states() -> None:
    """Count, period and burst tell the states apart; how the rate is spelled does not."""
    keys = {limit.key for limit in (RateLimit("1/s"), RateLimit("60/m"), RateLimit("1/m"), RateLimit("1/s", burst=2))}

    assert len(keys) == 4
    assert RateLimit("1/m").key == RateLimit("1/60s").key


@given(count=st.integers(1, 10_000), seconds=st.integers(1, 86_400))
def test_the_interval_never_makes_the_rate_faster(count: int, seconds: int) -> None:
    """The time between two calls is rounded up, and by less than a microsecond."""
    limit = RateLimit(f"{count}/{seconds}s")

    assert 0 <= limit.interval_us * count - limit.period_us < count


def test_answers_are_true_and_false() -> None:
    """An answer can be asked as a condition."""
    assert Allowed(0, 0.0)
    assert not Limited(0.0, None)


limits = st.builds(
    lambda count, seconds, burst: RateLimit(f"{count}/{seconds}s", burst=burst),
    st.integers(1, 50),
    st.integers(1, 60),
    st.integers(1, 20),
)
schedules = st.lists(
    st.tuples(
        st.one_of(st.just(0), st.integers(0, 1_000), st.integers(0, 2_000_000), st.integers(0, 120_000_000)),
        st.integers(1, 5),
    ),
    min_size=1,
    max_size=60,
)


@given(limit=limits, schedule=schedules, start_us=st.integers(0, 2**51))
def test_no_window_of_any_schedule_admits_more_than_the_bound(
    limit: RateLimit, schedule: list[tuple[int, int]], start_us: int
) -> None:
    """In any window of W, no more than burst + count * W / period is admitted."""
    now_us, tat_us = start_us, None
    admitted: list[tuple[int, int]] = []
    for advance_us, cost in schedule:
        now_us += advance_us
        verdict = decide(tat_us, now_us, limit.interval_us, limit.burst, cost)
        if verdict.wait_us == 0:
            tat_us = verdict.tat_us
            admitted.append((now_us, cost))

    for first, (from_us, _) in enumerate(admitted):
        total = 0
        for until_us, cost in admitted[first:]:
            total += cost
            assert (total - limit.burst) * limit.period_us <= limit.count * (until_us - from_us)


@given(limit=limits, schedule=schedules, cost=st.integers(1, 5))
def test_the_wait_is_exact(limit: RateLimit, schedule: list[tuple[int, int]], cost: int) -> None:
    """A refused call is admitted after exactly the wait that was named, and not a microsecond before."""
    cost = min(cost, limit.burst)
    now_us, tat_us = 0, None
    for advance_us, _ in schedule:
        now_us += advance_us
        verdict = decide(tat_us, now_us, limit.interval_us, limit.burst, cost)
        if verdict.wait_us:
            after = decide(tat_us, now_us + verdict.wait_us, limit.interval_us, limit.burst, cost)
            before = decide(tat_us, now_us + verdict.wait_us - 1, limit.interval_us, limit.burst, cost)

            assert after.wait_us == 0
            assert before.wait_us == 1
        else:
            tat_us = verdict.tat_us


@given(limit=limits, start_us=st.integers(0, 2**51))
def test_a_caller_who_rested_has_the_whole_burst(limit: RateLimit, start_us: int) -> None:
    """A burst of exactly ``burst`` calls is admitted to a new caller; the next one waits one interval."""
    tat_us, waits = None, []
    for _ in range(limit.burst + 1):
        verdict = decide(tat_us, start_us, limit.interval_us, limit.burst, 1)
        waits.append(verdict.wait_us)
        tat_us = verdict.tat_us

    assert waits == [0] * limit.burst + [limit.interval_us]


def test_at_the_steady_rate_nobody_waits() -> None:
    """Calls that come one interval apart are admitted for ever, also with a burst of 1."""
    limit = RateLimit("7/s", burst=1)
    arrivals = range(0, 1_000 * limit.interval_us, limit.interval_us)
    tat_us, waits = None, []
    for now_us in arrivals:
        verdict = decide(tat_us, now_us, limit.interval_us, limit.burst, 1)
        waits.append(verdict.wait_us)
        tat_us = verdict.tat_us

    assert set(waits) == {0}
    assert all(later - earlier == limit.interval_us for earlier, later in pairwise(arrivals))
