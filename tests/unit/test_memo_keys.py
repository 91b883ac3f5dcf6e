"""Keys of calls: the same however a call is spelled and however it travelled, and another for another call."""

import dataclasses
import json as plain_json
import math
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils import json
from pydantic import BaseModel, Field

from petiole.coordination.memo_keys import MemoKeys, canonical

through_json = partial(lambda value: json.loads(json.dumps(value)))


def sent(value: Any) -> str:
    """The text that is sent for a value, whatever the order of its keys."""
    return plain_json.dumps(plain_json.loads(json.dumps(value)), sort_keys=True)


def one(value: Any) -> None:
    """A task's function with one argument."""


def keys(function: Callable[..., Any] = one, **options: Any) -> MemoKeys:
    return MemoKeys(function, **{"bound": False, "key": None, "tags": (), "version": "", **options})


def key(*arguments: Any, of: MemoKeys | None = None, **keywords: Any) -> str:
    return (of or keys()).call("task", arguments, keywords).key


ZONES = [None, UTC, timezone(timedelta(hours=2)), ZoneInfo("Europe/Berlin")]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.decimals(allow_nan=False)
    | st.datetimes(timezones=st.sampled_from(ZONES))
    | st.dates()
    | st.times()
    | st.uuids()
)
dict_keys = st.text() | st.integers() | st.booleans() | st.none()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(dict_keys, inner, max_size=4)
    ),
    max_leaves=12,
)


def carried(value: Any) -> bool:
    """Whether a dict in it has two keys that a message would make one, or looks like kombu's own marks."""
    if isinstance(value, list | tuple):
        return all(map(carried, value))
    if isinstance(value, dict):
        names = [name if isinstance(name, str) else json.dumps(name) for name in value]
        return (
            len(set(names)) == len(names)
            and {*names} != {"__type__", "__value__"}
            and all(map(carried, value.values()))
        )
    return True


@given(values.filter(carried))
def test_a_message_does_not_change_the_key(value: Any) -> None:
    """What the sender computes is what the worker computes: whatever JSON carries."""
    assert key(value) == key(through_json(value))


@given(values.filter(carried), values.filter(carried))
def test_what_a_message_tells_apart_has_another_key(left: Any, right: Any) -> None:
    """Two values have one key exactly if the same text is sent for them."""
    assert (key(left) == key(right)) == (sent(left) == sent(right))


class Colour(Enum):
    RED = "red"


class Text(str, Enum):  # noqa: UP042 - as many still are
    RED = "red"


class Number(IntEnum):
    ONE = 1


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Data:
    x: int


class Record(msgspec.Struct):
    x: int


class Sent:
    """A type that knows how to be sent."""

    def __repr__(self) -> str:
        return "<Sent>"

    def __json__(self) -> Any:
        return {"x": (1, 2)}


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (Text.RED, "red"),
        (Number.ONE, 1),
        (Point(1, 2), [1, 2]),
        ({1: {2: (3,)}}, {"1": {"2": [3]}}),
        ({True: 1, None: 2, 1.5: 3}, {"true": 1, "null": 2, "1.5": 3}),
        ({Text.RED: 1}, {"red": 1}),
        ({"b": 1, "a": 2}, {"a": 2, "b": 1}),
        (Sent(), {"x": [1, 2]}),
        (2**80, 2**80),
    ],
    ids=repr,
)
def test_what_a_message_makes_the_same_has_one_key(value: Any, arrives: Any) -> None:
    """The call before it was sent, and as it arrives."""
    assert key(value) == key(arrives)


APART = [
    1, True, 1.0, "1", None, "None", b"1", [1], ["1"], {"1": 1}, [], {}, "", 0, False, math.inf, "inf", 2**80,
    str(2**80), date(2024, 1, 1), datetime(2024, 1, 1), "2024-01-01", "2024-01-01T00:00:00",  # noqa: DTZ001
    datetime(2024, 1, 1, tzinfo=UTC), time(1), timedelta(1), Decimal(1), Decimal("1.0"), UUID(int=1), UUID(int=1).hex,
    Colour.RED, "red", {1, 2}, frozenset({1, 2}), [1, 2], Data(1), Record(1), {"x": 1}, [[1]], [[], 1],
]  # fmt: skip


def test_values_that_differ_have_keys_that_differ() -> None:
    """Types are strict, also where Python calls two values equal."""
    by_key: dict[str, list[Any]] = {}
    for value in APART:
        by_key.setdefault(key(value), []).append(value)

    assert [values for values in by_key.values() if len(values) > 1] == []


def test_what_no_message_carries_is_told_apart_by_its_value() -> None:
    """For direct calls, and for serializers that change nothing."""
    assert key({3, 1, 2}) == key({2, 3, 1}) != key({1, 2})
    assert key(Data(1)) == key(Data(1)) != key(Data(2))
    assert key(Record(1)) != key(Record(2))
    assert key(timedelta(hours=24)) == key(timedelta(days=1))


