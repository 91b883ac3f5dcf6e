"""The near cache's store: what was dropped while it was fetched is not kept, and the bounds hold. No server needed."""

import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from petiole.cachelib import keys, near
from petiole.cachelib.listener import is_invalidation, is_pong, without_overlap
from petiole.cachelib.near import ABSENT, ENTRY_COSTS_BYTES, TAG_COSTS_BYTES, Near, NearStore

ENTRY = "petiole:1:cache:{shop:"
TAG = "petiole:1:tag:{shop:"
FOR_EVER = float("inf")
TEXT = st.text(min_size=1, max_size=20)


def a_store(**options):
    """A store that a listener has declared valid for ever."""
    store = NearStore(Near(**options), entry_prefix=ENTRY, tag_prefix=TAG)
    store.valid_until = FOR_EVER
    return store


def keep(store, key, payload="payload", *, tags=(), ttl_ms=60_000, size=7):
    return store.put(key, store.begin(key), payload, tags=tags, ttl_ms=ttl_ms, size=size)


def entry_name(key):
    return f"{ENTRY}{keys.escaped(key)}}}".encode()


def tag_name(tag):
    return f"{TAG}{keys.escaped(tag) if tag else ''}}}".encode()


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved: a list of one time."""
    time_s = [1_000.0]
    monkeypatch.setattr(near, "_now", lambda: time_s[0])
    return time_s


def test_what_was_put_is_what_is_got():
    """The very object, as often as it is asked for."""
    store, payload = a_store(), object()

    assert keep(store, "a", payload)
    assert store.get("a") is payload
    assert store.get("a") is payload
    assert store.get("b") is ABSENT


# --- no stale put -------------------------------------------------------------------------------------------------

DROPS = {
    "key": lambda store: store.drop("k"),
    "key, by name": lambda store: store.dropped([entry_name("other"), entry_name("k")]),
    "tag": lambda store: store.drop_tag("t"),
    "tag, by name": lambda store: store.dropped([tag_name("t")]),
    "namespace": lambda store: store.dropped([tag_name("")]),
    "everything": lambda store: store.dropped(None),
    "a name that is not understood": lambda store: store.dropped([b"petiole:1:cache:{shop:no brace"]),
    "fork": lambda store: (store.renew_after_fork(), setattr(store, "valid_until", FOR_EVER)),
}


def interleavings(*actors):
    """All orders in which the steps of several actors can follow each other: lists of actors' numbers."""
    steps = [number for number, count in enumerate(actors) for _ in range(count)]
    return sorted(set(itertools.permutations(steps)))


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS.keys())
@pytest.mark.parametrize("kept_before", [False, True], ids=["first", "again"])
def test_no_order_of_two_readers_and_a_writer_leaves_an_old_value(drop, kept_before):
    """Each reader: begin, fetch, put. The writer: write, then the drop arrives. 560 orders, none of them stale."""

    def reader(store, source):
        marker = store.begin("k")
        yield
        fetched = source["k"]
        yield
        store.put("k", marker, fetched, tags=["t"], ttl_ms=60_000, size=3)
        yield

    def writer(store, source):
        source["k"] = "new"
        yield
        drop(store)
        yield

    kept = 0
    for order in interleavings(3, 3, 2):
        store, source = a_store(), {"k": "old"}
        if kept_before:
            assert keep(store, "k", "old", tags=["t"])
        actors = [reader(store, source), reader(store, source), writer(store, source)]
        for number in order:
            next(actors[number])
        assert store.get("k") in ("new", ABSENT), order
        kept += store.get("k") == "new"
    assert kept > 0  # it does keep something


def test_a_drop_of_another_tag_does_not_refuse_what_has_none():
    """Only what has tags is refused when any tag drops meanwhile."""
    store = a_store()
    plain, tagged = store.begin("plain"), store.begin("tagged")
    store.drop_tag("elsewhere")

    assert store.put("plain", plain, 1, ttl_ms=1_000, size=1)
    assert not store.put("tagged", tagged, 1, tags=["t"], ttl_ms=1_000, size=1)
    assert keep(store, "tagged", tags=["t"])  # the next one is kept: its marker is a new one


