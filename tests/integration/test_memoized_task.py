"""Memoized tasks on a worker: promise 10, a duplicate completes as any other task, only faster."""

from collections.abc import Callable, Iterator
from queue import Queue
from threading import Event, Lock, Semaphore, current_thread
from typing import Any, Protocol

import pytest
from celery import Celery, Task, chain, chord, group, signals
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.worker import WorkController

from petiole import MISS, Cache, connect, memoized_task
from petiole.cachelib import Connections, EmbeddedServer
from petiole.coordination import MemoizedTask
from petiole.coordination.prometheus import CoordinationCollector

PATIENCE_S = 20.0


class Declare(Protocol):
    def __call__(self, function: Callable[..., Any], **options: Any) -> MemoizedTask: ...


def named(function: Callable[..., Any]) -> Callable[..., Any]:
    """Celery writes the head of a task's function down, so a lambda needs a name that can be written."""
    if function.__name__ == "<lambda>":
        function.__name__ = "report"
    return function


@pytest.fixture
def declare(worker_app: Celery, worker: WorkController, cache: Cache, name: str) -> Declare:
    """Declares a memoized task that the shared worker runs."""

    def make(function: Callable[..., Any], **options: Any) -> MemoizedTask:
        function = named(function)
        options = {"cache": cache, "name": f"{name}.{function.__name__}", **options}
        task = memoized_task(app=worker_app, **options)(function)
        worker.reload()
        return task

    return make


@pytest.fixture
def plain(worker_app: Celery, worker: WorkController, name: str) -> Callable[..., Task]:
    """Declares a task as any other."""

    def make(function: Callable[..., Any], **options: Any) -> Task:
        function = named(function)
        task = worker_app.task(name=f"{name}.plain.{function.__name__}", **options)(function)
        worker.reload()
        return task

    return make


class Body:
    """A task's body that notes with what it was called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self._lock = Lock()

    def __call__(self, call: Any) -> int:
        with self._lock:
            self.calls.append(call)
            return len(self.calls)

    @property
    def report(self) -> Callable[[Any], int]:
        """A plain function of it: of a method, Celery would ask the caller for ``self``."""

        def report(region: Any) -> int:
            return self(region)

        return report


@pytest.fixture
def body() -> Body:
    return Body()


def test_equal_calls_run_the_body_once(declare: Declare, body: Body) -> None:
    """The second task completes with the first one's value, and its body does not run."""
    task = declare(lambda region: {"region": region, "run": body(region)}, key="{region}")
    results = [task.delay(region).get(timeout=PATIENCE_S) for region in ("north", "north", "south", "north")]

    assert body.calls == ["north", "south"]
    assert results == [
        {"region": "north", "run": 1},
        {"region": "north", "run": 1},
        {"region": "south", "run": 2},
        {"region": "north", "run": 1},
    ]


def test_of_concurrent_duplicates_one_runs(declare: Declare, body: Body) -> None:
    """While one runs, duplicates wait for it and complete with its value."""
    begun, second, go = Semaphore(0), Event(), Event()

    def report(region: str) -> int:
        run = body(region)
        if run > 1:
            second.set()
        go.wait(PATIENCE_S)
        return run

    task = declare(report)

    def on_prerun(sender: Any = None, **_: Any) -> None:
        if sender.name == task.name:
            begun.release()

    signals.task_prerun.connect(on_prerun, weak=False)
    try:
        results = [task.delay("north") for _ in range(3)]
        for _ in range(3):
            assert begun.acquire(timeout=PATIENCE_S)
        assert not second.wait(0.2)
        go.set()
        values = [result.get(timeout=PATIENCE_S) for result in results]
    finally:
        go.set()
        signals.task_prerun.disconnect(on_prerun)

    assert values == [1, 1, 1]
    assert body.calls == ["north"]


def test_a_duplicate_has_an_id_and_a_result_of_its_own(declare: Declare, body: Body) -> None:
    """Two calls are two tasks: to forget one result leaves the other."""
    task = declare(body.report)
    first, second = task.delay("north"), task.delay("north")
    values = first.get(timeout=PATIENCE_S), second.get(timeout=PATIENCE_S)
    first.forget()

    assert first.id != second.id
    assert values == (1, 1)
    assert second.state == "SUCCESS"


