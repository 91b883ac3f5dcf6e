"""What the middleware promises: who is over the limit does not reach the application, and permits come back."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from email.message import Message as Mail
from http.client import HTTPConnection
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from local_nodes import eventually

from petiole.cachelib import Connections, EmbeddedServer, Settings, connect
from petiole.coordination.http import LimitedASGI, LimitedWSGI, client_address
from petiole.coordination.rate_limit import Allowed, Limited, RateLimit
from petiole.coordination.rate_limiter import RateLimiter


@pytest.fixture
def twice(redis: Connections, name: str) -> RateLimiter:
    """Admits two requests of each caller."""
    return RateLimiter(redis, name, [RateLimit("2/d")])


@pytest.fixture
def one_at_once(redis: Connections, name: str) -> RateLimiter:
    """Admits one request at a time of each caller."""
    return RateLimiter(redis, name, [RateLimit.concurrent(1, lease="10m")])


@pytest.fixture
def unreachable(own_server: Callable[..., EmbeddedServer]) -> Iterator[Connections]:
    """A server that does not answer."""
    server = own_server()
    with connect(settings=Settings(url=server.url)) as redis:
        server.stop()
        yield redis


# Who calls


@pytest.mark.parametrize(
    ("peer", "forwarded", "proxies", "expected"),
    [
        ("192.0.2.7", [], 0, "192.0.2.7"),
        ("192.0.2.7", ["198.51.100.1"], 0, "192.0.2.7"),  # anybody can write that
        ("192.0.2.7", ["203.0.113.9, 198.51.100.1"], 1, "198.51.100.1"),  # the proxy wrote the last
        ("192.0.2.7", ["203.0.113.9", "198.51.100.1"], 1, "198.51.100.1"),
        ("192.0.2.7", ["1.1.1.1, 203.0.113.9, 198.51.100.1"], 2, "203.0.113.9"),
        ("192.0.2.7", ["198.51.100.1"], 2, "198.51.100.1"),  # one of the two wrote it
        ("192.0.2.7", [], 2, "192.0.2.7"),
        ("192.0.2.7", [" , "], 1, "192.0.2.7"),
        ("192.0.2.7", ["198.51.100.1, unknown"], 1, "192.0.2.7"),
        ("192.0.2.7", ["198.51.100.1:4711"], 1, "198.51.100.1"),
        ("192.0.2.7", ["[2001:db8:1:2:3::4]:4711"], 1, "2001:db8:1:2::/64"),
        ("2001:db8:1:2:aaaa:bbbb:cccc:dddd", [], 0, "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::1", [], 0, "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", [], 0, "2001:db8:1:3::/64"),
        ("fe80::1%eth0", [], 0, "fe80::/64"),
        ("::ffff:192.0.2.7", [], 0, "192.0.2.7"),
        (None, [], 0, "unknown"),
        ("", ["198.51.100.1"], 0, "unknown"),
        ("", ["198.51.100.1"], 1, "198.51.100.1"),
        ("testclient", [], 0, "testclient"),
    ],
)
def test_a_client_is_told_apart_by_an_address_that_it_cannot_choose(
    peer: str | None, forwarded: list[str], proxies: int, expected: str
) -> None:
    """What stands before the entries of the trusted proxies may be written by anybody."""
    assert client_address(peer, forwarded, proxies=proxies) == expected


@pytest.mark.parametrize("forged", ["10.0.0.1", "10.0.0.1, 10.0.0.2", ", ,", "x" * 5_000, "::1", "[", "\xff"])
def test_whatever_a_client_forwards_it_is_the_one_that_the_proxy_saw(forged: str) -> None:
    """A proxy appends; so what is forged stands before it."""
    assert client_address("192.0.2.7", [f"{forged}, 198.51.100.1"], proxies=1) == "198.51.100.1"
    assert client_address("192.0.2.7", [forged, "198.51.100.1"], proxies=1) == "198.51.100.1"
    assert client_address("192.0.2.7", [forged]) == "192.0.2.7"


# WSGI


class Answer:
    """What a client got."""

    def __init__(self, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status = int(status.split()[0])
        self.headers = Mail()
        for header, value in headers:
            self.headers[header] = value
        self.body = body


def ask(app: Any, *, method: str = "GET", close: bool = True, **changes: Any) -> Answer:
    """One request, as a server makes it; the checks of the standard stand on both sides of the middleware."""
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "REMOTE_ADDR": "192.0.2.7", "QUERY_STRING": ""}
    setup_testing_defaults(environ)
    environ |= changes
    started: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], error: Any = None) -> Callable[[bytes], object]:
        started[:] = [status, headers]
        return lambda data: None

    response = validator(app)(environ, start_response)
    try:
        body = b"".join(response)
    finally:
        if close:
            response.close()  # type: ignore[attr-defined]
    return Answer(*started, body)


def hello(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """An application."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [b"hello"]


