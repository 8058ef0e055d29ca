"""Mounts and servers of images that are elsewhere: how they share, and what outages do to readers.

The real nbdkit, nginx and EROFS; what goes wrong goes wrong on the link between them
(tools/ondemand), or in the directory that nginx serves.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedupstore.mounts import sharing
from tests.interop.corpus import Images
from tests.interop.mountrig import MountRig, mount_rig
from tests.interop.rig import Servers, StoreDirectory, wait_until
from tests.interop.shop import Far

# Reads the image in pieces; prints what each brought, or the error.
READ_PIECES = """
import hashlib
h = connect()
for at in map(int, arguments):
    try:
        print(at, hashlib.sha256(h.pread(4096, at)).hexdigest())
    except nbd.Error as error:
        print(at, int(error.errnum))
"""


@pytest.fixture
def lazy(far: Far, empty_store_dir: StoreDirectory) -> StoreDirectory:
    """A store with lazy image `base`."""
    empty_store_dir.do("remote", "add", "far", far.url)
    empty_store_dir.do("pull", "--lazy", "far", "base")
    return empty_store_dir


@pytest.fixture
def rig(lazy: StoreDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[MountRig]:
    with mount_rig(lazy, monkeypatch) as made:
        yield made


@pytest.fixture
def serve(lazy: StoreDirectory) -> Iterator[Servers]:
    started = Servers(lazy.path)
    yield started
    started.close()


def missing(store: StoreDirectory) -> int:
    found: int = json.loads(store.do("info", "--json", "base"))["missing_bytes"]
    return found


def files(tree: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tree)): path.read_bytes()
        for path in sorted(tree.rglob("*"))
        if path.is_file()
    }


def read_uncached(path: Path) -> bytes:
    """A file's contents, what the kernel has cached of it dropped first."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def read_or_eio(path: Path) -> bytes | None:
    """A file's contents; None if that fails with EIO, as nothing else may."""
    try:
        return read_uncached(path)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None


# --- how they share ---


def test_lazy_image_is_mounted_itself_until_everything_is_here(
    rig: MountRig, images: Images
) -> None:
    before = missing(rig.store)
    assert before > 0
    directory = rig.mount("base", "auto")
    (mount,) = rig.listed()["mounts"]
    assert mount["share"] == "none"
    # A view would have needed all contents: mounting took some metadata.
    assert before - missing(rig.store) < before / 4
    assert files(directory) == files(images.base_tree)
    rig.umount(directory)
    rig.store.do("prefetch", "base")
    assert missing(rig.store) == 0
    directory = rig.mount("base", "auto")
    (mount,) = rig.listed()["mounts"]
    assert mount["share"] == sharing.candidates("auto")[0] != "none"
    assert files(directory) == files(images.base_tree)
    rig.umount(directory)
    rig.assert_nothing_left()


def test_sharing_that_is_asked_for_brings_what_it_needs(rig: MountRig, images: Images) -> None:
    directory = rig.mount("base", "pool")
    (mount,) = rig.listed()["mounts"]
    assert mount["share"] == "pool"
    assert files(directory) == files(images.base_tree)
    rig.umount(directory)
    rig.assert_nothing_left()


# --- outages ---


def test_mount_goes_on_after_an_outage(rig: MountRig, far: Far, images: Images) -> None:
    directory = rig.mount("base", "none")
    wanted = files(images.base_tree)
    present = "directory-1/file-11"
    assert (directory / present).read_bytes() == wanted[present]
    for path in directory.rglob("*"):  # names and sizes are here
        path.stat()
    away = far.folder.with_name("away")
    far.folder.rename(away)
    try:
        failed = [name for name in wanted if read_or_eio(directory / name) is None]
        assert failed
        assert read_uncached(directory / present) == wanted[present]
        assert rig.metrics()["dedup_remote_errors_total"] > 0
        server = rig.server()
    finally:
        away.rename(far.folder)
    wait_until(lambda: read_or_eio(directory / failed[0]) == wanted[failed[0]])
    assert {name: read_uncached(directory / name) for name in wanted} == wanted
    assert rig.server() == server
    rig.umount(directory)
    rig.assert_nothing_left()


def test_read_of_a_remote_that_refuses_ends_with_eio_and_one_line_that_says_why(
    lazy: StoreDirectory, serve: Servers, far: Far, images: Images
) -> None:
    server = serve(metrics=True)
    data = images.base.read_bytes()
    far_end = len(data) // 8192 * 4096
    before = server.client(READ_PIECES, "base", "0")
    far.link.down()
    during = server.client(READ_PIECES, "base", str(far_end), "0", str(far_end))
    first, here, second = during.splitlines()
    assert first == second == f"{far_end} {errno.EIO}"
    assert here == before.strip()
    # The second read needed no second wait: the remote is known to fail.
    assert server.metrics()["dedup_remote_errors_total"] >= 1
    assert len(server.log()) == 2
    where = rf"image 'base' offset \d+: {far.url}: packs/\w\w/\w+"
    server.expect_log(rf" error: {where}: cannot be reached \(try again later\)$")
    far.link.up()
    wait_until(lambda: server.client(READ_PIECES, "base", str(far_end)).strip() != first)
    assert server.read("base") == data


def test_wrong_bytes_never_reach_a_reader_nor_the_store(
    rig: MountRig, far: Far, images: Images
) -> None:
    directory = rig.mount("base", "none")
    wanted = files(images.base_tree)
    for path in directory.rglob("*"):
        path.stat()
    far.link.chaos(1.0, ["flip"], match="/packs/")
    read = {name: read_or_eio(directory / name) for name in wanted}
    assert all(data in (None, wanted[name]) for name, data in read.items())
    assert None in read.values()
    assert far.link.counters().faults["flip"] > 0
    assert missing(rig.store) > 0  # what is stored is verified in the end, by `check`
    # One that lies now and then is asked again: nobody notices.
    far.link.clear()
    far.link.strike("flip", 1, match="/packs/")
    name = next(name for name, data in read.items() if data is None)
    wait_until(lambda: read_or_eio(directory / name) == wanted[name])
    far.link.chaos(0.3, ["flip"], seed=3, match="/packs/")
    for name, content in wanted.items():
        assert read_or_eio(directory / name) in (None, content)
    far.link.clear()
    for name, content in wanted.items():
        wait_until(lambda name=name: read_or_eio(directory / name) is not None)  # type: ignore[misc]
        assert read_uncached(directory / name) == content
    rig.umount(directory)
    rig.assert_nothing_left()


def test_server_that_mount_starts_has_the_variables_of_the_mount_command(
    rig: MountRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-mount")
    directory = rig.mount("base", "none")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    environment = Path(f"/proc/{rig.server()}/environ").read_bytes().split(b"\0")
    assert b"AWS_ACCESS_KEY_ID=of-the-mount" in environment
    rig.umount(directory)
    rig.assert_nothing_left()
