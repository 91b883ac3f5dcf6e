"""What ``RateLimiter`` promises, on a real server and on its clock."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import pytest

from petiole.cachelib import Connections, EmbeddedServer, connect
from petiole.coordination import Allowed, Decision, Limited, RateLimit, RateLimiter
from petiole.coordination import rate_limiter as module
from petiole.coordination.errors import CoordinationError, LimiterUnavailable, LimitExceeded
from petiole.coordination.keys import RateKeys
from petiole.coordination.rate_limit import Reserved

KINDS = {
    "smooth": RateLimit("6/h"),
    "at_most": RateLimit.at_most("6/h", burst=6),
    "exact": RateLimit.exact("6/h"),
    "bucketed": RateLimit.bucketed("6/h"),
    "fixed": RateLimit.fixed("6/d", offset="1s"),
    "first": RateLimit.fixed("6/h", aligned=False),
}
EVERY = pytest.mark.parametrize("limit", KINDS.values(), ids=KINDS)
EVERY_AND_CONCURRENT = pytest.mark.parametrize(
    "limit", [*KINDS.values(), RateLimit.concurrent(6)], ids=[*KINDS, "concurrent"]
)


HAMMER = """
import json, os, sys, time
from petiole.cachelib import connect
from petiole.coordination import RateLimit, RateLimiter

url, name, rounds = sys.argv[1:]
redis = connect(url)
rolling = RateLimiter(redis, name, [RateLimit.exact("200/s")])
days = [
    RateLimiter(redis, name + kind, [limit])
    for kind, limit in {
        "smooth": RateLimit("500/d"),
        "at_most": RateLimit.at_most("500/d", burst=500),
        "exact": RateLimit.exact("500/d"),
        "bucketed": RateLimit.bucketed("500/30d"),
        "first": RateLimit.fixed("500/d", aligned=False),
        "concurrent": RateLimit.concurrent(500, lease="1d"),
    }.items()
] + [RateLimiter(redis, name + "both", [RateLimit("700/d"), RateLimit.exact("500/d")])]
leased = RateLimiter(redis, name + "leased", [RateLimit("200/s", burst=40)], lease_tokens=5)

def server_us():
    seconds, us = redis.coordination.time()
    return seconds * 1_000_000 + us

for _ in range(15):
    if not os.fork():
        break
redis.coordination.rpush(name + ":ready", "1")
redis.blocking.blpop([name + ":go"])
first = server_us()
asked, daily, late, times = 0, [0] * len(days), 0, []
for _ in range(int(rounds)):
    asked += 1
    decision = rolling.hit("everybody")
    if decision:
        times.append(decision.receipt.marks[0])
    daily = [count + bool(limiter.hit("everybody")) for count, limiter in zip(daily, days)]
    late += sum(bool(leased.hit("everybody")) for _ in range(5))
redis.coordination.rpush(name + ":reports", json.dumps([first, server_us(), asked, times, daily, late]))
redis.close()
"""


@pytest.mark.parametrize("rounds", [60, pytest.param(600, marks=pytest.mark.storm)])
def test_sixteen_processes_together_get_exactly_the_bound(redis: Connections, name: str, rounds: int) -> None:
    """However many hammer at once: all of what a limit admits is admitted, and not one more, in any window."""
    hammer = subprocess.Popen([sys.executable, "-c", HAMMER, redis.url, name, str(rounds)])
    for _ in range(16):
        assert redis.blocking.blpop([f"{name}:ready"], timeout=60)
    redis.coordination.rpush(f"{name}:go", *range(16))
    reports = [json.loads(redis.blocking.blpop([f"{name}:reports"], timeout=120)[1]) for _ in range(16)]
    assert hammer.wait(30) == 0
    firsts, lasts, asked, times, daily, late = zip(*reports, strict=True)

    assert [sum(counts) for counts in zip(*daily, strict=True)] == [500] * 7
    assert sum(asked) == 16 * rounds > 500
    began_us = sorted(at_us for own in times for at_us in own)
    assert all(later - at >= 1_000_000 for at, later in zip(began_us, began_us[200:], strict=False))
    assert len(began_us) >= 200
    window_us = max(lasts) - min(firsts)
    assert sum(late) <= RateLimit("200/s", burst=40).bound_us(window_us)
    assert sum(late) > 40


def test_a_caller_gets_the_burst_and_then_has_to_wait(redis: Connections, name: str) -> None:
    """The burst is admitted at once, counting down; the next call is told how long to wait, and by which limit."""
    limit = RateLimit("3/h")
    limiter = RateLimiter(redis, name, [limit])
    answers = [limiter.hit("user:7") for _ in range(4)]

    assert [answer.remaining for answer in answers[:3] if isinstance(answer, Allowed)] == [2, 1, 0]
    assert isinstance(answers[3], Limited)
    assert answers[3].by is limit
    assert answers[3].reason == "limit"
    assert 1_170 < answers[3].retry_after <= 1_200


def test_reset_after_is_when_the_whole_burst_is_back(redis: Connections, name: str) -> None:
    """After two of three calls an hour, two thirds of an hour pass until all is paid off."""
    limiter = RateLimiter(redis, name, [RateLimit("3/h")])
    limiter.hit("user:7")
    answer = limiter.hit("user:7")

    assert isinstance(answer, Allowed)
    assert 2_390 < answer.reset_after <= 2_400


def test_callers_do_not_share(redis: Connections, name: str) -> None:
    """One caller's calls are not charged to another."""
    limiter = RateLimiter(redis, name, [RateLimit("1/h")])

    assert limiter.hit("user:7")
    assert not limiter.hit("user:7")
    assert limiter.hit("user:8")


