"""What ``Barrier`` promises: nobody goes on before all are there, and only those count that live and wait."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest
from local_nodes import eventually
from redis.exceptions import ConnectionError as RedisConnectionError

from petiole.cachelib import Connections, EmbeddedServer, connect
from petiole.cachelib.connections import UNAVAILABLE
from petiole.coordination import barrier as module
from petiole.coordination.barrier import Barrier
from petiole.coordination.errors import BarrierTimeout, BarrierUnavailable, PartiesDisagree

LONG_S = 60


def test_nobody_passes_before_all_are_there(redis: Connections, name: str) -> None:
    """Each is told its place in the order of arrival."""
    barrier = Barrier(redis, name, 4)
    with ThreadPoolExecutor(4) as pool:
        asked = []
        for count in range(1, 4):
            asked.append(pool.submit(barrier.wait, LONG_S))
            eventually(lambda count=count: barrier.waiting() == count, "it waits")
        assert not any(one.done() for one in asked)
        asked.append(pool.submit(barrier.wait, LONG_S))
        assert [one.result(LONG_S) for one in asked] == [0, 1, 2, 3]
    assert barrier.waiting() == 0


def test_one_party_waits_for_nobody(redis: Connections, name: str) -> None:
    """Again and again."""
    assert [Barrier(redis, name, 1).wait() for _ in range(3)] == [0] * 3


def test_it_closes_again_and_each_opening_lets_so_many_pass(redis: Connections, name: str) -> None:
    """Eight threads come again and again to a barrier for four: each opening deals every place once."""
    barrier = Barrier(redis, name, 4)
    places: list[int] = []

    def come(_: int) -> None:
        while len(places) < 200:
            with suppress(BarrierTimeout):  # those who are left over at the end
                places.append(barrier.wait(2))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come, range(8)))

    assert {places.count(place) for place in range(4)} == {len(places) // 4}
    assert barrier.waiting() == 0


def test_who_waits_asks_nothing(own_server: Callable[..., EmbeddedServer], name: str) -> None:
    """Each party costs one request, however many wait."""
    with connect(own_server().url) as redis:
        barrier = Barrier(redis, name, 8)
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(barrier.wait, LONG_S) for _ in range(7)]
            eventually(lambda: barrier.waiting() == 7, "seven wait")
            asked.append(pool.submit(barrier.wait, LONG_S))
            assert sorted(one.result(LONG_S) for one in asked) == list(range(8))
        stats = redis.coordination.info("commandstats")
    assert (
        stats["cmdstat_evalsha"]["calls"] - stats["cmdstat_evalsha"]["failed_calls"] + stats["cmdstat_eval"]["calls"]
        == 8
    )


ROUNDS = """
import sys
from petiole.cachelib import connect
from petiole.coordination.barrier import Barrier

url, name, number, parties, rounds = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
with connect(url) as redis:
    barrier, client, key = Barrier(redis, name, parties), redis.coordination, f"petiole:test:{sys.argv[2]}"
    places = []
    for reached in range(1, rounds + 1):
        client.hset(key, str(number), reached)
        client.expire(key, 600)
        places.append(barrier.wait(timeout=60))
        behind = [one for one in client.hvals(key) if int(one) < reached]
        if behind or client.hlen(key) != parties:
            sys.exit(f"passed round {reached} before {behind}")
print(*places)
"""


@pytest.mark.parametrize("rounds", [15, pytest.param(500, marks=pytest.mark.storm)])
def test_processes_go_round_by_round(redis_server: EmbeddedServer, redis: Connections, name: str, rounds: int) -> None:
    """None is ever a round ahead of another that has not arrived."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ROUNDS, redis_server.url, name, str(number), "4", str(rounds)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    places = [process.communicate(timeout=120)[0].split() for process in processes]

    assert [process.returncode for process in processes] == [0] * 4
    assert [sorted(together) for together in zip(*places, strict=True)] == [["0", "1", "2", "3"]] * rounds


PARTY = """
import sys
from petiole.cachelib import connect
from petiole.coordination.barrier import Barrier

url, name, parties, ttl = sys.argv[1:]
with connect(url) as redis:
    print(Barrier(redis, name, int(parties), ttl=float(ttl)).wait(), flush=True)
"""

Party = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def party(redis_server: EmbeddedServer, name: str) -> Iterator[Party]:
    """Starts processes that wait at the barrier."""
    with ExitStack() as stack:

        def start(parties: int, ttl_s: float = 30) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", PARTY, redis_server.url, name, str(parties), str(ttl_s)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            return process

        yield start


def test_a_party_that_died_does_not_count(redis: Connections, name: str, party: Party) -> None:
    """It is found out by the one that would complete the number; the places of the living are without a gap."""
    barrier = Barrier(redis, name, 3)
    dead = party(3)
    eventually(lambda: barrier.waiting() == 1, "it waits")
    (its_token,) = tokens(barrier)
    dead.kill()
    dead.wait(LONG_S)
    eventually(lambda: not listeners(redis), "the server has seen that it is gone")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(barrier.wait, LONG_S)
        eventually(lambda: barrier.waiting() == 2, "two are there, one is dead")
        second = pool.submit(barrier.wait, LONG_S)
        eventually(lambda: its_token not in tokens(barrier), "the dead one is buried")
        assert not first.done()
        assert not second.done()
        third = pool.submit(barrier.wait, LONG_S)
        assert [one.result(LONG_S) for one in (first, second, third)] == [0, 1, 2]


