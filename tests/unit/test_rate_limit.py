"""What a rate limit is: what can be written, what is refused, what it states; and what an answer says."""

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petiole.coordination import Allowed, Limited, RateLimit
from petiole.coordination.rate_limit import Reserved, limits_of

ALL = [
    RateLimit("100/m"),
    RateLimit.at_most("100/m"),
    RateLimit.exact("100/m"),
    RateLimit.bucketed("100/m"),
    RateLimit.fixed("100/m"),
    RateLimit.fixed("100/m", aligned=False),
    RateLimit.concurrent(100),
]
MAKERS: list[Callable[..., RateLimit]] = [
    RateLimit,
    RateLimit.at_most,
    RateLimit.exact,
    RateLimit.bucketed,
    RateLimit.fixed,
]


@pytest.mark.parametrize(
    ("rate", "count", "period_us"),
    [
        ("1/s", 1, 1_000_000),
        ("100/m", 100, 60_000_000),
        ("10/30s", 10, 30_000_000),
        ("5/2h", 5, 7_200_000_000),
        ("5000/d", 5_000, 86_400_000_000),
        ("1000000/s", 1_000_000, 1_000_000),
    ],
)
def test_a_rate_is_a_count_per_period(rate: str, count: int, period_us: int) -> None:
    """A rate reads as count/period, with a number before the unit if need be; the burst is the count."""
    limit = RateLimit(rate)

    assert (limit.rate, limit.count, limit.period_us, limit.burst) == (rate, count, period_us, count)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "rate",
    [
        *("", "100", "100/", "/m", "100/w", "-1/s", "1.5/s", "100 / m", "100/m ", "100/m\n", "100/mm", "1e3/s"),
        *("100/-5s", "10/x", "nan/s", "inf/s", "10/nans", "\u0661/s", "9" * 17 + "/s"),
    ],
)
def test_a_rate_that_cannot_be_read_is_refused_with_an_example(make: Callable[..., RateLimit], rate: str) -> None:
    """What cannot be read is refused at once, and the message shows what can."""
    with pytest.raises(ValueError, match=r'cannot be read; write for example "100/m"'):
        make(rate)


@pytest.mark.parametrize("rate", [100, None, b"100/m", ("100", "m"), True, float("nan")])
def test_a_rate_that_is_no_text_is_refused(rate: object) -> None:
    """A number alone says nothing about time."""
    with pytest.raises(ValueError, match="cannot be read"):
        RateLimit(rate)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", ["0/s", "0/5m", "1/0s", "00/d"])
def test_a_rate_of_nothing_is_refused(rate: str) -> None:
    """A limit that would never admit anything is a mistake."""
    with pytest.raises(ValueError, match="would never admit"):
        RateLimit(rate)


@pytest.mark.parametrize("rate", ["1000001/s", "60000001/m"])
def test_a_rate_above_a_million_a_second_is_refused(rate: str) -> None:
    """What is counted in microseconds is paced in microseconds."""
    with pytest.raises(ValueError, match=r"above 1,000,000 calls a second"):
        RateLimit(rate)


@pytest.mark.parametrize("burst", [0, -1, 1.0, "3", True, False])
@pytest.mark.parametrize("make", [RateLimit, RateLimit.at_most])
def test_a_burst_that_is_no_positive_whole_number_is_refused(make: Callable[..., RateLimit], burst: object) -> None:
    """A burst is a whole number of at least 1."""
    with pytest.raises(ValueError, match="burst must be a whole number"):
        make("10/s", burst=burst)


