"""Imports: every kind of source, deduplication, races, and sources that misbehave."""

from __future__ import annotations

import gzip
import io
import multiprocessing
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3

from dedupstore import chunker, ingest, staging
from dedupstore.constants import SEGMENT_BYTES
from dedupstore.erofs import file_extents, is_erofs
from dedupstore.errors import ImageExistsError, SourceError, UsageError
from dedupstore.imported import Imported
from dedupstore.store import Store
from tests.conftest import (
    GRID,
    blocks,
    import_bytes,
    keys_of,
    noise,
    read_image,
    silent,
    text,
    write_sparse,
)
from tests.programs import (
    erofs_options_honoured,
    erofs_programs,
    unavailable,
)

Add = Callable[[str, bytes], Imported]

RAW_SOURCES = {
    "raw": noise(1, 3 << 20),
    "compressible": text(1, 3 << 20),
    "zeros only": bytes(3 << 20),
    "empty": b"",
    "one byte": b"x",
    "one zero byte": b"\0",
    "one block": noise(1),
    "ragged": noise(1, 200_001),
    "ragged zeros": bytes(200_001),
    "ragged tail of zeros": noise(1, 8 * GRID) + bytes(100),
    "longer than a segment": noise(1, SEGMENT_BYTES + 3 * GRID),
    "holes": blocks(0, 1, 0, 0, 2, 0, 1, 2, 0),
    "hole across segments": noise(1, GRID) + bytes(2 * SEGMENT_BYTES) + noise(2, GRID),
}
EACH_RAW = pytest.mark.parametrize("data", RAW_SOURCES.values(), ids=RAW_SOURCES)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small file tree: sizes around block borders, a symlink, a hard link, nested folders."""
    root = tmp_path / "tree"
    (root / "etc/deep/er").mkdir(parents=True)
    (root / "bin").mkdir()
    (root / "empty").touch()
    (root / "etc/small").write_bytes(b"setting = 1\n")
    (root / "etc/deep/block").write_bytes(noise(1, GRID))
    (root / "etc/deep/er/ragged").write_bytes(noise(2, 3 * GRID + 17))
    (root / "bin/program").write_bytes(text(3, 300_000))
    (root / "bin/copy").write_bytes(text(3, 300_000))
    (root / "bin/link").symlink_to("program")
    os.link(root / "bin/program", root / "bin/hard")
    (root / "bin/program").chmod(0o755)
    for i, path in enumerate(sorted(root.rglob("*"))):
        os.utime(path, (1_600_000_000 + i, 1_600_000_000 + i), follow_symlinks=False)
    os.utime(root, (1_600_000_000, 1_600_000_000))
    return root


def copied(tree: Path, target: Path) -> Path:
    """The tree again, its entries made in the opposite order, times restored."""
    target.mkdir()
    for path in sorted(tree.rglob("*")):
        if path.is_dir():
            (target / path.relative_to(tree)).mkdir()
    done: dict[int, Path] = {}
    for path in sorted(tree.rglob("*"), reverse=True):
        there = target / path.relative_to(tree)
        if path.is_symlink():
            there.symlink_to(path.readlink())
        elif path.is_file():
            inode = path.stat().st_ino
            if inode in done:
                os.link(done[inode], there)
            else:
                shutil.copyfile(path, there)
                done[inode] = there
    for path in [tree, *tree.rglob("*")]:
        shutil.copystat(path, target / path.relative_to(tree), follow_symlinks=False)
    return target


def make_tar(tree: Path, archive: Path, mode: str = "w") -> Path:
    with tarfile.open(archive, "w" if mode == "zst" else mode) as tar:  # type: ignore[call-overload]
        tar.add(tree, ".")
    if mode == "zst":
        archive.write_bytes(zstandard.compress(archive.read_bytes()))
    return archive


def make_erofs(tree: Path, image: Path, *options: str) -> bytes:
    for program in erofs_programs("mkfs.erofs"):
        command = [program, "--quiet", "-T0", *options, str(image), str(tree)]
        done = subprocess.run(command, check=False, capture_output=True)
        if done.returncode == 0 and erofs_options_honoured(options, image):
            return image.read_bytes()
    unavailable(f"no mkfs.erofs here can {' '.join(options)}")


# --- sources ---


@EACH_RAW
def test_raw_image_reads_back_as_it_was(store: Store, add: Add, data: bytes) -> None:
    imported = add("image", data)
    assert imported.size == len(data)
    assert store.image("image").kind == "raw"
    assert read_image(store, "image") == data
    assert store.image("image").size == len(data)


@EACH_RAW
def test_sparse_file_gives_the_digest_of_the_dense_one(
    store: Store, add: Add, tmp_path: Path, data: bytes
) -> None:
    dense = add("dense", data)
    source = write_sparse(tmp_path / "sparse", data)
    sparse = store.import_path(source, "sparse", silent)[1]
    assert sparse.digest == dense.digest
    assert sparse.zero_bytes == dense.zero_bytes
    assert sparse.new_chunks == 0
    assert read_image(store, "sparse") == data


def test_zeros_are_not_stored(store: Store, add: Add) -> None:
    imported = add("zeros", bytes(9 << 20))
    assert (imported.chunks, imported.new_bytes, imported.zero_bytes) == (0, 0, 9 << 20)
    assert store.stats().chunks == 0


def test_stream_is_imported_like_a_file(store: Store, add: Add) -> None:
    data = noise(1, 300_000)
    imported = store.import_stream(io.BytesIO(data), "stream", silent)
    assert imported.digest == add("file", data).digest
    assert read_image(store, "stream") == data


LAYOUTS = {
    "plain": ("-Enoinline_data",),
    "inline": (),
    "chunk-based": ("--chunksize=8192",),
    "lz4": ("-zlz4",),
    "lz4hc big pcluster": ("-zlz4hc", "-C65536"),
    "legacy compress": ("-zlz4", "-Elegacy-compress"),
    "lzma": ("-zlzma",),
    "deflate": ("-zdeflate",),
    "zstd": ("-zzstd",),
    "dedupe": ("-zlz4", "-Ededupe"),
    "fragments": ("-zlz4", "-Efragments,ztailpacking"),
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_erofs_image_reads_back_as_it_was(
    store: Store, tree: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    data = make_erofs(tree, tmp_path / "image.erofs", *options)
    name, _ = store.import_path(tmp_path / "image.erofs", None, silent)
    assert name == "image"
    assert store.image("image").kind == "erofs"
    assert read_image(store, "image") == data


def test_erofs_chunks_follow_files_whatever_precedes_them(store: Store, tmp_path: Path) -> None:
    big = noise(5, 400_000 // GRID * GRID)
    for name, extra in (("one", b""), ("two", noise(6, 5 * GRID))):
        root = tmp_path / name
        root.mkdir()
        (root / "m-big").write_bytes(big)
        if extra:
            (root / "a-first").write_bytes(extra)
        make_erofs(root, tmp_path / f"{name}.erofs", "-Enoinline_data")
        store.import_path(tmp_path / f"{name}.erofs", name, silent)
    assert store.diff("one", "two").shared_bytes >= len(big)


def test_malformed_erofs_is_imported_as_raw(store: Store, tree: Path, tmp_path: Path) -> None:
    data = bytearray(make_erofs(tree, tmp_path / "image.erofs", "-Enoinline_data"))
    data[1024 + 12] = 99  # the block size
    assert is_erofs(bytes(data))
    (tmp_path / "bad.erofs").write_bytes(data)
    name, _ = store.import_path(tmp_path / "bad.erofs", None, silent)
    assert store.image(name).kind == "raw"
    assert read_image(store, name) == bytes(data)


def test_truncated_erofs_is_imported_as_it_is(store: Store, tree: Path, tmp_path: Path) -> None:
    data = make_erofs(tree, tmp_path / "image.erofs", "-Enoinline_data")
    for length in (1500, GRID, len(data) - GRID, len(data) - 1):
        (tmp_path / "cut.erofs").write_bytes(data[:length])
        name, _ = store.import_path(tmp_path / "cut.erofs", f"cut{length}", silent)
        assert read_image(store, name) == data[:length]


def test_directory_becomes_a_deterministic_erofs_image(
    store: Store, tree: Path, tmp_path: Path
) -> None:
    name, first = store.import_path(tree, None, silent)
    assert name == "tree"
    assert store.image(name).kind == "erofs"
    again = store.import_path(copied(tree, tmp_path / "other"), "again", silent)[1]
    assert again.digest == first.digest
    assert again.new_chunks == 0
    assert is_erofs(read_image(store, "tree"))


def test_directory_image_keeps_file_times(store: Store, tree: Path) -> None:
    first = store.import_path(tree, "first", silent)[1]
    os.utime(tree / "etc/small", (1_500_000_000, 1_500_000_000))
    assert store.import_path(tree, "second", silent)[1].digest != first.digest


def test_directory_change_changes_the_digest(store: Store, tree: Path) -> None:
    first = store.import_path(tree, "first", silent)[1]
    (tree / "etc/small").write_bytes(b"setting = 2\n")
    assert store.import_path(tree, "second", silent)[1].digest != first.digest


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zst"])
def test_tar_gives_the_image_of_its_tree(
    store: Store, tree: Path, tmp_path: Path, mode: str
) -> None:
    from_tree = store.import_path(tree, "tree", silent)[1]
    archive = make_tar(tree, tmp_path / "archive.tar", mode)
    name, from_tar = store.import_path(archive, None, silent)
    assert name == "archive"
    assert from_tar.digest == from_tree.digest


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_on_standard_input_gives_the_image_of_its_tree(
    store: Store, tree: Path, tmp_path: Path, mode: str
) -> None:
    archive = make_tar(tree, tmp_path / "archive", mode)
    from_file = store.import_path(archive, "file", silent)[1]
    with archive.open("rb") as stream:
        from_stream = store.import_stream(stream, "stream", silent)
    assert from_stream.digest == from_file.digest


def test_tar_without_entries_for_folders_is_deterministic(
    store: Store, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tree / "etc/deep/block", "etc/deep/block")
    first = store.import_path(tmp_path / "a.tar", "first", silent)[1]
    assert store.import_path(tmp_path / "a.tar", "second", silent)[1].digest == first.digest


def test_nothing_is_left_in_the_working_directory(store: Store, tree: Path, tmp_path: Path) -> None:
    store.import_path(make_tar(tree, tmp_path / "archive.tar"), None, silent)
    store.import_path(tree, None, silent)
    store.import_stream(io.BytesIO(b"x"), "x", silent)
    assert list((store.path / "tmp").iterdir()) == []


def test_compressed_file_that_is_no_tar_is_imported_as_it_is(store: Store, add: Add) -> None:
    data = gzip.compress(text(1, 100_000))
    add("gz", data)
    assert read_image(store, "gz") == data


def test_damaged_gzip_is_imported_as_it_is(store: Store, add: Add) -> None:
    data = b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 5000
    add("gz", data)
    assert read_image(store, "gz") == data


# --- deduplication ---


def test_repeated_content_within_an_image_is_stored_once(store: Store, add: Add) -> None:
    part = noise(1, 4 * GRID)
    imported = add("twice", part + bytes(GRID) + part + bytes(GRID) + part)
    assert imported.new_bytes == imported.unique_bytes == len(part)
    assert store.stats().unique_bytes == len(part)


def test_identical_image_adds_no_chunks(store: Store, add: Add) -> None:
    data = noise(1, 2 << 20)
    first = add("first", data)
    before = store.stats()
    second = add("second", data)
    after = store.stats()
    assert (second.new_chunks, second.new_bytes, second.stored_bytes) == (0, 0, 0)
    assert second.digest == first.digest
    assert (after.chunks, after.frames) == (before.chunks, before.frames)
    assert read_image(store, "second") == data


def test_result_counts_what_was_new(store: Store, add: Add) -> None:
    shared, own = noise(1, 4 << 20), noise(2, 4 << 20)  # a segment each: cuts do not cross
    add("first", shared)
    second = add("second", shared + own)
    assert second.new_bytes == len(own)
    assert second.unique_bytes == len(shared) + len(own)
    assert store.stats().unique_bytes == len(shared) + len(own)
    assert read_image(store, "second") == shared + own


def test_content_is_right_when_every_xxh3_is_equal(
    store: Store, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunker, "xxh3_64_intdigest", lambda _: 0)
    data = noise(1, 500_000) + bytes(10 * GRID) + noise(2, 500_000)
    add("image", data)
    assert read_image(store, "image") == data


def test_blocks_that_hash_like_zeros_are_stored(
    store: Store, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunker, "xxh3_64_intdigest", lambda _: chunker._ZERO_BLOCK_HASH)
    data = blocks(1, 0, 2, 3, 0)
    imported = add("image", data)
    assert imported.zero_bytes == 2 * GRID
    assert read_image(store, "image") == data


def distinct_chunks(*images: bytes) -> int:
    """How many chunks the images have together, by the plainest means."""
    digests = set()
    for data in images:
        for segment in chunker.segments_of_data([(0, len(data))]):
            piece = memoryview(data)[segment.offset : segment.offset + segment.length]
            position = 0
            for length in chunker.cut_by_content(piece):
                chunk = piece[position : position + abs(length)]
                position += abs(length)
                if not chunker.is_zero(chunk):
                    digests.add(blake3(chunk).digest())
    return len(digests)


def import_in_child(path: str, source: str, name: str, barrier: Barrier) -> None:
    """Another process's import; small batches, so that the two interleave."""
    staging.BATCH_BYTES = 1 << 18
    with Store(Path(path)) as store:
        barrier.wait(60)
        store.import_path(Path(source), name, silent)


