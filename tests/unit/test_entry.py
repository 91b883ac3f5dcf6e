"""Entries: what is stored comes back, what is not an entry is refused, and age and versions decide."""

import math
from contextlib import suppress

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from petiole.cachelib import entry
from petiole.cachelib.entry import Freshness
from petiole.cachelib.formats import Undecodable

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)
TAGS = st.lists(st.text(min_size=1), max_size=3, unique=True)
MS = st.integers(0, 2**40 - 1)

WHOLE_VERSION = b"0" * 20
TOKEN = "a_token-of-16-ch"


def version(number):
    return b"%013x" % number + b"chance7"


def head(count=1, stale_ms=0, versions=None, token=TOKEN, kind=b"1"):
    """As ``head_of`` in ``lua/_versions.lua`` makes it."""
    made = b"\xc1" + kind + b"%02x%010x" % (count, stale_ms) + token.encode()
    return made + (versions if versions is not None else WHOLE_VERSION + b"".join(map(version, range(1, count))))


def body(value=None, *, tags=(), ttl_ms=1, load_ms=2, created_ms=3, how=""):
    packed = msgspec.msgpack.encode(value)
    return entry.encode(how, packed, created_ms=created_ms, ttl_ms=ttl_ms, load_ms=load_ms, tags=tags)


def stored_as(value=None, *, tags=(), stale_ms=0):
    return head(1 + len(tags), stale_ms) + body(value, tags=tags)


def versions_now(tags=()):
    return {"": WHOLE_VERSION} | {tag: version(number) for number, tag in enumerate(tags, 1)}


def same(one, other):
    return type(one) is type(other) and one == other


@given(VALUES, MS, MS, MS, MS, TAGS, st.booleans(), st.sampled_from(["", "json", "zlib"]))
def test_a_value_comes_back_as_it_was_stored(value, created_ms, ttl_ms, stale_ms, load_ms, tags, raised, how):
    """Encoding and decoding change neither the value nor what is known of it, however it is packed."""
    made = body(value, tags=tags, ttl_ms=ttl_ms, load_ms=load_ms, created_ms=created_ms, how=how)
    found = entry.decode(head(1 + len(tags), stale_ms, kind=b"x" if raised else b"1") + made)

    assert same(msgspec.msgpack.decode(entry.packed_value(found.body)), value)
    assert (found.body.created_ms, found.body.ttl_ms, found.body.load_ms) == (created_ms, ttl_ms, load_ms)
    assert (found.raised, found.body.how, found.tags) == (raised, how, tags)
    assert (found.token, found.stale_ms) == (TOKEN, stale_ms)
    assert entry.versions_of(found) == versions_now(tags)


@given(st.integers(-(2**63), 2**63 - 1), MS)
@example(0, 0)
@example(-(2**63), 0)
@example(2**63 - 1, 1)
def test_a_plain_whole_number_is_stored_as_redis_counts(number, stale_ms):
    """INCRBY reads what ``set`` wrote, once the head is taken off; a stale window is part of the head."""
    assert entry.encode_counter(number) == str(number).encode()
    found = entry.decode(head(stale_ms=stale_ms) + entry.encode_counter(number))

    assert (found.body, found.counter, found.stale_ms, found.tags, found.raised) == (None, number, stale_ms, (), False)


@given(VALUES, TAGS)
def test_no_body_looks_like_a_counter(value, tags):
    """The first byte after the head tells the two forms apart."""
    assert body(value, tags=tags)[0] not in b"-0123456789"


@given(st.text() | st.binary())
def test_no_head_looks_like_another_thing(value):
    """Its first byte begins neither text nor a MessagePack value, as other versions and other programs wrote them."""
    start = head()[:1]

    assert not msgspec.msgpack.encode(value).startswith(start)
    assert not str(value).encode("utf-8", "surrogatepass").startswith(start)
    assert start not in [msgspec.msgpack.encode(first)[:1] for first in (0, -1, None, True, 1.5, [], {}, "x" * 300)]


@pytest.mark.parametrize("value", [True, False, 2**63, -(2**63) - 1, 1.0, "1", None])
def test_what_is_no_whole_number_of_64_bits_is_no_counter(value):
    """A flag stays a flag, and a number that Redis cannot count is kept as it is."""
    assert entry.encode_counter(value) is None


def test_a_number_with_tags_is_no_counter():
    """INCRBY leaves no room for the tags' names."""
    with pytest.raises(Undecodable):
        entry.decode(head(2) + b"7")


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_read_or_refused(stored, with_head):
    """Whatever Redis holds under a key, reading it raises nothing but ``Undecodable``."""
    with suppress(Undecodable):
        entry.decode(head() + stored if with_head else stored)


