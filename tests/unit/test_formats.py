"""Formats: what is packed comes back, what is not what it claims to be is refused, and pickles are verified first.

``golden/formats.json`` holds bytes that earlier versions stored and that must be readable for ever. To add what
``GOLDEN`` has and the file has not (nothing that is there is ever written anew):

    .venv/bin/python tests/unit/test_formats.py
"""

import base64
import collections
import hashlib
import hmac
import json
import math
import pickle
import sys
import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from ipaddress import IPv4Address
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, NewType, Optional, TypedDict
from uuid import UUID

import msgspec
import pydantic
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from petiole.cachelib.errors import CachelibError, ValueTooLarge
from petiole.cachelib.formats import Codec, NotEncodable, Pickle, Undecodable, _kept_decoder

NAME = "petiole:1:cache:{shop:product:7}"
SECRET = b"a secret for tests, only"
OTHER = b"another secret for tests"
HOWS = ["", "zlib", "zstd", "json", "json+zlib", "json+zstd", "pickle", "pickle+zlib", "pickle+zstd"]

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXT | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(TEXT | st.integers(-9, 9) | st.binary(), inner, max_size=5)
    ),
    max_leaves=20,
)
PLAIN_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)


def codec(how="", **settings):
    """A codec that packs as ``how`` says whatever is longer than nothing."""
    format, _, compression = how.partition("+")
    if format in ("zlib", "zstd"):
        format, compression = "", format
    return Codec(
        {"": "msgpack", "json": "json", "pickle": Pickle(SECRET)}[format],
        compression=compression or "zlib",
        compress_above=0 if compression else None,
        **settings,
    )


def round_trip(value, how="", type=Any):
    one = codec(how)
    return one.unpack(*one.pack(value, NAME), NAME, type)


def same(one, other):
    return type(one) is type(other) and one == other


# Types that a caller may ask for


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int
    y: float


class Row(TypedDict):
    id: int
    seen: datetime


@dataclass
class Price:
    amount: Decimal
    valid: set[date] = field(default_factory=set)


class Item(msgspec.Struct):
    id: UUID
    price: Price
    image: bytes = b""


