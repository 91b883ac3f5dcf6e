"""For the tests of applications: a clock that they move, gates that are open or closed, and what is parked.

The invariant: a test sees what would happen in earnest. The clock moves the server's time in the very scripts that ask
for it; a closed gate parks a task where its own gate would. Only open gates and ``no_memo`` leave something out, and
say so. Everything is a context manager, puts back what it changed whatever happens inside, and holds for all threads of
this process. Nothing here is for production.

>>> @pytest.fixture
... def clock(redis):
...     with testing.moving_clock(redis) as clock:
...         yield clock
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from hashlib import blake2b
from itertools import count
from threading import Lock, RLock
from typing import Any, cast
from uuid import uuid4

import msgspec
from celery import Celery, Task
from kombu.utils import json as kombu_json

from .cachelib import MISS, Connections
from .cachelib import keys as cache_keys
from .cachelib.counters import Counters
from .cachelib.durations import Duration, milliseconds
from .cachelib.scripts import Script, rewrite
from .coordination import keys, passing
from .coordination.admitted import Admitted
from .coordination.coordinated import CoordinatedTask
from .coordination.errors import DuplicateTask, TaskRefused
from .coordination.gates import GateCall, Served
from .coordination.hold import Hold, Terms
from .coordination.keeper import Keeper
from .coordination.memo_results import Memo
from .coordination.memoize import MemoizedTask
from .coordination.parking import Attempt, ParkingLot, Running
from .coordination.turn_store import TurnStore
from .tasks.pump import Pump

__all__ = [
    "AskedCall",
    "Clock",
    "Recorder",
    "Waiting",
    "clear",
    "closed_gates",
    "moving_clock",
    "no_memo",
    "open_gates",
    "parked",
    "pump",
]

# The clock

_CLOCK = cache_keys.counters("testing", "clock")
"""By how much the time of this server is moved, and how many move it: a hash."""
_EVERYTHING = _CLOCK.partition("counters")[0] + "*"
_KEPT_MS = 86_400_000
"""So long a clock that nobody has put back is remembered."""

_ASKS_TIME, _ASKS_US = 'redis.call("TIME")', "testing_time()"
_MOVED_TIME = (
    "local function testing_time() "
    f"local time, moved_us = {_ASKS_TIME}, redis.call('HGET', '{_CLOCK}', 'moved_us') or 0 "
    "local now = time[1] * 1000000 + time[2] + moved_us "
    "return { string.format('%d', math.floor(now / 1000000)), string.format('%d', now % 1000000) } end "
)

_NOW = Script(
    "testing_now",
    f"""-- The server's time, as all scripts see it.
--
-- KEYS: clock
-- ARGV: none
-- RETURNS: {{seconds, microseconds}}
return {_ASKS_TIME}
""",
    list,
)

_ADVANCE = Script(
    "testing_advance",
    """-- Move the time of this server.
--
-- KEYS: clock
-- ARGV: pattern, by_ms, users, kept_ms
-- RETURNS: by how many microseconds it is moved now
-- pattern: of the keys that have less time to live then. users: how many more move the clock.
--
-- One script, because nobody may see the new time and an old key.

local by_ms = tonumber(ARGV[2])
if by_ms > 0 then
    for _, key in ipairs(redis.call("KEYS", ARGV[1])) do
        local left_ms = redis.call("PTTL", key)
        if key ~= KEYS[1] and left_ms > by_ms then
            redis.call("PEXPIRE", key, left_ms - by_ms)
        elseif key ~= KEYS[1] and left_ms >= 0 then
            redis.call("DEL", key)
        end
    end
end
local moved_us = redis.call("HINCRBY", KEYS[1], "moved_us", string.format("%.0f", by_ms * 1000))
if redis.call("HINCRBY", KEYS[1], "users", ARGV[3]) <= 0 then
    redis.call("DEL", KEYS[1])
else
    redis.call("PEXPIRE", KEYS[1], ARGV[4])
