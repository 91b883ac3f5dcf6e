"""What ``Lock`` promises to whoever takes it: one holder, one round trip, nothing left behind. In one process."""

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from local_nodes import eventually

from petiole.cachelib import EmbeddedServer, Settings, connect
from petiole.coordination import Busy, Hold, Lock, MultiLock, ReadWriteLock, Semaphore, acquiring
from petiole.coordination.errors import (
    LockError,
    LockLost,
    LockReentered,
    LockTimeout,
    NotReplicated,
    PermitsExceeded,
)
from petiole.coordination.fencing import FencedStore
from petiole.coordination.inspecting import names_held
from tests.contract.test_cache_fork import in_child, succeeded

SOON_S = 30
"""So long a test waits for what comes within milliseconds."""


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def waiting(lock, count=1):
    """Wait until so many wait."""
    eventually(lambda: len(lock.inspect().waiting) == count, f"{count} wait")


def is_free(lock):
    seen = lock.inspect()
    return not seen.held and not seen.waiting


# Take and give back


def test_one_holds_it_and_then_the_next(redis, name):
    with Lock(redis, name) as hold:
        assert isinstance(hold, Hold)
        assert hold
        assert hold.held
        assert not hold.lost
        busy = Lock(redis, name).try_acquire()
        assert isinstance(busy, Busy)
        assert not busy
        assert 0 < busy.retry_after <= 30
        assert busy.ahead == 0
    assert not hold.held
    assert not hold.lost
    match Lock(redis, name).try_acquire():
        case Busy():
            pytest.fail("it was given back")
        case again:
            assert again.fence > hold.fence
            assert again.token != hold.token
            assert again.release()


@pytest.mark.parametrize(
    "of",
    [
        Lock,
        lambda redis, name: Semaphore(redis, name, permits=1),
        lambda redis, name: MultiLock(redis, [name, f"{name}b"]),
        lambda redis, name: ReadWriteLock(redis, name).write,
    ],
    ids=["lock", "semaphore", "multi", "write"],
)
def test_the_block_of_what_is_busy_is_not_entered(redis, name, of):
    with of(redis, name).try_acquire() as hold:
        assert hold.held
        with pytest.raises(LockTimeout, match=rf"{name}.* was not free within 0 s"), of(redis, name).try_acquire():
            pytest.fail("it is held")
        assert hold.held
    assert not hold.held
    with of(redis, name).try_acquire() as again:
        assert again.held


def test_different_names_do_not_meet(redis, name):
    names = [name, f"{name}:a", f"{name}%3Aa", f"{name}:A", f"{name} "]
    holds = [Lock(redis, each).try_acquire() for each in names]
    assert all(holds)
    assert all(hold.release() for hold in holds)


def test_kinds_of_one_name_do_not_meet(redis, name):
    with Lock(redis, name), Semaphore(redis, name, permits=1), ReadWriteLock(redis, name).write:
        assert not Lock(redis, name).try_acquire()


def test_the_deadline_is_within_the_lease_and_never_after_it(redis, name):
    before = time.monotonic()
    hold = Lock(redis, name, ttl=20).acquire()
    # One hundredth less than the lease, from the moment before the request was sent.
    assert before + 20 * 0.99 <= hold.deadline <= time.monotonic() + 20 * 0.99
    assert 0 < hold.remaining <= 20 * 0.99
    hold.release()
    assert hold.remaining == 0


def test_to_release_twice_gives_back_once(redis, name):
    lock = Lock(redis, name)
    hold = lock.acquire()
    assert hold.release() is True
    assert hold.release() is False
    with lock as next_hold:
        assert hold.release() is False
        assert next_hold.held
        assert lock.inspect().holders[0].token == next_hold.token


def test_a_stranger_releases_nothing(redis, name):
    lock = Lock(redis, name)
    with lock as hold:
        assert hold.store.give("a stranger's token") is False
        assert hold.store.give("") is False
        assert [holder.token for holder in lock.inspect().holders] == [hold.token]


