"""What may be said of a task's memo: as ``memo_...`` attributes of its class, checked once. Pure.

The attributes are the one way in: ``@memoized_task`` turns its arguments into them. So a base class, the decorator and
``task_annotations`` mean the same, and a misspelt one is refused where the task is declared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from celery.exceptions import SoftTimeLimitExceeded, TaskPredicate

from ..cachelib import Cache
from ..cachelib.durations import Duration, milliseconds
from ..cachelib.policy import Policy

PREFIX = "memo_"
NO_RESULTS = (TaskPredicate, SoftTimeLimitExceeded)
"""What a task raises that is neither its result nor its failure: a retry, an ignored run, the end of its time."""

_METHODS = ("memo_stats",)
_NOT_ASKED_FOR_ALONE = ("memo_cache",)  # a base class may name the cache of all tasks without memoizing all of them


@dataclass(frozen=True, slots=True)
class MemoOptions:
    """The options of one task, checked.

    Arguments:
        cache: where results are kept; None: one for the app, made on first use.
        key: a template; None: all arguments.
        failures: which exceptions are remembered, and for how long.
        policy: those of the cache's own options that the task says something of.
    """

    cache: Cache | None = None
    key: str | None = None
    tags: tuple[str, ...] = ()
    version: str = ""
    failures: Mapping[type[Exception], Duration] = field(default_factory=dict)
    short_circuit: bool = False
    policy: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def checked(
        cls,
        *,
        cache: Cache | None = None,
        key: str | None = None,
        ttl: Duration | Callable[[Any], Duration] | None = None,
        stale: Duration = 0,
        early: float | Literal["xfetch"] | None = None,
        failures: Mapping[type[Exception], Duration] | None = None,
        tags: Sequence[str] = (),
        version: str | int = "",
        short_circuit: bool = False,
    ) -> "MemoOptions":
        """Options as they were given. Raises ``ValueError`` or ``TypeError`` for one that cannot be meant."""
        if cache is not None and not isinstance(cache, Cache):
            raise TypeError(f"memo_cache must be a Cache, not a {type(cache).__name__}")
        if key is not None and not isinstance(key, str):
            raise TypeError(f"memo_key must be a template such as '{{region}}', not {key!r}")
        if isinstance(tags, str):
            raise TypeError(f"memo_tags must be several, such as [{tags!r}], not the text {tags!r}")
        if type(version) not in (str, int):
            raise TypeError(f"memo_version must be text or a number, not {version!r}")
        if type(short_circuit) is not bool:
            raise TypeError(f"memo_short_circuit must be True or False, not {short_circuit!r}")
        policy: dict[str, Any] = {"stale": stale}
        policy |= {name: given for name, given in (("ttl", ttl), ("early", early)) if given is not None}
        Policy().changed(policy)
        if short_circuit and early is not None and (early == "xfetch" or callable(ttl) or ttl is None):
            raise ValueError(
                f"short_circuit with early={early!r}: where a task is sent it is not known how long it ran; give early "
                "as a share of the ttl, such as 0.8, and a ttl that is a duration"
            )
        return cls(cache, key, tuple(tags), str(version), _failures(failures or {}), short_circuit, policy)

    @classmethod
    def of(cls, task: type) -> "MemoOptions | None":
        """The options that a task's class has; None for one that is not memoized."""
        said = {name: getattr(task, name) for name in dir(task) if name.startswith(PREFIX) and name not in _METHODS}
        on = said.pop("memo_on", None)
        unknown = [name for name in said if name.removeprefix(PREFIX) not in DEFAULTS]
        if unknown:
            near = get_close_matches(unknown[0], [PREFIX + name for name in DEFAULTS], n=1)
            known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PREFIX + name for name in DEFAULTS)}"
            raise TypeError(f"unknown option {unknown[0]!r} of {task.__name__}; {known}")
        given = {name: value for name, value in said.items() if value is not DEFAULTS[name.removeprefix(PREFIX)]}
        if on is False or (on is None and not given.keys() - set(_NOT_ASKED_FOR_ALONE)):
            return None
        return cls.checked(**{name.removeprefix(PREFIX): value for name, value in given.items()})


DEFAULTS: Mapping[str, Any] = dict(MemoOptions.checked.__func__.__kwdefaults__)  # type: ignore[attr-defined]


def _failures(failures: Mapping[type[Exception], Duration]) -> Mapping[type[Exception], Duration]:
    if not isinstance(failures, Mapping):
        raise TypeError(f"memo_failures must say for how long: {{NotFound: '10s'}}, not {failures!r}")
    for kind, ttl in failures.items():
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise TypeError(f"memo_failures must name classes of exceptions, not {kind!r}")
        if issubclass(kind, NO_RESULTS):
            raise ValueError(f"memo_failures names {kind.__name__}, which is no failure of the task; leave it out")
        milliseconds(ttl, f"memo_failures[{kind.__name__}]")
    return dict(failures)
