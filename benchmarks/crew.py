"""A crew: processes that are started once and then do one job after another, all at the same moment.

The idea: starting thirty-two interpreters takes longer than what they are to be measured doing. A job is prepared by
everybody (connections are opened, what is slow the first time is done once), and only then are rounds run; a round
has a start and an end on the monotonic clock, which all processes of a machine share. The invariant: nobody outlives
the crew, and nobody is waited for without an end.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawArray
from typing import Any, NamedTuple, Self

Run = Callable[..., Any]
"""Works from one moment of the monotonic clock to another, and tells something. What else it is told, the job says."""
Prepare = Callable[..., AbstractContextManager[Run]]
"""Called in each process with the board, the number of the process, and the arguments of the job."""
Round = Callable[..., list[Any]]

BOARD_PLACES = 2
LEAD_S = 0.2
"""From the order to the start of a round: so long do the slowest have to be there."""
_GIVE_UP_S = 60.0
_READY = "ready"
_LEAVE_S = 5.0


class _Failed(NamedTuple):
    traceback: str


class Crew:
    """So many processes; ``with`` starts and ends them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._stack = ExitStack()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._board: Any = RawArray("q", BOARD_PLACES)  # memory that all of them see
        with ExitStack() as stack:
            for number in range(self._size):
                pipe, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self._board, number), daemon=True)
                process.start()
                theirs.close()
                stack.callback(_end, process)
                stack.callback(pipe.close)  # first: who reads from it leaves
                self._pipes.append(pipe)
                self._processes.append(process)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if kind is not None:
                process.kill()  # it may be in the middle of anything
            with suppress(OSError):
                pipe.send(None)
        self._stack.close()

    @contextmanager
    def prepared(self, count: int, prepare: Prepare, *arguments: object) -> Iterator[Round]:
        """The first ``count`` processes prepare; gives what runs a round: ``run(seconds, *details)``.

        ``at_start=`` names what is called here at the moment when the others begin. Raises ``RuntimeError`` for a
        process that fails or does not answer.
        """
        pipes = self._pipes[:count]
        self._board[:] = [0] * BOARD_PLACES
        for pipe in pipes:
            pipe.send((prepare, arguments))
        _answers(pipes, 0)
        yield partial(_round, pipes)
        for pipe in pipes:
            pipe.send(None)
        _answers(pipes, 0)


def _round(
    pipes: list[Connection], seconds: float, *details: object, at_start: Callable[[], object] | None = None
) -> list[Any]:
    started = time.monotonic() + LEAD_S
    for pipe in pipes:
        pipe.send((started, started + seconds, *details))
    if at_start:
        sleep_until(started)
        at_start()
    return _answers(pipes, seconds)


def _answers(pipes: list[Connection], seconds: float) -> list[Any]:
    deadline = time.monotonic() + seconds + _GIVE_UP_S
    found = []
    for number, pipe in enumerate(pipes):
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            raise RuntimeError(f"process {number} of the crew did not answer within {seconds + _GIVE_UP_S:.0f} s")
        try:
            answer = pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"process {number} of the crew is gone; what it wrote is above") from error
        if isinstance(answer, _Failed):
            raise RuntimeError(f"process {number} of the crew failed:\n{answer.traceback}")
        found.append(answer)
    return found


def _serve(pipe: Connection, board: Any, number: int) -> None:
    """What a process of the crew does, until it is told to leave or whoever tells it is gone."""
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while (order := pipe.recv()) is not None:
            prepare, arguments = order
            try:
                with prepare(board, number, *arguments) as run:
                    pipe.send(_READY)
                    while (told := pipe.recv()) is not None:
                        pipe.send(run(*told))
            except (EOFError, OSError):
                raise
            except Exception:  # noqa: BLE001 - told to the process that asked, which raises it
                pipe.send(_Failed(traceback.format_exc()))
            else:
                pipe.send(_READY)


def _end(process: Any) -> None:
    process.join(_LEAVE_S)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


def sleep_until(moment: float) -> None:
    """Sleep until the monotonic clock says so."""
    time.sleep(max(0.0, moment - time.monotonic()))
