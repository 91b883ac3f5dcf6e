"""What one decision of a rate limiter costs, beside one script call that decides, and the memory of one caller."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple
from uuid import uuid4

import redis

from .floor import Floor
from .limit_peers import GCRA, LIMITERS, Hit, Quota
from .measure import Entrant, Measured, interleave, repeated
from .memory import Taken
from .peers import Server

ALLOWED, DENIED = "one allowed", "one denied"

_NEVER_REACHED = Quota(10_000, 1)
_REACHED = Quota(100, 86_400)
_REMEMBERED = Quota(1_000, 3_600)
_HITS = 1_000
_CALLER = "caller:7"


class _Contestant(NamedTuple):
    operation: str
    who: str
    hit: Hit

    def check(self) -> None:
        """Who answers otherwise is measured doing something else. Raises ``RuntimeError``."""
        if self.hit(_CALLER) != (self.operation == ALLOWED):
            raise RuntimeError(f"{self.who} answered otherwise when {self.operation!r} was to be measured")


def measure_limits(server: Server, whose: Sequence[str] = (*LIMITERS,)) -> list[Measured]:
    """Measure a decision that allows, and one that denies."""
    with ExitStack() as stack:
        floor = stack.enter_context(closing(Floor(server.host, server.port)))
        floors = {ALLOWED: _floor(floor, _NEVER_REACHED), DENIED: _floor(floor, _REACHED)}
        contestants = []
        for who in whose:
            contestants.append(_Contestant(ALLOWED, who, LIMITERS[who](stack, server, _NEVER_REACHED)))
            contestants.append(_Contestant(DENIED, who, LIMITERS[who](stack, server, _REACHED)))
        contestants.append(_Contestant(ALLOWED, "the floor", floors[ALLOWED]))
        contestants.append(_Contestant(DENIED, "the floor", floors[DENIED]))
        for one in contestants:
            if one.operation == DENIED:
                _exhaust(one.hit)
            one.check()
        found = interleave(
            [
                Entrant(
                    one.operation,
                    one.who,
                    repeated(lambda hit=one.hit: hit(_CALLER)),  # type: ignore[misc]
                    repeated(lambda hit=floors[one.operation]: hit(_CALLER)),  # type: ignore[misc]
                    1,
                )
                for one in contestants
                if one.who in whose
            ]
        )
        for one in contestants:
            one.check()
        return found


def _floor(floor: Floor, quota: Quota) -> Hit:
    script = floor.call("SCRIPT", "LOAD", GCRA)()
    if not isinstance(script, bytes):
        raise RuntimeError(f"the server answered SCRIPT LOAD with {script!r}, not with the name of the script")
    call = floor.call("EVALSHA", script, "1", f"floor:rate:{quota}", str(quota.interval_us), str(quota.calls))
    return lambda _: call()[0] == 1


def _exhaust(hit: Hit) -> None:
    for _ in range(2 * _REACHED.calls):
        hit(_CALLER)


def measure_limit_memory(server: Server, whose: Sequence[str] = (*LIMITERS,)) -> list[Taken]:
    """What one caller more takes after 1,000 hits; what a limiter keeps once for all callers is not counted."""
    found = []
    with redis.Redis(server.host, server.port) as client:
        for who in whose:
            client.flushall()
            with ExitStack() as stack:
                hit = LIMITERS[who](stack, server, _REMEMBERED)
                hit(f"{uuid4().hex[:8]}:other")
                before = _taken(client)
                for _ in range(_HITS):
                    hit(_CALLER)
                found.append(Taken(who, _taken(client) - before))
        client.flushall()
    return found


def _taken(client: redis.Redis) -> int:
    return sum(client.memory_usage(key, samples=0) or 0 for key in client.scan_iter(count=1_000))
