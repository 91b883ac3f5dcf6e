"""What a holder learns when it holds no more, and what the one thread that renews does for it."""

import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from local_nodes import eventually

from petiole.cachelib import connect
from petiole.cachelib.connections import Profile
from petiole.coordination import Busy, Lock, keeper
from petiole.coordination.errors import LockError, LockLost, LockUnavailable

SOON_S = 30
KEEPER = "petiole-keeper"
NEVER = threading.Event()


@pytest.fixture
def own(own_server):
    """A server of this test's own, that it may stop and tell what to refuse."""
    with connect(own_server().url) as redis:
        redis.coordination.ping()
        yield redis


@contextmanager
def standing_still(redis):
    """The server's process is stopped: connections stay, no answer comes."""
    pid = redis.coordination.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def refusing(redis):
    """The server answers, and carries no script out."""
    redis.coordination.execute_command("ACL", "SETUSER", "default", "-eval", "-evalsha")
    try:
        yield
    finally:
        redis.coordination.execute_command("ACL", "SETUSER", "default", "+@all")


def scripts_refused(redis):
    return redis.coordination.info("errorstats").get("errorstat_NOPERM", {"count": 0})["count"]


def lose(hold):
    """Have it lost now, as if it had been taken away."""
    hold.store.clear()
    with pytest.raises(LockLost):
        hold.extend()


def keepers():
    return {thread for thread in threading.enumerate() if thread.name == KEEPER}


def scripts_run(redis):
    return redis.coordination.info("commandstats")["cmdstat_evalsha"]["calls"]


def is_free(lock):
    return not lock.inspect().held


# How it is lost


def test_keys_that_vanish_are_a_loss_and_are_not_made_anew(redis, name):
    lock, told = Lock(redis, name, ttl=0.6), []
    hold = lock.acquire()
    hold.on_lost(told.append)
    keys = list(redis.scan(f"petiole:*{name}*"))
    assert redis.coordination.delete(*keys) == len(keys) > 0
    eventually(lambda: told, "the holder is told")
    assert told == [hold]
    assert hold.lost
    assert not hold.held
    assert hold.remaining == 0
    assert "lost" in repr(hold)
    eventually(lambda: not lock._keeper._orphans, "it was given back")
    assert lock.inspect().holders == ()
    with Lock(redis, name) as following:
        assert following.fence > hold.fence
        assert hold.release() is False
        assert following.held


def test_an_extension_does_not_make_anew_what_has_vanished(redis, name):
    lock = Lock(redis, name)
    hold = lock.acquire()
    redis.coordination.delete(*redis.scan(f"petiole:*{name}*"))
    with pytest.raises(LockLost):
        hold.extend()
    assert hold.lost
    assert is_free(lock)


def test_the_holder_learns_of_a_loss_by_its_own_clock_while_the_server_stands_still(own, name, monkeypatch):
    lock, told = Lock(own, name, ttl=0.8), threading.Event()
    hold = lock.acquire()
    hold.on_lost(lambda _: told.set())
    with standing_still(own):
        assert not hold.lost or time.monotonic() >= hold.deadline
        assert told.wait(SOON_S)
        assert time.monotonic() >= hold.deadline
        assert hold.lost
        with pytest.raises(LockLost, match="no renewal was confirmed in time"):
            hold.raise_if_lost()
        with pytest.raises(LockError):
            hold.extend()
        assert hold.release() is False
    eventually(lambda: is_free(lock), "the server is asked to give it back, or it runs out")


def test_what_was_lost_once_stays_lost(own, name):
    """Also though the server would say that it is held: somebody else may have held it meanwhile."""
    hold = Lock(own, name, ttl=30).acquire()
    hold._deadline = time.monotonic()  # as if this process had been stopped for a lease
    assert hold.lost
    with pytest.raises(LockLost):
        hold.extend()
    assert hold.lost
    eventually(lambda: is_free(Lock(own, name)), "nobody holds it then, so it is given back")


def test_renewals_that_fail_for_a_moment_lose_nothing(own, name, caplog):
    lock = Lock(own, name, ttl=3)
    with lock as hold:
        with refusing(own):
            eventually(lambda: "not renewed" in caplog.text, "a renewal fails")
            deadline = hold.deadline
        eventually(lambda: hold.deadline > deadline or hold.lost, "the next one does not")
        assert hold.held


