"""Of many calls that come close together, in any process, only the newest runs, once they have ceased for a while.

Each call leaves a *claim* in Redis, which takes away the claim of the call before it unless that is due already. The
invariant: **a call runs only once its claim has been taken, and a claim can be taken once**; so of a series of calls
that supersede each other one runs, whichever process it came from. The clock that decides is the server's; processes
only learn in how many milliseconds to come back.
"""

import atexit
import contextvars
import functools
import heapq
import inspect
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from threading import Condition, Thread
from types import TracebackType
from typing import Any, ParamSpec, Self
from weakref import WeakSet

from ..cachelib.background import Background
from ..cachelib.connections import UNAVAILABLE, Connections, require_connections
from ..cachelib.counters import Counters
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.errors import ServerUnavailable
from ..cachelib.forks import renew_after_fork
from ..cachelib.scripts import load
from ..cachelib.templates import Template, signature_of
from ..cachelib.tokens import Tokens
from . import keys

logger = logging.getLogger(__name__)

P = ParamSpec("P")

_KEPT_MS = 600_000  # after it is due, a claim waits so long for an owner that is late
_LOOK_AGAIN_S = 0.05  # for a thread, when all were busy


def _registered(reply: list[Any]) -> tuple[str, int, bool]:
    claim, due_in_ms, gone = reply
    return claim.decode(), int(due_in_ms), bool(gone)


_REGISTER = load(__package__, "debounce_register", _registered)
_TAKE = load(__package__, "debounce_take", int)


@dataclass(frozen=True, slots=True)
class DebounceStats:
    """What a debounce has done in this process."""

    calls: int
    """That were asked for here."""
    runs: int
    superseded: int
    """That did not run, because a newer call had come, here or elsewhere."""
    cancelled: int
    dropped: int
    """By ``close(run=False)``."""
    failures: int
    """Runs that raised. They are logged."""
    alone: int
    """Calls and runs that were decided in this process alone, because Redis did not answer or had lost its keys."""
    pending: int
    """That wait now."""


@dataclass(slots=True)
class _Call:
    """A call that may run."""

    key: str
    run: Callable[[], object]
    claim: str | None
    """None: Redis knows nothing of it, this process alone decides."""
    due_s: float
    """By ``time.monotonic()``."""


@dataclass(slots=True, eq=False)
class _Slot:
    """The newest call of this process for a key; one timer runs for it, however many calls come."""

    call: _Call
    first_s: float


class _Timers:
    """One thread of this process that calls back when something is due; it ends when nothing is left."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._changed = Condition()
        self._thread: Thread | None = None
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"<_Timers [{len(self._heap)} set]>"

    def renew_after_fork(self) -> None:
        """Forget the parent's timers, and its thread."""
        self._heap, self._changed, self._thread = [], Condition(), None

    def at(self, due_s: float, callback: Callable[[], None]) -> None:
        """Call back at a time by ``time.monotonic()``. What is called must neither wait nor raise."""
        with self._changed:
            if self._thread is None:
                thread = Thread(target=self._run, name="petiole-debounce-timers", daemon=True)
                thread.start()
                self._thread = thread
            heapq.heappush(self._heap, (due_s, next(self._numbers), callback))
            if self._heap[0][2] is callback:
                self._changed.notify()

    def _run(self) -> None:
        changed = self._changed
        while True:
            with changed:
                while self._heap and (left_s := self._heap[0][0] - time.monotonic()) > 0:
                    changed.wait(left_s)
                if not self._heap:
                    self._thread = None  # under the lock in which another would see that there is one
                    return
                callback = heapq.heappop(self._heap)[2]
            try:
                callback()
            except Exception:
                logger.exception("a timer failed; the others go on")
            del callback  # it may hold a call's arguments, and the next one may be far away


_timers = _Timers()
_tokens = Tokens()
_all: "WeakSet[Debounce]" = WeakSet()