def tokens(barrier: Barrier) -> list[str]:
    """Those who wait, in order."""
    found: list[bytes] = barrier._redis.coordination.zrange(barrier._arrived, 0, -1)
    return [token.decode() for token in found]


def holders(barrier: Barrier) -> int:
    """How many parties of this very process wait."""
    (line,) = module.wakeups_of(barrier._redis)._lines.values()
    return len(line._waiters)


def test_a_party_that_is_stopped_counts_until_its_lease_is_over(redis: Connections, name: str, party: Party) -> None:
    """When it goes on it is there again."""
    barrier = Barrier(redis, name, 2)
    stopped = party(2, ttl_s=1)
    eventually(lambda: barrier.waiting() == 1, "it waits")
    os.kill(stopped.pid, signal.SIGSTOP)
    eventually(lambda: leases_over(barrier), "its lease is over")
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(barrier.wait, LONG_S)
        eventually(lambda: holders(barrier) == 1 and barrier.waiting() == 1 and not leases_over(barrier), "it is alone")
        assert not waits.done()
        os.kill(stopped.pid, signal.SIGCONT)
        assert waits.result(LONG_S) == 0
    assert stopped.communicate(timeout=LONG_S)[0] == "1\n"


def leases_over(barrier: Barrier) -> bool:
    """Whether some party has not been heard of for its lease."""
    client = barrier._redis.coordination
    seconds, microseconds = client.time()
    ends = [int(value.split()[0]) for field, value in client.hgetall(barrier._state).items() if field[:1] == b"w"]
    return any(end <= seconds * 1_000 + microseconds // 1_000 for end in ends)


def test_a_party_that_waits_long_says_that_it_is_there(redis: Connections, name: str) -> None:
    """So it counts for as long as it waits, however short its lease is."""
    barrier = Barrier(redis, name, 2, ttl=0.3)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(barrier.wait, LONG_S)
        eventually(lambda: barrier.waiting() == 1, "it waits")
        began = redis.coordination.time()[0]
        eventually(lambda: redis.coordination.time()[0] > began + 1, "several leases have passed")
        assert barrier.wait(LONG_S) == 1
        assert waits.result(LONG_S) == 0


def test_who_does_not_want_to_wait_longer_leaves(redis: Connections, name: str) -> None:
    """And does not count: the next ones need their full number."""
    barrier = Barrier(redis, name, 2)
    with pytest.raises(BarrierTimeout, match=rf"barrier '{name}': not all of 2 parties were there within 0.05 s"):
        barrier.wait(timeout=0.05)
    assert barrier.waiting() == 0
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(barrier.wait, LONG_S)
        eventually(lambda: barrier.waiting() == 1, "it waits")
        assert not waits.done()
        assert barrier.wait(LONG_S) == 1
        assert waits.result(LONG_S) == 0


def test_an_interrupt_leaves_the_barrier(redis: Connections, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised while it waits."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Line, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Barrier(redis, name, 2).wait()
    assert Barrier(redis, name, 2).waiting() == 0


def test_a_reply_that_was_lost_is_asked_for_again(
    redis: Connections, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the one that waits and by the one that opened it; none is counted twice."""
    barrier, arrive, lost = Barrier(redis, name, 2), module._ARRIVE, []

    def loses_every_other(*arguments: object, **values: object) -> object:
        reply = arrive(*arguments, **values)  # type: ignore[arg-type]
        if values["token"] not in lost:
            lost.append(values["token"])
            raise RedisConnectionError("the reply was lost")
        return reply

    monkeypatch.setattr(module, "_ARRIVE", loses_every_other)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(barrier.wait, LONG_S)
        eventually(lambda: barrier.waiting() == 1 and len(lost) == 1, "it waits")
        assert barrier.wait(LONG_S) == 1
        assert waits.result(LONG_S) == 0
    assert len(lost) == 2
    assert barrier.waiting() == 0


def test_a_message_that_was_lost_costs_a_third_of_a_lease(
    redis: Connections, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who passed is known for two leases."""
    monkeypatch.setattr(module.Line, "_tell", lambda *_: None)
    barrier = Barrier(redis, name, 3, ttl=1)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(barrier.wait, LONG_S) for _ in range(3)]
        assert sorted(one.result(LONG_S) for one in asked) == [0, 1, 2]


def test_those_who_wait_outlive_a_server_that_restarts(own_server: Callable[..., EmbeddedServer], name: str) -> None:
    """They arrive again, also where it has forgotten them."""
    server = own_server("--enable-debug-command", "yes")
    with connect(server.url) as redis, ThreadPoolExecutor(3) as pool:
        barrier = Barrier(redis, name, 3)
        asked = [pool.submit(barrier.wait, LONG_S) for _ in range(2)]
        eventually(lambda: barrier.waiting() == 2, "two wait")
        before = redis.coordination.info("server")["run_id"]
        with suppress(*UNAVAILABLE):
            redis.coordination.execute_command("DEBUG", "CRASH-AND-RECOVER", 1)

        def they_are_back() -> bool:
            with suppress(*UNAVAILABLE):
                return redis.coordination.info("server")["run_id"] != before and barrier.waiting() == 2
            return False

        eventually(they_are_back, "they wait at the server that has restarted")
        asked.append(pool.submit(barrier.wait, LONG_S))
        assert sorted(one.result(LONG_S) for one in asked) == [0, 1, 2]


def test_parties_that_disagree_are_told_so(redis: Connections, name: str) -> None:
    """The one that came later; those who wait are not disturbed. When nobody waits, another number may be given."""
    barrier = Barrier(redis, name, 2)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(barrier.wait, LONG_S)
        eventually(lambda: barrier.waiting() == 1, "it waits")
        with pytest.raises(PartiesDisagree, match="waits for 3 parties, those who are there wait for 2"):
            Barrier(redis, name, 3).wait(LONG_S)
        assert barrier.waiting() == 1
        assert barrier.wait(LONG_S) == 1
        assert waits.result(LONG_S) == 0
    assert Barrier(redis, name, 1).wait(LONG_S) == 0


def test_the_number_of_the_dead_binds_nobody(redis: Connections, name: str, party: Party) -> None:
    """Nor that of one that has left."""
    dead = party(3)
    barrier = Barrier(redis, name, 1)
    eventually(lambda: barrier.waiting() == 1, "it waits")
    dead.kill()
    dead.wait(LONG_S)
    eventually(lambda: not listeners(redis), "the server has seen that it is gone")
    assert barrier.wait(LONG_S) == 0


def listeners(redis: Connections) -> list[bytes]:
    """The channels on which grants are heard."""
    found: list[bytes] = redis.coordination.pubsub_channels("petiole:1:granted:*")
    return found


def test_many_parties_pass_at_once(redis: Connections, name: str) -> None:
    """More than one thousand: the server is asked who listens in several questions."""
    barrier = Barrier(redis, name, 2_500)
    arrive, client = module._ARRIVE, redis.coordination
    line = module.wakeups_of(redis).line(0)
    line.expect("ours")
    line.subscribe("ours")
    line.forget("ours")
    for number in range(2_499):
        arrived = arrive(
            client,
            state=barrier._state,
            arrived=barrier._arrived,
            opened=barrier._opened,
            token=f"token{number}",
            parties=2_500,
            lease_ms=60_000,
            channel=line.channel if number else "nobody-listens-here",
        )
        assert arrived == (0, 0)
    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(barrier.wait, LONG_S)
        eventually(lambda: "token0" not in tokens(barrier), "one is dead, and one has come")
        assert barrier.wait(LONG_S) == 2_499
        assert waits.result(LONG_S) == 2_498


def test_a_barrier_works_on_a_cluster(clustered: Connections, name: str) -> None:
    """The node that has it knows who listens."""
    barrier = Barrier(clustered, name, 3)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            asked = [pool.submit(barrier.wait, LONG_S) for _ in range(3)]
            assert sorted(one.result(LONG_S) for one in asked) == [0, 1, 2]


@pytest.mark.parametrize("parties", [0, -1, True, 10_001, 2.0, "3", None])
def test_bad_parties_are_refused(redis: Connections, name: str, parties: object) -> None:
    """When it is made."""
    with pytest.raises(ValueError, match="whole number from 1 to 10000"):
        Barrier(redis, name, parties)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"ttl": 0}, {"ttl": 0.05}, {"ttl": 3601}, {"ttl": float("nan")}])
def test_bad_leases_are_refused(redis: Connections, name: str, options: dict[str, float]) -> None:
    """They could not be kept."""
    with pytest.raises(ValueError, match="ttl"):
        Barrier(redis, name, 2, **options)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_bad_times_are_refused(redis: Connections, name: str, timeout: float) -> None:
    """Before it counts."""
    with pytest.raises(ValueError, match="timeout"):
        Barrier(redis, name, 2).wait(timeout)


def test_without_redis_nobody_passes(own_server: Callable[..., EmbeddedServer], name: str) -> None:
    """It says which server did not answer."""
    server = own_server()
    with connect(server.url) as redis:
        server.stop()
        with pytest.raises(BarrierUnavailable, match=f"Redis at {server.url} did not answer"):
            Barrier(redis, name, 2).wait()


def test_a_name_of_any_kind_is_one_name(redis: Connections, name: str) -> None:
    """Braces and line ends are text."""
    assert Barrier(redis, f"{name}{{}}\n", 1).wait() == 0
    assert repr(Barrier(redis, name, 2)).endswith("parties=2>")
    assert threading.active_count() < 50