def test_a_release_that_comes_late_frees_nothing_of_the_next_holder(redis, name, pool):
    lock = Lock(redis, name, ttl=0.1, renew=False)
    late = lock.acquire()
    following = pool.submit(Lock(redis, name).acquire, SOON_S).result(SOON_S)
    assert late.lost
    assert late.release() is False
    assert late.store.give(late.token) is False
    assert [holder.token for holder in lock.inspect().holders] == [following.token]
    assert following.held
    assert following.release() is True


def test_fences_rise_and_are_the_time_at_least_even_when_all_was_lost(redis, name):
    seconds, microseconds = redis.coordination.time()
    fences = []
    for _ in range(20):
        with Lock(redis, name) as hold:
            fences.append(hold.fence)
    redis.coordination.delete(hold.store.name)
    with Lock(redis, name) as hold:
        fences.append(hold.fence)
    assert fences == sorted(set(fences))
    assert fences[0] >= seconds * 1_000_000 + microseconds


def test_fences_rise_also_when_the_clock_is_behind_the_last_fence(redis, name):
    with Lock(redis, name) as hold:
        pass
    ahead = hold.fence + 60_000_000
    redis.coordination.hset(hold.store.name, "fence", ahead)
    with Lock(redis, name) as first:
        pass
    with Lock(redis, name) as second:
        pass
    assert (first.fence, second.fence) == (ahead + 1, ahead + 2)


def test_threads_that_share_a_lock_never_run_side_by_side(redis, name, pool):
    lock, inside, most, entered = Lock(redis, name), [], [], []

    def work():
        for _ in range(12):
            with lock as hold:
                inside.append(hold)
                most.append(len(inside))
                entered.append(hold.fence)
                inside.remove(hold)

    for future in [pool.submit(work) for _ in range(8)]:
        future.result(60)
    assert set(most) == {1}
    assert len(entered) == 96
    assert entered == sorted(set(entered))
    assert is_free(lock)


def test_a_hold_may_be_released_by_another_thread(redis, name, pool):
    lock = Lock(redis, name)
    hold = lock.acquire()
    assert pool.submit(hold.release).result(SOON_S) is True
    assert is_free(lock)
    assert lock.try_acquire().release()


@pytest.mark.parametrize("kind", ["lock", "semaphore", "multi"])
def test_a_block_may_end_in_another_thread_than_it_began_in(redis, name, pool, kind):
    """As the dependencies of a web framework do, that are generators and run in threads of a pool."""
    lock = {
        "lock": lambda: Lock(redis, name),
        "semaphore": lambda: Semaphore(redis, name, permits=1),
        "multi": lambda: MultiLock(redis, [name, f"{name}:2"]),
    }[kind]()
    with ThreadPoolExecutor(1) as other:
        hold = other.submit(lock.__enter__).result(SOON_S)
        assert hold.held
        lock.__exit__(None, None, None)
    assert not hold.held
    again = lock.try_acquire()
    assert again, "it was given back"
    assert again.release()


def test_blocks_of_several_threads_end_with_the_holds_of_their_own(redis, name):
    """Though all of them are of one object, and the first that began ends first."""
    semaphore = Semaphore(redis, name, permits=2)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        first, second = (thread.submit(semaphore.__enter__).result(SOON_S) for thread in (one, two))
        one.submit(semaphore.__exit__, None, None, None).result(SOON_S)
        assert (first.held, second.held) == (False, True)
        two.submit(semaphore.__exit__, None, None, None).result(SOON_S)
        assert not second.held


def test_what_the_body_raises_comes_out_and_the_lock_is_given_back(redis, name):
    lock = Lock(redis, name)
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    assert is_free(lock)


def test_reprs_tell_what_is_held_and_keep_the_token_to_themselves(redis, name):
    lock = Lock(redis, name, ttl=5)
    hold = lock.acquire()
    assert name in repr(lock)
    assert "ttl=5s" in repr(lock)
    assert name in repr(hold)
    assert str(hold.fence) in repr(hold)
    hold.release()
    assert "released" in repr(hold)
    assert hold.token not in repr(hold)
    assert hold.what == f"lock {name!r}"


# What it costs


