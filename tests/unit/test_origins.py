"""Files that are unchanged since they were imported are not read again; all others are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dedupstore import format as fmt, origins
from dedupstore.check import check_store
from dedupstore.cli.main import _run
from dedupstore.errors import ImageExistsError
from dedupstore.sources import FileSource
from dedupstore.store import Store
from tests.conftest import blocks, flip_record, keys_of, noise, read_image, silent

Reads = Callable[[], int]


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once: tests do not wait two seconds."""
    monkeypatch.setattr(origins, "SETTLED_NS", -(10**18))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Says how many bytes imports have read since it was last asked."""
    total = 0
    read_at = FileSource.read_at

    def counted(self: FileSource, offset: int, length: int) -> bytes:
        nonlocal total
        data = read_at(self, offset, length)
        total += len(data)
        return data

    def since() -> int:
        nonlocal total
        read, total = total, 0
        return read

    monkeypatch.setattr(FileSource, "read_at", counted)
    return since


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.img"
    path.write_bytes(blocks(1, 2, 0, 3))
    return path


def origin_keys(store: Store) -> list[bytes]:
    return [key for key in keys_of(store, "meta") if fmt.is_origin_key(key)]


def test_unchanged_file_is_not_read_again(store: Store, image: Path, reads: Reads) -> None:
    _, first = store.import_path(image, "first", silent)
    assert reads() >= image.stat().st_size
    name, second = store.import_path(image, "second", silent)
    assert reads() == 0
    assert name == "second"
    assert (second.digest, second.size, second.chunks) == (first.digest, first.size, first.chunks)
    assert (second.new_chunks, second.new_bytes, second.stored_bytes) == (0, 0, 0)
    assert store.image("second").kind == store.image("first").kind
    assert read_image(store, "second") == image.read_bytes()


def test_default_name_and_taken_name_are_as_for_a_file_that_is_read(
    store: Store, image: Path
) -> None:
    assert store.import_path(image, None, silent)[0] == "image"
    with pytest.raises(ImageExistsError):
        store.import_path(image, None, silent)


def test_reread_reads(store: Store, image: Path, reads: Reads) -> None:
    store.import_path(image, "first", silent)
    reads()
    store.import_path(image, "second", silent, reread=True)
    assert reads() >= image.stat().st_size


def test_reread_is_an_option_of_import(store: Store, image: Path, reads: Reads) -> None:
    store.import_path(image, "first", silent)
    reads()
    path = str(store.path)
    store.close()
    assert _run(["--store", path, "import", str(image), "second"]) == 0
    assert reads() == 0
    assert _run(["--store", path, "import", "--reread", str(image), "third"]) == 0
    assert reads() >= image.stat().st_size


def test_changed_file_of_the_same_size_and_time_is_read(store: Store, image: Path) -> None:
    """No program can set the change time."""
    store.import_path(image, "first", silent)
    before = image.stat()
    changed = blocks(1, 2, 0, 4)
    with image.open("r+b") as file:
        file.write(changed)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    store.import_path(image, "second", silent)
    assert read_image(store, "second") == changed


def test_another_file_at_the_same_path_is_read(store: Store, image: Path) -> None:
    store.import_path(image, "first", silent)
    other = image.with_name("other")
    other.write_bytes(blocks(7, 8, 0, 9))
    other.rename(image)
    store.import_path(image, "second", silent)
    assert read_image(store, "second") == blocks(7, 8, 0, 9)


def test_file_that_changes_while_it_is_imported_is_not_remembered(
    store: Store, image: Path, reads: Reads
) -> None:
    store.import_path(image, "first", lambda _done, _all: os.utime(image))
    assert origin_keys(store) == []
    reads()
    store.import_path(image, "second", silent)
    assert reads() > 0


def test_file_that_has_just_changed_is_not_remembered(
    store: Store, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further change could leave the same change time behind."""
    monkeypatch.setattr(origins, "SETTLED_NS", 2_000_000_000)
    store.import_path(image, "first", silent)
    assert origin_keys(store) == []


def test_device_has_no_state() -> None:
    assert origins.file_state(Path("/dev/null").stat()) is None


def test_directory_is_read_again(store: Store, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(noise(1))
    store.import_path(tree, "first", silent)
    (tree / "file").write_bytes(noise(2))
    store.import_path(tree, "second", silent)
    assert store.image("first").digest != store.image("second").digest


def test_removed_image_comes_back_before_gc_without_reading(
    store: Store, image: Path, reads: Reads
) -> None:
    store.import_path(image, "first", silent)
    store.remove(["first"])
    reads()
    store.import_path(image, "again", silent)
    assert reads() == 0
    store.collect_garbage()
    assert read_image(store, "again") == image.read_bytes()


def test_gc_forgets_the_files_of_images_that_it_reclaims(
    store: Store, image: Path, tmp_path: Path, reads: Reads
) -> None:
    kept = tmp_path / "kept.img"
    kept.write_bytes(noise(5))
    store.import_path(kept, "kept", silent)
    store.import_path(image, "first", silent)
    assert len(origin_keys(store)) == 2
    store.remove(["first"])
    store.collect_garbage()
    assert len(origin_keys(store)) == 1
    store.import_path(image, "again", silent)
    assert read_image(store, "again") == image.read_bytes()
    reads()
    store.import_path(kept, "kept too", silent)
    assert reads() == 0


def test_record_whose_manifest_an_older_release_reclaimed_counts_as_none(
    store: Store, image: Path
) -> None:
    store.import_path(image, "first", silent)
    digest = bytes.fromhex(store.image("first").digest)
    store.remove(["first"])
    with store.env.write() as txn:  # what its gc does: it knows no origins
        txn.delete(digest, db=store.env.manifests)
    store.collect_garbage()
    store.import_path(image, "again", silent)
    assert read_image(store, "again") == image.read_bytes()


def test_damaged_record_counts_as_none(store: Store, image: Path, reads: Reads) -> None:
    store.import_path(image, "first", silent)
    (key,) = origin_keys(store)
    for bit in (3, 70, -1):
        flip_record(store, "meta", key, bit)
        reads()
        store.import_path(image, f"again {bit}", silent)
        assert reads() > 0
    store.import_path(image, "last", silent)
    assert reads() == 0  # the import wrote a sound one


def test_repair_forgets_so_that_the_next_import_heals(
    store: Store, image: Path, reads: Reads
) -> None:
    store.import_path(image, "first", silent)
    flip_record(store, "frames", keys_of(store, "frames")[0], -1)
    path = store.path
    store.close()
    check_store(path, repair=True)
    with Store(path) as again:
        assert origin_keys(again) == []
        reads()
        again.import_path(image, "healed", silent)
        assert reads() > 0
        assert read_image(again, "first") == image.read_bytes()


def test_store_of_a_release_without_origins_gets_its_flag_with_the_first(
    store: Store, image: Path
) -> None:
    def features() -> int:
        with store.env.read() as txn:
            record: Any = txn.get(fmt.SUPERBLOCK_KEY, db=store.env.meta)
            return fmt.decode_superblock(record).features_compat

    assert features() == 0
    store.import_path(image, "first", silent)
    assert features() == fmt.FEATURE_COMPAT_ORIGINS
