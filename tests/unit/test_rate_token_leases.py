"""Tokens that are handed out later than they are charged never make a bound larger than it was declared."""

import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from petiole.coordination import Allowed, Limited, RateLimit
from petiole.coordination.rate_algorithms import Smooth
from petiole.coordination.token_leases import LONGEST_US, TokenLeases, burst_besides, lease_us

ANSWER = Allowed(5, 1.0)
START_US = 1_700_000_000_000_000

limits = st.builds(
    lambda n, burst: RateLimit(f"{n}/s", burst=burst), st.sampled_from([1, 3, 10, 50, 1000]), st.integers(8, 60)
)
steps = st.lists(
    st.tuples(
        st.integers(0, 3),  # process
        st.sampled_from([0, 0, 0.25, 0.5, 1, 2, 4]),  # leases that pass before it asks
        st.integers(1, 3),  # cost
        st.sampled_from([1, 1, 60]),  # how often it asks
        st.sampled_from([0, 0, 0.3]),  # leases that pass while the question is under way
    ),
    min_size=4,
    max_size=16,
)


def as_late_as_possible(leases: int) -> list[tuple[int, float, int, int, float]]:
    """Each process takes a lease and uses one token; later all of them use what they have, and ask for more."""
    first, *others = range(4)
    everything = [(first, leases, 1, 60, 0.0), *((process, 0.0, 1, 60, 0.0) for process in others)]
    return [*((process, 0.0, 1, 1, 0.0) for process in range(4)), *everything]


@example(limit=RateLimit("10/s", burst=40), schedule=as_late_as_possible(1), tokens=8)
@example(limit=RateLimit("10/s", burst=40), schedule=as_late_as_possible(2), tokens=8)
@settings(max_examples=400, deadline=None)
@given(limit=limits, schedule=steps, tokens=st.integers(1, 8))
def test_no_schedule_of_several_processes_uses_more_than_the_bound(
    limit: RateLimit, schedule: list[tuple[int, float, int, int, float]], tokens: int
) -> None:
    """Four processes that ask slowly and use late: in no window is more used than the limit declares."""
    try:
        lasting_us = lease_us((limit,), tokens)
    except ValueError:
        return
    burst = burst_besides(limit, lasting_us)
    smaller = RateLimit(limit.rate, burst=burst)
    model, processes = Smooth(), [TokenLeases(lasting_us) for _ in range(4)]
    used: list[tuple[int, int]] = []
    now_us = START_US
    for process, waits, cost, times, under_way in schedule:
        now_us += int(waits * lasting_us - 1) if waits else 0
        leases, cost = processes[process], min(cost, burst)
        for _ in range(times):
            found = leases.take("key", cost, now_us)
            if isinstance(found, tuple):
                used.append((now_us, cost))
            elif found is None:
                asked_us = now_us
                now_us += int(under_way * lasting_us)  # others see the charge from here on
                if model.earliest(smaller, now_us, cost) > now_us:
                    break
                charged = max(cost, min(tokens, model.left(smaller, now_us)[0]))
                model.charge(smaller, now_us, charged, now_us)
                used.append((now_us, cost))
                leases.put("key", charged - cost, asked_us, ANSWER)
    for first, (from_us, _) in enumerate(used):
        total = 0
        for until_us, cost in used[first:]:
            total += cost
            assert total <= limit.bound_us(until_us - from_us + 1)


def test_a_lease_lasts_a_second_or_a_quarter_of_the_burst() -> None:
    """What may be used late is taken from the burst, so it must be a small part of it."""
    assert lease_us((RateLimit("100/m"),), 10) == LONGEST_US
    assert lease_us((RateLimit("1000/s"),), 10) == 250_000
    assert burst_besides(RateLimit("1000/s"), 250_000) == 750
    assert lease_us((RateLimit("100/m"), RateLimit("1000/s")), 10) == 250_000


@pytest.mark.parametrize(
    ("limit", "tokens", "message"),
    [
        (RateLimit.exact("100/m"), 5, r"RateLimit\(rate\) or RateLimit.at_most"),
        (RateLimit.concurrent(5), 5, "handed out later"),
        (RateLimit("100/m"), -1, "lease_tokens=-1"),
        (RateLimit("100/m"), True, "lease_tokens=True"),
        (RateLimit("100/m"), 1.5, r"lease_tokens=1\.5"),
        (RateLimit("100/m"), 99, "leaves 98; write for example burst=135"),
        (RateLimit("10/s", burst=1), 1, "leaves 0; write for example burst=4"),
        (RateLimit("1000000/s", burst=1000), 10, "or a smaller lease_tokens"),
    ],
)
def test_a_lease_that_could_exceed_the_bound_is_refused(limit: RateLimit, tokens: int, message: str) -> None:
    """The message says what to change."""
    with pytest.raises(ValueError, match=message):
        lease_us((limit,), tokens)


