"""What an entry takes in Redis: MEMORY USAGE of all that 1,000 of the small values leave behind, for one of them."""

from typing import NamedTuple

import redis

from .caches import peers_on
from .peers import Server
from .workload import WARM, Operation


class Taken(NamedTuple):
    """The memory that one entry takes."""

    who: str
    bytes: int


def measure_memory(server: Server) -> list[Taken]:
    """Measure every peer on an empty server. Everything that is in it goes."""
    found = []
    with peers_on(server) as peers, redis.Redis(server.host, server.port) as client:
        for peer in peers:
            if Operation.WARM not in peer.calls:
                continue
            client.flushall()
            peer.run(peer.calls[Operation.WARM])
            taken = sum(client.memory_usage(key, samples=0) or 0 for key in client.scan_iter(count=1_000))
            found.append(Taken(peer.name, round(taken / len(WARM))))
        client.flushall()
    return sorted(found, key=lambda taken: taken.bytes)
