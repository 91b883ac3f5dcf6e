"""``@warmed``: the most requested calls are kept fresh, under the same rules as any load."""

from collections.abc import Callable
from queue import Queue
from threading import Event, Semaphore, Thread
from typing import Any

import pytest
from celery import Celery
from celery.beat import Scheduler
from celery.worker import WorkController

from petiole import MISS, Cache, warmed
from petiole.cachelib.counters import SharedCounters
from petiole.tasks.warming import WarmedFunction

PATIENCE_S = 20.0


def request(function: WarmedFunction[Any, Any], **times: int) -> None:
    """Ask for some calls so many times, as all processes together would."""
    for call, count in times.items():
        for _ in range(count):
            function(call)
    function.popularity.send()


@pytest.fixture
def loads() -> list[Any]:
    """With what the function was loaded."""
    return []


@pytest.fixture
def post(app: Celery, cache: Cache, name: str, loads: list[Any]) -> WarmedFunction[[str], int]:
    """Entries of 61 s that are warmed every 60 s: each warming finds all of them about to run out."""

    @warmed(cache, every=60, ttl=61, top=3, app=app, name=name)
    def post(post_id: str) -> int:
        loads.append(post_id)
        return len(loads)

    return post


def test_the_most_requested_calls_are_warmed_most_requested_first(
    post: WarmedFunction[[str], int], loads: list[Any]
) -> None:
    """Of all calls, the top ones are loaded anew, in the order of their rank."""
    request(post, d=1, a=4, c=2, b=3)
    loads.clear()
    report = post.warm()

    assert loads == ["a", "b", "c"]
    assert report == {"looked_at": 3, "warmed": 3, "failed": 0}


def test_what_was_warmed_is_what_callers_get(post: WarmedFunction[[str], int]) -> None:
    """A call after the warming is a hit, with the new value."""
    request(post, a=1)
    before = post.get("a")
    post.warm()

    assert before == 1
    assert post.get("a") == 2
    assert post("a") == 2


def test_what_stays_fresh_for_longer_is_left_alone(app: Celery, cache: Cache, name: str, loads: list[Any]) -> None:
    """Only what would run out before the next warming is loaded."""

    @warmed(cache, every=60, ttl=3_600, app=app, name=name)
    def post(post_id: str) -> int:
        loads.append(post_id)
        return len(loads)

    request(post, a=2, b=1)
    cache.touch(post.key("a"), 80)
    loads.clear()
    report = post.warm()

    assert loads == ["a"]
    assert report == {"looked_at": 2, "warmed": 1, "failed": 0}


def test_what_is_gone_is_warmed(post: WarmedFunction[[str], int], loads: list[Any]) -> None:
    """A popular call whose entry is gone is there again before anybody asks."""
    request(post, a=1)
    post.invalidate("a")
    loads.clear()
    post.warm()

    assert loads == ["a"]
    assert post.get("a") == 1


def test_what_is_asked_for_no_more_fades_out(post: WarmedFunction[[str], int], loads: list[Any]) -> None:
    """Each warming halves the ranking, so that what nobody asks for is not warmed for ever."""
    request(post, a=2)
    reports = [post.warm()["looked_at"] for _ in range(8)]

    assert reports[0] == 1
    assert reports[-1] == 0


def test_a_warming_does_not_bring_back_what_was_invalidated(app: Celery, cache: Cache, name: str) -> None:
    """It loads under a lease as any load does: an invalidation meanwhile voids it."""
    begun, go = Event(), Event()

    @warmed(cache, every=60, ttl=61, app=app, name=name)
    def post(post_id: str) -> str:
        if begun.is_set():
            return "new"
        return "old"

    request(post, a=1)
    original = post.original

    def slow(post_id: str) -> str:
        begun.set()
        go.wait(PATIENCE_S)
        return "read before the change"

    post.original = slow
    reports: Queue[dict[str, int]] = Queue()
    warming = Thread(target=lambda: reports.put(post.warm()))
    warming.start()
    try:
        assert begun.wait(PATIENCE_S)
        post.invalidate("a")
    finally:
        go.set()
        warming.join(PATIENCE_S)
    post.original = original

    assert reports.get(timeout=PATIENCE_S) == {"looked_at": 1, "warmed": 0, "failed": 0}
    assert post.get("a") is MISS
    assert post("a") == "new"


