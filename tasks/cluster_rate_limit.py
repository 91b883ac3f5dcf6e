"""``global_rate_limit``: Celery's own ``rate_limit``, for all workers together.

A consumer step takes the place of Celery's token buckets. A message that comes is held; the worker reserves a start for
it in Redis (``RateLimiter.reserve``), and hands it to the pool then. ``rate_slots`` decides, here it is done. One timer
serves all tasks: Celery's own has one chain per message, and with ten of them due its event loop falls to one a second.

What is held does not count against the prefetch limit, so other tasks of the same queue go on. What is held for half as
long as the broker waits for an acknowledgement goes back to it, and comes again with a new delivery: so nothing is
delivered twice for having waited.

The rates that people order (``celery control rate_limit``, Flower) are kept in Redis: told to all workers at once, read
again every few seconds, and kept as long as workers read them.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from threading import Lock
from typing import Any

from celery import Celery, Task, bootsteps
from celery.worker import control
from kombu.exceptions import OperationalError as BrokerUnavailable

from ..cachelib.connections import UNAVAILABLE, Connections, connect, require_connections
from ..cachelib.settings import Settings
from ..coordination.errors import LimiterUnavailable
from ..coordination.keys import RateKeys
from ..coordination.rate_limit import Limited, Reserved
from ..coordination.rate_limiter import RateLimiter
from .rate_slots import FORGET, GiveBack, Line, Reserve, Start, Wait, as_limit, read_rate

logger = logging.getLogger(__name__)

LOOP_WAITS_S = 0.25
"""For Redis, at most: the consumer's loop stands still meanwhile."""
_HELD_S = 900.0
ASK_AGAIN_S = 1.0
"""When Redis was away."""
READ_AGAIN_S = 10.0
"""The orders, in case that nobody told of a new one."""
ORDERS_LAST_S = 30 * 86_400
GUESTS_STAY_S = 1.0
"""A message that had to wait for its eta has been here for longer than is known."""
GIVEN_BACK_AT_ONCE = 20

_TOLD = "petiole_rate_limits_ordered"
_celerys_own: Callable[..., dict[str, Any]] = control.rate_limit


def global_rate_limit(
    app: Celery, redis: Connections | None = None, *, name: str | None = None, hold_at_most: int = 1_000
) -> None:
    """Have ``rate_limit`` hold for all workers of an app together, and not for each by itself.

    >>> app = Celery("shop")
    >>> global_rate_limit(app)
    >>> @app.task(rate_limit="10/s")
    ... def mail(address: str) -> None: ...

    Promises: all workers together start a task no more often than its ``rate_limit`` says, be it from the task's
    attribute, from ``task_annotations`` or ordered by remote control; "10/s" is one every 100 ms, as ever. With a
    backlog they start exactly so many, whatever the pool. It takes one call to Redis per limited task, none for the
    others, and other tasks do not wait behind those that are held. ``celery control rate_limit <task> <rate>``, as well
    as Flower's button, which asks one worker only, changes the rate in all workers, and it is kept when they restart:
    until another order, ``0`` for no limit, or ``default`` for what the code says; or until no worker has run for 30
    days. ``celery inspect stats`` shows the limits and what is held.

    When Redis does not answer, limited tasks wait and Redis is asked again every second; the others go on. So the
    limit is never exceeded, and with Redis away nothing that is limited starts. A worker that starts then goes by the
    code until it can read what was ordered.

    Non-promises: a slot is for the handing over to the pool, so where all its processes are busy tasks start later
    and may then start closer together; a worker that stood still starts up to a quarter of a second's worth at once.
    While workers change over from one rate to another, both count. A backlog goes to the workers as they fetch it,
    not evenly; a task that has waited for half of the broker's visibility timeout goes to the end of its queue.
    A task that is declared after the worker has started is limited from the next order, or the next reading of them.

    Arguments:
        redis: from ``connect``: where to count. Default: what ``Settings.read()`` finds, when a worker starts. The
            worker makes connections of its own to it, which wait for a quarter of a second at most.
        name: workers with the same name share limits. Default: that of the app.
        hold_at_most: so many messages one worker holds beside its prefetch limit; what comes then takes a place in it.

    Raises ``ValueError`` for ``hold_at_most`` below 1, or if this app has it already.
    """
    if type(hold_at_most) is not int or hold_at_most < 1:
        raise ValueError(f"hold_at_most is a whole number, 1 or more, not {hold_at_most!r}")
    if any(isinstance(step, type) and issubclass(step, GlobalRateLimit) for step in app.steps["consumer"]):
        raise ValueError(f"{app!r} has a global rate limit already; call global_rate_limit once per app")
    if redis is not None:
        require_connections(redis)
    url = redis.url if redis is not None else None
    options = {"url": url, "group": name or app.main or "celery", "hold_at_most": hold_at_most}
    app.steps["consumer"].add(type("GlobalRateLimit", (GlobalRateLimit,), {"__module__": __name__, **options}))
    control.control_command(
        name="rate_limit",
        args=[("task_name", str), ("rate_limit", str)],
        signature="<task_name> <rate_limit (e.g., 5/s | 5/m | 5/h | 0 | default)>",
    )(_rate_limit)
    control.control_command(name=_TOLD, visible=False)(_ordered_elsewhere)


