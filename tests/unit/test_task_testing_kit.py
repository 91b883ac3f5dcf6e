"""``petiole.testing`` where no server is: the texts of scripts, gates that are open or closed, tasks without a memo."""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery

from petiole import MISS, Cache, RateLimit, Settings, connect, coordinated_task, memoized_task
from petiole.cachelib import Connections
from petiole.cachelib.scripts import HOLE, Script, rewrite
from petiole.coordination import DuplicateTask, MemoizedTask, Rate, RateLimited, Unique, passing
from petiole.coordination.errors import TaskRefused
from petiole.coordination.memo_results import Memo
from petiole.testing import Recorder, closed_gates, moving_clock, no_memo, open_gates

TEXT = '-- Tells the time.\n--\n-- KEYS: a\n-- ARGV: b\nreturn redis.call("TIME")\n'
NOBODY = "redis://127.0.0.1:1"  # where nobody listens


class Server:
    """A client that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def execute_packed(self, packed: bytes) -> list[int]:
        self.sent.append(packed)
        return []

    def execute_command(self, *command: Any) -> list[int]:
        self.sent.append(command)
        return []


@pytest.fixture
def redis() -> Iterator[Connections]:
    """Connections to a server that is not there."""
    with connect(settings=Settings(url=NOBODY, cache_timeout=0.05)) as connections:
        yield connections


@pytest.fixture
def app(name: str) -> Iterator[Celery]:
    """An app without a broker."""
    app = Celery(name, set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.task_default_queue = name  # other tests have their own in the memory of this process
    yield app
    app.close()


@pytest.fixture
def _texts_are_put_back() -> Iterator[None]:
    yield
    rewrite(None)


def upper(text: str) -> str:
    return text.upper()


# Texts


@pytest.mark.usefixtures("_texts_are_put_back")
def test_a_script_that_is_rewritten_is_another_one_to_the_server_and_the_same_one_afterwards() -> None:
    script = Script("tells", TEXT, list)
    before = script.text, script.sha

    rewrite(upper)
    rewritten = script.text, script.sha
    rewrite(None)

    assert rewritten[0] == TEXT.upper()
    assert rewritten[1] != before[1]
    assert (script.text, script.sha) == before


@pytest.mark.usefixtures("_texts_are_put_back")
def test_a_script_that_is_loaded_while_texts_are_rewritten_is_rewritten_too() -> None:
    rewrite(upper)
    script = Script("tells", TEXT, list)
    rewritten = script.text
    rewrite(None)

    assert rewritten == TEXT.upper()
    assert script.text == TEXT


@pytest.mark.usefixtures("_texts_are_put_back")
def test_a_prepared_script_goes_with_its_text_whenever_it_was_prepared() -> None:
    script, server = Script("tells", TEXT, list), Server()
    written = script.sha
    before = script.prepared(a="k", b=HOLE)
    before(server, b"x")
    rewrite(upper)
    during = script.prepared(a="k", b=HOLE)
    rewritten = script.sha
    before(server, b"x")
    during(server, b"x")
    rewrite(None)
    before(server, b"x")
    during(server, b"x")

    shas = [written, rewritten, rewritten, written, written]
    assert [sha.encode() in sent for sha, sent in zip(shas, server.sent, strict=True)] == [True] * 5


def test_a_clock_that_cannot_be_moved_leaves_the_texts_as_they_are(redis: Connections) -> None:
    script = Script("tells", TEXT, list)

    with pytest.raises(Exception, match=r"127\.0\.0\.1"), moving_clock(redis):
        pytest.fail("there is no server")

    assert script.text == TEXT


# Open gates


def everything(app: Celery, redis: Connections, **options: Any) -> Any:
    """A task with gates of all kinds."""

    @coordinated_task(
        app=app,
        redis=redis,
        bind=True,
        lock="account:{account}",
        concurrency={"{tenant}": 5},
        rate=[Rate("90000/m", key="{tenant}", name="provider", cost="{tokens}"), RateLimit.at_most("100/m")],
        unique=Unique(until="end"),
        debounce="5s",
        **options,
    )
    def charge(self: Any, account: int, tenant: str = "acme", tokens: int = 10) -> int:
        self.admission.settle(tokens - 1, "{tenant}")
        return int(self.admission.hold.fence)

    return charge


def test_open_gates_let_a_task_run_where_no_redis_is(app: Celery, redis: Connections) -> None:
    charge = everything(app, redis)

    with open_gates() as gates:
        first = charge(7)
        second = charge.apply(args=[7], kwargs={"tokens": 30}).get()

    assert second > first
    assert [(call.task, call.args, call.kwargs) for call in gates.calls] == [
        (charge.name, (7,), {}),
        (charge.name, (7,), {"tokens": 30}),
    ]
    assert [call.settled for call in gates.of(charge)] == [[(9, "{tenant}")], [(29, "{tenant}")]]
    shown = gates.of(charge.name)[0].gates
    assert "lock 'account:7'" in shown
    assert len(shown) == 7  # the pause, two of the unique call, the lock, the permits, two rates


def test_open_gates_name_what_would_not_have_passed(app: Celery, redis: Connections) -> None:
    """Templates and costs are computed: a call that could never pass fails in the test too."""
    with open_gates() as gates, pytest.raises(ValueError, match="can never pass"):
        everything(app, redis)(7, tokens=100_000)

    assert gates.calls == []


def test_what_a_task_holds_at_open_gates_is_never_lost_and_its_guard_accepts(app: Celery, redis: Connections) -> None:
    @coordinated_task(app=app, redis=redis, bind=True, lock="a:{a}", concurrency=2, on_lost="terminate")
    def look(self: Any, a: int) -> Any:
        with sa.create_engine("sqlite://").begin() as connection:
            self.admission.hold.guard(connection)
        self.admission.raise_if_lost()
        self.admission.hold.extend()
        return list(self.admission.holds), self.admission.lost, self.admission.hold.release(), self.admission.hold.held

    with open_gates():
        assert look(1) == (["a:{a}", f"concurrency {look.name!r} (2)"], False, True, False)
    with pytest.raises(LookupError, match="not running"):
        _ = look.admission


def test_a_task_at_open_gates_cannot_settle_what_has_no_rate(app: Celery, redis: Connections) -> None:
    @coordinated_task(app=app, redis=redis, bind=True, rate=Rate("5/s", cost=2))
    def settle(self: Any, cost: Any, key: str | None) -> None:
        self.admission.settle(cost, key)

    @coordinated_task(app=app, redis=redis, bind=True, rate="5/s")
    def count_only(self: Any, cost: Any, key: str | None) -> None:
        self.admission.settle(cost, key)

    with open_gates() as gates:
        settle(0, None)
        with pytest.raises(LookupError, match=r"settle has no rate for '\{tenant\}'"):
            settle(1, "{tenant}")
        with pytest.raises(ValueError, match="-1"):
            settle(-1, None)
        with pytest.raises(
            ValueError, match=r"actual_cost=503 is more than 500 above the 2 that rate 5/s of '.*settle'"
        ):
            settle(503, None)
        with pytest.raises(LookupError, match="count_only has no rate whose cost is given"):
            count_only(1, None)
        count_only(1, "")
    assert [call.settled for call in gates.calls] == [[(0, None)], [], [], [], [], [(1, "")]]


def test_a_task_that_is_told_to_come_later_ends_so_at_open_gates(app: Celery, redis: Connections) -> None:
    @coordinated_task(app=app, redis=redis, rate="5/s")
    def ask() -> None:
        raise RateLimited(30)

    with open_gates(), pytest.raises(RateLimited):
        ask()


def test_open_gates_send_every_call_of_a_unique_task(
    app: Celery, redis: Connections, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it is the only one would be asked of Redis."""

    @coordinated_task(app=app, redis=redis, unique=Unique(until="end", on_conflict="raise"))
    def report() -> None: ...

    with open_gates(), app.connection_for_read() as connection:
        ids = {report.delay().id, report.delay().id}
        queue = connection.SimpleQueue(app.conf.task_default_queue)
        taken = [queue.get(block=False) for _ in range(2)]
        for message in taken:
            message.ack()
        queue.close()

    assert {message.headers["id"] for message in taken} == ids
    assert [record for record in caplog.records if record.name.startswith("petiole")] == [], "nobody was asked"


