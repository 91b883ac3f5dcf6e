"""A stampede: fifty callers miss one key at the same moment, and its load takes 50 ms.

Once as fifty threads of one process, once as five processes of ten (asyncio libraries: tasks of one event loop
instead of threads). Each round asks for a key that nobody has asked for before. What is shown, as medians over
the rounds: how often the loader ran, how long the callers took, and how many commands the server was sent for each
process, the loading one's included. Commands are counted by MONITOR, without those that scripts run inside.
"""

import asyncio
import importlib
import multiprocessing
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from itertools import chain
from typing import Any, NamedTuple
from uuid import uuid4

from petiole import Cache, connect
from petiole.cachelib import Settings

from .monitor import Monitor
from .peers import PETIOLE, Server
from .workload import SMALL, percentile

LOAD_S = 0.05
WARM_ROUNDS = 2
ROUNDS = 9
SHAPES = ((1, 50), (5, 10))
_GIVE_UP_S = 60

Ask = Callable[[str, Callable[[], Any]], Any]
"""Asks for a key, with the loader to call if it is not there."""


class Crowd(NamedTuple):
    """What a stampede cost: medians over the rounds."""

    who: str
    processes: int
    callers: int
    loads: float
    p50_ms: float
    p99_ms: float
    commands: float
    """Per process."""


def _petiole(server: Server) -> Ask:
    cache = Cache(connect(settings=Settings(url=server.url)), namespace="stampede")
    return lambda key, loader: cache.get_or_set(key, loader, ttl=60)


def _dogpile(server: Server) -> Ask:
    region = importlib.import_module("dogpile.cache").make_region()
    arguments = {"url": server.url, "distributed_lock": True, "thread_local_lock": False, "lock_timeout": 10}
    region.configure("dogpile.cache.redis", expiration_time=60, arguments=arguments)
    return lambda key, loader: region.get_or_create(f"dogpile:{key}", loader)


def _django(server: Server) -> Ask:
    importlib.import_module("django.conf").settings.configure()
    cache = importlib.import_module("django.core.cache.backends.redis").RedisCache(server.url, {})
    return lambda key, loader: cache.get_or_set(key, loader, 60)


def _naive(server: Server) -> Ask:
    json = importlib.import_module("json")
    client = importlib.import_module("redis").Redis(server.host, server.port)

    def ask(key: str, loader: Callable[[], Any]) -> Any:
        found = client.get(f"naive:{key}")
        if found is not None:
            return json.loads(found)
        value = loader()
        client.set(f"naive:{key}", json.dumps(value), ex=60)
        return value

    return ask


def _cashews(server: Server) -> Ask:
    cache = importlib.import_module("cashews").Cache()
    cache.setup(server.url, client_side=False)
    loaders: dict[str, Callable[[], Awaitable[Any]]] = {}

    @cache(ttl=60, key="cashews:{key}", lock=True)  # type: ignore[untyped-decorator, unused-ignore]
    async def load(key: str) -> Any:
        return await loaders[key]()

    async def ask(key: str, loader: Callable[[], Awaitable[Any]]) -> Any:
        loaders[key] = loader
        return await load(key)

    return ask


PLAIN: dict[str, Callable[[Server], Ask]] = {
    PETIOLE: _petiole,
    "dogpile.cache, distributed lock": _dogpile,
    "Django, get_or_set": _django,
    "redis-py, get, load, set": _naive,
}
AWAITED: dict[str, Callable[[Server], Ask]] = {"cashews, lock=True": _cashews}


def measure_stampedes(server: Server) -> list[Crowd]:
    """Measure everybody in both shapes."""
    return [_stampede(server, who, *shape) for shape in SHAPES for who in (*PLAIN, *AWAITED)]