def test_what_was_abandoned_is_not_kept_and_leaves_nothing():
    """A miss in Redis, or an error: the marker goes."""
    store = a_store()
    marker = store.begin("k")
    store.abandon("k", marker)

    assert not store.put("k", marker, 1, ttl_ms=1_000, size=1)
    assert store._markers == {}


def test_nothing_is_kept_or_served_while_the_listener_hears_nothing(clock):
    """Validity ends by time alone: nobody has to flip anything."""
    asked = []
    store = NearStore(Near(), entry_prefix=ENTRY, tag_prefix=TAG, watch=lambda *what: asked.append(what))
    assert store.begin("a") is None
    assert asked == [((ENTRY, TAG), store)]
    assert not store.put("a", None, 1, ttl_ms=1_000, size=1)
    store.abandon("a", None)

    store.valid_until = clock[0] + 1
    late = store.begin("late")
    assert keep(store, "a", 1)
    assert store.get("a") == 1
    clock[0] += 1
    assert store.get("a") is ABSENT
    assert not store.put("late", late, 1, ttl_ms=60_000, size=1)

    store.valid_until = clock[0] + 1  # heard again, on the same connection: nothing was lost
    assert store.get("a") == 1


def test_an_entry_is_kept_no_longer_than_redis_keeps_it_nor_than_the_options_say(clock):
    """The time that the answer took counts too."""
    store = a_store(ttl=5)
    marker = store.begin("short")
    clock[0] += 0.5
    assert store.put("short", marker, 1, ttl_ms=1_000, size=1)
    assert keep(store, "long", 2, ttl_ms=3_600_000)
    assert not keep(store, "over", 3, ttl_ms=0)
    clock[0] += 0.499
    assert store.get("short") == 1
    clock[0] += 0.001
    assert store.get("short") is ABSENT
    assert store.get("long") == 2
    assert store.stats.entries == 1  # what was over has gone
    clock[0] += 4.5
    assert store.get("long") is ABSENT
    assert store.stats == near.NearStats(entries=0, bytes=0, drops=0, evictions=0)


# --- names --------------------------------------------------------------------------------------------------------


@given(key=TEXT, other=TEXT)
def test_the_name_of_an_entry_drops_that_entry_and_no_other(key, other):
    """Whatever text the key is."""
    store = a_store()
    keep(store, other)
    keep(store, key)
    store.dropped([entry_name(key)])

    assert store.get(key) is ABSENT
    assert (store.get(other) is ABSENT) == (key == other)


@given(tag=TEXT, other=TEXT)
def test_the_name_of_a_tag_drops_what_names_it_and_nothing_else(tag, other):
    """At once, memory included."""
    store = a_store()
    keep(store, "both", tags=[tag, other])
    keep(store, "other", tags=[other])
    keep(store, "plain")
    store.dropped([tag_name(tag)])

    assert store.get("both") is ABSENT
    assert (store.get("other") is ABSENT) == (tag == other)
    assert store.get("plain") is not ABSENT
    assert set(store._keys_of) == ({other} - {tag})


@pytest.mark.parametrize(
    "name",
    [
        *(f"{ENTRY}{rest}".encode() for rest in ("", "k", "%zz}", "%4", "%4}", "k}lease", "k}}")),
        ENTRY.encode() + b"\xff}",
        TAG.encode() + b"t",
        b"something else",
    ],
)
def test_a_name_that_is_not_understood_drops_everything(name):
    """Better to fetch again than to have misread it."""
    store = a_store()
    keep(store, "k", tags=["t"])
    store.dropped([name])

    assert store.stats == near.NearStats(entries=0, bytes=0, drops=1, evictions=0)


# --- bounds -------------------------------------------------------------------------------------------------------


def cost_of(key, size, tags):
    return ENTRY_COSTS_BYTES + len(key) + size + sum(TAG_COSTS_BYTES + len(tag) for tag in tags)