end
return moved_us
""",
    int,
)

_lock = Lock()
_moving = 0
"""How many clocks are moved in this process."""


class Clock:
    """The time of a server, which a test moves. Made by ``moving_clock``."""

    def __init__(self, redis: Connections) -> None:
        self._redis = redis
        self._ended = False

    def __repr__(self) -> str:
        return f"<Clock of {self._redis.address}>"

    def advance(self, by: Duration) -> None:
        """Have time pass: for all scripts, and for all keys that have a TTL. Pumps look at once at what is due.

        >>> clock.advance("1m")

        Arguments:
            by: how much, up to ten years; time does not go back.

        Raises ``RuntimeError`` when its ``with`` block has ended, and redis-py's errors.
        """
        by_ms = milliseconds(by, "by")
        if self._ended:
            raise RuntimeError(f"{self!r} was put back when its with block ended; move it inside")
        self._change(by_ms, users=0)
        client = self._redis.coordination
        for channel in client.execute_command("PUBSUB", "CHANNELS", keys.ParkingKeys("*").channel):
            client.execute_command("PUBLISH", channel, "due")

    def now(self) -> datetime:
        """The server's time as all scripts see it, in UTC."""
        seconds, microseconds = _NOW(self._redis.coordination, clock=_CLOCK)
        return datetime.fromtimestamp(int(seconds), UTC) + timedelta(microseconds=int(microseconds))

    def _change(self, by_ms: int, *, users: int) -> None:
        _ADVANCE(
            self._redis.coordination, clock=_CLOCK, pattern=_EVERYTHING, by_ms=by_ms, users=users, kept_ms=_KEPT_MS
        )


@contextmanager
def moving_clock(redis: Connections) -> Iterator[Clock]:
    """Have the time of a server be moved by a test.

    >>> with moving_clock(redis) as clock:
    ...     assert all(limiter.hit("7") for _ in range(100))
    ...     assert not limiter.hit("7")
    ...     clock.advance("1m")
    ...     assert limiter.hit("7")

    Promises: until the end of the block every script of Petiole that this process runs on that server sees a time that
    is later by all that was advanced: rates refill, leases run out, cached values go stale, parked tasks get due.
    What has a TTL, and is a key of Petiole, has so much less of it. Both change at the same moment for all. Processes
    that all move the clock of one server share it.

    Non-promises: a process that does not use this sees the server's own time; and a key without a TTL stays. A hold,
    tokens that a limiter has leased, a near cache and a thread that waits for a lock go by the clock of their process:
    they learn of it with their next renewal, or look. So does ``Debounce``, which waits by timers. Afterwards the time
    is the server's own again, and what was written meanwhile is of the future: use a database for tests, or new names.

    Arguments:
        redis: from ``connect``; other connections to the same database see the same time.

    Raises ``ValueError`` for a Cluster, whose servers have a time each.
    """
    global _moving  # noqa: PLW0603 - the texts of scripts are of the whole process
    if redis.is_cluster:
        raise ValueError(
            f"the clock of {redis.address} cannot be moved: it is a Cluster, whose servers have a time each; "
            "test with a single server, such as connect('embedded://')"
        )
    clock = Clock(redis)
    clock._change(0, users=1)
    with _lock:
        _moving += 1
        rewrite(_with_moved_time)
    try:
        yield clock
    finally:
        clock._ended = True
        with _lock:
            _moving -= 1
            if not _moving:
                rewrite(None)
        clock._change(0, users=-1)


def _with_moved_time(text: str) -> str:
    return _MOVED_TIME + text.replace(_ASKS_TIME, _ASKS_US) if _ASKS_TIME in text else text


# Gates that are open, or closed


@dataclass(frozen=True, slots=True)
class AskedCall:
    """A call of a task whose gates were open, or closed."""

    task: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gates: list[str]
    """What it would have asked, or what has refused it, such as ``lock 'account:7'``."""
    settled: list[tuple[int, str | None]] = field(default_factory=list)
    """What it has settled: the cost, and the key of the rate that was meant."""