@pytest.fixture(scope="module")
def quiet_server():
    """A server that nobody else talks to."""
    server = EmbeddedServer.start()
    yield server
    server.stop()


@contextmanager
def counting(redis):
    """How often the server reads from a connection. The question itself is one."""
    client, counted = redis.coordination, []
    before = client.info("stats")["total_reads_processed"]
    yield counted
    counted.append(client.info("stats")["total_reads_processed"] - before - 1)


def test_to_take_and_to_give_back_are_one_round_trip_each(quiet_server, name):
    with connect(quiet_server.url) as redis:
        lock, other = Lock(redis, name), Lock(redis, name)
        warm = lock.acquire()
        other.try_acquire()
        other.inspect()
        other.force_release()
        warm.release()
        with counting(redis) as reads:
            hold = lock.acquire()
        assert reads == [1]
        with counting(redis) as reads:
            assert not other.try_acquire()
        assert reads == [1]
        with counting(redis) as reads:
            assert not hold.lost
            hold.raise_if_lost()
            assert hold.remaining > 0
        assert reads == [0]
        with counting(redis) as reads:
            lock.inspect()
        assert reads == [1]
        with counting(redis) as reads:
            hold.release()
        assert reads == [1]
        with counting(redis) as reads:
            hold.release()
        assert reads == [0]
        with counting(redis) as reads:
            lock.force_release()
        assert reads == [1]


def test_scripts_that_the_server_forgot_are_sent_again(redis, name):
    lock = Lock(redis, name)
    redis.coordination.script_flush()
    hold = lock.acquire()
    redis.coordination.script_flush()
    hold.extend()
    redis.coordination.script_flush()
    assert hold.release()


# The same thread again


def test_a_thread_that_waits_for_itself_is_told_so(redis, name, pool):
    lock = Lock(redis, name)
    with lock as hold:
        for same in (lock, Lock(redis, name)):
            with pytest.raises(LockReentered, match="reentrant"):
                same.acquire()
        assert hold.held
        assert not lock.try_acquire()  # does not wait, so there is nothing to be told
        with pytest.raises(LockTimeout):  # another thread waits
            pool.submit(lock.acquire, 0.05).result(SOON_S)
        with pytest.raises(LockReentered):  # also now that waiting is fast
            lock.acquire(SOON_S)
        eventually(lambda: not lock.inspect().waiting, "it has left the queue")
        assert hold.held
    assert is_free(lock)


def test_who_waits_for_itself_through_several_functions_is_told_so(redis, name):
    lock = Lock(redis, name)

    def inner(levels=5):
        if levels:
            return inner(levels - 1)
        return Lock(redis, name).acquire(SOON_S)

    def by_block():
        with lock:
            inner()

    def by_hold():
        hold = lock.acquire()
        with hold:
            inner()

    for outer in (by_block, by_hold):
        with pytest.raises(LockReentered):
            outer()
        assert is_free(lock)


def test_a_thread_of_a_pool_may_wait_for_what_it_has_acquired_for_somebody_else(redis, name):
    lock = Lock(redis, name)
    with ThreadPoolExecutor(1) as one:
        hold = one.submit(lock.acquire).result(SOON_S)
        following = one.submit(lock.acquire, SOON_S)
        waiting(lock)
        assert hold.release()
        assert following.result(SOON_S).release()


def test_what_is_handed_on_to_be_released_may_be_waited_for(redis, name, pool):
    lock, go_on = Lock(redis, name), threading.Event()

    def job(hold):
        assert go_on.wait(SOON_S)
        return hold.release()

    jobs = [pool.submit(job, lock.acquire())]
    pool.submit(lambda: (waiting(lock), go_on.set()))
    jobs.append(pool.submit(job, lock.acquire(SOON_S)))
    assert [job.result(SOON_S) for job in jobs] == [True, True]


