"""Histories of holds, and what is wrong with them. Pure.

Processes note what they did and when, by the clock that all processes of a machine share. A hold is believed in from
the moment it began until it was released, was seen to be lost, or its last known deadline has passed. Where the exact
moment is not known, the earlier one is taken: what is found here did happen.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Held:
    """One hold, as its process saw it. Times are seconds."""

    hold: str
    fence: int
    asked: float
    began: float
    believed_until: float
    ended: float
    """When its release began; of a process that was killed, its last note."""
    kept: bool | None = None
    """What its release returned: whether it was held until then. None: it was never released."""
    lost: bool = False
    units: int = 1

    @property
    def believed(self) -> bool:
        """Whether there was a moment at which it was believed in."""
        return self.began < self.believed_until


@dataclass(frozen=True)
class Write:
    """One attempt to write under a hold, to a place that checks fences."""

    hold: str
    fence: int
    began: float
    ended: float
    accepted: bool
    place: str = "table"


Notes = Sequence[Mapping[str, Any]]


def holds_of(notes: Notes) -> list[Held]:
    """The holds that the notes of all processes tell of."""
    by_hold: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for note in notes:
        by_hold[note["hold"]].append(note)
    return [_held(parts) for parts in by_hold.values() if any(part["note"] == "began" for part in parts)]


def writes_of(notes: Notes) -> list[Write]:
    """The writes to places that check fences."""
    return [
        Write(one["hold"], one["fence"], one["at"], one["ended"], one["accepted"], one["place"])
        for one in notes
        if one["note"] == "wrote"
    ]


def _held(notes: Notes) -> Held:
    began = next(one for one in notes if one["note"] == "began")
    looks = [began, *(one for one in notes if one["note"] == "looked")]
    good = [one for one in looks if not one.get("lost")]
    bad = min((one["at"] for one in looks if one.get("lost")), default=None)
    releasing = next((one["at"] for one in notes if one["note"] == "releasing"), None)
    released = next((one["held"] for one in notes if one["note"] == "released"), None)
    last = max(good, key=lambda one: one["at"], default=began)
    until = last["deadline"]
    if bad is not None and bad < until:  # the server's word came before the deadline, nobody knows when
        until = last["at"]
    if releasing is not None:
        until = min(until, releasing)
    return Held(
        hold=began["hold"],
        fence=began["fence"],
        asked=began["asked"],
        began=began["at"],
        believed_until=until,
        ended=releasing if releasing is not None else max(one["at"] for one in notes),
        kept=released,
        lost=bad is not None,
        units=began["units"],
    )


def crowds(holds: Iterable[Held], capacity: int) -> list[str]:
    """The moments at which more units were believed to be held than there are."""
    spans = [(one.began, one.believed_until, one) for one in holds if one.believed]
    return _crowds(spans, capacity, "believed in at one moment")


def crowds_of_kept(holds: Iterable[Held], capacity: int) -> list[str]:
    """The same of those that were told at their release that they had held until then.

    Holds also where Redis has lost its keys: who did not hold to the end is told so.
    """
    spans = [(one.began, one.ended, one) for one in holds if one.kept]
    return _crowds(spans, capacity, "told to have held until the end")


def _crowds(spans: Iterable[tuple[float, float, Held]], capacity: int, what: str) -> list[str]:
    moments = []
    for begin, end, one in spans:
        if begin < end:
            moments += [(begin, 1, one), (end, 0, one)]
    moments.sort(key=lambda moment: moment[:2])  # at one moment those who end go first
    found, inside, used = [], dict[str, Held](), 0
    for at, begins, one in moments:
        if begins:
            inside[one.hold] = one
            used += one.units
            if used > capacity:
                names = ", ".join(f"{held.hold} (fence {held.fence})" for held in inside.values())
                found.append(f"{used} of {capacity} units at {at:.6f}, {what}: {names}")
        elif inside.pop(one.hold, None):
            used -= one.units
    return found


def fences_out_of_order(holds: Iterable[Held]) -> list[str]:
    """Fences that occur twice, and holds that were asked for after one with a higher fence had begun."""
    held = list(holds)
    found, seen = [], dict[int, Held]()
    for one in held:
        if one.fence in seen:
            found.append(f"fence {one.fence} was given to {seen[one.fence].hold} and to {one.hold}")
        seen[one.fence] = one
    by_begin = sorted(held, key=lambda one: one.began)
    highest: Held | None = None
    position = 0
    for one in sorted(held, key=lambda one: one.asked):
        while position < len(by_begin) and by_begin[position].began < one.asked:
            candidate = by_begin[position]
            if highest is None or candidate.fence > highest.fence:
                highest = candidate
            position += 1
        if highest is not None and one.fence <= highest.fence and one is not highest:
            found.append(
                f"{one.hold} was asked for after {highest.hold} had begun, and has fence {one.fence} <= {highest.fence}"
            )
    return found


def fences_not_rising(holds: Iterable[Held]) -> list[str]:
    """Of holds that exclude each other: those that began, and were believed in, after one with a higher fence."""
    in_order = sorted((one for one in holds if one.believed), key=lambda one: one.began)
    return [
        f"{later.hold} began after {earlier.hold}, and has fence {later.fence} <= {earlier.fence}"
        for earlier, later in pairwise(in_order)
        if later.fence <= earlier.fence
    ]


def late_writes(writes: Iterable[Write]) -> list[str]:
    """Writes that were accepted after a later hold had written."""
    found = []
    for place in _places(writes).values():
        accepted = [one for one in place if one.accepted]
        by_end = sorted(accepted, key=lambda one: one.ended)
        highest, position = -1, 0
        for one in sorted(accepted, key=lambda one: one.began):
            while position < len(by_end) and by_end[position].ended < one.began:
                highest = max(highest, by_end[position].fence)
                position += 1
            if one.fence < highest:
                found.append(f"{one.place}: fence {one.fence} was written by {one.hold} after fence {highest}")
    return found


def needless_refusals(writes: Iterable[Write], holds: Iterable[Held]) -> list[str]:
    """Writes that were refused though no later hold had begun."""
    begun = sorted(holds, key=lambda one: one.began)
    found, highest, position = [], -1, 0
    for one in sorted((one for one in writes if not one.accepted), key=lambda one: one.ended):
        while position < len(begun) and begun[position].began < one.ended:
            highest = max(highest, begun[position].fence)
            position += 1
        if highest <= one.fence:
            found.append(f"{one.place}: fence {one.fence} of {one.hold} was refused, and no later hold had begun")
    return found


def _places(writes: Iterable[Write]) -> dict[str, list[Write]]:
    places: dict[str, list[Write]] = defaultdict(list)
    for one in writes:
        places[one.place].append(one)
    return places


def steps_back(fences: Sequence[int]) -> int:
    """How often a lower fence was written after a higher one, in a place that keeps the order of what was written."""
    return sum(later < earlier for earlier, later in pairwise(fences))


def violations(notes: Notes, *, capacity: int = 1, forgetful: bool = False) -> list[str]:
    """All that is wrong with a history.

    Arguments:
        capacity: how many units there are. With 1, holds exclude each other.
        forgetful: the server has lost its keys in between: then two may believe in their holds at one moment.
    """
    holds, writes = holds_of(notes), writes_of(notes)
    found = fences_out_of_order(holds) + crowds_of_kept(holds, capacity) + late_writes(writes)
    found += needless_refusals(writes, holds)
    if not forgetful:
        found += crowds(holds, capacity)
        if capacity == 1:
            found += fences_not_rising(holds)
    return found
