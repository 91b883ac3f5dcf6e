"""What locks promise, as the recorded histories of processes to which bad things happen.

Each process notes when it began to hold, with which fence, until when it believed in it, and what it wrote; the checker
(``histories.py``) looks for two that held at one moment, for fences that do not rise, and for late writes that were
accepted. Where no lease can prevent that two processes write at once, the fence must have refused the late one.
"""

import os
import random
import re
import threading
import time
from contextlib import suppress
from functools import partial

import pytest
from local_nodes import eventually

from petiole.cachelib import Settings, connect
from petiole.cachelib.circuit import UNAVAILABLE
from petiole.coordination import Lock, ReadWriteLock, Semaphore, turn_store
from petiole.coordination.errors import LockTimeout, LockUnavailable
from petiole.coordination.read_write_lock import MOST_READERS
from tests.contract.histories import crowds_of_kept, fences_out_of_order, holds_of, steps_back, violations, writes_of
from tests.contract.lock_programs.crew import Crew, Program, Storm, run, stopped
from tests.contract.lock_programs.cutting_proxy import cutting_proxy

SEEDS = range(int(os.environ.get("PETIOLE_STORM_SEEDS", "1")))
"""More of them for a longer proof: each is another storm."""
FAULTS = int(os.environ.get("PETIOLE_STORM_FAULTS", "5"))
"""Of each storm."""

PROCESSES = 16
TTL_S = 0.3
LONG_TTL_S = 30
PERMITS = 3
CAPACITIES = {"lock": 1, "semaphore": PERMITS, "readwrite": MOST_READERS}


@pytest.fixture(scope="module")
def program():
    started = Program()
    yield started
    started.close()


@pytest.fixture
def crew_of(program, tmp_path, name):
    """Starts crews, each with a folder of its own."""
    crews = []

    def start(url, **more):
        folder = tmp_path / f"crew{len(crews)}"
        folder.mkdir()
        crews.append(Crew(program, folder, url, name, **{"ttl_s": TTL_S} | more))
        return crews[-1]

    yield start
    for crew in crews:
        crew.close()


@pytest.fixture
def server(own_server):
    """A server of the test's own, afterwards without keys that live for ever, and without connections."""
    started = own_server()
    yield started
    nothing_is_left(started.port)


def connected(url):
    return connect(settings=Settings(url=url))


def nothing_is_left(port):
    """No key without a TTL, no connection besides the one that looks."""
    eventually(lambda: len(run(port, "CLIENT", "LIST").splitlines()) == 1, "all connections are closed")
    for key in run(port, "KEYS", "*"):
        assert int(run(port, "PTTL", key)) > 0, key


def nobody_is_left(redis, crew, kind="lock"):
    """Whoever comes now holds it, once the leases of the dead are over; then nobody else holds, and nobody waits."""
    thing = {
        "lock": lambda: Lock(redis, crew.name, ttl=TTL_S),
        "semaphore": lambda: Semaphore(redis, crew.name, permits=PERMITS, ttl=TTL_S),
        "readwrite": lambda: ReadWriteLock(redis, crew.name, ttl=TTL_S),
    }[kind]()
    if kind == "lock":
        thing.acquire(20).release()
    elif kind == "semaphore":
        thing.acquire(20, permits=PERMITS).release()
    else:
        thing.write.acquire(20).release()
    seen = thing.inspect()
    assert (seen.holders, seen.waiting) == ((), ())


def proven(crew, *, forgetful=False, capacity=1):
    """The holds of a history in which nothing is wrong."""
    notes = crew.notes()
    assert violations(notes, forgetful=forgetful, capacity=capacity) == []
    assert steps_back(crew.rows()) == 0
    return holds_of(notes)


@pytest.mark.parametrize("holds", [4, pytest.param(30, marks=pytest.mark.storm)])
@pytest.mark.parametrize("kind", CAPACITIES)
def test_of_sixteen_processes_never_more_hold_than_there_is_room_for(server, crew_of, kind, holds):
    crew = crew_of(server.url, kind=kind, permits=PERMITS, ttl_s=LONG_TTL_S)
    workers = [crew.start(holds=holds) for _ in range(PROCESSES)]
    crew.until(lambda: not crew.alive, "all are through")
    held = proven(crew, capacity=CAPACITIES[kind])
    assert all(one.kept for one in held)
    assert all(crew.count(worker, "began") for worker in workers)
    with connected(server.url) as redis:
        nobody_is_left(redis, crew, kind)


