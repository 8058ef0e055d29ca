"""Hosts of a network for tests: network namespaces on one bridge, each with a store of its own.

Owns namespaces, addresses and which of them a program is started in. A namespace lives as long as
this process holds it open, so a test that is killed leaves none behind; devices go with theirs.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.interop.rig import DEDUPSTORE, PATIENCE_SECONDS, Server, Servers, StoreDirectory, run
from tests.programs import program_path, require_program, require_root

_CLONE_NEWNET = 0x40000000
_BRIDGE = "hosts"
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace with an address. Whatever `inside` starts is in it: a thread's namespace
    is its own, and that of the processes that it starts."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.descriptor = -1
        maker = threading.Thread(target=self._make)  # which ends in the namespace that it made
        maker.start()
        maker.join()
        assert self.descriptor >= 0, "no network namespace"
        with self.inside():
            _ip("link", "set", "lo", "up")

    def _make(self) -> None:
        if _libc.unshare(_CLONE_NEWNET) == 0:
            self.descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Have this thread in the namespace."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(self.descriptor)
            yield
        finally:
            _enter(before)
            os.close(before)

    def close(self) -> None:
        os.close(self.descriptor)


def _ip(*words: str) -> None:
    run(program_path("ip") or "ip", *words)


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@dataclass(slots=True)
class Host(StoreDirectory):
    """A machine: its place in the network, its store, and what its programs find in their
    environment."""

    network: Namespace
    environment: dict[str, str]
    _servers: list[Servers] = field(default_factory=list)

    def cli(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        with self.network.inside():
            return subprocess.run(
                [DEDUPSTORE, "--store", self.path, *arguments],
                capture_output=True,
                check=False,
                text=True,
                timeout=PATIENCE_SECONDS,
                env={**os.environ, **self.environment},
            )

    def serve(self) -> Server:
        """Start nbdkit on this host, with metrics."""
        servers = Servers(self.path)
        self._servers.append(servers)
        with self.network.inside():
            return servers(metrics=True)

    def remote(self, url: str) -> None:
        """Make the remote `far` known."""
        self.do("remote", "add", "far", url)

    def stop_servers(self) -> None:
        """End what `serve` started: nothing unannounced may have been logged."""
        while self._servers:
            self._servers.pop().close()


class Network:
    """Namespaces that reach one another: `shop`, where object stores are, and hosts."""

    def __init__(self) -> None:
        require_root()
        require_program("ip")
        # Short: hosts have sockets in it.
        self._directory = Path(tempfile.mkdtemp(prefix="ds-", dir="/tmp"))
        self._hosts: list[Host] = []
        self.shop = Namespace("10.77.0.1")
        with self.shop.inside():
            # An address of its own: else it is its lowest port's, and another one with a new host.
            _ip("link", "add", _BRIDGE, "address", "02:00:00:00:00:01", "type", "bridge")
            _ip("address", "add", f"{self.shop.address}/24", "dev", _BRIDGE)
            _ip("link", "set", _BRIDGE, "up")

    def host(self, name: str, environment: Mapping[str, str]) -> Host:
        """A new host, with an empty store."""
        number = len(self._hosts) + 2
        network = Namespace(f"10.77.0.{number}")
        port = f"port{number}"
        pair = ["type", "veth", "peer", "name", "eth0", "netns", network.path]
        with self.shop.inside():
            _ip("link", "add", port, *pair)
            _ip("link", "set", port, "master", _BRIDGE, "up")
        with network.inside():
            _ip("address", "add", f"{network.address}/24", "dev", "eth0")
            _ip("link", "set", "eth0", "up")
        path = self._directory / name
        path.mkdir()
        own = {**environment, "DEDUPSTORE_RUN": str(path / "run")}
        host = Host(path / "store", network, own)
        host.create()
        self._hosts.append(host)
        return host

    def close(self) -> None:
        try:
            for host in self._hosts:
                host.stop_servers()
        finally:
            for network in (*(host.network for host in self._hosts), self.shop):
                network.close()
            shutil.rmtree(self._directory, ignore_errors=True)


def at_once(*works: Callable[[], object]) -> None:
    """Do all in threads that start together; the first failure is raised here."""
    barrier = threading.Barrier(len(works))
    failures: list[BaseException] = []

    def do(work: Callable[[], object]) -> None:
        try:
            barrier.wait(PATIENCE_SECONDS)
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=do, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
