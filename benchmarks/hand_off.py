"""Tasks that wait for one thing: how fast it is handed on, what that asks of Redis, and what one of them takes there.

All that they wait for is held until the last of them waits, and then given back at once. What is counted begins there,
and ends when the last body has run. The commands are those of the server that gates are asked on; the broker has one of
its own. They are counted by MONITOR, in a round of their own, because that slows the server down.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import redis

from petiole import Lock, Semaphore
from petiole.cachelib import EmbeddedServer

from .monitor import Monitor
from .peers import PETIOLE, Server
from .task_peers import AT_ONCE
from .waiting_peers import LOCK, PERMITS, POLL_S, REFUSED, RUNS, WaitingPeers, waiting_peers
from .workers import worker

_POOL = "prefork"
_WAITING = 200
_ROUNDS = 3
_LOOK_S = 0.005
_PATIENCE_S = 90.0
_HELD_S = 600
_IDLE_S = 2.0


class HandedOff(NamedTuple):
    """What it took until all that waited had run."""

    what: str
    who: str
    started_per_s: float
    commands: float
    """For each task."""
    idle_commands_per_s: float
    """Of all that wait together, while nothing is given back."""
    bytes: int | None
    """Of one that waits, on the server that gates are asked on; None for those that wait elsewhere."""


class _Round(NamedTuple):
    seconds: float
    commands: int
    idle_commands: int
    bytes: int


def measure_hand_off(server: Server) -> list[HandedOff]:
    """Measure tasks that are parked, and tasks that ask again and again."""
    gates = EmbeddedServer.start()
    try:
        with ExitStack() as stack:
            peers = waiting_peers(stack, server.url, gates.url)
            stack.enter_context(worker(_POOL, _POOL, server.url, gates.url))
            measuring = _Measuring(peers, server, Server("127.0.0.1", gates.port))
            stack.callback(measuring.close)
            lock, permits = peers.parked
            return [
                measuring.of(lock, PETIOLE, peers.parked[lock], lambda: _locked(peers)),
                measuring.of(permits, PETIOLE, peers.parked[permits], lambda: _taken(peers)),
                measuring.of(lock, f"Celery, retry every {POLL_S} s", peers.polling, measuring.locked_by_redis_py),
            ]
    finally:
        gates.stop()


class _Measuring:
    def __init__(self, peers: WaitingPeers, broker: Server, gates: Server) -> None:
        self._peers = peers
        self._gates = gates
        self._broker = redis.Redis(broker.host, broker.port)
        self._asked = redis.Redis(gates.host, gates.port)

    def close(self) -> None:
        self._broker.close()
        self._asked.close()

    def of(self, what: str, who: str, task: Any, held: Callable[[], Any]) -> HandedOff:
        self._round(task, held)  # the first only warms up
        timed = [self._round(task, held) for _ in range(_ROUNDS)]
        with Monitor(self._gates) as monitor:
            counted = self._round(task, held, monitor)
        parked = task is not self._peers.polling
        return HandedOff(
            what,
            who,
            _WAITING / statistics.median(one.seconds for one in timed),
            counted.commands / _WAITING,
            counted.idle_commands / _IDLE_S,
            timed[0].bytes // _WAITING if parked else None,
        )

    def _round(self, task: Any, held: Callable[[], Any], monitor: Monitor | None = None) -> _Round:
        self._broker.delete(RUNS, REFUSED)
        with held():
            before = self._memory()
            for number in range(_WAITING):
                task.apply_async((number,), queue=_POOL)
            self._until(lambda: self._waiting(task) >= _WAITING)
            taken = self._memory() - before
            idle_commands = 0
            if monitor is not None:
                monitor.count()
                time.sleep(_IDLE_S)
                idle_commands = monitor.count()
            began = time.monotonic()
        self._until(lambda: int(self._broker.get(RUNS) or 0) >= _WAITING)
        took_s = time.monotonic() - began
        return _Round(took_s, monitor.count() if monitor is not None else 0, idle_commands, taken)

    def _waiting(self, task: Any) -> int:
        """How many wait, as far as can be told from outside."""
        if task is self._peers.polling:
            return int(self._broker.get(REFUSED) or 0)
        return int(task.lot.counts()["parked"])

    def _memory(self) -> int:
        return sum(self._asked.memory_usage(key, samples=0) or 0 for key in self._asked.scan_iter(count=1_000))

    def _until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(_LOOK_S)

    @contextmanager
    def locked_by_redis_py(self) -> Iterator[None]:
        with self._asked.lock(LOCK, timeout=_HELD_S):
            yield


@contextmanager
def _locked(peers: WaitingPeers) -> Iterator[None]:
    with Lock(peers.redis, LOCK):
        yield


@contextmanager
def _taken(peers: WaitingPeers) -> Iterator[None]:
    with ExitStack() as stack:
        semaphore = Semaphore(peers.redis, PERMITS, permits=AT_ONCE)
        for _ in range(AT_ONCE):
            stack.enter_context(semaphore.acquire())
        yield
