"""What ``Leader`` promises: one leads, the next one follows, and each is told of both ends of its time."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
from local_nodes import eventually

from petiole.cachelib import Connections, EmbeddedServer, connect
from petiole.cachelib.connections import UNAVAILABLE
from petiole.cachelib.embedded import find_program, free_port
from petiole.cachelib.guarded import GuardedProcess
from petiole.coordination.hold import Hold
from petiole.coordination.leader import Leader

LONG_S = 60
TTL_S = 1
"""Short, where the death of a leader is waited for."""

Make = Callable[..., Leader]


class Diary:
    """What candidates were told, in order. Two callbacks of one candidate at once are noted as an error."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, int]] = []
        self._at_work: set[str] = set()

    def of(self, who: str, what: str) -> Callable[[Hold], None]:
        """A callback."""

        def note(hold: Hold) -> None:
            if who in self._at_work:
                self.lines.append((who, "both at once", hold.fence))
            self._at_work.add(who)
            self.lines.append((who, what, hold.fence))
            self._at_work.discard(who)

        return note

    def words(self, who: str) -> list[str]:
        """What one was told."""
        return [what for one, what, _ in self.lines if one == who]


@pytest.fixture
def diary() -> Diary:
    return Diary()


@pytest.fixture
def candidate(redis: Connections, name: str, diary: Diary) -> Iterator[Make]:
    """Starts candidates for one office, and stops them."""
    with ExitStack() as stack:

        def start(who: str, **options: object) -> Leader:
            options = {"ttl": 30, "on_elected": diary.of(who, "elected"), "on_lost": diary.of(who, "lost")} | options
            return stack.enter_context(Leader(redis, name, owner=who, **options))  # type: ignore[arg-type]

        yield start
    assert threads() == []


def threads() -> list[threading.Thread]:
    """The threads of candidates."""
    return [thread for thread in threading.enumerate() if thread.name == "petiole-leader"]


def waiting(leader: Leader) -> list[str]:
    """Who waits, in order."""
    return [one.owner for one in leader.inspect().waiting]


def test_one_leads_and_the_next_follows(candidate: Make, diary: Diary) -> None:
    """Each is told when its time begins and when it ends, and fences rise."""
    first = candidate("first")
    assert first.wait(LONG_S)
    eventually(lambda: diary.words("first") == ["elected"], "it is told so")
    second = candidate("second")
    eventually(lambda: waiting(first) == ["second"], "the second waits")

    assert diary.words("first") == ["elected"]
    assert diary.words("second") == []
    assert first.is_leader
    assert not second.is_leader
    assert not second.wait(0)
    assert second.fence is None
    old = first.fence
    first.stop()
    assert not first.is_leader
    assert first.fence is None
    assert second.wait(LONG_S)
    assert old is not None
    assert second.fence is not None
    assert second.fence > old
    second.stop()
    assert diary.words("first") == diary.words("second") == ["elected", "lost"]
    assert not second.inspect().held


def test_who_resigns_stands_at_the_end_of_the_queue(candidate: Make) -> None:
    """Three that resign lead in turn."""
    leaders = {who: candidate(who) for who in ("first",)}
    assert leaders["first"].wait(LONG_S)
    for count, who in enumerate(("second", "third"), 1):
        leaders[who] = candidate(who)
        eventually(lambda count=count: len(waiting(leaders["first"])) == count, "it waits")

    order = []
    for who, following in zip(("first", "second", "third"), ("second", "third", "first"), strict=True):
        others = [one for one in leaders if one not in (who, following)]
        assert leaders[who].resign()
        assert leaders[following].wait(LONG_S)
        assert not leaders[who].is_leader
        eventually(lambda expected=[*others, who]: waiting(leaders["first"]) == expected, "it is the last")
        order.append(following)
    assert order == ["second", "third", "first"]
    assert not leaders["second"].resign()


def test_who_resigns_and_is_alone_leads_again(candidate: Make, diary: Diary) -> None:
    """After it was told that its time is over."""
    alone = candidate("alone")
    assert alone.wait(LONG_S)
    old = alone.fence
    assert alone.resign()
    eventually(lambda: alone.is_leader, "it leads again")
    assert old is not None
    assert alone.fence is not None
    assert alone.fence > old
    alone.stop()
    assert diary.words("alone") == ["elected", "lost"] * 2


PROCESS = """
import sys, threading
from petiole.cachelib import connect
from petiole.coordination.leader import Leader

def say(word):
    return lambda hold: print(word, hold.fence, flush=True)

url, name = sys.argv[1:]
with connect(url) as redis, Leader(redis, name, ttl=1, on_elected=say("elected"), on_lost=say("lost")) as leader:
    sys.stdin.read()
"""


