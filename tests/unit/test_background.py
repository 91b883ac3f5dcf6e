"""Work beside the caller: how much of it at once, what it sees, what it brings back."""

import contextvars
import os
import signal
import threading
from contextlib import contextmanager

import pytest

from petiole.cachelib.background import Background

LONG_S = 60


@contextmanager
def held_up(background, count):
    """So many calls that run until the block ends."""
    go = threading.Event()
    jobs = [background.start(lambda: go.wait(LONG_S)) for _ in range(count)]
    try:
        yield jobs
    finally:
        go.set()
        for job in jobs:
            assert job.wait(LONG_S)
        while background._running:  # the last thing that a thread does
            pass


def test_a_call_runs_in_another_thread_that_keeps_nobody_from_ending():
    """What it returned is there once it has ended."""
    job = Background(1).start(threading.current_thread)

    assert job.wait(LONG_S)
    assert job.result() is not threading.current_thread()
    assert job.result().daemon
    assert job.result().name == "petiole-load"


@pytest.mark.parametrize("error", [OSError("away"), KeyboardInterrupt(), SystemExit(3)])
def test_what_a_call_raises_is_raised_where_its_result_is_asked_for(error):
    """And not in the thread, where nobody would hear of it."""

    def fails():
        raise error

    job = Background(1).start(fails)

    assert job.wait(LONG_S)
    with pytest.raises(type(error)) as caught:
        job.result()
    assert caught.value is error


def test_who_waits_is_told_that_it_took_too_long():
    """And may wait on."""
    background = Background(1)
    with held_up(background, 1) as (job,):
        assert not job.wait(0.001)
    assert job.wait(0)
    assert job.result() is True


def test_no_more_run_than_may():
    """What is too much is refused, not queued: a queue behind loaders that hang would only grow."""
    background = Background(3)
    with held_up(background, 3):
        assert background.start(int) is None
        assert repr(background) == "<Background [3 of 3 threads]>"
    job = background.start(int)
    assert job is not None
    assert job.wait(LONG_S)


def test_a_call_that_raises_makes_room_again():
    """However it ended."""
    background = Background(1)
    for _ in range(10):
        job = background.start(lambda: 1 / 0)
        assert job is not None
        assert job.wait(LONG_S)
        while background._running:
            pass


def test_a_thread_that_cannot_be_started_makes_room_again(monkeypatch):
    """The system may have no more of them: that is as if too many were running."""
    background = Background(1)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            assert background.start(int) is None
    job = background.start(int)
    assert job is not None
    assert job.wait(LONG_S)


def test_a_call_sees_the_context_of_who_started_it():
    """So a loader knows in whose load it is, and may not ask for its own key; what it sets stays its own."""
    variable = contextvars.ContextVar("variable", default="nobody")
    variable.set("caller")

    def call():
        seen = variable.get()
        variable.set("thread")
        return seen

    job = Background(1).start(call)

    assert job.wait(LONG_S)
    assert job.result() == "caller"
    assert variable.get() == "caller"


def test_a_forked_child_has_all_its_room():
    """The parent's threads are not there, and will never make any; nor does the child's work make room there."""
    background = Background(1)
    with held_up(background, 1), background._lock:
        pid = os.fork()
        if not pid:
            signal.alarm(30)
            try:
                job = background.start(lambda: 7)
                os._exit(0 if job is not None and job.wait(20) and job.result() == 7 else 1)
            finally:
                os._exit(2)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert background._running == 1

    assert status == 0
