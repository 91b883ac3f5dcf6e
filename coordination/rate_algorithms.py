"""How each kind of limit counts, as models that say what ``lua/_rate.lua`` does in Redis. Pure.

They are written for a reader and not for speed: the scripts are tested against them, and they against the bound. A
model holds what is stored for one caller under one limit. All times are whole microseconds of one clock.

Every model keeps three rules. A cost fits at ``earliest`` and not a microsecond before. Who is told a later time (a
reservation) is charged at that time, and nobody who asks after is admitted before it. A refund gives back no more than
would be free had the call never been charged.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from typing import Protocol

from .rate_limit import RateLimit

Marks = tuple[int, int]
"""By which a charge can be taken back."""


class Model(Protocol):
    """What is stored for one caller under one limit; the limit may be another at each call, of the same kind."""

    def earliest(self, limit: RateLimit, now_us: int, cost: int) -> int:
        """When a cost fits: now, or the first microsecond at which it does."""

    def charge(self, limit: RateLimit, now_us: int, cost: int, start_us: int) -> Marks:
        """Charge a call that begins at ``start_us``, which is not before ``earliest``."""

    def left(self, limit: RateLimit, now_us: int) -> Marks:
        """How many calls of cost 1 would be admitted now, and how long until all that was charged is paid off."""

    def refund(self, limit: RateLimit, now_us: int, cost: int, marks: Marks) -> None:
        """Take a charge back, as far as that is safe."""


@dataclass
class Smooth:
    """GCRA. One time says when all that was admitted is paid off at the steady rate."""

    paid_us: Fraction = Fraction(0)
    parts: int = 1
    """Of a microsecond, in which ``paid_us`` is told."""
    given_us: int = 0
    """How much was ever given back."""
    highest_us: int = 0
    """The latest ``paid_us`` that anybody was told; 0 while nothing was given back or reserved."""
    lowest_us: int = 0
    """Below this ``paid_us`` must not fall: reserved starts do not move when what was before them is given back."""
    reserved_us: int = 0
    """``paid_us`` and ``given_us`` together, at the last reservation: what was charged since then has a higher sum."""

    def earliest(self, limit: RateLimit, now_us: int, cost: int) -> int:
        return max(now_us, ceil(self._paid(limit, now_us) - (limit.burst - cost) * _interval(limit)))

    def charge(self, limit: RateLimit, now_us: int, cost: int, start_us: int) -> Marks:
        paid, price = self._paid(limit, now_us), cost * _interval(limit)
        if start_us > now_us or self.lowest_us > now_us:
            self.lowest_us = max(self.lowest_us, start_us) + ceil(price)
            self.highest_us = max(self.highest_us, floor(paid))
        self._store(limit, max(paid, Fraction(start_us)) + price)
        if start_us > now_us:
            self.reserved_us = floor(self.paid_us) + self.given_us
        return floor(self.paid_us), self.given_us

    def left(self, limit: RateLimit, now_us: int) -> Marks:
        ahead = self._paid(limit, now_us) - now_us
        return max(0, floor(limit.burst - ahead / _interval(limit))), ceil(ahead)

    def refund(self, limit: RateLimit, now_us: int, cost: int, marks: Marks) -> None:
        paid = self._paid(limit, now_us)
        promised_us, given_us = marks
        # What was given back since may have been before this call, and then this one is paid off earlier by as much.
        room_us = promised_us - max(0, self.given_us - given_us) - now_us
        if room_us <= 0 or floor(paid) <= now_us:
            return
        back, lowest_us = min(cost * _interval(limit), Fraction(room_us)), self.lowest_us
        if promised_us + given_us >= self.reserved_us:  # no reservation came after it, so it is in all of ``lowest_us``
            lowest_us = max(0, lowest_us - floor(back))
        if paid - back < lowest_us and floor(paid) < lowest_us:
            return
        self.lowest_us = lowest_us
        self.highest_us = max(self.highest_us, floor(paid) + 1)
        self.given_us += ceil(back)
        self._store(limit, max(paid - back, Fraction(self.lowest_us), Fraction(now_us)))

    def _paid(self, limit: RateLimit, now_us: int) -> Fraction:
        if self.highest_us <= now_us:
            self.given_us = self.highest_us = self.lowest_us = self.reserved_us = 0
        same = self.parts == limit.pace[0]
        return max(self.paid_us if same else Fraction(ceil(self.paid_us)), Fraction(now_us))

    def _store(self, limit: RateLimit, paid: Fraction) -> None:
        self.paid_us, self.parts = paid, limit.pace[0]
        if self.highest_us:
            self.highest_us = max(self.highest_us, ceil(paid))


@dataclass
class Log:
    """The times of the last calls, oldest first: as many as the largest count that the limit has had."""

    times_us: list[int] = field(default_factory=list)
    capacity: int = 0
    last_us: int = 0
    """The last time that was ever charged, be it given back."""

    def earliest(self, limit: RateLimit, now_us: int, cost: int) -> int:
        in_the_way = len(self.times_us) + cost - limit.count
        oldest_us = self.times_us[in_the_way - 1] if in_the_way > 0 else 0
        return max(now_us, self.last_us, oldest_us + limit.period_us)

    def charge(self, limit: RateLimit, now_us: int, cost: int, start_us: int) -> Marks:  # noqa: ARG002
        self.capacity = max(self.capacity, limit.count)
        self.times_us = [*self.times_us, *[start_us] * cost][-self.capacity :]
        self.last_us = start_us
        return start_us, 0

    def left(self, limit: RateLimit, now_us: int) -> Marks:
        reset_us = max(0, self.last_us + limit.period_us - now_us)
        counting = sum(time_us + limit.period_us > now_us for time_us in self.times_us)
        return (0 if self.last_us > now_us else max(0, limit.count - counting)), reset_us

    def refund(self, limit: RateLimit, now_us: int, cost: int, marks: Marks) -> None:
        now_us = max(now_us, self.last_us)  # what is over by the last reservation has been forgotten for it
        if marks[0] + limit.period_us > now_us:
            over = [time_us for time_us in self.times_us if time_us + limit.period_us <= now_us]
            self.times_us = self.times_us[len(over) + cost :]


@dataclass
class Buckets:
    """How many came in each stretch of time; the oldest that counts is partly over, and counts in full."""

    span_us: int = 0
    newest: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    """By number of the stretch, since the clock began."""

    def earliest(self, limit: RateLimit, now_us: int, cost: int) -> int:
        newest, counts = self._now(limit, now_us)
        span_us = _span_us(limit)
        at_us, total = max(now_us, newest * span_us), sum(counts.values())
        for number in sorted(counts):
            if total + cost <= limit.count:
                break
            total -= counts[number]
            at_us = (number + limit.buckets + 1) * span_us
        return at_us

    def charge(self, limit: RateLimit, now_us: int, cost: int, start_us: int) -> Marks:
        newest, counts = self._now(limit, now_us)
        newest = max(newest, start_us // _span_us(limit))
        counts[newest] = counts.get(newest, 0) + cost
        self._store(limit, newest, counts)
        return self.newest, self.span_us

    def left(self, limit: RateLimit, now_us: int) -> Marks:
        newest, counts = self._now(limit, now_us)
        reset_us = (max(counts) + limit.buckets + 1) * _span_us(limit) - now_us if counts else 0
        return (0 if newest * _span_us(limit) > now_us else max(0, limit.count - sum(counts.values()))), reset_us

    def refund(self, limit: RateLimit, now_us: int, cost: int, marks: Marks) -> None:
        newest, counts = self._now(limit, now_us)
        number, span_us = marks
        if span_us == _span_us(limit) and number in counts:
            counts[number] = max(0, counts[number] - cost)
            self._store(limit, newest, counts)

    def _now(self, limit: RateLimit, now_us: int) -> tuple[int, dict[int, int]]:
        """What counts now, and where the next one belongs."""
        span_us, newest, counts = _span_us(limit), self.newest, self.counts
        if self.span_us not in (0, span_us):  # all go where the latest of them may have been
            last_us = (newest + 1) * self.span_us - 1 if newest * self.span_us > now_us else now_us
            over = (newest + 1) * self.span_us + limit.buckets * span_us <= now_us
            newest, counts = last_us // span_us, {last_us // span_us: 0 if over else sum(counts.values())}
        newest = max(newest, now_us // span_us)
        return newest, {n: count for n, count in counts.items() if count and n >= newest - limit.buckets}

    def _store(self, limit: RateLimit, newest: int, counts: dict[int, int]) -> None:
        self.span_us, self.newest = _span_us(limit), newest
        self.counts = {n: count for n, count in counts.items() if count and n >= newest - limit.buckets}


@dataclass
class Window:
    """How many came in the window that is open: one of the clock's, or one that the first call opened."""

    begin_us: int | None = None
    used: int = 0

    def earliest(self, limit: RateLimit, now_us: int, cost: int) -> int:
        begin_us, used = self._now(limit, now_us)
        if used + cost <= limit.count:
            return max(now_us, begin_us)
        return _begin_us(limit, begin_us) + limit.period_us

    def charge(self, limit: RateLimit, now_us: int, cost: int, start_us: int) -> Marks:
        begin_us, used = self._now(limit, now_us)
        if limit.kind == "w":
            if used == 0 or start_us >= begin_us + limit.period_us:
                begin_us, used = start_us, 0
        elif _begin_us(limit, start_us) > begin_us:
            begin_us, used = _begin_us(limit, start_us), 0
        self.begin_us, self.used = begin_us, used + cost
        return begin_us, 0

    def left(self, limit: RateLimit, now_us: int) -> Marks:
        begin_us, used = self._now(limit, now_us)
        reset_us = _begin_us(limit, begin_us) + limit.period_us - now_us if used else 0
        return (0 if begin_us > now_us else max(0, limit.count - used)), reset_us

    def refund(self, limit: RateLimit, now_us: int, cost: int, marks: Marks) -> None:
        begin_us, used = self._now(limit, now_us)
        if used and begin_us == marks[0]:
            self.begin_us, self.used = begin_us, max(0, used - cost)

    def _now(self, limit: RateLimit, now_us: int) -> tuple[int, int]:
        begin_us = _begin_us(limit, now_us)
        if self.begin_us is None or self.begin_us <= begin_us - limit.period_us:
            return begin_us, 0
        return (self.begin_us if limit.kind == "w" else max(begin_us, self.begin_us)), self.used


