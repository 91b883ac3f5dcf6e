"""How something is acquired: take it, or wait in the queue until it is granted. Shared by locks and semaphores.

The shell around ``turn_take.lua``. The token is chosen before the first request, so every request can be repeated: a
reply that was lost, a broken connection, a restarted server all end in the same question, "how does it stand with my
token?". However it ends, nothing stays behind: what may have been taken for nobody is given back by the keeper.
"""

import logging
import math
import os
import socket
import threading
import time
from threading import Event
from types import TracebackType

from redis.exceptions import NoPermissionError, ResponseError

from ..cachelib.circuit import UNAVAILABLE
from ..cachelib.counters import Counters
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.tokens import Tokens
from .entered import Entered, calling_frame, owner_here
from .errors import LockError, LockReentered, LockTimeout, LockUnavailable, NotReplicated, PermitsExceeded
from .hold import NOT_OURS, Busy, Hold, Terms, valid_for_s
from .keeper import keeper_of
from .turn_store import Taken, TurnStore
from .wakeups import Line, wakeups_of

logger = logging.getLogger(__name__)

LONGEST_LABEL_BYTES = 200

_STAGGER_S, _LONGEST_STAGGER_S = 0.002, 0.1
"""Of those that look because a lease has run out, the first in the queue looks first; it settles it for all."""
_CLOCKS_DRIFT = 0.001
"""The share by which the server's clock and ours may part while one waits."""
_PAUSE_S = 0.05
_PATIENCE_S = 30.0
"""So long one that waits puts up with a server that does not answer."""
_REPLICATION_MS = 1_000

_tokens = Tokens()


def label_of(owner: str | None) -> str:
    """Who holds or waits, for those who look. Default: host and process."""
    if owner is None:
        return f"{socket.gethostname()}:{os.getpid()}"
    if not isinstance(owner, str) or not owner or len(owner.encode("utf-8", "replace")) > LONGEST_LABEL_BYTES:
        raise ValueError(f"owner={owner!r} must be text of 1 to {LONGEST_LABEL_BYTES} bytes")
    return "".join(letter if letter.isprintable() else "?" for letter in owner)


