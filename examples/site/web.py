"""The site as a WSGI application. ``GET`` reads a page, ``POST`` edits it; every request is recorded."""

import logging
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from petiole import Limited, RateLimit, RateLimiter
from petiole.cachelib.errors import ServerUnavailable, WriteBehindError

from .app import NAME, redis
from .pages import edit, page
from .statistics import record

logger = logging.getLogger(__name__)

limiter = RateLimiter(redis, NAME, [RateLimit("120/m", burst=60)], on_error="allow")

StartResponse = Callable[[str, list[tuple[str, str]]], Any]

_PHRASES = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 429: "Too Many Requests"}


def application(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """Answer one request. ``site.at`` and ``site.size`` in ``environ`` replay an old one."""
    method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
    client = environ.get("REMOTE_ADDR", "unknown")
    if method == "POST":
        status, body = (200, "edited") if edit(path) else (404, "no such page")
        return _answer(start_response, status, body, [])
    decision = limiter.hit(client)
    headers = []
    if isinstance(decision, Limited):
        status, body = 429, "slow down"
        headers = [("Retry-After", f"{decision.retry_after:.0f}")]
    elif (found := page(path)) is None:
        status, body = 404, "no such page"
    else:
        status, body = 200, found["body"]
    try:
        record(path, client, status, environ.get("site.size", len(body)), environ.get("site.at") or datetime.now(UTC))
    except (WriteBehindError, ServerUnavailable):
        logger.exception("a request was answered and not recorded")
        environ["site.unrecorded"] = True
    return _answer(start_response, status, body, headers)


def _answer(start_response: StartResponse, status: int, body: str, headers: list[tuple[str, str]]) -> Iterable[bytes]:
    start_response(f"{status} {_PHRASES[status]}", [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [body.encode()]
