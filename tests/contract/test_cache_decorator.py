"""``@cached``: the function itself, answering from the cache."""

import pytest

from petiole.cachelib import MISS, CachedFunction, cached


@pytest.fixture
def calls():
    return []


@pytest.fixture
def user(cache, calls):
    """A cached function that notes its calls, with a default, a tag of its argument, and a stale window."""

    @cached(cache, "user:{user_id}:{size}", ttl="5m", stale=60, tags=["user:{user_id}", "users"])
    def user(user_id: int, size: str = "s") -> dict:
        """One user."""
        calls.append((user_id, size))
        return {"id": user_id, "size": size, "call": len(calls)}

    return user


def test_a_call_is_answered_from_the_cache(user, calls):
    """However it is spelled, one call is loaded once, and another call is another."""
    answers = [user(7), user(user_id=7), user(7, "s"), user(7, size="s")]

    assert answers == [{"id": 7, "size": "s", "call": 1}] * 4
    assert user(8)["id"] == 8
    assert calls == [(7, "s"), (8, "s")]


def test_the_key_is_the_filled_template(user, cache):
    """A person can look it up."""
    user(7)

    assert user.key(7) == "user:7:s"
    assert cache.get("user:7:s")["id"] == 7


def test_get_never_loads(user, calls):
    """It answers with what is cached, or ``MISS``."""
    assert user.get(7) is MISS
    assert calls == []
    user(7)
    assert user.get(7)["id"] == 7


def test_invalidate_removes_one_call(user, calls):
    """And leaves the others."""
    user(7), user(8)
    user.invalidate(7)

    assert user.get(7) is MISS
    assert user.get(8)["id"] == 8


def test_tags_are_filled_too(user, cache):
    """One tag may be for one argument, another for all."""
    user(7), user(7, "l"), user(8)
    cache.invalidate(tags=["user:7"])

    assert [user.get(7), user.get(7, "l"), user.get(8) is MISS] == [MISS, MISS, False]
    cache.invalidate(tags=["users"])
    assert user.get(8) is MISS


def test_refresh_loads_anew(user, calls):
    """Although the value is still fresh, unless that is said to be enough."""
    user(7)

    assert user.refresh(7)
    assert user.get(7)["call"] == 2
    assert not user.refresh_call([7], {}, unless_fresh_for=10)
    assert user.refresh_call([], {"user_id": 7}, unless_fresh_for="1h")
    assert user(7)["call"] == len(calls) == 3


def test_ttl_and_stale_reach_redis(user, cache):
    """An entry lives for both."""
    user(7)
    left = cache.redis.coordination.pttl(cache.keys.entry(user.key(7)))

    assert 325_000 < left <= 360_000


def test_none_is_cached(cache, calls):
    """A function that returns nothing is called once."""
    function = cached(cache, "k")(lambda: calls.append(1))

    assert (function(), function(), calls) == (None, None, [1])
    assert function.get() is None


def test_it_looks_like_the_function(user):
    """Name, docstring and original stay, and its repr says how it is cached."""
    assert isinstance(user, CachedFunction)
    assert user.__name__ == "user"
    assert user.__doc__ == "One user."
    assert user.original(1)["id"] == 1
    assert "as 'user:{user_id}:{size}'" in repr(user)


@pytest.mark.parametrize(
    "options",
    [
        {"key": "{nobody}"},
        {"key": "k", "tags": ["{nobody}"]},
        {"key": "{"},
        {"key": "k", "ttl": 0},
        {"key": "k", "ttl": "soon"},
        {"key": "k", "stale": -1},
    ],
)
def test_a_mistake_shows_at_once(cache, options):
    """When the function is defined, not when it is first called."""
    with pytest.raises(ValueError, match=r"."):
        cached(cache, **options)(lambda a: a)


def test_arguments_that_the_function_does_not_take_are_a_type_error(user, calls):
    """As without a cache; nothing is loaded."""
    for call in (user, user.key, user.get, user.invalidate, user.refresh):
        with pytest.raises(TypeError):
            call(1, 2, 3)

    assert calls == []


def test_what_the_function_raises_reaches_the_caller(cache):
    """And is not cached."""
    answers = iter([ZeroDivisionError(), 5])

    @cached(cache, "k")
    def function():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(ZeroDivisionError):
        function()
    assert function() == 5
