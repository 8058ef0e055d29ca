"""Exports as files: the plugin's files= parameter with the real FUSE, read as any program reads."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.store import Store
from tests.interop.corpus import BLOCK, Images
from tests.interop.rig import Server, Servers, StoreDirectory, mounts_below, wait_until
from tests.interop.test_plugin_start import start_refused
from tests.programs import require_root

Serve = Callable[..., Server]


@pytest.fixture
def files() -> Iterator[Path]:
    """A directory to mount on, unmounted in the end."""
    require_root()
    with tempfile.TemporaryDirectory(prefix="ds-", dir="/tmp") as directory:
        yield Path(directory)
        assert mounts_below(Path(directory)) == []


@pytest.fixture
def serve(files: Path, server: Servers) -> Serve:
    """Starts nbdkit with its exports in `files`, and waits for these."""

    def start(*parameters: str, metrics: bool = False) -> Server:
        running = server(f"files={files}", *parameters, metrics=metrics)
        wait_until(lambda: mounts_below(files) != [])
        return running

    return start


def digest_of(store: StoreDirectory, name: str) -> str:
    with Store(store.path) as opened:
        return opened.image(name).digest


def test_file_is_the_image_and_clones_are_one_file(
    serve: Serve, store_dir: StoreDirectory, images: Images, files: Path
) -> None:
    serve()
    base = files / digest_of(store_dir, "base")
    assert base.read_bytes() == images.base.read_bytes()
    assert (files / digest_of(store_dir, "ragged")).read_bytes() == images.ragged.read_bytes()
    assert base == files / digest_of(store_dir, "clone")
    status = base.stat()
    assert (status.st_size, status.st_mode) == (images.base.stat().st_size, 0o100400)


def test_parts_are_read_at_any_offset_past_the_page_cache(
    serve: Serve, store_dir: StoreDirectory, images: Images, files: Path
) -> None:
    serve()
    data = images.ragged.read_bytes()
    descriptor = os.open(files / digest_of(store_dir, "ragged"), os.O_RDONLY | os.O_DIRECT)
    try:
        ends = (len(data) - BLOCK, len(data) - 1, len(data), len(data) + BLOCK)
        for offset in (*range(0, len(data), 7 * BLOCK + 13), *ends):
            assert os.pread(descriptor, 3 * BLOCK, offset) == data[offset : offset + 3 * BLOCK]
    finally:
        os.close(descriptor)


def test_many_readers_at_once_get_the_right_bytes(
    serve: Serve, store_dir: StoreDirectory, images: Images, files: Path
) -> None:
    serve("cache=256K")  # every reader evicts what the others read
    wanted = {"base": images.base.read_bytes(), "derived": images.derived.read_bytes()}
    wrong: list[str] = []

    def read(name: str) -> None:
        for _ in range(3):
            os.posix_fadvise(descriptors[name], 0, 0, os.POSIX_FADV_DONTNEED)
            if os.pread(descriptors[name], len(wanted[name]), 0) != wanted[name]:
                wrong.append(name)

    descriptors = {
        name: os.open(files / digest_of(store_dir, name), os.O_RDONLY) for name in wanted
    }
    threads = [threading.Thread(target=read, args=(name,)) for name in [*wanted] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for descriptor in descriptors.values():
        os.close(descriptor)
    assert wrong == []


@pytest.mark.parametrize("name", ["base", "..x", "0" * 64, "A" * 64, "x" * 255])
def test_what_is_no_digest_of_a_served_image_is_not_there(
    serve: Serve, files: Path, name: str
) -> None:
    serve()
    assert not (files / name).exists()
    assert list(files.iterdir()) == []


def test_files_cannot_select_what_image_does_not_allow(
    serve: Serve, store_dir: StoreDirectory, files: Path
) -> None:
    serve("image=ragged")
    assert (files / digest_of(store_dir, "ragged")).exists()
    assert not (files / digest_of(store_dir, "base")).exists()


def test_nothing_can_be_changed(serve: Serve, store_dir: StoreDirectory, files: Path) -> None:
    serve()
    base = files / digest_of(store_dir, "base")
    for change in (base.touch, base.unlink, (files / "new").touch, lambda: base.write_bytes(b"")):
        with pytest.raises(OSError, match="Read-only file system"):
            change()


def test_open_file_keeps_its_image_until_it_is_closed(
    serve: Serve, store_dir: StoreDirectory, images: Images, files: Path
) -> None:
    running = serve("cache=256K", metrics=True)
    path = files / digest_of(store_dir, "ragged")
    with path.open("rb") as file:
        assert running.metrics()["dedup_exports_open"] == 1
        store_dir.remove("ragged")
        store_dir.gc()
        assert file.read() == images.ragged.read_bytes()
    wait_until(lambda: running.metrics()["dedup_exports_open"] == 0)
    store_dir.gc()
    assert not path.exists()


@pytest.mark.damaged
def test_damage_is_an_error_where_it_is_and_logged_with_its_place(
    serve: Serve, store_dir: StoreDirectory, images: Images, files: Path
) -> None:
    (frame,) = list(store_dir.frames_of("derived") - store_dir.frames_of("base"))[:1]
    flip_frame(store_dir.path, frame)
    running = serve()
    place = rf"image '/{digest_of(store_dir, 'derived')}' offset \d+: chunk {frame} is damaged: "
    running.expect_log(f"nbdkit: dedupstore: error: {place}")
    data = images.derived.read_bytes()
    descriptor = os.open(files / digest_of(store_dir, "derived"), os.O_RDONLY | os.O_DIRECT)
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    found = [block_or_errno(descriptor, i * BLOCK) for i in range(len(blocks))]
    os.close(descriptor)
    assert 0 < found.count(errno.EIO) < len(blocks)
    assert all(a in (b, errno.EIO) for a, b in zip(found, blocks, strict=True))


def block_or_errno(descriptor: int, offset: int) -> bytes | int:
    try:
        return os.pread(descriptor, BLOCK, offset)
    except OSError as error:
        return error.errno or 0


def flip_frame(path: Path, frame: int) -> None:
    """Flip one bit of a frame's payload, behind the store's back."""
    with Store(path) as store, store.env.write() as txn:
        key = fmt.frame_key(frame)
        record = bytearray(txn.get(key, db=store.env.frames))
        record[-1] ^= 1
        txn.put(key, bytes(record), db=store.env.frames)


def test_server_ends_although_a_file_is_open(
    serve: Serve, store_dir: StoreDirectory, files: Path
) -> None:
    running = serve()
    descriptor = os.open(files / digest_of(store_dir, "base"), os.O_RDONLY | os.O_DIRECT)
    running.stop()
    with pytest.raises(OSError, match=r"not connected|aborted"):
        os.pread(descriptor, BLOCK, 0)
    with suppress(OSError):  # closed all the same
        os.close(descriptor)
    assert mounts_below(files) == []


def test_bad_directories_are_refused_in_one_line(
    store_dir: StoreDirectory, files: Path, tmp_path: Path
) -> None:
    store = f"store={store_dir.path}"
    (files / "x").touch()
    assert f"files={files}: not an empty directory" in start_refused(store, f"files={files}")
    (files / "x").unlink()
    none = tmp_path / "none"
    assert "No such file or directory" in start_refused(store, f"files={none}")
    none.touch()
    assert "Not a directory" in start_refused(store, f"files={none}")


def test_names_that_the_kernel_forgets_are_forgotten(
    serve: Serve, store_dir: StoreDirectory, files: Path
) -> None:
    """The numbers that look-ups are given do not stay: another look-up gets a new one."""
    serve()
    path = files / digest_of(store_dir, "base")
    first = path.stat().st_ino

    def forgotten() -> bool:
        Path("/proc/sys/vm/drop_caches").write_text("2")  # inodes and names that nobody uses
        return path.stat().st_ino != first

    wait_until(forgotten)
