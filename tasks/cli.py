"""The command line: ``petiole ...``, and the same as ``celery petiole ...``.

Celery imports this module for every one of its commands, so it imports what it needs only when it is run.
"""

import sys

import click


@click.group()
def petiole() -> None:
    """Petiole: caching, coordination and write-behind for Celery on Redis."""


@petiole.command()
@click.option("--url", help="Which Redis to ask. Default: REDIS_URL, or REDIS_HOST and its kin.")
def health(url: str | None) -> None:
    """Ask Redis how it is, and warn of settings that lose data."""
    from ..cachelib import connect
    from ..cachelib.errors import CachelibError

    try:
        with connect(url) as redis:
            found = redis.health()
    except (CachelibError, ValueError) as error:
        click.echo(f"petiole: {error}", err=True)
        sys.exit(1)
    click.echo(f"{found.server} at {found.address} answers in {found.latency_ms} ms; eviction: {found.eviction}")
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)


def main() -> None:
    """The program ``petiole``."""
    petiole(prog_name="petiole")
