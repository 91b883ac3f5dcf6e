"""The demo's log reader, and the audit that reads the same log by other means."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.site import access_log, audit

LINE = '10.0.0.1 - - [17/May/2015:10:05:03 +0000] "GET /a?b=c HTTP/1.1" 200 512 "-" "agent"'


def _counted(log: access_log.Log) -> audit.Counts:
    counts = audit.Counts(rows=len(log.requests), views=Counter(request.path for request in log.requests))
    for request in log.requests:
        counts.sizes[request.path] += request.size
    return counts


def test_a_combined_line_is_read() -> None:
    """Client, time, method, path, status and size."""
    request = access_log.parse_line(LINE)

    assert request is not None
    assert dataclasses.astuple(request)[2:] == ("GET", "/a?b=c", 200, 512)
    assert request.at.isoformat() == "2015-05-17T10:05:03+00:00"


def test_a_common_line_without_a_size_is_read() -> None:
    """A dash stands for no bytes."""
    request = access_log.parse_line('::1 - frank [10/Oct/2000:13:55:36 -0700] "HEAD / HTTP/1.0" 304 -')

    assert request is not None
    assert (request.client, request.size) == ("::1", 0)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        LINE.replace('"GET /a?b=c HTTP/1.1"', '"-"'),
        LINE.replace("17/May/2015", "99/May/2015"),
        LINE.replace(" 200 ", " abc "),
        LINE.replace(" 512 ", " many "),
        LINE.replace("/a?b=c", "/" + "x" * 901),
        LINE[:40],
    ],
)
def test_what_is_no_request_is_told_apart(line: str) -> None:
    """Neither reader takes it for a request."""
    assert access_log.parse_line(line) is None
    assert audit.request_of(line) is None


@given(
    st.lists(
        st.one_of(
            st.text(max_size=60),
            st.builds(
                lambda at, cut, put: LINE[:at] + put + LINE[at + cut :],
                st.integers(0, len(LINE)),
                st.integers(0, 9),
                st.text(alphabet='" \\[]-0aZ/é\t', max_size=4),
            ),
            st.just(LINE),
        ),
        max_size=8,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_readers_agree_on_damaged_logs(tmp_path: Path, lines: list[str]) -> None:
    """Lines are cut, filled and made up; the replay and the audit count the same."""
    text = "\n".join(line.replace("\r", " ").replace("\n", " ") for line in lines)
    path = tmp_path / "access.log"
    path.write_bytes(text.encode("utf-8", "replace"))

    read = access_log.parse(path.read_bytes().decode("utf-8", "replace").split("\n"))

    assert audit.differences(audit.count_log(path), _counted(read)) == []


def test_a_generated_log_is_the_same_each_time_and_readable() -> None:
    """A fixed seed; and every line is a request."""
    lines = list(access_log.generate(300, seed=1))

    assert lines == list(access_log.generate(300, seed=1))
    assert len(access_log.parse(lines).requests) == 300


def test_a_generated_log_has_popular_pages() -> None:
    """As sites have them: the first tenth of the pages gets more than half of the requests."""
    views = Counter(request.path for request in access_log.parse(access_log.generate(4_000, seed=2)).requests)

    assert sum(count for _, count in views.most_common(40)) > 2_000


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\x7fELF\0\0\0", "is binary"),
        (b"hello\nworld\n", "none of its 2 lines"),
    ],
)
def test_a_log_that_cannot_be_replayed_is_refused_in_one_line(tmp_path: Path, content: bytes | None, why: str) -> None:
    """Missing, empty, binary, or no access log at all."""
    path = tmp_path / "access.log"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(access_log.UnreadableLog, match=why) as refusal:
        access_log.read(path)
    assert "\n" not in str(refusal.value)


def test_unreadable_lines_are_counted_and_kept() -> None:
    """With their numbers, so that a person finds them."""
    log = access_log.parse([LINE, "garbage", LINE])

    assert len(log.requests) == 2
    assert log.unreadable == [(2, "garbage")]
