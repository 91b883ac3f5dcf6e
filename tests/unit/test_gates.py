"""Gates: every form in which a user may write one, what is refused and how, and what Redis is told of it."""

import inspect
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petiole.coordination import RateLimit, keys
from petiole.coordination.gates import Concurrency, Gates, Pause, Rate, Served, Unique, check_unique

TASK = "shop.charge"


def charge(account_id=7, tenant="acme", tokens=3):
    """The task of these tests: gates see its arguments."""


def declared(**options):
    return Gates(TASK, inspect.signature(charge), **options)


def calls_of(*arguments, keywords=None, **options):
    """What Redis is told of the gates of one call."""
    return declared(**options).of(arguments, keywords or {})


def only(*arguments, **options):
    (gate,) = calls_of(*arguments, **options)
    return gate


def unique_key(arguments, keywords):
    return f"key of {arguments!r}"


# Locks


def test_a_task_without_gates_has_none():
    assert not declared()
    assert calls_of() == []


def test_a_lock_is_the_lock_of_that_name():
    """A ``Lock`` of the same name and the gate exclude each other, so they have the same keys."""
    gate = only(42, lock="account:{account_id}")

    assert (gate.kind, gate.state, gate.second) == ("p", "petiole:1:turn:{lock:account:42}", gate.state + ":queue")
    assert gate.state == keys.turn("lock", "account:42")
    assert (gate.count, gate.amount, gate.lock, gate.template) == (1, 1, ("lock", "account:42"), "account:{account_id}")
    assert gate.shown == "lock 'account:42'"


def test_arguments_are_told_by_name_and_by_place_and_have_their_defaults():
    gates = declared(lock="{account_id}-{tenant}")

    first = gates.of([7], {"tenant": "acme"})
    assert first == gates.of([], {"account_id": 7}) == gates.of([7, "acme", 3], {})
    assert first != gates.of([7, "other"], {})


def test_several_locks_are_asked_in_their_order():
    shown = [gate.shown for gate in calls_of(1, lock=["a{account_id}", "b", "{tenant}"])]

    assert shown == ["lock 'a1'", "lock 'b'", "lock 'acme'"]


def test_arguments_that_the_task_does_not_take_are_refused():
    with pytest.raises(TypeError, match=r"^shop\.charge\(\): too many positional arguments$"):
        calls_of(1, "x", 3, 4, lock="a")


def test_a_task_that_was_not_told_to_be_given_itself_is_told_so():
    def bound(self, account_id): ...

    with pytest.raises(TypeError, match=r"^shop\.charge\(\): missing .*'account_id' .* declare it with bind=True"):
        Gates(TASK, inspect.signature(bound), lock="a").of([7], {})


def test_a_lock_without_a_name_is_refused():
    """It would be one lock for all calls that have no tenant, of all tasks."""
    with pytest.raises(ValueError, match=r"lock='\{tenant\}' is the empty name for this call of shop\.charge"):
        calls_of(1, "", lock="{tenant}")


# Concurrency


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (5, [(TASK, 5, "")]),
        (Concurrency(5), [(TASK, 5, "")]),
        (Concurrency(5, name="exports"), [("exports", 5, "")]),
        (Concurrency(5, key="{tenant}"), [(f"{TASK}:acme", 5, "{tenant}")]),
        (Concurrency(5, key="{tenant}", name="exports"), [("exports:acme", 5, "{tenant}")]),
        ({"{tenant}": 2, "{account_id}": 1}, [(f"{TASK}:acme", 2, "{tenant}"), (f"{TASK}:7", 1, "{account_id}")]),
        ([9, {"{tenant}": 2}], [(TASK, 9, ""), (f"{TASK}:acme", 2, "{tenant}")]),
        ((9, Concurrency(2, key="{tenant}")), [(TASK, 9, ""), (f"{TASK}:acme", 2, "{tenant}")]),
        (None, []),
    ],
)
def test_concurrency_is_written_in_many_ways_and_is_a_semaphore(given, seen):
    """A ``Semaphore`` named so, with so many permits, is the same thing."""
    gates = calls_of(concurrency=given)

    assert [(*gate.lock, gate.count, gate.template) for gate in gates] == [("semaphore", *one) for one in seen]
    assert [gate.state for gate in gates] == [keys.turn("semaphore", name) for name, _, _ in seen]


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "5", 1_000_001])
def test_a_number_of_permits_is_a_whole_number(count):
    with pytest.raises(ValueError, match=r"concurrency=.* must be a whole number from 1 to 1000000"):
        declared(concurrency=Concurrency(count))


