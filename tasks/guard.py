"""Keeps what running tasks hold, and gives back what a task held whose process has died. In a worker's main process.

A pool process cannot be relied on for either: code that keeps its interpreter busy renews nothing, and the dead give
nothing back. The main process sees both, for it hands out the tasks and waits for their processes. The invariant: what
a task holds is renewed as long as its process lives and its request is active, and is given back early only when that
very process is dead.

Redis is asked by one thread, never by the loop that takes messages: two round trips for all tasks together, every third
of a lease. Tasks that end sooner cost nothing.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from threading import Event, Thread
from typing import Any
from weakref import ref

from celery import Celery
from celery.signals import task_revoked
from celery.utils.imports import symbol_by_name
from celery.worker import state as worker_state

from ..cachelib.circuit import UNAVAILABLE
from ..coordination.coordinated import CoordinatedTask
from ..coordination.hold import lease_of
from ..coordination.parking import Attempt, Crashed, ParkingLot

logger = logging.getLogger(__name__)

_class_of: Callable[[Any], Any] = symbol_by_name  # which is not typed

_LOOK_S = 0.25
"""So often it looks, in this process alone, whether the processes of running tasks live."""
_DYING_S = 0.02
"""So often where one is known to be dying."""
_PAUSE_S = 0.2
_ANSWER_S = 3.0


@dataclass(slots=True, eq=False)
class _Running:
    """One delivery that was given to the pool."""

    request: "ref[Any]"
    task: CoordinatedTask
    lot: ParkingLot
    id: str
    token: str
    pid: int
    """Of the process that runs it: of the pool, or this one."""
    lease_s: float
    due: float
    """When it is to be renewed, by ``time.monotonic()``."""
    known: Crashed | None = None
    """What Redis says of it; None: it has not been asked, or knows nothing yet."""
    confirmed: float = 0.0
    dying: bool = False
    """Whether its process was told to end, or has."""
    lost: bool = False

    @property
    def is_active(self) -> bool:
        request = self.request()
        return request is not None and request in worker_state.active_requests


class Guard:
    """A thread of a worker's main process.

    Arguments:
        app: whose coordinated tasks are guarded.
        lots: where they are coordinated.
        processes: whether the pool is one of processes; else tasks run in this one.
    """

    def __init__(self, app: Celery, lots: Sequence[ParkingLot], *, processes: bool = True) -> None:
        self._app = app
        self._lots = list(lots)
        self._processes = processes
        self._running: dict[int, _Running] = {}
        self._dead: list[_Running] = []
        self._silent: list[ParkingLot] = []
        """Those that did not answer the last time; that was said then."""
        self._revoked: list[tuple[CoordinatedTask, Any, bool]] = []
        self._requests: dict[CoordinatedTask, Any] = {}
        self._leases_s: dict[str, float] = {}
        self._wake = Event()
        self._sleeps = False
        self._ending = False
        self._thread: Thread | None = None
        self.crashed = 0
        """How many tasks it has given back the holds of, because their process had died."""
        self.lost = 0
        """How many tasks lost something they held while they ran."""

    def __repr__(self) -> str:
        return f"<Guard [{len(self._running)} running, {self.crashed} crashed, {self.lost} lost]>"

    def start(self) -> None:
        """Begin, before the worker takes messages: from now on its requests tell the guard what becomes of them."""
        for task in list(self._app.tasks.values()):
            if isinstance(task, CoordinatedTask) and task.is_coordinated and task.lot in self._lots:
                self._leases_s[task.name] = lease_of(task.gate_lease) / 1_000
                self._requests[task] = task.Request
                task.Request = type("Request", (_Watched, _class_of(task.Request)), {"guard": self})
        task_revoked.connect(self._on_revoked, weak=False, dispatch_uid=self)
        self._thread = Thread(target=self._run, name="petiole-guard", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, once the pool has: what its dead held is given back."""
        self._ending = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_ANSWER_S)
        task_revoked.disconnect(dispatch_uid=self)
        for task, found in self._requests.items():
            task.Request = found
        self._requests.clear()

    # For the requests, in the loop that takes messages: nothing here may wait

    def accepted(self, request: Any, *, dying: bool = False) -> None:
        """A pool process has begun with it. May be repeated."""
        known = self._running.get(id(request))
        if known is not None and known.request() is request:
            known.dying = known.dying or dying
        else:
            now, task = time.monotonic(), request.task
            token = Attempt(request.id, request.request_dict.get("retries") or 0).token
            lease_s = self._leases_s.get(task.name, 1.0)
            pid = request.worker_pid if self._processes else os.getpid()
            self._running[id(request)] = _Running(
                ref(request), task, task.lot, request.id, token, pid, lease_s, now + lease_s / 3, dying=dying
            )
        if dying or self._sleeps:
            self._wake.set()

    def is_dying(self, request: Any) -> None:
        """Its process was told to end, or has."""
        if request.worker_pid:
            self.accepted(request, dying=True)

    def _on_revoked(self, sender: Any = None, request: Any = None, terminated: bool = False, **_: object) -> None:
        if isinstance(sender, CoordinatedTask) and sender in self._requests and request is not None:
            self._revoked.append((sender, request, terminated))
            self._wake.set()

    # In the thread

    def _run(self) -> None:
        while not self._ending:
            self._wake.wait(self._sleep_s())
            self._sleeps = False
            self._wake.clear()
            try:
                self._look()
            except Exception:
                logger.exception("running tasks are not renewed for a moment")
                time.sleep(_PAUSE_S)
        try:
            self._look()
        except Exception:
            logger.exception("what dead tasks held ends with its lease")

    def _sleep_s(self) -> float | None:
        if self._dead or any(one.dying for one in list(self._running.values())):
            return _DYING_S
        self._sleeps = not self._running
        if self._running or self._revoked:
            return min(_LOOK_S, *(lease_s / 6 for lease_s in self._leases_s.values()))
        return None

    def _look(self) -> None:
        self._sort_out()
        now = time.monotonic()
        due = [one for one in self._running.values() if one.due <= now + one.lease_s / 12]
        for lot, some in _by_lot(due):
            self._ask(self._renew, lot, some)
        dead, self._dead = self._dead, []
        for lot, some in _by_lot(dead):
            if not self._ask(self._give_back, lot, some):
                self._dead += [one for one in some if time.monotonic() < one.confirmed + one.lease_s]
        while self._revoked:
            self._forget(*self._revoked.pop())

    def _sort_out(self) -> None:
        """Forget what has ended, and see who is dead. Asks nobody but this machine."""
        running = list(self._running.items())
        busy = {one.pid for _, one in running if one.is_active}
        dead: dict[int, bool] = {}
        now = time.monotonic()
        for key, one in running:
            active = one.is_active
            if not active and (not one.dying or not self._processes):
                self._running.pop(key, None)
                continue
            if not self._processes:
                continue
            if one.pid not in dead:
                dead[one.pid] = _is_dead(one.pid)
            if dead[one.pid]:
                one.confirmed = max(one.confirmed, now)  # from when it is tried for one lease
                self._dead.append(one)
                self._running.pop(key, None)
            elif not active and one.pid in busy:  # it has ended, for its process does something else
                self._running.pop(key, None)

    def _renew(self, lot: ParkingLot, due: Sequence[_Running]) -> None:
        sent = time.monotonic()
        unknown = [one for one in due if one.known is None]
        found = lot.running([one.token for one in unknown])
        for one in unknown:
            one.due = sent + one.lease_s / 3
            known = found.get(one.token)
            if known is not None and known.is_of(one.pid):
                one.known, one.confirmed = known, sent
            elif one.confirmed and one.is_active and sent > one.confirmed + one.lease_s:
                self._was_lost(one, "Redis does not know it any more")
        held = {one.token: one for one in due if one.known is not None}
        sent = time.monotonic()
        lost = lot.renew({token: one.known for token, one in held.items() if one.known is not None})
        for token in set(held) - set(lost):
            held[token].due, held[token].confirmed = sent + held[token].lease_s / 3, sent
        if lost:
            self._see_what_is_lost(lot, [held[token] for token in lost], sent)

    def _see_what_is_lost(self, lot: ParkingLot, missed: Sequence[_Running], now: float) -> None:
        """Tell those that have ended, of which Redis knows nothing any more, from those that have lost something."""
        found = lot.running([one.token for one in missed])
        for one in missed:
            one.due = now + one.lease_s / 3
            known = found.get(one.token)
            if known is not None and known.is_of(one.pid):
                runs_on = one.known is not None and known.nonce == one.known.nonce
                one.known = known
                if runs_on and known.gates:  # else it has given them back itself
                    self._was_lost(one, "somebody has taken it away")
            else:
                one.known = None
                if one.is_active and (known is not None or now > one.confirmed + one.lease_s):
                    self._was_lost(one, f"it was not renewed for {now - one.confirmed:.1f} s")

    def _was_lost(self, one: _Running, reason: str) -> None:
        if not one.lost:
            one.lost = True
            self.lost += 1
            logger.warning("task %s[%s] has lost what it held, and runs on: %s", one.task.name, one.id, reason)

    def _give_back(self, lot: ParkingLot, dead: Sequence[_Running]) -> None:
        found = lot.running([one.token for one in dead])
        for one in dead:
            known = found.get(one.token)
            if known is not None and known.is_of(one.pid) and lot.crashed(one.token, known):
                self.crashed += 1
                logger.warning("task %s[%s] has died: what it held is given back", one.task.name, one.id)
            elif known is None:
                self._died_on_its_way(lot, one)

    def _died_on_its_way(self, lot: ParkingLot, one: _Running) -> None:
        """It may have been woken, and granted something; what Celery does of it now is a call of its own."""
        request = one.request()
        if request is not None:
            with suppress(TypeError, ValueError):  # arguments that the task does not take: it was granted nothing
                retries = request.request_dict.get("retries") or 0
                lot.died(Attempt(one.id, retries), one.task.gates.of(request.args or (), request.kwargs or {}))

    def _ask(
        self, what: Callable[[ParkingLot, Sequence[_Running]], None], lot: ParkingLot, some: list[_Running]
    ) -> bool:
        """Whether Redis has answered; if not, it is asked again in a moment."""
        try:
            what(lot, some)
        except (*UNAVAILABLE, RuntimeError) as error:  # RuntimeError: the connections were closed
            if lot not in self._silent:
                self._silent.append(lot)
                logger.warning(
                    "%d running tasks are not renewed until Redis at %s answers: %s",
                    len(some),
                    lot.redis.address,
                    error,
                )
            for one in some:
                one.due = time.monotonic() + min(_PAUSE_S, one.lease_s / 20)
            return False
        if lot in self._silent:
            self._silent.remove(lot)
            logger.info("Redis at %s answers again: running tasks are renewed", lot.redis.address)
        return True

    def _forget(self, task: CoordinatedTask, request: Any, terminated: bool) -> None:
        """A task was revoked, or had expired: nobody is to wait for it."""
        arguments, keywords = request.args or (), request.kwargs or {}
        try:
            task.unclaim(request.id, arguments, keywords)
            if not terminated:  # which has run, and gives back what it holds, or is found dead
                task.lot.revoked(Attempt(request.id, request.retries or 0), task.gates.of(arguments, keywords))
        except (TypeError, ValueError) as error:  # arguments that the task does not take: it holds nothing
            logger.debug("%s[%s] holds nothing: %s", task.name, request.id, error)
        except (RuntimeError, *UNAVAILABLE) as error:
            logger.warning("what %s[%s] was granted ends with its lease: %s", task.name, request.id, error)