def test_tasks_that_share_a_thread_of_a_pool_may_wait_for_each_other(redis, name):
    """Also when their contexts are copies of one in which the lock was used before."""
    lock = Lock(redis, name)
    with lock:
        pass

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        hold = await asyncio.create_task(asyncio.to_thread(lock.acquire))
        following = asyncio.create_task(asyncio.to_thread(lock.acquire, SOON_S))
        while not lock.inspect().waiting and not following.done():
            await asyncio.sleep(0.01)
        assert hold.release()
        assert (await following).release()

    asyncio.run(main())
    assert is_free(lock)


def test_generators_that_are_suspended_do_not_wait_for_themselves(redis, name, pool):
    lock = Lock(redis, name)

    def dependency():
        with lock.acquire(SOON_S) as hold:
            yield hold

    with ThreadPoolExecutor(1) as one:
        first, second = dependency(), dependency()
        assert one.submit(next, first).result(SOON_S).held
        following = one.submit(next, second)
        waiting(lock)
        pool.submit(first.close).result(SOON_S)
        assert following.result(SOON_S).held
        pool.submit(second.close).result(SOON_S)
    assert is_free(lock)


@pytest.mark.parametrize("reason", ["permits", "reentered", "replicas", "interrupt"])
def test_no_error_is_its_own_cause(redis, name, monkeypatch, reason):
    """Whoever walks along the causes would never come to the end."""

    def interrupt(*_):
        raise KeyboardInterrupt

    def too_many():
        Semaphore(redis, name, permits=1).acquire(permits=2)

    def again():
        with Lock(redis, name):
            Lock(redis, name).acquire(SOON_S)

    def replicated():
        Lock(redis, name, replicas=1).acquire()

    def interrupted():
        lock = Lock(redis, name)
        monkeypatch.setattr(lock._store, "take", interrupt)
        lock.acquire()

    call, kind = {
        "permits": (too_many, PermitsExceeded),
        "reentered": (again, LockReentered),
        "replicas": (replicated, NotReplicated),
        "interrupt": (interrupted, KeyboardInterrupt),
    }[reason]
    with pytest.raises(kind) as raised:
        call()
    error, seen = raised.value, []
    while error is not None:
        assert error not in seen
        seen.append(error)
        error = error.__cause__ or error.__context__


def test_a_reentrant_lock_is_free_after_as_many_releases(redis, name, pool):
    lock = Lock(redis, name, reentrant=True)
    with lock as outer:
        with lock as inner:
            assert inner is outer
            assert lock.try_acquire() is outer
            assert outer.release() is True
            assert not pool.submit(lock.try_acquire).result(SOON_S)  # another thread is another
            assert not Lock(redis, name, reentrant=True).try_acquire()  # another object is another
        assert outer.held
        assert not Lock(redis, name).try_acquire()
    assert not outer.held
    assert outer.release() is False
    assert is_free(lock)
    with lock as again:
        assert again.fence > outer.fence


def test_a_reentrant_lock_that_was_lost_is_acquired_anew(redis, name):
    lock = Lock(redis, name, reentrant=True)
    lost = lock.acquire()
    lock.force_release()
    with pytest.raises(LockLost):
        lost.extend()
    with lock as hold:
        assert hold is not lost
        assert hold.fence > lost.fence
        assert lost.release() is False
        assert hold.held
    assert is_free(lock)


# Renewal and its ends


def test_a_lease_is_renewed_for_as_long_as_it_is_held(redis, name):
    lock = Lock(redis, name, ttl=1)
    with lock as hold:
        first = hold.deadline
        eventually(lambda: hold.deadline > first + 1.1, "it was renewed more than once")
        assert hold.held
        assert not Lock(redis, name).try_acquire()
        assert lock.inspect().holders[0].fence == hold.fence
    assert lock.stats()["losses"] == 0


def test_without_renewal_a_hold_ends_with_its_lease(redis, name, pool):
    lock = Lock(redis, name, ttl=0.2, renew=False)
    hold = lock.acquire()
    deadline = hold.deadline
    with pool.submit(Lock(redis, name).acquire, SOON_S).result(SOON_S):
        assert hold.lost
        assert hold.deadline == deadline <= time.monotonic()


