"""What is stale, or soon will be, is loaded anew, in the caller, in a thread or elsewhere; and what a load may bring.

Loaders stand still at gates: nothing here depends on who is quick. An entry is made stale with ``expire``, and is due
early from its first moment on (``early`` of nearly nothing).
"""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from petiole.cachelib import MISS, Cache, Loaded, cached
from petiole.cachelib.background import Background
from petiole.cachelib.errors import LoaderRecursion, LoadTimedOut, ValueNotCacheable
from petiole.cachelib.keys import lease

MAY_TAKE_S = 30
AT_ONCE = 1e-9
"""``early`` as the share of the TTL that has always passed."""


def until(condition, what="it did not come to be"):
    """Wait for what must happen some time."""
    deadline = time.monotonic() + MAY_TAKE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.002)
    return found


def no_load_runs():
    until(lambda: not [one for one in threading.enumerate() if one.name == "petiole-load"], "a load does not end")


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    no_load_runs()


class Gate:
    """A loader that stands still until it is opened; it counts its calls and knows its threads."""

    def __init__(self, value="new", error=None):
        self.value, self.error = value, error
        self.threads = []
        self._open = threading.Event()

    def __call__(self):
        self.threads.append(threading.current_thread())
        assert self._open.wait(MAY_TAKE_S)
        if self.error is not None:
            raise self.error
        return self.value

    @property
    def calls(self):
        return len(self.threads)

    def open(self):
        self._open.set()
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._open.set()


def opened(value="new", error=None):
    return Gate(value, error).open()


def stored_stale(cache, key="k", value="old"):
    cache.set(key, value, stale=600)
    assert cache.expire(key)


def stored_early(cache, key="k", value="old"):
    cache.set(key, value, stale=600)
    at_first = cache.ttl(key)
    until(lambda: cache.ttl(key) < at_first)  # a millisecond is the least that passes


KINDS = {"stale": (stored_stale, {"stale": 600}), "early": (stored_early, {"stale": 600, "early": AT_ONCE})}
by_kind = pytest.mark.parametrize("kind", KINDS)


def leased(cache, key="k"):
    return bool(cache.redis.coordination.exists(lease(cache.keys.entry(key))))


# --- where it is loaded -----------------------------------------------------------------------------------------------


@by_kind
def test_inline_the_caller_who_notices_loads_and_gets_the_new_value(cache, kind):
    """And those who notice meanwhile are served what there is."""
    store, options = KINDS[kind]
    store(cache)
    with Gate() as gate, ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get_or_set, "k", gate, **options)
        until(lambda: gate.calls == 1)
        served = [cache.get_or_set("k", gate, **options) for _ in range(3)]
        gate.open()

        assert first.result(MAY_TAKE_S) == "new"
        assert served == ["old"] * 3
        assert gate.calls == 1
    assert cache.get("k") == "new"
    assert cache.stats().refreshes == 1


@by_kind
def test_in_a_thread_nobody_waits(cache, kind):
    """The caller is served what there is, while the loader stands still in another thread."""
    store, options = KINDS[kind]
    store(cache)
    with Gate() as gate:
        served = [cache.get_or_set("k", gate, refresh="thread", **options) for _ in range(3)]
        until(lambda: gate.calls == 1)

        assert served == ["old"] * 3
        assert gate.threads != [threading.current_thread()]
    until(lambda: cache.get("k") == "new")
    no_load_runs()
    assert gate.calls == 1


@by_kind
def test_a_refresher_runs_it_elsewhere_later(cache, kind):
    """With the call's arguments and the lease's token; meanwhile nobody else loads."""
    store, options = KINDS[kind]
    handed, loads = [], []

    @cached(cache, "k:{number}", refresh=lambda refresh: not handed.append(refresh), **options)
    def value(number, *, unit="m"):
        loads.append((number, unit))
        return f"{number} {unit}"

    store(cache, "k:7")
    assert [value(7, unit="s") for _ in range(3)] == ["old"] * 3
    (refresh,) = handed
    assert (refresh.key, refresh.arguments, refresh.keywords) == ("k:7", (7,), {"unit": "s"})
    assert loads == []

    assert value.refresh_call(refresh.arguments, refresh.keywords, token=refresh.token)
    assert loads == [(7, "s")]
    assert cache.get("k:7") == "7 s"
    assert not value.refresh_call(refresh.arguments, refresh.keywords, token=refresh.token), "its lease is over"
    assert loads == [(7, "s")]


