"""What the site keeps in SQL."""

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The site's tables; their names say whose they are, in a database that others may use too."""


class Page(Base):
    """A page, as its editors made it."""

    __tablename__ = "site_pages"

    path: Mapped[str] = mapped_column(sa.String(900), primary_key=True)
    section: Mapped[str] = mapped_column(sa.String(900), index=True)
    body: Mapped[str]
    edits: Mapped[int] = mapped_column(default=0)


class PageView(Base):
    """One request, one row. Appended behind."""

    __tablename__ = "site_page_views"

    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(sa.String(900))
    client: Mapped[str] = mapped_column(sa.String(255))
    status: Mapped[int]
    at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))


class Hit(Base):
    """How often each path was asked for, and how many bytes that was. Summed behind."""

    __tablename__ = "site_hits"

    path: Mapped[str] = mapped_column(sa.String(900), primary_key=True)
    views: Mapped[int]
    size: Mapped[int] = mapped_column(sa.BigInteger)


class ReportRun(Base):
    """How often the report of each section was really made. Summed behind."""

    __tablename__ = "site_report_runs"

    section: Mapped[str] = mapped_column(sa.String(900), primary_key=True)
    runs: Mapped[int]
