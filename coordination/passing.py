"""How a task passes its gates, where its body would run: it runs, it is parked, or it ends with what was decided.

Everything happens inside of the task's own call, so whatever Celery does around it (chains, chords, callbacks, events,
time limits) sees a task like any other. Parking ends a delivery as ``Ignore`` does: acknowledged, no result, no retry.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from uuid import uuid4

from celery import Task
from celery.exceptions import Ignore, Reject, Retry

from ..cachelib import MISS
from ..cachelib.circuit import UNAVAILABLE
from ..cachelib.counters import Counters
from . import parked_messages
from .admitted import Admitted
from .errors import DuplicateTask, LimiterUnavailable, RateLimited, TaskRefused, TooManyParked
from .gates import GateCall
from .guarded import is_guarded
from .parking import (
    Admission,
    Attempt,
    Full,
    Parked,
    ParkingLot,
    Refused,
    Running,
    Stale,
    Verdict,
)

_LONGEST_WAIT_S = 60.0
"""So long a task that runs where it was called waits for its gates."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.05
_LATER_S = 5.0
_MOST_TRIES = 5
_KNOWN_MS = 3_600_000

_refused_lately: set[str] = set()
"""Names of tasks of which the last call that was asked for here was refused."""


class StandIn(Protocol):
    """What decides about calls instead of their gates; see ``petiole.testing``."""

    asks_redis: bool

    def __call__(self, passage: "Passage") -> Any:
        """The result of a call."""


stand_in: StandIn | None = None
"""Of all threads of this process, while a test has one."""


class TaskParked(Ignore):  # type: ignore[misc]  # which Celery does not type
    """Ends the delivery of a task that waits in Redis. Neither a failure nor a retry."""


class DeliveryDropped(Ignore):  # type: ignore[misc]
    """Ends a delivery for which another one stands."""


