"""The main job from one command: ``make demo``, ``make demo LOG=access.log KILL=3 KEEP=1``.

Starts Redis, a worker, beat and Flower as real processes, replays an access log against the site, and ends with
a table, and with a verdict: what arrived in SQL, compared with what the log says by means of ``audit`` alone.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from petiole.cachelib import Connections, connect
from petiole.cachelib.errors import CachelibError

from . import access_log, audit

GENERATED_REQUESTS = 5_000
SEED = 20_260_101
SETTLE_S = 120.0  # how long buffers and invalidations may take to come to rest after the last request

console = Console(highlight=False, soft_wrap=True)  # a path is to be copied, not cut


class DemoFailed(Exception):
    """The demo cannot go on, and why, in words for the one who runs it."""


@dataclass(frozen=True)
class Outcome:
    """What the table shows."""

    rows: list[tuple[str, str]]
    problems: list[str]


@click.command()
@click.option("--log", envvar="LOG", default="", help="An access log to replay; default: a generated one.")
@click.option("--kill", envvar="KILL", default="0", help="How often to kill the worker (SIGKILL) on the way.")
@click.option("--keep", envvar="KEEP", default="", help="Stay up afterwards, until Ctrl-C.")
def main(log: str, kill: str, keep: str) -> None:
    """Run the main job."""
    if not kill.isdecimal():
        _fail(f"KILL={kill!r} is not a number of times")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    folder = Path(tempfile.mkdtemp(prefix="petiole-demo-"))
    problems: list[str] = ["interrupted"]
    try:
        problems = _run(folder, log, int(kill), keep not in ("", "0"))
    except (access_log.UnreadableLog, CachelibError, DemoFailed, ValueError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")
    finally:
        if not problems:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.exists() and any(folder.glob("*.log")):
            console.print(f"The logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if problems else 0)


def _run(folder: Path, log: str, kills: int, keep: bool) -> list[str]:
    path = Path(log) if log else _generated(folder)
    requests = access_log.read(path)
    _tell_of(path, requests, generated=not log)
    with connect(None if "REDIS_URL" in os.environ or "REDIS_HOST" in os.environ else "embedded://") as redis:
        found = redis.health()
        console.print(f"{found.server} at {found.address}")
        _settle_environment(redis, folder)
        # Imported now, because the site's modules read the environment, as an application's do.
        from .services import ServiceFailed, Services

        services = Services(folder)
        try:
            outcome = _replay(services, requests, path, kills)
            _show(outcome)
            console.print(f"Flower: {services.flower_url}")
            if keep:
                console.print("Up until Ctrl-C ...")
                _until_interrupted()
        except ServiceFailed as error:
            raise DemoFailed(str(error)) from None
        finally:
            services.stop()
    return outcome.problems


def _replay(services: Any, log: access_log.Log, path: Path, kills: int) -> Outcome:
    from . import pages
    from .app import cache, engine
    from .models import Base
    from .replay import Replay
    from .statistics import hits, report_runs, views

    _make_tables(Base, engine, log)
    with console.status("Starting a worker, beat and Flower ..."):
        services.start()
    total = len(log.requests)
    kill_at = [total * (number + 1) // (kills + 1) for number in range(kills)]
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("Replaying", total=total)
        killed = answered = 0
        turn = Lock()

        def advance(count: int) -> None:
            nonlocal killed, answered
            progress.advance(bar, count)
            with turn:
                answered += count
                if killed < len(kill_at) and answered >= kill_at[killed]:
                    killed += 1
                    services.wait_for_worker()  # one that is still starting has nothing to lose
                    services.kill_worker()
                    progress.console.print(f"killed the worker (SIGKILL) after {answered:,} requests")
                    services.start_worker()

        started = time.monotonic()
        replay = Replay(log.requests, advance)
        replay.run()
        seconds = time.monotonic() - started
        stats = cache.stats()  # before the look at edited pages, which are no requests
        pages.page.popularity.send()
        settling = progress.add_task("Settling", total=None)
        services.wait_for_worker()
        problems = _settle(replay.edited)
        progress.update(settling, total=1, completed=1)

    expected = audit.count_log(path)
    problems += audit.differences(expected, audit.count_sql(engine))
    if replay.unrecorded:
        problems.append(f"{replay.unrecorded} requests were answered and not recorded")
    counts = {**_shared("cache", cache.namespace), **_shared("site", cache.namespace)}
    written = views.stats().rows_applied + hits.stats().rows_applied
    lag_ms = max(views.stats().lag_ms, hits.stats().lag_ms)
    limited = sum(count for status, count in replay.statuses.items() if status.startswith("429"))
    return Outcome(
        [
            ("Requests", f"{total:,} in {seconds:.1f} s ({total / seconds:,.0f}/s)"),
            ("Hit ratio", f"{stats.hit_ratio:.1%}"),
            ("Loads saved", f"{stats.hits + stats.stale:,} of {stats.hits + stats.stale + stats.misses:,}"),
            ("Rows written behind", f"{written:,}"),
            ("Flush lag", f"{lag_ms:,} ms (oldest row of a batch, mean)"),
            ("Pages warmed", f"{counts.get('warmed', 0):,}"),
            ("Keys invalidated", f"{counts.get('invalidations', 0):,} for {replay.edits:,} edits"),
            ("Edits heard by workers", f"{counts.get('edits_heard', 0):,} (pub/sub: at most once)"),
            ("Report calls / runs", f"{replay.reports:,} / {_report_runs(report_runs.sink.engine):,}"),
            ("Requests limited", f"{limited:,}"),
            ("Workers killed", f"{killed:,}"),
        ],
        problems,
    )


def _settle(edited: set[str]) -> list[str]:
    """Wait until the buffers are empty and every edited page is served as it is in SQL."""
    from .app import Session
    from .models import Page
    from .pages import page
    from .statistics import hits, report_runs, views

    deadline = time.monotonic() + SETTLE_S
    while True:
        waiting = sum(sum(buffer.buffer.lengths()) for buffer in (views, hits, report_runs))
        with Session() as session:
            stale = [
                path
                for path in edited
                if (found := page.get(path)) and found["edits"] != session.get_one(Page, path).edits
            ]
        if not waiting and not stale:
            return []
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    problems = [f"{waiting} rows were still not flushed after {SETTLE_S:.0f} s"] if waiting else []
    if stale:
        problems.append(f"{len(stale)} edited pages are served stale, among them {stale[0]}")
    return problems


def _make_tables(base: Any, engine: Any, log: access_log.Log) -> None:
    import sqlalchemy as sa

    from .models import Page
    from .replay import paths_of, section_of

    there = set(sa.inspect(engine).get_table_names()) & set(base.metadata.tables)
    if there:
        raise DemoFailed(f"the database already has {', '.join(sorted(there))}; name an empty one in DATABASE_URL")
    base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            sa.insert(Page),
            [
                {"path": path, "section": section_of(path), "body": f"{path}, as it was first written", "edits": 0}
                for path in paths_of(log.requests)
            ],
        )


def _settle_environment(redis: Connections, folder: Path) -> None:
    """What every process of the site is told: where things are, and on a Redis of others a name that nobody has."""
    mine = os.environ.get("REDIS_URL") != redis.url and "REDIS_HOST" not in os.environ
    os.environ["SITE_NAME"] = "site" if mine else f"site-{uuid4().hex[:8]}"
    os.environ["REDIS_URL"] = redis.url
    os.environ.setdefault("DATABASE_URL", f"sqlite:///{folder / 'site.sqlite3'}")
    os.environ.setdefault("CACHE_TIMEOUT", "0.5")  # everything shares this one machine, and is being killed


def _generated(folder: Path) -> Path:
    path = folder / "access.log.generated"
    path.write_text("\n".join(access_log.generate(GENERATED_REQUESTS, seed=SEED)) + "\n")
    return path


def _tell_of(path: Path, log: access_log.Log, *, generated: bool) -> None:
    name = "a generated log" if generated else str(path)
    console.print(f"Replaying {name}: {len(log.requests):,} requests, {len(log.unreadable):,} unreadable lines")
    for number, line in log.unreadable[:3]:
        console.print(f"  line {number}: {line[:100]!r}", markup=False)


def _show(outcome: Outcome) -> None:
    table = Table(title="The main job", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in outcome.rows:
        table.add_row(name, value)
    table.add_section()
    verdict = "[bold red]no[/]" if outcome.problems else "[bold green]yes[/]"
    table.add_row("Verified", f"{verdict} (SQL against the log)")
    console.print(table)
    for problem in outcome.problems:
        console.print(f"[red]not verified:[/] {problem}")


def _shared(kind: str, name: str) -> dict[str, int]:
    from petiole.cachelib.counters import SharedCounters

    from .app import redis

    return dict(SharedCounters(redis, kind, name).read())


def _report_runs(engine: Any) -> int:
    import sqlalchemy as sa

    with engine.connect() as connection:
        return int(connection.scalar(sa.text("SELECT coalesce(sum(runs), 0) FROM site_report_runs")) or 0)


def _until_interrupted() -> None:
    try:
        while True:
            time.sleep(3_600)
    except (KeyboardInterrupt, SystemExit):
        console.print()


def _fail(why: str) -> None:
    click.echo(f"demo: {why}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