@pytest.fixture
def process(redis_server: EmbeddedServer, name: str) -> Iterator[subprocess.Popen[str]]:
    """A candidate in a process of its own."""
    command = [sys.executable, "-c", PROCESS, redis_server.url, name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def said(process: subprocess.Popen[str]) -> tuple[str, int]:
    """The next word, and the fence with it."""
    assert process.stdout is not None
    word, fence = process.stdout.readline().split()
    return word, int(fence)


def test_a_dead_leader_is_succeeded(candidate: Make, process: subprocess.Popen[str]) -> None:
    """Within its lease, by one whose fence is higher."""
    _, old = said(process)
    leader = candidate("next", ttl=TTL_S)
    eventually(lambda: waiting(leader) == ["next"], "it waits")
    process.kill()

    assert leader.wait(LONG_S)
    assert leader.fence is not None
    assert leader.fence > old


def test_a_leader_that_was_stopped_too_long_learns_of_it(candidate: Make, process: subprocess.Popen[str]) -> None:
    """It has been succeeded meanwhile; it is told so as soon as it runs, and is a candidate again."""
    _, old = said(process)
    leader = candidate("next", ttl=TTL_S)
    eventually(lambda: waiting(leader) == ["next"], "it waits")
    os.kill(process.pid, signal.SIGSTOP)
    assert leader.wait(LONG_S)
    between = leader.fence
    os.kill(process.pid, signal.SIGCONT)

    assert said(process) == ("lost", old)
    eventually(lambda: len(waiting(leader)) == 1, "it is a candidate again")
    leader.stop()
    word, new = said(process)
    assert word == "elected"
    assert between is not None
    assert old < between < new


def test_a_loss_is_told_by_the_clock_and_ends_in_another_campaign(candidate: Make, diary: Diary) -> None:
    """Also while ``on_elected`` is still at work: ``on_lost`` waits for it, ``is_leader`` does not."""
    begun, end = threading.Event(), threading.Event()

    def slow(hold: Hold) -> None:
        diary.of("slow", "elected")(hold)
        begun.set()
        assert end.wait(LONG_S)

    leader = candidate("slow", ttl=TTL_S, on_elected=slow)
    assert begun.wait(LONG_S)
    hold = leader.hold
    assert hold is not None
    leader._campaign.store.clear()
    eventually(lambda: hold.lost, "the lease is lost")
    assert not leader.is_leader
    assert diary.words("slow") == ["elected"]
    end.set()
    eventually(lambda: diary.words("slow") == ["elected", "lost", "elected"], "it leads again")


def test_a_callback_that_fails_is_logged_and_stops_nothing(candidate: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The office goes on."""

    def fails(hold: Hold) -> None:
        raise ValueError(f"told of {hold.fence}")

    leader = candidate("fails", on_elected=fails, on_lost=fails)
    assert leader.wait(LONG_S)
    old = leader.fence
    leader.resign()
    eventually(lambda: leader.fence not in (None, old), "it leads again")
    leader.stop()

    assert sum("a callback failed" in line for line in caplog.messages) == 4


def test_a_callback_may_stop_its_leader(candidate: Make, diary: Diary) -> None:
    """It does not wait for itself; started again, a new campaign waits for the end of the old one."""
    made: list[Leader] = []
    too_early: list[bool] = []
    began = threading.Event()

    def stops(hold: Hold) -> None:
        diary.of("one", "elected")(hold)
        assert began.wait(LONG_S)
        if len(diary.words("one")) == 1:
            made[0].stop()
            made[0].start()
            too_early.append(made[0].wait(0.3))

    made.append(candidate("one", on_elected=stops))
    began.set()
    eventually(lambda: diary.words("one") == ["elected", "lost", "elected"], "it leads again")
    made[0].stop()
    assert diary.words("one") == ["elected", "lost"] * 2
    assert too_early == [False]


@pytest.mark.parametrize("callback", ["on_elected", "on_lost"])
def test_a_callback_may_stop_its_leader_that_had_to_wait(candidate: Make, diary: Diary, callback: str) -> None:
    """The candidate's thread is told to ask nothing more, but it is the callback's thread too."""
    first, made = candidate("one"), []
    failures: list[BaseException] = []
    stopped = threading.Event()
    assert first.wait(LONG_S)

    def stops(hold: Hold) -> None:
        try:
            made[0].stop()
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            stopped.set()

    made.append(candidate("two", **{callback: stops}))
    eventually(lambda: waiting(first) == ["two"], "it waits")
    first.stop()
    if callback == "on_lost":
        assert made[0].wait(LONG_S)
        assert made[0].resign()
    assert stopped.wait(LONG_S)
    assert not failures
    again = threading.Thread(target=made[0].stop, daemon=True)
    again.start()
    again.join(LONG_S)
    assert not again.is_alive()
    assert not made[0].is_leader
    assert not made[0].inspect().held
    assert threads() == []


def test_a_stopped_candidate_leaves_the_queue(candidate: Make, diary: Diary) -> None:
    """And was never told anything. It may be started again, and twice is once."""
    leader = candidate("leader")
    assert leader.wait(LONG_S)
    other = candidate("other")
    eventually(lambda: waiting(leader) == ["other"], "it waits")
    other.stop()
    other.stop()
    eventually(lambda: waiting(leader) == [], "it has left")
    assert len(threads()) == 1
    other.start()
    other.start()
    eventually(lambda: waiting(leader) == ["other"], "it waits again")
    assert len(threads()) == 2
    assert diary.words("other") == []


def test_many_starts_and_stops_leave_nothing(redis: Connections, name: str, diary: Diary) -> None:
    """Whatever moment of an election a stop falls into: what was begun was ended."""
    leaders = [Leader(redis, name, on_elected=diary.of(who, "+"), on_lost=diary.of(who, "-")) for who in "ab"]

    def churn(leader: Leader) -> None:
        for _ in range(60):
            leader.start()
            leader.stop()

    churners = [threading.Thread(target=churn, args=(leader,)) for leader in leaders]
    for thread in churners:
        thread.start()
    for thread in churners:
        thread.join(LONG_S)

    assert threads() == []
    for who in "ab":
        assert set(zip(diary.words(who)[::2], diary.words(who)[1::2], strict=True)) <= {("+", "-")}
    eventually(lambda: not leaders[0].inspect().held and not waiting(leaders[0]), "nobody holds it, nobody waits")


def test_candidates_outlive_a_server_that_is_away(own_server: Callable[..., EmbeddedServer], name: str) -> None:
    """One leads again when it is back."""
    server = own_server("--enable-debug-command", "yes")
    with connect(server.url) as redis:
        with Leader(redis, name, ttl=TTL_S) as first, Leader(redis, name, ttl=TTL_S) as second:
            eventually(lambda: first.is_leader or second.is_leader, "one leads")
            leader = first if first.is_leader else second
            hold = leader.hold
            assert hold is not None
            before = redis.coordination.info("server")["run_id"]
            with suppress(*UNAVAILABLE):
                redis.coordination.execute_command("DEBUG", "CRASH-AND-RECOVER", 1)

            def restarted() -> bool:
                with suppress(*UNAVAILABLE):
                    return bool(redis.coordination.info("server")["run_id"] != before)
                return False

            eventually(restarted, "the server is back")
            eventually(lambda: hold.lost, "the hold that the server forgot is lost")
            eventually(lambda: first.is_leader or second.is_leader, "one leads again")
            assert not (first.is_leader and second.is_leader)
        assert threads() == []


def test_a_candidate_may_come_before_its_server(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """It says what it waits for, and leads when the server is there."""
    port = free_port()
    with connect(f"redis://127.0.0.1:{port}") as redis, Leader(redis, name) as leader:
        eventually(lambda: any("did not answer" in line for line in caplog.messages), "it has tried")
        server = GuardedProcess([find_program(), "--port", str(port), "--save", "", "--bind", "127.0.0.1"])
        try:
            assert leader.wait(LONG_S)
            leader.stop()
        finally:
            server.stop()


def test_a_leader_whose_server_hangs_stops(own_server: Callable[..., EmbeddedServer], name: str) -> None:
    """The one that leads and the one that waits: no thread stays."""
    server = own_server()
    with connect(server.url) as redis:
        leader = Leader(redis, name).start()
        assert leader.wait(LONG_S)
        waits = Leader(redis, name).start()
        eventually(lambda: len(waiting(leader)) == 1, "one waits")
        pid = redis.coordination.info("server")["process_id"]
        os.kill(pid, signal.SIGSTOP)
        try:
            waits.stop()
            leader.stop()
            assert threads() == []
            assert not leader.is_leader
        finally:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: not leader.inspect().held, "it was given back when the server answered")


def test_connections_that_are_closed_end_the_campaign(own_server: Callable[..., EmbeddedServer], name: str) -> None:
    """Without a word: there is nobody to ask any more."""
    redis = connect(own_server().url)
    leader = Leader(redis, name).start()
    assert leader.wait(LONG_S)
    waits = Leader(redis, name).start()
    eventually(lambda: len(waiting(leader)) == 1, "one waits")
    redis.close()

    eventually(lambda: threads() == [], "both have ended")
    assert not leader.is_leader
    leader.stop()
    waits.stop()


def test_a_forked_child_is_no_candidate(candidate: Make) -> None:
    """It leads nothing that its parent leads, and may become a candidate itself."""
    leader = candidate("parent")
    assert leader.wait(LONG_S)
    pid = os.fork()
    if not pid:
        signal.alarm(30)
        status = 1
        try:
            idle = not leader.is_leader and leader.fence is None and threads() == []
            leader.start()
            eventually(lambda: len(waiting(leader)) == 1, "the child waits")
            leader.stop()
            status = 0 if idle and threads() == [] else 2
        finally:
            os._exit(status)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert leader.is_leader


@pytest.mark.parametrize("options", [{"ttl": 0}, {"ttl": 7200}, {"ttl": float("nan")}, {"owner": ""}, {"owner": 7}])
def test_bad_options_are_refused(redis: Connections, name: str, options: dict[str, object]) -> None:
    """When it is made."""
    with pytest.raises(ValueError, match=r"ttl|owner"):
        Leader(redis, name, **options)  # type: ignore[arg-type]


def test_it_shows_what_it_is(candidate: Make, redis: Connections, name: str) -> None:
    """Without a password."""
    leader = candidate("one")
    assert leader.wait(LONG_S)
    assert repr(leader).endswith("[leads]>")
    assert repr(Leader(redis, name)).endswith("[stopped]>")
