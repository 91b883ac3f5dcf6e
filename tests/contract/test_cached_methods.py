"""``@cached`` on methods, with and without a key of its own: what makes two calls one, and what can be done to one."""

import uuid
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from functools import partial

import pytest

from petiole.cachelib import MISS, CachedFunction, cached


@pytest.fixture
def calls():
    return []


@pytest.fixture
def shop(cache, calls):
    """A class with cached methods of each kind."""

    class Shop:
        """Its instances differ by their id."""

        def __init__(self, id: int) -> None:
            self.id = id

        @cached(cache, "price:{self.id}:{item}", tags=["shop:{self.id}"])
        def price(self, item: str, currency: str = "EUR") -> list:
            """What an item costs."""
            calls.append(("price", self.id, item))
            return [self.id, item, len(calls)]

        @cached(cache)
        def weight(self, item: str, *, unit: str = "kg") -> list:
            calls.append(("weight", item, unit))
            return [item, unit, len(calls)]

        @classmethod
        @cached(cache, "kinds:{cls.__name__}:{n}")
        def kinds(cls, n: int) -> list:
            calls.append(("kinds", cls.__name__, n))
            return [cls.__name__, n, len(calls)]

        @staticmethod
        @cached(cache, "rate:{of}")
        def rate(of: str) -> list:
            calls.append(("rate", of))
            return [of, len(calls)]

    return Shop


# Methods


def test_a_method_is_cached_for_what_its_key_names_of_the_instance(shop, calls):
    """Two instances that the key does not tell apart share their values."""
    assert shop(1).price("a") == shop(1).price(item="a") == [1, "a", 1]
    assert shop(2).price("a") == [2, "a", 2]
    assert calls == [("price", 1, "a"), ("price", 2, "a")]


def test_a_method_called_by_its_class_is_the_same_call(shop, calls):
    """With the instance as the first argument."""
    one = shop(1)

    assert shop.price(one, "a") == one.price("a")
    assert shop.price.key(one, "a") == one.price.key("a") == "price:1:a"
    assert len(calls) == 1


def test_without_a_key_the_instance_is_left_out(shop, calls):
    """All instances share the values: the arguments alone make the key."""
    assert shop(1).weight("a") == shop(2).weight("a") == ["a", "kg", 1]
    assert shop(1).weight("a", unit="g") == ["a", "g", 2]
    assert shop(1).weight.key("a") == shop(2).weight.key(item="a", unit="kg")
    assert len(calls) == 2


def test_what_a_bound_method_can_do(shop, cache, calls):
    """All that a function can, for its instance alone."""
    one, two = shop(1), shop(2)
    one.price("a"), two.price("a")

    assert one.price.get("a") == [1, "a", 1]
    assert one.price.get("b") is MISS
    assert one.price.original("a") == [1, "a", 3]
    assert one.price.set(["set"], "a")
    assert one.price("a") == ["set"]
    assert one.price.refresh("a")
    assert one.price("a") == [1, "a", 4]
    one.price.invalidate("a")
    assert one.price.get("a") is MISS
    assert two.price("a") == [2, "a", 2]
    assert cache.invalidate(tags=["shop:2"]) == 1
    assert two.price.get("a") is MISS


def test_what_an_unbound_method_can_do(shop, calls):
    """The same, with the instance as the first argument."""
    one = shop(1)
    shop.price(one, "a")

    assert isinstance(shop.price, CachedFunction)
    assert shop.price.get(one, "a") == [1, "a", 1]
    assert shop.price.original(one, "a") == [1, "a", 2]
    assert shop.price.set(["set"], one, "a")
    assert one.price("a") == ["set"]
    assert shop.price.refresh(one, "a")
    assert one.price("a") == [1, "a", 3]
    shop.price.invalidate(one, "a")
    assert one.price.get("a") is MISS
    assert list(shop.price.tags(one, "a")) == ["shop:1"]


def test_a_method_without_a_key_can_do_the_same(shop, calls):
    """Bound and unbound mean the same calls."""
    one = shop(1)
    assert one.weight.set(["set"], "a")
    assert shop(2).weight("a") == shop.weight(one, "a") == ["set"]
    assert one.weight.refresh("a")
    assert one.weight.get("a") == ["a", "kg", 1]
    shop.weight.invalidate(one, "a")
    assert one.weight.get("a") is MISS


