"""Durations: what callers may write, and what it means in milliseconds."""

import math
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petiole.cachelib.durations import LONGEST_MS, milliseconds


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (1, 1_000),
        (0.25, 250),
        ("250ms", 250),
        ("90s", 90_000),
        ("5m", 300_000),
        ("2h30m", 9_000_000),
        ("1d", 86_400_000),
        ("1.5s", 1_500),
        (timedelta(minutes=1, milliseconds=1), 60_001),
    ],
)
def test_seconds_text_and_timedelta_are_durations(duration, expected):
    """All three spellings become whole milliseconds."""
    assert milliseconds(duration, "ttl") == expected


@pytest.mark.parametrize("duration", [0.0001, "0.01ms", timedelta(microseconds=1)])
def test_less_than_a_millisecond_counts_as_one(duration):
    """A TTL that rounds to nothing would be none."""
    assert milliseconds(duration, "ttl") == 1


@pytest.mark.parametrize(
    "duration", [0, -1, -0.001, math.nan, math.inf, -math.inf, "0s", timedelta(0), timedelta(seconds=-1)]
)
def test_what_is_not_more_than_zero_is_refused(duration):
    """Zero, negative and endless durations are errors that name the argument."""
    with pytest.raises(ValueError, match=r"^ttl="):
        milliseconds(duration, "ttl")


@pytest.mark.parametrize("duration", [0, 0.0, "0s", timedelta(0)])
def test_zero_is_a_duration_where_it_is_allowed(duration):
    """A stale window may be none."""
    assert milliseconds(duration, "stale", zero_allowed=True) == 0


@pytest.mark.parametrize("duration", [-1, math.nan, "-1s"])
def test_zero_allowed_allows_nothing_less(duration):
    """A stale window is never negative."""
    with pytest.raises(ValueError, match=r"^stale="):
        milliseconds(duration, "stale", zero_allowed=True)


@pytest.mark.parametrize("duration", ["", " ", "5", "5 m", "m", "5x", "5m5", "-5m", "1e3s", "5m\n", "5M"])
def test_text_that_is_no_duration_is_refused_with_an_example(duration):
    """The message shows what to write."""
    with pytest.raises(ValueError, match=r"is not a duration.*2h30m"):
        milliseconds(duration, "ttl")


@pytest.mark.parametrize("duration", [True, False, None, [5], b"5m", {"seconds": 5}, object()])
def test_another_type_is_a_type_error(duration):
    """A flag is no number of seconds."""
    with pytest.raises(TypeError, match=r"^ttl must be"):
        milliseconds(duration, "ttl")


def test_what_is_longer_than_ten_years_is_a_mistake_in_the_unit():
    """Milliseconds where seconds were meant are found out."""
    assert milliseconds(LONGEST_MS / 1_000, "ttl") == LONGEST_MS

    with pytest.raises(ValueError, match="ten years"):
        milliseconds(LONGEST_MS / 1_000 + 1, "ttl")


def test_a_number_beyond_floats_is_a_value_error_like_any_other():
    """However absurd a number is, it is refused as what it is."""
    with pytest.raises(ValueError, match=r"^ttl="):
        milliseconds(10**400, "ttl")


@given(st.integers(1, LONGEST_MS))
def test_whole_milliseconds_survive_every_spelling(ms):
    """No spelling adds or loses a millisecond."""
    assert milliseconds(f"{ms}ms", "ttl") == ms
    assert milliseconds(timedelta(milliseconds=ms), "ttl") == ms


@given(st.integers(1, 10_000_000))
def test_seconds_with_three_decimals_are_exact(ms):
    """A duration in seconds never becomes longer by the rounding of floats."""
    assert milliseconds(ms / 1_000, "ttl") == ms


@given(st.floats(min_value=1e-6, max_value=3e8))
def test_rounding_is_upwards_and_by_less_than_a_millisecond(seconds):
    """What is asked for is never cut to nothing."""
    ms = milliseconds(seconds, "ttl")

    assert ms >= 1
    assert abs(ms - seconds * 1_000) < 1.001
