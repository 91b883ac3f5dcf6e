"""Redis messages as Celery signals.

Pub/sub is at most once: a message that is published while a listener is away is gone. What must not be lost
belongs into a task or a buffer; a signal tells what happened to whoever is there.
"""

import logging
from threading import Event, Lock, Thread, current_thread
from typing import Any

import msgspec
from celery import Celery, signals
from celery.utils.dispatch import Signal

from ..cachelib.connections import UNAVAILABLE, Connections, require_connections
from ..cachelib.counters import Counters
from ..cachelib.errors import ServerUnavailable
from ..cachelib.forks import renew_after_fork

logger = logging.getLogger(__name__)

LARGEST_MESSAGE_BYTES = 1_048_576

_LOOK_UP_S = 0.5  # how soon a listener sees that it is to stop
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


class SignalBridge:
    """Publishes JSON on Redis channels, and turns what arrives into Celery signals.

    >>> bridge = SignalBridge(app, redis)
    >>> @bridge.signal("user:*").connect
    ... def on_user_event(sender, channel, payload, **kwargs): ...
    >>> bridge.publish("user:created", {"id": 7})

    A receiver is called as Celery calls receivers: ``sender`` is the bridge, ``channel`` the name, ``payload`` the
    decoded JSON; what it raises is logged and stops nobody else. (Celery holds receivers weakly: keep a
    reference, or connect with ``weak=False``.)

    In a worker it listens from ``worker_ready`` on, in the main process only: a message calls each receiver
    once per worker, not once per child. Elsewhere call ``start()``, in the process that is to listen (not
    before a fork).

    Promises: messages that cannot be read, or are larger than a megabyte, are counted and dropped; the listener
    reconnects for ever. Non-promises: a message sent while the listener is away is lost.

    Not yet: Celery signals to Redis channels (``forward``).

    Arguments:
        app: whose workers listen.
        redis: from ``connect``.
    """

    def __init__(self, app: Celery, redis: Connections) -> None:
        require_connections(redis)
        self.app = app
        self._redis = redis
        self._signals: dict[str, Signal] = {}
        self._thread: Thread | None = None
        self._stopping = Event()  # of the current listener: one that is slow to end must not hear of the next
        self._ready = Event()
        self._lock = Lock()
        self._counters = Counters()
        renew_after_fork(self)
        signals.worker_ready.connect(self._on_worker_ready, weak=False)
        signals.worker_shutdown.connect(self._on_worker_shutdown, weak=False)

    def __repr__(self) -> str:
        state = "listening" if self.listening else "not listening"
        return f"<SignalBridge at {self._redis.address} [{state}] {sorted(self._signals)}>"

    @property
    def listening(self) -> bool:
        """Whether this process listens, and is subscribed."""
        return self._thread is not None and self._ready.is_set()

    def signal(self, pattern: str) -> Signal:
        """The signal for a channel, or a pattern of channels with ``*``, ``?`` and ``[...]``.

        Asked for while the listener runs, it is heard within a second.
        """
        with self._lock:
            if pattern not in self._signals:
                self._signals[pattern] = Signal(name=f"petiole:{pattern}", providing_args={"channel", "payload"})
            return self._signals[pattern]

    def publish(self, channel: str, payload: object) -> int:
        """Send a JSON message. Returns how many listeners Redis handed it to.

        Raises ``TypeError`` for what has no JSON form, ``ValueError`` when it is too large, and
        ``ServerUnavailable`` when nobody knows whether it was sent.
        """
        message = msgspec.json.encode(payload)
        if len(message) > LARGEST_MESSAGE_BYTES:
            raise ValueError(f"the message for {channel!r} has {len(message)} bytes, more than {LARGEST_MESSAGE_BYTES}")
        try:
            return int(self._redis.coordination.execute_command("PUBLISH", channel, message))
        except UNAVAILABLE as error:
            raise ServerUnavailable(self._redis.address, error, doing=f"publish on {channel!r}") from error

    def start(self, *, wait: float = 0.0) -> None:
        """Listen in this process. Does nothing when it already does, or no signal was asked for.

        Arguments:
            wait: seconds to wait until the subscription stands.
        """
        with self._lock:
            if not self._signals or self._thread is not None:
                return
            self._stopping, self._ready = Event(), Event()
            self._thread = Thread(
                target=self._listen, args=(self._stopping, self._ready), name="petiole-signals", daemon=True
            )
            self._thread.start()
        if wait:
            self._ready.wait(wait)

    def stop(self) -> None:
        """Stop listening, and wait until the listener has ended; for two seconds, if a receiver keeps it busy.

        A receiver may call it too; then the listener ends after that receiver.
        """
        with self._lock:
            thread, self._thread = self._thread, None
            self._stopping.set()
            self._ready.clear()
        if thread is not None and thread is not current_thread():
            thread.join(timeout=_LOOK_UP_S * 4)

    def renew_after_fork(self) -> None:
        """Forget the parent's listener: its thread is not here."""
        self._lock = Lock()
        self._thread = None
        self._stopping, self._ready = Event(), Event()

    def stats(self) -> dict[str, int]:
        """Counts of this process: messages, dropped, reconnections."""
        counts = self._counters.read()
        return {name: counts.get(name, 0) for name in ("messages", "dropped", "reconnections")}

    def _listen(self, stopping: Event, ready: Event) -> None:
        pause_s = _FIRST_PAUSE_S
        while not stopping.is_set() and not self._redis.closed:
            try:
                self._listen_once(stopping, ready)
                pause_s = _FIRST_PAUSE_S
            except Exception as error:  # noqa: BLE001 - whatever it is, a listener that ends would miss all that comes
                ready.clear()
                if self._redis.closed:
                    return
                self._counters.add("reconnections")
                logger.warning("signals from Redis at %s: %s; again in %.1f s", self._redis.address, error, pause_s)
                stopping.wait(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def _listen_once(self, stopping: Event, ready: Event) -> None:
        """Listen on one connection, until it breaks, the listener is to stop, or there are new patterns."""
        with self._lock:
            patterns = sorted(self._signals)
        with self._redis.blocking.pubsub() as pubsub:
            pubsub.psubscribe(*patterns)
            confirmed = 0
            while not stopping.is_set() and len(self._signals) == len(patterns):
                message = pubsub.get_message(timeout=_LOOK_UP_S)
                if message is not None and message["type"] == "psubscribe":
                    confirmed += 1
                    if confirmed == len(patterns):
                        ready.set()
                elif message is not None and message["type"] == "pmessage":
                    self._dispatch(message)
        ready.clear()

    def _dispatch(self, message: dict[str, Any]) -> None:
        channel = message["channel"].decode("utf-8", "replace")
        raw: bytes = message["data"]
        self._counters.add("messages")
        if len(raw) > LARGEST_MESSAGE_BYTES:
            self._counters.add("dropped")
            logger.warning("a message of %d bytes on %r was dropped", len(raw), channel)
            return
        try:
            payload = msgspec.json.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._counters.add("dropped")
            logger.warning("a message on %r is not JSON and was dropped", channel)
            return
        signal = self._signals.get(message["pattern"].decode("utf-8", "replace"))
        if signal is not None:
            signal.send(sender=self, channel=channel, payload=payload)

    def _on_worker_ready(self, sender: Any = None, **_: Any) -> None:
        if getattr(sender, "app", None) is self.app:
            self.start()

    def _on_worker_shutdown(self, sender: Any = None, **_: Any) -> None:
        if getattr(sender, "app", None) is self.app:
            self.stop()
