"""``make bench``: Petiole beside the floor and beside others, in one run. docs/benchmarks.md says how to read it."""

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from petiole.cachelib import EmbeddedServer
from petiole.cachelib import __all__ as petiole_names

from . import show
from .admission import measure_admission
from .caches import measure_caches
from .contention import measure_contention
from .hand_off import measure_hand_off
from .limits import measure_limit_memory, measure_limits
from .locks import measure_locks
from .memory import measure_memory
from .peers import Server
from .sending import measure_sending
from .stampede import measure_stampedes
from .tasks import measure_passing
from .workers import measure_workers
from .writes import measure_flush, measure_writes

MEASURED = (
    "redis",
    "hiredis",
    "cachelib",
    "dogpile.cache",
    "Django",
    "cashews",
    "aiocache",
    "python-redis-lock",
    "pottery",
    "sherlock",
    "limits",
    "pyrate-limiter",
    "throttled-py",
    "celery",
    "celery-once",
    "celery-singleton",
)


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=("", *SECTIONS), default="", help="one section instead of all")
    parser.add_argument("--plot", default="", help="where a picture goes: a path that ends in .svg, .png or .pdf")
    parser.add_argument("--markdown", default="", help="where the tables go as Markdown")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if Console().is_terminal else 160)
    tables: list[show.Rows] = []
    for section, parts in SECTIONS.items():
        if options.only not in ("", section):
            continue
        for part in parts:
            with _server(pinned=part.pinned) as server:
                tables.append(part.measure(console, server, options.plot))
            show.print_table(console, tables[-1])
    console.print(_versions())
    if options.markdown:
        texts = [*(show.markdown(rows) for rows in tables), _versions() + "\n"]
        Path(options.markdown).write_text("\n".join(texts), encoding="utf-8")


def _cache(console: Console, server: Server, plot: str) -> show.Rows:
    found = measure_caches(server)
    show.print_bars(console, found)
    if plot:
        show.draw(found, Path(plot))
        console.print(f"The picture is in {plot}.")
    if "Near" not in petiole_names:
        console.print("Petiole's near cache is left out: petiole.cachelib has no Near.")
    return show.ratios(found)


def _memory(_console: Console, server: Server, _plot: str) -> show.Rows:
    return show.memory(measure_memory(server))


def _stampede(_console: Console, server: Server, _plot: str) -> show.Rows:
    return show.crowds(measure_stampedes(server))


def _writes(_console: Console, server: Server, _plot: str) -> show.Rows:
    rows = show.ratios(measure_writes(server))
    rows.append(["flush to SQLite in memory, rows/s", f"{measure_flush(server):,.0f}", "", ""])
    return rows


def _locks(console: Console, server: Server, _plot: str) -> show.Rows:
    found = measure_locks(server)
    show.print_bars(console, found)
    return show.contestants(found)


def _contention(_console: Console, server: Server, _plot: str) -> show.Rows:
    return show.contended(measure_contention(server))


def _limits(console: Console, server: Server, _plot: str) -> show.Rows:
    found = measure_limits(server)
    show.print_bars(console, found)
    return show.contestants(found, measure_limit_memory(server))


def _admission(_console: Console, server: Server, _plot: str) -> show.Rows:
    return show.admitted(measure_admission(server))


def _passing(_console: Console, server: Server, _plot: str) -> show.Rows:
    return show.passed(measure_passing(server))


def _solo(_console: Console, server: Server, _plot: str) -> show.Rows:
    return show.worked(measure_workers(server, "solo"))


def _prefork(_console: Console, server: Server, _plot: str) -> show.Rows:
    return show.worked(measure_workers(server, "prefork"))


def _sending(_console: Console, server: Server, _plot: str) -> show.Rows:
    return show.sent(measure_sending(server))


def _hand_off(_console: Console, server: Server, _plot: str) -> show.Rows:
    return show.handed_off(measure_hand_off(server))


class Part(NamedTuple):
    """Some of a section: one table."""

    measure: Callable[[Console, Server, str], show.Rows]
    pinned: bool = True


SECTIONS = {
    "cache": [Part(_cache)],
    "memory": [Part(_memory)],
    "stampede": [Part(_stampede, pinned=False)],
    "writes": [Part(_writes)],
    "locks": [Part(_locks), Part(_contention, pinned=False)],
    "limits": [Part(_limits), Part(_admission, pinned=False)],
    "tasks": [
        Part(_passing),
        Part(_solo),
        Part(_prefork, pinned=False),
        Part(_sending),
        Part(_hand_off, pinned=False),
    ],
}


def _versions() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in MEASURED)
    return f"Python {platform.python_version()}, {libraries}"


@contextmanager
def _server(*, pinned: bool) -> Iterator[Server]:
    """A server of our own. Pinned: on one core, and ourselves on the same, since waking another drowns the rest."""
    everywhere: set[int] = set()
    with suppress(AttributeError, OSError):
        everywhere = os.sched_getaffinity(0)
        if pinned:
            os.sched_setaffinity(0, {min(everywhere)})  # before the server is started: it inherits this
    server = EmbeddedServer.start()
    try:
        yield Server("127.0.0.1", server.port)
    finally:
        server.stop()
        with suppress(AttributeError, OSError):
            os.sched_setaffinity(0, everywhere)


if __name__ == "__main__":
    main()
