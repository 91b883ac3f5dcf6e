"""What ``make`` says on a machine where it cannot set up."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that nothing was set up in; enough of it to begin."""
    for name in ("Makefile", "pyproject.toml", "__init__.py", "celeryconfig.py", "py.typed"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("cachelib", "coordination", "tasks"):
        (tmp_path / name).mkdir()
    return tmp_path


def _make(checkout: Path, python: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["make", "--silent", "demo", f"PYTHON={python}"],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "HOME": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
    )


def _python(checkout: Path, body: str) -> str:
    path = checkout / "some-python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_no_python_is_said_in_one_line(checkout: Path) -> None:
    """With what to do."""
    done = _make(checkout, "no-such-python")

    assert done.returncode != 0
    assert done.stderr.startswith("petiole: there is no no-such-python; install Python 3.11 or newer")


def test_a_python_that_is_too_old_is_said_in_one_line(checkout: Path) -> None:
    """With its version, and what is needed."""
    old = _python(checkout, '[ "$1" = --version ] && echo "Python 3.9.2" && exit 0; exit 1')

    done = _make(checkout, old)

    assert done.returncode != 0
    assert done.stderr.startswith("petiole: Python 3.9.2 is too old; Python 3.11 or newer is needed")
    assert "Traceback" not in done.stderr


def test_a_python_without_venv_is_said_in_one_line(checkout: Path) -> None:
    """With the package that brings it."""
    bare = _python(checkout, 'case "$2" in *venv*) exit 1;; esac; exit 0')

    done = _make(checkout, bare)

    assert done.returncode != 0
    assert "cannot make virtual environments; install its venv module" in done.stderr
    assert not (checkout / ".venv").exists()


def test_help_lists_what_can_be_made(checkout: Path) -> None:
    """Without setting anything up."""
    environment = {"PATH": os.environ["PATH"]}  # not that of a make that runs the tests
    done = subprocess.run(["make", "help"], cwd=checkout, env=environment, capture_output=True, text=True, check=True)

    assert [line.split()[0] for line in done.stdout.strip().split("\n")] == [
        "help",
        "demo",
        "test",
        "storm",
        "check",
        "bench",
        "clean",
    ]
    assert not (checkout / ".venv").exists()
