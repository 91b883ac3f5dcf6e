"""Reading and editing pages: a cache that beat keeps warm, and edits that are invalidated everywhere."""

from typing import Any

from petiole import invalidate_on_commit, warmed
from petiole.cachelib.counters import SharedCounters

from .app import NAME, Session, app, bridge, cache, redis
from .models import Page

counters = SharedCounters(redis, "site", NAME)


@warmed(cache, "page:{path}", every=2, top=50, ttl=8, stale=30, app=app, name="page")
def page(path: str) -> dict[str, Any] | None:
    """A page as readers see it; None, which is cached as well, where there is none."""
    with Session() as session:
        found = session.get(Page, path)
        return None if found is None else {"body": found.body, "edits": found.edits, "section": found.section}


invalidate_on_commit(Session, cache, keys={Page: "page:{path}"}, app=app)


def edit(path: str) -> bool:
    """Change a page. Returns whether there is one. Its readers see the change once the commit's task has run."""
    with Session.begin() as session:
        found = session.get(Page, path, with_for_update=True)
        if found is None:
            return False
        found.edits += 1
        found.body = f"{path}, edited {found.edits} times"
    bridge.publish(f"{NAME}:page:edited", {"path": path})
    return True


def count_edit(**_: Any) -> None:
    """What a worker does when it hears of an edit, by a Celery signal that began as a Redis message."""
    counters.add(edits_heard=1)


bridge.signal(f"{NAME}:page:*").connect(count_edit)
