"""What comes back as what: types, formats, bounds, and what cannot be read or stored."""

import enum
import logging
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import msgspec
import pydantic
import pytest

from petiole.cachelib import MISS, Cache, Codec, Pickle, cached
from petiole.cachelib.errors import EntryNotCounter, ValueNotCacheable, ValueTooLarge

SECRET, OTHER_SECRET = b"sixteen bytes or more", b"another secret of that length"


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


@dataclass
class Point:
    x: int
    y: int = 0
    names: set[str] = field(default_factory=set)


class Order(msgspec.Struct):
    number: int
    price: Decimal
    at: datetime


class User(pydantic.BaseModel):
    name: str
    id: uuid.UUID


ID = uuid.UUID(int=7)
NOON = datetime(2024, 2, 29, 12, tzinfo=UTC)
TYPED = [
    (Point, Point(1, 2, {"a", "b"})),
    (list[Point], [Point(1), Point(2)]),
    (dict[str, Point | None], {"a": Point(1), "b": None}),
    (Order, Order(1, Decimal("9.50"), NOON)),
    (User, User(name="Ada", id=ID)),
    (Decimal, Decimal("0.10")),
    (uuid.UUID, ID),
    (set[int], {1, 2, 3}),
    (frozenset[str], frozenset("ab")),
    (tuple[int, str], (1, "a")),
    (datetime, NOON),
    (datetime, datetime(2024, 2, 29, 12)),  # noqa: DTZ001 - without a zone, on purpose
    (timedelta, timedelta(seconds=90)),
    (Colour, Colour.RED),
    (Level, Level.LOW),
    (bytes, b"\x00\xff"),
    (Point | None, None),
]
each_typed_value = pytest.mark.parametrize(
    ("kind", "value"), TYPED, ids=[f"{number}-{kind}" for number, (kind, _) in enumerate(TYPED)]
)


def never(*_):
    pytest.fail("the loader was called")


def stored(cache, key):
    return cache.redis.coordination.get(cache.keys.entry(key))


def leases(cache):
    return list(cache.redis.coordination.scan_iter(f"petiole:1:lease:{{{cache.namespace}:*", count=10_000))


def damage(cache, key, data):
    """Put other bytes where an entry is."""
    cache.redis.coordination.set(cache.keys.entry(key), data, px=60_000)


@pytest.fixture(params=["msgpack", "json", "pickle"])
def formatted(request, redis, name):
    """A cache of each format."""
    format = Pickle(SECRET) if request.param == "pickle" else request.param
    return Cache(redis, namespace=name, format=format)


# Types


@each_typed_value
def test_a_value_comes_back_as_the_type_that_is_asked_for(formatted, kind, value):
    """From every read, and to everyone who loads; equal, and of the same class."""
    formatted.set("k", value)
    formatted.set("m", value, tags=["t"])
    back = [
        formatted.get("k", MISS, type=kind),
        formatted.get_many(["k", "m"], type=kind)["m"],
        formatted.get_versioned("k", type=kind).value,
        formatted.get_or_set("k", never, type=kind),
        formatted.get_or_set("new", lambda: value, type=kind),
        formatted.get_or_set("new", never, type=kind),
        formatted.get_or_set_many(["m", "other"], lambda keys: {"other": value}, type=kind)["other"],
        formatted.get_or_set_many(["m", "other"], never, type=kind)["other"],
        formatted.getex("k", 60, MISS, type=kind),
        formatted.getdel("k", MISS, type=kind),
    ]

    assert back == [value] * len(back)
    assert {type(one) for one in back} == {type(value)}
    assert formatted.stats().undecodable == 0


@each_typed_value
def test_the_annotation_of_a_cached_function_is_its_type(cache, kind, value):
    """A hit is what the function returned."""
    calls = []

    @cached(cache, "k:{number}")
    def load(number: int) -> kind:
        calls.append(number)
        return value

    assert load(1) == load(1) == load.get(1) == value
    assert type(load(1)) is type(value)
    assert calls == [1]


def test_a_datetime_of_another_zone_is_the_same_instant(cache):
    """In UTC."""
    there = datetime(2024, 2, 29, 12, tzinfo=timezone(timedelta(hours=5)))
    cache.set("k", there)

    assert cache.get("k", type=datetime) == there