class Recorder:
    """Which calls came to their gates, in the order in which they came."""

    def __init__(self) -> None:
        self.calls: list[AskedCall] = []

    def __repr__(self) -> str:
        return f"<Recorder of {len(self.calls)} calls>"

    def of(self, task: Task | str) -> list[AskedCall]:
        """The calls of one task, or of the tasks of that name."""
        name = task if isinstance(task, str) else task.name
        return [call for call in self.calls if call.task == name]

    def note(self, passage: passing.Passage, gates: Sequence[GateCall]) -> AskedCall:
        """Note a call."""
        shown = [gate.shown for gate in gates]
        call = AskedCall(passage.task.name, tuple(passage.arguments), dict(passage.keywords), shown)
        self.calls.append(call)
        return call


@contextmanager
def open_gates() -> Iterator[Recorder]:
    """Have every coordinated task run at once, and ask no Redis.

    >>> with open_gates() as gates:
    ...     charge(7, tokens=100)
    >>> assert gates.of(charge)[0].gates == ["lock 'account:7'", "rate 90000/m of 'provider'"]
    >>> assert gates.of(charge)[0].settled == [(42, None)]

    Promises: the body of every coordinated task runs, in all threads of this process: called, ``apply``-ed, or in an
    embedded worker. What its gates would have been is computed and noted, so a template that does not fit fails.
    ``task.admission`` is there: holds with fences that rise, which are never lost, and whose ``guard`` accepts; what is
    settled is noted. ``apply_async`` sends every call, also of unique tasks.

    Non-promises: nothing is held, so two may run at once what only one may. Where the body raises ``RateLimited``, the
    call is not parked: it ends with that error. Workers in other processes ask their gates; locks and limiters that the
    body itself uses are as ever. Also a decorator; of nested ones, the inner one decides.
    """
    recorder = Recorder()
    with _standing_in(_Open(recorder)):
        yield recorder


@contextmanager
def closed_gates(*names: str) -> Iterator[Recorder]:
    """Have gates refuse every call, without holding anything.

    >>> with closed_gates("lock *"):
    ...     charge.delay(7)             # a worker parks it
    ...     ...
    ...     assert parked(app)[0].gate == "lock 'account:7'"
    >>> pump(app)                       # the gates are open again: it is sent

    Promises: in the workers of this process a call is parked at the first gate that is closed, in a line beside that of
    the gate itself, with its ``max_parked`` and ``when_full``. What was parked there may go when the block ends: it
    asks its gates then. A direct call, or an eager one, fails with ``TaskRefused`` at once, which takes no Redis.

    Non-promises: the gates themselves are neither held nor used up, so whoever asks a ``Lock`` of that name gets it.
    Workers in other processes see nothing of it. A debounced or unique call that is called directly is not refused by
    those gates, as ever.

    Arguments:
        names: which: patterns such as ``lock *`` or ``rate *`` for what ``parked`` calls them, or the templates that
            the task declares. Default: all.

    Raises ``ValueError`` for a pattern that no gate can match.
    """
    for name in names:
        _check_name(name)
    recorder = Recorder()
    closed = _Closed(recorder, names)
    try:
        with _standing_in(closed):
            yield recorder
    finally:
        closed.open()


_KINDS = ("lock ", "concurrency ", "rate ", "unique ", "pause of ")
"""How gates are called, up to their names."""
_KIND_ALONE = {"lock", "concurrency", "rate", "unique", "pause", "pause of"}


def _check_name(name: str) -> None:
    """Raise ``ValueError`` for what can close nothing: a test with it would test nothing."""
    start = re.split(r"[*?[]", name, maxsplit=1)[0]
    if start != name:
        may_close = any(kind.startswith(start) or start.startswith(kind) for kind in _KINDS)
    else:
        may_close = name.startswith(_KINDS) or not re.search("^$|['\"]", name)
    if name in _KIND_ALONE or not (may_close or "{" in name):
        raise ValueError(
            f"closed_gates({name!r}) closes nothing: gates are called lock '...', concurrency '...', rate ..., "
            "unique '...' or pause of '...'; write a pattern such as 'lock *', or a template as the task declares it"
        )


