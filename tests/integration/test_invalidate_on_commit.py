"""``invalidate_on_commit``: what a session changed is invalidated when it has committed, and never otherwise."""

import logging
import socket
import subprocess
import time
from collections.abc import Callable
from queue import Queue
from threading import Event
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery, signals
from celery.worker import WorkController
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, scoped_session, sessionmaker

from petiole import Cache, connect, invalidate_on_commit
from petiole.cachelib import Connections, EmbeddedServer, Settings
from petiole.cachelib.counters import SharedCounters
from petiole.cachelib.embedded import find_program
from petiole.tasks import invalidation as module
from petiole.tasks.invalidation import CommitInvalidation

PATIENCE_S = 20.0
NOBODY = "redis://127.0.0.1:1/0"  # nothing listens there
NO_BROKER = {"broker_url": NOBODY, "broker_transport_options": {"max_retries": 0}}  # and the test does not wait for it

any_database = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # where its kind plays no part


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    posts: Mapped[list["Post"]] = relationship(back_populates="author")
    notes: Mapped[list["Note"]] = relationship(cascade="all, delete-orphan")


class Post(Base):
    __tablename__ = "post"

    id: Mapped[int] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(unique=True)
    views: Mapped[int] = mapped_column(default=0)
    author_id: Mapped[int | None] = mapped_column(sa.ForeignKey("author.id"))
    author: Mapped[Author | None] = relationship(back_populates="posts")


class Note(Base):
    """A part of an author, without a way back."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int | None] = mapped_column(sa.ForeignKey("author.id"))


RULES: dict[str, Any] = {
    "keys": {Post: ["post:{id}", "slug:{slug}"], Author: "author:{id}", Note: "note:{id}"},
    "tags": {Post: "author:{author_id}", Note: "notes-of:{author_id}"},
}


Told = Callable[[], tuple[set[str], set[str]]]
NOTHING: tuple[set[str], set[str]] = (set(), set())


@pytest.fixture
def tables(engine: sa.Engine) -> sa.Engine:
    """The database with two authors and three posts, and nothing of it watched yet."""
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add_all([Author(id=1, name="Ann"), Author(id=2, name="Bob")])
        session.flush()
        session.add_all([Post(id=n, slug=f"post-{n}", author_id=1) for n in (1, 2, 3)])
        session.add(Note(id=1, author_id=1))
    return engine


@pytest.fixture
def make_session(tables: sa.Engine) -> sessionmaker[Session]:
    """Sessions on it. A maker of its own for each test, so that no test watches another's."""
    return sessionmaker(tables)


@pytest.fixture
def watcher(make_session: sessionmaker[Session], cache: Cache, app: Celery) -> CommitInvalidation:
    """What watches them, and sends to a queue that nobody empties but the test."""
    return invalidate_on_commit(make_session, cache, app=app, **RULES)


@pytest.fixture
def told(watcher: CommitInvalidation, app: Celery, sent: Callable[[Celery], list[dict[str, Any]]]) -> Told:
    """The keys and tags that were sent for invalidation since the last look."""

    def take() -> tuple[set[str], set[str]]:
        messages = sent(app)
        return {key for m in messages for key in m["keys"]}, {tag for m in messages for tag in m["tags"]}

    return take


def test_a_changed_row_is_told_after_the_commit(make_session: sessionmaker[Session], told: Told) -> None:
    """Nothing is sent while the transaction runs; its keys and tags are when it has committed."""
    with make_session() as session:
        session.get(Post, 1).views = 7  # type: ignore[union-attr]
        session.flush()
        before = told()
        session.commit()

    assert before == NOTHING
    assert told() == ({"post:1", "slug:post-1"}, {"author:1"})


def test_a_new_row_is_told_with_the_key_that_the_database_gave_it(
    make_session: sessionmaker[Session], told: Told
) -> None:
    """A key that the database chooses is known after the flush."""
    with make_session() as session:
        post = Post(slug="fresh", author_id=2)
        if session.get_bind().dialect.name == "postgresql":
            session.execute(sa.text("SELECT setval('post_id_seq', 100)"))
        session.add(post)
        session.commit()
        number = post.id

    assert number
    assert told() == ({f"post:{number}", "slug:fresh"}, {"author:2"})


