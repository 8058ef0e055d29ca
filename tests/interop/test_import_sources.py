"""Everything that `dedupstore import` takes: files, devices, directories, archives, streams."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.interop.corpus import Images
from tests.interop.rig import DEDUPSTORE, StoreDirectory, run
from tests.programs import require_program, require_root


def import_stream(store: StoreDirectory, source: Path, name: str) -> None:
    with source.open("rb") as stream:
        subprocess.run(
            [DEDUPSTORE, "--store", store.path, "import", "-", name],
            stdin=stream,
            stdout=subprocess.DEVNULL,
            check=True,
        )


def make_tar(tree: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(tree, ".")
    return archive


def test_block_device_is_imported_byte_for_byte(
    empty_store_dir: StoreDirectory, images: Images, tmp_path: Path
) -> None:
    require_root()
    require_program("losetup")
    device = run("losetup", "--find", "--show", "--read-only", images.base).strip()
    try:
        empty_store_dir.do("import", device, "device")
    finally:
        run("losetup", "--detach", device)
    assert empty_store_dir.export("device") == images.base.read_bytes()


def test_block_device_and_file_of_one_image_have_one_digest(
    empty_store_dir: StoreDirectory, images: Images
) -> None:
    require_root()
    require_program("losetup")
    device = run("losetup", "--find", "--show", "--read-only", images.base).strip()
    try:
        empty_store_dir.do("import", device, "device")
    finally:
        run("losetup", "--detach", device)
    empty_store_dir.import_file(images.base, "file")
    assert empty_store_dir.digest("device") == empty_store_dir.digest("file")


@pytest.mark.parametrize("image", ["base", "ragged"])
def test_standard_input_gives_the_same_digest_as_the_file(
    empty_store_dir: StoreDirectory, images: Images, image: str
) -> None:
    source = getattr(images, image)
    import_stream(empty_store_dir, source, "stream")
    empty_store_dir.import_file(source, "file")
    assert empty_store_dir.digest("stream") == empty_store_dir.digest("file")


def test_pipe_is_a_standard_input_too(
    empty_store_dir: StoreDirectory, images: Images, tmp_path: Path
) -> None:
    with subprocess.Popen(["cat", images.ragged], stdout=subprocess.PIPE) as cat:
        subprocess.run(
            [DEDUPSTORE, "--store", empty_store_dir.path, "import", "-", "pipe"],
            stdin=cat.stdout,
            stdout=subprocess.DEVNULL,
            check=True,
        )
    assert empty_store_dir.export("pipe") == images.ragged.read_bytes()


def test_standard_input_without_a_name_is_wrong_usage(empty_store_dir: StoreDirectory) -> None:
    assert "name" in empty_store_dir.refuse("import", "-", status=2)


def test_export_to_standard_output_equals_the_source(
    empty_store_dir: StoreDirectory, images: Images
) -> None:
    empty_store_dir.import_file(images.ragged, "ragged")
    result = subprocess.run(
        [DEDUPSTORE, "--store", empty_store_dir.path, "export", "ragged", "-"],
        capture_output=True,
        check=True,
    )
    assert result.stdout == images.ragged.read_bytes()


def test_tar_archive_gives_the_image_of_its_tree(
    empty_store_dir: StoreDirectory, images: Images, tmp_path: Path
) -> None:
    require_program("mkfs.erofs", "tar")
    archive = make_tar(images.base_tree, tmp_path / "tree.tar")
    empty_store_dir.import_file(archive, "archive")
    empty_store_dir.import_file(images.base_tree, "tree")
    assert empty_store_dir.digest("archive") == empty_store_dir.digest("tree")


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lambda x: lzma.compress(x, preset=0))],
)
def test_compressed_tar_gives_the_same_image_and_a_name_without_suffixes(
    empty_store_dir: StoreDirectory, images: Images, tmp_path: Path, suffix: str, compress: object
) -> None:
    require_program("mkfs.erofs", "tar")
    small = images.base_tree / "directory-1"
    archive = make_tar(small, tmp_path / "plain.tar")
    packed = tmp_path / f"root.tar.{suffix}"
    packed.write_bytes(compress(archive.read_bytes()))  # type: ignore[operator]
    empty_store_dir.do("import", packed)
    empty_store_dir.do("import", archive)
    assert empty_store_dir.digest("root") == empty_store_dir.digest("plain")


def test_tar_from_standard_input_gives_the_same_image(
    empty_store_dir: StoreDirectory, images: Images, tmp_path: Path
) -> None:
    require_program("mkfs.erofs", "tar")
    archive = make_tar(images.base_tree / "directory-1", tmp_path / "tree.tar")
    import_stream(empty_store_dir, archive, "stream")
    empty_store_dir.import_file(archive, "file")
    assert empty_store_dir.digest("stream") == empty_store_dir.digest("file")


def test_same_tree_in_another_place_gives_the_same_digest(
    empty_store_dir: StoreDirectory, images: Images, tmp_path: Path
) -> None:
    require_program("mkfs.erofs")
    shutil.copytree(images.base_tree, tmp_path / "elsewhere", copy_function=shutil.copy2)
    empty_store_dir.import_file(images.base_tree, "here")
    empty_store_dir.import_file(tmp_path / "elsewhere", "there")
    assert empty_store_dir.digest("here") == empty_store_dir.digest("there")


def test_working_files_of_a_directory_import_are_gone_afterwards(
    empty_store_dir: StoreDirectory, images: Images
) -> None:
    require_program("mkfs.erofs")
    empty_store_dir.import_file(images.base_tree, "tree")
    assert list((empty_store_dir.path / "tmp").iterdir()) == []


def test_erofs_whose_metadata_is_garbage_is_imported_as_raw(
    empty_store_dir: StoreDirectory, images: Images, tmp_path: Path
) -> None:
    broken = bytearray(images.base.read_bytes())
    broken[1024 + 128 : 8192] = bytes(b ^ 0xA5 for b in broken[1024 + 128 : 8192])
    broken[1024 + 16 : 1024 + 24] = b"\xff" * 8
    (tmp_path / "broken").write_bytes(broken)
    empty_store_dir.import_file(tmp_path / "broken", "broken")
    assert empty_store_dir.export("broken") == broken


def test_truncated_erofs_comes_back_byte_for_byte(
    empty_store_dir: StoreDirectory, images: Images, tmp_path: Path
) -> None:
    cut = images.base.read_bytes()[: images.base.stat().st_size // 2 + 77]
    (tmp_path / "cut").write_bytes(cut)
    empty_store_dir.import_file(tmp_path / "cut", "cut")
    assert empty_store_dir.export("cut") == cut


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, (4 << 20) + 1])
def test_raw_file_of_any_size_comes_back(
    empty_store_dir: StoreDirectory, images: Images, tmp_path: Path, size: int
) -> None:
    (tmp_path / "raw").write_bytes(images.noise.read_bytes()[:size])
    empty_store_dir.import_file(tmp_path / "raw", "raw")
    assert empty_store_dir.export("raw") == (tmp_path / "raw").read_bytes()


def test_export_keeps_holes(store_dir: StoreDirectory, images: Images, tmp_path: Path) -> None:
    store_dir.do("export", "ragged", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == images.ragged.read_bytes()
    assert (tmp_path / "out").stat().st_blocks <= images.ragged.stat().st_blocks + 64
