"""The floor: a round trip with nothing in it but the bytes. One socket, RESP by hand, replies read by hiredis."""

import socket
from collections.abc import Mapping

import hiredis

from .measure import Call
from .workload import MANY, TTL_S, WARM, Operation

PAYLOAD = b"x" * 180
LARGE_PAYLOAD = b"x" * 9_000
_KEY = b"floor:entry"
_LARGE_KEY = b"floor:large"
_TTL_MS = str(TTL_S * 1_000)


class Floor:
    """A connection that sends what is packed already, and waits for the replies."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.call("SET", _KEY, PAYLOAD)()
        self.call("SET", _LARGE_KEY, LARGE_PAYLOAD)()
        for key in MANY:
            self.call("SET", f"floor:{key}", PAYLOAD)()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def call(self, *command: str | bytes) -> Call:
        """A call that sends one command and reads its reply."""
        return self.pipeline(command)

    def pipeline(self, *commands: tuple[str | bytes, ...]) -> Call:
        """A call that sends several commands at once and reads all replies; returns the last."""
        packed = b"".join(_packed(command) for command in commands)
        reader, sock, count = hiredis.Reader(), self._socket, len(commands)

        def call_once() -> object:
            sock.sendall(packed)
            while True:
                reader.feed(sock.recv(65_536))
                reply = reader.gets()
                if reply is not False:
                    return reply

        def call() -> object:
            sock.sendall(packed)
            left, reply = count, None
            while left:
                reader.feed(sock.recv(65_536))
                while left and (reply := reader.gets()) is not False:
                    left -= 1
            return reply

        return call_once if count == 1 else call

    def of(self) -> Mapping[Operation, Call]:
        """The floor of each operation: what has to go over the wire for it, once."""
        get, store = self.call("GET", _KEY), self.call("SET", _KEY, PAYLOAD, "PX", _TTL_MS)
        return {
            Operation.GET: get,
            Operation.GET_OR_SET: get,
            Operation.CACHED: get,
            Operation.GET_TAGGED: get,
            Operation.GET_LARGE: self.call("GET", _LARGE_KEY),
            Operation.MISS: self.call("GET", "floor:absent"),
            Operation.SET: store,
            Operation.SET_TAGGED: store,
            Operation.GET_MANY: self.call("MGET", *(f"floor:{key}" for key in MANY)),
            Operation.SET_MANY: self.pipeline(*(("SET", f"floor:{key}", PAYLOAD, "PX", _TTL_MS) for key in MANY)),
            Operation.WARM: self.pipeline(*(("SET", f"floor:{key}", PAYLOAD, "PX", _TTL_MS) for key in WARM)),
            Operation.INVALIDATE: self.call("DEL", "floor:absent"),
            Operation.NEAR_COPY: get,
            Operation.NEAR_SHARED: get,
        }


def _packed(command: tuple[str | bytes, ...]) -> bytes:
    parts = [part.encode() if isinstance(part, str) else part for part in command]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