# Who is told, and how


def test_each_callback_is_called_once_in_a_thread_of_its_own(redis, name):
    hold, calls, main = Lock(redis, name).acquire(), [], threading.current_thread()
    for number in range(3):
        hold.on_lost(lambda lost, number=number: calls.append((number, lost, threading.current_thread())))
    lose(hold)
    eventually(lambda: len(calls) == 3, "all are called")
    assert hold.lost
    assert hold.release() is False
    hold.lose("again")
    assert sorted(number for number, _, _ in calls) == [0, 1, 2]
    assert {lost for _, lost, _ in calls} == {hold}
    assert all(thread not in (main, *keepers()) for _, _, thread in calls)


def test_who_asks_late_is_told_at_once(redis, name):
    hold, called = Lock(redis, name).acquire(), threading.Event()
    lose(hold)
    hold.on_lost(lambda _: called.set())
    assert called.wait(SOON_S)


def test_nobody_is_told_of_what_was_released(redis, name):
    lock, called = Lock(redis, name, ttl=0.1), []
    for _ in range(3):
        hold = lock.acquire()
        hold.on_lost(called.append)
        hold.release()
        eventually(lambda hold=hold: time.monotonic() > hold.deadline, "its lease would be over")
        assert not hold.lost
        hold.raise_if_lost()
    assert not called
    assert lock.stats()["losses"] == 0


def test_what_a_callback_raises_is_logged_and_the_others_are_called(redis, name, caplog):
    hold, called = Lock(redis, name).acquire(), threading.Event()

    def fail(_):
        raise RuntimeError("no such luck")

    hold.on_lost(fail)
    hold.on_lost(lambda _: called.set())
    lose(hold)
    assert called.wait(SOON_S)
    eventually(lambda: "no such luck" in caplog.text, "it is logged")


def test_all_are_told_when_many_are_lost_at_once(redis, name):
    told, go_on = [], threading.Event()

    def tell(lost):
        go_on.wait(SOON_S)
        told.append(lost.token)

    holds = [Lock(redis, f"{name}:{number}", ttl=0.3, renew=False).acquire() for number in range(60)]
    for hold in holds:
        hold.on_lost(tell)
    eventually(lambda: all(hold.lost for hold in holds), "all are lost")
    go_on.set()
    eventually(lambda: len(told) == 60, "all are told, though no more than a few at once")
    assert set(told) == {hold.token for hold in holds}


def test_a_callback_that_hangs_holds_up_no_renewal(redis, name):
    hang, called = threading.Event(), threading.Event()
    lost, kept = Lock(redis, f"{name}:a").acquire(), Lock(redis, f"{name}:b", ttl=1).acquire()

    def block(_):
        called.set()
        hang.wait(SOON_S)

    lost.on_lost(block)
    lose(lost)
    assert called.wait(SOON_S)
    first = kept.deadline
    eventually(lambda: kept.deadline > first + 0.5 or kept.lost, "it is renewed")
    hang.set()
    assert kept.release()


def test_a_loss_is_logged_with_its_reason_and_without_the_token(redis, name, caplog):
    hold = Lock(redis, name).acquire()
    with caplog.at_level(logging.DEBUG):
        lose(hold)
    assert f"lock {name!r} (fence {hold.fence}) was lost" in caplog.text
    assert hold.token not in caplog.text


# The end of a block


def test_a_block_that_lost_its_lock_raises_at_its_end(redis, name):
    done = []
    with pytest.raises(LockLost) as raised, Lock(redis, name) as hold:
        done.append(lose(hold))
    assert done == [None]
    assert (raised.value.what, raised.value.fence) == (f"lock {name!r}", hold.fence)
    hold = Lock(redis, name).acquire()
    with pytest.raises(LockLost), hold:
        lose(hold)


def test_a_block_whose_lock_the_server_has_given_away_raises_at_its_end(redis, name):
    """No renewal came in between that could have told."""
    lock, told = Lock(redis, name, ttl="1h"), threading.Event()

    def work():
        with lock as hold:
            hold.on_lost(lambda _: told.set())
            lock.force_release()
            assert Lock(redis, name).try_acquire().release()
            assert hold.held  # as far as it knows

    with pytest.raises(LockLost, match="the server says"):
        work()
    assert told.wait(SOON_S)
    assert lock.stats()["losses"] == 1
    hold = lock.acquire()
    lock.force_release()
    assert hold.release() is False
    assert hold.lost


