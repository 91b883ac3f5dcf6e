"""Calls that are seldom meant: each is either right, or refused before anything has been changed.

What a caller hands over may be text that is an enum too, an exception that cannot be made again, a list that changes
afterwards, an async function; and under a name of ours may lie what is not ours.
"""

import errno
import logging
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, StrEnum
from functools import partial
from uuid import UUID, uuid4

import pytest
from local_nodes import eventually

from petiole.cachelib import MISS, Cache, Loaded, Near, Settings, cached, connect
from petiole.cachelib.errors import EntryNotCounter, LoaderRecursion, ValueNotCacheable
from petiole.cachelib.keys import lease
from petiole.cachelib.listener import THREAD_NAME
from petiole.cachelib.remembered import Remembered, Unsent

LONG_S = 60
NOT_UNICODE = "\ud800"
TOO_LONG = "é" * 600  # as many letters as are allowed, and more bytes


class Group(str, Enum):  # noqa: UP042 - the text of such a member is not what it formats as: that is the point
    USERS = "users"


class NewGroup(StrEnum):
    USERS = "users"


members = pytest.mark.parametrize("member", [Group.USERS, NewGroup.USERS], ids=["str-and-Enum", "StrEnum"])


def counting(value=None, *, raises=None):
    """A loader that counts its calls."""

    def load():
        load.calls += 1
        if raises is not None:
            raise raises()
        return value() if callable(value) else value

    load.calls = 0
    return load


def is_loaded_by_nobody(cache, *keys):
    return not cache.redis.coordination.exists(*[lease(cache.keys.entry(key)) for key in keys])


# Text that is an enum too


@members
def test_a_member_of_an_enum_is_the_tag_that_it_equals(cache, member):
    load = counting("old")
    assert [cache.get_or_set("k", load, tags=[member]) for _ in range(2)] == ["old"] * 2
    assert (cache.get("k"), load.calls) == ("old", 1)
    cache.invalidate(tags=["users"])
    assert cache.get("k") is None
    cache.set("k", "other", tags=["users"])
    assert cache.get("k") == "other"
    cache.invalidate(tags=[member])
    assert cache.get("k") is None
    cache.get_or_set("k", lambda: Loaded("more", tags=[member]))
    assert cache.get("k") == "more"
    cache.invalidate(tags=["users"])
    assert cache.get("k") is None


@members
def test_a_member_of_an_enum_is_the_key_that_it_equals(cache, member):
    cache.set(member, 1)
    assert (cache.get("users"), cache.get_many([member, "users"])) == (1, {"users": 1})
    assert cache.delete("users") == 1
    assert cache.get(member) is None
    assert cache.get_or_set_many([member], lambda keys: dict.fromkeys(keys, 2)) == {"users": 2}
    assert cache.get("users") == 2
    assert cache.delete(member) == 1
    assert cache.get("users") is None


@members
def test_a_member_of_an_enum_is_dropped_near_when_another_process_changes_what_it_equals(redis_server, name, member):
    connected = partial(connect, settings=Settings(url=redis_server.url, cache_timeout=2))
    with connected() as here, connected() as elsewhere:
        cache, other = Cache(here, namespace=name, near=Near(ttl=LONG_S)), Cache(elsewhere, namespace=name)

        def near_hits():
            cache.get(member)
            return cache.stats().near_hits

        other.set("users", "old", tags=["t"])
        eventually(near_hits, "the near cache serves it")
        assert cache.get("users") == cache.get(member) == "old"
        other.set("users", "new")
        eventually(lambda: cache.get(member) == "new", "the change is heard of", within_s=LONG_S / 2)
        assert cache.get("users") == "new"
    eventually(lambda: not [one for one in threading.enumerate() if one.name == THREAD_NAME], "the listener ends")


# Exceptions


@pytest.mark.parametrize(
    ("listed", "raised"), [(LookupError, KeyError), (Exception, ZeroDivisionError), (OSError, TimeoutError)]
)
def test_an_exception_below_a_listed_class_is_cached(cache, listed, raised):
    load = counting(raises=partial(raised, "gone"))
    for _ in range(3):
        with pytest.raises(raised, match="gone") as caught:
            cache.get_or_set("k", load, exceptions={listed: 30})
        assert type(caught.value) is raised
    assert load.calls == 1


