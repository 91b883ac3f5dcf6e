"""Whose leases the main process of this worker renews, and whose parked tasks it wakes.

It says so before its pool starts: a forked child inherits it, a spawned one is told by the environment. Where nobody
has said so (a direct call, a web process, a task that was declared after its worker had started), nothing is parked,
and leases are renewed where the task runs.
"""

import json
import os
from collections.abc import Iterable

_ENVIRONMENT = "PETIOLE_GUARDED"

_namespaces: set[str] = set()


def guard_namespaces(namespaces: Iterable[str]) -> None:
    """Say that this process does it, for these."""
    _namespaces.update(namespaces)
    os.environ[_ENVIRONMENT] = json.dumps([os.getpid(), *sorted(_namespaces)])


def is_guarded(namespace: str) -> bool:
    """Whether this process, or its parent, does it."""
    return namespace in _namespaces or namespace in _by_parent()


def _by_parent() -> list[str]:
    try:
        said = json.loads(os.environ.get(_ENVIRONMENT, "[]"))
    except ValueError:
        return []
    return said[1:] if isinstance(said, list) and said[:1] == [os.getppid()] else []
