"""A client that sends each command to the node of a cluster which has its key, over a ``ThreadClient`` per node.

A command that a node has refused to carry out and redirected is sent again; no other is.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import redis
from redis.client import Pipeline
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError
from redis.exceptions import ConnectionError as RedisConnectionError

from .circuit import LOST, UNAVAILABLE, Circuits
from .client import ThreadClient
from .forks import renew_after_fork

Node = tuple[str, int]
"""Host and port."""

_REDIRECTIONS = 5
"""How often a command follows where it is sent."""

_LOOK_S = 0.5
_RENEW_S = 30.0
"""So often it is looked who is in a cluster: who has never heard of a replica would not find it as the successor."""
_LOOKS = 2
"""How many nodes are asked, at most, who has which slot: each may let the caller wait as long as a command."""


class SlotMap:
    """Which node of a cluster has which slot, as far as is known. Shared by the clients of all profiles.

    Answers are taken from it without a lock: it is replaced as a whole, or one slot at a time.
    """

    def __init__(self, seeds: Sequence[Node]) -> None:
        self.seeds = tuple(seeds)
        self.primaries: tuple[Node, ...] = ()
        self.nodes: tuple[Node, ...] = ()
        """Primaries and replicas."""
        self.asked_s = 0.0
        self.looking = threading.Lock()
        self._owners: list[Node | None] = []
        renew_after_fork(self)

    @property
    def known(self) -> bool:
        """Whether any cluster has told it yet."""
        return bool(self._owners)

    def owner(self, slot: int) -> Node | None:
        """The primary that has a slot; ``None`` where nobody has it."""
        return self._owners[slot]

    def moved(self, slot: int, node: Node) -> None:
        """A node has told where a slot is now."""
        self._owners[slot] = node

    def learn(self, reply: Sequence[Any], asked: Node) -> None:
        """Take over the reply to CLUSTER SLOTS. A node that does not know its own name is the one that was asked."""
        owners: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        primaries: dict[Node, None] = {}
        nodes: dict[Node, None] = {}
        for first, last, *holders in reply:
            found = [_node(holder, asked) for holder in holders]
            primaries[found[0]] = None
            nodes |= dict.fromkeys(found)
            owners[int(first) : int(last) + 1] = [found[0]] * (int(last) + 1 - int(first))
        self._owners, self.primaries, self.nodes = owners, tuple(primaries), tuple(nodes)

    def renew_after_fork(self) -> None:
        """Make the lock anew."""
        self.looking = threading.Lock()


class ClusterClient(redis.Redis):
    """A client that sends each command to the node which has its key, over a ``ThreadClient`` per node.

    All keys of a command, and of a transaction, are in one slot; the server refuses others. A command that was
    redirected (MOVED, ASK) was not carried out, and follows. When a node does not answer, the command fails within
    the profile's times, and the nodes that do are asked who has its slots now: by one thread, at most twice a second.

    A command without a key goes to any primary; ``scan_iter`` goes over all.
    """

    def __init__(self, slots: SlotMap, client_of: Callable[[Node], ThreadClient], circuits: Circuits | None) -> None:
        host, port = slots.seeds[0]
        super().__init__(host=host, port=port)
        self._slots = slots
        self._client_of = client_of
        self._circuits = circuits
        self._clients: dict[Node, ThreadClient] = {}

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """Send one command to the node that has its key and return its reply. Raises redis-py's errors."""
        slot = slot_of(arguments)
        node = self.owner(slot)
        asking = False
        for _ in range(_REDIRECTIONS):
            client = self.node_client(node)
            try:
                if asking:
                    client.execute_command("ASKING")
                return client.execute_command(*arguments, **options)
            except AskError as error:  # or MOVED
                node, asking = self.redirected(error, node), not isinstance(error, MovedError)
            except (*LOST, ClusterDownError):
                self.look_again(avoiding=node)
                raise
        raise RedisConnectionError(
            f"{arguments[0]} was redirected {_REDIRECTIONS} times, last to {named(node)}; its slot is being moved"
        )

    def node_client(self, node: Node) -> ThreadClient:
        """The client of one node."""
        known = self._clients.get(node)
        return known or self._clients.setdefault(node, self._client_of(node))

    def primaries(self) -> list[ThreadClient]:
        """The clients of all primaries, after a look at who they are."""
        self.owner(None)
        self.look_again()
        return [self.node_client(node) for node in self._slots.primaries]

    def scan_iter(
        self, match: Any = None, count: int | None = None, _type: Any = None, **options: Any
    ) -> Iterator[Any]:
        """The keys of every primary, one after another."""
        for client in self.primaries():
            yield from client.scan_iter(match=match, count=count, _type=_type, **options)

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> "Pipeline":
        """Commands that are sent together: to one node in a transaction, else to each node its own."""
        return _ClusterPipeline(self, transaction, shard_hint)

    def pubsub(self, **options: Any) -> Any:
        """Subscriptions at any primary: a cluster hands messages on to all."""
        return self.node_client(self.owner(None)).pubsub(**options)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Close the clients of all nodes."""
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()
        super().close()

    def owner(self, slot: int | None) -> Node:
        """The primary that has a slot, or any. The first question looks the cluster up."""
        slots = self._slots
        if not slots.known:
            self._look_up(slots.seeds)
        elif time.monotonic() - slots.asked_s > _RENEW_S:
            self.look_again()
        node = random.choice(slots.primaries) if slot is None else slots.owner(slot)
        if node is None:
            self.look_again()
            raise ClusterDownError(f"no node of the cluster has slot {slot}")
        return node

    def redirected(self, error: AskError, asked: Node) -> Node:
        """Where a node sends a command; remembered if the slot has moved for good."""
        node = (error.host or asked[0], error.port)
        if isinstance(error, MovedError):
            self._slots.moved(error.slot_id, node)
            self.look_again()
        return node

    def look_again(self, avoiding: Node | None = None) -> None:
        """Look the cluster up, unless somebody does or just did."""
        slots = self._slots
        if time.monotonic() - slots.asked_s < _LOOK_S or not slots.looking.acquire(blocking=False):
            return
        try:
            slots.asked_s = time.monotonic()
            others = [node for node in {*slots.nodes, *slots.seeds} if node != avoiding]
            random.shuffle(others)
            try:
                self._look_up(others[:_LOOKS])
            except UNAVAILABLE:  # what is known stays; the next one looks again
                return
        finally:
            slots.looking.release()

    def _look_up(self, nodes: Sequence[Node]) -> None:
        """Ask one node after another who has which slot. Raises what the last one said when none tells."""
        failure: BaseException = RedisConnectionError("no other node of the cluster is known")
        for node in nodes:
            try:
                reply = self.node_client(node).execute_command("CLUSTER SLOTS")
            except UNAVAILABLE as error:
                failure = error
                continue
            if reply:
                self._slots.asked_s = time.monotonic()
                self._slots.learn(reply, node)
                self._forget_others()
                return
            failure = ClusterDownError(f"{named(node)} knows of no node that has slots")
        raise failure

    def _forget_others(self) -> None:
        """Clients of nodes that are gone; the connections end when nobody uses them."""
        kept = {*self._slots.nodes, *self._slots.seeds}
        for gone in self._clients.keys() - kept:
            self._clients.pop(gone, None)
        if self._circuits:
            self._circuits.keep(named(node) for node in kept)


class _ClusterPipeline(Pipeline):
    """Collects commands, and hands them to pipelines of the nodes that have their keys."""

    def __init__(self, cluster: ClusterClient, transaction: bool, shard_hint: Any) -> None:
        super().__init__(cluster.connection_pool, cluster.response_callbacks, transaction, shard_hint)
        self._cluster = cluster
        self._together = transaction

    def immediate_execute_command(self, *arguments: Any, **_: Any) -> Any:
        """Refused: WATCH needs a connection before the keys are known."""
        raise NotImplementedError(f"{arguments[0]} in a pipeline is not possible on a cluster; use a script")

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send all, and return the replies in the order of the commands."""
        commands, self.command_stack = self.command_stack, []
        groups: dict[Node, list[int]] = {}
        if self._together and commands:
            slots = {slot for arguments, _ in commands if (slot := slot_of(arguments)) is not None}
            groups[self._cluster.owner(min(slots, default=None))] = list(range(len(commands)))
        else:
            for position, (arguments, _) in enumerate(commands):
                groups.setdefault(self._cluster.owner(slot_of(arguments)), []).append(position)
        replies: list[Any] = [None] * len(commands)
        for node, positions in groups.items():
            pipeline = self._cluster.node_client(node).pipeline(transaction=self._together)
            for position in positions:
                arguments, options = commands[position]
                pipeline.execute_command(*arguments, **options)
            try:
                found = pipeline.execute(raise_on_error=False)
            except (*LOST, ClusterDownError):
                self._cluster.look_again(avoiding=node)
                raise
            except AskError as error:
                self._cluster.redirected(error, node)
                raise
            for position, reply in zip(positions, found, strict=True):
                replies[position] = reply
                if isinstance(reply, AskError):
                    self._cluster.redirected(reply, node)
        if raise_on_error:
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        return replies