def test_a_cached_exception_is_raised_to_those_alone_who_list_it(cache):
    with pytest.raises(KeyError):
        cache.get_or_set("k", counting(raises=KeyError), exceptions={LookupError: 30})
    assert cache.get_or_set("k", lambda: "value", exceptions={OSError: 30}) == "value"


class OrderNotFound(Exception):
    """Its arguments are not those that it is made of."""

    def __init__(self, order_id, reason):
        super().__init__(f"{order_id}: {reason}")


class Answered(Exception):
    """Its one argument is another than the one that it is made of."""

    def __init__(self, status):
        self.status = status
        super().__init__(f"status {status}")


def order_not_found():
    return OrderNotFound(7, "sold")


def answered():
    return Answered(404)


def file_not_found():
    return FileNotFoundError(errno.ENOENT, "no such file", "order.txt")


def annotated():
    error = ValueError("wrong")
    error.order_id = 7
    return error


@pytest.mark.parametrize("make", [order_not_found, answered, file_not_found, annotated])
def test_an_exception_that_would_come_back_as_another_is_not_cached(cache, caplog, make):
    load = counting(raises=make)
    for calls in (1, 2):
        with pytest.raises(type(make())) as caught:
            cache.get_or_set("k", load, exceptions={Exception: 30})
        assert (str(caught.value), caught.value.__dict__) == (str(make()), make().__dict__)
        assert load.calls == calls
    assert is_loaded_by_nobody(cache, "k")
    assert "the exception of 'k' is not cached" in caplog.text


def test_notes_on_an_exception_do_not_keep_it_from_being_cached(cache):
    def noted():
        error = KeyError("gone")
        error.add_note("in row 7")
        return error

    load = counting(raises=noted)
    for _ in range(2):
        with pytest.raises(KeyError, match="gone"):
            cache.get_or_set("k", load, exceptions={KeyError: 30})
    assert load.calls == 1


# Others in the same process


@pytest.mark.parametrize("theirs", ["text", 7], ids=["text", "a-count"])
def test_who_joins_a_load_of_another_type_gets_a_value_of_their_own(cache, theirs):
    ours, begun, go_on = uuid4(), threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert go_on.wait(LONG_S)
        return theirs

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get_or_set, "k", slow)
        assert begun.wait(LONG_S)
        second = pool.submit(cache.get_or_set, "k", lambda: ours, type=UUID)
        eventually(lambda: cache.stats().joins, "the second caller joins the first")
        go_on.set()
        assert (first.result(LONG_S), second.result(LONG_S)) == (theirs, ours)


# What is not ours under a name of ours


@pytest.fixture(params=["list", "hash", "set", "rubbish"])
def put_rubbish(redis, request):
    """Puts what is no entry under a key, of each kind that Redis has."""
    client = redis.coordination

    def put(key):
        client.unlink(key)
        if request.param == "list":
            client.rpush(key, "not ours")
        elif request.param == "hash":
            client.hset(key, "not", "ours")
        elif request.param == "set":
            client.sadd(key, "not ours")
        else:
            client.set(key, b"\xc1not ours")
        client.expire(key, LONG_S)

    return put


@pytest.fixture
def strict(redis, name):
    """A cache that would raise if Redis were taken for away."""
    return Cache(redis, namespace=name, strict=True)


def test_what_is_no_entry_takes_no_other_key_away(strict, put_rubbish):
    strict.set("good", 1)
    put_rubbish(strict.keys.entry("k"))
    assert strict.get_many(["k", "good"]) == {"good": 1}
    assert strict.get("k", MISS) is MISS
    assert strict.explain("k")
    asked = []

    def load(keys):
        asked.append(keys)
        return dict.fromkeys(keys, 2)

    assert strict.get_or_set_many(["k", "good"], load) == {"k": 2, "good": 1}
    assert (asked, strict.get("k")) == ([["k"]], 2)


def test_what_is_no_entry_is_loaded_once_and_is_then_an_entry(strict, put_rubbish):
    put_rubbish(strict.keys.entry("k"))
    load = counting("loaded")
    assert [strict.get_or_set("k", load) for _ in range(2)] == ["loaded"] * 2
    assert load.calls == 1


