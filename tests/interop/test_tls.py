"""`serve` over TCP and with TLS: who gets in, by GnuTLS's real certificates and keys."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from dedupstore.mounts.handshake import export_digest
from tests.interop.corpus import Images
from tests.interop.credentials import Authority, shared_key
from tests.interop.rig import (
    DEDUPSTORE,
    PATIENCE_SECONDS,
    StoreDirectory,
    in_foreground,
    require_nbdkit,
    run,
    wait_until,
)


@dataclass(frozen=True, slots=True)
class Listener:
    """A running `dedupstore serve --tcp`."""

    host: str
    port: int

    def uri(self, scheme: str, user: str = "", parameters: str = "") -> str:
        return f"{scheme}://{user}{self.host}:{self.port}/base{parameters}"

    def plain(self) -> str:
        return self.uri("nbd")

    def with_certificates(self, directory: Path) -> str:
        return self.uri("nbds", parameters=f"?tls-certificates={directory}")

    def with_key(self, user: str, keys: Path) -> str:
        return self.uri("nbds", user=f"{user}@", parameters=f"?tls-psk-file={keys}")


Listen = Callable[..., Listener]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority whose certificates the servers have."""
    authority = Authority.create(tmp_path_factory.mktemp("tls") / "ours")
    for make in (authority.server, authority.client, authority.anonymous):
        make()
    return authority


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody trusts."""
    authority = Authority.create(tmp_path_factory.mktemp("tls") / "foreign")
    for make in (authority.client, authority.anonymous):
        make()
    return authority


@pytest.fixture
def listen(store_dir: StoreDirectory) -> Iterator[Listen]:
    """Starts `serve --tcp` on a free port of `host` and returns once it takes connections."""
    require_nbdkit()
    with ExitStack() as ends:

        def start(*options: str | Path, host: str = "127.0.0.1") -> Listener:
            port = _free_port(host)
            command = [DEDUPSTORE, "--store", store_dir.path, "serve"]
            serving = ends.enter_context(
                in_foreground(*command, "--tcp", f"{host}:{port}", *options)
            )
            wait_until(lambda: _listens(host, port) or serving.poll() is not None)
            assert serving.poll() is None
            return Listener(host, port)

        yield start


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


def _free_port(host: str) -> int:
    with _socket(host) as probe:
        probe.bind((host.strip("[]"), 0))
        return int(probe.getsockname()[1])


def _listens(host: str, port: int) -> bool:
    with _socket(host) as probe:
        return probe.connect_ex((host.strip("[]"), port)) == 0


def _copy(uri: str, target: Path) -> bytes:
    run("nbdcopy", uri, target)
    return target.read_bytes()


def _refused(uri: str) -> str:
    """What a client says that is not let in."""
    result = subprocess.run(
        ["nbdinfo", "--size", uri],
        capture_output=True,
        check=False,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode != 0, result.stdout
    return result.stderr


def test_certificate_of_the_authority_that_a_client_knows_is_accepted(
    listen: Listen, ours: Authority, images: Images, tmp_path: Path
) -> None:
    server = listen("--tls-certificates", ours.directory / "server")
    uri = server.with_certificates(ours.directory / "anonymous")
    assert _copy(uri, tmp_path / "copy") == images.base.read_bytes()
    run("nbdinfo", "--list", uri)


def test_over_tcp_a_client_without_tls_learns_nothing(listen: Listen, ours: Authority) -> None:
    server = listen("--tls-certificates", ours.directory / "server")
    assert "policy" in _refused(server.plain()) or "TLS" in _refused(server.plain())
    listed = subprocess.run(
        ["nbdinfo", "--list", server.plain()], capture_output=True, check=False, text=True
    )
    assert listed.returncode != 0
    assert "derived" not in listed.stdout + listed.stderr


def test_client_that_knows_another_authority_does_not_take_the_server_for_its_own(
    listen: Listen, ours: Authority, foreign: Authority
) -> None:
    server = listen("--tls-certificates", ours.directory / "server")
    assert "certificate" in _refused(server.with_certificates(foreign.directory / "anonymous"))


def test_verify_peer_lets_in_only_clients_with_a_certificate_of_the_authority(
    listen: Listen, ours: Authority, foreign: Authority, images: Images, tmp_path: Path
) -> None:
    server = listen("--tls-certificates", ours.directory / "server", "--tls-verify-peer")
    uri = server.with_certificates(ours.directory / "client")
    assert _copy(uri, tmp_path / "copy") == images.base.read_bytes()
    _refused(server.with_certificates(ours.directory / "anonymous"))
    # It trusts the server's authority, but what it shows was signed by another.
    pretender = tmp_path / "pretender"
    pretender.mkdir()
    for name in ("client-key.pem", "client-cert.pem"):
        (pretender / name).write_bytes((foreign.directory / "client" / name).read_bytes())
    (pretender / "ca-cert.pem").write_bytes(ours.certificate.read_bytes())
    _refused(server.with_certificates(pretender))
    _refused(server.plain())


def test_shared_key_lets_in_those_who_have_it(
    listen: Listen, images: Images, tmp_path: Path
) -> None:
    keys = shared_key(tmp_path / "keys", "alice")
    server = listen("--tls-psk", keys)
    assert _copy(server.with_key("alice", keys), tmp_path / "copy") == images.base.read_bytes()
    wrong = shared_key(tmp_path / "wrong", "alice")
    _refused(server.with_key("alice", wrong))
    _refused(server.with_key("mallory", shared_key(tmp_path / "other", "mallory")))
    _refused(server.plain())


def test_tls_off_serves_over_tcp_in_the_clear(
    listen: Listen, images: Images, tmp_path: Path
) -> None:
    server = listen("--tls", "off")
    assert _copy(server.plain(), tmp_path / "copy") == images.base.read_bytes()


def test_tls_on_serves_clients_with_and_without(
    listen: Listen, ours: Authority, images: Images, tmp_path: Path
) -> None:
    server = listen("--tls", "on", "--tls-certificates", ours.directory / "server")
    for uri in (server.plain(), server.with_certificates(ours.directory / "anonymous")):
        assert _copy(uri, tmp_path / "copy") == images.base.read_bytes()


def test_address_may_be_ipv6(listen: Listen, images: Images, tmp_path: Path) -> None:
    try:
        _free_port("[::1]")
    except OSError:
        pytest.skip("no IPv6 here")
    server = listen("--tls", "off", host="[::1]")
    assert _copy(server.plain(), tmp_path / "copy") == images.base.read_bytes()


def test_tls_over_a_unix_socket_is_required_once_credentials_are_given(
    store_dir: StoreDirectory, images: Images, tmp_path: Path
) -> None:
    require_nbdkit()
    keys = shared_key(tmp_path / "keys", "alice")
    path = store_dir.path / "nbd.sock"
    command = [DEDUPSTORE, "--store", store_dir.path, "serve", "--tls-psk", keys]
    with in_foreground(*command) as serving:
        wait_until(lambda: path.exists() or serving.poll() is not None)
        secure = f"nbds+unix://alice@/base?socket={path}&tls-psk-file={keys}"
        assert _copy(secure, tmp_path / "copy") == images.base.read_bytes()
        _refused(f"nbd+unix:///base?socket={path}")
        assert export_digest(path, "base", PATIENCE_SECONDS) is None, "no server for mounts"


@pytest.mark.parametrize(
    "options",
    [
        ("--tcp", "127.0.0.1"),
        ("--tcp", "127.0.0.1", "--tls", "require"),
        ("--tcp", "127.0.0.1", "--tls-psk", "/nowhere/keys"),
        ("--tcp", "127.0.0.1", "--tls-certificates", "/nowhere"),
        ("--tcp", "127.0.0.1", "--tls-certificates", "/", "--tls-psk", "/dev/null"),
        ("--tcp", "127.0.0.1", "--tls", "off", "--tls-psk", "/dev/null"),
        ("--tcp", "127.0.0.1", "--tls", "on", "--tls-certificates", "/", "--tls-verify-peer"),
        ("--tcp", "127.0.0.1", "--tls-psk", "/dev/null", "--tls-verify-peer"),
        ("--tcp", "127.0.0.1", "--tls", "off", "--socket", "/tmp/s"),
    ],
    ids=lambda options: " ".join(options[1:]),
)
def test_what_would_protect_less_than_it_says_is_refused_in_one_line(
    store_dir: StoreDirectory, options: tuple[str, ...]
) -> None:
    assert "--t" in store_dir.refuse("serve", *options, status=2)


def test_address_in_use_is_refused(store_dir: StoreDirectory) -> None:
    require_nbdkit()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = store_dir.cli("serve", "--tcp", address, "--tls", "off")
    assert result.returncode == 1
    assert "Address already in use" in result.stderr
    assert "Traceback" not in result.stderr