def test_over_the_limit_a_request_is_answered_with_429(twice: RateLimiter) -> None:
    """The client learns when to come again, as a program and as a person."""
    app = LimitedWSGI(validator(hello), twice)

    first, second, third = ask(app), ask(app), ask(app)

    assert [one.status for one in (first, second, third)] == [200, 200, 429]
    assert (first.body, first.headers["Content-Type"]) == (b"hello", "text/plain")
    assert [one.headers["RateLimit-Remaining"] for one in (first, second, third)] == ["1", "0", "0"]
    assert first.headers["Retry-After"] is None
    assert 0 < int(third.headers["Retry-After"]) <= 43_200
    assert third.headers["Content-Type"] == "application/problem+json"
    assert int(third.headers["Content-Length"]) == len(third.body)
    problem = json.loads(third.body)
    assert (problem["status"], problem["title"]) == (429, "Too Many Requests")
    assert third.headers["Retry-After"] in problem["detail"]


def test_what_is_refused_does_not_reach_the_application(twice: RateLimiter) -> None:
    """Nor does a HEAD request get a body."""
    reached: list[int] = []

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        reached.append(1)
        return hello(environ, start_response)

    limited = LimitedWSGI(app, twice)
    answers = [ask(limited) for _ in range(3)]
    head = ask(limited, method="HEAD")

    assert reached == [1, 1]
    assert answers[-1].status == head.status == 429
    assert head.body == b""
    assert int(head.headers["Content-Length"]) > 0


def test_clients_are_limited_each_for_itself(twice: RateLimiter) -> None:
    """By address; a forwarded one counts from a trusted proxy alone."""
    app = LimitedWSGI(validator(hello), twice)
    statuses = [ask(app, HTTP_X_FORWARDED_FOR=f"198.51.100.{number}").status for number in range(4)]
    assert statuses == [200, 200, 429, 429]

    behind = LimitedWSGI(validator(hello), twice, proxies=1)
    statuses = [ask(behind, HTTP_X_FORWARDED_FOR=f"198.51.100.{number}").status for number in range(4)]
    assert statuses == [200] * 4
    forged = [ask(behind, HTTP_X_FORWARDED_FOR=f"10.0.0.{number}, 203.0.113.9").status for number in range(4)]
    assert forged == [200, 200, 429, 429]


def test_a_key_of_ones_own_says_who_calls_and_none_is_not_limited(twice: RateLimiter) -> None:
    """A key that is too long for Redis, which a client may send, is no error."""
    app = LimitedWSGI(validator(hello), twice, key=lambda environ: environ.get("HTTP_X_API_KEY"))

    assert [ask(app, HTTP_X_API_KEY="a").status for _ in range(3)] == [200, 200, 429]
    assert [ask(app).status for _ in range(3)] == [200, 200, 200]
    assert [ask(app, HTTP_X_API_KEY="long" * 1_000).status for _ in range(3)] == [200, 200, 429]
    assert ask(app, HTTP_X_API_KEY="long" * 1_001).status == 200


def test_a_request_may_cost_more(twice: RateLimiter) -> None:
    """As a number, or as a function of the request."""
    app = LimitedWSGI(validator(hello), twice, cost=lambda environ: 2 if environ["REQUEST_METHOD"] == "POST" else 1)

    assert [ask(app, method="POST").status, ask(app).status] == [200, 429]


def test_whatever_a_client_sends_as_its_key_is_answered(twice: RateLimiter) -> None:
    """An empty header too: all who send one are one."""
    app = LimitedWSGI(hello, twice, key=lambda environ: environ.get("HTTP_X_API_KEY"))

    assert [ask(app, HTTP_X_API_KEY="").status for _ in range(3)] == [200, 200, 429]
    for key in (" ", "\x00", "\xff" * 128, "x" * 10_000, "\ud800"):
        assert ask(app, HTTP_X_API_KEY=key).status in (200, 413)


