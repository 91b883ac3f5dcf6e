"""The gates of a task: what must be free before it runs, and what becomes of a call for which it is not. Pure.

What a user writes (``lock="account:{account_id}"``, ``rate=["100/m", "{tenant}: 10/s"]``) is read once, when the
task is declared; ``Gates.of`` fills in the arguments of one call. All that Redis is told about a gate stands in
``GateCall``.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from inspect import Parameter, Signature
from typing import Any, Literal, NamedTuple, Self, get_args

import msgspec
from msgspec.structs import replace

from ..cachelib.durations import Duration, milliseconds
from ..cachelib.templates import key_template
from . import keys
from .rate_limit import RateLimit

WhenFull = Literal["reject", "drop_oldest", "drop_newest"]
OnConflict = Literal["join", "drop", "raise", "replace"]
Until = Literal["start", "end"]

_POLICIES: dict[str, str] = {"reject": "r", "drop_oldest": "o", "drop_newest": "n"}
_CONFLICTS: dict[str, tuple[int, str]] = {"join": (-1, "r"), "drop": (0, "n"), "raise": (0, "r"), "replace": (1, "l")}
"""How many may wait for the one that runs, and what becomes of one more."""
_KEYED_RATE = re.compile(r"(.*\{.*\}.*?)\s*:\s*([0-9]+/[0-9]*[smhd])", re.DOTALL)
_LARGEST = 1_000_000

EVERYBODY = "all"
"""The key of a rate that has none."""


@dataclass(frozen=True, slots=True)
class Rate:
    """How often a task may start.

    >>> Rate("10/s", key="{tenant}")
    >>> Rate(RateLimit.at_most("90000/m"), name="provider", cost="{tokens}")

    Arguments:
        limit: text as ``RateLimit`` reads it, or a ``RateLimit`` (a concurrent one is ``concurrency=``).
        key: what has a rate of its own: a template of the task's arguments. Default: the whole task.
        name: tasks with the same name share the rate; also a ``RateLimiter`` of that name with this limit, asked for
            the same key. Default: the task's name.
        cost: what one call counts for: a whole number, or a template that gives one. Default: 1, and ``settle`` leaves
            the rate alone.
    """

    limit: RateLimit | str
    key: str = ""
    name: str | None = None
    cost: int | str | None = None


@dataclass(frozen=True, slots=True)
class Concurrency:
    """How many may run at once.

    >>> Concurrency(5, key="{tenant}")

    Arguments:
        count: how many. ``Semaphore(redis, name, permits=count).resize(n)`` changes it while it is in use.
        key: what has permits of its own: a template. Default: the whole task.
        name: tasks with the same name share the permits; also a ``Semaphore`` with the name ``"name:key"``, or ``name``
            where there is no key. Default: the task's name.
    """

    count: int
    key: str = ""
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Unique:
    """Of calls that are the same, one.

    >>> Unique("{report_id}", until="end", on_conflict="join")

    Arguments:
        key: what makes calls the same: a template. Default: all arguments.
        until: ``start``: until it has started, one waits (others may come while it runs). ``end``: from when it is sent
            until it has ended, all its retries included. None: only while it runs. Or a duration, such as ``"10m"``:
            for so long after it was sent.
        on_conflict: what becomes of another call. ``join``: it ends when that one does, with its result; if that one
            fails, the next one runs. ``drop``: it ends at once, with None. ``raise``: ``DuplicateTask``, for the caller
            where he can be told, else as the failure of the task. ``replace``: it takes the place of the one that
            waits, which ends with None; what runs is left alone. So at most one runs and one waits, the newest: the
            last to be parked, which among calls that several workers take at once need not be the last that was sent.
    """

    key: str | None = None
    until: Until | Duration | None = None
    on_conflict: OnConflict = "join"


@dataclass(frozen=True, slots=True)
class Pause:
    """Runs once calls have paused, with the newest arguments; the others end with None.

    >>> Pause("5s", key="{user_id}", longest="1m")

    The newest are those of the last call to be parked, which among calls that several workers take at once need not be
    the last that was sent.

    Arguments:
        pause: how long no other call must have come.
        key: what is told apart: a template. Default: the whole task.
        longest: how long after the first call it runs at last. Default: ten pauses.
    """

    pause: Duration
    key: str = ""
    longest: Duration | None = None


class GateCall(msgspec.Struct, frozen=True):  # some are made for each call: a tenth of a frozen dataclass's time
    """One gate for one call, as the scripts are told of it; see ``lua/task_admit.lua``."""

    kind: str
    """p: permits. d: a pause. Else that of a ``RateLimit``."""
    shown: str
    """For people: such as ``lock 'account:7'``."""
    state: str
    second: str
    amount: int = 1
    count: int = 1
    span: int = 0
    rest: int = 0
    part: int = 1
    most: int = -1
    policy: str = "r"
    fair: str = "-"
    joins: bool = False
    """Whether those that wait end with the result of the one that runs."""
    template: str = ""
    """What the user wrote."""
    caller: str = ""
    """Of a rate: the key that is asked for."""
    limiter: str = ""
    limit: RateLimit | None = None
    costs: bool = False
    """Of a rate: whether the task says what a call costs."""
    lock: tuple[str, str] | None = None
    """Of permits: kind and name, as a ``TurnStore`` has them."""

    @property
    def claims_start(self) -> bool:
        """Whether it is a claim that ends when the task starts; then a permit may stand for it."""
        return self.kind == "c" and self.rest == 1

    @property
    def is_unique(self) -> bool:
        """Whether it is the permit of the only call that runs."""
        return self.lock is not None and self.lock[0] == "unique"

    @property
    def form(self) -> tuple[str, int, int, int, int, int, str]:
        """What the scripts are told that is the same for most calls of a task."""
        return self.kind, self.count, self.span, self.rest, self.part, self.most, self.policy

    def definition(self, lease_ms: int) -> str:
        """What whoever serves its line has to know."""
        arguments = [self.count, self.span, self.rest, self.part, lease_ms]
        return json.dumps([self.kind, self.shown, self.state, self.second, *arguments], separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Served:
    """A gate at which tasks wait, as its line's definition tells."""

    kind: str
    shown: str
    state: str
    second: str
    count: int
    span: int
    rest: int
    part: int
    lease_ms: int

    @classmethod
    def read(cls, definition: bytes) -> Self:
        """Raises ``ValueError`` for what is none."""
        found = json.loads(definition)
        if not isinstance(found, list) or len(found) != 9:
            raise ValueError(f"{definition!r} defines no gate")
        if not all(isinstance(part, str) for part in found[:4]) or not all(type(part) is int for part in found[4:]):
            raise ValueError(f"{definition!r} defines no gate")
        return cls(*found)