@pytest.mark.parametrize("ending", ["invalidated", "run out", "another's"])
def test_a_refresh_whose_lease_is_gone_does_nothing_elsewhere(cache, ending):
    """It is somebody else's then, or nobody's."""
    handed = []
    value = cached(cache, "k", stale=600, refresh=lambda refresh: not handed.append(refresh))(
        lambda: pytest.fail("loaded")
    )
    stored_stale(cache)
    assert value() == "old"
    held = lease(cache.keys.entry("k"))
    if ending == "invalidated":
        cache.delete("k")
    else:
        cache.redis.coordination.delete(held)
    if ending == "another's":
        cache.redis.coordination.hset(held, mapping={"token": "somebody", "waiting": 0})
        cache.redis.coordination.pexpire(held, 10_000)

    assert not value.refresh_call((), {}, token=handed[0].token)


@pytest.mark.parametrize("refuses", ["False", "raises"])
def test_what_a_refresher_does_not_take_is_loaded_in_a_thread(cache, refuses, caplog):
    """A broker that is away must not keep a value old."""

    def refresher(refresh):
        if refuses == "raises":
            raise OSError("the broker is away")
        return False

    value = cached(cache, "k", stale=600, refresh=refresher)(opened())
    stored_stale(cache)

    assert value() == "old"
    until(lambda: cache.get("k") == "new")


def test_without_a_call_to_hand_over_a_refresher_is_not_asked(cache):
    """``get_or_set`` has a closure that no other process could call: a thread loads."""
    stored_stale(cache)

    assert cache.get_or_set("k", opened(), stale=600, refresh=lambda refresh: pytest.fail("asked")) == "old"
    until(lambda: cache.get("k") == "new")


def test_when_all_threads_are_taken_the_value_that_there_is_is_served_and_another_may_load(cache):
    """The lease is given back, so that the next who notices tries again."""
    gates = [Gate() for _ in range(4)]
    try:
        for number, gate in enumerate(gates):
            stored_stale(cache, f"busy{number}")
            assert cache.get_or_set(f"busy{number}", gate, stale=600, refresh="thread") == "old"
        stored_stale(cache)
        refused = cache.get_or_set("k", lambda: pytest.fail("loaded"), stale=600, refresh="thread")

        assert refused == "old"
        assert not leased(cache)
        assert cache.get_or_set("k", opened(), stale=600, refresh="inline") == "new"
    finally:
        for gate in gates:
            gate.open()
    no_load_runs()
    assert cache.get_or_set("busy0", lambda: pytest.fail("loaded")) == "new"


def test_a_share_of_the_ttl_decides_when_it_is_early(cache):
    """Before that, nobody loads."""
    cache.set("k", "old", ttl=600)

    assert cache.get_or_set("k", lambda: pytest.fail("loaded"), early=0.9) == "old"
    assert cache.get_or_set("k", opened(), early=0.0001) in ("old", "new")  # a ten-thousandth: 60 ms
    until(lambda: cache.get_or_set("k", opened(), early=0.0001) == "new")


def test_xfetch_refreshes_what_was_slow_to_load_and_spares_what_was_quick(cache, monkeypatch):
    """By chance, the sooner the longer the load takes; chance is the same for both here."""
    monkeypatch.setattr("petiole.cachelib.loading.random.random", lambda: 0.999_999)  # 13.8 times the load's time
    monkeypatch.setattr("petiole.cachelib.entry.jittered", lambda ttl_ms, chance: ttl_ms)
    slow = {"now": 0.0}
    monkeypatch.setattr("petiole.cachelib.loading.time.perf_counter", lambda: slow["now"])

    def takes(seconds):
        slow["now"] += seconds
        return "old"

    cache.get_or_set("slow", lambda: takes(60), ttl=600, early="xfetch")
    cache.get_or_set("quick", lambda: takes(0.01), ttl=600, early="xfetch")

    assert cache.get_or_set("slow", opened(), ttl=600, early="xfetch") == "new"
    assert cache.get_or_set("quick", lambda: pytest.fail("loaded"), ttl=600, early="xfetch") == "old"