def _stampede(server: Server, who: str, processes: int, callers: int) -> Crowd:
    context = multiprocessing.get_context("spawn")
    name = uuid4().hex  # of keys that nobody has asked for yet
    gate, answers = context.Barrier(processes + 1), context.Queue()
    workers = [
        context.Process(target=_work, args=(server, who, callers, name, gate, answers), daemon=True)
        for _ in range(processes)
    ]
    with ExitStack() as stack:
        for worker in workers:
            worker.start()
            stack.callback(worker.join)
            stack.callback(worker.terminate)
        monitor = stack.enter_context(Monitor(server))
        commands = []
        for _ in range(WARM_ROUNDS + ROUNDS):
            gate.wait(_GIVE_UP_S)
            monitor.count()
            gate.wait(_GIVE_UP_S)  # here they run
            gate.wait(_GIVE_UP_S)
            commands.append(monitor.count() / processes)
        told = [answers.get(timeout=_GIVE_UP_S) for _ in workers]
        for worker in workers:
            worker.join(_GIVE_UP_S)
    loads = [sum(counts) for counts in zip(*(loads for loads, _ in told), strict=True)][WARM_ROUNDS:]
    took_ms = [list(chain(*parts)) for parts in zip(*(took_ms for _, took_ms in told), strict=True)][WARM_ROUNDS:]
    return Crowd(
        who,
        processes,
        callers,
        statistics.median(loads),
        statistics.median(percentile(took, 50) for took in took_ms),
        statistics.median(percentile(took, 99) for took in took_ms),
        statistics.median(commands[WARM_ROUNDS:]),
    )


def _work(server: Server, who: str, callers: int, name: str, gate: Any, answers: Any) -> None:
    """One process of a stampede: every round, through the gate, and all callers at once."""
    try:
        if who in PLAIN:
            answers.put(_threads(PLAIN[who](server), callers, name, gate))
        else:
            answers.put(asyncio.run(_tasks(AWAITED[who](server), callers, name, gate)))
    except BaseException:
        gate.abort()  # nobody waits for a process that is not coming
        raise


def _threads(ask: Ask, callers: int, name: str, gate: Any) -> tuple[list[int], list[list[float]]]:
    rounds = range(WARM_ROUNDS + ROUNDS)
    loads = [0 for _ in rounds]
    took_ms: list[list[float]] = [[] for _ in rounds]
    counting = threading.Lock()

    def pass_twice() -> None:
        gate.wait(_GIVE_UP_S)
        gate.wait(_GIVE_UP_S)

    begin = threading.Barrier(callers, action=pass_twice)
    end = threading.Barrier(callers, action=lambda: gate.wait(_GIVE_UP_S))

    def call(number: int) -> None:
        def load() -> Any:
            with counting:
                loads[number] += 1
            time.sleep(LOAD_S)
            return SMALL

        begin.wait(_GIVE_UP_S)
        started = time.perf_counter()
        answer = ask(f"{name}:{number}", load)
        took_ms[number].append((time.perf_counter() - started) * 1_000)
        end.wait(_GIVE_UP_S)
        _check(answer)

    def run() -> None:
        try:
            for number in rounds:
                call(number)
        except BaseException:
            for barrier in (gate, begin, end):
                barrier.abort()
            raise

    threads = [threading.Thread(target=run) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return loads, took_ms


async def _tasks(ask: Ask, callers: int, name: str, gate: Any) -> tuple[list[int], list[list[float]]]:
    loads, took_ms = [], []
    for number in range(WARM_ROUNDS + ROUNDS):
        loaded: list[int] = []

        async def load(loaded: list[int] = loaded) -> Any:
            loaded.append(1)
            await asyncio.sleep(LOAD_S)
            return SMALL

        async def call(key: str = f"{name}:{number}", load: Callable[[], Any] = load) -> float:
            started = time.perf_counter()
            _check(await ask(key, load))
            return (time.perf_counter() - started) * 1_000

        gate.wait(_GIVE_UP_S)
        gate.wait(_GIVE_UP_S)
        took_ms.append(list(await asyncio.gather(*(call() for _ in range(callers)))))
        gate.wait(_GIVE_UP_S)
        loads.append(len(loaded))
    return loads, took_ms


def _check(answer: Any) -> None:
    if answer != SMALL:
        raise RuntimeError(f"a caller of the stampede was given {str(answer)[:80]!r}, not what the loader loads")