def memo_gate(key: str) -> GateCall:
    """The gate of those that want one result: one makes it, the others wait to end with it."""
    state = keys.turn("memo", key)
    return GateCall("p", f"result {key!r}", state, keys.turn_queue(state), joins=True, lock=("memo", key))


Fill = Callable[[Sequence[Any], Mapping[str, Any]], str]
Filling = Callable[[Mapping[str, Any]], str]
"""What fills a template in with the values of a call's arguments. Raises ``TypeError`` where it cannot."""


class _Call(NamedTuple):
    """A call of a task: how it was spelled, and what each argument is."""

    arguments: Sequence[Any]
    keywords: Mapping[str, Any]
    values: Mapping[str, Any]
    fair: str
    """What goes by turns with others in a line that keys share."""


class Gates:
    """All gates of a task, in the order in which they are asked: pauses, permits, rates."""

    def __init__(
        self,
        task: str,
        signature: Signature,
        *,
        lock: str | Sequence[str] | None = None,
        concurrency: "int | Concurrency | Mapping[str, int] | Sequence[int | Concurrency] | None" = None,
        rate: "str | RateLimit | Rate | Mapping[str, str | RateLimit] | Sequence[str | RateLimit | Rate] | None" = None,
        unique: "Unique | None" = None,
        unique_key: Fill | None = None,
        namespace: str = "tasks",
        debounce: "Duration | Pause | None" = None,
        fair: str | None = None,
        max_parked: int | None = None,
        when_full: WhenFull = "reject",
        restored: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        if max_parked is not None and (type(max_parked) is not int or max_parked < 1):
            raise ValueError(f"max_parked={max_parked!r} must be a whole number, 1 or more")
        if when_full not in get_args(WhenFull):
            raise ValueError(f"when_full={when_full!r} is unknown; there are {', '.join(get_args(WhenFull))}")
        self._task = task
        self._restored = restored  # makes of arguments that were sent what the function is given
        self._arguments = _Arguments(task, signature)
        self._signature = signature
        self._most = -1 if max_parked is None else max_parked
        self._policy = _POLICIES[when_full]
        self._makers: list[Callable[[_Call], GateCall]] = []
        self._keyed: list[Filling] = []
        self._declared: set[tuple[str, ...]] = set()
        if debounce is not None:
            self._add_pause(debounce if isinstance(debounce, Pause) else Pause(debounce))
        if unique is not None:
            self._add_unique(unique, unique_key, namespace)
        for name in _locks(lock):
            self._add_lock(name)
        for permits in _concurrencies(concurrency):
            self._add_concurrency(permits)
        for limit in _rates(rate):
            self._add_rate(limit)
        self._fair = next(iter(self._keyed), None) if fair is None else self._filling(fair, "fair")

    def __repr__(self) -> str:
        return f"<Gates of {self._task} [{len(self._makers)}]>"

    def __bool__(self) -> bool:
        return bool(self._makers)

    def of(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[GateCall]:
        """The gates of one call.

        Raises ``TypeError`` for arguments that the task does not take, or that a template cannot be filled from, and
        ``ValueError`` for a cost that could never pass, or two gates with one name.
        """
        values, fair = self._arguments.of(arguments, keywords), "-"
        if self._restored is not None:
            self._restored(values)
        if self._fair is not None:
            fair = blake2b(self._fair(values).encode(), digest_size=8).hexdigest()
        call = _Call(arguments, keywords, values, fair)
        calls = [make(call) for make in self._makers]
        if len(calls) > 1 and len({call.state for call in calls}) < len(calls):
            names = ", ".join(call.shown for call in calls)
            raise ValueError(f"{self._task}: two gates of this call are the same one: {names}; give one another name")
        return calls

    def _filling(self, text: str, option: str) -> "Filling":
        """A template, checked."""
        task, what = self._task, f"{option}= of {self._task}"
        if not isinstance(text, str):
            raise TypeError(f"{what}: {text!r} is no template; write text, with the arguments of the task in braces")
        fill = key_template(text, self._signature, what).text.format

        def filled(values: Mapping[str, Any]) -> str:
            try:
                return fill(**values)
            except (LookupError, AttributeError, TypeError, ValueError) as error:
                raise TypeError(f"{option}={text!r} cannot be filled from this call of {task}: {error}") from None

        return filled

    def _declare(self, option: str, *gate: str, instead: str) -> None:
        """Raises ``ValueError`` for a gate that is declared twice: every call would wait for itself."""
        if (option, *gate) in self._declared:
            raise ValueError(f"{option}= of {self._task}: two gates are the same one, named {gate[-1]!r}; {instead}")
        self._declared.add((option, *gate))

    def _add_lock(self, name: str) -> None:
        fill = self._filling(name, "lock")
        if not name:
            raise ValueError(f"lock= of {self._task}: '' is no name; write one, such as 'account:{{account_id}}'")
        self._declare("lock", name, instead="leave one out")
        task, most, policy = self._task, self._most, self._policy

        def make(call: _Call) -> GateCall:
            filled = fill(call.values)
            if not filled:
                raise ValueError(f"lock={name!r} is the empty name for this call of {task}; write text before it")
            state = keys.turn("lock", filled)
            return GateCall(
                "p", f"lock {filled!r}", state, keys.turn_queue(state), most=most, policy=policy, fair=call.fair,
                template=name, lock=("lock", filled),
            )  # fmt: skip

        self._makers.append(make)

    def _add_concurrency(self, permits: Concurrency) -> None:
        if type(permits.count) is not int or not 1 <= permits.count <= _LARGEST:
            raise ValueError(f"concurrency={permits.count!r} must be a whole number from 1 to {_LARGEST}")
        fill, name = self._filling(permits.key, "concurrency"), permits.name or self._task
        instead = f"give one a name= of its own, as in Concurrency({permits.count}, name='database')"
        self._declare("concurrency", permits.key, name, instead=instead)
        if permits.key:
            self._keyed.append(fill)
        most, policy = self._most, self._policy

        def make(call: _Call) -> GateCall:
            key = fill(call.values)
            filled = f"{name}:{key}" if permits.key else name
            state = keys.turn("semaphore", filled)
            return GateCall(
                "p", f"concurrency {filled!r} ({permits.count})", state, keys.turn_queue(state), count=permits.count,
                most=most, policy=policy, fair=call.fair, template=permits.key, lock=("semaphore", filled),
            )  # fmt: skip

        self._makers.append(make if permits.key else _once(make))

    def _add_rate(self, rate: Rate) -> None:
        limit = RateLimit(rate.limit) if isinstance(rate.limit, str) else rate.limit
        if not isinstance(limit, RateLimit):
            raise TypeError(f"rate={rate.limit!r} is no rate; write text such as '100/m', a RateLimit or a Rate")
        if limit.kind == "c":
            raise ValueError(f"{limit!r} is no rate; write concurrency={limit.count}")
        fill, name, cost = self._filling(rate.key, "rate"), rate.name or self._task, self._cost(rate.cost)
        instead = f"give one a name= of its own, as in Rate({limit.rate!r}, name='provider')"
        self._declare("rate", limit.part, rate.key or EVERYBODY, name, instead=instead)
        if rate.key:
            self._keyed.append(fill)
        limiter = keys.RateKeys(name, [limit.part])
        kind, count, span, rest, part = limit.arguments()
        most, policy = self._most, self._policy

        def make(call: _Call) -> GateCall:
            caller, amount = fill(call.values) or EVERYBODY, cost(call.values)
            if not 1 <= amount <= limit.burst:
                raise ValueError(
                    f"{self._task}: a call that costs {amount} can never pass {limit!r}; it admits 1 to {limit.burst}"
                )
            block, state = (key.decode() for key in limiter.of(caller))
            shown = f"rate {limit} of {name!r}" + (f" for {caller!r}" if rate.key else "")
            return GateCall(
                kind.lower(), shown, state, block, 1 if limit.by_call else amount, count, span, rest, part, most,
                policy, call.fair, template=rate.key, caller=caller, limiter=name, limit=limit,
                costs=rate.cost is not None,
            )  # fmt: skip

        self._makers.append(make if rate.key or isinstance(rate.cost, str) else _once(make))

    def _add_unique(self, unique: Unique, key: Fill | None, namespace: str) -> None:
        check_unique(unique)
        if key is None:
            raise TypeError("the key of unique calls is missing")
        policy = {"join": "j", "drop": "n", "raise": "r", "replace": "n"}[unique.on_conflict]
        if unique.until is not None:
            ends_with_start = int(unique.until in get_args(Until))

            def claim(call: _Call) -> GateCall:
                filled = key(call.arguments, call.keywords)
                state = keys.claim(namespace, filled)
                return GateCall(
                    "c",
                    f"unique {filled!r}",
                    state,
                    state,
                    rest=ends_with_start,
                    policy=policy,
                    template=unique.key or "",
                )

            self._makers.append(claim)
        if unique.until == "start" or (unique.until not in (None, "end") and unique.on_conflict != "join"):
            return
        most, when_full = {"join": (-1, "r"), "drop": (0, "n"), "raise": (0, "r"), "replace": (1, "l")}[
            unique.on_conflict
        ]

        def permit(call: _Call) -> GateCall:
            filled = key(call.arguments, call.keywords)
            state = keys.turn("unique", filled)
            return GateCall(
                "p", f"unique {filled!r}", state, keys.turn_queue(state), most=most, policy=when_full,
                joins=unique.on_conflict == "join", template=unique.key or "", lock=("unique", filled),
            )  # fmt: skip

        self._makers.append(permit)

    def _add_pause(self, pause: Pause) -> None:
        pause_us = milliseconds(pause.pause, "debounce") * 1_000
        longest_us = 10 * pause_us if pause.longest is None else milliseconds(pause.longest, "longest") * 1_000
        if longest_us < pause_us:
            raise ValueError(f"longest={pause.longest!r} is shorter than the pause, {pause.pause!r}")
        fill = self._filling(pause.key, "debounce")

        def make(call: _Call) -> GateCall:
            key = fill(call.values)
            state = keys.debounced_task(self._task, key or EVERYBODY)
            return GateCall(
                "d", f"pause of {self._task!r}" + (f" for {key!r}" if key else ""), state, state, span=pause_us,
                rest=longest_us, most=1, policy="l", template=pause.key,
            )  # fmt: skip

        self._makers.append(make)

    def _cost(self, cost: int | str | None) -> Callable[[Mapping[str, Any]], int]:
        if isinstance(cost, str):
            fill = self._filling(cost, "cost")

            def filled(values: Mapping[str, Any]) -> int:
                text = fill(values)
                if not text.isascii() or not text.isdigit():
                    raise ValueError(f"cost={cost!r} gives {text!r} for this call, which is no whole number")
                return int(text)

            return filled
        amount = 1 if cost is None else cost
        if type(amount) is not int or amount < 1:
            raise ValueError(f"cost={cost!r} must be a whole number, 1 or more, or a template")
        return lambda _values: amount


class _Arguments:
    """A call's arguments by their names, with the defaults: as ``Signature.bind``, in a tenth of its time.

    Where a signature is not a plain one, or the arguments do not fit it, ``bind`` itself tells.
    """

    def __init__(self, task: str, signature: Signature) -> None:
        self._task = task
        self._signature = signature
        parameters = signature.parameters.values()
        self._plain = all(one.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY) for one in parameters)
        self._names = [one.name for one in parameters if one.kind is Parameter.POSITIONAL_OR_KEYWORD]
        self._all = signature.parameters.keys()
        self._defaults = {one.name: one.default for one in parameters if one.default is not Parameter.empty}

    def of(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ``TypeError`` for arguments that do not fit."""
        if self._plain and len(arguments) <= len(self._names):
            positional = dict(zip(self._names, arguments, strict=False))
            values = {**self._defaults, **positional, **keywords}
            if values.keys() == self._all and positional.keys().isdisjoint(keywords):
                return values
        return bound_to(self._signature, self._task, arguments, keywords)


def bound_to(signature: Signature, task: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by their names, with the defaults. Raises ``TypeError``, with the task's name."""
    try:
        bound = signature.bind(*arguments, **keywords)
    except TypeError as error:
        is_first = next(iter(signature.parameters), "") == "self"
        bind = " (for the task itself to be given as self, declare it with bind=True)" if is_first else ""
        raise TypeError(f"{task}(): {error}{bind}") from None
    bound.apply_defaults()
    return bound.arguments


def _once(make: Callable[[_Call], GateCall]) -> Callable[[_Call], GateCall]:
    """Make a gate that no argument changes for the first call only."""
    known: GateCall | None = None

    def made(call: _Call) -> GateCall:
        nonlocal known
        if known is None:
            known = make(call._replace(fair="-"))
        return known if call.fair == "-" else replace(known, fair=call.fair)

    return made


def check_unique(unique: Unique) -> None:
    """Raises ``ValueError`` for options that make no sense, alone or together."""
    if unique.on_conflict not in get_args(OnConflict):
        raise ValueError(f"on_conflict={unique.on_conflict!r} is unknown; there are {', '.join(get_args(OnConflict))}")
    if unique.until == "start" and unique.on_conflict == "join":
        raise ValueError(
            'until="start" and on_conflict="join": who waits only until another has started has no result to end with; '
            'write until="end", or on_conflict="drop"'
        )
    if unique.until not in (None, *get_args(Until)):
        milliseconds(unique.until, "until")  # type: ignore[arg-type]


def _locks(given: Any) -> Sequence[str]:
    if given is None or isinstance(given, str):
        return [] if given is None else [given]
    if not isinstance(given, Sequence):
        raise TypeError(f"lock={given!r} is no name; write a template such as 'account:{{account_id}}', or several")
    return given


def _concurrencies(given: Any) -> list[Concurrency]:
    if given is None:
        return []
    if isinstance(given, Concurrency):
        return [given]
    if isinstance(given, Mapping):
        return [Concurrency(count, key=key) for key, count in given.items()]
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [permits for one in given for permits in _concurrencies(one)]
    return [Concurrency(given)]


def _rates(given: Any) -> list[Rate]:
    if given is None:
        return []
    if isinstance(given, Rate):
        return [given]
    if isinstance(given, Mapping):
        return [Rate(limit, key=key) for key, limit in given.items()]
    if isinstance(given, str):
        keyed = _KEYED_RATE.fullmatch(given.strip())
        return [Rate(keyed[2], key=keyed[1]) if keyed else Rate(given)]
    if isinstance(given, Sequence):
        return [rate for one in given for rate in _rates(one)]
    return [Rate(given)]
