"""Fixtures of the guest tests: one store and its server, one guest per kernel, one boot each."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.rig import StoreDirectory, require_nbdkit
from tests.programs import require_program, unavailable
from tests.vm.rig import PERSISTENT, SOCKET, Service, attach, build_tree
from tools.guests.cache import SUITES, UnavailableError
from tools.guests.guest import Guest


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree that the image `base` was built from."""
    return build_tree(tmp_path_factory.mktemp("vm") / "tree")


@pytest.fixture(scope="session")
def service(tree: Path) -> Iterator[Service]:
    """The server of a store with `base`, intact in the end."""
    require_nbdkit()
    require_program("mkfs.erofs")
    directory = Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))  # a socket's path must be short
    store = StoreDirectory(directory / "store")
    store.create()
    store.do("import", tree, "base")
    service = Service(store.path, directory / "nbd")
    yield service
    service.kill()
    store.check()
    shutil.rmtree(directory)


@pytest.fixture(scope="session", params=SUITES)
def guest(request: pytest.FixtureRequest, service: Service) -> Iterator[Guest]:
    """A guest with the service's socket and nbd devices. Tests leave it as they found it."""
    try:
        booted = Guest(request.param, sockets={SOCKET: service.socket})
    except UnavailableError as error:
        unavailable(str(error))
    with booted:
        booted.do(["modprobe", "nbd"])
        yield booted


@pytest.fixture
def device(guest: Guest) -> Iterator[str]:
    """`base` as a block device of the guest, nothing of it cached."""
    device = "/dev/nbd0"
    guest.do(attach("base", device, *PERSISTENT))
    guest.do("echo 3 >/proc/sys/vm/drop_caches")
    yield device
    guest.do(["nbd-client", "-d", device])
    guest.do("while [ -e /sys/block/nbd0/pid ]; do sleep 0.05; done")


@pytest.fixture
def mounted(guest: Guest, device: str) -> Iterator[str]:
    """A plain EROFS mount of `device`."""
    guest.do(["mount", "-t", "erofs", "-o", "ro", device, "/mnt"])
    yield "/mnt"
    guest.do(["umount", "/mnt"])
