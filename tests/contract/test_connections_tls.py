"""TLS: the server's certificate is checked, the client shows its own, and sentinels and clusters speak it too.

A proxy ends TLS before a server that need not know of it; what is not TLS it hands on as it is.
"""

import select
import socket
import ssl
import subprocess
import threading
from contextlib import suppress

import pytest
from local_nodes import eventually

from petiole.cachelib import Settings, connect
from petiole.cachelib.connections import UNAVAILABLE
from petiole.cachelib.errors import ServerUnavailable

TLS_HANDSHAKE = b"\x16"
PATIENT = 10  # seconds: two handshakes through a proxy take long on a busy machine


class Certificates:
    """An authority, and what it signed for a server on loopback and for a client."""

    def __init__(self, folder):
        self.authority, self.stranger = folder / "ca.pem", folder / "stranger.pem"
        self.server, self.client = (folder / "server.pem", folder / "server.key"), (folder / "c.pem", folder / "c.key")
        new = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
        for certificate in (self.authority, self.stranger):
            _do(*new, "-subj", "/CN=authority", "-keyout", certificate.with_suffix(".key"), "-out", certificate)
        for (certificate, key), names in ((self.server, "DNS:localhost,IP:127.0.0.1"), (self.client, "DNS:client")):
            _do(
                *(*new, "-subj", "/CN=petiole", "-addext", f"subjectAltName={names}"),
                *("-addext", "basicConstraints=critical,CA:FALSE", "-keyout", key, "-out", certificate),
                *("-CA", self.authority, "-CAkey", self.authority.with_suffix(".key")),
            )


def _do(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


class Proxy:
    """Ends TLS before a server."""

    def __init__(self, target_port, certificates, *, asks_client=False, shows=None):
        self.secure = self.plain = 0
        self._target_port = target_port
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.authority)
        self._context.load_cert_chain(*(shows or certificates.server))
        self._context.verify_mode = ssl.CERT_REQUIRED if asks_client else ssl.CERT_NONE
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def stop(self):
        self._ending.set()
        for thread in self._threads:
            thread.join(20)
        self._listener.close()

    def _accept(self):
        while not self._ending.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                thread = threading.Thread(target=self._serve, args=(self._listener.accept()[0],))
                self._threads.append(thread)
                thread.start()

    def _serve(self, near):
        with suppress(OSError), near, socket.create_connection(("127.0.0.1", self._target_port)) as far:
            near.settimeout(20)
            if near.recv(1, socket.MSG_PEEK) == TLS_HANDSHAKE:
                with self._context.wrap_socket(near, server_side=True) as secured:
                    self.secure += 1
                    self._hand_on(secured, far)
            else:
                self.plain += 1
                self._hand_on(near, far)

    def _hand_on(self, near, far):
        while not self._ending.is_set():
            for source in select.select([near, far], [], [], 0.05)[0]:
                data = source.recv(65_536)
                while source is near and isinstance(near, ssl.SSLSocket) and near.pending():
                    data += near.recv(near.pending())
                if not data:
                    return
                (far if source is near else near).sendall(data)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def proxy(certificates):
    """Starts proxies for one test."""
    proxies = []

    def start(target_port, **options):
        proxies.append(Proxy(target_port, certificates, **options))
        return proxies[-1]

    yield start
    for one in proxies:
        one.stop()


def test_a_server_whose_certificate_is_signed_by_a_known_authority_is_reached(proxy, certificates, redis_server, name):
    """With both protocols, over TLS and nothing else."""
    front = proxy(redis_server.port)
    for protocol in (2, 3):
        with connect(
            f"rediss://localhost:{front.port}/0?ssl_ca_certs={certificates.authority}&protocol={protocol}"
        ) as r:
            assert r.coordination.set(name, "v" * 100_000, px=60_000)
            assert r.coordination.get(name) == b"v" * 100_000
            assert r.health().server
    assert front.secure >= 2
    assert not front.plain


@pytest.mark.parametrize("authority", ["", "stranger"])
def test_a_server_that_nobody_vouches_for_is_not_spoken_to(proxy, certificates, redis_server, authority):
    """Neither by the authorities of the machine nor by another's of the same name."""
    front = proxy(redis_server.port)
    query = f"?ssl_ca_certs={certificates.stranger}" if authority else ""
    url = f"rediss://localhost:{front.port}/0{query}"
    with connect(url) as redis, pytest.raises(ServerUnavailable, match=r"(?i)certificate"):
        redis.health()


def test_a_certificate_for_another_name_is_refused(proxy, certificates, redis_server):
    """It is the name in the URL that counts."""
    front = proxy(redis_server.port, shows=certificates.client)
    url = f"rediss://localhost:{front.port}/0?ssl_ca_certs={certificates.authority}"
    with connect(url) as redis, pytest.raises(ServerUnavailable, match=r"(?i)certificate|host"):
        redis.health()
    with connect(f"{url}&ssl_check_hostname=no") as redis:
        assert redis.coordination.ping()


def test_a_client_shows_its_certificate_where_one_is_wanted(proxy, certificates, redis_server):
    """And is refused without."""
    front = proxy(redis_server.port, asks_client=True)
    url = f"rediss://localhost:{front.port}/0?ssl_ca_certs={certificates.authority}"
    shown, key = certificates.client
    with connect(f"{url}&ssl_certfile={shown}&ssl_keyfile={key}") as redis:
        assert redis.coordination.ping()
    with connect(url) as redis, pytest.raises(ServerUnavailable):
        redis.health()


def test_a_server_without_tls_is_not_spoken_to_in_clear(redis_server, certificates):
    """There is no way back from rediss://."""
    url = f"rediss://localhost:{redis_server.port}/0?ssl_ca_certs={certificates.authority}"
    with connect(url) as redis, pytest.raises(ServerUnavailable):
        redis.health()


def test_the_nodes_of_a_cluster_are_reached_over_tls(proxy, certificates, own_cluster, name):
    """The ones that are named in the URL, and those that they name."""
    cluster = own_cluster(1)
    front = proxy(cluster.nodes[0].port)
    cluster.run(cluster.nodes[0], "CONFIG", "SET", "cluster-announce-port", front.port)
    url = f"rediss+cluster://localhost:{front.port}?ssl_ca_certs={certificates.authority}"
    with connect(settings=Settings(url=url, cache_timeout=PATIENT)) as redis:
        assert redis.coordination.set(name, "v", px=60_000)
        assert redis.cache.get(name) == b"v"
    assert front.secure >= 2
    assert not front.plain


def _sets(redis, name):
    try:
        return redis.coordination.set(name, "v", px=60_000)
    except UNAVAILABLE:
        return False


def test_sentinels_and_the_primary_that_they_name_are_reached_over_tls(
    proxy, certificates, redis_server, sentinel, name
):
    """Both with the certificates of the URL."""
    front = proxy(redis_server.port)
    asked = proxy(sentinel(front.port))
    url = f"rediss+sentinel://localhost:{asked.port}/mymaster/0?ssl_ca_certs={certificates.authority}"
    with connect(settings=Settings(url=url, cache_timeout=PATIENT)) as redis:
        eventually(lambda: _sets(redis, name), "it is written to")
        assert redis.cache.get(name) == b"v"
    assert asked.secure
    assert not asked.plain
    assert front.secure  # the sentinel itself comes in clear