class Bounds(RuleBasedStateMachine):
    """Any course of events: the bounds hold, the books agree with what is there, and nothing dropped is served."""

    some_keys = st.sampled_from("abcdefghij")
    some_tags = st.lists(st.sampled_from("xyz"), max_size=3)

    @initialize(max_entries=st.integers(1, 8), max_bytes=st.integers(1, 60_000))
    def start(self, max_entries, max_bytes):
        self.store = a_store(max_entries=max_entries, max_bytes=max_bytes)
        self.time_s = 0.0
        self.put_last = {}  # key -> payload, tags, size, expires
        self.markers = []

    @rule(key=some_keys)
    def begin(self, key):
        self.markers.append((key, self.store.begin(key)))

    @precondition(lambda self: getattr(self, "markers", None))
    @rule(tags=some_tags, size=st.integers(0, 3_000), last=st.booleans())
    def put(self, tags, size, last):
        key, marker = self.markers.pop(-1 if last else 0)
        payload = object()
        if self.store.put(key, marker, payload, tags=tags, ttl_ms=60_000, size=size):
            self.put_last[key] = payload, tags, size

    @rule(key=some_keys)
    def get(self, key):
        found = self.store.get(key)
        assert found is ABSENT or found is self.put_last[key][0]

    @rule(key=some_keys)
    def drop(self, key):
        self.store.drop(key)
        self.put_last.pop(key, None)

    @rule(tag=st.sampled_from("xyz"))
    def drop_tag(self, tag):
        self.store.drop_tag(tag)
        self.put_last = {key: put for key, put in self.put_last.items() if tag not in put[1]}

    @rule()
    def clear(self):
        self.store.clear()
        self.put_last.clear()

    @invariant()
    def the_books_agree(self):
        if not hasattr(self, "store"):
            return
        store = self.store
        assert set(store._kept) <= set(self.put_last)
        held = [(key, self.put_last[key]) for key in store._kept]
        assert store.stats.entries == len(held) <= store.options.max_entries
        assert store.stats.bytes == sum(cost_of(key, size, tags) for key, (_, tags, size) in held)
        assert store.stats.bytes <= store.options.max_bytes
        indexed = {(tag, key) for tag, its in store._keys_of.items() for key in its}
        assert indexed == {(tag, key) for key, (_, tags, _) in held for tag in tags}
        assert all(store._keys_of.values())


TestBounds = Bounds.TestCase
TestBounds.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(max_bytes=st.integers(6_000, 20_000), sizes=st.lists(st.integers(0, 900), min_size=20, max_size=60))
def test_many_entries_take_no_more_memory_than_they_may(max_bytes, sizes):
    """Whatever their sizes: the oldest make room, and the newest is there."""
    store = a_store(max_bytes=max_bytes)
    for number, size in enumerate(sizes):
        kept = keep(store, f"{number}", size=size)
        assert kept == (cost_of(f"{number}", size, ()) <= max_bytes // 16)
        assert (store.get(f"{number}") is not ABSENT) == kept
        assert store.stats.bytes <= max_bytes


def test_what_is_hit_outlives_what_is_not():
    """A scan over many keys does not push out what is asked for again and again."""
    store = a_store(max_entries=100)
    for number in range(50):
        keep(store, f"hot{number}")
    for number in range(10_000):
        keep(store, f"scan{number}")
        store.get(f"hot{number % 50}")

    assert all(store.get(f"hot{number}") is not ABSENT for number in range(50))
    assert store.stats.entries == 100
    assert store.stats.evictions == 10_000 + 50 - 100


def test_what_is_over_makes_room_before_what_is_not(clock):
    """And is not counted as pushed out."""
    store = a_store(max_entries=2)
    keep(store, "over", ttl_ms=1)
    store.get("over")
    keep(store, "kept")
    clock[0] += 1
    keep(store, "new")

    assert store.get("kept") is not ABSENT
    assert store.stats.evictions == 0


def test_an_entry_that_would_push_out_too_much_is_not_kept():
    """Nor is the one before it: it is not the value any more."""
    store = a_store(max_bytes=160_000)
    keep(store, "k", size=1)

    assert not keep(store, "k", size=10_000)
    assert store.get("k") is ABSENT
    assert keep(store, "k", size=10_000 - cost_of("k", 0, ()))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"max_entries": 0}, ValueError),
        ({"max_bytes": -1}, ValueError),
        ({"max_entries": 1.5}, TypeError),
        ({"max_entries": True}, TypeError),
        ({"ttl": 0}, ValueError),
        ({"ttl": None}, TypeError),
    ],
)
def test_options_that_cannot_be_meant_are_refused(wrong, error):
    """With the option's name in the message."""
    with pytest.raises(error, match=next(iter(wrong))):
        Near(**wrong)


