"""Containers that share: two Debian roots mounted by the project's own logic on real kernels, over
real nbd devices, and what the second one costs.

Reading a root takes an emulated processor ten seconds, so what can be seen of one reading is: the
guests measure once, at the same time, and tests say what the figures must be.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dedupstore.erofs.writer import scan_directory, write_image
from dedupstore.store import Store
from tests.conftest import silent
from tests.vm import rig
from tests.vm.rig import Service, at_once, debian_roots, leave_nothing
from tools.guests import inside
from tools.guests.guest import Guest, GuestError
from tools.guests.sharing import SOCKET, Containers, Cost, best_share

MB = 10**6
FIRST, SECOND, THIRD = "/mnt/1", "/mnt/2", "/mnt/3"
# What a container may take beyond the contents that are new: its directories and metadata, in page
# cache and over NBD.
OVERHEAD_CACHED, OVERHEAD_NBD = int(4.5 * MB), 2 * MB
# A part of the roots that both have, for what needs no more.
PART = "usr/bin"


@dataclass
class Measured:
    """One reading of containers on one kernel."""

    costs: dict[str, Cost] = field(default_factory=dict)
    ten: list[Cost] = field(default_factory=list)
    inventories: dict[str, Any] = field(default_factory=dict)
    shares: set[str] = field(default_factory=set)


@pytest.fixture(scope="session")
def measured(suite: str, every_measured: dict[str, Measured]) -> Measured:
    """What the guest measured."""
    return every_measured[suite]


@pytest.fixture(scope="session")
def every_measured(
    guests: dict[str, Guest],
    image_store: Store,
    image_servers: dict[str, Service],
    many: list[str],
) -> dict[str, Measured]:
    """What all guests measured."""

    def measure_one(suite: str) -> Measured:
        guest = guests[suite]
        return measure(
            guest, Containers(guest, image_store, image_servers[suite].store_reads), many
        )

    return at_once(measure_one, guests)


def measure(guest: Guest, containers: Containers, many: list[str]) -> Measured:
    """Base first; whatever comes then shares with it, and it stays to the end."""
    best = best_share(guest)
    found = Measured()
    costs = found.costs
    guest.python(inside.drop_caches)
    costs["first"] = containers.cost("base", FIRST, best)
    costs["second"] = containers.cost("derived", SECOND, best)
    costs["clone"] = containers.cost("clone", THIRD, best)
    found.shares = {mount["share"] for mount in containers.mounts()}
    for name, directory in (("base", FIRST), ("derived", SECOND)):
        found.inventories[name] = guest.python(inside.inventory, directory, timeout=200)
    containers.umount(SECOND, THIRD)
    costs["mapped"] = containers.cost("derived", SECOND, best, mapped=True)
    containers.umount(SECOND)
    costs["overlay"] = overlay_cost(guest, containers, "derived", best)
    containers.umount(SECOND)
    found.ten = [costs["first"]]
    for number, name in enumerate(many):
        found.ten.append(containers.cost(name, f"/mnt/ten-{number}", best))
    leave_nothing(guest, containers)
    return found


def overlay_cost(guest: Guest, containers: Containers, name: str, share: str) -> Cost:
    """What a container reads and writes through an overlay of its own."""
    containers.mount(name, SECOND, share)
    guest.do("mkdir /mnt/top && mount -t tmpfs none /mnt/top && cd /mnt/top && mkdir u w m")
    options = f"lowerdir={SECOND},upperdir=/mnt/top/u,workdir=/mnt/top/w"
    guest.do(["mount", "-t", "overlay", "-o", options, "none", "/mnt/top/m"])
    found = containers.read_cost("/mnt/top/m")
    guest.do("echo own >>/mnt/top/m/etc/fstab && grep -q own /mnt/top/m/etc/fstab")
    guest.do("umount /mnt/top/m /mnt/top && rmdir /mnt/top")
    return found


@pytest.fixture(scope="session")
def many(image_store: Store, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Nine more images, each base with a file of its own."""
    tree = tmp_path_factory.mktemp("many") / "tree"
    shutil.copytree(debian_roots() / "base", tree, symlinks=True, ignore=_no_devices)
    names = []
    for number in range(9):
        (tree / "etc" / "container").write_text(f"container {number}\n" * 1000)
        names.append(image_store.import_path(tree, f"container-{number}", silent)[0])
    shutil.rmtree(tree)
    return names


def _no_devices(directory: str, names: list[str]) -> list[str]:
    return names if directory.endswith("/dev") else []


@pytest.fixture(scope="session")
def new_bytes() -> int:
    """What derived has and base has not."""
    return rig.new_bytes()


# --- what it costs ---


def test_kernel_shares_as_it_can(measured: Measured, best: str) -> None:
    assert measured.shares == {best}


def test_first_container_costs_its_contents(measured: Measured) -> None:
    first = measured.costs["first"]
    assert first.file_bytes > 100 * MB
    assert first.cached_bytes < first.file_bytes * 1.2 < 160 * MB
    assert first.store_reads > 2000


