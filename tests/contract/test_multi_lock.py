"""What ``MultiLock`` promises: all names or none, nobody else meanwhile, and no circle in which callers wait."""

import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from local_nodes import eventually

from petiole.cachelib import Connections
from petiole.coordination.errors import LockError, LockLost, LockReentered, LockTimeout
from petiole.coordination.hold import Busy, Hold
from petiole.coordination.keeper import keeper_of
from petiole.coordination.lock import Lock
from petiole.coordination.multi_lock import MultiHold, MultiLock

LONG_S = 60
"""Longer than anything here takes, so that a circle is a failure and no hang."""


@pytest.fixture
def names(name: str) -> list[str]:
    """Three names of this test's own, in no order."""
    return [f"{name}:{letter}" for letter in "cab"]


def is_free(redis: Connections, name: str) -> bool:
    """Whether nobody holds a name or waits for it."""
    seen = Lock(redis, name).inspect()
    return not seen.held and not seen.waiting


def test_all_names_are_held_each_with_its_fence(redis: Connections, names: list[str]) -> None:
    """And given back together. Fences rise name by name."""
    lock = MultiLock(redis, [*names, names[0]])
    with lock as hold:
        assert list(hold.holds) == list(lock.names) == sorted(names)
        assert hold
        assert hold.held
        assert [Lock(redis, name).try_acquire().ahead for name in names] == [0, 0, 0]
        hold.raise_if_lost()
    again = lock.acquire()

    assert all(again.fences[name] > hold.fences[name] for name in names)
    assert again.release()
    assert not again.release()
    assert not again.held
    assert not again.lost
    assert all(is_free(redis, name) for name in names)


def test_the_lock_of_one_of_the_names_excludes_all(redis: Connections, names: list[str]) -> None:
    """None of the names is kept when one is not had."""
    hold = Lock(redis, names[0]).acquire()
    assert isinstance(MultiLock(redis, names).try_acquire(), Busy)
    assert all(is_free(redis, name) for name in names[1:])
    with pytest.raises(LockTimeout, match=rf"lock '{names[0]}' was not free within 0.05 s"):
        MultiLock(redis, names).acquire(timeout=0.05)
    assert all(is_free(redis, name) for name in names[1:])
    assert not Lock(redis, names[0]).inspect().waiting
    assert hold.release()


def test_the_names_share_the_time(redis: Connections, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What one name took is not there for the next."""
    given: list[float] = []
    acquire = Lock.acquire_units

    def noted(lock: Lock, units: int, timeout_s: float | None) -> Hold:
        given.append(timeout_s or 0.0)
        return acquire(lock, units, timeout_s)

    monkeypatch.setattr(Lock, "acquire_units", noted)
    MultiLock(redis, names).acquire(timeout=LONG_S).release()

    assert LONG_S >= given[0] > given[1] > given[2] > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_all_is_given_back_whatever_is_raised(
    redis: Connections, names: list[str], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """An interrupt in the middle leaves nothing behind."""
    acquire = Lock.acquire_units

    def interrupted(lock: Lock, units: int, timeout_s: float | None) -> Hold:
        if lock.name == max(names):
            raise error
        return acquire(lock, units, timeout_s)

    monkeypatch.setattr(Lock, "acquire_units", interrupted)
    with pytest.raises(error):
        MultiLock(redis, names).acquire()

    assert all(is_free(redis, name) for name in names)


def test_a_thread_that_holds_one_of_the_names_does_not_wait_for_itself(redis: Connections, names: list[str]) -> None:
    """It is told so, and holds no more than before."""
    with Lock(redis, max(names)):
        with pytest.raises(LockReentered):
            MultiLock(redis, names).acquire(timeout=LONG_S)
        assert is_free(redis, min(names))


def test_callers_with_any_names_in_any_order_never_wait_in_a_circle(redis: Connections, names: list[str]) -> None:
    """Twelve threads take what chance gives them, and each name has one holder at a time."""
    inside = dict.fromkeys(names, 0)
    overlaps: list[str] = []

    def take(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(15):
            mine = chance.sample(names, chance.randint(1, len(names)))
            with MultiLock(redis, mine).acquire(timeout=LONG_S):
                for name in mine:
                    inside[name] += 1
                overlaps.extend(name for name in mine if inside[name] != 1)
                for name in mine:
                    inside[name] -= 1

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(take, range(12)))

    assert overlaps == []
    assert all(is_free(redis, name) for name in names)


PROCESS = """
import random, sys
from petiole.cachelib import connect
from petiole.coordination.lock import Lock
from petiole.coordination.multi_lock import MultiLock

url, seed, *names = sys.argv[1:]
chance = random.Random(int(seed))
added = dict.fromkeys(names, 0)
with connect(url) as redis:
    client = redis.coordination
    for _ in range(40):
        mine = chance.sample(names, chance.randint(1, len(names)))
        lock = MultiLock(redis, mine) if len(mine) > 1 else Lock(redis, mine[0])
        with lock.acquire(timeout=60):
            seen = {name: int(client.get(f"petiole:test:{name}") or 0) for name in mine}
            for name in mine:
                client.set(f"petiole:test:{name}", seen[name] + 1, ex=600)
                added[name] += 1
print(*added.values())
"""


def test_processes_with_any_names_lose_no_update(redis: Connections, redis_server, names: list[str]) -> None:
    """They read and write back under the lock, some by ``Lock`` and some by ``MultiLock``, and none waits for ever."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, redis_server.url, str(seed), *names], stdout=subprocess.PIPE, text=True
        )
        for seed in range(4)
    ]
    added = [[int(count) for count in process.communicate(timeout=120)[0].split()] for process in processes]
    total = [sum(counts) for counts in zip(*added, strict=True)]

    assert [process.returncode for process in processes] == [0] * 4
    assert [int(redis.coordination.get(f"petiole:test:{name}")) for name in names] == total