# Rates


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("100/m", [("100/m", "", "all", TASK)]),
        ("{tenant}: 10/s", [("10/s", "{tenant}", "acme", TASK)]),
        ("{tenant}:{account_id} : 10/30s", [("10/30s", "{tenant}:{account_id}", "acme:7", TASK)]),
        (["100/m", "{tenant}: 10/s"], [("100/m", "", "all", TASK), ("10/s", "{tenant}", "acme", TASK)]),
        ({"{tenant}": "10/s"}, [("10/s", "{tenant}", "acme", TASK)]),
        (RateLimit.exact("5/m"), [("5/m", "", "all", TASK)]),
        (Rate("5/m"), [("5/m", "", "all", TASK)]),
        (Rate("5/m", key="{tenant}", name="provider"), [("5/m", "{tenant}", "acme", "provider")]),
        ({"{tenant}": RateLimit("5/m", burst=1)}, [("5/m", "{tenant}", "acme", TASK)]),
        (None, []),
    ],
)
def test_rates_are_written_in_many_ways_and_are_rate_limiters(given, seen):
    """A ``RateLimiter`` named so, asked for the same key, has the same state."""
    gates = calls_of(rate=given)

    assert [(gate.limit.rate, gate.template, gate.caller, gate.limiter) for gate in gates] == seen
    for gate in gates:
        block, state = keys.RateKeys(gate.limiter, [gate.limit.part]).of(gate.caller)
        assert (gate.state, gate.second) == (state.decode(), block.decode())
        assert gate.kind == gate.limit.kind
        assert (gate.count, gate.span, gate.rest, gate.part) == gate.limit.arguments()[1:]


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("soon", ValueError, "soon"),
        ("0/s", ValueError, "0/s"),
        ("{nobody}: 1/s", ValueError, r"which is no argument here; there are: account_id, tenant, tokens"),
        (RateLimit.concurrent(5), ValueError, "concurrency=5"),
        (Rate("1/s", cost=0), ValueError, r"cost=0 must be a whole number, 1 or more, or a template"),
        (Rate("1/s", cost=True), ValueError, "cost=True"),
        (Rate("1/s", cost=1.5), ValueError, r"cost=1\.5"),
        (Rate(5), TypeError, "rate=5 is no rate; write text such as '100/m'"),
        ([5], TypeError, "rate=5 is no rate"),
        ({7: "1/s"}, TypeError, "7 is no template"),
    ],
)
def test_a_rate_that_cannot_be_meant_is_refused(given, error, says):
    with pytest.raises(error, match=says):
        declared(rate=given)


def test_a_cost_is_a_number_or_an_argument():
    assert only(rate="9/m").amount == 1
    assert only(rate=Rate("9/m", cost=4)).amount == 4
    assert only(1, "acme", 8, rate=Rate("9/m", cost="{tokens}")).amount == 8


def test_a_limit_of_calls_counts_one_whatever_it_costs():
    assert only(1, "acme", 8, rate=Rate(RateLimit("9/m").of_calls(), cost="{tokens}")).amount == 1


@pytest.mark.parametrize("tokens", [0, 10])
def test_a_cost_that_could_never_pass_is_refused_instead_of_waiting_for_ever(tokens):
    with pytest.raises(ValueError, match=rf"costs {tokens} can never pass .*; it admits 1 to 9"):
        calls_of(1, "acme", tokens, rate=Rate("9/m", cost="{tokens}"))


@pytest.mark.parametrize("tokens", [-1, 1.5, "many", "", "٣"])
def test_a_cost_that_is_no_number_is_named(tokens):
    with pytest.raises(ValueError, match=r"cost='\{tokens\}' gives .* which is no whole number"):
        calls_of(1, "acme", tokens, rate=Rate("9/m", cost="{tokens}"))


# Unique


