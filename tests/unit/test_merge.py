"""``merge.py``: a batch is what its rows add up to, one at a time."""

import enum
from decimal import Decimal
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from petiole.cachelib.write_behind.merge import alike, summed

rows = st.lists(
    st.builds(
        lambda a, b, amounts: {"a": a, "b": b} | amounts,
        st.sampled_from(["x", "y", "z"]),
        st.integers(0, 2),
        st.fixed_dictionaries({}, optional={"n": st.integers(-99, 99), "m": st.decimals("-9", "9", places=2)}),
    ),
    max_size=40,
)


def added_one_by_one(rows: list[dict[str, Any]]) -> dict[tuple[str, int], tuple[int, Decimal]]:
    totals: dict[tuple[str, int], tuple[int, Decimal]] = {}
    for row in rows:
        n, m = totals.get((row["a"], row["b"]), (0, Decimal(0)))
        totals[row["a"], row["b"]] = (n + row.get("n", 0), m + row.get("m", 0))
    return totals


@given(rows)
def test_a_merged_batch_is_what_its_rows_add_up_to(rows: list[dict[str, Any]]) -> None:
    """Merging first and adding the total is adding row by row."""
    merged = summed(rows, ["a", "b"], ["n", "m"])

    assert {(row["a"], row["b"]): (row["n"], row["m"]) for row in merged} == added_one_by_one(rows)


@given(rows)
def test_a_merged_batch_names_each_key_once_in_order(rows: list[dict[str, Any]]) -> None:
    """Flushers that lock rows in one order do not deadlock."""
    keys = [(row["a"], row["b"]) for row in summed(rows, ["a", "b"], ["n", "m"])]

    assert keys == sorted(set(keys))


@given(rows, rows)
def test_where_a_batch_ends_does_not_matter(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    """Batches of batches add up to the same."""
    in_two = summed(first, ["a", "b"], ["n", "m"]) + summed(second, ["a", "b"], ["n", "m"])

    assert summed(in_two, ["a", "b"], ["n", "m"]) == summed(first + second, ["a", "b"], ["n", "m"])


@given(rows)
def test_merging_leaves_the_rows_as_they_are(rows: list[dict[str, Any]]) -> None:
    """A batch that could not be committed is merged again."""
    before = [dict(row) for row in rows]
    summed(rows, ["a", "b"], ["n", "m"])

    assert rows == before


def test_keys_that_have_no_order_can_be_merged() -> None:
    """Members of an Enum are not comparable, and are keys all the same."""
    colour = enum.Enum("colour", ["RED", "BLUE"])
    merged = summed([{"k": colour.RED, "n": 1}, {"k": colour.BLUE, "n": 2}, {"k": colour.RED, "n": 3}], ["k"], ["n"])

    assert {row["k"]: row["n"] for row in merged} == {colour.RED: 4, colour.BLUE: 2}


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers()), max_size=30))
def test_runs_of_alike_rows_keep_every_row_and_the_order(rows: list[dict[str, int]]) -> None:
    """Each run is one statement: the same columns within it, other columns in the next."""
    runs = alike(rows)

    assert [row for run in runs for row in run] == rows
    assert all(row.keys() == run[0].keys() for run in runs for row in run)
    assert all(one[0].keys() != next_[0].keys() for one, next_ in pairwise(runs))