def test_max_hold_ends_what_hangs(redis, name, pool):
    lock = Lock(redis, name, ttl=0.5, max_hold=1.2)
    hold, lost = lock.acquire(), threading.Event()
    first = hold.deadline
    hold.on_lost(lambda _: lost.set())
    with pool.submit(Lock(redis, name).acquire, SOON_S).result(SOON_S):
        assert hold.lost
        assert hold.deadline > first, "it was renewed until then"
        assert hold.deadline <= hold.began + 1.2
        assert lost.wait(SOON_S)
        with pytest.raises(LockLost, match="max_hold"):
            hold.raise_if_lost()


def test_a_hold_is_extended_from_now(redis, name):
    lock = Lock(redis, name, ttl=10, renew=False)
    hold = lock.acquire()
    hold.extend(60)
    assert 30 < hold.remaining <= 60
    assert 30 < lock.inspect().holders[0].lease_left <= 60
    hold.extend()
    assert 0 < hold.remaining <= 10
    assert 0 < lock.inspect().holders[0].lease_left <= 10
    hold.extend("2m")
    assert 60 < hold.remaining <= 120
    assert hold.release()


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), True, "soon", "3h"])
def test_a_hold_is_not_extended_for_what_is_no_lease(redis, name, ttl):
    with Lock(redis, name) as hold:
        before = hold.deadline
        with pytest.raises((ValueError, TypeError), match="ttl"):
            hold.extend(ttl)
        assert hold.deadline == before
        assert hold.held


def test_what_was_released_is_not_extended(redis, name):
    hold = Lock(redis, name).acquire()
    hold.release()
    with pytest.raises((LockError, ValueError)):
        hold.extend()
    assert is_free(Lock(redis, name))


def test_a_renewed_hold_that_is_shortened_is_still_renewed(redis, name):
    with Lock(redis, name, ttl=30) as hold:
        hold.extend(1)
        short = hold.deadline
        eventually(lambda: hold.deadline > short or hold.lost, "it is renewed, or lost")
        assert hold.held


# Taken away


def test_force_release_bumps_the_fence_and_lets_the_next_one_in(redis, name, pool):
    lock = Lock(redis, name)
    robbed = lock.acquire()
    following = pool.submit(Lock(redis, name).acquire, SOON_S)
    waiting(lock)
    assert lock.force_release() == 1
    hold = following.result(SOON_S)
    assert hold.fence > robbed.fence + 1
    with pytest.raises(LockLost):
        robbed.extend()
    assert robbed.lost
    assert robbed.release() is False
    assert hold.held
    assert hold.release()


def test_force_release_of_what_is_free_raises_the_fence_all_the_same(redis, name):
    lock = Lock(redis, name)
    with lock as hold:
        pass
    assert lock.force_release() == 0
    assert lock.inspect().last_fence > hold.fence


def test_others_wait_for_the_shortened_lease_of_one_that_died(redis, name):
    hold = Lock(redis, name, ttl="1h", renew=False).acquire()
    hold.extend(1)
    other = Lock(redis, name)
    assert other.try_acquire().retry_after <= 1
    eventually(lambda: hold.lost, "its lease is over")
    taken = []
    eventually(lambda: taken.append(other.try_acquire()) or taken[-1], "it is free then", within_s=30)
    assert taken[-1].release()


def test_nothing_is_extended_beyond_max_hold(redis, name):
    lock = Lock(redis, name, ttl=10, max_hold=20)
    hold = lock.acquire()
    hold.extend("1h")
    assert hold.deadline <= hold.began + 20
    assert 10 < lock.inspect().holders[0].lease_left <= 20
    assert hold.release()


# Replicas


def test_without_a_replica_what_wants_one_is_given_back(redis, name):
    lock = Lock(redis, name, replicas=1)
    for take in (lock.acquire, lock.try_acquire):
        with pytest.raises(NotReplicated, match="0 of 1") as raised:
            take()
        assert (raised.value.wanted, raised.value.confirmed) == (1, 0)
        assert is_free(lock)


