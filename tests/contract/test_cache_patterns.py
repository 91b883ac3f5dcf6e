"""Removing by pattern: what matches, nothing else, and however many there are."""

import pytest

from petiole.cachelib import Cache


def removed(cache, keys, pattern):
    """Which of some keys a pattern removed."""
    cache.set_many(dict.fromkeys(keys, 1))
    count = cache.invalidate(matching=pattern)
    gone = set(keys) - set(cache.get_many(keys))
    cache.delete(*keys)

    assert count == len(gone)
    return gone


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("user:*", ["user:1", "user:", "user:1:x"], ["use", "xuser:1"]),
        ("user:?", ["user:1"], ["user:", "user:12"]),
        ("user:[12]", ["user:1", "user:2"], ["user:3", "user:12"]),
        ("user:[^1]", ["user:2"], ["user:1"]),
        ("*:end", ["a:end", ":end"], ["a:end2", "end"]),
        ("*", ["a", "b:c", "x{y}z"], []),
        ("exact", ["exact"], ["exact2", "anexact", "exac"]),
        ("x{y}*", ["x{y}", "x{y}z"], ["xy", "x{yz"]),
        ("*}", ["}", "a}"], ["}a", "a"]),
        ("%*", ["%", "%7B"], ["{", "a"]),
        (r"a\*b", ["a*b"], ["aXb", "a\\*b"]),
        ("*:lease", ["a:lease"], ["a"]),
        ("a\n*", ["a\n", "a\nb"], ["a"]),
        ("é*", ["é", "éa"], ["e"]),
    ],
)
def test_a_pattern_removes_what_matches(cache, pattern, matching, others):
    """Stars, question marks and sets match; braces, percent signs and the rest are themselves."""
    assert removed(cache, [*matching, *others], pattern) == set(matching)


NAMESPACES = ["a", "ab", "a*", "a?", "[ab]", "a[b]", "a\\", "a{b}", "a:b", "%", "a%7Bb", "^a", "*"]


@pytest.mark.parametrize("mine", NAMESPACES)
def test_a_pattern_stays_in_its_namespace(redis, name, mine):
    """Whatever a namespace is made of, it is literal."""
    caches = {space: Cache(redis, namespace=f"{name}{space}") for space in NAMESPACES}
    for cache in caches.values():
        cache.set_many({"k": 1, "b:k": 2})
    count = caches[mine].invalidate(matching="*")
    left = {space for space, cache in caches.items() if len(cache.get_many(["k", "b:k"])) == 2}
    for cache in caches.values():
        cache.delete("k", "b:k")

    assert count == 2
    assert left == set(NAMESPACES) - {mine}


def test_thousands_of_keys_are_removed_and_others_left(redis, name):
    """SCAN goes through all of the server, in batches, and finds each matching key."""
    cache, other = Cache(redis, namespace=f"{name}[x]"), Cache(redis, namespace=name)
    doomed = [f"post:{{{i}}}*" for i in range(2_000)]
    cache.set_many(dict.fromkeys(doomed, 1))
    cache.set_many(dict.fromkeys(["user:1", "pos"], 1))
    other.set_many(dict.fromkeys(doomed[:100], 1))
    count = cache.invalidate(matching="post:{*}[*]")
    survivors = (len(cache.get_many(doomed)), len(cache.get_many(["user:1", "pos"])), len(other.get_many(doomed)))
    other.invalidate(matching="*")

    assert count == 2_000
    assert survivors == (0, 2, 100)


def test_a_pattern_leaves_tags_alone(cache):
    """It is about keys; what else carries the tag stays valid."""
    cache.set("post:1", 1, tags=["t"])
    cache.set("user:1", 2, tags=["t"])
    cache.invalidate(matching="post:*")

    assert cache.get_many(["post:1", "user:1"]) == {"user:1": 2}


def test_a_pattern_that_matches_nothing_removes_nothing(cache):
    """And says so."""
    assert cache.invalidate(matching="nothing:*") == 0
