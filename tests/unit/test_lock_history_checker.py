"""The checker of lock histories finds what is wrong in them, and nothing in those that are right."""

import pytest

from tests.contract.histories import (
    Held,
    Write,
    crowds,
    crowds_of_kept,
    fences_not_rising,
    fences_out_of_order,
    holds_of,
    late_writes,
    needless_refusals,
    steps_back,
    violations,
    writes_of,
)


def held(hold, fence, began, until, *, asked=None, ended=None, kept=True, units=1):
    """A hold that was believed in from one second to another."""
    asked, ended = (began if asked is None else asked), (until if ended is None else ended)
    return Held(hold, fence, asked, began, until, ended, kept, units=units)


def write(hold, fence, at, accepted, ended=None):
    return Write(hold, fence, at, at if ended is None else ended, accepted)


def began(hold, fence, at, deadline, *, asked=None, units=1):
    asked = at if asked is None else asked
    return {
        "note": "began",
        "hold": hold,
        "fence": fence,
        "at": at,
        "deadline": deadline,
        "asked": asked,
        "units": units,
    }


def looked(hold, at, deadline, *, lost=False):
    return {"note": "looked", "hold": hold, "at": at, "deadline": deadline, "lost": lost}


def wrote(hold, fence, at, *, accepted=True):
    return {
        "note": "wrote",
        "hold": hold,
        "fence": fence,
        "at": at,
        "ended": at,
        "accepted": accepted,
        "place": "table",
    }


def released(hold, at, *, kept=True):
    return [{"note": "releasing", "hold": hold, "at": at}, {"note": "released", "hold": hold, "at": at, "held": kept}]


ONE_AFTER_THE_OTHER = [
    *(began("a", 1, 0.0, 10.0), looked("a", 1.0, 11.0), wrote("a", 1, 1.5), *released("a", 2.0)),
    *(began("b", 2, 2.5, 12.0, asked=0.5), wrote("b", 2, 2.6), *released("b", 3.0)),
]
STOPPED_BEYOND_ITS_LEASE = [
    *(began("a", 1, 0.0, 1.0), wrote("a", 1, 0.5)),
    *(began("b", 2, 1.1, 12.0, asked=0.5), wrote("b", 2, 1.2)),
    *(wrote("a", 1, 1.5, accepted=False), looked("a", 1.6, 1.0, lost=True), *released("a", 1.7, kept=False)),
    *released("b", 3.0),
]


@pytest.mark.parametrize("notes", [[], ONE_AFTER_THE_OTHER, STOPPED_BEYOND_ITS_LEASE])
def test_nothing_is_found_where_nothing_is_wrong(notes):
    assert violations(notes) == []


SEEDED = {
    "two believe in their holds at one moment": [
        *(began("a", 1, 0.0, 10.0), *released("a", 2.0, kept=False)),
        *(began("b", 2, 1.9, 12.0), *released("b", 3.0)),
    ],
    "one that was killed would have believed in it for longer": [
        *(began("a", 1, 0.0, 10.0),),
        *(began("b", 2, 5.0, 12.0), *released("b", 6.0)),
    ],
    "two are told that they have held until the end": [
        *(began("a", 1, 0.0, 1.0), looked("a", 1.5, 1.0, lost=True), *released("a", 2.5, kept=True)),
        *(began("b", 2, 2.0, 12.0), *released("b", 3.0)),
    ],
    "a fence is given twice": [
        *(began("a", 1, 0.0, 10.0), *released("a", 1.0)),
        *(began("b", 1, 2.0, 12.0), *released("b", 3.0)),
    ],
    "a fence falls": [
        *(began("a", 2, 0.0, 10.0), *released("a", 1.0)),
        *(began("b", 1, 2.0, 12.0, asked=-1.0), *released("b", 3.0)),
    ],
    "a late write is accepted": [
        *(began("a", 1, 0.0, 1.0), began("b", 2, 1.1, 12.0), wrote("b", 2, 1.2), wrote("a", 1, 1.5)),
        *(*released("a", 1.7, kept=False), *released("b", 3.0)),
    ],
    "a write is refused for nothing": [
        *(began("a", 1, 0.0, 10.0), wrote("a", 1, 0.5, accepted=False), *released("a", 1.0)),
    ],
}


SAID = [
    "believed in at one moment",
    "believed in at one moment",
    "told to have held until the end",
    "was given to a and to b",
    "b began after a, and has fence 1 <= 2",
    "fence 1 was written by a after fence 2",
    "no later hold had begun",
]