KILLED = """
import sys, threading
from petiole.cachelib import connect
from petiole.coordination.multi_lock import MultiLock

url, *names = sys.argv[1:]
with connect(url) as redis:
    hold = MultiLock(redis, names, ttl=1).acquire()
    print(*hold.fences.values(), flush=True)
    threading.Event().wait()
"""


def test_a_dead_holder_delays_the_next_by_one_lease(redis: Connections, redis_server, names: list[str]) -> None:
    """All names of a process that was killed come free by themselves, and its fences are below the next ones."""
    command = [sys.executable, "-c", KILLED, redis_server.url, *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        fences = [int(fence) for fence in process.stdout.readline().split()]
        process.kill()

    with MultiLock(redis, names).acquire(timeout=LONG_S) as hold:
        assert all(new > old for new, old in zip(hold.fences.values(), fences, strict=True))


def test_it_is_lost_when_one_of_its_locks_is(redis: Connections, names: list[str]) -> None:
    """The holder is told once, with the name; the others are still held until it releases them."""
    told: list[MultiHold] = []
    heard = threading.Event()
    hold = MultiLock(redis, names, ttl=1).acquire()
    hold.on_lost(lambda lost: (told.append(lost), heard.set()))
    Lock(redis, names[1]).force_release()
    assert heard.wait(LONG_S)

    assert hold.lost
    assert not hold.held
    with pytest.raises(LockLost, match=names[1]):
        hold.raise_if_lost()
    assert [hold.holds[name].held for name in names] == [True, False, True]
    Lock(redis, names[0]).force_release()
    eventually(lambda: hold.holds[names[0]].lost, "the second is lost too")
    assert not hold.release()
    assert all(is_free(redis, name) for name in names)
    assert told == [hold]


def test_the_block_ends_with_the_loss(redis: Connections, names: list[str]) -> None:
    """Unless it raises something else."""

    def lose(error: Exception | None) -> None:
        with MultiLock(redis, names, ttl=1) as hold:
            Lock(redis, names[1]).force_release()
            eventually(lambda: hold.lost, "it is lost")
            if error:
                raise error

    with pytest.raises(LockLost, match=names[1]):
        lose(None)
    with pytest.raises(KeyError):
        lose(KeyError())
    assert all(is_free(redis, name) for name in names)


def test_what_is_lost_while_the_rest_is_waited_for_is_acquired_anew(redis: Connections, names: list[str]) -> None:
    """Nobody is told that all are held when one is not."""
    first, *_, last = sorted(names)
    blocking = Lock(redis, last).acquire()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(MultiLock(redis, names, ttl=1).acquire, LONG_S)
        eventually(lambda: Lock(redis, last).inspect().waiting, "it waits for the last name")
        Lock(redis, first).force_release()
        eventually(lambda: not kept(redis, first), "it has heard that the first is lost")
        blocking.release()
        hold = asked.result(LONG_S)

    assert hold.held
    assert Lock(redis, first).inspect().held
    assert hold.release()


def kept(redis: Connections, name: str) -> bool:
    """Whether this process believes that it holds a name."""
    return any(hold.what == f"lock {name!r}" for hold in list(keeper_of(redis)._holds.values()))


def test_names_in_several_slots_of_a_cluster_are_held_together(clustered: Connections, names: list[str]) -> None:
    """Each is asked for where it is."""
    assert len({Lock(clustered, name)._store.slot for name in names}) > 1
    with MultiLock(clustered, names).acquire(timeout=LONG_S) as hold:
        assert all(isinstance(Lock(clustered, name).try_acquire(), Busy) for name in names)
    assert not hold.held
    assert all(is_free(clustered, name) for name in names)


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        ("account", TypeError, r"write \['account'\], or use Lock"),
        (b"account", TypeError, "several names"),
        ([], ValueError, "nothing to lock"),
        (["a", 7], TypeError, "must be text, not int: 7"),
        (["a", ""], ValueError, "must not be empty"),
    ],
)
def test_what_is_no_names_is_refused(redis: Connections, names: object, error: type[Exception], says: str) -> None:
    """When it is made, not when it is used."""
    with pytest.raises(error, match=says):
        MultiLock(redis, names)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(redis: Connections, names: list[str], timeout: float) -> None:
    """Before anything is held."""
    with pytest.raises(ValueError, match="timeout"):
        MultiLock(redis, names).acquire(timeout)
    assert all(is_free(redis, name) for name in names)


def test_without_redis_nothing_is_held(own_server, names: list[str]) -> None:
    """It raises what ``Lock`` raises."""
    from petiole.cachelib import connect

    server = own_server()
    with connect(server.url) as redis:
        server.stop()
        with pytest.raises(LockError, match="did not answer"):
            MultiLock(redis, names).acquire()
