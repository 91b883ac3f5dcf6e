"""The options of a cache and of its calls: what is taken, what is refused and with which words, what they decide."""

import math
from datetime import timedelta
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petiole.cachelib.policy import XFETCH, Loaded, Policies, Policy, early_due


def is_odd(value):
    return bool(value % 2)


def ten_seconds(value):
    return 10


def takes_over(refresh):
    return True


class NotFound(LookupError):
    pass


class NotHere(NotFound):
    pass


@pytest.mark.parametrize(
    ("option", "given", "field", "expected"),
    [
        ("ttl", 60, "ttl_ms", 60_000),
        ("ttl", 0.25, "ttl_ms", 250),
        ("ttl", "1m30s", "ttl_ms", 90_000),
        ("ttl", timedelta(hours=1), "ttl_ms", 3_600_000),
        ("ttl", ten_seconds, "ttl_of", ten_seconds),
        ("ttl", None, "ttl_ms", 300_000),
        ("stale", "10m", "stale_ms", 600_000),
        ("stale", 0, "stale_ms", 0),
        ("stale", None, "stale_ms", 0),
        ("negative_ttl", 5, "negative_ttl_ms", 5_000),
        ("negative_ttl", None, "negative_ttl_ms", None),
        ("exceptions", {NotFound: 30, KeyError: "1m"}, "exceptions", ((NotFound, 30_000), (KeyError, 60_000))),
        ("exceptions", {}, "exceptions", ()),
        ("when", is_odd, "when", is_odd),
        ("when", None, "when", None),
        ("early", 0.8, "early", 0.8),
        ("early", "xfetch", "early", "xfetch"),
        ("early", None, "early", None),
        ("refresh", "inline", "refresh", "inline"),
        ("refresh", "thread", "refresh", "thread"),
        ("refresh", takes_over, "refresh", takes_over),
        ("retry_after", 0, "retry_after_ms", 0),
        ("retry_after", "2s", "retry_after_ms", 2_000),
        ("soft_timeout", 0.1, "soft_timeout_ms", 100),
        ("soft_timeout", None, "soft_timeout_ms", None),
        ("hard_timeout", "1s", "hard_timeout_ms", 1_000),
        ("hard_timeout", None, "hard_timeout_ms", None),
        ("wait", 0, "wait_ms", 0),
        ("wait", None, "wait_ms", None),
        ("type", set[int], "type", set[int]),
    ],
)
def test_an_option_becomes_what_it_says(option, given, field, expected):
    """In milliseconds, and no other option changes."""
    changed = Policy().changed({option: given})
    fields = [name for name in Policy.__slots__ if getattr(changed, name) != getattr(Policy(), name)]

    assert getattr(changed, field) == expected
    assert fields in ([], [field])


