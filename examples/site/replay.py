"""Replaying a log against the site: readers in threads, an editor and a reporter among them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Lock
from typing import Any

from .access_log import Request
from .statistics import section_report
from .web import application

READERS = 4
EDIT_EVERY = 50  # one edit for so many requests, of the page that was just asked for
REPORT_EVERY = 40
_CHUNK = 20


class Replay:
    """Sends the requests of a log through the WSGI application, in the log's order but for the last few.

    Arguments:
        requests: of the log.
        progress: called with the number of requests that were answered since the last time.
    """

    def __init__(self, requests: Sequence[Request], progress: Callable[[int], None]) -> None:
        self._requests = requests
        self._progress = progress
        self._lock = Lock()
        self.statuses: Counter[str] = Counter()
        self.edited: set[str] = set()
        self.edits = self.reports = self.unrecorded = 0

    def run(self) -> None:
        """Replay them all. What a reader raises is raised here."""
        with ThreadPoolExecutor(READERS, thread_name_prefix="reader") as readers:
            numbered = enumerate(self._requests, 1)
            for _ in readers.map(self._replay_chunk, iter(lambda: list(islice(numbered, _CHUNK)), [])):
                pass

    def _replay_chunk(self, chunk: list[tuple[int, Request]]) -> None:
        for number, request in chunk:
            self._read(request)
            if number % EDIT_EVERY == 0:
                self._edit(request.path)
            if number % REPORT_EVERY == 0:
                section_report.delay(section_of(request.path))
                with self._lock:
                    self.reports += 1
        self._progress(len(chunk))

    def _read(self, request: Request) -> None:
        environ: dict[str, Any] = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": request.path,
            "REMOTE_ADDR": request.client,
            "site.size": request.size,
            "site.at": request.at,
        }
        status = ask(environ)
        with self._lock:
            self.statuses[status] += 1
            self.unrecorded += bool(environ.get("site.unrecorded"))

    def _edit(self, path: str) -> None:
        if ask({"REQUEST_METHOD": "POST", "PATH_INFO": path}).startswith("200"):
            with self._lock:
                self.edits += 1
                self.edited.add(path)


def ask(environ: dict[str, Any]) -> str:
    """Call the application as a WSGI server does. Returns the status line."""
    statuses: list[str] = []
    for _ in application(environ, lambda status, _headers: statuses.append(status)):
        pass
    return statuses[0]


def section_of(path: str) -> str:
    """The first part of a path: ``/news/1`` is in ``/news``."""
    return "/" + path.lstrip("/").split("/", 1)[0].split("?", 1)[0]


def paths_of(requests: Sequence[Request]) -> Iterator[str]:
    """The paths that the log says exist, each once."""
    return iter(dict.fromkeys(request.path for request in requests if request.status != 404))
