"""What a lock costs that nobody else wants: taken and given back, beside the two round trips that it needs."""

from contextlib import ExitStack, closing
from uuid import uuid4

from .floor import Floor
from .lock_peers import LEASE_S, LOCKS, UNCONTENDED
from .measure import Call, Entrant, Measured, interleave, repeated
from .peers import Server

OPERATION = "acquire + release"

_DELETE_IF_OURS = """
if redis.call("GET", KEYS[1]) == ARGV[1] then return redis.call("DEL", KEYS[1]) end
return 0
"""


def measure_locks(server: Server) -> list[Measured]:
    """Measure a reused lock object of everybody."""
    with ExitStack() as stack:
        floor = stack.enter_context(closing(Floor(server.host, server.port)))
        two_round_trips = repeated(_two_round_trips(floor))
        entrants = []
        for who in UNCONTENDED:
            lock = LOCKS[who](stack, server)(uuid4().hex)

            def hold(lock=lock):  # type: ignore[no-untyped-def]
                with lock:
                    pass

            entrants.append(Entrant(OPERATION, who, repeated(hold), two_round_trips, 1))
        return interleave(entrants)


def _two_round_trips(floor: Floor) -> Call:
    key, token = f"floor:lock:{uuid4().hex}", uuid4().hex
    loaded = floor.call("SCRIPT", "LOAD", _DELETE_IF_OURS)()
    if not isinstance(loaded, bytes):
        raise RuntimeError(f"the server answered SCRIPT LOAD with {loaded!r}, not with the name of the script")
    take = floor.call("SET", key, token, "NX", "PX", str(LEASE_S * 1_000))
    give = floor.call("EVALSHA", loaded, "1", key, token)
    if (take(), give()) != (b"OK", 1):
        raise RuntimeError("the floor's lock was not taken and given back")

    def call() -> None:
        take()
        give()

    return call
