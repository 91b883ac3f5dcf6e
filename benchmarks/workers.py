"""Real workers: what one task takes in one, from its queue to its acknowledgement, beside a plain one.

The idea: all that is to be measured lies in one queue before the worker begins, in blocks, in an order that is drawn
anew for each round. The worker goes through it, and the length of the queue tells when it has come to the end of a
block. So all are measured in one worker, within seconds of one another, and nothing is asked of the tasks. The
invariant: a block is only judged beside the plain one of its own round.
"""

import os
import random
import statistics
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import IO, Any, NamedTuple

import redis

from petiole.cachelib.guarded import GuardedProcess

from .peers import Server
from .task_peers import PLAIN, task_peers

BROKER, GATES = "PETIOLE_BENCH_BROKER", "PETIOLE_BENCH_GATES"
"""In the environment of a worker: the address of the broker, and of the server that gates are asked on, if another."""

POOLS = {"solo": ("-P", "solo"), "prefork": ("-P", "prefork", "-c", "2")}
_ROUNDS = 12
_BLOCK = 80
_LOOK_S = 0.002
_START_S = 30.0
_STALL_S = 20.0


class Worked(NamedTuple):
    """What one task took in a worker, over all rounds."""

    who: str
    pool: str
    ratio: float
    """To a plain task of the same round."""
    low: float
    high: float
    us: float


@contextmanager
def worker(queue: str, pool: str, broker: str, gates: str = "") -> Iterator[None]:
    """A worker that serves one queue. Raises ``RuntimeError`` where it ends by itself."""
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.worker_app", "worker", *POOLS[pool], "-Q", queue]
    environment = {**os.environ, BROKER: broker, **({GATES: gates} if gates else {})}
    with tempfile.TemporaryFile() as log:
        process = GuardedProcess(
            [*command, "-l", "WARNING", "-n", f"{queue}@bench"], output=log, environment=environment
        )
        try:
            yield
            if not process.running:
                raise RuntimeError(f"the worker has ended by itself: {_last_words(log)}")
        except TimeoutError as error:
            raise RuntimeError(f"the worker did not go on: {_last_words(log)}") from error
        finally:
            process.stop()


def measure_workers(server: Server, pool: str, whose: Sequence[str] = ()) -> list[Worked]:
    """Measure everybody in one worker."""
    with ExitStack() as stack:
        peers = task_peers(stack, server.url)
        tasks = {who: task for who, task in peers.passing.items() if not whose or who in whose}
        client = stack.enter_context(redis.Redis(server.host, server.port))
        blocks = [PLAIN, *(who for _ in range(_ROUNDS) for who in random.sample([*tasks], len(tasks)))]
        _send(tasks, blocks, pool)
        with worker(pool, pool, server.url):
            ends = _ends(client, pool, len(blocks))
        client.flushall()
    return _judged([*tasks], blocks, ends, pool)


def _send(tasks: Mapping[str, Any], blocks: Sequence[str], queue: str) -> None:
    number = 0
    for who in blocks:
        for _ in range(_BLOCK):
            number += 1
            tasks[who].apply_async((number,), queue=queue)


def _ends(client: Any, queue: str, blocks: int) -> list[float]:
    """When the worker had taken so many blocks out of the queue."""
    left, moved = [-client.llen(queue)], time.monotonic()
    seen_at = [moved]
    while left[-1] < 0:
        time.sleep(_LOOK_S)
        length, now = client.llen(queue), time.monotonic()
        if -length > left[-1]:
            moved = now
        elif now - moved > _STALL_S + (_START_S if len(left) == 1 else 0):
            raise TimeoutError
        if -length == left[-1]:
            seen_at[-1] = now
        else:
            left.append(-length)
            seen_at.append(now)
    return [_crossing(left, seen_at, -(blocks - number - 1) * _BLOCK) for number in range(blocks)]


def _crossing(left: Sequence[int], seen_at: Sequence[float], mark: int) -> float:
    """When the queue was so long, between two looks at it."""
    after = max(1, bisect_left(left, mark))
    share = (mark - left[after - 1]) / (left[after] - left[after - 1])
    return seen_at[after - 1] + share * (seen_at[after] - seen_at[after - 1])


def _judged(whose: Sequence[str], blocks: Sequence[str], ends: Sequence[float], pool: str) -> list[Worked]:
    each = len(whose)
    took_us = [(end - start) / _BLOCK * 1e6 for start, end in pairwise(ends)]
    rounds = [
        dict(zip(blocks[first : first + each], took_us[first - 1 :], strict=False))
        for first in range(1, len(blocks), each)
    ]
    found = []
    for who in whose:
        ratios = [one[who] / one[PLAIN] for one in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found.append(Worked(who, pool, middle, low, high, statistics.median(one[who] for one in rounds)))
    return found


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")[-800:].strip()
