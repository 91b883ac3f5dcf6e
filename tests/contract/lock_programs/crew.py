"""Processes that take turns, and those who start, stop and kill them, and read what they have noted."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from redis.connection import Connection

from petiole.coordination.fencing import create_fences

PROGRAM = Path(__file__).parent / "holders.py"
MAY_TAKE_S = 60.0


class Program:
    """The process that forks the others, and a thread that hears what they say."""

    def __init__(self) -> None:
        self.heard = threading.Condition()
        self.ended = False
        self._crews: dict[int, Crew] = {}
        self._process = subprocess.Popen([sys.executable, PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def start(self, crew: "Crew", job: dict[str, Any]) -> int:
        """Start a process; its number."""
        number = len(self._crews) + 1
        self._crews[number] = crew
        assert self._process.stdin
        self._process.stdin.write(json.dumps(job | {"number": number}).encode() + b"\n")
        self._process.stdin.flush()
        return number

    def close(self) -> None:
        """Once all that it has started are gone."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._thread.join(MAY_TAKE_S)
        self._process.stdout.close()
        assert self._process.wait(MAY_TAKE_S) == 0

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            number, word = line.decode(errors="replace").rstrip("\n").split(" ", 1)
            crew = self._crews[int(number)]
            with self.heard:
                if word.startswith("pid "):
                    crew.pids[int(number)] = int(word[4:])
                else:
                    crew.said.append((int(number), word))
                self.heard.notify_all()
        with self.heard:
            self.ended = True
            self.heard.notify_all()


