"""Entries as they were stored once: today's code must still read them, or a deploy would empty every cache.

``.venv/bin/python tests/unit/test_entry_golden.py`` adds what is new to the file, and never changes what is there.
"""

import json
from pathlib import Path

import pytest

from petiole.cachelib import entry
from petiole.cachelib.formats import Codec

GOLDEN = Path(__file__).parent / "golden" / "entries.json"
NAME = "petiole:1:cache:{shop:user:1}"
VERSION = "0001a2b3c4d5e" + "abc0001"

VALUES = {
    "a dict": ({"id": 7, "names": ["a", "b"], "none": None}, [], 0),
    "with tags and a stale window": (["text", 1.5, True], ["users", "team:3"], 600_000),
    "compressed": ("x" * 40_000, [], 0),
    "a counter": (42, None, 0),
    "an exception": (["builtins.KeyError", ["no such user"]], [], 0),
}


def stored(what):
    """As the scripts store it."""
    value, tags, stale_ms = VALUES[what]
    kind = b"x" if what == "an exception" else b"1"
    if tags is None:
        body, tags = entry.encode_counter(value), []
    else:
        how, packed = Codec().pack(value, NAME)
        body = entry.encode(how, packed, created_ms=1_700_000_000_000, ttl_ms=300_000, load_ms=12, tags=tags)
    head = b"\xc1" + kind + b"%02x%010x" % (1 + len(tags), stale_ms) + b"0123456789abcdef"
    return head + VERSION.encode() * (1 + len(tags)) + body


@pytest.mark.parametrize("what", VALUES)
def test_what_was_stored_once_is_read_for_ever(what):
    """Its value, its tags and its stale window."""
    golden = bytes.fromhex(json.loads(GOLDEN.read_text())[what])
    value, tags, stale_ms = VALUES[what]

    opened = entry.decode(golden)

    assert list(opened.tags) == (tags or [])
    assert opened.stale_ms == stale_ms
    assert opened.token == "0123456789abcdef"
    assert opened.raised == (what == "an exception")
    assert set(entry.versions_of(opened).values()) == {VERSION.encode()}
    if opened.body is None:
        assert opened.counter == value
    else:
        assert Codec().unpack(opened.body.how, entry.packed_value(opened.body), NAME) == value
        assert (opened.body.ttl_ms, opened.body.load_ms) == (300_000, 12)


@pytest.mark.parametrize("what", sorted(VALUES.keys() - {"compressed"}))  # compressors differ from version to version
def test_what_is_stored_today_is_what_was_stored_once(what):
    """Another form needs another kind or format, which processes of before count as a miss."""
    assert stored(what).hex() == json.loads(GOLDEN.read_text())[what]


if __name__ == "__main__":
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for what in VALUES:
        known.setdefault(what, stored(what).hex())
    GOLDEN.write_text(json.dumps(known, indent=1) + "\n")