def test_without_a_type_a_value_comes_back_as_what_the_format_has(cache):
    """Lists, dicts, text."""
    cache.set("k", {"point": Point(1), "set": {1}, "price": Decimal("9.50"), "id": ID, "colour": Colour.RED})

    assert cache.get("k") == {
        "point": {"x": 1, "y": 0, "names": []},
        "set": [1],
        "price": "9.50",
        "id": str(ID),
        "colour": "red",
    }


def test_the_type_of_the_cache_is_that_of_its_calls(redis, name):
    """Where they do not say."""
    cache = Cache(redis, namespace=name, type=Point)
    cache.get_or_set("k", lambda: Point(1))

    assert cache.get_or_set("k", never) == Point(1)
    assert cache.get_or_set("k", never, type=Any) == {"x": 1, "y": 0, "names": []}


def test_a_type_given_to_a_cached_function_is_stronger_than_its_annotation(cache):
    """Who decorates knows more."""

    @cached(cache, "k", type=Any)
    def load() -> Point:
        return Point(1)

    assert load() == Point(1)
    assert load() == {"x": 1, "y": 0, "names": []}


LIES = {
    (kind, lie)
    for kind in (uuid.UUID, Decimal, set[int], Point, Colour)
    for lie in ("text", 7, None)
    if (kind, lie) != (Decimal, 7)  # a whole number is read as a Decimal
}


@pytest.mark.parametrize(
    ("kind", "lie"), [*sorted(LIES, key=str), (Point, {"x": "no number"}), (set[int], ["a"])], ids=lambda p: str(p)[-9:]
)
def test_a_value_that_is_not_of_its_type_is_not_cached(cache, caplog, kind, lie):
    """It reaches the caller, and a line in the log says which type it is not, without the value."""

    @cached(cache, "the key")
    def load() -> kind:
        return lie

    with caplog.at_level(logging.WARNING, "petiole"):
        assert load() == lie
        assert load() == lie
    assert cache.stats().loads == 2
    assert stored(cache, "the key") is None
    assert leases(cache) == []
    assert "the value of 'the key' is not cached" in caplog.text
    assert "no number" not in caplog.text


@pytest.mark.parametrize("number", [7, -1])
def test_a_number_is_not_served_as_another_type(cache, number):
    """Also where it is stored as a counter; a hit is never of another class than the one asked for."""
    cache.set("k", number)

    for kind in (str, uuid.UUID, Point, list[int]):
        assert cache.get("k", MISS, type=kind) is MISS
    assert cache.get("k", MISS, type=int) == number
    for kind in (Decimal, float):
        assert type(cache.get("k", MISS, type=kind)) in (kind, type(MISS))


def test_annotations_that_tell_nothing_more_are_left_alone(cache):
    """A function that says dict and returns a list is no reason to load each time."""

    @cached(cache, "k:{number}")
    def load(number: int) -> dict[str, int] | None:
        return [number]

    assert load(1) == load(1) == [1]
    assert cache.stats().loads == 1


class Opaque:
    """Nothing that a value could be restored as."""

    def __init__(self, value: int) -> None:
        self.value = value


def test_an_annotation_that_cannot_be_restored_is_left_alone(cache):
    """Decorating does not fail, nor does a call: what the function returns is cached as what the format has."""

    @cached(cache, "a")
    def unknown() -> "NameForTypeCheckersAlone":  # noqa: F821 - on purpose
        return {"a": 1}

    @cached(cache, "b")
    def union() -> list[Point] | list[User]:
        return [1]

    assert [unknown(), unknown(), union(), union()] == [{"a": 1}, {"a": 1}, [1], [1]]
    assert cache.stats().loads == 2


@pytest.mark.parametrize("kind", [list[Point] | list[User], 7, "Point"], ids=["union", "number", "text"])
def test_a_type_that_cannot_be_restored_is_refused_when_it_is_said(cache, kind):
    """Once, and not as a miss for ever."""
    with pytest.raises(TypeError):
        cached(cache, "k", type=kind)(lambda: 1)
    with pytest.raises(TypeError):
        cache.get_or_set("k", never, type=kind)
    with pytest.raises(TypeError):
        Cache(cache.redis, namespace="n", type=kind)


def test_an_entry_of_another_type_is_loaded_anew(cache):
    """Such as one of before a deploy; it is counted, and overwritten."""
    cache.set("k", {"x": "text"})

    assert cache.get("k", MISS, type=Point) is MISS
    assert cache.get_or_set("k", lambda: Point(1), type=Point) == Point(1)
    assert cache.get_or_set("k", never, type=Point) == Point(1)
    assert cache.stats().undecodable >= 2
    assert leases(cache) == []