def test_two_processes_that_import_the_same_content_store_it_once(
    store: Store, tmp_path: Path
) -> None:
    shared = noise(1, 2 * SEGMENT_BYTES)
    images = {"a": shared + noise(2, 1 << 20), "b": noise(3, SEGMENT_BYTES) + shared}
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    children = []
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
        arguments = (str(store.path), str(tmp_path / name), name, barrier)
        children.append(context.Process(target=import_in_child, args=arguments))
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    for name, data in images.items():
        assert read_image(store, name) == data
    assert store.stats().chunks == distinct_chunks(*images.values())
    assert keys_of(store, "drafts") == []


def test_chunk_stored_by_another_import_meanwhile_is_not_stored_again(
    store: Store, tmp_path: Path
) -> None:
    """The worker looked it up and found nothing; by the commit it is there."""
    shared = noise(1, SEGMENT_BYTES)
    data = shared + noise(2, SEGMENT_BYTES)
    (tmp_path / "outer").write_bytes(data)
    done = False

    def meanwhile(_done: int, _total: int) -> None:
        nonlocal done
        if not done:
            done = True
            import_bytes(store, tmp_path, "inner", noise(7, GRID) + shared[GRID:])
            import_bytes(store, tmp_path, "same", shared)

    store.import_path(tmp_path / "outer", "outer", meanwhile)
    assert read_image(store, "outer") == data
    assert read_image(store, "same") == shared
    assert store.stats().chunks == distinct_chunks(data, noise(7, GRID) + shared[GRID:])