def test_gates_are_as_ever_after_the_block_also_after_an_exception(app: Celery, redis: Connections) -> None:
    with suppress(KeyError), open_gates():
        raise KeyError
    with suppress(KeyError), closed_gates():
        raise KeyError

    assert passing.stand_in is None


def test_open_gates_decorate_a_test(app: Celery, redis: Connections) -> None:
    charge = everything(app, redis)

    @open_gates()
    def test() -> int:
        return int(charge(1))

    assert test() < test()
    assert passing.stand_in is None


def test_of_nested_blocks_the_inner_one_decides(app: Celery, redis: Connections) -> None:
    charge = everything(app, redis)

    with open_gates() as outer:
        charge(1)
        with open_gates() as inner:
            charge(2)
            with closed_gates("lock *"), pytest.raises(TaskRefused):
                charge(3)
        charge(4)

    assert [call.args for call in outer.calls] == [(1,), (4,)]
    assert [call.args for call in inner.calls] == [(2,)]


def test_blocks_that_overlap_each_end_for_themselves(app: Celery, redis: Connections) -> None:
    """As those of two threads may."""
    charge = everything(app, redis)
    first, second = ExitStack(), ExitStack()
    early = first.enter_context(open_gates())
    late = second.enter_context(open_gates())
    first.close()
    charge(1)
    second.close()

    assert (len(early.calls), len(late.calls)) == (0, 1)
    assert passing.stand_in is None


