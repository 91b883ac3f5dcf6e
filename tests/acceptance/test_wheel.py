"""The wheel, alone in a new environment, beside packages and modules whose names are near its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import tasks, cachelib, flask_caching                  # the user's own tasks.py, and Pallets' CacheLib
assert tasks.MINE and hasattr(cachelib, "SimpleCache"), "somebody else's modules are hidden"
from petiole import Cache, SqlSink, WriteBehind, connect, memoized_task
from petiole.cachelib.scripts import load
from petiole.celeryconfig import task_acks_late
import petiole, petiole.tasks
assert "site-packages" in petiole.__file__
assert petiole.tasks.app.main == "petiole"
with connect("embedded://") as redis:
    cache = Cache(redis, namespace="shop")
    assert cache.get_or_set("a", lambda: 1) == 1 and cache.get("a") == 1
print("works", petiole.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as an index would get it, from a copy: a build leaves files behind."""
    import shutil

    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(folder / "source")],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Every module and script; no tests, no examples, no top-level name but its own."""
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    product = [path for part in ("cachelib", "coordination", "tasks") for path in (ROOT / part).rglob("*")]
    expected = {f"petiole/{path.relative_to(ROOT)}" for path in product if path.suffix in (".py", ".lua")}

    assert expected <= set(names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"petiole"}
    assert "petiole/py.typed" in names
    assert not [name for name in names if "tests" in name or "examples" in name]


@pytest.mark.storm
def test_the_wheel_works_beside_flask_caching_and_the_users_own_tasks_module(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has nothing else; neither breaks the other."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", f"{wheel}[embedded]", "flask-caching"],
        check=True,
        capture_output=True,
    )
    (tmp_path / "tasks.py").write_text("MINE = True\n")
    (tmp_path / "program.py").write_text(PROGRAM)

    done = subprocess.run([str(python), "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    told = subprocess.run(
        [str(python.parent / "petiole"), "health", "--url", "embedded://"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("works ")
    assert told.returncode == 0, told.stderr
    assert "valkey" in told.stdout
