"""``Barrier``: so many parties wait for each other, in whatever processes; when all are there, all go on.

Who arrives says so in a script that counts (``lua/barrier_arrive.lua``); whoever completes the number lets all pass in
the same moment, and tells their processes (``wakeups.py``), so nobody asks while it waits. The invariant: one opening
lets exactly so many pass, each of which was alive and had not left in the moment of the opening.
"""

import math
import time
from contextlib import suppress
from threading import Event
from typing import Any, NamedTuple

from ..cachelib.connections import UNAVAILABLE, Connections, require_connections
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.scripts import load
from ..cachelib.tokens import Tokens
from . import keys
from .errors import BarrierTimeout, BarrierUnavailable, PartiesDisagree
from .hold import lease_of
from .wakeups import Line, wakeups_of

MOST_PARTIES = 10_000

_PAUSE_S = 0.05
_FIRST_PATIENCE_S, _PATIENCE_S = 1.0, 30.0
"""So long one that arrives, and one that waits already, puts up with a server that does not answer."""

_tokens = Tokens()


class _Arrived(NamedTuple):
    """How it stands with one party."""

    state: int
    """1: it may pass. 0: it waits. -1: those who wait already wait for another number."""
    number: int
    """Its place; 1 if it waited before; the other number."""


_ARRIVE = load(__package__, "barrier_arrive", lambda reply: _Arrived(*reply))
_LEAVE = load(__package__, "barrier_leave", int)


class Barrier:
    """So many parties wait for each other, in whatever processes.

    >>> Barrier(redis, "stage-1", parties=8).wait(timeout="5m")
    3

    Promises: when ``parties`` are there, all of them go on, within milliseconds, and no one before; then the barrier is
    closed again for the next ones. Each is told its place in the order of arrival, from 0, so one of them can be given
    what one is to do. Who waits asks nothing, except three times per ``ttl`` whether it was told. A party whose process
    has died does not count, nor one that has left after its ``timeout``. A reply that was lost, a broken connection,
    and a server that restarts before all are there, are the same as a longer wait.

    Non-promises: a party that dies after the barrier has opened has passed it, and one that is stopped (SIGSTOP) counts
    until ``ttl`` is over; so does one whose machine has vanished from the network, and one that could not say that it
    leaves because Redis did not answer. A server that restarts without its data, after it has opened the barrier and
    before all have heard of it, lets those wait for the next opening.

    On a Cluster the server that has the barrier's slot knows who listens only of those who are connected to itself, and
    so are all that wait; when the slot moves they look again within a third of ``ttl``, and who was not counted
    meanwhile has lost its place in the order, no more.

    Safe to share between threads; each thread that waits is a party.

    Arguments:
        redis: from ``connect``.
        name: of the barrier; all parties give the same.
        parties: how many wait for each other, 1 to 10,000; all give the same number, else ``PartiesDisagree``.
        ttl: how long a party counts that is not heard of. From 0.1 s to an hour.
    """

    def __init__(self, redis: Connections, name: str, parties: int, *, ttl: Duration = 30) -> None:
        require_connections(redis)
        if isinstance(parties, bool) or not isinstance(parties, int) or not 1 <= parties <= MOST_PARTIES:
            raise ValueError(f"parties={parties!r} must be a whole number from 1 to {MOST_PARTIES}")
        self.name = name
        self.parties = parties
        self._redis = redis
        self._lease_ms = lease_of(ttl)
        self._what = f"barrier {name!r}"
        self._state = keys.barrier(name)
        self._arrived = keys.barrier_arrived(self._state)
        self._opened = keys.barrier_opened(self._state)

    def __repr__(self) -> str:
        return f"<Barrier {self.name!r} at {self._redis.address} parties={self.parties}>"

    def wait(self, timeout: Duration | None = None) -> int:
        """Wait until all parties are there. Returns how many of those that pass now came before this one.

        Arguments:
            timeout: how long at most. Default: for ever.

        Raises ``BarrierTimeout`` when too few came in time, ``PartiesDisagree`` when those who are there wait for
        another number, ``BarrierUnavailable`` when Redis does not answer. Then this party does not count.
        """
        timeout_s = None if timeout is None else milliseconds(timeout, "timeout") / 1_000
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        token = _tokens.next()
        try:
            place = self._wait(token, until)
        except BarrierUnavailable:
            place = self._leave(token)
            if place is None:
                raise
        except BaseException:
            self._leave(token)
            raise
        if place is None:  # unless it has opened at the last moment
            place = self._leave(token)
        if place is None:
            raise BarrierTimeout(self._what, timeout_s or 0.0, self.parties)
        return place

    def waiting(self) -> int:
        """How many wait now, those included that have died meanwhile. Raises redis-py's errors."""
        return int(self._client.zcard(self._arrived))

    @property
    def _client(self) -> Any:
        return self._redis.coordination

    def _wait(self, token: str, until: float) -> int | None:
        """The place of one that may pass. None when the time is over."""
        waits, heard, silent_since = False, True, math.inf
        while True:
            try:
                line = wakeups_of(self._redis).line(self._redis.slot(self._state))
                try:
                    line.expect(token)
                    place, heard = self._stand(line, token, until, heard)
                finally:
                    line.forget(token)
                if place is not None:
                    return place
                waits, silent_since = True, math.inf
            except UNAVAILABLE as error:
                now = time.monotonic()
                silent_since = min(silent_since, now)
                if now >= until or now - silent_since > (_PATIENCE_S if waits else _FIRST_PATIENCE_S):
                    raise BarrierUnavailable(self._what, self._redis.address, error) from error
                Event().wait(min(_PAUSE_S, until - now))
            if time.monotonic() >= until:
                return None

    def _stand(self, line: Line, token: str, until: float, heard: bool) -> tuple[int | None, bool]:
        """Say that it is there, and wait until it is told to pass, or until it has to say so again.

        Returns the place, if it may pass, and whether something was heard.
        """
        line.subscribe(token)
        sent = time.monotonic()
        arrived = _ARRIVE(
            self._client,
            state=self._state,
            arrived=self._arrived,
            opened=self._opened,
            token=token,
            parties=self.parties,
            lease_ms=self._lease_ms,
            channel=line.channel,
        )
        if arrived.state == 1:
            return arrived.number, True
        if arrived.state == -1:
            raise PartiesDisagree(self._what, self.parties, arrived.number)
        if not heard and not arrived.number:  # the server found nobody who listens, and did not count it
            line.close()
            return None, True
        told = line.wait(token, min(until, sent + self._lease_ms / 3_000))
        if told is None or not told.fence:
            return None, told is not None
        return told.fence - 1, True

    def _leave(self, token: str) -> int | None:
        """Its place, if the barrier has opened meanwhile."""
        with suppress(*UNAVAILABLE, RuntimeError):  # it does not count any more when its lease is over
            place = _LEAVE(self._client, state=self._state, arrived=self._arrived, opened=self._opened, token=token)
            return place if place >= 0 else None
        return None