# --- when it fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", ["inline", "thread"])
@by_kind
def test_a_loader_that_fails_leaves_the_value_and_is_asked_again_after_a_pause(cache, kind, refresh, caplog):
    """A database that is down is not asked by every request."""
    store, options = KINDS[kind]
    store(cache)
    failing = opened(error=OSError("the database is away"))
    with caplog.at_level(logging.WARNING, "petiole"):
        served = [cache.get_or_set("k", failing, refresh=refresh, retry_after="1m", **options)]
        no_load_runs()
        served += [cache.get_or_set("k", failing, refresh=refresh, retry_after="1m", **options) for _ in range(5)]

    assert served == ["old"] * 6
    assert failing.calls == 1
    assert "the database is away" in caplog.text
    left_ms = cache.redis.coordination.pttl(lease(cache.keys.entry("k")))
    assert 5_000 < left_ms <= 60_000


def test_after_the_pause_it_is_asked_again(cache):
    """And what it brings then is stored."""
    stored_stale(cache)
    failing = opened(error=OSError("the database is away"))

    assert cache.get_or_set("k", failing, stale=600, retry_after=0.05) == "old"
    until(lambda: cache.get_or_set("k", opened(), stale=600) == "new")


def test_without_a_pause_it_is_asked_each_time(cache):
    """``retry_after=0``."""
    stored_stale(cache)
    failing = opened(error=OSError("the database is away"))

    assert [cache.get_or_set("k", failing, stale=600, retry_after=0) for _ in range(3)] == ["old"] * 3
    assert failing.calls == 3


@pytest.mark.parametrize("gone", ["deleted", "invalidated", "expired by Redis"])
def test_the_pause_does_not_delay_those_who_have_nothing_to_serve(cache, gone):
    """They load at once, whoever failed before."""
    cache.set("k", "old", stale=600, tags=["t"])
    cache.expire("k")
    failing = opened(error=OSError("the database is away"))
    assert cache.get_or_set("k", failing, stale=600, retry_after="10m", tags=["t"]) == "old"
    assert leased(cache)
    if gone == "deleted":
        cache.delete("k")
    elif gone == "invalidated":
        cache.invalidate(tags=["t"])
    else:
        cache.redis.coordination.delete(cache.keys.entry("k"))

    assert cache.get_or_set("k", opened(), wait=5, tags=["t"]) == "new"
    assert cache.get("k") == "new"
    assert cache.stats().waits == 0


def test_a_loader_that_fails_where_nothing_is_left_raises_and_pauses_nobody(cache):
    """The next caller loads at once."""
    with pytest.raises(OSError, match="away"):
        cache.get_or_set("k", opened(error=OSError("the database is away")), stale=600, retry_after="10m")

    assert not leased(cache)
    assert cache.get_or_set("k", opened()) == "new"


def test_several_stale_values_are_served_when_their_loader_fails(cache):
    """With a pause for all of them; what is missing cannot be served, so then it raises."""
    stored_stale(cache, "a", 1)
    stored_stale(cache, "b", 2)
    calls = []

    def failing(keys):
        calls.append(sorted(keys))
        raise OSError("the database is away")

    for _ in range(3):
        assert cache.get_or_set_many(["a", "b"], failing, stale=600, retry_after="10m") == {"a": 1, "b": 2}
    with pytest.raises(OSError, match="away"):
        cache.get_or_set_many(["a", "b", "c"], failing, stale=600)
    assert calls == [["a", "b"], ["c"]]
    assert not leased(cache, "c")


# --- when it takes too long -------------------------------------------------------------------------------------------


@by_kind
def test_a_soft_timeout_serves_what_there_is_and_the_load_goes_on(cache, kind):
    """What it brings later is stored; others do not load meanwhile."""
    store, options = KINDS[kind]
    store(cache)
    with Gate() as gate:
        assert [cache.get_or_set("k", gate, soft_timeout=0.01, **options) for _ in range(3)] == ["old"] * 3
        assert gate.calls == 1
        assert cache.stats().load_timeouts == 1
    until(lambda: cache.get("k") == "new")


def test_a_soft_timeout_does_not_matter_where_there_is_nothing_to_serve(cache):
    """There the loader is waited for."""
    with Gate() as gate, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cache.get_or_set, "k", gate, stale=600, soft_timeout=0.001)
        until(lambda: gate.calls == 1)
        gate.open()

        assert asked.result(MAY_TAKE_S) == "new"


