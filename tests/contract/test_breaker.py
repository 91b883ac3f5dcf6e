"""The circuit before a server that does not answer: nobody waits for it, it is tried again, and a child looks anew."""

import logging
import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from petiole.cachelib import Settings, connect
from petiole.cachelib.circuit import CircuitOpen
from petiole.cachelib.connections import UNAVAILABLE

TIMEOUT_S = 0.05


@contextmanager
def hung(redis):
    """The process of a server stands still."""
    pid = redis.coordination.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture
def own(own_server):
    with connect(settings=Settings(url=own_server().url, cache_timeout=TIMEOUT_S)) as redis:
        redis.coordination.ping()
        yield redis


def fail_until_open(redis):
    """How many calls failed at the server before one was refused."""
    count, deadline = 0, time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            redis.cache.get("k")
        except CircuitOpen:
            return count
        except UNAVAILABLE:
            count += 1
    raise AssertionError("it never opened")


def answered(redis):
    """Calls until one is answered."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            return redis.cache.ping()
        except UNAVAILABLE:
            time.sleep(0.01)
    raise AssertionError("it never closed")


def test_a_hung_server_is_left_alone_after_some_failures_and_found_again(own):
    """Closed, open, and closed again by the probe that is answered."""
    assert own.breaker.state == "closed"
    with hung(own):
        assert 5 <= fail_until_open(own) < 20
        assert own.breaker.state == "open"
    assert answered(own)
    assert own.breaker.state == "closed"


def test_while_it_is_open_a_thousand_calls_cost_less_than_a_few_that_wait(own):
    """They do not touch the network; every one of them is an error that a cache knows what to do with."""
    with hung(own):
        fail_until_open(own)
        started = time.monotonic()
        refused = 0
        while own.breaker.state == "open" and refused < 1_000:
            with pytest.raises(UNAVAILABLE):
                own.cache.get("k")
            refused += 1
        assert refused == 1_000 or time.monotonic() - started > 0.4  # a machine that was busy for so long
    answered(own)


def test_what_is_refused_says_who_does_not_answer_and_what_was_tried(own):
    """It is redis-py's kind of error: whoever handles a lost connection handles this."""
    with hung(own):
        fail_until_open(own)
        with pytest.raises(RedisConnectionError, match=rf"{own.address} did not answer.*TimeoutError") as caught:
            own.cache.get("k")
        assert isinstance(caught.value, CircuitOpen)
    answered(own)


def test_only_the_cache_gives_up_early(own):
    """Who must know that something happened goes on trying, and pipelines do not ask either."""
    with hung(own):
        fail_until_open(own)
    assert own.coordination.ping()
    answered(own)


def test_answers_that_are_errors_never_open_it(own):
    """However many commands the server refuses, and for however long."""
    own.coordination.set("text", "x", px=60_000)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        with pytest.raises(ResponseError):
            own.cache.incr("text")

    assert own.breaker.state == "closed"


def test_a_server_that_is_busy_with_a_script_counts_as_one_that_does_not_answer(own_server):
    """It says BUSY, and can do nothing."""
    server = own_server("--busy-reply-threshold", "1")
    with connect(settings=Settings(url=server.url, cache_timeout=2)) as redis:
        redis.coordination.ping()  # who is there already may end the script
        script = threading.Thread(target=lambda: _until_killed(redis))
        script.start()
        try:
            count = fail_until_open(redis)
        finally:
            redis.coordination.execute_command("SCRIPT KILL")
            script.join(20)
        assert count >= 5
        answered(redis)


def _until_killed(redis):
    with pytest.raises(ResponseError, match="killed"):
        redis.blocking.execute_command("EVAL", "while true do end", 0)


def test_a_refused_connection_opens_it_too():
    """A server that is not there fails fast, and the log would be full of it."""
    with connect(settings=Settings(url="redis://127.0.0.1:1/0")) as redis:
        fail_until_open(redis)
        assert redis.breaker.state == "open"


def test_it_is_logged_when_it_opens_and_when_it_closes_and_never_between(own, caplog):
    """One line each, without the password of the URL."""
    with caplog.at_level(logging.DEBUG, "petiole.cachelib.circuit"):
        with hung(own):
            fail_until_open(own)
            until = time.monotonic() + 0.7
            while time.monotonic() < until:  # a probe or more that fail
                with pytest.raises(UNAVAILABLE):
                    own.cache.get("k")
        answered(own)

    assert [record.message.split(own.address)[1].split("(")[0].strip() for record in caplog.records] == [
        "does not answer",
        "answers again",
    ]


def test_many_threads_find_a_server_again_with_one_probe_each_time(own):
    """While one tries, the others are refused."""
    with hung(own):
        fail_until_open(own)
        circuit = own.breaker.of(own.address)
        while own.breaker.state == "open":
            time.sleep(0.005)
        asked, barrier = [], threading.Barrier(8)

        def ask():
            barrier.wait(10)
            started = time.monotonic()
            try:
                own.cache.get("k")
            except CircuitOpen:
                asked.append("refused")
            except UNAVAILABLE:
                asked.append("tried")
            return time.monotonic() - started

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(asked) == ["refused"] * 7 + ["tried"]
        assert circuit.state in ("open", "half-open")
    answered(own)


def test_a_child_looks_for_itself(own):
    """Also when it was forked while another thread held the lock."""
    with hung(own):
        fail_until_open(own)
    circuit = own.breaker.of(own.address)
    held, leave = threading.Event(), threading.Event()

    def hold():
        with circuit._lock:
            held.set()
            leave.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    pid = os.fork()
    if not pid:
        signal.alarm(10)  # a child that waits for the lock ends here
        status = 1
        try:
            status = 0 if own.breaker.state == "closed" and own.coordination.ping() else 2
        finally:
            os._exit(status)
    leave.set()
    holder.join(10)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    answered(own)


def test_a_probe_that_a_signal_breaks_off_makes_way_for_another(own):
    """The signal says nothing about the server."""

    class BrokenOff(BaseException):
        pass

    def break_off(*_):
        raise BrokenOff

    before = signal.signal(signal.SIGALRM, break_off)
    try:
        with hung(own):
            fail_until_open(own)
            while own.breaker.state == "open":
                time.sleep(0.005)
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(BrokenOff):
                own.cache.get("k")
            with pytest.raises(RedisTimeoutError):  # and not CircuitOpen
                own.cache.get("k")
        assert answered(own)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
