"""Who holds what, who waits, since when: for people, in one round trip each. Nothing is decided by it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from ..cachelib.connections import Connections
from . import keys
from .turn_store import Snapshot, TurnStore

Kind = Literal["lock", "semaphore", "readwrite"]

_HOLDS = re.compile(r"(\d+) \d+ (\d+) (\d+) \S+ (.*)", re.DOTALL)
_WAITS = re.compile(r"(\d+) \d+ (\d+) \S+ (.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Holder:
    """One that holds."""

    owner: str
    token: str
    fence: int
    permits: int
    held_for: float
    """Seconds since it was granted, by the server's clock; 0 where that was set back meanwhile."""
    lease_left: float
    """Seconds until its lease runs out, if it is not renewed."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """One that waits."""

    owner: str
    token: str
    permits: int
    waiting_for: float
    """Seconds since it came."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """All that is known at one moment; a thousand of each at most."""

    holders: tuple[Holder, ...]
    waiting: tuple[Waiting, ...]
    """In the order in which they are served."""
    last_fence: int
    permits: int | None
    """How many there are, where a number was set for all (``Semaphore.resize``)."""

    @property
    def held(self) -> bool:
        """Whether anybody holds it."""
        return bool(self.holders)


def inspect(store: TurnStore) -> Inspected:
    """What is known of one thing. Raises redis-py's errors."""
    return inspected(store.read())


def inspected(snapshot: Snapshot) -> Inspected:
    """A snapshot, as people read it. Leases that have run out hold nothing. Pure."""
    holders, waiting = [], []
    for field, text in snapshot.state.items():
        found = _HOLDS.fullmatch(text) if field.startswith("h") else None
        if found and int(found[3]) > snapshot.now_us:
            age_us, left_us = max(0, snapshot.now_us - int(found[2])), int(found[3]) - snapshot.now_us
            holders.append(Holder(found[4], field[1:], int(found[2]), int(found[1]), age_us / 1e6, left_us / 1e6))
    for token in snapshot.queue:
        found = _WAITS.fullmatch(snapshot.state.get(f"w{token}", ""))
        if found:
            since_us = max(0, snapshot.now_us - int(found[2]))
            waiting.append(Waiting(found[3], token, int(found[1]), since_us / 1e6))
    holders.sort(key=lambda holder: holder.fence)
    set_permits = snapshot.state.get("capacity")
    return Inspected(
        tuple(holders),
        tuple(waiting),
        int(float(snapshot.state.get("fence", 0))),
        int(set_permits) if set_permits else None,
    )


def names_held(redis: Connections, kind: Kind = "lock", pattern: str = "*") -> Iterator[str]:
    """The names of all that were held or waited for in the last two hours, by SCAN, in no order.

    Arguments:
        redis: from ``connect``.
        kind: of what.
        pattern: of the name, as SCAN takes it: ``"invoice:*"``.

    Raises redis-py's errors.
    """
    _check_kind(kind)
    seen: set[str] = set()
    for raw in redis.scan(keys.turns_matching(kind, pattern)):
        name = keys.turn_name(raw.decode())
        if name not in seen:
            seen.add(name)
            yield name


def inspect_named(redis: Connections, kind: Kind, name: str) -> Inspected:
    """What is known of one, by its name alone. Raises redis-py's errors."""
    return inspect(_store_of(redis, kind, name, 1))


def force_release_named(redis: Connections, kind: Kind, name: str) -> int:
    """Take one from whoever holds it, by its name alone; see ``Lock.force_release``. Raises redis-py's errors.

    How many permits a semaphore has is known to those who use it: of those who wait as many are served at once as held
    it, the others as soon as one of its users does something.
    """
    known = inspect_named(redis, kind, name)
    in_use = sum(holder.permits for holder in known.holders)
    capacity = {"lock": 1, "readwrite": 1_000_000, "semaphore": max(1, in_use)}[kind]
    return _store_of(redis, kind, name, capacity).clear()


def _store_of(redis: Connections, kind: Kind, name: str, capacity: int) -> TurnStore:
    _check_kind(kind)
    return TurnStore(redis, kind, name, capacity)


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} is unknown; there are {', '.join(get_args(Kind))}")
