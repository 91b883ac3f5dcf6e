"""What a fence refuses where it is checked: in a transaction, in a column, in a key of Redis."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from local_nodes import eventually
from sqlalchemy.orm import Session

from petiole.coordination import Lock
from petiole.coordination.errors import LockError, StaleFence
from petiole.coordination.fencing import FencedStore, create_fences, fenced, guard

SOON_S = 30

metadata = sa.MetaData()
invoices = sa.Table(
    "invoices",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("paid_by", sa.String(20)),
    sa.Column("fence", sa.BigInteger),
)


@pytest.fixture
def database(engine):
    """With the table of fences, and one invoice."""
    create_fences(engine)
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(invoices).values(id=7, paid_by="nobody"))
    return engine


def hold(fence):
    return SimpleNamespace(fence=fence)


def paid_by(engine):
    with engine.connect() as connection:
        return connection.scalar(sa.select(invoices.c.paid_by))


def pay(connection, who):
    connection.execute(sa.update(invoices).values(paid_by=who))


# Transactions


def test_an_earlier_hold_commits_nothing_after_a_later_one(redis, name, database):
    lock = Lock(redis, name)
    earlier = lock.acquire()
    lock.force_release()  # as if it had slept through its lease
    later = Lock(redis, name).try_acquire()
    with database.begin() as connection:
        later.guard(connection)
        pay(connection, "later")
    with pytest.raises(StaleFence, match="out of date") as raised, database.begin() as connection:
        earlier.guard(connection)
    assert raised.value.fence == earlier.fence
    assert isinstance(raised.value, LockError)
    assert paid_by(database) == "later"
    with database.begin() as connection:  # the same hold, as often as it likes
        later.guard(connection)
        pay(connection, "later again")
    assert paid_by(database) == "later again"
    assert later.release()


def test_what_is_refused_has_written_nothing(database):
    with database.begin() as connection:
        guard(connection, "l", 2)

    def pay_and_guard():
        with database.begin() as connection:
            pay(connection, "who is refused")
            guard(connection, "l", 1)

    with pytest.raises(StaleFence):
        pay_and_guard()
    assert paid_by(database) == "nobody"
    with database.begin() as connection:
        guard(connection, "l", 3)


def test_locks_guard_each_for_itself(database):
    names = ["l", "L", "l ", "x" * 2_000, "ü🔒"]
    for number, name in enumerate(names, 1):
        with database.begin() as connection:
            guard(connection, name, 10 * number)
    for number, name in enumerate(names, 1):
        with pytest.raises(StaleFence), database.begin() as connection:
            guard(connection, name, 10 * number - 1)
        with database.begin() as connection:
            guard(connection, name, 10 * number)


def test_a_guard_that_is_rolled_back_has_raised_nothing(database):
    with database.connect() as connection:
        guard(connection, "l", 5)
        connection.rollback()
    with database.begin() as connection:
        guard(connection, "l", 4)


def test_a_session_is_guarded_as_a_connection_is(database):
    with Session(database) as session, session.begin():
        guard(session, "l", 2)
        session.execute(sa.update(invoices).values(paid_by="a session"))
    assert paid_by(database) == "a session"
    with Session(database) as session, pytest.raises(StaleFence):
        guard(session, "l", 1)
    with Session(database) as session, session.begin():
        guard(session, "l", 3)


def test_fences_are_as_large_as_the_time_in_microseconds(database):
    with database.begin() as connection:
        guard(connection, "l", 4_000_000_000_000_000)
    with pytest.raises(StaleFence), database.begin() as connection:
        guard(connection, "l", 3_999_999_999_999_999)


def in_transaction(engine, fence, guarded=None, commit=None):
    """Guard, say so, wait for leave to commit, commit."""
    with engine.begin() as connection:
        guard(connection, "l", fence)
        if guarded:
            guarded.set()
        pay(connection, str(fence))
        if commit:
            assert commit.wait(SOON_S)


@pytest.mark.parametrize("first", [True, False], ids=["nobody-was-here", "somebody-was-here"])
@pytest.mark.parametrize(("running", "coming"), [(5, 4), (4, 5)], ids=["the-later-runs", "the-earlier-runs"])
def test_of_two_transactions_at_once_the_second_waits_for_the_first(database, first, running, coming):
    if not first:
        in_transaction(database, 1)
    guarded, commit = threading.Event(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(in_transaction, database, running, guarded, commit)
        assert guarded.wait(SOON_S)
        other = pool.submit(in_transaction, database, coming)
        with pytest.raises(TimeoutError):
            other.result(0.2)  # it waits
        commit.set()
        one.result(SOON_S)
        if coming < running:
            with pytest.raises(StaleFence):
                other.result(SOON_S)
        else:
            other.result(SOON_S)
    assert paid_by(database) == "5"


def test_the_first_use_by_many_at_once_leaves_the_highest(database):
    start = threading.Barrier(4)

    def work(fence):
        start.wait(SOON_S)
        try:
            in_transaction(database, fence)
        except StaleFence:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(work, [1, 2, 3, 4]))
    assert done[3]
    assert paid_by(database) == "4"
    with pytest.raises(StaleFence):
        in_transaction(database, 3)


def test_the_table_may_be_made_by_several_at_once_and_again(engine):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: create_fences(engine), range(4)))
    create_fences(engine)
    with engine.begin() as connection:
        guard(connection, "l", 1)


# Columns


def test_a_row_is_changed_by_no_earlier_hold_than_the_last(database):
    def pay_fenced(fence):
        statement = sa.update(invoices).where(invoices.c.id == 7).values(paid_by=str(fence))
        with database.begin() as connection:
            return connection.execute(fenced(statement, invoices.c.fence, hold(fence))).rowcount

    assert pay_fenced(5) == 1  # from no fence at all
    assert pay_fenced(4) == 0
    assert paid_by(database) == "5"
    assert pay_fenced(5) == 1
    assert pay_fenced(6) == 1
    assert paid_by(database) == "6"
    with database.connect() as connection:
        assert connection.scalar(sa.select(invoices.c.fence)) == 6


# Redis


@pytest.fixture
def store(redis, name):
    return FencedStore(redis, name, ttl=600)


def test_a_value_is_changed_by_no_earlier_hold_than_the_last(store):
    assert store.get("k") is None
    store.set("k", b"five", hold(5))
    with pytest.raises(StaleFence, match="nothing was written") as raised:
        store.set("k", b"four", hold(4))
    assert raised.value.fence == 4
    assert store.get("k") == b"five"
    store.set("k", b"five again", hold(5))
    store.set("k", b"six", hold(6))
    assert store.get("k") == b"six"
    store.set("other", b"one", hold(1))
    assert store.get("other") == b"one"


def test_fences_one_apart_are_told_apart_whatever_their_size(store):
    large = 4_000_000_000_000_000
    store.set("k", "later", hold(large + 1))
    with pytest.raises(StaleFence):
        store.set("k", "earlier", hold(large))
    assert store.get("k") == b"later"


def test_holds_of_a_lock_are_checked_by_the_store(redis, name, store):
    with Lock(redis, name) as earlier:
        store.set("k", "earlier", earlier)
    with Lock(redis, name) as later:
        store.set("k", "later", later)
        with pytest.raises(StaleFence):
            store.set("k", "too late", earlier)
    assert store.get("k") == b"later"


def test_text_is_kept_as_its_bytes(store):
    store.set("k", "ü🔒\0", hold(1))
    assert store.get("k") == "ü🔒\0".encode()
    store.set("k", b"\xff\x00", hold(1))
    assert store.get("k") == b"\xff\x00"
    store.set("k", "", hold(1))
    assert store.get("k") == b""


@pytest.mark.parametrize("wrong", [None, 1, 1.5, ["x"], bytearray(b"x"), {"a": 1}], ids=str)
def test_what_is_neither_bytes_nor_text_is_refused(store, wrong):
    with pytest.raises(TypeError, match="bytes or text"):
        store.set("k", wrong, hold(1))
    assert store.get("k") is None


def test_what_is_too_large_is_refused(store):
    with pytest.raises(ValueError, match="bytes, more than"):
        store.set("k", b"x" * (8 * 1024 * 1024 + 1), hold(1))
    assert store.get("k") is None


def test_what_has_expired_has_forgotten_its_fence(redis, name):
    store = FencedStore(redis, name, ttl=0.05)
    store.set("k", "late", hold(9))
    eventually(lambda: store.get("k") is None, "it expires")
    store.set("k", "early", hold(1))


def test_any_text_is_a_key_and_stores_do_not_meet(redis, name):
    for number, key in enumerate(["k", "k}", "{k", "k\n", ":", "%", "ü🔒", " "], 1):
        first, second = FencedStore(redis, name), FencedStore(redis, f"{name}:")
        first.set(key, "first", hold(number))
        second.set(key, "second", hold(0))
        assert (first.get(key), second.get(key)) == (b"first", b"second")
    with pytest.raises(StaleFence):
        FencedStore(redis, name).set("k", "x", hold(0))


def test_names_keys_and_times_that_make_no_sense_are_refused(redis, name, store):
    for wrong in ("", "x" * 2_000, 7):
        with pytest.raises((ValueError, TypeError)):
            FencedStore(redis, wrong)
        with pytest.raises((ValueError, TypeError)):
            store.set(wrong, "x", hold(1))
    for wrong in (0, -1, float("nan"), float("inf"), True, "soon"):
        with pytest.raises((ValueError, TypeError), match="ttl"):
            FencedStore(redis, name, ttl=wrong)


def test_its_repr_tells_its_name(store):
    assert store.name in repr(store)
