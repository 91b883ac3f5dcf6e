"""A limiter before a web application: WSGI and ASGI middleware.

Who calls is told by a key, which is made of the request; what is not allowed is answered here, and the application does
not hear of it. The invariant: **whoever is told apart by an address is told apart by one that he cannot choose**, so
nothing that a client may write itself counts, and all addresses that one subscriber of IPv6 has are one.
"""

import asyncio
import functools
import hashlib
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .errors import LimiterUnavailable
from .rate_limit import Allowed, Limited

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApplication = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[str, str]]

_IPV6_HOST = 64  # bits that one subscriber, who is given a /64 network at least, may choose
_EMPTY_KEY = "(empty)"
_LONGEST_KEY = 128  # what is longer is hashed: a client may have written it
_RETRY_WITHOUT_REDIS_S = 1
_TRY_AGAIN_LATER = 1013  # of the close codes that IANA registers for WebSocket
_WITH_HEADERS = ("http.response.start", "websocket.accept", "websocket.http.response.start")


class Limiter(Protocol):
    """Whatever decides as a ``RateLimiter`` does."""

    def hit(self, key: str, cost: int = 1) -> Allowed | Limited:
        """Ask for one call."""


def client_address(peer: str | None, forwarded: Iterable[str] = (), *, proxies: int = 0) -> str:
    """What tells a client apart by its address. Pure.

    Arguments:
        peer: who the connection comes from; None, or empty, for a Unix socket.
        forwarded: the values of ``X-Forwarded-For``, in their order.
        proxies: how many trusted proxies a request has passed, each of which adds the address of who connected to it:
            the last entry is the nearest one's. What stands before those may be written by the client.

    An IPv4 address as it is, of an IPv6 address its /64 network. ``"unknown"``, the same for all, where there is none.
    """
    if proxies:
        entries = [entry.strip() for value in forwarded for entry in value.split(",")]
        entries = [entry for entry in entries if entry]
        trusted = entries[-proxies:]  # fewer than proxies: it was one of them that wrote the first
        if trusted and (found := _network(trusted[0])):
            return found
    return _network(peer or "") or peer or "unknown"


def _network(text: str) -> str | None:
    if text.startswith("["):  # [2001:db8::1]:443
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:  # 192.0.2.1:443
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            network = ipaddress.IPv6Address(int(address) >> _IPV6_HOST << _IPV6_HOST)
            return f"{network}/{128 - _IPV6_HOST}"
        address = address.ipv4_mapped
    return str(address)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client is told instead of the application's response."""

    status: int
    title: str
    headers: Headers
    body: bytes


def refusal(decision: Limited | LimiterUnavailable) -> Refusal:
    """What to answer: 429 to who is over a limit, 503 where nobody could be asked. Pure."""
    if isinstance(decision, LimiterUnavailable):
        status, title, headers = 503, "Service Unavailable", [("Retry-After", str(_RETRY_WITHOUT_REDIS_S))]
    elif decision.reason == "unavailable":
        status, title, headers = 503, "Service Unavailable", decision.headers()
    else:
        status, title, headers = 429, "Too Many Requests", decision.headers()
    after = next(value for name, value in headers if name == "Retry-After")
    return _refusal(status, title, headers, f"Try again in {after} s.")


def _refusal(status: int, title: str, headers: Headers, detail: str) -> Refusal:
    problem = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    body = json.dumps(problem).encode()
    headers = [*headers, ("Content-Type", "application/problem+json"), ("Content-Length", str(len(body)))]
    return Refusal(status, title, headers, body)


