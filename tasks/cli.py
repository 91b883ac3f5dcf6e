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

_LONGEST_CALL = 120
"""So many letters of a call are shown."""


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
    from ..coordination.gates import Served
    from ..coordination.parking import ParkingLot, namespaces_of

    with _connected(url) as redis:
        namespaces = namespaces_of(redis)
        if namespace not in (None, *namespaces):
            others = f"; of {', '.join(namespaces)} there is" if namespaces else ""
            click.echo(f"{namespace}: nothing is parked{others}")
        elif not namespaces:
            click.echo(f"nothing is parked at {redis.address}")
        for found in namespaces if namespace is None else {namespace}.intersection(namespaces):
            lot = ParkingLot(redis, found)
            counts = lot.counts()
            click.echo(f"{found}: {counts.pop('parked')} parked")
            for gate, count in sorted(counts.items(), key=lambda pair: -pair[1]):
                click.echo(f"  {count:6} at {gate}")
            gates = {line: Served.read(definition).shown for line, definition in lot.lines()}
            gates["-"] = "the end of its twin, which runs"
            for waiting in lot.waiting(most):
                waits = f"waits for {gates.get(waiting.line, 'nothing any more')}"
                where = "is on its way to a worker" if waiting.woken else waits
                click.echo(f"  {waiting.id}: {_call(waiting.record)}, retry {waiting.retries}, {where}")


def _call(record: dict[str, Any]) -> str:
    """A task and its arguments, as they may be shown, in a line."""
    options = record.get("options") or {}
    arguments = options.get("argsrepr") or repr(tuple(record.get("args") or ()))
    keywords = options.get("kwargsrepr") or repr(record.get("kwargs") or {})
    shown = [text for text in (arguments, keywords) if text not in ("()", "[]", "{}")]
    text = " ".join(" ".join([str(record.get("task", "?")), *shown]).split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _LONGEST_CALL else f"{text[:_LONGEST_CALL]} ..."


@contextmanager
def _connected(url: str | None) -> Iterator["Connections"]:
    """A server that may be away: then the program ends with a line that says so."""
    from redis.exceptions import ConnectionError as RedisConnectionError
    from redis.exceptions import TimeoutError as RedisTimeoutError

    from ..cachelib import connect
    from ..cachelib.connections import UNAVAILABLE
    from ..cachelib.errors import CachelibError

    address = ""
    try:
        with connect(url) as redis:
            address = redis.address
            yield redis
    except (RedisConnectionError, RedisTimeoutError) as error:
        said = str(error).rstrip(".")
        click.echo(f"petiole: Redis at {address}: {said}; --url or REDIS_URL names another one", err=True)
        sys.exit(1)
    except (CachelibError, ValueError, *UNAVAILABLE) as error:
        click.echo(f"petiole: {error}", err=True)
        sys.exit(1)


def main() -> None:
    """The program ``petiole``."""
    petiole(prog_name="petiole")