def test_what_can_never_pass_is_answered_with_413_and_not_tried_again(twice: RateLimiter) -> None:
    """Though the client says what it costs."""
    app = LimitedWSGI(hello, twice, cost=lambda environ: int(environ["HTTP_X_COST"]))

    for cost in ("3", "0", "-1"):
        answer = ask(app, HTTP_X_COST=cost)
        assert answer.status == 413
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert "Retry-After" not in answer.headers
        assert json.loads(answer.body)["status"] == 413
    assert [ask(app, HTTP_X_COST="1").status for _ in range(2)] == [200, 200]


def test_headers_of_the_application_are_its_own(twice: RateLimiter) -> None:
    """What it says of limits itself is left as it is."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("ratelimit-remaining", "7")])
        return [b"hello"]

    answer = ask(LimitedWSGI(validator(app), twice))

    assert answer.headers.get_all("RateLimit-Remaining") == ["7"]
    assert answer.headers["RateLimit-Limit"] == "2"


def test_a_permit_is_held_until_the_response_is_closed(one_at_once: RateLimiter) -> None:
    """Not only until the application has returned: a response may be made while it is sent."""
    closed: list[int] = []

    class Slow:
        def __iter__(self) -> Iterator[bytes]:
            inside.append(ask(app).status)
            yield b"hello"

        def close(self) -> None:
            closed.append(1)

    def slow(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return Slow()

    inside: list[int] = []
    app = LimitedWSGI(validator(slow), one_at_once)

    assert ask(app).status == 200
    assert inside == [429]
    assert closed == [1]
    assert isinstance(one_at_once.hit("192.0.2.7"), Allowed)


def test_a_permit_comes_back_when_the_application_raises(one_at_once: RateLimiter) -> None:
    """At once, while it makes its response, or when that is closed."""

    class Response:
        def __init__(self, where: str) -> None:
            self.where = where

        def __iter__(self) -> Iterator[bytes]:
            if self.where == "sent":
                raise ValueError(self.where)
            yield b"hello"

        def close(self) -> None:
            if self.where == "closed":
                raise ValueError(self.where)

    def fails(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        where = environ["HTTP_WHERE"]
        if where == "called":
            raise ValueError(where)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return Response(where)

    app = LimitedWSGI(fails, one_at_once)
    for where in ("called", "sent", "closed"):
        with pytest.raises(ValueError, match=where):
            ask(app, HTTP_WHERE=where)
        decision = one_at_once.hit("192.0.2.7")
        assert isinstance(decision, Allowed), where
        decision.release()


def test_without_permits_the_response_is_the_applications_own(twice: RateLimiter) -> None:
    """So that a server may send a file its own way, and count a list."""
    response = [b"hello"]

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return response

    environ: dict[str, Any] = {"REMOTE_ADDR": "192.0.2.7"}
    setup_testing_defaults(environ)
    assert LimitedWSGI(app, twice)(environ, lambda *_: lambda data: None) is response


@pytest.mark.parametrize(("on_error", "status"), [("raise", 503), ("deny", 503), ("allow", 200)])
def test_without_redis_requests_are_answered_as_the_limiter_was_told(
    unreachable: Connections, on_error: Any, status: int
) -> None:
    """It is not the client's fault: 503, and when to come again."""
    limiter = RateLimiter(unreachable, "web", [RateLimit("2/d")], on_error=on_error)
    answer = ask(LimitedWSGI(validator(hello), limiter))

    assert answer.status == status
    assert (answer.headers["Retry-After"] is not None) == (status == 503)
    assert unreachable.address.encode() not in answer.body


def test_a_permit_that_cannot_be_given_back_does_not_spoil_the_response(
    own_server: Callable[..., EmbeddedServer], caplog: pytest.LogCaptureFixture
) -> None:
    """Its lease sees to it."""
    server = own_server()
    with connect(settings=Settings(url=server.url)) as redis:
        limiter = RateLimiter(redis, "web", [RateLimit.concurrent(1)])

        def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            server.stop()
            return hello(environ, start_response)

        assert ask(LimitedWSGI(app, limiter)).body == b"hello"
    assert caplog.records


