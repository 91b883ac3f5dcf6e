"""Sends parked tasks again when they may run. Of all workers that serve one namespace one does it, the others stand by.

It sleeps until the next task is due, or until Redis says that something was given back. All that it knows stands in
Redis, so when its process dies another one goes on within three seconds; what was sent twice then is found out when it
comes. It asks nothing while nothing happens, but for its lease.
"""

import logging
import time
from collections.abc import Sequence
from threading import Event, Thread
from typing import Any, NamedTuple

from celery import Celery
from celery.worker import state as worker_state
from kombu.exceptions import OperationalError
from redis.exceptions import ResponseError

from ..cachelib.circuit import LOST, UNAVAILABLE
from ..cachelib.client import ThreadClient
from ..cachelib.pushes import is_pong, listening_connection
from ..coordination import parked_messages
from ..coordination.acquiring import Acquirable
from ..coordination.coordinated import CoordinatedTask
from ..coordination.errors import LockError, LockTimeout, LockUnavailable
from ..coordination.gates import Served
from ..coordination.hold import Hold, Terms
from ..coordination.parking import Due, ParkingLot, Woken
from ..coordination.turn_store import TurnStore

logger = logging.getLogger(__name__)

_LEASE_MS = 3_000
_STAND_BY_S = 1.0
_LONGEST_SLEEP_S = 0.5
"""After so long it looks whether it is to stop, and which tasks were revoked."""
_REVOKED_S = 5.0
"""So often it looks at all that were revoked, though they are as many as before: one may have taken another's place."""
_PAUSE_S = 0.5
_ANSWER_S = 2.0
_HEARTBEAT_S = 10.0
_MOST_HEARD = 1_000
_LONGEST_FAILURE_S = 60.0


class _Failed(NamedTuple):
    """Of a task that the broker did not take."""

    at: float
    """When it is sent again."""
    pause_s: float