def test_a_chain_goes_on_after_a_remembered_task(declare: Declare, body: Body) -> None:
    """Each link gets the value of the one before it, run or remembered."""

    def double(number: int) -> int:
        body(number)
        return number * 2

    task = declare(double)
    first = chain(task.s(2), task.s(), task.s()).delay().get(timeout=PATIENCE_S)
    again = chain(task.s(2), task.s(), task.s()).delay().get(timeout=PATIENCE_S)

    assert (first, again) == (16, 16)
    assert body.calls == [2, 4, 8]


def test_a_group_counts_its_duplicates(declare: Declare, body: Body) -> None:
    """A group has one value per member, equal ones too, in their order."""

    def double(number: int) -> int:
        body(number)
        return number * 2

    task = declare(double)
    values = group(task.s(n) for n in (1, 2, 1, 1, 2)).delay().get(timeout=PATIENCE_S)

    assert values == [2, 4, 2, 2, 4]
    assert sorted(body.calls) == [1, 2]


@pytest.mark.parametrize("remembered", [False, True])
def test_a_chord_completes_with_duplicates_inside(
    declare: Declare, plain: Callable[..., Task], body: Body, remembered: bool
) -> None:
    """A chord's callback gets one value per member, also when all of them are remembered."""

    def double(number: int) -> int:
        body(number)
        return number * 2

    def collect(values: list[int]) -> list[int]:
        return sorted(values)

    task, collected = declare(double), plain(collect)
    if remembered:
        assert [task(n) for n in (1, 2)] == [2, 4]
    values = chord([task.s(n) for n in (1, 1, 2, 1)], collected.s()).delay().get(timeout=PATIENCE_S)

    assert values == [2, 2, 2, 4]
    assert sorted(body.calls) == [1, 2]


def test_a_chord_may_end_in_a_remembered_task(declare: Declare, plain: Callable[..., Task], body: Body) -> None:
    """The body of a chord may be memoized too."""

    def total(values: list[int]) -> int:
        body(values)
        return sum(values)

    echo, task = plain(lambda number: number), declare(total)
    values = [chord([echo.s(1), echo.s(2)], task.s()).delay().get(timeout=PATIENCE_S) for _ in range(2)]

    assert values == [3, 3]
    assert len(body.calls) == 1


def test_callbacks_fire_for_a_remembered_task(declare: Declare, plain: Callable[..., Task], body: Body) -> None:
    """What is linked to a task runs after it, run or remembered."""
    heard: list[int] = []
    rang = Semaphore(0)

    def hear(value: int) -> None:
        heard.append(value)
        rang.release()

    task, listener = declare(body.report), plain(hear)
    for _ in range(2):
        task.apply_async(("north",), link=listener.s())
        assert rang.acquire(timeout=PATIENCE_S)

    assert heard == [1, 1]


def test_a_bound_task_knows_itself_and_is_told_apart_by_its_arguments(declare: Declare, body: Body) -> None:
    """With bind=True the body gets the task; the key is made of the other arguments."""

    def report(self: Task, region: str, year: int = 2024) -> list[Any]:
        body(region)
        return [self.name, self.request.called_directly, region, year]

    task = declare(report, bind=True)
    by_template = declare(report, bind=True, key="{region}:{year}", name=f"{task.name}.template")
    values = [task.delay("north").get(timeout=PATIENCE_S), task.delay(year=2024, region="north").get(PATIENCE_S)]

    assert values == [[task.name, False, "north", 2024]] * 2
    assert by_template.delay("north").get(timeout=PATIENCE_S)[0] == by_template.name
    assert body.calls == ["north", "north"]


def test_a_task_that_retries_is_remembered_when_it_succeeds(declare: Declare, body: Body) -> None:
    """Retries are no results; the run that succeeds is."""

    def flaky(region: str) -> str:
        if body(region) < 3:
            raise ConnectionResetError("not yet")
        return f"report of {region}"

    task = declare(flaky, autoretry_for=(ConnectionError,), retry_kwargs={"countdown": 0, "max_retries": 5})
    values = [task.delay("north").get(timeout=PATIENCE_S) for _ in range(2)]

    assert values == ["report of north"] * 2
    assert len(body.calls) == 3


