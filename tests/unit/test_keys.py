"""Names of Redis keys: no two things share one, and user text cannot break out of the braces."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from petiole.cachelib import keys
from petiole.cachelib.keys import CacheKeys

# Text that is dense in what has a meaning in a key, so that a hole is found soon.
TRICKY = st.text(st.sampled_from("ab:%{}0123457BDA*?[]\\^\n\x7fé"), min_size=1, max_size=12)
TEXT = TRICKY | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
NAMES = st.tuples(TEXT, TEXT)


@given(NAMES, NAMES)
@example(("a:b", "c"), ("a", "b:c"))
@example(("a", "%7D"), ("a", "}"))
@example(("a%3A", "b"), ("a:", "b"))
@example(("a", "b}:lease"), ("a", "b"))
def test_no_two_entries_share_a_key(first, second):
    """Another namespace or another key is always another key in Redis."""
    assume(first != second)

    (namespace, key), (other_namespace, other_key) = first, second
    assert CacheKeys(namespace).entry(key) != CacheKeys(other_namespace).entry(other_key)


@given(NAMES, NAMES)
def test_no_part_of_one_entry_is_another_entry(first, second):
    """A lease and a wake-up list are never mistaken for something stored."""
    entry = CacheKeys(first[0]).entry(first[1])
    other = CacheKeys(second[0]).entry(second[1])

    assert other not in (keys.lease(entry), keys.wake(entry, "a1"))
    assert not keys.lease(entry).startswith(CacheKeys(first[0]).entry_prefix)  # of which near caches are told
    assert len({entry, keys.lease(entry), keys.wake(entry, "a1"), keys.wake(entry, "b2")}) == 4


@given(TEXT, TEXT)
def test_kinds_do_not_meet(namespace, text):
    """An entry, its lease, a tag and a ranking of the same name are keys of their own, as are those of the whole."""
    names = CacheKeys(namespace)
    made = {names.entry(text), keys.lease(names.entry(text)), names.tag(text), names.popular(text)}

    assert len(made | {names.whole, names.sequence, keys.wake(names.entry(text), "a1")}) == 7


@given(NAMES, NAMES)
@example(("a:b", "c"), ("a", "b:c"))
def test_no_two_tags_share_a_version(first, second):
    """Nor does a tag share that of a namespace, its own or another."""
    assume(first != second)
    names, others = CacheKeys(first[0]), CacheKeys(second[0])

    assert names.tag(first[1]) not in (others.tag(second[1]), others.whole, names.whole)
    assert (names.whole == others.whole) == (names.sequence == others.sequence) == (first[0] == second[0])


@given(NAMES, TEXT)
def test_what_a_namespace_begins_with_is_its_own(first, other):
    """Near caches tell by these beginnings which keys of a server are theirs."""
    assume(first[0] != other)
    names, others = CacheKeys(first[0]), CacheKeys(other)

    assert names.entry(first[1]).startswith(names.entry_prefix)
    assert names.tag(first[1]).startswith(names.tag_prefix)
    assert names.whole.startswith(names.tag_prefix)
    assert not names.entry(first[1]).startswith(others.entry_prefix)
    assert not names.tag(first[1]).startswith(others.tag_prefix)


@given(NAMES)
def test_an_entry_is_told_from_its_own_key_and_its_lease(first):
    """And from nothing else, so that a removal by pattern touches no other kind."""
    names = CacheKeys(first[0])
    entry = names.entry(first[1])

    assert keys.entry_of(entry) == keys.entry_of(keys.lease(entry)) == entry
    for other in (names.tag(first[1]), names.popular(first[1]), names.whole, names.sequence, keys.wake(entry, "a1")):
        assert keys.entry_of(other) is None


@given(TEXT, TEXT)
def test_braces_stay_balanced(namespace, text):
    """A key has one pair of braces and nothing of the user's text outside, so its parts share a Cluster slot."""
    names = CacheKeys(namespace)
    entry = names.entry(text)
    made = (entry, names.tag(text), names.popular(text), keys.lease(entry), keys.wake(entry, "a1"))
    for key in (*made, names.whole, names.sequence):
        head, _, rest = key.partition("{")
        inner, _, tail = rest.partition("}")

        assert key.count("{") == key.count("}") == 1
        assert inner
        assert head.startswith("petiole:1:")
        assert tail == (":a1" if key == keys.wake(entry, "a1") else "")


@given(TEXT, TEXT)
def test_an_entry_its_lease_and_its_wake_up_list_share_a_slot(namespace, text):
    """One script touches all three, also in a cluster."""
    entry = CacheKeys(namespace).entry(text)
    tags = {key[key.index("{") : key.index("}") + 1] for key in (entry, keys.lease(entry), keys.wake(entry, "a1"))}

    assert len(tags) == 1


@given(TEXT, TEXT)
def test_a_key_has_no_control_characters(namespace, text):
    """What a person sees of a key in a terminal is the key."""
    assert not any(ord(c) < 0x20 or ord(c) == 0x7F for c in CacheKeys(namespace).entry(text))


@given(st.tuples(TEXT, st.integers(0, 9), st.integers(1, 9)), st.tuples(TEXT, st.integers(0, 9), st.integers(1, 9)))
@example(("a:0/1", 0, 1), ("a", 0, 1))
def test_no_two_partitions_share_a_stream(first, second):
    """The rows of two buffers never mix."""
    assume(first != second)

    assert keys.stream(*first) != keys.stream(*second)


@given(NAMES, NAMES)
def test_no_two_counters_share_a_key(first, second):
    """Counters of another kind or name are other counters."""
    assume(first != second)

    assert keys.counters(*first) != keys.counters(*second)


def test_partitions_are_listed_in_order():
    """All partitions of a buffer are named, the first one first."""
    assert keys.streams("b", 2) == [keys.stream("b", 0, 2), keys.stream("b", 1, 2)]


@pytest.mark.parametrize("make", [CacheKeys, CacheKeys("n").entry, CacheKeys("n").tag, CacheKeys("n").matching])
@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", ValueError),
        ("x" * 1_025, ValueError),
        ("é" * 513, ValueError),
        ("\ud800", ValueError),
        (b"bytes", TypeError),
        (7, TypeError),
        (None, TypeError),
        (["a"], TypeError),
    ],
)
def test_text_that_cannot_be_a_name_is_refused(make, text, error):
    """Empty, too long, not Unicode or not text: an error before anything is sent."""
    with pytest.raises(error) as caught:
        make(text)

    assert type(caught.value) is error  # a UnicodeEncodeError, which is a ValueError too, would not say what to do


def test_a_name_of_the_longest_size_is_taken():
    """The bound is in bytes and is itself allowed."""
    assert "é" * 512 in CacheKeys("n").entry("é" * 512)


def test_a_name_that_is_too_long_is_not_repeated_in_full():
    """The message says what to do, and is itself short."""
    with pytest.raises(ValueError, match="hash it first") as caught:
        CacheKeys("n").entry("x" * 100_000)

    assert len(str(caught.value)) < 200


@given(st.text(st.sampled_from("*?[]\\^ab"), min_size=1, max_size=8))
def test_a_namespace_is_literal_in_a_pattern(namespace):
    """Each character of a namespace that means something to SCAN is escaped."""
    pattern = CacheKeys(namespace).matching("k")
    prefix = pattern[: pattern.rindex(":k}")].replace("petiole:1:*:", "", 1)  # the star is for the kind
    unescaped = prefix
    for special in "*?[]\\^":
        unescaped = unescaped.replace(f"\\{special}", "")

    assert not any(special in unescaped for special in "*?[]^\\")