@pytest.mark.parametrize("way", ["second", "mapped", "overlay"])
def test_second_container_costs_what_is_new(measured: Measured, new_bytes: int, way: str) -> None:
    second = measured.costs[way]
    assert second.file_bytes > measured.costs["first"].file_bytes
    assert second.cached_bytes <= new_bytes + OVERHEAD_CACHED
    assert second.nbd_bytes <= new_bytes + OVERHEAD_NBD


def test_identical_clone_costs_nothing(measured: Measured) -> None:
    clone = measured.costs["clone"]
    assert clone.file_bytes == measured.costs["first"].file_bytes
    assert clone.cached_bytes <= 0.1 * MB
    assert (clone.nbd_bytes, clone.store_reads) == (0, 0)


def test_server_loads_no_shared_chunk_again(measured: Measured, image_store: Store) -> None:
    own = image_store.diff("base", "derived").only_b_chunks
    # Its own chunks and its view's metadata; a frame of those may hold a few others.
    assert measured.costs["second"].store_reads <= own + 32


def test_ten_containers_cost_half_as_much_again_as_one(measured: Measured) -> None:
    assert len(measured.ten) == 10
    assert all(cost.file_bytes >= measured.ten[0].file_bytes for cost in measured.ten)
    total = sum(cost.cached_bytes for cost in measured.ten)
    assert total <= 1.5 * measured.ten[0].cached_bytes


def test_without_sharing_the_second_container_costs_as_much_as_the_first(
    containers: Containers,
) -> None:
    first = containers.cost("base", FIRST, "none", part=PART)
    second = containers.cost("derived", SECOND, "none", part=PART)
    assert second.cached_bytes > 0.95 * first.cached_bytes > 10 * MB
    clone = containers.cost("clone", THIRD, "none", part=PART)
    assert clone.cached_bytes <= 0.1 * MB
    assert (clone.nbd_bytes, clone.store_reads) == (0, 0)


def test_sharing_can_be_turned_off_beside_mounts_that_share(
    guest: Guest, containers: Containers, best: str
) -> None:
    containers.mount("base", FIRST, best)
    guest.python(inside.read_all, f"{FIRST}/{PART}", timeout=120)
    apart = containers.cost("base", SECOND, "none", part=PART)
    assert apart.cached_bytes > 10 * MB
    containers.mount("clone", THIRD, best)
    superblocks = {mount["directory"]: mount["superblock"] for mount in containers.mounts()}
    assert superblocks[FIRST] == superblocks[THIRD] != superblocks[SECOND]
    shares = {mount["directory"]: mount["share"] for mount in containers.mounts()}
    assert shares == {FIRST: best, SECOND: "none", THIRD: best}


# --- what it shows ---


@pytest.mark.parametrize("name", ["base", "derived"])
def test_mounted_container_is_as_its_tree(measured: Measured, name: str) -> None:
    assert measured.inventories[name] == inside.inventory(str(debian_roots() / name))


@pytest.mark.parametrize("share", ["kernel", "pool", "none"])
def test_tree_of_every_kind_of_file_is_mounted_as_it_is(
    guest: Guest, containers: Containers, best: str, kinds: Path, share: str
) -> None:
    """The image with fingerprints mounts on every kernel, also where it does not share."""
    if share == "kernel" and best != "kernel":
        with pytest.raises(GuestError, match="Invalid argument"):
            containers.mount("kinds", FIRST, share)
        return
    containers.mount("kinds", FIRST, share)
    assert guest.python(inside.inventory, FIRST) == inside.inventory(str(kinds))


def test_programs_run_from_the_second_container(
    guest: Guest, containers: Containers, best: str
) -> None:
    command = "perl -e 'print 6*7'; ls -l /bin | wc -l; sha256sum /bin/bash"
    for directory in (FIRST, SECOND):
        containers.mount("base" if directory == FIRST else "derived", directory, best)
    outputs, cached = [], []
    for directory in (FIRST, SECOND):
        before = guest.python(inside.cached_bytes)
        outputs.append(guest.do(["chroot", directory, "/bin/bash", "-c", command]))
        cached.append(guest.python(inside.cached_bytes) - before)
    assert outputs[0].startswith("42")
    assert outputs[0].split()[-2] == outputs[1].split()[-2]
    assert cached[1] < cached[0] / 4


# --- lifetimes ---


@pytest.mark.parametrize(("stays", "goes"), [("base", "derived"), ("derived", "base")])
def test_container_reads_on_when_another_goes(
    guest: Guest, containers: Containers, best: str, stays: str, goes: str
) -> None:
    """Both have read all; what one of them has made the kernel share must not go with it."""
    containers.mount(stays, FIRST, best)
    guest.python(inside.read_all, f"{FIRST}/{PART}", timeout=120)
    containers.mount(goes, SECOND, best)
    guest.python(inside.read_all, f"{SECOND}/{PART}", timeout=120)
    containers.umount(SECOND)
    guest.python(inside.drop_caches)
    found = guest.python(inside.inventory, f"{FIRST}/{PART}", timeout=120)
    assert found == inside.inventory(str(debian_roots() / stays / PART))


