"""A file system without room: what cannot be written says so, and all that is there stays."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from dedupstore.frames import TOTALS_KEY
from dedupstore.store import Store
from tests.conftest import noise, read_image
from tests.fault.conftest import Command
from tests.interop.corpus import Images
from tests.interop.rig import DEDUPSTORE, Servers, StoreDirectory, refusal, run
from tests.lazy import make_remote
from tests.programs import require_program, require_root
from tools.crashes import program

DISK_BYTES = 40 << 20


@dataclass(slots=True)
class Disk:
    """A small file system with a store on it, and a file that takes the room that is to be gone."""

    path: Path
    store: StoreDirectory

    def fill(self, leave: int = 0) -> None:
        """Take all room but `leave` bytes."""
        with (self.path / "filler").open("wb", buffering=0) as filler:
            _write_until_full(filler.fileno())
            os.fsync(filler.fileno())
            if leave:
                os.ftruncate(filler.fileno(), os.fstat(filler.fileno()).st_size - leave)
                os.fsync(filler.fileno())

    def free(self) -> None:
        (self.path / "filler").unlink()
        run("sync", "--file-system", self.path)  # others' may be slow, or gone


def _write_until_full(file: int) -> None:
    for size in (1 << 20, 4096, 1):
        with suppress(OSError):
            while os.write(file, b"\xff" * size):
                pass


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, filled_store: Path) -> Iterator[Disk]:
    """A disk of 40 MiB with the filled store on it, intact in the end."""
    require_root()
    point = tmp_path / "disk"
    point.mkdir()
    if request.param == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", point)
    else:
        require_program("mkfs.ext4", "losetup")
        with (tmp_path / "ext4").open("wb") as image:
            image.truncate(DISK_BYTES)
        run("mkfs.ext4", "-q", "-m0", "-O^has_journal", tmp_path / "ext4")
        run("mount", "-o", "loop", tmp_path / "ext4", point)
    try:
        store = StoreDirectory(point / "store")
        shutil.copytree(filled_store, store.path)
        yield Disk(point, store)
        store.check()
    finally:
        run("umount", point)


def no_room(result: tuple[int, str, str]) -> str:
    status, _, err = result
    line = refusal(status, err)
    assert "space left" in line, line
    return line


def test_import_that_does_not_fit_fails_in_one_line_and_harms_nothing(
    disk: Disk, images: Images, command: Command
) -> None:
    disk.fill(leave=6 << 20)
    no_room(command(disk.store.path, "import", images.noise, "noise"))
    disk.store.check()
    assert disk.store.names() == ["base", "clone", "derived", "ragged"]
    disk.free()
    assert disk.store.export("derived") == images.derived.read_bytes()


def test_import_succeeds_after_gc_and_with_room(
    disk: Disk, images: Images, command: Command
) -> None:
    before = disk.store.totals()
    disk.fill(leave=6 << 20)
    no_room(command(disk.store.path, "import", images.noise, "noise"))
    disk.free()
    disk.store.gc()
    assert disk.store.totals() == before
    assert command(disk.store.path, "import", images.noise, "noise")[0] == 0
    with_room = disk.path.parent / "noise"
    assert command(disk.store.path, "export", "noise", with_room)[0] == 0
    assert with_room.read_bytes() == images.noise.read_bytes()


@pytest.mark.parametrize("words", [["ls"], ["info", "base"], ["stats"], ["check"], ["gc", "-n"]])
def test_reading_commands_work_on_a_full_disk(
    disk: Disk, command: Command, words: list[str]
) -> None:
    disk.fill()
    status, out, err = command(disk.store.path, *(x.replace("-n", "--dry-run") for x in words))
    assert (status, err) == (0, "")
    assert out


def test_full_disk_is_served_byte_for_byte(disk: Disk, images: Images, server: Servers) -> None:
    disk.fill()
    running = server(store=disk.store.path)
    assert running.read("base") == images.base.read_bytes()
    assert running.read("ragged") == images.ragged.read_bytes()


def test_directory_import_on_a_full_disk_fails_in_one_line(
    disk: Disk, images: Images, command: Command
) -> None:
    disk.fill()
    no_room(command(disk.store.path, "import", images.base_tree, "tree"))
    assert list((disk.store.path / "tmp").iterdir()) == []


def test_stream_import_on_a_full_disk_fails_in_one_line(disk: Disk, images: Images) -> None:
    disk.fill(leave=4096)
    with images.noise.open("rb") as stream:
        result = subprocess.run(
            [DEDUPSTORE, "--store", disk.store.path, "import", "-", "stream"],
            stdin=stream,
            capture_output=True,
            check=False,
            text=True,
        )
    no_room((result.returncode, result.stdout, result.stderr))


def test_export_to_a_full_disk_fails_in_one_line_and_leaves_no_part(
    disk: Disk, command: Command, store_dir: StoreDirectory
) -> None:
    disk.fill(leave=1 << 20)
    status, _, err = command(store_dir.path, "export", "base", disk.path / "base")
    assert "No space left" in refusal(status, err)
    assert sorted(path.name for path in disk.path.iterdir() if path.name != "lost+found") == [
        "filler",
        "store",
    ]


@pytest.mark.parametrize(
    "words", [["clone", "base", "new"], ["rename", "base", "new"], ["rm", "derived"], ["gc"]]
)
def test_small_change_on_a_full_disk_happens_whole_or_not_at_all(
    disk: Disk, command: Command, words: list[str]
) -> None:
    before = disk.store.names()
    disk.fill()
    result = command(disk.store.path, *words)
    if result[0]:
        no_room(result)
        assert disk.store.names() == before
        disk.free()
        assert command(disk.store.path, *words)[0] == 0


def test_rm_and_gc_make_room_on_a_disk_that_an_import_filled(
    disk: Disk, images: Images, command: Command
) -> None:
    disk.fill(leave=6 << 20)
    no_room(command(disk.store.path, "import", images.noise, "noise"))
    assert command(disk.store.path, "rm", "derived")[0] == 0
    assert command(disk.store.path, "gc")[0] == 0
    assert command(disk.store.path, "import", images.derived, "derived")[0] == 0


def test_init_on_a_full_disk_fails_in_one_line_and_succeeds_with_room(
    disk: Disk, command: Command
) -> None:
    disk.fill()
    status, _, err = command(disk.path / "new", "init")
    assert "space left" in refusal(status, err).lower()
    disk.free()
    status, _, err = command(disk.path / "new", "init")
    assert (status, err) == (0, "")


PAGES_LEFT = (0, 1, 2, 3, 5, 8, 16, 64, 256, 1024, 4096)


@pytest.mark.parametrize("disk", ["ext4"], indirect=True)
@pytest.mark.parametrize(
    "words",
    [
        ["import", "NOISE", "new"],
        ["import", "TREE", "new"],
        ["clone", "base", "new"],
        ["rename", "clone", "new"],
        ["mount", "--dry-run", "--share=pool", "derived", "/mnt"],
        ["gc", "--compact"],
        ["check", "--repair"],
        ["export", "ragged", "TARGET"],
        ["rm", "base"],
    ],
    ids=lambda words: words[0],
)
def test_command_that_runs_out_of_room_anywhere_fails_in_one_line_until_there_is_enough(
    disk: Disk, images: Images, command: Command, words: list[str]
) -> None:
    places = {"NOISE": images.noise, "TREE": images.base_tree, "TARGET": disk.path / "out"}
    words = [str(places.get(word, word)) for word in words]
    if words[0] == "gc":
        disk.store.remove("derived")
    if words[0] == "check":
        program.in_fork(partial(_lose_totals, disk.store.path))
    names = disk.store.names()
    for pages in PAGES_LEFT:
        disk.fill(leave=pages * 4096)
        result = command(disk.store.path, *words)
        if result[0] == 0:
            break
        no_room(result)
        assert disk.store.names() == names
        assert [path.name for path in disk.path.iterdir() if "partial" in path.name] == []
        disk.free()
        if words[0] == "import":  # the frames of batches that were committed
            assert command(disk.store.path, "gc")[0] == 0
    else:
        pytest.fail("never enough")
    disk.free()
    disk.store.check()
    assert disk.store.export("ragged") == images.ragged.read_bytes()


def _lose_totals(store: Path) -> str:
    with Store(store) as opened, opened.env.write() as txn:
        txn.delete(TOTALS_KEY, db=opened.env.meta)
    return ""


def test_lazy_image_on_a_full_disk_is_served_and_stored_once_there_is_room(
    disk: Disk, tmp_path: Path, command: Command
) -> None:
    data = noise(91, 3 << 20)
    url = make_remote(tmp_path, {"far": data})
    for words in (("remote", "add", "far", url), ("pull", "far", "far", "--lazy")):
        assert command(disk.store.path, *words)[0] == 0
    disk.fill(leave=64 << 10)
    with Store(disk.store.path) as store:
        distant = store.stats().distant_frames
        assert read_image(store, "far") == data
        store.fetcher().keeper.flush()
        assert store.stats().distant_frames > distant // 2
        assert store.fetcher().kept[1] > 0
    no_room(command(disk.store.path, "pull", "far", "far", "--as", "whole"))
    disk.free()
    with Store(disk.store.path) as store:
        assert read_image(store, "far") == data
        store.fetcher().keeper.flush()
        assert store.stats().distant_frames == 0
    disk.store.check()
