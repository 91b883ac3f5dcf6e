"""``Buffer``: what is put is there, in order, and never more than the bound."""

from collections.abc import Callable
from threading import Barrier, Thread

import pytest

from petiole.cachelib import Connections, EmbeddedServer, connect
from petiole.cachelib.errors import BufferFull, ServerFull, ServerUnavailable
from petiole.cachelib.write_behind import Buffer


def payloads(buffer: Buffer, partition: int = 0) -> list[bytes]:
    return [entry.payload for entry in buffer.read(partition).entries]


def test_rows_are_read_in_the_order_of_their_puts(redis: Connections, name: str) -> None:
    """A row stands behind every row that was put there before."""
    buffer = Buffer(redis, name)
    for number in range(50):
        buffer.put(0, b"%d" % number)

    assert payloads(buffer) == [b"%d" % number for number in range(50)]


def test_any_bytes_can_be_put(redis: Connections, name: str) -> None:
    """A payload is bytes, not text."""
    buffer = Buffer(redis, name)
    buffer.put(0, bytes(range(256)))
    buffer.put(0, b"")

    assert payloads(buffer) == [bytes(range(256)), b""]


def test_reading_takes_nothing_away(redis: Connections, name: str) -> None:
    """A flusher that dies after its read has lost nothing."""
    buffer = Buffer(redis, name)
    buffer.put(0, b"row")

    assert payloads(buffer) == payloads(buffer) == [b"row"]


def test_a_read_is_at_most_one_batch(redis: Connections, name: str) -> None:
    """The oldest come first."""
    buffer = Buffer(redis, name, batch_size=2)
    for payload in (b"1", b"2", b"3"):
        buffer.put(0, payload)

    assert payloads(buffer) == [b"1", b"2"]


def test_a_trim_removes_the_batch_and_nothing_behind_it(redis: Connections, name: str) -> None:
    """Rows that were put after the read stay."""
    buffer = Buffer(redis, name, batch_size=2)
    for payload in (b"1", b"2", b"3"):
        buffer.put(0, payload)
    batch = buffer.read(0)
    buffer.put(0, b"4")

    assert buffer.trim(0, batch) == 2
    assert payloads(buffer) == [b"3", b"4"]


def test_partitions_do_not_see_each_other(redis: Connections, name: str) -> None:
    """Each is one stream, and ``lengths`` tells them apart."""
    buffer = Buffer(redis, name, partitions=3)
    buffer.put(0, b"a")
    buffer.put(2, b"b")
    buffer.put(2, b"c")

    assert buffer.lengths() == [1, 0, 2]
    assert payloads(buffer, 2) == [b"b", b"c"]


def test_buffers_do_not_see_each_other(redis: Connections, name: str) -> None:
    """Names are kept apart, whatever characters they have."""
    Buffer(redis, name).put(0, b"a")

    assert Buffer(redis, f"{name}:0").lengths() == [0, 0, 0, 0]
    assert Buffer(redis, f"{name}}}").lengths() == [0, 0, 0, 0]


def test_a_full_partition_takes_no_more_and_is_left_as_it_is(redis: Connections, name: str) -> None:
    """``BufferFull`` says which partition, and that nothing was added."""
    buffer = Buffer(redis, name, partitions=2, max_length=3)
    for payload in (b"1", b"2", b"3"):
        buffer.put(1, payload)

    with pytest.raises(BufferFull) as caught:
        buffer.put(1, b"4")
    assert (caught.value.buffer, caught.value.partition, caught.value.length) == (name, 1, 3)
    assert payloads(buffer, 1) == [b"1", b"2", b"3"]
    buffer.put(0, b"the other partition is not full")


def test_a_partition_that_was_trimmed_takes_rows_again(redis: Connections, name: str) -> None:
    """The bound is on rows that wait."""
    buffer = Buffer(redis, name, max_length=1)
    buffer.put(0, b"1")
    buffer.trim(0, buffer.read(0))
    buffer.put(0, b"2")

    assert payloads(buffer) == [b"2"]