def test_batches_commit_drafts_and_the_image_replaces_them(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BATCH_BYTES", 1 << 20)
    data = noise(1, 8 * SEGMENT_BYTES)
    (tmp_path / "image").write_bytes(data)
    drafts = []
    store.import_path(
        tmp_path / "image", "image", lambda *_: drafts.append(len(keys_of(store, "drafts")))
    )
    assert max(drafts) > 1
    assert keys_of(store, "drafts") == []
    assert read_image(store, "image") == data


# --- failures ---


def test_name_that_is_taken_is_refused_before_the_work(store: Store, add: Add) -> None:
    add("name", blocks(1))
    with pytest.raises(ImageExistsError):
        add("name", blocks(2))
    assert store.stats().chunks == 1


def test_name_taken_meanwhile_is_refused_and_nothing_changed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "outer").write_bytes(noise(1, 100_000))

    def meanwhile(_done: int, _total: int) -> None:
        if not store.names():
            import_bytes(store, tmp_path, "name", blocks(1))

    with pytest.raises(ImageExistsError):
        store.import_path(tmp_path / "outer", "name", meanwhile)
    assert read_image(store, "name") == blocks(1)
    store.collect_garbage()
    assert store.stats().chunks == 1


@pytest.mark.parametrize("sparse", [False, True])
def test_source_that_shrinks_is_an_error(store: Store, tmp_path: Path, sparse: bool) -> None:
    source = tmp_path / "image"
    data = noise(1, GRID) + bytes(9 * SEGMENT_BYTES) + noise(2, GRID)
    if sparse:
        write_sparse(source, data)
    else:
        source.write_bytes(noise(1, 10 * SEGMENT_BYTES))
    hashed = ingest.Ingest._hash

    def hash_and_shrink(self: ingest.Ingest, segment: chunker.Segment) -> list[ingest._Hashed]:
        result = hashed(self, segment)
        os.truncate(source, GRID)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest.Ingest, "_hash", hash_and_shrink)
        patch.setattr(ingest, "_SEGMENTS_AHEAD", 0)
        with pytest.raises(SourceError, match="shorter"):
            store.import_path(source, "image", silent)
    assert store.names() == []


