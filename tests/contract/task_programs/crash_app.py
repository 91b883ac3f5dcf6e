"""The app of the crash tests: tasks that begin, note it, and stay until they are told to go on.

Each test has a tag, which its locks are keyed by. Notes carry the server's time, so that those of several processes
have one order. Gates may be on a server of their own, which a test can stop without the broker.
"""

import ctypes
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery
from redis import Redis

from petiole import Settings, connect
from petiole.coordination.coordinated import coordinated_task
from petiole.coordination.errors import LockLost, StaleFence
from petiole.coordination.fencing import FencedStore
from petiole.coordination.gates import Concurrency, Unique

FOLDER = Path(__file__).parent
HOLDS_THE_INTERPRETER_US = 3_000_000


class Notes:
    """What the bodies note, and what they are told."""

    def __init__(self, url: str) -> None:
        self.client: Redis = Redis.from_url(url, protocol=2, decode_responses=True, socket_timeout=None)  # some wait

    def now_us(self) -> int:
        """The server's time."""
        seconds, micros = self.client.time()  # type: ignore[misc]
        return int(seconds) * 1_000_000 + int(micros)

    def note(self, tag: str, what: str, fence: int = 0) -> int:
        """Note something. How many notes there are of it."""
        entry = {"what": what, "at": self.now_us(), "pid": os.getpid(), "main": os.getppid(), "fence": fence}
        self.client.rpush(f"notes:{tag}", json.dumps(entry))
        return [one["what"] for one in self.of(tag)].count(what)

    def of(self, tag: str) -> list[dict[str, Any]]:
        """All notes of a tag."""
        return [json.loads(entry) for entry in self.client.lrange(f"notes:{tag}", 0, -1)]  # type: ignore[union-attr]

    def stay(self, tag: str, who: str) -> None:
        """Wait until it is told to go on."""
        self.client.blpop([f"go:{tag}:{who}"])

    def go(self, tag: str, who: str) -> None:
        """Tell it."""
        self.client.rpush(f"go:{tag}:{who}", 1)


def make_app(url: str, gates_url: str, **settings: Any) -> Celery:
    """The app as workers and senders have it."""
    app = Celery("crashes", broker=url, backend=url, set_as_current=False, broker_connection_retry_on_startup=True)
    app.conf.update(worker_prefetch_multiplier=1, worker_hijack_root_logger=False, result_expires=600, **settings)
    notes = Notes(url)
    redis = connect(settings=Settings(url=gates_url, cache_timeout=2))

    def stay_once(self: Any, tag: str, who: str = "second") -> int:
        # It does not look at what it holds: the process that has looked renews it too.
        run = notes.note(tag, f"{who} began")
        if run == 1 and who == "first":
            notes.stay(tag, who)
        notes.note(tag, f"{who} ended")
        return run

    def staying(name: str, **options: Any) -> None:
        options = {"lock": "{tag}", "lease": 60, **options}
        coordinated_task(app=app, name=name, redis=redis, bind=True, **options)(stay_once)

    staying("early")
    staying("late", acks_late=True)
    staying("rejected", acks_late=True, reject_on_worker_lost=True)
    staying("retried", acks_late=True, retry_on_worker_lost=True, default_retry_delay=0)
    staying("limited", time_limit=1)
    staying("several", lock=["{tag}", "{tag}:other"], concurrency=Concurrency(1, "{tag}"))
    staying("short", lease=1.5)
    staying("brief", lease=2)

    def hold_the_interpreter(self: Any, tag: str, who: str) -> bool:
        hold = self.admission.hold
        notes.note(tag, f"{who} began", hold.fence)
        ctypes.PyDLL(None).usleep(HOLDS_THE_INTERPRETER_US)
        lost = bool(hold.lost)
        notes.note(tag, f"{who} ended", hold.fence)
        return lost

    def be_stopped(self: Any, tag: str, who: str) -> str:
        notes.note(tag, f"{who} began")
        try:
            notes.stay(tag, who)
        except LockLost:
            notes.note(tag, f"{who} was stopped")
            raise
        return "went on"

    def look(self: Any, tag: str, who: str) -> bool:
        hold = self.admission.hold
        notes.note(tag, f"{who} began", hold.fence)
        notes.stay(tag, who)
        for _ in range(1_000):  # the main process may hear of it first
            if hold.lost:
                return True
            time.sleep(0.01)
        return False

    def write(self: Any, tag: str, who: str) -> str:
        hold = self.admission.hold
        store = FencedStore(redis, "crashes", ttl=60)
        store.set(tag, who, hold)
        notes.note(tag, f"{who} began", hold.fence)
        if who == "first":
            notes.stay(tag, who)
        try:
            store.set(tag, f"{who} again", hold)
            answer = "written"
        except StaleFence:
            answer = "refused"
        notes.note(tag, f"{who} {answer}", hold.fence)
        return answer

    class Deadly:
        """A result that its process does not outlive the first time, where Celery keeps it."""

        def __init__(self, run: int) -> None:
            self.run = run

        def __json__(self) -> int:
            if self.run == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.run

    def die_with_the_result(self: Any, tag: str) -> Deadly:
        return Deadly(notes.note(tag, "began"))

    for function, options in (
        (die_with_the_result, {"acks_late": True, "reject_on_worker_lost": True}),
        (hold_the_interpreter, {"lease": 1.5}),
        (be_stopped, {"lease": 0.6, "on_lost": "terminate"}),
        (look, {"lease": 0.6}),
        (write, {"lease": 2}),
    ):
        coordinated_task(app=app, name=function.__name__, redis=redis, bind=True, lock="{tag}", **options)(function)

    @coordinated_task(app=app, name="once", redis=redis, unique=Unique("{tag}", until="start", on_conflict="drop"))
    def once(tag: str) -> None:
        """Of those that wait, one."""

    return app


if "CRASH_TEST_URL" in os.environ:
    app = make_app(
        os.environ["CRASH_TEST_URL"],
        os.environ["CRASH_TEST_GATES"],
        **json.loads(os.environ.get("CRASH_TEST_SETTINGS", "{}")),
    )