def slot_of(arguments: Sequence[Any]) -> int | None:
    """The slot of the first key of a command; ``None`` for a command without keys, which any node carries out."""
    name = arguments[0].upper()
    place = 1
    if name in _KEYS_COUNTED:
        place = 3 if int(arguments[2]) else len(arguments)
    elif name in _KEYS_AFTER_STREAMS:
        words = [word.upper() if isinstance(word, str) else word for word in arguments]
        place = words.index("STREAMS" if "STREAMS" in words else b"STREAMS") + 1
    elif name == "OBJECT":
        place = 2
    elif name.partition(" ")[0] in _KEYLESS:
        return None
    return slot_of_key(arguments[place]) if place < len(arguments) else None


def slot_of_key(key: Any) -> int:
    """The slot of a key: one of 16384, by its part in braces if it has one."""
    return key_slot(key if isinstance(key, bytes) else str(key).encode())


def named(node: Node) -> str:
    """``host:port``, as it stands in a URL."""
    host, port = node
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_KEYS_COUNTED = {"EVAL", "EVALSHA", "EVAL_RO", "EVALSHA_RO", "FCALL", "FCALL_RO"}
_KEYS_AFTER_STREAMS = {"XREAD", "XREADGROUP"}
_KEYLESS = {
    *(
        "ACL",
        "ASKING",
        "AUTH",
        "BGSAVE",
        "CLIENT",
        "CLUSTER",
        "COMMAND",
        "CONFIG",
        "DBSIZE",
        "DEBUG",
        "ECHO",
        "FLUSHALL",
    ),
    *("FLUSHDB", "FUNCTION", "HELLO", "INFO", "KEYS", "LATENCY", "PING", "PUBLISH", "PUBSUB", "RANDOMKEY", "READONLY"),
    *("ROLE", "SCAN", "SCRIPT", "SLOWLOG", "TIME", "WAIT"),
}


def _node(holder: Sequence[Any], asked: Node) -> Node:
    """Host and port out of CLUSTER SLOTS, where a host may be missing or ``?``."""
    host = holder[0].decode() if isinstance(holder[0], bytes) else holder[0]
    return (host if host and host != "?" else asked[0], int(holder[1]))