def test_a_loss_is_told_by_the_clock_while_another_thread_is_about_to_tell(redis, name):
    """The one that finds out first takes it from those that are kept, and may be a while before it says so."""
    hold = Lock(redis, name, ttl=0.2, renew=False).acquire()
    assert hold._keeper.let_go(hold)  # as that thread does
    eventually(lambda: time.monotonic() > hold.deadline, "its lease is over")
    assert hold.lost
    assert not hold.held
    with pytest.raises(LockLost):
        hold.raise_if_lost()
    assert hold.release() is False


def test_a_callback_that_exits_costs_the_others_nothing(redis, name, caplog):
    count, told, exits = 20, [], sys.exit
    holds = [Lock(redis, f"{name}:{number}", ttl="1h").acquire() for number in range(count)]
    for hold in holds:
        hold.on_lost(lambda hold: (told.append(hold), exits(1)))
        lose(hold)
    eventually(lambda: len(told) == count, "all are told", within_s=20)
    eventually(lambda: caplog.text.count("SystemExit: 1") >= count, "each exit is logged", within_s=20)


def test_a_loss_hides_nothing_that_the_block_raises(redis, name):
    def lose_and_fail(hold):
        lose(hold)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Lock(redis, name) as hold:
        lose_and_fail(hold)
    hold = Lock(redis, name).acquire()
    with pytest.raises(ZeroDivisionError), hold:
        lose_and_fail(hold)


# Without Redis


def test_without_redis_nothing_is_taken(own, name):
    lock = Lock(own, name)
    with refusing(own):
        for take in (lock.acquire, lock.try_acquire, lambda: lock.acquire(SOON_S), lock.__enter__):
            with pytest.raises(LockUnavailable, match=r"was not taken.*refused .*see what it says") as raised:
                take()
            assert raised.value.__cause__ is not None
    assert is_free(lock)
    assert lock.try_acquire().release()


def test_a_server_that_is_gone_is_an_error_and_not_a_wait(own_server, name):
    server = own_server()
    with connect(server.url) as redis:
        lock = Lock(redis, name)
        hold = lock.acquire()
        server.stop()
        with pytest.raises(LockUnavailable):
            Lock(redis, name).acquire()
        with pytest.raises(LockUnavailable):
            hold.extend()
        assert hold.release() in (True, False)
        assert hold.release() is False


def test_what_cannot_be_given_back_now_is_given_back_later(own, name):
    lock = Lock(own, name, ttl="1h")
    hold = lock.acquire()
    with refusing(own):
        assert hold.release() is True  # it was held until now
        assert hold.release() is False
        assert not hold.held
        assert not hold.lost
        assert lock.inspect
    eventually(lambda: is_free(lock), "it is given back as soon as the server answers")


def test_a_block_ends_as_ever_though_its_server_is_away(own, name):
    lock = Lock(own, name, ttl="1h")
    lock.__enter__()
    with refusing(own):
        lock.__exit__(None, None, None)
    eventually(lambda: is_free(lock), "it is given back as soon as the server answers")


def test_a_take_whose_answer_never_came_is_given_back(own, name, monkeypatch):
    """The server carries it out when it goes on, for somebody who has given up."""
    monkeypatch.setattr("petiole.cachelib.connections.COORDINATION", Profile("coordination", 0.3, 0.3))
    with connect(own.url) as redis:
        lock = Lock(redis, name, ttl="1h")
        with lock:
            pass
        before = lock.inspect().last_fence
        with standing_still(own), pytest.raises(LockUnavailable):
            lock.acquire()
        eventually(lambda: lock.inspect().last_fence > before, "the server has taken it for nobody")
        eventually(lambda: is_free(lock), "it is given back", within_s=20)


def test_holds_of_closed_connections_are_lost_and_hide_nothing(own_server, name):
    redis = connect(own_server().url)
    hold = Lock(redis, name, ttl=5).acquire()

    def close_and_fail():
        redis.close()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), hold:
        close_and_fail()
    assert hold.release() is False
    assert not hold.held


