"""What ``ReadWriteLock`` promises: readers together, a writer alone, nobody starves, a writer may become a reader."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from local_nodes import eventually

from petiole.coordination import Lock, ReadWriteLock
from petiole.coordination.errors import LockError, LockLost, LockReentered

SOON_S = 30
LEASE_S = 120


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def book(redis, name):
    return ReadWriteLock(redis, name, ttl=LEASE_S)


def waiting(book, count=1):
    """Wait until so many wait."""
    eventually(lambda: len(book.inspect().waiting) == count, f"{count} wait")


def is_free(book):
    seen = book.inspect()
    return not seen.held and not seen.waiting


def elsewhere(call, *arguments):
    """Call it in a thread that ends: no other waits for what it took itself."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *arguments).result(SOON_S)


def test_readers_read_together_and_keep_writers_out(book):
    readers = [book.read.try_acquire() for _ in range(5)]
    assert all(readers)
    assert not book.write.try_acquire()
    assert [holder.permits for holder in book.inspect().holders] == [1] * 5
    assert all(reader.release() for reader in readers[:4])
    assert not book.write.try_acquire()
    assert readers[4].release()
    assert book.write.try_acquire().release()


def test_a_writer_is_alone(book):
    with book.write as hold:
        assert hold.held
        assert not book.read.try_acquire()
        assert not book.write.try_acquire()
    with book.read:
        assert book.read.try_acquire().release()
    assert is_free(book)


def test_threads_that_read_and_write_never_see_half_a_change(book, pool):
    pair, torn = [0, 0], []

    def write():
        for _ in range(6):
            with book.write:
                pair[0] += 1
                time.sleep(0)
                pair[1] += 1

    def read():
        for _ in range(12):
            with book.read:
                first = pair[0]
                time.sleep(0)
                torn.append(first != pair[1])

    for future in [pool.submit(work) for work in [write, read] * 4]:
        future.result(60)
    assert pair == [24, 24]
    assert not any(torn)
    assert is_free(book)


def test_a_writer_that_waits_is_not_starved_by_readers_that_keep_coming(book, pool):
    reader = book.read.acquire()
    writer = pool.submit(book.write.acquire, SOON_S)
    waiting(book)
    assert not book.read.try_acquire()  # though a reader reads
    late = [pool.submit(book.read.acquire, SOON_S) for _ in range(3)]
    waiting(book, 4)
    assert reader.release()
    written = writer.result(SOON_S)
    assert not any(future.done() for future in late)
    assert written.release()
    read = [future.result(SOON_S) for future in late]  # all at once: nobody has given anything back
    assert all(hold.fence > written.fence for hold in read)
    assert all(hold.release() for hold in read)


def test_readers_are_not_starved_by_writers_that_keep_coming(book, pool):
    first = book.write.acquire()
    reader = pool.submit(book.read.acquire, SOON_S)
    waiting(book)
    second = pool.submit(book.write.acquire, SOON_S)
    waiting(book, 2)
    assert first.release()
    read = reader.result(SOON_S)
    assert not second.done()
    assert read.release()
    assert second.result(SOON_S).release()


def test_each_reader_has_a_lease_of_its_own(redis, name, pool):
    dead = ReadWriteLock(redis, name, ttl=0.5, renew=False).read.acquire()
    book = ReadWriteLock(redis, name, ttl=LEASE_S)
    alive = book.read.acquire()
    writer = pool.submit(book.write.acquire, SOON_S)
    waiting(book)
    eventually(lambda: dead.lost and len(book.inspect().holders) == 1, "the lease of the dead one runs out")
    assert not writer.done()
    assert alive.release()
    assert writer.result(SOON_S).release()


# From writer to reader


def test_a_writer_becomes_a_reader_and_lets_readers_in_and_no_writer(book, pool):
    hold = book.write.acquire()
    fence = hold.fence
    readers = [pool.submit(book.read.acquire, SOON_S) for _ in range(3)]
    waiting(book, 3)
    writer = pool.submit(book.write.acquire, SOON_S)
    waiting(book, 4)
    book.downgrade(hold)
    read = [future.result(SOON_S) for future in readers]
    assert not writer.done()
    assert hold.held
    assert (hold.fence, hold.units) == (fence, 1)
    assert [holder.permits for holder in book.inspect().holders] == [1] * 4
    book.downgrade(hold)  # may be repeated
    assert hold.release()
    assert not writer.done()
    assert all(reader.release() for reader in read)
    written = writer.result(SOON_S)
    assert written.fence > fence
    assert written.release()
    assert is_free(book)