def test_source_that_changes_under_a_reused_chunk_is_an_error(
    store: Store, add: Add, tmp_path: Path
) -> None:
    data = noise(1, 2 * SEGMENT_BYTES)
    add("first", data)
    source = tmp_path / "image"
    source.write_bytes(data)

    def meanwhile(done: int, _total: int) -> None:
        if store.names():
            store.remove(["first"])
            store.collect_garbage()
            source.write_bytes(noise(2, len(data)))

    with pytest.raises(SourceError, match="changed"):
        store.import_path(source, "image", meanwhile)
    assert store.names() == []


@pytest.mark.parametrize("source", ["missing", "missing/deep", "x" * 300, "fifo"])
def test_unreadable_source_is_a_source_error(store: Store, tmp_path: Path, source: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceError) as caught:
        store.import_path(tmp_path / source, "image", silent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["-x", "host:x"])
def test_relative_paths_that_look_like_something_else_are_files(
    store: Store, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """mkfs.erofs would take a leading dash for an option, tar a colon for another host."""
    monkeypatch.chdir(tmp_path)
    make_tar(tree, tmp_path / f"{name}.tar")
    tree.rename(tmp_path / name)
    from_tar = store.import_path(Path(f"{name}.tar"), "from tar", silent)[1]
    assert store.import_path(Path(name), "from tree", silent)[1].digest == from_tar.digest


def test_failed_import_leaves_the_store_usable(store: Store, add: Add, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(noise(1, 100_000))

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.import_path(tmp_path / "image", "image", interrupt)
    assert store.names() == []
    add("image", noise(1, 100_000))
    assert read_image(store, "image") == noise(1, 100_000)


@pytest.mark.parametrize("name", ["", ".", "..", "-x", "/x", "x/", "a//b", "a/../b", "a*", "a\nb"])
def test_names_that_shells_and_globs_misread_are_refused(
    store: Store, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError):
        store.import_stream(io.BytesIO(b"x"), name, silent)


# --- metadata ---


def test_metadata_and_contents_share_no_frame_and_metadata_s_lie_together(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Frames of few chunks: many of each kind, in an image that is quickly made.
    monkeypatch.setattr(ingest, "FRAME_SLOTS_MAX", 4)
    tree = tmp_path / "tree"
    for number in range(120):
        path = tree / f"directory-{number % 7}" / f"file-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(number, 1 + number * 997 % 40_000))
    image = tmp_path / "image.erofs"
    # Its inodes lie between the contents, as mkfs.erofs puts them.
    mkfs, *_ = erofs_programs("mkfs.erofs")
    subprocess.run([mkfs, "--quiet", "-x-1", image, tree], check=True, capture_output=True)
    data = image.read_bytes()
    extents = file_extents(lambda at, length: data[at : at + length], len(data))
    is_content = bytearray(len(data))
    for start, end in extents:
        is_content[start:end] = b"\1" * (end - start)
    store.import_path(image, "image", silent)
    manifest = store.open_manifest("image")
    frames: dict[bool, list[int]] = {True: [], False: []}
    for start, length, ref in manifest.runs(0, len(data)):
        kinds = set(is_content[start : start + length])
        if ref:
            assert len(kinds) == 1
            frames[kinds == {1}].append(ref >> 16)
    store.close_manifest(manifest)
    contents, metadata = set(frames[True]), set(frames[False])
    assert not contents & metadata
    assert len(metadata) >= 3
    assert len(contents) > 10
    assert sorted(metadata) == list(range(min(metadata), max(metadata) + 1))
    assert min(metadata) > max(contents)
    assert read_image(store, "image") == data
