"""What ``RateLimiter`` promises, on a real server and on its clock."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petiole.cachelib import Connections, EmbeddedServer, connect
from petiole.cachelib.scripts import Script
from petiole.coordination import Allowed, Decision, Limited, RateLimit, RateLimiter
from petiole.coordination import keys as key_names
from petiole.coordination import rate_limiter as module
from petiole.coordination.errors import CoordinationError, LimiterUnavailable
from petiole.coordination.rate_limit import decide

CLOCK = 'local time = redis.call("TIME")\nlocal now = time[1] * 1000000 + time[2]\n'
EXPIRY = "math.ceil((tats[i] - now) / 1000)"


def with_our_clock(script: Script[tuple[int, int, int, int]]) -> Script[tuple[int, int, int, int]]:
    """The same script on a clock that the test turns; states are kept longer, for they expire on the server's."""
    text = script.text
    for old, new in [
        (CLOCK, "local now = tonumber(ARGV[#ARGV])\n"),
        (EXPIRY, f"60000 + {EXPIRY}"),
        ("-- ARGV: cost, intervals_us..., bursts...", "-- ARGV: cost, intervals_us..., bursts..., now_us"),
    ]:
        assert text.count(old) == 1, f"the script has no {old!r} any more"
        text = text.replace(old, new)
    return Script("rate_hit_with_our_clock", text, script.decode)


HIT_AT = with_our_clock(module._HIT)