@pytest.mark.parametrize(
    ("unique", "kinds", "policies", "most"),
    [
        (Unique(), "p", "r", [-1]),
        (Unique(on_conflict="drop"), "p", "n", [0]),
        (Unique(on_conflict="raise"), "p", "r", [0]),
        (Unique(on_conflict="replace"), "p", "l", [1]),
        (Unique(until="start", on_conflict="drop"), "c", "n", [-1]),
        (Unique(until="end", on_conflict="join"), "cp", "jr", [-1, -1]),
        (Unique(until="end", on_conflict="drop"), "cp", "nn", [-1, 0]),
        (Unique(until="end", on_conflict="raise"), "cp", "rr", [-1, 0]),
        (Unique(until="end", on_conflict="replace"), "cp", "nl", [-1, 1]),
        (Unique(until="10m", on_conflict="join"), "cp", "jr", [-1, -1]),
        (Unique(until="10m", on_conflict="drop"), "c", "n", [-1]),
        (Unique(until=600, on_conflict="raise"), "c", "r", [-1]),
    ],
)
def test_unique_is_a_claim_while_it_is_to_come_and_a_permit_while_it_runs(unique, kinds, policies, most):
    gates = calls_of(3, unique=unique, unique_key=unique_key, namespace="shop")

    assert "".join(gate.kind for gate in gates) == kinds
    assert "".join(gate.policy for gate in gates) == policies
    assert [gate.most for gate in gates] == most
    assert [gate.joins for gate in gates if gate.kind == "p"] == [unique.on_conflict == "join"] * kinds.count("p")
    for gate in gates:
        if gate.kind == "c":
            assert gate.state.startswith("petiole:1:claim:{shop}:")
            assert gate.rest == (unique.until in ("start", "end"))
        else:
            assert gate.lock[0] == "unique"
            assert gate.count == 1


def test_calls_that_are_told_apart_have_gates_of_their_own():
    options = {"unique": Unique(until="end"), "unique_key": unique_key}

    assert {gate.state for gate in calls_of(3, **options)} & {gate.state for gate in calls_of(4, **options)} == set()
    assert calls_of(3, **options) == calls_of(3, **options)


@pytest.mark.parametrize(
    ("unique", "says"),
    [
        (Unique(on_conflict="wait"), "on_conflict='wait' is unknown; there are join, drop, raise, replace"),
        (Unique(until="start"), 'write until="end", or on_conflict="drop"'),
        (Unique(until="soon"), "until"),
        (Unique(until=0), "until"),
    ],
)
def test_a_unique_that_cannot_be_meant_is_refused(unique, says):
    with pytest.raises(ValueError, match=says):
        check_unique(unique)
    with pytest.raises(ValueError, match=says):
        declared(unique=unique, unique_key=unique_key)


def test_a_unique_without_its_key_is_refused():
    with pytest.raises(TypeError, match="the key of unique calls is missing"):
        declared(unique=Unique())


# Pauses


@pytest.mark.parametrize(
    ("given", "pause_us", "longest_us", "caller"),
    [
        ("5s", 5_000_000, 50_000_000, "all"),
        (0.5, 500_000, 5_000_000, "all"),
        (Pause("5s", longest="1m"), 5_000_000, 60_000_000, "all"),
        (Pause("5s", key="{tenant}", longest="5s"), 5_000_000, 5_000_000, "acme"),
    ],
)
def test_a_debounce_is_a_pause_in_which_one_waits_the_newest(given, pause_us, longest_us, caller):
    gate = only(debounce=given)

    assert (gate.kind, gate.span, gate.rest, gate.most, gate.policy) == ("d", pause_us, longest_us, 1, "l")
    assert gate.state == f"petiole:1:pause:{{{TASK}:{caller}}}"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("soon", "debounce"),
        (0, "debounce"),
        (Pause("5s", longest="4s"), "longest='4s' is shorter than the pause, '5s'"),
    ],
)
def test_a_pause_that_cannot_be_meant_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        declared(debounce=given)


# All of them


def test_pauses_come_before_permits_and_permits_before_rates():
    """Nobody holds a permit while he waits for a pause, and no token is charged to who gets no permit."""
    gates = calls_of(
        rate="9/m", concurrency=2, lock="a", debounce="5s", unique=Unique(until="end"), unique_key=unique_key
    )

    assert [gate.kind for gate in gates] == ["d", "c", "p", "p", "p", "g"]
    assert [gate.lock and gate.lock[0] for gate in gates][2:5] == ["unique", "lock", "semaphore"]