@pytest.mark.parametrize(
    ("rate", "burst"),
    [("1/d", 10**9), ("1/99999999d", None), ("1/36500d", 10_000), ("999999/s", 2**40), ("1/s", 2**60)],
)
def test_a_limit_beyond_exact_arithmetic_is_refused(rate: str, burst: int | None) -> None:
    """Redis computes with doubles: what would pass 2^53 microseconds could admit too many, so it is refused."""
    with pytest.raises(ValueError, match=r"write a smaller"):
        RateLimit(rate, burst=burst)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RateLimit.at_most("10/s", burst=11), "write at most 10"),
        (lambda: RateLimit.exact("10001/d"), r"write RateLimit.bucketed\('10001/d'\)"),
        (lambda: RateLimit.bucketed("10/s", buckets=1), "from 2 to 100, not 1"),
        (lambda: RateLimit.bucketed("10/s", buckets=True), "from 2 to 100, not True"),
        (lambda: RateLimit.fixed("10/s", offset=1), "not shorter than the period"),
        (lambda: RateLimit.fixed("10/s", aligned=False, offset=0.5), "leave it out"),
        (lambda: RateLimit.fixed("10/s", aligned=1), "True or False, not 1"),  # type: ignore[arg-type]
        (lambda: RateLimit.fixed("10/s", offset=float("nan")), "offset=nan"),
        (lambda: RateLimit.concurrent(0), "from 1 to 1000000, not 0"),
        (lambda: RateLimit.concurrent(True), "not True"),
        (lambda: RateLimit.concurrent(3, lease=0), "lease=0 must be more than zero"),
        (lambda: RateLimit.concurrent(3, lease=float("inf")), "lease=inf"),
        (lambda: RateLimit("1/s", name=""), "1 to 64 characters"),
        (lambda: RateLimit("1/s", name=7), "1 to 64 characters"),  # type: ignore[arg-type]
    ],
)
def test_what_a_limit_cannot_be_is_refused(make: Callable[[], RateLimit], message: str) -> None:
    """The message says what was wrong, with which value, and what to write."""
    with pytest.raises(ValueError, match=message):
        make()


def test_a_limit_cannot_be_changed() -> None:
    """A limit is a value."""
    limit = RateLimit("10/s")

    with pytest.raises(FrozenInstanceError):
        limit.count = 20  # type: ignore[misc]
    assert limit == RateLimit("10/s")
    assert len({limit, RateLimit("10/s"), RateLimit("20/s")}) == 2


def test_a_state_is_found_by_kind_and_period_or_by_name() -> None:
    """Count, burst and buckets do not tell states apart, so they may be changed while the limit is in use."""
    assert RateLimit("1/m").part == RateLimit("60/60s", burst=7).part == RateLimit.at_most("9/m").part == "g60s"
    assert RateLimit("1/m", name="free").part == RateLimit("1/h", name="free").part == "g.free"
    assert RateLimit.bucketed("1/m", buckets=5).part == RateLimit.bucketed("2/m", buckets=6).part
    assert len({limit.part for limit in ALL}) == len(ALL) - 1
    assert RateLimit("1/m", name="a:b}").part == "g.a%3Ab%7D"


def test_limits_that_would_share_a_state_need_names() -> None:
    """The message says how to give one."""
    with pytest.raises(ValueError, match=r"share one state.*RateLimit\('20/m', name=\.\.\.\)"):
        limits_of((RateLimit("10/m"), RateLimit("20/m")))
    with pytest.raises(ValueError, match=r"write RateLimit\('10/m'\)"):
        limits_of(("10/m",))  # type: ignore[arg-type]

    limits_of((RateLimit("10/m"), RateLimit("20/m", name="other"), RateLimit.exact("10/m"), RateLimit("10/h")))


@pytest.mark.parametrize(
    ("limits", "instead"),
    [("100/m", "RateLimit('100/m')"), (RateLimit.exact("5/s"), 'RateLimit("100/m")'), (None, 'RateLimit("100/m")')],
)
def test_limits_are_a_list(limits: Any, instead: str) -> None:
    """One alone is told how to be one."""
    with pytest.raises(ValueError, match=re.escape(f"limits={limits!r} is no list; write [{instead}]")):
        limits_of(limits)
    assert limits_of(iter([RateLimit("10/m")])) == (RateLimit("10/m"),)  # type: ignore[arg-type]


@given(count=st.integers(1, 1_000_000), seconds=st.integers(1, 86_400))
def test_the_interval_is_exact(count: int, seconds: int) -> None:
    """So many calls at the steady rate take the period, and no part of a microsecond more or less."""
    limit = RateLimit(f"{count}/{seconds}s", burst=1)
    whole, rest, parts = limit.interval_us

    assert count * whole * parts + count * rest == limit.period_us * parts
    assert 0 <= rest < parts