def test_the_bound_holds_however_many_put_at_once(redis: Connections, name: str) -> None:
    """Bound and append are one step."""
    buffer = Buffer(redis, name, max_length=50)
    start = Barrier(4)
    refused: list[int] = []

    def put_many() -> None:
        start.wait()
        for _ in range(25):
            try:
                buffer.put(0, b"row")
            except BufferFull as full:
                refused.append(full.length)

    threads = [Thread(target=put_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert buffer.lengths()[0] == 50
    assert refused == [50] * 50


def test_a_batch_is_reported_full_exactly_at_the_multiples_of_its_size(redis: Connections, name: str) -> None:
    """One put in ``batch_size`` asks for a flush."""
    buffer = Buffer(redis, name, batch_size=3)

    assert [buffer.put(0, b"row") for _ in range(7)] == [False, False, True, False, False, True, False]


def test_rows_of_one_key_stay_in_one_partition_in_every_process() -> None:
    """The partition depends on the identity alone: not on a hash that each process seeds anew."""
    one = Buffer(connect("redis://127.0.0.1:1/0"), "a", partitions=4)

    assert [one.partition_of(identity) for identity in (b"", b"a", b"b", b"key")] == [0, 3, 1, 1]


def test_keys_spread_over_the_partitions() -> None:
    """No partition is left out."""
    buffer = Buffer(connect("redis://127.0.0.1:1/0"), "a", partitions=8)

    assert {buffer.partition_of(b"%d" % number) for number in range(100)} == set(range(8))


@pytest.mark.parametrize("argument", ["partitions", "batch_size", "max_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True, None])
def test_a_size_that_is_none_is_refused_at_once(argument: str, value: object) -> None:
    """Whole numbers of at least 1."""
    with pytest.raises(ValueError, match=f"{argument} must be a whole number of at least 1"):
        Buffer(connect("redis://127.0.0.1:1/0"), "a", **{argument: value})  # type: ignore[arg-type]


def test_a_server_that_forgot_its_scripts_is_told_them_again(redis: Connections, name: str) -> None:
    """A restart, a failover or SCRIPT FLUSH in the middle changes nothing."""
    buffer = Buffer(redis, name)
    client = redis.coordination
    client.script_flush()
    buffer.put(0, b"1")
    client.script_flush()
    buffer.put(0, b"2")
    client.script_flush()
    batch = buffer.read(0)
    client.script_flush()

    assert [entry.payload for entry in batch.entries] == [b"1", b"2"]
    assert buffer.trim(0, batch) == 2


def test_a_put_without_a_server_says_that_nobody_answered(own_server: Callable[..., EmbeddedServer], name: str) -> None:
    """``ServerUnavailable``, with the address, and the row is taken once the server is there."""
    server = own_server()
    with connect(server.url) as redis:
        buffer = Buffer(redis, name)
        buffer.put(0, b"1")
        server.stop()

        with pytest.raises(ServerUnavailable, match=f"put into buffer '{name}'") as caught:
            buffer.put(0, b"2")
    assert caught.value.address == server.url


def test_each_entry_carries_the_run_that_gave_it_its_id(
    redis: Connections, own_server: Callable[..., EmbeddedServer], name: str
) -> None:
    """Another server, another run; the read names the same one."""
    runs = set()
    with connect(own_server().url) as other:
        for connections in (redis, other):
            buffer = Buffer(connections, name)
            buffer.put(0, b"row")
            batch = buffer.read(0)
            assert batch.entries[0].run == batch.run == connections.coordination.info("server")["run_id"][:12]
            runs.add(batch.run)

    assert len(runs) == 2


def test_a_trim_that_was_meant_for_another_run_removes_nothing(
    redis: Connections, own_server: Callable[..., EmbeddedServer], name: str
) -> None:
    """After a restart ids may have gone back: rows that nobody applied could stand before the mark."""
    with connect(own_server().url) as other:
        before = Buffer(other, name)
        before.put(0, b"1")
        batch = before.read(0)
    after = Buffer(redis, name)
    redis.coordination.xadd(f"petiole:1:buffer:{{{name}:0/4}}", {"r": "other", "d": "2"}, id="1-1")

    assert after.trim(0, batch) == 0
    assert payloads(after) == [b"2"]


def test_a_server_that_does_not_tell_its_run_is_served_all_the_same(
    own_server: Callable[..., EmbeddedServer], name: str
) -> None:
    """INFO is not for everybody: such entries share one run without a name."""
    server = own_server()
    with connect(server.url) as admin:
        admin.coordination.execute_command("ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all", "-info")
    with connect(server.url.replace("redis://", "redis://app:secret@")) as redis:
        buffer = Buffer(redis, name)
        buffer.put(0, b"1")
        batch = buffer.read(0)

        assert (batch.run, batch.entries[0].run) == ("", "")
        assert buffer.trim(0, batch) == 1
        assert "secret" not in repr(buffer)


def test_a_server_without_memory_refuses_the_row_by_that_name(own_server: Callable[..., EmbeddedServer]) -> None:
    """It is not a server that did not answer: the row is known not to be there."""
    server = own_server("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    with connect(server.url) as redis:
        buffer = Buffer(redis, "full", partitions=1)
        taken: list[bool] = []

        def fill() -> None:
            while len(taken) < 1_000:
                taken.append(buffer.put(0, b"x" * 10_000))

        with pytest.raises(ServerFull, match="maxmemory"):
            fill()
        assert buffer.lengths() == [len(taken)]