STORMS = {
    "killed": ["kill"],
    "stopped beyond their leases": ["pause"],
    "cut off": ["cut_all", "cut_listeners"],
    "with a server that hangs and forgets its scripts": ["hang", "forget_scripts"],
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("faults", STORMS.values(), ids=STORMS)
def test_one_at_a_time_holds_a_lock_while_processes_are(server, crew_of, faults, seed):
    """Each at a moment that nobody has chosen, holders as well as those who wait."""
    crew = crew_of(server.url, seed=seed)
    for _ in range(PROCESSES):
        crew.start()
    Storm(crew, server.port, seed).blow(*faults, times=FAULTS)
    crew.end()
    assert len(proven(crew)) > FAULTS
    with connected(server.url) as redis:
        nobody_is_left(redis, crew)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["semaphore", "readwrite"])
def test_never_more_hold_than_there_is_room_for_whatever_happens(server, crew_of, kind, seed):
    """Two threads of each process."""
    crew = crew_of(server.url, kind=kind, permits=PERMITS, seed=seed, threads=2)
    for _ in range(PROCESSES // 2):
        crew.start()
    faults = [fault for storm in STORMS.values() for fault in storm]
    Storm(crew, server.port, seed).blow(*faults, times=FAULTS)
    crew.end()
    assert len(proven(crew, capacity=CAPACITIES[kind])) > FAULTS
    with connected(server.url) as redis:
        nobody_is_left(redis, crew, kind)


def test_a_holder_that_was_stopped_beyond_its_lease_is_refused_where_it_writes(server, crew_of):
    """No lease can keep it from writing; the fence does, and its own clock has told it."""
    crew = crew_of(server.url)
    sleeper = crew.start("acquire", "write", "wait", "write", "look", "release")
    crew.hear(sleeper, "ready")
    crew.pause(sleeper)
    successor = crew.start("acquire", "write", "wait", "look", "release", ttl_s=LONG_TTL_S)
    crew.hear(successor, "ready")
    crew.go(sleeper)
    crew.resume(sleeper)
    crew.hear(sleeper, "done")
    crew.go(successor)
    crew.hear(successor, "done")

    late, later = proven(crew)
    assert steps_back(crew.unguarded()) == 1  # they did write at once
    assert crew.count(sleeper, "refused") == 2  # in the table and in the store
    assert (late.lost, late.kept) == (True, False)
    assert (later.lost, later.kept) == (False, True)  # the late release has freed nothing


def test_a_waiter_that_was_granted_the_lock_while_it_was_stopped_does_not_believe_it(server, crew_of):
    crew = crew_of(server.url)
    holder = crew.start("acquire", "wait", "release", ttl_s=LONG_TTL_S)
    crew.hear(holder, "ready")
    sleeper = crew.start("acquire", "write", "look", "release")
    with connected(server.url) as redis:
        lock = Lock(redis, crew.name)
        eventually(lambda: len(lock.inspect().waiting) == 1, "one waits")
        crew.pause(sleeper)
        granted = crew.start("acquire", "write", "wait", "look", "release", ttl_s=LONG_TTL_S)
        eventually(lambda: len(lock.inspect().waiting) == 2, "two wait")
        crew.go(holder)
        crew.hear(granted, "ready")  # it has waited for the lease of the one that sleeps
        crew.resume(sleeper)
        eventually(lambda: len(lock.inspect().waiting) == 1, "it waits again")
        assert crew.count(sleeper, "began") == 0
        crew.go(granted)
        crew.hear(sleeper, "done")
        crew.hear(granted, "done")
    held = proven(crew)
    assert len(held) == 3
    assert all(one.kept for one in held)
    assert steps_back(crew.unguarded()) == 0


def test_a_call_that_keeps_the_interpreter_beyond_the_lease_is_found_out(server, crew_of):
    """Renewals run in a thread, which gets no turn: the holder learns of the loss when it looks, from its own clock."""
    crew = crew_of(server.url)
    hog = crew.start("prepare_hog", "acquire", "write", "wait", "hog_it", "write", "look", "release", ttl_s=0.6)
    crew.hear(hog, "ready")
    successor = crew.start("acquire", "write", "wait", "release", ttl_s=LONG_TTL_S)
    with connected(server.url) as redis:
        eventually(lambda: len(Lock(redis, crew.name).inspect().waiting) == 1, "one waits")
    crew.go(hog)
    crew.hear(successor, "ready")
    crew.hear(hog, "done")
    crew.go(successor)
    crew.hear(successor, "done")
    late, later = proven(crew)
    assert steps_back(crew.unguarded()) == 1
    assert crew.count(hog, "refused") == 2
    assert (late.lost, late.kept, later.kept) == (True, False, True)


def test_holder_and_waiters_survive_a_server_that_is_restarted_with_what_it_had(own_server, crew_of, tmp_path):
    kept = ("--appendonly", "yes", "--appendfsync", "always", "--dir", str(tmp_path))
    server = own_server(*kept, "--enable-debug-command", "yes")
    crew = crew_of(server.url, ttl_s=LONG_TTL_S)
    holder = crew.start("acquire", "write", "wait", "look", "write", "release")
    crew.hear(holder, "ready")
    waiters = [crew.start("acquire", "write", "look", "release") for _ in range(3)]
    with connected(server.url) as redis:
        eventually(lambda: len(Lock(redis, crew.name).inspect().waiting) == 3, "three wait")
    restart(server)
    crew.go(holder)
    crew.until(lambda: not crew.alive, "all are through")
    held = proven(crew)
    assert len(held) == 1 + len(waiters)
    assert all(one.kept for one in held)


def test_fences_rise_over_a_server_that_has_forgotten_everything(own_server, crew_of):
    """Then two may hold at once; only the later one is told at its end that it did, and only it may write."""
    server = own_server("--enable-debug-command", "yes")
    crew = crew_of(server.url, ttl_s=LONG_TTL_S)
    before = crew.start("acquire", "write", "wait", "write", "release")
    crew.hear(before, "ready")
    restart(server)
    after = crew.start("acquire", "write", "wait", "write", "release")
    crew.hear(after, "ready")
    crew.go(before)
    crew.hear(before, "done")
    crew.go(after)
    crew.hear(after, "done")
    early, late = sorted(proven(crew, forgetful=True), key=lambda one: one.began)
    assert early.fence < late.fence
    assert (early.kept, late.kept) == (False, True)
    assert crew.count(before, "refused") == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_who_is_told_to_have_held_has_held_though_everything_is_flushed_in_between(server, crew_of, seed):
    crew = crew_of(server.url, seed=seed, database=None)
    for _ in range(PROCESSES // 2):
        crew.start()
    Storm(crew, server.port, seed).blow("flush", times=FAULTS)
    crew.end()
    notes = crew.notes()
    held = holds_of(notes)
    assert fences_out_of_order(held) + crowds_of_kept(held, 1) == []
    with connected(server.url) as redis:
        nobody_is_left(redis, crew)


def restart(server):
    """The server ends as by a power cut, and comes back on its port."""
    began = run(server.port, "INFO", "server").split(b"run_id:")[1].split()[0]
    with suppress(*UNAVAILABLE):  # it says no more
        run(server.port, "DEBUG", "CRASH-AND-RECOVER")

    def is_back():
        try:
            return run(server.port, "INFO", "server").split(b"run_id:")[1].split()[0] != began
        except UNAVAILABLE:
            return False

    eventually(is_back, "the server is back")


def test_a_holder_learns_of_its_loss_while_the_server_hangs(server):
    with connected(server.url) as redis:
        hold = Lock(redis, "x", ttl=TTL_S).acquire()
        learned = threading.Event()
        hold.on_lost(lambda lost: learned.set())
        with stopped(server.port):
            assert learned.wait(30)
            assert hold.lost
        later = Lock(redis, "x", ttl=TTL_S).acquire(20)
        assert later.fence > hold.fence
        assert not hold.release()
        assert later.release()


CUTS = ["before", "within", "after"]


@pytest.mark.parametrize("moment", CUTS)
def test_an_acquire_that_was_cut_off_leaves_nothing_behind(server, name, moment):
    """Whether the server has got the request or not: nobody holds twice, and the next one need not wait for a lease."""
    with cutting_proxy(server.port) as proxy, connected(proxy.url) as cut_off, connected(server.url) as redis:
        lock = Lock(cut_off, name, ttl=LONG_TTL_S, owner="cut off")
        lock.acquire().release()  # connected, and the script is known
        proxy.cut(b"cut off", moment)
        try:
            hold = lock.acquire()
        except LockUnavailable:
            hold = None
        assert proxy.cuts == 1
        other = Lock(redis, name, ttl=LONG_TTL_S)
        if hold:
            assert not other.try_acquire()
            assert hold.release()
        other.acquire(LONG_TTL_S / 2).release()
        seen = other.inspect()
        assert (seen.holders, seen.waiting) == ((), ())


@pytest.mark.parametrize("moment", CUTS)
def test_a_release_that_was_cut_off_frees_the_lock_once(server, name, moment):
    with cutting_proxy(server.port) as proxy, connected(proxy.url) as cut_off, connected(server.url) as redis:
        hold = Lock(cut_off, name, ttl=LONG_TTL_S).acquire()
        proxy.cut(turn_store._GIVE.sha.encode(), moment)
        hold.release()
        assert proxy.cuts == 1
        later = Lock(redis, name, ttl=LONG_TTL_S).acquire(LONG_TTL_S / 2)  # long before the lease would be over
        assert not hold.release()
        assert later.fence > hold.fence
        time.sleep(0.1)  # the keeper of the first may give back again
        assert Lock(redis, name).inspect().holders[0].token == later.token
        assert later.release()


@pytest.mark.parametrize("moment", CUTS)
def test_a_waiter_that_was_cut_off_keeps_its_place_and_takes_no_second_one(server, name, moment):
    with cutting_proxy(server.port) as proxy, connected(proxy.url) as cut_off, connected(server.url) as redis:
        waiting = Lock(cut_off, name, ttl=LONG_TTL_S, owner="cut off")
        waiting.acquire().release()
        lock = Lock(redis, name, ttl=LONG_TTL_S)
        hold = lock.acquire()
        got = []
        proxy.cut(b"petiole:1:granted", *CUTS)  # each of its requests for a place, in one way each
        thread = threading.Thread(target=lambda: got.append(waiting.acquire(LONG_TTL_S)))
        thread.start()
        eventually(lambda: proxy.cuts == len(CUTS) and len(lock.inspect().waiting) == 1, "it waits in spite of all")
        assert hold.release()
        thread.join(LONG_TTL_S)
        assert got[0].fence > hold.fence
        assert got[0].release()
        assert (lock.inspect().holders, lock.inspect().waiting) == ((), ())


@pytest.mark.parametrize("seed", SEEDS)
def test_one_at_a_time_holds_a_lock_over_connections_that_are_cut_anywhere(server, crew_of, seed):
    chance = random.Random(seed)
    with cutting_proxy(server.port) as proxy:
        crew = crew_of(proxy.url, seed=seed, ttl_s=2)
        proxy.cut_now_and_then(lambda: chance.choice(CUTS) if chance.random() < 0.03 else None)
        for _ in range(8):
            crew.start(holds=15)
        crew.until(lambda: not crew.alive, "all are through")
        proven(crew)
        assert proxy.cuts > 8
        with connected(server.url) as redis:
            nobody_is_left(redis, crew)


def test_a_forked_child_holds_nothing_of_what_its_parent_holds(server, crew_of):
    crew = crew_of(server.url, ttl_s=LONG_TTL_S)
    parent = crew.start("acquire", "write", "fork", "wait", "look", "release", "wait")
    crew.hear(parent, "child-refused")
    assert crew.count(parent, "child-lost") == 1
    with connected(server.url) as redis:
        lock = Lock(redis, crew.name)
        eventually(lambda: len(lock.inspect().waiting) == 1, "the child waits")
        assert lock.inspect().held
        crew.go(parent)
        crew.hear(parent, "child-done")
        crew.go(parent)
        crew.hear(parent, "done")
        nobody_is_left(redis, crew)
    assert crew.count(parent, "held") == 1
    assert crew.count(parent, "released") == 2


def test_over_a_failover_of_sentinels_fences_rise_and_the_loss_is_learned(own_server, sentinel, crew_of):
    """What the replica had not got is free at once. Who held it before is told that it did not hold to its end."""
    primary = own_server("--repl-diskless-sync-delay", "0")
    replica = own_server("--replicaof", "127.0.0.1", str(primary.port))
    eventually(lambda: b"master_link_status:up" in run(replica.port, "INFO"), "the replica follows")
    port = sentinel(primary.port)

    def ready():
        told = run(port, "SENTINEL", "MASTER", "mymaster")
        return told[told.index(b"num-slaves") + 1] == b"1"

    eventually(ready, "the sentinel knows the replica")
    crew = crew_of(f"redis+sentinel://127.0.0.1:{port}/mymaster/0", ttl_s=LONG_TTL_S)
    run(replica.port, "CONFIG", "SET", "masterauth", "wrong")  # it cannot come back: what follows, it misses
    run(replica.port, "CLIENT", "KILL", "TYPE", "master")
    before = crew.start("acquire", "wait", "write", "release")
    crew.hear(before, "ready")
    waiter = crew.start("acquire", "write", "wait", "release")
    eventually(lambda: b" name=petiole-grants" in run(primary.port, "CLIENT", "LIST"), "it waits")
    primary.stop()
    crew.hear(waiter, "ready")
    crew.go(before)
    crew.hear(before, "done")
    crew.go(waiter)
    crew.hear(waiter, "done")
    early, late = sorted(proven(crew, forgetful=True), key=lambda one: one.began)
    assert early.fence < late.fence
    assert (early.kept, late.kept) == (False, True)
    assert crew.count(before, "refused") == 2


def test_waiters_of_a_cluster_go_on_after_a_failover_of_their_node(own_cluster, crew_of):
    cluster = own_cluster(1, replicas=1)
    crew = crew_of(cluster.url, ttl_s=LONG_TTL_S)
    holder = crew.start("acquire", "write", "wait", "look", "release", "wait")
    crew.hear(holder, "ready")
    waiters = [crew.start("acquire", "write", "look", "release") for _ in range(3)]
    primary, replica = cluster.nodes[0], cluster.replicas[0]
    with connected(cluster.url) as redis:
        eventually(lambda: len(Lock(redis, crew.name).inspect().waiting) == 3, "three wait")
    eventually(partial(caught_up, cluster, primary, replica), "the replica has it all")
    primary.stop()
    cluster.run(replica, "CLUSTER", "FAILOVER", "TAKEOVER")
    eventually(lambda: b"role:master" in cluster.run(replica, "INFO", "replication"), "it has succeeded")
    listening = partial(cluster.run, replica, "CLIENT", "LIST")
    eventually(lambda: listening().count(b" name=petiole-grants") == len(waiters), "they listen there")
    eventually(lambda: scripts_of(cluster, replica) >= len(waiters), "they have asked there")
    crew.go(holder)
    for waiter in waiters:
        crew.hear(waiter, "done")
    crew.go(holder)  # who ends at once after a release that Redis did not hear leaves its lease behind
    crew.hear(holder, "done")
    held = proven(crew)
    assert len(held) == 1 + len(waiters)
    assert max(one.began for one in held) - released_at(held) < LONG_TTL_S / 3  # nobody has waited for a lease


def scripts_of(cluster, node):
    """How many scripts it has carried out."""
    told = cluster.run(node, "INFO", "commandstats")
    return sum(int(calls) for calls in re.findall(rb"cmdstat_eval(?:sha)?:calls=(\d+)", told))


def released_at(held):
    """When the first of some holds was released."""
    return min(one.ended for one in held)


def caught_up(cluster, primary, replica):
    """Whether a replica has all that its primary has written."""
    offsets = [
        cluster.run(node, "INFO", "replication").split(b"master_repl_offset:")[1].split()[0]
        for node in (primary, replica)
    ]
    return offsets[0] == offsets[1]


def test_closed_connections_leave_no_thread_behind(server, name):
    """Of one that holds, one that waits, and one that has left. That no connection is left, the fixture sees."""
    before = set(threading.enumerate())
    redis = connected(server.url)
    lock = Lock(redis, name)
    lock.acquire()
    ended = []

    def wait(timeout_s):
        try:
            lock.acquire(timeout_s)
        except (LockTimeout, LockUnavailable, RuntimeError) as error:  # RuntimeError: closed meanwhile
            ended.append(type(error))

    leaves, stays = (threading.Thread(target=wait, args=(timeout_s,)) for timeout_s in (0.05, 40))
    leaves.start()
    leaves.join(20)
    assert ended == [LockTimeout]
    stays.start()
    eventually(lambda: len(lock.inspect().waiting) == 1, "one waits")
    redis.close()
    eventually(lambda: set(threading.enumerate()) <= before, "all threads have ended", within_s=20)
    assert len(ended) == 2


def test_the_proof_has_writes_to_judge(server, crew_of):
    """A history without writes, or without refusals where there must be some, would prove nothing."""
    crew = crew_of(server.url)
    crew.start(holds=5)
    crew.until(lambda: not crew.alive, "it is through")
    assert {one.place for one in writes_of(crew.notes())} == {"table", "store"}