def test_a_class_method_is_cached_for_its_class(shop, calls):
    """What a subclass inherits is a call of its own, where the key says so."""

    class Bakery(shop):
        pass

    assert shop.kinds(1) == shop(7).kinds(1) == ["Shop", 1, 1]
    assert Bakery.kinds(1) == ["Bakery", 1, 2]
    assert shop.kinds.get(1) == ["Shop", 1, 1]
    shop.kinds.invalidate(1)
    assert shop.kinds.get(1) is MISS
    assert Bakery.kinds.get(1) == ["Bakery", 1, 2]
    assert Bakery.kinds.key(1) == "kinds:Bakery:1"


def test_a_static_method_is_a_function(shop, calls):
    """By the class and by an instance."""
    assert shop.rate("a") == shop(1).rate("a") == ["a", 1]
    assert shop.rate.key("a") == shop(1).rate.key("a") == "rate:a"
    assert shop.rate.refresh("a")
    assert shop(1).rate.get("a") == ["a", 2]
    shop(1).rate.invalidate("a")
    assert shop.rate.get("a") is MISS


def test_a_class_method_without_a_key_leaves_the_class_out(cache):
    """As a method leaves out the instance."""

    class Shop:
        @classmethod
        @cached(cache)
        def name(cls, n: int) -> str:
            return f"{cls.__name__}{n}"

    class Bakery(Shop):
        pass

    assert Shop.name(1) == Bakery.name(1) == "Shop1"
    assert Shop.name.key(2) == Bakery.name.key(2)


@pytest.mark.parametrize("kind", [classmethod, staticmethod])
def test_the_order_that_makes_no_sense_is_refused_or_works(cache, kind):
    """``@cached`` outside of ``@staticmethod`` is the same function; outside of ``@classmethod`` it cannot be."""

    def made():
        class Shop:
            @cached(cache, "kinds:{n}")
            @kind
            def kinds(*arguments, n: int = 1) -> list:
                return [n]

        return Shop

    try:
        shop = made()
    except (TypeError, ValueError) as error:
        assert "classmethod" in str(error) or "callable" in str(error)  # noqa: PT017 - either is right
    else:
        assert shop.kinds(n=2) == shop.kinds(n=2) == [2]


def test_a_method_keeps_what_it_is_known_by(shop):
    """Its name, its docstring, its signature."""
    assert shop.price.__name__ == "price"
    assert shop.price.__doc__ == "What an item costs."
    assert "price" in repr(shop.price)
    assert "price:{self.id}:{item}" in repr(shop.price)
    assert "price" in repr(shop(1).price)


def test_a_key_that_names_what_is_no_argument_is_refused_at_once(cache):
    """And not at the first call."""
    with pytest.raises(ValueError, match="'itm', which is no argument here; there are: self, item"):

        class Shop:
            @cached(cache, "price:{itm}")
            def price(self, item: str) -> int:
                return 1


def test_what_the_key_names_of_the_instance_must_be_there(cache):
    """A missing attribute is told as such, and nothing is cached."""

    class Shop:
        @cached(cache, "price:{self.id}")
        def price(self) -> int:
            return 1

    with pytest.raises(AttributeError, match="id"):
        Shop().price()


def test_a_call_that_the_method_does_not_take_is_refused(shop, calls):
    """Before anything is looked up; also by what is done to it."""
    for call in (
        shop(1).price,
        shop(1).price.key,
        shop(1).price.get,
        shop(1).price.invalidate,
        shop(1).price.refresh,
        partial(shop(1).price.set, 7),
    ):
        with pytest.raises(TypeError, match="argument"):
            call()
    assert calls == []


def test_two_instances_keep_their_own_while_they_load(shop, calls):
    """A bound method is made anew at each access, and holds no state."""
    one, two = shop(1).price, shop(2).price

    assert [one("a"), two("a"), one("a"), two("a")] == [[1, "a", 1], [2, "a", 2]] * 2


# Without a key


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Point:
    x: int
    y: int


@dataclass(frozen=True)
class Vector:
    x: int
    y: int


@pytest.fixture
def load(cache, calls):
    @cached(cache)
    def load(*arguments, **keywords):
        calls.append((arguments, keywords))
        return len(calls)

    return load


