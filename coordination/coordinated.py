"""``@coordinated_task`` and its base class: a Celery task that runs when its gates let it.

The gates are asked in the worker, where the body would run, by one script; see ``passing.py`` for what becomes of a
task that they refuse, ``gates.py`` for what can be declared, ``parking.py`` for where it waits.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, ClassVar, Literal, cast, get_args
from uuid import uuid4
from weakref import WeakKeyDictionary

from celery import Celery, Task, shared_task
from celery.exceptions import Ignore, Retry
from celery.result import AsyncResult
from celery.signals import task_postrun

from ..cachelib import MISS, Cache, Connections, connect
from ..cachelib.circuit import UNAVAILABLE
from ..cachelib.connections import require_connections
from ..cachelib.counters import Counters
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.errors import CachelibError
from ..cachelib.templates import signature_of
from . import parked_messages, passing
from .admitted import Admitted
from .declaring import check_coordinated, refuse_async
from .errors import DuplicateTask, RateLimited
from .gates import Concurrency, GateCall, Gates, OnConflict, Pause, Rate, Unique, Until, WhenFull, check_unique
from .hold import lease_of
from .losing import run_until_lost
from .memo_keys import MemoKeys, restoring
from .parking import ParkingLot
from .passing import Passage
from .rate_limit import RateLimit

logger = logging.getLogger(__name__)

OnLost = Literal["mark", "terminate"]

_WORKER_STEP = "petiole.tasks.coordination_step:CoordinationStep"
_CONSUMER_STEP = "petiole.tasks.coordination_step:WokenQueues"

PREFIX = "gate_"
_DECLARED = ("lock", "concurrency", "rate", "unique", "debounce")
_CLAIM_MS = 3_600_000
"""So long a call that is unique may take from when it is due until it starts; then another one may be sent."""
_JOINED_S = 600.0
"""So long the result of a call is kept for those that waited for it to end."""

_lots: "WeakKeyDictionary[Connections, dict[str, ParkingLot]]" = WeakKeyDictionary()
_connections: "WeakKeyDictionary[Celery, Connections]" = WeakKeyDictionary()


class CoordinatedTask(Task):
    """The base of coordinated tasks: what ``@coordinated_task`` makes, and what an application's own base may build on.

    >>> @app.task(base=CoordinatedTask, gate_lock="account:{account_id}")
    ... def charge(account_id: int) -> None: ...

    The options are class attributes, so ``task_annotations`` can set them too; a task without any runs as ever.

    Attributes:
        gate_redis: where it is coordinated. Default: of the app, ``connect()`` at first use.
        gate_lock, gate_concurrency, gate_rate, gate_unique, gate_debounce, gate_fair, gate_max_parked, gate_when_full,
            gate_lease, gate_on_lost: as for ``coordinated_task``.
    """

    abstract = True

    gate_redis: ClassVar[Connections | None] = None
    gate_lock: ClassVar[str | Sequence[str] | None] = None
    gate_concurrency: ClassVar[Any] = None
    gate_rate: ClassVar[Any] = None
    gate_unique: ClassVar[Unique | OnConflict | bool | None] = None
    gate_debounce: ClassVar[Duration | Pause | None] = None
    gate_fair: ClassVar[str | None] = None
    gate_max_parked: ClassVar[int | None] = None
    gate_when_full: ClassVar[WhenFull] = "reject"
    gate_lease: ClassVar[Duration] = 30
    gate_on_lost: ClassVar[OnLost] = "mark"

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Check the options when the task is declared, not when it runs."""
        super().on_bound(app)
        if cls.run is not Task.run and _gates_of(cls, app):
            refuse_async(cls.run)
            add_steps(app)

    @property
    def gates(self) -> Gates:
        """What must be free before it runs."""
        found = self.__dict__.get("_gates")
        if found is None:
            found = self.__dict__.setdefault("_gates", _gates_of(type(self), self.app))
        return cast("Gates", found)

    @property
    def is_coordinated(self) -> bool:
        """Whether there is a gate at all."""
        return bool(self.gates)

    @property
    def lot(self) -> ParkingLot:
        """Where its calls wait."""
        return lot_of(self.app, self.gate_redis)

    @property
    def admission(self) -> Admitted:
        """What the running call holds. Raises ``LookupError`` where none runs."""
        found = getattr(self.request, "admission", None)
        if not isinstance(found, Admitted):
            raise LookupError(f"{self.name} is not running here, or has no gates")
        return found

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        parked_messages.restore_address(self.request_stack.top)
        if not self.gates:
            self._leave_lot()
            return super().__call__(*arguments, **keywords)
        return without_frames(lambda: self._pass_gates(arguments, keywords, self._body_of(arguments, keywords)))

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        **options: Any,
    ) -> Any:
        """As ever; but a call that is not unique may be told so here.

        With ``unique=Unique(until=..., on_conflict="drop")`` a second call that nobody else waits for is not sent: the
        result returned is that of the first one. With ``"raise"`` it raises ``DuplicateTask``. A call in a chain, group
        or chord, or with an id, a link or a parent that waits, is always sent, and is decided in the worker.
        """
        unique = _unique_of(type(self))
        asked = passing.stand_in is None or passing.stand_in.asks_redis
        if unique is None or unique.until is None or self.app.conf.task_always_eager or not asked:
            return super().apply_async(args, kwargs, task_id, producer, link, link_error, shadow, **options)
        bare = task_id is None and not link and not link_error and not _IN_CANVAS & options.keys()
        chosen = task_id or uuid4().hex
        other = self._claim(unique, args or (), kwargs or {}, chosen, options)
        if not other and task_id is not None and unique.on_conflict == "join" and not options.get("retries"):
            self._forget_joined(task_id)  # of an earlier call that had the same id
        if other and bare and unique.on_conflict == "drop":
            return AsyncResult(other, backend=self.backend, app=self.app)
        if other and bare and unique.on_conflict == "raise":
            raise DuplicateTask(self.name, "the call", other)
        if other and unique.on_conflict == "join":
            headers = dict(options.pop("headers", None) or {})
            ours = headers.get(parked_messages.HEADER)
            headers[parked_messages.HEADER] = {**(ours if isinstance(ours, dict) else {}), "follows": other}
            options["headers"] = headers
        try:
            return super().apply_async(args, kwargs, chosen, producer, link, link_error, shadow, **options)
        except BaseException:
            if not other:
                self.unclaim(chosen, args or (), kwargs or {})
            raise

    def retry(self, args: Any = None, kwargs: Any = None, exc: Any = None, throw: bool = True, **options: Any) -> Any:
        """As ever; but ``RateLimited`` is for the gates, and no failure, whatever ``autoretry_for`` says."""
        if isinstance(exc, RateLimited):
            raise exc
        return super().retry(args, kwargs, exc, throw, **options)

    def on_replace(self, sig: Any) -> Any:
        """Give back what is held before the other one comes: it has the same id, and may want the same."""
        admitted = getattr(self.request, "admission", None)
        if isinstance(admitted, Admitted):
            admitted.end()
            self.request.admission = None
        return super().on_replace(sig)

    def unclaim(self, id: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Nobody need wait any more for a call that was to be the only one: it was revoked, or could not be sent."""
        try:
            for gate in self.gates.of(arguments, keywords):
                if gate.kind == "c":
                    self.lot.unclaim(gate.state, id)
        except UNAVAILABLE as error:
            logger.warning("%s: the claim of %s ends by itself: %s", self.name, id, error)

    def coordination_stats(self) -> dict[str, int]:
        """Counts of this process.

        ``runs``; ``parked``; ``joined``: ended with the result of another call; ``dropped``; ``rejected``;
        ``rate_limited``: the task said so; ``stale``: deliveries for which another one stood; ``postponed``: sent again
        because Redis was away.
        """
        names = ("runs", "parked", "joined", "dropped", "rejected", "rate_limited", "stale", "postponed")
        return dict.fromkeys(names, 0) | self._counters.read()

    @property
    def _counters(self) -> Counters:
        found = self.__dict__.get("_coordination_counters")
        if found is None:
            found = self.__dict__.setdefault("_coordination_counters", Counters())
        return cast("Counters", found)

    def _body_of(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Callable[[], Any]:
        return lambda: self.run(*arguments, **keywords)

    def _pass_gates(
        self,
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        body: Callable[[], Any],
        *,
        memo: GateCall | None = None,
    ) -> Any:
        """Run a body when the gates let it.

        Arguments:
            memo: the gate of those that want the same result, which is asked too.
        """
        running = self.request_stack.top
        if running is None or getattr(running, "admission", None) is not None:
            # A direct call, maybe of a body by itself. Its request is its own: what it holds is not for other threads.
            self.push_request(args=arguments, kwargs=keywords, called_directly=True, admission=None, headers={})
            try:
                return self._pass_gates(arguments, keywords, body, memo=memo)
            finally:
                self.pop_request()
        followed = parked_messages.header_of(running).get("follows")
        followed = followed if isinstance(followed, str) else ""
        if followed and not parked_messages.generation_of(running):
            value = self._joined(f"j{followed}")
            if value is not MISS:
                self._counters.add("joined")
                return value
        try:
            gates = self.gates.of(arguments, keywords)
        except (TypeError, ValueError):
            self._leave_lot()
            raise
        running.asks_gates = True
        started_once = parked_messages.header_of(running).get("again") and not any(gate.is_unique for gate in gates)
        if started_once or not self._claims():
            gates = [gate for gate in gates if gate.kind != "c"]
        return Passage(
            self,
            self.lot,
            [*([memo] if memo is not None else ()), *gates],
            arguments,
            keywords,
            lease_of(self.gate_lease),
            self._counters,
            body if self.gate_on_lost == "mark" else lambda: run_until_lost(self.admission, body),
            self._joined,
            self._verdict_of,
            lambda: self._reclaim(arguments, keywords),
            lambda retry: self._retried_in_ms(retry, gates),
            followed,
            alone=memo is not None and not self.gates,
        ).go()

    def _forget_joined(self, id: str) -> None:
        with suppress(CachelibError, RuntimeError, *UNAVAILABLE):
            _joined_cache(self.lot).delete(f"{self.name}:{id}")

    def _claims(self) -> bool:
        """Whether the running delivery may be the one that others claim to be."""
        return True

    def _unclaim_start(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """The running delivery ends and has not asked its gates: what it claimed until it starts is free again."""
        request, unique = self.request_stack.top, _unique_of(type(self))
        if request is None or request.called_directly or unique is None or unique.until not in get_args(Until):
            return
        if request.id and not getattr(request, "asks_gates", False):
            with suppress(TypeError, ValueError):  # arguments that make no claim: it has none
                self.unclaim(request.id, arguments, keywords)

    def _leave_lot(self) -> None:
        """This delivery was woken, and will not ask its gates: it has none any more, or they are others."""
        request = self.request_stack.top
        if request is not None and parked_messages.generation_of(request):
            with suppress(RuntimeError, *UNAVAILABLE):
                self.lot.forget(request.id)

    def _joined(self, verdict: str) -> Any:
        """The result of the call that a verdict names; ``MISS`` when it is not known any more."""
        if not verdict.startswith("j"):
            return MISS
        try:
            return _joined_cache(self.lot).get(f"{self.name}:{verdict[1:]}", MISS)
        except (CachelibError, *UNAVAILABLE):
            return MISS

    def _verdict_of(self, value: Any, nonce: str) -> str:
        """Keep the result for those that wait to end with it."""
        unique = _unique_of(type(self))
        if unique is None or unique.on_conflict != "join" or self.request.called_directly:
            return "-"
        # Of a call that is the only one from when it is sent, others know the id; of one that runs, its run.
        place = f"{self.request.id}.{nonce}" if unique.until is None else self.request.id
        ttl_s = _JOINED_S if unique.until is None else max(_CLAIM_MS, _claim_ms(unique)) / 1_000
        try:
            kept = _joined_cache(self.lot).set(f"{self.name}:{place}", value, ttl=ttl_s)
        except (CachelibError, TypeError, ValueError, *UNAVAILABLE) as error:
            logger.warning("%s: others cannot end with its result, and will run: %s", self.name, error)
            return "-"
        return f"j{place}" if kept is not False else "-"

    def _reclaim(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Claim once more to be the only call: it has to come again."""
        unique = _unique_of(type(self))
        if unique is not None and unique.until == "end" and self._claims():
            self._claim(unique, arguments, keywords, self.request.id, {"retries": 1})

    def _retried_in_ms(self, retry: Retry, gates: Sequence[GateCall]) -> int:
        """In what time the next attempt of the only call comes; 0: none does, or it is for other arguments.

        Called while what the task holds is about to be given back, so it raises nothing.
        """
        unique, signature = _unique_of(type(self)), retry.sig
        if unique is None or unique.on_conflict != "join" or unique.until is None or signature is None:
            return 0
        try:
            following = self.gates.of(signature.args or (), signature.kwargs or {})
            states, same = ([gate.state for gate in some if gate.is_unique] for some in (gates, following))
            return 1 + int(_seconds_until_due(signature.options) * 1_000) if states == same else 0
        except Exception as error:  # noqa: BLE001 - whatever the next attempt is made of, this one has ended
            logger.warning("%s: others do not wait for the next attempt: %s", self.name, error)
            return 0

    def _claim(
        self,
        unique: Unique,
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        id: str,
        options: Mapping[str, Any],
    ) -> str:
        """Claim to be the only call. The id of another one that is, or the empty text."""
        gates = self.gates.of(arguments, keywords)
        claims = [gate for gate in gates if gate.kind == "c"]
        permits = [gate.state for gate in gates if gate.is_unique]
        ttl_ms = _claim_ms(unique)
        if unique.until in get_args(Until):
            ttl_ms += int(_seconds_until_due(options) * 1_000)
        try:
            for gate in claims:
                sent_before = options.get("retries") or _said_by_us(options)
                replaces = unique.on_conflict == "replace" and not sent_before
                state = permits[0] if unique.until == "end" else gate.state
                other = self.lot.claim(gate.state, state, id, ttl_ms=ttl_ms, replace=replaces)
                if other:
                    return other
        except UNAVAILABLE as error:
            logger.warning("%s: whether it is the only call is decided in the worker: %s", self.name, error)
        return ""


def _claim_ms(unique: Unique) -> int:
    if unique.until is None or unique.until in get_args(Until):
        return _CLAIM_MS
    return milliseconds(unique.until, "until")


def _said_by_us(options: Mapping[str, Any]) -> bool:
    """Whether a call is sent again that was sent before: it could not be asked for, or has to come later."""
    said = (options.get("headers") or {}).get(parked_messages.HEADER)
    return isinstance(said, dict) and bool(said.get("postponed") or said.get("again"))


def _seconds_until_due(options: Mapping[str, Any]) -> float:
    eta = options.get("eta")
    if isinstance(eta, str):
        eta = datetime.fromisoformat(eta)
    if isinstance(eta, datetime):
        return max(0.0, (eta - datetime.now(eta.tzinfo)).total_seconds())
    return max(0.0, float(options.get("countdown") or 0))


_IN_CANVAS = {"chain", "chord", "group_id", "reply_to", "replaced_task_nesting"}


def coordinated_task(
    *,
    app: Celery | None = None,
    redis: Connections | None = None,
    lock: str | Sequence[str] | None = None,
    concurrency: "int | Concurrency | Mapping[str, int] | Sequence[int | Concurrency] | None" = None,
    rate: "str | RateLimit | Rate | Mapping[str, str | RateLimit] | Sequence[str | RateLimit | Rate] | None" = None,
    unique: "Unique | OnConflict | bool | None" = None,
    debounce: "Duration | Pause | None" = None,
    fair: str | None = None,
    max_parked: int | None = None,
    when_full: WhenFull = "reject",
    lease: Duration = 30,
    on_lost: OnLost = "mark",
    base: type[Task] | None = None,
    **options: Any,
) -> Callable[[Callable[..., Any]], CoordinatedTask]:
    """Make a task that runs when its gates let it, in all workers together.

    >>> @coordinated_task(app=app, lock="account:{account_id}", rate=["100/m", "{tenant}: 10/s"])
    ... def charge(account_id: int, tenant: str) -> None: ...

    Promises:

    - One script asks all gates, permits before tokens: it takes all or nothing, and names the one that refused.
    - A task that is refused is parked in Redis by the same script, and its delivery is acknowledged. It uses up no
      retry, no slot, no prefetch and no memory of a worker; the visibility timeout does not double it; it is revocable
      and visible (``petiole parked``), survives restarts, and is sent again when it may run: first come, first served
      within a key, and by turns between keys.
    - While its lease is valid nobody else holds what it holds. What a task held whose pool process dies, or is
      terminated, is given back within a second; what a whole worker held that dies, within one ``lease``. Locks are
      those of ``Lock``, of the same name.
    - A second delivery of a call that runs does not run beside it: it runs if the first one's process dies.
    - Rates hold for when tasks start: no window of time sees more than ``RateLimit.bound``.

    Non-promises: what Redis forgets is forgotten; the order holds between tasks that wait, not between one that waits
    and one that was woken and sits in a queue of the broker. No lease can stop a process that was stopped for longer
    than it and goes on: what must not be done twice is checked by the fence (``task.admission.hold.guard``). Without
    Redis nothing runs: the broker delivers the task again, five to ten seconds later. The newest call is the last to be
    parked, which need not be the last that was sent. ``task.run(...)`` asks no gate.

    Run where it is called (eager mode, a direct call), a task waits for its gates in place, for a minute at most.

    Arguments:
        app: the Celery app; without one, as ``shared_task``.
        redis: a single server, or one with Sentinels. Default: ``connect()`` at first use, one per app.
        lock: names of locks, templates of the arguments: one at a time.
        concurrency: how many at once: a number, ``{"{tenant}": 5}``, or ``Concurrency``, or several of them.
        rate: how often: ``"100/m"``, ``"{tenant}: 10/s"``, a ``RateLimit``, or ``Rate``, or several of them.
        unique: of calls that are the same, one: ``Unique(...)``; a name of ``on_conflict``; or True, to join.
        debounce: run when calls have paused for so long, with the newest arguments; or a ``Pause``.
        fair: what goes by turns in lines that several keys share: a template. Default: the first key of a rate or of
            permits.
        max_parked: how many calls may wait at one gate. Default: any number.
        when_full: what becomes of one more: ``reject`` (it fails with ``TooManyParked``), ``drop_oldest`` (the first of
            the line ends with None), ``drop_newest`` (it ends with None).
        lease: how long others wait when a whole worker has died.
        on_lost: when what it holds was lost: ``mark`` (``task.admission.lost`` says so), or ``terminate`` (as by a soft
            time limit, with ``LockLost``; in pools of processes).
        base: a task class to build on. Default: the app's.
        options: for ``app.task``.

    Raises ``ValueError`` or ``TypeError`` for what cannot be meant: at once, or, for what needs the arguments of the
    function, when Celery makes the task, which is before a worker starts.
    """
    declared = {
        "redis": redis, "lock": lock, "concurrency": concurrency, "rate": rate, "unique": unique, "debounce": debounce,
        "fair": fair, "max_parked": max_parked, "when_full": when_full, "lease": lease, "on_lost": on_lost,
    }  # fmt: skip
    if redis is not None:
        require_connections(redis)
    _check_on_lost(on_lost, "on_lost")
    lease_of(lease, "lease")

    def decorate(function: Callable[..., Any]) -> CoordinatedTask:
        parent = base or (app.Task if app is not None else Task)
        check_coordinated(options, parent)
        refuse_async(function)
        bases = (parent,) if issubclass(parent, CoordinatedTask) else (CoordinatedTask, parent)
        given = {PREFIX + name: value for name, value in declared.items()}
        kind = type("CoordinatedTask", bases, {"abstract": True, **given})
        if app is None:
            return cast("CoordinatedTask", shared_task(base=kind, **options)(function))
        return cast("CoordinatedTask", app.task(base=kind, **{"shared": False, **options})(function))

    return decorate


def add_steps(app: Celery) -> None:
    """Have the workers of an app wake what is parked, renew leases, and know what is over. Loaded by name, there."""
    task_postrun.connect(passing.is_over, weak=False, dispatch_uid="petiole")
    app.steps["worker"].add(_WORKER_STEP)
    app.steps["consumer"].add(_CONSUMER_STEP)


def without_frames(call: Callable[[], Any]) -> Any:
    """The result of a call; an exception that ends a delivery comes without its frames.

    Celery pickles them for its main process, and nobody reads them: half of what it costs to park a task.
    """
    try:
        return call()
    except Ignore as ignored:
        ended = ignored
    raise ended.with_traceback(None)


def lot_of(app: Celery, redis: Connections | None) -> ParkingLot:
    """Where the calls of an app's tasks wait. Asks nobody."""
    if redis is None:
        redis = _connections.get(app) or _connections.setdefault(app, connect())
    namespace = app.main or "tasks"
    lots = _lots.setdefault(redis, {})
    return lots.get(namespace) or lots.setdefault(namespace, ParkingLot(redis, namespace))


def _joined_cache(lot: ParkingLot) -> Cache:
    cache = lot.__dict__.get("_joined")
    if cache is None:
        cache = lot.__dict__.setdefault("_joined", Cache(lot.redis, namespace=f"joined:{lot.keys.namespace}"))
    return cast("Cache", cache)


def _unique_of(task: type[CoordinatedTask]) -> Unique | None:
    unique = task.gate_unique
    if unique is None or unique is False:
        return None
    if unique is True:
        return Unique()
    return unique if isinstance(unique, Unique) else Unique(on_conflict=unique)


def _unique_key(task: type[CoordinatedTask], name: str) -> Callable[[Sequence[Any], Mapping[str, Any]], str]:
    unique = _unique_of(task)
    found = MemoKeys(
        task.run,
        bound=_is_bound(task),
        key=None if unique is None else unique.key,
        tags=(),
        version="",
        what=f"unique= of {name}",
        restores_models=task._dump_pydantic_arguments is not None,
    )
    return lambda arguments, keywords: found.call(name, arguments, keywords).key


def _check_on_lost(given: object, name: str) -> None:
    if given not in get_args(OnLost):
        raise ValueError(f"{name}={given!r} is unknown; there are {', '.join(get_args(OnLost))}")


def _is_bound(task: type[CoordinatedTask]) -> bool:
    """Whether the function is given the task itself first."""
    return not isinstance(inspect.getattr_static(task, "run"), staticmethod)


def _gates_of(task: type[CoordinatedTask], app: Celery) -> Gates:
    """Reads what a task declares. Raises ``ValueError`` and ``TypeError`` for what makes no sense."""
    if (task.name or "").startswith("celery."):
        return Gates(task.name, signature_of(task.run))
    unknown = [name for name in vars(task) if name.startswith(PREFIX) and not hasattr(CoordinatedTask, name)]
    if unknown:
        known = ", ".join(sorted(name for name in vars(CoordinatedTask) if name.startswith(PREFIX)))
        raise TypeError(f"{unknown[0]} is no option of a coordinated task; there are {known}")
    if task.gate_redis is not None:
        require_connections(task.gate_redis, "gate_redis")
    _check_on_lost(task.gate_on_lost, "gate_on_lost")
    lease_of(task.gate_lease, "gate_lease")
    unique = _unique_of(task)
    if unique is not None:
        check_unique(unique)
    name = str(task.name)
    return Gates(
        name,
        signature_of(task.run, without_first=_is_bound(task)),
        lock=task.gate_lock,
        concurrency=task.gate_concurrency,
        rate=task.gate_rate,
        unique=unique,
        unique_key=None if unique is None else _unique_key(task, name),
        namespace=app.main or "tasks",
        debounce=task.gate_debounce,
        fair=task.gate_fair,
        max_parked=task.gate_max_parked,
        when_full=task.gate_when_full,
        restored=restoring(task.run) if task._dump_pydantic_arguments is not None else None,
    )