@pytest.mark.parametrize(
    ("limit", "window", "bound"),
    [
        (RateLimit("60/m"), "60s", 119),
        (RateLimit("60/m", burst=1), "60s", 60),
        (RateLimit("60/m"), 0.001, 60),
        (RateLimit("60/m"), timedelta(minutes=2), 179),
        (RateLimit.at_most("100/m"), "60s", 100),
        (RateLimit.at_most("1/m"), "60s", 1),
        (RateLimit.at_most("100/m", burst=100), "60s", 100),
        (RateLimit.exact("100/m"), "60s", 100),
        (RateLimit.exact("100/m"), "61s", 200),
        (RateLimit.bucketed("100/m"), "60s", 100),
        (RateLimit.fixed("100/m"), "60s", 200),
        (RateLimit.fixed("100/m"), 0.001, 200),
        (RateLimit.fixed("100/m", aligned=False), "60s", 200),
        (RateLimit.fixed("100/m"), "3m", 400),
    ],
)
def test_a_limit_states_its_bound(limit: RateLimit, window: float | str | timedelta, bound: int) -> None:
    """The most that any window of that length may see."""
    assert limit.bound(window) == bound


@given(count=st.integers(1, 100_000), seconds=st.integers(1, 86_400), burst=st.integers(1, 1_000))
def test_at_most_states_its_count_for_its_period_whatever_the_burst(count: int, seconds: int, burst: int) -> None:
    """At most N means N; also with both ends of the window, which is a microsecond longer."""
    limit = RateLimit.at_most(f"{count}/{seconds}s", burst=min(count, burst))

    assert limit.bound_us(limit.period_us + 1) == count


def test_a_concurrent_limit_has_no_bound_per_time() -> None:
    """What ends at once may begin again at once."""
    with pytest.raises(ValueError, match="no bound per time"):
        RateLimit.concurrent(5).bound("1s")
    with pytest.raises(ValueError, match="is none"):
        RateLimit("1/s").bound_us(0)


@pytest.mark.parametrize("limit", ALL, ids=repr)
def test_a_limit_shows_what_it_is(limit: RateLimit) -> None:
    """Its repr tells the kinds apart."""
    assert "100" in repr(limit)
    assert len({repr(one) for one in ALL}) == len(ALL)
    assert "name='free'" in repr(RateLimit("1/s", name="free"))


def test_answers_are_true_and_false() -> None:
    """An answer can be asked as a condition, and taken apart by a pattern."""
    assert Allowed(0, 0.0)
    assert Reserved(1.0)
    assert not Limited(0.0, None)
    match Limited(2.5, None):
        case Limited(retry_after):
            assert retry_after == 2.5


def test_an_allowed_call_has_the_headers_of_its_tightest_limit() -> None:
    """Limit, Remaining and Reset tell of one limit, in whole seconds; Policy of all."""
    limits = (RateLimit("100/m"), RateLimit("5000/d"), RateLimit.concurrent(3))

    assert Allowed(7, 3.2, limits[0], limits).headers() == [
        ("RateLimit-Limit", "100"),
        ("RateLimit-Remaining", "7"),
        ("RateLimit-Reset", "4"),
        ("RateLimit-Policy", "100;w=60, 5000;w=86400"),
    ]


def test_a_limited_call_is_told_when_to_come_again() -> None:
    """Retry-After is at least a second, and rounded up: who comes then is not too early."""
    limit = RateLimit("100/m")

    assert Limited(12.1, limit, "limit", 3, 60.0, (limit,)).headers() == [
        ("RateLimit-Limit", "100"),
        ("RateLimit-Remaining", "3"),
        ("RateLimit-Reset", "60"),
        ("RateLimit-Policy", "100;w=60"),
        ("Retry-After", "13"),
    ]
    assert Limited(0.0, None, "unavailable").headers() == [("Retry-After", "1")]
    assert Allowed(0, 0.0).headers() == []


def test_what_was_not_charged_has_nothing_to_release() -> None:
    """An answer that was given without Redis can be left like any other."""
    with Allowed(0, 0.0) as decision:
        decision.release()
