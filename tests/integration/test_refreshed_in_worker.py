"""``refreshed_in_worker``: what is stale is loaded by a worker, under the lease of the reader who noticed."""

import logging
from collections.abc import Callable
from enum import Enum
from threading import Event, current_thread
from typing import Any

import pytest
from celery import Celery
from celery.worker import WorkController

from petiole import Cache, cached, refreshed_in_worker

TTL = 100


@pytest.fixture
def loads() -> list[str]:
    """By which thread the function was loaded, each time."""
    return []


@pytest.fixture
def declare(cache: Cache, name: str, loads: list[str]) -> Callable[..., Any]:
    """A cached function, to be refreshed in a worker of an app."""

    def make(app: Celery, body: Callable[[Any], Any] | None = None, **options: Any) -> Any:
        @refreshed_in_worker(app=app, name=name)
        @cached(cache, "page:{page_id}", ttl=TTL, stale=TTL, **options)
        def page(page_id: Any) -> int:
            loads.append(current_thread().name)
            return body(page_id) if body else len(loads)

        return page

    return make


def make_stale(function: Any, *arguments: Any) -> None:
    """As if its TTL had passed."""
    assert function.cache.expire(function.key(*arguments))


def test_a_stale_value_is_served_while_a_worker_loads_a_new_one(
    worker_app: Celery,
    worker: WorkController,
    declare: Callable[..., Any],
    loads: list[str],
    until: Callable[..., None],
) -> None:
    """The reader gets at once what there is; who reads after the worker gets the new one."""
    page = declare(worker_app)
    worker.reload()
    assert page(1) == 1
    make_stale(page, 1)

    assert page(1) == 1
    until(lambda: page.get(1) == 2)
    assert loads[0] == current_thread().name != loads[1]
    assert page(1) == 2


def test_however_many_notice_one_refresh_is_sent(
    app: Celery, declare: Callable[..., Any], sent: Callable[[Celery], list[dict[str, Any]]], loads: list[str]
) -> None:
    """Whoever has the lease sends; nobody else does before it runs out."""
    page = declare(app)
    page(1)
    make_stale(page, 1)

    assert [page(1) for _ in range(5)] == [1] * 5
    messages = sent(app)
    assert [(message["arguments"], message["keywords"]) for message in messages] == [[[1], {}]] or len(messages) == 1
    assert len(loads) == 1


def test_a_value_that_was_invalidated_since_the_reader_noticed_is_not_stored(
    app: Celery, declare: Callable[..., Any], sent: Callable[[Celery], list[dict[str, Any]]], loads: list[str]
) -> None:
    """The worker goes on with the lease that the reader took; the invalidation has voided it."""
    page = declare(app)
    page(1)
    make_stale(page, 1)
    page(1)
    (message,) = sent(app)
    page.invalidate(1)

    assert app.tasks[page.policy.refresh._task.name](**message) is False
    assert len(loads) == 1, "there was nothing left to load for"
    assert page.cache.get(page.key(1)) is None


@pytest.mark.parametrize("what", ["key", "tag", "namespace"])
def test_an_invalidation_during_the_workers_load_wins(
    app: Celery, cache: Cache, declare: Callable[..., Any], sent: Callable[[Celery], list[dict[str, Any]]], what: str
) -> None:
    """What the worker read before it is not stored."""
    invalidations = {
        "key": lambda: cache.delete("page:1"),
        "tag": lambda: cache.invalidate(tags=["pages"]),
        "namespace": cache.clear,
    }
    in_worker = Event()

    def body(_: Any) -> int:
        if in_worker.is_set():
            invalidations[what]()
        return 7

    page = declare(app, body, tags=["pages"])
    page(1)
    make_stale(page, 1)
    page(1)
    (message,) = sent(app)
    in_worker.set()

    assert app.tasks[page.policy.refresh._task.name](**message) is False
    assert cache.get("page:1") is None
    assert cache.stats().refused == 1


def test_a_token_that_has_run_out_does_nothing(
    app: Celery, declare: Callable[..., Any], sent: Callable[[Celery], list[dict[str, Any]]], loads: list[str]
) -> None:
    """Somebody else has the lease by then, and loads."""
    page = declare(app)
    page(1)
    make_stale(page, 1)
    page(1)
    (message,) = sent(app)
    message["token"] = "x" * 16

    assert app.tasks[page.policy.refresh._task.name](**message) is False
    assert len(loads) == 1


class Colour(Enum):
    """An argument that a message would change."""

    RED = "red"


def test_what_a_message_cannot_carry_is_refreshed_by_a_thread(
    app: Celery, declare: Callable[..., Any], sent: Callable[[Celery], list[dict[str, Any]]], until: Callable[..., None]
) -> None:
    """An enum would arrive as text, and make another key."""
    page = declare(app)
    page(Colour.RED)
    make_stale(page, Colour.RED)

    assert page(Colour.RED) == 1
    until(lambda: page.get(Colour.RED) == 2)
    assert sent(app) == []


def test_a_broker_that_is_away_leaves_the_refresh_to_a_thread(
    make_app: Callable[..., Celery], declare: Callable[..., Any], until: Callable[..., None], caplog: Any
) -> None:
    """The reader gets what there is, and does not wait for the broker to come back."""
    page = declare(make_app(broker_url="redis://127.0.0.1:1/0"))
    page(1)
    make_stale(page, 1)

    with caplog.at_level(logging.WARNING, "petiole"):
        assert page(1) == 1
    until(lambda: page.get(1) == 2)
    assert "did not take the refresh" in caplog.text


def test_the_task_is_named_and_expires_with_the_lease(
    app: Celery, cache: Cache, declare: Callable[..., Any], name: str, monkeypatch: Any
) -> None:
    """A heap of refreshes that nobody needs any more evaporates."""
    page = declare(app)
    task = app.tasks[f"petiole.refresh.{name}"]
    seen: dict[str, Any] = {}
    monkeypatch.setattr(task, "apply_async", lambda *_, **options: seen.update(options))
    page(1)
    make_stale(page, 1)
    page(1)

    assert seen["expires"] == cache.lease_ms / 1_000
    assert task.ignore_result


def test_only_a_cached_function_can_be_refreshed(app: Celery) -> None:
    """The order of the decorators matters; the message says it."""
    with pytest.raises(TypeError, match="above @cached"):
        refreshed_in_worker(app=app)(len)  # type: ignore[arg-type]