@dataclass
class Permits:
    """Who is there, and until when at the latest. A call takes one, whatever it costs."""

    ends_us: list[int] = field(default_factory=list)

    def earliest(self, limit: RateLimit, now_us: int, cost: int) -> int:  # noqa: ARG002
        ends_us = self._now(now_us)
        over = len(ends_us) - limit.count
        return now_us if over < 0 else ends_us[over]

    def charge(self, limit: RateLimit, now_us: int, cost: int, start_us: int) -> Marks:  # noqa: ARG002
        self.ends_us = sorted([*self._now(now_us), now_us + limit.period_us])
        return 0, 0

    def left(self, limit: RateLimit, now_us: int) -> Marks:
        ends_us = self._now(now_us)
        return max(0, limit.count - len(ends_us)), max((end_us - now_us for end_us in ends_us), default=0)

    def refund(self, limit: RateLimit, now_us: int, cost: int, marks: Marks) -> None:
        """Not modelled: a permit is given back by its name."""

    def _now(self, now_us: int) -> list[int]:
        return [end_us for end_us in self.ends_us if end_us > now_us]


MODELS: dict[str, type[Model]] = {"g": Smooth, "l": Log, "b": Buckets, "f": Window, "w": Window, "c": Permits}


@dataclass
class Answer:
    """What ``lua/rate_hit.lua`` returns."""

    refusing: int
    wait_us: int
    tightest: int
    remaining: int
    reset_us: int
    marks: list[Marks]