@pytest.mark.parametrize(
    "options",
    [
        {"lock": ["{tenant}", "acme"]},
        {"concurrency": [Concurrency(5, name="a", key="{tenant}"), Concurrency(3, name="a:acme")]},
        {"rate": ["1/s", Rate("9/s", key="{tenant}")]},
    ],
)
def test_two_gates_that_are_one_are_refused(options):
    """A task that wants the same lock twice would wait for itself."""
    gates = declared(**options)
    first = [gate.state for gate in declared(**{name: given[0] for name, given in options.items()}).of([1, "all"], {})]

    with pytest.raises(ValueError, match=f"{TASK}: two gates of this call are the same one: .*; give one another name"):
        gates.of([1, "all" if "rate" in options else "acme"], {})
    assert first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lock": ["a", "a"]}, r"lock= of shop\.charge: two gates are the same one, named 'a'; leave one out"),
        ({"lock": ["{tenant}", "b", "{tenant}"]}, r"named '\{tenant\}'; leave one out"),
        (
            {"concurrency": [5, 3]},
            r"concurrency= of shop\.charge: .* named 'shop\.charge'; give one a name= of its own",
        ),
        ({"concurrency": [5, Concurrency(3, name=TASK)]}, r"as in Concurrency\(3, name='database'\)"),
        ({"concurrency": [{"{tenant}": 5}, {"{tenant}": 3}]}, "give one a name="),
        ({"rate": ["100/m", "10/m"]}, r"rate= of shop\.charge: .*, as in Rate\('10/m', name='provider'\)"),
        ({"rate": ["1/s", Rate("9/s")]}, "give one a name="),
        ({"rate": ["{tenant}: 1/s", Rate("9/s", key="{tenant}")]}, "give one a name="),
    ],
)
def test_two_gates_that_are_one_for_every_call_are_refused_when_they_are_declared(options, says):
    with pytest.raises(ValueError, match=says):
        declared(**options)


def test_gates_that_differ_in_their_name_their_key_or_their_period_are_several():
    rates = ["1/s", "9/m", "{tenant}: 1/s", Rate("1/s", name="provider"), RateLimit.exact("1/s")]
    permits = [5, {"{tenant}": 3}, Concurrency(3, name="database")]

    assert len(calls_of(lock=["a", "b"], concurrency=permits, rate=rates)) == 10


def test_gates_that_differ_in_one_call_may_be_one_in_another():
    """It is looked at for each call."""
    gates = declared(lock=["{tenant}", "acme"])

    assert len(gates.of([1, "other"], {})) == 2
    with pytest.raises(ValueError, match="the same one"):
        gates.of([1, "acme"], {})


@pytest.mark.parametrize(
    "options", [{"rate": "{tenant}: 1/s"}, {"concurrency": [9, {"{tenant}": 2}]}, {"lock": "a", "fair": "{tenant}"}]
)
def test_the_first_key_of_a_rate_or_of_permits_goes_by_turns(options):
    gates = declared(**options)

    def fair(*arguments):
        (found,) = {gate.fair for gate in gates.of(arguments, {})}
        return found

    assert fair(1, "acme") == fair(2, "acme")
    assert fair(1, "acme") != fair(1, "other")
    assert fair(1, "acme") != "-"


def test_keys_that_go_by_turns_are_one_word_whatever_they_are():
    """They stand among others in one line of text."""
    gates = declared(lock="a", fair="{tenant}")

    assert all(gates.of([1, odd], {})[0].fair.isalnum() for odd in ("", " ", "a b", "-", "ü\n", "x" * 1000))


def test_without_keys_all_are_alike():
    assert {gate.fair for gate in calls_of(lock="a{account_id}", rate="1/s", concurrency=5)} == {"-"}


def test_fair_is_by_the_key_that_is_named():
    assert only(1, "a", lock="x", rate=None, fair="{account_id}") == only(1, "b", lock="x", fair="{account_id}")