@pytest.fixture
def states(name: str) -> Iterator["Queue[str]"]:
    """In which state each run of this test's tasks ended."""
    queue: Queue[str] = Queue()

    def note(sender: Any = None, state: str = "", **_: Any) -> None:
        if sender.name.startswith(name):
            queue.put(state)

    signals.task_postrun.connect(note, weak=False)
    yield queue
    signals.task_postrun.disconnect(note)


def test_a_failed_refresh_leaves_the_stale_result(
    declare: Declare, body: Body, cache: Cache, states: "Queue[str]"
) -> None:
    """The refresh fails as a task of its own; the calls that noticed complete with what there is."""

    def report(region: str) -> str:
        if body(region) > 1:
            raise ValueError("the report is broken")
        return "old"

    task = declare(report, key="{region}", stale=600)
    task("north")
    assert cache.expire(task.key("north"))

    assert task.delay("north").get(timeout=PATIENCE_S) == "old"
    assert sorted([states.get(timeout=PATIENCE_S), states.get(timeout=PATIENCE_S)]) == ["FAILURE", "SUCCESS"]
    assert task.delay("north").get(timeout=PATIENCE_S) == "old"


def test_a_failure_is_not_remembered(declare: Declare, body: Body) -> None:
    """A task that fails fails as any other, and the next one runs."""

    def report(region: str) -> str:
        if body(region) == 1:
            raise ValueError("the first one fails")
        return "good"

    task = declare(report)
    with pytest.raises(ValueError, match="the first one fails"):
        task.delay("north").get(timeout=PATIENCE_S)

    assert task.peek("north") is MISS
    assert task.delay("north").get(timeout=PATIENCE_S) == "good"


def test_none_is_remembered(declare: Declare, body: Body) -> None:
    """None is a result like any other."""
    task = declare(lambda region: body(region) and None)
    values = [task.delay("north").get(timeout=PATIENCE_S) for _ in range(2)]

    assert values == [None, None]
    assert body.calls == ["north"]
    assert task.peek("north") is None


def test_a_task_whose_result_is_ignored_is_remembered(
    declare: Declare, body: Body, ended: Callable[[str], Semaphore]
) -> None:
    """The memo is kept apart from Celery's results."""
    task = declare(body.report, ignore_result=True)
    runs = ended(task.name)
    for _ in range(2):
        task.delay("north")
        assert runs.acquire(timeout=PATIENCE_S)

    assert body.calls == ["north"]
    assert task.peek("north") == 1


def test_values_of_different_type_are_different_calls(declare: Declare, body: Body) -> None:
    """By default 1, "1", True, 1.0 and None are five calls."""
    task = declare(body.report)
    calls = [1, "1", True, 1.0, None]
    first = [task.delay(value).get(timeout=PATIENCE_S) for value in calls]
    again = [task.delay(value).get(timeout=PATIENCE_S) for value in calls]

    assert first == again == [1, 2, 3, 4, 5]


def test_one_call_may_be_spelled_in_many_ways(declare: Declare, body: Body) -> None:
    """By position or by keyword, in whatever order, with a default given or left out: one call."""

    def report(region: str, year: int = 2024, *, detail: dict[str, int] | None = None, **more: int) -> int:
        return body((region, year, detail, more))

    task = declare(report)
    same = [
        task.s("north", 2024, detail={"a": 1, "b": 2}, x=1, y=2),
        task.s(region="north", detail={"b": 2, "a": 1}, y=2, x=1),
        task.s("north", y=2, detail={"a": 1, "b": 2}, year=2024, x=1),
    ]
    values = [signature.delay().get(timeout=PATIENCE_S) for signature in same]

    assert values == [1, 1, 1]
    assert task.delay("north", detail={"a": 1, "b": 2}, x=1, y=3).get(timeout=PATIENCE_S) == 2


def test_arguments_that_do_not_fit_are_refused_where_they_are_sent(declare: Declare) -> None:
    """The signature of the task is that of its function, so that a wrong call never leaves the caller."""
    task = declare(lambda region: region)

    with pytest.raises(TypeError, match="region"):
        task.delay()
    with pytest.raises(TypeError, match="positional"):
        task.delay("north", "south")