class Caller:
    """One caller under several limits: ``lua/rate_hit.lua`` and ``lua/rate_refund.lua`` as a model."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}

    def ask(self, limits: tuple[RateLimit, ...], now_us: int, cost: int, within_us: int = 0) -> Answer:
        """Charge a call to all limits, at the earliest time that suits all, if that is within so many microseconds."""
        waits = [self._of(limit).earliest(limit, now_us, _price(limit, cost)) - now_us for limit in limits]
        wait_us = max(waits)
        if wait_us > within_us:
            refusing = waits.index(wait_us)
            left = self._of(limits[refusing]).left(limits[refusing], now_us)
            return Answer(refusing + 1, wait_us, refusing + 1, *left, [])
        marks = [self._of(limit).charge(limit, now_us, _price(limit, cost), now_us + wait_us) for limit in limits]
        lefts = [self._of(limit).left(limit, now_us) for limit in limits]
        tightest = min(range(len(limits)), key=lambda i: lefts[i][0])
        return Answer(0, wait_us, tightest + 1, *lefts[tightest], marks)

    def owe(self, limits: tuple[RateLimit, ...], now_us: int, cost: int) -> None:
        """Charge what has been spent, to each limit as soon as it admits it."""
        for limit in limits:
            left = cost if limit.kind != "c" and not limit.by_call else 0
            while left:
                part = min(left, limit.arguments()[1])
                self._of(limit).charge(limit, now_us, part, self._of(limit).earliest(limit, now_us, part))
                left -= part

    def refund(self, limits: tuple[RateLimit, ...], now_us: int, cost: int, marks: list[Marks]) -> None:
        """Take a charge back."""
        for limit, mark in zip(limits, marks, strict=True):
            self._of(limit).refund(limit, now_us, _price(limit, cost), mark)

    def _of(self, limit: RateLimit) -> Model:
        return self.models.setdefault(limit.part, MODELS[limit.kind]())


def _price(limit: RateLimit, cost: int) -> int:
    return 1 if limit.by_call else cost


def _interval(limit: RateLimit) -> Fraction:
    count, period_us = limit.pace
    return Fraction(period_us, count)


def _span_us(limit: RateLimit) -> int:
    return -(-limit.period_us // limit.buckets)


def _begin_us(limit: RateLimit, at_us: int) -> int:
    """When the window begins that a time is in; of a window from the first call, the time itself."""
    if limit.kind == "w":
        return at_us
    return (at_us - limit.offset_us) // limit.period_us * limit.period_us + limit.offset_us
