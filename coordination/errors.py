"""What can go wrong on floor 2. One root; facts as attributes; the message says the next step."""


class CoordinationError(Exception):
    """Root of every error that ``petiole.coordination`` raises on purpose."""


class LimiterUnavailable(CoordinationError):
    """A limiter could not ask Redis, and was told to raise rather than to guess."""

    def __init__(self, limiter: str, address: str, cause: BaseException) -> None:
        self.limiter = limiter
        self.address = address
        super().__init__(
            f"limiter {limiter!r} got no answer from Redis at {address} ({type(cause).__name__}: {cause}); "
            'on_error="allow" or "deny" decides without it'
        )
