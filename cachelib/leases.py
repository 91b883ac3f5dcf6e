"""Leases that last as long as their loads, and no longer than their process.

A lease is short, so that a holder that dies is soon succeeded; a load may be long. One thread per cache and process
renews, every third of a lease, those that are held by then; it ends when there is nothing to do. A load that was voided
meanwhile is not renewed, so its value is refused as ever.

It also gives back what nobody holds: a look that timed out may be carried out by the server all the same, later, and
then there is a lease whose holder does not know of it.
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


class _Orphaned(NamedTuple):
    """Leases that may have been taken, for nobody."""

    names: Sequence[str]
    until: float
    """When they have run out by themselves."""


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
        self._orphaned: dict[str, _Orphaned] = {}
        self._thread: Thread | None = None
        self._wake = Event()
        self._lock = Lock()
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"<LeaseKeeper [{len(self._held)} held]>"

    def renew_after_fork(self) -> None:
        """Forget the parent's leases, and its thread."""
        self._lock, self._wake = Lock(), Event()
        self._held, self._orphaned, self._thread = {}, {}, None

    @contextmanager
    def keeping(self, names: Sequence[str], token: str, most_s: float = math.inf) -> Iterator[None]:
        """Renew the leases of some entries, which one look took, while the block runs, and for ``most_s`` at most."""
        try:
            with self._lock:
                self._held[token] = _Held(names, time.monotonic() + most_s)
                self._have_thread()
            yield
        finally:
            self.forget(token)

    def forget(self, token: str) -> None:
        """Renew no more, although the load may go on."""
        with self._lock:
            self._held.pop(token, None)

    def orphaned(self, names: Sequence[str], token: str) -> None:
        """Give back leases that a look may have taken whose reply never came, as soon as the server answers."""
        with self._lock:
            self._orphaned[token] = _Orphaned(names, time.monotonic() + self._lease_ms / 1_000)
            self._have_thread()
            self._wake.set()

    def _have_thread(self) -> None:
        if self._thread is not None:
            return
        thread = Thread(target=self._run, name="petiole-leases", daemon=True)
        try:
            thread.start()
            self._thread = thread
        except RuntimeError as error:  # the system has none for us: a load that is longer than its lease is not stored
            logger.warning("no thread to renew leases with: %s", error)

    def _run(self) -> None:
        wake = self._wake
        while not self._redis.closed:
            wake.wait(self._lease_ms / 3_000)
            wake.clear()
            for token, orphaned in self._still_orphaned():
                try:
                    self._store.void(orphaned.names, token)
                except (*UNAVAILABLE, RuntimeError) as error:  # RuntimeError: closed between the two lines
                    logger.debug("a lease of %s was not given back: %s", orphaned.names[0], error)
            for token, held in self._due():
                try:
                    if not self._store.renew(held.names, token):
                        self.forget(token)  # voided; what its load brings is refused
                except (*UNAVAILABLE, RuntimeError) as error:
                    logger.warning("the lease of %s was not renewed: %s", held.names[0], error)
            with self._lock:
                if not self._held and not self._orphaned:
                    self._thread = None  # under the lock in which another would see that there is one
                    return

    def _still_orphaned(self) -> list[tuple[str, _Orphaned]]:
        """Until they have run out: the server may carry out the look after we have given its lease back."""
        now = time.monotonic()
        with self._lock:
            self._orphaned = {token: one for token, one in self._orphaned.items() if now < one.until}
            return list(self._orphaned.items())

    def _due(self) -> list[tuple[str, _Held]]:
        """Those that were held a round ago already: most loads are done before their first."""
        now = time.monotonic()
        with self._lock:
            due = [(token, held) for token, held in self._held.items() if held.seen and now < held.until]
            self._held = {token: held._replace(seen=True) for token, held in self._held.items()}
        return due
