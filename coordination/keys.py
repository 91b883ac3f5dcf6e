"""The only place in this package that spells the names of Redis keys. Pure. Form: see ``cachelib.keys``."""

from collections.abc import Sequence

from ..cachelib.keys import LAYOUT, escaped, escaped_name, unescaped


class RateKeys:
    """The keys of the callers of one limiter: whether a caller is blocked, then the state of each limit."""

    __slots__ = ("_ends", "_prefix")

    def __init__(self, limiter: str, parts: Sequence[str]) -> None:
        self._prefix = f"{LAYOUT}:rate:{{{escaped_name(limiter, 'limiter')}:"
        self._ends = [f"}}:{part}".encode() for part in ("block", *parts)]

    def of(self, key: str) -> list[bytes]:
        """The keys of one caller."""
        caller = (self._prefix + escaped(key)).encode()
        return [caller + end for end in self._ends]


def rate_part(kind: str, period_us: int, name: str | None) -> str:
    """What tells the states of a caller's limits apart: kind and period, such as ``g60s``, or kind and name."""
    if name is not None:
        return f"{kind}.{escaped_name(name)}"
    return kind if kind == "c" else f"{kind}{period_us // 1_000_000}s"


def flight_namespace(flight: str) -> str:
    """The namespace of the cache that a single flight keeps its values in."""
    return f"flight:{flight}"


def throttle_limiter(throttle: str) -> str:
    """The name of the limiter that a throttle asks."""
    return f"throttle:{throttle}"


def debounced(debounce: str, key: str) -> str:
    """The calls of one debounced key that may still run: a sorted set of claims, by when they are due."""
    return f"{LAYOUT}:debounce:{{{escaped_name(debounce, 'debounce')}:{escaped(key)}}}"


def turn(kind: str, name: str) -> str:
    """Who holds units of something, and what is known of those who wait: a hash."""
    return f"{LAYOUT}:turn:{{{escaped_name(kind, 'kind')}:{escaped(name, 'name')}}}"


def needs_no_fence(turn: str) -> bool:
    """Whether it is the permit of calls that are the same: of those there is one state for each key, and no end."""
    return turn.startswith(_WITHOUT_FENCE)


_WITHOUT_FENCE = tuple(turn(kind, "*").partition("*")[0] for kind in ("memo", "unique"))


def turns_matching(kind: str, pattern: str) -> str:
    """A pattern for SCAN that finds the hashes of ``turn``."""
    return turn(kind, pattern)


def turn_name(key: str) -> str:
    """The name of what such a hash is about."""
    return unescaped(key[key.index(":", key.index("{")) + 1 : -1])


def turn_queue(turn: str) -> str:
    """Those who wait, in their order: a sorted set of tokens."""
    return f"{turn}:queue"


def granted(process: str) -> str:
    """The channel on which one process hears that it was granted what it waits for. No key: nothing is stored."""
    return f"{LAYOUT}:granted:{process}"


def barrier(name: str) -> str:
    """The state of a barrier: for how many it waits, and what is known of each that waits: a hash."""
    return f"{LAYOUT}:barrier:{{{escaped(name, 'name')}}}"


def barrier_arrived(barrier: str) -> str:
    """Those who wait, in the order in which they came: a sorted set of tokens."""
    return f"{barrier}:arrived"


def barrier_opened(barrier: str) -> str:
    """Those whom the barrier let pass lately, for who has not heard of it: a sorted set of tokens."""
    return f"{barrier}:opened"


def fenced(store: str, key: str) -> str:
    """A value that only the latest hold can change, and its fence: a hash."""
    return f"{LAYOUT}:fenced:{{{escaped_name(store, 'store')}:{escaped(key)}}}"


class ParkingKeys:
    """The keys of all tasks of one namespace that are parked, or run."""

    __slots__ = ("due", "gates", "namespace", "parked", "waits", "woken")

    def __init__(self, namespace: str) -> None:
        self.namespace = escaped_name(namespace, "namespace")
        self.parked = _parked(self.namespace)
        """What is to be sent when a task is woken, by its id: a hash."""
        self.waits = f"{self.parked}:waits"
        """Where each waits: a hash."""
        self.due = f"{self.parked}:due"
        """When a line, or a task, is to be looked at: a sorted set."""
        self.woken = f"{self.parked}:woken"
        """Those to be sent: a sorted set."""
        self.gates = f"{self.parked}:gates"
        """The gate of each line in which anybody waits: a hash."""

    def run(self, token: str) -> str:
        """Says that an attempt of a task runs, and where, while it does."""
        return f"{LAYOUT}:run:{{{self.namespace}}}:{escaped(token)}"

    def line(self, state: str) -> str:
        """Those of this namespace that wait at a gate: a sorted set of ids. Another namespace has a line of its own."""
        return f"{state}{self._line}"

    def order(self, state: str) -> str:
        """In which order those keys come that wait at a gate: a hash."""
        return f"{state}:order:{self.namespace}"

    def wakes(self, state: str) -> str:
        """The state of a rate as it will be when all that were woken have come."""
        return f"{state}:wakes:{self.namespace}"

    def state_of(self, line: str) -> str:
        """The state of the gate at which those in a line wait."""
        return line.removesuffix(self._line)

    @property
    def _line(self) -> str:
        return f":parked:{self.namespace}"

    @property
    def channel(self) -> str:
        """On which is said that a line or a task is due. No key: nothing is stored."""
        return granted(f"parked.{self.namespace}")


def _parked(namespace: str) -> str:
    return f"{LAYOUT}:parked:{{{namespace}}}"


PARKED_MATCHING = _parked("*")
"""A pattern for SCAN that finds the hashes of parked tasks."""


def parked_namespace(parked: str) -> str:
    """The namespace of such a hash."""
    return unescaped(parked[parked.index("{") + 1 : -1])


def debounced_task(task: str, key: str) -> str:
    """The gate at which the calls of a task that are debounced wait for a pause. Nothing is stored under this name."""
    return f"{LAYOUT}:pause:{{{escaped_name(task, 'task')}:{escaped(key)}}}"


def claim(namespace: str, key: str) -> str:
    """Which of those calls has been sent that are the same, where one is to be sent: the id of that call."""
    return f"{LAYOUT}:claim:{{{escaped_name(namespace, 'namespace')}}}:{escaped(key)}"
