"""Hears from Redis which keys have changed: one thread and one connection for all near caches of a process.

The server is asked to tell about every key under some prefixes (``CLIENT TRACKING ... BCAST``), whoever changes it:
no writer has to publish anything, and ``redis-cli`` is heard too. What a connection that breaks was about to tell is
lost, so nothing here depends on noticing that it broke:

- **Validity ends by itself.** A PING is sent every third of a heartbeat. Once its PONG has been read, all that the
  server had to tell before it got the PING has been read too, for it came on the same connection; so what near caches
  hold may be served until *the PING was sent* + ``heartbeat_s``, and not for a moment longer. A server that is away,
  paused or cut off, and a thread here that gets no turn, extend nothing.
- **Hence the bound.** Nothing is served longer than ``heartbeat_s`` after the reply to the write that changed it, and
  usually it goes within a millisecond. (Time in which the whole machine sleeps is not counted; and ``SWAPDB`` changes
  values of which the server tells nobody.)
- **Whoever begins to listen is emptied first**, after the server has agreed to tell and before validity begins; again
  after each new connection.

Prefixes are added by connecting anew, so that there is one way to begin, and not a second one that is seldom used.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from threading import Event, Lock, Thread, current_thread
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .connections import UNAVAILABLE, Connections
from .forks import renew_after_fork
from .pushes import is_pong as is_pong
from .pushes import listening_connection

logger = logging.getLogger(__name__)

THREAD_NAME = "petiole-listener"

_CHANNEL = "__redis__:invalidate"
_ANSWER_S = 2.0  # for what is said once, when a connection begins; a server that hangs takes connections and is silent
_SHORTEST_READ_S = 0.001
_LOCKED_S = 0.1  # longer than the lock is ever held, unless by the thread that asks
_REFUSED_S = 30.0  # a server that knows no CLIENT TRACKING, or forbids it, will not soon change its mind
_BACKOFF = ExponentialWithJitterBackoff(base=0.05, cap=2.0)

Names = Sequence[bytes]
"""Full names of keys, as Redis has them."""


class Subscriber(Protocol):
    """A near cache, as the listener sees it. Both are used by the listener's thread alone."""

    valid_until: float
    """Until when, by ``time.monotonic()``, what it holds may be served. 0 while nothing may."""

    def dropped(self, names: Names | None) -> None:
        """These keys have changed. ``None``: any may have."""


class Lost(Exception):
    """The server was silent for a heartbeat."""


