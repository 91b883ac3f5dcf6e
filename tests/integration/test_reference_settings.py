"""``petiole.celeryconfig``: what its lines promise, as far as one process can see it."""

import time
from collections.abc import Iterator

import pytest
from celery import Celery
from celery.app.defaults import NAMESPACES, flatten
from celery.contrib.testing.app import setup_default_app
from kombu.exceptions import OperationalError

from petiole import celeryconfig

# Celery's Redis backend reads these, and its table of defaults does not have them.
UNDECLARED = {"redis_client_name", "redis_backend_health_check_interval"}


@pytest.fixture
def reference() -> Iterator[Celery]:
    """An app with the reference settings, and a broker that is away."""
    app = Celery("reference", set_as_current=False)
    with setup_default_app(app):
        app.config_from_object("petiole.celeryconfig")
        app.conf.broker_url = app.conf.result_backend = "redis://127.0.0.1:1/0"
        yield app


@pytest.mark.parametrize("retry", [True, False])
def test_a_publish_that_cannot_be_made_raises_soon(reference: Celery, retry: bool) -> None:
    """A request whose broker is away is not held for long, neither with the retry policy nor without."""

    @reference.task(name="reference.task", ignore_result=True)
    def task() -> None:
        """Is never run."""

    started = time.monotonic()
    with pytest.raises(OperationalError):
        task.apply_async(retry=retry)

    assert time.monotonic() - started < 20  # a pool by itself tries for minutes


def test_every_setting_is_one_that_celery_knows(reference: Celery) -> None:
    """A misspelled setting would be ignored without a word."""
    known = {name for name, _ in flatten(NAMESPACES)}
    ours = {name for name in vars(celeryconfig) if not name.startswith("_") and name not in ("os", "Settings")}

    assert ours - known <= UNDECLARED
