"""Entries: what is stored comes back, what is not an entry is refused, and age and tags decide."""

import math
from contextlib import suppress

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from petiole.cachelib import entry
from petiole.cachelib.entry import Envelope, Freshness, Undecodable

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)
TAGS = st.dictionaries(st.text(min_size=1), st.text(), max_size=3)
MS = st.integers(0, 2**40)


def encoded(value=None, *, stale_ms=0, tags=None):
    return entry.encode(value, created_ms=1, stale_ms=stale_ms, load_ms=2, tags=tags or {})


def same(one, other):
    return type(one) is type(other) and one == other


@given(VALUES, MS, MS, MS, TAGS)
def test_a_value_comes_back_as_it_was_stored(value, created_ms, stale_ms, load_ms, tags):
    """Encoding and decoding change neither the value nor what is known of it."""
    stored = entry.encode(value, created_ms=created_ms, stale_ms=stale_ms, load_ms=load_ms, tags=tags)
    envelope, found = entry.decode(stored)

    assert same(found, value)
    if envelope is not None:
        assert (envelope.created_ms, envelope.stale_ms, envelope.load_ms) == (created_ms, stale_ms, load_ms)
        assert envelope.tags == tags


@given(st.integers(-(2**63), 2**63 - 1))
@example(0)
@example(-(2**63))
@example(2**63 - 1)
def test_a_plain_whole_number_is_stored_as_redis_counts(number):
    """INCRBY reads what ``set`` wrote."""
    assert encoded(number) == str(number).encode()
    assert entry.decode(encoded(number)) == (None, number)


@given(VALUES, MS, TAGS)
def test_no_envelope_looks_like_a_counter(value, stale_ms, tags):
    """The first byte tells the two forms apart."""
    stored = encoded(value, stale_ms=stale_ms, tags=tags)
    is_counter = type(value) is int and not stale_ms and not tags and -(2**63) <= value < 2**63

    assert (stored[0] in b"-0123456789") == is_counter


@pytest.mark.parametrize("value", [True, False, 2**63, 1.0])
def test_what_is_no_whole_number_of_64_bits_is_no_counter(value):
    """A flag stays a flag, and a number that Redis cannot count is kept as it is."""
    envelope, found = entry.decode(encoded(value))

    assert envelope is not None
    assert same(found, value)


@pytest.mark.parametrize("value", [7, -7])
def test_a_number_with_tags_or_a_stale_window_keeps_them(value):
    """Only a number that needs nothing else is stored bare."""
    assert entry.decode(encoded(value, stale_ms=5))[0].stale_ms == 5
    assert entry.decode(encoded(value, tags={"t": "v"}))[0].tags == {"t": "v"}


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(stored):
    """Whatever Redis holds under a key, reading it raises nothing but ``Undecodable``."""
    with suppress(Undecodable):
        entry.decode(stored)


@given(VALUES, st.data())
def test_a_damaged_entry_is_read_or_refused(value, data):
    """One changed or missing byte raises nothing but ``Undecodable``."""
    stored = bytearray(encoded(value, stale_ms=1, tags={"t": "v"}))
    place = data.draw(st.integers(0, len(stored) - 1))
    if data.draw(st.booleans()):
        del stored[place:]
    else:
        stored[place] = data.draw(st.integers(0, 255))
    with suppress(Undecodable):
        entry.decode(bytes(stored))


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"-",
        b"12x",
        b"1" * 5_000,
        b"\xc1",
        b"pickle",
        msgspec.msgpack.encode({"not": "an array"}),
        msgspec.msgpack.encode([1, 0, 0, 0]),
        msgspec.msgpack.encode([2, 0, 0, 0, {}, None]),
        msgspec.msgpack.encode([0, 0, 0, 0, {}, None]),
        msgspec.msgpack.encode(["1", 0, 0, 0, {}, None]),
        msgspec.msgpack.encode([1, 0, 0, 0, {"t": 1}, None]),
        b"\x96\x01\x00\x00\x00\x80" + b"\x91" * 100_000 + b"\xc0",
        b"\x96\x01\x00\x00\x00\x80\xdd\xff\xff\xff\xff",
        b"\x96\x01\x00\x00\x00\x80\x81\x80\x01",
        b"\x96\x01\x00\x00\x00\x80\xa1\xff",
    ],
    ids=[
        "empty",
        "minus",
        "nearly-a-number",
        "endless-number",
        "unused-opcode",
        "text",
        "map",
        "short-array",
        "format-2",
        "format-0",
        "format-text",
        "tag-version-no-text",
        "deep-nesting",
        "length-lies",
        "unhashable-key",
        "no-utf8",
    ],
)
def test_what_is_no_entry_of_this_format_is_undecodable(stored):
    """Garbage, another format's number and hostile nesting are refused, never guessed at."""
    with pytest.raises(Undecodable):
        entry.decode(stored)