class Listener:
    """Tells near caches what has changed. Starts its thread with the first that asks, ends it with the last.

    >>> listener = Listener(connections)
    >>> listener.watch([cache.keys.entry_prefix], store)

    Promise: while ``time.monotonic() < store.valid_until`` the store has been told of every change whose writer had
    its reply ``heartbeat_s`` ago or earlier. Non-promise: that it is told of each change once, or only of changes.

    Ends by itself soon after the connections were closed. Usable after a fork: the child hears nothing before it
    calls ``watch`` itself, on a connection of its own, and the parent hears on.

    Arguments:
        connections: the server. Held weakly.
        heartbeat_s: how long a change may go unnoticed when the connection is in trouble.
    """

    def __init__(self, connections: Connections, *, heartbeat_s: float = 1.0) -> None:
        if heartbeat_s <= 0:
            raise ValueError(f"heartbeat_s={heartbeat_s!r} must be more than zero")
        self.address = connections.address
        self.heartbeat_s = heartbeat_s
        self._connections = ref(connections)
        self._is_cluster = bool(getattr(connections, "is_cluster", False))
        self._watched: WeakKeyDictionary[Subscriber, tuple[bytes, ...]] = WeakKeyDictionary()
        self._told: list[tuple[ref[Subscriber], tuple[bytes, ...]]] = []  # the listener's thread alone changes it
        self._lock = Lock()
        self._stop = Event()
        self._thread: Thread | None = None
        self._connection: Any = None
        self._up = False
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"<Listener {self.address} [{'up' if self._up else 'down'}]>"

    @property
    def up(self) -> bool:
        """Whether the last that was heard of the connection is good. Near caches do not ask: they have a time."""
        return self._up

    def watch(self, prefixes: Sequence[str], subscriber: Subscriber) -> None:
        """Tell a subscriber about all keys that begin with one of the prefixes, for as long as it lives.

        Returns at once; within a third of a heartbeat the subscriber's ``valid_until`` is set, if the server can be
        reached. Costs nothing when it was called before, and may be called as long as the subscriber is off: a call
        from a signal handler, in the middle of another, does nothing. Nor does one once it is closed.

        Raises ``ValueError`` on a Cluster, and for an empty prefix, which would mean every key of the server.
        """
        if self._thread is not None and subscriber in self._watched:
            return
        if self._is_cluster:
            raise ValueError(f"near caches are not supported on a Cluster yet ({self.address}); leave out near=")
        if not prefixes or not all(prefixes):
            raise ValueError(f"prefixes={prefixes!r}: name at least one, and no empty one")
        if not self._lock.acquire(timeout=_LOCKED_S):
            return
        try:
            if self._is_closed(self._stop):
                return
            self._watched[subscriber] = tuple(prefix.encode() for prefix in prefixes)
            if self._thread is None:
                thread = Thread(target=self._run, args=(self._stop,), name=THREAD_NAME, daemon=True)
                thread.start()
                self._thread = thread
        except RuntimeError as error:  # no thread to be had; a read that could do without must not fail for it
            logger.debug("near caches stay off: %s", error)
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the thread and the connection: takes a third of a heartbeat, or what connecting takes."""
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not current_thread():
            thread.join()

    def renew_after_fork(self) -> None:
        """Be as new. Of the parent's connection the child closes its copy of the socket and says nothing on it."""
        inherited, self._connection = self._connection, None
        was_closed = self._stop.is_set()
        self._lock = Lock()
        self._stop = Event()
        if was_closed:
            self._stop.set()
        self._thread = None
        self._watched, self._told = WeakKeyDictionary(), []
        self._up = False
        if inherited is not None:
            inherited.disconnect()  # which looks at the process id; an open copy would keep the connection from ending

    def _run(self, stop: Event) -> None:
        failures, complained = 0, False
        while not self._is_over(stop):
            delay_s = 0.0
            try:
                self._connection = self._connect()
                for _ in self._beats(stop, self._connection):
                    if complained:
                        logger.warning("near caches are on again: Redis at %s is heard", self.address)
                    failures, complained = 0, False
            except Exception as error:  # whatever it was: what cannot be heard must not be served
                failures += 1
                refused = isinstance(error, ResponseError)
                delay_s = _REFUSED_S if refused else _BACKOFF.compute(failures)
                if not complained and not self._is_closed(stop):
                    unexpected = not isinstance(error, (*UNAVAILABLE, Lost))
                    logger.warning(_COMPLAINT, self.address, type(error).__name__, error, exc_info=unexpected)
                    complained = True
            finally:
                self._hear_no_more()
            stop.wait(delay_s)

    def _is_closed(self, stop: Event) -> bool:
        connections = self._connections()
        return stop.is_set() or connections is None or connections.closed

    def _is_over(self, stop: Event) -> bool:
        """Whether the thread has nothing to do any more. Then, and under the lock, it stops being the thread."""
        with self._lock:
            if not self._is_closed(stop) and len(self._watched):
                return False
            self._thread = None
            return True

    def _connect(self) -> Any:
        connections = self._connections()
        if connections is None:
            raise Lost("the connections are gone")
        return listening_connection(connections.blocking, THREAD_NAME, _ANSWER_S)

    def _beats(self, stop: Event, connection: Any) -> Iterator[None]:
        """Listen, and yield after each PONG. Ends when there is something else to listen to, or nothing."""
        with self._lock:
            tracked = without_overlap(prefix for prefixes in self._watched.values() for prefix in prefixes)
        _begin(connection, tracked)
        while not self._is_closed(stop) and self._adopt(tracked):
            sent = time.monotonic()  # before it is sent: the server cannot have got it earlier
            connection.send_command("PING", check_health=False)
            if not self._hear(connection, sent + self.heartbeat_s, until_pong=True):
                raise Lost(f"no answer for {self.heartbeat_s} s")
            self._extend(sent + self.heartbeat_s)
            yield
            self._hear(connection, sent + self.heartbeat_s / 3, until_pong=False)

    def _adopt(self, tracked: Names) -> bool:
        """Begin to tell those who came meanwhile. False if there is nobody, or another prefix is needed for one."""
        with self._lock:
            watched = list(self._watched.items())
        known = {id(subscriber) for reference, _ in self._told if (subscriber := reference()) is not None}
        new = [(subscriber, prefixes) for subscriber, prefixes in watched if id(subscriber) not in known]
        if not all(prefix.startswith(tuple(tracked)) for _, prefixes in new for prefix in prefixes):
            return False
        for subscriber, prefixes in new:
            if self._drop(subscriber, None):  # what it began to fetch before now was not watched over
                self._told.append((ref(subscriber), prefixes))
        return bool(watched)

    def _hear(self, connection: Any, until: float, *, until_pong: bool) -> bool:
        """Pass on what comes, until the PONG or a time. Whether there was a PONG.

        One that waits for a PONG gives up only when nothing is left to read: a thread that got no turn for a while
        finds the answer lying there.
        """
        while True:
            left_s = until - time.monotonic()
            if left_s <= 0 and not until_pong:
                return False
            try:
                message = connection.read_response(
                    disable_decoding=True,
                    timeout=max(left_s, _SHORTEST_READ_S),
                    disconnect_on_error=False,
                    push_request=True,
                )
            except RedisTimeoutError:
                if left_s <= 0:
                    return False
                continue
            if is_pong(message):
                return True
            if is_invalidation(message):
                names = message[-1]
                self._tell(names if isinstance(names, list) else None)  # None from a flush; text is somebody's PUBLISH

    def _tell(self, names: Names | None) -> None:
        for told in list(self._told):
            reference, prefixes = told
            subscriber = reference()
            theirs = names and [name for name in names if name.startswith(prefixes)]
            if subscriber is not None and (theirs or names is None) and not self._drop(subscriber, theirs):
                self._told.remove(told)

    def _drop(self, subscriber: Subscriber, names: Names | None) -> bool:
        """Tell one. False if it could not take it: then it is off until it asks again, and the others are heard on."""
        try:
            subscriber.dropped(names)
        except Exception:
            logger.exception("a near cache did not take what had changed; it is off")
            subscriber.valid_until = 0.0
            with self._lock:
                self._watched.pop(subscriber, None)
            return False
        return True

    def _extend(self, until: float) -> None:
        self._up = True
        self._told = [told for told in self._told if told[0]() is not None]
        for reference, _ in self._told:
            subscriber = reference()
            if subscriber is not None:
                subscriber.valid_until = until

    def _hear_no_more(self) -> None:
        self._up = False
        told, self._told = self._told, []
        for reference, _ in told:
            subscriber = reference()
            if subscriber is not None:
                subscriber.valid_until = 0.0
                self._drop(subscriber, None)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()


