"""Redis messages as Celery signals: who hears what, and what a broken message or connection does."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from threading import Event
from typing import Any

import pytest
from celery import Celery

from petiole import Connections, SignalBridge, connect
from petiole.cachelib import EmbeddedServer
from petiole.cachelib.errors import ServerUnavailable
from petiole.coordination.signals import LARGEST_MESSAGE_BYTES

PATIENCE_S = 20.0

Heard = Queue[tuple[str, Any]]


@pytest.fixture
def bridge(app: Celery, redis: Connections) -> Iterator[SignalBridge]:
    """A bridge that this test starts."""
    bridge = SignalBridge(app, redis)
    yield bridge
    bridge.stop()


@pytest.fixture
def heard() -> Heard:
    """What a receiver has heard: channels with payloads."""
    return Queue()


def listen(bridge: SignalBridge, pattern: str, heard: Heard) -> None:
    def receive(sender: SignalBridge, channel: str, payload: Any, **_: Any) -> None:
        heard.put((channel, payload))

    bridge.signal(pattern).connect(receive, weak=False)


def listeners() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "petiole-signals"]


def test_a_message_reaches_the_receivers_with_channel_and_payload(bridge: SignalBridge, name: str) -> None:
    """Each receiver of the channel is called once, with the bridge, the channel and the decoded JSON."""
    calls: Queue[dict[str, Any]] = Queue()
    for _ in range(2):
        bridge.signal(f"{name}:created").connect(lambda **call: calls.put(call), weak=False)
    bridge.start(wait=PATIENCE_S)
    handed = bridge.publish(f"{name}:created", {"id": 7, "tags": ["ä", None, 1.5]})
    received = [calls.get(timeout=PATIENCE_S) for _ in range(2)]

    assert handed == 1
    for call in received:
        assert call["sender"] is bridge
        assert call["channel"] == f"{name}:created"
        assert call["payload"] == {"id": 7, "tags": ["ä", None, 1.5]}
    assert calls.empty()


def test_a_pattern_hears_every_channel_that_it_matches(bridge: SignalBridge, heard: Heard, name: str) -> None:
    """A pattern hears its channels, and no others."""
    listen(bridge, f"{name}:user:*", heard)
    bridge.start(wait=PATIENCE_S)
    handed = [bridge.publish(f"{name}:{channel}", channel) for channel in ("user:1", "order:1", "user:2")]
    received = [heard.get(timeout=PATIENCE_S) for _ in range(2)]

    assert handed == [1, 0, 1]
    assert received == [(f"{name}:user:1", "user:1"), (f"{name}:user:2", "user:2")]


def test_a_message_that_two_patterns_match_reaches_both(bridge: SignalBridge, name: str) -> None:
    """Signals do not take messages from each other."""
    wide, narrow = Queue(), Queue()  # type: Heard, Heard
    listen(bridge, f"{name}:*", wide)
    listen(bridge, f"{name}:user:1", narrow)
    bridge.start(wait=PATIENCE_S)
    bridge.publish(f"{name}:user:1", "hello")

    assert wide.get(timeout=PATIENCE_S) == narrow.get(timeout=PATIENCE_S) == (f"{name}:user:1", "hello")
    assert wide.empty()
    assert narrow.empty()


def test_one_pattern_is_one_signal(bridge: SignalBridge, name: str) -> None:
    """Whoever asks for a pattern gets the same signal."""
    assert bridge.signal(f"{name}:*") is bridge.signal(f"{name}:*")


@pytest.mark.parametrize(
    "raw",
    [
        b"{not json",
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'"' + b"x" * LARGEST_MESSAGE_BYTES + b'"',
    ],
    ids=["not JSON", "empty", "not UTF-8", "nested", "too large"],
)
def test_a_message_that_cannot_be_read_is_dropped_and_counted(
    bridge: SignalBridge, redis: Connections, heard: Heard, name: str, raw: bytes
) -> None:
    """What is not JSON, or too large, reaches nobody, is counted, and stops nothing."""
    listen(bridge, name, heard)
    bridge.start(wait=PATIENCE_S)
    redis.coordination.publish(name, raw)
    bridge.publish(name, "good")

    assert heard.get(timeout=PATIENCE_S) == (name, "good")
    assert heard.empty()
    assert bridge.stats() == {"messages": 2, "dropped": 1, "reconnections": 0}


def test_a_message_of_just_the_largest_size_is_heard(bridge: SignalBridge, heard: Heard, name: str) -> None:
    """The bound is what publish accepts."""
    text = "x" * (LARGEST_MESSAGE_BYTES - 2)
    listen(bridge, name, heard)
    bridge.start(wait=PATIENCE_S)
    bridge.publish(name, text)

    assert heard.get(timeout=PATIENCE_S) == (name, text)


def test_a_receiver_that_raises_stops_nobody(bridge: SignalBridge, heard: Heard, name: str) -> None:
    """The other receivers of the message and the next message are as if it had not raised."""

    def broken(**_: Any) -> None:
        raise RuntimeError("a receiver is broken")

    bridge.signal(name).connect(broken, weak=False)
    listen(bridge, name, heard)
    bridge.start(wait=PATIENCE_S)
    for number in range(2):
        bridge.publish(name, number)

    assert [heard.get(timeout=PATIENCE_S) for _ in range(2)] == [(name, 0), (name, 1)]


def test_a_listener_whose_connection_was_cut_comes_back(
    app: Celery, own_server: Callable[..., EmbeddedServer], heard: Heard, until: Callable[[Callable[[], object]], None]
) -> None:
    """The listener subscribes again by itself, and counts it."""
    with connect(own_server().url) as redis:
        bridge = SignalBridge(app, redis)
        listen(bridge, "news", heard)
        bridge.start(wait=PATIENCE_S)
        try:
            killed = redis.coordination.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            # More than once: for a moment the server counts the connection that it is closing as one that hears.
            until(lambda: bridge.publish("news", "again") and heard.qsize())
            received = heard.get(timeout=PATIENCE_S)
            until(lambda: bridge.listening)
            stats = bridge.stats()
        finally:
            bridge.stop()

    assert killed == 1
    assert received == ("news", "again")
    assert stats["reconnections"] == 1


def test_a_pattern_that_is_asked_for_later_is_heard_too(
    bridge: SignalBridge, heard: Heard, name: str, until: Callable[[Callable[[], object]], None]
) -> None:
    """A running listener takes up new patterns, and keeps the old ones."""
    listen(bridge, f"{name}:first", heard)
    bridge.start(wait=PATIENCE_S)
    listen(bridge, f"{name}:second", heard)
    until(lambda: bridge.publish(f"{name}:second", 2))
    second = heard.get(timeout=PATIENCE_S)
    until(lambda: bridge.listening)
    bridge.publish(f"{name}:first", 1)

    assert second == (f"{name}:second", 2)
    assert heard.get(timeout=PATIENCE_S) == (f"{name}:first", 1)


def test_stop_ends_the_listener(bridge: SignalBridge, heard: Heard, name: str) -> None:
    """After stop there is no thread and no subscription; start listens again."""
    listen(bridge, name, heard)
    before = len(listeners())
    bridge.start(wait=PATIENCE_S)
    running = len(listeners()) - before, bridge.listening
    bridge.stop()
    stopped = len(listeners()) - before, bridge.listening
    missed = bridge.publish(name, "nobody is there")
    bridge.start(wait=PATIENCE_S)
    bridge.publish(name, "there again")

    assert running == (1, True)
    assert stopped == (0, False)
    assert missed == 0
    assert heard.get(timeout=PATIENCE_S) == (name, "there again")


def test_to_start_twice_is_to_start_once(bridge: SignalBridge, heard: Heard, name: str) -> None:
    """There is one listener, and a message is heard once."""
    listen(bridge, name, heard)
    before = len(listeners())
    bridge.start(wait=PATIENCE_S)
    bridge.start()

    assert len(listeners()) - before == 1
    assert bridge.publish(name, "once") == 1


def test_stop_while_a_receiver_is_busy_leaves_no_second_listener(
    bridge: SignalBridge, heard: Heard, name: str, until: Callable[[Callable[[], object]], None]
) -> None:
    """A listener that was told to stop stops when its receiver returns, also when another was started meanwhile."""
    busy, go = Event(), Event()

    def slow(payload: Any, **_: Any) -> None:
        if payload == "slow":
            busy.set()
            go.wait(PATIENCE_S)

    bridge.signal(name).connect(slow, weak=False)
    listen(bridge, name, heard)
    before = len(listeners())
    bridge.start(wait=PATIENCE_S)
    bridge.publish(name, "slow")
    try:
        assert busy.wait(PATIENCE_S)
        bridge.stop()
        bridge.start(wait=PATIENCE_S)
    finally:
        go.set()
    until(lambda: len(listeners()) - before == 1)

    assert bridge.publish(name, "once") == 1


def test_a_receiver_may_stop_the_bridge(bridge: SignalBridge, name: str) -> None:
    """A message such as "shut down" ends the listener that heard it."""
    outcome: Queue[BaseException | None] = Queue()

    def receive(**_: Any) -> None:
        try:
            bridge.stop()
        except BaseException as error:  # noqa: BLE001 - it is handed to the test
            outcome.put(error)
        else:
            outcome.put(None)

    bridge.signal(name).connect(receive, weak=False)
    bridge.start(wait=PATIENCE_S)
    (thread,) = listeners()
    bridge.publish(name, "shut down")

    assert outcome.get(timeout=PATIENCE_S) is None
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_listener_ends_quietly_with_its_connections(
    app: Celery, own_server: Callable[..., EmbeddedServer], heard: Heard
) -> None:
    """Connections that are closed under a listener end it; there is nothing left to come back to."""
    redis = connect(own_server().url)
    bridge = SignalBridge(app, redis)
    listen(bridge, "news", heard)
    bridge.start(wait=PATIENCE_S)
    (thread,) = listeners()
    redis.close()
    redis_is_cut = connect(redis.url)
    redis_is_cut.coordination.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    redis_is_cut.close()
    thread.join(PATIENCE_S)

    assert not thread.is_alive()
    assert not bridge.listening


def test_without_signals_there_is_nothing_to_listen_to(bridge: SignalBridge) -> None:
    """A bridge that only publishes starts no thread."""
    before = len(listeners())
    bridge.start(wait=0.1)

    assert len(listeners()) == before
    assert not bridge.listening


def test_to_stop_what_never_began_does_nothing(bridge: SignalBridge) -> None:
    """stop may be called at any time."""
    bridge.stop()

    assert not bridge.listening


def recursive() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


@pytest.mark.parametrize("payload", [object(), {1, 2, object()}, recursive()], ids=["object", "set", "recursive"])
def test_what_has_no_json_form_is_not_published(bridge: SignalBridge, name: str, payload: object) -> None:
    """It is the caller's mistake, and said so."""
    with pytest.raises((TypeError, RecursionError)):
        bridge.publish(name, payload)