@pytest.mark.parametrize(
    ("change", "after"),
    [
        (lambda cache: cache.set("k", 1), 1),
        (lambda cache: cache.add("k", 1), 1),
        (lambda cache: cache.set_many({"k": 1, "other": 2}), 1),
        (lambda cache: cache.refresh("k", lambda: 1), 1),
        (lambda cache: not cache.replace("k", 1), None),
        (lambda cache: not cache.compare_and_set("k", 1, "0" * 16), None),
        (lambda cache: not cache.touch("k"), None),
        (lambda cache: cache.getex("k", 60, MISS) is MISS, None),
        (lambda cache: cache.getdel("k", MISS) is MISS, None),
        (lambda cache: not cache.exists("k"), None),
        (lambda cache: cache.ttl("k") is None, None),
        (lambda cache: cache.expire("k") in (True, False), None),
        (lambda cache: cache.delete("k") == 1, None),
    ],
    ids=[
        "set",
        "add",
        "set_many",
        "refresh",
        "replace",
        "compare_and_set",
        "touch",
        "getex",
        "getdel",
        "exists",
        "ttl",
        "expire",
        "delete",
    ],
)
def test_every_operation_takes_what_is_no_entry_for_nothing(strict, put_rubbish, change, after):
    put_rubbish(strict.keys.entry("k"))
    assert change(strict)
    assert strict.get("k") == after


def test_counting_begins_anew_where_there_is_no_entry_and_nowhere_else(strict, put_rubbish):
    put_rubbish(strict.keys.entry("k"))
    assert (strict.incr("k"), strict.get("k")) == (1, 1)
    strict.set("k", "text")
    with pytest.raises(EntryNotCounter):
        strict.incr("k")


@pytest.mark.parametrize("whose", ["tag", "namespace", "sequence"])
def test_what_is_no_version_keeps_nobody_from_caching_or_invalidating(strict, put_rubbish, whose):
    keys = strict.keys
    strict.set("k", "old", tags=["t"])
    put_rubbish({"tag": keys.tag("t"), "namespace": keys.whole, "sequence": keys.sequence}[whose])
    load = counting("new")
    assert strict.get("k", MISS) in ("old", MISS)
    strict.invalidate(tags=["t"])
    assert strict.get("k", MISS) is MISS
    assert [strict.get_or_set("k", load, tags=["t"]) for _ in range(2)] == ["new"] * 2
    assert (strict.get("k"), load.calls) == ("new", 1)
    put_rubbish({"tag": keys.tag("t"), "namespace": keys.whole, "sequence": keys.sequence}[whose])
    strict.clear()
    assert strict.get("k", MISS) is MISS


# Odd tags


def test_the_tags_of_a_guard_and_of_what_is_set_under_it_are_not_too_many_together(cache):
    ours, others = [f"a{i}" for i in range(200)], [f"b{i}" for i in range(200)]
    with cache.guard(["k"], tags=ours) as guard:
        with pytest.raises(ValueError, match="254 tags, not 400"):
            cache.set_many({"k": 1}, tags=others, guard=guard)
        assert cache.set_many({"k": 2}, tags=ours[:100] + others[:54], guard=guard)  # the same tag counts once
    assert cache.get("k") == 2
    assert cache.stats().undecodable == 0


ODD_TAGS = pytest.mark.parametrize(
    ("tag", "error", "says"),
    [
        (NOT_UNICODE, ValueError, "not valid Unicode"),
        (TOO_LONG, ValueError, "1200 bytes"),
        ("", ValueError, "empty"),
        (7, TypeError, "must be text"),
        (None, TypeError, "must be text"),
    ],
    ids=["surrogate", "too-long", "empty", "number", "none"],
)


@ODD_TAGS
def test_an_odd_tag_of_what_was_loaded_leaves_no_lease_behind(cache, tag, error, says):
    with pytest.raises(error, match=says):
        cache.get_or_set("k", lambda: Loaded(1, tags=[tag]))
    assert is_loaded_by_nobody(cache, "k")
    with pytest.raises(error, match=says):
        cache.get_or_set_many(["k", "other"], lambda keys: {key: Loaded(1, tags=[tag]) for key in keys})
    assert is_loaded_by_nobody(cache, "k", "other")
    with pytest.raises(error, match=says):
        cache.refresh("k", lambda: Loaded(1, tags=[tag]))
    assert is_loaded_by_nobody(cache, "k")
    assert cache.get_or_set("k", lambda: 2) == 2


