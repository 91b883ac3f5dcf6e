"""The command line: ``petiole ...``, and the same as ``celery petiole ...``.

Celery imports this module for every one of its commands, so it imports what it needs only when it is run.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..cachelib import Connections


_URL = click.option("--url", help="Which Redis to ask. Default: REDIS_URL, or REDIS_HOST and its kin.")
_KIND = click.option(
    "--kind", type=click.Choice(["lock", "semaphore", "readwrite"]), default="lock", show_default=True, help="Of what."
)


@click.group()
def petiole() -> None:
    """Petiole: caching, coordination and write-behind for Celery on Redis."""


@petiole.command()
@_URL
def health(url: str | None) -> None:
    """Ask Redis how it is, and warn of settings that lose data."""
    with _connected(url) as redis:
        found = redis.health()
    click.echo(f"{found.server} at {found.address} answers in {found.latency_ms} ms; eviction: {found.eviction}")
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)


@petiole.command()
@_URL
@_KIND
@click.argument("pattern", default="*")
def locks(url: str | None, kind: Any, pattern: str) -> None:
    """List who holds what, and who waits; PATTERN of names, such as 'invoice:*'."""
    from ..coordination.inspecting import inspect_named, names_held

    with _connected(url) as redis:
        for name in sorted(names_held(redis, kind, pattern)):
            found = inspect_named(redis, kind, name)
            for holder in found.holders:
                click.echo(
                    f"{name}: held by {holder.owner} for {holder.held_for:.1f} s, "
                    f"lease {holder.lease_left:.1f} s, fence {holder.fence}"
                )
            for place, waiting in enumerate(found.waiting, 1):
                click.echo(f"{name}: {place}. in the queue is {waiting.owner}, for {waiting.waiting_for:.1f} s")


@petiole.command("force-release")
@_URL
@_KIND
@click.argument("name")
@click.confirmation_option(prompt="Is the holder dead, or does it no harm if it goes on?")
def force_release(url: str | None, kind: Any, name: str) -> None:
    """Take NAME from whoever holds it; the next in the queue holds it at once."""
    from ..coordination.inspecting import force_release_named

    with _connected(url) as redis:
        cleared = force_release_named(redis, kind, name)
    click.echo(f"{name}: taken from {cleared} that held it" if cleared else f"{name}: nobody held it")


@petiole.command()
@_URL
@click.option("--most", default=100, show_default=True, type=click.IntRange(1, 10_000), help="How many to list.")
@click.argument("namespace", required=False)
def parked(url: str | None, most: int, namespace: str | None) -> None:
    """List the tasks that wait for their gates: how many at each, and which; of an app's NAMESPACE (its main name)."""
    from ..coordination.parking import ParkingLot, namespaces_of

    with _connected(url) as redis:
        for found in [namespace] if namespace else namespaces_of(redis):
            lot = ParkingLot(redis, found)
            counts = lot.counts()
            click.echo(f"{found}: {counts.pop('parked')} parked")
            for gate, count in sorted(counts.items(), key=lambda pair: -pair[1]):
                click.echo(f"  {count:6} at {gate}")
            for waiting in lot.waiting(most):
                where = "is on its way to a worker" if waiting.woken else f"waits in {waiting.line}"
                click.echo(f"  {waiting.id}: {waiting.task}, retry {waiting.retries}, {where}")


@contextmanager
def _connected(url: str | None) -> Iterator["Connections"]:
    """A server that may be away: then the program ends with a line that says so."""
    from ..cachelib import connect
    from ..cachelib.connections import UNAVAILABLE
    from ..cachelib.errors import CachelibError

    try:
        with connect(url) as redis:
            yield redis
    except (CachelibError, ValueError, *UNAVAILABLE) as error:
        click.echo(f"petiole: {error}", err=True)
        sys.exit(1)


def main() -> None:
    """The program ``petiole``."""
    petiole(prog_name="petiole")
