"""Loads under way in this process, so that its threads ask Redis, and the loader, once.

A thread that misses opens a flight; others that miss the same key while it is open wait for it, without a command. The
invariant: **a flight is closed to newcomers before the step that decides what it brings** (the fill that is accepted,
or the look that finds a fresh value). So whoever joined did so before that step, and every invalidation that had
returned when it joined was known to Redis at that step. A flight that brings nothing sends those who joined to look for
themselves.
"""

from collections.abc import Callable
from threading import Event, Lock
from typing import Any

from .forks import renew_after_fork


class Flight:
    """One load, or one wait for another process's load."""

    __slots__ = ("_done", "result")

    def __init__(self) -> None:
        self._done = Event()
        self.result: Callable[[Any], Any] | None = None
        """Makes the value, for each who joined one of its own, as the type given. None: it brought nothing."""

    def join(self, most_s: float) -> Callable[[Any], Any] | None:
        """Wait for it. Returns what makes the value, if it brought one in time."""
        self._done.wait(most_s)
        return self.result

    def land(self, result: Callable[[Any], Any] | None) -> None:
        """Tell those who joined."""
        self.result = result
        self._done.set()

    def end(self) -> None:
        """Tell those who joined, unless they have been told."""
        self._done.set()


class Flights:
    """The open flights, by key. Threads may share it."""

    def __init__(self) -> None:
        self._open: dict[str, Flight] = {}
        self._lock = Lock()
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"<Flights [{len(self._open)} open]>"

    def get(self, key: str) -> Flight | None:
        """The open flight of a key."""
        return self._open.get(key)

    def open(self, key: str) -> Flight:
        """A flight that others may join, unless there is one already: then one that nobody will."""
        flight = Flight()
        with self._lock:
            self._open.setdefault(key, flight)
        return flight

    def close(self, key: str, flight: Flight) -> None:
        """Let nobody join any more."""
        with self._lock:
            if self._open.get(key) is flight:
                del self._open[key]

    def renew_after_fork(self) -> None:
        """Forget the parent's flights: the threads that would end them are not here."""
        self._lock = Lock()
        self._open = {}