@pytest.mark.parametrize("option", [{"key": "{regoin}"}, {"tags": ["sales:{regoin}"]}, {"key": "{0}"}])
def test_a_template_that_names_no_argument_is_refused_at_once(app: Celery, cache: Cache, option: Any) -> None:
    """A wrong name is found when the module is imported, and the message lists the arguments."""
    with pytest.raises(ValueError, match="no argument here; there are: region"):

        @memoized_task(app=app, cache=cache, **option)
        def report(region: str) -> str:
            return region


def test_a_bound_task_cannot_be_keyed_by_itself(app: Celery, cache: Cache) -> None:
    """``self`` is no argument of the caller's."""
    with pytest.raises(ValueError, match="there are: region"):

        @memoized_task(app=app, cache=cache, bind=True, key="{self}")
        def report(self: Task, region: str) -> str:
            return region


@pytest.mark.parametrize(
    ("option", "error"),
    [({"ttl": 0}, ValueError), ({"ttl": "soon"}, ValueError), ({"stale": -1}, ValueError), ({"ttl": [1]}, TypeError)],
)
def test_a_duration_that_is_none_is_refused_at_once(
    app: Celery, cache: Cache, option: Any, error: type[Exception]
) -> None:
    """A wrong duration is found when the module is imported."""
    with pytest.raises(error, match="ttl|stale"):  # noqa: RUF043
        memoized_task(app=app, cache=cache, **option)


def test_an_invalidated_call_runs_again(declare: Declare, body: Body) -> None:
    """invalidate forgets one call, and no other; peek tells what is remembered and runs nothing."""
    task = declare(body.report)
    before = [task.delay(region).get(timeout=PATIENCE_S) for region in ("north", "south")]
    task.invalidate(region="north")
    peeked = task.peek("north"), task.peek("south")
    after = [task.delay(region).get(timeout=PATIENCE_S) for region in ("north", "south")]

    assert before == [1, 2]
    assert peeked == (MISS, 2)
    assert after == [3, 2]


def test_a_run_that_was_under_way_when_it_was_invalidated_is_not_remembered(declare: Declare, body: Body) -> None:
    """What was computed from the old state completes its task, and is not kept."""
    begun, go = Event(), Event()

    def report(region: str) -> int:
        run = body(region)
        begun.set()
        go.wait(PATIENCE_S)
        return run

    task = declare(report)
    result = task.delay("north")
    try:
        assert begun.wait(PATIENCE_S)
        task.invalidate("north")
    finally:
        go.set()

    assert result.get(timeout=PATIENCE_S) == 1
    assert task.peek("north") is MISS
    assert task.delay("north").get(timeout=PATIENCE_S) == 2


def test_a_tag_forgets_every_call_that_names_it(declare: Declare, cache: Cache, body: Body) -> None:
    """Tags are filled from the arguments."""
    task = declare(lambda region, year: body((region, year)), tags=["sales:{region}"])
    for call in [("north", 1), ("north", 2), ("south", 1)]:
        task.delay(*call).get(timeout=PATIENCE_S)
    cache.invalidate(tags=["sales:north"])

    assert [task.peek(*call) for call in [("north", 1), ("north", 2), ("south", 1)]] == [MISS, MISS, 3]


def test_a_direct_call_shares_the_memo(declare: Declare, body: Body) -> None:
    """Calling the task as a function asks the memo too; ``run`` always runs."""
    task = declare(body.report)

    assert task("north") == 1
    assert task.delay("north").get(timeout=PATIENCE_S) == 1
    assert task.apply(("north",)).get() == 1
    assert task.run("north") == 2


def test_without_redis_the_body_runs(declare: Declare, body: Body, own_server: Callable[..., EmbeddedServer]) -> None:
    """The cache's server may be away: tasks run and complete as if nothing was remembered; forgetting waits."""
    server = own_server()
    with connect(server.url) as redis:
        cache = Cache(redis, namespace="away")
        task = declare(body.report, cache=cache)
        server.stop()
        values = [task.delay("north").get(timeout=PATIENCE_S) for _ in range(2)]
        peeked = task.peek("north")
        task.invalidate("north")
        unsent = cache.stats().unsent

    assert values == [1, 2]
    assert peeked is MISS
    assert unsent == 1


