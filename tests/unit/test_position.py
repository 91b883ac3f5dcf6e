"""``position.py``: whatever happens in whatever order, each entry is applied once."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from petiole.cachelib.write_behind.position import (
    MOST_RUNS,
    START,
    Entry,
    EntryId,
    Position,
    marks_from_text,
    marks_to_text,
)

ids = st.builds(EntryId, st.integers(0, 2**63), st.integers(0, 2**63))


def entries(run: str, *numbers: int) -> list[Entry]:
    return [Entry(EntryId(number, 0), run, b"") for number in numbers]


@given(ids)
def test_an_id_is_read_back_from_its_text(entry_id: EntryId) -> None:
    """Text and id are two forms of one thing."""
    assert EntryId.parse(str(entry_id)) == entry_id


@given(ids, ids)
def test_nothing_stands_between_an_id_and_the_following_one(one: EntryId, other: EntryId) -> None:
    """A trim up to the following id removes an entry and nothing behind it."""
    assert one < one.following()
    assert not one < other < one.following()


def test_ids_are_ordered_as_numbers() -> None:
    """Redis compares ids as numbers: text would put 10 before 9."""
    assert EntryId.parse("9-0") < EntryId.parse("10-0")
    assert EntryId.parse("5-9") < EntryId.parse("5-10")


@given(st.dictionaries(st.text("0123456789abcdef", max_size=12), ids, max_size=8))
def test_marks_are_read_back_from_their_text_in_their_order(marks: dict[str, EntryId]) -> None:
    """The order counts: the oldest run is forgotten first."""
    read = marks_from_text(marks_to_text(marks))

    assert list(read.items()) == list(marks.items())


def test_everything_is_unapplied_at_the_start() -> None:
    """Even the smallest id that there is."""
    first = [Entry(EntryId(0, 0), "a", b"")]

    assert START.unapplied(first) == first


def test_the_mark_itself_is_applied_and_what_follows_is_not() -> None:
    """An entry is applied if and only if its id is not above the mark of its run."""
    position = START.after(entries("a", 1, 2, 3), now_ms=9)

    assert position.unapplied(entries("a", 2, 3, 4)) == entries("a", 4)


def test_each_run_has_a_mark_of_its_own() -> None:
    """Ids that went back in a new run are new."""
    position = START.after(entries("a", 100), now_ms=100)

    assert position.unapplied(entries("b", 1, 2)) == entries("b", 1, 2)


def test_a_mark_never_goes_back() -> None:
    """What was applied stays applied, although a later batch ends lower."""
    position = START.after([*entries("a", 100), *entries("b", 1)], now_ms=100).after(entries("b", 2), now_ms=100)

    assert position.marks == {"a": EntryId(100, 0), "b": EntryId(2, 0)}


def test_the_most_recent_runs_are_kept_and_the_oldest_forgotten() -> None:
    """The marks are bounded; a run that is met again counts as recent."""
    position = START
    for run in range(MOST_RUNS):
        position = position.after(entries(str(run), 1), now_ms=1)
    position = position.after(entries("0", 2), now_ms=1).after(entries("new", 1), now_ms=1)

    assert len(position.marks) == MOST_RUNS
    assert list(position.marks)[-2:] == ["0", "new"]
    assert "1" not in position.marks


def test_a_position_counts_versions_and_rows_and_knows_the_lag_of_its_last_batch() -> None:
    """The version rises by one for a batch of any size; the lag is the age of the oldest row."""
    position = START.after(entries("a", 1_000, 1_500), now_ms=1_700).after(entries("a", 1_600), now_ms=1_610)

    assert (position.version, position.rows_applied, position.lag_ms) == (2, 3, 10)


def test_a_clock_that_went_back_gives_no_negative_lag() -> None:
    """A lag is an age."""
    assert START.after(entries("a", 1_000), now_ms=400).lag_ms == 0


@dataclass
class Flush:
    """One flusher, somewhere between its read and its trim."""

    read: list[Entry]
    run: str
    position: Position
    committed: bool = False


class AnyInterleaving(RuleBasedStateMachine):
    """Servers, databases and flushers as lists. A flusher may be stopped, overtaken or killed after any step."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 1
        self.clock = 1_000
        self.last = EntryId(0, 0)
        self.stream: list[Entry] = []
        self.snapshot: tuple[list[Entry], EntryId] = ([], EntryId(0, 0))
        self.number = 0
        self.position = START
        self.applied: list[bytes] = []
        self.flushes: list[Flush] = []

    @property
    def run(self) -> str:
        return f"run{self.runs}"

    @rule(ticks=st.integers(0, 2), rows=st.integers(1, 3))
    def put(self, ticks: int, rows: int) -> None:
        self.clock += ticks
        for _ in range(rows):
            self.last = max(EntryId(self.clock, 0), self.last.following())
            self.number += 1
            self.stream.append(Entry(self.last, self.run, b"%08d" % self.number))

    @rule(count=st.integers(1, 4))
    def read(self, count: int) -> None:
        if self.stream:
            self.flushes.append(Flush(self.stream[:count], self.run, self.position))

    @precondition(lambda self: self.flushes)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        flush = data.draw(st.sampled_from(self.flushes))
        unapplied = flush.position.unapplied(flush.read)
        if flush.committed or not unapplied:
            flush.committed = True
        elif flush.position.version != self.position.version:
            self.flushes.remove(flush)  # fenced: it reads again
        else:
            moved = flush.position.after(unapplied, self.clock)
            self.position = Position(
                moved.version, marks_from_text(marks_to_text(moved.marks)), moved.rows_applied, moved.lag_ms
            )
            self.applied += [entry.payload for entry in unapplied]
            flush.committed = True

    @precondition(lambda self: any(flush.committed for flush in self.flushes))
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        flush = data.draw(st.sampled_from([flush for flush in self.flushes if flush.committed]))
        self.flushes.remove(flush)
        if flush.run == self.run:
            before = max(entry.id for entry in flush.read).following()
            self.stream = [entry for entry in self.stream if entry.id >= before]

    @precondition(lambda self: self.flushes)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        self.flushes.remove(data.draw(st.sampled_from(self.flushes)))

    @rule()
    def save(self) -> None:
        self.snapshot = (list(self.stream), self.last)

    @rule(back=st.integers(0, 50))
    def restart_from_snapshot(self, back: int) -> None:
        self.runs += 1
        self.clock -= back
        self.stream, self.last = list(self.snapshot[0]), self.snapshot[1]

    @rule()
    def reload_snapshot_in_the_same_run(self) -> None:
        self.stream, self.last = list(self.snapshot[0]), self.snapshot[1]
        self.clock = max([self.clock, *(mark.ms for mark in self.position.marks.values())]) + 1

    @rule(back=st.integers(0, 500))
    def restart_empty(self, back: int) -> None:
        self.runs += 1
        self.clock -= back
        self.stream, self.last = [], EntryId(0, 0)
        self.snapshot = ([], EntryId(0, 0))

    @invariant()
    def nothing_is_applied_twice_and_the_order_is_kept(self) -> None:
        assert self.applied == sorted(set(self.applied))
        assert self.position.rows_applied == len(self.applied)

    def teardown(self) -> None:
        """Whatever happened: two flushes later all that Redis still held is applied, once."""
        held = {entry.payload for entry in self.stream}
        unapplied = self.position.unapplied(self.stream)
        self.applied += [entry.payload for entry in unapplied]

        assert held <= set(self.applied)
        assert self.applied == sorted(set(self.applied))


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
