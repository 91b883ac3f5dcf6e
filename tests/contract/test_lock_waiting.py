"""Waiting for a lock: in order, without asking, and leaving nothing behind however it ends."""

import linecache
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from local_nodes import eventually

import petiole.coordination
from petiole.cachelib import connect
from petiole.coordination import Lock
from petiole.coordination.errors import LockTimeout, LockUnavailable

SOON_S = 30
"""So long a test waits for what comes within milliseconds; shorter than the lease that it would else take."""
LEASE_S = 120
WINDOW = threading.Event()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def own(own_server):
    """A server of this test's own, with nobody else's commands."""
    with connect(own_server().url) as redis:
        redis.coordination.ping()
        yield redis


def waiting(lock, count=1):
    """Wait until so many wait."""
    eventually(lambda: len(lock.inspect().waiting) == count, f"{count} wait")


def elsewhere(call):
    """Call it in a thread that ends: no other waits for what it took itself."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(SOON_S)


def is_free(lock):
    seen = lock.inspect()
    return not seen.held and not seen.waiting


def calls(redis, command):
    return redis.coordination.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0)


# The order, and what it costs


def test_first_come_first_served(redis, name, pool):
    lock, served = Lock(redis, name, ttl=LEASE_S), []

    def work(number):
        with Lock(redis, name, ttl=LEASE_S).acquire(SOON_S) as hold:
            served.append((number, hold.fence))

    with lock:
        futures = []
        for number in range(8):
            futures.append(pool.submit(work, number))
            waiting(lock, number + 1)
    for future in futures:
        future.result(SOON_S)
    assert [number for number, _ in served] == list(range(8))
    assert [fence for _, fence in served] == sorted(fence for _, fence in served)
    assert is_free(lock)


def test_one_that_comes_later_and_tries_does_not_overtake(redis, name, pool):
    lock, first = Lock(redis, name, ttl=LEASE_S), threading.Event()
    hold = lock.acquire()
    following = pool.submit(Lock(redis, name, ttl=LEASE_S).acquire, SOON_S)
    waiting(lock)
    busy = lock.try_acquire()
    assert not busy
    assert busy.ahead == 1
    tried = []

    def try_on_and_on():
        while not first.is_set():
            tried.append(lock.try_acquire())

    trying = pool.submit(try_on_and_on)
    hold.release()
    granted = following.result(SOON_S)
    first.set()
    trying.result(SOON_S)
    assert not any(tried)
    assert granted.release()
    assert lock.try_acquire().release()


def test_who_waits_asks_nothing(own, name, pool):
    lock = Lock(own, name, ttl=LEASE_S)
    with lock:
        futures = [pool.submit(Lock(own, name, ttl=LEASE_S).acquire, SOON_S) for _ in range(5)]
        waiting(lock, 5)
        before = own.coordination.info("stats")["total_reads_processed"]
        WINDOW.wait(0.3)
        assert own.coordination.info("stats")["total_reads_processed"] - before == 1  # the question itself
        listening = [client for client in own.coordination.client_list() if client["name"] == "petiole-grants"]
        assert len(listening) == 1  # however many threads wait
    for count in range(5, 0, -1):
        granted = next_of(futures)
        assert len(futures) == count - 1
        assert granted.release()


def next_of(futures):
    """The hold of the one that was granted; of the others nobody was."""
    eventually(lambda: any(future.done() for future in futures), "one is granted")
    (done,) = [future for future in futures if future.done()]
    futures.remove(done)
    return done.result(0)


def test_exactly_one_is_woken_by_a_release_and_the_hand_off_costs_one_script(own, name, pool):
    lock = Lock(own, name, ttl=LEASE_S)
    hold = lock.acquire()
    futures = [pool.submit(Lock(own, name, ttl=LEASE_S).acquire, SOON_S) for _ in range(6)]
    waiting(lock, 6)
    for left in range(5, -1, -1):
        scripts, messages = calls(own, "evalsha"), calls(own, "publish")
        assert hold.release()
        hold = next_of(futures)
        assert (calls(own, "evalsha") - scripts, calls(own, "publish") - messages) == (1, 1)
        assert len(futures) == left
    assert hold.release()
    assert is_free(lock)


def test_a_waiter_that_has_died_is_passed_over(redis, name, pool):
    lock = Lock(redis, name, ttl=LEASE_S)
    hold = lock.acquire()
    for number in range(3):
        hold.store.take(f"dead{number}", 1, LEASE_S * 1_000, f"{name}:nobody listens", "dead")
    following = pool.submit(lock.acquire, SOON_S)
    waiting(lock, 4)
    assert hold.release()
    granted = following.result(SOON_S)
    assert not lock.inspect().waiting
    assert granted.release()


def test_who_waits_is_woken_when_the_lease_of_a_dead_holder_runs_out(redis, name, pool):
    dead = Lock(redis, name, ttl=0.5, renew=False).acquire()
    futures = [pool.submit(Lock(redis, name, ttl=LEASE_S).acquire, SOON_S) for _ in range(3)]
    hold = next_of(futures)
    assert dead.lost
    assert time.monotonic() >= dead.deadline
    assert hold.release()
    assert next_of(futures).release()
    assert next_of(futures).release()


def test_the_thread_that_reads_for_all_hands_on_when_it_leaves(redis, name, pool):
    lock = Lock(redis, name, ttl=LEASE_S)
    hold = lock.acquire()
    reader = pool.submit(lock.acquire, 0.4)
    waiting(lock)
    others = [pool.submit(lock.acquire, SOON_S) for _ in range(2)]
    with pytest.raises(LockTimeout):
        reader.result(SOON_S)
    waiting(lock, 2)
    assert hold.release()
    assert next_of(others).release()
    assert next_of(others).release()


def test_threads_that_wait_for_different_locks_share_one_connection(own, name, pool):
    holds = [Lock(own, f"{name}:{number}", ttl=LEASE_S).acquire() for number in range(6)]
    futures = [pool.submit(Lock(own, f"{name}:{number}", ttl=LEASE_S).acquire, SOON_S) for number in range(6)]
    for number in range(6):
        waiting(Lock(own, f"{name}:{number}"))
    for hold, future in reversed(list(zip(holds, futures, strict=True))):
        assert not future.done()
        assert hold.release()
        assert future.result(SOON_S).release()
    names = [client["name"] for client in own.coordination.client_list()]
    assert names.count("petiole-grants") == 1


# Giving up


def test_a_timeout_says_what_was_not_free_and_leaves_no_place_in_the_queue(redis, name, pool):
    lock = Lock(redis, name, ttl=LEASE_S)
    hold = lock.acquire()
    with pytest.raises(LockTimeout, match=r"was not free within 0.1 s") as raised:
        pool.submit(lock.acquire, 0.1).result(SOON_S)
    assert isinstance(raised.value, TimeoutError)
    assert (raised.value.what, raised.value.timeout) == (f"lock {name!r}", 0.1)
    assert lock.inspect().waiting == ()
    assert hold.release()
    assert is_free(lock)


def test_who_gives_up_holds_up_nobody_behind(redis, name, pool):
    lock = Lock(redis, name, ttl=LEASE_S)
    hold = lock.acquire()
    impatient = pool.submit(lock.acquire, 0.5)
    waiting(lock)
    patient = pool.submit(lock.acquire, SOON_S)
    with pytest.raises(LockTimeout):
        impatient.result(SOON_S)
    assert hold.release()
    assert patient.result(SOON_S).release()
    assert is_free(lock)


def test_a_grant_that_comes_as_the_time_is_over_is_not_lost(redis, name, pool):
    """Whoever waited and whoever released meet at the same moment, many times: it is held, or it is free."""
    lock = Lock(redis, name, ttl=LEASE_S)
    for number in range(30):
        hold = lock.acquire()
        following = pool.submit(lock.acquire, 0.02)
        WINDOW.wait(0.012 + number * 0.0006)
        assert hold.release()
        with suppress(LockTimeout):
            assert following.result(SOON_S).release()
        eventually(lambda: is_free(lock), "it is free")


def test_a_queue_that_becomes_empty_and_is_used_again_has_a_ttl(redis, name):
    """In one script: who waited is served, and who asks takes a place in a queue that is made anew."""
    lock = Lock(redis, name)
    store, listener = lock._store, redis.coordination.pubsub()
    listener.subscribe(name)
    listener.get_message(timeout=SOON_S)
    try:
        store.take("dead", 1, 200, "", "owner")
        store.take("waits", 1, 60_000, name, "owner")
        eventually(lambda: not lock.inspect().held, "the lease of the dead one is over")
        assert store.take("asks", 1, 60_000, name, "owner").state == 0
        seen = lock.inspect()
        assert ([holder.token for holder in seen.holders], [waiter.token for waiter in seen.waiting]) == (
            ["waits"],
            ["asks"],
        )
        assert redis.coordination.pttl(store._queue) > 3_600_000
    finally:
        listener.close()


# A signal in the middle


class SoftTimeLimitExceeded(Exception):
    """As a worker's time limit raises it."""


