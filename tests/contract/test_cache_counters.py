"""Counters: in one process, and shared by all."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from petiole.cachelib import Settings, connect
from petiole.cachelib.connections import UNAVAILABLE
from petiole.cachelib.counters import Counters, SharedCounters
from petiole.cachelib.keys import counters

DAY_MS = 86_400_000


def test_no_count_of_a_process_is_lost_between_threads():
    """Threads add at once, and the sum is right."""
    counts = Counters()
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(lambda: [counts.add("a") for _ in range(2_000)]) for _ in range(8)]:
            done.result()
    counts.add("b", 5)

    assert counts.read() == {"a": 16_000, "b": 5}


def test_what_was_read_does_not_change():
    """A reading is a copy."""
    counts = Counters()
    before = counts.read()
    counts.add("a")

    assert before == {}


def test_shared_counts_are_seen_by_all(redis, name):
    """Two processes that count the same thing count together."""
    one, other = SharedCounters(redis, "flush", name), SharedCounters(redis, "flush", name)
    one.add(rows=5, batches=1)
    other.add(rows=2)
    other.add(rows=-1)

    assert one.read() == other.read() == {"rows": 6, "batches": 1}


def test_shared_counts_are_kept_for_a_week(redis, name):
    """From the last change on, and not for ever."""
    counts = SharedCounters(redis, "flush", name)
    counts.add(rows=1)
    redis.coordination.pexpire(counters("flush", name), 1_000)
    counts.add(rows=1)

    assert 6 * DAY_MS < redis.coordination.pttl(counters("flush", name)) <= 7 * DAY_MS


def test_other_kinds_and_names_are_other_counts(redis, name):
    """Nothing is added to somebody else's."""
    SharedCounters(redis, "a", name).add(x=1)

    assert SharedCounters(redis, "b", name).read() == {}
    assert SharedCounters(redis, "a", f"{name}2").read() == {}
    assert repr(SharedCounters(redis, "a", name)) == f"<SharedCounters petiole:1:counters:{{a:{name}}}>"


def test_counts_that_cannot_be_sent_are_lost_and_logged(caplog):
    """They inform; nothing fails for them."""
    with (
        connect(settings=Settings(url="redis://:s3cret@127.0.0.1:1/0")) as redis,
        caplog.at_level(logging.WARNING, "petiole"),
    ):
        SharedCounters(redis, "a", "b").add(rows=3)

    assert "were not sent" in caplog.text
    assert "'rows': 3" in caplog.text
    assert "s3cret" not in caplog.text


def test_reading_without_redis_raises():
    """Whoever asks for counts is told that there are none to be had."""
    with connect(settings=Settings(url="redis://127.0.0.1:1/0")) as redis, pytest.raises(UNAVAILABLE):
        SharedCounters(redis, "a", "b").read()
