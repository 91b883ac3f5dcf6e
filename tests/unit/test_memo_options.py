"""What may be said of a task's memo, and what is refused where it is declared."""

from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded

from petiole.coordination.memo_options import MemoOptions


def declared(**attributes: Any) -> type:
    """A class with some attributes."""
    return type("report", (), attributes)


@pytest.mark.parametrize(
    ("option", "error", "says"),
    [
        ({"ttl": 0}, ValueError, "ttl"),
        ({"ttl": "soon"}, ValueError, "ttl"),
        ({"stale": -1}, ValueError, "stale"),
        ({"early": 2}, ValueError, "early"),
        ({"cache": "shop"}, TypeError, "memo_cache must be a Cache"),
        ({"key": 7}, TypeError, "memo_key must be a template"),
        ({"tags": "sales"}, TypeError, r"such as \['sales'\]"),
        ({"version": None}, TypeError, "memo_version"),
        ({"short_circuit": 1}, TypeError, "memo_short_circuit"),
        ({"failures": [ValueError]}, TypeError, "for how long"),
        ({"failures": {"ValueError": 1}}, TypeError, "classes of exceptions"),
        ({"failures": {BaseException: 1}}, TypeError, "classes of exceptions"),
        ({"failures": {ValueError: "soon"}}, ValueError, r"memo_failures\[ValueError\]"),
        ({"short_circuit": True, "early": "xfetch", "ttl": 60}, ValueError, "share of the ttl"),
        ({"short_circuit": True, "early": 0.5}, ValueError, "share of the ttl"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(option: dict[str, Any], error: type[Exception], says: str) -> None:
    """The message names it and says what to do."""
    with pytest.raises(error, match=says):
        MemoOptions.checked(**option)


@pytest.mark.parametrize("kind", [Retry, Ignore, Reject, SoftTimeLimitExceeded])
def test_what_is_no_failure_cannot_be_remembered_as_one(kind: type[Exception]) -> None:
    """A retry that is on its way must not be raised again for another task."""
    with pytest.raises(ValueError, match=f"{kind.__name__}, which is no failure"):
        MemoOptions.checked(failures={kind: 1})


@pytest.mark.parametrize(
    ("attributes", "on"),
    [
        ({}, False),
        ({"memo_ttl": None, "memo_tags": (), "memo_on": None}, False),
        ({"memo_on": True}, True),
        ({"memo_ttl": 5}, True),
        ({"memo_key": "{x}"}, True),
        ({"memo_ttl": 5, "memo_on": False}, False),
    ],
)
def test_a_task_is_memoized_when_it_says_something_of_its_memo(attributes: dict[str, Any], on: bool) -> None:
    """So that a base class for all tasks memoizes none by itself."""
    assert (MemoOptions.of(declared(**attributes)) is not None) == on


def test_a_misspelt_option_is_refused() -> None:
    """An attribute that nobody reads would be an option that silently does nothing."""
    with pytest.raises(TypeError, match="unknown option 'memo_tll' of report; did you mean 'memo_ttl'"):
        MemoOptions.of(declared(memo_tll=5))


def test_a_ttl_may_be_a_function_of_the_result() -> None:
    """As an attribute of a class it does not become a method."""
    options = MemoOptions.of(declared(memo_ttl=lambda value: value))

    assert options is not None
    assert options.policy["ttl"](7) == 7