def test_limiters_of_one_name_share_and_of_two_do_not(redis: Connections, name: str) -> None:
    """The name is what limiters in several processes have in common."""
    RateLimiter(redis, name, [RateLimit("1/h")]).hit("user:7")

    assert not RateLimiter(redis, name, [RateLimit("1/h")]).hit("user:7")
    assert RateLimiter(redis, f"{name}-other", [RateLimit("1/h")]).hit("user:7")


def states(redis: Connections, limiter: RateLimiter, key: str) -> list[bytes | None]:
    """What is stored for a caller, as it is."""
    keys = RateKeys(limiter.name, [limit.part for limit in limiter.limits]).of(key)[1:]
    return [redis.coordination.dump(state) for state in keys]


def test_a_denied_call_charges_nothing(redis: Connections, name: str) -> None:
    """A refused call leaves every state as it was: of the limit that refused and of those that would not have."""
    others = [limit for kind, limit in KINDS.items() if kind != "at_most"]  # which has the state of the smooth one
    limiter = RateLimiter(redis, name, [*others, RateLimit.concurrent(100), RateLimit("2/2h")])
    limiter.hit("user:7", cost=2)
    before = states(redis, limiter, "user:7")
    refused = [limiter.hit("user:7") for _ in range(5)]

    assert not any(refused)
    assert None not in before
    assert states(redis, limiter, "user:7") == before


def test_a_denied_first_call_stores_nothing(redis: Connections, name: str) -> None:
    """Where one limit refuses a caller that another has not seen, the other stays without a state."""
    tight, wide = RateLimit("1/h"), RateLimit("100/2h")
    RateLimiter(redis, name, [tight]).hit("user:7")
    limiter = RateLimiter(redis, name, [wide, tight])
    refused = limiter.hit("user:7")

    assert not refused
    assert states(redis, limiter, "user:7")[0] is None


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_limits_that_refuse_the_longest_wait_is_named(redis: Connections, name: str, order: int) -> None:
    """The answer names the limit that asks for the longest wait, so that waiting so long is enough."""
    minute, day = RateLimit("1/m"), RateLimit("1/d")
    limiter = RateLimiter(redis, name, [minute, day][::order])
    limiter.hit("user:7")
    answer = limiter.hit("user:7")

    assert isinstance(answer, Limited)
    assert answer.by is day
    assert answer.retry_after > 86_000


def test_remaining_is_what_the_tightest_limit_leaves(redis: Connections, name: str) -> None:
    """Of several limits, remaining and reset_after tell of the one that leaves the least; so do the headers."""
    hour, minute = RateLimit("100/h"), RateLimit("5/m")
    answer = RateLimiter(redis, name, [hour, minute]).hit("user:7")

    assert isinstance(answer, Allowed)
    assert answer.remaining == 4
    assert answer.limit is minute
    assert 11 < answer.reset_after <= 12
    assert ("RateLimit-Policy", "100;w=3600, 5;w=60") in answer.headers()


def test_a_cost_counts_as_so_many_calls(redis: Connections, name: str) -> None:
    """One call of cost 4 leaves as much as four calls; one that does not fit waits for what is missing only."""
    limiter = RateLimiter(redis, name, [RateLimit("6/h")])
    answer = limiter.hit("user:7", cost=4)
    refused = limiter.hit("user:7", cost=3)

    assert isinstance(answer, Allowed)
    assert answer.remaining == 2
    assert isinstance(refused, Limited)
    assert 570 < refused.retry_after <= 600
    assert limiter.hit("user:7", cost=2)


@pytest.mark.parametrize("cost", [0, -1, 4, 1.0, "1", True, None])
def test_a_cost_that_could_never_pass_is_refused(redis: Connections, name: str, cost: object) -> None:
    """A cost is a whole number from 1 to the smallest burst; the message names the limiter and the range."""
    limiter = RateLimiter(redis, name, [RateLimit("10/h"), RateLimit("5/2h", burst=3)])

    with pytest.raises(ValueError, match=rf"{name}.*from 1 to 3"):
        limiter.hit("user:7", cost=cost)  # type: ignore[arg-type]


