"""Flower, as a process, shows what Petiole's tasks do."""

import json
import urllib.request
from collections.abc import Callable

import pytest
from local_nodes import LocalCelery, eventually
from pytest_celery import CeleryTestSetup
from shop import BATCH, Shop

from petiole.cachelib.embedded import free_port


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_flower_shows_flushes_with_their_results(
    celery_setup: CeleryTestSetup, start: Callable[..., LocalCelery], shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By buffer, with the number of rows."""
    monkeypatch.setenv("FLOWER_UNAUTHENTICATED_API", "true")
    port = free_port()
    flower = start("flower", "--address=127.0.0.1", f"--port={port}", ready="Connected to redis")
    assert flower.ready()

    def tasks() -> dict[str, dict[str, object]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/tasks", timeout=10) as answer:
            found: dict[str, dict[str, object]] = json.load(answer)
        return {str(task["name"]): task for task in found.values() if task["state"] == "SUCCESS"}

    def flushed() -> bool:
        # Again and again, because Flower hears only of what happens after it has begun to listen.
        for _ in range(BATCH):
            shop.sales.put({"number": 1})
        return f"petiole.flush.{shop.sales.name}" in tasks()

    eventually(flushed, "Flower shows a flush")
    task = tasks()[f"petiole.flush.{shop.sales.name}"]
    assert "'rows'" in str(task["result"])
