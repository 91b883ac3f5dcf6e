"""What a decorator is given and does not know: Celery's own is handed on, and what was meant for us is refused."""

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from celery import Celery, Task

from petiole import coordinated_task, memoized_task
from petiole.coordination import CoordinatedTask, MemoizedTask, Unique
from petiole.coordination.coordinated import PREFIX
from petiole.coordination.declaring import GATES, MEMO, check_coordinated, check_memoized

Decorator = Callable[..., Callable[[Callable[..., Any]], Task]]

BOTH = [coordinated_task, memoized_task]
HANDED_ON = (
    "name bind base typing shared lazy filter pydantic pydantic_strict pydantic_context pydantic_dump_kwargs "
    "autoretry_for dont_autoretry_for retry_kwargs retry_backoff retry_backoff_max retry_jitter "
    "queue exchange exchange_type routing_key priority expires serializer compression delivery_mode immediate "
    "mandatory eta countdown headers ignore_result accept_magic_kwargs result_serializer"
)
"""What Celery takes besides the attributes of its tasks."""


def charge(account_id: int) -> None:
    """The function of the tasks."""


@pytest.fixture
def app(name: str) -> Iterator[Celery]:
    """An app without a broker."""
    app = Celery(name, set_as_current=False, broker="memory://")
    yield app
    app.close()


def test_the_names_of_our_options_are_those_of_the_task_classes() -> None:
    assert sorted(PREFIX + name for name in GATES) == sorted(
        name for name in vars(CoordinatedTask) if name.startswith(PREFIX)
    )
    assert set(MEMO) == {name.removeprefix("memo_") for name in vars(MemoizedTask) if name.startswith("memo_")} - {
        "on",
        "stats",
    }


@pytest.mark.parametrize("check", [check_coordinated, check_memoized])
def test_what_celery_knows_is_celerys(check: Callable[..., None]) -> None:
    """None of it is near an option of ours, so it need not be known which Celery it is."""
    check(dict.fromkeys([*dir(Task), *HANDED_ON.split()]), object)


@pytest.mark.parametrize("decorator", BOTH)
def test_options_of_celerys_take_effect(app: Celery, decorator: Decorator) -> None:
    options = {"name": "shop.charge", "rate_limit": "10/s", "time_limit": 30, "autoretry_for": (OSError,), "bind": True}

    def named(self: Task) -> str:
        return str(self.name)

    task = decorator(app=app, **options)(named)

    assert (task.name, task.rate_limit, task.time_limit) == ("shop.charge", "10/s", 30)
    assert task.run() == "shop.charge"


@pytest.mark.parametrize("decorator", BOTH)
@pytest.mark.parametrize("name", ["owner", "team", "release", "late", "timeout", "on_call", "category", "label"])
def test_an_attribute_of_ones_own_is_handed_on(app: Celery, decorator: Decorator, name: str) -> None:
    assert getattr(decorator(app=app, **{name: "mine"})(charge), name) == "mine"


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("lokc", "lock"), ("concurency", "concurrency"), ("rates", "rate"), ("uniqe", "unique"), ("leese", "lease"),
        ("max_park", "max_parked"), ("when_ful", "when_full"), ("on_loss", "on_lost"), ("debouce", "debounce"),
    ],
)  # fmt: skip
def test_a_misspelt_gate_is_refused(app: Celery, misspelt: str, meant: str) -> None:
    """Else the task would run without it, and nobody would be told."""
    with pytest.raises(TypeError, match=f"coordinated_task has no option {misspelt!r}; did you mean {meant!r}"):
        coordinated_task(app=app, **{misspelt: 3})(charge)
    with pytest.raises(TypeError, match=f"memoized_task has no option {misspelt!r}; did you mean 'gate_{meant}'"):
        memoized_task(app=app, **{misspelt: 3})(charge)


@pytest.mark.parametrize(("misspelt", "meant"), [("ttll", "ttl"), ("tag", "tags"), ("shortcircuit", "short_circuit")])
def test_a_misspelt_option_of_a_memo_is_refused(app: Celery, misspelt: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"memoized_task has no option {misspelt!r}; did you mean {meant!r}"):
        memoized_task(app=app, **{misspelt: 3})(charge)
    with pytest.raises(TypeError, match=f"did you mean {meant!r}, of memoized_task"):
        coordinated_task(app=app, **{misspelt: 3})(charge)


