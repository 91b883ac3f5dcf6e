"""A circuit breaker: after some failures in a row nobody waits for a server that does not answer.

PURE: time comes in as an argument and results are values; ``client.Circuit`` is the shell with the clock and the lock.

Closed, every call goes through. It opens when ``threshold`` calls in a row have failed over ``span_ms`` or longer: one
short pause of a server fails the calls of many threads at one moment, and is no outage. Open, no call goes through
until its time is over; then one does, the probe. A probe that succeeds closes it; each that fails doubles the open
time, up to ``longest_open_ms``. Only the results of probes count while it is not closed: what was sent before it
opened says nothing about now.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

State = Literal["closed", "open", "half-open"]


class Pass(Enum):
    """What a call may do."""

    CALL = "call"
    PROBE = "probe"
    """Go through alone, while all others are refused."""
    REFUSED = "refused"


class Change(Enum):
    """What a result changed."""

    NONE = "none"
    OPENED = "opened"
    STAYED_OPEN = "stayed open"
    CLOSED = "closed"


@dataclass
class Breaker:
    """Whether calls go through. Not safe to share between threads without a lock.

    Arguments:
        threshold: failures in a row that open it.
        span_ms: how far apart the first and the last of them are at least.
        open_ms: how long it stays open at first.
        longest_open_ms: how long it stays open at most, however many probes have failed.
        probe_ms: a probe that has no result for so long is taken for lost, and another may go.

    Raises ``ValueError`` for numbers that fit no breaker.
    """

    threshold: int = 5
    span_ms: int = 100
    open_ms: int = 500
    longest_open_ms: int = 10_000
    probe_ms: int = 1_000
    _failures: int = field(default=0, init=False, repr=False)
    _first_failure_ms: float = field(default=0, init=False, repr=False)
    _open_for_ms: int = field(default=0, init=False, repr=False)
    """0: closed."""
    _refused_until_ms: float = field(default=0, init=False, repr=False)
    """The end of the open time, or of the time that a probe is given."""
    _probing: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("threshold", 1), ("span_ms", 0), ("open_ms", 1), ("probe_ms", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} is too small for a breaker; give {least} or more")
        if self.longest_open_ms < self.open_ms:
            raise ValueError(
                f"longest_open_ms={self.longest_open_ms!r} is less than open_ms={self.open_ms!r}; give as much or more"
            )

    @property
    def troubled(self) -> bool:
        """Whether a success would change anything: calls have failed, or it is not closed."""
        return bool(self._failures)

    def state(self, now_ms: float) -> State:
        """Closed, open, or half-open: a probe may go, or is on its way."""
        if not self._open_for_ms:
            return "closed"
        return "half-open" if self._probing or now_ms >= self._refused_until_ms else "open"

    def ask(self, now_ms: float) -> Pass:
        """Whether a call may go through. Who got a pass tells its result."""
        if not self._open_for_ms:
            return Pass.CALL
        if now_ms < self._refused_until_ms:
            return Pass.REFUSED
        self._probing, self._refused_until_ms = True, now_ms + self.probe_ms
        return Pass.PROBE

    def succeeded(self, passed: Pass) -> Change:
        """A call was answered."""
        if self._open_for_ms and passed is not Pass.PROBE:
            return Change.NONE
        closes = self._open_for_ms > 0
        self._failures, self._open_for_ms, self._probing = 0, 0, False
        return Change.CLOSED if closes else Change.NONE

    def failed(self, passed: Pass, now_ms: float) -> Change:
        """A call was not answered."""
        if self._open_for_ms:
            if passed is not Pass.PROBE:
                return Change.NONE
            self._open(min(2 * self._open_for_ms, self.longest_open_ms), now_ms)
            return Change.STAYED_OPEN
        if not self._failures:
            self._first_failure_ms = now_ms
        self._failures += 1
        if self._failures < self.threshold or now_ms - self._first_failure_ms < self.span_ms:
            return Change.NONE
        self._open(self.open_ms, now_ms)
        return Change.OPENED

    def broke_off(self, passed: Pass) -> None:
        """A call has ended before its result was known; after a probe, another may go at once."""
        if self._open_for_ms and passed is Pass.PROBE:
            self._probing, self._refused_until_ms = False, 0

    def _open(self, for_ms: int, now_ms: float) -> None:
        self._open_for_ms, self._refused_until_ms, self._probing = for_ms, now_ms + for_ms, False
