"""Images that are laid out but not written: bytes of any range, hashing on the way, failures."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedupstore import trees
from dedupstore.building import BuiltSource
from dedupstore.constants import SEGMENT_BYTES
from dedupstore.erofs.tree import Attributes, Directory, ReadInto, RegularFile
from dedupstore.erofs.writer import plan_image, scan_directory, write_image
from dedupstore.errors import SourceError
from dedupstore.store import Store
from tests.conftest import noise, read_image, silent

PLAIN = Attributes(0o644)


class Bytes:
    """The content of a file in memory; `fail_at` is the offset at which reading it fails."""

    def __init__(self, data: bytes, fail_at: int | None = None) -> None:
        self._data = data
        self._fail_at = fail_at

    @contextmanager
    def opened(self) -> Iterator[ReadInto]:
        yield self._read_into

    def _read_into(self, offset: int, buffer: memoryview) -> int:
        part = self._data[offset : offset + len(buffer)]
        if self._fail_at is not None and offset + len(part) > self._fail_at:
            raise SourceError("file: Input/output error")
        buffer[: len(part)] = part
        return len(part)


def file(data: bytes, fail_at: int | None = None) -> RegularFile:
    extents = ((0, len(data)),) if data else ()
    return RegularFile(PLAIN, len(data), extents, Bytes(data, fail_at))


def written(root: Directory) -> bytes:
    out = io.BytesIO()
    write_image(root, out, fingerprints=True)
    return out.getvalue()


def drained(source: BuiltSource) -> bytes:
    """Every segment, as an import on one thread reads them."""
    parts = [source.read_segment(s.offset, s.length) for s in source.segments()]
    return b"".join(parts)


@pytest.fixture
def root() -> Directory:
    """Files of less and more than a segment, and a sparse one."""
    sparse = noise(9, 8192)
    return Directory(
        Attributes(0o755),
        {
            b"large": file(noise(1, 3 * SEGMENT_BYTES + 777)),
            b"small": file(b"small"),
            b"empty": file(b""),
            b"sparse": RegularFile(PLAIN, 9 << 20, ((0, 8192),), Bytes(sparse + bytes(9 << 20))),
            b"folder": Directory(PLAIN, {b"%d" % i: file(noise(i, 5000)) for i in range(40)}),
        },
    )


def test_segments_are_the_image(root: Directory) -> None:
    assert drained(BuiltSource(plan_image(root, fingerprints=True), "tree")) == written(root)


def test_any_range_is_that_of_the_image(root: Directory) -> None:
    source = BuiltSource(plan_image(root, fingerprints=True), "tree")
    drained(source)
    image = written(root)
    choice = random.Random(3)
    for _ in range(200):
        offset = choice.randrange(len(image) + 100)
        length = choice.choice((1, 4096, 100_000))
        assert source.read_at(offset, length) == image[offset : offset + length]


def test_imported_tree_reads_back_as_the_written_image(
    store: Store, root: Directory, tmp_path: Path
) -> None:
    """On several threads, the parts of a large file hashed in turn."""
    store._importer()._import_built(trees.build(root, "tree"), "image", silent)
    assert read_image(store, "image") == written(root)


@pytest.mark.parametrize("at", [0, SEGMENT_BYTES + 5, 3 * SEGMENT_BYTES])
def test_file_that_cannot_be_read_fails_the_import_and_nobody_waits(
    store: Store, root: Directory, at: int
) -> None:
    root.entries[b"large"] = file(noise(1, 3 * SEGMENT_BYTES + 777), fail_at=at)
    with pytest.raises(SourceError, match=r"^tree: file: Input/output error$"):
        store._importer()._import_built(trees.build(root, "tree"), "image", silent)
    assert store.names() == []


def change_content(path: Path) -> None:
    path.write_bytes(noise(5, path.stat().st_size))


def shorten(path: Path) -> None:
    path.write_bytes(b"x")


@pytest.mark.parametrize("change", [change_content, shorten])
def test_file_that_changes_after_the_scan_fails_the_import(
    store: Store, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """Its fingerprint must be that of the bytes that are stored."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(noise(4, 100_000))
    root = scan_directory(tree)
    change(tree / "file")
    with pytest.raises(SourceError, match=r"changed|shorter"):
        store._importer()._import_built(trees.build(root, "tree"), "image", silent)
    assert store.names() == []
