"""What can go wrong on floor 2. One root; facts as attributes; the message says the next step."""

from ..cachelib.durations import Duration, milliseconds


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


class LimitExceeded(CoordinationError):
    """A call was refused where only an allowed one can go on: ``with limiter.hit(key): ...``."""

    def __init__(self, retry_after: float, by: str) -> None:
        self.retry_after = retry_after
        super().__init__(f"refused by {by}; try again in {retry_after:.3g} s")


class LockError(CoordinationError):
    """Root of what goes wrong with locks, semaphores and whatever else is held."""

    _message = ""
    """Of an error that a task may end with: a result backend rebuilds it of its facts, which are its ``args``."""

    def __str__(self) -> str:
        return self._message or super().__str__()


class LockTimeout(LockError, TimeoutError):
    """It was not free within the time that the caller gave it. Nothing is held, and no place in the queue."""

    def __init__(self, what: str, timeout: float) -> None:
        self.what = what
        self.timeout = timeout
        super().__init__(f"{what} was not free within {timeout:g} s; who holds it is told by inspect()")


class LockLost(LockError):
    """The lease ended while it was held: somebody else may hold it by now."""

    def __init__(self, what: str, fence: int, reason: str) -> None:
        self.what = what
        self.fence = fence
        self.reason = reason
        super().__init__(
            f"{what} (fence {fence}) was lost: {reason}. What was done since may have been done beside somebody else; "
            "check the fence where it is written (hold.guard), or undo it"
        )
        self._message, self.args = str(self), (what, fence, reason)


class LockUnavailable(LockError):
    """Nobody knows whether it is free, because Redis does not answer. It was not taken."""

    def __init__(self, what: str, address: str, cause: BaseException, *, refused: bool = False) -> None:
        self.what = what
        self.address = address
        super().__init__(
            f"{what} was not taken: Redis at {address} {'refused' if refused else 'did not answer'} "
            f"({type(cause).__name__}: {cause}). Nothing runs without the lock; "
            f"{'see what it says' if refused else 'try again when Redis is back'}"
        )


class LockReentered(LockError, RuntimeError):
    """A thread waits for what it holds itself, and would wait for ever."""

    def __init__(self, what: str, by_task: bool = False) -> None:
        self.what = what
        self.by_task = by_task
        super().__init__(
            f"{what} is held by the task that runs here, by its own gate, and it would wait for itself; "
            "do not take it again: self.admission.hold is that hold"
            if by_task
            else f"{what} is held by this very thread, which would wait for itself; make it reentrant=True"
        )
        self._message, self.args = str(self), (what, by_task)


class NotReplicated(LockError):
    """Too few replicas have confirmed the hold. It was given back."""

    def __init__(self, what: str, wanted: int, confirmed: int) -> None:
        self.what = what
        self.wanted = wanted
        self.confirmed = confirmed
        super().__init__(f"{what}: {confirmed} of {wanted} replicas have confirmed it in time; it was given back")


class PermitsExceeded(LockError, ValueError):
    """More permits were asked for than there are: it could never be granted."""

    def __init__(self, what: str, wanted: int) -> None:
        self.what = what
        self.wanted = wanted
        super().__init__(
            f"{what} has fewer than {wanted} permits: this could never be granted; ask for less, or resize it"
        )


class StaleFence(LockError):
    """A later hold has been here: what this one was about to write is out of date. Nothing was written."""

    def __init__(self, what: str, fence: int) -> None:
        self.what = what
        self.fence = fence
        super().__init__(f"{what}: fence {fence} is out of date, a later holder was here; nothing was written")


class BarrierError(CoordinationError):
    """Root of what goes wrong at barriers."""


class BarrierTimeout(BarrierError, TimeoutError):
    """Too few arrived within the time that the caller gave it. The caller does not count any more."""

    def __init__(self, what: str, timeout: float, parties: int) -> None:
        self.what = what
        self.timeout = timeout
        self.parties = parties
        super().__init__(
            f"{what}: not all of {parties} parties were there within {timeout:g} s; this one has left, and the others "
            "wait on"
        )


class BarrierUnavailable(BarrierError):
    """Nobody knows who has arrived, because Redis does not answer."""

    def __init__(self, what: str, address: str, cause: BaseException) -> None:
        self.what = what
        self.address = address
        super().__init__(
            f"{what}: Redis at {address} did not answer ({type(cause).__name__}: {cause}). The barrier was not passed; "
            "wait again when Redis is back"
        )


class PartiesDisagree(BarrierError, ValueError):
    """Those who wait already wait for another number of parties."""

    def __init__(self, what: str, parties: int, others: int) -> None:
        self.what = what
        self.parties = parties
        self.others = others
        super().__init__(
            f"{what}: this process waits for {parties} parties, those who are there wait for {others}; "
            "give all of them the same number"
        )


class TaskError(CoordinationError):
    """Root of what goes wrong with the gates of tasks. A result backend rebuilds it of its facts."""

    def __init__(self, message: str, *facts: object) -> None:
        self._message = message
        super().__init__(*facts)

    def __str__(self) -> str:
        return self._message


class DuplicateTask(TaskError):
    """Another call that counts as the same has been sent, or runs."""

    def __init__(self, task: str, what: str, other: str = "") -> None:
        self.task = task
        self.what = what
        self.other = other
        by = f" by {other}" if other else ""
        message = f"{task}: {what} is taken{by}; on_conflict= says what becomes of another call"
        super().__init__(message, task, what, other)


class TooManyParked(TaskError):
    """So many tasks wait at a gate already that one more was turned away."""

    def __init__(self, task: str, gate: str, most: int) -> None:
        self.task = task
        self.gate = gate
        self.most = most
        super().__init__(
            f"{task}: {most} wait at {gate}, which is max_parked; send it again later, or choose another when_full=",
            task,
            gate,
            most,
        )


class TaskRefused(TaskError):
    """A task that runs where it was called (eager, or by a direct call) was not admitted in time."""

    def __init__(self, task: str, gate: str, waited: float) -> None:
        self.task = task
        self.gate = gate
        self.waited = waited
        message = f"{task}: {gate} did not admit it within {waited:g} s; a worker would park it and go on"
        super().__init__(message, task, gate, waited)


class RateLimited(TaskError):
    """Raised by a task that was told to come again later: it is parked, and so are all that want the same.

    >>> if answer.status == 429:
    ...     raise RateLimited(float(answer.headers["Retry-After"]))

    Arguments:
        after: in how many seconds, or another duration.
        key: the key of the rate that is meant, as the task declares it, such as ``"{tenant}"``. Default: of the rates
            that the arguments tell apart all, or else those of the whole task. One that no rate has pauses nothing, and
            is logged.
    """

    def __init__(self, after: Duration, key: str | None = None) -> None:
        self.after_ms = max(1, milliseconds(after, "after", zero_allowed=True))
        self.key = key
        super().__init__(f"come again in {self.after_ms / 1_000:g} s", self.after_ms / 1_000, key)
