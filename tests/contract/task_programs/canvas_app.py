"""The app of the canvas tests: a task for every gate, for workers and senders alike.

Each call has a tag, which its gates are keyed by and under which its runs are noted in Redis: tests do not meet.
"""

import os
import signal
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.exceptions import SoftTimeLimitExceeded
from pydantic import BaseModel
from redis import Redis

from petiole import Cache, RateLimit, Settings, connect, memoized_task
from petiole.coordination.coordinated import CoordinatedTask, coordinated_task
from petiole.coordination.errors import RateLimited
from petiole.coordination.gates import Concurrency, Pause, Rate, Unique

PATIENCE_S = 20
OTHER_QUEUE = "other"
FOLDER = Path(__file__).parent


class Hooked(Task):
    """An application's own base: its hooks are noted."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        self.app.note(f"hooks:{args[1]}", "before_start")

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self.app.note(f"hooks:{args[1]}", "on_success")

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self.app.note(f"hooks:{args[1]}", "on_failure")

    def on_retry(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self.app.note(f"hooks:{args[1]}", "on_retry")

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self.app.note(f"hooks:{args[1]}", f"after_return {status}")


class Order(BaseModel):
    """What a task with pydantic=True is given."""

    number: int
    tag: str
    of: datetime | None = None


def make_app(url: str) -> Celery:
    """The app as workers and senders have it."""
    app = Celery("canvas", broker=url, backend=url, set_as_current=False)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=False,
        worker_prefetch_multiplier=4,
        broker_transport_options={"priority_steps": list(range(10)), "queue_order_strategy": "priority"},
        accept_content=["json", "pickle"],
        result_expires=600,
        task_routes={"routed": {"queue": OTHER_QUEUE}},
        task_annotations={"annotated": {"gate_lock": "canvas:annotated:{tag}"}},
    )
    notes = Redis.from_url(url, protocol=2, decode_responses=True, socket_timeout=3 * PATIENCE_S)
    redis = connect(settings=Settings(url=url, cache_timeout=2))
    app.notes, app.redis = notes, redis
    app.note = notes.rpush

    def gated(name: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        return coordinated_task(app=app, redis=redis, name=name, **options)

    def begin(tag: str) -> int:
        """Note a run; while its tag is held, it goes no further."""
        run = int(notes.rpush(f"runs:{tag}", repr(time.monotonic_ns())))
        if int(notes.incr(f"inside:{tag}")) > int(notes.get(f"most:{tag}") or 0):
            notes.set(f"most:{tag}", notes.get(f"inside:{tag}"))
        try:
            if notes.exists(f"hold:{tag}"):
                notes.blpop([f"go:{tag}"], timeout=2 * PATIENCE_S)
        finally:
            notes.decr(f"inside:{tag}")
        return run

    def double(number: int, tag: str) -> int:
        begin(tag)
        return number * 2

    gates: dict[str, dict[str, Any]] = {
        "locked": {"lock": "canvas:{tag}"},
        "paired": {"concurrency": {"{tag}": 2}},
        "rated": {"rate": Rate(RateLimit("50/s", burst=1), key="{tag}")},
        "everything": {
            "lock": ["canvas:every:{tag}", "canvas:each:{tag}:{number}"],
            "concurrency": [{"{tag}": 2}, 3],
            "rate": [Rate(RateLimit("60/s", burst=1), key="{tag}"), "1000/s"],
            "unique": "join",
        },
        "join": {"unique": "join"},
        "join_end": {"unique": Unique(until="end")},
        "join_for": {"unique": Unique(until="10m")},
        "join_key": {"unique": Unique("{tag}", until="end")},
        "drop": {"unique": "drop"},
        "drop_start": {"unique": Unique(until="start", on_conflict="drop")},
        "drop_end": {"unique": Unique(until="end", on_conflict="drop")},
        "drop_for": {"unique": Unique(until="10m", on_conflict="drop")},
        "raise": {"unique": "raise"},
        "raise_start": {"unique": Unique(until="start", on_conflict="raise")},
        "raise_end": {"unique": Unique(until="end", on_conflict="raise")},
        "raise_for": {"unique": Unique(until="10m", on_conflict="raise")},
        "replace": {"unique": Unique("{tag}", on_conflict="replace")},
        "replace_start": {"unique": Unique("{tag}", until="start", on_conflict="replace")},
        "replace_end": {"unique": Unique("{tag}", until="end", on_conflict="replace")},
        "paused": {"debounce": Pause("2s", key="{tag}", longest="30s")},
        "late": {"lock": "canvas:{tag}", "acks_late": True},
        "full_reject": {"lock": "canvas:{tag}", "max_parked": 1},
        "full_oldest": {"lock": "canvas:{tag}", "max_parked": 1, "when_full": "drop_oldest"},
        "full_newest": {"lock": "canvas:{tag}", "max_parked": 1, "when_full": "drop_newest"},
        "forgotten": {"lock": "canvas:{tag}", "ignore_result": True},
        "odd task. name: {not} a template \u00e9 \n%s": {"lock": "canvas:{tag}"},
        "long" * 60: {"lock": "canvas:{tag}", "concurrency": {"{tag}": 1}},
    }
    for name, options in gates.items():
        gated(name, **options)(double)

    def tell(self: Task, number: int, tag: str) -> dict[str, Any]:
        begin(tag)
        request = self.request
        return {
            "number": number,
            "id": request.id,
            "retries": request.retries,
            "root_id": request.root_id,
            "parent_id": request.parent_id,
            "priority": request.delivery_info.get("priority") if request.delivery_info else None,
            "routing_key": request.delivery_info.get("routing_key") if request.delivery_info else None,
            "headers": request.headers,
            "stamps": request.stamps,
            "stamped_headers": request.stamped_headers,
            "timelimit": request.timelimit,
            "shadow": request.shadow,
            "origin": request.origin,
            "reply_to": request.reply_to,
            "group": request.group,
            "ignore_result": request.ignore_result,
            "fence": self.admission.hold.fence,
            "lost": self.admission.lost,
            "holds": list(self.admission.holds),
        }

    gated("tell", bind=True, lock="canvas:{tag}")(tell)
    gated("routed", bind=True, lock="canvas:{tag}")(tell)

    @gated("never_retried", bind=True, lock="canvas:{tag}", max_retries=0)
    def never_retried(self: Task, number: int, tag: str) -> int:
        begin(tag)
        return int(self.request.retries)

    @gated("retried", bind=True, lock="canvas:{tag}", max_retries=1)
    def retried(self: Task, number: int, tag: str) -> int:
        begin(tag)
        if not self.request.retries:
            raise self.retry(countdown=0)
        return number * 2

    @gated(
        "flaky",
        base=Hooked,
        lock="canvas:{tag}",
        autoretry_for=(ConnectionError,),
        retry_kwargs={"countdown": 0, "max_retries": 3},
        retry_backoff=False,
        bind=True,
    )
    def flaky(self: Task, number: int, tag: str) -> int:
        begin(tag)
        if self.request.retries < number:
            raise ConnectionResetError("not yet")
        return number * 2

    @gated("flaky_joined", bind=True, unique=Unique("{tag}", until="end"), autoretry_for=(ConnectionError,),
           retry_kwargs={"countdown": 0, "max_retries": 3})  # fmt: skip
    def flaky_joined(self: Task, number: int, tag: str) -> int:
        begin(tag)
        if self.request.retries < 2:
            raise ConnectionResetError("not yet")
        return number * 2

    @gated("failing", base=Hooked, lock="canvas:{tag}")
    def failing(number: int, tag: str) -> int:
        begin(tag)
        raise LookupError(f"{number} fails")

    @gated("failing_joined", unique=Unique("{tag}"))
    def failing_joined(number: int, tag: str) -> int:
        if begin(tag) == 1:
            raise LookupError("the first one fails")
        return 7

    @gated("replaced", bind=True, lock="canvas:{tag}")
    def replaced(self: Task, number: int, tag: str) -> None:
        begin(tag)
        raise self.replace(app.tasks["locked"].s(number, tag))

    @gated("replaced_by_itself", bind=True, lock="canvas:{tag}")
    def replaced_by_itself(self: Task, number: int, tag: str) -> int:
        begin(tag)
        if number < 2:
            raise self.replace(self.s(number + 1, tag))
        return number

    @gated("slow", lock="canvas:{tag}", time_limit=2 * PATIENCE_S, soft_time_limit=1)
    def slow(number: int, tag: str) -> str:
        try:
            begin(tag)
            return "done"
        except SoftTimeLimitExceeded:
            return "too slow"

    @gated("killed", lock="canvas:{tag}", time_limit=1)
    def killed(number: int, tag: str) -> int:
        begin(tag)
        return number

    @gated("told_to_wait", bind=True, rate=Rate("1000/s", key="{tag}"), max_retries=0)
    def told_to_wait(self: Task, number: int, tag: str) -> list[int]:
        if begin(tag) == 1:
            raise RateLimited(0.5)
        return [number, self.request.retries, int(notes.llen(f"runs:{tag}"))]

    @gated("told_without_rate", bind=True, lock="canvas:{tag}")
    def told_without_rate(self: Task, number: int, tag: str) -> list[int]:
        if begin(tag) == 1:
            raise RateLimited(0.2)
        return [number, self.request.retries]

    @gated("costly", bind=True, rate=Rate(RateLimit("10/d", burst=10), key="{tag}", cost="{number}"))
    def costly(self: Task, number: int, tag: str, actual: int) -> int:
        begin(tag)
        self.admission.settle(actual)
        return number

    @gated("dying", lock="canvas:{tag}", lease=1, acks_late=True, reject_on_worker_lost=True)
    def dying(number: int, tag: str) -> int:
        if notes.incr(f"died:{tag}") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(tag) * number

    @gated("dying_retried", bind=True, lock="canvas:{tag}", lease=1, retry_on_worker_lost=True,
           acks_late=True, max_retries=2, default_retry_delay=0)  # fmt: skip
    def dying_retried(self: Task, number: int, tag: str) -> int:
        if not self.request.retries:
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(tag) * number

    @gated("pickled", lock="canvas:{tag}", serializer="pickle")
    def pickled(number: Any, tag: str) -> str:
        begin(tag)
        return repr(number)

    @gated("pickled_by_call", bind=True, lock="canvas:{tag}", max_retries=0)
    def pickled_by_call(self: Task, number: Any, tag: str) -> str:
        begin(tag)
        return repr(number)

    @gated("modelled", lock="canvas:{order.tag}", pydantic=True)
    def modelled(order: Order) -> Order:
        begin(order.tag)
        assert isinstance(order, Order)
        return Order(number=order.number * 2, tag=order.tag, of=order.of)

    @gated("keyword_only", lock="canvas:{tag}")
    def keyword_only(*, number: int = 4, tag: str) -> int:
        begin(tag)
        return number * 2

    @gated("starred", lock="canvas:{numbers[0]}:{more[tag]}")
    def starred(*numbers: int, **more: Any) -> int:
        begin(more["tag"])
        return sum(numbers)

    @gated("braces", lock="{{canvas}}:{tag}:\n:{number}")
    def braces(number: Any, tag: str) -> Any:
        begin(tag)
        return number

    @gated("returns", bind=True, lock="canvas:{tag}")
    def returns(self: Task, number: int, tag: str) -> int:
        """Calls itself, as a plain function, and another gated task."""
        begin(tag)
        return int(app.tasks["paired"](number, f"{tag}:inner")) + int(self.request.retries)

    @gated("recursive", bind=True, concurrency=Concurrency(5, key="{tag}"))
    def recursive(self: Task, number: int, tag: str) -> int:
        begin(tag)
        return number if number <= 0 else number + self(number - 1, tag)

    @memoized_task(app=app, name="fibonacci", cache=Cache(redis, namespace="canvas"), ttl=60)
    def fibonacci(number: int, tag: str) -> int:
        begin(tag)
        return number if number < 2 else fibonacci(number - 1, tag) + fibonacci(number - 2, tag)

    @app.task(base=CoordinatedTask, name="by_base", gate_redis=redis, gate_lock="canvas:{tag}", shared=False)
    def by_base(number: int, tag: str) -> int:
        begin(tag)
        return number * 2

    @app.task(base=CoordinatedTask, name="annotated", gate_redis=redis, shared=False)
    def annotated(number: int, tag: str) -> int:
        begin(tag)
        return number * 2

    class ByClass(CoordinatedTask):
        name = "by_class"
        gate_redis = redis
        gate_lock = "canvas:{tag}"

        def run(self, number: int, tag: str) -> int:
            begin(tag)
            return number * 2

    app.register_task(ByClass())

    @app.task(name="plain", shared=False)
    def plain(number: int, tag: str) -> int:
        return number * 2

    @app.task(name="total", shared=False)
    def total(numbers: list[int]) -> int:
        return sum(number or 0 for number in numbers)

    @app.task(name="flat", shared=False)
    def flat(value: Any) -> Any:
        return value

    @app.task(name="hear", shared=False)
    def hear(*heard: Any) -> None:
        notes.rpush(f"heard:{heard[-1]}", str(heard[0]))

    return app


if "CANVAS_TEST_URL" in os.environ:
    import canvas_shared  # noqa: F401 - only here: it is a task of every app in its process

    app = make_app(os.environ["CANVAS_TEST_URL"])
