"""Checking the demo's result by other means: its own reading of the log, and plain SQL.

Nothing of Petiole is used here, nor the parser that the replay uses: what both got wrong in the same way would
otherwise count as right.
"""

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa


@dataclass
class Counts:
    """What a log says, or what SQL says."""

    rows: int = 0
    views: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)


def count_log(path: Path) -> Counts:
    """Count a log by splitting its lines at their quotation marks."""
    counts = Counts()
    for line in path.read_text("utf-8", "replace").split("\n"):
        found = request_of(line)
        if found:
            requested, size = found
            counts.rows += 1
            counts.views[requested] += 1
            counts.sizes[requested] += size
    return counts


def count_sql(engine: sa.Engine) -> Counts:
    """Count what has arrived in SQL."""
    with engine.connect() as connection:
        rows = connection.scalar(sa.text("SELECT count(*) FROM site_page_views"))
        per_path = connection.execute(sa.text("SELECT path, count(*) FROM site_page_views GROUP BY path")).all()
        hits = connection.execute(sa.text("SELECT path, views, size FROM site_hits")).all()
    counts = Counts(rows or 0, Counter({path: views for path, views, _ in hits}))
    counts.sizes = Counter({path: size for path, _, size in hits})
    if Counter(dict(map(tuple, per_path))) != counts.views:
        counts.rows = -1  # the two tables contradict each other
    return counts


def differences(expected: Counts, found: Counts) -> list[str]:
    """What does not agree, in sentences. Empty when everything does."""
    told = []
    if found.rows == -1:
        told.append("the rows of site_page_views and the sums of site_hits contradict each other")
    elif expected.rows != found.rows:
        told.append(f"the log has {expected.rows} requests, site_page_views has {found.rows} rows")
    for what, ours, theirs in (("views", expected.views, found.views), ("bytes", expected.sizes, found.sizes)):
        wrong = [path for path in ours.keys() | theirs.keys() if ours[path] != theirs[path]]
        if wrong:
            path = min(wrong)
            told.append(f"{what} of {len(wrong)} paths differ; {path}: log {ours[path]}, SQL {theirs[path]}")
    return told


def request_of(line: str) -> tuple[str, int] | None:
    """Path and size of a line; None when it is no request."""
    head, _, rest = line.partition('] "')
    who, _, stamp = head.partition(" [")
    names = who.split(" ", 2)
    request, after = "", rest
    while True:  # to the first quotation mark that no backslash protects
        piece, mark, after = after.partition('"')
        request += piece
        if not mark or not _protected(request):
            break
        request += mark
    fields, words = after.split(" "), request.split(" ")
    if len(names) < 3 or not all(names) or set('[]"') & set(who + stamp) or not mark or "\0" in line:
        return None
    if len(fields) < 3 or fields[0] or len(words) < 2:
        return None
    status, size = fields[1], fields[2]
    path = " ".join(words[1:-1] if len(words) > 2 and words[-1].startswith("HTTP/") else words[1:])
    known = len(status) == 3 and _digits(status) and (size == "-" or (_digits(size) and len(size) <= 15))
    if not known or not words[0].isalpha() or not path or len(path.encode()) > 900 or len(names[0]) > 255:
        return None
    try:
        datetime.strptime(stamp, "%d/%b/%Y:%H:%M:%S %z")
    except ValueError:
        return None
    return path, 0 if size == "-" else int(size)


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _protected(text: str) -> bool:
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1