def test_without_an_app_it_is_a_shared_task(
    worker_app: Celery, worker: WorkController, cache: Cache, name: str, body: Body
) -> None:
    """Every app has the task, as with shared_task."""

    @memoized_task(cache=cache, name=f"{name}.shared", key="{region}")
    def report(region: str) -> int:
        return body(region)

    worker.reload()
    values = [report.delay("north").get(timeout=PATIENCE_S) for _ in range(2)]

    assert values == [1, 1]
    assert report.peek("north") == 1
    assert isinstance(worker_app.tasks[f"{name}.shared"], MemoizedTask)


def test_it_builds_on_the_task_class_that_it_is_given(declare: Declare, worker_app: Celery, body: Body) -> None:
    """A base of the application's own keeps what it adds."""

    class Audited(worker_app.Task):  # type: ignore[name-defined,misc]
        abstract = True
        auditor = "alice"

    task = declare(body.report, base=Audited, max_retries=7)

    assert isinstance(task, Audited)
    assert (task.auditor, task.max_retries) == ("alice", 7)
    assert [task.delay("north").get(timeout=PATIENCE_S) for _ in range(2)] == [1, 1]


def test_tasks_do_not_share(declare: Declare, body: Body, name: str) -> None:
    """The same call of two tasks is two results."""
    one = declare(body.report, name=f"{name}.one", key="{region}")
    two = declare(body.report, name=f"{name}.two", key="{region}")

    assert (one("north"), two("north"), one("north"), two("north")) == (1, 2, 1, 2)


def test_a_cache_is_made_on_first_use_where_none_is_given(
    app: Celery, redis: Connections, monkeypatch: pytest.MonkeyPatch, body: Body, name: str
) -> None:
    """Declaring a task reads no settings; the first call takes the server from the environment."""
    monkeypatch.setenv("REDIS_URL", "nonsense://")
    task = memoized_task(app=app, name=f"{name}.report", key="{region}")(body.report)
    monkeypatch.setenv("REDIS_URL", redis.url)

    assert [task("north"), task("north")] == [1, 1]
    task.invalidate("north")
    assert memoized_task(app=app)(body.report).memo.cache is task.memo.cache, "one for all tasks of an app"
    task.memo.cache.redis.close()


@pytest.mark.parametrize("said", [SoftTimeLimitExceeded(), Ignore(), Reject("no", requeue=False), Retry("later")])
def test_what_is_no_failure_is_never_remembered(app: Celery, cache: Cache, body: Body, name: str, said: Any) -> None:
    """Also where every exception is: a task that is told to end has to hear it, and so has the next one."""

    @memoized_task(app=app, cache=cache, failures={Exception: 60}, name=f"{name}.report")
    def report() -> None:
        body(None)
        raise said

    for _ in range(2):
        with pytest.raises(type(said)) as caught:
            report()
        assert caught.value is said
    assert len(body.calls) == 2


def test_a_failure_that_is_named_is_remembered(declare: Declare, body: Body) -> None:
    """The next task fails with one of the same class and arguments, and does not run; others are forgotten."""

    def report(region: str) -> None:
        body(region)
        raise (LookupError if region == "north" else OSError)("nothing there", 404)

    task = declare(report, failures={LookupError: "1m"})
    for region, kind in [("north", LookupError), ("south", OSError)]:
        for _ in range(2):
            with pytest.raises(kind) as caught:
                task(region)
            assert caught.value.args == ("nothing there", 404)
        with pytest.raises(kind):
            task.delay(region).get(timeout=PATIENCE_S)

    assert body.calls == ["north", "south", "south", "south"]
    assert task.memo_stats()["failures"] == 2
    task.invalidate("north")
    with pytest.raises(LookupError):
        task("north")
    assert len(body.calls) == 5


def test_a_remembered_failure_is_not_retried(declare: Declare, body: Body) -> None:
    """Autoretry tries what ran; its last failure is remembered, and raised at once."""

    def flaky(region: str) -> None:
        body(region)
        raise ConnectionResetError("never")

    retries = {"countdown": 0, "max_retries": 2}
    task = declare(flaky, autoretry_for=(ConnectionError,), retry_kwargs=retries, failures={ConnectionError: 60})
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            task.delay("north").get(timeout=PATIENCE_S)

    assert len(body.calls) == 3


