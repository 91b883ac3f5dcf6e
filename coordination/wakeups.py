"""Hearing that what one waits for was granted: one connection per process and server, however many threads wait.

Each process has a channel of its own. Whoever makes room publishes there, in the script that grants; the server's
answer to PUBLISH tells it whether anybody listens, so a dead process is passed over in the same moment. No thread is
kept for this: of those that wait one reads the connection, tells the others what is theirs, and hands the reading on
when it leaves.

A message is a hint that saves a question. When the connection breaks, all that wait look for themselves.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..cachelib.client import ThreadClient
from ..cachelib.cluster import ClusterClient
from ..cachelib.connections import UNAVAILABLE, Connections
from ..cachelib.forks import renew_after_fork
from ..cachelib.pushes import is_pong, listening_connection
from ..cachelib.tokens import Tokens
from . import keys
from .turn_store import node_of

logger = logging.getLogger(__name__)

_ANSWER_S = 2.0
_HEARTBEAT_S = 10.0
"""After so long a silence the server is asked whether it is there: networks forget connections that are silent."""
_SHORTEST_READ_S = 0.001
_CONNECTING_S = 0.02
_READER = "reader"

_tokens = Tokens()


class Told(NamedTuple):
    """What was told to one that waits."""

    fence: int
    """0: look again."""
    ends_us: int
    """The end of its lease, by the server's clock."""


_LOOK = Told(0, 0)


class Waiter:
    """One that waits."""

    __slots__ = ("event", "told")

    def __init__(self) -> None:
        self.event = Event()
        self.told: Told | None = None

    def tell(self, told: Told) -> None:
        """A grant is not overwritten by a hint to look."""
        if self.told is None or told.fence:
            self.told = told
        self.event.set()


class Line:
    """The connection to one server on which a process hears of its grants."""

    def __init__(self, client_of: Callable[[], ThreadClient], unreachable: Callable[[], None]) -> None:
        self._client_of = client_of
        self._unreachable = unreachable
        self._connection: Any = None
        self._waiters: dict[str, Waiter] = {}
        self._heard = 0.0
        self._pinged = 0.0
        self._reader: dict[str, str] = {}
        """Whose turn it is to read: one token, or none. A dict, because it is taken and known to be taken in one step:
        an exception out of a signal handler cannot come in between."""
        self.channel = keys.granted(_tokens.next())
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"<Line [{'up' if self.up else 'down'}, {len(self._waiters)} wait]>"

    @property
    def up(self) -> bool:
        """Whether it was subscribed when last heard of."""
        return self._connection is not None

    def renew_after_fork(self) -> None:
        """A child has a channel of its own, and nobody who waits."""
        inherited, self._connection = self._connection, None
        self._reader, self._waiters = {}, {}
        self.channel = keys.granted(_tokens.next())
        if inherited is not None:
            inherited.disconnect()  # which looks at the process id

    def close(self) -> None:
        """Close the connection; who waits looks for itself."""
        self._broken(self._connection)

    def expect(self, token: str) -> None:
        """Whoever is going to wait says so before it asks for a place in the queue; and ``forget``, however it ends."""
        self._waiters[token] = Waiter()

    def forget(self, token: str) -> None:
        """It waits no more. Somebody else must read, if it was the one that did."""
        self._waiters.pop(token, None)
        self._hand_on(token)

    def subscribe(self, token: str) -> None:
        """See to it that grants can be heard. Raises redis-py's errors."""
        while self._connection is None or time.monotonic() - self._heard >= _HEARTBEAT_S:
            if self._is_reader(token):
                try:
                    if self._connection is not None:
                        self._check()
                    if self._connection is None:
                        self._connect()
                finally:
                    self._hand_on(token)
                return
            if self._connection is not None:
                return  # somebody reads it, and sees to it
            self._waiters[token].event.wait(_CONNECTING_S)  # somebody is connecting
            self._waiters[token].event.clear()

    def wait(self, token: str, until: float) -> Told | None:
        """Wait until it is told something, or until a time by ``time.monotonic()``."""
        waiter = self._waiters[token]
        try:
            while waiter.told is None:
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return None
                if self._is_reader(token):
                    if waiter.told is None:
                        self._read(until)
                else:
                    waiter.event.wait(left_s)
                    waiter.event.clear()
            told, waiter.told = waiter.told, None
            return told
        finally:
            self._hand_on(token)

    def _is_reader(self, token: str) -> bool:
        """Whether it is this one's turn to read, until it hands on."""
        return self._reader.setdefault(_READER, token) == token

    def _hand_on(self, leaving: str) -> None:
        """Read no more, and have another of those that wait read, if nobody does."""
        if self._reader.get(_READER) == leaving:
            self._reader.pop(_READER, None)
        if not self._reader:
            for token, waiter in list(self._waiters.items()):
                if token != leaving:
                    waiter.event.set()
                    return

    def _connect(self) -> None:
        connection = listening_connection(self._client_of(), "petiole-grants", _ANSWER_S)
        try:
            connection.connect()
            connection.send_command("SUBSCRIBE", self.channel, check_health=False)
            connection.read_response(disable_decoding=True, push_request=True)
        except BaseException as error:
            connection.disconnect()
            if isinstance(error, UNAVAILABLE):
                self._unreachable()
            raise
        self._heard, self._pinged = time.monotonic(), 0.0
        self._connection = connection

    def _check(self) -> None:
        """Whether a connection that was silent still works; if not, it is closed."""
        until = time.monotonic() + _ANSWER_S
        self._heard = -_HEARTBEAT_S  # whatever is heard now is newer
        while self._connection is not None and self._heard < 0 and time.monotonic() < until:
            self._read(until)
        if self._heard < 0:
            self._broken(self._connection)

    def _read(self, until: float) -> None:
        """Read one message, and tell whom it concerns. By the one that has the reading alone."""
        connection = self._connection
        if connection is None:
            self._broken(None)
            return
        try:
            now = time.monotonic()
            if not self._pinged and now - self._heard >= _HEARTBEAT_S:
                connection.send_command("PING", check_health=False)
                self._pinged = now
            quiet_until = self._pinged + _ANSWER_S if self._pinged else self._heard + _HEARTBEAT_S
            message = connection.read_response(
                disable_decoding=True,
                timeout=max(_SHORTEST_READ_S, min(until, quiet_until) - now),
                disconnect_on_error=False,
                push_request=True,
            )
        except RedisTimeoutError:
            if self._pinged and time.monotonic() - self._pinged >= _ANSWER_S:
                self._broken(connection)
            return
        except UNAVAILABLE as error:
            logger.debug("the connection on which grants are heard broke: %s", error)
            self._broken(connection)
            return
        except BaseException:  # a signal, in the middle of a reply perhaps
            self._broken(connection)
            raise
        self._heard, self._pinged = time.monotonic(), 0.0
        if not is_pong(message):
            self._tell(message)

    def _tell(self, message: object) -> None:
        if not isinstance(message, list) or len(message) != 3 or message[0] != b"message":
            return
        try:
            token, fence, ends_us = message[2].decode().split(" ")
            told = Told(int(fence), int(ends_us))
        except (AttributeError, UnicodeDecodeError, ValueError):  # somebody else's message
            return
        waiter = self._waiters.get(token)
        if waiter is not None:
            waiter.tell(told)

    def _broken(self, connection: Any) -> None:
        if connection is self._connection:
            self._connection = None
        if connection is not None:
            connection.disconnect()
        for waiter in list(self._waiters.values()):
            waiter.tell(_LOOK)


