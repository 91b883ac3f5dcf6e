"""What it takes to send a task: plain, one that is to be the only one, and one that is not sent after all.

New calls have a number each; what they leave in the queue is thrown away before each of them, outside the time taken. A
duplicate has the number of a call that is in the queue.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from itertools import count
from typing import Any, NamedTuple

import redis
from celery_once import AlreadyQueued

from .floor import Floor
from .measure import Call, Entrant, Measured, interleave, repeated
from .peers import PETIOLE, Server
from .task_peers import PLAIN, TARGET, TaskPeers, task_peers
from .workers import worker

NEW, DUPLICATE, ANSWER = "one that is sent", "a duplicate", "with its result"
ROUNDS = 40
_QUEUE = "sent"
_SERVED = "solo"
_MESSAGE_BYTES = 900
"""About what Celery makes of such a call."""
_PATIENCE_S = 10
_TWICE = 7


class _Sender(NamedTuple):
    operation: str
    who: str
    call: Call
    prepare: Call | None = None


def measure_sending(server: Server, rounds: int = ROUNDS) -> list[Measured]:
    """Measure everybody, beside one push of as many bytes."""
    with ExitStack() as stack:
        peers = task_peers(stack, server.url)
        client = stack.enter_context(redis.Redis(server.host, server.port))
        floor = stack.enter_context(closing(Floor(server.host, server.port)))
        push = repeated(floor.call("LPUSH", "floor:queue", b"x" * _MESSAGE_BYTES), lambda: client.delete("floor:queue"))
        stack.enter_context(worker(_SERVED, "solo", server.url))
        senders = [*_new(peers, client), *_duplicates(peers), *_answers(peers)]
        found = interleave(
            [Entrant(one.operation, one.who, repeated(one.call, one.prepare), push, 1) for one in senders], rounds
        )
        client.flushall()
        return found


def _new(peers: TaskPeers, client: Any) -> list[_Sender]:
    numbers = count(1_000)
    tasks = {
        PLAIN: peers.passing[PLAIN],
        TARGET: peers.passing[TARGET],
        f"{PETIOLE}, unique until its end": peers.sending["claimed"],
        "celery-once": peers.passing["celery-once"],
        "celery-singleton": peers.passing["celery-singleton"],
    }

    def sender(task: Any) -> Callable[[], None]:
        return lambda: task.apply_async((next(numbers),), queue=_QUEUE)

    return [_Sender(NEW, who, sender(task), lambda: client.delete(_QUEUE)) for who, task in tasks.items()]


def _duplicates(peers: TaskPeers) -> list[_Sender]:
    claimed, once = peers.sending["claimed"], peers.passing["celery-once"]
    singleton = peers.passing["celery-singleton"]
    firsts = {task: task.apply_async((_TWICE,), queue=_QUEUE) for task in (claimed, once, singleton)}

    def dropped() -> None:
        if claimed.apply_async((_TWICE,), queue=_QUEUE).id != firsts[claimed].id:
            raise RuntimeError("the duplicate was sent")

    def once_again() -> None:
        with suppress(AlreadyQueued):
            once.apply_async((_TWICE,), queue=_QUEUE)
            raise RuntimeError("the duplicate was sent")

    def a_second() -> None:
        if singleton.apply_async((_TWICE,), queue=_QUEUE).id != firsts[singleton].id:
            raise RuntimeError("the duplicate was sent")

    answered = peers.sending["answered"]
    answered.apply((0,))
    return [
        _Sender(DUPLICATE, f"{PETIOLE}, unique, dropped", dropped),
        _Sender(DUPLICATE, "celery-once", once_again),
        _Sender(DUPLICATE, "celery-singleton", a_second),
        _Sender(DUPLICATE, f"{PETIOLE}, memoized, answered where it is sent", lambda: answered.delay(0)),
    ]


def _answers(peers: TaskPeers) -> list[_Sender]:
    answered, plain = peers.sending["answered, with a result"], peers.sending["with a result"]
    answered.apply((0,))

    def get() -> None:
        answered.delay(0).get(timeout=_PATIENCE_S)

    def round_about() -> None:
        plain.apply_async((0,), queue=_SERVED).get(timeout=_PATIENCE_S)

    return [
        _Sender(ANSWER, f"{PLAIN}, run by a worker, get()", round_about),
        _Sender(ANSWER, f"{PETIOLE}, memoized, answered where it is sent, get()", get),
    ]