def test_two_warmings_at_once_do_the_work_once(app: Celery, cache: Cache, name: str) -> None:
    """The second one finds the lease taken, and leaves the call alone."""
    begun, go, loads = Event(), Event(), Semaphore(0)
    warming_now = Event()

    @warmed(cache, every=60, ttl=61, app=app, name=name)
    def post(post_id: str) -> str:
        if warming_now.is_set():
            loads.release()
            begun.set()
            go.wait(PATIENCE_S)
        return post_id

    request(post, a=8)
    warming_now.set()
    first: Queue[dict[str, int]] = Queue()
    warming = Thread(target=lambda: first.put(post.warm()))
    warming.start()
    try:
        assert begun.wait(PATIENCE_S)
        second = post.warm()
    finally:
        go.set()
        warming.join(PATIENCE_S)

    assert second == {"looked_at": 1, "warmed": 0, "failed": 0}
    assert first.get(timeout=PATIENCE_S)["warmed"] == 1
    assert loads.acquire(blocking=False)
    assert not loads.acquire(blocking=False)


def test_a_call_that_fails_is_counted_and_stops_no_other(
    app: Celery, cache: Cache, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A broken call is logged; the ones below it are warmed."""
    broken: set[str] = set()

    @warmed(cache, every=60, ttl=61, app=app, name=name)
    def post(post_id: str) -> str:
        if post_id in broken:
            raise LookupError(f"there is no {post_id}")
        return post_id

    request(post, a=3, b=2, c=1)
    broken.add("a")
    report = post.warm()

    assert report == {"looked_at": 3, "warmed": 2, "failed": 1}
    assert [record.levelname for record in caplog.records if "warming" in record.getMessage()] == ["WARNING"]
    assert dict(SharedCounters(cache.redis, "cache", cache.namespace).read()) == {"warmed": 2, "warming_failed": 1}


def test_the_ranking_is_shared_and_names_calls_by_their_arguments(
    app: Celery, cache: Cache, name: str, loads: list[Any]
) -> None:
    """Arguments are repeated as they were given: text, numbers, booleans and None, by position and by name."""

    @warmed(cache, every=60, ttl=61, app=app, name=name)
    def page(path: str, number: int = 1, *, full: bool = False, user: str | None = None) -> list[Any]:
        loads.append((path, number, full, user))
        return [path]

    page("/", 2, full=True)
    page("/a", user=None)
    page.popularity.send()
    expected = sorted(loads)
    loads.clear()
    page.warm()

    assert sorted(loads) == expected == [("/", 2, True, None), ("/a", 1, False, None)]


@pytest.mark.parametrize(
    "argument", [2**70, -(2**70), float("nan"), "\ud800"], ids=["large", "small", "nan", "surrogate"]
)
def test_what_cannot_be_ranked_can_be_called(app: Celery, cache: Cache, name: str, argument: Any) -> None:
    """The ranking informs; an argument that it cannot hold does not fail the call, and is not warmed as another."""
    calls: list[str] = []

    @warmed(cache, "{length}", every=60, ttl=61, app=app, name=name)
    def size(value: Any, length: int = 7) -> str:
        calls.append(repr(value))
        return "answered"

    first = size(argument)
    size.popularity.send()
    size.invalidate(argument)
    size.warm()

    assert first == "answered"
    assert set(calls) == {repr(argument)}


def test_other_arguments_are_cached_and_not_ranked(app: Celery, cache: Cache, name: str) -> None:
    """A call that could not be repeated from what Redis holds is cached as ever."""

    @warmed(cache, "{value}", every=60, ttl=61, app=app, name=name)
    def size(value: Any) -> int:
        return len(value)

    sizes = [size((1, 2)), size((1, 2))]
    size.popularity.send()

    assert sizes == [2, 2]
    assert cache.stats().hits == 1
    assert size.warm() == {"looked_at": 0, "warmed": 0, "failed": 0}


@pytest.mark.parametrize(("ttl", "every"), [(60, 60), (30, "1m"), ("59s", 60.0)])
def test_entries_that_run_out_between_warmings_are_refused(cache: Cache, ttl: Any, every: Any) -> None:
    """The message has both durations, and says what to do."""
    with pytest.raises(ValueError, match="warm more often, or give a longer ttl"):
        warmed(cache, every=every, ttl=ttl)


def test_the_ttl_of_the_cache_counts_where_none_is_given(cache: Cache) -> None:
    """The default TTL is held against the period too."""
    with pytest.raises(ValueError, match=r"live for 300 s run out between warmings every 300 s"):
        warmed(cache, every=300)


@pytest.mark.parametrize("top", [0, -1, 1.5, "10", True, None])
def test_a_top_that_is_no_positive_whole_number_is_refused(cache: Cache, top: Any) -> None:
    """At least one call is warmed."""
    with pytest.raises(ValueError, match="top must be a whole number"):
        warmed(cache, every=60, top=top)


@pytest.mark.parametrize("chosen", ["a b", "a:b", "é", "-"])
def test_a_name_that_fits_no_task_is_refused(cache: Cache, app: Celery, chosen: str) -> None:
    """It becomes part of the task's name."""
    with pytest.raises(ValueError, match="becomes part of a task's name"):
        warmed(cache, every=60, app=app, name=chosen)(len)


def test_by_default_it_is_named_by_module_and_function(cache: Cache, app: Celery) -> None:
    """Task and beat entry say whose they are."""

    def front_page() -> None:
        """Loads nothing."""

    front_page.__module__ = "shop.pages"
    function = warmed(cache, every=60, app=app)(front_page)
    app.finalize()

    assert function.task.name == "petiole.warm.shop.pages.front_page"
    assert "petiole: warm shop.pages.front_page" in app.conf.beat_schedule


def test_a_function_of_a_program_or_a_private_module_can_be_warmed(cache: Cache, app: Celery) -> None:
    """Names such as __main__ and _pages begin with an underscore; a default name never refuses a function."""

    def front_page() -> None:
        """Loads nothing."""

    for module in ("__main__", "_pages"):
        front_page.__module__ = module

        assert warmed(cache, every=60, app=app)(front_page)


def entries(app: Celery, name: str) -> list[dict[str, Any]]:
    app.finalize()
    return [entry for key, entry in app.conf.beat_schedule.items() if key == f"petiole: warm {name}"]


def test_it_brings_one_beat_entry(app: Celery, post: WarmedFunction[[str], int], name: str) -> None:
    """The entry sends the task of the function, at the period that was asked for."""
    (entry,) = entries(app, name)

    assert entry["task"] == f"petiole.warm.{name}"
    assert entry["schedule"].total_seconds() == 60
    assert entry["options"]["expires"] == 60
    assert f"petiole.warm.{name}" in app.tasks


def test_without_an_app_every_app_warms(make_app: Callable[..., Celery], cache: Cache, name: str) -> None:
    """Each app has the task and the entry, once."""
    apps = [make_app()]

    @warmed(cache, every=60, name=name)
    def post(post_id: str) -> str:
        return post_id

    apps.append(make_app())

    for app in apps:
        assert len(entries(app, name)) == 1
        assert f"petiole.warm.{name}" in app.tasks


def test_the_applications_own_entry_wins(make_app: Callable[..., Celery], cache: Cache, name: str) -> None:
    """Who wants to warm at night says so in the schedule, under the same name."""
    app = make_app()
    own = {"task": f"petiole.warm.{name}", "schedule": 86_400.0}
    app.conf.beat_schedule = {f"petiole: warm {name}": own}
    warmed(cache, every=60, app=app, name=name)(len)

    assert entries(app, name) == [own]


def test_the_worker_warms(
    worker_app: Celery,
    worker: WorkController,
    cache: Cache,
    name: str,
    loads: list[Any],
    ended: Callable[[str], Semaphore],
) -> None:
    """What beat sends, a worker runs."""

    @warmed(cache, every=60, ttl=61, app=worker_app, name=name)
    def post(post_id: str) -> int:
        loads.append(post_id)
        return len(loads)

    worker.reload()
    request(post, a=2, b=1)
    loads.clear()
    runs = ended(post.task.name)
    post.task.delay()
    assert runs.acquire(timeout=PATIENCE_S)

    assert loads == ["a", "b"]


def test_the_message_that_beat_sends_can_be_sent(
    app: Celery, post: WarmedFunction[[str], int], name: str, sent: Callable[[Celery], list[dict[str, Any]]]
) -> None:
    """Beat's scheduler sends the entry, and the message is one that the task takes."""
    (entry,) = entries(app, name)
    scheduler = Scheduler(app=app, lazy=True)
    scheduler.setup_schedule()
    scheduler.apply_async(scheduler.Entry(app=app, name="warm", **entry), advance=False)

    assert sent(app) == [{}]


def test_it_is_called_as_the_function_itself(post: WarmedFunction[[str], int]) -> None:
    """Name, docstring and result are the function's."""
    assert post.__name__ == "post"
    assert post("a") == 1
    assert post("a") == 1


def test_by_default_different_calls_have_different_keys(cache: Cache, name: str) -> None:
    """Whatever stands in their arguments, and of whatever type it is."""

    @warmed(cache, every=1, name=name)
    def page(first: object, second: object = None) -> list[object]:
        return [first, second]

    calls = [("x:y", "z"), ("x", "y:z"), (1, None), ("1", None), (True, None)]

    assert [page(*call) for call in calls] == [list(call) for call in calls]