def test_one_call_may_be_spelled_in_many_ways() -> None:
    """By position or keyword, with a default given or left out."""

    def function(region: str, year: int = 2024, *rest: int, detail: Any = None, **more: int) -> None: ...

    made = keys(function)
    same = {
        key("north", of=made),
        key("north", 2024, of=made),
        key(year=2024, region="north", detail=None, of=made),
    }
    others = {key("north", 2025, of=made), key("north", 2024, 1, of=made), key("north", x=1, of=made)}

    assert len(same) == 1
    assert len(others - same) == 3


class Model(BaseModel):
    x: int
    when: date = date(2024, 1, 1)
    size: int = Field(default=1, alias="big")


def test_a_model_and_the_dict_it_is_sent_as_have_one_key() -> None:
    """Also a dict that leaves out what has a default, as some senders write it, and an optional model."""

    def function(model: Model | None, other: int = 1) -> None: ...

    made = keys(function, restores_models=True)
    model = Model(x=7)
    same = {
        key(model, of=made),
        key(model.model_dump(mode="json", by_alias=True), of=made),
        key({"x": 7}, of=made),
        key({"x": "7", "when": "2024-01-01"}, of=made),
    }

    assert len(same) == 1
    assert key(Model(x=8), of=made) not in same
    assert key({"y": 1}, of=made) != key({"y": 2}, of=made), "what is no model fails in the task, and has keys too"


def test_a_template_sees_a_model_wherever_it_is_filled() -> None:
    """Its attributes can be named although the worker is given a dict."""

    def function(model: Model) -> None: ...

    made = keys(function, key="{model.x}", tags=["x:{model.x}"], restores_models=True)

    assert made.call("task", (Model(x=7),), {})[:2] == made.call("task", ({"x": 7},), {})[:2] == ("task:7", ("x:7",))


def test_a_template_is_filled_with_what_arrives() -> None:
    """A tuple, a number as a key, an enum: as the worker has them."""
    made = keys(key="{value}")

    assert key((1, 2), of=made) == key([1, 2], of=made)
    assert key({1: 2}, of=made) == key({"1": 2}, of=made)
    assert key(Text.RED, of=made) == key("red", of=made) == "task:red"


def test_a_long_template_makes_a_short_key() -> None:
    """A key has to fit the cache; two that begin alike stay two."""
    made = keys(key="{value}")

    assert len(key("x" * 10_000, of=made)) < 100
    assert key("x" * 10_000, of=made) != key("x" * 10_001, of=made)


def test_the_version_is_part_of_the_key() -> None:
    """Another version, another call."""
    assert len({key("a", of=keys(key="{value}", version=version)) for version in ("", "1", "2")}) == 3


def test_a_bound_task_is_told_apart_by_the_other_arguments() -> None:
    """Its first argument is the task itself, which no caller gives."""

    def function(self: Any, region: str) -> None: ...

    assert key("north", of=keys(function, bound=True)) == key(region="north", of=keys(function, bound=True))
    with pytest.raises(ValueError, match="no argument here; there are: region"):
        keys(function, bound=True, key="{self}")


def nested() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (object(), "value, a object: .*key template"),
        ([object()], "value, a list: .*key template"),
        ({1: 1, "1": 2}, "two keys"),
        ({(1, 2): 1}, "a tuple is the key of a dict"),
        (nested(), "nested too deeply"),
    ],
    ids=["object", "inside", "two keys", "tuple as key", "deep"],
)
def test_what_makes_no_key_is_a_type_error_that_says_so(value: Any, says: str) -> None:
    """It names the task and the argument, and not the value, which may be a secret."""
    with pytest.raises(TypeError, match=f"task.*{says}"):
        key(value)


def test_a_call_that_does_not_fit_is_a_type_error() -> None:
    """As a call of the function is."""
    with pytest.raises(TypeError, match="missing a required argument: 'value'"):
        key()


def test_a_template_that_cannot_be_filled_is_a_type_error() -> None:
    """It names the template and the task."""
    with pytest.raises(TypeError, match=r"'\{value.x\}' cannot be filled from this call of task"):
        key(1, of=keys(key="{value.x}"))


def test_a_canonical_form_is_one_that_messagepack_has() -> None:
    """Whatever the value: the encoder needs no help."""
    msgspec.msgpack.encode([canonical(value) for value in APART])


def test_a_call_that_the_function_does_not_take_names_the_task() -> None:
    with pytest.raises(TypeError, match=r"^task\(\): missing a required argument: 'value'$"):
        key()
    with pytest.raises(TypeError, match=r"^task\(\): too many positional arguments$"):
        key(1, 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"key": "value"}, r"^key= of one: 'value' is the same for all calls; write '\{value\}'"),
        ({"key": "{}"}, r"^key= of one: '\{\}' has braces without a name, .* there are: value"),
        ({"key": "{value"}, r"^key= of one: '\{value' is no template: "),
        ({"key": "{nope}", "what": "unique= of task"}, "^unique= of task: .* names 'nope'"),
        ({"tags": ["{nope}"]}, "^tags= of one: .* names 'nope'"),
    ],
)
def test_a_template_that_cannot_be_meant_is_refused_with_the_names_of_function_and_option(
    options: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        keys(**options)


def test_a_tag_may_be_called_as_an_argument_is() -> None:
    """It need not tell calls apart."""
    assert keys(tags=["value"]).call("task", [1], {}).tags == ("value",)
