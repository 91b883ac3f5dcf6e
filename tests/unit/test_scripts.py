"""Scripts: every file states its contract, every call keeps to it, and nothing in them reaches too far."""

import ast
import hashlib
import re
from itertools import dropwhile, zip_longest
from pathlib import Path

import pytest

from petiole.cachelib.scripts import Script, load

ROOT = Path(__file__).parents[2]
PACKAGES = ("cachelib", "coordination", "tasks")
ALL = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.lua"))
FILES = [path for path in ALL if not path.stem.startswith("_")]
SHARED = [path for path in ALL if path.stem.startswith("_")]  # what scripts share; no script by itself
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

WITHOUT_KEY = {"TIME", "INFO"}
FORBIDDEN = {"KEYS", "SCAN", "FLUSHDB", "FLUSHALL", "CONFIG", "EVAL", "RANDOMKEY", "SELECT"}
CHANNELS = {"PUBLISH", "PUBSUB"}  # what they name is no key
KEY_PARAMETERS = {"key", "tag", "state", "queue", "waits", "parked", "woken", "due", "line", "order"}
"""What a parameter of a shared function is called that takes a key."""


def script(path):
    return Script(path.stem, path.read_text("utf-8"), str)


def header_of(path):
    """The comments before the first line of code, without the lines at their begin that name what is shared."""
    lines = path.read_text("utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("--"))]
    return list(dropwhile(lambda line: line.startswith("-- USES: "), header))


def shared_by(path):
    """The files whose text is put before a script's."""
    return [
        path.parent / f"{name}.lua" for name in re.findall(r"^-- USES: (.*)$", path.read_text("utf-8"), re.MULTILINE)
    ]


def functions_of(path):
    """(name, parameters) of each function that a file defines."""
    found = re.findall(r"^local function (\w+)\(([^)]*)\)", path.read_text("utf-8"), re.MULTILINE)
    return [(name, parts_of(parameters)) for name, parameters in found]


def every(files):
    return pytest.mark.parametrize("path", files, ids=[path.stem for path in files])


def test_there_are_scripts():
    """The tests below look at something."""
    assert {"entries_look", "entries_fill", "buffer_put", "rate_hit"} <= {path.stem for path in FILES}
    assert {"_versions"} <= {path.stem for path in SHARED}


@every(FILES)
def test_a_script_opens_with_its_contract(path):
    """What it does, KEYS, ARGV, RETURNS, and why it is one script, before the first line of code."""
    lines = header_of(path)
    header = "\n".join(lines)

    assert re.match(r"-- [A-Z].*[.;,]", lines[0])
    assert [m[1] for m in re.finditer(r"^-- (KEYS|ARGV|RETURNS): \S", header, re.MULTILINE)] == [
        "KEYS",
        "ARGV",
        "RETURNS",
    ]
    assert "One script, because" in header


@every(FILES)
def test_a_header_explains_what_it_names(path):
    """A word before a colon is a name of KEYS, ARGV or RETURNS: an explanation does not outlive its argument."""
    header = "\n".join(header_of(path))
    explained = set(re.findall(r"^-- (\w+): ", header, re.MULTILINE)) - {"KEYS", "ARGV", "RETURNS"}
    returned = set(re.findall(r"[{,] ?(\w+)", "".join(re.findall(r"^-- RETURNS: (\{.*)$", header, re.MULTILINE))))

    assert explained <= {name for name, _ in (*script(path).keys, *script(path).arguments)} | returned


@every(SHARED)
def test_what_scripts_share_opens_with_what_it_is(path):
    """It has no KEYS and no ARGV of its own, and touches none: its functions are given what they need."""
    text = path.read_text("utf-8")

    assert re.match(r"-- [A-Z].*[.:]", header_of(path)[0])
    assert not re.findall(r"\b(?:KEYS|ARGV)\b", text)
    assert functions_of(path)
    assert not re.findall(r"^(?!local |end|--|    |$).", text, re.MULTILINE), "it does something when it is put before"


@every(FILES)
def test_a_script_uses_what_it_says_it_uses(path):
    """Code that is sent along for nothing is sent with every text; code that is missing fails when it is run."""
    text = path.read_text("utf-8")

    for shared in SHARED:
        called = [name for name, _ in functions_of(shared) if re.search(rf"\b{name}\(", text)]
        assert bool(called) == (shared in shared_by(path)), f"{shared.name}: {called}"


@every(FILES)
def test_a_script_is_named_noun_first(path):
    """A list of scripts is sorted by what they touch."""
    assert re.fullmatch(r"[a-z]+_[a-z]+", path.stem)


def parts_of(text):
    """What stands between the commas that are in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def names_of_keys(text):
    """The names that stand for keys wherever they are given something: by an assignment, or by a loop over KEYS."""
    given = {name: {"KEYS[]"} for _, name in re.findall(r"for (\w+), (\w+) in ipairs\(KEYS\)", text)}
    for names, values in re.findall(r"^\s*(?:local )?(\w+(?:, \w+)*) = (.*)$", text, re.MULTILINE):
        for name, value in zip_longest(parts_of(names), parts_of(values), fillvalue=""):
            given.setdefault(name, set()).add(value)
    return {name for name, values in given.items() if all(re.fullmatch(r"KEYS\[[^\[\]]*\]", value) for value in values)}


def keys_that_are_touched(text):
    """(what touches it, the key) for each command and each call of a function that is given one."""
    calls = re.findall(r"redis\.p?call\(\s*\"(\w+)\"(?:\s*,\s*([^,)]+))?", text)
    assert len(re.findall(r"redis\.p?call\(", text)) == len(calls), "a command that is no literal"
    yield from calls
    for name, parameters in [function for path in SHARED for function in functions_of(path)]:
        for arguments in re.findall(rf"(?<!function )\b{name}\(([^()]*(?:\([^()]*\)[^()]*)*)\)", text):
            for parameter, argument in zip(parameters, parts_of(arguments), strict=True):
                if parameter in KEY_PARAMETERS:
                    yield name, argument


@every(ALL)
def test_a_script_touches_only_the_keys_that_it_is_given(path):
    """Every command names a key of KEYS and none looks at the whole server, as Cluster asks."""
    text = path.read_text("utf-8")
    given = names_of_keys(text)
    if path in SHARED:  # those of its functions that touch a key are given it
        given = {name for _, names in functions_of(path) for name in names if name in KEY_PARAMETERS} - {
            name
            for names in re.findall(r"^\s*(?:local )?(\w+(?:, \w+)*) = ", text, re.MULTILINE)
            for name in parts_of(names)
        }
    touched = list(keys_that_are_touched(text))

    assert touched
    for command, key in touched:
        assert command not in FORBIDDEN
        if command not in WITHOUT_KEY | CHANNELS:
            assert key.startswith("KEYS[") or key in given, f"{command} {key}"


@pytest.mark.parametrize(
    "text",
    [
        'redis.call("GET", "a")',
        'redis.call("GET", ARGV[1])',
        'local key = ARGV[1]\nredis.call("GET", key)',
        'local key = KEYS[1] .. ":lease"\nredis.call("GET", key)',
        'local key, lease = KEYS[1]\nredis.call("GET", lease)',
        'local key = KEYS[1]\nkey = "a"\nredis.call("GET", key)',
        'for i, tag in ipairs(ARGV) do\nredis.call("GET", tag)',
        "version_of(ARGV[1], sequence, chance, ttl_ms)",
        "local made = sequence_of(name, ttl_ms)",
        "local entry = park_look(ARGV[1], id)",
    ],
)
def test_the_test_before_sees_what_it_looks_for(text):
    """Keys that are made in a script are found, also behind a name and in a call of what is shared."""
    ((_, key),) = keys_that_are_touched(text)

    assert not key.startswith("KEYS[")
    assert key not in names_of_keys(text)


@every(FILES)
def test_a_script_reads_no_more_than_its_header_names(path):
    """A literal index beyond the names in the header is a mistake in one of the two."""
    text = path.read_text("utf-8")
    for which, names in (("KEYS", script(path).keys), ("ARGV", script(path).arguments)):
        used = {int(index) for index in re.findall(rf"{which}\[(\d+)\]", text)}
        single = [many for _, many in names].index(True) if any(many for _, many in names) else len(names)

        if single == len(names):
            assert used == set(range(1, len(names) + 1))
        assert used <= set(range(1, len(names) + 1))
        if which == "ARGV" or "(#KEYS - " in text:  # what comes after the single ones is counted from there
            assert {int(first) for first in re.findall(rf"{which}\[(\d+) \+", text)} <= {single}


@every(FILES)
def test_what_is_counted_is_named(path):
    """``tag_count`` is how many ``tags...`` there are among KEYS: the loader fills it in."""
    many = {name for name, many in script(path).keys if many}
    counted = [name.removesuffix("_count") + "s" for name, _ in script(path).arguments if name.endswith("_count")]

    assert set(counted) <= many
    divided = re.search(r"(?:#KEYS|\(#KEYS - (\d+)\)) / (\d+)", path.read_text("utf-8"))
    equally_long = divided and (int(divided[1] or 0), int(divided[2])) == (
        len(script(path).keys) - len(many),
        len(many),
    )
    assert len(many) < 2 or counted or equally_long, "where does one end and the other begin?"


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
            if isinstance(node, ast.Call):
                prepares = isinstance(node.func, ast.Attribute) and node.func.attr == "prepared"
                called = node.func.value if prepares else node.func
                if isinstance(called, ast.Name) and called.id in loaded:
                    loaded[called.id][1].append(sorted(keyword.arg for keyword in node.keywords))
        for path, calls in loaded.values():
            yield module, path, calls


def test_every_script_is_called_by_the_names_of_its_header():
    """A call and a header that part company are found without a server."""
    for module, path, calls in loads_and_calls():
        named = (name for name, _ in (*script(path).keys, *script(path).arguments))
        names = sorted(name for name in named if not name.endswith("_count"))  # those the loader fills in

        assert calls, f"{module.name} loads {path.name} and never calls it"
        assert all(call == names for call in calls), f"{module.name} calls {path.name} with {calls}, not {names}"


def test_every_script_has_one_home():
    """Each file is loaded by exactly one module, of its own package; what is shared by none, but used."""
    assert sorted(path for _, path, _ in loads_and_calls()) == FILES
    assert {shared for path in FILES for shared in shared_by(path)} == set(SHARED)


def test_what_a_script_uses_is_sent_before_it():
    """The functions are there when the first line of the script runs, and the digest is that of the whole."""
    loaded = load("petiole.cachelib", "tags_read", list)
    folder = ROOT / "cachelib" / "lua"
    texts = [(folder / f"{name}.lua").read_text("utf-8") for name in ("_versions", "tags_read")]

    assert loaded.text == "\n".join(texts)
    assert loaded.sha == hashlib.sha1("\n".join(texts).encode(), usedforsecurity=False).hexdigest()
    assert loaded.keys == script(folder / "tags_read.lua").keys


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


def test_a_list_of_names_goes_on_after_a_comma():
    """And ends where a line ends without one, whatever comes then."""
    text = "-- Does.\n--\n-- KEYS: a,\n-- b...\n-- ARGV: c,\n-- d...,\n-- e...\n-- RETURNS: f, g\n-- h\nreturn 1\n"
    does = Script("does", text, int)

    assert does.keys == (("a", False), ("b", True))
    assert does.arguments == (("c", False), ("d", True), ("e", True))


@pytest.mark.parametrize("text", ["return 1", "-- KEYS: a\nreturn 1", "-- ARGV: a\nreturn 1"])
def test_a_file_without_a_contract_is_refused(text):
    """A script that does not say what it takes cannot be called."""
    with pytest.raises(ValueError, match=r"does\.lua does not open with"):
        Script("does", text, int)


def test_a_script_shows_what_it_takes():
    """Its repr is its signature."""
    assert repr(Script("does", TEXT, int)) == "<Script does(a, b, c, d, e)>"


COUNTED = (
    "-- Does.\n--\n-- KEYS: a, tags..., b..., c...\n-- ARGV: tag_count, d, e...\n-- RETURNS: nothing\n\nreturn 1\n"
)


def test_a_sequence_that_is_counted_may_have_a_length_of_its_own():
    """Its length is sent where the header says so; nobody who calls can get it wrong."""
    client, does = Recorder(), Script("does", COUNTED, int)
    does(client, a="x", tags=["t", "u", "v"], b=["b1"], c=["c1"], d=4, e=["e1"])
    does(client, a="x", tags=[], b=["b1", "b2"], c=["c1", "c2"], d=4, e=["e1", "e2"])

    assert client.sent == [
        ("EVALSHA", does.sha, 6, "x", "t", "u", "v", "b1", "c1", 3, 4, "e1"),
        ("EVALSHA", does.sha, 5, "x", "b1", "b2", "c1", "c2", 0, 4, "e1", "e2"),
    ]
    assert repr(does) == "<Script does(a, b, c, d, e, tags)>"


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"b": []}, ValueError), ({"e": ["1", "2"]}, ValueError), ({"tag_count": 2}, TypeError)],
)
def test_the_sequences_that_are_not_counted_are_equally_long(changes, error):
    """And the count is no argument."""
    client, does = Recorder(), Script("does", COUNTED, int)

    with pytest.raises(
        error, match="b, c, e must be equally long" if error is ValueError else r"unknown: \['tag_count'\]"
    ):
        does(client, **{"a": "x", "tags": [], "b": ["b"], "c": ["c"], "d": 4, "e": ["e"]} | changes)
    assert client.sent == []
