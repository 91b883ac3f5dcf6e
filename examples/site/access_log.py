"""Reading and making access logs, in Apache's common and combined format. Pure, but for the reading."""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import Path

LONGEST_PATH_BYTES = 900

_LINE = re.compile(
    r'([^ \[\]"]+) [^ \[\]"]+ [^\[\]"]+ \[([^\[\]"]+)\] "((?:[^"\\]|\\.)*)" ([0-9]{3}) ([0-9]{1,15}|-)(?: |$)'
)


class UnreadableLog(Exception):
    """A log that cannot be replayed, and why, in one line."""


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the log."""

    client: str
    at: datetime
    method: str
    path: str
    status: int
    size: int


@dataclass(frozen=True, slots=True)
class Log:
    """A log that was read."""

    requests: list[Request]
    unreadable: list[tuple[int, str]]
    """Number and text of the lines that are no request."""


def read(path: Path) -> Log:
    """Read a log. Raises ``UnreadableLog`` when it is missing, empty, binary or no access log at all."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UnreadableLog(f"{path}: {error.strerror}") from None
    if not raw.strip():
        raise UnreadableLog(f"{path} is empty")
    if b"\0" in raw[:65_536]:
        raise UnreadableLog(f"{path} is binary, not an access log")
    log = parse(raw.decode("utf-8", "replace").split("\n"))
    if not log.requests:
        raise UnreadableLog(f"{path}: none of its {len(log.unreadable)} lines is in Apache's common or combined format")
    return log


def parse(lines: Iterable[str]) -> Log:
    """Tell requests and other lines apart. Blank lines are neither."""
    log = Log([], [])
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        request = parse_line(line)
        if request is None:
            log.unreadable.append((number, line))
        else:
            log.requests.append(request)
    return log


def parse_line(line: str) -> Request | None:
    """One line; None when it is no request that a site could have answered."""
    match = _LINE.match(line)
    if not match or "\0" in line:
        return None
    client, stamp, request, status, size = match.groups()
    method, _, rest = request.partition(" ")
    path, space, protocol = rest.rpartition(" ")
    if not (space and protocol.startswith("HTTP/")):
        path = rest
    if not method.isalpha() or not path or len(path.encode()) > LONGEST_PATH_BYTES or len(client) > 255:
        return None
    try:
        at = datetime.strptime(stamp, "%d/%b/%Y:%H:%M:%S %z")
    except ValueError:
        return None
    return Request(client, at, method, path, int(status), 0 if size == "-" else int(size))


def generate(requests: int, *, seed: int, pages: int = 400, clients: int = 150) -> Iterator[str]:
    """An access log with a few popular pages and many that are not, as sites have them (Zipf's law)."""
    chance = random.Random(seed)
    paths = [f"/{('news', 'sport', 'weather', 'culture')[page % 4]}/{page}" for page in range(pages)]
    page_weights = list(accumulate(1 / rank for rank in range(1, pages + 1)))
    client_weights = list(accumulate(1 / rank**0.5 for rank in range(1, clients + 1)))
    at = datetime(2026, 1, 1, 8, tzinfo=UTC)
    for _ in range(requests):
        at += timedelta(seconds=chance.expovariate(2))
        path = chance.choices(paths, cum_weights=page_weights)[0]
        client = chance.choices(range(clients), cum_weights=client_weights)[0]
        missing = chance.random() < 0.02
        path, status = (f"/gone/{chance.randrange(20)}", 404) if missing else (path, 200)
        stamp = at.strftime("%d/%b/%Y:%H:%M:%S %z")
        size = 300 + len(path) * 10
        yield f'10.0.{client // 250}.{client % 250} - - [{stamp}] "GET {path} HTTP/1.1" {status} {size} "-" "demo"'