class Debounce:
    """Runs the newest of several calls, once no more have come for a while.

    >>> debounce = Debounce(redis, "reindex", wait=2, max_wait=30)
    >>> debounce.call("product:7", reindex, 7)
    >>> @debounce.calls("product:{product_id}")
    ... def reindex(product_id: int) -> None: ...

    Promises: of all calls for a key, from any process, of which each comes less than ``wait`` after the one before,
    exactly one runs: the newest, ``wait`` after it came, or ``max_wait`` after the first came if that is earlier, and
    then as soon as a thread is free. It runs in the process that asked for it, in the caller's context variables. An
    exception is logged and counted. What it runs is taken before it begins, so a call that comes meanwhile begins a
    new series, and may run beside it.

    Non-promises: a process that dies takes its pending call with it (also one that ends without ``close()``; it logs
    how many), and with it those that the call had superseded. While Redis does not answer, each process debounces for
    itself, so that up to one call per process runs; a warning is logged. A call whose claim Redis has lost (a
    restart without persistence, an eviction) runs, with a warning, rather than not at all. A failover may lose the
    newest claim, and an older call runs in its place. Runs of one key do not wait for each other: use a ``Lock``.

    Arguments:
        redis: from ``connect``.
        name: keeps the keys of several debounces apart. All processes should give the same times.
        wait: how long calls must have ceased.
        max_wait: how long after the first call one runs, although more come. Default: as long as they come.
        threads: how many calls may run at once in this process; those that are due wait for a thread.

    Raises ``ValueError`` or ``TypeError`` for what cannot be meant. Close it, or use it in a ``with``.
    """

    def __init__(
        self, redis: Connections, name: str, *, wait: Duration, max_wait: Duration | None = None, threads: int = 4
    ) -> None:
        require_connections(redis)
        self.name = name
        self._redis = redis
        self._wait_ms = milliseconds(wait, "wait")
        self._max_wait_ms = None if max_wait is None else milliseconds(max_wait, "max_wait")
        if self._max_wait_ms is not None and self._max_wait_ms < self._wait_ms:
            raise ValueError(f"max_wait={max_wait!r} is shorter than wait={wait!r}, so it would always cut it short")
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
            raise ValueError(f"threads={threads!r} must be a whole number of at least 1")
        keys.debounced(name, "any")  # says what is wrong with the name
        self._most = threads
        self._background = Background(threads)
        self._counters = Counters()
        self._renew()
        renew_after_fork(self)
        _all.add(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._slots)} pending, {self._running} running"
        return f"<Debounce {self.name!r} [{state}]>"

    def _renew(self) -> None:
        self._changed = Condition()
        self._slots: set[_Slot] = set()
        self._newest: dict[str, _Slot] = {}
        self._ready: deque[_Call] = deque()
        self._workers = 0
        self._running = 0
        self._alone = False
        self._closed = False

    def renew_after_fork(self) -> None:
        """Forget the parent's calls: it will run them."""
        closed = self._closed
        self._renew()
        self._closed = closed

    def call(self, key: str, function: Callable[P, object], *arguments: P.args, **keywords: P.kwargs) -> None:
        """Have a function run with these arguments, unless a newer call for the key comes in time.

        One round trip. Raises ``RuntimeError`` once closed.
        """
        _refuse_async(function)
        name = keys.debounced(self.name, key)
        run = functools.partial(contextvars.copy_context().run, function, *arguments, **keywords)
        with self._changed:
            if self._closed:
                raise RuntimeError(f"{self!r} takes no more calls; make another")
            slot = self._newest.get(key)
            previous = slot.call.claim or "" if slot is not None else ""
        self._counters.add("calls")
        try:
            claim, due_in_ms, gone = _REGISTER(
                self._redis.coordination,
                claims=name,
                token=_tokens.next(),
                previous=previous,
                wait_ms=self._wait_ms,
                max_wait_ms=self._max_wait_ms or 0,
                kept_ms=_KEPT_MS,
            )
        except UNAVAILABLE as error:
            self._counters.add("alone")
            logger.log(
                logging.DEBUG if self._alone else logging.WARNING,  # once, until it answers again
                "debounce %r: Redis at %s did not answer (%s: %s), so this process debounces for itself",
                *(self.name, self._redis.address, type(error).__name__, error),
            )
            self._alone = True
            call = _Call(key, run, None, time.monotonic() + self._wait_ms / 1_000)
        else:
            self._alone = False
            if not gone:
                previous = ""
            call = _Call(key, run, claim, time.monotonic() + due_in_ms / 1_000)  # from the reply on: never too early
        if not self._noted(call, previous):
            self._run(call)  # closed meanwhile: it may have superseded another process's call, so one must run

    def calls(self, key: str) -> Callable[[Callable[P, object]], Callable[P, None]]:
        """Make each call of a function, or of a method, one that is debounced. It returns None at once.

        Arguments:
            key: text with the function's arguments in braces, such as ``"product:{product_id}"``. Functions with the
                same text supersede each other.
        """

        def decorate(function: Callable[P, object]) -> Callable[P, None]:
            _refuse_async(function)
            template = Template(key, signature_of(function))

            @functools.wraps(function)
            def debounced(*arguments: P.args, **keywords: P.kwargs) -> None:
                self.call(template.fill(arguments, keywords), function, *arguments, **keywords)

            return debounced

        return decorate

    def cancel(self, key: str) -> bool:
        """Let no call for a key run that has not begun yet, in any process. Returns whether there was one.

        Raises ``ServerUnavailable`` when Redis does not answer: then only this process's calls are cancelled.
        """
        name = keys.debounced(self.name, key)
        with self._changed:
            mine = {slot for slot in self._slots if slot.call.key == key}
            self._forget(mine)
            waiting = [call for call in self._ready if call.key == key]
            for call in waiting:
                self._ready.remove(call)
        alone = sum(call.claim is None for call in (*waiting, *(slot.call for slot in mine)))
        try:
            # Every claim has a score above the "-" that keeps the key. One command, so no script.
            removed: int = self._redis.coordination.execute_command("ZREMRANGEBYSCORE", name, "1", "+inf")
        except UNAVAILABLE as error:
            self._counters.add("cancelled", len(mine) + len(waiting))
            raise ServerUnavailable(self._redis.address, error, doing=f"cancelling {key!r} elsewhere") from error
        self._counters.add("cancelled", removed + alone)
        return removed + alone > 0

    def stats(self) -> DebounceStats:
        """What it has done in this process."""
        counts = self._counters.read()
        names = ("calls", "runs", "superseded", "cancelled", "dropped", "failures", "alone")
        with self._changed:
            pending = len(self._slots) + len(self._ready)
        return DebounceStats(**{name: counts.get(name, 0) for name in names}, pending=pending)

    def close(self, *, run: bool = True, timeout: Duration = 30) -> bool:
        """End it: what is pending in this process runs now, here, one after the other, earlier than it was due.

        Arguments:
            run: False: drop what is pending; how many is logged.
            timeout: how long to wait for the calls that run in threads already.

        Returns whether all of them have ended. May be called twice.
        """
        timeout_ms = milliseconds(timeout, "timeout", zero_allowed=True)
        with self._changed:
            self._closed = True
            pending = deque(sorted([*self._ready, *(slot.call for slot in self._slots)], key=lambda call: call.due_s))
            self._ready.clear()
            self._forget(set(self._slots))
        try:
            while run and pending:
                self._run(pending.popleft())
        finally:
            if pending:
                self._counters.add("dropped", len(pending))
                logger.warning("debounce %r was closed; %d pending calls were dropped", self.name, len(pending))
        with self._changed:
            return self._changed.wait_for(lambda: self._running == 0, timeout_ms / 1_000)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Waiting

    def _noted(self, call: _Call, gone: str) -> bool:
        """Keep a call until it is due. Returns whether that can be: not once closed.

        It takes the place of this process's call before it where that will not run any more: its claim is ``gone``, or
        Redis does not know one of the two.
        """
        now_s = time.monotonic()
        with self._changed:
            if self._closed:
                return False
            slot = self._newest.get(call.key)
            if slot is not None and (call.claim is None or slot.call.claim is None or slot.call.claim == gone):
                if call.claim is None and self._max_wait_ms is not None:
                    call.due_s = min(call.due_s, slot.first_s + self._max_wait_ms / 1_000)
                slot.call = call
                self._counters.add("superseded")
                return True
            slot = self._newest[call.key] = _Slot(call, now_s)
            self._slots.add(slot)
        _timers.at(call.due_s, functools.partial(self._look_at, slot))
        return True

    def _look_at(self, slot: _Slot) -> None:
        """Its timer rings: hand the call to a thread, unless a newer one has taken its place."""
        with self._changed:
            if slot not in self._slots:
                return
            later_s = slot.call.due_s
            due = later_s <= time.monotonic()
            if due:
                self._forget({slot})
                self._ready.append(slot.call)
        if due:
            self._start_ready()
        else:
            _timers.at(later_s, functools.partial(self._look_at, slot))

    def _forget(self, slots: set[_Slot]) -> None:
        self._slots -= slots
        for slot in slots:
            if self._newest.get(slot.call.key) is slot:
                del self._newest[slot.call.key]

    # Running

    def _start_ready(self) -> None:
        """Have a thread run what is due, unless all are busy: then the first that is free does."""
        with self._changed:
            if not self._ready or self._workers >= self._most:
                return
            self._workers += 1
        if self._background.start(self._work) is None:  # the system has none, or one has not quite ended
            with self._changed:
                self._workers -= 1
            _timers.at(time.monotonic() + _LOOK_AGAIN_S, self._start_ready)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._ready:
                    self._workers -= 1  # under the lock in which another would rely on it
                    return
                call = self._ready.popleft()
                self._running += 1
            with suppress(BaseException):  # it has been logged, and the others must not suffer
                self._run(call)
            del call
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _run(self, call: _Call) -> None:
        if not self._taken(call):
            self._counters.add("superseded")
            return
        self._counters.add("runs")
        try:
            call.run()
        except BaseException as error:
            self._counters.add("failures")
            logger.exception("debounce %r: the call for %r failed", self.name, call.key)
            if not isinstance(error, Exception):  # Ctrl-C while it is closed
                raise

    def _taken(self, call: _Call) -> bool:
        """Whether a call that is due is ours to run."""
        if call.claim is None:
            return True
        late_s = time.monotonic() - call.due_s
        try:
            told = _TAKE(self._redis.coordination, claims=keys.debounced(self.name, call.key), claim=call.claim)
        except (*UNAVAILABLE, RuntimeError) as error:  # RuntimeError: the connections were closed before us
            why = f"Redis at {self._redis.address} did not answer ({type(error).__name__}: {error})"
        else:
            if told == 1:
                return True
            if told == 0 and late_s * 1_000 < _KEPT_MS:
                return False
            why = "Redis has lost it" if told else f"it was looked at {late_s:.0f} s late"
        self._counters.add("alone")
        logger.warning(
            "debounce %r: the call for %r runs, although a newer one may run too: %s", self.name, call.key, why
        )
        return True


def _refuse_async(function: Callable[..., object]) -> None:
    if not callable(function):
        raise TypeError(f"{function!r} cannot be called; give the function, and its arguments after it")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{function!r} is async, and runs in a thread, where nothing awaits it")


def _tell_what_is_lost() -> None:
    for debounce in list(_all):
        if pending := debounce.stats().pending:
            logger.warning("%r: the process ends, and %d calls are lost; close() runs them", debounce, pending)


atexit.register(_tell_what_is_lost)
