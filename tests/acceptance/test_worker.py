"""The whole of it with real processes: a worker, beat, Redis, and each kind of database.

pytest-celery's ``celery_setup`` holds the worker, the broker and the backend; its nodes are local processes.
"""

import pytest
from local_nodes import LocalCelery, eventually
from pytest_celery import CeleryTestSetup
from shop import BATCH, Article, Shop, Total

ONE_DATABASE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # where the kind does not matter
EACH_DATABASE = pytest.mark.parametrize(
    "database_url", ["postgresql", pytest.param("sqlite", marks=pytest.mark.storm)], indirect=True
)


def _totals(shop: Shop) -> dict[str, int]:
    with shop.session() as session:
        return {total.article: total.sold for total in session.query(Total)}


def _sell(shop: Shop, numbers: range) -> None:
    for number in numbers:
        shop.sales.put({"number": number})
        shop.totals.put({"article": f"a{number % 3}", "sold": number})


def _expected_totals(count: int) -> dict[str, int]:
    return {f"a{article}": sum(n for n in range(count) if n % 3 == article) for article in range(3)}


def _waiting(shop: Shop) -> int:
    return sum(shop.sales.buffer.lengths()) + sum(shop.totals.buffer.lengths())


@ONE_DATABASE
def test_a_full_batch_is_flushed_without_beat(celery_setup: CeleryTestSetup, shop: Shop) -> None:
    """A partition that is full asks a worker to flush it."""
    partition = shop.sales.buffer.partition_of(shop.sales.sink.format.pack({"number": 1}).identity)

    for _ in range(BATCH):
        shop.sales.put({"number": 1})

    eventually(lambda: shop.sales.buffer.lengths()[partition] == 0, "the flushed rows have left Redis")
    assert shop.count() == BATCH


@EACH_DATABASE
def test_rows_that_fill_no_batch_are_flushed_by_beat(
    celery_setup: CeleryTestSetup, beat: LocalCelery, shop: Shop
) -> None:
    """No row waits for company longer than ``max_delay``, while beat and a worker run."""
    _sell(shop, range(3))

    eventually(lambda: _waiting(shop) == 0, "beat had the rows flushed")
    assert shop.count() == 3
    assert _totals(shop) == _expected_totals(3)


@EACH_DATABASE
@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.storm)])
def test_a_worker_that_is_killed_again_and_again_neither_loses_nor_repeats_a_row(
    celery_setup: CeleryTestSetup, beat: LocalCelery, shop: Shop, kills: int
) -> None:
    """Every acknowledged put is in SQL exactly once, whatever SIGKILL hits."""
    rows = 0
    for _ in range(kills):
        _sell(shop, range(rows, rows + 300))
        rows += 300
        flushed = shop.count()
        eventually(lambda flushed=flushed: shop.count() > flushed, "the worker is in the middle of its work")
        celery_setup.worker.kill("SIGKILL")
        _sell(shop, range(rows, rows + 50))
        rows += 50
        celery_setup.worker.restart()

    eventually(lambda: _waiting(shop) == 0, "all rows have left Redis")
    assert shop.count() == rows
    assert _totals(shop) == _expected_totals(rows)


@ONE_DATABASE
def test_a_worker_that_is_asked_to_end_drains_the_buffers(celery_setup: CeleryTestSetup, shop: Shop) -> None:
    """SIGTERM leaves nothing for the next worker."""
    _sell(shop, range(5))

    celery_setup.worker.kill("SIGTERM")

    assert _waiting(shop) == 0
    assert shop.count() == 5
    assert _totals(shop) == _expected_totals(5)


@ONE_DATABASE
def test_what_a_session_committed_is_invalidated_by_a_worker(celery_setup: CeleryTestSetup, shop: Shop) -> None:
    """After the commit, the cached value goes; after a rollback it stays."""
    with shop.session.begin() as session:
        session.add(Article(id=1, price=10))
    assert shop.article(1) == 10

    with shop.session.begin() as session:
        session.get_one(Article, 1).price = 12

    eventually(lambda: shop.article(1) == 12, "readers see the new price")


@ONE_DATABASE
def test_beat_keeps_popular_calls_warm(celery_setup: CeleryTestSetup, beat: LocalCelery, shop: Shop) -> None:
    """A page that readers asked for is loaded anew by a worker, before it runs out."""
    shop.article(1)
    shop.article.popularity.send()

    eventually(lambda: shop.counters.read().get("loads", 0) > 1, "the worker has loaded it again")
    assert shop.cache.stats().loads == 1


@ONE_DATABASE
def test_equal_calls_of_a_memoized_task_run_once(celery_setup: CeleryTestSetup, shop: Shop) -> None:
    """Every call completes with the value; the body ran once."""
    results = [shop.report.delay(2026) for _ in range(20)]

    assert [result.get(timeout=60) for result in results] == [4052] * 20
    assert shop.counters.read()["runs"] == 1


@ONE_DATABASE
def test_a_message_reaches_the_receivers_of_a_worker_once(celery_setup: CeleryTestSetup, shop: Shop, name: str) -> None:
    """Not once per pool process: the main process listens."""
    eventually(lambda: shop.bridge.publish(f"{name}:hello", {}) > 0, "the worker has subscribed")
    eventually(lambda: shop.counters.read().get("messages"), "the message was heard")

    assert shop.counters.read()["messages"] == 1


@ONE_DATABASE
def test_tasks_of_petiole_are_registered_under_their_names(celery_setup: CeleryTestSetup, shop: Shop) -> None:
    """What Flower and ``celery inspect registered`` show."""
    (found,) = shop.app.control.inspect(timeout=30, limit=1).registered().values()

    names = {f"petiole.flush.{shop.sales.name}", "petiole.warm.article", f"petiole.invalidate.{shop.cache.namespace}"}
    assert names <= set(found)