class _Held:
    """The messages of one task that this worker holds. Celery knows it as the task's bucket."""

    def __init__(self, step: "GlobalRateLimit", task: str, keep_s: float) -> None:
        self.task = task
        self.line: Line[Any, Reserved] = Line(keep_s)
        self.rate: str | None = None
        self.due_s = math.inf
        self._step = step

    def clear_pending(self) -> None:
        """Celery has lost its connection, or ends: what is held here cannot be acknowledged any more."""
        self.line.clear()
        self._step.cleared(self)


class GlobalRateLimit(bootsteps.StartStopStep):
    """The consumer step. ``global_rate_limit`` makes one for each app."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    url: str | None = None
    group = "celery"
    hold_at_most = 1_000

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._consumer = consumer
        self._redis: Connections | None = None
        self._limiters: dict[str, RateLimiter] = {}
        self._orders: dict[str, str] = {}
        self._held: dict[str, _Held] = {}
        self._running = False
        self._away_until_s = -math.inf
        self._away = False
        self._lifted = 0
        self._timer: Any = None
        self._timer_at_s = math.inf
        self._reread: Any = None
        self._busy = Lock()
        self._again = False
        consumer.petiole_rate_limits = self
        consumer.bucket_for_task = self._bucket_for_task
        consumer._limit_task = self._hold
        consumer._limit_post_eta = self._hold_after_eta
        consumer.reset_rate_limits()

    def __repr__(self) -> str:
        held = sum(len(held.line) for held in self._held.values())
        return f"<GlobalRateLimit {self.group!r} [{held} held{', Redis is away' if self._away else ''}]>"

    # What Celery calls

    def start(self, consumer: Any) -> None:
        """The consumer has a connection: from now on there are messages."""
        self._running = True
        keep_s = _half_of_visibility_s(consumer)
        for held in self._held.values():
            held.line.keep_s = keep_s
        self.reread()

    def stop(self, consumer: Any) -> None:  # noqa: ARG002
        """The consumer has lost its connection, or ends."""
        self._running = False
        for entry in (self._timer, self._reread):
            self._cancel(entry)
        self._timer = self._reread = None
        for held in self._held.values():
            held.clear_pending()

    def terminate(self, consumer: Any) -> None:
        """As ``stop``."""
        self.stop(consumer)

    def shutdown(self, consumer: Any) -> None:
        """The worker ends."""
        self.stop(consumer)
        redis, self._redis = self._redis, None
        self._limiters.clear()
        if redis is not None:
            redis.close()

    def info(self, consumer: Any) -> dict[str, Any]:  # noqa: ARG002
        """For ``inspect stats``, and so for Flower."""
        tasks = {
            name: {"rate_limit": held.rate, "ordered": name in self._orders, "held": len(held.line)}
            for name, held in self._held.items()
            if held.rate is not None or len(held.line) or name in self._orders
        }
        return {"global_rate_limit": {"name": self.group, "redis": "away" if self._away else "there", "tasks": tasks}}

    def _bucket_for_task(self, task: Task) -> _Held | None:
        """In place of the consumer's own."""
        name = task.name
        try:
            rate = read_rate(self._orders.get(name, task.rate_limit))
        except ValueError as error:
            raise ValueError(f"task {name!r}: {error}") from None
        held = self._held.get(name)
        if held is None:
            if rate is None:
                return None
            held = self._held[name] = _Held(self, name, _half_of_visibility_s(self._consumer))
        if rate != held.rate:
            if held.rate is not None:
                self._give_back_slots(held)
            held.rate = rate
            held.line.limited = rate is not None
            held.line.heard()
            held.due_s = -math.inf
        return held if rate is not None else None

    def _hold(self, request: Any, held: _Held, tokens: int) -> None:  # noqa: ARG002
        held.line.add(request, time.monotonic())
        held.due_s = -math.inf
        self._attend()

    def _hold_after_eta(self, request: Any, held: _Held, tokens: int) -> None:
        self._consumer.qos.decrement_eventually()
        if _late_s(request) > GUESTS_STAY_S / 2:  # it came when its eta was over
            self._hold(request, held, tokens)
            return
        held.line.add_guest(request, time.monotonic(), GUESTS_STAY_S)
        held.due_s = -math.inf
        self._attend()

    # Orders

    def order(self, task: str, value: str | None) -> bool:
        """Keep an order, or with ``None`` forget it. Whether it is another than before. Raises ``UNAVAILABLE``."""
        client, key = self._connections().coordination, self._order_key(task)
        if value is None:
            return bool(client.execute_command("DEL", key))
        before = client.set(key, value, ex=ORDERS_LAST_S, get=True)
        return bool(before != value.encode())

    def reread(self) -> None:
        """Read what was ordered, keep it for longer, and act on it. Again after some seconds."""
        self._cancel(self._reread)
        self._reread = None
        names = list(self._consumer.app.tasks)
        try:
            pipeline = self._connections().coordination.pipeline(transaction=False)
            for name in names:
                pipeline.execute_command("GETEX", self._order_key(name), "EX", ORDERS_LAST_S)
            answers = pipeline.execute()
        except UNAVAILABLE as error:
            self._is_away(error)
        else:
            self._is_there()
            self._orders = {
                name: _text(value) for name, value in zip(names, answers, strict=True) if _good(name, value)
            }
            self._consumer.reset_rate_limits()
        if self._running:
            self._reread = self._consumer.timer.call_after(ASK_AGAIN_S if self._away else READ_AGAIN_S, self._on_reread)
            self._attend()

    def _on_reread(self) -> None:
        self._reread = None  # it runs: under gevent, to cancel it would end it
        if self._running:
            self.reread()

    def _order_key(self, task: str) -> bytes:
        return RateKeys(self._limiter_name, ["ordered"]).of(task)[1]

    # The line

    def cleared(self, held: _Held) -> None:
        """What one task had here is gone."""
        self._give_back_slots(held)
        self._lifted = 0  # of a prefetch limit that goes with the connection

    def _attend(self) -> None:
        """Do what is due. Who comes meanwhile, from another thread or greenlet, leaves it to who is at it."""
        self._again = True
        while self._again and self._running and self._busy.acquire(blocking=False):
            try:
                self._again = False
                try:
                    for held in list(self._held.values()):
                        if held.due_s <= time.monotonic():
                            self._serve(held)
                finally:
                    self._lift_prefetch()
                    self._set_timer()
            finally:
                self._busy.release()

    def _serve(self, held: _Held) -> None:
        held.due_s, given_back = time.monotonic() + ASK_AGAIN_S, 0  # should anything below raise
        while self._running:
            now_s = time.monotonic()
            match held.line.next(now_s):
                case Start(request):
                    self._consumer._limit_move_to_pool(request)
                case Reserve(within_s):
                    self._reserve(held, within_s, now_s)
                case GiveBack(request):
                    request.message.reject_log_error(logger, self._consumer.connection_errors, requeue=True)
                    given_back += 1
                    if given_back == GIVEN_BACK_AT_ONCE:
                        held.due_s = now_s + 0.01
                        return
                case Wait(delay_s):
                    held.due_s = now_s + delay_s
                    return
                case None:
                    held.due_s = math.inf
                    self._give_back_slots(held)
                    return

    def _reserve(self, held: _Held, within_s: float, now_s: float) -> None:
        if now_s < self._away_until_s:
            held.line.refused(self._away_until_s)
            return
        rate = held.rate
        if rate is None:
            return
        try:
            answer = self._limiter(rate).reserve(held.task, within=within_s if math.isfinite(within_s) else None)
        except LimiterUnavailable as error:
            self._is_away(error)
            held.line.refused(self._away_until_s)
            return
        self._is_there()
        now_s = time.monotonic()  # after the answer: so a start is never before the server's
        if isinstance(answer, Limited):
            held.line.refused(now_s + max(ASK_AGAIN_S, answer.retry_after - within_s))
        elif held.rate != rate:  # changed while Redis was asked
            self._refund(rate, [answer])
        else:
            held.line.reserved(now_s + answer.start_after, answer)

    def _give_back_slots(self, held: _Held) -> None:
        if held.rate is not None:
            self._refund(held.rate, held.line.take_slots(time.monotonic()), held.task)

    def _refund(self, rate: str, slots: list[Reserved], task: str = "") -> None:
        """As far as it goes: what is not given back is a slot that nobody uses."""
        try:
            for slot in slots:
                self._limiter(rate).refund(slot)
        except LimiterUnavailable as error:
            logger.debug("slots of %s were not given back: %s", task, error)

    def _lift_prefetch(self) -> None:
        """Let the broker deliver one more for each that is held, so that these are in nobody's way."""
        qos = self._consumer.qos
        target = min(self.hold_at_most, sum(len(held.line) for held in self._held.values()))
        while self._lifted < target:
            before = qos.value
            if qos.increment_eventually() == before:  # no limit, or worker_eta_task_limit
                break
            self._lifted += 1
        if self._lifted > target:
            qos.decrement_eventually(self._lifted - target)
            self._lifted = target

    def _set_timer(self) -> None:
        at_s = min((held.due_s for held in self._held.values()), default=math.inf)
        if not self._running or at_s == math.inf or (self._timer is not None and self._timer_at_s <= at_s):
            return
        self._cancel(self._timer)
        self._timer_at_s = at_s
        self._timer = self._consumer.timer.call_after(max(0.0, at_s - time.monotonic()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None  # as in _on_reread
        self._attend()

    def _cancel(self, entry: Any) -> None:
        if entry is not None:
            self._consumer.timer.cancel(entry)

    # Redis

    @property
    def _limiter_name(self) -> str:
        return f"celery:{self.group}"

    def _connections(self) -> Connections:
        if self._redis is None:
            url = self.url or Settings.read().url
            times = f"socket_timeout={LOOP_WAITS_S}&socket_connect_timeout={LOOP_WAITS_S}"
            self._redis = connect(f"{url}{'&' if '?' in url else '?'}{times}")
        return self._redis

    def _limiter(self, rate: str) -> RateLimiter:
        if rate not in self._limiters:
            self._limiters[rate] = RateLimiter(self._connections(), self._limiter_name, [as_limit(rate)])
        return self._limiters[rate]

    def _is_away(self, error: BaseException) -> None:
        self._away_until_s = time.monotonic() + ASK_AGAIN_S
        if not self._away:
            logger.warning("rate limits: Redis did not answer, limited tasks wait until it does: %s", error)
        self._away = True

    def _is_there(self) -> None:
        if self._away:
            logger.warning("rate limits: Redis answers again")
        self._away = False


def _rate_limit(state: Any, task_name: str, rate_limit: object, **options: Any) -> dict[str, Any]:
    """Tell all workers to modify the rate limit of a task; 0: none, default: what the code says."""
    step = getattr(state.consumer, "petiole_rate_limits", None)
    if step is None:
        return dict(_celerys_own(state, task_name, rate_limit, **options))
    if task_name not in state.app.tasks:
        logger.error("rate limit for unknown task %r", task_name)
        return _no("unknown task")
    try:
        value = None if rate_limit == FORGET else (read_rate(rate_limit) or "0")
    except ValueError as error:
        return _no(f"Invalid rate limit string: {error}")
    try:
        changed = step.order(task_name, value)
    except UNAVAILABLE as error:
        logger.error("rate limit for %s not changed, Redis did not answer: %s", task_name, error)
        return _no(f"nothing has changed: Redis did not answer ({type(error).__name__})")
    step.reread()
    if changed:
        with suppress(BrokerUnavailable, *UNAVAILABLE):  # then the others read it within READ_AGAIN_S
            state.app.control.broadcast(_TOLD)
    logger.info("rate limit of %s, in all workers: %s", task_name, value or "as in the code")
    if value is None:
        return _yes("rate limit is that of the code again, in all workers")
    if value == "0":
        return _yes("rate limit disabled successfully, in all workers")
    return _yes("new rate limit set successfully, in all workers")


def _ordered_elsewhere(state: Any, **_: Any) -> None:
    """Another worker was told of a new rate limit."""
    step = getattr(state.consumer, "petiole_rate_limits", None)
    if step is not None:
        step.reread()


def _yes(text: str) -> dict[str, Any]:
    return {"ok": text}


def _no(text: str) -> dict[str, Any]:
    return {"error": text}


def _half_of_visibility_s(consumer: Any) -> float:
    """For how long a message may be held. RabbitMQ closes the channel of who holds one for half an hour."""
    channel = getattr(consumer.task_consumer, "channel", None)
    timeout_s = getattr(channel, "visibility_timeout", None)
    return float(timeout_s) / 2 if timeout_s else _HELD_S


def _late_s(request: Any) -> float:
    """By how much the eta of a message is over."""
    try:
        eta = datetime.fromisoformat(request.eta)
    except (TypeError, ValueError):
        return 0.0
    return time.time() - (eta if eta.tzinfo else eta.astimezone()).timestamp()


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


def _good(task: str, value: bytes | None) -> bool:
    """Whether Redis has an order that can be followed."""
    if value is None:
        return False
    try:
        read_rate(_text(value))
    except ValueError as error:
        logger.error("task %r: what was ordered is left aside: %s", task, error)
        return False
    return True