def test_containers_come_and_go_while_one_is_read(
    guest: Guest, containers: Containers, best: str
) -> None:
    containers.mount("base", FIRST, best)
    read = f"find {FIRST}/{PART} -type f -exec dd if={{}} of=/dev/null bs=128k ';'"
    guest.do(f"(while :; do {read}; done) >/dev/null 2>/tmp/errors & echo $! >/tmp/reader")
    for _ in range(2):
        containers.mount("derived", SECOND, best)
        guest.python(inside.drop_caches)
        guest.python(inside.read_all, f"{SECOND}/{PART}", timeout=200)
        containers.umount(SECOND)
    guest.do("kill $(cat /tmp/reader); while pidof find; do sleep 0.1; done")
    assert "error" not in guest.do("cat /tmp/errors").replace("0 errors", "")


# --- devices ---


def test_attached_device_is_the_image_and_no_busy_one_is_taken(
    guest: Guest, containers: Containers, image_store: Store
) -> None:
    guest.do(["nbd-client", "-unix", SOCKET, "/dev/nbd0", "-N", "derived", "-b", "4096"])
    device = containers.attach("base")
    assert device == "/dev/nbd1"
    assert containers.attach("clone") == device
    block = "/sys/block/nbd1"
    assert guest.do(["cat", f"{block}/queue/logical_block_size"]) == "4096\n"
    assert guest.do(["cat", f"{block}/size"]) == f"{image_store.image('base').size // 512}\n"
    guest.do(["mkdir", "-p", FIRST])
    guest.do(["mount", "-t", "erofs", "-o", "ro", device, FIRST])
    found = guest.python(inside.inventory, f"{FIRST}/etc")
    assert found == inside.inventory(str(debian_roots() / "base" / "etc"))
    guest.do(["umount", FIRST])
    for name in ("base", "clone"):
        assert guest.do(["cat", f"{block}/size"]) != "0\n"
        containers.detach(name)
    assert guest.do(["cat", f"{block}/size"]) == "0\n"
    guest.do(["nbd-client", "-d", "/dev/nbd0"])


# --- trust ---


def test_claimed_fingerprint_reaches_no_neighbour(
    guest: Guest, containers: Containers, image_store: Store, best: str, tmp_path: Path
) -> None:
    """An image claims that its file is another one's. A kernel that shares, given the images as
    they are, believes it, and the neighbour reads bytes that it never had; of views it reads its
    own. (Kernels that know no fingerprints cannot be fooled, and are shown not to be.)"""
    honest, crafted = b"the neighbour's own content\n", b"what an attacker would like\n"
    assert len(honest) == len(crafted)
    if "victim" not in image_store.names():
        import_file(image_store, tmp_path, "victim", honest)
        import_file(image_store, tmp_path, "attacker", crafted, claims=honest)
    domain = ",inode_share,domain_id=by-hand" if best == "kernel" else ""
    for number, (name, directory) in enumerate((("attacker", FIRST), ("victim", SECOND))):
        device = f"/dev/nbd{number}"
        guest.do(["nbd-client", "-unix", SOCKET, device, "-N", name, "-b", "4096"])
        guest.do(["mkdir", "-p", directory])
        guest.do(["mount", "-t", "erofs", "-o", f"ro{domain}", device, directory])
        read(guest, directory)
    fooled = read(guest, SECOND)
    for number, directory in enumerate((FIRST, SECOND)):
        guest.do(["umount", directory])
        guest.do(["nbd-client", "-d", f"/dev/nbd{number}"])
    assert fooled == (crafted if best == "kernel" else honest)
    for name, directory in (("attacker", FIRST), ("victim", SECOND)):
        containers.mount(name, directory, best)
        read(guest, directory)
    assert read(guest, FIRST) == crafted
    assert read(guest, SECOND) == honest


def read(guest: Guest, directory: str) -> bytes:
    """The file, by read(2): what is spliced is never shared."""
    return guest.do(f"dd if={directory}/file bs=4k 2>/dev/null").encode()


def import_file(
    store: Store, directory: Path, name: str, content: bytes, claims: bytes = b""
) -> None:
    """Import an image with one file; with `claims` its fingerprint is that of another content."""
    tree = directory / name
    tree.mkdir()
    (tree / "file").write_bytes(content)
    out = io.BytesIO()
    write_image(scan_directory(tree), out, fingerprints=True)
    raw = out.getvalue()
    if claims:
        own, other = (hashlib.sha256(data).digest() for data in (content, claims))
        assert raw.count(own) == 1
        raw = raw.replace(own, other)
    image = directory / f"{name}.erofs"
    image.write_bytes(raw)
    store.import_path(image, name, silent)