@pytest.mark.parametrize(("notes", "said"), list(zip(SEEDED.values(), SAID, strict=True)), ids=SEEDED)
def test_what_is_wrong_is_found(notes, said):
    assert said in violations(notes)[0]


def test_a_forgetful_server_excuses_two_that_believe_but_not_two_that_are_told_so():
    notes = SEEDED["two believe in their holds at one moment"]
    assert violations(notes, forgetful=True) == []
    assert violations(SEEDED["two are told that they have held until the end"], forgetful=True) != []
    assert violations(SEEDED["a late write is accepted"], forgetful=True) != []


def test_a_hold_is_believed_in_until_its_release_or_the_last_deadline_that_was_seen():
    assert holds_of([began("a", 1, 0.0, 10.0), *released("a", 2.0)])[0].believed_until == 2.0
    assert holds_of([began("a", 1, 0.0, 1.0), *released("a", 2.0)])[0].believed_until == 1.0
    assert holds_of([began("a", 1, 0.0, 1.0), looked("a", 0.5, 1.5)])[0].believed_until == 1.5


def test_a_loss_that_came_before_the_deadline_ends_the_belief_at_the_last_good_look():
    notes = [began("a", 1, 0.0, 9.0), looked("a", 1.0, 9.0), looked("a", 2.0, 9.0, lost=True)]
    assert (holds_of(notes)[0].believed_until, holds_of(notes)[0].lost) == (1.0, True)


def test_a_hold_that_began_after_its_deadline_was_never_believed_in():
    (late,) = holds_of([began("a", 1, 2.0, 1.0)])
    assert not late.believed
    other = held("b", 2, 0.5, 3.0)
    assert crowds([late, other], 1) == []
    assert fences_not_rising([other, late]) == []


def test_one_that_begins_at_the_moment_another_ends_is_not_beside_it():
    assert crowds([held("a", 1, 0.0, 1.0), held("b", 2, 1.0, 2.0)], 1) == []


def test_units_are_added_up():
    readers = [held("r1", 1, 0.0, 2.0), held("r2", 2, 0.5, 2.5)]
    assert crowds(readers, 3) == []
    assert len(crowds([*readers, held("w", 3, 2.2, 3.0, units=3)], 3)) == 1
    assert crowds([*readers, held("w", 3, 2.5, 3.0, units=3)], 3) == []


def test_what_was_never_released_was_not_told_to_have_held():
    assert crowds_of_kept([held("a", 1, 0.0, 2.0, kept=None), held("b", 2, 1.0, 3.0)], 1) == []


def test_two_that_were_asked_for_at_once_may_begin_in_any_order():
    """A semaphore's second permit may be known to its holder before the first."""
    assert fences_out_of_order([held("b", 2, 1.0, 5.0, asked=0.5), held("a", 1, 1.1, 5.0, asked=0.4)]) == []
    assert len(fences_out_of_order([held("b", 2, 1.0, 5.0, asked=0.5), held("a", 1, 1.3, 5.0, asked=1.2)])) == 1


def test_writes_at_one_moment_may_be_accepted_in_any_order():
    assert late_writes([write("a", 1, 1.0, True, ended=2.0), write("b", 2, 1.5, True, ended=1.8)]) == []
    assert len(late_writes([write("a", 1, 1.9, True, ended=2.0), write("b", 2, 1.5, True, ended=1.8)])) == 1


def test_a_write_may_be_refused_once_a_later_hold_has_begun():
    holds = [held("a", 1, 0.0, 1.0), held("b", 2, 1.2, 3.0)]
    assert needless_refusals([write("a", 1, 1.5, False)], holds) == []
    assert len(needless_refusals([write("a", 1, 1.1, False)], holds)) == 1
    assert len(needless_refusals([write("b", 2, 1.5, False)], holds)) == 1


def test_steps_back_are_counted():
    assert steps_back([]) == 0
    assert steps_back([1, 1, 2, 3]) == 0
    assert steps_back([1, 3, 2, 3, 1]) == 2


def test_notes_that_are_no_holds_are_passed_over():
    notes = [wrote("z", 9, 0.2), *ONE_AFTER_THE_OTHER]
    assert [one.hold for one in holds_of(notes)] == ["a", "b"]
    assert [one.hold for one in writes_of(notes)] == ["z", "a", "b"]
