"""What stands around the body of a task in the process that runs it, beside one round trip.

Each call goes through what Celery itself calls for a delivered task, with a request as a worker has it. So it is all
that a worker does for a task but for taking it from the broker and acknowledging it; ``workers.py`` measures that.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from itertools import count
from typing import Any
from uuid import uuid4

from celery.app.trace import build_tracer

from petiole.coordination.coordinated import CoordinatedTask
from petiole.coordination.guarded import guard

from .floor import Floor
from .measure import Call, Entrant, Measured, interleave, repeated
from .peers import Server
from .task_peers import HIT, task_peers

OPERATION = "one task run"
ROUNDS = 60

_numbers = count(1)


def measure_passing(server: Server, whose: Sequence[str] = (), rounds: int = ROUNDS) -> list[Measured]:
    """Measure everybody."""
    with ExitStack() as stack:
        peers = task_peers(stack, server.url)
        floor = stack.enter_context(closing(Floor(server.host, server.port)))
        round_trip = repeated(script_call(floor))
        gated = [task for task in peers.passing.values() if isinstance(task, CoordinatedTask)]
        guard((task.name, task.lot.redis.address) for task in gated)  # as its main process says in a worker
        peers.passing[HIT].apply((0,))  # the first makes what the others find
        return interleave(
            [
                Entrant(OPERATION, who, repeated(traced(task)), round_trip, 1)
                for who, task in peers.passing.items()
                if not whose or who in whose
            ],
            rounds,
        )


def script_call(floor: Floor) -> Call:
    """One round trip that runs a script which does nothing."""
    loaded = floor.call("SCRIPT", "LOAD", "return 1")()
    if not isinstance(loaded, bytes):
        raise RuntimeError(f"the server answered SCRIPT LOAD with {loaded!r}, not with the name of the script")
    return floor.call("EVALSHA", loaded, "0")


def traced(task: Any) -> Callable[[], None]:
    """Run a task as a worker does that was handed a message. Raises ``RuntimeError`` for one that does not succeed."""
    task = task.app.tasks[task.name]  # itself, as a worker has it, and not a proxy
    run = build_tracer(task.name, task, app=task.app, hostname="bench")
    state: dict[str, Any] = {}
    task.on_failure = lambda error, *_: state.update(error=error)

    def call() -> None:
        number, id = next(_numbers), uuid4().hex
        request = {
            "id": id,
            "task": task.name,
            "root_id": id,
            "args": (number,),
            "kwargs": {},
            "retries": 0,
            "is_eager": False,
            "called_directly": False,
            "ignore_result": True,
            "headers": {},
            "hostname": "bench",
            "delivery_info": {"exchange": "", "routing_key": "bench", "priority": 0, "redelivered": False},
        }
        run(id, (number,), {}, request)
        if state:
            raise RuntimeError(f"{task.name} failed: {state['error']!r}")

    return call