def test_a_deleted_row_is_told(make_session: sessionmaker[Session], told: Told) -> None:
    """Its columns are read before it is gone."""
    with make_session() as session:
        session.delete(session.get(Post, 2))
        session.commit()

    assert told() == ({"post:2", "slug:post-2"}, {"author:1"})


def test_a_changed_column_is_told_with_its_old_and_its_new_value(
    make_session: sessionmaker[Session], told: Told
) -> None:
    """What was cached under the old value is as wrong as what is cached under the new one."""
    with make_session() as session:
        post = session.get(Post, 1)
        assert post
        post.slug, post.author_id = "renamed", 2
        session.commit()

    assert told() == ({"post:1", "slug:post-1", "slug:renamed"}, {"author:1", "author:2"})


def test_an_old_value_that_was_not_loaded_is_told(make_session: sessionmaker[Session], told: Told) -> None:
    """An attribute that is set without having been read, as after every commit, is looked up first."""
    with make_session() as session:
        post = session.get(Post, 1)
        assert post
        session.commit()  # expires everything
        post.slug = "renamed"
        session.commit()

    assert told()[0] == {"post:1", "slug:post-1", "slug:renamed"}


def test_expired_attributes_are_read(make_session: sessionmaker[Session], told: Told) -> None:
    """Columns that a template names and that are not loaded are loaded before the flush."""
    with make_session() as session:
        post = session.get(Post, 1)
        assert post
        session.commit()  # expires everything
        post.views = 7
        session.delete(session.get(Post, 2))
        session.commit()

    assert told() == ({"post:1", "slug:post-1", "post:2", "slug:post-2"}, {"author:1"})


def test_every_flush_of_a_transaction_counts(make_session: sessionmaker[Session], told: Told) -> None:
    """What was flushed early is told with the rest, each key once."""
    with make_session() as session:
        post = session.get(Post, 1)
        assert post
        for slug in ("a", "b", "c"):
            post.slug = slug
            session.flush()
        session.commit()

    assert told()[0] == {"post:1", "slug:post-1", "slug:a", "slug:b", "slug:c"}


def test_a_row_that_was_only_read_is_not_told(make_session: sessionmaker[Session], told: Told) -> None:
    """Reading invalidates nothing."""
    with make_session() as session:
        session.get(Post, 1)
        session.commit()

    assert told() == NOTHING


def test_another_author_through_the_relationship_is_told(make_session: sessionmaker[Session], told: Told) -> None:
    """``post.author = other`` changes the column author_id: old and new are told, as if it had been set itself."""
    with make_session() as session:
        post, bob = session.get(Post, 1), session.get(Author, 2)
        assert post
        post.author = bob
        session.commit()

    assert told()[1] == {"author:1", "author:2"}


def test_a_member_that_moved_to_another_collection_is_told(make_session: sessionmaker[Session], told: Told) -> None:
    """``author.posts.append(post)`` changes a column of the post."""
    with make_session() as session:
        post, bob = session.get(Post, 1), session.get(Author, 2)
        assert post
        assert bob
        bob.posts.append(post)
        session.commit()

    assert told()[1] == {"author:1", "author:2"}


def test_a_part_that_was_added_through_a_collection_is_told(make_session: sessionmaker[Session], told: Told) -> None:
    """A new part knows whose it is only after the flush."""
    with make_session() as session:
        bob = session.get(Author, 2)
        assert bob
        bob.notes.append(Note(id=7))
        session.commit()
    keys, tags = told()

    assert "note:7" in keys
    assert "notes-of:2" in tags