class Address(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    street: str = pydantic.Field(alias="Strasse")
    since: datetime
    labels: set[str]


class Customer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    id: UUID
    address: Address
    balance: Decimal
    homepage: pydantic.HttpUrl | None = None
    colour: Colour = Colour.RED

    @pydantic.computed_field
    def initials(self) -> str:
        return "x"


class Photo(pydantic.BaseModel):
    content: bytes


class Login(pydantic.BaseModel):
    password: pydantic.SecretStr


@dataclass
class Order:
    customer: Customer
    server: IPv4Address
    folder: PurePosixPath


NOW = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
NAIVE = NOW.replace(tzinfo=None)
ID = UUID("12345678-1234-5678-1234-567812345678")
ADDRESS = Address(Strasse="Süd 1", since=NAIVE, labels={"home", "work"})
CUSTOMER = Customer(
    id=ID, address=ADDRESS, balance=Decimal("1.50"), homepage="https://example.org/a", colour=Colour.BLUE
)
ITEM = Item(ID, Price(Decimal("9.90"), {date(2026, 1, 1)}), b"\xff\x00")
UserId = NewType("UserId", int)

TYPED = [
    (Price(Decimal("1.10"), {date(2026, 1, 1)}), Price),
    (ITEM, Item),
    ([ITEM], list[Item]),
    ({"a": ITEM}, dict[str, Item]),
    (None, Optional[Item]),  # noqa: UP045 - the older way of writing it too
    (ITEM, Item | None),
    (NOW, datetime),
    (NAIVE, datetime),
    (timedelta(days=1, seconds=1), timedelta),
    (Decimal("1.00"), Decimal),
    (ID, UUID),
    ({1, 2}, set[int]),
    (frozenset({"a"}), frozenset[str]),
    ((1, "a", None), tuple[int, str, None]),
    ((1, 2, 3), tuple[int, ...]),
    (Colour.RED, Colour),
    (Colour.BLUE, Colour),
    (Level.LOW, Level),
    (Point(1, 2.5), Point),
    ({"id": 1, "seen": NOW}, Row),
    (b"\xff\x00", bytes),
    ({1: "a", -2: "b"}, dict[int, str]),
    ({ID: 1}, dict[UUID, int]),
    ({b"\xff": 1}, dict[bytes, int]),
    (UserId(7), UserId),
    ("a", Literal["a", "b"]),
    (5, Annotated[int, ["cannot be hashed"]]),
    (CUSTOMER, Customer),
    ([CUSTOMER, None], list[Customer | None]),
    ({"a": [ADDRESS]}, dict[str, list[Address]]),
    (Order(CUSTOMER, IPv4Address("10.0.0.1"), PurePosixPath("/a/b")), Order),
    (pydantic.RootModel[list[int]]([1, 2]), pydantic.RootModel[list[int]]),
]

WRONG = [
    ("text", int),
    (1, str),
    (1.5, int),
    ([1, "a"], list[int]),
    ({"amount": "x"}, Price),
    ({}, Item),
    ("green", Colour),
    ({"id": "not a uuid"}, Customer),
    ([], Customer),
    (1, IPv4Address),
    ("10.0.0.256", IPv4Address),
    ("x", complex),
    ({"a": 1}, collections.Counter),
]


# What is packed comes back


@settings(deadline=None)
@given(PLAIN, st.sampled_from(["", "zlib", "zstd"]))
@example(math.inf, "")
def test_plain_values_come_back_from_messagepack_as_they_were(value, how):
    """Bytes, infinities and keys that are no text too."""
    assert same(round_trip(value, how), value)


@settings(deadline=None)
@given(PLAIN_JSON, st.sampled_from(["json", "json+zlib", "json+zstd"]))
@example([None, 1e22, 2**64 - 1], "json")
def test_what_json_can_say_comes_back_from_json_as_it_was(value, how):
    """Nothing that JSON has a form for is refused."""
    assert same(round_trip(value, how), value)


@settings(deadline=None)
@given(PLAIN, st.sampled_from(["pickle", "pickle+zlib", "pickle+zstd"]))
def test_plain_values_come_back_from_pickle_as_they_were(value, how):
    """The signature is taken off again."""
    assert same(round_trip(value, how), value)


def test_nan_comes_back_from_messagepack():
    """It equals nothing, so that it stands apart."""
    assert math.isnan(round_trip(math.nan))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("value", "kind"), TYPED, ids=[str(kind) for _, kind in TYPED])
def test_a_value_comes_back_as_the_type_that_is_asked_for(value, kind, how):
    """In every format, twice: the second time by the decoder that was kept."""
    for _ in range(2):
        assert same(round_trip(value, how, kind), value)


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            Item,
            st.uuids(),
            st.builds(Price, st.decimals(allow_nan=False), st.sets(st.dates(), max_size=3)),
            st.binary(max_size=9),
        ),
        max_size=4,
    ),
    st.sampled_from(HOWS),
)
def test_typed_values_come_back_whatever_they_hold(items, how):
    """Struct, dataclass, UUID, Decimal, set, date and bytes, in each other."""
    assert same(round_trip(items, how, list[Item]), items)


@settings(deadline=None)
@given(
    st.builds(
        Address,
        Strasse=TEXT,
        since=st.datetimes(timezones=st.none() | st.just(UTC) | st.just(timezone(timedelta(hours=2)))),
        labels=st.sets(TEXT, max_size=3),
    ),
    st.sampled_from(HOWS),
)
def test_pydantic_models_come_back_equal(address, how):
    """Strict, with aliases, and with no field too many allowed."""
    assert same(round_trip(address, how, Address), address)


def test_a_model_of_an_older_pydantic_is_stored_by_its_aliases():
    """Before 2.11, pydantic could not be asked to validate by names."""

    class Old:
        def __init__(self, value):
            self.value = value

        def model_dump(self, *, round_trip, by_alias):
            return {"alias": self.value}

        @classmethod
        def model_validate(cls, plain, *, strict):
            return cls(plain["alias"])

    assert round_trip(Old(3), "", Old).value == 3