@pytest.mark.parametrize(("when_full", "policy"), [("reject", "r"), ("drop_oldest", "o"), ("drop_newest", "n")])
def test_how_many_may_wait_is_told_to_locks_permits_and_rates(when_full, policy):
    gates = calls_of(lock="a", concurrency=5, rate="1/s", max_parked=3, when_full=when_full)

    assert [(gate.most, gate.policy) for gate in gates] == [(3, policy)] * 3


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_parked": 0}, ValueError, "max_parked=0 must be a whole number, 1 or more"),
        ({"max_parked": True}, ValueError, "max_parked=True"),
        ({"max_parked": "3"}, ValueError, "max_parked='3'"),
        ({"when_full": "wait"}, ValueError, "when_full='wait' is unknown; there are reject, drop_oldest, drop_newest"),
        ({"lock": "{nobody}"}, ValueError, "which is no argument here"),
        ({"lock": 7}, TypeError, "lock=7 is no name; write a template such as 'account:{account_id}', or several"),
        ({"lock": [7]}, TypeError, r"lock= of shop\.charge: 7 is no template; write text"),
        (
            {"lock": ""},
            ValueError,
            r"lock= of shop\.charge: '' is no name; write one, such as 'account:\{account_id\}'",
        ),
        ({"concurrency": {"{nobody}": 1}}, ValueError, "which is no argument here"),
        ({"lock": "a", "fair": "{nobody}"}, ValueError, "which is no argument here"),
        ({"lock": "a", "fair": 7}, TypeError, "7 is no template"),
        ({"rate": Rate("1/s", cost="{nobody}")}, ValueError, "which is no argument here"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_it_is_declared(options, error, says):
    with pytest.raises(error, match=says):
        declared(**options)


@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("lock", lambda text: {"lock": text}),
        ("concurrency", lambda text: {"concurrency": {text: 5}}),
        ("rate", lambda text: {"rate": {text: "1/s"}}),
        ("cost", lambda text: {"rate": Rate("1/s", cost=text)}),
        ("debounce", lambda text: {"debounce": Pause("5s", key=text)}),
        ("fair", lambda text: {"lock": "a", "fair": text}),
    ],
)
class TestTemplates:
    """Of every option."""

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("{nobody}", "names 'nobody', which is no argument here; there are: account_id, tenant, tokens"),
            ("t:{}", "has braces without a name, which is no argument here; there are: account_id, tenant, tokens"),
            ("t:{0}", "has braces without a name"),
            ("{tenant", r"is no template: expected '\}' before end of string; write the name .*'\{account_id\}'"),
            ("tenant", r"is the same for all calls; write '\{tenant\}' for the argument of that name"),
        ],
    )
    def test_one_that_cannot_be_meant_is_refused_with_the_names_of_task_and_option(self, option, options, text, says):
        with pytest.raises(ValueError, match=rf"^{option}= of shop\.charge: {re.escape(repr(text))} {says}"):
            declared(**options(text))

    @pytest.mark.parametrize("text", ["{tenant.id}", "{tenant[x]}", "{tenant:d}", "{tenant[9]}"])
    def test_one_that_a_call_cannot_fill_is_a_type_error_that_names_it(self, option, options, text):
        """It is a mistake in the call, as an argument is that the task does not take."""
        gates = declared(**options(text))

        with pytest.raises(TypeError, match=rf"^{option}={re.escape(repr(text))} cannot be filled from this call of "):
            gates.of([1, "acme"], {})


def test_a_text_that_is_no_argument_is_one_key_for_all_calls():
    """That may be meant: then it is not the name of an argument."""
    assert only(lock="reports").shown == "lock 'reports'"
    assert only(concurrency={"reports": 5}).shown == f"concurrency '{TASK}:reports' (5)"
    assert only(rate={"reports": "1/s"}).caller == "reports"


def test_gates_are_shown_without_arguments():
    assert repr(declared(lock="{tenant}", rate="1/s")) == f"<Gates of {TASK} [2]>"


# What whoever serves a line reads


@given(
    account=st.text(max_size=20),
    options=st.sampled_from(
        [
            {"lock": "{account_id}"},
            {"concurrency": {"{account_id}": 3}},
            {"rate": Rate(RateLimit("7/m", burst=3), key="{account_id}")},
            {"rate": Rate(RateLimit.bucketed("9/m"), key="{account_id}")},
            {"debounce": Pause("5s", key="{account_id}")},
        ]
    ),
    lease_ms=st.integers(100, 3_600_000),
)
def test_a_definition_is_read_as_it_was_written(account, options, lease_ms):
    gate = only(account or "-", **options)
    served = Served.read(gate.definition(lease_ms).encode())

    for name in ("kind", "shown", "state", "second", "count", "span", "rest", "part"):
        assert getattr(served, name) == getattr(gate, name)
    assert served.lease_ms == lease_ms


@pytest.mark.parametrize(
    "definition",
    [
        b"", b"null", b"{}", b"[]", b"7", b"\xff", b'["p","lock","s","q",1,0,0,1]', b'["p","lock","s",7,1,0,0,1,30000]',
        b'["p","lock","s","q",1,0,0,1,30000,1]', b'["p","lock","s","q","1",0,0,1,30000]',
        b'["p","lock","s","q",true,0,0,1,30000]', b'["p","lock","s","q",1.5,0,0,1,30000]',
    ],
)  # fmt: skip
def test_a_definition_that_was_not_written_by_us_is_refused(definition):
    with pytest.raises(ValueError):  # noqa: PT011  # by JSON itself, or by us
        Served.read(definition)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=12))
def test_whatever_stands_there_is_refused_as_one_error(found):
    definition = json.dumps(found).encode()
    try:
        assert json.loads(definition) == found
        served = Served.read(definition)
    except ValueError:
        return
    assert len(found) == 9
    assert served.kind == found[0]
