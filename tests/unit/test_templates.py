"""Keys made of arguments: the same for the same call, another for another, and mistakes found at once."""

import inspect

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from petiole.cachelib.templates import Fingerprint, Template, key_template, signature_of


def function(user_id, size="s", *more, flag=False, **rest): ...


SIGNATURE = signature_of(function)


@pytest.mark.parametrize(
    ("arguments", "keywords"), [((7,), {}), ((), {"user_id": 7}), ((7, "s"), {}), ((7,), {"size": "s", "flag": False})]
)
def test_a_call_has_one_name_however_it_is_spelled(arguments, keywords):
    """Defaults are applied, and keywords are the same as positions."""
    assert Template("u:{user_id}:{size}:{flag}", SIGNATURE).fill(arguments, keywords) == "u:7:s:False"
    assert Fingerprint(SIGNATURE).fill(arguments, keywords) == Fingerprint(SIGNATURE).fill([7], {})


def test_a_template_reaches_into_arguments():
    """Attributes, items, conversions and formats work as in any format text."""
    template = Template("{user_id.real}:{rest[a]}:{size!r}:{more[0]:>3}", SIGNATURE)

    assert template.fill([7, "s", 1], {"a": "x"}) == "7:x:'s':  1"


@pytest.mark.parametrize("text", ["{user}", "{}", "{0}", "{user_id}{nope.a}", "{", "}", "{user_id"])
def test_a_template_that_cannot_be_filled_is_refused_at_once(text):
    """A mistake shows when the function is defined, not when it is called."""
    with pytest.raises(ValueError, match=r"."):
        Template(text, SIGNATURE)


def test_the_message_lists_what_a_template_may_name():
    """The arguments that there are stand in the message."""
    with pytest.raises(ValueError, match=r"'\{user\}' names 'user'.*user_id, size, more, flag, rest"):
        Template("{user}", SIGNATURE)


@pytest.mark.parametrize("text", ["{}", "{0}", "{nope}", "{user_id"])
def test_the_message_says_whose_template_it_is(text):
    with pytest.raises(ValueError, match=r"^key= of report: '\{"):
        Template(text, SIGNATURE, "key= of report")


def test_a_template_that_tells_calls_apart_is_not_the_bare_name_of_an_argument():
    """All calls would have one key. Any other text may be meant as one key for all."""
    with pytest.raises(ValueError, match=r"^key= of report: 'user_id' is the same for all calls; write '\{user_id\}'"):
        key_template("user_id", SIGNATURE, "key= of report")
    assert key_template("users", SIGNATURE, "").fill([7], {}) == "users"
    assert key_template("{user_id}", SIGNATURE, "").fill([7], {}) == "7"


def test_a_template_without_arguments_is_a_key():
    """A function without arguments has one result."""
    assert Template("all", inspect.signature(lambda: 0)).fill([], {}) == "all"


@pytest.mark.parametrize("name", [Template("k", signature_of(lambda a: 0)), Fingerprint(signature_of(lambda a: 0))])
@pytest.mark.parametrize(("arguments", "keywords"), [([], {}), ([1, 2], {}), ([1], {"a": 1}), ([1], {"b": 1})])
def test_a_call_that_the_function_does_not_take_is_a_type_error(name, arguments, keywords):
    """What could not be called has no key."""
    with pytest.raises(TypeError):
        name.fill(arguments, keywords)


def test_self_can_be_left_out():
    """The caller of a bound method does not give its first argument."""

    def method(self, a): ...

    assert list(signature_of(method, without_first=True).parameters) == ["a"]


ARGUMENTS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text() | st.binary() | st.lists(st.text())


@given(st.lists(ARGUMENTS, min_size=2, max_size=4), st.lists(ARGUMENTS, min_size=2, max_size=4))
def test_two_calls_have_two_fingerprints(first, second):
    """Other arguments, also of another type, are another call."""
    assume(repr(first) != repr(second))

    assert Fingerprint(SIGNATURE).fill(first, {}) != Fingerprint(SIGNATURE).fill(second, {})


@given(st.dictionaries(st.sampled_from("abcd"), ARGUMENTS, max_size=4))
def test_the_order_of_keywords_does_not_matter(keywords):
    """Keywords are a set of names."""
    backwards = dict(reversed(keywords.items()))

    assert Fingerprint(SIGNATURE).fill([1], keywords) == Fingerprint(SIGNATURE).fill([1], backwards)


@pytest.mark.parametrize(("one", "other"), [(1, "1"), (1, True), (0, False), (1, 1.0), ("a", b"a"), (None, "None")])
def test_values_that_look_alike_are_told_apart(one, other):
    """A fingerprint knows types."""
    assert Fingerprint(SIGNATURE).fill([one], {}) != Fingerprint(SIGNATURE).fill([other], {})


def circle():
    it = []
    it.append(it)
    return it


@pytest.mark.parametrize("argument", [object(), 2**70, "\ud800", lambda: 0, circle()])
def test_arguments_that_cannot_be_told_apart_are_refused(argument):
    """Two objects without a form would be one call; the message says what to give instead."""
    with pytest.raises(TypeError, match="give a key template"):
        Fingerprint(SIGNATURE).fill([argument], {})