def test_without_a_key_all_arguments_make_it(cache, calls):
    """Positions, keywords, their order and defaults do not matter: one call is one call."""

    @cached(cache)
    def load(a, b=2, *, c=3, **others):
        calls.append((a, b, c, others))
        return [len(calls)]

    same = [
        load(1),
        load(1, 2),
        load(a=1),
        load(b=2, a=1),
        load(1, c=3),
        load(c=3, b=2, a=1),
    ]
    assert same == [[1]] * 6
    assert load(1, x=1, y=2) == load(1, y=2, x=1) == [2]
    assert load({"a": 1, "b": 2}) == load({"b": 2, "a": 1}) == [3]
    assert [load(2), load(1, 3), load(1, c=4), load(1, x=1)] == [[4], [5], [6], [7]]


def test_without_a_key_types_are_told_apart(load, calls):
    """A user's number and the text of it, or True, must never be one another's value."""
    unlike = [
        *(1, True, "1", 1.0, b"1", None, "None", "", 0, False, "True"),
        *([], {}, [1], ["1"], [[1]], {"1": 1}, {"a": None}),
    ]
    keys = [load.key(one) for one in unlike]

    assert len(set(keys)) == len(unlike)
    assert [load(one) for one in unlike] == list(range(1, len(unlike) + 1))
    assert [load(one) for one in unlike] == list(range(1, len(unlike) + 1))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Decimal(1), "1"),
        (uuid.UUID(int=1), str(uuid.UUID(int=1))),
        (Colour.RED, "red"),
        (Point(1, 2), Vector(1, 2)),
        (Point(1, 2), {"x": 1, "y": 2}),
        ((1, 2), [1, 2]),
        ({1, 2}, [1, 2]),
    ],
    ids=lambda value: str(value)[-12:],
)
def test_without_a_key_values_of_two_types_are_told_apart(load, one, other):
    """Also where a format would store them alike."""
    assert load.key(one) != load.key(other)
    assert load.key([one]) != load.key([other])
    assert load.key(one) == load.key(one)


@pytest.mark.parametrize(("one", "other"), [({1: "a"}, {"1": "a"}), ({True: "a"}, {1: "a"})], ids=str)
def test_without_a_key_dicts_by_other_keys_than_text_are_told_apart_or_refused(load, one, other):
    """What cannot be told apart is not guessed at."""
    keys = []
    for argument in (one, other):
        try:
            keys.append(load.key(argument))
        except TypeError as error:
            keys.append(f"{argument}: {error}")

    assert keys[0] != keys[1]
    assert all("give a key template" in key for key in keys if key.startswith("{"))


def test_without_a_key_sets_are_told_by_what_is_in_them(load):
    """Not by the order in which a process has them."""
    words = [f"word{i}" for i in range(50)]
    forwards, backwards = set(words), set()
    for word in words[::-1]:
        backwards.add(word)

    assert load.key(forwards) == load.key(backwards)
    assert load.key(forwards) != load.key(set(words[1:]))


def test_without_a_key_two_functions_are_told_apart(cache):
    """Also of the same name in two classes."""

    class A:
        @cached(cache)
        def load(self, n: int) -> str:
            return f"A{n}"

    class B:
        @cached(cache)
        def load(self, n: int) -> str:
            return f"B{n}"

    assert [A().load(1), B().load(1), A().load(1)] == ["A1", "B1", "A1"]


def test_without_a_key_it_is_short_and_tells_whose_it_is(load):
    """However long the arguments are; a person sees the function."""
    key = load.key("x" * 100_000)

    assert len(key) < 300
    assert "load" in key


def test_arguments_that_cannot_be_told_apart_are_refused(load, calls):
    """With what to do; two objects that look alike might not be."""
    for argument in (object(), lambda: 1, iter([1])):
        with pytest.raises(TypeError, match="give a key template"):
            load(argument)
    assert calls == []


def test_a_method_without_a_key_and_without_arguments_is_one_call(cache, calls):
    """For all instances, whatever they hold."""

    class Shop:
        def __init__(self) -> None:
            self.opaque = object()

        @cached(cache)
        def items(self) -> list:
            calls.append(self)
            return [len(calls)]

    assert Shop().items() == Shop().items() == [1]


def test_a_plain_function_may_call_its_first_argument_as_it_likes(cache):
    """It is a method where it stands in a class; elsewhere every argument counts."""

    @cached(cache)
    def load(first, second=0):
        return [first, second]

    assert load(1) == [1, 0]
    assert load(2) == [2, 0]
    assert load.key(1) != load.key(2)
