"""The cache's round trips: every operation of every peer, beside its floor."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .floor import Floor
from .measure import Entrant, Measured, interleave, repeated
from .peers import AWAITED, PLAIN, Peer, Server, cashews_near, petiole_near
from .workload import Operation, check

SLOW = {Operation.INVALIDATE: 11}
"""Operations whose preparation takes long, and how many rounds they get."""


@contextmanager
def peers_on(server: Server) -> Iterator[list[Peer]]:
    """All peers that have no near cache."""
    with asyncio.Runner() as runner, ExitStack() as stack:
        loop = runner.get_loop()
        peers = [make(server) for make in PLAIN] + [make(server, loop) for make in AWAITED]
        for peer in peers:
            stack.callback(peer.run, peer.close)
        yield peers


@contextmanager
def near_peers_on(server: Server) -> Iterator[list[Peer]]:
    """The peers that answer from their own process."""
    with asyncio.Runner() as runner, ExitStack() as stack:
        peers = [cashews_near(server, runner.get_loop())]
        if own := petiole_near(server):
            peers.insert(0, own)
        for peer in peers:
            stack.callback(peer.run, peer.close)
        yield peers


def measure_caches(server: Server) -> list[Measured]:
    """Measure what goes to the server, and then, by itself, what does not: its listeners hear every write."""
    with peers_on(server) as peers:
        measured = _measure(server, peers)
    with near_peers_on(server) as peers:
        return measured + _measure(server, peers)


def _measure(server: Server, peers: list[Peer]) -> list[Measured]:
    floor = Floor(server.host, server.port)
    floors = floor.of()
    entrants: dict[int | None, list[Entrant]] = {}
    for peer in peers:
        peer.run(peer.fill)
    for peer in peers:
        for operation, call in peer.calls.items():
            if operation in peer.prepare:
                peer.run(peer.prepare[operation])
            for _ in range(2):  # the first decorated call loads, the second one hits
                answer = peer.run(call)
            if peer.decodes:
                check(operation, peer.name, answer)
            entrant = Entrant(
                operation.value, peer.name, peer.slice(operation), repeated(floors[operation]), operation.items
            )
            entrants.setdefault(SLOW.get(operation), []).append(entrant)
    found = [
        measured
        for rounds, group in entrants.items()
        for measured in (interleave(group) if rounds is None else interleave(group, rounds))
    ]
    floor.close()
    order = [operation.value for operation in Operation]
    return sorted(found, key=lambda measured: order.index(measured.operation))
