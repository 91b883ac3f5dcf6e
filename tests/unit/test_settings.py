"""Settings: where they come from, which one wins, and what is never shown."""

import dataclasses

import pytest

from petiole.cachelib import Settings
from petiole.cachelib.settings import Address, without_password


def test_defaults_need_nothing():
    """Without arguments and environment there is a server on this machine and four TTL classes."""
    settings = Settings.read({})

    assert settings == Settings()
    assert settings.url == "redis://localhost:6379/0"
    assert (settings.ttl_short, settings.ttl_medium, settings.ttl_long, settings.ttl_day) == (60, 300, 3_600, 86_400)
    assert settings.cache_timeout == 0.05


def test_the_environment_is_read():
    """Each variable reaches its setting, as seconds or as text with units."""
    settings = Settings.read(
        {
            "REDIS_URL": "redis://cache:1/2",
            "CACHE_TTL_SHORT": "30",
            "CACHE_TTL_MEDIUM": "10m",
            "CACHE_TTL_LONG": "2h",
            "CACHE_TTL_DAY": "1d",
            "CACHE_TIMEOUT": "0.1",
        }
    )

    assert settings == Settings(
        url="redis://cache:1/2", ttl_short=30.0, ttl_medium="10m", ttl_long="2h", ttl_day="1d", cache_timeout=0.1
    )


def test_the_process_environment_is_the_default(monkeypatch):
    """Without an argument the environment of the process is read."""
    monkeypatch.setenv("REDIS_URL", "redis://from-the-process:1")

    assert Settings.read().url == "redis://from-the-process:1"


def test_arguments_win_over_the_environment():
    """What the program says stands above what surrounds it."""
    settings = Settings.read({"REDIS_URL": "redis://a", "CACHE_TTL_SHORT": "1"}, url="redis://b")

    assert settings.url == "redis://b"
    assert settings.ttl_short == 1.0


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({"REDIS_HOST": "h"}, "redis://h:6379/0"),
        ({"REDIS_HOST": "h", "REDIS_PORT": "1", "REDIS_DB": "2"}, "redis://h:1/2"),
        ({"REDIS_HOST": "h", "REDIS_PASSWORD": "p@s/s:#%"}, "redis://:p%40s%2Fs%3A%23%25@h:6379/0"),
        ({"REDIS_HOST": "h", "REDIS_PORT": "", "REDIS_DB": "", "REDIS_PASSWORD": ""}, "redis://h:6379/0"),
        ({"REDIS_HOST": "h", "REDIS_URL": "redis://u"}, "redis://u"),
        ({"REDIS_HOST": "h", "REDIS_URL": ""}, "redis://h:6379/0"),
        ({"REDIS_PORT": "1", "REDIS_PASSWORD": "p"}, "redis://localhost:6379/0"),
    ],
)
def test_parts_make_a_url_where_there_is_none(environment, url):
    """Host, port, password and database are put together, with the password quoted."""
    assert Settings.read(environment).url == url


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("REDIS_PORT", "http"),
        ("REDIS_PORT", "-1"),
        ("REDIS_DB", "main"),
        ("CACHE_TTL_SHORT", "soon"),
        ("CACHE_TTL_MEDIUM", "0"),
        ("CACHE_TTL_LONG", "-5"),
        ("CACHE_TTL_DAY", "nan"),
        ("CACHE_TIMEOUT", "inf"),
    ],
)
def test_a_variable_that_does_not_fit_is_named(variable, text):
    """Whoever set it finds it by its own name."""
    with pytest.raises(ValueError, match=variable):
        Settings.read({"REDIS_HOST": "h", variable: text})


@pytest.mark.parametrize("name", ["ttl_short", "ttl_medium", "ttl_long", "ttl_day", "cache_timeout"])
@pytest.mark.parametrize("duration", [0, -1, float("nan"), "soon"])
def test_an_argument_that_is_no_duration_is_named(name, duration):
    """Settings that would fail later fail when they are made."""
    with pytest.raises(ValueError, match=name):
        Settings(**{name: duration})


def test_an_unknown_argument_is_refused_with_the_nearest_known_one():
    """A typing error is found and explained."""
    with pytest.raises(TypeError, match="'ttl_shrt'; did you mean 'ttl_short'"):
        Settings.read({}, ttl_shrt=1)


def test_an_argument_that_is_like_none_is_refused_with_all_known_ones():
    """Where nothing is near, the choice is shown."""
    with pytest.raises(TypeError, match=r"'zzz'; known: \['url', .*'cache_timeout'\]"):
        Settings.read({}, zzz=1)