class Wakeups:
    """The lines of one process to the servers of one ``Connections``: one, or one for each node of a Cluster."""

    def __init__(self, redis: Connections) -> None:
        self._redis = ref(redis)
        self._lines: WeakKeyDictionary[ThreadClient, Line] = WeakKeyDictionary()
        redis.own(self)

    def __repr__(self) -> str:
        return f"<Wakeups {list(self._lines.values())}>"

    def closing(self) -> None:
        """Listen no more: what is given back now is for other processes."""
        self.close()

    def close(self) -> None:
        """Close all lines."""
        for line in list(self._lines.values()):
            line.close()

    def line(self, slot: int) -> Line:
        """The line to the server that has a slot. Raises redis-py's errors where it is not known which that is."""
        redis = self._redis()
        if redis is None or redis.closed:
            raise RuntimeError(f"the connections to {redis.address if redis else 'Redis'} were closed; connect again")
        client = node_of(redis, slot)
        known = self._lines.get(client)
        if known is None:
            reference = ref(client)

            def client_of() -> ThreadClient:
                client = reference()
                if client is None:
                    raise RedisConnectionError("the server is no part of the cluster any more")
                return client

            known = self._lines.setdefault(client, Line(client_of, lambda: self._look_again(slot)))
        return known

    def _look_again(self, slot: int) -> None:
        """On a Cluster another node may have the slot by now; only commands that fail find that out by themselves."""
        redis = self._redis()
        client: Any = None if redis is None or redis.closed else redis.coordination
        if isinstance(client, ClusterClient):
            with suppress(*UNAVAILABLE):
                client.look_again(avoiding=client.owner(slot))


_wakeups: "WeakKeyDictionary[Connections, Wakeups]" = WeakKeyDictionary()


def wakeups_of(redis: Connections) -> Wakeups:
    """The wake-ups of a server in this process: one for all that wait."""
    return _wakeups.get(redis) or _wakeups.setdefault(redis, Wakeups(redis))
