"""Who is measured around a task: tasks that do nothing, one per gate of ours and per other library.

The idea: what a call of them takes is what stands around the body. No gate is ever closed here: each call has a lock of
its own, and no limit is reached.
"""

import importlib
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

from celery import Celery

from petiole import Cache, Rate, Unique, connect, coordinated_task, memoized_task
from petiole.cachelib import Connections, Settings

from .peers import PETIOLE

PLAIN = "plain Celery"
TARGET = f"{PETIOLE}, rate + concurrency"
HIT = f"{PETIOLE}, memoized, a hit"

AT_ONCE = 50
_NEVER_REACHED = "100000/s"
_KEPT_S = 600


class TaskPeers(NamedTuple):
    """An app, and its tasks; each is called with a number."""

    app: Celery
    redis: Connections
    passing: dict[str, Any]
    """By the names of their rows: what a worker is measured running."""
    sending: dict[str, Any]
    """What is measured being sent, besides."""


def task_peers(stack: ExitStack, url: str) -> TaskPeers:
    """Declare the tasks. The broker, the results, the gates and the locks of all are on one server."""
    redis = stack.enter_context(connect(settings=Settings(url=url)))
    app = stack.enter_context(closing(Celery("bench", broker=url, backend=url, set_as_current=False)))
    app.conf.update(
        broker_connection_retry_on_startup=True,
        task_ignore_result=True,
        result_expires=_KEPT_S,
        worker_hijack_root_logger=False,
        ONCE={"backend": "celery_once.backends.Redis", "settings": {"url": url, "default_timeout": _KEPT_S}},
        singleton_backend_url=url,
        singleton_lock_expiry=_KEPT_S,
    )
    # Both keep the first server that a process has told them of.
    importlib.import_module("celery_once.backends.redis").redis = None
    importlib.import_module("celery_singleton.backends")._backend = None
    cache = Cache(redis, namespace="bench")

    def gated(name: str, **options: Any) -> Any:
        return coordinated_task(app=app, redis=redis, name=name, **options)(_nothing())

    def memoized(name: str, **options: Any) -> Any:
        return memoized_task(app=app, cache=cache, key="all the same", ttl="1h", name=name, **options)(_nothing())

    def based(name: str, base: str, **options: Any) -> Any:
        module, _, kind = base.partition(":")
        return app.task(name=name, base=getattr(importlib.import_module(module), kind), **options)(_nothing())

    lock = "bench:{number}"
    once, singleton = based("once", "celery_once:QueueOnce"), based("singleton", "celery_singleton:Singleton")
    return TaskPeers(
        app,
        redis,
        {
            PLAIN: app.task(name="plain")(_nothing()),
            f"{PETIOLE}, lock": gated("lock", lock=lock),
            f"{PETIOLE}, rate": gated("rate", rate=_NEVER_REACHED),
            f"{PETIOLE}, concurrency": gated("concurrency", concurrency=AT_ONCE),
            TARGET: gated("target", concurrency=AT_ONCE, rate=_NEVER_REACHED),
            f"{PETIOLE}, lock + concurrency + 2 rates": gated(
                "all", lock=f"all:{lock}", concurrency=AT_ONCE, rate=[_NEVER_REACHED, Rate("90000/s", name="other")]
            ),
            f"{PETIOLE}, unique, join": gated("join", unique=Unique("{number}")),
            HIT: memoized("hit"),
            "celery-once": once,
            "celery-singleton": singleton,
        },
        {
            "with a result": app.task(name="with_result", ignore_result=False)(_nothing()),
            "claimed": gated("claimed", unique=Unique("{number}", until="end", on_conflict="drop")),
            "answered": memoized("answered", short_circuit=True),
            "answered, with a result": memoized("answered_with_result", short_circuit=True, ignore_result=False),
        },
    )


def _nothing() -> Callable[[int], None]:
    def nothing(number: int) -> None:
        """Do nothing."""

    return nothing
