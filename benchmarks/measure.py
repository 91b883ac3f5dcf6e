"""How time is taken: in short slices, all contestants interleaved, each against a floor of its own moment.

The idea: a machine is never equally fast twice, so no slice is compared with one from another moment. In every
round, in an order drawn anew, each contestant runs one slice with a slice of its floor right beside it; what
counts is the quotient of the two, and of those the median over the rounds. The invariant: nothing but the calls
themselves is inside the time taken, neither what prepares them nor the start of an event loop.
"""

import asyncio
import gc
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

Call = Callable[[], Any]
Slice = Callable[[int], float]
"""Makes so many calls, and tells how many seconds they took."""

ROUNDS = 25
_SLICE_S = 0.003
_MOST_CALLS = 5_000


class Entrant(NamedTuple):
    """Who does what, and the floor of it."""

    operation: str
    who: str
    mine: Slice
    floor: Slice
    items: int
    """Keys, rows or whatever one call handles: times are shown for one of them."""


class Measured(NamedTuple):
    """What one entrant took, over all rounds."""

    operation: str
    who: str
    ratio: float
    low: float
    high: float
    """The quartiles of the ratio: half of the rounds lie between them."""
    us: float
    floor_us: float


def repeated(call: Call, prepare: Call | None = None) -> Slice:
    """Slices of a function that is simply called. ``prepare`` runs before each call and is not timed."""

    def run(calls: int) -> float:
        if prepare is None:
            started = time.perf_counter()
            for _ in range(calls):
                call()
            return time.perf_counter() - started
        took = 0.0
        for _ in range(calls):
            prepare()
            started = time.perf_counter()
            call()
            took += time.perf_counter() - started
        return took

    return run


def awaited(loop: asyncio.AbstractEventLoop, call: Callable[[], Awaitable[Any]], prepare: Call | None = None) -> Slice:
    """Slices of a coroutine function: one coroutine awaits them all, so the loop is entered once per slice."""

    async def run(calls: int) -> float:
        if prepare is None:
            started = time.perf_counter()
            for _ in range(calls):
                await call()
            return time.perf_counter() - started
        took = 0.0
        for _ in range(calls):
            await prepare()
            started = time.perf_counter()
            await call()
            took += time.perf_counter() - started
        return took

    return lambda calls: loop.run_until_complete(run(calls))


def interleave(entrants: Sequence[Entrant], rounds: int = ROUNDS) -> list[Measured]:
    """Measure them all, in random order in each round."""
    calls = [(_enough(entrant.mine), _enough(entrant.floor)) for entrant in entrants]
    ratios: list[list[float]] = [[] for _ in entrants]
    times_us: list[list[float]] = [[] for _ in entrants]
    floors_us: list[list[float]] = [[] for _ in entrants]
    gc.collect()
    gc.freeze()  # what all the libraries have imported is not for one operation's collections to look through
    console = Console(stderr=True)
    for _ in track(range(rounds), "rounds", console=console, transient=True, disable=not console.is_terminal):
        for index in random.sample(range(len(entrants)), len(entrants)):
            entrant, (my_calls, floor_calls) = entrants[index], calls[index]
            slices = [(entrant.mine, my_calls), (entrant.floor, floor_calls)]
            mine_first = random.random() < 0.5
            took_s = [run(count) / count for run, count in (slices if mine_first else reversed(slices))]
            mine_s, floor_s = took_s if mine_first else reversed(took_s)
            ratios[index].append(mine_s / floor_s)
            times_us[index].append(mine_s / entrant.items * 1e6)
            floors_us[index].append(floor_s / entrant.items * 1e6)
    gc.unfreeze()
    return [
        Measured(
            entrant.operation,
            entrant.who,
            *_quartiles(ratios[index]),
            statistics.median(times_us[index]),
            statistics.median(floors_us[index]),
        )
        for index, entrant in enumerate(entrants)
    ]


def _quartiles(ratios: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def _enough(run: Slice) -> int:
    """How many calls fill a slice. The first calls only warm up."""
    run(3)
    each_s = max(run(3) / 3, 1e-9)
    return max(1, min(_MOST_CALLS, round(_SLICE_S / each_s)))
