"""The main job from its command, with all of its processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.site import access_log

ROOT = Path(__file__).parents[2]


def _demo(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "examples.site.demo", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(autouse=True)
def _what_it_leaves_is_the_tests_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A demo that failed keeps its logs."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def _row(output: str, name: str) -> str:
    found = re.search(rf"│ {re.escape(name)} +│ +(.*?) +│", output)
    assert found, output
    return found[1]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of 2,000 requests, and two lines that are none."""
    path = tmp_path / "access.log"
    path.write_text("\n".join(["not a request", *access_log.generate(2_000, seed=7), '1.2.3.4 - - [x] "-" 408 -']))
    return path


def test_a_log_ends_verified_although_the_worker_is_killed(log: Path) -> None:
    """SQL holds what the log says, exactly; the table tells the rest."""
    done = _demo("--log", str(log), "--kill", "2")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 unreadable lines" in done.stdout
    assert "not a request" in done.stdout
    assert _row(done.stdout, "Verified").startswith("yes")
    assert _row(done.stdout, "Rows written behind") == "4,000"
    assert _row(done.stdout, "Workers killed") == "2"
    assert _row(done.stdout, "Requests").startswith("2,000 in")
    calls, runs = _row(done.stdout, "Report calls / runs").split(" / ")
    assert int(calls) == 50
    assert 1 <= int(runs) < 20
    assert int(_row(done.stdout, "Requests limited")) > 0
    assert re.search(r"Flower: http://127\.0\.0\.1:\d+", done.stdout)


@pytest.mark.storm
def test_a_demo_that_is_not_verified_says_so_and_fails(log: Path, tmp_path: Path) -> None:
    """The verdict comes from the log and SQL: a row that is not there is seen."""
    sabotage = tmp_path / "sitecustomize.py"
    sabotage.write_text(
        "import sys\n"
        "if 'examples.site.demo' in ' '.join(sys.orig_argv) and 'celery' not in ' '.join(sys.orig_argv):\n"
        "    from examples.site import audit\n"
        "    honest = audit.count_sql\n"
        "    def dropping_a_row(engine):\n"
        "        import sqlalchemy as sa\n"
        "        with engine.begin() as connection:\n"
        "            connection.execute(sa.text('DELETE FROM site_page_views WHERE id = 5'))\n"
        "        return honest(engine)\n"
        "    audit.count_sql = dropping_a_row\n"
    )
    few = tmp_path / "few.log"
    few.write_text("\n".join(log.read_text().split("\n")[:200]))

    done = _demo("--log", str(few), PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")

    assert done.returncode == 1
    assert _row(done.stdout, "Verified").startswith("no")
    assert "not verified: the rows of site_page_views and the sums of site_hits contradict each other" in done.stdout


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b"\0\1\2", "is binary"),
        (b"hi\n", "none of its 1 lines"),
    ],
)
def test_a_log_that_cannot_be_read_is_one_clear_line(tmp_path: Path, content: bytes | None, why: str) -> None:
    """And an exit status that tells it."""
    path = tmp_path / "access.log"
    if content is not None:
        path.write_bytes(content)

    done = _demo("--log", str(path))

    assert done.returncode == 1
    assert done.stdout == ""
    assert why in done.stderr
    assert len(done.stderr.strip().split("\n")) == 1


def test_a_redis_that_is_away_is_named_without_a_traceback() -> None:
    """The address that was tried, without its password, and what to do."""
    done = _demo(REDIS_URL="redis://:secret@127.0.0.1:1/0")

    assert done.returncode == 1
    assert "redis://:***@127.0.0.1:1/0" in done.stderr
    assert "REDIS_URL" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stdout + done.stderr


def test_a_number_of_kills_that_is_none_is_refused() -> None:
    """Before anything is started."""
    done = _demo("--kill", "often")

    assert done.returncode == 1
    assert "KILL='often'" in done.stderr


def test_a_database_that_is_in_use_is_left_alone(log: Path, tmp_path: Path) -> None:
    """The demo wants tables of its own, and drops nobody's."""
    import sqlalchemy as sa

    url = f"sqlite:///{tmp_path / 'theirs.sqlite3'}"
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE site_pages (path TEXT)")
    engine.dispose()

    done = _demo("--log", str(log), DATABASE_URL=url)

    assert done.returncode == 1
    assert "already has site_pages" in done.stderr