@pytest.mark.parametrize(
    ("option", "given", "error", "message"),
    [
        *[
            (option, given, error, message)
            for option in ("ttl", "stale", "negative_ttl", "retry_after", "soft_timeout", "hard_timeout", "wait")
            for given, error, message in (
                (-1, ValueError, f"{option}=-1 must be"),
                ("soon", ValueError, f"{option}='soon' is not a duration"),
                (True, TypeError, f"{option} must be seconds.*not True"),
                ([1], TypeError, rf"{option} must be seconds.*not \[1\]"),
                (math.inf, ValueError, f"{option}=inf"),
                (1e12, ValueError, f"{option}=1000000000000.0 is longer than ten years"),
            )
        ],
        ("ttl", 0, ValueError, "ttl=0 must be more than zero"),
        ("negative_ttl", 0, ValueError, "negative_ttl=0 must be more than zero"),
        ("soft_timeout", 0, ValueError, "soft_timeout=0 must be more than zero"),
        ("hard_timeout", 0, ValueError, "hard_timeout=0 must be more than zero"),
        ("retry_after", None, TypeError, "retry_after must be seconds"),
        ("exceptions", [NotFound], TypeError, "exceptions must say for how long"),
        ("exceptions", None, TypeError, "exceptions must say for how long"),
        ("exceptions", {"NotFound": 5}, TypeError, "classes of exceptions, not 'NotFound'"),
        ("exceptions", {int: 5}, TypeError, "classes of exceptions, not <class 'int'>"),
        ("exceptions", {KeyboardInterrupt: 5}, TypeError, "classes of exceptions, not <class 'KeyboardInterrupt'>"),
        ("exceptions", {NotFound: 0}, ValueError, "exceptions=0 must be more than zero"),
        ("when", "always", TypeError, "when must be a function of the value, not 'always'"),
        ("early", 0, ValueError, "early=0 must be a share of the TTL"),
        ("early", 1, ValueError, "early=1 must be a share of the TTL"),
        ("early", True, ValueError, "early=True must be a share of the TTL"),
        ("early", math.nan, ValueError, "early=nan must be a share of the TTL"),
        ("early", "0.8", ValueError, "early='0.8' must be a share of the TTL"),
        ("refresh", None, ValueError, "refresh=None must be"),
        ("refresh", "worker", ValueError, 'refresh=\'worker\' must be "inline", "thread" or a Refresher'),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(option, given, error, message):
    """With its name, the value, and what would do."""
    with pytest.raises(error, match=message):
        Policy().changed({option: given})


@pytest.mark.parametrize(
    ("name", "near"),
    [("tll", "ttl"), ("stale_", "stale"), ("negativ_ttl", "negative_ttl"), ("hardtimeout", "hard_timeout")],
)
def test_an_unknown_option_is_refused_with_the_nearest_known_one(name, near):
    """A misspelt TTL would be none."""
    with pytest.raises(TypeError, match=f"unknown option '{name}'; did you mean '{near}'"):
        Policy().changed({name: 1})


def test_an_option_like_no_other_is_refused_with_all_that_are_known():
    """So that one need not look them up."""
    with pytest.raises(TypeError, match=r"unknown option 'zzz'; known: ttl, stale, .*type"):
        Policy().changed({"zzz": 1})


def test_options_change_what_they_name_and_nothing_else():
    """Those of the cache stay where a call does not say."""
    own = Policy().changed({"ttl": 60, "stale": 10, "refresh": "thread"})
    changed = own.changed({"ttl": 5})

    assert (changed.ttl_ms, changed.stale_ms, changed.refresh) == (5_000, 10_000, "thread")
    assert (own.ttl_ms, own.stale_ms) == (60_000, 10_000)


def test_a_ttl_by_value_is_replaced_by_one_that_is_fixed():
    """The call says more than the cache."""
    assert Policy().changed({"ttl": ten_seconds}).ttls_ms(1) == (10_000, 0)
    assert Policy().changed({"ttl": ten_seconds}).changed({"ttl": 7}).ttls_ms(1) == (7_000, 0)


def test_nothing_has_a_ttl_of_its_own_and_is_not_served_stale():
    """What is not there may soon be."""
    policy = Policy().changed({"ttl": ten_seconds, "stale": 60, "negative_ttl": 2})

    assert policy.ttls_ms(None) == (2_000, 0)
    assert policy.ttls_ms(0) == (10_000, 60_000)
    assert Policy().changed({"stale": 60}).ttls_ms(None) == (300_000, 60_000)


def test_a_ttl_by_value_is_checked_as_any():
    """A function may be wrong too."""
    with pytest.raises(ValueError, match="ttl=-3 must be more than zero"):
        Policy().changed({"ttl": lambda value: value}).ttls_ms(-3)


def test_an_exception_is_cached_by_the_first_class_that_it_is_of():
    """A subclass may come before its base."""
    policy = Policy().changed({"exceptions": {NotHere: 1, NotFound: 2}})

    assert policy.exception_ttl_ms(NotHere()) == 1_000
    assert policy.exception_ttl_ms(NotFound()) == 2_000
    assert policy.exception_ttl_ms(LookupError()) is None
    assert policy.exception_ttl_ms(KeyboardInterrupt()) is None


def test_what_a_loader_says_by_itself_is_to_be_stored():
    """And adds nothing."""
    assert Loaded(7) == Loaded(7, ttl=None, stale=None, tags=(), store=True)


# Refreshing early

DURATIONS_MS = st.integers(min_value=0, max_value=10_000_000)
CHANCES = [number / 1_000 for number in range(1_000)]


@given(left_ms=st.integers(min_value=1, max_value=10_000_000), load_ms=st.integers(min_value=1, max_value=100_000))
def test_xfetch_refreshes_with_the_probability_of_its_paper(left_ms, load_ms):
    """exp(-left/load): of a thousand chances, spread evenly, as many say so."""
    due = sum(early_due(XFETCH, fresh_left_ms=left_ms, ttl_ms=1, load_ms=load_ms, chance=chance) for chance in CHANCES)

    assert due / len(CHANCES) == pytest.approx(math.exp(-left_ms / load_ms), abs=0.0011)


@given(left_ms=DURATIONS_MS, load_ms=DURATIONS_MS, chance=st.floats(min_value=0, max_value=1, exclude_max=True))
def test_xfetch_is_the_sooner_the_longer_a_load_takes(left_ms, load_ms, chance):
    """And what is due now is due from then on; at the end it always is."""

    def due(left_ms, load_ms):
        return early_due(XFETCH, fresh_left_ms=left_ms, ttl_ms=1, load_ms=load_ms, chance=chance)

    assert due(0, load_ms)
    if due(left_ms, load_ms):
        assert due(left_ms // 2, load_ms)
        assert due(left_ms, load_ms + 1)
    if load_ms == 0 and left_ms:
        assert not due(left_ms, 0)


@given(
    share=st.floats(min_value=0.01, max_value=0.99),
    ttl_ms=st.integers(min_value=100, max_value=10_000_000),
    left=st.floats(min_value=0, max_value=1),
    chance=st.floats(min_value=0, max_value=1, exclude_max=True),
)
def test_a_share_refreshes_once_so_much_of_the_ttl_has_passed(share, ttl_ms, left, chance):
    """Neither chance nor the price of the load has a part in it."""
    fresh_left_ms = int(ttl_ms * left)
    due = {
        early_due(share, fresh_left_ms=fresh_left_ms, ttl_ms=ttl_ms, load_ms=load_ms, chance=by_chance)
        for load_ms in (0, 1_000_000)
        for by_chance in (0.0, chance)
    }
    passed_ms = ttl_ms - fresh_left_ms

    if abs(passed_ms - ttl_ms * share) > 1:
        assert due == {passed_ms > ttl_ms * share}


# Policies, each checked once


def anything(kind):
    pass


def test_a_call_without_options_has_the_policy_of_the_cache():
    """The very object: it costs nothing."""
    own = Policy().changed({"ttl": 7})

    assert Policies(own, anything).of({}) is own


def test_the_same_options_are_checked_once():
    """Every call gives them again."""
    policies = Policies(Policy(), anything)

    assert policies.of({"ttl": 5, "type": int}) is policies.of({"ttl": 5, "type": int})
    assert policies.of({"ttl": 5}) is not policies.of({"ttl": 6})


def test_true_and_one_are_kept_apart():
    """They are equal, but only one of them is a duration; whichever came first."""
    policies = Policies(Policy(), anything)

    assert policies.of({"ttl": 1}).ttl_ms == 1_000
    with pytest.raises(TypeError, match="not True"):
        policies.of({"ttl": True})
    assert policies.of({"stale": 0}).stale_ms == 0
    with pytest.raises(TypeError, match="not False"):
        policies.of({"stale": False})
    assert policies.of({"type": Literal[1]}).type != policies.of({"type": Literal[True]}).type


def test_options_that_cannot_be_looked_up_are_checked_each_time():
    """Such as a dict of exceptions, which may have changed."""
    policies, ttls = Policies(Policy(), anything), {NotFound: 30}
    before = policies.of({"exceptions": ttls})
    ttls[NotFound] = 60

    assert before.exceptions == ((NotFound, 30_000),)
    assert policies.of({"exceptions": ttls}).exceptions == ((NotFound, 60_000),)
    with pytest.raises(TypeError, match="unknown option 'tll'"):
        policies.of({"tll": 1, "exceptions": ttls})


def test_policies_are_bounded():
    """A call that makes its functions anew each time does not fill the memory."""
    policies = Policies(Policy(), anything)
    sizes = set()
    for number in range(2_000):
        assert policies.of({"when": lambda value, number=number: number}).when(None) == number
        sizes.add(len(policies._known))

    assert max(sizes) <= 256


def test_a_type_that_no_value_could_be_restored_as_is_refused_at_once():
    """By the check that the cache gives, for its own options and for those of each call."""
    asked = []

    def refuse_sets(kind):
        asked.append(kind)
        if kind is set:
            raise TypeError("no sets here")

    policies = Policies(Policy(type=int), refuse_sets)
    with pytest.raises(TypeError, match="no sets here"):
        policies.of({"type": set})
    with pytest.raises(TypeError, match="no sets here"):
        policies.of({"type": set})
    with pytest.raises(TypeError, match="no sets here"):
        Policies(Policy(type=set), refuse_sets)
    assert asked == [int, set, set, set]
    assert Policies(Policy(), refuse_sets).of({"type": Any}).type is Any
