"""What locks and semaphores say to Redis: one method per operation. The scripts are in ``lua/turn*.lua``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..cachelib.client import ThreadClient
from ..cachelib.cluster import ClusterClient
from ..cachelib.connections import Connections, Profile, require_connections
from ..cachelib.scripts import HOLE, Prepared, load
from . import keys

RENEWING = Profile("renewing", answer_s=0.5, connect_s=0.5)
"""For renewals: a lease must not run out because one of them waits for its answer."""

_MOST_SHOWN = 1_000
_MOST_PREPARED = 32


class Taken(NamedTuple):
    """How it stands after an attempt to take."""

    state: int
    """1: held. 0: not now. -1: never, there are not so many units."""
    fence: int
    ends_us: int
    """The end of the lease; where it is not held, of the first lease that runs out, 0 if there is none."""
    now_us: int
    """The server's clock."""
    ahead: int
    """How many wait before it."""
    queued_before: int
    """1 if it had its place in the queue before."""


class Snapshot(NamedTuple):
    """All that Redis knows of one thing at one moment; of those who wait a thousand."""

    now_us: int
    state: dict[str, str]
    queue: list[str]


def _taken(reply: list[int]) -> Taken:
    return Taken._make(reply)


def _snapshot(reply: list[Any]) -> Snapshot:
    now_us, state, queue = reply
    texts = [part.decode("utf-8", "replace") for part in state]
    fields = dict(zip(texts[::2], texts[1::2], strict=True))
    return Snapshot(int(now_us), fields, [token.decode() for token in queue])


_TAKE = load(__package__, "turn_take", _taken)
_GIVE = load(__package__, "turn_give", int)
_RENEW = load(__package__, "turns_renew", list)
_SHRINK = load(__package__, "turn_shrink", bool)
_READ = load(__package__, "turn_read", _snapshot)
_CLEAR = load(__package__, "turn_clear", int)
_RESIZE = load(__package__, "turn_resize", int)


class TurnStore:
    """One thing of which there are so many units. Every method is one round trip and raises redis-py's errors."""

    def __init__(self, redis: Connections, kind: str, name: str, capacity: int) -> None:
        require_connections(redis)
        self.redis = redis
        self.name = keys.turn(kind, name)
        self._queue = keys.turn_queue(self.name)
        self._capacity = capacity
        self._takes: dict[tuple[int, int, str, str], Prepared[Taken]] = {}
        self._give = _GIVE.prepared(state=self.name, queue=self._queue, token=HOLE, capacity=capacity)

    def __repr__(self) -> str:
        return f"<TurnStore {self.name}>"

    @property
    def slot(self) -> int:
        """The slot of its keys on a Cluster, else 0."""
        return self.redis.slot(self.name)

    def take(self, token: str, units: int, lease_ms: int, channel: str, label: str, least_fence: int = 0) -> Taken:
        """Take units, or a place in the queue; see ``turn_take.lua``. May be repeated with the same token."""
        prepared = self._takes.get((units, lease_ms, channel, label)) if not least_fence else None
        if prepared is None:
            prepared = _TAKE.prepared(
                state=self.name,
                queue=self._queue,
                token=HOLE,
                units=units,
                lease_ms=lease_ms,
                capacity=self._capacity,
                channel=channel,
                least_fence=least_fence,
                label=label,
            )
            if len(self._takes) >= _MOST_PREPARED:
                self._takes.clear()
            if not least_fence:
                self._takes[units, lease_ms, channel, label] = prepared
        return prepared(self._client, token.encode())

    def give(self, token: str, *, briefly: bool = False) -> bool:
        """Give back what a token holds, or its place. Whether it held until now. May be repeated.

        Arguments:
            briefly: wait for the answer no longer than for that of a renewal.
        """
        client = self.redis.client(RENEWING) if briefly else self._client
        return bool(self._give(client, token.encode()))

    def shrink(self, token: str, units: int) -> bool:
        """Give back all but so many of the units that a token holds. Whether it holds any. May be repeated."""
        return _SHRINK(
            self._client,
            state=self.name,
            queue=self._queue,
            token=token,
            capacity=self._capacity,
            units=units,
        )

    def read(self) -> Snapshot:
        """Who holds and who waits, a thousand of each at most."""
        return _READ(self._client, state=self.name, queue=self._queue, most=_MOST_SHOWN)

    def clear(self) -> int:
        """Take it from all who hold it; how many they were."""
        return _CLEAR(self._client, state=self.name, queue=self._queue, capacity=self._capacity)

    def resize(self, units: int) -> int:
        """Set how many units there are; 0: as many as each process says. How many are in use."""
        return _RESIZE(self._client, state=self.name, queue=self._queue, capacity=self._capacity, units=units)

    def confirm(self, replicas: int, timeout_ms: int) -> int:
        """How many replicas have what this thread has written."""
        client = self._client
        if isinstance(client, ClusterClient):
            client = client.node_client(client.owner(self.slot))
        return int(client.execute_command("WAIT", replicas, timeout_ms))

    @property
    def _client(self) -> Any:
        return self.redis.coordination


def renew(redis: Connections, holds: Sequence[tuple[str, str, int]]) -> list[bool]:
    """Prolong leases: state key, token and milliseconds of each; on a Cluster all in one slot. Which are still held."""
    names = [name for name, _, _ in holds]
    replies = _RENEW(
        redis.client(RENEWING),
        states=names,
        tokens=[token for _, token, _ in holds],
        leases_ms=[lease_ms for _, _, lease_ms in holds],
    )
    return [bool(reply) for reply in replies]


def server_of(redis: Connections, slot: int) -> object:
    """What tells servers apart: the node that has a slot, as far as is known. Asks nobody."""
    return redis.node(slot)


def node_of(redis: Connections, slot: int) -> ThreadClient:
    """The client of the server that has a slot. Raises redis-py's errors."""
    client: Any = redis.coordination
    if isinstance(client, ClusterClient):
        return client.node_client(client.owner(slot))
    return client  # type: ignore[no-any-return]