@pytest.mark.parametrize(
    ("lease", "error", "says"),
    [
        (0, ValueError, "lease=0 must be more than zero"),
        ("2h", ValueError, "lease='2h': a lease is from 0.1 s to an hour"),
        ("30", ValueError, "lease='30' is not a duration"),
        (None, TypeError, "lease must be seconds"),
    ],
)
def test_a_lease_that_is_none_is_called_a_lease(app: Celery, lease: Any, error: type[Exception], says: str) -> None:
    """A task has no ttl."""
    with pytest.raises(error, match=f"^{says}"):
        coordinated_task(app=app, lock="a", lease=lease)
    with pytest.raises(error, match=f"^gate_{says}"):
        _ = memoized_task(app=app, ttl="5m", gate_lock="a", gate_lease=lease)(charge).name


def test_what_is_to_become_of_a_loss_is_one_of_two(app: Celery) -> None:
    with pytest.raises(ValueError, match=r"^on_lost='stop' is unknown; there are mark, terminate$"):
        coordinated_task(app=app, lock="a", on_lost="stop")
    with pytest.raises(ValueError, match=r"^gate_on_lost='stop' is unknown"):
        _ = memoized_task(app=app, ttl="5m", gate_lock="a", gate_on_lost="stop")(charge).name


@pytest.mark.parametrize("decorator", BOTH)
def test_what_a_base_class_declares_is_no_mistake(app: Celery, decorator: Decorator) -> None:
    class Tagged(Task):
        tag = ""

    assert decorator(app=app, base=Tagged, tag="mine")(charge).tag == "mine"


@pytest.mark.parametrize("name", GATES)
def test_a_gate_of_a_memoized_task_is_written_with_its_prefix(app: Celery, name: str) -> None:
    with pytest.raises(
        TypeError, match=rf"{name} is no option of memoized_task; write gate_{name}=\.\.\., as in @memo"
    ):
        memoized_task(app=app, ttl="5m", **{name: 3})(charge)


def test_the_spelling_that_the_message_shows_works(app: Celery) -> None:
    task = memoized_task(app=app, ttl="5m", gate_lock="account:{account_id}")(charge)

    assert [gate.shown for gate in task.gates.of([7], {})] == ["lock 'account:7'"]
    assert task.memo is not None


@pytest.mark.parametrize("name", [*MEMO, *(f"memo_{name}" for name in MEMO)])
def test_a_memo_is_no_gate(app: Celery, name: str) -> None:
    says = (
        rf"{name} is no option of coordinated_task; .* @memoized_task\(app=app, {name.removeprefix('memo_')}=\.\.\., "
    )
    with pytest.raises(TypeError, match=says):
        coordinated_task(app=app, lock="a", **{name: 3})(charge)


def test_a_coordinated_task_may_be_memoized_by_its_base(app: Celery) -> None:
    task: Any = coordinated_task(app=app, base=MemoizedTask, lock="a", memo_ttl="5m")(charge)

    assert task.gates
    assert task.memo is not None


@pytest.mark.parametrize("key", ["account_id", "{acount_id}", "{account_id"])
def test_a_key_that_cannot_be_meant_names_the_task_and_the_option(app: Celery, key: str) -> None:
    """A bare name would be one key for all calls: one result for all, one call of all."""
    with pytest.raises(ValueError, match=r"^key= of charge: "):
        memoized_task(app=app, key=key)(charge)
    with pytest.raises(ValueError, match=r"^unique= of shop\.charge: "):
        _ = coordinated_task(app=app, name="shop.charge", unique=Unique(key, until="end"))(charge).run


async def coroutine(account_id: int) -> None: ...


async def generator(account_id: int) -> AsyncIterator[int]:
    yield account_id


@pytest.mark.parametrize("decorator", BOTH)
@pytest.mark.parametrize("function", [coroutine, generator])
def test_an_async_function_is_refused(app: Celery, decorator: Decorator, function: Callable[..., Any]) -> None:
    """Celery would take what it returns for its result, and it would never run."""
    with pytest.raises(TypeError, match=f"{function.__name__} is async, which is not supported; write a plain def"):
        decorator(app=app)(function)


@pytest.mark.parametrize(
    ("base", "option"), [(CoordinatedTask, {"gate_lock": "a"}), (MemoizedTask, {"memo_ttl": "5m"})]
)
def test_an_async_function_is_refused_with_the_base_class_alone(app: Celery, base: type, option: Any) -> None:
    with pytest.raises(TypeError, match="coroutine is async"):
        _ = app.task(base=base, shared=False, **option)(coroutine).name


def test_an_async_function_that_has_no_gates_is_not_ours(app: Celery) -> None:
    """A class of all tasks leaves those alone that say nothing of gates."""
    assert app.task(base=MemoizedTask, shared=False)(coroutine).name.endswith("coroutine")
