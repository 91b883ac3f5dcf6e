"""What is counted: every request, written behind; and a report that is made once and remembered."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from petiole import SqlSink, WriteBehind, memoized_task

from .app import NAME, Session, app, cache, engine, redis
from .models import Hit, Page, PageView, ReportRun

views = WriteBehind(
    redis, f"{NAME}.views", SqlSink(engine, PageView.__table__, mode="append"), app=app, partitions=2, batch_size=500
)
hits = WriteBehind(
    redis, f"{NAME}.hits", SqlSink(engine, Hit.__table__, mode="sum", key="path"), app=app, partitions=2, batch_size=500
)
report_runs = WriteBehind(
    redis, f"{NAME}.report_runs", SqlSink(engine, ReportRun.__table__, mode="sum", key="section"), app=app, partitions=1
)


def record(path: str, client: str, status: int, size: int, at: datetime) -> None:
    """Note one request: a row of its own, and one more for its path. Two round trips, no SQL."""
    views.put({"path": path, "client": client, "status": status, "at": at})
    hits.put({"path": path, "views": 1, "size": size})


@memoized_task(app=app, cache=cache, key="{section}", ttl="1m", stale="1m")
def section_report(section: str) -> dict[str, Any]:
    """The most read pages of a section. Asked for often, made once a minute."""
    report_runs.put({"section": section, "runs": 1})
    statement = (
        sa.select(Hit.path, Hit.views)
        .join(Page, Page.path == Hit.path)
        .where(Page.section == section)
        .order_by(Hit.views.desc())
        .limit(10)
    )
    with Session() as session:
        return {"section": section, "top": [[path, count] for path, count in session.execute(statement)]}