limits = st.lists(
    st.builds(
        lambda per, seconds, burst: RateLimit(f"{per}/{seconds}s", burst=burst),
        st.one_of(st.integers(1, 20), st.integers(1, 10_000)),
        st.one_of(st.integers(1, 60), st.integers(1, 86_400)),
        st.one_of(st.integers(1, 5), st.integers(1, 10_000)),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda limit: limit.key,
)
schedules = st.lists(
    st.tuples(
        st.one_of(st.just(0), st.integers(0, 2_000), st.integers(0, 3_000_000), st.integers(0, 10**11)),
        st.one_of(st.just(1), st.integers(1, 10_000)),
    ),
    min_size=1,
    max_size=20,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(limits=limits, schedule=schedules, start_us=st.integers(1_600_000_000_000_000, 2_500_000_000_000_000))
def test_the_script_agrees_with_the_model_on_every_schedule(
    redis: Connections, limits: list[RateLimit], schedule: list[tuple[int, int]], start_us: int
) -> None:
    """Whatever comes when, Redis answers and stores what ``decide`` computes, to the microsecond."""
    states = key_names.rate("model", uuid4().hex, [limit.key for limit in limits])
    tats: list[int | None] = [None] * len(limits)
    now_us = start_us
    for advance_us, cost in schedule:
        now_us += advance_us
        cost = min(cost, *(limit.burst for limit in limits))
        verdicts = [
            decide(tat, now_us, limit.interval_us, limit.burst, cost) for tat, limit in zip(tats, limits, strict=True)
        ]
        wait_us = max(verdict.wait_us for verdict in verdicts)
        refusing = 0 if wait_us == 0 else 1 + [verdict.wait_us for verdict in verdicts].index(wait_us)
        remaining = min(
            (limit.burst * limit.interval_us - (verdict.tat_us - now_us)) // limit.interval_us
            for verdict, limit in zip(verdicts, limits, strict=True)
        )
        if not refusing:
            tats = [verdict.tat_us for verdict in verdicts]

        answer = HIT_AT(
            redis.coordination,
            states=states,
            cost=cost,
            intervals_us=[limit.interval_us for limit in limits],
            bursts=[limit.burst for limit in limits],
            now_us=now_us,
        )
        stored = redis.coordination.mget(states)

        reset_us = max(verdict.tat_us for verdict in verdicts) - now_us
        assert answer == (refusing, wait_us, max(0, remaining), reset_us)
        assert [None if raw is None else int(raw) for raw in stored] == tats


HAMMER = """
import json, sys, time
from petiole.cachelib import connect
from petiole.coordination import RateLimit, RateLimiter

url, name, rate, burst, seconds = sys.argv[1:]
redis = connect(url)
limiter = RateLimiter(redis, name, [RateLimit(rate, burst=int(burst))])

def server_us():
    seconds, us = redis.coordination.time()
    return seconds * 1_000_000 + us

redis.coordination.time()
redis.coordination.rpush(name + ":ready", "1")
redis.blocking.blpop([name + ":go"])
first, asked, admitted = server_us(), 0, 0
end = time.monotonic() + float(seconds)
while time.monotonic() < end:
    asked += 1
    admitted += bool(limiter.hit("everybody"))
print(json.dumps([first, server_us(), asked, admitted]))
redis.close()
"""


def test_eight_processes_together_get_no_more_than_the_bound(redis: Connections, name: str) -> None:
    """However many processes hammer at once, all together get burst + count * W / period at most, and not less."""
    arguments = [redis.url, name, "200/s", "20", "2"]
    processes = [subprocess.Popen([sys.executable, "-c", HAMMER, *arguments], stdout=subprocess.PIPE) for _ in range(8)]
    for _ in processes:
        assert redis.blocking.blpop([f"{name}:ready"], timeout=30)
    redis.coordination.rpush(f"{name}:go", *range(8))
    reports = [json.loads(process.communicate(timeout=30)[0]) for process in processes]

    window_us = max(last for _, last, _, _ in reports) - min(first for first, _, _, _ in reports)
    asked = sum(asked for _, _, asked, _ in reports)
    admitted = sum(admitted for _, _, _, admitted in reports)
    bound = 20 + 200 * window_us / 1_000_000
    assert admitted <= bound < asked
    assert admitted >= bound * 0.5


def test_a_caller_gets_the_burst_and_then_has_to_wait(redis: Connections, name: str) -> None:
    """The burst is admitted at once, counting down; the next call is told how long to wait, and by which limit."""
    limit = RateLimit("3/h")
    limiter = RateLimiter(redis, name, [limit])
    answers = [limiter.hit("user:7") for _ in range(4)]

    assert [answer.remaining for answer in answers[:3] if isinstance(answer, Allowed)] == [2, 1, 0]
    assert isinstance(answers[3], Limited)
    assert answers[3].by is limit
    assert 1_190 < answers[3].retry_after <= 1_200


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
    stored: list[bytes | None] = redis.coordination.mget(
        key_names.rate(limiter.name, key, [limit.key for limit in limiter.limits])
    )
    return stored


def test_a_denied_call_charges_nothing(redis: Connections, name: str) -> None:
    """A refused call leaves every state as it was: of the limit that refused and of those that would not have."""
    limiter = RateLimiter(redis, name, [RateLimit("100/h"), RateLimit("2/h")])
    limiter.hit("user:7", cost=2)
    before = states(redis, limiter, "user:7")
    refused = [limiter.hit("user:7") for _ in range(5)]

    assert not any(refused)
    assert None not in before
    assert states(redis, limiter, "user:7") == before


def test_a_denied_first_call_stores_nothing(redis: Connections, name: str) -> None:
    """Where one limit refuses a caller that another has not seen, the other stays without a state."""
    tight, wide = RateLimit("1/h"), RateLimit("100/h")
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
    """Of several limits, remaining tells the smallest and reset_after the longest."""
    answer = RateLimiter(redis, name, [RateLimit("100/h"), RateLimit("5/m")]).hit("user:7")

    assert isinstance(answer, Allowed)
    assert answer.remaining == 4
    assert 35 < answer.reset_after <= 36


def test_a_cost_counts_as_so_many_calls(redis: Connections, name: str) -> None:
    """One call of cost 4 leaves as much as four calls; one that does not fit waits for what is missing only."""
    limiter = RateLimiter(redis, name, [RateLimit("6/h")])
    answer = limiter.hit("user:7", cost=4)
    refused = limiter.hit("user:7", cost=3)

    assert isinstance(answer, Allowed)
    assert answer.remaining == 2
    assert isinstance(refused, Limited)
    assert 590 < refused.retry_after <= 600
    assert limiter.hit("user:7", cost=2)


@pytest.mark.parametrize("cost", [0, -1, 4, 1.0, "1", True, None])
def test_a_cost_that_could_never_pass_is_refused(redis: Connections, name: str, cost: object) -> None:
    """A cost is a whole number from 1 to the smallest burst; the message names the limiter and the range."""
    limiter = RateLimiter(redis, name, [RateLimit("10/h"), RateLimit("5/h", burst=3)])

    with pytest.raises(ValueError, match=rf"{name}.*from 1 to 3"):
        limiter.hit("user:7", cost=cost)  # type: ignore[arg-type]


def test_a_state_is_gone_when_it_is_paid_off(redis: Connections, name: str) -> None:
    """Each state lives for as long as its own limit needs it, and no longer."""
    limiter = RateLimiter(redis, name, [RateLimit("10/s"), RateLimit("10/h")])
    limiter.hit("user:7")
    brief, long = key_names.rate(name, "user:7", [limit.key for limit in limiter.limits])

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
        assert answer == (Allowed(0, 0.0) if on_error == "allow" else Limited(1.0, None))
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
    "a:1/3600000000/1",
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
    names = key_names.rate("a{b}:c", "d}e:{f", ["1/2/3", "4/5/6"])
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