def test_an_orphan_that_the_flush_deletes_is_told(make_session: sessionmaker[Session], told: Told) -> None:
    """A part that is taken out of its whole is deleted by the flush: its row is gone, so its key is told."""
    with make_session() as session:
        ann = session.get(Author, 1)
        assert ann
        ann.notes.clear()
        session.commit()
        left = session.scalars(sa.select(Note)).all()
    keys, tags = told()

    assert left == []
    assert "note:1" in keys
    assert "notes-of:1" in tags


def test_parts_that_are_deleted_with_their_whole_are_told(make_session: sessionmaker[Session], told: Told) -> None:
    """A delete that cascades in the ORM names every row."""
    with make_session() as session:
        session.execute(sa.update(Post).values(author_id=None))
        session.delete(session.get(Author, 1))
        session.commit()
    keys, _ = told()

    assert {"author:1", "note:1"} <= keys


def test_a_rollback_tells_nothing(make_session: sessionmaker[Session], told: Told) -> None:
    """Neither at once, nor with the next commit of the session."""
    with make_session() as session:
        session.get(Post, 1).views = 7  # type: ignore[union-attr]
        session.flush()
        session.rollback()
        session.get(Post, 2).views = 7  # type: ignore[union-attr]
        session.commit()

    assert told() == ({"post:2", "slug:post-2"}, {"author:1"})


def test_a_session_that_is_closed_without_a_commit_tells_nothing(
    make_session: sessionmaker[Session], told: Told
) -> None:
    """To close rolls back: what was flushed is not told with the session's next commit either."""
    session = make_session()
    session.get(Post, 1).views = 7  # type: ignore[union-attr]
    session.flush()
    session.close()
    session.get(Post, 2).views = 7  # type: ignore[union-attr]
    session.commit()
    session.close()

    assert told() == ({"post:2", "slug:post-2"}, {"author:1"})


def test_a_commit_that_fails_tells_nothing(make_session: sessionmaker[Session], told: Told) -> None:
    """A flush that the database refuses rolls all of it back."""
    with make_session() as session:
        session.get(Post, 1).views = 7  # type: ignore[union-attr]
        session.flush()
        session.add(Post(id=50, slug="post-2"))
        with pytest.raises(sa.exc.IntegrityError):
            session.commit()
        session.rollback()
        session.commit()

    assert told() == NOTHING


def test_a_savepoint_that_is_released_tells_nothing_yet(make_session: sessionmaker[Session], told: Told) -> None:
    """The transaction around it decides."""
    with make_session() as session:
        with session.begin_nested():
            session.get(Post, 1).views = 7  # type: ignore[union-attr]
            with session.begin_nested():
                session.get(Post, 2).views = 7  # type: ignore[union-attr]
        released = told()
        session.commit()

    assert released == NOTHING
    assert told()[0] == {"post:1", "slug:post-1", "post:2", "slug:post-2"}


def test_a_savepoint_that_is_released_and_rolled_back_from_outside_tells_nothing(
    make_session: sessionmaker[Session], told: Told
) -> None:
    """What the outer transaction takes back has not happened."""
    with make_session() as session:
        with session.begin_nested():
            session.get(Post, 1).views = 7  # type: ignore[union-attr]
        session.rollback()
        session.commit()

    assert told() == NOTHING


def test_after_a_savepoint_was_rolled_back_the_rest_is_told(make_session: sessionmaker[Session], told: Told) -> None:
    """What the transaction changed besides is not forgotten with the savepoint."""
    with make_session() as session:
        session.get(Post, 1).views = 7  # type: ignore[union-attr]
        session.flush()
        savepoint = session.begin_nested()
        session.get(Post, 2).views = 7  # type: ignore[union-attr]
        session.flush()
        savepoint.rollback()
        session.commit()

    assert {"post:1", "slug:post-1"} <= told()[0]


@any_database
def test_what_the_orm_does_not_see_is_named_with_add(
    make_session: sessionmaker[Session], watcher: CommitInvalidation, told: Told
) -> None:
    """A bulk update is told with its transaction, or not at all."""
    with make_session() as session:
        session.execute(sa.update(Post).values(views=0))
        watcher.add(session, tags=["posts"], keys=(f"post:{n}" for n in (1, 2)))
        session.rollback()
        session.execute(sa.update(Post).values(views=0))
        watcher.add(session, tags=["posts"])
        session.commit()

    assert told() == (set(), {"posts"})


