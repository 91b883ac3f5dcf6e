"""How it is shown: a table of ratios, bars beside the numbers, the same as Markdown, and a picture."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .admission import RATE, SECONDS, Admitted
from .contention import Contended
from .hand_off import HandedOff
from .measure import Measured
from .memory import Taken
from .peers import PETIOLE
from .stampede import LOAD_S, Crowd
from .task_peers import PLAIN
from .workers import Worked

_BAR = 36
_MISSING = "–"  # noqa: RUF001
_CONTENDED = ["taken/s", "handed over/s", "commands each", "p99 ms", "longest ms", "fairness", "overlaps"]

Rows = list[list[str]]


def ratio_text(ratio: float) -> str:
    """A ratio with as many digits as it deserves."""
    return f"{ratio:.3f}" if ratio < 0.1 else f"{ratio:.2f}" if ratio < 100 else f"{ratio:,.0f}"


def ratios(found: Sequence[Measured]) -> Rows:
    """Operations down, contestants across; the first row is the heading."""
    who, cells = _columns(found), {(one.operation, one.who): one for one in found}
    rows = [["ratio to the floor", *who, f"{PETIOLE}, µs", "floor, µs"]]
    for operation in dict.fromkeys(one.operation for one in found):
        mine = cells.get((operation, PETIOLE))
        texts = [ratio_text(cells[operation, name].ratio) if (operation, name) in cells else _MISSING for name in who]
        floor_us = statistics.median(one.floor_us for one in found if one.operation == operation)
        rows.append([operation, *texts, f"{mine.us:,.2f}" if mine else _MISSING, f"{floor_us:,.2f}"])
    return rows


def crowds(found: Sequence[Crowd]) -> Rows:
    """What a stampede cost each."""
    rows = [[f"one key missed, {LOAD_S * 1_000:.0f} ms to load", "loads", "p50 ms", "p99 ms", "commands per process"]]
    for one in found:
        shape = f"{one.processes} x {one.callers}: {one.who}"
        rows.append([shape, f"{one.loads:.0f}", f"{one.p50_ms:.1f}", f"{one.p99_ms:.1f}", f"{one.commands:,.1f}"])
    return rows


def memory(found: Sequence[Taken]) -> Rows:
    """What an entry takes."""
    return [["memory of one entry", "bytes"], *([one.who, f"{one.bytes:,}"] for one in found)]


def contestants(found: Sequence[Measured], taken: Sequence[Taken] = ()) -> Rows:
    """Contestants down, operations across, for few operations and many contestants; and the memory, if there is any."""
    operations, cells = [*_by_operation(found)], {(one.operation, one.who): one for one in found}
    bytes_of = {one.who: f"{one.bytes:,}" for one in taken}
    floors = {name: statistics.median(one.floor_us for one in _by_operation(found)[name]) for name in operations}
    rows = [["ratio to the floor", *(text for name in operations for text in (name, "µs"))]]
    for who in _columns(found):
        rows.append([who])
        for name in operations:
            one = cells.get((name, who))
            rows[-1] += [ratio_text(one.ratio), f"{one.us:,.2f}"] if one else [_MISSING, _MISSING]
    rows.append(["the floor", *(text for name in operations for text in ("1", f"{floors[name]:,.2f}"))])
    if taken:
        rows[0].append("bytes after 1,000 hits")
        for row in rows[1:]:
            row.append(bytes_of.get(row[0], _MISSING))
    return rows


def contended(found: Sequence[Contended]) -> Rows:
    """What a contended lock gave."""
    rows = [["taken at once by", *_CONTENDED]]
    for one in found:
        crowd = f"{one.processes} processes" if one.threads == 1 else f"{one.threads} threads"
        rows.append(
            [
                f"{crowd}: {one.who}",
                f"{one.taken_per_s:,.0f}",
                f"{one.hand_offs_per_s:,.0f}",
                f"{one.commands:.1f}",
                f"{one.p99_ms:,.1f}",
                f"{one.longest_ms:,.0f}",
                f"{one.fairness:.2f}",
                f"{one.overlaps}",
            ]
        )
    return rows


def admitted(found: Sequence[Admitted]) -> Rows:
    """What a hammered limit let through."""
    rate, ideal = f"{RATE.calls} calls a second, {SECONDS:.0f} s", f"{RATE.calls * SECONDS / RATE.seconds:.0f}"
    return [
        [rate, "decisions/s", f"let through (the rate: {ideal})", "most within 1 s"],
        *([one.who, f"{one.decisions_per_s:,.0f}", f"{one.admitted:,}", f"{one.most_in_1_s:,}"] for one in found),
    ]


def passed(found: Sequence[Measured]) -> Rows:
    """What stands around the body of a task, in the process that runs it."""
    plain = next(one for one in found if one.who == PLAIN)
    rows = [["one task, without a broker", "ratio to the floor", "half of the rounds", "µs", "more than plain, µs"]]
    for one in found:
        texts = [ratio_text(one.ratio), f"{ratio_text(one.low)} to {ratio_text(one.high)}", f"{one.us:,.0f}"]
        rows.append([one.who, *texts, f"{one.us - plain.us:,.0f}"])
    floor_us = statistics.median(one.floor_us for one in found)
    return [*rows, ["the floor", "1", "", f"{floor_us:,.0f}", ""]]


def worked(found: Sequence[Worked]) -> Rows:
    """What a task takes in a worker, beside a plain one."""
    rows = [[f"one task in a worker, {found[0].pool}", "ratio to plain", "half of the rounds", "µs", "tasks/s"]]
    for one in found:
        texts = [ratio_text(one.ratio), f"{ratio_text(one.low)} to {ratio_text(one.high)}", f"{one.us:,.0f}"]
        rows.append([one.who, *texts, f"{1e6 / one.us:,.0f}"])
    return rows


def sent(found: Sequence[Measured]) -> Rows:
    """What it takes to send a task."""
    rows = [["sending", "ratio to the floor", "half of the rounds", "µs"]]
    for one in found:
        texts = [ratio_text(one.ratio), f"{ratio_text(one.low)} to {ratio_text(one.high)}", f"{one.us:,.0f}"]
        rows.append([f"{one.operation}: {one.who}", *texts])
    floor_us = statistics.median(one.floor_us for one in found)
    return [*rows, ["the floor", "1", "", f"{floor_us:,.0f}"]]


def handed_off(found: Sequence[HandedOff]) -> Rows:
    """What it took until all that waited had run."""
    rows = [["tasks that wait for", "started/s", "commands each", "commands/s while they wait", "bytes each"]]
    for one in found:
        taken = _MISSING if one.bytes is None else f"{one.bytes:,}"
        texts = [f"{one.started_per_s:,.0f}", f"{one.commands:.1f}", f"{one.idle_commands_per_s:,.1f}", taken]
        rows.append([f"{one.what}: {one.who}", *texts])
    return rows


def markdown(rows: Rows) -> str:
    """Rows as a Markdown table."""
    heading, *rest = rows
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heading, rule, *rest]) + "\n"


def print_table(console: Console, rows: Rows) -> None:
    """Rows as a table on the terminal."""
    heading, *rest = rows
    table = Table(*heading[:1])
    for column in heading[1:]:
        table.add_column(column, justify="right")
    for row in rest:
        table.add_row(*row)
    console.print(table)


def print_bars(console: Console, found: Sequence[Measured]) -> None:
    """Each operation by itself, fastest first, and with a scale of its own."""
    for operation, group in _by_operation(found).items():
        most = max(one.ratio for one in group)
        table = Table(title=operation, title_justify="left", box=None, pad_edge=False)
        table.add_column("", width=max(22, *(len(one.who) for one in group)))
        table.add_column("ratio", justify="right", width=8)
        table.add_column("half of the rounds", justify="right", width=20)
        table.add_column("µs", justify="right", width=10)
        table.add_column("")
        for one in sorted(group, key=lambda one: one.ratio):
            bar = "█" * max(1, round(one.ratio / most * _BAR))
            spread = f"{ratio_text(one.low)} to {ratio_text(one.high)}"
            style = "bold green" if one.who.startswith(PETIOLE) else ""
            table.add_row(one.who, ratio_text(one.ratio), spread, f"{one.us:,.2f}", bar, style=style)
        console.print(table)
        console.print()


def draw(found: Sequence[Measured], path: Path) -> None:
    """The ratios as a picture, of the kind that the name of the file says (.svg, .png, .pdf)."""
    import matplotlib as mpl  # half a second, and only for this

    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    groups = _by_operation(found)
    tallest = max(len(group) for group in groups.values())
    columns = 3
    rows = math.ceil(len(groups) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(15, 2.5 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, (operation, group) in zip(axes.flat, groups.items(), strict=False):
        ordered = sorted(group, key=lambda one: one.ratio, reverse=True)
        colours = ["#2a9d58" if one.who.startswith(PETIOLE) else "#9aa5b1" for one in ordered]
        axis.barh([one.who for one in ordered], [one.ratio for one in ordered], color=colours)
        axis.errorbar(
            [one.ratio for one in ordered],
            range(len(ordered)),
            xerr=[[one.ratio - one.low for one in ordered], [one.high - one.ratio for one in ordered]],
            fmt="none",
            ecolor="#333333",
            elinewidth=1,
        )
        for place, one in enumerate(ordered):
            axis.annotate(
                ratio_text(one.ratio), (one.high, place), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axis.axvline(1, color="#c0392b", linewidth=1)
        axis.margins(x=0.18)
        axis.set_ylim(len(ordered) - 0.5 - tallest, len(ordered) - 0.5)  # all bars are equally thick
        axis.set_title(operation, fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Time as a ratio to the floor, a round trip by hand (red line). Shorter is better.", fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _columns(found: Iterable[Measured]) -> list[str]:
    return list(dict.fromkeys(one.who for one in found))


def _by_operation(found: Sequence[Measured]) -> Mapping[str, list[Measured]]:
    groups: dict[str, list[Measured]] = {}
    for one in found:
        groups.setdefault(one.operation, []).append(one)
    return groups
