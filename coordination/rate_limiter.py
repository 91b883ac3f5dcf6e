"""Rate limits that hold for all processes together: one script call per decision, on the server's clock."""

import logging
import time
from collections.abc import Sequence
from threading import Event
from typing import Literal, get_args

from ..cachelib.connections import UNAVAILABLE, Connections, require_connections
from ..cachelib.counters import Counters
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.scripts import HOLE, Script, load
from ..cachelib.tokens import Tokens
from .errors import LimiterUnavailable
from .keys import RateKeys
from .rate_limit import (
    FARTHEST_US,
    Allowed,
    CallerState,
    Decision,
    Limited,
    LimitState,
    RateLimit,
    Receipt,
    Reserved,
    check_cost,
    highest_cost,
    limits_of,
)
from .token_leases import TokenLeases, burst_besides, lease_us

logger = logging.getLogger(__name__)

OnError = Literal["raise", "allow", "deny"]
Mode = Literal["hit", "take", "reserve", "peek", "owe"]

LONGEST_BLOCK_US = 86_400_000_000
MOST_OWED = 100
"""A call may turn out to have cost so many times what its limits admit at once; beyond it is a mistake in the unit."""

_RETRY_WITHOUT_REDIS_S = 1.0
_COUNTED = ("allowed", "limited", "reserved", "blocked", "errors")

_HIT: Script[list[int]] = load(__package__, "rate_hit", list)
_REFUND = load(__package__, "rate_refund", int)
_BLOCK = load(__package__, "rate_block", int)


