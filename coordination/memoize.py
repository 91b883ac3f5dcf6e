"""``@memoized_task`` and its base class: a Celery task whose body is skipped when its result is known.

The memo is asked in the worker, where the body would run (``Task.__call__``), and not where the task is sent:
so chains, groups, chords and callbacks see a task that runs as any other, only faster.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, cast

from celery import Celery, Task, shared_task
from celery.result import AsyncResult

from ..cachelib import MISS, Cache
from ..cachelib.durations import Duration
from . import memo_refresh, parked_messages, passing
from .coordinated import CoordinatedTask, add_steps, lot_of, without_frames
from .declaring import check_memoized, refuse_async
from .gates import memo_gate
from .guarded import is_guarded
from .memo_keys import Call, MemoKeys
from .memo_options import DEFAULTS, PREFIX, MemoOptions
from .memo_results import Memo
from .parking import ParkingLot
from .short_circuit import answered


class MemoizedTask(CoordinatedTask):
    """The base of memoized tasks: what ``@memoized_task`` makes, and what an application's own base may build on.

    >>> @app.task(base=MemoizedTask, memo_key="{region}", memo_ttl="5m")
    ... def sales_report(region: str) -> dict: ...

    ``task(...)``, ``delay``, ``apply_async`` and ``apply`` are as ever; ``run`` always runs. The promises are those of
    ``memoized_task``, and so is the meaning of the options. They are class attributes, so ``task_annotations`` can set
    them too. As the class of all tasks (``Celery(task_cls=MemoizedTask)``) it memoizes those that say something of
    their memo, and none of Celery's own.

    Attributes:
        memo_on: True: with nothing else said, by all arguments, for the TTL of the cache; False: not at all.
        memo_cache: where results are kept; alone it memoizes nothing, so that a base class may name it for all.
        memo_key, memo_ttl, memo_stale, memo_early, memo_failures, memo_tags, memo_version, memo_short_circuit: as for
            ``memoized_task``.
    """

    abstract = True

    memo_on: ClassVar[bool | None] = None
    memo_cache: ClassVar[Cache | None] = None
    memo_key: ClassVar[str | None] = None
    memo_ttl: ClassVar[Duration | Callable[[Any], Duration] | None] = None
    memo_stale: ClassVar[Duration] = 0
    memo_early: ClassVar[float | Literal["xfetch"] | None] = None
    memo_failures: ClassVar[Mapping[type[Exception], Duration] | None] = None
    memo_tags: ClassVar[Sequence[str]] = ()
    memo_version: ClassVar[str | int] = ""
    memo_short_circuit: ClassVar[bool] = False

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Check the options when the task is declared, not when it runs."""
        super().on_bound(app)
        if cls.run is not Task.run and _found(cls) is not None:
            refuse_async(cls.run)
            add_steps(app)

    @property
    def is_coordinated(self) -> bool:
        """Whether its calls may have to wait: for a gate, or for a result that is being made."""
        return super().is_coordinated or (self.memo is not None and not self.memo.cache.redis.is_cluster)

    @property
    def lot(self) -> ParkingLot:
        """Where its calls wait."""
        return lot_of(self.app, self.gate_redis or (None if self.memo is None else self.memo.cache.redis))

    @property
    def memo(self) -> Memo | None:
        """How results are kept; None for a task that is not memoized."""
        known = self.__dict__.get("_memo")
        if known is None and "_memo" not in self.__dict__:
            found = _found(type(self))
            # setdefault: of two threads that are first, one must not count in a memo that is thrown away.
            known = self.__dict__.setdefault("_memo", None if found is None else Memo(self, *found))
        return known

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        parked_messages.restore_address(self.request_stack.top)
        run = partial(super().__call__, *arguments, **keywords)
        memo = self.memo
        if memo is None:
            return run()
        call = memo.call(arguments, keywords)
        try:
            return self._found_or_run(memo, call, run)
        finally:
            self._unclaim_start(arguments, keywords)

    def _found_or_run(self, memo: Memo, call: Call, run: Callable[[], Any]) -> Any:
        token = memo_refresh.token_in(self)
        if token is None:
            return self._lead_or_follow(memo, call, run)
        if parked_messages.generation_of(self.request):  # what it was handed may be the permit of the result
            run = partial(self._pass_memo_gate, call, self._body_of(call.arguments, call.keywords))
        value = memo.refresh(call, run, token, again=memo_refresh.comes_again(self))
        if value is not MISS:
            return value
        # A lease that has run out, or that an invalidation has voided: nobody waits for what would have been made.
        return None if token else self._lead_or_follow(memo, call, run)

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
        """As ever. Raises ``TypeError``, before anything is sent, for arguments that make no key.

        With ``memo_short_circuit``, a bare call whose result is fresh is answered without the broker.
        """
        memo = self.memo
        if memo_refresh.is_header(self.name, options.get("headers")):  # which the lease of the cache makes unique
            return super(CoordinatedTask, self).apply_async(
                args, kwargs, task_id, producer, link, link_error, shadow, **options
            )
        if memo is not None and isinstance(args, list | tuple | None) and isinstance(kwargs, Mapping | None):
            call = memo.call(args or (), kwargs or {})
            if memo.options.short_circuit:
                place = {"task_id": task_id, "producer": producer, "link": link, "link_error": link_error}
                result = answered(self, memo, call, {**place, "shadow": shadow, **options})
                if result is not None:
                    return result
        return super().apply_async(args, kwargs, task_id, producer, link, link_error, shadow, **options)

    def key(self, *arguments: Any, **keywords: Any) -> str:
        """The key of a call in the cache: the same in every process, before and after it went through a broker."""
        return self._call(arguments, keywords)[1].key

    def peek(self, *arguments: Any, **keywords: Any) -> Any:
        """The remembered result of a call, fresh or stale; ``MISS`` when there is none. Never runs the task."""
        memo, call = self._call(arguments, keywords)
        return memo.peek(call)

    def invalidate(self, *arguments: Any, **keywords: Any) -> None:
        """Forget the result of a call; a run of it that is under way will not be remembered.

        When Redis does not answer it is remembered, and sent when it does; see ``Cache.invalidate``.
        """
        memo, call = self._call(arguments, keywords)
        memo.forget(call)

    def refresh(self, *arguments: Any, **keywords: Any) -> AsyncResult:
        """Have a worker make the result of a call anew; until it has, the one there is is served.

        Returns the result of that task: what it made. When another run of the call is under way at that moment, no
        second one is begun, and the result is what is remembered, or what that run brings. A refresh that is retried
        goes on as a refresh.
        """
        self._call(arguments, keywords)
        return self.apply_async(arguments, keywords, headers=memo_refresh.header(self.name))

    def memo_stats(self) -> Mapping[str, int]:
        """Counts of this process: hits, joins, runs, failures, refreshes, answered. See ``Memo.stats``."""
        memo = self.memo
        return {} if memo is None else memo.stats()

    def _lead_or_follow(self, memo: Memo, call: Call, run: Callable[[], Any]) -> Any:
        """What is remembered; else what this run makes, or the run of another that is under way.

        Delivered by a worker, a call that follows is parked; where it was called, it waits in place.
        """
        request = self.request
        here = request.called_directly or request.is_eager or request.id is None
        here = here or passing.stand_in is not None or memo.cache.redis.is_cluster
        if here or not is_guarded(self.name, self.lot.redis.address):
            return memo.lead_or_wait(call, run)
        if not parked_messages.generation_of(request):  # else the lot knows of it, and is asked first
            value = memo.look(call)
            if value is not MISS:
                return value
        body = self._body_of(call.arguments, call.keywords)
        return self._pass_memo_gate(call, partial(memo.lead_or_wait, call, body))

    def _pass_memo_gate(self, call: Call, body: Callable[[], Any]) -> Any:
        """Run a body when the gates let it, and those that want the same result."""
        gate = memo_gate(call.key)
        return without_frames(lambda: self._pass_gates(call.arguments, call.keywords, body, memo=gate))

    def _claims(self) -> bool:
        return memo_refresh.token_in(self) is None

    def _joined(self, verdict: str) -> Any:
        """As of a coordinated task; and what is remembered."""
        memo = self.memo
        if verdict != "m" or memo is None:
            return super()._joined(verdict)
        value = memo.look(memo.call(self.request.args, self.request.kwargs))
        if value is not MISS:
            memo.count("joins")
        return value

    def _verdict_of(self, value: Any, nonce: str) -> str:
        """Those that wait for the result find it in the cache; if it was not kept, one of them runs."""
        told, memo = super()._verdict_of(value, nonce), self.memo
        if told != "-" or memo is None:
            return told
        return "m" if memo.peek(memo.call(self.request.args, self.request.kwargs)) is not MISS else "-"

    def _call(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[Memo, Call]:
        memo = self.memo
        if memo is None:
            raise TypeError(f"{self.name} is not memoized: give it memo_ttl, or memo_on=True")
        return memo, memo.call(arguments, keywords)


def memoized_task(
    *,
    app: Celery | None = None,
    cache: Cache | None = None,
    key: str | None = None,
    ttl: Duration | Callable[[Any], Duration] | None = None,
    stale: Duration = 0,
    early: float | Literal["xfetch"] | None = None,
    failures: Mapping[type[Exception], Duration] | None = None,
    tags: Sequence[str] = (),
    version: str | int = "",
    short_circuit: bool = False,
    base: type[Task] | None = None,
    **options: Any,
) -> Callable[[Callable[..., Any]], MemoizedTask]:
    """Make a task whose result is remembered.

    >>> @memoized_task(app=app, key="{region}", ttl="5m", stale="1m", tags=["sales"], failures={NotFound: "10s"})
    ... def sales_report(region: str) -> dict: ...
    >>> sales_report.delay("north"); sales_report.peek("north"); sales_report.invalidate("north")

    Promises:
        - On a hit the body does not run, and the task completes with the remembered value as any task, so chains go on,
          chords count and callbacks fire.
        - Of all workers that need one result at once, one runs the body. If it fails, is retried or is invalidated, one
          of the others runs; if its process dies, one does after the cache's lease at most.
        - One call has one key: by position or keyword, with a default given or left out, sent, called or ``apply``-ed,
          a model or the dict that it is sent as. Arguments that make no key are a ``TypeError`` before anything is
          sent or run.
        - A stale result is returned at once, and one refresh is sent: this very task, so its routes and limits hold.
          When the broker does not take it, whoever reads after the cache's lease sends another.
        - A failure is remembered only if ``failures`` names it; a retry, ``Ignore``, ``Reject``, a replaced task and
          the end of the time limit never.
        - Without Redis the body runs. A result that the cache cannot keep completes its task all the same.

    Non-promises: It is not a lock: when Redis is away, and when a process was held up for longer than a lease, two may
    run. Those that need a result that is being made are parked, as coordinated tasks are; where nobody would wake them
    (a direct call, eager mode, a cache on a Cluster) they wait in place, for no longer than the time limit and two
    leases (an hour, where there is no limit), and then run beside it. A refresh that no worker takes within the lease
    expires. Results are kept as MessagePack; what JSON results lose (tuples become lists) is lost here too.

    Arguments:
        app: the Celery app; without one, as ``shared_task``.
        cache: where results are kept. Default: one per app, at ``Settings.read().url``.
        key: what tells calls apart, such as ``"{region}"``: what two calls have in common there they share.
            Default: all arguments, by value and type as JSON has it.
        ttl, stale, early: as for ``Cache.get_or_set``.
        failures: which exceptions are remembered, and for how long: ``{NotFound: "10s"}``. The task then fails with one
            of the same class and arguments, without running; subclasses too.
        tags: as for ``Cache.get_or_set``; they may name arguments.
        version: part of the key: raise it when the task's results change their meaning.
        short_circuit: answer a call whose result is fresh where it is sent: no message, no worker, no task events or
            signals. Only a bare ``delay`` or ``apply_async`` (no id, link, countdown or header, no part of a canvas);
            the result is stored under an id of its own, unless it is ignored.
        base: a task class to build on. Default: the app's.
        options: for ``app.task``; and its gates, with a ``gate_`` before the names that ``coordinated_task`` has for
            them: ``@memoized_task(app=app, ttl="5m", gate_lock="report:{region}")``. A hit passes no gate.

    Raises ``ValueError`` or ``TypeError`` at once for a template that names what is no argument, and for options that
    cannot be meant.
    """
    said = {
        "cache": cache,
        "key": key,
        "ttl": ttl,
        "stale": stale,
        "early": early,
        "failures": failures,
        "tags": tags,
        "version": version,
        "short_circuit": short_circuit,
    }
    checked = MemoOptions.checked(**cast("dict[str, Any]", said))

    def decorate(function: Callable[..., Any]) -> MemoizedTask:
        _keys(checked, function, bound=bool(options.get("bind")))
        parent = base or (app.Task if app is not None else Task)
        check_memoized(options, parent)
        refuse_async(function)
        kind = parent
        if not issubclass(parent, MemoizedTask):
            kind = type("MemoizedTask", (MemoizedTask, parent), {"abstract": True})
        # Only what was said: the rest may be said by the base.
        memo = {PREFIX + name: value for name, value in said.items() if value is not DEFAULTS[name]}
        given = {"base": kind, "memo_on": True, **memo, **options}
        if app is None:
            return cast("MemoizedTask", shared_task(**given)(function))
        return cast("MemoizedTask", app.task(**{"shared": False, **given})(function))

    return decorate


def _found(task: type[MemoizedTask]) -> tuple[MemoOptions, MemoKeys] | None:
    """What a class says of its memo, checked; None when it is not memoized."""
    if (task.name or "").startswith("celery."):
        return None  # chord_unlock and the like: an application's base is theirs too
    checked = MemoOptions.of(task)
    if checked is None:
        return None
    bound = not isinstance(inspect.getattr_static(task, "run"), staticmethod)
    return checked, _keys(checked, task.run, bound=bound, restores_models=task._dump_pydantic_arguments is not None)


def _keys(
    options: MemoOptions, function: Callable[..., Any], *, bound: bool, restores_models: bool = False
) -> MemoKeys:
    return MemoKeys(
        function,
        bound=bound,
        key=options.key,
        tags=options.tags,
        version=options.version,
        restores_models=restores_models,
    )
