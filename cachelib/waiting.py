"""Waiting for another's load: woken by the one who fills, one connection per key and process.

The first thread that waits for a load blocks in Redis (BLPOP on a list that is this load's alone); the others of
the process wait for that thread. Whoever comes back looks again: being woken is a hint, never a promise that the
value is there. A filler that died wakes nobody, so no one waits for longer than a second before looking.
"""

from contextlib import suppress
from threading import Event, Lock

from .connections import UNAVAILABLE, Connections
from .forks import renew_after_fork

_LOOK_AGAIN_S = 1.0


class Waiting:
    """The waits of one process."""

    def __init__(self, redis: Connections) -> None:
        self._redis = redis
        self._events: dict[str, Event] = {}
        self._lock = Lock()
        renew_after_fork(self)

    def renew_after_fork(self) -> None:
        """Forget the parent's waits: the threads that would end them are not here."""
        self._lock = Lock()
        self._events = {}

    def wait(self, wake: str, most_s: float) -> None:
        """Wait until the load that wakes by this list has ended, or ``most_s`` or a second has passed."""
        seconds = max(0.001, min(most_s, _LOOK_AGAIN_S))
        with self._lock:
            event = self._events.get(wake)
            first = event is None
            if event is None:
                event = self._events[wake] = Event()
        if not first:
            event.wait(seconds)
            return
        try:
            with suppress(*UNAVAILABLE):  # the look that follows will tell, and knows what to do without Redis
                self._redis.waiting.execute_command("BLPOP", wake, f"{seconds:.3f}")
        finally:
            with self._lock:
                self._events.pop(wake, None)
            event.set()
