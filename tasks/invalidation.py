"""``invalidate_on_commit``: what a session changed is invalidated once it has committed, by a Celery task.

Before the commit is too early (a reader would cache the old row again), in the web process alone is too
little (Redis may be away at that moment). So the keys and tags are collected while the session flushes, sent
to a task after the commit, and the task tries until Redis has them.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any
from weakref import WeakKeyDictionary, ref

from celery import Celery, Task
from sqlalchemy import event, inspect
from sqlalchemy.orm import Session, SessionTransaction, object_session, scoped_session, sessionmaker

from ..cachelib.cache import Cache
from ..cachelib.counters import SharedCounters
from ..cachelib.errors import ServerUnavailable
from . import wiring

logger = logging.getLogger(__name__)

_BATCH = 500  # keys and tags per task: a message of a bulk change stays small

SessionSource = type[Session] | sessionmaker[Any] | scoped_session[Any] | Session
Rules = Mapping[type, str | Sequence[str]]


def add_invalidation_task(cache: Cache, app: Celery | None) -> Task:
    """The task ``petiole.invalidate.<namespace>`` of a cache: ``task.delay(keys=[...], tags=[...])``.

    Tries again, at growing distances of up to a minute and without end, while Redis does not answer.
    """
    tasks = _tasks.setdefault(app or _EVERY_APP, {})
    known = tasks.get(cache.namespace)
    if known is not None:
        address, task = known
        if address != cache.redis.address:
            raise ValueError(
                f"namespace {cache.namespace!r} is invalidated at {address} already, not at {cache.redis.address}; "
                "give the caches different namespaces"
            )
        return task
    counters = SharedCounters(cache.redis, "cache", cache.namespace)

    def invalidate(keys: Sequence[str] = (), tags: Sequence[str] = ()) -> dict[str, int]:
        removed = cache.invalidate(keys=keys, tags=tags, strict=True)  # or the task tries again
        counters.add(invalidations=len(keys) + len(tags), removed=removed)
        return {"keys": len(keys), "tags": len(tags), "removed": removed}

    name = wiring.checked_name(cache.namespace, "namespace")
    task = wiring.add_task(
        app,
        f"petiole.invalidate.{name}",
        invalidate,
        ignore_result=True,
        acks_late=True,  # twice is harmless, never is not
        autoretry_for=(ServerUnavailable,),
        max_retries=None,
        retry_backoff=True,
        retry_backoff_max=60,
    )
    tasks[cache.namespace] = (cache.redis.address, task)
    return task


class _EveryApp:
    """Stands for all apps, where none is named."""


_EVERY_APP = _EveryApp()
_tasks: "WeakKeyDictionary[Any, dict[str, tuple[str, Task]]]" = WeakKeyDictionary()


@dataclass(slots=True)
class _Changes:
    """What one transaction has changed so far. Dicts, because they keep an order and no doubles."""

    keys: dict[str, None] = field(default_factory=dict)
    tags: dict[str, None] = field(default_factory=dict)


class CommitInvalidation:
    """Watches sessions and invalidates after their commits. Made by ``invalidate_on_commit``."""

    def __init__(self, cache: Cache, keys: Rules, tags: Rules, app: Celery | None) -> None:
        self.cache = cache
        self.task = add_invalidation_task(cache, app)
        self._rules = {
            model: (_templates(keys.get(model, ()), model), _templates(tags.get(model, ()), model))
            for model in {**keys, **tags}
        }
        self._changes: WeakKeyDictionary[Session, _Changes] = WeakKeyDictionary()

    def __repr__(self) -> str:
        models = ", ".join(sorted(model.__name__ for model in self._rules))
        return f"<CommitInvalidation of {self.cache.namespace!r} [{models}]>"

    def add(self, session: Session, *, keys: Iterable[str] = (), tags: Iterable[str] = ()) -> None:
        """Invalidate more once this session commits: for what the ORM does not see, such as bulk updates."""
        changes = self._changes.setdefault(session, _Changes())
        changes.keys.update(dict.fromkeys(keys))
        changes.tags.update(dict.fromkeys(tags))

    def watch(self, source: SessionSource) -> None:
        """Follow the sessions of a source."""
        is_ours = _membership(source)
        event.listen(source, "after_commit", self._after_commit)  # first: what is no source is refused here
        event.listen(source, "after_transaction_end", self._after_transaction_end)

        def note(_mapper: object, _connection: object, instance: object) -> None:
            session = object_session(instance)
            if session is not None and is_ours(session):
                self._note(session, instance)

        for model, (keys, tags) in self._rules.items():
            # For each row that a flush writes: also those that it finds by itself, such as orphans, and with the
            # columns that it fills itself, such as foreign keys.
            event.listen(model, "after_insert", note, propagate=True)
            event.listen(model, "after_update", note, propagate=True)
            event.listen(model, "before_delete", note, propagate=True)
            for column in {name for template in (*keys, *tags) for name in _columns_in(template)}:
                # A column that is set without having been read would not know what it was before.
                event.listen(getattr(model, column), "set", _ignore, active_history=True, propagate=True)

    def _note(self, session: Session, instance: object) -> None:
        for model, (keys, tags) in self._rules.items():
            if isinstance(instance, model):
                for columns in (_Columns(instance), _FormerColumns(instance)):
                    self.add(
                        session,
                        keys=[template.format_map(columns) for template in keys],
                        tags=[template.format_map(columns) for template in tags],
                    )

    def _after_commit(self, session: Session) -> None:
        if session.in_nested_transaction():
            return  # a savepoint; the transaction around it may still be rolled back
        changes = self._changes.pop(session, None)
        if changes is None:
            return
        keys, tags = list(changes.keys), list(changes.tags)
        for start in range(0, max(len(keys), len(tags)), _BATCH):
            self._send(keys[start : start + _BATCH], tags[start : start + _BATCH])

    def _after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        # Rolled back, or closed: nothing of it is true. (After a savepoint's rollback its changes are kept, and
        # invalidated with the rest: needless, harmless.)
        if transaction.parent is None:
            self._changes.pop(session, None)

    def _send(self, keys: list[str], tags: list[str]) -> None:
        try:
            wiring.send_at_once(self.task, keywords={"keys": keys, "tags": tags})
        except Exception as error:  # noqa: BLE001 - whatever it was: the data is committed, and the cache is not told
            logger.warning("the broker did not take an invalidation (%s); it is done here instead", error)
            self.cache.invalidate(keys=keys, tags=tags, strict=False)  # what Redis does not take is remembered


def invalidate_on_commit(
    source: SessionSource,
    cache: Cache,
    *,
    keys: Rules | None = None,
    tags: Rules | None = None,
    app: Celery | None = None,
) -> CommitInvalidation:
    """Invalidate what sessions change, after they have committed, through a Celery task.

    >>> invalidate_on_commit(Session, cache, keys={User: "user:{id}"}, tags={Post: ["author:{author_id}"]})

    A key or tag is filled from the columns of the changed object; where a column changed, both with the old and
    with the new value. Nothing is sent for a transaction that is rolled back.

    Promises: once the broker has taken the task, the invalidation is tried until Redis has it; when the broker
    does not, it is done in this process, which remembers what Redis does not take.

    Non-promises: between the commit and the task, readers may still get the old value. What goes past the ORM
    (``session.execute(update(...))``, raw SQL, other programs) is not seen: name it with ``add``. A process that
    dies between the commit and the sending invalidates nothing: bounded by the TTL.

    Arguments:
        source: a ``sessionmaker``, ``scoped_session``, ``Session`` class or one session.
        cache: what to invalidate in.
        keys, tags: per model, text with its columns in braces, or several.
        app: the Celery app; without one, as ``shared_task``.

    Raises ``ValueError`` at once for text that names what is no column of the model.
    """
    if not keys and not tags:
        raise ValueError("name keys or tags: without them nothing would ever be invalidated")
    watcher = CommitInvalidation(cache, keys or {}, tags or {}, app)
    watcher.watch(source)
    return watcher


def _templates(given: str | Sequence[str], model: type) -> tuple[str, ...]:
    templates = (given,) if isinstance(given, str) else tuple(given)
    known: list[str] = inspect(model).column_attrs.keys()
    for template in templates:
        try:
            strangers = [name for name in _columns_in(template) if name not in known]
        except ValueError as error:
            strangers = [str(error)]
        if strangers:
            raise ValueError(
                f"{template!r} names {strangers[0]!r}, which is no column of {model.__name__}; "
                f"it has {', '.join(known)}"
            )
    return templates


def _columns_in(template: str) -> list[str]:
    """The names in the braces of a template. Raises ``ValueError`` for one that cannot be read."""
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]


def _membership(source: SessionSource) -> Callable[[Session], bool]:
    """Whether a session is one of a source."""
    if isinstance(source, Session):
        watched = ref(source)  # the listeners outlive the session
        return lambda session: session is watched()
    made_by = source.session_factory if isinstance(source, scoped_session) else source
    kind = made_by.class_ if isinstance(made_by, sessionmaker) else made_by
    return lambda session: isinstance(session, kind)


def _ignore(*_: object) -> None:
    """A listener that is there only so that old values are kept."""


class _Columns(dict[str, Any]):
    """The columns of an object as they are. Only those that a template names are looked at."""

    def __init__(self, instance: object) -> None:
        self._instance = instance

    def __missing__(self, name: str) -> Any:
        return getattr(self._instance, name)


class _FormerColumns(_Columns):
    """The columns of an object as they were before this flush."""

    def __missing__(self, name: str) -> Any:
        state = inspect(self._instance)
        if state is None or not state.persistent:
            return getattr(self._instance, name)
        former = state.attrs[name].load_history().deleted
        return former[0] if former else getattr(self._instance, name)