_COMPLAINT = "near caches are off, reads go to Redis: %s is not heard (%s: %s); trying on"


def _begin(connection: Any, prefixes: Names) -> None:
    """Connect, and have the server tell about these prefixes on this connection. Raises redis-py's errors.

    A RESP2 connection can be told only as a subscriber. A RESP3 connection need not be one, but the server bounds what
    it keeps for a subscriber that does not read, such as a process that is paused, and for others by default not.
    """
    connection.connect()
    pushes = int(connection.get_protocol()) == 3
    redirect = () if pushes else ("REDIRECT", _ask(connection, "CLIENT", "ID"))
    options = [part for prefix in prefixes for part in ("PREFIX", prefix)]
    _ask(connection, "CLIENT", "TRACKING", "ON", *redirect, "BCAST", *options)
    try:
        _ask(connection, "SUBSCRIBE", _CHANNEL)
    except ResponseError:  # an ACL may forbid the channel
        if not pushes:
            raise


def _ask(connection: Any, *command: Any) -> Any:
    """Send a command and return its reply. What is told before is skipped: whoever listens is emptied after this."""
    connection.send_command(*command, check_health=False)
    deadline = time.monotonic() + _ANSWER_S
    while time.monotonic() < deadline:
        reply = connection.read_response(disable_decoding=True, push_request=True)
        if not is_invalidation(reply):
            return reply
    raise RedisError(f"{command[0]} was not answered for {_ANSWER_S} s")


def is_invalidation(message: object) -> bool:
    """Whether this tells of changed keys, in its last item: pushed by RESP3, published by RESP2."""
    return isinstance(message, list) and message[:1] in ([b"invalidate"], [b"message"])


def without_overlap(prefixes: Iterable[bytes]) -> list[bytes]:
    """The prefixes that cover all of them: the server refuses two of which one begins with the other."""
    kept: list[bytes] = []
    for prefix in sorted(set(prefixes)):  # what covers a prefix is sorted before it
        if not kept or not prefix.startswith(kept[-1]):
            kept.append(prefix)
    return kept


_listeners: "WeakKeyDictionary[Connections, Listener]" = WeakKeyDictionary()


def listener_of(connections: Connections) -> Listener:
    """The listener of a server in this process: one for all caches."""
    return (
        _listeners.setdefault(connections, Listener(connections))
        if connections not in _listeners
        else _listeners[connections]
    )