_standing: list[passing.StandIn] = []


@contextmanager
def _standing_in(stand_in: passing.StandIn) -> Iterator[None]:
    """Whoever came last decides, also where blocks of several threads overlap."""
    with _lock:
        _standing.append(stand_in)
        passing.stand_in = stand_in
    try:
        yield
    finally:
        with _lock:
            _standing.remove(stand_in)
            passing.stand_in = _standing[-1] if _standing else None


class _Open:
    """Runs the body."""

    asks_redis = False

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, passage: passing.Passage) -> Any:
        call = self._recorder.note(passage, passage.gates)
        passage.counters.add("runs")
        request = passage.task.request
        request.admission = _OpenAdmission(passage, call)
        try:
            return passage.body()
        finally:
            request.admission = None


class _OpenAdmission(Admitted):
    """What a task is told that it holds, where nothing is held."""

    def __init__(self, passage: passing.Passage, call: AskedCall) -> None:
        request, gates = passage.task.request, tuple(passage.gates)
        attempt = Attempt(request.id or uuid4().hex, request.retries or 0, 0, passage.task.name)
        fences = tuple((next(_fences), 0) for _ in gates)
        running = Running(attempt, "-", gates, 0.0, 0, fences, time.monotonic(), passage.lease_ms)
        super().__init__(passage.lot, running)
        self._call = call
        for gate, (fence, _) in zip(gates, fences, strict=True):
            if gate.lock is not None:
                self._holds[gate.state] = _OpenHold(gate, attempt.token, fence, passage.lease_ms)

    def settle(self, actual_cost: int, key: str | None = None) -> None:
        """Note it."""
        self._to_settle(actual_cost, key)
        self._call.settled.append((actual_cost, key))


