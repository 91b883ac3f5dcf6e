"""``Redlock``: a lock that a majority of independent servers must grant, so that it outlives the loss of a few of them.

Each server is asked for the same lock, by the same script as ``Lock`` but without a queue, one after another and in the
same order by all, which splits the votes least. What is granted by a majority is held for as long as a majority of the
leases is valid. The invariant of the fence: before a hold is returned, a majority has stored its fence. Any later
majority shares a server with that one, which grants a higher one; so fences rise, whatever the servers' clocks say.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from threading import Event
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from ..cachelib.connections import UNAVAILABLE, Connections, Profile, require_connections
from ..cachelib.counters import Counters
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.tokens import Tokens
from .acquiring import label_of
from .entered import Entered
from .errors import LockLost, LockTimeout, LockUnavailable
from .hold import Busy, Hold, Terms, valid_for_s
from .keeper import keeper_of
from .lock import terms_of
from .turn_store import Taken, TurnStore

logger = logging.getLogger(__name__)

KIND = "redlock"

_FEWEST = 3
_EXPIRY_S = 0.002
"""What a server may be late or early with the end of a lease."""
_LONGEST_ANSWER_S = 0.25
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.2
_PATIENCE_S = 30.0
"""So long one that waits puts up with too few servers that answer."""

_tokens = Tokens()


class _Store(TurnStore):
    """What is said to one of the servers, over a client that does not wait long: the others are there for that."""

    def __init__(self, redis: Connections, name: str, profile: Profile) -> None:
        super().__init__(redis, KIND, name, capacity=1)
        self._profile = profile

    @property
    def _client(self) -> Any:
        return self.redis.client(self._profile)


class _Grant(NamedTuple):
    """What one server has granted."""

    store: _Store
    token: str
    fence: int


class RedlockHold:
    """Leases on a majority of servers. Made by ``Redlock.acquire``; true as a condition.

    >>> with Redlock([first, second, third], "invoice:42") as hold:
    ...     charge(fence=hold.fence)
    ...     hold.raise_if_lost()

    Each server's lease is renewed on its own; lost is the hold when fewer than a majority of them are valid. A server
    that has lost its lease is not asked for another one. Otherwise as ``Hold``.
    """

    def __init__(self, what: str, fence: int, quorum: int, holds: Sequence[Hold], terms: Terms) -> None:
        self.what = what
        """What is held, for people: such as ``redlock 'invoice:42'``."""
        self.fence = fence
        """A number above that of every earlier hold of the same thing."""
        self._quorum = quorum
        self._holds = holds
        self._terms = terms
        self._ended = threading.Lock()  # whoever acquires it decides how it ended; nobody waits for it
        self._lost = self._released = False
        self._callbacks: list[Callable[[RedlockHold], None]] = []
        for hold in holds:
            hold.on_lost(self._one_lost)

    def __repr__(self) -> str:
        state = "lost" if self.lost else f"{self.remaining:.1f} s" if self.held else "released"
        return f"<RedlockHold {self.what} fence={self.fence} [{state}]>"

    def __bool__(self) -> bool:
        return True

    @property
    def deadline(self) -> float:
        """Until when a majority of leases is valid for certain, by ``time.monotonic()``; renewals move it."""
        valid = sorted((hold.deadline for hold in self._holds if hold.held), reverse=True)
        return valid[self._quorum - 1] - _EXPIRY_S if len(valid) >= self._quorum else 0.0

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; 0 when it is not held any more."""
        return 0.0 if self._ended.locked() else max(0.0, self.deadline - time.monotonic())

    @property
    def lost(self) -> bool:
        """Whether somebody else may hold it by now. Asks nobody but the clock. Not of one that was released."""
        if self._lost:
            return True
        if self._released or time.monotonic() < self.deadline:
            return False
        if self._ended.acquire(blocking=False):
            self._lost = True
            self._forget()
        return True  # another thread may be in the middle of it: the clock has said it all the same

    @property
    def held(self) -> bool:
        """Whether it is held: neither lost nor released."""
        return not self.lost and not self._ended.locked()

    def raise_if_lost(self) -> None:
        """Raise ``LockLost`` when somebody else may hold it by now. Costs no round trip."""
        if self.lost:
            raise LockLost(self.what, self.fence, f"fewer than {self._quorum} servers have confirmed it in time")

    def on_lost(self, callback: Callable[["RedlockHold"], None]) -> None:
        """Have a function called with this hold, once, when it is lost; in a thread of its own.

        At once where it is lost already. Not called when it is released. What it raises is logged.
        """
        self._callbacks.append(callback)
        if self.lost:
            self._call_back()

    def release(self) -> bool:
        """Give it back on every server. May be repeated, and never raises because servers are away.

        Returns whether a majority held it until now.
        """
        was_held = self.held and self._ended.acquire(blocking=False)
        self._released = self._released or was_held
        released: list[bool] = []
        with ExitStack() as rest:  # which goes on with the others when one is interrupted
            for hold in self._holds:
                rest.callback(lambda one: released.append(one.release()), hold)
        return was_held and sum(released) >= self._quorum

    def abandon(self) -> None:
        """Give it back soon, everywhere: nobody will come back to it."""
        self._released = self._released or self._ended.acquire(blocking=False)
        for hold in self._holds:
            hold.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it. Raises ``LockLost`` when it was lost meanwhile and nothing else is being raised."""
        if not self.release() and error is None:
            self.raise_if_lost()

    def _forget(self) -> None:
        """What is left on some servers is given back, by their keepers."""
        logger.warning("%s (fence %d) was lost: fewer than %d servers keep it", self.what, self.fence, self._quorum)
        for hold in self._holds:
            keeper = keeper_of(hold.store.redis)
            if keeper.let_go(hold):
                keeper.give_back(hold.store, hold.token, self._terms.lease_ms)

        self._call_back()

    def _one_lost(self, _: Hold) -> None:
        if self.lost:
            self._call_back()

    def _call_back(self) -> None:
        while self._callbacks:
            try:
                callback = self._callbacks.pop(0)
            except IndexError:  # another thread was first
                return
            keeper_of(self._holds[0].store.redis).calling_back.start(partial(callback, self))


class Redlock:
    """One holder at a time, granted by a majority of independent servers.

    >>> with Redlock([first, second, third], "invoice:42", ttl=10) as hold:
    ...     charge(fence=hold.fence)

    Nearly always ``Lock`` is what you want: it is one round trip, fair, and woken instead of asking again. A failover
    of its server may lose a lock; the fence, checked where it is written, catches that, and has to be checked anyway.
    Take this one where several servers without replicas are there already, and work has to go on while one is away.

    Promises: while its leases are valid on a majority of the servers, nobody else holds it; so it is there, and stays
    held, while a minority of servers is away. Its validity is ``ttl`` less what acquiring took, 1 % for clocks of other
    speed, and 2 ms. What was not granted by a majority is given back everywhere. A server that hangs costs a fortieth
    of ``ttl``, 0.25 s at most, and is then asked last for the next ``ttl``. ``hold.fence`` rises with every hold,
    whatever the clocks of the servers say.

    Non-promises. Kleppmann's critique of the algorithm is right: it relies on time. A process that is stopped for
    longer than its lease goes on beside the next holder until it looks at ``hold.lost``; a server whose clock is set
    forward ends its lease early, and grants it to another. Only the fence, checked where it is written, refuses the
    late one. A server that restarts without what it had stored grants anew what is still held, and forgets the fence:
    keep it away for ``ttl``, or have it store every write (``appendfsync always``). State is kept for two hours after
    the last use; then the fence begins with the servers' clocks again. The servers are to be independent: replicas of
    one another, or databases of one server, make no majority. A server that has lost its lease is not asked for another
    one, so a long hold does not outlive the restart of all servers in turn. No order: who waits asks again, after a
    pause of chance.

    Safe to share between threads; a forked child holds nothing of what its parent holds.

    Arguments:
        servers: an odd number of them, 3 or more, each from ``connect``; all processes name the same.
        name: what is locked. It is no ``Lock`` of that name.
        ttl, renew, max_hold, owner: as for ``Lock``; ``ttl`` is a second at least.
    """

    def __init__(
        self,
        servers: Sequence[Connections],
        name: str,
        *,
        ttl: Duration = 10,
        renew: bool = True,
        max_hold: Duration | None = None,
        owner: str | None = None,
    ) -> None:
        self.name = name
        self._servers = _independent(servers)
        self._quorum = len(self._servers) // 2 + 1
        self._terms = terms_of(ttl, renew, max_hold)
        if self._terms.lease_ms < 1_000:
            raise ValueError(f"ttl={ttl!r} is too short to ask {len(self._servers)} servers: a second at least")
        answer_s = min(_LONGEST_ANSWER_S, self._terms.lease_ms / 40_000)
        profile = Profile("redlock", answer_s=answer_s, connect_s=answer_s)
        self._stores = [_Store(server, name, profile) for server in self._servers]
        self._what = f"redlock {name!r}"
        self._owner = owner
        label_of(owner)
        self._counters = Counters()
        self._silent: dict[_Store, float] = {}
        self._entered: Entered[RedlockHold] = Entered()

    def __repr__(self) -> str:
        return f"<Redlock {self.name!r} at {len(self._servers)} servers>"

    def acquire(self, timeout: Duration | None = None) -> RedlockHold:
        """Hold it, asking again after a pause of chance if need be.

        Arguments:
            timeout: how long to go on asking. Default: for ever.

        Raises ``LockTimeout`` when it was not free in time, and ``LockUnavailable`` when too few servers answer: at
        once when it is so from the beginning, later after 30 s or the timeout. Then nothing is held.
        """
        timeout_s = None if timeout is None else milliseconds(timeout, "timeout") / 1_000
        began = time.monotonic()
        silent_since: float | None = None
        waits = False
        while True:
            error: LockUnavailable | None = None
            try:
                hold = self.try_acquire()
                if isinstance(hold, RedlockHold):
                    return hold
                silent_since = None
            except LockUnavailable as unavailable:
                silent_since = silent_since or time.monotonic()
                if not waits or time.monotonic() - silent_since > _PATIENCE_S:
                    raise
                error = unavailable
            waits = True
            pause_s = random.uniform(_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S)
            if timeout_s is not None:
                left_s = began + timeout_s - time.monotonic()
                if left_s <= 0:
                    raise error or LockTimeout(self._what, timeout_s)
                pause_s = min(pause_s, left_s)
            Event().wait(pause_s)

    def try_acquire(self) -> RedlockHold | Busy:
        """Hold it if a majority grants it now. Raises ``LockUnavailable`` when too few servers answer."""
        token, asked = _tokens.next(), list[tuple[_Store, str]]()
        try:
            hold = self._attempt(token, asked)
        except BaseException:
            self._give_back(asked)
            raise
        if isinstance(hold, Busy):
            self._give_back(asked)
        return hold

    def __enter__(self) -> RedlockHold:
        return self._entered.enter(self.acquire)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it. Raises ``LockLost`` when it was lost meanwhile and nothing else is being raised."""
        self._entered.leave(kind, error, trace)

    def _attempt(self, token: str, asked: list[tuple[_Store, str]]) -> RedlockHold | Busy:
        """Ask all, and have the highest fence stored by a majority.

        Arguments:
            asked: is filled with what may have been granted.
        """
        began = time.monotonic()
        deadline = began + valid_for_s(self._terms.lease_ms)
        grants: list[_Grant] = []
        refusals: list[Taken] = []
        failures: list[tuple[_Store, BaseException]] = []
        label = label_of(self._owner)
        for number, store in self._in_turn(began):
            if len(grants) >= self._quorum and store in self._silent:
                break  # nobody needs it, and it may cost time
            if len(self._stores) - len(refusals) < self._quorum:
                break
            own_token = f"{token}.{number}"  # a server that is named twice, by two names, grants it once
            asked.append((store, own_token))
            try:
                taken = store.take(own_token, 1, self._terms.lease_ms, "", label)
            except UNAVAILABLE as error:
                failures.append((store, error))
                self._silent[store] = time.monotonic() + self._terms.lease_ms / 1_000
                continue
            self._silent.pop(store, None)
            if taken.state == 1:
                grants.append(_Grant(store, own_token, taken.fence))
            else:
                refusals.append(taken)
                asked.pop()
        fence = max((grant.fence for grant in grants), default=0)
        kept = self._stored(grants, fence, label, failures) if len(grants) >= self._quorum else []
        if len(kept) >= self._quorum and time.monotonic() < deadline - _EXPIRY_S:
            tokens = {grant.token for grant in kept}
            holds = [self._hold_of(grant, deadline) for grant in kept]
            self._give_back([(store, one) for store, one in asked if one not in tokens])
            return RedlockHold(self._what, fence, self._quorum, holds, self._terms)
        if len(self._stores) - len(failures) < self._quorum:
            addresses = ", ".join(store.redis.address for store, _ in failures)
            raise LockUnavailable(self._what, addresses, failures[-1][1]) from failures[-1][1]
        ends_s = [max(0.0, (taken.ends_us - taken.now_us) / 1e6) for taken in refusals]
        return Busy(max(ends_s, default=0.0), 0, self._what)

    def _stored(
        self, grants: Sequence[_Grant], fence: int, label: str, failures: list[tuple[_Store, BaseException]]
    ) -> list[_Grant]:
        """Which of those that granted have the fence. One that grants anew, for its lease has run out, counts not."""
        kept = []
        for grant in grants:
            if grant.fence < fence:
                try:
                    taken = grant.store.take(grant.token, 1, self._terms.lease_ms, "", label, least_fence=fence)
                except UNAVAILABLE as error:
                    failures.append((grant.store, error))
                    continue
                if taken.state != 1 or taken.fence != fence:
                    continue
            kept.append(grant)
        return kept

    def _hold_of(self, grant: _Grant, deadline: float) -> Hold:
        keeper = keeper_of(grant.store.redis)
        what = f"{self._what} at {grant.store.redis.address}"
        return Hold(grant.store, keeper, what, grant.token, grant.fence, deadline, self._terms, self._counters)

    def _give_back(self, asked: Sequence[tuple[_Store, str]]) -> None:
        """On servers that answer at once; on the others as soon as they do, for what was asked may still arrive."""
        for store, token in asked:
            if store not in self._silent:
                try:
                    store.give(token)
                    continue
                except UNAVAILABLE:
                    self._silent[store] = time.monotonic() + self._terms.lease_ms / 1_000
                except RuntimeError:  # its connections were closed: the lease ends by itself
                    continue
            keeper_of(store.redis).give_back(store, token, self._terms.lease_ms, repeatedly=True)

    def _in_turn(self, now: float) -> list[tuple[int, _Store]]:
        """The servers in the order of all processes; those that hang come last."""
        for store, until in list(self._silent.items()):
            if until <= now:
                self._silent.pop(store, None)
        return sorted(enumerate(self._stores), key=lambda one: one[1] in self._silent)


def _independent(servers: Sequence[Connections]) -> tuple[Connections, ...]:
    """The servers. Raises ``ValueError`` for such as make no majority."""
    several = tuple(servers)
    if len(several) < _FEWEST:
        raise ValueError(
            f"{len(several)} servers make no majority that outlives one of them: name 3 or more; for one, use Lock"
        )
    if len(several) % 2 == 0:
        raise ValueError(
            f"{len(several)} servers: an even number outlives no more failures than {len(several) - 1}, and may be "
            "split in halves; leave one out, or add one"
        )
    by_place: dict[str, Connections] = {}
    for number, server in enumerate(several):
        require_connections(server, f"servers[{number}]")
        place = _place(server)
        if place in by_place:
            raise ValueError(
                f"{server.address} and {by_place[place].address} are one server, which makes no majority by itself"
            )
        by_place[place] = server
    return tuple(by_place[place] for place in sorted(by_place))


def _place(server: Connections) -> str:
    """Where it is, whatever the user, the database and the options."""
    parts = urlsplit(server.address)
    place = parts.netloc.rpartition("@")[2].lower().replace("localhost", "127.0.0.1")
    if not place:  # a socket
        return parts.path
    return place if ":" in place else f"{place}:6379"