def test_without_a_type_a_value_comes_back_as_the_format_has_it():
    """The documented loss, so that nobody finds it by surprise."""
    value = {"tuple": (1,), "decimal": Decimal("1.0"), "bytes": b"\xff", "at": NOW}

    assert round_trip(value) == {"tuple": [1], "decimal": "1.0", "bytes": b"\xff", "at": NOW}
    assert round_trip(value | {1: 2}, "json") == {
        "tuple": [1],
        "decimal": "1.0",
        "bytes": "/w==",
        "at": "2026-03-01T12:30:15.123456Z",
        "1": 2,
    }


def test_hundreds_of_types_can_be_asked_for():
    """More decoders than are kept: the first are made again."""
    kinds = [msgspec.defstruct(f"Kind{number}", [("a", int)]) for number in range(600)]

    for kind in [*kinds, *kinds[:3]]:
        assert round_trip(kind(1), "", kind) == kind(1)
    assert _kept_decoder.cache_info().currsize <= 256


def test_the_decoder_of_a_type_is_made_once():
    """Making one costs more than a hundred readings."""
    kind = msgspec.defstruct("Kind", [("a", int)])
    before = _kept_decoder.cache_info().misses

    for _ in range(3):
        assert round_trip([kind(1)], "", list[kind]) == [kind(1)]
    assert _kept_decoder.cache_info().misses == before + 1


def test_what_a_codec_packed_another_codec_reads_whatever_its_own_settings():
    """A deploy may change the format while the old entries are still there."""
    reader = Codec(Pickle(SECRET), compression="zstd", compress_above=None)

    for how in HOWS:
        packed = codec(how).pack(["a"] * 100, NAME)
        assert packed[0] == how
        assert reader.unpack(*packed, NAME) == ["a"] * 100


def test_bytes_may_come_as_a_view():
    """What a client hands on without a copy."""
    for how in HOWS:
        found, data = codec(how).pack(["a"] * 100, NAME)
        assert codec(how).unpack(found, memoryview(data), NAME) == ["a"] * 100


# What is refused when packing


@pytest.mark.parametrize("how", ["", "json", "pickle"])
def test_a_value_without_a_form_is_refused_with_the_reason(how):
    """Before anything is stored."""
    with pytest.raises(NotEncodable, match=r"a generator cannot be stored as \w+: "):
        codec(how).pack((number for number in [1]), NAME)


@pytest.mark.parametrize(
    "value",
    [2**64, "\ud800", {"a": [object()]}, {frozenset({1}): {1j}}],
    ids=["too large", "a surrogate", "an object", "a complex number"],
)
def test_what_messagepack_cannot_say_is_refused(value):
    """By one error, whatever msgspec raises."""
    with pytest.raises(NotEncodable, match="cannot be stored as msgpack: "):
        codec().pack(value, NAME)


@pytest.mark.parametrize("value", [math.nan, [math.inf], {"a": Point(1, -math.inf)}, {math.nan: None}], ids=repr)
def test_json_refuses_numbers_that_it_would_write_as_null(value):
    """They would come back as None, or not at all."""
    with pytest.raises(NotEncodable, match="no NaN and no infinity; use msgpack"):
        codec("json").pack(value, NAME)


def test_json_refuses_keys_that_would_become_one():
    """One of the two values would be lost."""
    with pytest.raises(NotEncodable, match="two keys of one dict are the same text"):
        codec("json").pack([{1: "a", "1": "b"}], NAME)


@pytest.mark.parametrize("value", [Photo(content=b"abcd"), {"a": [Photo(content=b"")]}], ids=["alone", "inside"])
def test_json_refuses_models_with_bytes(value):
    """A model would take the base64 text for the bytes themselves."""
    with pytest.raises(NotEncodable, match="a Photo that holds bytes"):
        codec("json").pack(value, NAME)


def test_models_with_bytes_come_back_from_messagepack():
    """It has bytes, of any kind."""
    assert round_trip(Photo(content=b"\xff"), "", Photo) == Photo(content=b"\xff")


