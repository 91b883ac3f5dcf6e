"""Who waits for a task's rate limit in one worker, and what the worker does next. Pure.

A line has *messages*, which wait, and *slots*: times that are reserved in Redis, which are nobody else's. The slots are
the line's and not of single messages: whoever is first when a slot comes takes it. So a message that leaves the line
takes none with it, and one call to Redis per message is enough.

The invariant: while there is a limit, nothing leaves the line for the pool but at a slot that has come, and each slot
is used once. And nothing stays longer than the broker lets a delivery be unacknowledged: what cannot start in time is
given back to the broker. Times are seconds of the worker's own monotonic clock.
"""

import math
import re
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, TypeVar

from ..coordination.rate_limit import RateLimit

AHEAD_S = 0.25
"""Slots are reserved so far ahead, that a worker that is busy for a moment loses none. After a standstill it starts at
most what is due in that time at once."""

FORGET = "default"
"""Instead of a rate: whatever the code says."""

_M = TypeVar("_M")
_S = TypeVar("_S")
_RATE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,18})?)(?:/([smh]))?", re.ASCII)


def read_rate(value: object) -> str | None:
    """A rate as Celery's ``rate_limit`` takes it, in one form: ``"10/s"``. ``None`` where there is no limit.

    Raises ``ValueError`` for what is none.
    """
    if value is None or value == "":
        return None
    text = value
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:.12f}" if isinstance(value, float) else f"{value}"
    found = _RATE.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"rate_limit {value!r} is none: write '10/s', '100/m' or '5/h', or 0 for no limit")
    if Fraction(found[1]) == 0 and value != 0 and not isinstance(value, str):
        raise ValueError(f"rate_limit {value!r} is too small to be told from 0, which is no limit; write it per hour")
    if Fraction(found[1]) == 0:
        return None
    number = found[1].rstrip("0").rstrip(".") if "." in found[1] else found[1]
    rate = f"{number}/{found[2] or 's'}"
    as_limit(rate)
    return rate


def as_limit(rate: str) -> RateLimit:
    """What ``read_rate`` has read, as a limit of one at a time: Celery's "10/s" is one every 100 ms.

    The state of each rate is its own: who changes "1/h" to "100/s" does not wait for the hour that was begun.
    """
    number, _, unit = rate.partition("/")
    exact = Fraction(number).limit_denominator(1_000_000)
    return RateLimit(f"{exact.numerator}/{exact.denominator}{unit}", burst=1, name=f"celery {rate}")


@dataclass(frozen=True, slots=True)
class Start(Generic[_M]):
    """This message goes to the pool now."""

    message: _M


@dataclass(frozen=True, slots=True)
class GiveBack(Generic[_M]):
    """This message goes back to the broker, which would soon think it lost."""

    message: _M


@dataclass(frozen=True, slots=True)
class Reserve:
    """Ask Redis for the next slot, if it comes within so many seconds; then say ``reserved`` or ``refused``."""

    within_s: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again in so many seconds."""

    delay_s: float


class Line(Generic[_M, _S]):
    """The messages of one task in one worker that wait for its limit. ``limited`` says whether it has one.

    Arguments:
        keep_s: for how long a message may be here; infinity where the broker does not ask for it.
    """

    def __init__(self, keep_s: float) -> None:
        self.keep_s = keep_s
        self.limited = True
        self._messages: deque[tuple[float, _M]] = deque()
        self._guests: deque[tuple[float, _M]] = deque()
        self._slots: deque[tuple[float, _S]] = deque()
        self._ask_at_s = -math.inf

    def __len__(self) -> int:
        return len(self._messages) + len(self._guests)

    def add(self, message: _M, now_s: float) -> None:
        """A message has come from the broker just now."""
        self._messages.append((now_s + self.keep_s, message))

    def add_guest(self, message: _M, now_s: float, keep_s: float) -> None:
        """One of which the worker does not know how long it has been here. It starts if nobody else waits."""
        self._guests.append((now_s + min(keep_s, self.keep_s), message))

    def next(self, now_s: float) -> Start[_M] | GiveBack[_M] | Reserve | Wait | None:
        """What is to be done now; done, ask again, until it is to wait or nobody is here."""
        if not len(self):
            return None
        if not self.limited:
            return Start(self._first().popleft()[1])
        if self._slots and self._slots[0][0] <= now_s:
            self._slots.popleft()
            return Start(self._first().popleft()[1])
        for queue in (self._messages, self._guests):
            if queue and queue[0][0] <= now_s:
                return GiveBack(queue.popleft()[1])
        wants = len(self._slots) < len(self) and (not self._slots or self._slots[-1][0] < now_s + AHEAD_S)
        if wants and self._ask_at_s <= now_s:
            return Reserve(self.keep_s)
        at_s = min(queue[0][0] for queue in (self._messages, self._guests) if queue)
        if self._slots:
            at_s = min(at_s, self._slots[0][0])
        elif wants:
            at_s = min(at_s, self._ask_at_s)
        return Wait(at_s - now_s)

    def reserved(self, start_s: float, slot: _S) -> None:
        """Redis has reserved a slot. ``start_s``: when it comes."""
        self._slots.append((start_s, slot))

    def refused(self, until_s: float) -> None:
        """Redis has reserved none, or could not be asked: not to be asked again before."""
        self._ask_at_s = until_s

    def heard(self) -> None:
        """The limit has changed: what was known of the old one does not count any more."""
        self._ask_at_s = -math.inf

    def take_slots(self, now_s: float) -> list[_S]:
        """Give all slots up. Those that were still to come, the latest first: they are to be given back."""
        slots = [slot for start_s, slot in reversed(self._slots) if start_s > now_s]
        self._slots.clear()
        return slots

    def clear(self) -> None:
        """Forget all messages: the broker delivers them anew."""
        self._messages.clear()
        self._guests.clear()

    def _first(self) -> deque[tuple[float, _M]]:
        return self._messages or self._guests
