"""The command line: ``petiole health``, ``locks`` and ``force-release``, and the same through ``celery``."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
from local_nodes import eventually

from petiole.cachelib import Connections, EmbeddedServer, connect
from petiole.coordination import Lock, Semaphore
from petiole.coordination.inspecting import inspect_named

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


def test_locks_lists_who_holds_and_who_waits(redis_server: EmbeddedServer, redis: Connections, name: str) -> None:
    """By name, a line each, with the owner and the fence; of a pattern only what matches."""
    with Lock(redis, f"{name}:7", owner="the first") as hold, Lock(redis, "other", owner="somebody"):
        waiting = Thread(target=lambda: Lock(redis, f"{name}:7", owner="the second").acquire(30).release())
        waiting.start()
        eventually(lambda: inspect_named(redis, "lock", f"{name}:7").waiting, "it waits")
        ended = run([str(BIN / "petiole"), "locks", f"{name}:*"], REDIS_URL=redis_server.url)
    waiting.join()

    held, waits = ended.stdout.splitlines()
    assert held.startswith(f"{name}:7: held by the first for ")
    assert held.endswith(f"fence {hold.fence}")
    assert waits.startswith(f"{name}:7: 1. in the queue is the second, for ")
    assert ended.stderr == ""


@pytest.mark.parametrize("kind", ["lock", "semaphore"])
def test_force_release_takes_it_from_who_holds_it(
    redis_server: EmbeddedServer, redis: Connections, name: str, kind: str
) -> None:
    """After a question that a script answers with --yes; whoever comes next holds it, with a higher fence."""
    held: Lock | Semaphore = Lock(redis, name) if kind == "lock" else Semaphore(redis, name, permits=1)
    old = held.acquire()
    command = [str(BIN / "petiole"), "force-release", "--kind", kind, name]

    asked = run(command, REDIS_URL=redis_server.url)
    assert asked.returncode == 1
    assert not held.try_acquire()

    done = run([*command, "--yes"], REDIS_URL=redis_server.url)
    assert done.stdout == f"{name}: taken from 1 that held it\n"
    new = held.acquire(5)
    assert new.fence > old.fence
    assert not old.release()
    new.release()
    assert run([*command, "--yes"], REDIS_URL=redis_server.url).stdout == f"{name}: nobody held it\n"


@pytest.mark.parametrize("command", [["locks"], ["force-release", "--yes", "x"], ["parked"]])
def test_locks_of_a_server_that_is_away_end_with_a_line(command: list[str]) -> None:
    """And not with a traceback."""
    ended = run([str(BIN / "petiole"), *command], REDIS_URL="redis://127.0.0.1:1/0")

    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "redis://127.0.0.1:1/0" in ended.stderr
    assert "--url or REDIS_URL" in ended.stderr