def test_a_state_is_gone_when_it_is_paid_off(redis: Connections, name: str) -> None:
    """Each state lives for as long as its own limit needs it, and no longer."""
    limiter = RateLimiter(redis, name, [RateLimit("10/s"), RateLimit("10/h")])
    limiter.hit("user:7")
    _, brief, long = RateKeys(name, [limit.part for limit in limiter.limits]).of("user:7")

    assert redis.coordination.pttl(brief) <= 100
    assert 350_000 < redis.coordination.pttl(long) <= 360_000


@pytest.mark.parametrize("on_error", ["raise", "allow", "deny"])
def test_without_redis_the_limiter_does_what_it_was_told(
    own_server: Callable[..., EmbeddedServer], caplog: pytest.LogCaptureFixture, on_error: str
) -> None:
    """A limiter that cannot ask raises, allows or denies; what it decides without Redis is logged."""
    server = own_server()
    with connect(server.url) as redis:
        limiter = RateLimiter(redis, "api", [RateLimit("10/s")], on_error=on_error)  # type: ignore[arg-type]
        limiter.hit("user:7")
        server.stop()
        answer: Decision | LimiterUnavailable
        with caplog.at_level(logging.WARNING, logger=module.__name__):
            try:
                answer = limiter.hit("user:7")
            except LimiterUnavailable as error:
                answer = error

    if on_error == "raise":
        assert isinstance(answer, LimiterUnavailable)
        assert isinstance(answer, CoordinationError)
        assert answer.limiter == "api"
        assert server.url in str(answer)
        assert not caplog.records
    else:
        assert answer == (Allowed(0, 0.0) if on_error == "allow" else Limited(1.0, None, "unavailable"))
        assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("on_error", ["allow", "deny"])
def test_a_server_that_is_full_is_a_server_that_cannot_answer(
    own_server: Callable[..., EmbeddedServer], on_error: str
) -> None:
    """Redis that refuses to write (out of memory, a replica) cannot decide either: on_error says what then."""
    with connect(own_server("--maxmemory", "1", "--maxmemory-policy", "noeviction").url) as redis:
        limiter = RateLimiter(redis, "api", [RateLimit("10/s")], on_error=on_error)  # type: ignore[arg-type]

        assert bool(limiter.hit("user:7")) is (on_error == "allow")


def test_a_server_that_forgot_its_scripts_is_told_again(redis: Connections, name: str) -> None:
    """A restart or SCRIPT FLUSH between two calls is not noticed."""
    limiter = RateLimiter(redis, name, [RateLimit("2/h")])
    limiter.hit("user:7")
    redis.coordination.script_flush()

    assert limiter.hit("user:7")
    assert not limiter.hit("user:7")


AWKWARD = [
    "a",
    "a:b",
    "b",
    "b:b",
    "{a}",
    "a}",
    "a\nb",
    "a\r\nb",
    "%7D",
    "}",
    "a%3Ab",
    "ä",
    "a:g3600s",
    "\x00",
    " ",
]


def test_awkward_names_do_not_meet(redis: Connections, name: str) -> None:
    """Braces, colons, percent signs and newlines in names and callers are text like any other."""
    limiters = [RateLimiter(redis, f"{name}{awkward}", [RateLimit("1/h")]) for awkward in ["", *AWKWARD]]
    first = [limiter.hit(key) for limiter in limiters for key in AWKWARD]
    second = [limiter.hit(key) for limiter in limiters for key in AWKWARD]

    assert all(first)
    assert not any(second)


def test_all_states_of_a_caller_are_in_one_cluster_slot() -> None:
    """One script touches them, so what stands in braces is the same, and the only one."""
    names = [key.decode() for key in RateKeys("a{b}:c", ["g1s", "l.a%7D"]).of("d}e:{f")]
    tags = {name[name.index("{") : name.index("}") + 1] for name in names}

    assert len(tags) == 1
    assert all(name.count("{") == name.count("}") == 1 for name in names)


@pytest.mark.parametrize(
    ("key", "error"), [("", ValueError), (7, TypeError), (b"x", TypeError), ("x" * 2_000, ValueError)]
)
def test_a_caller_that_is_no_name_is_refused(
    redis: Connections, name: str, key: object, error: type[Exception]
) -> None:
    """A caller is text that fits into a key."""
    with pytest.raises(error, match="key"):
        RateLimiter(redis, name, [RateLimit("1/h")]).hit(key)  # type: ignore[arg-type]


def test_a_limiter_without_limits_is_refused(redis: Connections, name: str) -> None:
    """Nothing to agree would admit everything."""
    with pytest.raises(ValueError, match="at least one"):
        RateLimiter(redis, name, [])