class Acquirable:
    """Something that one thread after another holds, for a time. The base of ``Lock``, and of the sides of others."""

    def __init__(
        self,
        store: TurnStore,
        what: str,
        units: int,
        terms: Terms,
        *,
        owner: str | None = None,
        reentrant: bool = False,
        replicas: int = 0,
        alone: bool = True,
    ) -> None:
        if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 0:
            raise ValueError(f"replicas={replicas!r} must be a whole number, 0 or more")
        self.what = what
        self._redis = store.redis
        self._store = store
        self._units = units
        self._terms = terms
        self._owner = owner
        if owner is not None:
            label_of(owner)
        self._reentrant = reentrant
        self._replicas = replicas
        self._keeper = keeper_of(store.redis)
        self._alone = alone  # a thread that holds it and waits for more would wait for itself
        self._counters = Counters()
        self._mine = threading.local()
        self._entered: Entered[Hold] = Entered()
        self._labels: dict[int, str] = {}
        self._line: Line | None = None

    def acquire(self, timeout: Duration | None = None) -> Hold:
        """Hold it, waiting for it if need be.

        Arguments:
            timeout: how long to wait at most. Default: for ever.

        Raises ``LockTimeout`` when it was not free in time, ``LockUnavailable`` when Redis does not answer,
        ``NotReplicated`` when too few replicas have confirmed it, and ``LockReentered`` where it would wait inside of a
        ``with`` block that holds it. Then nothing is held. (Of what was acquired without ``with`` nobody knows who will
        release it: who waits for himself there waits for ever, or until ``timeout``.)
        """
        return self.acquire_units(self._units, None if timeout is None else milliseconds(timeout, "timeout") / 1_000)

    def try_acquire(self) -> Hold | Busy:
        """Hold it if it is free now, in one round trip. Never overtakes those who wait.

        As a ``with`` block, ``Busy`` raises ``LockTimeout``. Raises ``LockUnavailable`` when Redis does not answer.
        """
        return self.try_acquire_units(self._units)

    def __enter__(self) -> Hold:
        token, hold = _tokens.next(), None
        try:
            hold = self.acquire_units(self._units, None, token)
            self._entered.push(hold)
            if self._alone and hold.frame is None:
                hold.frame = calling_frame()
            return hold
        except BaseException as error:  # out of a signal handler, between two lines
            if hold is not None:
                self._entered.drop(hold)
            self._undo(token, error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it. Raises ``LockLost`` when it was lost meanwhile and nothing else is being raised."""
        self._entered.leave(kind, error, trace)

    def shrink(self, hold: Hold, units: int) -> None:
        """Give back all but so many units of a hold. Raises ``ValueError``, ``LockLost`` and ``LockUnavailable``."""
        if hold.store.name != self._store.name:
            raise ValueError(f"{hold!r} is no hold of {self.what}")
        hold.raise_if_not_held()
        try:
            held = self._store.shrink(hold.token, units)
        except UNAVAILABLE as error:
            raise LockUnavailable(self.what, self._redis.address, error) from error
        if not held:
            hold.lose(NOT_OURS)
            hold.raise_if_not_held()
        hold.units = units

    def stats(self) -> dict[str, float]:
        """Counts of this object in this process.

        ``holds``: acquired. ``waits``: of those, had to wait. ``wait_s``, ``hold_s``: sums. ``timeouts``: not acquired
        in time. ``losses``: lost while held. ``overages``: released after they were lost.
        """
        counts = self._counters.read()
        whole = {name: float(counts.get(name, 0)) for name in ("holds", "waits", "timeouts", "losses", "overages")}
        return whole | {"wait_s": counts.get("wait_us", 0) / 1e6, "hold_s": counts.get("hold_us", 0) / 1e6}

    def _label(self) -> str:
        """Of this process: a forked child is another."""
        process = os.getpid()
        label = self._labels.get(process)
        if label is None:
            label = self._labels[process] = label_of(self._owner)
        return label

    def try_acquire_units(self, units: int) -> Hold | Busy:
        """``try_acquire`` for another number of units."""
        again = self._again()
        if again is not None:
            return again
        token = _tokens.next()
        try:
            return self._first(token, units)
        except BaseException as error:
            self._undo(token, error)
            raise

    def acquire_units(self, units: int, timeout_s: float | None, token: str = "") -> Hold:
        """``acquire`` for another number of units.

        Arguments:
            token: chosen by a caller who sees to it that nothing stays behind after an exception.
        """
        again = self._again()
        if again is not None:
            return again
        token, until = token or _tokens.next(), math.inf if timeout_s is None else time.monotonic() + timeout_s
        try:
            line = self._line
            if line is None or not line.up:  # nobody had to wait here lately: asking for a place can wait
                first = self._first(token, units)
                if isinstance(first, Hold):
                    return first
                line = None
            hold = self._wait(token, units, until, line)
            if hold is not None:
                return hold
        except BaseException as error:  # also out of a signal handler, between two lines: nothing stays behind
            self._undo(token, error)
            raise
        self._counters.add("timeouts")
        raise LockTimeout(self.what, timeout_s or 0.0)

    def _undo(self, token: str, error: BaseException) -> None:
        """Leave nothing behind. Raises ``LockUnavailable`` for an error of the server's."""
        unknown = not isinstance(error, LockError)  # whether a request is still on its way
        self._keeper.undo(self._store, token, self._terms.lease_ms, repeatedly=unknown)
        if isinstance(error, UNAVAILABLE) or (isinstance(error, RuntimeError) and self._redis.closed):
            refused = isinstance(error, ResponseError)
            raise LockUnavailable(self.what, self._redis.address, error, refused=refused) from error

    def _again(self) -> Hold | None:
        """What this owner holds already, where it may hold it twice."""
        if not self._reentrant:
            return None
        hold, owner = getattr(self._mine, "hold", (None, None))
        return hold.reenter() if hold is not None and hold.held and owner == owner_here() else None

    def _first(self, token: str, units: int) -> Hold | Busy:
        """The first request, which asks for no place in the queue. Raises redis-py's errors."""
        sent = time.monotonic()
        taken = self._store.take(token, units, self._terms.lease_ms, "", self._label())
        if taken.state == 1:
            return self._held(token, units, taken.fence, sent + valid_for_s(self._terms.lease_ms))
        self._refuse_never(taken, units)
        return Busy(max(0.0, (taken.ends_us - taken.now_us) / 1e6), taken.ahead, self.what)

    def _wait(self, token: str, units: int, until: float, line: Line | None) -> Hold | None:
        """Stand in the queue. None when the time is over; then the place was given back.

        Arguments:
            line: to use for the first question, if it is the very first.
        """
        began, waits, heard, silent_since = time.monotonic(), False, True, math.inf
        try:
            while True:
                try:
                    if line is None:
                        waits = waits or self._begin_to_wait()
                        line = self._line = wakeups_of(self._redis).line(self._store.slot)
                    try:
                        line.expect(token)
                        hold, heard = self._stand(line, token, units, until, heard, waits)
                    finally:
                        line.forget(token)
                    if hold is not None:
                        return hold
                    waits, silent_since = True, math.inf
                except UNAVAILABLE as error:
                    now = time.monotonic()
                    silent_since = min(silent_since, now)
                    in_vain = isinstance(error, NoPermissionError) or now - silent_since > _PATIENCE_S
                    if not waits or now >= until or in_vain:
                        raise
                    Event().wait(min(_PAUSE_S, until - now))
                line = None
                if time.monotonic() >= until:
                    self._leave(token)
                    return None
        finally:
            if waits:
                self._counters.add("wait_us", int((time.monotonic() - began) * 1_000_000))

    def _begin_to_wait(self) -> bool:
        if self._alone and self._keeper.waits_for_itself(self._store):
            raise LockReentered(self.what, by_task=self._keeper.runs_under(self._store))
        self._counters.add("waits")
        return True

    def _stand(
        self, line: Line, token: str, units: int, until: float, heard: bool, waits: bool
    ) -> tuple[Hold | None, bool]:
        """Ask how it stands, and wait until there is a reason to ask again: a grant, or a lease that has run out.

        Returns the hold, if it was granted, and whether something was heard.
        """
        line.subscribe(token)
        lease_ms = self._terms.lease_ms
        sent = time.monotonic()
        taken = self._store.take(token, units, lease_ms, line.channel, self._label())
        if taken.state == 1:
            deadline = sent + valid_for_s((taken.ends_us - taken.now_us) / 1_000)
            return self._held(token, units, taken.fence, deadline), True
        self._refuse_never(taken, units)
        if not waits:
            self._begin_to_wait()
        if not heard and not taken.queued_before:  # it was granted, and the server found nobody to tell
            line.close()
            return None, True
        runs_out_s = max(0.0, (taken.ends_us - taken.now_us) / 1e6) if taken.ends_us else lease_ms / 1_000
        look_at = sent + runs_out_s + min(_STAGGER_S * (taken.ahead + 1), _LONGEST_STAGGER_S)
        told = line.wait(token, min(until, look_at))
        if told is None or not told.fence:
            return None, told is not None
        # The lease began when it was granted, by the server's clock; its reply to us told how far that was from ours.
        granted_at = sent + ((told.ends_us - taken.now_us) / 1e6 - lease_ms / 1_000) * (1 - _CLOCKS_DRIFT)
        now = time.monotonic()
        deadline = min(granted_at, now) + valid_for_s(lease_ms)
        if now > deadline - valid_for_s(lease_ms) / 2:  # told late, or waited for so long that the clocks have parted
            return None, True
        return self._held(token, units, told.fence, deadline, by_another=True), True

    def _held(self, token: str, units: int, fence: int, deadline: float, *, by_another: bool = False) -> Hold:
        hold = Hold(self._store, self._keeper, self.what, token, fence, deadline, self._terms, self._counters, units)
        self._counters.add("holds")
        if self._reentrant:
            self._mine.hold = hold, owner_here()
        if self._replicas:
            self._confirm(hold, by_another)
        return hold

    def _confirm(self, hold: Hold, by_another: bool) -> None:
        """Have replicas confirm it, or give it back."""
        try:
            if by_another:  # WAIT counts what this thread's connection has written: a look writes
                taken = self._store.take(hold.token, hold.units, self._terms.lease_ms, "", self._label())
                if taken.state != 1 or taken.fence != hold.fence:
                    raise NotReplicated(self.what, self._replicas, 0)
            confirmed = self._store.confirm(self._replicas, _REPLICATION_MS)
        except BaseException:
            hold.release()
            raise
        if confirmed < self._replicas:
            hold.release()
            raise NotReplicated(self.what, self._replicas, confirmed)

    def _refuse_never(self, taken: Taken, units: int) -> None:
        if taken.state == -1:
            raise PermitsExceeded(self.what, units)

    def _leave(self, token: str) -> None:
        """Give back the place in the queue, or what was granted at the last moment."""
        try:
            self._store.give(token)
        except UNAVAILABLE:
            self._keeper.give_back(self._store, token, self._terms.lease_ms, repeatedly=True)
