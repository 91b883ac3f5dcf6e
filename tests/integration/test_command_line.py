"""The command line: ``petiole health``, and the same through ``celery``."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from petiole.cachelib import EmbeddedServer, connect

BIN = Path(sys.executable).parent
PETIOLE = [str(BIN / "petiole"), "health"]
CELERY = [str(BIN / "celery"), "-A", "petiole.tasks", "petiole", "health"]

both = pytest.mark.parametrize("command", [PETIOLE, CELERY], ids=["petiole", "celery"])


def run(command: list[str], *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program from somewhere else, with no Redis of anybody's in its environment."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("REDIS_", "CELERY_"))}
    return subprocess.run(
        [*command, *arguments],
        env={**environment, **variables},
        cwd="/",
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


@both
def test_a_server_that_answers_is_described(command: list[str], redis_server: EmbeddedServer) -> None:
    """What it is, where, how fast, and what it evicts; nothing is wrong with it."""
    ended = run(command, REDIS_URL=redis_server.url)

    assert ended.returncode == 0, ended.stderr
    assert f" at {redis_server.url} answers in " in ended.stdout
    assert ended.stdout.rstrip().endswith("ms; eviction: noeviction")
    assert ended.stderr == ""


@both
def test_a_server_that_does_not_answer_is_named(command: list[str]) -> None:
    """One line with the address and what to check, exit status 1, and no traceback."""
    ended = run(command, REDIS_URL="redis://127.0.0.1:1/0")

    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "redis://127.0.0.1:1/0" in ended.stderr
    assert "REDIS_URL" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_the_option_names_another_server(redis_server: EmbeddedServer) -> None:
    """An argument comes before the environment."""
    ended = run(PETIOLE, "--url", redis_server.url, REDIS_URL="redis://127.0.0.1:1/0")

    assert ended.returncode == 0
    assert redis_server.url in ended.stdout


def test_a_server_that_evicts_is_warned_of(own_server: Callable[..., EmbeddedServer]) -> None:
    """Settings that lose data are said on standard error; the server answers, so the status is 0."""
    ended = run(PETIOLE, "--url", own_server("--maxmemory-policy", "allkeys-lru").url)

    assert ended.returncode == 0
    assert "warning: maxmemory-policy is allkeys-lru" in ended.stderr


def test_a_password_that_is_right_is_not_printed(own_server: Callable[..., EmbeddedServer]) -> None:
    """A server that asks for a password is described without it."""
    server = own_server()
    with connect(server.url) as redis:
        redis.coordination.config_set("requirepass", "sesame")
    right = run(PETIOLE, "--url", server.url.replace("://", "://:sesame@"))
    wrong = run(PETIOLE, "--url", server.url.replace("://", "://:sesamo@"))

    assert right.returncode == 0, right.stderr
    assert wrong.returncode == 1
    for ended, password in [(right, "sesame"), (wrong, "sesamo")]:
        assert password not in ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "url",
    [
        "redis://:sesame@127.0.0.1:1/0",
        "redis://user:sesame@127.0.0.1:1/0",
        "redis://127.0.0.1:1/0?password=sesame",
        "http://:sesame@127.0.0.1:1/0",
        "redis://:sesame@127.0.0.1:port/0",
        "redis://:sesame@127.0.0.1:99999/0",
        "redis://:open/sesame@127.0.0.1:1/0",
        "redis://:sesame#1@127.0.0.1:1/0",
        "redis://:sesame?1@127.0.0.1:1/0",
        "redis://:ses@sesame@127.0.0.1:1/0",
        "redis://:[sesame@127.0.0.1:1/0",
        ":sesame@127.0.0.1:1",
    ],
)
def test_no_address_gives_its_password_away(url: str) -> None:
    """Whatever is wrong with an address, also a password that was not quoted, it is refused without printing it."""
    ended = run(PETIOLE, "--url", url)

    assert ended.returncode == 1
    assert "sesame" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_setting_that_is_none_is_named(redis_server: EmbeddedServer) -> None:
    """A wrong variable in the environment is a sentence too."""
    ended = run(PETIOLE, REDIS_URL=redis_server.url, CACHE_TTL_SHORT="soon")

    assert ended.returncode == 1
    assert "CACHE_TTL_SHORT" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_lists_the_commands() -> None:
    """The program tells what it can."""
    ended = run([PETIOLE[0]], "--help")

    assert ended.returncode == 0
    assert "health" in ended.stdout