@any_database
def test_many_keys_are_sent_in_several_messages(
    make_session: sessionmaker[Session],
    watcher: CommitInvalidation,
    app: Celery,
    sent: Callable[[Celery], list[dict[str, Any]]],
) -> None:
    """No message names more than 500 of each, and together they name all, once."""
    with make_session() as session:
        session.get(Post, 1)
        watcher.add(session, keys=[f"k{n}" for n in range(1_201)], tags=[f"t{n}" for n in range(501)])
        session.commit()
    messages = sent(app)

    assert [(len(m["keys"]), len(m["tags"])) for m in messages] == [(500, 500), (500, 1), (201, 0)]
    assert sorted(key for m in messages for key in m["keys"]) == sorted(f"k{n}" for n in range(1_201))


@any_database
@pytest.mark.parametrize("kind", ["sessionmaker", "scoped_session", "class", "session"])
def test_every_source_of_sessions_can_be_watched(
    tables: sa.Engine, cache: Cache, app: Celery, sent: Callable[[Celery], list[dict[str, Any]]], kind: str
) -> None:
    """A maker, a registry, a class of sessions, or one session."""

    class OwnSession(Session):
        """A class of the application's own."""

    maker = sessionmaker(tables, class_=OwnSession)
    registry = scoped_session(maker)
    session = registry() if kind == "scoped_session" else maker()
    source: Any = {"sessionmaker": maker, "scoped_session": registry, "class": OwnSession, "session": session}[kind]
    invalidate_on_commit(source, cache, app=app, **RULES)
    session.get(Post, 1).views = 7  # type: ignore[union-attr]
    session.commit()
    registry.remove()
    session.close()

    assert [m["tags"] for m in sent(app)] == [["author:1"]]


@any_database
def test_sessions_of_another_maker_are_not_watched(tables: sa.Engine, watcher: CommitInvalidation, told: Told) -> None:
    """Only the source that was named is followed."""
    with sessionmaker(tables)() as session:
        session.get(Post, 1).views = 7  # type: ignore[union-attr]
        session.commit()

    assert told() == NOTHING


@any_database
def test_the_worker_invalidates(
    make_session: sessionmaker[Session], cache: Cache, worker_app: Celery, worker: WorkController
) -> None:
    """From the commit to the cache: the keys and the tags are gone, and counted; the others stay."""
    done: Queue[Any] = Queue()
    invalidate_on_commit(make_session, cache, app=worker_app, **RULES)
    worker.reload()
    cache.set("post:1", "old")
    cache.set("post:2", "kept")
    cache.set("list", "old", tags=["author:1"])

    def on_success(sender: Any = None, result: Any = None, **_: Any) -> None:
        if sender.name == f"petiole.invalidate.{cache.namespace}":
            done.put(result)

    signals.task_success.connect(on_success, weak=False)
    try:
        with make_session() as session:
            session.get(Post, 1).views = 7  # type: ignore[union-attr]
            session.commit()
        result = done.get(timeout=PATIENCE_S)
    finally:
        signals.task_success.disconnect(on_success)

    assert cache.get_many(["post:1", "post:2", "list"]) == {"post:2": "kept"}
    assert result == {"keys": 2, "tags": 1, "removed": 2}
    assert dict(SharedCounters(cache.redis, "cache", cache.namespace).read()) == {"invalidations": 3, "removed": 2}


