"""What must be made anew in a forked child: locks that another thread of the parent may have held.

In the child nobody would ever release them. (redis-py's own pools look at the process id themselves.)
"""

import os
from typing import Protocol
from weakref import WeakSet


class ForkAware(Protocol):
    """Something with a lock."""

    def renew_after_fork(self) -> None:
        """Make locks, and what they guard, fit for the child. Called while the child has one thread."""


_known: "WeakSet[ForkAware]" = WeakSet()


def renew_after_fork(what: ForkAware) -> None:
    """Have something renewed in every child that is forked while it is alive."""
    _known.add(what)


def _renew_all() -> None:
    for what in list(_known):
        what.renew_after_fork()


os.register_at_fork(after_in_child=_renew_all)
