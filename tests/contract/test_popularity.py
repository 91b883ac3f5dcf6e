"""Popularity: what is asked for most, over all processes, and fading with time."""

import logging

import pytest

from petiole.cachelib import Settings, connect
from petiole.cachelib.keys import CacheKeys
from petiole.cachelib.popularity import Popularity

DAY_MS = 86_400_000


@pytest.fixture
def key(name):
    return CacheKeys(name).popular("module.function")


@pytest.fixture
def popularity(redis, key):
    return Popularity(redis, key, top=3)


def note(popularity, **counts):
    for name, count in counts.items():
        for _ in range(count):
            popularity.note([name], {})
    popularity.send()


def names(calls):
    return [arguments[0] for arguments, _ in calls]


def scores(redis, key):
    return dict(redis.coordination.zrange(key, 0, -1, withscores=True))


def test_the_most_requested_come_first(popularity):
    """And no more of them than are wanted."""
    note(popularity, a=1, b=4, c=2, d=3)

    assert names(popularity.take()) == ["b", "d", "c"]


def test_a_call_comes_back_as_it_was_made(popularity):
    """Positions and keywords, with their types."""
    popularity.note([1, "1", 1.5, True, None], {"b": "é", "a": -1})
    popularity.send()

    (call,) = popularity.take()
    assert call == ([1, "1", 1.5, True, None], {"b": "é", "a": -1})
    assert [type(value) for value in call[0]] == [int, str, float, bool, type(None)]


def test_the_order_of_keywords_does_not_matter(popularity, redis, key):
    """One call is counted as one."""
    popularity.note([], {"a": 1, "b": 2})
    popularity.note([], {"b": 2, "a": 1})
    popularity.send()

    assert list(scores(redis, key).values()) == [2.0]


def test_processes_count_together(redis, key):
    """Two objects with one key are one ranking."""
    one, other = Popularity(redis, key, top=3), Popularity(redis, key, top=3)
    note(one, a=2, b=3)
    note(other, a=2)

    assert names(other.take()) == ["a", "b"]


def test_taking_halves_what_was_counted(popularity, redis, key):
    """What is popular now overtakes what was popular once, and what nobody asks for any more goes."""
    note(popularity, a=8, b=1)
    popularity.take()

    assert scores(redis, key) == {b'[["a"],{}]': 4.0, b'[["b"],{}]': 0.5}
    note(popularity, b=4)
    assert names(popularity.take()) == ["b", "a"]
    for _ in range(10):
        popularity.take()
    assert popularity.take() == []
    assert not redis.coordination.exists(key)


def test_a_ranking_keeps_its_tail_short(redis, key):
    """Ten times what is wanted: what stands below may rise, but not without bound."""
    popularity = Popularity(redis, key, top=2)
    note(popularity, **{f"n{i:02}": 40 - i for i in range(30)})
    popularity.take()

    assert len(scores(redis, key)) == 20
    assert b'[["n19"],{}]' in scores(redis, key)
    assert b'[["n20"],{}]' not in scores(redis, key)


def test_a_ranking_that_nobody_adds_to_expires(popularity, redis, key):
    """A day after the last call; taking from it does not prolong it, and keeps its time."""
    note(popularity, a=8)
    assert 0.9 * DAY_MS < redis.coordination.pttl(key) <= DAY_MS
    redis.coordination.pexpire(key, 50_000)
    popularity.take()

    assert 0 < redis.coordination.pttl(key) <= 50_000


def test_calls_are_sent_in_bundles(popularity, redis, key, monkeypatch):
    """Nothing for the first calls, all of them with the 64th."""
    monkeypatch.setattr("petiole.cachelib.popularity._SEND_AFTER_S", 1e9)
    for _ in range(63):
        popularity.note(["a"], {})

    assert not redis.coordination.exists(key)
    assert repr(popularity) == f"<Popularity {key} [63 not sent]>"
    popularity.note(["a"], {})
    assert scores(redis, key) == {b'[["a"],{}]': 64.0}
    assert repr(popularity) == f"<Popularity {key} [0 not sent]>"


def test_a_call_is_sent_after_a_while(popularity, redis, key, monkeypatch):
    """A function that is seldom called is ranked too."""
    monkeypatch.setattr("petiole.cachelib.popularity._SEND_AFTER_S", 0.0)
    popularity.note(["a"], {})

    assert redis.coordination.exists(key)


def test_sending_nothing_sends_nothing(popularity, redis, key):
    """An empty ranking is none."""
    popularity.send()

    assert not redis.coordination.exists(key)
    assert popularity.take() == []


@pytest.mark.parametrize("argument", [[1], {"a": 1}, (1,), b"b", object(), 1j, "x" * 2_000])
def test_a_call_that_could_not_be_repeated_is_not_ranked(popularity, argument):
    """Neither as a position nor as a keyword."""
    popularity.note([argument], {})
    popularity.note([], {"a": argument})
    popularity.send()

    assert popularity.take() == []


@pytest.mark.parametrize("argument", ["\ud800", float("nan"), float("inf")])
def test_a_plain_value_that_would_come_back_as_another_is_not_ranked(popularity, argument):
    """Counting a call never fails it, and a warmer never repeats one that nobody made."""
    popularity.note([argument], {})
    popularity.send()

    assert popularity.take() == []


def test_what_is_no_call_is_skipped(popularity, redis, key, caplog):
    """Somebody else's text in the ranking does not stop the warming."""
    note(popularity, a=1)
    redis.coordination.zadd(key, {"garbage": 5, "[1]": 4})
    with caplog.at_level(logging.WARNING, "petiole"):
        calls = popularity.take()

    assert names(calls) == ["a"]
    assert "which is no call" in caplog.text


def test_what_cannot_be_sent_is_dropped(key, caplog):
    """Without Redis a call costs a line in the log, and never fails."""
    with (
        connect(settings=Settings(url="redis://:s3cret@127.0.0.1:1/0")) as redis,
        caplog.at_level(logging.WARNING, "petiole"),
    ):
        popularity = Popularity(redis, key, top=3)
        note(popularity, a=1)

    assert "not sent" in caplog.text
    assert "s3cret" not in caplog.text
    assert "[0 not sent]" in repr(popularity)


def test_what_is_no_call_is_skipped_and_stops_nothing(redis, name):
    """Anybody may write to Redis: not JSON, not UTF-8, or nested without end."""
    popularity = Popularity(redis, f"petiole:test:{name}", top=10)
    popularity.note(["a"], {})
    popularity.send()
    for junk in (b"{", b'[["\xff"],{}]', b"[" * 100_000):
        redis.coordination.zadd(f"petiole:test:{name}", {junk: 5})

    assert popularity.take() == [(["a"], {})]