@any_database
def test_a_broker_that_is_away_means_that_it_is_done_here(
    make_session: sessionmaker[Session],
    cache: Cache,
    make_app: Callable[..., Celery],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The commit succeeds, at once, and the cache is right when it returns."""
    invalidate_on_commit(make_session, cache, app=make_app(**NO_BROKER), **RULES)
    cache.set("post:1", "old")
    with caplog.at_level(logging.WARNING, logger=module.__name__), make_session() as session:
        session.get(Post, 1).views = 7  # type: ignore[union-attr]
        session.commit()

    assert cache.get("post:1") is None
    assert [record.levelname for record in caplog.records if record.name == module.__name__] == ["WARNING"]


@any_database
def test_a_broker_that_is_away_does_not_hold_the_commit_up(
    make_session: sessionmaker[Session], cache: Cache, make_app: Callable[..., Celery]
) -> None:
    """Also with Celery's own settings, by which a pool tries for six seconds to reach a broker, for each message."""
    watcher = invalidate_on_commit(make_session, cache, app=make_app(broker_url=NOBODY), **RULES)
    with make_session() as session:
        session.get(Post, 1).views = 7  # type: ignore[union-attr]
        watcher.add(session, keys=[f"k{n}" for n in range(1_000)])
        started = time.monotonic()
        session.commit()

    assert time.monotonic() - started < 3


@any_database
def test_a_broker_that_is_full_means_that_it_is_done_here(
    make_session: sessionmaker[Session],
    cache: Cache,
    make_app: Callable[..., Celery],
    own_server: Callable[..., EmbeddedServer],
) -> None:
    """A broker that answers and refuses does not fail a commit that has happened."""
    full = own_server("--maxmemory", "1", "--maxmemory-policy", "noeviction")
    invalidate_on_commit(make_session, cache, app=make_app(broker_url=full.url), **RULES)
    cache.set("post:1", "old")
    with make_session() as session:
        session.get(Post, 1).views = 7  # type: ignore[union-attr]
        session.commit()

    assert cache.get("post:1") is None


@any_database
def test_when_broker_and_cache_are_away_it_is_logged_and_the_commit_stands(
    make_session: sessionmaker[Session],
    make_app: Callable[..., Celery],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The data is committed; an exception would tell the caller that it is not. What it was about is remembered."""

    def told(logger: str, level: int) -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == logger and r.levelno == level]

    with connect(settings=Settings(url=NOBODY)) as nowhere:
        cache = Cache(nowhere, namespace="nowhere")
        invalidate_on_commit(make_session, cache, app=make_app(**NO_BROKER), **RULES)
        with make_session() as session:
            session.get(Post, 1).views = 7  # type: ignore[union-attr]
            session.commit()
        unsent = cache.stats().unsent
    with make_session() as session:
        stored = session.get(Post, 1)
        assert stored
        views = stored.views
    deadline = time.monotonic() + 30
    while not told("petiole.cachelib.remembered", logging.ERROR):  # by the thread that was sending
        assert time.monotonic() < deadline
        Event().wait(0.01)

    assert views == 7
    assert unsent > 0
    assert len(told(module.__name__, logging.WARNING)) == 1
    assert "the broker did not take an invalidation" in told(module.__name__, logging.WARNING)[0]
    assert len(told("petiole.cachelib.remembered", logging.WARNING)) == 1
    assert "post:1" in told("petiole.cachelib.remembered", logging.ERROR)[0]


def test_the_task_tries_until_redis_is_back(
    worker_app: Celery, worker: WorkController, redis: Connections, name: str
) -> None:
    """While the cache's server is away the task retries; once it is back the invalidation happens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    states: Queue[str] = Queue()

    def note(sender: Any = None, state: str = "", **_: Any) -> None:
        if sender.name == f"petiole.invalidate.{name}":
            states.put(state)

    signals.task_postrun.connect(note, weak=False)
    server = None
    try:
        with connect(f"redis://127.0.0.1:{port}/0") as away:
            cache = Cache(away, namespace=name)
            task = module.add_invalidation_task(cache, worker_app)
            worker.reload()
            task.delay(keys=["post:1"], tags=["posts"])
            first = states.get(timeout=PATIENCE_S)
            server = subprocess.Popen(
                [find_program(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
                stdout=subprocess.DEVNULL,
            )
            later = [states.get(timeout=PATIENCE_S)]
            while later[-1] == "RETRY":
                later.append(states.get(timeout=PATIENCE_S))
            counted = dict(SharedCounters(away, "cache", name).read())
    finally:
        signals.task_postrun.disconnect(note)
        if server is not None:
            server.terminate()
            server.wait(PATIENCE_S)

    assert first == "RETRY"
    assert later[-1] == "SUCCESS"
    assert counted == {"invalidations": 2, "removed": 0}


def test_the_task_tries_for_ever_and_is_acknowledged_late(app: Celery, cache: Cache) -> None:
    """An invalidation that a worker took with it would leave a stale entry; one that is done twice does no harm."""
    task = module.add_invalidation_task(cache, app)

    assert task.max_retries is None
    assert task.acks_late
    assert (task.retry_backoff, task.retry_backoff_max) == (True, 60)


def test_one_cache_has_one_task_per_app(make_app: Callable[..., Celery], cache: Cache) -> None:
    """To watch several sources of sessions declares the task once."""
    app, other = make_app(), make_app()
    task = module.add_invalidation_task(cache, app)

    assert module.add_invalidation_task(cache, app) is task
    assert module.add_invalidation_task(cache, other) is not task


@any_database
def test_two_caches_of_one_namespace_may_be_watched(
    app: Celery, redis: Connections, name: str, tables: sa.Engine
) -> None:
    """Modules that each make the cache of a namespace share its task, without a warning."""
    for _ in range(2):
        invalidate_on_commit(sessionmaker(tables), Cache(redis, namespace=name), app=app, **RULES)
    app.finalize()

    assert f"petiole.invalidate.{name}" in app.tasks


@any_database
@pytest.mark.parametrize(
    "rule",
    [
        {"keys": {Post: "post:{idd}"}},
        {"tags": {Post: ["fine:{id}", "author:{author}"]}},
        {"keys": {Post: "{0}"}},
        {"keys": {Post: "{}"}},
        {"keys": {Post: "{id.year}"}},
        {"keys": {Post: "{id[0]}"}},
    ],
    ids=lambda rule: next(str(text) for models in rule.values() for text in models.values()),
)
def test_a_template_that_names_no_column_is_refused_at_once(
    make_session: sessionmaker[Session], cache: Cache, app: Celery, rule: Any
) -> None:
    """The message has the template and the columns of the model."""
    with pytest.raises(ValueError, match=r"no column of Post; it has id, slug, views, author_id"):
        invalidate_on_commit(make_session, cache, app=app, **rule)


@any_database
@pytest.mark.parametrize("template", ["post:{id", "post:id}", "{"])
def test_a_template_that_cannot_be_read_is_refused_at_once(
    make_session: sessionmaker[Session], cache: Cache, app: Celery, template: str
) -> None:
    """A brace that is left open is found when the module is imported."""
    with pytest.raises(ValueError, match=r"[{}]"):
        invalidate_on_commit(make_session, cache, app=app, keys={Post: template})


@any_database
def test_a_column_may_be_formatted(make_session: sessionmaker[Session], cache: Cache, app: Celery, told: Told) -> None:
    """What text formatting can do with a value it may do with a column."""
    invalidate_on_commit(make_session, cache, app=app, keys={Post: "padded:{id:05d}"})
    with make_session() as session:
        session.get(Post, 1).views = 7  # type: ignore[union-attr]
        session.commit()

    assert "padded:00001" in told()[0]


@any_database
def test_to_watch_for_nothing_is_refused(make_session: sessionmaker[Session], cache: Cache, app: Celery) -> None:
    """Without keys and tags nothing would ever be invalidated."""
    with pytest.raises(ValueError, match="name keys or tags"):
        invalidate_on_commit(make_session, cache, app=app)


@any_database
def test_a_watcher_tells_what_it_watches(watcher: CommitInvalidation, name: str) -> None:
    """Its repr has the namespace and the models."""
    assert repr(watcher) == f"<CommitInvalidation of {name!r} [Author, Note, Post]>"
