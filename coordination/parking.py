"""Tasks that may not run yet wait in Redis: what is said to it, one method per operation.

A refused task is written down in the script that refuses it, so it is in its line before what it waits for can end.
From then on it is in nobody's memory and in no broker. It leaves Redis when it is admitted, not when it is woken: what
was sent and got lost is still known, and a message that comes twice finds nothing the second time. The scripts are in
``lua/task_*.lua``, ``lua/line_serve.lua`` and ``lua/parked_*.lua``.
"""

import json
import os
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec

from ..cachelib.connections import Connections
from ..cachelib.scripts import HOLE, Prepared, load
from ..cachelib.tokens import Tokens
from . import keys
from .gates import GateCall, Served
from .turn_store import RENEWING, renew

_PATIENCE_US = 25_000
"""A task that may run in so short a time waits in its worker: to park it would take as long."""
_LEAD_US = 3_000
"""So much before its time a task is woken, for it has a way to go."""
_WAY_US = 15_000
"""So much before its time a task is woken that waits for a rate: if it is early it waits in its worker, and what it is
late is lost to all who come after it. Less than ``_PATIENCE_US``."""
_LAG_US = 20_000
"""So long a woken task may be on its way without those after it being woken later."""
_MOST_AT_ONCE = 100
_MOST_TOLD = 200
"""So many of those that wait for a result are told by the script that ends its task, the others by the pump."""
LEASE_MS = 30_000
_SEND_AGAIN_MS = 3_600_000
"""A woken task that has not come by then was lost on its way. If not, the second message finds nothing."""
_PUT_OFF_S = 10
LARGEST_RECORD_BYTES = 1_000_000
_MOST_FORMS = 1_000

_tokens = Tokens()


class Attempt(NamedTuple):
    """One delivery of one attempt of a task."""

    id: str
    retries: int
    generation: int = 0
    """Of the parking from which it was woken; 0: it was not parked."""
    label: str = ""
    """For people: the task's name."""
    again: bool = False
    """Whether the call was admitted before, and comes once more: a retry, or one that was told to come later."""

    @property
    def token(self) -> str:
        """Tells it from other attempts, not from other deliveries."""
        return f"{_word(self.id)}.{self.retries}"


@dataclass(frozen=True, slots=True)
class Running:
    """It was admitted, and holds what it needs."""

    attempt: Attempt
    nonce: str
    gates: tuple[GateCall, ...]
    wait_s: float
    """How long it must wait in its worker before it begins."""
    now_us: int
    given: tuple[tuple[int, int], ...]
    """For each gate: fence and end of a lease, or the receipt of a rate."""
    sent: float
    """When it was asked, by ``time.monotonic()``."""
    lease_ms: int


@dataclass(frozen=True, slots=True)
class Parked:
    """It waits in Redis."""

    by: GateCall | None
    """The gate that refused it; None: the same attempt runs elsewhere."""
    wait_s: float
    """When it may run, if the others in its line did not come first; 0 where nobody knows."""


@dataclass(frozen=True, slots=True)
class Refused:
    """It may not run, and was not to be parked."""

    by: GateCall | None
    retry_after: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What it waited for has been decided: ``d``, it is dropped; ``j...``, it ends with the result of that attempt."""

    text: str


@dataclass(frozen=True, slots=True)
class Full:
    """So many wait already that it was turned away."""

    by: GateCall
    dropped: bool
    """Whether it ends with None; else it fails."""


@dataclass(frozen=True, slots=True)
class Stale:
    """Another delivery stands for it."""


Admission = Running | Parked | Refused | Verdict | Full | Stale


class Woken(NamedTuple):
    """A task to be sent."""

    id: str
    generation: int
    token: str
    verdict: str
    again: bool
    """Whether it was sent before, an hour ago, and has not come."""
    record: bytes


class Due(NamedTuple):
    """What is to be done for those that are parked."""

    next_in_s: float | None
    """When there is something to do again."""
    lines: list[tuple[str, bytes]]
    """To be served: each line, and the definition of its gate."""
    tasks: list[str]
    """Whose own time has come."""
    woken: list[Woken]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A parked task, for those who look."""

    id: str
    retries: int
    woken: bool
    """Whether it is on its way to a worker."""
    line: str
    record: dict[str, Any]

    @property
    def task(self) -> str:
        """The name of the task."""
        return str(self.record.get("task", "?"))