def test_holds_of_closed_connections_are_told_so(own_server, name):
    redis, told = connect(own_server().url), threading.Event()
    hold = Lock(redis, name, ttl=1).acquire()
    hold.on_lost(lambda _: told.set())
    redis.close()
    assert told.wait(SOON_S)
    with pytest.raises(LockLost):
        hold.raise_if_lost()


def test_what_cannot_be_given_back_now_is_given_back_later_though_its_lease_was_extended(own, name):
    """It is remembered for as long as the server may think that it is held, and not for the lease it began with."""
    lock = Lock(own, name, ttl=0.3, renew=False)
    hold = lock.acquire()
    hold.extend("1h")
    with refusing(own):
        assert hold.release() is True
        refused = scripts_refused(own)
        NEVER.wait(0.8)  # longer than the lease it began with
        assert scripts_refused(own) > refused, "it was tried again"
    eventually(lambda: is_free(lock), "it is given back as soon as the server answers", within_s=20)


def test_what_closed_connections_held_is_free_at_once(own_server, name):
    server, told = own_server(), []
    redis = connect(server.url)
    holds = [Lock(redis, f"{name}:{number}", ttl="1h").acquire() for number in range(3)]
    for hold in holds:
        hold.on_lost(told.append)
    redis.close()
    assert not any(hold.held for hold in holds)
    eventually(lambda: len(told) == 3, "they are told", within_s=20)
    with connect(server.url) as other:
        for number in range(3):
            assert Lock(other, f"{name}:{number}").try_acquire().release()


def test_what_could_not_be_given_back_is_tried_once_more_when_the_connections_close(own, name):
    with connect(own.url) as redis:
        hold = Lock(redis, name, ttl="1h").acquire()
        with refusing(own):
            assert hold.release()
    assert Lock(own, name).try_acquire().release()


def test_with_closed_connections_nothing_is_taken(own_server, name):
    redis = connect(own_server().url)
    lock, used = Lock(redis, name), Lock(redis, f"{name}:used")
    with used:
        pass
    redis.close()
    for call in (lock.acquire, lock.try_acquire, used.acquire, used.try_acquire):
        with pytest.raises(LockUnavailable):
            call()


def test_a_server_that_refuses_is_told_from_one_that_does_not_answer(own, name):
    lock = Lock(own, name)
    for call in (lock.acquire, lock.try_acquire):
        with refusing(own), pytest.raises(LockUnavailable, match=r"refused \(NoPermissionError"):
            call()
    with standing_still(own), pytest.raises(LockUnavailable, match="did not answer"):
        lock.try_acquire()
    eventually(lambda: is_free(lock), "what it did when it went on is undone", within_s=20)


# The thread that renews


def test_an_extension_and_a_renewal_follow_one_another(redis, name, monkeypatch):
    """If they crossed, the hold could believe in the one that was carried out first."""
    lock = Lock(redis, name, ttl=10)
    hold, renewed = lock.acquire(), threading.Event()
    renew = keeper.renew

    def slowly(redis, holds):
        replies = renew(redis, holds)
        if holds[0][2] == 60_000:  # its answer is read after a renewal, if one can be made now
            hold.renewal_due = 0.0
            hold._keeper.keep(hold)
            renewed.wait(0.5)
        else:
            renewed.set()
        return replies

    monkeypatch.setattr(keeper, "renew", slowly)
    hold.extend(60)

    def believes_what_the_server_says():
        believed_s = hold.remaining
        return believed_s <= lock.inspect().holders[0].lease_left

    eventually(believes_what_the_server_says, "it believes in no more than there is", within_s=5)
    assert hold.release()


def test_a_shorter_lease_counts_from_the_moment_it_is_asked_for(redis, name, monkeypatch):
    """The answer may be lost; the server has shortened it all the same, and another may hold it."""
    hold = Lock(redis, name, ttl=60, renew=False).acquire()
    renew = keeper.renew

    def without_an_answer(redis, holds):
        renew(redis, holds)
        raise TimeoutError("no answer")

    monkeypatch.setattr(keeper, "renew", without_an_answer)
    with pytest.raises(LockUnavailable):
        hold.extend(0.3)
    other, taken = Lock(redis, name), []
    eventually(lambda: taken.append(other.try_acquire()) or taken[-1], "it is free", within_s=20)
    assert hold.lost
    assert taken[-1].release()