class Crew:
    """Processes with numbers. What they say is kept in the order in which it was heard."""

    def __init__(
        self, program: Program, folder: Path, url: str, name: str, *, ttl_s: float, kind: str = "lock", **more: Any
    ) -> None:
        self.folder = folder
        self.name = name
        self.ttl_s = ttl_s
        self.database = folder / "rows.sqlite3"
        self.engine = sa.create_engine(f"sqlite:///{self.database}")
        with self.engine.begin() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            connection.exec_driver_sql("CREATE TABLE rows (id INTEGER PRIMARY KEY AUTOINCREMENT, fence INTEGER)")
        create_fences(self.engine)
        self._job = {"url": url, "name": name, "ttl_s": ttl_s, "kind": kind, "folder": str(folder), **more}
        self._job |= {"database": str(self.database)}
        self.said: list[tuple[int, str]] = []
        self.pids: dict[int, int] = {}
        self.killed: set[int] = set()
        self._program = program

    def start(self, *steps: str, **more: Any) -> int:
        """Start a process, and tell its number once it has one. Without steps it does anything, until the end."""
        number = self._program.start(self, {**self._job, **more} | ({"steps": steps} if steps else {}))
        self.until(lambda: number in self.pids, f"process {number} has started")
        return number

    def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait until what was said makes something true."""
        with self._program.heard:
            came = self._program.heard.wait_for(lambda: holds() or self.deaths(), MAY_TAKE_S)
        assert not self.deaths(), self.deaths()
        assert came, f"it did not come to be: {what}; {self.said[-10:]}"

    def count(self, number: int, word: str) -> int:
        """How often a process has said a word."""
        return self.said.count((number, word))

    def total(self, word: str) -> int:
        """How often all have said a word."""
        return sum(said == word for _, said in list(self.said))

    def hear(self, number: int, word: str, times: int = 1) -> None:
        """Wait until a process has said a word so often."""
        self.until(lambda: self.count(number, word) >= times, f"process {number} says {word!r}, {times} times")

    def hear_more(self, word: str, times: int = 1, *, meanwhile: Callable[[], object] = bool) -> int:
        """Wait until a word is said so often from now on, by whomever; who said it last.

        Arguments:
            meanwhile: called again and again.
        """
        at = len(self.said)

        def said() -> bool:
            meanwhile()
            return sum(said == word for _, said in self.said[at:]) >= times

        with self._program.heard:
            for _ in range(int(MAY_TAKE_S / 0.05)):
                if self._program.heard.wait_for(lambda: said() or self.deaths(), 0.05):
                    break
        self.until(said, f"anybody says {word!r}")
        return next(number for number, said in reversed(self.said) if said == word)

    def deaths(self) -> list[str]:
        """The last words of those that ended by an error."""
        dead = [f"{number} {said}" for number, said in list(self.said) if said.startswith("died")]
        return [*dead, "the program has ended"] if self._program.ended else dead

    @property
    def alive(self) -> list[int]:
        """Who was not killed, and is not through."""
        done = {number for number, word in list(self.said) if word == "done"}
        return [number for number in self.pids if number not in self.killed and number not in done]

    def go(self, number: int) -> None:
        """Tell one that is ready to go on."""
        os.kill(self.pids[number], signal.SIGUSR1)

    def pause(self, number: int) -> None:
        """Stop a process, and wait until it stands still."""
        os.kill(self.pids[number], signal.SIGSTOP)
        while psutil.Process(self.pids[number]).status() != psutil.STATUS_STOPPED:
            threading.Event().wait(0.001)

    def resume(self, number: int) -> None:
        """Let a stopped process go on."""
        os.kill(self.pids[number], signal.SIGCONT)

    def kill(self, number: int) -> float:
        """Kill a process; when."""
        self.killed.add(number)
        with suppress(ProcessLookupError):
            os.kill(self.pids[number], signal.SIGKILL)
        return time.monotonic()

    def end(self) -> None:
        """Tell all that do anything that it is over, and wait until all are through."""
        (self.folder / "ended").touch()
        self.until(lambda: not self.alive, "all are through")

    def close(self) -> None:
        """Leave no process behind."""
        for number in self.alive:
            self.kill(number)
        for number in self.pids:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(self.pids[number]).wait(MAY_TAKE_S)
        self.engine.dispose()

    def notes(self) -> list[dict[str, Any]]:
        """What all have noted, each in its order. The last note of one that was killed may be cut short."""
        found = []
        for path in sorted(self.folder.glob("*.notes")):
            found += [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        return found

    def rows(self) -> list[int]:
        """The fences of the rows in the table that was guarded, in the order of their commits."""
        with self.engine.connect() as connection:
            return list(connection.scalars(sa.text("SELECT fence FROM rows ORDER BY id")))

    def unguarded(self) -> list[int]:
        """The fences of what was written to a place that checks none, in its order."""
        path = self.folder / "unguarded"
        return [int(line) for line in path.read_bytes().split()] if path.exists() else []


def run(port: int, *command: object) -> Any:
    """One command to one server, over a connection of its own, with the bare reply."""
    connection = Connection(host="127.0.0.1", port=port, protocol=2, socket_timeout=20)
    try:
        connection.send_command(*command)
        return connection.read_response()
    finally:
        connection.disconnect()


@contextmanager
def stopped(port: int) -> Iterator[None]:
    """The server hangs."""
    pid = int(run(port, "INFO", "server").split(b"process_id:")[1].split()[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class Storm:
    """Does something bad to a crew, again and again, at moments that nobody has chosen."""

    def __init__(self, crew: Crew, port: int, seed: int) -> None:
        self.crew = crew
        self.port = port
        self.ttl_s = crew.ttl_s
        self.chance = random.Random(seed)
        self.done: Counter[str] = Counter()
        self._paused: dict[int, float] = {}

    def blow(self, *faults: str, times: int) -> None:
        """Each fault comes after somebody has begun to hold."""
        for _ in range(times):
            holder = self.crew.hear_more("began", self.chance.choice([1, 2, 5]), meanwhile=self._wake)
            awake = [number for number in self.crew.alive if number not in self._paused]
            victim = holder if holder in awake and self.chance.random() < 0.5 else self.chance.choice(awake)
            fault = self.chance.choice(faults)
            self.done[fault] += 1
            getattr(self, f"_{fault}")(victim)
            self._wake()
        while self._paused:
            self._wake()
            threading.Event().wait(0.01)

    def _wake(self) -> None:
        """Those who have slept for longer than their lease. (Who sleeps may hold the database, too.)"""
        for number, since in list(self._paused.items()):
            if time.monotonic() - since > self.ttl_s * 1.3:
                del self._paused[number]
                self.crew.resume(number)

    def _kill(self, victim: int) -> None:
        self.crew.kill(victim)
        self.crew.start()

    def _pause(self, victim: int) -> None:
        if len(self._paused) < 4:
            self.crew.pause(victim)
            self._paused[victim] = time.monotonic()

    def _forget_scripts(self, victim: int) -> None:
        run(self.port, "SCRIPT", "FLUSH")

    def _cut_listeners(self, victim: int) -> None:
        run(self.port, "CLIENT", "KILL", "TYPE", "pubsub")

    def _cut_all(self, victim: int) -> None:
        run(self.port, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def _hang(self, victim: int) -> None:
        with stopped(self.port):
            threading.Event().wait(self.ttl_s * self.chance.choice([0.3, 1.3]))

    def _flush(self, victim: int) -> None:
        run(self.port, "FLUSHALL")