def test_with_a_replica_the_hold_is_there_when_it_is_returned(own_server, name, monkeypatch):
    primary = own_server("--repl-diskless-sync-delay", "0")
    replica = own_server("--replicaof", f"127.0.0.1 {primary.port}")
    with connect(primary.url) as redis, connect(replica.url) as copy, ThreadPoolExecutor(1) as pool:
        eventually(lambda: redis.coordination.execute_command("WAIT", 1, 100) == 1, "the replica follows")
        lock = Lock(redis, name, replicas=1)
        monkeypatch.setattr(acquiring, "_REPLICATION_MS", 30_000)  # as long as a busy machine needs
        with lock as hold:
            assert copy.coordination.hexists(hold.store.name, f"h{hold.token}")
            following = pool.submit(lock.acquire, SOON_S)
            waiting(lock)
        granted = following.result(SOON_S)  # by the release of another: also that is confirmed
        assert copy.coordination.hexists(hold.store.name, f"h{granted.token}")
        assert granted.release()
        monkeypatch.undo()
        with pytest.raises(NotReplicated, match="1 of 2"):
            Lock(redis, name, replicas=2).acquire()
        assert is_free(lock)


def test_a_hold_that_was_waited_for_is_confirmed_by_replicas_too(own_server, name, pool):
    primary = own_server("--repl-diskless-sync-delay", "0")
    replica = own_server("--replicaof", f"127.0.0.1 {primary.port}")
    with connect(primary.url) as redis, connect(replica.url) as copy:
        process = copy.coordination.info("server")["process_id"]
        eventually(lambda: redis.coordination.execute_command("WAIT", 1, 100) == 1, "the replica follows")
        lock = Lock(redis, name, ttl="1h")
        with lock:
            following = pool.submit(Lock(redis, name, ttl="1h", replicas=1).acquire, SOON_S)
            waiting(lock)
            eventually(lambda: redis.coordination.execute_command("WAIT", 1, 100) == 1, "the queue is replicated")
            os.kill(process, signal.SIGSTOP)
        try:
            with pytest.raises(NotReplicated):
                following.result(SOON_S)
        finally:
            os.kill(process, signal.SIGCONT)
        assert is_free(lock)


def test_what_was_taken_away_while_it_was_confirmed_is_not_held(redis, name, pool, monkeypatch):
    """It would be taken anew, and the fence of the hold would be below that of a holder in between."""
    lock = Lock(redis, name, replicas=1)
    take, looks = lock._store.take, []

    def taken_away(token, units, lease_ms, channel, *rest):
        if looks and not channel:
            lock.force_release()
            assert Lock(redis, name).try_acquire().release()
        looks.append(channel)
        return take(token, units, lease_ms, channel, *rest)

    monkeypatch.setattr(lock._store, "take", taken_away)
    monkeypatch.setattr(lock._store, "confirm", lambda replicas, timeout_ms: replicas)
    with Lock(redis, name):
        following = pool.submit(lock.acquire, SOON_S)
        waiting(lock)
    with pytest.raises(NotReplicated):
        following.result(SOON_S)
    assert [bool(channel) for channel in looks] == [False, True, False]
    eventually(lambda: is_free(lock), "it is given back", within_s=20)


# Names, labels, arguments


@pytest.mark.parametrize(
    "ending",
    ["{a}", "}", "{", "a{b}c{", "\n", "\r\n\0", "a b", "ü🔒", "%7D", "%", ":", "*?[a]", ":leases", "}:queue"],
)
def test_any_text_is_a_name(redis, name, ending):
    lock = Lock(redis, name + ending)
    with lock:
        assert not Lock(redis, name + ending).try_acquire()
        assert lock.inspect().held
        assert name + ending in set(names_held(redis))
        assert Lock(redis, name).try_acquire().release()
    assert is_free(lock)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [("", ValueError), ("x" * 1025, ValueError), ("\ud800", ValueError), (7, TypeError), (None, TypeError)],
    ids=["empty", "long", "surrogate", "number", "none"],
)
def test_what_is_no_name_is_refused(redis, wrong, error):
    for make in (Lock, ReadWriteLock, lambda *both: Semaphore(*both, permits=1)):
        with pytest.raises(error, match="name"):
            make(redis, wrong)