@pytest.mark.parametrize("how", ["", "json"])
def test_a_secret_of_a_model_is_refused_and_not_stored_as_asterisks(how):
    """What came back would be another password."""
    with pytest.raises(NotEncodable, match="SecretStr") as caught:
        codec(how).pack(Login(password="open sesame"), NAME)

    assert "sesame" not in str(caught.value)


def test_a_model_that_would_not_come_back_is_refused():
    """Its field was set to what its type does not allow."""
    with pytest.raises(NotEncodable, match="a Photo cannot be stored"):
        codec().pack(Photo.model_construct(content=1), NAME)


@pytest.mark.parametrize("how", ["", "json", "pickle"])
def test_a_value_nested_too_deeply_is_refused(how):
    """It is an error, not a crash."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]

    with pytest.raises(NotEncodable, match="nested too deeply, or contains itself"):
        codec(how).pack(deep, NAME)
    while deep:  # taken apart here: at once, the interpreter's own destructor would have to go as deep
        deep = deep[0]


@pytest.mark.parametrize("how", ["", "json"])
def test_a_value_that_contains_itself_is_refused(how):
    """Lists, dicts, objects."""
    circle: list[Any] = []
    circle.append({"a": Price(circle)})

    with pytest.raises(NotEncodable, match="nested too deeply, or contains itself"):
        codec(how).pack(circle, NAME)


@pytest.mark.parametrize("error", [ValueError, OverflowError, KeyError, RuntimeError, ZeroDivisionError])
@pytest.mark.parametrize("how", ["", "json", "pickle"])
def test_an_error_of_the_values_own_code_is_told_as_the_reason(error, how):
    """Whatever a model or an object raises while it is packed."""

    class Broken:
        def model_dump(self, **_):
            raise error("the reason")

        model_validate = None
        __reduce_ex__ = model_dump

    with pytest.raises(NotEncodable) as caught:
        codec(how).pack([Broken()], NAME)

    assert str(caught.value).startswith(f"a list cannot be stored as {how or 'msgpack'}: ")


@pytest.mark.parametrize("how", HOWS)
def test_a_value_with_more_bytes_than_allowed_is_refused_by_its_size_before_compression(how):
    """Otherwise what was stored could not be read."""
    with pytest.raises(ValueTooLarge, match=r"more than max_bytes=1000; store it in parts, or raise") as caught:
        codec(how, max_bytes=1000).pack("a" * 1001, NAME)

    assert (caught.value.name, caught.value.limit) == (NAME, 1000)
    assert caught.value.size > 1001
    assert isinstance(caught.value, CachelibError)


@pytest.mark.parametrize("how", HOWS)
def test_a_value_with_just_the_bytes_allowed_comes_back(how):
    """The bound is the same in both directions."""
    _, data = codec(how.partition("+")[0] if how not in ("zlib", "zstd") else "").pack("a" * 990, NAME)
    bound = len(data) - (32 if "pickle" in how else 0)

    one = codec(how, max_bytes=bound)
    assert one.unpack(*one.pack("a" * 990, NAME), NAME) == "a" * 990
    with pytest.raises(ValueTooLarge):
        codec(how, max_bytes=bound - 1).pack("a" * 990, NAME)


# Compression


@pytest.mark.parametrize("format", ["msgpack", "json", Pickle(SECRET)], ids=["msgpack", "json", "pickle"])
def test_only_what_is_longer_than_the_threshold_is_compressed(format):
    """The threshold itself is not longer. The signature of a pickle does not count."""
    how, data = Codec(format).pack("a" * 500, NAME)
    size = len(data) - (32 if how == "pickle" else 0)

    assert Codec(format, compress_above=size).pack("a" * 500, NAME) == (how, data)
    compressed, shorter = Codec(format, compress_above=size - 1).pack("a" * 500, NAME)
    assert compressed.endswith("zlib")
    assert len(shorter) < len(data)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_what_does_not_get_shorter_is_stored_as_it_is(compression):
    """Random bytes, pictures, what is compressed already."""
    noise = b"".join(hashlib.sha256(bytes([number])).digest() for number in range(100))

    assert Codec(compression=compression, compress_above=0).pack(noise, NAME)[0] == ""


BOMB_BYTES = 200_000_000


def bomb(compression):
    """A few bytes that expand to many. Neither a value nor truncated, so that only the bound can refuse it."""
    if compression == "zlib":
        stream = zlib.compressobj(9)
        return b"".join(stream.compress(bytes(10_000_000)) for _ in range(BOMB_BYTES // 10_000_000)) + stream.flush()
    announced = "announced" in compression
    stream = zstandard.ZstdCompressor().compressobj(**({"size": BOMB_BYTES} if announced else {}))
    return b"".join(stream.compress(bytes(10_000_000)) for _ in range(BOMB_BYTES // 10_000_000)) + stream.flush()


@pytest.mark.parametrize("form", ["zlib", "zstd announced", "zstd"])
@pytest.mark.parametrize("format", ["", "json+", "pickle+"])
def test_a_bomb_is_refused_without_the_memory_it_asks_for(form, format):
    """Expansion stops at the bound, whatever the stream announces."""
    how, data, one = format + form.partition(" ")[0], bomb(form), codec("pickle", max_bytes=1_000_000)
    if format == "pickle+":
        data = Pickle(SECRET).signed(data, how, NAME)

    tracemalloc.start()
    try:
        with pytest.raises(Undecodable, match="expands beyond max_bytes=1000000"):
            one.unpack(how, data, NAME)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("how", ["zlib", "zstd", "json+zlib", "json+zstd"])
def test_a_compressed_value_must_be_one_whole_stream(how):
    """Nothing missing, nothing behind it: otherwise the bytes are not those that were stored."""
    _, data = codec(how).pack(["abc"] * 100, NAME)

    for bad in (data[:-1], data[:-5], data + b"x", data + data, data[1:], b""):
        with pytest.raises(Undecodable):
            codec().unpack(how, bad, NAME)


# Pickle


SPRUNG: list[str] = []


def spring(what):
    SPRUNG.append(what)


class Trap:
    """Tells if it was unpickled."""

    def __reduce__(self):
        return spring, ("unpickled",)


@pytest.fixture
def trap():
    SPRUNG.clear()
    yield Trap()
    SPRUNG.clear()


def refused(one, how, data, name=NAME):
    with pytest.raises(Undecodable):
        one.unpack(how, data, name)
    assert SPRUNG == []


def test_the_trap_springs_when_it_is_unpickled(trap):
    """The tests below would hold for a trap that never springs."""
    round_trip(trap, "pickle")

    assert SPRUNG == ["unpickled"]


def test_only_what_a_secret_of_the_codec_has_signed_is_unpickled(trap):
    """Not without a signature, with a false one, or with another's."""
    body = pickle.dumps(trap)
    _, signed = codec("pickle").pack(trap, NAME)

    refused(codec("pickle"), "pickle", body)
    refused(codec("pickle"), "pickle", bytes(32) + body)
    refused(codec("pickle"), "pickle", hmac.digest(SECRET, body, "sha256") + body)
    refused(codec("pickle"), "pickle", signed[:10])
    refused(Codec(Pickle(OTHER)), "pickle", signed)
    refused(Codec(), "pickle", signed)