def test_it_serves_behind_a_real_server(twice: RateLimiter) -> None:
    """The one of the standard library, over HTTP."""

    class Quiet(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with make_server("127.0.0.1", 0, LimitedWSGI(hello, twice), handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        statuses = []
        try:
            for _ in range(3):
                connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
                connection.request("GET", "/")
                response = connection.getresponse()
                statuses.append((response.status, response.read()[:5]))
                connection.close()
        finally:
            server.shutdown()
            thread.join(20)

    assert statuses == [(200, b"hello"), (200, b"hello"), (429, b'{"typ')]


# ASGI


class Conversation:
    """What a server and an application say to each other, the server's part by hand."""

    def __init__(self, app: Any, *events: dict[str, Any], type: str = "http", **changes: Any) -> None:
        self.app = app
        self.scope = {
            "type": type,
            "method": "GET",
            "path": "/",
            "headers": [],
            "client": ("192.0.2.7", 4711),
        } | changes
        self.events = list(events) or [{"type": "http.request", "body": b"", "more_body": False}]
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        """The next event."""
        return self.events.pop(0)

    async def send(self, message: dict[str, Any]) -> None:
        """What the application says."""
        self.sent.append(message)

    async def __call__(self) -> "Conversation":
        await self.app(self.scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        """Of the response."""
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> dict[bytes, bytes]:
        """Of the response."""
        return dict(self.sent[0]["headers"])


async def greet(scope: Any, receive: Any, send: Any) -> None:
    """An application."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"hello"})


def run(*conversations: Callable[[], Awaitable[Any]]) -> list[Any]:
    """One after the other, on one event loop."""

    async def all_of_them() -> list[Any]:
        return [await conversation() for conversation in conversations]

    return asyncio.run(all_of_them())


def test_over_the_limit_an_asgi_request_is_answered_with_429(twice: RateLimiter) -> None:
    """With the same headers and body as by WSGI; header names are lower case, as the standard wants them."""
    app = LimitedASGI(greet, twice)

    first, second, third = run(*[Conversation(app) for _ in range(3)])

    assert [one.status for one in (first, second, third)] == [200, 200, 429]
    assert [one.headers[b"ratelimit-remaining"] for one in (first, second, third)] == [b"1", b"0", b"0"]
    assert first.headers[b"content-type"] == b"text/plain"
    assert third.headers[b"content-type"] == b"application/problem+json"
    assert int(third.headers[b"retry-after"]) > 0
    assert json.loads(third.sent[1]["body"])["status"] == 429
    assert all(name == name.lower() for name in third.headers)


def test_asgi_requests_with_an_empty_key_or_too_high_a_cost_are_answered(twice: RateLimiter) -> None:
    """As by WSGI; a WebSocket is denied."""
    empty = LimitedASGI(greet, twice, key=lambda scope: "")
    too_much = LimitedASGI(greet, twice, cost=lambda scope: 3)
    opened = {"type": "websocket.connect"}

    answers = run(*[Conversation(empty) for _ in range(3)], Conversation(too_much))
    (denied,) = run(Conversation(too_much, opened, type="websocket"))

    assert [one.status for one in answers] == [200, 200, 429, 413]
    assert json.loads(answers[-1].sent[1]["body"])["status"] == 413
    assert b"retry-after" not in answers[-1].headers
    assert denied.sent[0]["type"] == "websocket.close"


def test_asgi_clients_are_limited_each_for_itself(twice: RateLimiter) -> None:
    """By address, of IPv6 by network; a forwarded one counts from a trusted proxy alone, whatever the client sent."""

    def statuses(app: Any, changes: list[dict[str, Any]]) -> list[int]:
        return [one.status for one in run(*[Conversation(app, **change) for change in changes])]

    def forwarded(*values: bytes) -> dict[str, Any]:
        return {"headers": [(b"x-forwarded-for", value) for value in values]}

    app, behind = LimitedASGI(greet, twice), LimitedASGI(greet, twice, proxies=1)
    assert statuses(app, [{"client": (f"2001:db8::{number}", 1)} for number in range(4)]) == [200, 200, 429, 429]
    assert statuses(app, [forwarded(b"198.51.100.%d" % number) for number in range(3)]) == [200, 200, 429]
    assert statuses(behind, [forwarded(b"198.51.100.%d" % number) for number in range(3)]) == [200] * 3
    assert statuses(behind, [forwarded(b"10.0.0.%d" % number, b"203.0.113.9") for number in range(3)]) == [
        200,
        200,
        429,
    ]
    assert statuses(app, [{"client": None} for _ in range(3)]) == [200, 200, 429]


def test_lifespan_and_requests_without_a_key_pass(twice: RateLimiter) -> None:
    """They are not limited."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    run(*[Conversation(LimitedASGI(app, twice), type="lifespan") for _ in range(3)])
    run(*[Conversation(LimitedASGI(app, twice, key=lambda scope: None)) for _ in range(3)])

    assert seen == ["lifespan"] * 3 + ["http"] * 3


def test_a_websocket_over_the_limit_is_denied(twice: RateLimiter) -> None:
    """As an HTTP response where the server offers that, by closing it otherwise."""
    app = LimitedASGI(greet, twice)
    hello = {"type": "websocket.connect"}
    offered = {"extensions": {"websocket.http.response": {}}}

    first, _, closed, denied, gone = run(
        Conversation(app, hello, type="websocket"),
        Conversation(app, hello, type="websocket"),
        Conversation(app, hello, type="websocket"),
        Conversation(app, hello, type="websocket", **offered),
        Conversation(app, {"type": "websocket.disconnect", "code": 1001}, type="websocket"),
    )

    assert first.sent[0]["type"] == "websocket.accept"
    assert first.headers[b"ratelimit-remaining"] == b"1"
    assert closed.sent == [{"type": "websocket.close", "code": 1013, "reason": "Too Many Requests"}]
    assert [message["type"] for message in denied.sent] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert denied.status == 429
    assert gone.sent == []


def test_an_asgi_permit_is_held_while_the_application_runs(one_at_once: RateLimiter) -> None:
    """And comes back when it returns, raises, or is cancelled."""

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        entered.set()
        if scope["path"] == "/fails":
            raise ValueError("no page")
        if scope["path"] == "/waits":
            await asyncio.Event().wait()

    async def story() -> list[int]:
        nonlocal entered
        entered = asyncio.Event()
        task = asyncio.create_task(Conversation(app, path="/waits")())
        await asyncio.wait_for(entered.wait(), 20)
        refused = await Conversation(app)()
        task.cancel()
        await asyncio.wait([task])
        with pytest.raises(ValueError, match="no page"):
            await Conversation(app, path="/fails")()
        await Conversation(app, path="/returns")()
        return [refused.status]

    entered: asyncio.Event
    app = LimitedASGI(waits, one_at_once)

    assert asyncio.run(story()) == [429]
    assert isinstance(one_at_once.hit("192.0.2.7"), Allowed)


class Slow:
    """A limiter that answers when it is told to."""

    def __init__(self, limiter: RateLimiter) -> None:
        self.limiter = limiter
        self.asked, self.go = threading.Event(), threading.Event()
        self.decision: Allowed | Limited | None = None

    def hit(self, key: str, cost: int = 1) -> Allowed | Limited:
        """As the limiter."""
        self.asked.set()
        assert self.go.wait(30)
        self.decision = self.limiter.hit(key, cost)
        return self.decision


def test_the_event_loop_does_not_wait_for_the_limiter(one_at_once: RateLimiter) -> None:
    """Another coroutine runs while the limiter is being asked: here, the one that lets it answer."""

    async def story() -> int:
        task = asyncio.create_task(Conversation(LimitedASGI(greet, slow))())
        while not slow.asked.is_set():
            await asyncio.sleep(0.001)
        slow.go.set()
        return (await task).status

    slow = Slow(one_at_once)
    assert asyncio.run(story()) == 200


def test_a_permit_comes_back_when_the_client_left_while_the_limiter_was_asked(one_at_once: RateLimiter) -> None:
    """The thread goes on, and is given a permit that nobody wants any more."""

    async def story() -> None:
        task = asyncio.create_task(Conversation(LimitedASGI(greet, slow))())
        while not slow.asked.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        slow.go.set()
        await asyncio.to_thread(eventually, lambda: slow.decision is not None, "it was given a permit")
        await asyncio.to_thread(eventually, lambda: one_at_once.peek("192.0.2.7"), "the permit is free again")

    slow = Slow(one_at_once)
    asyncio.run(story())
    assert isinstance(slow.decision, Allowed)


def test_without_redis_asgi_requests_are_answered_with_503(unreachable: Connections) -> None:
    """And with when to come again."""
    (answer,) = run(Conversation(LimitedASGI(greet, RateLimiter(unreachable, "web", [RateLimit("2/d")]))))

    assert answer.status == 503
    assert answer.headers[b"retry-after"] == b"1"


# Bad input


@pytest.mark.parametrize("kind", [LimitedWSGI, LimitedASGI])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"key": "address"}, TypeError, "key='address' must be a function"),
        ({"cost": 0}, ValueError, "cost=0"),
        ({"cost": True}, ValueError, "cost=True"),
        ({"proxies": -1}, ValueError, "proxies=-1"),
        ({"proxies": "1"}, ValueError, "proxies='1'"),
        ({"proxies": 1, "key": str}, ValueError, "leave one out"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    kind: Any, twice: RateLimiter, wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    """When the middleware is made, not with the first request."""
    with pytest.raises(error, match=message):
        kind(hello, twice, **wrong)
