"""What ``Redlock`` promises: a majority of servers grants it to one at a time, keeps it, and makes its fences rise."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from local_nodes import eventually

from petiole.cachelib import Connections, EmbeddedServer, connect
from petiole.coordination import redlock as module
from petiole.coordination.errors import LockLost, LockTimeout, LockUnavailable
from petiole.coordination.hold import Busy
from petiole.coordination.inspecting import inspect
from petiole.coordination.lock import Lock
from petiole.coordination.redlock import KIND, Redlock, RedlockHold
from petiole.coordination.turn_store import Taken, TurnStore

LONG_S = 60
DAY_US = 86_400_000_000


@pytest.fixture(scope="module")
def three_servers(_no_process_is_left_behind: None) -> Iterator[list[EmbeddedServer]]:
    """Three that the tests of this file share, and none of them stops for good."""
    servers = [EmbeddedServer.start() for _ in range(3)]
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def servers(three_servers: list[EmbeddedServer]) -> Iterator[list[Connections]]:
    """Connections to them, in the order in which they are asked. Afterwards every key must have a TTL."""
    with ExitStack() as stack:
        several = [stack.enter_context(connect(server.url)) for server in three_servers]
        several.sort(key=lambda server: server.address)
        yield several
        for server in several:
            client = server.coordination
            assert [key for key in client.scan_iter("petiole:*") if client.pttl(key) == -1] == []


def store(server: Connections, name: str) -> TurnStore:
    """What one server knows of a lock."""
    return TurnStore(server, KIND, name, capacity=1)


def is_held_at(server: Connections, name: str) -> bool:
    return inspect(store(server, name)).held


@contextmanager
def hung(*servers: Connections) -> Iterator[None]:
    """The processes of servers stand still."""
    pids = [server.coordination.info("server")["process_id"] for server in servers]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def held(lock: Redlock) -> RedlockHold:
    """A hold that is granted at once."""
    hold = lock.try_acquire()
    assert isinstance(hold, RedlockHold)
    return hold


def test_a_majority_grants_it_to_one_at_a_time(servers: list[Connections], name: str) -> None:
    """All servers keep it, and all have it back."""
    lock = Redlock(servers, name)
    with lock as hold:
        assert hold
        assert hold.held
        assert hold.remaining > 0
        assert all(is_held_at(server, name) for server in servers)
        assert isinstance(Redlock(servers, name).try_acquire(), Busy)
        with pytest.raises(LockTimeout, match=f"redlock '{name}' was not free within 0.05 s"):
            lock.acquire(timeout=0.05)
        with pytest.raises(LockTimeout, match=f"redlock '{name}' was not free"), lock.try_acquire():
            pytest.fail("it is held")
        hold.raise_if_lost()
    assert not hold.held
    assert not hold.lost
    assert hold.remaining == 0
    assert not hold.release()
    assert not any(is_held_at(server, name) for server in servers)
    assert held(lock).release()


def test_it_is_no_plain_lock_of_that_name(servers: list[Connections], name: str) -> None:
    """A lock on one of the servers is another lock."""
    with Lock(servers[0], name):
        assert held(Redlock(servers, name)).release()


def test_of_many_that_compete_one_holds_it(servers: list[Connections], name: str) -> None:
    """Each in the end, and the fences are in the order of the holds."""
    inside, overlaps, fences = [0], [], []

    def compete(_: int) -> None:
        lock = Redlock(servers, name)
        for _ in range(8):
            with lock.acquire(timeout=LONG_S) as hold:
                inside[0] += 1
                if inside[0] != 1:
                    overlaps.append(hold)
                fences.append(hold.fence)
                inside[0] -= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(compete, range(6)))

    assert overlaps == []
    assert len(fences) == 48
    assert fences == sorted(set(fences))


def test_what_no_majority_grants_is_given_back(servers: list[Connections], name: str) -> None:
    """Also at the server that had granted it."""
    first, *others = servers
    with held(Redlock(servers, name)):
        store(first, name).clear()
        assert isinstance(Redlock(servers, name).try_acquire(), Busy)
        assert not is_held_at(first, name)
        assert all(is_held_at(server, name) for server in others)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_is_raised_all_is_given_back(
    servers: list[Connections], name: str, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Also what was granted when the reply had not come."""
    take = module._Store.take

    def interrupted(self: TurnStore, *arguments: object, **options: object) -> Taken:
        taken = take(self, *arguments, **options)  # type: ignore[arg-type]
        if self.redis is servers[1]:
            raise error
        return taken

    monkeypatch.setattr(module._Store, "take", interrupted)
    with pytest.raises(error):
        Redlock(servers, name).acquire()

    assert not any(is_held_at(server, name) for server in servers)


