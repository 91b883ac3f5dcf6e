"""What people see of locks and semaphores: holders, waiters, ages; one moment, one round trip, nothing changed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from local_nodes import eventually

from petiole.coordination import Lock, ReadWriteLock, Semaphore
from petiole.coordination.inspecting import Inspected, inspected, names_held
from petiole.coordination.turn_store import Snapshot

SOON_S = 30
LEASE_S = 120


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_what_nobody_ever_held_is_free(redis, name):
    assert Lock(redis, name).inspect() == Inspected((), (), 0, None)
    assert not Lock(redis, name).inspect().held
    assert not list(redis.scan(f"petiole:*{name}*")), "a look leaves nothing"


def test_the_holder_is_told_with_its_age_and_what_is_left(redis, name):
    lock = Lock(redis, name, ttl=LEASE_S, owner="me")
    with lock as hold:
        (first,) = lock.inspect().holders
        assert (first.owner, first.token, first.fence, first.permits) == ("me", hold.token, hold.fence, 1)
        assert 0 <= first.held_for < SOON_S
        assert LEASE_S - SOON_S < first.lease_left <= LEASE_S
        eventually(lambda: lock.inspect().holders[0].held_for > first.held_for, "it grows")
        assert lock.inspect().holders[0].lease_left < first.lease_left
        assert lock.inspect().held
        hold.extend(LEASE_S * 2)
        assert lock.inspect().holders[0].lease_left > LEASE_S
        assert lock.inspect().holders[0].held_for > first.held_for  # since it was granted
    seen = lock.inspect()
    assert (seen.holders, seen.held, seen.last_fence) == ((), False, hold.fence)


def test_those_who_wait_are_told_in_the_order_in_which_they_are_served(redis, name, pool):
    lock = Lock(redis, name, ttl=LEASE_S)
    hold = lock.acquire()
    futures = []
    for number in range(4):
        futures.append(pool.submit(Lock(redis, name, ttl=LEASE_S, owner=f"w{number}").acquire, SOON_S))
        eventually(lambda number=number: len(lock.inspect().waiting) == number + 1, "it waits")
    seen = lock.inspect().waiting
    assert [waiter.owner for waiter in seen] == ["w0", "w1", "w2", "w3"]
    ages = [waiter.waiting_for for waiter in seen]
    assert ages == sorted(ages, reverse=True)
    assert all(0 <= age < SOON_S for age in ages)
    tokens = [waiter.token for waiter in seen]
    assert hold.release()
    for token, future in zip(tokens, futures, strict=True):
        granted = future.result(SOON_S)
        assert granted.token == token
        assert lock.inspect().holders[0].owner == f"w{tokens.index(token)}"
        assert granted.release()


def test_a_lease_that_has_run_out_holds_nothing(redis, name):
    hold = Lock(redis, name, ttl=0.1, renew=False).acquire()
    eventually(lambda: not Lock(redis, name).inspect().held, "it runs out")
    assert Lock(redis, name).inspect().last_fence == hold.fence


def test_a_look_changes_nothing(redis, name, pool):
    lock = Lock(redis, name, ttl=LEASE_S)
    hold = lock.acquire()
    future = pool.submit(lock.acquire, SOON_S)
    eventually(lambda: lock.inspect().waiting, "it waits")
    keys = sorted(redis.scan(f"petiole:*{name}*"))
    before = [redis.coordination.dump(key) for key in keys]
    for _ in range(3):
        lock.inspect()
        list(names_held(redis))
    assert [redis.coordination.dump(key) for key in keys] == before
    assert hold.release()
    assert future.result(SOON_S).release()


def test_a_thousand_are_shown_and_no_more(redis, name):
    semaphore = Semaphore(redis, name, permits=2_000, ttl=LEASE_S)
    store = semaphore._store
    for number in range(1_100):
        assert store.take(f"h{number:04}", 1, LEASE_S * 1_000, "", "label").state == 1
    assert 1_000 <= len(semaphore.inspect().holders) <= 1_100
    assert semaphore.force_release() == 1_100
    assert not semaphore.inspect().held


def test_names_are_found_by_kind_and_pattern(redis, name):
    names = {f"{name}:a", f"{name}:b{{x}}", f"{name}:b\n"}
    for each in names:
        with Lock(redis, each):
            pass
    with Semaphore(redis, f"{name}:s", permits=1), ReadWriteLock(redis, f"{name}:r").read:
        assert set(names_held(redis, pattern=f"{name}*")) == names
        assert names <= set(names_held(redis))
        assert sorted(names_held(redis, pattern=f"{name}:a")) == [f"{name}:a"]
        assert sorted(names_held(redis, pattern=f"{name}:b*")) == sorted(names - {f"{name}:a"})
        assert list(names_held(redis, "semaphore", f"{name}*")) == [f"{name}:s"]
        assert list(names_held(redis, kind="readwrite", pattern=f"{name}*")) == [f"{name}:r"]


def test_names_are_found_on_all_nodes_of_a_cluster(clustered, name):
    names = {f"{name}:{number}" for number in range(20)}
    for each in names:
        with Lock(clustered, each):
            pass
    assert set(names_held(clustered, pattern=f"{name}*")) == names


def test_a_clock_that_was_set_back_makes_no_negative_ages(redis, name):
    """The fence may be ahead of the server's clock: it never goes back."""
    with Lock(redis, name) as hold:
        pass
    redis.coordination.hset(hold.store.name, "fence", hold.fence + 3_600_000_000)
    with Lock(redis, name):
        (holder,) = Lock(redis, name).inspect().holders
        assert holder.held_for == 0


def test_what_somebody_else_wrote_is_passed_over():
    """A state that no script of ours wrote shows nothing, and breaks nothing."""
    seen = inspected(Snapshot(1_000, {"fence": "7", "hx": "nonsense", "wy": "", "z": "?"}, ["y", "n"]))
    assert seen == Inspected((), (), 7, None)