class _Gate:
    """What both kinds of middleware have in common: the question, and the permit."""

    def __init__(
        self, limiter: Limiter, key: Callable[[Any], str | None], cost: int | Callable[[Any], int], proxies: int
    ) -> None:
        if not callable(key):
            raise TypeError(f"key={key!r} must be a function of the request that returns text, or None for no limit")
        if not callable(cost) and (not isinstance(cost, int) or isinstance(cost, bool) or cost < 1):
            raise ValueError(f"cost={cost!r} must be a whole number of at least 1, or a function of the request")
        if not isinstance(proxies, int) or isinstance(proxies, bool) or proxies < 0:
            raise ValueError(f"proxies={proxies!r} must be a whole number: how many trusted proxies there are")
        self.limiter = limiter
        self._key = key
        self._cost = cost

    def question(self, request: Any) -> tuple[str, int] | None:
        """Who asks, and for how much. None: there is no limit for this request."""
        key = self._key(request)
        if key is None:
            return None
        if key == "":  # an empty header, say: all of them together are one
            key = _EMPTY_KEY
        elif isinstance(key, str) and len(key) > _LONGEST_KEY:
            key = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).hexdigest()
        return key, self._cost(request) if callable(self._cost) else self._cost

    def ask(self, key: str, cost: int) -> Allowed | Refusal:
        """The limiter's decision."""
        try:
            decision = self.limiter.hit(key, cost)
        except LimiterUnavailable as error:
            logger.warning("a request was answered with 503: %s", error)
            return refusal(error)
        except ValueError as error:  # a cost that can never pass, or a key that cannot be one
            logger.warning("a request was answered with 413: %s", error)
            return _refusal(413, "Content Too Large", [], "It could never pass the limit.")
        return decision if isinstance(decision, Allowed) else refusal(decision)

    @staticmethod
    def release(decision: Allowed) -> None:
        """Give a permit back. Its lease does if Redis does not answer, so the response is not spoiled for that."""
        try:
            decision.release()
        except Exception as error:  # noqa: BLE001 - whatever it was, the response is the application's
            logger.warning("a permit was not given back, and is free when its lease has run out: %s", error)


def _holds_permit(decision: Allowed) -> bool:
    return any(limit.kind == "c" for limit in decision.limits)


class LimitedWSGI:
    """A WSGI application behind a limiter.

    >>> app = LimitedWSGI(app, RateLimiter(redis, "web", [RateLimit("100/m")]), proxies=1)
    >>> app = LimitedWSGI(app, limiter, key=lambda environ: environ.get("HTTP_X_API_KEY"))

    Promises: what is over the limit does not reach the application; it is answered with 429, ``Retry-After`` and a
    short ``application/problem+json``. A response of the application gets the limiter's ``RateLimit-`` headers, except
    those that it has itself. The permit of a concurrent limit is given back when the server closes the response, and
    when the application raises. Where the limiter cannot ask Redis, and does not allow then, the answer is 503.

    Non-promises: the address of a client is that of the last proxy, unless ``proxies`` says how many there are; with a
    number that is too high, clients can choose their address. A server that never closes a response keeps the permit
    for its lease.

    Arguments:
        app: the application.
        limiter: what decides; ``on_error`` says whether requests pass while Redis is away.
        key: who asks, from the ``environ``; None: not limited. What is longer than 128 characters is hashed. Default:
            the client's address, of IPv6 its /64 network.
        cost: what a request costs, or a function of the ``environ`` that says it.
        proxies: how many trusted proxies are before this server, for the default key. 0: ``X-Forwarded-For`` means
            nothing.

    Raises ``ValueError`` or ``TypeError`` for what cannot be meant.
    """

    def __init__(
        self,
        app: "WSGIApplication",
        limiter: Limiter,
        *,
        key: "Callable[[WSGIEnvironment], str | None] | None" = None,
        cost: "int | Callable[[WSGIEnvironment], int]" = 1,
        proxies: int = 0,
    ) -> None:
        _refuse_both(key, proxies)
        self.app = app
        self._gate = _Gate(limiter, key or functools.partial(_wsgi_client, proxies=proxies), cost, proxies)

    def __repr__(self) -> str:
        return f"<LimitedWSGI {self.app!r} by {self._gate.limiter!r}>"

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        question = self._gate.question(environ)
        if question is None:
            return self.app(environ, start_response)
        decision = self._gate.ask(*question)
        if isinstance(decision, Refusal):
            start_response(f"{decision.status} {decision.title}", decision.headers)
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [decision.body]
        extra = decision.headers()

        def start(status: str, headers: Headers, *error: Any) -> Callable[[bytes], object]:
            return start_response(status, _joined(headers, extra), *error)

        if not _holds_permit(decision):
            return self.app(environ, start)  # as it is, so that a server may send files its own way
        try:
            return _Closing(self.app(environ, start), functools.partial(self._gate.release, decision))
        except BaseException:
            self._gate.release(decision)
            raise


class _Closing:
    """A response that does something more when it is closed."""

    def __init__(self, response: Iterable[bytes], at_end: Callable[[], None]) -> None:
        self._response = response
        self._at_end = at_end

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._response)

    def close(self) -> None:
        """Called by the server, whether the response was sent or not."""
        try:
            if (close := getattr(self._response, "close", None)) is not None:
                close()
        finally:
            self._at_end()