# Formats


def test_entries_of_another_format_are_read(redis, name):
    """So the format may be changed while entries of the old one are stored."""
    caches = [Cache(redis, namespace=name, format=format) for format in ("msgpack", "json", Pickle(SECRET))]
    for number, writer in enumerate(caches):
        writer.set(f"k{number}", {"a": [1, None]}, tags=["t"])

    assert [reader.get(f"k{n}") for n in (0, 1) for reader in caches] == [{"a": [1, None]}] * 6
    assert [reader.get("k2", MISS) for reader in caches] == [MISS, MISS, {"a": [1, None]}]


def test_a_pickle_brings_back_what_no_other_format_has(redis, name):
    """Any class of Python."""
    cache = Cache(redis, namespace=name, format=Pickle(SECRET))
    cache.set("k", {"opaque": Opaque(7), (1, 2): {3}})
    back = cache.get("k")

    assert back["opaque"].value == 7
    assert back[1, 2] == {3}
    assert cache.get_or_set("other", lambda: Opaque(8), type=Opaque).value == 8
    assert cache.get_or_set("other", never, type=Opaque).value == 8


def unpickled(*_):
    pytest.fail("it was unpickled")


class Hostile:
    def __reduce__(self):
        return unpickled, ()


def test_a_pickle_that_was_tampered_with_is_a_miss_and_never_run(redis, name):
    """Whichever byte it was."""
    cache = Cache(redis, namespace=name, format=Pickle(SECRET))
    cache.set("k", Hostile())
    good = stored(cache, "k")
    for place in [*range(len(good) - 100, len(good), 7), len(good) - 1]:
        damage(cache, "k", good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert cache.get("k", MISS) is MISS
    assert cache.stats().undecodable >= 15
    assert cache.get_or_set("k", lambda: "new") == "new"
    assert cache.get("k") == "new"


def test_a_pickle_of_another_key_is_a_miss(redis, name):
    """Whoever can write to Redis may not give one user the entry of another."""
    cache = Cache(redis, namespace=name, format=Pickle(SECRET))
    cache.set_many({"user:1": {"admin": True}, "user:2": {"admin": False}})
    one, two = stored(cache, "user:1"), stored(cache, "user:2")
    damage(cache, "user:1", two)
    damage(cache, "user:2", one)

    assert cache.get("user:1", MISS) is MISS
    assert cache.get_many(["user:1", "user:2"]) == {}
    assert cache.stats().undecodable == 3


def test_a_pickle_of_another_secret_is_a_miss(redis, name):
    """Until the secret is among those that verify."""
    Cache(redis, namespace=name, format=Pickle(OTHER_SECRET)).set("k", [1])

    assert Cache(redis, namespace=name, format=Pickle(SECRET)).get("k", MISS) is MISS
    assert Cache(redis, namespace=name, format=Pickle(SECRET, OTHER_SECRET)).get("k", MISS) == [1]


@pytest.mark.parametrize("format", ["pickle", "yaml", Pickle, None, b"json"])
def test_an_unknown_format_is_refused(redis, format):
    """A pickle without a secret is none."""
    with pytest.raises((TypeError, ValueError), match="format"):
        Cache(redis, namespace="n", format=format)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("format", ["msgpack", "json", Pickle(SECRET)], ids=["msgpack", "json", "pickle"])
def test_a_long_value_is_stored_compressed(redis, name, format, compression):
    """And comes back; a short one is stored as it is."""
    cache = Cache(redis, namespace=name, format=Codec(format, compression=compression, compress_above=1_000))
    long = {"text": "petiole " * 10_000}
    cache.set_many({"long": long, "short": "petiole"})

    assert cache.get_many(["long", "short"]) == {"long": long, "short": "petiole"}
    assert len(stored(cache, "long")) < 5_000
    assert compression in cache.explain("long").how
    assert compression not in cache.explain("short").how


# What cannot be stored


def test_a_value_over_the_bound_is_refused_by_set(redis, name):
    """Nothing is stored, and what was there stays; the error says how large it may be."""
    cache = Cache(redis, namespace=name, format=Codec(max_bytes=1_000))
    cache.set("k", "short")
    for store in (
        lambda: cache.set("k", "long" * 1_000),
        lambda: cache.set_many({"other": 1, "k": "long" * 1_000}),
        lambda: cache.add("new", "long" * 1_000),
        lambda: cache.replace("k", "long" * 1_000),
    ):
        with pytest.raises(ValueTooLarge, match=r"4003 bytes .* max_bytes=1000"):
            store()
    assert cache.get_many(["k", "other", "new"]) == {"k": "short"}


def test_a_loaded_value_over_the_bound_is_returned_and_not_cached(redis, name, caplog):
    """The caller can do nothing for it; a line in the log tells who can."""
    cache = Cache(redis, namespace=name, format=Codec(max_bytes=1_000))
    long = "long" * 1_000
    with caplog.at_level(logging.WARNING, "petiole"):
        assert cache.get_or_set("k", lambda: long) == long
        assert cache.get_or_set_many(["k", "short"], lambda keys: {"k": long, "short": 1}) == {"k": long, "short": 1}
        assert not cache.refresh("k", lambda: long)
    assert cache.get_many(["k", "short"]) == {"short": 1}
    assert caplog.text.count("the value of 'k' is not cached") == 3
    assert "max_bytes=1000" in caplog.text
    assert "longlong" not in caplog.text
    assert leases(cache) == []


def contains_itself():
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value",
    [object(), Opaque(1), lambda: 1, iter([1]), 2**64, {"deep": [object()]}, contains_itself(), MISS],
    ids=["object", "class", "function", "iterator", "2**64", "deep", "itself", "MISS"],
)
def test_a_value_without_a_form_is_refused_with_its_key(cache, value):
    """By every write; nothing is stored."""
    for store in (
        lambda: cache.set("the key", value),
        lambda: cache.set_many({"a": 1, "the key": value}),
        lambda: cache.add("the key", value),
    ):
        with pytest.raises(ValueNotCacheable, match="'the key'") as caught:
            store()
        assert caught.value.key == "the key"
        assert isinstance(caught.value, TypeError)
    if value is not MISS:  # a loader says with it that there is nothing to cache
        with pytest.raises(ValueNotCacheable, match="'the key'"):
            cache.get_or_set("the key", lambda: value)
    assert cache.get_many(["a", "the key"]) == {}
    assert leases(cache) == []