def test_what_is_too_large_is_not_published(bridge: SignalBridge, name: str) -> None:
    """The message names the channel and the sizes."""
    with pytest.raises(ValueError, match=rf"{name}.*{LARGEST_MESSAGE_BYTES + 1} bytes, more than"):
        bridge.publish(name, "x" * (LARGEST_MESSAGE_BYTES - 1))


def test_to_publish_without_redis_raises(app: Celery, own_server: Callable[..., EmbeddedServer]) -> None:
    """Nobody knows whether it was sent, and the caller is told; the message has the address."""
    server = own_server()
    with connect(server.url) as redis:
        bridge = SignalBridge(app, redis)
        bridge.publish("news", 1)
        server.stop()
        with pytest.raises(ServerUnavailable, match=server.url):
            bridge.publish("news", 2)


def test_a_bridge_tells_its_state(bridge: SignalBridge, heard: Heard, name: str) -> None:
    """Its repr has the address, whether it listens, and to what."""
    listen(bridge, name, heard)
    before = repr(bridge)
    bridge.start(wait=PATIENCE_S)

    assert before.endswith(f"[not listening] ['{name}']>")
    assert repr(bridge).endswith(f"[listening] ['{name}']>")


WORKER = """
import os

from celery import Celery, signals

from petiole import SignalBridge, connect

app = Celery("bridged", broker=os.environ["REDIS_URL"])
app.conf.task_default_queue = "bridged"
redis = connect()
bridge = SignalBridge(app, redis)


@bridge.signal("bridged:*").connect
def on_event(channel, payload, **_):
    redis.coordination.rpush("heard", f"{channel} {payload} {os.getpid()}")


@signals.worker_shutdown.connect
def on_shutdown(**_):
    redis.coordination.rpush("ended", str(bridge.listening))
"""