def test_a_downgraded_hold_is_renewed_and_extended_as_before(redis, name):
    book = ReadWriteLock(redis, name, ttl=1)
    hold = book.write.acquire()
    book.downgrade(hold)
    first = hold.deadline
    eventually(lambda: hold.deadline > first + 1.1 or hold.lost, "it was renewed more than once")
    hold.extend(50)
    assert hold.held
    assert book.inspect().holders[0].permits == 1
    assert hold.release()
    assert is_free(book)


def test_a_writer_that_has_lost_its_hold_does_not_become_a_reader(redis, book):
    hold = book.write.acquire()
    book.force_release()
    with pytest.raises(LockLost):
        hold.extend()
    with pytest.raises(LockLost):
        book.downgrade(hold)
    assert is_free(book)


def test_a_writer_that_does_not_know_of_its_loss_is_told(redis, book):
    hold = book.write.acquire()
    redis.coordination.delete(*redis.scan(f"petiole:*{book.name}*"))
    with pytest.raises(LockLost):
        book.downgrade(hold)
    assert hold.lost
    assert is_free(book)  # and nothing is made anew

    robbed = book.write.acquire()
    book.force_release()
    other = elsewhere(book.write.acquire)
    with pytest.raises(LockLost):
        book.downgrade(robbed)
    assert other.held
    assert [holder.token for holder in book.inspect().holders] == [other.token]
    assert other.release()


def test_what_was_released_does_not_become_a_reader(book):
    hold = book.write.acquire()
    assert hold.release()
    with pytest.raises((ValueError, LockError)):
        book.downgrade(hold)
    assert is_free(book)


def test_the_hold_of_another_lock_does_not_become_a_reader(redis, name, book):
    other = ReadWriteLock(redis, f"{name}:other")
    with Lock(redis, name) as lock_hold, other.write as hold:
        for foreign in (lock_hold, hold):
            with pytest.raises(ValueError, match="no hold of"):
                book.downgrade(foreign)
        assert not other.read.try_acquire()
    assert is_free(book)


# The same thread again


@pytest.mark.parametrize(("first", "second"), [("read", "write"), ("write", "read"), ("write", "write")])
def test_a_thread_that_waits_for_itself_is_told_so(book, first, second):
    with getattr(book, first) as hold:
        with pytest.raises(LockReentered):
            getattr(book, second).acquire(SOON_S)
        assert hold.held
        eventually(lambda: not book.inspect().waiting, "it has left the queue")
    assert is_free(book)


def test_a_reader_reads_again_as_long_as_no_writer_waits(book, pool):
    with book.read:
        with book.read as second:
            assert second.held
        writer = pool.submit(book.write.acquire, SOON_S)
        waiting(book)
        with pytest.raises(LockReentered):
            book.read.acquire(SOON_S)
        waiting(book)
    assert writer.result(SOON_S).release()
    assert is_free(book)


def test_two_locks_of_one_thread_do_not_disturb_each_other(redis, name, book, pool):
    other = ReadWriteLock(redis, f"{name}:other", ttl=LEASE_S)
    held = pool.submit(other.write.acquire).result(SOON_S)
    with book.write:
        future = pool.submit(held.release)
        with other.write as hold:  # waits, though this thread holds another lock
            assert hold.held
        assert future.result(SOON_S)


def test_force_release_takes_from_readers_and_lets_the_writer_in(book, pool):
    readers = [book.read.acquire() for _ in range(3)]
    writer = pool.submit(book.write.acquire, SOON_S)
    waiting(book)
    assert book.force_release() == 3
    hold = writer.result(SOON_S)
    assert [reader.release() for reader in readers] == [False] * 3
    assert hold.fence > max(reader.fence for reader in readers)
    assert hold.release()


def test_it_says_what_is_held(book):
    with book.read as hold:
        assert hold.what == f"read lock {book.name!r}"
    with book.write as hold:
        assert hold.what == f"write lock {book.name!r}"
    assert book.name in repr(book)
    assert book.name in repr(book.read)
    assert book.read.stats()["holds"] == book.write.stats()["holds"] == 1
