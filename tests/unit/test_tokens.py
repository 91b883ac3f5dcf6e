"""Tokens: none comes twice, whoever asks: threads at once, forked children, at the end of a series."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from petiole.cachelib.tokens import _COUNTED, Tokens

EACH = 2_000


@pytest.fixture
def often_switched():
    """Threads take turns as often as the interpreter can have them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def near_its_end(tokens, left):
    """Let a series have so many numbers left."""
    tokens._series = tokens._series._replace(numbers=count(_COUNTED - left))


def test_a_token_has_sixteen_characters_of_ascii():
    """That is the width of its field in an entry; none of them ends a key or a field."""
    made = [Tokens().next() for _ in range(100)]

    assert {len(token) for token in made} == {16}
    assert all(token.isascii() and token.replace("-", "").replace("_", "").isalnum() for token in made)


def test_two_series_have_nothing_in_common():
    """Each process, and each cache, begins with chance of its own."""
    assert len({Tokens().next()[:10] for _ in range(1_000)}) == 1_000


def test_threads_never_get_the_same_token(often_switched):
    """However they take turns."""
    tokens = Tokens()
    with ThreadPoolExecutor(8) as pool:
        made = [token for part in pool.map(lambda _: [tokens.next() for _ in range(EACH)], range(8)) for token in part]

    assert len(set(made)) == 8 * EACH


def test_a_series_that_ends_is_followed_by_another():
    """The number keeps its six digits."""
    tokens = Tokens()
    near_its_end(tokens, 2)
    made = [tokens.next() for _ in range(4)]

    assert [token[10:] for token in made] == ["fffffe", "ffffff", "000000", "000001"]
    assert made[0][:10] == made[1][:10] != made[2][:10] == made[3][:10]


def test_threads_that_end_a_series_together_never_get_the_same_token(often_switched):
    """A new start never meets a number of the old series, nor the other way round."""
    for _ in range(50):
        tokens = Tokens()
        near_its_end(tokens, 20)
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(lambda of: [of.next() for _ in range(20)], tokens) for _ in range(8)]
            made = [token for part in asked for token in part.result(60)]

        assert len(set(made)) == 8 * 20
        assert {len(token) for token in made} == {16}


def test_a_forked_child_has_a_start_of_its_own():
    """Or parent and child would take each other's leases for their own."""
    tokens = Tokens()
    tokens.next()
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writing, "".join(tokens.next() for _ in range(100)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    child = {said[i : i + 16] for i in range(0, len(said), 16)}
    parent = {tokens.next() for _ in range(100)}

    assert len(child) == len(parent) == 100
    assert not child & parent
    assert len({token[:10] for token in child | parent}) == 2
