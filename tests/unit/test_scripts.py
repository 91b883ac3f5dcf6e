"""Scripts: every file states its contract, every call keeps to it, and nothing in them reaches too far."""

import ast
import re
from pathlib import Path

import pytest

from petiole.cachelib.scripts import Script

ROOT = Path(__file__).parents[2]
PACKAGES = ("cachelib", "coordination", "tasks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.lua"))
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

WITHOUT_KEY = {"TIME", "INFO"}
FORBIDDEN = {"KEYS", "SCAN", "FLUSHDB", "FLUSHALL", "CONFIG", "EVAL", "RANDOMKEY", "SELECT", "PUBLISH"}


def script(path):
    return Script(path.stem, path.read_text("utf-8"), str)


def every(files):
    return pytest.mark.parametrize("path", files, ids=[path.stem for path in files])


def test_there_are_scripts():
    """The tests below look at something."""
    assert {"entry_read", "buffer_put", "rate_hit"} <= {path.stem for path in FILES}


@every(FILES)
def test_a_script_opens_with_its_contract(path):
    """What it does, KEYS, ARGV, RETURNS, and why it is one script, before the first line of code."""
    lines = path.read_text("utf-8").splitlines()
    header = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("--"))])

    assert re.match(r"-- [A-Z].*[.;]", lines[0])
    assert [m[1] for m in re.finditer(r"^-- (KEYS|ARGV|RETURNS): \S", header, re.MULTILINE)] == [
        "KEYS",
        "ARGV",
        "RETURNS",
    ]
    assert "One script, because" in header


@every(FILES)
def test_a_script_is_named_noun_first(path):
    """A list of scripts is sorted by what they touch."""
    assert re.fullmatch(r"[a-z]+_[a-z]+", path.stem)


@every(FILES)
def test_a_script_touches_only_the_keys_that_it_is_given(path):
    """Every command names a key of KEYS and none looks at the whole server, as Cluster asks."""
    text = path.read_text("utf-8")
    calls = re.findall(r"redis\.p?call\(\s*\"(\w+)\"(?:\s*,\s*([^,)]+))?", text)
    # Names that a loop gives to the keys, such as "for i, tag in ipairs(KEYS)".
    given = {name for _, name in re.findall(r"for (\w+), (\w+) in ipairs\(KEYS\)", text)}

    assert calls
    for command, key in calls:
        assert command not in FORBIDDEN
        if command not in WITHOUT_KEY:
            assert key.startswith("KEYS[") or key in given, f"{command} {key}"
    assert len(re.findall(r"redis\.p?call\(", text)) == len(calls), "a command that is no literal"


@every(FILES)
def test_a_script_reads_no_more_than_its_header_names(path):
    """A literal index beyond the names in the header is a mistake in one of the two."""
    text = path.read_text("utf-8")
    for which, names in (("KEYS", script(path).keys), ("ARGV", script(path).arguments)):
        used = {int(index) for index in re.findall(rf"{which}\[(\d+)\]", text)}

        if not any(many for _, many in names):
            assert used == set(range(1, len(names) + 1))
        assert used <= set(range(1, len(names) + 1))


def loads_and_calls():
    """(module, script, names at the call) for every call of a loaded script in the tree."""
    for module in MODULES:
        tree = ast.parse(module.read_text("utf-8"))
        loaded = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
                function = node.value.func
                if isinstance(function, ast.Name) and function.id == "load":
                    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                    loaded[target.id] = (module.parent / "lua" / f"{node.value.args[1].value}.lua", [])
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in loaded:
                loaded[node.func.id][1].append(sorted(keyword.arg for keyword in node.keywords))
        for path, calls in loaded.values():
            yield module, path, calls


def test_every_script_is_called_by_the_names_of_its_header():
    """A call and a header that part company are found without a server."""
    for module, path, calls in loads_and_calls():
        names = sorted(name for name, _ in (*script(path).keys, *script(path).arguments))

        assert calls, f"{module.name} loads {path.name} and never calls it"
        assert all(call == names for call in calls), f"{module.name} calls {path.name} with {calls}, not {names}"


def test_every_script_has_one_home():
    """Each file is loaded by exactly one module, of its own package."""
    assert sorted(path for _, path, _ in loads_and_calls()) == FILES


TEXT = "-- Does.\n--\n-- KEYS: a, b...\n-- ARGV: c, d..., e...\n-- RETURNS: nothing\n\nreturn 1\n"


class Recorder:
    """Stands where a client stands, and keeps what it was asked to send."""

    def __init__(self):
        self.sent = []

    def execute_command(self, *command):
        self.sent.append(command)
        return b"7"


def test_arguments_are_sent_in_the_order_of_the_header():
    """Names are for people; Redis gets positions."""
    client, does = Recorder(), Script("does", TEXT, int)

    assert does(client, e=[5, 6], d=["3", "4"], c=b"2", b=["y", "z"], a="x") == 7
    assert client.sent == [("EVALSHA", does.sha, 3, "x", "y", "z", b"2", "3", "4", 5, 6)]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"a": "x", "b": [], "c": 1, "d": []},
        {"a": "x", "b": [], "c": 1, "d": [], "e": [], "f": 1},
        {"a": "x", "b": [], "c": 1, "d": [], "E": []},
    ],
)
def test_a_call_that_does_not_fit_is_refused_before_anything_is_sent(values):
    """Missing and unknown names are a ``TypeError`` that lists the right ones."""
    client = Recorder()

    with pytest.raises(TypeError, match=r"does\.lua takes \['a', 'b', 'c', 'd', 'e'\]"):
        Script("does", TEXT, int)(client, **values)
    assert client.sent == []


def test_sequences_that_go_together_are_equally_long():
    """Payloads without their TTLs would be read as something else."""
    client = Recorder()

    with pytest.raises(ValueError, match="d, e must be equally long"):
        Script("does", TEXT, int)(client, a="x", b=[], c=1, d=[1], e=[])
    assert client.sent == []


@pytest.mark.parametrize("text", ["return 1", "-- KEYS: a\nreturn 1", "-- ARGV: a\nreturn 1"])
def test_a_file_without_a_contract_is_refused(text):
    """A script that does not say what it takes cannot be called."""
    with pytest.raises(ValueError, match=r"does\.lua does not open with"):
        Script("does", text, int)


def test_a_script_shows_what_it_takes():
    """Its repr is its signature."""
    assert repr(Script("does", TEXT, int)) == "<Script does(a, b, c, d, e)>"