def damaged(stored, data):
    """With one byte changed, or the end missing."""
    stored = bytearray(stored)
    place = data.draw(st.integers(0, len(stored) - 1))
    if data.draw(st.booleans()):
        del stored[place:]
    else:
        stored[place] = data.draw(st.integers(0, 255))
    return bytes(stored)


@given(VALUES, st.data())
def test_a_damaged_entry_is_read_or_refused(value, data):
    """One changed or missing byte raises nothing but ``Undecodable``."""
    with suppress(Undecodable):
        found = entry.decode(damaged(stored_as(value, tags=["t"], stale_ms=1), data))
        if found.body:
            entry.packed_value(found.body)


FIELDS = [1, 2, 3, [], "", None]


def fields(**changes):
    names = ("created_ms", "ttl_ms", "load_ms", "tags", "how", "value")
    return head() + msgspec.msgpack.encode([changes.get(name, FIELDS[i]) for i, name in enumerate(names)])


def test_the_bodies_that_the_next_test_changes_are_readable():
    """Or it would refuse for another reason than the one that it names."""
    assert entry.decode(fields()).body.created_ms == 1


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"-",
        b"7",
        head(),
        head()[:20],
        head() + b"-",
        head() + b"12x",
        head(kind=b"x") + b"12",
        head() + b"1" * 5_000,
        b"\xc1",
        b"\xc11",
        b"pickle",
        b"\xc12" + stored_as()[2:],
        b"\xc10" + stored_as()[2:],
        b"\xc11zz" + stored_as()[4:],
        b"\xc1101" + b"not hexa!!" + stored_as()[14:],
        head(token="é" * 8) + body(),
        body(),
        head() + msgspec.msgpack.encode({"not": "an array"}),
        head() + msgspec.msgpack.encode(FIELDS[:5]),
        fields(created_ms="1"),
        fields(tags=[1]),
        fields(tags={"t": "v"}),
        fields(how=b""),
        head(1) + body(tags=["t"]),
        head(2) + body(),
        head(3) + body(tags=["t"]),
        head() + b"\x96\x01\x02\x03\x90\xa0" + b"\x91" * 100_000 + b"\xc0",
        head() + b"\x96\x01\x02\x03\x90\xa0\xdd\xff\xff\xff\xff",
        head() + b"\x96\x01\x02\x03\x91\xa1\xff\xa0\xc0",
        head() + body() + b"\xc0",
    ],
    ids=[
        "empty",
        "minus",
        "a-bare-number",
        "no-body",
        "half-a-head",
        "minus-body",
        "nearly-a-number",
        "exception-is-a-number",
        "endless-number",
        "one-byte",
        "two-bytes",
        "text",
        "format-2",
        "format-0",
        "count-no-number",
        "window-no-number",
        "token-no-ascii",
        "no-head",
        "map",
        "short-array",
        "time-is-text",
        "tag-is-number",
        "tags-are-a-map",
        "how-is-bytes",
        "tag-without-version",
        "version-without-tag",
        "one-version-too-many",
        "deep-nesting",
        "length-lies",
        "tag-no-utf8",
        "more-behind",
    ],
)
def test_what_is_no_entry_of_this_format_is_undecodable(stored):
    """Garbage, another format's number and hostile nesting are refused, never guessed at."""
    with pytest.raises(Undecodable):
        entry.decode(stored)


@pytest.mark.parametrize(
    "digits", [b"1_0", b"12 ", b" 12", b"+1", b"-0", b"007", b"1\n", b"9" * 30, b"9223372036854775808"]
)
def test_a_number_that_redis_would_not_count_is_no_counter(digits):
    """Only what INCRBY reads is a counter; Python's ``int`` reads more."""
    with pytest.raises(Undecodable):
        entry.decode(head() + digits)


def test_a_packed_value_that_is_no_bytes_is_undecodable():
    """Another format's bytes are told as such, before they are unpacked."""
    with pytest.raises(Undecodable):
        entry.packed_value(entry.decode(fields(how="json", value=[1])).body)


def opened(stale_ms=0, tags=()):
    return entry.decode(stored_as(tags=tags, stale_ms=stale_ms))


@given(MS, st.integers(-2, 2**40))
def test_age_is_told_by_what_is_left_to_live(stale_ms, left_ms):
    """Fresh exactly while more than the stale window is left."""
    freshness = entry.judge(opened(stale_ms), left_ms, versions_now())
    is_stale = stale_ms > 0 and 0 <= left_ms <= stale_ms

    assert freshness is (Freshness.STALE if is_stale else Freshness.FRESH)


