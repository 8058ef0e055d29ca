"""The store's own rules: creation, names, versions, sums."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.catalog import default_name
from dedupstore.constants import CDC_BYTES_MIN, IMAGE_NAME_BYTES_MAX, SEGMENT_BYTES
from dedupstore.env import DATA_FILE
from dedupstore.errors import (
    DedupError,
    ImageExistsError,
    ImageNotFoundError,
    StoreAccessError,
    StoreDamagedError,
    StoreExistsError,
    StoreNotFoundError,
    StoreVersionError,
    UsageError,
)
from dedupstore.imported import Imported
from dedupstore.store import Store
from tests.conftest import (
    blocks,
    flip_record,
    import_bytes,
    keys_of,
    noise,
    opened,
    read_image,
    read_range,
    text,
)

Add = Callable[[str, bytes], Imported]


# --- creation and opening ---


def test_second_creation_is_refused_and_changes_nothing(store: Store, add: Add) -> None:
    add("a", blocks(1))
    with pytest.raises(StoreExistsError, match="already holds a store"):
        Store.create(store.path)
    assert read_image(store, "a") == blocks(1)


def test_store_is_created_in_an_empty_folder_and_below_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Store.create(tmp_path / "empty").close()
    Store.create(tmp_path / "not/yet/there").close()


def test_store_is_created_where_a_creation_has_failed(tmp_path: Path) -> None:
    (tmp_path / "tmp" / "0123456789abcdef0123456789abcdef").mkdir(parents=True)
    (tmp_path / "locks").touch()
    Store.create(tmp_path).close()
    with Store(tmp_path) as store:
        assert store.names() == []


def test_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter").touch()
    with pytest.raises(StoreExistsError, match="not empty"):
        Store.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreExistsError):
        Store.create(tmp_path / "file")
    with pytest.raises(DedupError):
        Store.create(tmp_path / "file/below")


def test_new_store_is_private(store: Store) -> None:
    assert store.path.stat().st_mode & 0o777 == 0o700
    assert (store.path / DATA_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("make", [lambda p: None, Path.mkdir, Path.touch])
def test_opening_what_is_no_store_says_so(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(StoreNotFoundError, match="dedupstore init"):
        Store(tmp_path / "x")
    assert not (tmp_path / "x" / DATA_FILE).exists()


def test_opening_twice_in_one_process_is_refused(store: Store) -> None:
    with pytest.raises(StoreAccessError, match="already open"):
        Store(store.path)


def test_closing_twice_is_harmless_and_allows_reopening(store: Store) -> None:
    store.close()
    store.close()
    Store(store.path).close()


def test_store_keeps_its_identity(store: Store) -> None:
    superblock = store.superblock
    store.close()
    with Store(store.path) as again:
        assert again.superblock == superblock


@pytest.mark.damaged
@pytest.mark.parametrize(
    "change",
    [{"version": fmt.FORMAT_VERSION + 1}, {"features_incompat": 1 << 5}],
    ids=["version", "feature"],
)
def test_newer_store_is_refused_and_not_touched(store: Store, change: dict[str, int]) -> None:
    record = fmt.encode_superblock(replace(store.superblock, **change))
    with store.env.write() as txn:
        txn.put(fmt.SUPERBLOCK_KEY, record, db=store.env.meta)
    store.close()
    before = (store.path / DATA_FILE).read_bytes()
    for _ in range(2):  # and the refusal leaves nothing open
        with pytest.raises(StoreVersionError, match="newer dedupstore"):
            Store(store.path)
    assert (store.path / DATA_FILE).read_bytes() == before


def test_unknown_compatible_feature_is_ignored(store: Store) -> None:
    record = fmt.encode_superblock(replace(store.superblock, features_compat=1 << 9))
    with store.env.write() as txn:
        txn.put(fmt.SUPERBLOCK_KEY, record, db=store.env.meta)
    store.close()
    Store(store.path).close()


@pytest.mark.damaged
def test_damaged_superblock_is_reported(store: Store) -> None:
    flip_record(store, "meta", fmt.SUPERBLOCK_KEY, 77)
    store.close()
    with pytest.raises(StoreDamagedError, match="superblock"):
        Store(store.path)


@pytest.mark.damaged
def test_missing_superblock_is_reported(store: Store) -> None:
    with store.env.write() as txn:
        txn.delete(fmt.SUPERBLOCK_KEY, db=store.env.meta)
    store.close()
    with pytest.raises(StoreDamagedError, match="not a dedupstore store"):
        Store(store.path)


@pytest.mark.damaged
@pytest.mark.parametrize("length", [0, 1, 4096, 10_000])
def test_truncated_data_file_is_reported(store: Store, add: Add, length: int) -> None:
    add("a", noise(1, 200_000))
    store.close()
    os.truncate(store.path / DATA_FILE, length)
    with pytest.raises(StoreDamagedError) as caught:
        Store(store.path)
    assert "\n" not in str(caught.value)


# --- names ---


def test_images_are_listed_in_the_order_of_their_names(store: Store, add: Add) -> None:
    for name in ("b", "a/x", "ä", "a"):
        add(name, blocks(1))
    assert store.names() == ["a", "a/x", "b", "ä"]
    assert [image.name for image in store.images()] == store.names()


def test_clone_is_the_same_image_under_another_name(store: Store, add: Add) -> None:
    add("a", blocks(1, 0, 2))
    before = store.stats()
    store.clone("a", "b")
    after = store.stats()
    a, b = store.images()
    assert replace(b, name="a", created=a.created) == a
    assert (after.images, after.chunks, after.logical_bytes) == (2, before.chunks, 2 * a.size)
    assert read_image(store, "b") == blocks(1, 0, 2)


def test_clone_of_what_is_missing_and_to_what_exists_is_refused(store: Store, add: Add) -> None:
    add("a", blocks(1))
    add("b", blocks(2))
    with pytest.raises(ImageNotFoundError):
        store.clone("x", "y")
    with pytest.raises(ImageExistsError):
        store.clone("a", "b")
    with pytest.raises(ImageExistsError):
        store.clone("a", "a")
    assert read_image(store, "b") == blocks(2)


def test_rename_moves_and_refuses(store: Store, add: Add) -> None:
    add("a", blocks(1))
    add("b", blocks(2))
    store.rename("a", "c")
    assert store.names() == ["b", "c"]
    assert read_image(store, "c") == blocks(1)
    with pytest.raises(ImageExistsError):
        store.rename("c", "b")
    with pytest.raises(ImageNotFoundError):
        store.rename("a", "d")
    assert store.names() == ["b", "c"]


def test_rename_to_itself_keeps_the_image(store: Store, add: Add) -> None:
    add("a", blocks(1))
    store.rename("a", "a")
    assert read_image(store, "a") == blocks(1)


def test_rm_removes_all_or_none(store: Store, add: Add) -> None:
    for name in "abc":
        add(name, blocks(1))
    with pytest.raises(ImageNotFoundError, match="'x'"):
        store.remove(["a", "x", "b"])
    assert store.names() == ["a", "b", "c"]
    store.remove(["a", "c", "a"])
    assert store.names() == ["b"]


BAD_NAMES = ["", ".", "..", "-rf", "/abs", "a/", "a//b", "a/./b", "a/../b", "a*b", "a?", "[a]"]
BAD_NAMES += [
    "a\\b",
    "a\nb",
    "a\0b",
    "a\x7f",
    "a\u200bb",
    "\udc80",
    "x" * (IMAGE_NAME_BYTES_MAX + 1),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_names_are_refused_everywhere(store: Store, add: Add, name: str) -> None:
    add("a", blocks(1))
    for give in (lambda: store.clone("a", name), lambda: store.rename("a", name)):
        with pytest.raises(UsageError) as caught:
            give()
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageNotFoundError) as missing:
        store.image(name)
    assert "\n" not in str(missing.value)
    assert store.names() == ["a"]


@pytest.mark.parametrize("name", ["a", "a b", "debian/12", "v1.0", "ä€", "x" * 255, "a:b", "~"])
def test_good_names_are_accepted(store: Store, add: Add, name: str) -> None:
    add(name, blocks(1))
    assert store.image(name).name == name


def test_info_describes_the_image(store: Store, add: Add) -> None:
    imported = add("a", blocks(1, 0, 0, 1) + b"x")
    info = store.image("a")
    assert (info.size, info.digest, info.kind) == (4 * 4096 + 1, imported.digest.hex(), "raw")
    assert info.zero_bytes == 2 * 4096
    assert info.chunks >= 2


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/base.erofs", "base"),
        ("base.tar.gz", "base"),
        ("base.tgz", "base"),
        ("BASE.IMG", "BASE"),
        ("rootfs.erofs.xz", "rootfs"),
        ("debian-12.5", "debian-12.5"),
        ("v1.tar", "v1"),
        (".img", ".img"),
        ("/dev/sda", "sda"),
        ("tree/", "tree"),
        ("x.tar.tar.tar", "x.tar"),
    ],
)
def test_default_name_is_the_file_name_without_its_suffixes(path: str, name: str) -> None:
    assert default_name(Path(path)) == name


def test_default_name_of_the_current_folder_is_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rootfs").mkdir()
    monkeypatch.chdir(tmp_path / "rootfs")
    assert default_name(Path()) == "rootfs"
    with pytest.raises(UsageError):
        default_name(Path("/"))


# --- sums ---


def test_stats_of_an_empty_store(store: Store) -> None:
    stats = store.stats()
    assert (stats.images, stats.chunks, stats.dedup_ratio, stats.compression_ratio) == (0, 0, 1, 1)
    assert stats.file_bytes > 0


def test_stats_add_up(store: Store, add: Add) -> None:
    size = 1 << 20
    imports = [add("a", text(1, size)), add("b", noise(2, size)), add("c", text(1, size))]
    stats = store.stats()
    assert stats.images == 3
    assert stats.logical_bytes == 3 * size
    assert stats.unique_bytes == sum(imported.new_bytes for imported in imports)
    assert stats.stored_bytes == sum(imported.stored_bytes for imported in imports)
    assert stats.chunks == sum(imported.new_chunks for imported in imports)
    assert stats.chunks == len(keys_of(store, "chunks"))
    assert stats.frames == len(keys_of(store, "frames"))
    assert stats.dedup_ratio == pytest.approx(3 * size / stats.unique_bytes, abs=1e-4)
    assert stats.compression_ratio == pytest.approx(
        stats.unique_bytes / stats.stored_bytes, abs=1e-4
    )
    assert stats.stored_bytes < stats.unique_bytes


def test_zeros_count_as_logical_bytes_only(store: Store, add: Add) -> None:
    add("zeros", bytes(1 << 20))
    stats = store.stats()
    assert (stats.logical_bytes, stats.unique_bytes, stats.dedup_ratio) == (1 << 20, 0, 1.0)


def part(number: int) -> bytes:
    return noise(number, CDC_BYTES_MIN)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1, 2, 3], [2, 3, 4, 5]),
        ([1, 1, 2], [1]),
        ([1], [2]),
        ([1, 2], [1, 2]),
        ([], [1]),
        ([], []),
    ],
)
def test_diff_equals_brute_force(store: Store, add: Add, a: list[int], b: list[int]) -> None:
    gap = bytes(4096)
    images = {"a": gap.join(map(part, a)), "b": gap.join(map(part, b))}
    for name, data in images.items():
        add(name, data)
    found = store.diff("a", "b")
    shared, only_a, only_b = set(a) & set(b), set(a) - set(b), set(b) - set(a)
    assert (found.shared_chunks, found.only_a_chunks, found.only_b_chunks) == (
        len(shared),
        len(only_a),
        len(only_b),
    )
    assert (found.shared_bytes, found.only_a_bytes, found.only_b_bytes) == tuple(
        len(numbers) * CDC_BYTES_MIN for numbers in (shared, only_a, only_b)
    )
    assert (found.a_size, found.b_size) == (len(images["a"]), len(images["b"]))
    assert found.identical == (images["a"] == images["b"])


def test_diff_of_a_long_image_with_itself_shares_everything(store: Store, add: Add) -> None:
    imported = add("a", noise(1, SEGMENT_BYTES + 4096))
    found = store.diff("a", "a")
    assert found.identical
    assert found.shared_bytes == imported.unique_bytes
    assert (found.only_a_chunks, found.only_b_chunks) == (0, 0)


def test_diff_of_a_missing_image_says_which(store: Store, add: Add) -> None:
    add("a", blocks(1))
    with pytest.raises(ImageNotFoundError, match="'b'"):
        store.diff("a", "b")


# --- open images ---


def test_image_imported_again_is_read_where_it_lies_now(store: Store, tmp_path: Path) -> None:
    """A server that once had the image open must not serve it from where it lay then."""
    data = noise(1, 1 << 20)
    import_bytes(store, tmp_path, "a", data)
    remembered = store.open_manifest("a")
    store.close_manifest(remembered)
    store.remove(["a"])
    store.collect_garbage()
    import_bytes(store, tmp_path, "a", data)
    with opened(store, "a") as reader:
        assert reader.manifest is not remembered
        assert read_range(reader, 0, len(data)) == data


def test_opening_a_missing_image_holds_no_lease(store: Store) -> None:
    with pytest.raises(ImageNotFoundError):
        store.open_manifest("nothing")
    assert store.leases._held == {}
