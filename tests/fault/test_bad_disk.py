"""A store on a disk that fails to read or write: one line each, nothing lost, servers go on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.store import Store
from tests.fault.conftest import Command
from tests.interop.corpus import Images
from tests.interop.rig import Servers, StoreDirectory, refusal
from tests.programs import require_program, require_root
from tools.crashes import program
from tools.faults.bad_disk import BadDisk, bad_disk

NAMES = ["base", "clone", "derived", "ragged"]


@pytest.fixture
def disk(tmp_path: Path, filled_store: Path) -> Iterator[BadDisk]:
    """A disk with the filled store on it, not mounted."""
    require_root()
    require_program("mkfs.ext4", "losetup", "nbdkit", "nbdfuse")
    with bad_disk(tmp_path) as made:
        with made.mounted():
            shutil.copytree(filled_store, made.root / "store")
        yield made


def require_intact(disk: BadDisk, images: Images) -> None:
    store = StoreDirectory(disk.root / "store")
    store.check()
    assert store.names() == NAMES
    for name in ("base", "derived", "ragged"):
        assert store.export(name) == getattr(images, name).read_bytes()


def test_disk_that_fails_to_read_ends_every_command_with_one_line(
    disk: BadDisk, images: Images, command: Command, tmp_path: Path
) -> None:
    store = disk.root / "store"
    with disk.mounted():
        for words in (
            ["ls"],
            ["stats"],
            ["clone", "base", "new"],
            ["rename", "base", "new"],
            ["rm", "base"],
            ["import", str(images.noise), "new"],
            ["import", str(images.base_tree), "new"],
            ["export", "base", str(tmp_path / "out")],
            ["mount", "--dry-run", "--share=pool", "base", "/mnt"],
            ["gc"],
            ["gc", "--compact"],
            ["check"],
            ["check", "--repair"],
        ):
            disk.forget(store / "data.mdb")
            with disk.failing("read"):
                status, out, err = command(store, *words)
            if words[0] == "check" and not err:
                assert status == 1
                assert out
            else:
                refusal(status, err)
    with disk.mounted():
        require_intact(disk, images)


@pytest.mark.parametrize(
    "words",
    [["import", "noise", "new"], ["clone", "base", "new"], ["rm", "base"], ["gc", "--compact"]],
)
def test_disk_that_fails_to_write_ends_a_command_with_one_line_and_harms_nothing(
    disk: BadDisk, images: Images, command: Command, words: list[str]
) -> None:
    store = disk.root / "store"
    words = [str(images.noise) if word == "noise" else word for word in words]
    with disk.mounted():
        assert command(store, "clone", "base", "gone")[0] == 0
        assert command(store, "rm", "gone")[0] == 0
        with disk.failing("write"):
            status, _, err = command(store, *words)
            refusal(status, err)
            # The file system is read-only by now.
            refusal(*command(store, *words)[::2])
    with disk.mounted():
        require_intact(disk, images)
        assert command(store, *words)[0] == 0
        StoreDirectory(store).check()


def frame_of(store: Path, name: str, *, but: str) -> tuple[int, int, int]:
    """A frame that only one image needs: the offset and length of its record in data.mdb, and the
    offset in the image of a chunk in it."""

    def find() -> str:
        with Store(store) as opened:
            others = opened.open_manifest(but)
            taken = {ref >> fmt.REF_SLOT_BITS for ref in others.refs}
            manifest = opened.open_manifest(name)
            data = (store / "data.mdb").read_bytes()
            with opened.env.read() as txn:
                for start, ref in zip(manifest.starts, manifest.refs, strict=False):
                    frame = ref >> fmt.REF_SLOT_BITS
                    if ref == fmt.REF_HOLE or frame in taken:
                        continue
                    value = txn.get(fmt.frame_key(frame), db=opened.env.frames)
                    if len(value) > 3 * 4096:
                        return f"{data.index(bytes(value))} {len(value)} {start}"
        raise AssertionError("no such frame")

    at, length, start = map(int, program.in_fork(find).split())
    return at, length, start


READ_AROUND = """
h = connect()
found = []
for at in map(int, arguments):
    try:
        h.pread(4096, at)
        found.append("ok")
    except nbd.Error as error:
        found.append(error.errno)
print(*found)
"""


def test_bad_block_under_a_frame_is_an_io_error_to_those_who_read_it_and_to_nobody_else(
    disk: BadDisk, images: Images, server: Servers
) -> None:
    store = disk.root / "store"
    with disk.mounted():
        at, length, start = frame_of(store, "derived", but="base")
        running = server(store=store)
        (store / "data.mdb").read_bytes()
        disk.forget(store / "data.mdb", at + 4096, length - 8192)
        with disk.failing("read"):
            assert running.client(READ_AROUND, "derived", str(start)).split() == ["EIO"]
            assert running.read("base") == images.base.read_bytes()
        # The same server, once the disk gives it again.
        assert running.read("derived") == images.derived.read_bytes()
        running.expect_log("cannot be read: Input/output error")
        running.stop()


def test_bad_block_under_a_frame_is_found_and_mended_from_another_store(
    disk: BadDisk, images: Images, command: Command, filled_store: Path
) -> None:
    store = disk.root / "store"
    with disk.mounted():
        at, length, _ = frame_of(store, "derived", but="base")
        (store / "data.mdb").read_bytes()
        disk.forget(store / "data.mdb", at + 4096, length - 8192)
        with disk.failing("read"):
            status, out, err = command(store, "check")
        assert (status, err) == (1, "")
        assert "image 'derived' offset" in out
        assert "cannot be read: Input/output error" in out
        status, out, err = command(store, "check", "--repair", "--from", filled_store)
        assert (status, err) == (0, "")
        require_intact(disk, images)
