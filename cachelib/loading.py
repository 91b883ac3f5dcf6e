"""Loading what is missing or stale, under a lease.

The invariant that all of it keeps: **a value is stored only by a load whose lease nobody has voided since the load
began, under versions of its tags that were current then** (leases: Nishtala et al., "Scaling Memcache at Facebook",
NSDI 2013). It holds wherever the load runs: in the caller, in a thread, in another process that was given the lease's
token.
"""

import inspect
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from . import entry as entries
from . import exceptions
from . import keys as key_names
from . import policy as policies
from .background import Background
from .connections import UNAVAILABLE, Connections
from .counters import Counters
from .entry import Freshness
from .entry_store import EntryStore, Take, Write
from .errors import LoaderRecursion, LoadTimedOut, ValueNotCacheable, ValueTooLarge
from .flights import Flight, Flights
from .formats import Codec, NotEncodable, Undecodable
from .keys import CacheKeys
from .leases import LeaseKeeper
from .missing import MISS
from .policy import Loaded, Policy, Refresh
from .reading import Reader, Reading
from .remembered import Remembered
from .waiting import wait_for_load

logger = logging.getLogger(__name__)

T = TypeVar("T")
Call = tuple[tuple[Any, ...], Mapping[str, Any]]
Maker = Callable[[Any], Any]
"""Makes a value of its own for each who asks, as the type that is given."""

_MOST_LEASES = 4  # waited for another's load, before a caller loads for itself
_REFRESHING = 4  # threads at once
_TIMED = 32  # loads with a time limit at once

_loading: ContextVar[tuple[tuple[int, str], ...]] = ContextVar("petiole_loading", default=())


class Request(NamedTuple):
    """What a caller wants."""

    key: str
    loader: Callable[[], Any]
    policy: Policy
    tags: Sequence[str] = ()
    call: Call | None = None
    """The call that the loader makes, for a refresher that makes it elsewhere."""