@ODD_TAGS
def test_an_odd_tag_of_a_call_is_refused_before_anything_is_loaded(cache, tag, error, says):
    load = counting(1)
    for call in (
        lambda: cache.get_or_set("k", load, tags=[tag]),
        lambda: cache.get_or_set_many(["k"], lambda keys: load(), tags=[tag]),
        lambda: cache.refresh("k", load, tags=[tag]),
        lambda: cache.set("k", 1, tags=[tag]),
        lambda: cache.guard(["k"], tags=[tag]).__enter__(),
        lambda: cache.invalidate(tags=[tag]),
    ):
        with pytest.raises(error, match=says):
            call()
    assert (load.calls, cache.get("k", MISS)) == (0, MISS)
    assert is_loaded_by_nobody(cache, "k")


def test_tags_may_come_one_after_another_and_in_any_script(cache):
    for call in (
        lambda: cache.set("k", 1, tags=(tag for tag in ["ключ", "é" * 512])),
        lambda: cache.get_or_set("k", lambda: 1, tags=(tag for tag in ["ключ", "é" * 512])),
        lambda: cache.get_or_set("k", lambda: Loaded(1, tags=(tag for tag in ["ключ", "é" * 512]))),
        lambda: cache.get_or_set_many(["k"], lambda keys: {"k": 1}, tags=(tag for tag in ["ключ", "é" * 512])),
    ):
        for tag in ("ключ", "é" * 512):
            call()
            assert cache.get("k") == 1
            cache.invalidate(tags=(one for one in [tag]))
            assert cache.get("k") is None


def test_tags_are_those_that_the_list_held_when_it_was_given(cache):
    tags, begun, go_on = ["a"], threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert go_on.wait(LONG_S)
        return "new"

    cache.set("k", "old", stale=LONG_S)
    cache.expire("k")
    assert cache.get_or_set("k", slow, tags=tags, stale=LONG_S, refresh="thread") == "old"
    assert begun.wait(LONG_S)
    tags.clear()
    go_on.set()
    eventually(lambda: cache.get("k") == "new", "the thread has stored what it loaded")
    cache.invalidate(tags=["a"])
    assert cache.get("k") is None


# Asking for what one is loading oneself


def test_who_guards_a_key_is_not_kept_waiting_for_themselves(redis, name):
    cache, load = Cache(redis, namespace=name, lease=1), counting(1)
    with cache.guard(["a", "b"]) as guard:
        for ask in (
            lambda: cache.get_or_set("a", load),
            lambda: cache.get_or_set_many(["a", "free"], lambda keys: dict.fromkeys(keys, load())),
        ):
            with pytest.raises(LoaderRecursion, match="'a'"):
                ask()
        assert cache.get_or_set("other", lambda: 3) == 3
        assert cache.set_many({"a": 4}, guard=guard)
        assert cache.get_or_set("a", load) == 4
    assert cache.get_or_set("b", load) == 1


def test_a_refresh_in_a_thread_may_ask_for_what_its_starter_is_loading(cache, caplog):
    def load_a():
        return "a of " + cache.get_or_set("b", load_b, stale=LONG_S, refresh="thread")

    def load_b():
        return "b of " + cache.get_or_set("a", load_a)

    cache.set("b", "old b", stale=LONG_S)
    cache.expire("b")
    with caplog.at_level(logging.WARNING):
        assert cache.get_or_set("a", load_a) == "a of old b"
        eventually(lambda: cache.get("b") == "b of a of old b", "the refresh is done")
    assert "LoaderRecursion" not in caplog.text


# Patterns


ODD_PATTERNS = pytest.mark.parametrize(
    ("pattern", "error"),
    [("", ValueError), (TOO_LONG, ValueError), (NOT_UNICODE, ValueError), (7, TypeError), (["a*"], TypeError)],
    ids=["empty", "too-long", "surrogate", "number", "list"],
)


@ODD_PATTERNS
def test_an_odd_pattern_is_refused_before_anything_is_removed(cache, pattern, error):
    cache.set_many({"a": 1, "b": 2}, tags=["t"])
    with pytest.raises(error):
        cache.invalidate(keys=["a"], tags=["t"], matching=pattern)
    assert cache.get_many(["a", "b"]) == {"a": 1, "b": 2}


@ODD_PATTERNS
def test_an_odd_pattern_is_refused_before_anything_is_remembered(name, pattern, error):
    with connect(settings=Settings(url="redis://127.0.0.1:1/0", cache_timeout=0.05)) as redis:
        cache = Cache(redis, namespace=name)
        with pytest.raises(error):
            cache.invalidate(keys=["a"], tags=["t"], matching=pattern)
        assert cache.stats().unsent == 0


