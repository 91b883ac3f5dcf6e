"""pytest-celery's setup, with local processes as its nodes, and the shop as its app."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from celery import Celery
from local_nodes import LocalCelery, LocalServer
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryTestWorker,
    CeleryWorkerCluster,
)
from shop import Base, Shop, make

from petiole.cachelib import EmbeddedServer

Start = Callable[..., LocalCelery]


@pytest.fixture
def shop(redis_server: EmbeddedServer, engine: object, database_url: str, name: str) -> Iterator[Shop]:
    """The shop as the web process has it, with its tables, on a database of the test's own."""
    shop = make(redis_server.url, database_url, name)
    Base.metadata.create_all(shop.engine)
    yield shop
    shop.close()


@pytest.fixture
def shop_environment(redis_server: EmbeddedServer, database_url: str, name: str) -> Mapping[str, str]:
    """What the shop's processes are told."""
    return {"SHOP_REDIS_URL": redis_server.url, "SHOP_DATABASE_URL": database_url, "SHOP_NAME": name}


@pytest.fixture
def start(shop: Shop, shop_environment: Mapping[str, str], tmp_path: Path) -> Iterator[Start]:
    """Starts celery processes of the shop for one test."""
    started: list[LocalCelery] = []

    def start(command: str, *arguments: str, ready: str) -> LocalCelery:
        process = LocalCelery(command, *arguments, environment=shop_environment, folder=tmp_path, ready=ready)
        started.append(process)
        return process

    yield start
    for process in started:
        process.teardown()


@pytest.fixture
def beat(start: Start) -> LocalCelery:
    """Beat, as a process."""
    beat = start("beat", "--loglevel=info", ready="beat: Starting...")
    assert beat.ready()
    return beat


@pytest.fixture
def celery_worker(start: Start, shop: Shop, name: str) -> Iterator[CeleryTestWorker]:
    """A worker with two processes, as a process."""
    arguments = ("--concurrency=2", f"--hostname={name}@local", "--loglevel=info", "--without-mingle")
    worker = CeleryTestWorker(start("worker", *arguments, ready="ready."), shop.app)
    yield worker
    worker.teardown()


@pytest.fixture
def celery_worker_cluster(celery_worker: CeleryTestWorker) -> Iterator[CeleryWorkerCluster]:
    cluster = CeleryWorkerCluster(celery_worker)
    assert cluster.ready()
    yield cluster
    cluster.teardown()


@pytest.fixture
def celery_broker_cluster(redis_server: EmbeddedServer, shop: Shop) -> Iterator[CeleryBrokerCluster]:
    cluster = CeleryBrokerCluster(CeleryTestBroker(LocalServer(redis_server), shop.app))
    yield cluster
    cluster.teardown()


@pytest.fixture
def celery_backend_cluster(redis_server: EmbeddedServer, shop: Shop) -> Iterator[CeleryBackendCluster]:
    cluster = CeleryBackendCluster(CeleryTestBackend(LocalServer(redis_server), shop.app))
    yield cluster
    cluster.teardown()


@pytest.fixture
def celery_setup_app(shop: Shop) -> Celery:
    """The app that all nodes share is the shop's own."""
    return shop.app