def test_a_hard_timeout_raises_and_lets_others_load(cache):
    """What the first load brings after all is not stored over theirs."""
    with Gate("late") as gate:
        with pytest.raises(LoadTimedOut) as raised:
            cache.get_or_set("k", gate, hard_timeout=0.02)

        assert not leased(cache)
        assert cache.get_or_set("k", opened(), hard_timeout=20) == "new"
    no_load_runs()
    assert cache.get("k") == "new"
    assert "k" in str(raised.value)
    assert cache.stats().refused == 1


def test_a_load_that_timed_out_stores_nothing_even_if_nobody_else_has(cache):
    """Its lease is gone, and who knows what has been invalidated since."""
    with Gate("late") as gate, pytest.raises(LoadTimedOut):
        cache.get_or_set("k", gate, hard_timeout=0.02)
    no_load_runs()

    assert cache.get("k", MISS) is MISS


def test_who_waits_for_another_s_load_waits_no_longer_than_the_hard_timeout(redis, name):
    """In the same process, and in another."""
    holder, other = Cache(redis, namespace=name), Cache(redis, namespace=name)
    with ThreadPoolExecutor(1) as pool, Gate() as gate:
        first = pool.submit(holder.get_or_set, "k", gate)
        until(lambda: gate.calls == 1)
        for cache in (holder, other):
            with pytest.raises(LoadTimedOut):
                cache.get_or_set("k", lambda: pytest.fail("loaded"), hard_timeout=0.05)
        gate.open()

        assert first.result(MAY_TAKE_S) == "new"
    assert other.get_or_set("k", lambda: pytest.fail("loaded"), hard_timeout=20) == "new"


def test_who_joined_a_load_that_timed_out_loads(cache):
    """A joiner with more patience is not left with nothing."""
    with Gate("late") as gate, ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get_or_set, "k", gate, hard_timeout=0.5)
        until(lambda: gate.calls == 1)
        joined = pool.submit(cache.get_or_set, "k", opened())
        with pytest.raises(LoadTimedOut):
            first.result(MAY_TAKE_S)

        assert joined.result(MAY_TAKE_S) == "new"


def test_a_stale_value_whose_loader_hangs_beyond_the_hard_timeout_may_be_loaded_by_others(cache):
    """A loader that hangs for ever must not keep a key from being refreshed for ever."""
    stored_stale(cache)
    with Gate("late") as gate:
        assert cache.get_or_set("k", gate, stale=600, hard_timeout=0.02, retry_after=0) == "old"
        second = cache.get_or_set("k", opened(), stale=600, hard_timeout=20)
    no_load_runs()

    assert second == "new"
    assert cache.get("k") == "new"


def test_threads_with_a_time_limit_are_bounded_and_the_error_says_so(cache, monkeypatch):
    """Loaders that hang cannot be ended in Python, but there are not more and more of them."""
    monkeypatch.setattr(cache._loading, "_timed", Background(1))
    with Gate() as gate:
        with pytest.raises(LoadTimedOut) as hangs:
            cache.get_or_set("hangs", gate, hard_timeout=0.02)
        with pytest.raises(LoadTimedOut) as refused:
            cache.get_or_set("k", lambda: pytest.fail("loaded"), hard_timeout=20)
        stored_stale(cache, "s")

        assert cache.get_or_set("s", lambda: pytest.fail("loaded"), stale=600, soft_timeout=20) == "old"
        assert str(hangs.value).replace("hangs", "k") != str(refused.value)
        assert not leased(cache, "k")
        assert not leased(cache, "s")
    no_load_runs()
    assert cache.get_or_set("k", opened(), hard_timeout=20) == "new"


# --- what a load may bring --------------------------------------------------------------------------------------------


def test_none_is_a_value_with_a_ttl_of_its_own(cache):
    """What is not there may soon be, and it is never served stale."""
    loads = []
    for _ in range(3):
        assert cache.get_or_set("k", lambda: loads.append(1), ttl=600, negative_ttl=30, stale=600) is None
    left_ms = cache.redis.coordination.pttl(cache.keys.entry("k"))

    assert loads == [1]
    assert cache.get("k", MISS) is None
    assert 0 < left_ms <= 30_000
    assert not cache.expire("k") or cache.get("k", MISS) is MISS


class NotFoundError(Exception):
    """What a loader raises for what is not there."""


class NotFoundAtAllError(NotFoundError):
    """A kind of it."""


