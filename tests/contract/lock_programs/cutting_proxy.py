"""A proxy before a server that cuts connections: at a request that it was told of, or anywhere in the bytes."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Moment = Literal["before", "within", "after"]
"""Of a cut: the server gets nothing of the request; a part of it; all of it, and only its reply is lost."""

JOIN_S = 10.0


class CuttingProxy:
    """Hands on everything, until it is told to cut."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.cuts = 0
        self._lock = threading.Lock()
        self._planned: list[tuple[bytes, Moment]] = []
        self._chooses: Callable[[], Moment | None] = lambda: None
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self, request: bytes, *moments: Moment) -> None:
        """Cut at the next request that contains these bytes, and at those after it, one moment for each."""
        with self._lock:
            self._planned = [(request, moment) for moment in moments]

    def cut_now_and_then(self, chooses: Callable[[], Moment | None]) -> None:
        """Let somebody decide at each request."""
        self._chooses = chooses

    def close(self) -> None:
        """Close all connections."""
        for one in [self._listening, *self._sockets]:
            _shut(one)
        for thread in self._threads:
            thread.join(JOIN_S)
        for one in [self._listening, *self._sockets]:
            one.close()

    def _moment(self, data: bytes) -> Moment | None:
        with self._lock:
            if self._planned and self._planned[0][0] in data:
                self.cuts += 1
                return self._planned.pop(0)[1]
            chosen = self._chooses()
            self.cuts += chosen is not None
            return chosen

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._target_port))
            except OSError:
                return
            self._sockets += [client, server]
            cut = threading.Event()
            for work in ((self._ask, client, server, cut), (self._answer, server, client, cut)):
                self._threads.append(threading.Thread(target=work[0], args=work[1:], daemon=True))
                self._threads[-1].start()

    def _ask(self, client: socket.socket, server: socket.socket, cut: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(65_536):
                moment = self._moment(data)
                if moment == "before":
                    break
                if moment == "within":
                    server.sendall(data[: len(data) // 2])
                    break
                if moment == "after":
                    cut.set()  # who hands the replies on cuts, when there is one: then the server has done it
                server.sendall(data)
        if not cut.is_set():
            _shut(client)
            _shut(server)

    def _answer(self, server: socket.socket, client: socket.socket, cut: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(65_536):
                if cut.is_set():
                    break
                client.sendall(data)
        _shut(client)
        _shut(server)


def _shut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutting_proxy(target_port: int) -> Iterator[CuttingProxy]:
    """A proxy for a test."""
    proxy = CuttingProxy(target_port)
    try:
        yield proxy
    finally:
        proxy.close()
