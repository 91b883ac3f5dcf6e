"""Starts processes that take turns, write, and note down what they did, until they are killed or have done all.

One is forked for each line of input, which is its job; so a new one is at work in milliseconds. What they say, one line
each, is ``<number> <word>``, for those who want to do something to them just then. What they note goes into a file of
each, one write per note, so that a kill loses none.
"""

import json
import os
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from petiole.cachelib import Settings, connect
from petiole.coordination.errors import LockTimeout, LockUnavailable, StaleFence
from petiole.coordination.fencing import FencedStore
from petiole.coordination.hold import Hold
from petiole.coordination.lock import Lock
from petiole.coordination.read_write_lock import MOST_READERS, ReadWriteLock
from petiole.coordination.semaphore import Semaphore

LIVES_S = 90
MOST_LETTERS = 60


class Worker:
    """One process, or one of its threads."""

    def __init__(self, job: dict[str, Any], redis: Any, engine: "sa.Engine | None", thread: int) -> None:
        self.job = job
        self.engine = engine
        self.thread = thread
        self.chance = random.Random(f"{job.get('seed', 0)}.{job['number']}.{thread}")
        self.holds = 0
        self.hold: Hold | None = None
        self.exclusive = False
        self.hog = ""
        folder = Path(job["folder"])
        self.notes = os.open(folder / f"{os.getpid()}.{thread}.notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.unguarded = os.open(folder / "unguarded", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.ended = folder / "ended"
        self.store = FencedStore(redis, job["name"], ttl="1h")
        name, terms = job["name"], {"ttl": job["ttl_s"]}
        self.sides: list[tuple[Any, int]] = []
        if job["kind"] == "semaphore":
            semaphore = Semaphore(redis, name, permits=job["permits"], **terms)
            self.sides = [(_Permits(semaphore, count), count) for count in range(1, job["permits"] + 1)]
        elif job["kind"] == "readwrite":
            both = ReadWriteLock(redis, name, **terms)
            self.sides = [(both.read, 1), (both.read, 1), (both.write, MOST_READERS)]
        else:
            self.sides = [(Lock(redis, name, **terms), 1)]

    @property
    def name(self) -> str:
        """Of the hold that it has, or had last."""
        return f"{os.getpid()}.{self.thread}.{self.holds}"

    def note(self, what: str, at: float, **more: object) -> None:
        os.write(self.notes, json.dumps({"note": what, "hold": self.name, "at": at, **more}).encode() + b"\n")

    def say(self, word: str) -> None:
        os.write(1, f"{self.job['number']} {word}\n".encode())

    def acquire(self, how: str = "acquire", timeout_s: float | None = None) -> bool:
        """Whether it is held now."""
        side, units = self.chance.choice(self.sides)
        asked = time.monotonic()
        try:
            hold = side.try_acquire() if how == "try" else side.acquire(timeout_s)
        except LockTimeout:
            self.say("timeout")
            return False
        except LockUnavailable:
            self.say("unavailable")
            return False
        if not hold:
            self.say("busy")
            return False
        self.holds += 1
        self.hold, self.exclusive = hold, units == max(most for _, most in self.sides)
        self.note("began", hold.began, asked=asked, fence=hold.fence, units=units, deadline=hold.deadline)
        self.say("began")
        return True

    def look(self) -> None:
        if self.hold:
            at = time.monotonic()
            lost = self.hold.lost
            self.note("looked", at, lost=lost, deadline=self.hold.deadline)
            self.say("lost" if lost else "held")

    def write(self) -> None:
        """To all places, whatever its lease says; the fence decides."""
        hold = self.hold
        if not hold or not self.exclusive:
            return
        os.write(self.unguarded, b"%d\n" % hold.fence)
        self._write("store", lambda: self.store.set("value", str(hold.fence), hold), hold.fence)
        if self.engine:
            self._write("table", self._write_row, hold.fence)

    def _write(self, place: str, write: Any, fence: int) -> None:
        began = time.monotonic()
        try:
            write()
            accepted = True
        except StaleFence:
            accepted = False
        except Exception as error:  # noqa: BLE001  # the server is away: nobody knows whether it was written
            self.say(f"unwritten {type(error).__name__}")
            return
        self.note("wrote", began, ended=time.monotonic(), place=place, fence=fence, accepted=accepted)
        self.say("wrote" if accepted else "refused")

    def _write_row(self) -> None:
        assert self.hold
        assert self.engine
        with self.engine.begin() as connection:
            self.hold.guard(connection)
            connection.execute(sa.text("INSERT INTO rows (fence) VALUES (:fence)"), {"fence": self.hold.fence})

    def release(self) -> None:
        if self.hold:
            self.note("releasing", time.monotonic())
            held = self.hold.release()
            self.note("released", time.monotonic(), held=held)
            self.say("released" if held else "released-late")
            self.hold = None

    def wait(self) -> None:
        """Until it is told to go on."""
        self.say("ready")
        signal.sigwait({signal.SIGUSR1})

    def prepare_hog(self) -> None:
        """Find a text on which one C call takes longer than two leases of the processor's time."""
        for letters in range(18, MOST_LETTERS):
            self.hog = "a" * letters
            began = time.thread_time()
            self.hog_it()
            if time.thread_time() - began > 2 * self.job["ttl_s"]:
                return

    def hog_it(self) -> None:
        """One call that does not let go of the GIL: a match that tries all ways to split the text."""
        re.match(r"(?:a|a)*b", self.hog)

    def fork(self) -> None:
        """A child that believes it holds what its parent holds would release it, and write."""
        child = os.fork()
        if not child:
            assert self.hold
            self.say("child-lost" if self.hold.lost else "child-held")
            self.say("child-released" if self.hold.release() else "child-refused")
            self.hold = None
            self.acquire()  # waits for its parent
            self.write()
            self.release()
            self.say("child-done")
            os._exit(0)

    def do(self, step: str) -> None:
        match step.split(" "):
            case ["acquire"]:
                self.acquire()
            case ["try"]:
                self.acquire("try")
            case ["within", seconds]:
                self.acquire("acquire", float(seconds))
            case [word]:
                getattr(self, word)()

    def do_anything(self) -> None:
        """Acquire in any way, write, look, take its time, and release; until the end is told."""
        for number in range(self.job.get("holds", 1_000_000)):
            if self.ended.exists():
                return
            how = self.chance.choice(["acquire", "acquire", "within", "try"]) if number else "acquire"
            if not self.acquire(how, self.chance.uniform(0.001, 0.5) if how == "within" else None):
                time.sleep(self.chance.uniform(0.0, 0.02))
                continue
            for _ in range(self.chance.randrange(3)):
                self.look()
                self.write()
                time.sleep(self.chance.uniform(0.0, self.job.get("body_s", 0.005)))
            self.release()


class _Permits:
    """So many permits of a semaphore, acquired as a lock is."""

    def __init__(self, semaphore: Semaphore, count: int) -> None:
        self.semaphore, self.count = semaphore, count

    def acquire(self, timeout: float | None) -> Hold:
        return self.semaphore.acquire(timeout, permits=self.count)

    def try_acquire(self) -> Any:
        return self.semaphore.try_acquire(permits=self.count)


def work(job: dict[str, Any]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.alarm(LIVES_S)
    engine = None
    if job.get("database"):
        engine = sa.create_engine(f"sqlite:///{job['database']}", connect_args={"timeout": 30})
        sa.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    with connect(settings=Settings(url=job["url"])) as redis:
        if "steps" in job:
            worker = Worker(job, redis, engine, 0)
            for step in job["steps"]:
                worker.do(step)
        else:
            workers = [Worker(job, redis, engine, number) for number in range(job.get("threads", 1))]
            threads = [threading.Thread(target=worker.do_anything) for worker in workers[1:]]
            for thread in threads:
                thread.start()
            workers[0].do_anything()
            for thread in threads:
                thread.join()
    if engine:
        engine.dispose()


def run(job: dict[str, Any]) -> None:
    """Do a job, in a process of its own, and say how it ended."""

    def say(words: str) -> None:
        os.write(1, f"{job['number']} {words}".replace("\n", " ").encode() + b"\n")

    threading.excepthook = lambda hook: say(f"died {hook.exc_value!r:.500}")
    try:
        say(f"pid {os.getpid()}")
        work(job)
        say("done")
    except BaseException as error:  # noqa: BLE001
        say(f"died {error!r:.500}")
    finally:
        os._exit(0)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the killed leave no zombies
    for line in sys.stdin:
        if os.fork() == 0:
            run(json.loads(line))


main()