class Pump:
    """A thread of a worker's main process."""

    def __init__(self, app: Celery, lot: ParkingLot) -> None:
        self._app = app
        self._lot = lot
        self._stopping = Event()
        self._thread: Thread | None = None
        self._revoked: set[str] = set()
        self._revoked_seen = 0
        self._revoked_due = 0.0
        self._is_silent = False
        """Whether Redis did not answer, or refused, the last time; that was said then."""
        self._failed: dict[str, _Failed] = {}
        """Which could not be sent the last time: it comes after the others, if it was for what is written of it."""
        self.leads = False
        """Whether it is the one that sends."""
        self.sent = 0
        """How many tasks it has sent."""

    def __repr__(self) -> str:
        return f"<Pump of {self._lot.keys.namespace!r} [{'leads' if self.leads else 'stands by'}, {self.sent} sent]>"

    def start(self) -> None:
        """Begin to stand by."""
        self._thread = Thread(target=self._run, name="petiole-pump", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, and let another one lead at once."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_ANSWER_S + _STAND_BY_S)

    def _run(self) -> None:
        store = TurnStore(self._lot.redis, "parking", self._lot.keys.namespace, capacity=1)
        candidate = Acquirable(store, f"parking of {self._lot.keys.namespace!r}", 1, Terms(_LEASE_MS))
        while not self._stopping.is_set():
            try:
                hold = candidate.acquire(timeout=_STAND_BY_S)
            except LockTimeout:
                self._hears_again()
                continue
            except (LockError, RuntimeError, *UNAVAILABLE) as error:
                self._hears_nothing(error)
                self._stopping.wait(_PAUSE_S)
                continue
            try:
                self.leads = True
                self._lead(hold)
            except (RuntimeError, *UNAVAILABLE) as error:
                self._hears_nothing(error)
                self._stopping.wait(_PAUSE_S)
            except Exception:
                logger.exception("parked tasks are not sent for a moment")
                self._stopping.wait(_PAUSE_S)
            finally:
                self.leads = False
                hold.release()

    def _hears_nothing(self, error: BaseException) -> None:
        """Say so, once: until Redis answers again nothing else is to be told."""
        if self._is_silent or self._stopping.is_set():
            return
        self._is_silent = True
        cause = error.__cause__ if isinstance(error, LockUnavailable) and error.__cause__ is not None else error
        said = f"{type(cause).__name__}: {cause}".rstrip(".")
        hint = "; if that is another one than you mean, set REDIS_URL, or give redis=connect(...)"
        logger.warning(
            "parked tasks are not sent until Redis at %s answers (%s)%s",
            self._lot.redis.address, said, hint if isinstance(cause, LOST) else "",
        )  # fmt: skip

    def _hears_again(self) -> None:
        if self._is_silent:
            self._is_silent = False
            logger.info("Redis at %s answers again: parked tasks are sent", self._lot.redis.address)

    def _lead(self, hold: Hold) -> None:
        listener = _Listener(self._lot)
        try:
            for line, definition in self._lot.lines():
                self._serve(line, definition)  # whoever led before may have missed what was given back
            while not self._stopping.is_set() and hold.held:
                due = self._do_what_is_due()
                self._look_for_revoked()
                self._hears_again()
                sleep_s = _LONGEST_SLEEP_S if due.next_in_s is None else min(due.next_in_s, _LONGEST_SLEEP_S)
                if due.lines or due.tasks or due.woken:
                    sleep_s = 0.0
                for granted in listener.heard(sleep_s):
                    self._serve_granted(granted)
        finally:
            listener.close()

    def once(self) -> int:
        """Send what may run now, in this thread, whoever leads; return how many were sent. For tests."""
        before, sent = self.sent, -1
        for line, definition in self._lot.lines():
            self._serve(line, definition)
        due = None
        while due is None or due.lines or due.tasks or self.sent > sent:
            sent = self.sent
            due = self._do_what_is_due()
        return self.sent - before

    def _do_what_is_due(self) -> Due:
        due = self._lot.next()
        for line, definition in due.lines:
            self._serve(line, definition)
        for id in due.tasks:
            self._lot.wake(id, "=")
        self._send(due.woken)
        return due

    def _serve_granted(self, line: str) -> None:
        """Something that the first of a line waits for was handed to it."""
        definition = self._lot.definition(line)
        if definition is not None:
            self._serve(line, definition)

    def _serve(self, line: str, definition: bytes) -> None:
        try:
            gate = Served.read(definition)
        except ValueError as error:
            logger.error("those in %s wait for ever: %s", line, error)
            self._lot.forget_line(line)
            return
        try:
            self._lot.serve(line, gate)
        except ResponseError as error:  # something else stands where its state should; or nothing can be written at all
            self._lot.put_off(line)
            logger.error("those in %s are not woken for now: %s", line, error)

    def _send(self, woken: Sequence[Woken]) -> None:
        now = time.monotonic()
        for id, failed in list(self._failed.items()):
            if failed.at <= now - _LONGEST_FAILURE_S:
                del self._failed[id]
        some = [one for one in woken if one.id not in self._failed or self._failed[one.id].at <= now]
        if not some:
            if woken:  # what cannot be sent stands before all others: not without a pause
                self._stopping.wait(_PAUSE_S)
            return
        handed: list[Woken] = []
        try:
            with self._app.producer_or_acquire() as producer, producer.batch():  # which is sent when it is left
                handed = self._hand_over(some, producer)
        except Exception as error:  # noqa: BLE001  # each transport has errors of its own
            logger.warning("the broker did not take %d parked tasks: %s", len(some), error)
            self._stopping.wait(_PAUSE_S)
            return
        if not handed:
            self._stopping.wait(_PAUSE_S)
            return
        forget = [one.verdict == "x" or (one.again and self._passes_no_gate(one)) for one in handed]
        self._lot.sent(handed, forget=forget)
        self.sent += len(handed)
        for one in handed:
            self._failed.pop(one.id, None)

    def _hand_over(self, some: Sequence[Woken], producer: Any) -> list[Woken]:
        """Those that need not be sent any more: the broker has them, or they cannot be sent at all."""
        handed: list[Woken] = []
        for one in some:
            try:
                if not (one.again and self._passes_no_gate(one)):
                    parked_messages.send(self._app, producer, one, revoked=one.verdict == "x")
            except (KeyError, TypeError, ValueError) as error:
                logger.error("task %s cannot be sent, and stays parked: %s", one.id, error)
            except (OperationalError, OSError, *UNAVAILABLE):
                raise  # it is not this task, it is the broker
            except Exception as error:  # noqa: BLE001  # each transport has errors of its own
                self._put_off(one, error)
                continue
            handed.append(one)
        return handed

    def _put_off(self, one: Woken, error: BaseException) -> None:
        """The broker did not take it: the others must not wait for it."""
        known = self._failed.get(one.id)
        pause_s = _PAUSE_S if known is None else min(2 * known.pause_s, _LONGEST_FAILURE_S)
        self._failed[one.id] = _Failed(time.monotonic() + pause_s, pause_s)
        logger.warning("the broker did not take task %s; it is sent again in %.1f s: %s", one.id, pause_s, error)

    def _passes_no_gate(self, one: Woken) -> bool:
        """Whether it is a task that has had gates, and has none any more: it runs when it comes, and tells nobody."""
        try:
            task = self._app.tasks.get(parked_messages.task_of(one))
        except (KeyError, TypeError, ValueError):
            return False
        return task is not None and not (isinstance(task, CoordinatedTask) and task.is_coordinated)

    def _look_for_revoked(self) -> None:
        """Wake those that were revoked: the worker that gets one marks it so."""
        revoked: Any = worker_state.revoked
        now = time.monotonic()
        if len(revoked) == self._revoked_seen and now < self._revoked_due:
            return
        self._revoked_due = now + _REVOKED_S
        known = set(revoked)
        for id in self._lot.among(known - self._revoked):
            self._lot.wake(id, "x")
        self._revoked, self._revoked_seen = known, len(revoked)


class _Listener:
    """The connection on which Redis says that something is to be done."""

    def __init__(self, lot: ParkingLot) -> None:
        client = lot.redis.coordination
        if not isinstance(client, ThreadClient):
            raise TypeError(f"{client!r} is no client of a single server")
        self._connection = listening_connection(client, "petiole-parking", _ANSWER_S)
        self._connection.connect()
        self._connection.send_command("SUBSCRIBE", lot.keys.channel, check_health=False)
        self._connection.read_response(disable_decoding=True, push_request=True)
        self._heard = time.monotonic()
        self._pinged = False

    def close(self) -> None:
        self._connection.disconnect()

    def heard(self, longest_s: float) -> list[str]:
        """Wait until something is said. The lines to which a permit was handed."""
        lines: dict[str, None] = {}
        for _ in range(_MOST_HEARD):
            if not self._connection.can_read(timeout=longest_s):
                self._look_whether_it_is_there()
                break
            longest_s = 0.0
            line = self._read()
            if line:
                lines[line] = None
        return list(lines)

    def _look_whether_it_is_there(self) -> None:
        silent_s = time.monotonic() - self._heard
        if silent_s > _HEARTBEAT_S + _ANSWER_S:
            raise ConnectionError("the connection on which grants are heard is silent")
        if silent_s > _HEARTBEAT_S and not self._pinged:
            self._connection.send_command("PING", check_health=False)
            self._pinged = True

    def _read(self) -> str:
        message = self._connection.read_response(disable_decoding=True, push_request=True)
        self._heard, self._pinged = time.monotonic(), False
        if is_pong(message) or not isinstance(message, list) or len(message) != 3 or message[0] != b"message":
            return ""
        line: str = message[2].decode("utf-8", "replace")
        return line.rpartition(" ")[0].rpartition(" ")[0]
