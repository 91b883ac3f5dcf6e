"""Which ``with`` statements have begun, and who would wait for himself."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest

from petiole.coordination.entered import Entered, calling_frame, is_running, owner_here
from petiole.coordination.errors import LockLost

SOON_S = 30


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Calls in another thread, always the same."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda call: pool.submit(call).result(SOON_S)


@pytest.fixture
def switching_often() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Held:
    """What is held, and how it ended."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.failure = failure
        self.ends: list[str] = []

    def __exit__(self, *_: object) -> None:
        self.ends.append("left")
        if self.failure is not None:
            raise self.failure

    def abandon(self) -> None:
        """As of a hold."""
        self.ends.append("abandoned")


def begin(entered: Entered[Held], failure: BaseException | None = None) -> Held:
    """A statement begins."""
    return entered.enter(lambda: Held(failure))


def end(entered: Entered[Held]) -> None:
    """A statement ends."""
    entered.leave(None, None, None)


def test_a_statement_ends_with_the_newest_hold_of_its_own_thread(elsewhere: Callable[..., Any]) -> None:
    entered: Entered[Held] = Entered()
    outer, inner, of_another = begin(entered), begin(entered), elsewhere(lambda: begin(entered))

    end(entered)
    assert [outer.ends, inner.ends, of_another.ends] == [[], ["left"], []]
    end(entered)
    assert [outer.ends, inner.ends, of_another.ends] == [["left"], ["left"], []]
    elsewhere(lambda: end(entered))
    assert of_another.ends == ["left"]


def test_a_statement_that_moved_to_another_thread_ends_there(elsewhere: Callable[..., Any]) -> None:
    entered: Entered[Held] = Entered()
    hold = elsewhere(lambda: begin(entered))
    end(entered)

    assert hold.ends == ["left"]


def test_what_was_not_entered_cannot_be_left() -> None:
    entered: Entered[Held] = Entered()
    begin(entered)
    end(entered)

    with pytest.raises(RuntimeError, match="__exit__ without its __enter__"):
        end(entered)


@pytest.mark.parametrize(
    ("failure", "ends"),
    [
        (KeyboardInterrupt(), ["left", "abandoned"]),
        (LockLost("lock 'a'", 1, "why"), ["left"]),
    ],
)
def test_a_statement_has_ended_whatever_its_end_raises(failure: BaseException, ends: list[str]) -> None:
    """The next one to end is another; out of a signal handler, nobody else knows the hold."""
    entered: Entered[Held] = Entered()
    outer, inner = begin(entered), begin(entered, failure)

    with pytest.raises(type(failure)):
        end(entered)
    assert inner.ends == ends
    end(entered)
    assert outer.ends == ["left"]


def test_a_statement_that_could_not_begin_has_not_begun() -> None:
    entered: Entered[Held] = Entered()
    outer = begin(entered)

    def fails() -> Held:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        entered.enter(fails)
    end(entered)
    assert outer.ends == ["left"]


def test_threads_that_begin_and_end_at_once_take_nothing_from_each_other(switching_often: None) -> None:
    entered: Entered[Held] = Entered()
    for _ in range(200):  # so that to look through them takes a while
        begin(entered)
    start, wrong = threading.Barrier(4), []

    def work() -> None:
        start.wait(SOON_S)
        for _ in range(300):
            hold = begin(entered)
            end(entered)
            if hold.ends != ["left"]:
                wrong.append(hold)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result(SOON_S)
    assert not wrong


def test_an_owner_is_a_thread_and_not_its_number() -> None:
    """Numbers are used again as soon as a thread has ended."""
    owners: list[object] = []
    for _ in range(20):
        thread = threading.Thread(target=lambda: owners.append(owner_here()))
        thread.start()
        thread.join()

    assert len(set(owners)) == 20
    assert owner_here() == owner_here()


def acquire() -> FrameType:
    """As a function of the package does, which is not looked for itself, but whoever called it."""
    return calling_frame()


def test_a_function_is_running_until_it_returns_and_not_while_it_is_suspended(elsewhere: Callable[..., Any]) -> None:
    here = acquire()
    assert is_running(here)
    assert not elsewhere(lambda: is_running(here))

    def deeper(levels: int) -> bool:
        return deeper(levels - 1) if levels else is_running(here)

    assert deeper(20)

    def returned() -> FrameType:
        frame = acquire()
        assert is_running(frame)
        return frame

    assert not is_running(returned())

    def suspended() -> Iterator[FrameType]:
        yield acquire()

    generator = suspended()
    assert not is_running(next(generator))
