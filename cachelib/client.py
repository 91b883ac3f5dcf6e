"""redis-py's client with one connection per thread, for one server.

Everything that redis-py does for a connection (URL, TLS, ACL, protocol, timeouts, Sentinel) stays as it is. What is
left out is what it does around each command: taking a connection from a pool and giving it back, retries, and
measurements, which together cost as much as the round trip itself. Pipelines and subscriptions go through the pool as
ever. A command is sent once.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet, finalize

import redis
from hiredis import pack_command
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MasterDownError, ReadOnlyError, ResponseError

from .breaker import Pass
from .circuit import Circuit
from .forks import renew_after_fork

_QUIET_S = 0.01
"""A connection that was used so recently is used again without a look at it."""


class ThreadClient(redis.Redis):
    """A client whose threads keep a connection each, made by the first command and closed with the thread.

    A command is sent once. After an error that is not the server's answer the connection is closed, because nobody
    knows what is still to come on it; also when a signal or a time limit broke off in the middle. So it is after the
    answer that this server is a replica now: the next command asks anew who the primary is.
    """

    def __init__(self, *arguments: Any, circuit: Circuit | None = None, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._circuit = circuit
        self._own = threading.local()
        self._all: WeakSet[Any] = WeakSet()
        renew_after_fork(self)

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """Send one command and return its reply, as redis-py reads it. Raises redis-py's errors."""
        try:
            own = self._own.state
        except AttributeError:
            own = self._new_state()
        if own.busy:  # a signal handler, or a finaliser, in the middle of another command of this thread
            return super().execute_command(*arguments, **options)  # type: ignore[no-untyped-call]
        name = arguments[0]
        packed: Sequence[bytes] = (pack_command(_texts(arguments)),)  # type: ignore[arg-type]  # typed as a tuple of one
        if " " in name:  # a command of two words, which redis-py takes apart
            packed = own.connection.pack_command(*arguments)
        return self._exchange(own, packed, lambda: self.parse_response(own.connection, name, **options))  # type: ignore[no-untyped-call]

    def execute_packed(self, packed: bytes) -> Any:
        """Send one command that is packed already and return its reply as it is. Raises redis-py's errors."""
        try:
            own = self._own.state
        except AttributeError:
            own = self._new_state()
        if not own.busy:
            return self._exchange(own, (packed,), own.connection.read_response)
        connection = self.connection_pool.get_connection()
        try:
            connection.send_packed_command((packed,))
            return connection.read_response()
        finally:
            self.connection_pool.release(connection)

    def _exchange(self, own: "_ThreadState", packed: Sequence[bytes], read: Callable[[], Any]) -> Any:
        """Send what is packed over the thread's connection, and read the reply."""
        circuit = self._circuit
        passed = circuit.ask() if circuit is not None and circuit.troubled else Pass.CALL
        connection = own.connection
        own.busy = True
        try:
            now_s = time.monotonic()
            if now_s - own.used_s > _QUIET_S or not connection.is_connected:
                _freshen(connection)
            own.used_s = now_s
            connection.send_packed_command(packed)
            reply = read()
        except ResponseError as error:
            if circuit is not None:
                circuit.ended(passed, error)
            if _is_demoted(error):
                connection.disconnect()
            raise
        except BaseException as error:
            connection.disconnect()
            if circuit is not None:
                circuit.ended(passed, error)
            raise
        finally:
            own.busy = False
        if circuit is not None and circuit.troubled:
            circuit.answered(passed)
        return reply

    def close(self) -> None:
        """Close the connections of all threads, and the pool."""
        for connection in list(self._all):
            connection.disconnect()
        super().close()

    def renew_after_fork(self) -> None:
        """The parent's connections are the parent's."""
        self._own, self._all = threading.local(), WeakSet()

    def _new_state(self) -> "_ThreadState":
        pool = self.connection_pool
        state = _ThreadState(pool.connection_class(**pool.connection_kwargs))
        self._all.add(state.connection)
        self._own.state = state
        return state


class _ThreadState:
    """A thread's connection, closed when the thread ends: redis-py's connections alone wait for the collector."""

    __slots__ = ("__weakref__", "busy", "connection", "used_s")

    def __init__(self, connection: Any) -> None:
        self.busy = False
        self.used_s = 0.0
        self.connection = connection
        finalize(self, connection.disconnect).atexit = False


def _is_demoted(error: ResponseError) -> bool:
    """Whether a server says that it is a replica. Scripts of older servers say so in the middle of their error."""
    return isinstance(error, ReadOnlyError | MasterDownError) or "READONLY" in str(error)


def _freshen(connection: Any) -> None:
    """Connect, also when the server has closed the connection meanwhile or something is there that nobody asked for."""
    if connection.is_connected:
        try:
            spoilt = bool(connection.can_read())
        except (RedisConnectionError, OSError):
            spoilt = True
        if not spoilt:
            return
        connection.disconnect()
    connection.connect()


def _texts(arguments: tuple[Any, ...]) -> tuple[str | bytes, ...]:
    """Arguments as text. hiredis would format numbers itself, and crashes when a signal raises while it does."""
    return tuple([a if isinstance(a, str | bytes) else repr(a) for a in arguments])