def test_settings_are_frozen():
    """What was passed down cannot change under somebody."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().url = "redis://other"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:s3cret@h:1/0", "redis://:***@h:1/0"),
        ("rediss://user:s3cret@h", "rediss://user:***@h"),
        ("redis://user:s3cr@et@h", "redis://user:***@h"),
        ("redis://h?password=s3cret&db=1", "redis://h?password=***&db=1"),
        ("unix:///tmp/r.sock?PASSWORD=s3cret", "unix:///tmp/r.sock?PASSWORD=***"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://user@h", "redis://user@h"),
        ("redis+cluster://:s3cret@h1:1,h2:2", "redis+cluster://:***@h1:1,h2:2"),
        ("rediss+cluster://u:s3cret@[::1]:1,h2/0?protocol=2", "rediss+cluster://u:***@[::1]:1,h2/0?protocol=2"),
        ("redis+sentinel://u:s3cr@et@h1,h2:2/main/0", "redis+sentinel://u:***@h1,h2:2/main/0"),
        ("redis+sentinel://h:1/main?sentinel_password=s3cret", "redis+sentinel://h:1/main?sentinel_password=***"),
        ("redis+sentinel://h:1/main?a=b&sentinel_username=s3cr", "redis+sentinel://h:1/main?a=b&sentinel_username=***"),
    ],
)
def test_a_url_is_shown_without_its_password(url, shown):
    """Everything but the password stays readable."""
    assert without_password(url) == shown
    assert "s3cr" not in repr(Settings(url=url))


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://:s3cret/x@h1:1,h2:2",
        "redis+cluster://h1:1,:s3cret@h2:2",
        "redis+sentinel://:s3cret?x@h1:1,h2:2/main",
        "redis+sentinel://h1:1,h2:2/main?sentinel_password=s3cret@x",
        "redis+sentinel://:s3cret#x@h1:1,h2:2/main",
        "redis://:s3cret/x@h:1",
        "redis://:s3cret?x@h",
        "redis://:s3cret#x@h",
        "user:s3cret@h:1",
        "redis://[:s3cret@h",
    ],
)
def test_a_password_is_not_shown_where_it_broke_the_url(url):
    """A password that nobody quoted is the usual reason for a bad URL, and must not come out in the message."""
    assert "s3cret" not in without_password(url)
    assert "s3cret" not in repr(Settings(url=url))


@pytest.mark.parametrize(
    "query", ["ssl_password=s3cret", "sslpassword=s3cret&x=1", "x=1&auth_token=s3cret", "p%61ssword=s3cret"]
)
def test_no_secret_in_the_query_is_shown(query: str) -> None:
    """By whatever name it goes."""
    assert "s3cret" not in without_password(f"rediss://h:1/0?{query}")


# Addresses


@pytest.mark.parametrize(
    ("url", "kind", "nodes", "service", "first"),
    [
        ("redis://h:1/2", "server", (), "", "redis://h:1/2"),
        ("unix:///r.sock?db=1", "server", (), "", "unix:///r.sock?db=1"),
        ("embedded://", "embedded", (), "", ""),
        ("redis+cluster://h1:7000,h2", "cluster", (("h1", 7000), ("h2", 6379)), "", "redis://h1:7000/0"),
        ("rediss+cluster://u:p@h1/?a=b", "cluster", (("h1", 6379),), "", "rediss://u:p@h1:6379/0?a=b"),
        ("redis+cluster://[::1]:7,h/0", "cluster", (("::1", 7), ("h", 6379)), "", "redis://[::1]:7/0"),
        ("redis+sentinel://h1,h2:5/main", "sentinel", (("h1", 26379), ("h2", 5)), "main", "redis://h1:26379/0"),
        (
            "rediss+sentinel://u:p%40@h1/main/3?x=1",
            "sentinel",
            (("h1", 26379),),
            "main",
            "rediss://u:p%40@h1:26379/3?x=1",
        ),
        ("redis+sentinel://h/a%20b/", "sentinel", (("h", 26379),), "a b", "redis://h:26379/0"),
    ],
)
def test_a_url_is_taken_apart(url, kind, nodes, service, first):
    """Hosts, the name of the primary, and what redis-py reads itself."""
    address = Address.read(url)

    assert (address.kind, address.nodes, address.service, address.url) == (kind, nodes, service, first)
    assert "p%40" not in repr(address)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis+cluster://", "hosts are written host:port"),
        ("redis+cluster://h1:7000,", "hosts are written host:port"),
        ("redis+cluster://h1:70000", "port"),
        ("redis+cluster://h1:port", "hosts are written host:port"),
        ("redis+cluster://:s3cret/x@h1:1", "hosts are written host:port"),
        ("redis+cluster://h1/1", "no databases but 0"),
        ("redis+cluster://h1?db=2", "no databases but 0"),
        ("redis+sentinel://h1:1", "does not say which primary"),
        ("redis+sentinel://h1:1/?db=1", "does not say which primary"),
        ("redis+sentinel://:s3cret@h1:1/main/x", "the database is no number"),
        ("redis+sentinel://:s3cret@h1:1/main?db=x", "the database is no number"),
        ("redis+other://h1", "starts with one of"),
        ("redis://h:s3cret", "port"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused_with_the_reason(url, message):
    """Before anything is sent, and without its password."""
    with pytest.raises(ValueError, match=message) as caught:
        Address.read(url)

    assert "s3cret" not in f"{caught.value} {caught.value.__cause__}"
