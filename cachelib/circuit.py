"""The shell of the circuit breaker: a clock, a lock, a log line when it opens and one when it closes.

``breaker.py`` decides. While a circuit is open a command fails at once, and nothing is sent.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    MaxConnectionsError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .breaker import Breaker, Change, Pass, State
from .forks import renew_after_fork

logger = logging.getLogger(__name__)

UNAVAILABLE = (RedisError, OSError, RedisClusterException)
"""What redis-py raises when the server is away or hangs, the connection broke, or the server refuses: it has no memory
left, is a replica, cannot persist, is loading; and what Petiole raises while a circuit is open."""

LOST = (RedisConnectionError, RedisTimeoutError, OSError)
"""No answer came."""


class CircuitOpen(RedisConnectionError):
    """The server did not answer several times in a row, and is left alone for a while. Nothing was sent."""


class Circuit:
    """A breaker for one server, shared by the threads of a process."""

    def __init__(self, address: str, breaker: Breaker) -> None:
        self.address = address
        self.troubled = False
        """Whether there is anything to ask or to tell: while it is ``False``, a command costs one look at it."""
        self._breaker = breaker
        self._last_error = ""
        self._lock = threading.RLock()  # a signal handler may come in between
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"<Circuit {self.address} [{self.state}]>"

    @property
    def state(self) -> State:
        """How it stands at this moment."""
        with self._lock:
            return self._breaker.state(_now_ms())

    def ask(self) -> Pass:
        """May a command go through? Raises ``CircuitOpen`` when it may not."""
        with self._lock:
            passed = self._breaker.ask(_now_ms())
        if passed is Pass.REFUSED:
            raise CircuitOpen(
                f"Redis at {self.address} did not answer several times in a row (last: {self._last_error}); "
                "it is left alone, and asked again within seconds"
            )
        return passed

    def answered(self, passed: Pass) -> None:
        """The server answered."""
        with self._lock:
            change = self._breaker.succeeded(passed)
            self.troubled = self._breaker.troubled
        if change is Change.CLOSED:
            logger.warning("Redis at %s answers again", self.address)

    def ended(self, passed: Pass, error: BaseException) -> None:
        """A command has ended with an error."""
        if not is_no_answer(error):
            if isinstance(error, RedisError):
                if self.troubled:
                    self.answered(passed)
            elif passed is Pass.PROBE:
                with self._lock:
                    self._breaker.broke_off(passed)
            return
        with self._lock:
            self._last_error = f"{type(error).__name__}: {error}"
            change = self._breaker.failed(passed, _now_ms())
            self.troubled = True
        if change is Change.OPENED:
            logger.warning("Redis at %s does not answer (%s); it is left alone for a while", self.address, error)

    def renew_after_fork(self) -> None:
        """A child looks for itself."""
        self._lock = threading.RLock()
        self._breaker = replace(self._breaker)  # a new one, with the same numbers
        self.troubled = False


class Circuits:
    """The circuits of the servers that one ``Connections`` reaches: one, or one for each node of a cluster."""

    def __init__(self, breaker: Callable[[], Breaker]) -> None:
        self._breaker = breaker
        self._circuits: dict[str, Circuit] = {}

    def __repr__(self) -> str:
        return f"<Circuits [{self.state}]>"

    @property
    def state(self) -> State:
        """``"closed"``, ``"open"`` or ``"half-open"``; of several, that of the worst."""
        states = {circuit.state for circuit in list(self._circuits.values())}
        return "open" if "open" in states else "half-open" if "half-open" in states else "closed"

    def of(self, address: str) -> Circuit:
        """The circuit of a server."""
        known = self._circuits.get(address)
        return known or self._circuits.setdefault(address, Circuit(address, self._breaker()))

    def keep(self, addresses: Iterable[str]) -> None:
        """Forget the circuits of all others."""
        for gone in self._circuits.keys() - set(addresses):
            self._circuits.pop(gone, None)


def is_no_answer(error: BaseException) -> bool:
    """Whether a server did not answer, or answered that it can do nothing yet: it loads, or a script keeps it busy.

    A wrong password or a command that does not fit is an answer.
    """
    if isinstance(error, ResponseError):
        return str(error).startswith("BUSY ")
    return isinstance(error, LOST) and not isinstance(
        error, AuthenticationError | AuthorizationError | MaxConnectionsError | CircuitOpen
    )


def _now_ms() -> float:
    return time.monotonic() * 1_000