def test_a_result_that_cannot_be_kept_is_not_lost(
    app: Celery, cache: Cache, body: Body, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The run has had its effects: its task completes, and the log says that nothing is remembered."""

    @memoized_task(app=app, cache=cache, name=f"{name}.report")
    def report() -> object:
        body(None)
        return report

    with caplog.at_level("WARNING", "petiole"):
        assert [report(), report()] == [report, report]
    assert len(body.calls) == 2
    assert f"a result of {name}.report is not remembered" in caplog.text


def test_the_time_limits_of_the_cache_are_not_those_of_a_task(app: Celery, redis: Connections, name: str) -> None:
    """The body runs in the thread that was given the request, whatever the cache does with its own loaders."""
    cache = Cache(redis, namespace=name, hard_timeout=0.001, soft_timeout=0.001, wait=0.001, stale=60, type=list[int])

    @memoized_task(app=app, cache=cache, bind=True, name=f"{name}.report")
    def report(self: Task) -> str:
        Event().wait(0.05)
        return f"{current_thread().name} {self.request.id}"

    assert report.apply(task_id="mine").get() == f"{current_thread().name} mine" == report.peek()


def test_hits_joins_and_runs_are_counted(declare: Declare, body: Body) -> None:
    """Each call is one of them."""
    begun, go = Event(), Event()

    def report(region: str) -> int:
        begun.set()
        go.wait(PATIENCE_S)
        return body(region)

    task = declare(report)
    waits = task.memo.cache.stats
    leader = task.delay("north")
    assert begun.wait(PATIENCE_S)
    followers = [task.delay("north") for _ in range(2)]
    pause = Event()
    while waits().waits + waits().joins < 2:
        pause.wait(0.002)
    go.set()
    assert [result.get(timeout=PATIENCE_S) for result in (leader, *followers)] == [1, 1, 1]
    task("north")

    counts = {name: count for name, count in task.memo_stats().items() if count}
    assert counts == {"runs": 1, "joins": 2, "hits": 1}
    assert "1 hits, 2 joins, 1 runs" in repr(task.memo)


def test_the_counts_are_told_to_prometheus(declare: Declare, body: Body) -> None:
    """By the collector that locks and limiters have."""
    task = declare(body.report)
    task("north")
    families = {family.name: family for family in CoordinationCollector(task.memo).collect()}

    (sample,) = families["petiole_memo_runs"].samples
    assert (sample.labels, sample.value) == ({"name": task.name}, 1)


def test_another_version_is_another_result(declare: Declare, body: Body, name: str) -> None:
    """A result of the old meaning is not served for the new one."""
    tasks = [declare(body.report, name=f"{name}.report", version=1)]
    tasks[0]("north")
    key = tasks[0].key("north")
    tasks[0].memo.cache.set(key.replace("@1", "@2"), "of the new one")

    assert key.startswith(f"{name}.report@1:")
    assert tasks[0]("north") == 1


@pytest.mark.parametrize("how", ["delay", "apply_async", "direct", "apply", "signature"])
def test_arguments_that_make_no_key_are_refused_before_anything_happens(app: Celery, cache: Cache, how: str) -> None:
    """Nothing is sent, and the body does not run."""
    ran: list[Any] = []

    @memoized_task(app=app, cache=cache)
    def report(region: Any) -> None:
        ran.append(region)

    ways: dict[str, Callable[[Any], Any]] = {
        "delay": report.delay,
        "apply_async": lambda value: report.apply_async((value,)),
        "direct": report,
        "apply": lambda value: report.apply((value,), throw=True),
        "signature": lambda value: report.s(value).delay(),
    }
    with pytest.raises(TypeError, match="cannot tell calls apart by region, a object"):
        ways[how](object())
    assert ran == []


def test_eager_tasks_are_remembered(make_app: Callable[..., Celery], cache: Cache, body: Body, name: str) -> None:
    """With task_always_eager, what is sent runs here, after the serializer has seen it."""
    app = make_app(task_always_eager=True)
    task = memoized_task(app=app, cache=cache, name=f"{name}.report")(body.report)

    assert [task.delay((1, {2: 3})).get(), task.delay([1, {"2": 3}]).get(), task((1, {2: 3}))] == [1, 1, 1]
    assert chain(task.s("a"), task.s()).delay().get() == 3
    assert group(task.s("a"), task.s("a")).delay().get() == [2, 2]