class Crashed(NamedTuple):
    """What is known of an attempt that runs: written by its worker, read when that has died."""

    nonce: str
    node: str
    pid: int
    lease_ms: int
    gates: list[list[Any]]
    """State, queue and number of its permits each."""

    def is_of(self, pid: int) -> bool:
        """Whether it runs in that process of this node."""
        return self.node == _HOST and self.pid == pid


_ADMIT = load(__package__, "task_admit", list)
_END = load(__package__, "task_end", int)
_SERVE = load(__package__, "line_serve", int)
_NEXT = load(__package__, "parked_next", list)
_SENT = load(__package__, "parked_sent", int)
_FORGET = load(__package__, "parked_forget", bool)
_WAKE = load(__package__, "parked_wake", list)
_RENEW = load(__package__, "runs_renew", list)
_CLAIM = load(__package__, "claim_take", list)
_UNCLAIM = load(__package__, "claim_drop", bool)


class ParkingLot:
    """The tasks of one namespace that are parked, or run. Every method raises redis-py's errors."""

    def __init__(self, redis: Connections, namespace: str) -> None:
        if redis.is_cluster:
            raise ValueError(
                f"{redis.address} is a Cluster; the gates of a task are asked in one script, so their names must be on "
                "one server. Give coordinated tasks a single server or Sentinel: coordinated_task(redis=connect(...))"
            )
        self.redis = redis
        self.keys = keys.ParkingKeys(namespace)
        self._prepared: dict[tuple[Any, ...], Prepared[Any]] = {}

    def __repr__(self) -> str:
        return f"<ParkingLot {self.keys.namespace!r} at {self.redis.address}>"

    def admit(
        self,
        attempt: Attempt,
        gates: Sequence[GateCall],
        *,
        record: bytes | None,
        lease_ms: int = LEASE_MS,
        expires_us: int = 0,
    ) -> Admission:
        """Ask all gates of a task at once.

        Arguments:
            record: what is to be sent when it is woken; None: it is not to be parked.
            lease_ms: how long it holds what it holds, unless that is renewed.
            expires_us: in what time it expires; 0: never.
        """
        nonce, token, sent = _tokens.next(), attempt.token, time.monotonic()
        reply = self._asking(gates, lease_ms, park=0 if record is None else 1 + attempt.again)(
            self.redis.coordination,
            *_encoded(
                self.keys.run(token),
                *[gate.state for gate in gates],
                *[gate.second for gate in gates],
                *[self.keys.line(gate.state) for gate in gates],
                *[self.keys.order(gate.state) for gate in gates],
                attempt.id,
                token,
                nonce,
                str(attempt.generation),
            ),
            _run_text(gates, lease_ms),
            record or b"",
            *_encoded(
                _label(attempt),
                str(expires_us),
                *[str(gate.amount) for gate in gates],
                *[gate.fair for gate in gates],
                *[gate.definition(lease_ms) if record is not None else "" for gate in gates],
            ),
        )
        outcome, place, wait_us, _, now_us, text = reply[:6]
        gate = gates[place - 1] if place else None
        match outcome:
            case 1:
                given = tuple(zip(reply[6::2], reply[7::2], strict=True))
                return Running(attempt, nonce, tuple(gates), wait_us / 1e6, now_us, given, sent, lease_ms)
            case 0 | -1:
                return Parked(gate, wait_us / 1e6)
            case 2:
                return Refused(gate, wait_us / 1e6)
            case 3:
                return Verdict(text.decode() if place else unquote(text.decode()))
            case -2:
                return Stale()
            case _:
                if gate is None:
                    raise ValueError(f"task_admit.lua returned {reply!r}")
                return Full(gate, outcome == -4)

    def end(
        self, running: Running, *, verdict: str = "-", known_ms: int = 0, over: bool = True, retried_ms: int = 0
    ) -> bool:
        """Give back what a task holds. May be repeated.

        Arguments:
            verdict: what those are told that wait to end with its result; "-": that they may run.
            known_ms: how long it is to be known that it has ended.
            over: False: Celery has something to do for it still, and says by ``over`` when it has.
            retried_ms: in what time its next attempt comes, if that ends others with its result too; 0: there is none.
        """
        permits = [gate for gate in running.gates if gate.kind == "p"]
        attempt = running.attempt
        return self._end(
            attempt.id,
            attempt.token,
            running.nonce,
            [[gate.state, gate.second, gate.count] for gate in permits],
            [verdict if gate.joins else "-" for gate in permits],
            known_ms=known_ms if over else running.lease_ms,
            rest=b"" if over else _run_text([], running.lease_ms),
            next_token=attempt._replace(retries=attempt.retries + 1).token if retried_ms else "",
            next_ms=retried_ms + running.lease_ms,
            keeps=[int(retried_ms > 0 and gate.is_unique) for gate in permits],
        )

    def over(self, running: Running, *, known_ms: int) -> bool:
        """Celery has done all there was to do for an attempt that gave back what it held."""
        attempt = running.attempt
        return self._end(attempt.id, attempt.token, running.nonce, [], [], known_ms=known_ms)

    def has_ended(self, token: str) -> bool:
        """Whether an attempt is known to have ended."""
        return bool(self.redis.coordination.execute_command("GET", self.keys.run(token)) == b"ended")

    def running(self, tokens: Sequence[str]) -> dict[str, Crashed]:
        """What is known of attempts that run, by their tokens."""
        if not tokens:
            return {}
        texts = self.redis.client(RENEWING).execute_command("MGET", *map(self.keys.run, tokens))
        return {
            token: found
            for token, text in zip(tokens, texts, strict=True)
            if text is not None and (found := _read_run(text)) is not None
        }

    def renew(self, attempts: dict[str, Crashed]) -> list[str]:
        """Prolong the leases of attempts, and of the permits they hold. Returns the tokens of those that lost any."""
        if not attempts:
            return []
        permits = [(gate[0], token, found.lease_ms) for token, found in attempts.items() for gate in found.gates]
        kept = _RENEW(
            self.redis.client(RENEWING),
            runs=[self.keys.run(token) for token in attempts],
            nonces=[found.nonce for found in attempts.values()],
            leases_ms=[found.lease_ms for found in attempts.values()],
        )
        lost = [token for token, known in zip(attempts, kept, strict=True) if not known]
        if permits:
            held = renew(self.redis, permits)
            lost += [token for (_, token, _), known in zip(permits, held, strict=True) if not known]
        return list(dict.fromkeys(lost))

    def crashed(self, token: str, found: Crashed) -> bool:
        """Give back what an attempt held whose process has died. Whether it was still known to run there.

        Arguments:
            found: what ``running`` has told of it, with the process that has died: another delivery is left alone.
        """
        id = unquote(token.rpartition(".")[0])
        return self._end(id, token, found.nonce, found.gates, ["-"] * len(found.gates), crashed=True)

    def claim(self, claim: str, state: str, id: str, *, ttl_ms: int, replace: bool) -> str:
        """Claim that a call is the only one that has been sent. The id of the one that has it, or the empty text.

        Arguments:
            claim: its key. state: of the permit that the call has which runs.
            replace: take it from a call that waits.
        """
        taken, other = _CLAIM(
            self.redis.coordination, claim=claim, state=state, id=id, ttl_ms=ttl_ms, replace=int(replace)
        )
        return "" if taken else str(other.decode())

    def unclaim(self, claim: str, id: str) -> bool:
        """Give a claim back. Whether that call had it."""
        return _UNCLAIM(self.redis.coordination, claim=claim, id=id)

    # For whoever wakes those that are parked

    def next(self) -> Due:
        """What is to be done now."""
        now_us, following, lines, tasks, sends = _NEXT(
            self.redis.coordination,
            due=self.keys.due,
            woken=self.keys.woken,
            waits=self.keys.waits,
            parked=self.keys.parked,
            gates=self.keys.gates,
            lead_us=_LEAD_US,
            most=_MOST_AT_ONCE,
        )
        woken = [
            Woken(
                sends[i].decode(),
                int(sends[i + 1]),
                sends[i + 2].decode(),
                sends[i + 3].decode(),
                sends[i + 4] == b"a",
                sends[i + 5],
            )
            for i in range(0, len(sends), 6)
        ]
        named = [(line.decode(), definition) for line, definition in zip(lines[::2], lines[1::2], strict=True)]
        next_in_s = max(0, following - now_us - _LEAD_US) / 1e6 if following else None
        return Due(next_in_s, named, [task.decode() for task in tasks], woken)

    def lines(self) -> list[tuple[str, bytes]]:
        """All lines in which anybody waits, and the definitions of their gates."""
        found = self.redis.coordination.execute_command("HGETALL", self.keys.gates)
        pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
        return [(line.decode(), definition) for line, definition in pairs]

    def definition(self, line: str) -> bytes | None:
        """Of the gate at which those in a line wait; None when nobody does."""
        found: bytes | None = self.redis.coordination.execute_command("HGET", self.keys.gates, line)
        return found

    def among(self, ids: Collection[str]) -> list[str]:
        """Which of these tasks are parked."""
        some, found = list(ids), []
        for start in range(0, len(some), 1_000):
            batch = some[start : start + 1_000]
            known = self.redis.coordination.execute_command("HMGET", self.keys.waits, *batch)
            found += [id for id, text in zip(batch, known, strict=True) if text is not None]
        return found

    def serve(self, line: str, gate: Served) -> int:
        """Wake those of a line that may go now. How many."""
        return _SERVE(
            self.redis.coordination,
            line=line,
            order=self.keys.order(gate.state),
            state=gate.state,
            second=gate.second,
            wakes=self.keys.wakes(gate.state),
            waits=self.keys.waits,
            woken=self.keys.woken,
            gates=self.keys.gates,
            due=self.keys.due,
            kind=gate.kind,
            count=gate.count,
            span=gate.span,
            rest=gate.rest,
            part=gate.part,
            lease_ms=gate.lease_ms,
            lead_us=_LEAD_US,
            most=_MOST_AT_ONCE,
            channel=self.keys.channel,
            lag_us=_LAG_US,
            way_us=_WAY_US,
        )

    def put_off(self, line: str) -> None:
        """Serve a line later."""
        client: Any = self.redis.coordination
        seconds, _ = client.execute_command("TIME")
        client.execute_command("ZADD", self.keys.due, "XX", (int(seconds) + _PUT_OFF_S) * 1_000_000, line)

    def forget_line(self, line: str) -> None:
        """Serve a line no more whose gate cannot be read."""
        self.redis.coordination.execute_command("ZREM", self.keys.due, line)

    def sent(self, woken: Sequence[Woken], *, forget: Sequence[bool]) -> None:
        """Note that tasks have been sent.

        Arguments:
            forget: of each whether it will not come to its gates again.
        """
        _SENT(
            self.redis.coordination,
            woken=self.keys.woken,
            waits=self.keys.waits,
            parked=self.keys.parked,
            due=self.keys.due,
            ids=[one.id for one in woken],
            tokens=[one.token for one in woken],
            generations=[one.generation for one in woken],
            forget=[int(over) for over in forget],
            again_ms=[_SEND_AGAIN_MS] * len(woken),
        )

    def wake(self, id: str, verdict: str) -> bool:
        """Wake one task out of its turn. Whether it is awake.

        Arguments:
            verdict: ``x``: it is revoked. ``=``: its own time has come.
        """
        line = ""
        while True:
            known = self.redis.coordination.execute_command("HGET", self.keys.waits, id)
            token = known.split(b" ", 3)[2].decode() if known else id
            state = self.keys.state_of(line)
            woken, at = _WAKE(
                self.redis.coordination,
                waits=self.keys.waits,
                woken=self.keys.woken,
                line=line,
                order=self.keys.order(state),
                due=self.keys.due,
                run=self.keys.run(token),
                id=id,
                verdict=verdict,
            )
            if woken or not at or at in (b"-", line.encode()):
                return bool(woken)
            line = at.decode()

    def forget(self, id: str, *, sent_as: str = "") -> bool:
        """Know nothing more of a parked task. Whether it was known.

        Arguments:
            sent_as: the token of an attempt; only if that has been sent, and has not come to its gates.
        """
        return _FORGET(
            self.redis.coordination,
            waits=self.keys.waits,
            parked=self.keys.parked,
            woken=self.keys.woken,
            due=self.keys.due,
            id=id,
            sent_as=sent_as,
        )

    def died(self, attempt: Attempt, gates: Sequence[GateCall]) -> None:
        """A process has died that had not asked the gates of its task: Celery has said that it failed."""
        if self.forget(attempt.id, sent_as=attempt.token):
            self._hand_on(attempt, gates)

    def revoked(self, attempt: Attempt, gates: Sequence[GateCall]) -> None:
        """Know nothing more of a task that was revoked where it came, and hand on what it was granted on its way."""
        self.forget(attempt.id)
        self._hand_on(attempt, gates)

    def _hand_on(self, attempt: Attempt, gates: Sequence[GateCall]) -> None:
        permits = [[gate.state, gate.second, gate.count] for gate in gates if gate.kind == "p"]
        if permits:
            told = ["-"] * len(permits)
            self._end(attempt.id, attempt.token, "-", permits, told)  # unless it runs elsewhere

    # For those who look

    def waiting(self, most: int = 1_000) -> list[Waiting]:
        """The tasks that are parked, in no order."""
        client: Any = self.redis.coordination
        cursor, found = b"0", []
        while True:
            cursor, pairs = client.execute_command("HSCAN", self.keys.waits, cursor, "COUNT", 500)
            flat = [part for pair in pairs.items() for part in pair] if isinstance(pairs, dict) else list(pairs)
            ids = flat[::2]
            if ids:
                records = client.execute_command("HMGET", self.keys.parked, *ids)
                for id, known, record in zip(ids, flat[1::2], records, strict=True):
                    found.append(_waiting(id.decode(), known.decode(), record))
            if cursor in (b"0", 0, "0") or len(found) >= most:
                return found[:most]

    def counts(self) -> dict[str, int]:
        """How many wait in each line, by the names of the gates; ``woken``: on their way to be sent."""
        client: Any = self.redis.coordination
        counts = {"parked": int(client.execute_command("HLEN", self.keys.waits))}
        for line, definition in self.lines():
            counts[Served.read(definition).shown] = int(client.execute_command("ZCARD", line))
        return counts

    def _end(
        self,
        id: str,
        token: str,
        nonce: str,
        permits: Sequence[Sequence[Any]],
        verdicts: Sequence[str],
        *,
        crashed: bool = False,
        known_ms: int = 0,
        rest: bytes = b"",
        next_token: str = "",
        next_ms: int = 0,
        keeps: Sequence[int] = (),
    ) -> bool:
        states = [permit[0] for permit in permits]
        known = self._ending(len(states), crashed=crashed)(
            self.redis.coordination,
            *_encoded(
                self.keys.run(token),
                *states,
                *[permit[1] for permit in permits],
                *[self.keys.line(state) for state in states],
                *[self.keys.order(state) for state in states],
                id,
                token,
                nonce,
                str(known_ms),
            ),
            rest,
            *_encoded(
                next_token,
                str(next_ms),
                *[str(permit[2]) for permit in permits],
                *[_word(verdict) for verdict in verdicts],
                *[str(int(keys.needs_no_fence(state))) for state in states],
                *[str(kept) for kept in keeps or [0] * len(states)],
            ),
        )
        return bool(known)

    def _asking(self, gates: Sequence[GateCall], lease_ms: int, *, park: int) -> Prepared[list[Any]]:
        """What asks such gates: packed but for what differs from call to call."""
        form = ("admit", lease_ms, park, *[gate.form for gate in gates])
        return self._prepared.get(form) or self._keep(
            form,
            _ADMIT.prepared(
                run=HOLE,
                parked=self.keys.parked,
                waits=self.keys.waits,
                due=self.keys.due,
                woken=self.keys.woken,
                gates=self.keys.gates,
                states=[HOLE] * len(gates),
                seconds=[HOLE] * len(gates),
                lines=[HOLE] * len(gates),
                orders=[HOLE] * len(gates),
                id=HOLE,
                token=HOLE,
                nonce=HOLE,
                generation=HOLE,
                run_text=HOLE,
                lease_ms=lease_ms,
                park=park,
                record=HOLE,
                patience_us=_PATIENCE_US,
                channel=self.keys.channel,
                label=HOLE,
                expires_us=HOLE,
                kinds=[gate.kind for gate in gates],
                amounts=[HOLE] * len(gates),
                counts=[gate.count for gate in gates],
                spans=[gate.span for gate in gates],
                rests=[gate.rest for gate in gates],
                parts=[gate.part for gate in gates],
                most=[gate.most for gate in gates],
                policies=[gate.policy for gate in gates],
                fairs=[HOLE] * len(gates),
                definitions=[HOLE] * len(gates),
            ),
        )

    def _ending(self, permits: int, *, crashed: bool) -> Prepared[int]:
        """What gives so many permits back."""
        form = ("end", permits, crashed)
        return self._prepared.get(form) or self._keep(
            form,
            _END.prepared(
                run=HOLE,
                parked=self.keys.parked,
                waits=self.keys.waits,
                due=self.keys.due,
                woken=self.keys.woken,
                gates=self.keys.gates,
                states=[HOLE] * permits,
                queues=[HOLE] * permits,
                lines=[HOLE] * permits,
                orders=[HOLE] * permits,
                id=HOLE,
                token=HOLE,
                nonce=HOLE,
                crashed=int(crashed),
                channel=self.keys.channel,
                known_ms=HOLE,
                rest=HOLE,
                next_token=HOLE,
                next_ms=HOLE,
                most=_MOST_TOLD,
                capacities=[HOLE] * permits,
                verdicts=[HOLE] * permits,
                forgets=[HOLE] * permits,
                keeps=[HOLE] * permits,
            ),
        )

    def _keep(self, form: tuple[Any, ...], prepared: Prepared[Any]) -> Prepared[Any]:
        if len(self._prepared) >= _MOST_FORMS:
            self._prepared.clear()
        self._prepared[form] = prepared
        return prepared


