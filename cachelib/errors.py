"""What can go wrong on floor 1. One root; facts as attributes; the message says the next step."""


class CachelibError(Exception):
    """Root of every error that ``petiole.cachelib`` raises on purpose."""


class ServerUnavailable(CachelibError):
    """Redis could not be reached, or did not answer in time."""

    def __init__(self, address: str, cause: BaseException, *, doing: str) -> None:
        self.address = address
        self.doing = doing
        super().__init__(
            f"{doing}: Redis at {address} did not answer ({type(cause).__name__}: {cause}). "
            "Check that the server runs there and that REDIS_URL names it."
        )


class ServerNotFound(CachelibError):
    """``embedded://`` found no server program to start."""


class EntryNotCounter(CachelibError):
    """``incr`` met a key that holds something else than a whole number."""

    def __init__(self, key: str, *, overflow: bool = False) -> None:
        self.key = key
        self.overflow = overflow
        super().__init__(
            f"{key!r} would leave the 64 bits that Redis counts with"
            if overflow
            else f"{key!r} does not hold a whole number that can be counted on (one with tags cannot); delete it first"
        )


class ValueNotCacheable(CachelibError, TypeError):
    """A value has no form in the cache's format, or is not of the type that was given."""

    def __init__(self, key: str, value: object, cause: BaseException) -> None:
        self.key = key
        super().__init__(
            f"the value for {key!r}, a {type(value).__name__}, cannot be cached ({cause}); "
            "give built-in types, dataclasses, msgspec structs, datetimes, Decimal or UUID"
        )


class LoadTimedOut(CachelibError, TimeoutError):
    """A loader did not end within ``hard_timeout``, and there was nothing stale to serve."""

    def __init__(self, key: str, timeout_ms: int, *, too_many: bool = False) -> None:
        self.key = key
        self.timeout_ms = timeout_ms
        why = (
            "too many loads with a time limit are running already; what do they wait for?"
            if too_many
            else f"it did not end within {timeout_ms / 1_000:g} s; the next caller may try again"
        )
        super().__init__(f"the loader of {key!r}: {why}")


class LoaderRecursion(CachelibError, RuntimeError):
    """A loader asked for the very key that it is loading."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"the loader of {key!r} asked the cache for {key!r} again; it would wait for itself")


class WriteBehindError(CachelibError):
    """Root of the errors of the write-behind buffers."""


class RowRefused(WriteBehindError, ValueError):
    """A row does not fit its table. It was refused before it entered the buffer."""

    def __init__(self, table: str, column: str | None, reason: str) -> None:
        self.table = table
        self.column = column
        self.reason = reason
        where = f"{table}.{column}" if column else table
        super().__init__(f"row refused, nothing was written: {where}: {reason}")


class BufferFull(WriteBehindError):
    """A partition holds as many unflushed rows as it may. The row was not accepted."""

    def __init__(self, buffer: str, partition: int, length: int) -> None:
        self.buffer = buffer
        self.partition = partition
        self.length = length
        super().__init__(
            f"buffer {buffer!r}, partition {partition}, holds {length} unflushed rows and takes no more; "
            "is a worker flushing it? Otherwise raise max_length"
        )


class ServerFull(WriteBehindError):
    """Redis has reached its memory limit. The row was not accepted."""

    def __init__(self, address: str, buffer: str) -> None:
        self.address = address
        self.buffer = buffer
        super().__init__(
            f"buffer {buffer!r}: Redis at {address} has no memory left (maxmemory) and refused the row; "
            "give it more, or flush faster"
        )


class SinkUnfit(WriteBehindError, ValueError):
    """A table cannot serve the mode that was asked of it."""


class ValueTooLarge(CachelibError, ValueError):
    """A value has more bytes than its codec stores. Nothing was stored."""

    def __init__(self, name: str, size: int, limit: int) -> None:
        self.name = name
        self.size = size
        self.limit = limit
        super().__init__(
            f"the value for {name!r} has {size} bytes before compression, more than max_bytes={limit}; "
            "store it in parts, or raise max_bytes"
        )