@pytest.mark.parametrize(
    ("owner", "shown"),
    [
        ("worker 7", "worker 7"),
        ("ü🔒 100% {sure}", "ü🔒 100% {sure}"),
        ("two\nlines\0", "two?lines?"),
        ("x" * 200, "x" * 200),
        (" ", " "),
    ],
)
def test_the_owner_is_shown_to_those_who_look(redis, name, owner, shown, pool):
    lock = Lock(redis, name, owner=owner)
    with lock:
        following = pool.submit(lock.acquire, SOON_S)
        waiting(lock)
        assert [holder.owner for holder in lock.inspect().holders] == [shown]
        assert [waiter.owner for waiter in lock.inspect().waiting] == [shown]
    assert following.result(SOON_S).release()


def test_without_a_name_the_owner_is_host_and_process(redis, name):
    with Lock(redis, name):
        assert Lock(redis, name).inspect().holders[0].owner.endswith(f":{os.getpid()}")


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        *[("ttl", wrong) for wrong in (0, -1, NAN, INFINITY, -INFINITY, 0.099, 3600.001, "1d", "", "10", True, None)],
        *[("max_hold", wrong) for wrong in (0, -1, NAN, INFINITY, 29, True, "x")],
        *[("replicas", wrong) for wrong in (-1, 1.0, True, "1", None)],
        *[("owner", wrong) for wrong in ("", "x" * 201, "ü" * 101, 7, b"x")],
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(redis, name, argument, wrong):
    for make in (Lock, ReadWriteLock, lambda *both, **rest: Semaphore(*both, permits=1, **rest)):
        with pytest.raises((ValueError, TypeError), match=argument):
            make(redis, name, **{argument: wrong})


def test_max_hold_without_renewal_makes_no_sense(redis, name):
    with pytest.raises(ValueError, match="max_hold"):
        Lock(redis, name, max_hold=60, renew=False)


@pytest.mark.parametrize("ttl", [0.1, "100ms", 3600, "1h"])
def test_the_shortest_and_the_longest_lease_are_leases(redis, name, ttl):
    began = time.monotonic()
    with Lock(redis, name, ttl=ttl) as hold:
        assert hold.deadline > began


@pytest.mark.parametrize("timeout", [0, -1, NAN, INFINITY, True, "soon"])
def test_a_timeout_that_makes_no_sense_is_refused(redis, name, timeout):
    lock = Lock(redis, name)
    with pytest.raises((ValueError, TypeError), match="timeout"):
        lock.acquire(timeout)
    assert is_free(lock)


# Counts


def test_the_counts_tell_what_has_happened(redis, name, pool):
    lock, other = Lock(redis, name), Lock(redis, name)
    zero = dict.fromkeys(("holds", "waits", "wait_s", "hold_s", "timeouts", "losses", "overages"), 0)
    assert lock.stats() == zero
    with lock:
        with pytest.raises(LockTimeout):
            pool.submit(other.acquire, 0.05).result(SOON_S)
        assert not other.try_acquire()
        following = pool.submit(other.acquire, SOON_S)
        waiting(lock)
    hold = following.result(SOON_S)
    counts = lock.stats()
    assert (counts["holds"], counts["waits"], counts["timeouts"]) == (1, 0, 0)
    assert counts["hold_s"] >= 0.05
    assert counts["wait_s"] == 0
    counts = other.stats()
    assert (counts["holds"], counts["waits"], counts["timeouts"]) == (1, 2, 1)
    assert 0.02 < counts["wait_s"] < lock.stats()["hold_s"]
    other.force_release()
    with pytest.raises(LockLost):
        hold.extend()
    assert hold.release() is False
    counts = other.stats()
    assert (counts["losses"], counts["overages"]) == (1, 1)


# A forked child


def test_a_forked_child_holds_nothing_of_its_parent(redis, name):
    lock, called = Lock(redis, name, reentrant=True), []
    hold = lock.acquire()
    hold.on_lost(called.append)

    def child():
        with pytest.raises(LockLost, match="forked"):
            hold.raise_if_lost()
        return (
            hold.lost
            and not hold.held
            and hold.release() is False
            and not lock.try_acquire()
            and not called
            and lock.inspect().holders[0].token == hold.token
        )

    assert succeeded(in_child(child))
    assert hold.held
    assert not Lock(redis, name).try_acquire()
    assert hold.release() is True
    assert called == []


