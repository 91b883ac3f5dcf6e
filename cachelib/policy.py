"""How values of a cache are loaded and kept: the options of ``get_or_set``, ``@cached`` and ``Cache``, checked once.
Pure."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Generic, Literal, Protocol, TypedDict, TypeVar

from .durations import Duration, milliseconds

T = TypeVar("T")
XFETCH: Literal["xfetch"] = "xfetch"


class Refresher(Protocol):
    """Runs refreshes elsewhere, such as in a Celery worker."""

    def __call__(self, refresh: "Refresh") -> bool:
        """Take over a refresh; False when it cannot, and the cache sees to it itself."""


@dataclass(frozen=True, slots=True)
class Refresh:
    """A load that is due and may run elsewhere. Its lease is taken already.

    Whoever runs it calls ``CachedFunction.refresh_call(arguments, keywords, token=token)`` before the lease runs out;
    later, the load is somebody else's, and the call does nothing.
    """

    key: str
    token: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


class Options(TypedDict, total=False):
    """What may be said of how values are loaded and kept; in ``Cache`` for all of them, in a call for this one.

    ttl: how long a value is fresh (its soft TTL): seconds, ``timedelta``, "5m", or a function of the value.
    stale: how long after that it may still be served while somebody loads a new one. Default: not at all.
    negative_ttl: the TTL of ``None``, where it is to be another: what is not there may soon be.
    exceptions: which exceptions of the loader are cached, and for how long: ``{NotFound: 30}``. Reading raises them.
    when: only values for which this is true are cached.
    early: refresh before the TTL is over: a number such as 0.8, once that share of it has passed; or "xfetch", by
        chance, the sooner the longer the load takes (Vattani, Chierichetti, Lowenstein, VLDB 2015).
    refresh: where stale values, and fresh ones that are refreshed early, are loaded anew: "inline", the caller who
        notices waits for it; "thread", it is served what there is and a thread loads; or a ``Refresher``.
    retry_after: after a loader has failed and a stale value was served, how long until it is asked again. Default: 5 s.
    soft_timeout: how long to wait for the loader when there is a stale value to serve; the load goes on.
    hard_timeout: how long to wait for the loader at all; then ``LoadTimedOut`` is raised, and others may load.
    wait: how long to wait for another's load; then this caller loads for itself, and what it loads is not stored.
        Default: four leases.
    type: what the value is: a dataclass, msgspec struct, pydantic model, ``set[int]``, ``Decimal`` ... It is restored
        as that; without it as what MessagePack has (lists, dicts, text).
    """

    ttl: Duration | Callable[[Any], Duration] | None
    stale: Duration | None
    negative_ttl: Duration | None
    exceptions: Mapping[type[Exception], Duration]
    when: Callable[[Any], bool] | None
    early: float | Literal["xfetch"] | None
    refresh: Literal["inline", "thread"] | Refresher
    retry_after: Duration
    soft_timeout: Duration | None
    hard_timeout: Duration | None
    wait: Duration | None
    type: Any


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """What a loader returns to say more than the value.

    >>> def load_user():
    ...     row = ...
    ...     return Loaded(row, ttl="1h" if row.settled else 10, tags=[f"team:{row.team_id}"])

    Arguments:
        ttl, stale: of this value; instead of those of the call.
        tags: besides those of the call. A value is not stored when one of them was invalidated while it was loaded.
        store: False: do not cache it.
    """

    value: T
    ttl: Duration | None = None
    stale: Duration | None = None
    tags: tuple[str, ...] | list[str] = ()
    store: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.tags, str):
            raise TypeError(f"tags must be several, such as [{self.tags!r}], not the text {self.tags!r}")


@dataclass(frozen=True, slots=True)
class Policy:
    """Options, checked, in milliseconds."""

    ttl_ms: int = 300_000
    ttl_of: Callable[[Any], Duration] | None = None
    stale_ms: int = 0
    negative_ttl_ms: int | None = None
    exceptions: tuple[tuple[type[Exception], int], ...] = ()
    when: Callable[[Any], bool] | None = None
    early: float | Literal["xfetch"] | None = None
    refresh: Literal["inline", "thread"] | Refresher = "inline"
    retry_after_ms: int = 5_000
    soft_timeout_ms: int | None = None
    hard_timeout_ms: int | None = None
    wait_ms: int | None = None
    type: Any = Any

    def changed(self, options: Mapping[str, Any]) -> "Policy":
        """With some options of their own. Raises ``TypeError`` and ``ValueError``, naming the option."""
        changes: dict[str, Any] = {}
        for name, value in options.items():
            checked = _CHECKS.get(name)
            if checked is None:
                near = get_close_matches(name, _CHECKS, n=1)
                raise TypeError(
                    f"unknown option {name!r}"
                    + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(_CHECKS)}")
                )
            changes |= checked(value)
        return replace(self, **changes)

    def ttls_ms(self, value: object) -> tuple[int, int]:
        """For how long a value is fresh, and for how long after that it may be served."""
        if value is None and self.negative_ttl_ms is not None:
            return self.negative_ttl_ms, 0
        if self.ttl_of is not None:
            return milliseconds(self.ttl_of(value), "ttl"), self.stale_ms
        return self.ttl_ms, self.stale_ms

    def exception_ttl_ms(self, error: BaseException) -> int | None:
        """For how long an exception is cached; None for one that is not."""
        return next((ttl_ms for kind, ttl_ms in self.exceptions if isinstance(error, kind)), None)


def early_due(
    early: float | Literal["xfetch"], *, fresh_left_ms: int, ttl_ms: int, load_ms: int, chance: float
) -> bool:
    """Whether a fresh value is to be refreshed now.

    Arguments:
        fresh_left_ms: how much longer it stays fresh.
        ttl_ms: how long it was to be.
        load_ms: what it cost to load.
        chance: uniform in [0, 1); matters to "xfetch" alone.
    """
    if early == XFETCH:
        return -load_ms * math.log(1.0 - chance) >= fresh_left_ms
    return fresh_left_ms <= ttl_ms * (1.0 - early)


def longest_early_ms(early: float | Literal["xfetch"] | None, *, ttl_ms: int, load_ms: int) -> int:
    """How long before a value is stale it may have to be refreshed; by "xfetch" seldom longer than this."""
    if early is None:
        return 0
    return 3 * load_ms if early == XFETCH else int(ttl_ms * (1.0 - early))


def _duration(name: str, field: str, *, zero_allowed: bool = False, optional: bool = False) -> Callable[[Any], Any]:
    def check(value: Any) -> dict[str, Any]:
        if value is None and optional:
            return {field: None}
        return {field: milliseconds(value, name, zero_allowed=zero_allowed)}

    return check


def _ttl(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if callable(value):
        return {"ttl_of": value}
    return {"ttl_ms": milliseconds(value, "ttl"), "ttl_of": None}


def _exceptions(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"exceptions must say for how long: {{NotFound: 30}}, not {value!r}")
    for kind in value:
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise TypeError(f"exceptions must name classes of exceptions, not {kind!r}")
    return {"exceptions": tuple((kind, milliseconds(ttl, "exceptions")) for kind, ttl in value.items())}


def _early(value: Any) -> dict[str, Any]:
    if value is None or value == XFETCH:
        return {"early": value}
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(f'early={value!r} must be a share of the TTL between 0 and 1, such as 0.8, or "xfetch"')
    return {"early": float(value)}


def _refresh(value: Any) -> dict[str, Any]:
    if value not in ("inline", "thread") and not callable(value):
        raise ValueError(f'refresh={value!r} must be "inline", "thread" or a Refresher')
    return {"refresh": value}


def _when(value: Any) -> dict[str, Any]:
    if value is not None and not callable(value):
        raise TypeError(f"when must be a function of the value, not {value!r}")
    return {"when": value}


_CHECKS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "ttl": _ttl,
    "stale": lambda value: {} if value is None else {"stale_ms": milliseconds(value, "stale", zero_allowed=True)},
    "negative_ttl": _duration("negative_ttl", "negative_ttl_ms", optional=True),
    "exceptions": _exceptions,
    "when": _when,
    "early": _early,
    "refresh": _refresh,
    "retry_after": _duration("retry_after", "retry_after_ms", zero_allowed=True),
    "soft_timeout": _duration("soft_timeout", "soft_timeout_ms", optional=True),
    "hard_timeout": _duration("hard_timeout", "hard_timeout_ms", optional=True),
    "wait": _duration("wait", "wait_ms", zero_allowed=True, optional=True),
    "type": lambda value: {"type": value},
}


class Policies:
    """The policies of one cache: its own, and those of calls that say otherwise, each checked once.

    Arguments:
        check_type: raises ``TypeError`` for a type that no value could be restored as.
    """

    _MOST = 256

    def __init__(self, default: Policy, check_type: Callable[[Any], None]) -> None:
        self._check_type = check_type
        self.default = self._checked(default)
        self._known: dict[Any, Policy] = {}

    def of(self, options: Mapping[str, Any]) -> Policy:
        """The policy of a call."""
        if not options:
            return self.default
        # With the types: True and 1 are the same key, but only one of them is a duration.
        try:
            key = tuple([(name, value, type(value)) for name, value in options.items()])
            known = self._known.get(key)
        except TypeError:  # what cannot be looked up, such as a dict
            return self._checked(self.default.changed(options))
        if known is None:
            known = self._checked(self.default.changed(options))
            if any(callable(value) and not isinstance(value, type) for value in options.values()):
                return known  # a function that is made for each call must not live on here, with all that it holds
            if len(self._known) >= self._MOST:
                self._known.clear()
            self._known[key] = known
        return known

    def _checked(self, policy: Policy) -> Policy:
        if policy.type is not Any:
            self._check_type(policy.type)
        return policy