class Loading:
    """The loads of one cache."""

    def __init__(
        self,
        redis: Connections,
        keys: CacheKeys,
        store: EntryStore,
        codec: Codec,
        reader: Reader,
        counters: Counters,
        remembered: Remembered,
        keeper: LeaseKeeper,
        lease_ms: int,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._store = store
        self._codec = codec
        self._reader = reader
        self._counters = counters
        self._remembered = remembered
        self._lease_ms = lease_ms
        self.keeper = keeper
        self._flights = Flights()
        self._refreshing = Background(_REFRESHING)
        self._timed = Background(_TIMED)

    # One key

    def value(self, request: Request) -> Any:
        """The stored value of a key, or that of the loader."""
        key, policy = request.key, request.policy
        name = self._keys.entry(key)
        started: float | None = None
        waited_for: Flight | None = None  # closed: the next look decides what it brings
        try:
            while True:
                if (flight := self._flights.get(key)) is not None:
                    started = started or time.monotonic()
                    left_s = self._left_to_wait_s(request, started)
                    self._counters.add("joins")
                    if left_s > 0 and (make := flight.join(left_s)) is not None:
                        with suppress(Undecodable):  # of another type than ours: look for ourselves
                            return make(policy.type)
                plain = policy.type is Any and policy.early is None and waited_for is None
                reading = self._look(request, name, Take.IF_GONE, plain=plain)
                if reading is None:
                    return self._unstored(request)
                freshness, value = self._outcome(reading, policy)
                if waited_for is not None:
                    fresh = freshness is Freshness.FRESH
                    waited_for.land(partial(self._reader.value, reading) if fresh else None)
                    waited_for = None
                if freshness is not Freshness.FRESH and reading.look.lease == 0:
                    # Stale, invalidated or unreadable, but stored: the lease was not asked for yet.
                    take = Take.ALWAYS if freshness is Freshness.STALE else Take.OR_WAIT
                    again = self._look(request, name, take)
                    if again is None:
                        return value if freshness is Freshness.STALE else self._unstored(request)
                    reading = again
                    freshness, value = self._outcome(reading, policy)
                if freshness is Freshness.FRESH:
                    self._counters.add("hits")
                    if reading.leased:  # somebody filled it between the two looks
                        self._give_back(reading)
                    elif policy.early is not None and self._early_due(reading, policy):
                        return self._early(request, name, value)
                    return value
                if freshness is Freshness.STALE:
                    self._counters.add("stale")
                    return self._refreshed(request, reading, value) if reading.leased else value
                if reading.leased:
                    self._counters.add("misses")
                    return self._loaded(request, reading)
                started = started or time.monotonic()
                left_s = self._left_to_wait_s(request, started)
                if left_s <= 0:  # whoever loads is neither done nor dead: do not hang with a loader that hangs
                    return self._unstored(request)
                if self._flights.get(key) is not None:
                    continue  # it is a load of this process, which began while we looked
                self._counters.add("waits")
                waited_for = self._flights.open(key)
                try:
                    wait_for_load(self._redis, name, reading.look.holder, min(left_s, -reading.look.lease / 1_000))
                finally:
                    self._flights.close(key, waited_for)
        finally:
            if waited_for is not None:
                waited_for.land(None)

    def refresh(self, request: Request, *, unless_fresh_for_ms: int, token: str, wait_ms: int) -> bool:
        """Load a key anew; a load that is under way is waited for. Returns whether a value was stored."""
        key, name = request.key, self._keys.entry(request.key)
        if unless_fresh_for_ms:
            readings = self._reader.read([key], request.tags, near=False)
            if readings is None:
                return False
            if readings[0].freshness is Freshness.FRESH:
                left_ms = entries.fresh_left_ms(readings[0].entry, readings[0].look.left_ms)
                if left_ms > unless_fresh_for_ms:
                    return False
        # As those do who have nothing to serve: it does not mind that a load has just failed.
        take, until = Take.GO_ON if token else Take.OR_WAIT, time.monotonic() + wait_ms / 1_000
        while (reading := self._look(request, name, take, token, near=False)) is None or not reading.leased:
            left_s = until - time.monotonic()
            if reading is None or token or left_s <= 0:
                return False
            wait_for_load(self._redis, name, reading.look.holder, min(left_s, -reading.look.lease / 1_000))
        self._counters.add("refreshes")
        return self._load_and_fill(request, reading, None, pause=bool(token))[1]

    # Several keys

    def values(
        self, keys: Sequence[str], loader: Callable[[list[str]], Mapping[str, Any]], policy: Policy, tags: Sequence[str]
    ) -> dict[str, Any]:
        """The stored values of keys, and those that one call of the loader gives for the others."""
        names = [self._keys.entry(key) for key in keys]
        readings = self._reader.look(keys, names, tags, Take.IF_GONE) if keys else []
        if readings is None:
            self._counters.add("misses", len(keys))
            return _plain(self._load_many(list(keys), loader)[0])
        found: dict[str, Any] = {}
        leased: list[list[Reading]] = [[]]  # those of one look have one token
        waiting: list[str] = []
        again: dict[Take, list[Reading]] = {Take.ALWAYS: [], Take.OR_WAIT: []}
        stale: dict[str, Any] = {}
        for reading in readings:
            freshness, value = self._outcome_or_gone(reading, policy)
            if freshness is Freshness.FRESH:
                self._counters.add("hits")
                found[reading.key] = value
            elif reading.leased:
                leased[0].append(reading)
            elif reading.look.lease < 0:
                waiting.append(reading.key)
            else:
                again[Take.ALWAYS if freshness is Freshness.STALE else Take.OR_WAIT].append(reading)
        for take, those in again.items():
            looked = self._reader.look([r.key for r in those], [r.name for r in those], tags, take) if those else []
            leased.append([])
            for before, reading in zip(those, looked or those, strict=True):
                freshness, value = self._outcome_or_gone(reading, policy)
                if freshness is Freshness.FRESH:
                    self._counters.add("hits")
                    found[reading.key] = value
                    if reading.leased:
                        self._give_back(reading)
                    continue
                if freshness is Freshness.STALE:
                    self._counters.add("stale")
                    stale[reading.key] = value
                if reading.leased:
                    leased[-1].append(reading)
                elif before.key not in stale:
                    waiting.append(before.key)
        mine = [group for group in leased if group]
        if mine:
            self._counters.add("misses", sum(r.key not in stale for group in mine for r in group))
            found |= self._loaded_many(mine, loader, policy, tags, stale)
        for key, value in stale.items():
            found.setdefault(key, value)
        alone = replace(policy, hard_timeout_ms=None, soft_timeout_ms=None, early=None, refresh="inline")
        for key in waiting:  # after ours are filled: who waits while others wait for it would wait for ever
            one = Request(key, partial(_one_of_many, loader, key), alone, tags)
            if (value := self.value(one)) is not MISS:
                found[key] = value
        return {key: found[key] for key in keys if key in found}

    def fill_many(
        self, readings: Sequence[Reading], values: Mapping[str, Any], policy: Policy, tags: Sequence[str], load_ms: int
    ) -> set[str]:
        """Store values under the leases of one look. Returns the keys that were stored; ends the other leases too.

        Raises ``ValueNotCacheable`` for the first that has no form, once the others are stored.
        """
        writes: dict[tuple[int, tuple[str, ...]], dict[str, tuple[bytes, int]]] = {}
        keys = {reading.name: reading.key for reading in readings}
        failure: Exception | None = None
        for reading in readings:
            if reading.key not in values:
                continue
            try:
                made = self._packed(reading, values[reading.key], policy, tags, load_ms)
            except Exception as error:  # noqa: BLE001 - it is raised when the others have been stored
                failure = failure or error
                continue
            if made is not None:
                body, ttl_ms, stale_ms, all_tags, _ = made
                writes.setdefault((stale_ms, all_tags), {})[reading.name] = (body, ttl_ms)
        stored: set[str] = set()
        ended: set[str] = set()
        look = readings[0].look
        try:
            for (stale_ms, all_tags), bodies in writes.items():
                write = Write(
                    {name: body for name, (body, _) in bodies.items()},
                    [ttl_ms for _, ttl_ms in bodies.values()],
                    stale_ms,
                    all_tags,
                )
                ended.update(bodies)
                outcome = self._store.fill(write, look)
                self._counters.add("refused", sum(not done for done in outcome.values()))
                stored.update(keys[name] for name, done in outcome.items() if done)
            if left := [reading.name for reading in readings if reading.name not in ended]:
                self._store.give_back(left, look)
        except UNAVAILABLE as error:
            self.keeper.orphaned(list(keys), look.token)
            self._reader.degraded("fill", error)
        finally:
            self._reader.changed(keys.values())
        if failure is not None:
            raise failure
        return stored

    # Loading

    def _loaded(self, request: Request, reading: Reading) -> Any:
        """Load what is missing, while others of this process may join."""
        flight = self._flights.open(request.key)
        try:
            return self._loaded_in_time(request, reading, flight)
        finally:  # whatever came in between: a flight that stays open would hold up every later miss
            self._flights.close(request.key, flight)
            flight.end()

    def _loaded_in_time(self, request: Request, reading: Reading, flight: Flight) -> Any:
        limit_ms = request.policy.hard_timeout_ms
        if limit_ms is None:
            return self._load_and_fill(request, reading, flight)[0]
        job = self._timed.start(lambda: self._load_and_fill(request, reading, flight)[0])
        if job is not None and job.wait(limit_ms / 1_000):
            return job.result()
        if job is not None:
            job.abandon(f"the load of {request.key!r}")
        # Let others load: this one may hang for ever. If it ends after all, its value is refused, not stored.
        self.keeper.forget(reading.look.token)
        self._flights.close(request.key, flight)
        self._give_back(reading)
        self._counters.add("load_timeouts")
        raise LoadTimedOut(request.key, limit_ms, too_many=job is None)

    def _refreshed(self, request: Request, reading: Reading, value: Any) -> Any:
        """Load anew what is there: stale, or fresh and soon no longer. Returns the new value, or the one there is."""
        policy = request.policy
        if policy.refresh != "inline":
            if not self._elsewhere(request, reading):
                self._give_back(reading)
            return value
        self._counters.add("refreshes")
        limits = [ms for ms in (policy.soft_timeout_ms, policy.hard_timeout_ms) if ms is not None]
        try:
            if not limits:
                return self._load_and_fill(request, reading, None)[0]
            job = self._timed.start(lambda: self._load_and_fill(request, reading, None)[0])
            if job is None:
                self._give_back(reading)
            elif job.wait(min(limits) / 1_000):
                return job.result()
            else:
                job.abandon(f"the load of {request.key!r}")
                if min(limits) == policy.hard_timeout_ms:  # others may load, once the pause is over
                    self.keeper.forget(reading.look.token)
                    self._end([reading.name], reading, policy.retry_after_ms)
        except Exception as error:
            if policy.exception_ttl_ms(error) is not None or isinstance(error, ValueNotCacheable | LoaderRecursion):
                raise
            logger.warning("loader of %r failed; the value that there is is served", request.key, exc_info=True)
            return value
        self._counters.add("load_timeouts")
        return value

    def _elsewhere(self, request: Request, reading: Reading) -> bool:
        """Have a refresh run by the refresher, or in a thread. Returns whether one of them took it."""
        refresher = request.policy.refresh
        if callable(refresher) and request.call is not None:
            try:
                if refresher(Refresh(request.key, reading.look.token, *request.call)):
                    self._counters.add("refreshes")
                    return True
            except Exception as error:  # noqa: BLE001 - whatever it was: it did not take it
                logger.warning("%r did not take the refresh of %r (%s)", refresher, request.key, error)

        def job() -> None:
            _loading.set(())  # nobody waits for this thread, so it cannot wait for itself
            try:
                self._load_and_fill(request, reading, None)
            except Exception:
                logger.warning("refresh of %r failed", request.key, exc_info=True)

        if self._refreshing.start(job) is None:
            return False
        self._counters.add("refreshes")
        return True

    def _early_due(self, reading: Reading, policy: Policy) -> bool:
        body = reading.entry.body if reading.entry else None
        if body is None or policy.early is None:
            return False
        return policies.early_due(
            policy.early,
            fresh_left_ms=entries.fresh_left_ms(reading.entry, reading.look.left_ms),
            ttl_ms=body.ttl_ms,
            load_ms=body.load_ms,
            chance=random.random(),
        )

    def _early(self, request: Request, name: str, value: Any) -> Any:
        """Refresh a fresh value, if nobody does already."""
        reading = self._look(request, name, Take.ALWAYS, near=False)
        if reading is None or not reading.leased:
            return value
        return self._refreshed(request, reading, value)

    def _unstored(self, request: Request) -> Any:
        """Load for this caller alone."""
        self._counters.add("misses")
        limit_ms = request.policy.hard_timeout_ms
        if limit_ms is None:
            return _plain_value(self._load(request.key, request.loader)[0])
        job = self._timed.start(lambda: self._load(request.key, request.loader)[0])
        if job is not None and job.wait(limit_ms / 1_000):
            return _plain_value(job.result())
        if job is not None:
            job.abandon(f"the load of {request.key!r}")
        self._counters.add("load_timeouts")
        raise LoadTimedOut(request.key, limit_ms, too_many=job is None)

    def _load_and_fill(
        self, request: Request, reading: Reading, flight: Flight | None, *, pause: bool = True
    ) -> tuple[Any, bool]:
        """Load under the lease, store it, and bring the flight home. Returns the value, and whether it was stored.

        Arguments:
            pause: whether a loader that fails is left alone for a while, because there is a value that is served.
        """
        brought: Maker | None = None
        try:
            try:
                with self.keeper.keeping([reading.name], reading.look.token, _most_s(request.policy)):
                    loaded, load_ms = self._load(request.key, request.loader)
            except BaseException as error:
                self._failed(request, reading, error, pause=pause)
                raise
            if flight is not None:
                self._flights.close(request.key, flight)
            try:
                brought = self._fill(request, reading, loaded, load_ms)
            except BaseException:
                self._give_back(reading)
                raise
            return _plain_value(loaded), brought is not None
        finally:
            if flight is not None:
                self._flights.close(request.key, flight)
                flight.land(brought)

    def _load(self, key: str, loader: Callable[[], Any]) -> tuple[Any, int]:
        """The loader's value, and how many milliseconds it took."""
        with self.not_twice([key]):
            return self._timed_call(loader)

    def _timed_call(self, loader: Callable[[], T]) -> tuple[T, int]:
        started = time.perf_counter()
        try:
            loaded = loader()
            if inspect.iscoroutine(loaded):
                loaded.close()
                raise TypeError("the loader is an async function; give one that returns the value itself")
        except Exception:
            self._counters.add("load_errors")
            raise
        load_ms = int((time.perf_counter() - started) * 1_000)
        self._counters.add("loads")
        self._counters.add("load_ms", load_ms)
        return loaded, load_ms

    def _load_many(
        self, keys: list[str], loader: Callable[[list[str]], Mapping[str, Any]]
    ) -> tuple[Mapping[str, Any], int]:
        with self.not_twice(keys):
            values, load_ms = self._timed_call(lambda: loader(list(keys)))
        if not isinstance(values, Mapping):
            raise TypeError(f"the loader of several keys must return a dict of their values, not {values!r:.100}")
        return values, load_ms

    def _loaded_many(
        self,
        groups: Sequence[Sequence[Reading]],
        loader: Callable[[list[str]], Mapping[str, Any]],
        policy: Policy,
        tags: Sequence[str],
        stale: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Load what several looks have leased in one call, and store it."""
        keys = [reading.key for group in groups for reading in group]
        try:
            with self._keeping_all(groups):
                values, load_ms = self._load_many(keys, loader)
        except BaseException as error:
            pause_ms = policy.retry_after_ms if isinstance(error, Exception) else 0
            for group in groups:
                kept = [reading for reading in group if reading.key in stale]
                for those, ms in ((kept, pause_ms), ([r for r in group if r.key not in stale], 0)):
                    if those:
                        self._end([reading.name for reading in those], those[0], ms)
            if isinstance(error, Exception) and all(key in stale for key in keys):
                logger.warning("loader of %r failed; the values that there are are served", keys, exc_info=True)
                return {}
            raise
        failure: Exception | None = None
        for group in groups:
            try:
                self.fill_many(group, values, policy, tags, load_ms)
            except Exception as error:  # noqa: BLE001 - it is raised when the other groups have been stored
                failure = failure or error
        if failure is not None:
            raise failure
        return {key: _plain_value(values[key]) for key in keys if key in values}

    @contextmanager
    def _keeping_all(self, groups: Sequence[Sequence[Reading]]) -> Iterator[None]:
        if not groups:
            yield
            return
        first, *rest = groups
        with (
            self.keeper.keeping([reading.name for reading in first], first[0].look.token),
            self._keeping_all(rest),
        ):
            yield

    # Storing

    def _fill(self, request: Request, reading: Reading, loaded: Any, load_ms: int) -> Maker | None:
        """Store what a load gave. Returns what makes its value again, or None when it was not stored."""
        made = self._packed(reading, loaded, request.policy, request.tags, load_ms)
        if made is None:
            self._give_back(reading)
            return None
        body, ttl_ms, stale_ms, tags, make = made
        return make if self._stored(reading, Write({reading.name: body}, [ttl_ms], stale_ms, tags)) else None

    def _stored(self, reading: Reading, write: Write) -> bool:
        try:
            stored = self._store.fill(write, reading.look)
        except UNAVAILABLE as error:
            self.keeper.orphaned([reading.name], reading.look.token)
            self._reader.degraded("fill", error)
            return False
        finally:
            self._reader.changed([reading.key])
        if not stored[reading.name]:
            self._counters.add("refused")
        return stored[reading.name]

    def _packed(
        self, reading: Reading, loaded: Any, policy: Policy, tags: Sequence[str], load_ms: int
    ) -> tuple[bytes, int, int, tuple[str, ...], Maker] | None:
        """A loaded value as it is stored: its body, for how long, stale for how long, its tags, and what makes it
        again.

        None for what is not to be stored. Raises ``ValueNotCacheable``, after the lease has been given back.
        """
        try:
            said = loaded if isinstance(loaded, Loaded) else Loaded(loaded)
            value = said.value
            if not said.store or value is MISS or (policy.when is not None and not policy.when(value)):
                return None
            ttl_ms, stale_ms = policy.ttls_ms(value)
            changed = Policy(ttl_ms, stale_ms=stale_ms).changed(
                {name: given for name, given in (("ttl", said.ttl), ("stale", said.stale)) if given is not None}
            )
            ttl_ms, stale_ms = changed.ttls_ms(value)
            all_tags = tuple(dict.fromkeys((*tags, *said.tags)))
            if said.tags:
                all_tags = checked_tags(all_tags, self._keys)
            ttl_ms = entries.jittered(ttl_ms, random.random())
            if self._remembered.any and self._remembered.covers(reading.key, all_tags):
                return None
            body, make = self.body(
                reading.key,
                reading.name,
                value,
                all_tags,
                policy.type,
                ttl_ms=ttl_ms,
                load_ms=load_ms,
                countable=policy.early is None,
            )
        except ValueTooLarge as error:
            logger.warning("the value of %r is not cached: %s", reading.key, error)
            return None
        except Undecodable as error:
            logger.warning(
                "the value of %r is not cached: it is no %r (%s); give the type that it is",
                reading.key,
                policy.type,
                error,
            )
            return None
        except BaseException:
            self._give_back(reading)
            raise
        return body, ttl_ms + stale_ms, stale_ms, all_tags, make

    def body(
        self,
        key: str,
        name: str,
        value: Any,
        tags: Sequence[str],
        type: Any = Any,
        *,
        ttl_ms: int,
        load_ms: int = 0,
        countable: bool = True,
    ) -> tuple[bytes, Maker]:
        """The body of an entry, and what makes its value again.

        Arguments:
            countable: whether a whole number without tags is stored so that ``incr`` can add to it, which leaves no
                room for what it cost to load.

        Raises ``ValueNotCacheable``, ``ValueTooLarge``, and ``Undecodable`` for a value that is not of its type.
        """
        countable = countable and not tags and (type is Any or type is int)
        if countable and (counter := entries.encode_counter(value)) is not None:
            return counter, lambda type: value if type is Any or type is int else self._repacked(value, name, type)
        try:
            if value is MISS:
                raise NotEncodable("MISS stands for what is not cached")
            how, packed = self._codec.pack(value, name)
        except NotEncodable as error:
            raise ValueNotCacheable(key, value, error) from None
        if type is not Any:
            self._codec.unpack(how, packed, name, type)
        body = entries.encode(
            how,
            packed,
            created_ms=int(time.time() * 1_000),
            ttl_ms=ttl_ms,
            load_ms=load_ms,
            tags=tags,
        )
        return body, lambda type: self._codec.unpack(how, packed, name, type)

    def _repacked(self, value: Any, name: str, type: Any) -> Any:
        return self._codec.unpack(*self._codec.pack(value, name), name, type)

    # Failing

    def _failed(self, request: Request, reading: Reading, error: BaseException, *, pause: bool) -> None:
        """A load raised: cache the exception where asked, or end the lease, with a pause where a value is left."""
        ttl_ms = request.policy.exception_ttl_ms(error)
        if ttl_ms is not None:
            ttl_ms = entries.jittered(ttl_ms, random.random())
            try:
                described = exceptions.described(error)
                body, _ = self.body(reading.key, reading.name, described, request.tags, ttl_ms=ttl_ms)
            except (ValueNotCacheable, ValueTooLarge, TypeError) as why:
                logger.warning("the exception of %r is not cached: %s", request.key, why)
            else:
                self._stored(reading, Write({reading.name: body}, [ttl_ms], tags=request.tags, raised=True))
                return
        pause = pause and reading.freshness is not Freshness.GONE
        pause = pause and isinstance(error, Exception) and not isinstance(error, LoaderRecursion)
        self._end([reading.name], reading, request.policy.retry_after_ms if pause else 0)

    def _give_back(self, reading: Reading) -> None:
        self._end([reading.name], reading, 0)

    def _end(self, names: Sequence[str], reading: Reading, pause_ms: int) -> None:
        try:
            self._store.give_back(names, reading.look, pause_ms=pause_ms)
        except UNAVAILABLE as error:
            self._counters.add("errors")  # also in a strict cache: it will be given back, or run out
            self.keeper.orphaned(names, reading.look.token)
            logger.debug("a lease was not given back: %s", error)

    # Judging

    def _look(
        self, request: Request, name: str, take: Take, token: str = "", *, plain: bool = False, near: bool = True
    ) -> Reading | None:
        if not token:
            return self._reader.look_one(request.key, name, request.tags, take, plain=plain, near=near)
        readings = self._reader.look([request.key], [name], request.tags, take, token, near=near)
        return readings[0] if readings else None

    def _outcome(self, reading: Reading, policy: Policy) -> tuple[Freshness, Any]:
        """What a reading brings. Raises a cached exception; what cannot be read is gone."""
        if reading.freshness is Freshness.GONE:
            return Freshness.GONE, MISS
        try:
            if not reading.raised:
                return reading.freshness, self._reader.value(reading, policy.type, early_ms=_early_ms(reading, policy))
            name, arguments = self._reader.value(reading, tuple[str, list[Any]])
        except Undecodable:
            return Freshness.GONE, MISS
        error = exceptions.rebuilt(name, arguments, [kind for kind, _ in policy.exceptions])
        if error is None:
            return Freshness.GONE, MISS  # of a kind that this caller does not expect
        self._counters.add("hits")
        raise error

    def _outcome_or_gone(self, reading: Reading, policy: Policy) -> tuple[Freshness, Any]:
        """As ``_outcome``; of several keys, one's exception must not take the others' values away."""
        return (Freshness.GONE, MISS) if reading.raised else self._outcome(reading, policy)

    def _left_to_wait_s(self, request: Request, started: float) -> float:
        """How much longer a caller waits for another's load. Raises ``LoadTimedOut`` after its hard timeout."""
        self._refuse_recursion(request.key)
        policy = request.policy
        waited_s = time.monotonic() - started
        if policy.hard_timeout_ms is not None and waited_s * 1_000 >= policy.hard_timeout_ms:
            self._counters.add("load_timeouts")
            raise LoadTimedOut(request.key, policy.hard_timeout_ms)
        wait_ms = self._lease_ms * _MOST_LEASES if policy.wait_ms is None else policy.wait_ms
        left_s = wait_ms / 1_000 - waited_s
        return left_s if policy.hard_timeout_ms is None else min(left_s, policy.hard_timeout_ms / 1_000 - waited_s)

    @contextmanager
    def not_twice(self, keys: Sequence[str]) -> Iterator[None]:
        """Notes that keys are being loaded, and refuses to load them inside their own load."""
        for key in keys:
            self._refuse_recursion(key)
        before = _loading.set((*_loading.get(), *((id(self), key) for key in keys)))
        try:
            yield
        finally:
            _loading.reset(before)

    def _refuse_recursion(self, key: str) -> None:
        if (id(self), key) in _loading.get():
            raise LoaderRecursion(key)


def _most_s(policy: Policy) -> float:
    """How long a load is waited for at all."""
    return math.inf if policy.hard_timeout_ms is None else policy.hard_timeout_ms / 1_000


def _early_ms(reading: Reading, policy: Policy) -> int:
    body = reading.entry.body if reading.entry else None
    if body is None or policy.early is None:
        return 0
    return policies.longest_early_ms(policy.early, ttl_ms=body.ttl_ms, load_ms=body.load_ms)


def checked_tags(tags: Iterable[str], keys: CacheKeys) -> tuple[str, ...]:
    """Tags as they were given. Refuses what are none, or too many."""
    if isinstance(tags, str):
        raise TypeError(f"tags must be several, such as [{tags!r}], not the text {tags!r}")
    tags = tuple(tags)  # of our own: a list may be changed while a thread loads
    if len(tags) > entries.MOST_TAGS:
        raise ValueError(f"an entry may have {entries.MOST_TAGS} tags, not {len(tags)}")
    for tag in tags:
        if type(tag) is not str or not tag or len(tag) > key_names.LONGEST_NAME_BYTES or not tag.isascii():
            keys.tag(tag)  # says what is wrong with it
    return tags


def _plain_value(loaded: Any) -> Any:
    return loaded.value if isinstance(loaded, Loaded) else loaded


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain_value(value) for key, value in values.items()}


def _one_of_many(loader: Callable[[list[str]], Mapping[str, Any]], key: str) -> Any:
    return loader([key]).get(key, MISS)