def test_renewals_do_not_shorten_what_was_extended(redis, name):
    lock, other = Lock(redis, name, ttl=1), Lock(redis, f"{name}:other", ttl=1).acquire()
    hold, first = lock.acquire(), other.deadline
    hold.extend(60)
    hold.renewal_due = 0.0  # as if it had been in a batch already
    hold._keeper.keep(hold)
    eventually(lambda: hold.renewal_due, "it was renewed")
    eventually(lambda: other.deadline > first + 0.5, "another was renewed again and again")
    assert hold.remaining > 30
    assert lock.inspect().holders[0].lease_left > 30
    assert hold.release()
    assert other.release()


def test_a_hold_that_was_found_late_is_renewed_at_once(redis, name):
    """Somebody was told late that it was granted, so most of its lease is over."""
    lock = Lock(redis, name, ttl=600)
    taken = lock._store.take("token", 1, 600_000, "", "somebody")
    late = time.monotonic() + 60
    hold = lock._held("token", 1, taken.fence, late)
    eventually(lambda: hold.deadline > late, "it is renewed, before a third of a lease from now", within_s=30)
    assert hold.release()


@contextmanager
def hanging(cluster, node):
    pid = int(cluster.run(node, "INFO", "server").split(b"process_id:")[1].split()[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_node_that_hangs_costs_nothing_that_is_held_on_the_others(own_cluster, name):
    cluster = own_cluster(3)
    for node in cluster.nodes:  # the others go on without it, and nobody takes over
        cluster.run(node, "CONFIG", "SET", "cluster-require-full-coverage", "no")
        cluster.run(node, "CONFIG", "SET", "cluster-node-timeout", "60000")
    with connect(cluster.url) as redis:
        holds = [Lock(redis, f"{name}:{number}", ttl=3).acquire() for number in range(30)]
        sick = cluster.nodes[1]
        there = [hold for hold in holds if cluster.owner(hold.store.slot) is sick]
        others = [hold for hold in holds if hold not in there]
        assert len(there) > 2
        with hanging(cluster, sick):
            until = time.monotonic() + 5.5
            eventually(lambda: all(hold.lost for hold in there), "those are lost", within_s=20)
            eventually(lambda: all(hold.deadline > until or hold.lost for hold in others), "renewed", within_s=20)
            assert [hold.what for hold in others if hold.lost] == []
        assert all(hold.release() for hold in others)


def test_one_thread_renews_all_of_a_process_in_few_commands(own, name):
    before, count = keepers(), 150
    holds = [Lock(own, f"{name}:{number}", ttl=4).acquire() for number in range(count)]
    deadlines, scripts = [hold.deadline for hold in holds], scripts_run(own)
    assert len(keepers() - before) == 1
    eventually(lambda: all(hold.deadline > first for hold, first in zip(holds, deadlines, strict=True)), "all renewed")
    assert scripts_run(own) - scripts < count / 4
    assert len(keepers() - before) == 1
    assert all(hold.release() for hold in holds)


def test_the_thread_that_renews_ends_when_nothing_is_held_and_begins_again(redis, name):
    before, lock = keepers(), Lock(redis, name, ttl=1)
    for _ in range(2):
        with lock as hold:
            assert len(keepers() - before) == 1
            first = hold.deadline
            eventually(lambda hold=hold, first=first: hold.deadline > first, "it is renewed")
        eventually(lambda: keepers() <= before, "the thread ends")


def test_the_thread_that_renews_ends_with_its_connections(own_server, name):
    before, server = keepers(), own_server()
    with connect(server.url) as redis:
        hold = Lock(redis, name, ttl=1).acquire()
        assert len(keepers() - before) == 1
    eventually(lambda: keepers() <= before, "the thread ends")
    assert not hold.held


def test_without_a_thread_a_hold_ends_with_its_lease(redis, name, caplog, monkeypatch):
    lock = Lock(redis, name, ttl=0.3)

    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        hold = lock.acquire()
    assert "no thread to renew leases with" in caplog.text
    eventually(lambda: hold.lost, "it is lost")
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(lock.acquire, SOON_S).result(SOON_S)
    assert not isinstance(following, Busy)
    assert following.release()