# What is remembered


def test_what_cannot_be_sent_at_all_holds_up_nothing_else(redis, caplog, monkeypatch):
    monkeypatch.setattr("petiole.cachelib.remembered._FIRST_PAUSE_S", 0.01)
    sent = []

    def send(unsent):
        if "bad" in unsent.keys:
            raise ValueError("no such key")
        sent.extend(unsent.keys)

    remembered = Remembered(redis, send, "cache 'c'")
    remembered.add(Unsent(keys={"bad": None}), OSError("away"))
    eventually(lambda: not remembered.any, "what cannot be sent is given up")
    assert "'bad' cannot be sent, and is given up" in caplog.text
    remembered.add(Unsent(keys={"good": None}), OSError("away"))
    eventually(lambda: sent == ["good"] and not remembered.any, "later ones are sent")
    assert not remembered.covers("good")


def test_of_many_lost_invalidations_the_log_names_the_first_few(caplog):
    def send(_):
        raise OSError("away")

    with connect(settings=Settings(url="redis://127.0.0.1:1/0", cache_timeout=0.05)) as redis:
        remembered = Remembered(redis, send, "cache 'c'")
        remembered.add(Unsent(keys={f"user:{number}": None for number in range(9_000)}), OSError("away"))
        remembered.at_exit()
    (lost,) = [record.getMessage() for record in caplog.records if "never told" in record.getMessage()]
    assert "9000 invalidations" in lost
    assert "'user:0'" in lost
    assert "user:100'" not in lost
    assert len(lost) < 300
    remembered.renew_after_fork()  # nothing is to be said at the exit of this process


# Functions


def unresolved(cache, **options):
    @cached(cache, "report:{number}", **options)
    def report(number: int) -> "NotImportedHere":  # noqa: F821
        return {"number": number}

    return report


def test_an_annotation_that_means_nothing_is_told_when_the_function_is_decorated(cache, caplog):
    report = unresolved(cache)
    assert re.search(r"what .*report returns cannot be found out .*NotImportedHere.*give type=", caplog.text)
    assert [report(1), report(1)] == [{"number": 1}] * 2


def test_with_a_type_no_annotation_is_needed(cache, caplog):
    report = unresolved(cache, type=dict[str, int])
    assert [report(1), report(1)] == [{"number": 1}] * 2
    assert not caplog.records


def test_async_functions_are_refused_when_they_are_decorated(cache):
    async def user(user_id: int) -> int:
        return user_id

    async def users():
        yield 1

    for function in (user, users):
        with pytest.raises(TypeError, match=r"user.*async"):
            cached(cache, "user")(function)


def test_async_loaders_are_refused_and_leave_nothing_behind(cache):
    async def load(*_):
        return 1

    for call in (
        lambda: cache.get_or_set("k", load),
        lambda: cache.get_or_set("k", load, hard_timeout=LONG_S),
        lambda: cache.refresh("k", load),
        lambda: cache.get_or_set_many(["k"], load),
    ):
        with pytest.raises(TypeError, match="async"):
            call()
        assert is_loaded_by_nobody(cache, "k")
    assert cache.get("k", MISS) is MISS


def test_a_bound_method_has_what_a_cached_function_has(cache):
    class Team:
        def __init__(self, team_id):
            self.id = team_id

        @cached(cache, "team:{self.id}:{user_id}", tags=["team:{self.id}"])
        def member(self, user_id: int) -> UUID:
            """Who that is."""
            return UUID(int=user_id)

    member = Team(5).member
    assert (list(member.tags(7)), member.key(7), member.cache) == (["team:5"], "team:5:7", cache)
    assert (member.__name__, member.__doc__) == ("member", "Who that is.")
    assert member(7) == member.original(7) == member.get(7) == UUID(int=7)
    cache.invalidate(tags=member.tags(7))
    assert member.get(7) is MISS


@pytest.mark.parametrize("value", ["nonsense", 7, None])
def test_a_value_that_is_not_of_the_functions_type_is_refused(cache, value):
    @cached(cache, "token:{user_id}")
    def token(user_id: int) -> UUID:
        return UUID(int=user_id)

    with pytest.raises(ValueNotCacheable):
        token.set(value, 7)
    assert token.get(7) is MISS
    assert token.set(UUID(int=9), 7)
    assert token(7) == UUID(int=9)