def test_a_pickle_is_signed_for_its_key(trap):
    """Who can write to Redis cannot give one key the value of another."""
    how, signed = codec("pickle").pack(trap, NAME)

    refused(codec("pickle"), how, signed, NAME + "x")


def test_a_pickle_is_signed_for_how_it_is_read(trap):
    """A plain one is not read as a compressed one, which would be tried before it is known to be one."""
    how, signed = codec("pickle").pack(trap, NAME)

    for other in {"pickle", "pickle+zlib", "pickle+zstd"} - {how}:
        with pytest.raises(Undecodable, match="no secret of this codec has signed"):
            codec("pickle").unpack(other, signed, NAME)
    assert SPRUNG == []


def test_letters_cannot_move_between_what_is_signed(trap):
    """The lengths are signed too: a name's end is not the beginning of what follows."""
    signed = Pickle(SECRET).signed(b"cd", "pickle", "ab")

    for name, how, body in (("a", "bpickle", b"cd"), ("abp", "ickle", b"cd"), ("ab", "picklec", b"d")):
        with pytest.raises(Undecodable):
            Pickle(SECRET).verified(signed[:32] + body, how, name)
    assert bytes(Pickle(SECRET).verified(signed, "pickle", "ab")) == b"cd"


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_a_pickle_is_verified_before_it_is_expanded(compression, monkeypatch):
    """Decompressors have had holes too: nobody without a secret gets to them."""

    def expanded(*_):
        raise AssertionError("expanded before it was verified")

    monkeypatch.setattr("petiole.cachelib.formats._expand", expanded)
    how, signed = codec(f"pickle+{compression}").pack("a" * 1000, NAME)

    with pytest.raises(Undecodable, match="no secret of this codec has signed"):
        Codec(Pickle(OTHER)).unpack(how, signed, NAME)


