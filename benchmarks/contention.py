"""A lock that everybody wants: many holders, one after another, with nothing to do while they hold it.

As 8 and as 32 processes, and as 32 threads of one. In each round everybody takes the lock and gives it back, over and
over, until the time is up. What is shown, as medians over the rounds: how often it was taken, how often by another
than the last time, how long the waits were, and how even the shares. The longest wait is that of all rounds. Commands
are counted in a round of its own, because counting them slows the server down. Each holder looks at memory that all
see whether another one is inside; in the round of its own it also lets others run first, as holders of one process
would never meet otherwise.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from typing import Any, NamedTuple
from uuid import uuid4

from .crew import Crew, Round, Run, sleep_until
from .lock_peers import CONTENDED, LOCKS
from .monitor import Monitor
from .peers import Server
from .workload import percentile

SHAPES = ((8, 1), (32, 1), (1, 32))
"""Processes, and threads of each."""
ROUNDS = 3
ROUND_S = 1.0
_COUNTED_S = 0.5
_INSIDE, _LAST = 0, 1
"""Places on the board: who holds the lock now (0: nobody), and who held it last."""


class Contended(NamedTuple):
    """What a contended lock gave to those who wanted it: medians over the rounds."""

    who: str
    processes: int
    threads: int
    taken_per_s: float
    hand_offs_per_s: float
    """Taken by another than the last time."""
    commands: float
    """Sent to the server for each time it was taken."""
    p99_ms: float
    longest_ms: float
    """Of all rounds."""
    fairness: float
    """Jain's index of how often each had it: 1 when all had it equally often, 1/n when one had it always."""
    overlaps: int
    """How often one found another inside. Of all rounds."""


class Tally(NamedTuple):
    """What one contender had of one round."""

    taken: int
    hand_offs: int
    overlaps: int
    waits_ms: list[float]
    """Also of the last, which may have come when the time was up."""


def measure_contention(
    server: Server, whose: Sequence[str] = CONTENDED, shapes: Sequence[tuple[int, int]] = SHAPES
) -> list[Contended]:
    """Measure everybody in every shape."""
    with Crew(max(processes for processes, _ in shapes)) as crew, Monitor(server) as monitor:
        return [_contend(crew, monitor, server, who, *shape) for shape in shapes for who in whose]


def _contend(crew: Crew, monitor: Monitor, server: Server, who: str, processes: int, threads: int) -> Contended:
    with crew.prepared(processes, contender, server, who, uuid4().hex, threads) as run:
        rounds = [_round(run, ROUND_S) for _ in range(ROUNDS)]
        counted = _round(run, _COUNTED_S, monitor)
        commands = monitor.count() / sum(len(tally.waits_ms) for tally in counted)
    waits_ms = [[*chain.from_iterable(tally.waits_ms for tally in tallies)] for tallies in rounds]
    return Contended(
        who,
        processes,
        threads,
        statistics.median(sum(tally.taken for tally in tallies) / ROUND_S for tallies in rounds),
        statistics.median(sum(tally.hand_offs for tally in tallies) / ROUND_S for tallies in rounds),
        commands,
        statistics.median(percentile(waits, 99) for waits in waits_ms),
        max(chain.from_iterable(waits_ms)),
        statistics.median(jain([tally.taken for tally in tallies]) for tallies in rounds),
        sum(tally.overlaps for tallies in (*rounds, counted) for tally in tallies),
    )


def _round(run: Round, seconds: float, monitor: Monitor | None = None) -> list[Tally]:
    told = run(seconds, monitor is not None, at_start=monitor.count if monitor else None)
    return [*chain.from_iterable(told)]


def jain(shares: Sequence[int]) -> float:
    """Jain's fairness index."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0


@contextmanager
def contender(board: Any, number: int, server: Server, who: str, name: str, threads: int) -> Iterator[Run]:
    """One process that wants the lock, with so many threads."""
    with ExitStack() as stack:
        make = LOCKS[who](stack, server)
        locks = [(make(name), make(uuid4().hex)) for _ in range(threads)]
        pool = stack.enter_context(ThreadPoolExecutor(threads))

        def run(start: float, end: float, linger: bool) -> list[Tally]:
            futures = [
                pool.submit(_want, board, 1 + number * threads + place, *pair, start, end, linger)
                for place, pair in enumerate(locks)
            ]
            return [future.result() for future in futures]

        yield run


def _want(
    board: Any,
    me: int,
    lock: AbstractContextManager[Any],
    own: AbstractContextManager[Any],
    start: float,
    end: float,
    linger: bool,
) -> Tally:
    taken = hand_offs = overlaps = 0
    waits_ms = []
    with own:
        pass  # the connection of this thread is there when it counts
    sleep_until(start)
    asked = time.monotonic()
    while asked < end:
        with lock:
            now = time.monotonic()
            overlaps += board[_INSIDE] != 0
            board[_INSIDE] = me
            if now < end:
                taken += 1
                hand_offs += board[_LAST] != me
            board[_LAST] = me
            waits_ms.append((now - asked) * 1_000)
            if linger:
                time.sleep(0)
            overlaps += board[_INSIDE] != me
            board[_INSIDE] = 0
        asked = time.monotonic()
    return Tally(taken, hand_offs, overlaps, waits_ms)