def test_a_token_is_used_once_and_in_time() -> None:
    """Three tokens are handed out to three; at the end of the lease there are none."""
    leases = TokenLeases(1_000)
    leases.put("a", 3, 10_000, ANSWER)

    assert [leases.take("a", 1, 10_001) for _ in range(4)] == [(ANSWER, left, 11_000) for left in (2, 1, 0)] + [None]
    leases.put("b", 3, 10_000, ANSWER)
    assert leases.take("b", 1, 11_000) is None
    assert leases.take("a", 1, 10_001) is None


def test_two_threads_that_ask_at_once_share_what_both_were_charged() -> None:
    """For as long as the shorter of the two leases lasts."""
    leases = TokenLeases(1_000)
    leases.put("a", 3, 10_000, ANSWER)

    assert leases.put("a", 2, 10_500, ANSWER) == 11_000
    assert leases.take("a", 5, 10_600) == (ANSWER, 0, 11_000)


def test_a_refusal_is_remembered_until_it_is_over() -> None:
    """For costs that are not smaller, with what is left of the wait; never for longer than a second."""
    leases = TokenLeases(1_000)
    limit = RateLimit("1/m")
    leases.refuse("a", 2, 10_000_000, Limited(0.5, limit, "limit", 1, 30.0))

    assert leases.take("a", 2, 10_200_000) == Limited(0.3, limit, "limit", 1, 29.8)
    assert leases.take("a", 1, 10_200_000) is None
    assert leases.take("a", 2, 10_500_000) is None
    leases.refuse("a", 2, 10_000_000, Limited(30.0, limit))
    assert leases.take("a", 2, 10_999_999) is not None
    assert leases.take("a", 2, 11_000_000) is None


def test_a_refusal_does_not_take_away_what_was_charged() -> None:
    """A large cost that was refused leaves the tokens for smaller ones."""
    leases = TokenLeases(1_000_000)
    leases.put("a", 3, 10_000, ANSWER)
    leases.refuse("a", 9, 10_001, Limited(0.5, None))

    assert leases.take("a", 1, 10_002) == (ANSWER, 2, 1_010_000)


def test_tokens_come_back_to_their_own_lease_only() -> None:
    """What was taken of a lease that is over is lost, not added to the next one."""
    leases = TokenLeases(1_000)
    until_us = leases.put("a", 3, 10_000, ANSWER)
    leases.take("a", 2, 10_001)
    leases.give_back("a", 2, until_us)
    leases.give_back("a", 2, until_us + 1)
    leases.give_back("b", 2, until_us)

    assert leases.take("a", 3, 10_002) == (ANSWER, 0, until_us)
    assert leases.take("a", 1, 10_002) is None
    assert leases.take("b", 1, 10_002) is None


def test_the_least_recently_asked_are_forgotten() -> None:
    """Keys come from outside; memory is bounded."""
    leases = TokenLeases(1_000, most_keys=3)
    for key in "abcd":
        leases.put(key, 1, 10_000, ANSWER)

    assert len(leases) == 3
    assert leases.take("a", 1, 10_001) is None
    assert leases.take("d", 1, 10_001)
    leases.forget("c")
    assert leases.take("c", 1, 10_001) is None


def test_a_forked_child_has_nothing_of_its_parents() -> None:
    """Two processes would hand out the same tokens."""
    leases = TokenLeases(1_000)
    leases.put("a", 3, 10_000, ANSWER)
    child = os.fork()
    if not child:
        os._exit(0 if leases.take("a", 1, 10_001) is None else 1)
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert leases.take("a", 1, 10_001)


@given(limit=limits, tokens=st.integers(1, 200))
def test_the_burst_that_the_message_proposes_is_enough(limit: RateLimit, tokens: int) -> None:
    """Who does what it says is not told something else."""
    try:
        lease_us((limit,), tokens)
    except ValueError as error:
        burst = int(str(error).split("burst=")[2].split(",")[0])
        assert lease_us((RateLimit(limit.rate, burst=burst),), tokens)
