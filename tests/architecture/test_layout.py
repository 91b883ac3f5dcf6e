"""The tree: what is shipped, what every module has, and what stands in one place only."""

import ast
import re
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("cachelib", "coordination", "tasks")
FOLDERS = [ROOT, *(path.parent for floor in FLOORS for path in sorted((ROOT / floor).rglob("__init__.py")))]
MODULES = [path for folder in FOLDERS for path in sorted(folder.glob("*.py"))]
LUA = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.lua"))]
SCRIPTS = [path for path in LUA if not path.stem.startswith("_")]
SHARED = [path for path in LUA if path.stem.startswith("_")]  # what scripts share, put before their text
PRODUCT = [*MODULES, *LUA]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def package(folder: Path) -> str:
    return ".".join(("petiole", *folder.relative_to(ROOT).parts))


@pytest.fixture(scope="module")
def setuptools() -> dict[str, Any]:
    """What pyproject.toml tells setuptools."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    return found


def test_the_packages_that_are_shipped_are_those_of_the_tree(setuptools: dict[str, Any]) -> None:
    """A folder that is not listed would be missing from the wheel."""
    assert sorted(setuptools["packages"]) == sorted(package(folder) for folder in FOLDERS)


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without __init__.py would be found here and not in the wheel."""
    folders = {path.parent for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}

    assert folders <= set(FOLDERS)


def test_the_scripts_that_are_shipped_are_those_of_the_tree(setuptools: dict[str, Any]) -> None:
    """Every package with a lua folder lists it, and no script stands elsewhere."""
    listed = {name for name, patterns in setuptools["package-data"].items() if "lua/*.lua" in patterns}

    assert {path.parent.name for path in LUA} == {"lua"}
    assert {package(path.parents[1]) for path in LUA} == listed


def test_there_is_something_to_look_at() -> None:
    """The tests below would hold for an empty tree."""
    assert len(FOLDERS) == 5
    assert len(MODULES) > 30
    assert len(SCRIPTS) > 10


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_every_module_says_first_what_it_is(path: Path) -> None:
    """A docstring whose first line is a sentence."""
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))

    assert docstring
    assert re.match(r"\S.*[.:]", docstring.split("\n\n")[0], re.DOTALL)


@pytest.mark.parametrize("path", [folder / "__init__.py" for folder in FOLDERS], ids=named)
def test_every_package_names_what_is_public(path: Path) -> None:
    """``__all__`` is there, and what it names is there too."""
    body = ast.parse(path.read_text("utf-8")).body
    (names,) = [
        ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    ]
    module = __import__(package(path.parent), fromlist=["_"])

    assert names
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", PRODUCT, ids=named)
def test_nothing_is_left_to_do(path: Path) -> None:
    """What is missing is said under "Not yet", where a reader of the class finds it."""
    assert re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", [path for path in PRODUCT if path != ROOT / "cachelib" / "keys.py"], ids=named)
def test_the_layout_of_keys_is_spelled_in_one_place(path: Path) -> None:
    """The prefix of all keys stands in cachelib/keys.py alone."""
    assert "petiole:1" not in path.read_text("utf-8")


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "keys.py"], ids=named)
def test_only_the_modules_of_keys_make_keys(path: Path) -> None:
    """Who needs a key asks keys.py for it: nobody else knows the layout."""
    imported = {
        alias.name
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    assert not imported & {"LAYOUT", "escaped", "escaped_name"}


def test_every_kind_of_key_is_spelled_once() -> None:
    """No two things in Redis share the form of a key."""
    kinds = [
        kind
        for path in MODULES
        if path.name == "keys.py"
        for kind in re.findall(r"\{LAYOUT\}:([a-z]+)", path.read_text("utf-8"))
    ]

    assert kinds
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_every_script_opens_with_its_contract(path: Path) -> None:
    """What it does, KEYS, ARGV, RETURNS, and why it must be one script; named <noun>_<verb>."""
    head = path.read_text("utf-8").split("\n\n")[0].splitlines()
    head = head[1:] if head[0].startswith("-- USES: ") else head

    assert re.fullmatch(r"[a-z]+_[a-z]+", path.stem)
    assert all(line.startswith("--") for line in head)
    assert re.match(r"-- [A-Z].*", head[0])
    assert [sum(line.startswith(f"-- {word}:") for line in head) for word in ("KEYS", "ARGV", "RETURNS")] == [1, 1, 1]
    assert "script" in "\n".join(head).lower()


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_every_script_has_a_loader(path: Path) -> None:
    """A script that nobody loads is nobody's."""
    sources = [module.read_text("utf-8") for module in path.parents[1].glob("*.py")]

    assert sum(source.count(f'"{path.stem}"') for source in sources) == 1


@pytest.mark.parametrize("path", SHARED, ids=named)
def test_what_scripts_share_is_used_by_several_and_says_what_it_is(path: Path) -> None:
    """Code of one script stands in that script; a header of KEYS and ARGV is for what is called by itself."""
    text = path.read_text("utf-8")
    users = [script for script in path.parent.glob("*.lua") if f"-- USES: {path.stem}\n" in script.read_text("utf-8")]

    assert re.match(r"-- [A-Z].*\n--\n", text)
    assert not re.search(r"^-- (?:KEYS|ARGV|RETURNS):", text, re.MULTILINE)
    assert len(users) > 1


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_between_packages_imports_are_relative(path: Path) -> None:
    """The repository's root has no importable name of its own. (The reference settings are loaded by name.)"""
    tree = ast.parse(path.read_text("utf-8"))
    absolute = [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "petiole"
    ]

    assert absolute == [] or path == ROOT / "celeryconfig.py"


def test_errors_of_a_floor_have_one_root() -> None:
    """A caller can catch a whole floor."""
    for floor, root in [("cachelib", "CachelibError"), ("coordination", "CoordinationError")]:
        module = __import__(f"petiole.{floor}.errors", fromlist=["_"])
        values = [value for value in vars(module).values() if isinstance(value, type)]
        errors = [value for value in values if value.__module__ == module.__name__]

        assert errors
        assert all(issubclass(error, getattr(module, root)) for error in errors)


OUTSIDE = [path for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", OUTSIDE, ids=named)
def test_what_benchmarks_and_examples_take_from_the_package_is_there(path: Path) -> None:
    """Nothing else looks at those that nobody runs here: some need libraries that are only installed to measure."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("petiole"):
            module = import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}"), alias.name