def test_secrets_are_replaced_one_by_one():
    """The first signs, all verify: add the new one everywhere, then put it first, then drop the old one."""
    old, both, new = Codec(Pickle(SECRET)), Codec(Pickle(OTHER, SECRET)), Codec(Pickle(OTHER))

    assert both.unpack(*old.pack(1, NAME), NAME) == 1
    assert new.unpack(*both.pack(1, NAME), NAME) == 1
    with pytest.raises(Undecodable):
        new.unpack(*old.pack(1, NAME), NAME)


def test_secrets_are_not_shown():
    """Neither by repr nor by what the objects hold."""
    one = Codec(Pickle(SECRET, OTHER))

    assert repr(one).startswith("Codec(Pickle(***, ***), compression='zlib'")
    held = [getattr(one._pickle, slot) for slot in Pickle.__slots__]
    assert b"secret" not in repr(held).encode()
    with pytest.raises(TypeError):
        pickle.dumps(one._pickle)


@pytest.mark.parametrize("error", [ValueError, ImportError, RecursionError, MemoryError, AssertionError, StopIteration])
def test_whatever_unpickling_raises_the_value_is_undecodable(error):
    """A class that has moved, or whose state has changed."""

    data = b"cbuiltins\nexec\n(V" + f"raise {error.__name__}('hunter2')".encode() + b"\ntR."

    with pytest.raises(Undecodable):
        codec("pickle").unpack("pickle", Pickle(SECRET).signed(data, "pickle", NAME), NAME)


def test_an_unpickled_object_must_be_of_the_type_that_is_asked_for():
    """As far as its outside tells."""
    packed = codec("pickle").pack([1], NAME)

    for kind in (list, list[int], list[int] | None, Annotated[list[int], "x"], Any, object, NewType("L", list)):
        assert codec("pickle").unpack(*packed, NAME, kind) == [1]
    for kind in (dict, tuple[int, ...], int | None, None, Literal[1], Row, Customer, UserId):
        with pytest.raises(Undecodable, match="Expected"):
            codec("pickle").unpack(*packed, NAME, kind)


# What is not what it claims to be


@pytest.mark.parametrize("how", ["", "json", "zlib", "json+zstd"])
@pytest.mark.parametrize(("value", "kind"), WRONG, ids=[str(kind) for _, kind in WRONG])
def test_a_value_of_another_type_is_undecodable(value, kind, how):
    """An entry that another version of the program stored."""
    with pytest.raises(Undecodable):
        round_trip(value, how, kind)


@pytest.mark.parametrize("kind", [set[int] | list[int], Customer | int, "int", 5, Decimal | str], ids=str)
def test_a_type_that_cannot_be_restored_is_told_to_who_declares_it(kind):
    """And whoever asks for it all the same finds nothing, but no crash."""
    for how in ("", "json"):
        with pytest.raises(TypeError):
            codec(how).check_type(kind)
        with pytest.raises(Undecodable):
            round_trip(1, how, kind)
    for good in (Item, list[Customer], Any, Annotated[int, []]):
        codec().check_type(good)


