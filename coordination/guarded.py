"""Which tasks the main process of this worker looks after: it renews their leases, and wakes those that are parked.

It says so before its pool starts: a forked child inherits it, a spawned one is told by the environment. Where nobody
has said so (a direct call, a web process, a task that was declared after its worker had started), nothing is parked,
and leases are renewed where the task runs.
"""

import json
import os
from collections.abc import Iterable
from hashlib import blake2b

_ENVIRONMENT = "PETIOLE_GUARDED"

_guarded: set[str] = set()


def guard(tasks: Iterable[tuple[str, str]]) -> None:
    """Say that this process does it, for these: the name of a task, and where it is coordinated."""
    _guarded.update(_mark(name, address) for name, address in tasks)
    os.environ[_ENVIRONMENT] = json.dumps([os.getpid(), *sorted(_guarded)])


def is_guarded(name: str, address: str) -> bool:
    """Whether this process, or its parent, does it for a task."""
    mark = _mark(name, address)
    return mark in _guarded or mark in _by_parent()


def _mark(name: str, address: str) -> str:
    return blake2b(f"{name} {address}".encode(), digest_size=6).hexdigest()


def _by_parent() -> list[str]:
    try:
        said = json.loads(os.environ.get(_ENVIRONMENT, "[]"))
    except ValueError:
        return []
    return said[1:] if isinstance(said, list) and said[:1] == [os.getppid()] else []
