"""Fixtures of the guest tests: two stores with their servers, and one guest per kernel."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dedupstore.store import Store
from tests.conftest import silent
from tests.interop.rig import StoreDirectory, require_nbdkit
from tests.programs import require_program, unavailable
from tests.vm.rig import (
    PERSISTENT,
    SOCKET,
    Service,
    at_once,
    attach,
    build_tree,
    debian_roots,
    leave_nothing,
)
from tools.guests import inside, sharing
from tools.guests.cache import SUITES, UnavailableError
from tools.guests.content import checkout_files
from tools.guests.guest import Guest
from tools.guests.sharing import Containers, best_share


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


@pytest.fixture(scope="session")
def image_store() -> Iterator[Store]:
    """A store with the two Debian roots, base and derived, imported as directories as most users
    would, and clone, a second name for base."""
    roots = debian_roots()
    directory = Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))
    store = StoreDirectory(directory / "store")
    store.create()
    for name in ("base", "derived"):
        store.do("import", roots / name, name)
    store.do("clone", "base", "clone")
    with Store(store.path) as opened:
        yield opened
    store.check()
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def kinds(image_store: Store, tree: Path) -> Path:
    """The tree of the image `kinds`, which has a file of every kind."""
    image_store.import_path(tree, "kinds", silent)
    return tree


@pytest.fixture(scope="session")
def image_servers(image_store: Store) -> Iterator[dict[str, Service]]:
    """A server of the images for each guest, so that each has its own count of what it loads."""
    require_nbdkit()
    directory = image_store.path.parent
    servers = {
        suite: Service(image_store.path, directory / f"nbd{i}", directory / f"metrics{i}")
        for i, suite in enumerate(SUITES)
    }
    yield servers
    for server in servers.values():
        server.kill()


@pytest.fixture(scope="session")
def guests(service: Service, image_servers: dict[str, Service]) -> Iterator[dict[str, Guest]]:
    """All guests, booted at once, with the servers' sockets and nbd devices."""
    files = checkout_files(*sharing.PROJECT)

    def boot(suite: str) -> Guest:
        sockets = {SOCKET: service.socket, sharing.SOCKET: image_servers[suite].socket}
        return Guest(suite, files=files, sockets=sockets)

    with ExitStack() as opened:
        try:
            found = at_once(boot, SUITES)
        except UnavailableError as error:
            unavailable(str(error))
        for guest in found.values():
            opened.enter_context(guest)
            guest.do(["modprobe", "nbd"])
        yield found


@pytest.fixture(scope="session", params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    """The suite that a guest's kernel is from."""
    return str(request.param)


@pytest.fixture(scope="session")
def guest(suite: str, guests: dict[str, Guest]) -> Guest:
    """A guest. Tests leave it as they found it."""
    return guests[suite]


@pytest.fixture(scope="session")
def images(suite: str, image_servers: dict[str, Service]) -> Service:
    """The server of the Debian roots that the guest mounts from."""
    return image_servers[suite]


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


@pytest.fixture(scope="session")
def best(guest: Guest) -> str:
    """How this kernel shares."""
    return best_share(guest)


@pytest.fixture
def containers(guest: Guest, image_store: Store, images: Service) -> Iterator[Containers]:
    """The containers, nothing of them cached before and nothing left of them after."""
    found = Containers(guest, image_store, images.store_reads)
    guest.python(inside.drop_caches)
    yield found
    leave_nothing(guest, found)
