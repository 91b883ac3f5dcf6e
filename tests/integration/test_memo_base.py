"""The base class of memoized tasks: every way to make a task gives the same memo."""

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, Task, shared_task
from celery.worker import WorkController
from pydantic import BaseModel

from petiole import MISS, Cache, Lock, memoized_task
from petiole.coordination import MemoizedTask, TaskRefused, passing

PATIENCE_S = 20.0


@pytest.fixture
def calls() -> list[Any]:
    """With what the body was called."""
    return []


@pytest.fixture
def report(calls: list[Any]) -> Callable[[str], int]:
    """The function of a task."""

    def report(region: str) -> int:
        calls.append(region)
        return len(calls)

    return report


class Audited(Task):
    """An application's base, which has a way to call and to send of its own."""

    abstract = True
    audit: tuple[list[str], list[str]]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.audit[0].append("called")
        return super().__call__(*arguments, **keywords)

    def apply_async(self, *arguments: Any, **keywords: Any) -> Any:
        self.audit[1].append("sent")
        return super().apply_async(*arguments, **keywords)


class MemoizedAndAudited(MemoizedTask, Audited):
    abstract = True


def of_an_app(app: Celery, name: str, cache: Cache, report: Any) -> Any:
    return app.task(base=MemoizedTask, name=name, memo_key="{region}", memo_ttl="5m", memo_cache=cache)(report)


def shared(app: Celery, name: str, cache: Cache, report: Any) -> Any:
    task = shared_task(base=MemoizedTask, name=name, memo_key="{region}", memo_ttl="5m", memo_cache=cache)(report)
    app.finalize()
    return app.tasks[name] if task.name == name else None


def decorated(app: Celery, name: str, cache: Cache, report: Any) -> Any:
    return memoized_task(app=app, name=name, key="{region}", ttl="5m", cache=cache)(report)


def composed(app: Celery, name: str, cache: Cache, report: Any) -> Any:
    audit: tuple[list[str], list[str]] = ([], [])
    return app.task(base=MemoizedAndAudited, name=name, memo_key="{region}", memo_cache=cache, audit=audit)(report)


def of_a_class(app: Celery, name: str, cache: Cache, report: Any) -> Any:
    class Report(MemoizedTask):
        memo_key = "{region}"
        memo_cache = cache

        def run(self, region: str) -> int:
            return int(report(region))

    Report.name = name
    return app.register_task(Report())


@pytest.mark.parametrize("make", [of_an_app, shared, decorated, composed, of_a_class])
def test_every_way_to_make_a_task_gives_the_same_memo(
    worker_app: Celery, worker: WorkController, cache: Cache, name: str, report: Any, calls: list[Any], make: Any
) -> None:
    """One mechanism: class attributes."""
    task = make(worker_app, name, cache, report)
    worker.reload()

    assert [task.delay("north").get(timeout=PATIENCE_S), task.delay(region="north").get(timeout=PATIENCE_S)] == [1, 1]
    assert task.key("north") == f"{name}:north"
    assert (task("north"), task.apply(("north",)).get(), task.peek("north")) == (1, 1, 1)
    task.invalidate("north")
    assert task.peek("north") is MISS
    assert task.delay("north").get(timeout=PATIENCE_S) == 2
    assert calls == ["north", "north"]


def test_it_composes_with_a_base_of_the_application(app: Celery, cache: Cache, name: str, report: Any) -> None:
    """What that base does around a run it does around a run, and not around a hit."""
    task = composed(app, name, cache, report)
    assert [task("north"), task("north")] == [1, 1]
    task.delay("north")

    assert task.audit == (["called"], ["sent"])
    via_decorator = memoized_task(app=app, cache=cache, base=Audited, name=f"{name}.2", audit=([], []))(report)
    assert [via_decorator("north"), via_decorator("north")] == [2, 2]
    assert via_decorator.audit == (["called"], [])


