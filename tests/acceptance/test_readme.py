"""README.md as a new user would try it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_runs_as_it_stands_and_prints_what_it_says(tmp_path: Path) -> None:
    """The first Python block; what it prints is in its own comments."""
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    (tmp_path / "example.py").write_text(block)
    promised = [
        line.partition("#")[2].strip() for line in block.split("\n") if re.match(r" *(user|report|print)\b.*#", line)
    ]

    done = subprocess.run(
        [sys.executable, "-W", "error", "example.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split("\n") == promised


def test_what_the_pages_point_to_is_there() -> None:
    """Every relative link of every page."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} points to {link}"
