"""How a task passes its gates, where its body would run: it runs, it is parked, or it ends with what was decided.

Everything happens inside of the task's own call, so whatever Celery does around it (chains, chords, callbacks, events,
time limits) sees a task like any other. Parking ends a delivery as ``Ignore`` does: acknowledged, no result, no retry.
"""

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

from celery import Task
from celery.exceptions import Ignore, Reject, Retry
from kombu.exceptions import OperationalError
from redis.exceptions import ResponseError

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

logger = logging.getLogger(__name__)

_LONGEST_WAIT_S = 60.0
"""So long a task that runs where it was called waits for its gates."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.05
_LATER_S = 5.0
_MOST_TRIES = 5
_KNOWN_MS, _KNOWN_PARKED_MS = 3_600_000, 600_000
_PAUSE_S = 1.0
_NOT_NOW = ("OOM", "READONLY", "MISCONF", "LOADING", "BUSY", "MASTERDOWN", "NOREPLICAS", "TRYAGAIN", "CLUSTERDOWN")
"""How the answers begin of a server that cannot do it now, and can later."""

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


def is_over(task: Task, state: str | None = None, **_: Any) -> None:
    """Celery has kept the result of a task, and sent what follows it. A receiver of ``task_postrun``.

    Arguments:
        state: None when the process is told to end, and nothing of that was done.
    """
    when_over = getattr(task.request, "when_over", None)
    if when_over is None:  # nearly always: it is told of every task of the process
        return
    task.request.when_over = None
    if state is not None:
        with suppress(RuntimeError, *UNAVAILABLE):  # then it may run again if it comes again, as any late task
            when_over()


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
    verdict_of: Callable[[Any, str], str]
    """What those are told that wait to end with this result, which that run has brought."""
    reclaim: Callable[[], None]
    """Claim once more to be the only call."""
    retried_in_ms: Callable[[Retry], int]
    """In what time the next attempt comes for which those wait that join; 0: they do not."""
    followed: str = ""
    """The id of the call whose result it is to have, if that ends first."""
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
        if is_guarded(self.task.name, self.lot.redis.address):
            return self._delivered()
        self._unclaim()  # it waits here for those that run, and asks for no claim
        try:  # nobody in this worker would wake it: the task was declared after the worker had started
            return self._wait_here()
        except UNAVAILABLE as error:
            return self._without_redis(error)
        except TaskRefused as error:
            raise self._later(error, random.uniform(_LATER_S, 2 * _LATER_S)) from error

    # In a worker

    def _delivered(self) -> Any:
        attempt, gates = self._attempt(), list(self.gates)
        if self._may_have_ended and self._has_ended(attempt):
            return self._act_on(Stale())
        for _ in range(_MOST_TRIES):
            try:
                outcome = self._admit(attempt, gates)
            except UNAVAILABLE as error:
                return self._without_redis(error)
            if isinstance(outcome, Stale) and attempt.generation and self._was_lost(attempt):
                attempt = attempt._replace(generation=0)
                continue
            if isinstance(outcome, Running) and self.followed:
                value = self._followed(outcome)
                return self._run(outcome) if value is MISS else value
            if not isinstance(outcome, Verdict):
                return self._act_on(outcome)
            value = self._decided(outcome)
            if value is not MISS:
                return value
            # What it waited for is gone: it runs for itself.
            attempt = attempt._replace(generation=0)
            gates = [gate for gate in gates if gate.kind != "c" or gate.policy != "j"]
        raise TaskRefused(self.task.name, "a verdict that changes", 0.0)

    def _attempt(self) -> Attempt:
        request = self.task.request
        return Attempt(
            request.id,
            request.retries or 0,
            parked_messages.generation_of(request),
            self.task.name,
            again=bool(request.retries or parked_messages.header_of(request).get("again")),
        )

    def _decided(self, verdict: Verdict) -> Any:
        """What a call ends with by a verdict; ``MISS`` when that is not known any more."""
        if verdict.text == "d":
            self._unclaim()
            self.counters.add("dropped")
            return None
        if verdict.text == "x":
            self._unclaim()
            raise DeliveryDropped("it was revoked while it waited")
        value = self.joined(verdict.text)
        if value is not MISS:
            self._unclaim()
            self.counters.add("joined")
        return value

    def _followed(self, running: Running) -> Any:
        """The result of the call that it follows, which may have ended after it was looked for; else ``MISS``."""
        verdict = f"j{self.followed}"
        value = self.joined(verdict)
        if value is not MISS:
            Admitted(self.lot, running).end(verdict)
            self.counters.add("joined")
        return value

    def _unclaim(self) -> None:
        """It ends, and was never admitted: what it claimed until it starts is free for the next one."""
        for gate in self.gates:
            if gate.claims_start:
                with suppress(*UNAVAILABLE):
                    self.lot.unclaim(gate.state, self.task.request.id)

    def _has_ended(self, attempt: Attempt) -> bool:
        """Whether the broker delivers it again because it has not heard that it has ended."""
        try:
            return self.lot.has_ended(attempt.token)
        except UNAVAILABLE:
            return False

    def _was_lost(self, attempt: Attempt) -> bool:
        """Whether the broker delivers it again because the worker died that had it first."""
        return self._is_redelivered and not self._has_ended(attempt)

    @property
    def _is_redelivered(self) -> bool:
        return bool(self.task.acks_late and (self.task.request.delivery_info or {}).get("redelivered"))

    @property
    def _may_have_ended(self) -> bool:
        """Whether another message of it may have been the one that ran."""
        return self._is_redelivered or bool(parked_messages.header_of(self.task.request).get("postponed"))

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
                self._unclaim()
                self.counters.add("dropped" if dropped else "rejected")
                if dropped:
                    return None
                if by.most <= 0:
                    raise DuplicateTask(self.task.name, by.shown)
                raise TooManyParked(self.task.name, by.shown, by.most)
            case _:
                raise TypeError(f"{outcome!r} is no answer to a delivery")

    def _without_redis(self, error: BaseException) -> Any:
        """Redis does not answer, or cannot do it now. A script that is wrong is a failure like any other."""
        if isinstance(error, ResponseError) and not str(error).startswith(_NOT_NOW):
            raise error
        if self.alone:
            return self.body()
        raise self._later(error, random.uniform(_LATER_S, 2 * _LATER_S)) from error

    def _later(self, error: BaseException, countdown: float, **said: bool) -> Retry:
        """Have the broker deliver it again, without using up a retry: it cannot be parked.

        Where the broker is away too, it is waited for: the call is in nobody's hands but ours.
        """
        request = self.task.request
        header = {**parked_messages.header_of(request), "postponed": True, **said}
        request.headers = {**(request.headers or {}), parked_messages.HEADER: header}
        parked_messages.forget_generation(request)
        signature = self.task.signature_from_request(
            request, self.arguments, self.keywords, countdown=countdown, retries=request.retries
        )
        serializer = parked_messages.serializer_of(self.task, self.arguments, self.keywords)
        while True:
            try:
                signature.apply_async(**({} if serializer is None else {"serializer": serializer}))
                break
            except (OperationalError, OSError, *UNAVAILABLE) as away:
                logger.warning("%s[%s] waits for the broker in its slot: %s", self.task.name, request.id, away)
                time.sleep(_PAUSE_S)
        self.counters.add("postponed")
        return Retry(f"its gates cannot be asked ({type(error).__name__})", exc=None, when=countdown, sig=signature)

    # Where it was called

    def _wait_here(self) -> Any:
        request, began = self.task.request, time.monotonic()
        if request.called_directly or not request.id:  # a body may call itself
            attempt = Attempt(uuid4().hex, 0, 0, self.task.name)
        else:
            attempt = self._attempt()
        gates = [gate for gate in self.gates if gate.kind not in "cd"]  # who waits for the result has not paused
        while True:
            outcome = self.lot.admit(attempt, gates, record=None, lease_ms=self.lease_ms)
            if isinstance(outcome, Verdict):
                value = self._decided(outcome)
                if value is not MISS:
                    return value
                attempt = attempt._replace(generation=0)
                continue
            if not isinstance(outcome, Refused):
                return self._act_on(outcome)
            # A retry is sent before its attempt ends: what refuses it may be that one.
            if outcome.by is not None and outcome.by.most == 0 and not attempt.again:
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
            if not delivered or not is_guarded(self.task.name, self.lot.redis.address):
                admitted.keep()
            parked_messages.forget_generation(request)
            request.admission = admitted
            value = admitted.run(self.body)
            verdict = self.verdict_of(value, running.nonce)
        except RateLimited as limited:
            self.counters.add("rate_limited")
            try:
                paused = delivered and self._pause(admitted, limited)
            finally:
                admitted.end()
            if not delivered:
                raise
            return self._again(running.attempt._replace(generation=0, again=True), limited, paused=paused)
        except (Retry, Reject, Ignore) as ended:  # Ignore: it was replaced, by one that has its id
            if request.admission is admitted:
                admitted.end(retried_ms=self.retried_in_ms(ended) if isinstance(ended, Retry) else 0)
            raise
        except BaseException:
            self._end(admitted, running, "-")
            raise
        finally:
            request.admission = None
        self._end(admitted, running, verdict)
        return value

    def _end(self, admitted: Admitted, running: Running, verdict: str) -> None:
        """Give all back; and have it known that the call has ended, where another message of it may come.

        Where the broker delivers it again because it has not heard, that is to be known only when Celery has kept the
        result and sent what follows: what died before that comes again.
        """
        request = self.task.request
        if not self.task.acks_late:
            # Of one that was parked another message may come, which was sent because no answer had come.
            admitted.end(verdict, known_ms=_KNOWN_PARKED_MS if running.attempt.generation else 0)
        elif request.called_directly or request.is_eager:
            admitted.end(verdict)
        else:
            admitted.end(verdict, over=False)
            request.when_over = partial(self.lot.over, running, known_ms=_KNOWN_MS)

    def _pause(self, admitted: Admitted, limited: RateLimited) -> bool:
        """Whether a gate is closed now. What the call has claimed is its own until it has ended."""
        try:
            self.reclaim()
            return admitted.block(limited.after_ms / 1_000, limited.key)
        except (LimiterUnavailable, *UNAVAILABLE):
            return False

    def _again(self, attempt: Attempt, limited: RateLimited, *, paused: bool) -> Any:
        """Come again, by the gate that is closed now."""
        request = self.task.request
        header = {**parked_messages.header_of(request), "again": True}
        request.headers = {**(request.headers or {}), parked_messages.HEADER: header}
        if paused:
            try:
                outcome = self._admit(attempt, [gate for gate in self.gates if gate.kind not in "cd"])
            except UNAVAILABLE as error:
                raise self._later(error, limited.after_ms / 1_000) from limited
            if not isinstance(outcome, Running):
                return self._act_on(outcome)
            Admitted(self.lot, outcome).end()
        raise self._later(limited, limited.after_ms / 1_000)
