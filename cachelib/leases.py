"""Leases that last as long as their loads, and no longer than their process.

A lease is short, so that a holder that dies is soon succeeded; a load may be long. One thread per cache and process
renews, every third of a lease, those that are held by then. It is started by the first load, and ends when the
connections are closed. A load that was voided meanwhile is not renewed, so its value is refused as ever.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Lock, Thread
from typing import NamedTuple

from .connections import UNAVAILABLE, Connections
from .entry_store import EntryStore
from .forks import renew_after_fork

logger = logging.getLogger(__name__)


class _Held(NamedTuple):
    """Loads that are under way."""

    names: Sequence[str]
    until: float = math.inf
    """When nobody waits for them any more, by ``time.monotonic()``: then others may load."""
    seen: bool = False
    """Whether it was there at the last round."""


class LeaseKeeper:
    """Renews what this process holds.

    Non-promise: code that holds the interpreter lock for a whole lease (a long call into C) keeps the thread from
    running; then the load's value is not stored, and somebody else may load too.
    """

    def __init__(self, redis: Connections, store: EntryStore, lease_ms: int) -> None:
        self._redis = redis
        self._store = store
        self._lease_ms = lease_ms
        self._held: dict[str, _Held] = {}  # by token
        self._thread: Thread | None = None
        self._lock = Lock()
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"<LeaseKeeper [{len(self._held)} held]>"

    def renew_after_fork(self) -> None:
        """Forget the parent's leases, and its thread."""
        self._lock = Lock()
        self._held, self._thread = {}, None

    @contextmanager
    def keeping(self, names: Sequence[str], token: str, most_s: float = math.inf) -> Iterator[None]:
        """Renew the leases of some entries, which one look took, while the block runs, and for ``most_s`` at most."""
        try:
            with self._lock:
                self._held[token] = _Held(names, time.monotonic() + most_s)
                if self._thread is None:
                    self._thread = Thread(target=self._run, name="petiole-leases", daemon=True)
                    self._thread.start()
            yield
        finally:
            self.forget(token)

    def forget(self, token: str) -> None:
        """Renew no more, although the load may go on."""
        with self._lock:
            self._held.pop(token, None)

    def _run(self) -> None:
        pause = Event()
        while not self._redis.closed:
            pause.wait(self._lease_ms / 3_000)
            for token, held in self._due():
                try:
                    self._store.renew(held.names, token)
                except (*UNAVAILABLE, RuntimeError) as error:  # RuntimeError: closed between the two lines
                    logger.warning("the lease of %s was not renewed: %s", held.names[0], error)

    def _due(self) -> list[tuple[str, "_Held"]]:
        """Those that were held a round ago already: most loads are done before their first."""
        now = time.monotonic()
        with self._lock:
            due = [(token, held) for token, held in self._held.items() if held.seen and now < held.until]
            self._held = {token: held._replace(seen=True) for token, held in self._held.items()}
        return due