class _Watched:
    """What a request tells the guard; mixed into the request class of each coordinated task."""

    guard: Guard
    worker_pid: int | None

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A pool process has begun with it."""
        super().on_accepted(pid, time_accepted)  # type: ignore[misc]
        self.guard.accepted(self)

    def on_timeout(self, soft: bool, timeout: float) -> None:  # Celery's own signature
        """Of a hard time limit: its process is killed next."""
        if not soft:
            self.guard.is_dying(self)
        super().on_timeout(soft, timeout)  # type: ignore[misc]

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """It has failed; where no process of the pool has said so, it was the process that did."""
        if not return_ok:
            self.guard.is_dying(self)
        return super().on_failure(exc_info, send_failed_event, return_ok)  # type: ignore[misc]

    def terminate(self, pool: Any, signal: Any = None) -> Any:
        """It was revoked while it ran: its process is told to end."""
        self.guard.is_dying(self)
        return super().terminate(pool, signal)  # type: ignore[misc]

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> Any:
        """The broker is gone, or the worker ends at once: its process is told to end."""
        self.guard.is_dying(self)
        return super().cancel(pool, signal, emit_retry)  # type: ignore[misc]


def _by_lot(some: Sequence[_Running]) -> list[tuple[ParkingLot, list[_Running]]]:
    ordered = sorted(some, key=lambda one: id(one.lot))
    return [(lot, list(group)) for lot, group in groupby(ordered, key=lambda one: one.lot)]


def _is_dead(pid: int) -> bool:
    """Whether a child of this process has ended; it is left to the pool to take notice."""
    if hasattr(os, "waitid"):
        try:
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            pass  # the pool has taken notice; or it is no child of ours
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