def test_every_thread_finds_the_gates_open_and_its_own_admission(app: Celery, redis: Connections) -> None:
    meeting = threading.Barrier(4, timeout=20)

    @coordinated_task(app=app, redis=redis, bind=True, lock="a:{a}")
    def meet(self: Any, a: int) -> list[str]:
        meeting.wait()
        what = [self.admission.hold.what]
        meeting.wait()
        return what

    app.finalize()  # Celery makes a task at its first use, which threads may not share
    with open_gates() as gates, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(meet, range(4)))

    assert found == [[f"lock 'a:{a}'"] for a in range(4)]
    assert sorted(call.args for call in gates.calls) == [(0,), (1,), (2,), (3,)]


def test_a_body_that_calls_its_own_task_has_its_admission_afterwards(app: Celery, redis: Connections) -> None:
    @coordinated_task(app=app, redis=redis, bind=True, lock="a:{a}")
    def count_down(self: Any, a: int) -> list[str]:
        below = count_down(a - 1) if a else []
        return [self.admission.hold.what, *below]

    with open_gates():
        expected = ["lock 'a:2'", "lock 'a:1'", "lock 'a:0'"]
        assert count_down(2) == expected
        assert count_down.apply(args=[2]).get() == expected


# Closed gates


def test_a_closed_gate_refuses_a_direct_call_at_once_without_redis(app: Celery, redis: Connections) -> None:
    charge = everything(app, redis)

    with closed_gates() as gates:
        with pytest.raises(TaskRefused, match="unique"):
            charge(7)
        with pytest.raises(TaskRefused, match="unique"):
            charge.apply(args=[7], throw=True)

    assert [call.args for call in gates.of(charge)] == [(7,), (7,)]


@pytest.mark.parametrize("name", ["lock *", "account:{account}", "* 'account:7'"])
def test_gates_are_closed_by_what_they_are_called_or_by_their_template(
    app: Celery, redis: Connections, name: str
) -> None:
    with closed_gates("nothing", name) as gates, pytest.raises(TaskRefused, match=r"lock 'account:7'"):
        everything(app, redis)(7)

    assert gates.calls[0].gates == ["lock 'account:7'"]


@pytest.mark.parametrize(
    "name", ["", "lock", "pause", "lokc *", "lokc 'account:7'", "Lock *", "of *", "result *", "Rate*"]
)
def test_a_name_that_closes_no_gate_is_refused(app: Celery, redis: Connections, name: str) -> None:
    """A test with a typo in it would test nothing."""
    gates = everything(app, redis).gates.of([7], {})
    assert not any(fnmatchcase(gate.shown, name) for gate in gates)

    with pytest.raises(ValueError, match=re.escape(f"closed_gates({name!r}) closes nothing")), closed_gates(name):
        pytest.fail("it is refused")


def test_the_kinds_of_all_gates_can_be_closed(app: Celery, redis: Connections) -> None:
    gates = everything(app, redis).gates.of([7], {})

    for gate in gates:
        for name in {gate.shown, gate.shown[:6] + "*", gate.template, "[" + gate.shown[0] + "]*", "*"} - {""}:
            with closed_gates(name):
                pass
    assert {gate.shown.split()[0] for gate in gates} == {"pause", "unique", "lock", "concurrency", "rate"}


def test_a_closed_gate_of_a_unique_task_does_what_the_task_says(app: Celery, redis: Connections) -> None:
    @coordinated_task(app=app, redis=redis, unique="drop")
    def dropped() -> int:
        return 1

    @coordinated_task(app=app, redis=redis, unique="raise")
    def refused() -> int:
        return 1

    with closed_gates():
        assert dropped() is None
        with pytest.raises(DuplicateTask):
            refused()


# No memo


@pytest.fixture
def cache(redis: Connections, name: str) -> Cache:
    return Cache(redis, namespace=name)


def test_a_memoized_task_without_its_memo_runs_always(app: Celery, cache: Cache) -> None:
    runs: list[str] = []

    @memoized_task(app=app, cache=cache, key="{region}", ttl="5m", short_circuit=True)
    def report(region: str) -> str:
        runs.append(region)
        return region

    with no_memo():
        with no_memo():
            assert report("north") == report("north") == report.apply(args=["north"]).get() == "north"
        assert report.peek("north") is MISS
        report.invalidate("north")
        report("north")
        with pytest.raises(TypeError):
            report("north", "south")

    assert runs == ["north"] * 4
    assert cache.stats().errors == 0  # nobody was asked


def test_memos_are_as_ever_after_the_block_also_after_an_exception() -> None:
    before, before_task = dict(vars(Memo)), dict(vars(MemoizedTask))
    with suppress(KeyError), no_memo():
        assert vars(Memo)["peek"] is not before["peek"]
        raise KeyError

    assert dict(vars(Memo)) == before
    assert dict(vars(MemoizedTask)) == before_task


def test_a_recorder_says_what_it_is() -> None:
    assert repr(Recorder()) == "<Recorder of 0 calls>"