@dataclass(frozen=True, slots=True)
class Passage:
    """One call of a task on its way."""

    task: Task
    lot: ParkingLot
    gates: Sequence[GateCall]
    arguments: Sequence[Any]
    keywords: Mapping[str, Any]
    lease_ms: int
    counters: Counters
    body: Callable[[], Any]
    joined: Callable[[str], Any]
    """The result of the call that a verdict names, or ``MISS``."""
    verdict_of: Callable[[Any], str]
    """What those are told that wait to end with this result."""
    alone: bool = False
    """Whether the gate is only there so that others need not do the same: without Redis it is open."""

    def go(self) -> Any:
        """The result of the call."""
        return self.pass_gates() if stand_in is None else stand_in(self)

    def pass_gates(self) -> Any:
        """The result of the call, by what its gates say."""
        request = self.task.request
        if request.called_directly or request.is_eager:
            return self._wait_here()
        if is_guarded(self.lot.keys.namespace):
            return self._delivered()
        try:  # nobody in this worker would wake it: the task was declared after the worker had started
            return self._wait_here()
        except UNAVAILABLE as error:
            return self._without_redis(error)
        except TaskRefused as error:
            raise self._later(error, random.uniform(_LATER_S, 2 * _LATER_S)) from error

    # In a worker

    def _delivered(self) -> Any:
        request = self.task.request
        attempt = Attempt(request.id, request.retries or 0, parked_messages.generation_of(request), self.task.name)
        gates = list(self.gates)
        if self._is_redelivered and self._has_ended(attempt):
            return self._act_on(Stale())
        for _ in range(_MOST_TRIES):
            try:
                outcome = self._admit(attempt, gates)
            except UNAVAILABLE as error:
                return self._without_redis(error)
            if isinstance(outcome, Stale) and attempt.generation and self._was_lost(attempt):
                attempt = attempt._replace(generation=0)
                continue
            if not isinstance(outcome, Verdict):
                return self._act_on(outcome)
            if outcome.text == "d":
                self.counters.add("dropped")
                return None
            if outcome.text == "x":
                raise DeliveryDropped("it was revoked while it waited")
            value = self.joined(outcome.text)
            if value is not MISS:
                self.counters.add("joined")
                return value
            # What it waited for is gone: it runs for itself.
            attempt = attempt._replace(generation=0)
            gates = [gate for gate in gates if gate.kind != "c" or gate.policy != "j"]
        raise TaskRefused(self.task.name, "a verdict that changes", 0.0)

    def _has_ended(self, attempt: Attempt) -> bool:
        """Whether the broker delivers it again because it has not heard that it has ended."""
        try:
            return self.lot.has_ended(attempt.token)
        except UNAVAILABLE:
            return False

    def _was_lost(self, attempt: Attempt) -> bool:
        """Whether the broker delivers it again because the worker died that had it first."""
        return self._is_redelivered and not self.lot.has_ended(attempt.token)

    @property
    def _is_redelivered(self) -> bool:
        return bool(self.task.acks_late and (self.task.request.delivery_info or {}).get("redelivered"))

    def _admit(self, attempt: Attempt, gates: Sequence[GateCall]) -> Admission:
        """Ask, and have it parked if it is refused.

        To write a call down takes longer than to ask: where calls of this task were admitted lately, it is asked first.
        """
        if self.task.name not in _refused_lately:
            outcome = self.lot.admit(attempt, gates, record=None, lease_ms=self.lease_ms)
            if not isinstance(outcome, Refused):
                return outcome
        outcome = self._admit_or_park(attempt, gates)
        if isinstance(outcome, Running):
            _refused_lately.discard(self.task.name)
        else:
            _refused_lately.add(self.task.name)
        return outcome

    def _admit_or_park(self, attempt: Attempt, gates: Sequence[GateCall]) -> Admission:
        try:
            record: bytes | None = parked_messages.record_of(self.task, self.arguments, self.keywords)
        except (TypeError, ValueError) as error:
            outcome = self.lot.admit(attempt, gates, record=None, lease_ms=self.lease_ms)
            if isinstance(outcome, Refused):
                known = outcome.by is not None and outcome.by.limit is not None  # a permit may be free long before
                wait_s = outcome.retry_after if known else min(outcome.retry_after, _LATER_S)
                raise self._later(error, max(1.0, wait_s)) from error
            return outcome
        return self.lot.admit(
            attempt,
            gates,
            record=record,
            lease_ms=self.lease_ms,
            expires_us=parked_messages.expires_in_us(self.task.request),
        )

    def _act_on(self, outcome: Admission) -> Any:
        match outcome:
            case Running():
                return self._run(outcome)
            case Parked(by):
                self.counters.add("parked")
                raise TaskParked(f"parked: {by.shown if by else 'it runs elsewhere'}")
            case Stale():
                self.counters.add("stale")
                raise DeliveryDropped("another delivery stands for it")
            case Full(by, dropped):
                self.counters.add("dropped" if dropped else "rejected")
                if dropped:
                    return None
                if by.most <= 0:
                    raise DuplicateTask(self.task.name, by.shown)
                raise TooManyParked(self.task.name, by.shown, by.most)
            case _:
                raise TypeError(f"{outcome!r} is no answer to a delivery")

    def _without_redis(self, error: BaseException) -> Any:
        if self.alone:
            return self.body()
        raise self._later(error, random.uniform(_LATER_S, 2 * _LATER_S)) from error

    def _later(self, error: BaseException, countdown: float) -> Retry:
        """Have the broker deliver it again, without using up a retry: it cannot be parked."""
        request = self.task.request
        signature = self.task.signature_from_request(
            request, self.arguments, self.keywords, countdown=countdown, retries=request.retries
        )
        serializer = parked_messages.serializer_of(self.task, self.arguments, self.keywords)
        signature.apply_async(**({} if serializer is None else {"serializer": serializer}))
        self.counters.add("postponed")
        return Retry(f"its gates cannot be asked ({type(error).__name__})", exc=None, when=countdown, sig=signature)

    # Where it was called

    def _wait_here(self) -> Any:
        request, began = self.task.request, time.monotonic()
        generation = 0 if request.called_directly else parked_messages.generation_of(request)
        id = uuid4().hex if request.called_directly else request.id  # a body may call itself
        attempt = Attempt(id or uuid4().hex, request.retries or 0, generation, self.task.name)
        gates = [gate for gate in self.gates if gate.kind not in "cd"]  # who waits for the result has not paused
        while True:
            outcome = self.lot.admit(attempt, gates, record=None, lease_ms=self.lease_ms)
            if isinstance(outcome, Running):
                return self._run(outcome)
            if not isinstance(outcome, Refused):
                return self._act_on(outcome)
            if outcome.by is not None and outcome.by.most == 0:
                self.counters.add("dropped" if outcome.by.policy == "n" else "rejected")
                if outcome.by.policy == "n":
                    return None
                raise DuplicateTask(self.task.name, outcome.by.shown)
            waited = time.monotonic() - began
            if waited + min(outcome.retry_after, _LONGEST_PAUSE_S) > _LONGEST_WAIT_S:
                raise TaskRefused(self.task.name, outcome.by.shown if outcome.by else "its twin", waited)
            time.sleep(min(max(outcome.retry_after, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S))

    # Running

    def _run(self, running: Running) -> Any:
        admitted, request = Admitted(self.lot, running), self.task.request
        try:
            self.counters.add("runs")
            if running.wait_s > 0:
                time.sleep(running.wait_s)
            delivered = not (request.called_directly or request.is_eager)
            if not delivered or not is_guarded(self.lot.keys.namespace):
                admitted.keep()
            parked_messages.forget_generation(request)
            request.admission = admitted
            value = admitted.run(self.body)
            verdict = self.verdict_of(value)
        except RateLimited as limited:
            paused = self._pause(admitted, limited)
            admitted.end()
            if running.attempt.generation:
                running = replace(running, attempt=running.attempt._replace(generation=0))
            return self._again(running.attempt, limited, paused)
        except (Retry, Reject, Ignore):  # Ignore: it was replaced, by one that has its id
            if request.admission is admitted:
                admitted.end()
            raise
        except BaseException:
            admitted.end(known_ms=self._known_ms)
            raise
        finally:
            request.admission = None
        admitted.end(verdict, known_ms=self._known_ms)
        return value

    @property
    def _known_ms(self) -> int:
        """How long it is to be known that it has ended: where the broker may deliver it again, for not having heard."""
        return _KNOWN_MS if self.task.acks_late else 0

    def _pause(self, admitted: Admitted, limited: RateLimited) -> bool:
        self.counters.add("rate_limited")
        try:
            return admitted.block(limited.after_ms / 1_000, limited.key)
        except LimiterUnavailable:
            return False

    def _again(self, attempt: Attempt, limited: RateLimited, paused: bool) -> Any:
        """Come again, by the gate that is closed now."""
        if self.task.request.called_directly or self.task.request.is_eager:
            raise limited
        if paused:
            outcome = self._admit(attempt, [gate for gate in self.gates if gate.kind not in "cd"])
            if not isinstance(outcome, Running):
                return self._act_on(outcome)
            Admitted(self.lot, outcome).end()
        raise self._later(limited, limited.after_ms / 1_000)
