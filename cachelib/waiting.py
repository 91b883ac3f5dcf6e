"""Waiting for another process's load: woken by the one who fills, without a command in between.

A thread blocks in Redis (BLPOP on a list that is this load's alone); other threads of its process wait for it, see
``flights.py``. Whoever comes back looks again: being woken is a hint, never a promise that the value is there. A filler
that died wakes nobody, so no one waits for longer than a second before looking.
"""

from threading import Event

from . import keys as key_names
from .connections import UNAVAILABLE, Connections

_LOOK_AGAIN_S = 1.0
_PAUSE_S = 0.05


def wait_for_load(redis: Connections, name: str, holder: str, most_s: float) -> None:
    """Wait until the load of an entry that has this token ends, or ``most_s`` or a second has passed."""
    seconds = max(0.001, min(most_s, _LOOK_AGAIN_S))
    try:
        redis.waiting.execute_command("BLPOP", key_names.wake(name, holder), f"{seconds:.3f}")
    except UNAVAILABLE:  # away, or it forbids waiting: the look that follows will tell, but must not follow at once
        Event().wait(min(seconds, _PAUSE_S))
