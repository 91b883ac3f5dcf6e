"""redis-py's client with one connection per thread.

Everything that redis-py does for a connection (URL, TLS, ACL, protocol, timeouts) stays as it is. What is left out is
what it does around each command: taking a connection from a pool and giving it back, retries, and measurements, which
together cost as much as the round trip itself. Pipelines and subscriptions go through the pool as ever.
"""

import os
import threading
from typing import Any
from weakref import WeakSet, finalize

import redis
from hiredis import pack_command
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError


class ThreadClient(redis.Redis):
    """A client whose threads keep a connection each, made by the first command and closed with the thread.

    A command is sent once. After an error that is not the server's answer the connection is closed, because nobody
    knows what is still to come on it; also when a signal or a time limit broke off in the middle.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._own = threading.local()
        self._own_process = os.getpid()
        self._all: WeakSet[Any] = WeakSet()

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """Send one command and return its reply, as redis-py reads it. Raises redis-py's errors."""
        own = self._own_state()
        if own.busy:  # a signal handler, or a finaliser, in the middle of another command of this thread
            return super().execute_command(*arguments, **options)  # type: ignore[no-untyped-call]
        connection = own.connection
        own.busy = True
        try:
            if _is_spoilt(connection):
                connection.disconnect()
            if " " in arguments[0]:  # a command of two words, which redis-py takes apart
                connection.send_command(*arguments)
            else:
                packed = pack_command(_texts(arguments))  # type: ignore[arg-type]  # typed as a tuple of one
                connection.send_packed_command((packed,))
            return self.parse_response(connection, arguments[0], **options)  # type: ignore[no-untyped-call]
        except ResponseError:
            raise
        except BaseException:
            connection.disconnect()
            raise
        finally:
            own.busy = False

    def close(self) -> None:
        """Close the connections of all threads, and the pool."""
        for connection in list(self._all):
            connection.disconnect()
        super().close()

    def _own_state(self) -> Any:
        if self._own_process != os.getpid():  # the parent's connections are the parent's
            self._own, self._own_process, self._all = threading.local(), os.getpid(), WeakSet()
        own = self._own
        if not hasattr(own, "state"):
            pool = self.connection_pool
            state = _ThreadState(pool.connection_class(**pool.connection_kwargs))
            self._all.add(state.connection)
            own.state = state
        return own.state


class _ThreadState:
    """A thread's connection, closed when the thread ends: redis-py's connections alone wait for the collector."""

    __slots__ = ("__weakref__", "busy", "connection")

    def __init__(self, connection: Any) -> None:
        self.busy = False
        self.connection = connection
        finalize(self, connection.disconnect).atexit = False


def _texts(arguments: tuple[Any, ...]) -> tuple[str | bytes, ...]:
    """Arguments as text. hiredis would format numbers itself, and crashes when a signal raises while it does."""
    return tuple([a if isinstance(a, str | bytes) else repr(a) for a in arguments])


def _is_spoilt(connection: Any) -> bool:
    """Whether the server has closed the connection, or something is there that nobody asked for."""
    if not connection.is_connected:
        return False
    try:
        return bool(connection.can_read())
    except (RedisConnectionError, OSError):
        return True