@pytest.mark.parametrize("stored", [b"1_0", b"12 ", b"1\n", b"9" * 30])
def test_a_number_that_redis_would_not_count_is_no_counter(stored):
    """Only what INCRBY reads is a counter; Python's ``int`` reads more."""
    with pytest.raises(Undecodable):
        entry.decode(stored)


def envelope(stale_ms=0, tags=None):
    return Envelope(entry.FORMAT, 0, stale_ms, 0, tags or {}, msgspec.Raw(b"\xc0"))


@given(MS, st.integers(-2, 2**40))
def test_age_is_told_by_what_is_left_to_live(stale_ms, left_ms):
    """Fresh exactly while more than the stale window is left."""
    freshness = entry.judge(envelope(stale_ms), left_ms, {})
    is_stale = stale_ms > 0 and 0 <= left_ms <= stale_ms

    assert freshness is (Freshness.STALE if is_stale else Freshness.FRESH)


@given(st.dictionaries(st.text(max_size=2), st.sampled_from("vw"), min_size=1, max_size=3), st.data())
def test_an_entry_stands_with_all_its_tags(tags, data):
    """One tag whose version is another, missing or unknown makes the entry gone, whatever its age."""
    now = {
        tag: data.draw(st.sampled_from(["v", "w", None]))
        for tag in tags
        if data.draw(st.booleans(), label=f"{tag!r} was asked for")
    }
    left_ms = data.draw(st.integers(-2, 100))
    freshness = entry.judge(envelope(stale_ms=50, tags=tags), left_ms, now)

    assert (freshness is not Freshness.GONE) == all(now.get(tag) == version for tag, version in tags.items())


def test_a_counter_is_fresh_as_long_as_it_is_stored():
    """A bare number has neither tags nor a stale window."""
    assert entry.judge(None, 1, {}) is Freshness.FRESH


@given(MS, st.integers(-2, 2**41))
def test_the_fresh_part_is_what_is_left_before_the_stale_window(stale_ms, left_ms):
    """How much longer an entry is fresh is never negative."""
    assert entry.fresh_left_ms(envelope(stale_ms), left_ms) == max(0, left_ms - stale_ms)
    assert entry.fresh_left_ms(None, left_ms) == max(0, left_ms)


@given(st.integers(1, 2**40), st.floats(0, 1, exclude_max=True))
@example(1, 0.999)
@example(10, 0.999)
def test_jitter_only_shortens_and_by_a_tenth_at_most(ttl_ms, chance):
    """A TTL is an upper bound on staleness, and never becomes none."""
    jittered = entry.jittered(ttl_ms, chance)

    assert 1 <= jittered <= ttl_ms
    assert jittered >= math.floor(ttl_ms * 0.9)


def test_jitter_spreads():
    """What is written together does not expire together."""
    assert entry.jittered(1_000, 0.0) == 1_000
    assert entry.jittered(1_000, 0.5) == 950
    assert entry.jittered(1_000, 0.99) == 901


def test_tags_that_were_not_asked_for_are_named():
    """An entry may carry other tags than its reader expects."""
    assert entry.missing_tags(["a"], envelope(tags={"a": "v", "b": "v"})) == ["b"]
    assert entry.missing_tags(["a"], None) == []