@contextmanager
def signal_after(seconds, error):
    """Have a handler raise in this, the main thread."""

    def interrupt(*_):
        raise error

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("error", [SoftTimeLimitExceeded, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("others", [0, 1], ids=["it-reads", "another-reads"])
def test_a_signal_ends_the_wait_and_leaves_no_place_in_the_queue(redis, name, pool, error, others):
    lock = Lock(redis, name, ttl=LEASE_S)
    hold = elsewhere(lock.acquire)
    patient = [pool.submit(lock.acquire, SOON_S) for _ in range(others)]
    waiting(lock, others)
    with signal_after(0.2, error), pytest.raises(error):
        lock.acquire()
    waiting(lock, others)  # so many are left
    assert hold.release()
    for future in patient:
        assert future.result(SOON_S).release()
    assert is_free(lock)


HERE = Path(petiole.coordination.__file__).resolve().parent


class At:
    """Raises where the call enters its ``point``-th function of this package."""

    def __init__(self, point):
        self.point, self.seen = point, 0

    def __call__(self, frame, event, argument):
        if event == "call" and Path(frame.f_code.co_filename).resolve().parent == HERE:
            self.seen += 1
            if self.seen == self.point:
                raise SoftTimeLimitExceeded(f"at point {self.point}, {frame.f_code.co_qualname}")


def traced(call, trace):
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(before)


def use(lock):
    return [lock.acquire()]


def use_as_a_block(lock):
    return [lock.__enter__()]


def try_to_use(lock):
    return [lock.try_acquire()]


@pytest.mark.parametrize(
    ("call", "options"),
    [(use, {}), (try_to_use, {}), (use_as_a_block, {}), (use, {"reentrant": True})],
    ids=["acquire", "try_acquire", "with", "reentrant"],
)
def test_a_signal_at_any_point_of_taking_costs_the_next_one_lease_at_most(redis, name, call, options):
    use(Lock(redis, f"{name}:warm"))[0].release()
    all_points = At(0)
    use_all = traced(lambda: call(Lock(redis, f"{name}:none", **options)), all_points)
    assert [hold.release() for hold in use_all] == [True] * len(use_all)
    assert all_points.seen > 10
    locks = [Lock(redis, f"{name}:{point}", ttl=0.5, **options) for point in range(all_points.seen + 5)]
    for point, lock in enumerate(locks, 1):
        with suppress(SoftTimeLimitExceeded):
            for hold in traced(lambda lock=lock: call(lock), At(point)):
                hold.release()
    for point, lock in enumerate(locks, 1):
        eventually(lambda lock=lock: is_free(lock), f"it is free, and renewed by nobody, after {point}", 20)
        assert elsewhere(lock.try_acquire).release()
    eventually(lambda: "[0 held]" in repr(locks[0]._keeper), "nothing is kept", within_s=20)


def test_a_release_that_a_signal_broke_off_may_be_repeated(redis, name):
    all_points = At(0)
    traced(Lock(redis, f"{name}:none").acquire().release, all_points)
    assert all_points.seen > 3
    for point in range(1, all_points.seen + 1):
        lock = Lock(redis, f"{name}:{point}", ttl=LEASE_S)
        hold = lock.acquire()
        with suppress(SoftTimeLimitExceeded):
            traced(hold.release, At(point))
        hold.release()
        eventually(lambda lock=lock: is_free(lock), f"it is given back, after point {point}", within_s=20)
        assert not hold.held


class AtLine:
    """Raises before the ``point``-th line that the call executes in this package, between the entries of two functions.

    A line that says only ``try:`` executes nothing, so no signal handler runs there.
    """

    def __init__(self, point, first, last):
        self.point, self.first, self.last, self.where = point, first, last, "nowhere"
        self.seen, self.between = 0, False

    def __call__(self, frame, event, argument):
        if Path(frame.f_code.co_filename).parent.name != HERE.name:
            return None
        if event == "call" and frame.f_code.co_qualname in (self.first, self.last):
            self.between = frame.f_code.co_qualname == self.first
        if (
            event == "line"
            and self.between
            and linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() != "try:"
        ):
            self.seen += 1
            if self.seen == self.point:
                self.where = f"at line {frame.f_lineno} of {frame.f_code.co_qualname}"
                raise SoftTimeLimitExceeded(self.where)
        return self


def whole_block(lock):
    with lock:
        pass


def block_of_a_hold(lock):
    with lock.acquire():
        pass


def take_and_give_back(lock):
    lock.acquire().release()


@pytest.mark.parametrize(
    ("call", "between"),
    [
        (whole_block, ("Acquirable.__enter__", "Acquirable.__exit__")),
        (whole_block, ("Entered._newest", None)),
        (block_of_a_hold, ("Hold.__exit__", None)),
        (take_and_give_back, ("Hold.release", None)),
    ],
    ids=["begin", "end", "end-of-a-hold", "release"],
)
def test_a_signal_at_any_line_leaves_nothing_held(redis, name, call, between):
    """Nobody has the hold that could give it back, and it would be renewed for as long as the process lives."""
    call(Lock(redis, f"{name}:warm"))
    all_lines = AtLine(0, *between)
    traced(lambda: call(Lock(redis, f"{name}:none")), all_lines)
    assert all_lines.seen > 10
    locks = [Lock(redis, f"{name}:{point}", ttl="1h") for point in range(1, all_lines.seen + 1)]
    points = [AtLine(point, *between) for point in range(1, all_lines.seen + 1)]
    for lock, point in zip(locks, points, strict=True):
        with suppress(SoftTimeLimitExceeded):
            traced(lambda lock=lock: call(lock), point)
    for lock, point in zip(locks, points, strict=True):
        eventually(lambda lock=lock: is_free(lock), f"it is given back, though raised {point.where}", within_s=20)


def test_a_signal_at_any_point_of_a_wait_leaves_nobody_behind(redis, name, pool):
    warm = Lock(redis, f"{name}:warm", ttl=LEASE_S)
    hold = warm.acquire()
    with pytest.raises(LockTimeout):
        pool.submit(warm.acquire, 0.05).result(SOON_S)
    hold.release()

    def wait(lock, at):
        hold = elsewhere(Lock(redis, lock.name, ttl=LEASE_S).acquire)
        with suppress(LockTimeout, SoftTimeLimitExceeded):
            traced(lambda: lock.acquire(0.03), at)
        return hold

    all_points = At(0)
    wait(Lock(redis, f"{name}:none", ttl=LEASE_S), all_points).release()
    assert all_points.seen > 20
    for point in range(all_points.seen + 1):
        lock = Lock(redis, f"{name}:{point}", ttl=LEASE_S)
        hold = wait(lock, At(point))
        eventually(lambda lock=lock: not lock.inspect().waiting, f"no place is left after point {point}")
        assert hold.release()
        assert is_free(lock), f"after point {point}"


# Redis away


def test_who_waits_goes_on_when_its_connections_are_cut(own, name, pool):
    lock = Lock(own, name, ttl=LEASE_S)
    hold = lock.acquire()
    futures = [pool.submit(Lock(own, name, ttl=LEASE_S).acquire, SOON_S) for _ in range(3)]
    waiting(lock, 3)
    order = [waiter.token for waiter in lock.inspect().waiting]
    own.coordination.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    eventually(lambda: listeners(own) == 1, "it listens again")
    assert [waiter.token for waiter in lock.inspect().waiting] == order  # in their places
    assert hold.release()
    for token in order:
        granted = next_of(futures)
        assert granted.token == token
        assert granted.release()


def listeners(redis):
    return sum(client["name"] == "petiole-grants" for client in redis.coordination.client_list())


def forbid(redis, *what):
    redis.coordination.execute_command("ACL", "SETUSER", "default", *what)


def test_who_waits_goes_on_when_redis_is_back(own, name, pool):
    lock = Lock(own, name, ttl=LEASE_S)
    hold = lock.acquire()
    future = pool.submit(Lock(own, name, ttl=LEASE_S).acquire, SOON_S)
    waiting(lock)
    own.coordination.config_set("maxmemory", 1)  # it refuses what could take memory, and so every script
    own.coordination.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    eventually(lambda: calls_refused(own) > 2, "it has tried again")
    assert not future.done()
    own.coordination.config_set("maxmemory", 0)
    eventually(lambda: listeners(own) == 1, "it listens again")
    assert hold.release()
    assert future.result(SOON_S).release()


def calls_refused(redis):
    return redis.coordination.info("errorstats").get("errorstat_OOM", {"count": 0})["count"]


def test_who_waits_and_is_not_allowed_to_listen_is_told_at_once(own, name, pool):
    lock = Lock(own, name, ttl=LEASE_S)
    hold = elsewhere(lock.acquire)
    forbid(own, "-subscribe")
    with pytest.raises(LockUnavailable, match=r"refused \(NoPermissionError"):
        lock.acquire()
    assert own.coordination.info("errorstats")["errorstat_NOPERM"]["count"] < 5, "to ask again is of no use"
    forbid(own, "+@all")
    eventually(lambda: not lock.inspect().waiting, "no place is left in the queue")
    assert hold.release()


def test_who_waits_takes_a_place_again_in_a_queue_that_was_lost(own, name, pool):
    lock = Lock(own, name, ttl=2)
    hold = lock.acquire()
    future = pool.submit(Lock(own, name, ttl=2).acquire, SOON_S)
    waiting(lock)
    own.coordination.flushall()
    assert future.result(SOON_S).release()  # with the lease that it saw last, if nobody tells it before
    eventually(lambda: hold.lost, "the holder learns of it")


def test_who_waits_for_a_server_that_does_not_come_back_is_told(own, name, pool, monkeypatch):
    monkeypatch.setattr("petiole.coordination.acquiring._PATIENCE_S", 0.3)
    lock = Lock(own, name, ttl=LEASE_S)
    hold = lock.acquire()
    future = pool.submit(Lock(own, name, ttl=LEASE_S).acquire, SOON_S)
    waiting(lock)
    forbid(own, "-subscribe", "-evalsha", "-eval")
    own.coordination.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    with pytest.raises(LockUnavailable):
        future.result(SOON_S)
    forbid(own, "+@all")
    eventually(lambda: not lock.inspect().waiting, "its place is given back")
    assert hold.release()
    eventually(lambda: is_free(lock), "nothing is left")


def test_who_waits_with_a_timeout_is_told_in_time_that_redis_is_away(own, name, pool):
    lock = Lock(own, name, ttl=LEASE_S)
    hold = lock.acquire()
    future = pool.submit(Lock(own, name, ttl=LEASE_S).acquire, 1)
    waiting(lock)
    forbid(own, "-subscribe", "-evalsha", "-eval")
    own.coordination.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    with pytest.raises((LockUnavailable, LockTimeout)):
        future.result(SOON_S)
    forbid(own, "+@all")
    assert hold.release()
    eventually(lambda: is_free(lock), "nothing is left")


def test_to_close_the_connections_ends_the_wait(redis_server, redis, name, pool):
    with Lock(redis, name, ttl=LEASE_S):
        closing = connect(redis_server.url)
        futures = [pool.submit(Lock(closing, name, ttl=LEASE_S).acquire) for _ in range(3)]
        waiting(Lock(redis, name), 3)
        closing.close()
        for future in futures:
            with pytest.raises(LockUnavailable):
                future.result(SOON_S)
    eventually(lambda: is_free(Lock(redis, name)), "nobody that has gone is granted it")