def test_a_forked_child_takes_waits_and_is_granted_as_itself(redis, name):
    lock = Lock(redis, name, ttl=5)
    hold = lock.acquire()

    def child():
        with lock.acquire(SOON_S) as mine:  # by the release of the parent
            return mine.held and lock.inspect().holders[0].owner.endswith(f":{os.getpid()}")

    pid = in_child(child)
    waiting(lock)
    assert hold.release()
    assert succeeded(pid)
    assert is_free(lock)


# Other servers


def use_everything(redis, name):
    """Every script once, and what was left."""
    lock, semaphore, book = Lock(redis, name), Semaphore(redis, name, permits=1), ReadWriteLock(redis, name)
    store = FencedStore(redis, name, ttl=60)
    with ThreadPoolExecutor(4) as pool:
        hold = lock.acquire()
        following = pool.submit(lock.acquire, SOON_S)
        waiting(lock)
        assert lock.inspect().holders[0].token == hold.token
        hold.extend()
        store.set("k", "value", hold)
        assert store.get("k") == b"value"
        others = [Lock(redis, f"{name}:{number}").acquire() for number in range(5)]
        for other in others:
            other.extend()
        assert hold.release()
        granted = following.result(SOON_S)
        assert {name, f"{name}:3"} <= set(names_held(redis, pattern=f"{name}*"))
        assert lock.force_release() == 1
        with pytest.raises(LockLost):
            granted.extend()
        for other in others:
            assert other.release()

        first = semaphore.acquire()
        more = pool.submit(semaphore.acquire, SOON_S)
        waiting(semaphore)
        assert semaphore.resize(2) == 2
        assert more.result(SOON_S).release()
        assert first.release()

        writer = book.write.acquire()
        reader = pool.submit(book.read.acquire, SOON_S)
        waiting(book)
        book.downgrade(writer)
        assert reader.result(SOON_S).release()
        assert writer.release()


def test_all_of_it_works_with_the_older_protocol(redis_server, name):
    with connect(settings=Settings(url=f"{redis_server.url}?protocol=2", cache_timeout=2)) as redis:
        use_everything(redis, name)


def test_all_of_it_works_with_the_newer_protocol(redis_server, name):
    with connect(settings=Settings(url=f"{redis_server.url}?protocol=3", cache_timeout=2)) as redis:
        use_everything(redis, name)


def test_all_of_it_works_on_a_cluster(clustered, name):
    use_everything(clustered, name)


def test_holds_in_all_slots_of_a_cluster_are_renewed(clustered, name):
    holds = [Lock(clustered, f"{name}:{number}", ttl=2).acquire() for number in range(30)]
    deadlines = [hold.deadline for hold in holds]
    eventually(lambda: all(hold.deadline > first for hold, first in zip(holds, deadlines, strict=True)), "all renewed")
    assert all(hold.release() for hold in holds)


def test_every_key_has_a_ttl_while_it_is_held_and_waited_for(redis, name, pool):
    lock, semaphore, book = Lock(redis, name), Semaphore(redis, name, permits=3), ReadWriteLock(redis, name)
    holds = [lock.acquire(), semaphore.acquire(permits=2), book.read.acquire()]
    futures = [
        pool.submit(lock.acquire, SOON_S),
        pool.submit(semaphore.acquire, SOON_S, permits=2),
        pool.submit(book.write.acquire, SOON_S),
    ]
    for each in (lock, semaphore, book):
        waiting(each)
    keys = list(redis.scan(f"petiole:*{name}*"))
    assert len(keys) >= 6  # of each the state and the queue
    assert all(redis.coordination.pttl(key) > 3_600_000 for key in keys)
    for hold, future in zip(holds, futures, strict=True):
        assert hold.release()
        assert future.result(SOON_S).release()
