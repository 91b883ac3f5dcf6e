"""What ``Semaphore`` promises: never more than its permits, in order, and its number may change while it is used."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from local_nodes import eventually

from petiole.coordination import Busy, Semaphore
from petiole.coordination.errors import LockError, LockLost, LockTimeout, PermitsExceeded

SOON_S = 30
LEASE_S = 120


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def of(redis, name):
    """Makes the same semaphore again, as another process would."""
    return lambda permits, **options: Semaphore(redis, name, permits=permits, **{"ttl": LEASE_S, **options})


def waiting(semaphore, count=1):
    """Wait until so many wait."""
    eventually(lambda: len(semaphore.inspect().waiting) == count, f"{count} wait")


def in_use(semaphore):
    return sum(holder.permits for holder in semaphore.inspect().holders)


def is_free(semaphore):
    seen = semaphore.inspect()
    return not seen.held and not seen.waiting


def test_never_more_than_the_permits_are_held(of, pool):
    semaphore, inside, most, served = of(3), set(), [], []

    def work(number):
        for _ in range(8):
            with semaphore as hold:
                inside.add(hold)
                most.append(len(inside))
                served.append(number)
                inside.remove(hold)

    for future in [pool.submit(work, number) for number in range(9)]:
        future.result(60)
    assert max(most) <= 3
    assert sorted(served) == sorted(list(range(9)) * 8)
    assert is_free(semaphore)


def test_as_many_as_there_are_are_held_and_no_more(of):
    semaphore = of(3)
    holds = [semaphore.try_acquire() for _ in range(4)]
    assert [bool(hold) for hold in holds] == [True, True, True, False]
    assert isinstance(holds[3], Busy)
    assert 0 < holds[3].retry_after <= LEASE_S
    assert len({hold.fence for hold in holds[:3]}) == 3
    assert [hold.units for hold in holds[:3]] == [1, 1, 1]
    assert holds[1].release()
    assert semaphore.try_acquire().release()
    assert holds[0].release()
    assert holds[2].release()
    assert is_free(semaphore)


def test_several_permits_are_taken_all_or_none(of, pool):
    semaphore = of(5)
    three = semaphore.acquire(permits=3)
    assert three.units == 3
    assert not semaphore.try_acquire(permits=3)
    assert in_use(semaphore) == 3
    with pytest.raises(LockTimeout):
        pool.submit(semaphore.acquire, 0.05, permits=3).result(SOON_S)
    assert in_use(semaphore) == 3
    two = semaphore.try_acquire(permits=2)
    assert in_use(semaphore) == 5
    assert three.release()
    assert in_use(semaphore) == 2
    assert two.release()


def test_a_large_request_is_not_overtaken_by_small_ones(of, pool):
    semaphore = of(4)
    first, second = semaphore.acquire(permits=2), semaphore.acquire(permits=1)
    large = pool.submit(of(4).acquire, SOON_S, permits=4)
    waiting(semaphore)
    small = pool.submit(of(4).acquire, SOON_S)  # for which there would be room
    waiting(semaphore, 2)
    busy = semaphore.try_acquire()
    assert not busy
    assert busy.ahead == 2
    assert second.release()
    assert [waiter.permits for waiter in semaphore.inspect().waiting] == [4, 1]
    assert first.release()
    granted = large.result(SOON_S)
    assert granted.units == 4
    assert not small.done()
    assert granted.release()
    assert small.result(SOON_S).release()
    assert is_free(semaphore)


def test_a_release_wakes_all_for_whom_there_is_room_and_no_more(of, pool):
    semaphore = of(4)
    all_of_them = semaphore.acquire(permits=4)
    futures = []
    for number, permits in enumerate([1, 2, 2, 1]):
        futures.append(pool.submit(of(4).acquire, SOON_S, permits=permits))
        waiting(semaphore, number + 1)
    assert all_of_them.release()
    first, second = futures[0].result(SOON_S), futures[1].result(SOON_S)
    assert in_use(semaphore) == 3
    assert len(semaphore.inspect().waiting) == 2
    assert second.release()
    third, fourth = futures[2].result(SOON_S), futures[3].result(SOON_S)
    assert in_use(semaphore) == 4
    fences = [hold.fence for hold in (first, second, third, fourth)]
    assert fences == sorted(set(fences))
    for hold in (first, third, fourth):
        assert hold.release()


def test_a_thread_may_hold_permits_and_wait_for_more(of, pool):
    semaphore = of(2)
    mine, others = semaphore.acquire(), pool.submit(semaphore.acquire).result(SOON_S)
    release = threading.Timer(0.1, others.release)
    release.start()
    more = semaphore.acquire(SOON_S)
    release.join()
    assert mine.held
    assert more.release()
    assert mine.release()


def test_who_waits_is_woken_when_the_lease_of_a_dead_holder_runs_out(of, pool):
    semaphore = of(2)
    dead = of(2, ttl=0.5, renew=False).acquire()
    alive = semaphore.acquire()
    one = pool.submit(semaphore.acquire, SOON_S)
    granted = one.result(SOON_S)
    assert time.monotonic() >= dead.deadline
    assert dead.lost
    assert alive.held
    assert dead.release() is False
    assert in_use(semaphore) == 2
    assert granted.release()
    assert alive.release()


# The number


def test_more_permits_are_granted_at_once_to_those_who_wait(of, pool):
    semaphore = of(1)
    hold = semaphore.acquire()
    futures = [pool.submit(of(1).acquire, SOON_S) for _ in range(4)]
    waiting(semaphore, 4)
    assert semaphore.resize(3) == 3
    eventually(lambda: sum(future.done() for future in futures) == 2, "as many as were added are granted")
    assert semaphore.inspect().permits == 3
    assert len(semaphore.inspect().waiting) == 2
    assert hold.release()
    for future in futures:
        eventually(lambda: any(future.done() for future in futures), "the next is granted")
    done = [future for future in futures if future.done()]
    for future in done:
        assert future.result(0).release()
    for future in [future for future in futures if future not in done]:
        assert future.result(SOON_S).release()
    assert is_free(semaphore)


def test_permits_taken_away_are_missing_when_they_are_given_back(of, pool):
    semaphore = of(3)
    holds = [semaphore.acquire() for _ in range(3)]
    future = pool.submit(of(3).acquire, SOON_S)
    waiting(semaphore)
    assert semaphore.resize(1) == 3  # in use: nothing is taken from who holds it
    assert all(hold.held for hold in holds)
    assert holds[0].release()
    assert holds[1].release()
    assert in_use(semaphore) == 1
    assert not future.done()
    assert not semaphore.try_acquire()
    assert holds[2].release()
    assert future.result(SOON_S).release()
    assert semaphore.try_acquire().release()


def test_a_number_that_was_set_is_the_number_for_all_until_it_is_forgotten(of):
    assert of(1).resize(2) == 0
    holds = [of(5).try_acquire() for _ in range(3)]
    assert [bool(hold) for hold in holds] == [True, True, False]
    assert of(5).inspect().permits == 2
    assert of(5).resize(None) == 2
    assert of(5).inspect().permits is None
    assert not of(2).try_acquire()  # each goes by its own
    assert of(3).try_acquire().release()
    for hold in holds[:2]:
        assert hold.release()
    assert of(1).resize(None) == 0


def test_a_number_that_was_set_is_remembered_while_nobody_holds_anything(redis, of):
    assert of(1).resize(7) == 0
    with of(1):
        pass
    assert of(1).inspect().permits == 7
    (state,) = redis.scan(f"petiole:*:{{semaphore:{of(1).name}}}")
    assert redis.coordination.pttl(state) > 6 * 86_400_000


def test_a_number_is_remembered_that_was_set_while_it_was_in_use(redis, of):
    """And so had a TTL already."""
    with of(1):
        assert of(1).resize(7) == 1
    (state,) = redis.scan(f"petiole:*:{{semaphore:{of(1).name}}}")
    assert redis.coordination.pttl(state) > 6 * 86_400_000
    assert of(1).resize(None) == 0
    assert redis.coordination.pttl(state) < 86_400_000


def test_it_remembers_nothing_of_each_number_that_was_asked_for(of):
    semaphore = of(500)
    for permits in range(1, 200):
        assert semaphore.acquire(permits=permits).release()
    assert len(semaphore._store._takes) < 50


def test_more_than_there_are_is_refused_at_once(of, pool):
    semaphore = of(3)
    for take in (lambda: semaphore.acquire(permits=4), lambda: semaphore.try_acquire(permits=4)):
        with pytest.raises(PermitsExceeded, match="fewer than 4 permits") as raised:
            take()
        assert (raised.value.wanted, raised.value.what) == (4, f"semaphore {semaphore.name!r}")
        assert isinstance(raised.value, ValueError)
        assert isinstance(raised.value, LockError)
    assert is_free(semaphore)
    assert semaphore.acquire(permits=3).release()
    semaphore.resize(2)
    with pytest.raises(PermitsExceeded):
        semaphore.acquire(permits=3)
    semaphore.resize(9)
    assert semaphore.acquire(permits=9).release()


def test_one_that_waits_for_more_than_there_are_by_now_is_told_so(of, pool):
    semaphore = of(3)
    hold = semaphore.acquire(permits=2)
    large = pool.submit(of(3).acquire, SOON_S, permits=3)
    waiting(semaphore)
    small = pool.submit(of(3).acquire, SOON_S)
    waiting(semaphore, 2)
    semaphore.resize(2)
    assert hold.release()
    with pytest.raises(PermitsExceeded):
        large.result(SOON_S)
    granted = small.result(SOON_S)  # who stood behind it goes on
    eventually(lambda: not semaphore.inspect().waiting, "no place is left")
    assert granted.release()
    assert is_free(semaphore)


@pytest.mark.parametrize("wrong", [0, -1, 1_000_001, 1.0, True, "3", None])
def test_what_is_no_number_of_permits_is_refused(of, wrong):
    for call in (of, lambda wrong: of(3).acquire(permits=wrong), lambda wrong: of(3).try_acquire(permits=wrong)):
        with pytest.raises(ValueError, match="permits"):
            call(wrong)
    if wrong is not None:
        with pytest.raises(ValueError, match="permits"):
            of(3).resize(wrong)
    assert is_free(of(3))


# For people


def test_it_tells_who_holds_and_who_waits(of, pool):
    semaphore = of(3, owner="first")
    with semaphore as hold:
        two = of(3, owner="second").acquire(permits=2)
        future = pool.submit(of(3, owner="third").acquire, SOON_S, permits=3)
        waiting(semaphore)
        seen = semaphore.inspect()
        assert [(one.owner, one.permits, one.fence) for one in seen.holders] == [
            ("first", 1, hold.fence),
            ("second", 2, two.fence),
        ]
        assert [(one.owner, one.permits) for one in seen.waiting] == [("third", 3)]
        assert seen.last_fence == two.fence
        assert seen.permits is None
        assert two.release()
    granted = future.result(SOON_S)
    assert semaphore.force_release() == 1
    with pytest.raises(LockLost):
        granted.extend()
    assert "permits=3" in repr(semaphore)
    assert semaphore.stats()["holds"] == 1


def test_force_release_takes_from_all_and_lets_in_those_who_wait(of, pool):
    semaphore = of(2)
    robbed = [semaphore.acquire() for _ in range(2)]
    futures = [pool.submit(of(2).acquire, SOON_S) for _ in range(2)]
    waiting(semaphore, 2)
    assert semaphore.force_release() == 2
    holds = [future.result(SOON_S) for future in futures]
    assert min(hold.fence for hold in holds) > max(hold.fence for hold in robbed)
    assert [hold.release() for hold in robbed] == [False, False]
    assert [hold.release() for hold in holds] == [True, True]