def test_a_loader_may_say_that_there_is_nothing(cache):
    """``MISS`` reaches the caller, and is not cached."""
    assert cache.get_or_set("k", lambda: MISS) is MISS
    assert stored(cache, "k") is None
    assert cache.get_or_set("k", lambda: 1) == 1


CALLS = {
    "get": lambda c, key: c.get(key),
    "get_many": lambda c, key: c.get_many(["a", key]),
    "get_versioned": lambda c, key: c.get_versioned(key),
    "exists": lambda c, key: c.exists(key),
    "ttl": lambda c, key: c.ttl(key),
    "get_or_set": lambda c, key: c.get_or_set(key, never),
    "get_or_set_many": lambda c, key: c.get_or_set_many(["a", key], never),
    "refresh": lambda c, key: c.refresh(key, dict),
    "set": lambda c, key: c.set(key, 1),
    "set_many": lambda c, key: c.set_many({"a": 1, key: 2}),
    "guard": lambda c, key: c.guard(["a", key]).__enter__(),
    "add": lambda c, key: c.add(key, 1),
    "replace": lambda c, key: c.replace(key, 1),
    "compare_and_set": lambda c, key: c.compare_and_set(key, 1, "0" * 16),
    "incr": lambda c, key: c.incr(key),
    "decr": lambda c, key: c.decr(key),
    "touch": lambda c, key: c.touch(key),
    "getex": lambda c, key: c.getex(key),
    "getdel": lambda c, key: c.getdel(key),
    "expire": lambda c, key: c.expire(key),
    "delete": lambda c, key: c.delete("a", key),
    "invalidate": lambda c, key: c.invalidate(keys=["a", key]),
    "explain": lambda c, key: c.explain(key),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_no_key_is_refused_everywhere(cache, call):
    """Empty, not text, longer than a key may be, no Unicode; before anything is sent or removed."""
    for key, error, message in (
        ("", ValueError, "key must not be empty"),
        (7, TypeError, "key must be text, not int: 7"),
        (None, TypeError, "key must be text, not NoneType"),
        (b"k", TypeError, "key must be text, not bytes"),
        ("k" * 1_025, ValueError, "key has 1025 bytes, more than 1024: 'kkk.*hash it first"),
        ("é" * 600, ValueError, "key has 1200 bytes"),
        ("\ud800", ValueError, "not valid Unicode"),
    ):
        with pytest.raises(error, match=message):
            call(cache, key)
    assert stored(cache, "a") is None
    assert leases(cache) == []
    assert cache.stats().errors == 0


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_any_other_text_is_a_key(cache, call):
    """It is escaped where Redis would take it for something else."""
    for key in ("k" * 1_024, "é" * 512, " ", "{}:*?[]%\n\x00", "a}b{c"):
        cache.set_many({key: 1, "a": 2})
        call(cache, key)
        cache.delete(key)
        assert cache.get(key, MISS) is MISS


@pytest.mark.parametrize("ttl", [-1, 0, True, "soon", float("nan"), [1]])
def test_a_ttl_that_is_none_is_refused_everywhere(cache, ttl):
    """Before anything is sent, or loaded."""
    for call in (
        lambda: Cache(cache.redis, namespace="n", ttl=ttl),
        lambda: cache.set("k", 1, ttl=ttl),
        lambda: cache.set_many({"k": 1}, ttl=ttl),
        lambda: cache.add("k", 1, ttl=ttl),
        lambda: cache.get_or_set("k", never, ttl=ttl),
        lambda: cache.get_or_set_many(["k"], never, ttl=ttl),
        lambda: cache.refresh("k", never, ttl=ttl),
        lambda: cache.incr("k", ttl=ttl),
        lambda: cache.decr("k", ttl=ttl),
        lambda: cache.touch("k", ttl),
        lambda: cache.getex("k", ttl),
        lambda: cached(cache, "k", ttl=ttl)(never),
    ):
        with pytest.raises((TypeError, ValueError), match="ttl"):
            call()
    assert stored(cache, "k") is None


def test_a_mistaken_ttl_is_refused_although_nothing_could_be_stored(cache):
    """A mistake must not depend on what is in Redis."""
    with pytest.raises(ValueError, match="ttl=-1"):
        cache.replace("absent", 1, ttl=-1)
    with pytest.raises(ValueError, match="ttl=-1"):
        cache.compare_and_set("absent", 1, "0" * 16, ttl=-1)


def test_an_unknown_option_is_refused_everywhere(cache):
    """With the nearest known one."""
    for call in (
        lambda: Cache(cache.redis, namespace="n", stal=5),
        lambda: cache.get_or_set("k", never, stal=5),
        lambda: cache.get_or_set_many(["k"], never, stal=5),
        lambda: cache.refresh("k", never, stal=5),
        lambda: cached(cache, "k", stal=5)(never),
    ):
        with pytest.raises(TypeError, match="unknown option 'stal'; did you mean 'stale'"):
            call()


# What cannot be read

HEAD = b"\xc1101" + b"0" * 10 + b"t" * 16
GARBAGE = {
    "nothing": b"",
    "text": b"somebody else's text",
    "head alone": b"\xc11",
    "half a head": HEAD[:20],
    "no body": HEAD + b"v" * 20,
    "digits of no number": HEAD + b"v" * 20 + b"12x",
    "no hexadecimal": b"\xc11zz" + b"z" * 60,
    "many versions": b"\xc11ff" + b"f" * 60,
    "pickle": b"\x80\x05}.",
}


def damaged(cache, how):
    """An entry that was damaged, or is somebody else's; None: its value alone."""
    cache.set("k", ["value"], ttl=60, stale=600)
    good = stored(cache, "k")
    damage(cache, "k", GARBAGE[how] if how in GARBAGE else good[: len(good) - 3])


@pytest.fixture(params=[*GARBAGE, "cut off"])
def broken(request, cache):
    damaged(cache, request.param)
    return cache


def test_what_cannot_be_read_is_a_miss_to_all_who_read(broken, caplog):
    """It is counted, and a line in the log says so, without what is stored."""
    with caplog.at_level(logging.WARNING, "petiole"):
        assert broken.get("k", MISS) is MISS
        assert broken.get_many(["k"]) == {}
        assert broken.get_versioned("k") is None
        assert broken.exists("k") is False
        assert broken.ttl("k") is None
        assert broken.getex("k", 5, MISS) is MISS
        assert broken.touch("k", 5) is False
        assert broken.replace("k", 1) is False
        assert broken.compare_and_set("k", 1, "t" * 16) is False
        assert broken.getdel("k", MISS) is MISS
    assert broken.stats().undecodable >= 9
    assert broken.stats().errors == 0
    assert "'k' cannot be read" in caplog.text
    assert "somebody" not in caplog.text
    assert stored(broken, "k") is None


def test_what_cannot_be_read_is_not_given_more_time(broken):
    """Nobody wants it."""
    broken.touch("k", 10_000)
    broken.getex("k", 10_000)

    assert broken.redis.coordination.pttl(broken.keys.entry("k")) <= 60_000


@pytest.mark.parametrize(
    "load",
    [
        lambda c: c.get_or_set("k", lambda: "new"),
        lambda c: c.get_or_set_many(["k"], lambda keys: {"k": "new"})["k"],
        lambda c: c.refresh("k", lambda: "new"),
        lambda c: c.refresh("k", lambda: "new", unless_fresh_for=1),
        lambda c: c.set("k", "new"),
        lambda c: c.add("k", "new"),
    ],
    ids=["get_or_set", "get_or_set_many", "refresh", "refresh unless fresh", "set", "add"],
)
def test_what_cannot_be_read_is_overwritten(broken, load):
    """It does not stand in the way of a good value."""
    assert load(broken)
    assert broken.get("k") == "new"
    assert leases(broken) == []


def test_what_cannot_be_read_is_removed_as_anything_else(broken):
    """By key, by pattern, and as stale: it has no stale window."""
    assert broken.delete("k") == 1
    damage(broken, "k", b"text")
    assert broken.invalidate(matching="k*") == 1
    damage(broken, "k", b"text")
    assert broken.expire("k")
    assert stored(broken, "k") is None


@pytest.mark.parametrize("how", ["nothing", "text", "pickle", "cut off"])
def test_what_is_no_number_is_not_counted_on(cache, how):
    """The error says what to do, and nothing has changed."""
    damaged(cache, how)
    before = stored(cache, "k")
    with pytest.raises(EntryNotCounter, match="delete it first"):
        cache.incr("k")
    assert stored(cache, "k") == before
    assert cache.delete("k") == 1
    assert cache.incr("k") == 1


@pytest.mark.parametrize("how", ["head alone", "half a head", "no body", "digits of no number", "no hexadecimal"])
def test_what_begins_like_an_entry_and_is_of_no_version_is_counted_over(cache, how):
    """As what was there before the namespace was cleared."""
    damaged(cache, how)

    assert cache.incr("k", 5) == 5
    assert cache.get("k") == 5
    assert 0 < cache.redis.coordination.pttl(cache.keys.entry("k")) <= 300_000


def test_what_cannot_be_read_is_explained(broken):
    """Without what is stored."""
    told = broken.explain("k")

    assert told.state == "undecodable"
    assert "cannot be read" in told.note
    assert "somebody" not in repr(told)
    assert told.size_bytes == len(stored(broken, "k"))


@pytest.fixture
def tampered(redis, name):
    """An entry whose head is whole, and whose value no longer is what was signed."""
    cache = Cache(redis, namespace=name, format=Pickle(SECRET))
    cache.set("k", {"a": 1}, ttl=60)
    good = stored(cache, "k")
    damage(cache, "k", good[:-1] + b"!")
    return cache


def test_a_value_that_cannot_be_read_does_not_stand_in_the_way(tampered):
    """To ``add`` it is as good as nothing, as it is to ``get``; and to ``replace``."""
    assert tampered.get("k", MISS) is MISS
    assert not tampered.replace("k", "new")
    assert tampered.add("k", "new")
    assert tampered.get("k") == "new"


def test_a_value_that_cannot_be_read_is_explained(tampered):
    """Who asks why it is a miss is not told that it is served."""
    told = tampered.explain("k")

    assert told.state == "undecodable"
    assert "it is served" not in told.note


def test_a_key_of_another_kind_takes_nobody_down(cache):
    """Somebody else's list under our name: no value, and a removal removes it."""
    client = cache.redis.coordination
    client.rpush(cache.keys.entry("k"), "somebody's")
    client.expire(cache.keys.entry("k"), 60)

    assert cache.get("k", MISS) is MISS
    assert cache.get_many(["k", "other"]) == {}
    assert cache.delete("k") == 1
    assert cache.stats().unsent == 0
    client.rpush(cache.keys.entry("k"), "somebody's")
    client.expire(cache.keys.entry("k"), 60)
    assert cache.get_or_set("k", lambda: 1) == 1
    assert cache.get("k") == 1
    cache.delete("k")
    assert cache.get_or_set("k", lambda: 2) == 2
    assert cache.get("k") == 2