def test_an_exception_is_cached_by_its_type(cache):
    """Who names the type is raised it again without a load; others load."""
    missing = opened(error=NotFoundError("user", 7))
    for _ in range(3):
        with pytest.raises(NotFoundError) as raised:
            cache.get_or_set("k", missing, exceptions={NotFoundError: 30})
        assert raised.value.args == ("user", 7)
    left_ms = cache.redis.coordination.pttl(cache.keys.entry("k"))

    assert missing.calls == 1
    assert 0 < left_ms <= 30_000
    assert cache.get("k", MISS) is MISS
    assert cache.get_many(["k"]) == {}
    assert cache.get_or_set("k", opened()) == "new", "who does not name it does not get it"
    assert cache.get("k") == "new"


def test_an_exception_of_another_type_is_not_cached(cache):
    """Only what was named."""
    for _ in range(2):
        failing = opened(error=OSError("the database is away"))
        with pytest.raises(OSError, match="away"):
            cache.get_or_set("k", failing, exceptions={NotFoundError: 30})
        assert failing.calls == 1


def test_a_kind_of_a_named_exception_is_cached_too_and_raised_as_what_can_be_known(cache):
    """Whatever it comes back as, a caller who catches the named type catches it, and it is not served as a value."""
    missing = opened(error=NotFoundAtAllError("user"))
    for _ in range(2):
        with pytest.raises(NotFoundError):
            cache.get_or_set("k", missing, exceptions={NotFoundError: 30})
    assert cache.get("k", MISS) is MISS


def test_a_cached_exception_is_voided_like_a_value(cache):
    """By key, by tag; and by an invalidation while the loader ran."""

    def missing():
        raise NotFoundError

    for invalidate in (lambda: cache.delete("k"), lambda: cache.invalidate(tags=["t"]), cache.clear):
        with pytest.raises(NotFoundError):
            cache.get_or_set("k", missing, exceptions={NotFoundError: 30}, tags=["t"])
        invalidate()
        assert cache.get_or_set("k", opened(), exceptions={NotFoundError: 30}, tags=["t"]) == "new"
        cache.delete("k")

    def overtaken():
        cache.invalidate(tags=["t"])
        raise NotFoundError

    with pytest.raises(NotFoundError):
        cache.get_or_set("k", overtaken, exceptions={NotFoundError: 30}, tags=["t"])
    assert cache.get_or_set("k", opened(), exceptions={NotFoundError: 30}, tags=["t"]) == "new"


def test_when_decides_what_is_cached(cache):
    """What is not cached is returned all the same, and nobody waits for it afterwards."""
    for _ in range(2):
        loader = opened(0)
        assert cache.get_or_set("k", loader, when=lambda value: value > 0) == 0
        assert loader.calls == 1
        assert not leased(cache)
    assert cache.get_or_set("k", opened(5), when=lambda value: value > 0) == 5
    assert cache.get("k") == 5


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_a_when_that_raises_reaches_the_caller_and_keeps_no_lease(cache, many):
    """Nobody waits for a load that is over."""
    wrong = {"when": lambda value: value.missing}
    keys = ["other", "k", "another"]
    load = (
        (lambda: cache.get_or_set_many(keys, lambda keys: dict.fromkeys(keys, 1), **wrong))
        if many
        else (lambda: cache.get_or_set("k", opened(), **wrong))
    )
    with pytest.raises(AttributeError):
        load()

    assert [key for key in keys if leased(cache, key)] == []


def test_a_value_without_a_form_among_several_reaches_the_caller_and_keeps_no_lease(cache):
    """The others need not wait for a lease to run out."""
    values = {"a": 1, "b": object(), "c": 3}
    with pytest.raises(ValueNotCacheable):
        cache.get_or_set_many(["a", "b", "c"], lambda keys: values)

    assert [key for key in values if leased(cache, key)] == []


def test_a_loader_says_more_of_its_value(cache):
    """Its TTL, how long it may be stale, its tags; and that it is not to be stored."""
    client = cache.redis.coordination
    value = cache.get_or_set("k", lambda: Loaded("v", ttl=30, stale=60, tags=["mine"]), ttl=600, tags=["ours"])
    left_ms = client.pttl(cache.keys.entry("k"))

    assert value == cache.get("k") == "v"
    assert 60_000 < left_ms <= 90_000
    assert 0 < cache.ttl("k") <= 30
    for tag in ("mine", "ours"):
        cache.get_or_set("k", lambda: Loaded("v", tags=["mine"]), tags=["ours"])
        cache.invalidate(tags=[tag])
        assert cache.get("k", MISS) is MISS
    assert cache.get_or_set("k", lambda: Loaded("unstored", store=False)) == "unstored"
    assert cache.get("k", MISS) is MISS
    assert not leased(cache)
    several = cache.get_or_set_many(
        ["a", "b", "c"], lambda keys: {"a": Loaded(1, tags=["x"]), "b": Loaded(2, store=False), "c": Loaded(3, ttl=5)}
    )
    assert several == {"a": 1, "b": 2, "c": 3}
    assert cache.get_many(["a", "b", "c"]) == {"a": 1, "c": 3}
    assert cache.ttl("c") <= 5