@pytest.mark.parametrize("kind", [Any, int, list[Item], Customer, Annotated[list[int], []], complex], ids=str)
@settings(deadline=None)
@given(data=st.binary(), how=st.sampled_from(HOWS) | st.text(max_size=12))
@example(data=b"\xdd\xff\xff\xff\xff", how="")
@example(data=b"\x91" * 100_000, how="")
@example(data=b"[" * 100_000, how="json")
@example(data=b"9" * 10_000, how="json")
@example(data=b"\xd6\xff" + b"\xff" * 4, how="")
@example(data=b"\xc7\x0c\xff" + b"\xff" * 12, how="")
def test_random_bytes_are_undecodable_or_a_value_but_never_another_error(kind, data, how):
    """Whatever the bytes are, and whatever they claim to be."""
    _only_undecodable(how, data, kind)


@settings(deadline=None)
@given(data=st.binary(max_size=60), how=st.sampled_from(["pickle", "pickle+zlib", "pickle+zstd"]))
def test_random_bytes_with_a_true_signature_are_undecodable_or_a_value(data, how):
    """A secret's holder may err too."""
    _only_undecodable(how, Pickle(SECRET).signed(data, how, NAME), int)


@settings(deadline=None)
@given(st.sampled_from(HOWS), st.sampled_from(HOWS), st.data())
def test_damaged_bytes_are_undecodable_or_a_value_but_never_another_error(how, read_as, data):
    """Cut off, one bit turned, read as something else."""
    _, packed = codec(how).pack([{"id": "x" * 30, "address": [1, None, 2.5, b"" if "json" not in how else ""]}], NAME)
    place = data.draw(st.integers(0, len(packed) - 1))
    turned = bytearray(packed)
    turned[place] ^= 1 << data.draw(st.integers(0, 7))

    for kind in (Any, list[dict[str, Any]], list[Customer]):
        for damaged in (packed[:place], bytes(turned), packed):
            _only_undecodable(read_as, damaged, kind)
    if "pickle" in how:
        for damaged in (packed[:place], bytes(turned)):
            with pytest.raises(Undecodable):
                codec("pickle").unpack(how, damaged, NAME)


def _only_undecodable(how, data, kind):
    for one in (codec("pickle", max_bytes=100_000), Codec()):
        with suppress(Undecodable):
            one.unpack(how, data, NAME, kind)


@pytest.mark.parametrize(
    "how", ["msgpack", "zlib+json", "json+", "+zlib", "JSON", "lz4", "json+zlib+zlib", None, 5, []]
)
def test_an_unknown_how_is_undecodable(how):
    """A newer version's, perhaps: it is never guessed at."""
    with pytest.raises(Undecodable):
        codec("pickle").unpack(how, b"\x01", NAME)


def test_no_stored_value_is_quoted_in_a_message():
    """Messages go to logs; values are people's data."""

    @dataclass
    class Picky:
        a: str

        def __post_init__(self):
            raise ValueError(f"refused: {self.a}")

    class PickyModel(pydantic.BaseModel):
        a: int

    class Token(Enum):
        A = "a"

    for value, kind in (({"a": "hunter2"}, Picky), ({"a": "hunter2"}, PickyModel), ("hunter2", Token)):
        with pytest.raises(Undecodable) as caught:
            round_trip([value], "", list[kind])
        assert "hunter2" not in str(caught.value)
        assert "[0]" in str(caught.value) or "..." in str(caught.value)
        assert caught.value.__cause__ is None