_fences = count(time.time_ns() // 1_000)
"""They begin as those of a server do: above what other processes may have written."""


class _OpenHold(Hold):
    """A hold of nothing: never lost."""

    def __init__(self, gate: GateCall, token: str, fence: int, lease_ms: int) -> None:
        nobody, deadline = _Nobody(gate.state), time.monotonic() + 366 * 86_400
        store, keeper = cast(TurnStore, nobody), cast(Keeper, nobody)
        super().__init__(store, keeper, gate.shown, token, fence, deadline, Terms(lease_ms), Counters())

    def guard(self, connection: Any) -> None:
        """Accept."""


class _Nobody:
    """In place of a hold's store and keeper."""

    def __init__(self, name: str) -> None:
        self.name = name

    def keep(self, _hold: Hold) -> None:
        """Nothing is renewed."""

    def let_go(self, _hold: Hold) -> bool:
        """It was held."""
        return True

    def extend(self, _hold: Hold, _lease_ms: int) -> None:
        """It lasts."""

    def give(self, _token: str) -> bool:
        """It was held."""
        return True

    def give_back(self, _store: object, _token: str, _lease_ms: int) -> None:
        """Nobody waits for it."""


class _Closed:
    """Puts, before each gate that is closed, one of which there are no permits, with a line of its own."""

    asks_redis = True

    def __init__(self, recorder: Recorder, names: Sequence[str]) -> None:
        self._recorder = recorder
        self._names = names
        self._parked: dict[tuple[ParkingLot, str], tuple[GateCall, int]] = {}
        self._lock = RLock()
        """So that none is parked after the gates were opened."""

    def __call__(self, passage: passing.Passage) -> Any:
        request = passage.task.request
        if request.called_directly or request.is_eager:
            return self._called(passage)
        gates: list[GateCall] = []
        with self._lock:
            for gate in passage.gates:
                if self._closes(gate):
                    state = keys.turn("closed", blake2b(gate.state.encode(), digest_size=16).hexdigest())
                    refusing = msgspec.structs.replace(
                        gate, kind="p", state=state, second=keys.turn_queue(state), count=0, lock=None, limit=None,
                        joins=False,
                    )  # fmt: skip
                    self._parked[passage.lot, state] = (refusing, passage.lease_ms)
                    gates.append(refusing)
                gates.append(gate)
            if len(gates) > len(passage.gates):
                self._recorder.note(passage, [gate for gate in passage.gates if self._closes(gate)])
                return replace(passage, gates=gates).pass_gates()
        return passage.pass_gates()

    def _called(self, passage: passing.Passage) -> Any:
        closed = [gate for gate in passage.gates if gate.kind not in "cd" and self._closes(gate)]
        if not closed:
            return passage.pass_gates()
        self._recorder.note(passage, closed)
        if closed[0].most != 0:
            raise TaskRefused(passage.task.name, closed[0].shown, 0.0)
        if closed[0].policy == "n":
            return None
        raise DuplicateTask(passage.task.name, closed[0].shown)

    def _closes(self, gate: GateCall) -> bool:
        return not self._names or any(
            name == gate.template or fnmatchcase(gate.shown, name) for name in self._names if name
        )

    def open(self) -> None:
        """Let go those that are parked."""
        with self._lock:
            for (lot, state), (refusing, lease_ms) in self._parked.items():
                client, line = lot.redis.coordination, lot.keys.line(state)
                opened = msgspec.structs.replace(refusing, count=1_000_000).definition(lease_ms)
                if lot.definition(line) is not None:
                    client.execute_command("HSET", lot.keys.gates, line, opened)
                while lot.serve(line, Served.read(opened.encode())):
                    pass
                client.execute_command("DEL", state, refusing.second)  # nobody gives back what they were given there
                client.execute_command("PUBLISH", lot.keys.channel, "due")
            self._parked.clear()


# What is parked


@dataclass(frozen=True, slots=True)
class Waiting:
    """A call that is parked."""

    id: str
    task: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gate: str
    """What it waits for, such as ``lock 'account:7'``; empty where it waits for nothing any more, or for its twin."""
    woken: bool
    """Whether it is on its way to a worker."""


def parked(app: Celery) -> list[Waiting]:
    """What waits: the calls of an app's tasks that are parked, those of one gate in the order in which they may go.

    >>> assert [(one.task, one.args) for one in parked(app)] == [("shop.charge", (7,))]

    Raises redis-py's errors.
    """
    found: list[Waiting] = []
    for lot in _lots(app):
        shown: dict[str, str] = {}
        places: dict[str, int] = {}
        for line, definition in lot.lines():
            shown[line] = Served.read(definition).shown
            for id in lot.redis.coordination.execute_command("ZRANGE", line, 0, -1):
                places[id.decode()] = len(places)
        waiting = lot.waiting(lot.counts()["parked"] + 1_000)
        for one in sorted(waiting, key=lambda one: places.get(one.id, len(places))):
            record = _from_json(json.dumps(one.record))
            arguments, keywords = tuple(record.get("args", ())), dict(record.get("kwargs", {}))
            gate = "" if one.woken else shown.get(one.line, "")
            found.append(Waiting(one.id, one.task, arguments, keywords, gate, one.woken))
    return found


def pump(app: Celery) -> int:
    """Wake and send what may run now, here, without a worker's pump; returns how many were sent.

    >>> clock.advance("1m")
    >>> assert pump(app) == 1

    One pass: what was sent and is refused again is sent by the next one. With any broker, ``memory://`` too. Raises
    redis-py's errors; what the broker does not take is logged, and stays.
    """
    return sum(Pump(app, lot).once() for lot in _lots(app))


def clear(app: Celery) -> None:
    """Forget all that is parked or held by an app's tasks, and what they have claimed. Rates stay as they are.

    >>> @pytest.fixture(autouse=True)
    ... def nothing_is_parked():
    ...     yield
    ...     testing.clear(app)

    For when no worker runs: a task that runs goes on without what it held. What lies in the broker stays there, and
    is found stale, or asks its gates, when it comes. Raises redis-py's errors.
    """
    for lot in _lots(app):
        client, names = lot.redis.coordination, lot.keys
        lines = lot.lines()
        counts = {line: Served.read(definition).count for line, definition in lines}
        for one in lot.waiting(lot.counts()["parked"] + 1_000):
            if one.line.startswith(_TURNS):
                state = lot.keys.state_of(one.line)
                _give_back(lot, Attempt(one.id, one.retries), state, counts.get(one.line, 1))
        run = names.run("*")[:-1]
        for name in _names_from(lot.redis, run):
            token = cache_keys.unescaped(name.removeprefix(run))
            for known in lot.running([token]).values():
                lot.crashed(token, known)
        client.execute_command("DEL", names.parked, names.waits, names.woken)
        for line, definition in lines:  # finds nobody there any more, and tidies up
            gate = Served.read(definition)
            lot.serve(line, gate)
            client.execute_command("DEL", line, lot.keys.order(gate.state), lot.keys.wakes(gate.state))
        claims = keys.claim(cache_keys.unescaped(names.namespace), "*")[:-1]
        client.execute_command("DEL", names.due, names.gates, *_names_from(lot.redis, claims))


_from_json: Callable[[str], Any] = kombu_json.loads  # which is not typed
_TURNS = keys.turn("x", "x").partition("{")[0]


def _give_back(lot: ParkingLot, attempt: Attempt, state: str, capacity: int) -> None:
    """Give back the permit that was handed to a parked task."""
    gate = GateCall("p", "", state, keys.turn_queue(state), count=max(1, capacity))
    lot.end(Running(attempt, "-", (gate,), 0.0, 0, ((0, 0),), 0.0, 0))


def _names_from(redis: Connections, prefix: str) -> list[str]:
    """The keys that begin with a text."""
    names = {name.decode() for name in redis.scan(_EVERYTHING)}
    return sorted(name for name in names if name.startswith(prefix))


def _lots(app: Celery) -> list[ParkingLot]:
    tasks = [task for task in app.tasks.values() if isinstance(task, CoordinatedTask) and task.is_coordinated]
    return list(dict.fromkeys(task.lot for task in tasks))


# Memoized tasks


def _runs(memo: Memo, _call: Any, run: Callable[[], Any], _token: str = "") -> Any:
    memo.count("runs")
    return run()


def _leads(_task: MemoizedTask, memo: Memo, call: Any, run: Callable[[], Any]) -> Any:
    return _runs(memo, call, run)


def _knows_nothing(_memo: Memo, _call: Any) -> Any:
    return MISS


def _forgets(_memo: Memo, _call: Any) -> None:
    return None


_WITHOUT_MEMO: list[tuple[type, str, Callable[..., Any]]] = [
    (MemoizedTask, "_lead_or_follow", _leads),
    (Memo, "lead_or_wait", _runs),
    (Memo, "refresh", _runs),
    (Memo, "look", _knows_nothing),
    (Memo, "peek", _knows_nothing),
    (Memo, "fresh", _knows_nothing),
    (Memo, "forget", _forgets),
]
_WITH_MEMO = [(where, name, getattr(where, name)) for where, name, _ in _WITHOUT_MEMO]
_without_memo = 0


@contextmanager
def no_memo() -> Iterator[None]:
    """Have memoized tasks run always, and remember nothing; they ask no Redis.

    >>> with no_memo():
    ...     assert report("north") == report("north")   # the body has run twice

    Promises: in all threads of this process, a call that is run runs its body. ``peek`` returns ``MISS``. What was
    remembered before is there again afterwards. Also a decorator.

    Non-promises: ``cached`` functions, and workers in other processes, remember as ever.
    """
    _change_memo(1)
    try:
        yield
    finally:
        _change_memo(-1)


def _change_memo(by: int) -> None:
    global _without_memo  # noqa: PLW0603 - the class is of the whole process
    with _lock:
        _without_memo += by
        for where, name, method in _WITHOUT_MEMO if _without_memo else _WITH_MEMO:
            setattr(where, name, method)