def test_it_goes_on_while_a_minority_hangs(
    servers: list[Connections], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which costs one short wait, and not one for each acquire; when it answers again it holds nothing."""
    lock, asked = Redlock(servers, name, ttl=LONG_S), []
    take = module._Store.take

    def noted(self: TurnStore, *arguments: object, **options: object) -> Taken:
        asked.append(self.redis)
        return take(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Store, "take", noted)
    with hung(servers[0]):
        for _ in range(rounds := 20):
            lock.acquire(timeout=LONG_S).release()
    # A busy machine may let another look silent for once, and then the one that hangs is needed.
    assert 1 <= asked.count(servers[0]) < rounds / 2
    eventually(lambda: not is_held_at(servers[0], name), "the one that hung has it back")


def test_the_time_that_asking_takes_is_not_valid(
    servers: list[Connections], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validity counts from before the first question, less one hundredth and two milliseconds."""
    asked: list[float] = []
    take = module._Store.take

    def noted(self: TurnStore, *arguments: object, **options: object) -> Taken:
        asked.append(time.monotonic())
        return take(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Store, "take", noted)
    with held(Redlock(servers, name, ttl=10, renew=False)) as hold:
        assert hold.deadline <= asked[0] + 9.9 - 0.002


def test_what_took_longer_than_the_lease_is_not_held(
    servers: list[Connections], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though every server has granted it."""
    take = module._Store.take

    def late(self: TurnStore, *arguments: object, **options: object) -> Taken:
        taken = take(self, *arguments, **options)  # type: ignore[arg-type]
        monkeypatch.setattr(module, "_EXPIRY_S", 10.0)  # as if the lease was over now
        return taken

    monkeypatch.setattr(module._Store, "take", late)
    assert isinstance(Redlock(servers, name).try_acquire(), Busy)
    assert not any(is_held_at(server, name) for server in servers)


def test_a_server_that_is_named_twice_has_one_vote(
    servers: list[Connections], three_servers: list[EmbeddedServer], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two names of one machine hide that it is one."""
    with connect(servers[0].url) as alias:
        monkeypatch.setattr(module, "_place", lambda server: str(id(server)))
        lock = Redlock([servers[0], alias, servers[1]], name)
        store(servers[1], name).take("another", 1, 60_000, "", "another")
        assert isinstance(lock.try_acquire(), Busy)
        store(servers[1], name).give("another")
        assert held(lock).release()


def test_fences_rise_whatever_the_clocks_say(servers: list[Connections], name: str) -> None:
    """The majority that knows the fence of the server whose clock is a day ahead need not be that server."""
    ahead, between, behind = servers
    jump(ahead, name, DAY_US)
    another = store(behind, name)
    another.take("another", 1, 60_000, "", "another")
    first = held(Redlock(servers, name))
    assert first.fence > ahead.coordination.time()[0] * 1_000_000 + DAY_US // 2
    first.release()
    another.give("another")
    store(ahead, name).take("another", 1, 60_000, "", "another")
    second = held(Redlock(servers, name))

    assert second.fence > first.fence
    second.release()
    assert inspect(store(between, name)).last_fence >= second.fence
    store(ahead, name).give("another")


def jump(server: Connections, name: str, ahead_us: int) -> None:
    """The server's last fence is what its clock would give if it went ahead by so much; it never goes back."""
    client, known = server.coordination, store(server, name)
    seconds, microseconds = client.time()
    fence = seconds * 1_000_000 + microseconds + ahead_us
    client.hset(known.name, "fence", max(fence, inspect(known).last_fence))
    client.pexpire(known.name, 7_200_000)


def test_fences_rise_with_clocks_and_failures_of_chance(servers: list[Connections], name: str) -> None:
    """Each time one server, by chance, votes for nobody; now and then one believes that it is another day."""
    chance = random.Random(name)
    lock, fences = Redlock(servers, name), []
    for day in range(60):
        if chance.random() < 0.3:
            jump(chance.choice(servers), name, day * DAY_US)
        away = store(chance.choice(servers), name)
        away.take("away", 1, 60_000, "", "away")
        hold = held(lock)
        fences.append(hold.fence)
        hold.release()
        away.give("away")

    assert fences == sorted(set(fences))


def test_it_is_kept_as_long_as_the_process_lives(servers: list[Connections], name: str) -> None:
    """The leases of all servers are renewed, by a third of their time."""
    with held(Redlock(servers, name, ttl=3)) as hold:
        first = hold.deadline
        eventually(lambda: hold.deadline > first + 3, "it was renewed for more than a lease")
        assert hold.held
        assert isinstance(Redlock(servers, name).try_acquire(), Busy)
        with pytest.raises(LockTimeout, match=name), Redlock(servers, name).try_acquire():
            pytest.fail("it is held")


def test_it_is_lost_when_a_majority_does_not_confirm_it(servers: list[Connections], name: str) -> None:
    """The holder is told by its own clock, once; the end of the block says so."""
    told: list[RedlockHold] = []
    heard = threading.Event()

    def lose() -> None:
        with held(Redlock(servers, name, ttl=1)) as hold:
            hold.on_lost(lambda lost: (told.append(lost), heard.set()))
            with hung(*servers[:2]):
                assert heard.wait(LONG_S)
                assert hold.lost
                assert not hold.held

    with pytest.raises(LockLost, match=f"redlock '{name}'.*fewer than 2 servers"):
        lose()
    eventually(lambda: not any(is_held_at(server, name) for server in servers), "all have it back")
    assert len(told) == 1


def test_it_is_valid_for_as_long_as_a_majority_of_its_leases(servers: list[Connections], name: str) -> None:
    """Neither as long as the longest, nor as short as the shortest."""
    with held(Redlock(servers, name, ttl=60)) as hold:
        longest, middle, _ = hold._holds
        longest._deadline += 20
        middle._deadline += 10
        assert hold.deadline == middle.deadline - 0.002


def test_it_is_kept_while_a_minority_hangs(servers: list[Connections], name: str) -> None:
    """Also beyond the end of that server's lease."""
    with held(Redlock(servers, name, ttl=1)) as hold, hung(servers[1]):
        first = hold.deadline
        eventually(lambda: hold.deadline > first + 1, "it was renewed for more than a lease")
        assert hold.held


def test_it_outlives_the_loss_of_a_minority(servers: list[Connections], name: str) -> None:
    """A server that forgets it is one vote; the second one is the end, and the third has it back."""
    told = threading.Event()
    hold = held(Redlock(servers, name, ttl=1))
    hold.on_lost(lambda _: told.set())
    store(servers[0], name).clear()
    eventually(lambda: sum(one.held for one in hold._holds) == 2, "the loss of one was seen")
    assert hold.held
    assert not told.is_set()
    store(servers[1], name).clear()
    assert told.wait(LONG_S)
    assert hold.lost
    eventually(lambda: not is_held_at(servers[2], name), "the third has it back")
    late = threading.Event()
    hold.on_lost(lambda _: late.set())
    assert late.wait(LONG_S)
    assert not hold.release()


def test_a_hold_ends_after_max_hold(servers: list[Connections], name: str) -> None:
    """However alive the process is."""
    hold = held(Redlock(servers, name, ttl=1, max_hold=1))
    eventually(lambda: hold.lost, "it was not renewed")
    with Redlock(servers, name).acquire(timeout=LONG_S) as following:
        assert following.fence > hold.fence


def test_too_few_servers_are_no_majority(own_server: Callable[..., EmbeddedServer], name: str) -> None:
    """It says which do not answer, and leaves nothing with the one that does."""
    with ExitStack() as stack:
        started = [own_server() for _ in range(3)]
        servers = [stack.enter_context(connect(server.url)) for server in started]
        lock = Redlock(servers, name)
        hold = held(lock)
        started[0].stop()
        assert hold.held
        assert hold.release()
        assert held(lock).release()
        started[1].stop()
        with pytest.raises(LockUnavailable, match=started[1].url):
            lock.try_acquire()
        with pytest.raises(LockUnavailable, match=f"redlock '{name}' was not taken"):
            lock.acquire(timeout=LONG_S)
        assert not is_held_at(servers[2], name)


PROCESS = """
import sys
from petiole.cachelib import connect
from petiole.coordination.redlock import Redlock

name, *urls = sys.argv[1:]
hold = Redlock([connect(url) for url in urls], name, ttl=1).acquire()
print(hold.fence, flush=True)
sys.stdin.readline()
print(hold.lost, hold.release(), flush=True)
"""


@pytest.fixture
def process(three_servers: list[EmbeddedServer], name: str) -> Iterator[subprocess.Popen[str]]:
    """One that holds it in a process of its own."""
    command = [sys.executable, "-c", PROCESS, name, *(server.url for server in three_servers)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_dead_holder_delays_the_next_by_one_lease(
    servers: list[Connections], name: str, process: subprocess.Popen[str]
) -> None:
    """Whose fence is higher."""
    assert process.stdout is not None
    old = int(process.stdout.readline())
    process.kill()
    with Redlock(servers, name).acquire(timeout=LONG_S) as hold:
        assert hold.fence > old


def test_a_holder_that_was_stopped_too_long_knows_it(
    servers: list[Connections], name: str, process: subprocess.Popen[str]
) -> None:
    """By its own clock, before it asks anybody; and releases nothing of the next one's."""
    assert process.stdout is not None
    assert process.stdin is not None
    old = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGSTOP)
    with Redlock(servers, name).acquire(timeout=LONG_S) as hold:
        assert hold.fence > old
        os.kill(process.pid, signal.SIGCONT)
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "True False\n"
        assert sum(is_held_at(server, name) for server in servers) >= 2  # as many as it takes to hold it


def test_a_forked_child_holds_nothing(servers: list[Connections], name: str) -> None:
    """And gives nothing back of what its parent holds."""
    with held(Redlock(servers, name)) as hold:
        pid = os.fork()
        if not pid:
            signal.alarm(30)
            status = 1
            try:
                status = 0 if hold.lost and not hold.release() else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert hold.held
        assert all(is_held_at(server, name) for server in servers)


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ([], "0 servers make no majority"),
        (["redis://a"], "for one, use Lock"),
        (["redis://a", "redis://b"], "name 3 or more"),
        (["redis://a", "redis://b", "redis://c", "redis://d"], "an even number outlives no more failures than 3"),
        (["redis://a", "redis://b", "redis://a"], "are one server"),
        (["redis://a", "redis://b", "redis://a:6379/1"], "are one server"),
        (["redis://localhost", "redis://b", "redis://127.0.0.1"], "are one server"),
        (["unix:///tmp/a", "redis://b", "unix:///tmp/a?db=1"], "are one server"),
    ],
)
def test_servers_that_make_no_majority_are_refused(name: str, urls: list[str], says: str) -> None:
    """When it is made. Passwords are not shown."""
    with ExitStack() as stack, pytest.raises(ValueError, match=says):
        Redlock([stack.enter_context(connect(url)) for url in urls], name)


@pytest.mark.parametrize("options", [{"ttl": 0.5}, {"ttl": 0}, {"ttl": 7_200}, {"max_hold": 1}, {"owner": ""}])
def test_bad_options_are_refused(servers: list[Connections], name: str, options: dict[str, object]) -> None:
    """When it is made."""
    with pytest.raises(ValueError, match=r"ttl|max_hold|owner"):
        Redlock(servers, name, **options)  # type: ignore[arg-type]


def test_it_shows_what_it_is(servers: list[Connections], name: str) -> None:
    """And whether it is held."""
    lock = Redlock(servers, name)
    assert repr(lock) == f"<Redlock '{name}' at 3 servers>"
    hold = held(lock)
    assert re.fullmatch(rf"<RedlockHold redlock '{name}' fence={hold.fence} \[\d\.\d s\]>", repr(hold))
    hold.release()
    assert repr(hold).endswith("[released]>")