def test_a_memoized_task_with_gates_asks_them_only_when_it_runs(
    app: Celery, cache: Cache, name: str, report: Any, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hit passes none."""
    monkeypatch.setattr(passing, "_LONGEST_WAIT_S", 0)
    task = memoized_task(app=app, key="{region}", ttl="5m", cache=cache, gate_lock=name)(report)
    app.conf.task_always_eager = True
    assert task.delay("north").get() == 1

    with Lock(cache.redis, name):
        assert task.delay("north").get() == 1
        with pytest.raises(TaskRefused, match=name):
            task.delay("south").get()
    assert calls == ["north"]
    assert task.delay("south").get() == 2


def test_a_base_that_is_memoized_already_is_taken_as_it_is(app: Celery, cache: Cache, report: Any) -> None:
    """The decorator adds what it is told; the rest is the base's."""

    class Ours(MemoizedTask):
        abstract = True
        memo_cache = cache

    task = memoized_task(app=app, base=Ours, key="{region}")(report)

    assert task.memo is not None
    assert task.memo.cache is cache
    assert [task("north"), task("north")] == [1, 1]


def test_as_the_class_of_all_tasks_it_memoizes_those_that_ask(
    make_app: Callable[..., Celery], cache: Cache, name: str, report: Any, calls: list[Any]
) -> None:
    """And none of Celery's own, whatever an application's base says for all."""

    class Ours(MemoizedTask):
        abstract = True
        memo_cache = cache

    app = Celery(name, task_cls=Ours, set_as_current=False, broker_url=make_app().conf.broker_url)
    plain = app.task(name=f"{name}.plain")(report)
    asked = app.task(name=f"{name}.asked", memo_key="{region}")(report)

    assert [plain("north"), plain("north"), asked("north"), asked("north")] == [1, 2, 3, 3]
    assert (plain.memo, plain.memo_stats()) == (None, {})
    with pytest.raises(TypeError, match="is not memoized: give it memo_ttl"):
        plain.peek("north")
    app.close()


def test_celerys_own_tasks_are_never_memoized(make_app: Callable[..., Celery], cache: Cache, name: str) -> None:
    """A chord would be unlocked once, and never again."""

    class Ours(MemoizedTask):
        abstract = True
        memo_cache = cache
        memo_ttl = 60

    app = Celery(name, task_cls=Ours, set_as_current=False, broker_url=make_app().conf.broker_url)
    app.finalize()
    memos = {name: task.memo for name, task in app.tasks.items() if isinstance(task, MemoizedTask)}

    assert "celery.chord_unlock" in memos
    assert {memo for name, memo in memos.items() if name.startswith("celery.")} == {None}
    app.close()


def test_configuration_may_set_the_memo(make_app: Callable[..., Celery], cache: Cache, name: str, report: Any) -> None:
    """task_annotations set attributes, and the memo is made of those."""
    app = make_app(task_annotations={name: {"memo_ttl": 7, "memo_key": "{region}"}})
    task = app.task(base=MemoizedTask, name=name, memo_cache=cache)(report)

    assert [task("north"), task("north")] == [1, 1]
    assert 0 < (cache.ttl(task.key("north")) or 0) <= 7


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"memo_key": "{regoin}"}, ValueError, "there are: region"),
        ({"memo_tll": 5, "memo_on": True}, TypeError, "did you mean 'memo_ttl'"),
        ({"memo_ttl": "soon"}, ValueError, "ttl"),
    ],
)
def test_a_wrong_option_is_found_when_the_task_is_declared(
    app: Celery, cache: Cache, report: Any, options: Any, error: type[Exception], says: str
) -> None:
    """Not by the first worker that runs it."""
    with pytest.raises(error, match=says):
        _ = app.task(base=MemoizedTask, memo_cache=cache, **options)(report).name


class Order(BaseModel):
    id: int
    lines: list[str] = []


def test_models_make_the_key_that_their_dicts_make(
    worker_app: Celery, worker: WorkController, cache: Cache, name: str, calls: list[Any]
) -> None:
    """Sent, called, or applied; as a model, or as the dict that it is sent as. The body is given the model."""

    @memoized_task(app=worker_app, cache=cache, name=name, pydantic=True)
    def price(order: Order, factor: int = 1) -> Order:
        calls.append(order)
        return Order(id=len(calls), lines=order.lines)

    worker.reload()
    order = Order(id=7, lines=["a"])
    results = [
        price.delay(order).get(timeout=PATIENCE_S),
        price.delay({"id": 7, "lines": ["a"]}).get(timeout=PATIENCE_S),
        price.delay(factor=1, order={"id": "7", "lines": ["a"]}).get(timeout=PATIENCE_S),
        price(order),
        price.apply((order,)).get(),
        price.peek(order),
    ]

    assert results == [{"id": 1, "lines": ["a"]}] * 6
    assert calls == [order]


def test_a_key_survives_the_broker(
    worker_app: Celery, worker: WorkController, cache: Cache, name: str, calls: list[Any]
) -> None:
    """What the sender peeks at and invalidates is what the worker has remembered."""
    from datetime import UTC, datetime
    from decimal import Decimal

    @memoized_task(app=worker_app, cache=cache, name=name)
    def report(call: Any, **more: Any) -> int:
        calls.append(call)
        return len(calls)

    worker.reload()
    call: Any = ({1: (2, None)}, datetime(2024, 1, 1, tzinfo=UTC), Decimal("1.50"), b"\xff", 1.0)

    assert report.delay(call, x=(1,)).get(timeout=PATIENCE_S) == 1
    assert (report.peek(call, x=(1,)), report(call, x=[1])) == (1, 1)
    report.invalidate(call, x=(1,))
    assert report.delay(call, x=(1,)).get(timeout=PATIENCE_S) == 2