# --- threads, signals, forks --------------------------------------------------------------------------------------


def test_threads_that_put_and_drop_at_once_never_leave_an_old_value():
    """Eight threads fetch what one thread changes and drops; what is served was never dropped before."""
    store, source, over = a_store(max_entries=4), dict.fromkeys("abcdef", 0), threading.Event()
    dropped_up_to = dict.fromkeys(source, 0)
    stale = []

    def read():
        while not over.is_set():
            for key in source:
                least = dropped_up_to[key]
                found = store.get(key)
                if found is ABSENT:
                    marker = store.begin(key)
                    store.put(key, marker, source[key], tags=["t"], ttl_ms=60_000, size=1)
                elif found < least:
                    stale.append((key, found, least))

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read) for _ in range(8)]
        try:
            for number in range(1, 4_000):
                for key in source:
                    source[key] = number
                (store.clear, lambda: store.drop_tag("t"), lambda: [store.drop(k) for k in source])[number % 3]()
                dropped_up_to.update(dict.fromkeys(source, number))
        finally:
            over.set()
        for reader in readers:
            reader.result()

    assert stale == []
    assert store.stats.bytes == sum(kept.bytes for kept in store._kept.values())


def test_a_lock_that_another_thread_held_does_not_stop_a_forked_child():
    """What the child starts with is empty, off, and free."""
    store = a_store()
    keep(store, "k", tags=["t"])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(store._lock.acquire).result()
        store.renew_after_fork()

    assert store.valid_until == 0.0
    assert store.stats == near.NearStats(entries=0, bytes=0, drops=0, evictions=0)
    store.valid_until = FOR_EVER
    assert store.get("k") is ABSENT


@pytest.mark.parametrize("what", ["key", "tag"])
def test_a_change_that_a_signal_handler_makes_in_the_middle_of_a_put_is_not_lost(what):
    """At every line of ``put``, a handler drops the key or its tag: what was fetched before is not kept."""
    lines = [0]

    def run(stop_at):
        store = a_store(max_entries=1)
        keep(store, "other", tags=["t"])
        marker, count = store.begin("k"), [0]

        def tracer(frame, event, argument):
            if frame.f_code.co_filename != near.__file__:
                return None
            if event == "line":
                count[0] += 1
                if count[0] == stop_at:
                    sys.settrace(None)
                    DROPS[what](store)
            return tracer

        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            store.put("k", marker, "old", tags=["t"], ttl_ms=60_000, size=1)
        finally:
            sys.settrace(before)
        lines[0] = max(lines[0], count[0])
        return store

    run(0)
    atomic = 0
    for stop_at in range(1, lines[0] + 1):
        store = run(stop_at)
        assert store.stats.bytes == sum(kept.bytes for kept in store._kept.values())
        if store.get("k") is ABSENT:
            assert set().union(*store._keys_of.values()) >= set(store._kept)
        else:
            atomic += 1
    assert atomic <= 3  # the lines after the last look: a tracer gets in between, a handler does not: no call is there


# --- what a listener reads ----------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1, max_size=4)))
def test_prefixes_without_overlap_cover_the_same_names(prefixes):
    """And none begins with another, which the server would refuse."""
    kept = without_overlap(prefixes)

    assert set(kept) <= set(prefixes)
    assert all(prefix.startswith(tuple(kept)) for prefix in prefixes)
    assert not any(one != other and one.startswith(other) for one in kept for other in kept)


def test_messages_are_told_apart():
    """In both protocols."""
    assert is_pong(b"PONG")
    assert is_pong([b"pong", b""])
    assert is_invalidation([b"invalidate", [b"k"]])
    assert is_invalidation([b"message", b"__redis__:invalidate", None])
    for other in (b"OK", 7, None, [], [b"subscribe", b"__redis__:invalidate", 1]):
        assert not is_pong(other)
        assert not is_invalidation(other)
