"""The face: which names there are, and what importing them costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import petiole

FACE = {
    "Allowed", "Barrier", "Busy", "Cache", "Codec", "Concurrency", "Connections", "CoordinatedTask", "Debounce",
    "DuplicateTask", "Hold", "Leader", "Limited", "Loaded", "Lock", "MISS", "MemoizedTask", "MultiLock", "Near",
    "Pause", "Pickle", "Rate", "RateLimit", "RateLimited", "RateLimiter", "ReadWriteLock", "Redlock", "Reserved",
    "Semaphore", "Settings", "SignalBridge", "SingleFlight", "SqlSink", "Throttle", "TooManyParked", "Unique",
    "WriteBehind", "cached", "connect", "coordinated_task", "global_rate_limit", "invalidate_on_commit",
    "memoized_task", "refreshed_in_worker", "warmed",
}  # fmt: skip

# Reports what a piece of code has imported and started, and whether a socket was made.
PROBE = """
import json, socket, sys, threading
made = []
class Watched(socket.socket):
    def __init__(self, *arguments, **keywords):
        made.append(str(arguments))
        super().__init__(*arguments, **keywords)
socket.socket = Watched
{code}
print(json.dumps([sorted(sys.modules), [t.name for t in threading.enumerate()], made]))
"""


def after(code: str) -> tuple[set[str], list[str], list[str]]:
    """Modules, threads and sockets of a new process that has run some code."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE.replace("{code}", code)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    modules, threads, sockets = json.loads(ran.stdout)
    return set(modules), threads, sockets


def test_the_face_has_these_names_and_no_others() -> None:
    """A public name is added or taken away on purpose, and written into the changelog."""
    assert set(petiole.__all__) == FACE
    assert len(petiole.__all__) == len(FACE)


@pytest.mark.parametrize("name", sorted(FACE))
def test_every_name_of_the_face_is_there(name: str) -> None:
    """It can be had, and is the same each time."""
    assert getattr(petiole, name) is getattr(petiole, name)
    assert name in dir(petiole)


def test_a_star_import_gives_the_face() -> None:
    """And nothing else."""
    names: dict[str, object] = {}
    exec("from petiole import *", names)

    assert names.keys() - {"__builtins__"} == FACE


def test_the_names_that_type_checkers_see_are_the_names_that_there_are() -> None:
    """What stands under TYPE_CHECKING, in ``__all__`` and in the table of homes is the same."""
    source = Path(petiole.__file__).read_text("utf-8")
    (typed,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    seen = {alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}

    assert seen == set(petiole.__all__) == set(petiole._HOME)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As from any module, so that hasattr and getattr with a default work."""
    with pytest.raises(AttributeError, match="module 'petiole' has no attribute 'Cash'"):
        _ = petiole.Cash  # type: ignore[attr-defined]

    assert not hasattr(petiole, "Lok")


@pytest.mark.parametrize("package", ["petiole.coordination", "petiole.tasks"])
def test_an_unknown_name_of_a_floor_is_an_attribute_error(package: str) -> None:
    """The floors look up late too."""
    module = __import__(package, fromlist=["_"])

    assert not hasattr(module, "Cash")
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_version_is_that_of_the_distribution() -> None:
    """There is one place where it is written."""
    from importlib.metadata import version

    assert petiole.__version__ == version("petiole")


HEAVY = ("celery", "kombu", "billiard", "sqlalchemy", "flower", "rich")


@pytest.mark.parametrize(
    "code",
    [
        "import petiole",
        "from petiole import Cache, Connections, MISS, Settings, cached, connect",
        "from petiole import Codec, Loaded, Near, Pickle",
        "from petiole import Allowed, Limited, RateLimit, RateLimiter",
        "from petiole import Barrier, Debounce, Leader, Lock, MultiLock, Redlock, Semaphore, SingleFlight, Throttle",
        "import petiole.coordination.http, petiole.coordination.fencing, petiole.coordination.inspecting",
        "import petiole.tasks.cli",
        "import petiole.coordination, petiole.tasks",
        "from petiole import Cache, RateLimit, RateLimiter, connect\n"
        "redis = connect('redis://127.0.0.1:1')\n"
        "Cache(redis, namespace='x'); RateLimiter(redis, 'x', [RateLimit('1/s')])",
        "from petiole import Lock, Semaphore, connect\n"
        "redis = connect('redis://127.0.0.1:1')\n"
        "Lock(redis, 'x'); Semaphore(redis, 'x', permits=2)",
    ],
)
def test_who_only_caches_and_limits_imports_neither_celery_nor_sqlalchemy(code: str) -> None:
    """A web process pays for what it uses."""
    modules, _, _ = after(code)

    assert sorted(module for module in modules if module.partition(".")[0] in HEAVY) == []


def test_the_measure_sees_what_it_looks_for() -> None:
    """The names that need Celery and SQLAlchemy do import them: the probe is not blind."""
    modules, _, _ = after("from petiole import SqlSink, memoized_task")

    assert {"celery", "sqlalchemy"} <= modules


@pytest.mark.parametrize(
    "code",
    [
        "import petiole",
        "from petiole import *",
        "import petiole.celeryconfig, petiole.tasks.app",
        "from petiole import Cache, SignalBridge, connect\n"
        "from petiole.tasks import app\n"
        "redis = connect('redis://127.0.0.1:1')\n"
        "bridge = SignalBridge(app, redis); bridge.signal('*'); Cache(redis, namespace='x')",
        "from petiole import Cache, cached, connect\n"
        "redis = connect('redis://127.0.0.1:1')\n"
        "cache = Cache(redis, namespace='x', near=True, refresh='thread', hard_timeout=5)\n"
        "cached(cache, 'k')(lambda: 1); repr(cache), cache.stats()",
        "from petiole import Barrier, Debounce, Leader, Lock, MultiLock, ReadWriteLock, Semaphore, Throttle, connect\n"
        "redis = connect('redis://127.0.0.1:1')\n"
        "Lock(redis, 'x'); Semaphore(redis, 'x', permits=2); ReadWriteLock(redis, 'x'); MultiLock(redis, ['x', 'y'])\n"
        "Leader(redis, 'x'); Barrier(redis, 'x', 2); Throttle(redis, 'x', every=1); Debounce(redis, 'x', wait=1)",
    ],
)
def test_importing_and_declaring_starts_no_thread_and_opens_no_socket(code: str) -> None:
    """Nothing happens before the first command."""
    _, threads, sockets = after(code)

    assert threads == ["MainThread"]
    assert sockets == []


def test_the_probe_sees_threads_and_sockets() -> None:
    """A command does open a socket, and a started bridge is a thread."""
    _, threads, sockets = after(
        "from petiole import SignalBridge, connect\n"
        "from petiole.tasks import app\n"
        "redis = connect('redis://127.0.0.1:1')\n"
        "bridge = SignalBridge(app, redis); bridge.signal('*'); bridge.start()\n"
        "try: redis.coordination.ping()\n"
        "except Exception: pass"
    )

    assert "petiole-signals" in threads
    assert sockets
