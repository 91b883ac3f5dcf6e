"""One call at a time for a key, among all processes; those who ask meanwhile get its value.

It is a cache whose values live for a moment: the load, the lease and the waking are those of ``cachelib.Cache``. The
invariant is the cache's too: whoever is given a value that another made came while it was being made, or within
``linger`` after.
"""

from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

from ..cachelib import Cache, CachedFunction, Codec, Connections, Pickle, Stats, cached
from ..cachelib.durations import Duration, milliseconds
from . import keys

P = ParamSpec("P")
T = TypeVar("T")

_SHORTEST_LINGER_MS = 50


class SingleFlight:
    """Lets one caller run and gives its value to the others.

    >>> flight = SingleFlight(redis, "prices")
    >>> flight.do("oil", fetch_oil_price)
    >>> @flight.shared("price:{symbol}")
    ... def price(symbol: str) -> float: ...

    Promises: of all threads and processes that ask for a key while its function runs, or within ``linger`` (up to a
    tenth less) after it returned, one runs it; the others wait without a command and are woken with its value, also
    with ``None``. A run that raises fails the one who ran; one of those who wait runs next, and so on, so that each
    exception reaches him whose run it was. A process that dies delays those who wait by ``lease`` at most; a long run
    keeps its lease.

    Non-promises: this is no lock. Without Redis, everyone runs for himself (a warning says so once), and so does who
    has waited for longer than ``wait``. A value above ``Codec.max_bytes``, and one that is not of its type, is not
    shared. What is shared comes back as MessagePack has it, unless a type is given: tuples become lists.

    Arguments:
        redis: from ``connect``.
        name: keeps the keys of several flights apart.
        linger: how long a value is given to those who come after it was made. At least 50 ms: who was woken has to
            fetch it.
        lease: how long a run is waited for whose process has died.
        wait: how long to wait for a run that goes on and on. Default: a minute.
        format: as for ``Cache``.
        type: what the values are, as for ``Cache.get_or_set``.

    Raises ``ValueError`` or ``TypeError`` for what cannot be meant.
    """

    def __init__(
        self,
        redis: Connections,
        name: str,
        *,
        linger: Duration = 1,
        lease: Duration = 5,
        wait: Duration = 60,
        format: Literal["msgpack", "json"] | Pickle | Codec = "msgpack",
        type: Any = Any,
    ) -> None:
        if milliseconds(linger, "linger") < _SHORTEST_LINGER_MS:
            raise ValueError(
                f"linger={linger!r} is shorter than those who are woken may need to fetch the value; "
                f"give {_SHORTEST_LINGER_MS} ms or more"
            )
        if not isinstance(name, str) or not name:
            raise ValueError(f"a single flight needs a name, which keeps its keys apart from others', not {name!r}")
        self.name = name
        self.cache = Cache(
            redis, namespace=keys.flight_namespace(name), lease=lease, format=format, ttl=linger, wait=wait, type=type
        )
        self._type = type

    def __repr__(self) -> str:
        return f"<SingleFlight {self.name!r} at {self.cache.redis.address}>"

    def do(self, key: str, function: Callable[[], T], *, type: Any = None) -> T:
        """The function's value, or that of another caller who runs it, or has just run it.

        Arguments:
            key: what is the same for those who may share. Two functions under one key share too.
            function: called without arguments. It must not ask for the same key.
            type: of this value, where it is not that of the flight.

        A run costs two round trips. Raises what the function raises, ``ValueNotCacheable`` for a value that has no
        form in the flight's format, and ``LoaderRecursion`` for a function that asks for its own key.
        """
        return self.cache.get_or_set(key, function, type=self._type if type is None else type)

    def shared(self, key: str | None = None) -> Callable[[Callable[P, T]], CachedFunction[P, T]]:
        """Make each call of a function, or of a method, a flight.

        Arguments:
            key: text with the function's arguments in braces, as for ``cached``. Functions with the same text share.
                Without one: the function's name and a digest of all arguments.

        What the function's annotation says it returns is the ``type``.
        """
        return cached(self.cache, key)

    def forget(self, key: str) -> None:
        """Share no more what was made, or is being made, before now: who asks next runs."""
        self.cache.delete(key)

    def stats(self) -> Stats:
        """What this process has done: ``loads`` ran here, ``hits``, ``joins`` and ``waits`` shared."""
        return self.cache.stats()