def test_a_worker_listens_in_its_main_process_while_it_runs(
    own_server: Callable[..., EmbeddedServer], tmp_path: Path, until: Callable[[Callable[[], object]], None]
) -> None:
    """From its start to its end a worker hears each message once, whatever the number of its children."""
    (tmp_path / "bridged.py").write_text(WORKER)
    server = own_server()
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "bridged", "worker", "--pool=prefork", "-c", "2", "-l", "ERROR"],
        cwd=tmp_path,
        env={**os.environ, "REDIS_URL": server.url},
    )
    with connect(server.url) as redis:
        try:
            until(lambda: redis.coordination.publish("bridged:7", '"hello"'))
            heard = redis.blocking.blpop(["heard"], timeout=PATIENCE_S)
            handed = redis.coordination.publish("bridged:8", '"again"')
            again = redis.blocking.blpop(["heard"], timeout=PATIENCE_S)
            worker.send_signal(signal.SIGTERM)
            ended = redis.blocking.blpop(["ended"], timeout=PATIENCE_S)
            worker.wait(PATIENCE_S)
        finally:
            worker.kill()
            worker.wait()
        left = redis.coordination.llen("heard")

    assert heard[1].decode() == f"bridged:7 hello {worker.pid}"
    assert again[1].decode() == f"bridged:8 again {worker.pid}"
    assert handed == 1
    assert left == 0
    assert ended[1] == b"False"
    assert worker.returncode == 0