def namespaces_of(redis: Connections) -> list[str]:
    """The namespaces in which any task is parked. Looks through all keys, a thousand at a time."""
    client: Any = redis.coordination
    cursor: Any = b"0"
    found: set[str] = set()
    while True:
        cursor, names = client.execute_command("SCAN", cursor, "MATCH", keys.PARKED_MATCHING, "COUNT", 1_000)
        found |= {keys.parked_namespace(name.decode()) for name in names}
        if cursor in (b"0", 0, "0"):
            return sorted(found)


_WORD = str.maketrans({letter: f"%{ord(letter):02X}" for letter in " \t\n\v\f\r%"})


def _word(text: str) -> str:
    """Text without spaces, for it stands among other words; an id may be any text. ``unquote`` reads it."""
    return text.translate(_WORD)


def _label(attempt: Attempt) -> str:
    text = f"{attempt.label}[{attempt.id}]@{_node()}"
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text[:200]


def _node() -> str:
    return f"{_HOST}:{os.getpid()}"


_HOST = socket.gethostname()


def _run_text(gates: Sequence[GateCall], lease_ms: int) -> bytes:
    permits = [(gate.state, gate.second, gate.count) for gate in gates if gate.kind == "p"]
    return msgspec.json.encode((_HOST, os.getpid(), lease_ms, permits))


def _encoded(*texts: str) -> list[bytes]:
    return [text.encode() for text in texts]


def _read_run(text: bytes) -> Crashed | None:
    """None for what was not written by us."""
    nonce, _, rest = text.decode("utf-8", "replace").partition(" ")
    try:
        node, pid, lease_ms, gates = json.loads(rest)
        if all(isinstance(gate, list) and len(gate) == 3 for gate in gates):
            return Crashed(nonce, str(node), int(pid), int(lease_ms), gates)
    except (ValueError, TypeError):
        pass
    return None


def _waiting(id: str, known: str, record: bytes | None) -> Waiting:
    mode, _, token, _, _, _, line = known.split(" ", 6)
    try:
        read = json.loads(record or b"{}")
    except ValueError:
        read = {}
    retries = token.rpartition(".")[2]
    return Waiting(id, int(retries), mode != "q", line, read if isinstance(read, dict) else {})
