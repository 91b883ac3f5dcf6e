"""Locks and limits on a Cluster: every script of the package runs there, with keys in several slots."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from local_nodes import eventually

import petiole.coordination
from petiole import (
    Barrier,
    Connections,
    Debounce,
    Leader,
    Lock,
    RateLimit,
    RateLimiter,
    ReadWriteLock,
    Semaphore,
    SingleFlight,
    Throttle,
)
from petiole.cachelib.scripts import load
from petiole.coordination import keys, parking
from petiole.coordination.errors import StaleFence
from petiole.coordination.fencing import FencedStore

LONG_S = 60.0
SCRIPTS = sorted(
    path.stem
    for path in (Path(petiole.coordination.__file__).parent / "lua").glob("*.lua")
    if not path.stem.startswith("_")
)
SEVERAL_SLOTS = {"task_admit", "task_end", "line_serve", "parked_wake", "claim_take"}
"""One admission asks all gates of a task, whose names are in several slots. ``ParkingLot`` refuses a Cluster."""


@pytest.fixture
def names(name: str) -> Iterator[list[str]]:
    """Names whose keys are in several slots, on all nodes of three."""
    return [f"{name}-{number}" for number in range(12)]


def test_every_script_runs_on_a_cluster(clustered: Connections, names: list[str]) -> None:
    """Each operation of each class, once; afterwards every script is known to some node, and no error came."""
    for node in clustered.coordination.primaries():  # type: ignore[attr-defined]
        node.execute_command("SCRIPT FLUSH")
    with ThreadPoolExecutor(4) as pool:
        for each in names:
            lock = Lock(clustered, each)
            hold = lock.acquire(LONG_S)
            hold.extend()
            waiting = pool.submit(Lock(clustered, each).acquire, LONG_S)
            eventually(lambda: lock.inspect().waiting, "it waits")  # noqa: B023
            assert lock.force_release() == 1
            later = waiting.result(LONG_S)
            assert later.fence > hold.fence
            store = FencedStore(clustered, "store")
            store.set(each, b"1", later)
            with pytest.raises(StaleFence):
                store.set(each, b"2", hold)
            assert later.release()
            semaphore = Semaphore(clustered, each, permits=1)
            with semaphore:
                assert semaphore.resize(2) == 1
                assert (again := semaphore.try_acquire())
                assert again.release()
            both = ReadWriteLock(clustered, each)
            written = both.write.acquire(LONG_S)
            both.downgrade(written)
            with both.read:
                assert written.release()
        barrier = Barrier(clustered, names[0], 2)
        arrived = pool.submit(barrier.wait, LONG_S)
        assert {barrier.wait(LONG_S), arrived.result(LONG_S)} == {0, 1}
        lonely = pool.submit(Barrier(clustered, names[1], 2).wait, 0.2)
        with pytest.raises(TimeoutError):
            lonely.result(LONG_S)
    with Leader(clustered, names[2]) as leader:
        assert leader.wait(LONG_S)
    limiter = RateLimiter(clustered, names[3], [RateLimit("5/m"), RateLimit.exact("9/h")])
    decision = limiter.hit("k")
    limiter.refund(decision)  # type: ignore[arg-type]
    limiter.block("k", 5)
    assert not limiter.hit("k")
    assert Throttle(clustered, names[4], every=60).hit("k")
    with Debounce(clustered, names[5], wait=0.05) as debounce:
        debounce.call("k", list)
    assert SingleFlight(clustered, names[6]).do("k", lambda: 7) == 7
    run_what_parks_in_one_slot(clustered, names[7])

    shas = [load("petiole.coordination", script, list).sha for script in SCRIPTS]
    known = [client.script_exists(*shas) for client in clustered.coordination.primaries()]  # type: ignore[attr-defined]
    unknown = {script for script, *nodes in zip(SCRIPTS, *known, strict=True) if not any(nodes)}
    assert unknown == SEVERAL_SLOTS


def run_what_parks_in_one_slot(clustered: Connections, namespace: str) -> None:
    """The scripts of parked tasks that touch the names of one namespace alone."""
    client, named = clustered.coordination, keys.ParkingKeys(namespace)
    common = {"waits": named.waits, "woken": named.woken, "due": named.due, "parked": named.parked}
    client.hset(named.waits, "id", "w 1 id.0 1 - - -")
    client.hset(named.parked, "id", "record")
    client.zadd(named.woken, {"id": 1})
    found = parking._NEXT(client, **common, gates=named.gates, lead_us=0, most=10)
    assert found[4] == [b"id", b"1", b"id.0", b"-", b"w", b"record"]
    sent = {"ids": ["id"], "tokens": ["id.0"], "generations": [1], "forget": [0], "again_ms": [60_000]}
    assert parking._SENT(client, **common, **sent) == 1
    assert parking._FORGET(client, **common, id="id", sent_as="")
    client.set(named.run("id.0"), "nonce text", px=1_000)
    assert parking._RENEW(client, runs=[named.run("id.0")], nonces=["nonce"], leases_ms=[60_000]) == [1]
    claim = keys.claim(namespace, "key")
    client.set(claim, "id", px=60_000)
    assert parking._UNCLAIM(client, claim=claim, id="id")


def test_a_parking_lot_refuses_a_cluster_and_says_what_to_do(clustered: Connections) -> None:
    """Before any task could be parked where it would not be found."""
    with pytest.raises(ValueError, match=r"is a Cluster; .* Give coordinated tasks a single server or Sentinel"):
        parking.ParkingLot(clustered, "shop")
