"""Child processes that do not outlive their owner, even when the owner is killed.

A process is started under a small guard that reads from a pipe whose other end only the owner holds: when the
owner ends, however it ends, the pipe closes, and the guard stops the process. (A child that the owner forks
later holds the pipe too: then the process ends with the last of them.)
"""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

# `read` is built into the shell, so there is no further process to be left behind; fd 3, because a shell gives
# its background jobs an empty standard input.
_GUARD = """
exec 3<&0
"$@" </dev/null 3<&- & child=$!
trap 'kill $child 2>/dev/null' TERM INT HUP
( read _ <&3; kill $child 2>/dev/null ) & reader=$!
wait $child; status=$?
while kill -0 $child 2>/dev/null; do wait $child; status=$?; done
kill $reader 2>/dev/null
exit $status
"""


class GuardedProcess:
    """A process in a session of its own, so that a Ctrl-C in the terminal is for its owner, who then stops it.

    Arguments:
        command: the program and its arguments.
        output: a file, or its path, that its standard output and error are appended to; None drops them.
        environment: of the process; None for the owner's.
        folder: to start it in; None for the owner's.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: Path | IO[bytes] | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.command = tuple(command)
        self._owner = os.getpid()
        sink = output.open("ab") if isinstance(output, Path) else output
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "petiole-guard", *command],
                stdin=subprocess.PIPE,
                stdout=sink or subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )
        finally:
            if sink is not None and sink is not output:
                sink.close()

    def __repr__(self) -> str:
        return f"<GuardedProcess {' '.join(self.command)[:80]} [{'running' if self.running else 'ended'}]>"

    @property
    def group(self) -> int:
        """The process group of the guard, the process and all that it starts."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def stop(self, *, within_s: float = 10.0) -> None:
        """Ask it to end (SIGTERM), and kill it when it does not. Does nothing in a forked child."""
        if os.getpid() != self._owner:
            return
        self._process.terminate()  # the guard hands it on, once: a second SIGTERM would cut short what a first began
        try:
            self._process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.stdin:
            self._process.stdin.close()

    def kill(self) -> None:
        """End it and all that it started, at once (SIGKILL)."""
        if os.getpid() != self._owner:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