def test_an_unknown_on_error_is_refused(redis: Connections, name: str) -> None:
    """The message lists what there is."""
    with pytest.raises(ValueError, match="raise, allow, deny"):
        RateLimiter(redis, name, [RateLimit("1/h")], on_error="ignore")  # type: ignore[arg-type]


def test_a_limiter_tells_its_state(redis: Connections, name: str) -> None:
    """Its repr has the name and the rates."""
    assert repr(RateLimiter(redis, name, [RateLimit("100/m"), RateLimit("5000/d")])) == (
        f"<RateLimiter {name!r} [100/m, 5000/d]>"
    )


def test_one_decision_is_one_round_trip(own_server: Callable[..., EmbeddedServer]) -> None:
    """Several limits cost one command, as one limit does."""
    with connect(own_server().url) as redis:
        limiter = RateLimiter(redis, "api", [RateLimit("100/m"), RateLimit("5000/d"), RateLimit("10/s")])
        limiter.hit("user:7")
        redis.coordination.config_resetstat()
        for _ in range(10):
            limiter.hit("user:7")
        sent = redis.coordination.info("commandstats")

    assert sent["cmdstat_evalsha"]["calls"] == 10
    assert set(sent) <= {"cmdstat_evalsha", "cmdstat_time", "cmdstat_get", "cmdstat_set", "cmdstat_config|resetstat"}


@EVERY_AND_CONCURRENT
def test_every_kind_admits_its_count_and_then_refuses(redis: Connections, name: str, limit: RateLimit) -> None:
    """The count is admitted at once, counting down; the next is told who refused, and the caller's keys end."""
    limiter = RateLimiter(redis, name, [limit])
    answers = [limiter.hit("user:7") for _ in range(7)]

    assert [answer.remaining for answer in answers] == [5, 4, 3, 2, 1, 0, 0]
    assert isinstance(answers[6], Limited)
    assert answers[6].by is limit
    assert 0 < answers[6].retry_after <= limit.period_us / 1e6 * 1.1 + 1


@EVERY_AND_CONCURRENT
def test_a_callers_state_is_small(redis: Connections, name: str, limit: RateLimit) -> None:
    """What a caller costs who has used up a limit: what the docstring says, and what its name is longer."""
    limiter = RateLimiter(redis, name, [limit])
    for _ in range(6):
        limiter.hit("user:7")
    used: int = redis.coordination.memory_usage(RateKeys(name, [limit.part]).of("user:7")[1])

    assert used <= {"c": 80 + 6 * 28, "l": 80 + 6 * 16}.get(limit.kind, 110) + 32


def test_many_permits_take_more_each_than_few(redis: Connections, name: str) -> None:
    """Another form of sorted set: what one of them costs then is in the docstring too."""
    limit = RateLimit.concurrent(200)
    limiter = RateLimiter(redis, name, [limit])
    state = RateKeys(name, [limit.part]).of("user:7")[1]
    used: list[int] = []
    for permits in (128, 72):
        for _ in range(permits):
            limiter.hit("user:7")
        used.append(redis.coordination.memory_usage(state))

    assert used[0] <= 80 + 128 * 30
    assert 128 * 30 < used[1] <= 200 * 110


def test_peek_and_inspect_charge_nothing(redis: Connections, name: str) -> None:
    """They tell what there is; asked a hundred times, it is still there."""
    day = RateLimit.exact("9/d")
    limiter = RateLimiter(redis, name, [RateLimit("3/h"), day])
    limiter.hit("user:7")
    answers = [limiter.peek("user:7", cost=2) for _ in range(100)]
    seen = limiter.inspect("user:7")

    assert all(answers)
    assert {answer.remaining for answer in answers} == {2}
    assert [state.remaining for state in seen.limits] == [2, 8]
    assert seen.limits[1].limit is day
    assert seen.blocked_for == 0
    limiter.hit("user:7", cost=2)
    refused = limiter.peek("user:7", cost=3)
    assert isinstance(refused, Limited)
    assert limiter.stats() == {"allowed": 2, "limited": 0, "reserved": 0, "blocked": 0, "errors": 0}
    with pytest.raises(ValueError, match="peek"):
        limiter.refund(answers[0])  # type: ignore[arg-type]


@EVERY
def test_a_call_that_is_given_back_can_be_made_again(redis: Connections, name: str, limit: RateLimit) -> None:
    """A refund makes room for as much as was charged, once."""
    limiter = RateLimiter(redis, name, [limit])
    limiter.hit("user:7", cost=4)
    decision = limiter.hit("user:7", cost=2)
    assert isinstance(decision, Allowed)
    limiter.refund(decision)

    assert limiter.peek("user:7").remaining in (1, 2)  # of a smooth one, less by what is paid off meanwhile
    with pytest.raises(ValueError, match="given back or settled before"):
        limiter.refund(decision)
    with pytest.raises(ValueError, match="given back or settled before"):
        limiter.settle(decision, 1)


