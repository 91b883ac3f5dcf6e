"""Waiting for another's load: woken by the one who fills, one connection per key and process.

The first thread that waits for a key blocks in Redis (BLPOP); the others of this process wait for that
thread. Whoever comes back looks again: being woken is a hint, never a promise that the value is there. A
wake-up may be lost (the filler died), so nobody waits for longer than a second before looking.
"""

from threading import Event, Lock

from . import keys
from .connections import UNREACHABLE, Connections

_LOOK_AGAIN_S = 1.0


class Waiting:
    """The waits of one process."""

    def __init__(self, redis: Connections) -> None:
        self._redis = redis
        self._events: dict[str, Event] = {}
        self._lock = Lock()

    def wait(self, entry: str, most_s: float) -> None:
        """Wait until the load of ``entry`` ended, or ``most_s`` or a second has passed."""
        seconds = max(0.001, min(most_s, _LOOK_AGAIN_S))
        with self._lock:
            event = self._events.get(entry)
            first = event is None
            if event is None:
                event = self._events[entry] = Event()
        if not first:
            event.wait(seconds)
            return
        try:
            self._redis.blocking.execute_command("BLPOP", keys.wake(entry), f"{seconds:.3f}")
        except UNREACHABLE:
            pass  # the look that follows will tell, and knows what to do without Redis
        finally:
            with self._lock:
                self._events.pop(entry, None)
            event.set()