def test_the_ttl_may_be_a_function_of_the_value(cache):
    """For a value that knows how soon it changes; also where it is set."""
    cache.get_or_set("settled", opened({"settled": True}), ttl=lambda value: "1h" if value["settled"] else 10)
    cache.get_or_set("open", opened({"settled": False}), ttl=lambda value: "1h" if value["settled"] else 10)
    cache.get_or_set_many(["a", "b"], lambda keys: {"a": 20, "b": 400}, ttl=lambda value: value)

    assert 3_000 < cache.ttl("settled") <= 3_600
    assert 0 < cache.ttl("open") <= 10
    assert 0 < cache.ttl("a") <= 20 < cache.ttl("b") <= 400


# --- a loader that asks for itself ------------------------------------------------------------------------------------


RECURSIONS = {
    "get_or_set": lambda cache: cache.get_or_set("k", lambda: cache.get_or_set("k", opened(), wait=20)),
    "through another key": lambda cache: cache.get_or_set(
        "k", lambda: cache.get_or_set("between", lambda: cache.get_or_set("k", opened()))
    ),
    "with a time limit": lambda cache: cache.get_or_set(
        "k", lambda: cache.get_or_set("k", opened(), hard_timeout=20), hard_timeout=20
    ),
    "many in one": lambda cache: cache.get_or_set(
        "k", lambda: cache.get_or_set_many(["k"], lambda keys: dict.fromkeys(keys, 1))
    ),
    "one in many": lambda cache: cache.get_or_set_many(
        ["other", "k"], lambda keys: dict.fromkeys(keys, cache.get_or_set("k", opened()))
    ),
    "many in many": lambda cache: cache.get_or_set_many(
        ["other", "k"], lambda keys: cache.get_or_set_many(["k"], lambda more: dict.fromkeys(more, 1))
    ),
}


@pytest.mark.parametrize("way", RECURSIONS)
def test_a_loader_that_asks_for_its_own_key_is_refused_and_not_hung(cache, way):
    """It would wait for itself; and nothing is left that others would wait for."""
    with pytest.raises(LoaderRecursion) as raised:
        RECURSIONS[way](cache)

    assert "'k'" in str(raised.value)
    assert [key for key in ("k", "between", "other") if leased(cache, key)] == []
    assert cache.get_or_set("k", opened()) == "new"


@by_kind
def test_a_refresh_in_a_thread_that_asks_for_its_own_key_is_served_what_there_is(cache, kind):
    """It need not wait for itself: there is a value."""
    store, options = KINDS[kind]
    store(cache)
    asked = []

    def loader():
        asked.append(cache.get_or_set("k", lambda: pytest.fail("loaded"), **options))
        return "new"

    assert cache.get_or_set("k", loader, refresh="thread", **options) == "old"
    until(lambda: cache.get("k") == "new")
    assert asked == ["old"]


def test_a_refresh_in_a_thread_whose_key_is_invalidated_meanwhile_is_refused_when_it_asks_for_it(cache):
    """Then there is nothing to serve, and the load that it would wait for is its own."""
    stored_stale(cache)
    raised = []

    def loader():
        cache.redis.coordination.delete(cache.keys.entry("k"))  # as by an eviction: its lease stays
        with pytest.raises(LoaderRecursion) as error:
            cache.get_or_set("k", lambda: pytest.fail("loaded"))
        raised.append(error)
        return "new"

    assert cache.get_or_set("k", loader, stale=600, refresh="thread") == "old"
    until(lambda: raised)
    no_load_runs()
    assert cache.get("k") == "new"


def test_two_caches_may_have_the_same_key_in_each_other_s_loaders(redis, name):
    """It is the same name, and another thing."""
    one, two = Cache(redis, namespace=f"{name}-1"), Cache(redis, namespace=f"{name}-2")

    assert one.get_or_set("k", lambda: two.get_or_set("k", opened())) == "new"