class LimitedASGI:
    """An ASGI application behind a limiter, on asyncio.

    >>> app = LimitedASGI(app, RateLimiter(redis, "web", [RateLimit("100/m")]), proxies=1)

    Promises, non-promises, arguments: as ``LimitedWSGI``, with the ``scope`` in place of the ``environ``. The limiter
    is asked in a thread, so the event loop never waits for Redis. The permit of a concurrent limit is given back when
    the application returns, raises or is cancelled, also while the limiter was being asked. A WebSocket is one request,
    for as long as it is open; one that is refused is answered as HTTP where the server can
    (``websocket.http.response``), and closed with 1013 otherwise. Other scopes, such as ``lifespan``, pass.
    """

    def __init__(
        self,
        app: ASGIApplication,
        limiter: Limiter,
        *,
        key: Callable[[Scope], str | None] | None = None,
        cost: int | Callable[[Scope], int] = 1,
        proxies: int = 0,
    ) -> None:
        _refuse_both(key, proxies)
        self.app = app
        self._gate = _Gate(limiter, key or functools.partial(_asgi_client, proxies=proxies), cost, proxies)

    def __repr__(self) -> str:
        return f"<LimitedASGI {self.app!r} by {self._gate.limiter!r}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        question = self._gate.question(scope) if scope["type"] in ("http", "websocket") else None
        if question is None:
            await self.app(scope, receive, send)
            return
        decision = await self._asked(*question)
        if isinstance(decision, Refusal):
            await _refuse(decision, scope, receive, send)
            return
        extra = decision.headers()

        async def send_with_headers(message: Message) -> None:
            if message["type"] in _WITH_HEADERS:
                message = {**message, "headers": _joined_raw(message.get("headers") or (), extra)}
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            if _holds_permit(decision):
                # It runs to its end in its thread, also when this is cancelled once more.
                await asyncio.shield(_in_thread(self._gate.release, decision))

    async def _asked(self, key: str, cost: int) -> Allowed | Refusal:
        asked = _in_thread(self._gate.ask, key, cost)
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            asked.add_done_callback(self._release_unwanted)  # the thread goes on, and may be given a permit
            raise

    def _release_unwanted(self, asked: "asyncio.Future[Allowed | Refusal]") -> None:
        if asked.cancelled() or asked.exception() is not None:
            return
        decision = asked.result()
        if isinstance(decision, Allowed) and _holds_permit(decision):
            _in_thread(self._gate.release, decision)


def _in_thread(function: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":
    return asyncio.get_running_loop().run_in_executor(None, function, *arguments)


async def _refuse(answer: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    kind = "http"
    if scope["type"] == "websocket":
        if (await receive())["type"] != "websocket.connect":  # it has gone already
            return
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": _TRY_AGAIN_LATER, "reason": answer.title})
            return
        kind = "websocket.http"
    body = b"" if scope.get("method") == "HEAD" else answer.body
    headers = _joined_raw((), answer.headers)
    await send({"type": f"{kind}.response.start", "status": answer.status, "headers": headers})
    await send({"type": f"{kind}.response.body", "body": body})


def _wsgi_client(environ: "WSGIEnvironment", *, proxies: int) -> str:
    forwarded = environ.get("HTTP_X_FORWARDED_FOR")
    return client_address(environ.get("REMOTE_ADDR"), [forwarded] if forwarded else [], proxies=proxies)


def _asgi_client(scope: Scope, *, proxies: int) -> str:
    client = scope.get("client")
    forwarded = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"x-forwarded-for"]
    return client_address(client[0] if client else None, forwarded, proxies=proxies)


def _joined(headers: Headers, extra: Headers) -> Headers:
    """The application's headers, and those of ours that it does not have."""
    its = {name.lower() for name, _ in headers}
    return [*headers, *((name, value) for name, value in extra if name.lower() not in its)]


def _joined_raw(headers: Iterable[Iterable[bytes]], extra: Headers) -> list[tuple[bytes, bytes]]:
    found = [(bytes(name), bytes(value)) for name, value in headers]
    its = {name.lower() for name, _ in found}
    ours = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in extra]
    return [*found, *(pair for pair in ours if pair[0] not in its)]


def _refuse_both(key: object, proxies: int) -> None:
    if key is not None and proxies:
        raise ValueError(f"proxies={proxies!r} is for the default key, but key={key!r} is given; leave one out")