# Settings


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "msgpak"}, ValueError, "unknown format 'msgpak'; did you mean 'msgpack'?"),
        ({"format": "JSON"}, ValueError, "did you mean 'json'?"),
        ({"format": "yaml"}, ValueError, r"known: \('msgpack', 'json'\), or Pickle\(secret\)"),
        ({"format": "pickle"}, ValueError, r"give format=Pickle\(secret\), not 'pickle'"),
        ({"format": Pickle}, TypeError, r"give format=Pickle\(secret\), not the class"),
        ({"format": None}, TypeError, "format must be one of"),
        ({"compression": "gzip"}, ValueError, "unknown compression 'gzip'"),
        ({"compression": "zst"}, ValueError, "did you mean 'zstd'?"),
        ({"compression": None}, TypeError, "compression must be one of"),
        ({"compress_above": -1}, ValueError, "compress_above must be 0 or more, not -1"),
        ({"compress_above": True}, TypeError, "compress_above must be a whole number of bytes, not bool"),
        ({"compress_above": 1.5}, TypeError, "compress_above must be a whole number of bytes, not float"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be 1 or more, not 0"),
        ({"max_bytes": True}, TypeError, "max_bytes must be a whole number of bytes, not bool"),
        ({"max_bytes": None}, TypeError, "max_bytes must be a whole number"),
        ({"max_bytes": 2**40}, ValueError, "more than Redis stores under one key"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_what_to_do(arguments, error, message):
    """When the codec is made, and not with the first value."""
    with pytest.raises(error, match=message):
        Codec(**arguments)


@pytest.mark.parametrize(
    ("secrets", "error", "message"),
    [
        ((), ValueError, r"Pickle\(secret\)"),
        (("long enough, but text",), TypeError, "secret 1 of Pickle must be bytes, not str"),
        ((SECRET, b"hunter2"), ValueError, "secret 2 of Pickle has 7 bytes, fewer than 16"),
    ],
)
def test_secrets_that_do_not_fit_are_refused_and_not_shown(secrets, error, message):
    """An error message goes to logs."""
    with pytest.raises(error, match=message) as caught:
        Pickle(*secrets)

    assert "hunter2" not in str(caught.value)
    assert "long enough" not in str(caught.value)


def test_without_zstd_its_choice_is_refused_and_its_entries_are_undecodable(monkeypatch):
    """It is an extra: who has not installed it misses what others compressed with it, and is told."""
    packed = codec("zstd").pack("a" * 1000, NAME)
    monkeypatch.setitem(sys.modules, "zstandard", None)

    with pytest.raises(ValueError, match=r"pip install petiole\[zstd\]"):
        Codec(compression="zstd")
    with pytest.raises(Undecodable, match=r"pip install petiole\[zstd\]"):
        Codec().unpack(*packed, NAME)
    assert round_trip("a" * 1000, "zlib") == "a" * 1000


# What was stored by earlier versions

GOLDEN: dict[str, tuple[Any, Any]] = {
    "plain": ({"text": "Süd", "numbers": [0, -1, 2**63, 1.5], "none": None, "yes": True, "many": "a" * 200}, Any),
    "typed": ([ITEM] * 3, list[Item]),
    "model": ([CUSTOMER] * 3, list[Customer]),
    "instant": ([NOW] * 20, list[datetime]),
}
GOLDEN_FILE = Path(__file__).parent / "golden" / "formats.json"


def add_golden() -> None:
    """Writes what the file does not have yet. Pickles hold plain values only: a test's classes may move."""
    stored = json.loads(GOLDEN_FILE.read_text("utf-8")) if GOLDEN_FILE.exists() else {}
    for title, (value, _) in GOLDEN.items():
        for how in HOWS:
            if f"{title}, {how}" not in stored and (title == "plain" or "pickle" not in how):
                found, data = codec(how).pack(value, NAME)
                stored[f"{title}, {how}"] = {"how": found, "base64": base64.b64encode(data).decode()}
    GOLDEN_FILE.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")


@pytest.mark.parametrize("title", json.loads(GOLDEN_FILE.read_text("utf-8")) if GOLDEN_FILE.exists() else [])
def test_what_earlier_versions_stored_is_still_read(title):
    """A deploy does not empty the cache, and a format keeps its meaning."""
    stored = json.loads(GOLDEN_FILE.read_text("utf-8"))[title]
    value, kind = GOLDEN[title.partition(",")[0]]

    assert same(codec("pickle").unpack(stored["how"], base64.b64decode(stored["base64"]), NAME, kind), value)


def test_there_are_stored_bytes_of_every_form():
    """The test above would hold for an empty file."""
    assert {entry["how"] for entry in json.loads(GOLDEN_FILE.read_text("utf-8")).values()} == set(HOWS)


if __name__ == "__main__":
    add_golden()
