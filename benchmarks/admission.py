"""A limit that everybody hammers: 8 processes ask for one caller, over and over, at 100 calls a second.

First without a pause: shown are how many decisions there were, and how many calls were let through beside what the
rate says. Then, for another caller, after a pause: one call each opens a window, if there are windows, and most of a
second later all come at once, for a second, so that the edge of a window lies among them, also where windows follow the
clock. The most that were let through within one second is that of both. A call is let through somewhere between the
moment when it was asked for and the moment when the answer was there; a second counts only the calls that lie in it
with both, so that a process that the system let wait accuses nobody.
"""

import time
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, NamedTuple
from uuid import uuid4

from .crew import Crew, Run, sleep_until
from .limit_peers import LIMITERS, Quota
from .peers import Server

PROCESSES = 8
RATE = Quota(100, 1)
SECONDS = 2.0

Span = tuple[float, float]
"""A stretch of time. Of a call: when it was asked for, and when it was let through."""

_WITHOUT_A_PAUSE: tuple[Span, ...] = ((0.0, SECONDS),)
_AFTER_A_PAUSE: tuple[Span, ...] = ((0.0, 0.0), (0.8, 1.85))


class Admitted(NamedTuple):
    """What a hammered limit let through."""

    who: str
    decisions_per_s: float
    admitted: int
    most_in_1_s: int


def measure_admission(server: Server, whose: Sequence[str] = (*LIMITERS,)) -> list[Admitted]:
    """Measure everybody."""
    with Crew(PROCESSES) as crew:
        return [_hammer(crew, server, who) for who in whose]


def _hammer(crew: Crew, server: Server, who: str) -> Admitted:
    decisions, spans = _let_through(crew, server, who, _WITHOUT_A_PAUSE)
    _, paused = _let_through(crew, server, who, _AFTER_A_PAUSE)
    return Admitted(who, decisions / SECONDS, len(spans), max(most_within(spans, 1.0), most_within(paused, 1.0)))


def _let_through(crew: Crew, server: Server, who: str, bursts: Sequence[Span]) -> tuple[int, list[Span]]:
    with crew.prepared(PROCESSES, hammer, server, who, uuid4().hex, bursts) as run:
        told = run(bursts[-1][1])
    return sum(decisions for decisions, _ in told), [*chain.from_iterable(spans for _, spans in told)]


def most_within(spans: Sequence[Span], seconds: float) -> int:
    """The most spans that lie in any window of so many seconds, with their beginning and their end."""
    most = 0
    ends: list[float] = []
    for asked, answered in sorted(spans, reverse=True):
        insort(ends, answered)
        most = max(most, bisect_left(ends, asked + seconds))
    return most


@contextmanager
def hammer(_board: Any, _number: int, server: Server, who: str, key: str, bursts: Sequence[Span]) -> Iterator[Run]:
    """One process that asks as fast as it can, and at least once, in each burst."""
    with ExitStack() as stack:
        hit = LIMITERS[who](stack, server, RATE)
        hit(uuid4().hex)  # the connection is there when it counts

        def run(start: float, _end: float) -> tuple[int, list[Span]]:
            decisions, spans = 0, []
            for begin, end in bursts:
                sleep_until(start + begin)
                asked = 0.0
                while asked < start + end:
                    asked = time.monotonic()
                    admitted = hit(key)
                    answered = time.monotonic()
                    decisions += 1
                    if admitted:
                        spans.append((asked, answered))
                    asked = answered
            return decisions, spans

        yield run