class RateLimiter:
    """Admits calls, per caller, while every one of its limits allows them.

    >>> limiter = RateLimiter(redis, "api", [RateLimit("100/m"), RateLimit("5000/d")])
    >>> match limiter.hit("user:7"):
    ...     case Allowed(remaining): ...
    ...     case Limited(retry_after): ...

    Promises: no limit's bound (see ``RateLimit.bound``) is exceeded, by any number of processes, whatever their clocks
    say. A refused call is charged to no limit. The answer names the limit that refused: of several, the one that asks
    for the longest wait. A limit may be changed while it is in use, by a limiter of the same name with other limits:
    its state goes on (see ``RateLimit``).

    Non-promises: what Redis forgets (a restart without persistence, an eviction) is admitted again. What a call turns
    out to cost beyond what was charged for it (``settle``) is held against those who come later, not prevented.

    Arguments:
        redis: from ``connect``.
        name: keeps the callers of several limiters apart.
        limits: all must agree. Two of the same kind and period need names.
        on_error: when Redis does not answer: ``raise`` (``LimiterUnavailable``), ``allow`` or ``deny``.
        lease_tokens: for callers who come so often that a round trip each is too much: the process is charged for up to
            so many calls at once and hands them out itself, within a second; and it remembers a refusal for as long.
            The bound holds as ever, for a smaller burst is charged; what is not used in time is lost, and a block is
            heard of up to a second later. For smooth limits only, and all processes must give the same number.
    """

    def __init__(
        self,
        redis: Connections,
        name: str,
        limits: Sequence[RateLimit],
        *,
        on_error: OnError = "raise",
        lease_tokens: int = 0,
    ) -> None:
        require_connections(redis)
        self.limits = limits_of(limits)
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error={on_error!r} is unknown; there are {', '.join(get_args(OnError))}")
        self._redis = redis
        self.name = name
        self._on_error: OnError = on_error
        self._lease_tokens = lease_tokens
        self._leases: TokenLeases | None = None
        self._arguments = [limit.arguments() for limit in self.limits]
        self._highest_cost = highest_cost(self.limits)
        if lease_tokens != 0 or isinstance(lease_tokens, bool):
            lasting_us = lease_us(self.limits, lease_tokens)
            self._leases = TokenLeases(lasting_us)
            bursts = [burst_besides(limit, lasting_us) for limit in self.limits]
            self._arguments = [
                (kind, burst, span_us, rest, parts)
                for burst, (kind, _, span_us, rest, parts) in zip(bursts, self._arguments, strict=True)
            ]
            self._highest_cost = min(bursts)
        self._keys = RateKeys(name, [limit.part for limit in self.limits])
        self._permits = any(limit.kind == "c" for limit in self.limits)
        self._tokens = Tokens()
        self._counters = Counters()
        kinds, counts, spans_us, rests, parts = zip(*self._arguments, strict=True)
        self._prepared = _HIT.prepared(
            block=HOLE,
            states=[HOLE] * len(self.limits),
            mode="hit",
            cost=HOLE,
            amount=0,
            permit=HOLE,
            kinds=kinds,
            counts=counts,
            spans_us=spans_us,
            rests=rests,
            parts=parts,
        )

    def __repr__(self) -> str:
        return f"<RateLimiter {self.name!r} [{', '.join(map(str, self.limits))}]>"

    def with_limits(self, limits: Sequence[RateLimit]) -> "RateLimiter":
        """The same limiter with other limits: for a caller with a plan of his own. It counts into the same ``stats``.

        >>> limiter.with_limits([RateLimit("1000/m")]).hit("user:7")

        The state of the old limits goes on under the new ones of the same name, or of the same kind and period. Made
        once per plan, not once per call. A caller who is asked for by two plans in turns may get what both admit.
        """
        other = RateLimiter(self._redis, self.name, limits, on_error=self._on_error, lease_tokens=self._lease_tokens)
        other._counters = self._counters
        return other

    def stats(self) -> dict[str, int]:
        """How often this process was allowed, limited, reserved, blocked, or got no answer (errors)."""
        return dict.fromkeys(_COUNTED, 0) | self._counters.read()

    # Asking

    def hit(self, key: str, cost: int = 1) -> Decision:
        """Ask for one call, in one round trip. If it is ``Allowed``, it has been charged.

        Arguments:
            key: who calls.
            cost: how many calls this one counts for.

        Raises ``ValueError`` for a cost above the smallest burst, which could never pass, and
        ``LimiterUnavailable`` as ``on_error`` says.
        """
        if type(cost) is not int or not 1 <= cost <= self._highest_cost:
            check_cost(cost, self._highest_cost, self)
        try:
            if self._leases is not None:
                return self._hit_leased(self._leases, key, cost)
            permit = self._tokens.next() if self._permits else ""
            client = self._redis.coordination
            reply = self._prepared(client, *self._keys.of(key), b"%d" % cost, permit.encode())
        except UNAVAILABLE as error:
            return self._without_redis(error)
        if reply[0]:
            return self._refused(reply)
        self._counters.add("allowed")
        return self._allowed(key, cost, reply, permit)

    def peek(self, key: str, cost: int = 1) -> Decision:
        """What ``hit`` would say. Nothing is charged: ``remaining`` is what there is; there is nothing to refund."""
        check_cost(cost, self._highest_cost, self)
        try:
            reply = self._ask("peek", key, cost, 0, "")
        except UNAVAILABLE as error:
            return self._without_redis(error)
        if reply[0]:
            return self._limited(reply)
        return Allowed(reply[3], reply[4] / 1e6, self.limits[reply[2] - 1], self.limits)

    def inspect(self, key: str) -> CallerState:
        """All that is known of a caller, for people. Raises ``LimiterUnavailable``, whatever ``on_error`` says."""
        try:
            reply = self._ask("peek", key, 1, 0, "")
        except UNAVAILABLE as error:
            raise self._unavailable(error) from error
        pairs = zip(reply[6::2], reply[7::2], strict=True)
        states = [
            LimitState(limit, remaining, reset_us / 1e6)
            for limit, (remaining, reset_us) in zip(self.limits, pairs, strict=True)
        ]
        return CallerState(self._blocked_us(key) / 1e6, tuple(states))

    def reserve(self, key: str, cost: int = 1, *, within: Duration | None = None) -> Reserved | Limited:
        """Be charged for a call that may come later: the answer tells when. First come, first served.

        >>> match limiter.reserve("provider", within="30s"):
        ...     case Reserved(start_after): task.apply_async(countdown=start_after)
        ...     case Limited(): ...

        Nobody else gets that place, so there is no crowd when it is time. Who does not come gives it back (``refund``).

        Arguments:
            within: refuse rather than to reserve later than that. Default: nine years.

        Raises ``ValueError`` where a limit is concurrent (who holds permits in an hour is not known), else as ``hit``.
        """
        check_cost(cost, self._highest_cost, self)
        if self._permits:
            raise ValueError(f"{self!r} limits how many are at once, and nobody knows when one ends: hit() again later")
        within_us = FARTHEST_US
        if within is not None:
            within_us = min(within_us, milliseconds(within, "within", zero_allowed=True) * 1_000)
        try:
            reply = self._ask("reserve", key, cost, within_us, "")
        except UNAVAILABLE as error:
            answer = self._without_redis(error)
            return answer if isinstance(answer, Limited) else Reserved(0.0)
        if reply[0]:
            return self._refused(reply)
        self._counters.add("reserved")
        wait_us, tightest, remaining, reset_us = reply[1:5]
        receipt = self._receipt(key, cost, reply[6:], "")
        return Reserved(wait_us / 1e6, remaining, reset_us / 1e6, self.limits[tightest - 1], self.limits, receipt)

    def wait(self, key: str, cost: int = 1, *, timeout: Duration | None = None, stop: Event | None = None) -> Decision:
        """Reserve, and sleep until it is time. First come, first served; nothing is asked meanwhile.

        Arguments:
            timeout: be refused at once rather than to wait longer than that.
            stop: ends the wait early when it is set: ``Limited`` with reason ``"stopped"``; the place is given back, as
                it is when an exception ends the wait.

        Raises as ``reserve``.
        """
        reserved = self.reserve(key, cost, within=timeout)
        if isinstance(reserved, Limited):
            return reserved
        if reserved.start_after > 0:
            try:
                stopped = (stop or Event()).wait(reserved.start_after)
            except BaseException:
                self.refund(reserved)
                raise
            if stopped:
                self.refund(reserved)
                return Limited(0.0, None, "stopped", limits=self.limits)
        return Allowed(
            reserved.remaining,
            max(0.0, reserved.reset_after - reserved.start_after),
            reserved.limit,
            reserved.limits,
            reserved.receipt,
        )

    # Afterwards

    def refund(self, decision: Allowed | Reserved) -> None:
        """Give back what a call was charged that did not take place: as far as it still counts, and its permit.

        What is paid off, or over, by now stays so. While reservations of others are to come, no more is given back than
        leaves them their places. An exact log forgets the oldest calls that count in place of this one, so it stays on
        the safe side. One decision is given back once: the attempt counts, also when Redis did not answer.

        Raises ``ValueError`` for a decision that was given back or settled before, or that charged nothing; and
        ``LimiterUnavailable``, unless ``on_error`` says otherwise; then it is logged.
        """
        receipt = self._redeemed(decision)
        if receipt is None:
            return
        receipt.release = None
        self._give_back(receipt, receipt.cost, receipt.limits)

    def settle(self, decision: Allowed | Reserved, actual_cost: int) -> None:
        """Replace the estimate that was charged by what the call has cost: less is given back, more is owed.

        >>> decision = limiter.hit("provider", cost=estimate)
        >>> limiter.settle(decision, answer.usage.total_tokens)

        What is owed is charged whatever the limits say: those who come later wait for it. A permit is not given back.

        Arguments:
            actual_cost: 0 or more; up to a hundred times what the limits admit at once beyond the estimate.

        Raises as ``refund``.
        """
        most = MOST_OWED * self._highest_cost
        if type(actual_cost) is not int or actual_cost < 0:
            raise ValueError(f"actual_cost must be a whole number, 0 or more, not {actual_cost!r}")
        estimate = getattr(getattr(decision, "receipt", None), "cost", 0)
        if actual_cost - estimate > most:
            raise ValueError(
                f"actual_cost {actual_cost} is more than {most} above what was charged; is the unit right?"
            )
        receipt = self._redeemed(decision)
        if receipt is None or actual_cost == estimate:
            return
        if actual_cost < estimate:
            rated = tuple(limit for limit in receipt.limits if limit.kind != "c" and not limit.by_call)
            if rated:
                self._give_back(receipt, estimate - actual_cost, rated)
            return
        try:
            self._ask("owe", receipt.key, actual_cost - estimate, FARTHEST_US, "")
        except UNAVAILABLE as error:
            self._lost(error, f"{actual_cost - estimate} owed by {receipt.key!r} were not charged")

    def block(self, key: str, for_: Duration) -> float:
        """Refuse a caller for a while, in all processes: for example for as long as a provider's Retry-After says.

        A block that lasts longer already stays. Returns for how many seconds the caller is blocked now: at most a day,
        whatever was asked for, because such numbers come from elsewhere. Raises ``LimiterUnavailable``.
        """
        for_us = min(LONGEST_BLOCK_US, milliseconds(for_, "for_") * 1_000)
        block = self._keys.of(key)[0]
        try:
            return _BLOCK(self._redis.coordination, block=block, for_us=for_us) / 1e6
        except UNAVAILABLE as error:
            raise self._unavailable(error) from error
        finally:
            self._forget(key)

    def unblock(self, key: str) -> bool:
        """End a block. Returns whether there was one. Raises ``LimiterUnavailable``."""
        try:
            return bool(self._redis.coordination.execute_command("DEL", self._keys.of(key)[0]))
        except UNAVAILABLE as error:
            raise self._unavailable(error) from error
        finally:
            self._forget(key)

    # Inside

    def _hit_leased(self, leases: TokenLeases, key: str, cost: int) -> Decision:
        now_us = time.monotonic_ns() // 1_000  # before the call: what is charged is charged after it
        found = leases.take(key, cost, now_us)
        if isinstance(found, Limited):
            self._counters.add("blocked" if found.reason == "blocked" else "limited")
            return found
        if found is not None:
            self._counters.add("allowed")
            answer, left, until_us = found
            receipt = self._receipt(key, cost, [], "", until_us)
            return Allowed(answer.remaining + left, answer.reset_after, answer.limit, answer.limits, receipt)
        reply = self._ask("take", key, cost, max(cost, self._lease_tokens), "")
        if reply[0]:
            refusal = self._refused(reply)
            leases.refuse(key, cost, now_us, refusal)
            return refusal
        self._counters.add("allowed")
        charged = Allowed(reply[3], reply[4] / 1e6, self.limits[reply[2] - 1], self.limits)
        left = reply[5] - cost
        until_us = leases.put(key, left, now_us, charged)
        receipt = self._receipt(key, cost, [], "", until_us)
        return Allowed(charged.remaining + left, charged.reset_after, charged.limit, charged.limits, receipt)

    def _ask(self, mode: Mode, key: str, cost: int, amount: int, permit: str) -> list[int]:
        block, *states = self._keys.of(key)
        kinds, counts, spans_us, rests, parts = zip(*self._arguments, strict=True)
        return _HIT(
            self._redis.coordination,
            block=block,
            states=states,
            mode=mode,
            cost=cost,
            amount=amount,
            permit=permit,
            kinds=kinds,
            counts=counts,
            spans_us=spans_us,
            rests=rests,
            parts=parts,
        )

    def _give_back(self, receipt: Receipt, cost: int, limits: tuple[RateLimit, ...]) -> None:
        if receipt.leased_until_us:
            if self._leases is not None:
                self._leases.give_back(receipt.key, cost, receipt.leased_until_us)
            return
        marks = dict(zip(receipt.limits, zip(receipt.marks[::2], receipt.marks[1::2], strict=True), strict=True))
        kinds, counts, spans_us, rests, parts = zip(*[limit.arguments() for limit in limits], strict=True)
        try:
            _REFUND(
                self._redis.coordination,
                states=RateKeys(self.name, [limit.part for limit in limits]).of(receipt.key)[1:],
                cost=cost,
                permit=receipt.permit,
                kinds=kinds,
                counts=counts,
                spans_us=spans_us,
                rests=rests,
                parts=parts,
                firsts=[marks[limit][0] for limit in limits],
                seconds=[marks[limit][1] for limit in limits],
            )
        except UNAVAILABLE as error:
            self._lost(error, f"{cost} of {receipt.key!r} were not given back")

    def _redeemed(self, decision: Allowed | Reserved) -> Receipt | None:
        """The receipt of a decision, good for once; None where Redis was not asked."""
        if not isinstance(decision, Allowed | Reserved):
            raise ValueError(f"{decision!r} was charged nothing: give back what hit, reserve or wait has admitted")
        receipt = decision.receipt
        if receipt is None:
            if decision.limit is not None:
                raise ValueError(f"{decision!r} comes from peek and was charged nothing")
            return None
        if receipt.limiter != self.name:
            raise ValueError(f"{decision!r} was charged by the limiter {receipt.limiter!r}, not by {self.name!r}")
        try:
            receipt.unused.pop()
        except IndexError:
            raise ValueError(f"{decision!r} was given back or settled before; that can be done once") from None
        return receipt

    def _release(self, key: str, permit: str) -> None:
        """Give a permit back. What cannot be sent ends with the lease."""
        for limit, state in zip(self.limits, self._keys.of(key)[1:], strict=True):
            if limit.kind == "c":
                try:
                    self._redis.coordination.execute_command("ZREM", state, permit)
                except UNAVAILABLE as error:
                    self._counters.add("errors")
                    logger.warning("limiter %r: a permit ends with its lease, was not given back: %s", self.name, error)

    def _blocked_us(self, key: str) -> int:
        left_ms: int = self._redis.coordination.execute_command("PTTL", self._keys.of(key)[0])
        return max(0, left_ms) * 1_000

    def _forget(self, key: str) -> None:
        if self._leases is not None:
            self._leases.forget(key)

    def _receipt(self, key: str, cost: int, marks: list[int], permit: str, leased_until_us: int = 0) -> Receipt:
        release = self._release if permit else None
        return Receipt(self.name, key, cost, self.limits, marks, permit, release, leased_until_us)

    def _allowed(self, key: str, cost: int, reply: list[int], permit: str) -> Allowed:
        receipt = self._receipt(key, cost, reply[6:], permit)
        return Allowed(reply[3], reply[4] / 1e6, self.limits[reply[2] - 1], self.limits, receipt)

    def _refused(self, reply: list[int]) -> Limited:
        self._counters.add("blocked" if reply[0] < 0 else "limited")
        return self._limited(reply)

    def _limited(self, reply: list[int]) -> Limited:
        refusing, wait_us, _, remaining, reset_us = reply[:5]
        if refusing < 0:
            return Limited(wait_us / 1e6, None, "blocked", 0, reset_us / 1e6, self.limits)
        return Limited(wait_us / 1e6, self.limits[refusing - 1], "limit", remaining, reset_us / 1e6, self.limits)

    def _without_redis(self, error: BaseException) -> Decision:
        if self._on_error == "raise":
            raise self._unavailable(error) from error
        self._counters.add("errors")
        logger.warning("limiter %r: Redis did not answer (%s); on_error=%s", self.name, error, self._on_error)
        if self._on_error == "allow":
            return Allowed(0, 0.0)
        return Limited(_RETRY_WITHOUT_REDIS_S, None, "unavailable")

    def _lost(self, error: BaseException, what: str) -> None:
        if self._on_error == "raise":
            raise self._unavailable(error) from error
        self._counters.add("errors")
        logger.warning("limiter %r: %s: %s", self.name, what, error)

    def _unavailable(self, error: BaseException) -> LimiterUnavailable:
        self._counters.add("errors")
        return LimiterUnavailable(self.name, self._redis.address, error)