@given(TAGS, st.data())
def test_an_entry_stands_with_all_its_tags_and_its_namespace(tags, data):
    """One tag whose version is another, missing or unknown makes the entry gone, whatever its age."""
    then = versions_now(tags)
    now = {
        tag: data.draw(st.sampled_from([then[tag], version(99), None]))
        for tag in then
        if data.draw(st.booleans(), label=f"{tag!r} was asked for")
    }
    left_ms = data.draw(st.integers(-2, 100))
    freshness = entry.judge(opened(stale_ms=50, tags=tags), left_ms, now)

    assert (freshness is not Freshness.GONE) == all(now.get(tag) == version for tag, version in then.items())


def test_a_counter_stands_with_its_namespace():
    """It has no tags, but a stale window like any other."""
    counter = entry.decode(head(stale_ms=10) + b"7")

    assert entry.judge(counter, 11, versions_now()) is Freshness.FRESH
    assert entry.judge(counter, 10, versions_now()) is Freshness.STALE
    assert entry.judge(counter, 11, {"": version(99)}) is Freshness.GONE
    assert entry.judge(counter, 11, {}) is Freshness.GONE


@given(VALUES, TAGS, MS, st.integers(-2, 2**40), st.data())
def test_the_short_way_to_a_value_never_differs_from_the_long_one(value, tags, stale_ms, left_ms, data):
    """``fresh_value`` returns what decoding, judging and unpacking give, or says that it is not sure.

    Also for what is damaged, but for the token, which no read looks at.
    """
    asked = data.draw(st.just(tags) | TAGS)
    then = versions_now(tags)
    current = {tag: data.draw(st.just(then.get(tag)) | st.sampled_from([version(99), None])) for tag in ("", *asked)}
    how = data.draw(st.sampled_from(["", "", "json"]))
    raised = data.draw(st.booleans())
    stored = head(1 + len(tags), stale_ms, kind=b"x" if raised else b"1") + body(value, tags=tags, how=how)
    if data.draw(st.booleans()):
        stored = damaged(stored, data)
        stored = stored[:14] + TOKEN.encode() + stored[30:]
    found = entry.fresh_value(stored, left_ms, list(current.values()), asked)

    if found is not entry.UNSURE:
        long = entry.decode(stored)
        assert entry.judge(long, left_ms, current) is Freshness.FRESH
        assert (long.raised, long.body.how) == (False, "")
        assert same(msgspec.msgpack.decode(entry.packed_value(long.body)), found)


@pytest.mark.parametrize("tags", [[], ["t"], ["t", "u"]])
def test_the_short_way_is_taken_by_a_plain_fresh_entry(tags):
    """Or it would be of no use."""
    current = list(versions_now(tags).values())

    assert entry.fresh_value(stored_as({"a": [1]}, tags=tags), 1, current, tags) == {"a": [1]}
    assert entry.fresh_value(stored_as(1, tags=tags, stale_ms=5), 6, current, tags) == 1
    assert entry.fresh_value(stored_as(1, tags=tags, stale_ms=5), 5, current, tags) is entry.UNSURE


def test_the_short_way_is_not_taken_by_an_entry_whose_tags_have_no_versions():
    """It is undecodable, and must not be served as one that no tag can remove."""
    stored = head(1) + body("served", tags=["t"])

    with pytest.raises(Undecodable):
        entry.decode(stored)
    assert entry.fresh_value(stored, 1, [WHOLE_VERSION], ()) is entry.UNSURE


@given(MS, st.integers(-2, 2**41))
def test_the_fresh_part_is_what_is_left_before_the_stale_window(stale_ms, left_ms):
    """How much longer an entry is fresh is never negative."""
    assert entry.fresh_left_ms(opened(stale_ms), left_ms) == max(0, left_ms - stale_ms)
    assert entry.fresh_left_ms(None, left_ms) == max(0, left_ms)


@given(st.lists(st.integers(0, 2**52 - 1), min_size=1, max_size=3), st.integers(0, 2**52 - 1))
def test_a_load_was_invalidated_if_one_version_is_younger_than_its_beginning(numbers, since):
    """Versions are compared by the number of the invalidation that made them; chance plays no part."""
    versions = b"".join(b"%013x" % number + b"zzzzzzz" for number in numbers)

    assert entry.invalidated_since(versions, b"%013x" % since) == (max(numbers) > since)


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
