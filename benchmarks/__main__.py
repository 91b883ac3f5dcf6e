"""``make bench``: Petiole beside the floor and beside others, in one run. docs/benchmarks.md says how to read it."""

import argparse
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from petiole.cachelib import EmbeddedServer
from petiole.cachelib import __all__ as petiole_names

from . import show
from .caches import measure_caches
from .memory import measure_memory
from .peers import Server
from .stampede import measure_stampedes
from .writes import measure_flush, measure_writes

MEASURED = ("redis", "hiredis", "cachelib", "dogpile.cache", "Django", "cashews", "aiocache")
SECTIONS = ("cache", "memory", "stampede", "writes")


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=("", *SECTIONS), default="", help="one section instead of all")
    parser.add_argument("--plot", default="", help="where a picture goes: a path that ends in .svg, .png or .pdf")
    parser.add_argument("--markdown", default="", help="where the tables go as Markdown")
    options = parser.parse_args()
    sections = [options.only] if options.only else list(SECTIONS)
    console = Console(highlight=False, width=None if Console().is_terminal else 160)
    tables: list[show.Rows] = []
    for section in sections:
        with _server(pinned=section != "stampede") as server:
            tables += _section(console, section, server, options.plot)
    console.print(_versions())
    if options.markdown:
        texts = [*(show.markdown(rows) for rows in tables), _versions() + "\n"]
        Path(options.markdown).write_text("\n".join(texts), encoding="utf-8")


def _section(console: Console, section: str, server: Server, plot: str) -> list[show.Rows]:
    if section == "cache":
        found = measure_caches(server)
        show.print_bars(console, found)
        rows = show.ratios(found)
        if plot:
            show.draw(found, Path(plot))
            console.print(f"The picture is in {plot}.")
        if "Near" not in petiole_names:
            console.print("Petiole's near cache is left out: petiole.cachelib has no Near.")
    elif section == "memory":
        rows = show.memory(measure_memory(server))
    elif section == "stampede":
        rows = show.crowds(measure_stampedes(server))
    else:
        rows = show.ratios(measure_writes(server))
        rows.append(["flush to SQLite in memory, rows/s", f"{measure_flush(server):,.0f}", "", ""])
    show.print_table(console, rows)
    return [rows]


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
