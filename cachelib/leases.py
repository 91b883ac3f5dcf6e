"""Leases that last as long as their loads, and no longer than their process.

A lease is short, so that a holder that dies is soon succeeded; a load may be long. One thread per cache and process
renews, every third of a lease, those that are held by then. It is started by the first load, and ends with the
process. A load that was voided meanwhile is not renewed, so its value is refused as ever.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread

from .connections import UNAVAILABLE, Connections
from .forks import renew_after_fork
from .scripts import load

logger = logging.getLogger(__name__)

_RENEW = load(__package__, "lease_renew", bool)


class LeaseKeeper:
    """Renews what this process holds.

    Non-promise: code that holds the interpreter lock for a whole lease (a long call into C) keeps the thread from
    running; then the load's value is not stored, and somebody else may load too.
    """

    def __init__(self, redis: Connections, lease_ms: int) -> None:
        self._redis = redis
        self._lease_ms = lease_ms
        self._held: dict[str, tuple[str, bool]] = {}  # token -> lease, whether it was there at the last round
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
    def keeping(self, lease: str, token: str) -> Iterator[None]:
        """Renew a lease while the block runs."""
        with self._lock:
            self._held[token] = (lease, False)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="petiole-leases", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._held.pop(token, None)

    def _run(self) -> None:
        pause = Event()
        while not self._redis.closed:
            pause.wait(self._lease_ms / 3_000)
            for lease, token in self._due():
                try:
                    _RENEW(self._redis.coordination, lease=lease, token=token, lease_ms=self._lease_ms)
                except (*UNAVAILABLE, RuntimeError) as error:  # RuntimeError: closed between the two lines
                    logger.warning("lease %s was not renewed: %s", lease, error)

    def _due(self) -> list[tuple[str, str]]:
        """Those that were held a round ago already: most loads are done before their first."""
        with self._lock:
            due = [(lease, token) for token, (lease, seen) in self._held.items() if seen]
            self._held = {token: (lease, True) for token, (lease, _) in self._held.items()}
        return due