def test_of_many_threads_one_gives_back(redis: Connections, name: str) -> None:
    """A decision is given back once, whoever tries."""
    limiter = RateLimiter(redis, name, [RateLimit.exact("8/h")])
    limiter.hit("user:7", cost=4)
    decision = limiter.hit("user:7")
    failures: list[ValueError] = []

    def give_back() -> None:
        try:
            limiter.refund(decision)  # type: ignore[arg-type]
        except ValueError as error:
            failures.append(error)

    threads = [Thread(target=give_back) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(failures) == 7
    assert limiter.peek("user:7").remaining == 4


@EVERY
def test_an_estimate_is_settled(redis: Connections, name: str, limit: RateLimit) -> None:
    """What a call cost less comes back at once; what it cost more is owed by those who come later."""
    limiter = RateLimiter(redis, name, [limit])
    first = limiter.hit("user:7", cost=5)
    assert isinstance(first, Allowed)
    limiter.settle(first, 2)
    assert limiter.peek("user:7").remaining in (3, 4)
    second = limiter.hit("user:7")
    assert isinstance(second, Allowed)
    limiter.settle(second, 1 + 3 * limit.count)
    refused = limiter.peek("user:7", limit.burst)

    assert isinstance(refused, Limited)
    assert refused.retry_after > 2 * limit.period_us / 1e6
    with pytest.raises(ValueError, match="is the unit right"):
        limiter.settle(limiter.with_limits([RateLimit("6/m")]).hit("user:8"), 10_000)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 or more"):
        limiter.settle(second, -1)


@pytest.mark.parametrize("actual_cost", [0, 1, 2])
def test_to_settle_gives_no_permit_back(redis: Connections, name: str, actual_cost: int) -> None:
    """Where all limits are of what is at once, there is nothing to be given back or owed."""
    limiter = RateLimiter(redis, name, [RateLimit.concurrent(2)])
    decision = limiter.hit("user:7")
    assert isinstance(decision, Allowed)

    limiter.settle(decision, actual_cost)

    assert limiter.peek("user:7").remaining == 1
    with pytest.raises(ValueError, match="given back or settled before"):
        limiter.settle(decision, actual_cost)
    decision.release()
    assert limiter.peek("user:7").remaining == 2


def test_a_block_is_for_calls_that_were_allowed(redis: Connections, name: str) -> None:
    """The body of one that was refused does not run; the error says when to come again."""
    limiter, ran = RateLimiter(redis, name, [RateLimit("1/m")]), []
    with limiter.hit("user:7"):
        ran.append("first")
    refused = limiter.peek("user:7")
    assert isinstance(refused, Limited)

    with pytest.raises(LimitExceeded, match="1/m") as raised, limiter.hit("user:7"):
        ran.append("second")

    assert ran == ["first"]
    assert 0 < raised.value.retry_after <= refused.retry_after
    limiter.block("user:7", "2m")
    with pytest.raises(LimitExceeded, match="blocked"), limiter.hit("user:7"):
        ran.append("third")
    assert ran == ["first"]


def test_only_what_this_limiter_charged_is_given_back(redis: Connections, name: str) -> None:
    """A refusal was charged nothing; another limiter's decision is in other keys; without Redis there is none."""
    limiter = RateLimiter(redis, name, [RateLimit("1/h")])
    decision = limiter.hit("user:7")
    refused: Any = limiter.hit("user:7")

    with pytest.raises(ValueError, match="charged nothing"):
        limiter.refund(refused)
    with pytest.raises(ValueError, match=f"not by '{name}-other'"):
        RateLimiter(redis, f"{name}-other", [RateLimit("1/h")]).refund(decision)  # type: ignore[arg-type]
    limiter.refund(Allowed(0, 0.0))


@EVERY
def test_reservations_are_apart_as_the_limit_asks(redis: Connections, name: str, limit: RateLimit) -> None:
    """Each gets a time of its own turn; one that would be too late is refused and charged nothing."""
    limiter = RateLimiter(redis, name, [limit])
    starts = [limiter.reserve("user:7", cost=3) for _ in range(5)]
    refused = limiter.reserve("user:7", cost=3, within=1)

    waits_s = [answer.start_after for answer in starts if isinstance(answer, Reserved)]
    assert waits_s[:2] == [0, 0]
    assert waits_s[2] > 0
    assert waits_s[4] > waits_s[2] - 30 <= waits_s[3]
    assert isinstance(refused, Limited)
    assert refused.retry_after >= waits_s[4] - 30
    assert not limiter.hit("user:7")
    assert limiter.stats() == {"allowed": 0, "limited": 2, "reserved": 5, "blocked": 0, "errors": 0}


def test_wait_comes_back_when_it_is_time(redis: Connections, name: str) -> None:
    """Five calls at 50 a second without a burst take 80 ms of the server's time, and ask once each."""
    limiter = RateLimiter(redis, name, [RateLimit("50/s", burst=1)])

    def server_us() -> int:
        seconds, us = redis.coordination.time()
        return int(seconds) * 1_000_000 + int(us)

    began_us = server_us()
    answers = [limiter.wait("user:7") for _ in range(5)]

    assert all(isinstance(answer, Allowed) for answer in answers)
    assert server_us() - began_us >= 80_000


def test_wait_does_not_begin_when_it_would_take_too_long(redis: Connections, name: str) -> None:
    """Who has less time than it takes is refused at once, and charged nothing."""
    limiter = RateLimiter(redis, name, [RateLimit("1/h")])
    limiter.hit("user:7")
    answer = limiter.wait("user:7", timeout="30m")

    assert isinstance(answer, Limited)
    assert answer.retry_after < 3_600
    assert isinstance(limiter.reserve("user:7", within="1h"), Reserved)


def test_who_stops_waiting_gives_his_place_back(redis: Connections, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an event, or by an exception: the next one gets what he would have got without him."""
    limiter = RateLimiter(redis, name, [RateLimit("2/h")])
    limiter.hit("user:7", cost=2)
    stop = Event()
    stop.set()
    stopped = limiter.wait("user:7", stop=stop)

    class Interrupted(Event):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        limiter.wait("user:7", stop=Interrupted())
    refused = limiter.peek("user:7")

    assert isinstance(stopped, Limited)
    assert stopped.reason == "stopped"
    assert isinstance(refused, Limited)
    assert 1_700 < refused.retry_after <= 1_800


def test_a_concurrent_limit_cannot_be_reserved(redis: Connections, name: str) -> None:
    """Nobody knows when those who are there will have ended."""
    limiter = RateLimiter(redis, name, [RateLimit("9/s"), RateLimit.concurrent(2)])

    with pytest.raises(ValueError, match="nobody knows when one ends"):
        limiter.reserve("user:7")
    with pytest.raises(ValueError, match="nobody knows when one ends"):
        limiter.wait("user:7")


def test_a_permit_comes_back_when_it_is_released(redis: Connections, name: str) -> None:
    """By ``with``, by ``release`` or by a refund; a second time changes nothing."""
    limiter = RateLimiter(redis, name, [RateLimit("100/h"), RateLimit.concurrent(2)])
    first, second = limiter.hit("user:7", cost=30), limiter.hit("user:7", cost=30)
    assert isinstance(first, Allowed)
    assert isinstance(second, Allowed)
    refused = limiter.hit("user:7")

    assert isinstance(refused, Limited)
    assert refused.by == RateLimit.concurrent(2)
    with first:
        assert limiter.peek("user:7", 1) == refused or not limiter.peek("user:7")
    assert limiter.inspect("user:7").limits[1].remaining == 1
    first.release()
    assert limiter.inspect("user:7").limits[1].remaining == 1
    limiter.refund(second)
    second.release()
    assert limiter.inspect("user:7").limits[1].remaining == 2
    assert limiter.inspect("user:7").limits[0].remaining >= 69


def test_a_permit_of_a_holder_that_died_comes_back_by_its_lease(redis: Connections, name: str) -> None:
    """Nobody releases it; after its lease somebody else is admitted, while others keep theirs."""
    limiter = RateLimiter(redis, name, [RateLimit.concurrent(1, lease=1)])
    while (refused := limiter.hit("user:7")) or (refused := limiter.hit("user:7")):
        pass  # a machine on which a second passes between two lines
    assert isinstance(refused, Limited)
    assert refused.retry_after <= 1
    time.sleep(refused.retry_after)

    assert limiter.hit("user:7")


def test_a_blocked_caller_is_refused_everywhere(redis: Connections, name: str) -> None:
    """Whatever is left; for as long as the longest block says; until it is ended."""
    limiter = RateLimiter(redis, name, [RateLimit("100/h")])
    elsewhere = RateLimiter(redis, name, [RateLimit("100/h")])
    assert 570 < limiter.block("user:7", "10m") <= 600
    assert 570 < limiter.block("user:7", 1) <= 600
    answer = elsewhere.hit("user:7")

    assert isinstance(answer, Limited)
    assert (answer.by, answer.reason) == (None, "blocked")
    assert 570 < answer.retry_after <= 600
    assert 570 < elsewhere.inspect("user:7").blocked_for <= 600
    reserved = elsewhere.reserve("user:7")
    assert isinstance(reserved, Reserved)
    assert 599 < reserved.start_after <= 600
    assert elsewhere.hit("user:8")
    assert elsewhere.unblock("user:7")
    assert not elsewhere.unblock("user:7")
    assert limiter.stats()["blocked"] == 0
    assert elsewhere.stats()["blocked"] == 1


def test_a_block_lasts_a_day_at_most(redis: Connections, name: str) -> None:
    """The number may come from somebody else's mistake."""
    limiter = RateLimiter(redis, name, [RateLimit("100/h")])

    assert limiter.block("user:7", "30d") == 86_400
    with pytest.raises(ValueError, match="for_=0"):
        limiter.block("user:7", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_is_changed_while_it_is_in_use(redis: Connections, name: str, kind: str) -> None:
    """What was admitted under the old count still counts under the new one, be it lower or higher."""
    limit = KINDS[kind]

    def with_count(count: int) -> RateLimiter:
        made = {
            "smooth": RateLimit,
            "at_most": lambda rate: RateLimit.at_most(rate, burst=count),
            "exact": RateLimit.exact,
            "bucketed": lambda rate: RateLimit.bucketed(rate, buckets=count),
            "fixed": lambda rate: RateLimit.fixed(rate, offset="1s"),
            "first": lambda rate: RateLimit.fixed(rate, aligned=False),
        }[kind](limit.rate.replace("6", str(count), 1))
        return limiter.with_limits([made])

    limiter = RateLimiter(redis, name, [limit])
    limiter.hit("user:7", cost=5)
    lower, higher = with_count(4), with_count(30)

    assert not lower.hit("user:7")
    assert limiter.peek("user:7").remaining == 1
    spare = higher.peek("user:7").remaining
    assert 5 <= spare <= 25  # five sixths of an hour are owed, or five calls
    assert higher.hit("user:7", cost=spare)
    assert not higher.hit("user:7")
    assert not limiter.hit("user:7")
    assert limiter.stats() == higher.stats()


@pytest.mark.parametrize("skew_s", [3_600, -3_600])
def test_the_clocks_of_callers_change_nothing(
    redis: Connections, name: str, monkeypatch: pytest.MonkeyPatch, skew_s: int
) -> None:
    """Whoever is an hour ahead or behind gets what the others leave, and no one else pays for it."""
    limiter = RateLimiter(redis, name, [limit for kind, limit in KINDS.items() if kind != "at_most"])
    assert limiter.hit("user:7", cost=4)
    ours, ours_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: ours() + skew_s)
    monkeypatch.setattr(time, "time_ns", lambda: ours_ns() + skew_s * 10**9)

    assert limiter.hit("user:7", cost=2)
    assert not limiter.hit("user:7")
    monkeypatch.undo()
    assert not limiter.hit("user:7")


def test_on_a_cluster_everything_works(clustered: Connections, name: str) -> None:
    """All keys of a caller are in one slot, so one script sees them; each caller may be elsewhere."""
    kinds = [limit for kind, limit in KINDS.items() if kind != "at_most"]
    limiter = RateLimiter(clustered, name, [*kinds, RateLimit.concurrent(6)])
    for caller in ("a", "b", "c", "{d}"):
        decisions = [limiter.hit(caller) for _ in range(7)]
        assert [bool(decision) for decision in decisions] == [True] * 6 + [False]
        limiter.refund(decisions[5])  # type: ignore[arg-type]
        assert limiter.inspect(caller).limits[1].remaining == 1
        assert limiter.block(caller, 60) == 60
        assert limiter.unblock(caller)


def test_after_a_restart_the_limiter_goes_on(own_server: Callable[..., EmbeddedServer]) -> None:
    """A server that comes back empty has no scripts and no states: nothing fails, and callers begin anew."""
    server = own_server()
    with connect(server.url) as redis:
        limiter = RateLimiter(redis, "api", [limit for kind, limit in KINDS.items() if kind != "at_most"])
        decision = limiter.hit("user:7", cost=6)
        assert not limiter.hit("user:7")
        redis.coordination.flushall()
        redis.coordination.script_flush()

        limiter.refund(decision)  # type: ignore[arg-type]
        assert limiter.hit("user:7", cost=6)
        assert not limiter.hit("user:7")


@pytest.mark.parametrize("on_error", ["raise", "allow", "deny"])
def test_without_redis_nothing_is_given_back_silently(
    own_server: Callable[..., EmbeddedServer], caplog: pytest.LogCaptureFixture, on_error: str
) -> None:
    """A refund that cannot be sent raises, or is logged and counted; a permit ends with its lease."""
    server = own_server()
    with connect(server.url) as redis:
        limiter = RateLimiter(redis, "api", [RateLimit("10/s"), RateLimit.concurrent(9)], on_error=on_error)  # type: ignore[arg-type]
        first, second, third = (limiter.hit("user:7", cost=2) for _ in range(3))
        server.stop()
        with caplog.at_level(logging.WARNING, logger=module.__name__):
            third.release()  # type: ignore[union-attr]
            for give_back in (lambda: limiter.refund(first), lambda: limiter.settle(second, 9)):  # type: ignore[arg-type]
                if on_error == "raise":
                    with pytest.raises(LimiterUnavailable):
                        give_back()
                else:
                    give_back()
        for ask in (
            lambda: limiter.block("user:7", 1),
            lambda: limiter.unblock("user:7"),
            lambda: limiter.inspect("a"),
        ):
            with pytest.raises(LimiterUnavailable):
                ask()

    assert limiter.stats()["errors"] == 6
    assert len(caplog.records) == (1 if on_error == "raise" else 3)


def test_a_leased_token_and_a_known_refusal_cost_no_round_trip(own_server: Callable[..., EmbeddedServer]) -> None:
    """Of sixty calls, ten at a time are asked for; and once refused, nobody is asked until it is over."""
    with connect(own_server().url) as redis:
        limiter = RateLimiter(redis, "api", [RateLimit("60/h")], lease_tokens=10)
        redis.coordination.config_resetstat()
        answers = [limiter.hit("user:7") for _ in range(200)]
        sent = redis.coordination.info("commandstats")

    assert 50 <= sum(map(bool, answers)) <= 59  # a token is kept for what may be used late
    assert sent["cmdstat_evalsha"]["calls"] <= 10
    assert limiter.stats()["allowed"] == sum(map(bool, answers))
    assert limiter.stats()["limited"] == 200 - sum(map(bool, answers))


def test_leased_tokens_are_given_back_to_their_lease(redis: Connections, name: str) -> None:
    """And a block is heard of at once by the process that makes it."""
    limiter = RateLimiter(redis, name, [RateLimit("60/h")], lease_tokens=10)
    decisions = [limiter.hit("user:7", cost=2) for _ in range(2)]
    before = limiter.hit("user:7").remaining
    limiter.refund(decisions[0])  # type: ignore[arg-type]
    limiter.settle(decisions[1], 1)  # type: ignore[arg-type]

    assert limiter.hit("user:7").remaining in (before + 2, before + 1)  # the lease may have run out meanwhile
    limiter.block("user:7", 60)
    assert not limiter.hit("user:7")
    limiter.unblock("user:7")
    assert limiter.hit("user:7")


def test_a_limit_of_calls_counts_each_call_as_one_whatever_it_costs(redis: Connections, name: str) -> None:
    """Requests and tokens of one provider, in one decision; what settles the tokens leaves the requests alone."""
    limits = [RateLimit("3/m").of_calls(), RateLimit("1000/m")]
    limiter = RateLimiter(redis, name, limits)
    first = limiter.hit("k", cost=600)
    assert isinstance(first, Allowed)

    refused = limiter.hit("k", cost=600)
    assert isinstance(refused, Limited)
    assert refused.by == limits[1]  # too many tokens; the request was not charged either
    limiter.settle(first, 100)
    second, third = limiter.hit("k", cost=600), limiter.hit("k", cost=1)
    assert isinstance(second, Allowed)
    assert isinstance(third, Allowed)
    fourth = limiter.hit("k", cost=1)
    assert isinstance(fourth, Limited)
    assert fourth.by == limits[0]  # too many requests

    limiter.refund(third)
    assert limiter.hit("k", cost=1)
    assert not limiter.hit("k", cost=1)
    states = limiter.inspect("k").limits
    assert states[0].remaining == 0
    assert 295 <= states[1].remaining <= 310


@pytest.mark.parametrize("make", [RateLimit, RateLimit.at_most, RateLimit.exact, RateLimit.bucketed, RateLimit.fixed])
def test_every_kind_of_limit_can_count_calls(redis: Connections, name: str, make: Callable[[str], RateLimit]) -> None:
    """A cost that is beyond the count passes, and is one of so many; beside a limit of costs of the same kind."""
    limiter = RateLimiter(redis, name, [make("2/h").of_calls(), make("5000/h")])
    most = limiter._highest_cost

    answers = [limiter.hit("k", cost=cost) for cost in (most // 2, 1, 1)]
    allowed = [bool(answer) for answer in answers]
    assert allowed == ([True, False, False] if make == RateLimit.at_most else [True, True, False])
    assert isinstance(answers[2], Limited)
    assert answers[2].by == make("2/h").of_calls()


def test_limits_of_calls_do_not_go_with_leased_tokens(redis: Connections, name: str) -> None:
    """A lease is of costs."""
    with pytest.raises(ValueError, match="lease_tokens"):
        RateLimiter(redis, name, [RateLimit("1000/s").of_calls()], lease_tokens=5)
