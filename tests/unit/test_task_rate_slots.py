"""What a worker does next with the messages that wait for a task's rate limit."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petiole.tasks.rate_slots import AHEAD_S, GiveBack, Line, Reserve, Start, Wait, as_limit, read_rate


@pytest.mark.parametrize(
    ("value", "rate"),
    [
        (None, None), ("", None), (0, None), (0.0, None), ("0", None), ("0/s", None), ("0.0/m", None),
        ("10/s", "10/s"), ("10", "10/s"), (10, "10/s"), (2.5, "2.5/s"), ("100/m", "100/m"), ("5/h", "5/h"),
        ("0.50/s", "0.5/s"), ("10.0/s", "10/s"), (" 7/m ", "7/m"), (100, "100/s"),
    ],
)  # fmt: skip
def test_a_rate_is_read_as_celery_reads_it(value: object, rate: str | None) -> None:
    """Numbers are per second."""
    assert read_rate(value) == rate


@pytest.mark.parametrize(
    "value", ["10/d", "10/", "/s", "-1/s", -1, "ten/s", "10/s/s", True, [], b"10/s", math.nan, math.inf, 1e-15, "1e3/s"]
)
def test_what_is_no_rate_is_refused_and_named(value: object) -> None:
    """Celery itself raises KeyError for "10/d", and takes -1."""
    with pytest.raises(ValueError, match="rate_limit"):
        read_rate(value)


def test_more_than_one_in_a_microsecond_is_refused() -> None:
    """No clock would tell them apart."""
    with pytest.raises(ValueError, match="microsecond"):
        read_rate("1000001/s")


@pytest.mark.parametrize(
    ("rate", "interval_us"), [("10/s", 100_000), ("0.5/s", 2_000_000), ("1.5/m", 40_000_000), ("5/h", 720_000_000)]
)
def test_a_limit_is_one_at_a_time(rate: str, interval_us: int) -> None:
    """ "10/s" is one every 100 ms, and no ten at once."""
    limit = as_limit(rate)

    assert limit.burst == 1
    assert limit.interval_us[0] == interval_us


def test_each_rate_has_a_state_of_its_own() -> None:
    """Or a worker that is told "100/s" would wait for the hour that "1/h" has begun."""
    assert as_limit("1/h").part != as_limit("100/s").part


def line_of(*messages: str, keep_s: float = math.inf) -> Line[str, str]:
    line: Line[str, str] = Line(keep_s)
    for message in messages:
        line.add(message, 0.0)
    return line


def test_a_message_starts_at_its_slot_and_not_before() -> None:
    line = line_of("a")

    assert line.next(0.0) == Reserve(math.inf)
    line.reserved(1.0, "slot")

    assert line.next(0.5) == Wait(0.5)
    assert line.next(1.0) == Start("a")
    assert line.next(1.0) is None


def test_a_slot_is_asked_for_once_per_message() -> None:
    line = line_of("a", "b")

    line.reserved(0.1, "first")
    line.reserved(0.2, "second")

    assert line.next(0.0) == Wait(0.1)


def test_no_more_is_reserved_than_a_moment_ahead() -> None:
    line = line_of("a", "b", "c")

    line.reserved(AHEAD_S, "first")

    assert line.next(0.0) == Wait(AHEAD_S)
    assert line.next(AHEAD_S) == Start("a")
    assert line.next(AHEAD_S) == Reserve(math.inf)


def test_who_was_refused_asks_later() -> None:
    line = line_of("a")

    line.refused(2.0)

    assert line.next(0.0) == Wait(2.0)
    assert line.next(2.0) == Reserve(math.inf)


def test_a_refusal_by_the_old_limit_does_not_count_under_the_new_one() -> None:
    line = line_of("a")
    line.refused(3_600.0)

    line.heard()

    assert line.next(0.0) == Reserve(math.inf)


def test_what_cannot_start_in_time_goes_back_and_leaves_its_slot_to_the_next() -> None:
    line = line_of("a", keep_s=10.0)
    line.reserved(12.0, "slot")
    line.add("b", 5.0)

    assert line.next(9.0) == Wait(1.0)
    assert line.next(10.0) == GiveBack("a")
    assert line.next(12.0) == Start("b")


def test_a_guest_starts_if_nobody_else_waits() -> None:
    line = line_of()
    line.add_guest("guest", 0.0, keep_s=1.0)
    line.reserved(0.5, "slot")

    assert line.next(0.5) == Start("guest")


def test_a_guest_goes_back_early_where_others_wait() -> None:
    line = line_of("a", keep_s=10.0)
    line.reserved(5.0, "slot")
    line.add_guest("guest", 0.0, keep_s=1.0)

    assert line.next(0.0) == Wait(1.0)
    assert line.next(1.0) == GiveBack("guest")


def test_a_guest_stays_where_the_broker_lets_it() -> None:
    line = line_of()
    line.add_guest("guest", 0.0, keep_s=math.inf)
    line.refused(100.0)

    assert line.next(50.0) == Wait(50.0)


def test_without_a_limit_all_start_in_their_order() -> None:
    line = line_of("a", "b")
    line.limited = False

    assert [line.next(0.0), line.next(0.0), line.next(0.0)] == [Start("a"), Start("b"), None]


def test_slots_that_are_to_come_are_given_back_the_latest_first() -> None:
    """Only the latest reservation of all can be given back in full."""
    line = line_of("a", "b", "c")
    for start_s in (1.0, 2.0, 3.0):
        line.reserved(start_s, f"at {start_s}")

    assert line.take_slots(1.5) == ["at 3.0", "at 2.0"]
    assert line.take_slots(1.5) == []


@given(
    st.lists(st.tuples(st.sampled_from(["message", "guest", "nothing"]), st.floats(0.0, 3.0)), max_size=60),
    st.floats(0.01, 2.0),
    st.one_of(st.just(math.inf), st.floats(0.5, 4.0)),
)
def test_nothing_starts_without_a_slot_and_nothing_stays_too_long(
    steps: list[tuple[str, float]], interval_s: float, keep_s: float
) -> None:
    """Whatever comes when, and however late the worker looks: as many starts as slots that have come, at most."""
    line: Line[int, None] = Line(keep_s)
    now_s, paid_s = 0.0, 0.0
    slots_s: list[float] = []
    came_s: dict[int, float] = {}
    left: list[Any] = []
    started = 0
    for what, later_s in steps:
        now_s += later_s
        if what != "nothing":
            came_s[len(came_s)] = now_s
            (line.add if what == "message" else lambda m, n: line.add_guest(m, n, 1.0))(len(came_s) - 1, now_s)
        while not isinstance(found := line.next(now_s), Wait | None):
            match found:
                case Reserve(within_s):
                    start_s = max(now_s, paid_s)
                    if start_s - now_s > within_s:
                        line.refused(now_s + 1.0)
                        continue
                    paid_s = start_s + interval_s
                    slots_s.append(start_s)
                    line.reserved(start_s, None)
                case Start(message):
                    started += 1
                    left.append(message)
                case GiveBack(message):
                    assert now_s - came_s[message] >= min(keep_s, 1.0) - 1e-9
                    left.append(message)
        assert started <= sum(start_s <= now_s for start_s in slots_s)
        assert all(now_s - came_s[message] < keep_s for message in came_s.keys() - set(left))
        if isinstance(found, Wait):
            assert found.delay_s > 0
        else:
            line.take_slots(now_s)
    assert len(set(left)) == len(left)
    assert len(left) + len(line) == len(came_s)
