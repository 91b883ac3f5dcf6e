"""What a task that was admitted may ask while it runs: its holds, and what it has cost.

In a worker the leases are renewed by its main process, so nothing is made here until it is asked for. Where there is no
such process (an eager run, a direct call) the holds are made at once, and renewed in this one.
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ..cachelib.circuit import UNAVAILABLE
from ..cachelib.counters import Counters
from ..cachelib.durations import Duration
from .errors import LockLost
from .gates import GateCall
from .hold import Hold, Terms, valid_for_s
from .keeper import keeper_of
from .parking import ParkingLot, Running
from .rate_limit import Allowed, RateLimit, Receipt
from .rate_limiter import MOST_OWED, RateLimiter
from .turn_store import TurnStore, renew

logger = logging.getLogger(__name__)


class TaskHold(Hold):
    """A hold that the main process of the worker renews too: it is lost when the server says so, or does not answer.

    A task that keeps the interpreter busy in C code renews nothing, and finds its deadline passed when it comes back.
    So it asks before it believes that: as long as the server knows the very hold, nobody else can have had it.
    """

    @property
    def lost(self) -> bool:
        if self._reason is None and not self._released and time.monotonic() >= self._deadline:
            self._ask_again()
        return super().lost

    def _ask_again(self) -> None:
        sent, lease_ms = time.monotonic(), self._terms.lease_ms
        try:
            (held,) = renew(self.store.redis, [(self.store.name, self.token, lease_ms)])
        except (*UNAVAILABLE, RuntimeError):
            return
        if held and self._reason is None:
            self.renewed(sent + valid_for_s(lease_ms), lease_ms)


class Admitted:
    """Of a running task: ``task.admission``.

    >>> @coordinated_task(app=app, bind=True, lock="account:{account_id}", rate=Rate("90000/m", cost="{tokens}"))
    ... def charge(self, account_id, tokens):
    ...     with engine.begin() as connection:
    ...         self.admission.hold.guard(connection)
    ...     self.admission.settle(answer.usage.total_tokens)
    """

    def __init__(self, lot: ParkingLot, running: Running) -> None:
        self._lot = lot
        self._running = running
        self._holds: dict[str, Hold] = {}

    def __repr__(self) -> str:
        return f"<Admitted {self._running.attempt.label} {', '.join(gate.shown for gate in self._running.gates)}>"

    @property
    def hold(self) -> Hold:
        """The first lock, or else the first permit, that the task holds: ``fence``, ``lost``, ``guard``.

        Raises ``LookupError`` when it holds none.
        """
        permits = self._permits
        if not permits:
            raise LookupError(f"{self._running.attempt.label} holds nothing: it has no lock= and no concurrency=")
        locks = [gate for gate in permits if gate.lock is not None and gate.lock[0] == "lock"]
        return self._hold_of((locks or permits)[0])

    @property
    def holds(self) -> Mapping[str, Hold]:
        """All that it holds, by what the task declares, such as ``"account:{account_id}"``.

        What has no template, or shares it, is there as what people are shown: ``"concurrency 'shop.charge' (5)"``.
        """
        permits = self._permits
        written = Counter(gate.template for gate in permits)
        return {
            gate.template if gate.template and written[gate.template] == 1 else gate.shown: self._hold_of(gate)
            for gate in permits
        }

    @property
    def lost(self) -> bool:
        """Whether somebody else may hold by now what it held when it began."""
        return any(hold.lost for hold in self.every_hold())

    def raise_if_lost(self) -> None:
        """Raise ``LockLost`` when somebody else may hold what it held when it began."""
        for hold in self.every_hold():
            hold.raise_if_lost()

    def settle(self, actual_cost: int, key: str | None = None) -> None:
        """Replace the estimate that was charged by what the task has cost: less is given back, more is owed.

        Arguments:
            actual_cost: 0 or more.
            key: the key of the rate that is meant, as the task declares it; of several with that key, those whose
                ``cost`` is given. Default: all rates whose ``cost`` is given.

        Raises ``LookupError`` when there is no such rate, and as ``RateLimiter.settle``; then nothing was settled,
        except where Redis did not answer for one of several.
        """
        for gate, limit in self._to_settle(actual_cost, key):
            given = self._running.given[self._running.gates.index(gate)]
            receipt = Receipt(gate.limiter, gate.caller, gate.amount, (limit,), list(given), "", None)
            limiter = RateLimiter(self._lot.redis, gate.limiter, [limit])
            limiter.settle(Allowed(0, 0.0, limit, (limit,), receipt), actual_cost)

    def block(self, after: Duration, key: str | None) -> bool:
        """Pause rates of the task for all; see ``RateLimited``. Whether there was one to pause."""
        rates = [gate for gate in self._running.gates if gate.limit is not None]
        if key is not None:
            keys = ", ".join(repr(gate.template) for gate in rates)
            rates = [gate for gate in rates if gate.template == key]
            if not rates:
                known = f"the keys of its rates are {keys}" if keys else "it has no rate"
                logger.warning("%s: RateLimited(key=%r) pauses nothing: %s", self._running.attempt.label, key, known)
        elif any(gate.template for gate in rates):
            rates = [gate for gate in rates if gate.template]
        for gate in rates:
            if gate.limit is not None:
                RateLimiter(self._lot.redis, gate.limiter, [gate.limit]).block(gate.caller, after)
        return bool(rates)

    # For the task's base class

    def keep(self) -> None:
        """Make the holds, and have them renewed by this process."""
        for gate in self._running.gates:
            if gate.lock is not None:
                self._hold_of(gate)

    def run(self, body: Callable[[], Any]) -> Any:
        """Run the task's body; a lock that it holds and waits for is one it would wait for without end."""
        frames = keeper_of(self._lot.redis).running_under
        locks = [gate.state for gate in self._running.gates if gate.lock is not None and gate.lock[0] == "lock"]
        for state in locks:
            frames[state] = sys._getframe()
        try:
            return body()
        finally:
            for state in locks:
                frames.pop(state, None)

    def end(self, verdict: str = "-", *, known_ms: int = 0, over: bool = True, retried_ms: int = 0) -> bool:
        """Give all back; see ``ParkingLot.end``. Whether it was held until now.

        When Redis does not answer, it is given back when it does.
        """
        try:
            known = self._lot.end(self._running, verdict=verdict, known_ms=known_ms, over=over, retried_ms=retried_ms)
        except (*UNAVAILABLE, RuntimeError):
            self.keep()
            for hold in self._holds.values():
                hold.abandon()
            return False
        for hold in self._holds.values():
            hold.given_back()
        return known

    def every_hold(self) -> list[Hold]:
        """All that it holds, whatever it is called."""
        return [self._hold_of(gate) for gate in self._permits]

    @property
    def _permits(self) -> list[GateCall]:
        return [gate for gate in self._running.gates if gate.lock is not None]

    def _to_settle(self, actual_cost: int, key: str | None) -> list[tuple[GateCall, RateLimit]]:
        """The rates that are meant. Raises as ``settle``."""
        if type(actual_cost) is not int or actual_cost < 0:
            raise ValueError(f"actual_cost={actual_cost!r} must be a whole number, 0 or more")
        rates = [
            (gate, gate.limit)
            for gate in self._running.gates
            if gate.limit is not None and not gate.limit.by_call and key in (None, gate.template)
        ]
        if key is None or any(gate.costs for gate, _ in rates):
            rates = [(gate, limit) for gate, limit in rates if gate.costs]
        if not rates:
            which = 'whose cost is given; write rate=Rate("90000/m", cost=...)' if key is None else f"for {key!r}"
            raise LookupError(f"{self._running.attempt.label} has no rate {which}")
        for gate, limit in rates:
            if actual_cost - gate.amount > MOST_OWED * limit.burst:
                raise ValueError(
                    f"actual_cost={actual_cost} is more than {MOST_OWED * limit.burst} above the {gate.amount} that "
                    f"{gate.shown} was charged; is the unit right?"
                )
        return rates

    def _hold_of(self, gate: GateCall) -> Hold:
        hold = self._holds.get(gate.state)
        if hold is None and gate.lock is not None:
            place = self._running.gates.index(gate)
            fence, ends_us = self._running.given[place]
            store = TurnStore(self._lot.redis, *gate.lock, capacity=gate.count)
            left_ms = (ends_us - self._running.now_us) / 1_000
            hold = TaskHold(
                store, keeper_of(self._lot.redis), gate.shown, self._running.attempt.token, fence,
                self._running.sent + valid_for_s(left_ms), Terms(self._running.lease_ms), Counters(),
            )  # fmt: skip
            self._holds[gate.state] = hold
        if hold is None:
            raise LockLost(gate.shown, 0, "it is no permit")
        return hold
