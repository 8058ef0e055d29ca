"""Archives that were made to fill memory or the disk, to keep an import busy, to lead outside."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import zstandard

from dedupstore import archives
from dedupstore.erofs import read_tree
from dedupstore.erofs.tree import Directory
from dedupstore.erofs.writer import (
    archives as members,
    fingerprints,
    placement,
    plan_image,
    scan_tar,
)
from dedupstore.errors import SourceError
from dedupstore.store import Store
from tests.conftest import read_image, silent
from tests.fault.test_hostile_images import dedupstore, limited_store
from tools.fuzzing.archives import header, pax

__all__ = ["limited_store"]

END = bytes(1024)
FILE = header(b"file", b"0", 0)


def refusal(store: Path, tmp_path: Path, archive: bytes, *, name: str = "image") -> str:
    """What the command says that refuses an archive, in bounded memory and time."""
    source = tmp_path / "source.tar"
    source.write_bytes(archive)
    done = dedupstore(store, "import", source, name)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert len(line) < 1000
    return line


LONG_NAME = header(b"././@LongLink", b"L", 2) + b"n\0".ljust(512, b"\0")
MANY_RECORDS = {b"k%d" % n: b"v" for n in range(200)}
ENDLESS: dict[str, tuple[bytes, str]] = {
    "headers of headers": (LONG_NAME * 5000 + FILE + END, "headers without end"),
    "records for records": (pax({b"a": b"b"}) * 5000 + FILE + END, "headers without end"),
    "name of 8 GiB": (header(b"l", b"L", (8 << 30) - 1) + END, "headers of more than"),
    "records of 8 GiB": (header(b"x", b"x", (8 << 30) - 1) + END, "headers of more than"),
    "name without end": (header(b"l", b"L", 17 << 20) + b"n" * (17 << 20) + END, "headers of more"),
    "records for all members": (pax(MANY_RECORDS, b"g") + FILE + END, "impossible header"),
    "size below zero": (FILE + pax({b"size": b"-1536"}) + FILE + END, "damaged archive"),
    "size of 2^70": (pax({b"size": b"%d" % (1 << 70)}) + FILE + END, "archive"),
    "acl without end": (
        pax({b"SCHILY.acl.access": b"user:" + b"n" * 100_000 + b":rwx"}) + FILE + END,
        "unknown here",
    ),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_endless_archive_is_refused_in_one_line(
    limited_store: Path, tmp_path: Path, what: str
) -> None:
    archive, reason = ENDLESS[what]
    assert reason in refusal(limited_store, tmp_path, archive)


def sparse(count: int, size: int, at: int) -> bytes:
    """Members of `size` bytes that have one byte of data each."""
    records = {b"GNU.sparse.map": b"%d,1" % at, b"GNU.sparse.size": b"%d" % size}
    data = b"d".ljust(512, b"\0")
    return b"".join(
        pax(records | {b"GNU.sparse.name": b"f%d" % n}) + header(b"f%d" % n, b"0", 1) + data
        for n in range(count)
    )


def test_sparse_members_of_2_to_62_bytes_are_refused(limited_store: Path, tmp_path: Path) -> None:
    """Each would take a chunk of hundreds of GiB, or a map of 64 MiB."""
    line = refusal(limited_store, tmp_path, sparse(200, 1 << 62, 0) + END)
    assert "no sound archive" in line or "too large" in line


def test_holes_of_many_members_are_not_all_hashed(tmp_path: Path) -> None:
    """A gigabyte of zeros is a second of hashing, and takes 2 KB of an archive."""
    source = tmp_path / "holes.tar"
    source.write_bytes(sparse(400, 1 << 30, 0) + END)
    with source.open("rb") as file:
        plan = plan_image(scan_tar(file.fileno()), fingerprints=True)
    hashed = [placed for placed in plan.files if placed.fingerprinted]
    assert len(plan.files) == 400
    assert sum(placed.node.size for placed in hashed) <= fingerprints.HOLES_BYTES_MAX_OF_TREE + 400
    assert hashed


def test_maps_of_many_members_do_not_fill_memory(tmp_path: Path) -> None:
    """A map with an entry for each block of a file of 64 GiB takes 64 MiB."""
    source = tmp_path / "maps.tar"
    source.write_bytes(sparse(100, 64 << 30, 5 << 30) + END)
    with source.open("rb") as file:
        plan = plan_image(scan_tar(file.fileno()))
    assert plan.size - plan.metadata_at <= placement.MAPS_BYTES_MAX + (1 << 20)


def test_many_members_are_refused_before_they_fill_memory(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "_NODES_MAX", 50)
    source = tmp_path / "source.tar"
    for names in ([b"%d" % n for n in range(51)], [b"/".join([b"d"] * 26)] * 2):
        source.write_bytes(b"".join(header(name, b"0", 0) for name in names) + END)
        if len(names) > 2:
            with pytest.raises(SourceError, match="more than 50 files"):
                store.import_path(source, "image", silent)
        else:
            store.import_path(source, "image", silent)


def test_many_pieces_of_sparse_files_are_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "_EXTENTS_MAX", 3)
    source = tmp_path / "source.tar"
    source.write_bytes(sparse(3, 9000, 100) + END)
    store.import_path(source, "three", silent)
    source.write_bytes(sparse(4, 9000, 100) + END)
    with pytest.raises(SourceError, match="more than 3 pieces"):
        store.import_path(source, "four", silent)


# --- compressed -------------------------------------------------------------------------------

SOUND = header(b"file", b"0", 5) + b"12345".ljust(512, b"\0") + END
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
}


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_archive_that_unpacks_to_too_much_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(archives, "_UNPACKED_PER_BYTE_MAX", 2)
    monkeypatch.setattr(archives, "_UNPACKED_BYTES_MIN", 1 << 20)
    source = tmp_path / "source"
    source.write_bytes(COMPRESSORS[kind](SOUND + bytes(1 << 19)))
    store.import_path(source, "enough", silent)
    source.write_bytes(COMPRESSORS[kind](SOUND + bytes(3 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="unpack it, and import the result"):
            store.import_path(source, "too-much", silent)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert not list((store.path / "tmp").iterdir())


def test_bound_lets_every_gzip_pass() -> None:
    zeros = 64 << 20
    packed = len(gzip.compress(bytes(zeros)))
    assert zeros <= archives.unpacked_bytes_max(packed)


def test_xz_that_wants_too_much_memory_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(lzma.compress(SOUND, preset=9))
    monkeypatch.setattr(archives, "UNPACKING_MEMORY_BYTES_MAX", 32 << 20)
    with pytest.raises(SourceError, match="unpack it, and import the result"):
        store.import_path(source, "image", silent)
    monkeypatch.undo()
    store.import_path(source, "image", silent)


def test_zstd_that_wants_too_much_memory_is_refused(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    parameters = zstandard.ZstdCompressionParameters(window_log=31, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    source.write_bytes(stream.compress(SOUND) + stream.flush())
    with pytest.raises(SourceError, match="unpack it, and import the result"):
        store.import_path(source, "image", silent)


def test_xz_of_several_streams_with_padding_is_read_whole(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    half = len(SOUND) // 2
    packed = [lzma.compress(part) for part in (SOUND[:half], SOUND[half:])]
    source.write_bytes(packed[0] + bytes(200_000) + packed[1] + bytes(4))
    store.import_path(source, "image", silent)
    assert set(tree_of(store, "image").entries) == {b"file"}


@pytest.mark.parametrize("cut", [30, 60, 80])
def test_xz_that_ends_too_early_is_no_archive(store: Store, tmp_path: Path, cut: int) -> None:
    """And so a raw image, or, once it is known to be one, a damaged archive."""
    source = tmp_path / "source"
    packed = lzma.compress(SOUND)
    source.write_bytes(packed[:cut])
    try:
        store.import_path(source, "image", silent)
    except SourceError as error:
        assert "damaged archive" in f"{error}"  # noqa: PT017
    else:
        assert read_image(store, "image") == packed[:cut]


# --- names that lead elsewhere ----------------------------------------------------------------


def tree_of(store: Store, name: str) -> Directory:
    image = read_image(store, name)
    return read_tree(lambda offset, length: image[offset : offset + length], len(image))


def tar_of(parts: Iterable[bytes]) -> bytes:
    return b"".join(parts) + END


ESCAPES: Mapping[str, bytes] = {
    "parent": tar_of([header(b"../up", b"0", 0)]),
    "parent inside": tar_of([header(b"a/../../up", b"0", 0)]),
    "through a link": tar_of([header(b"l", b"2", 0, b"/etc"), header(b"l/passwd", b"0", 0)]),
    "link to a parent": tar_of([header(b"l", b"1", 0, b"../../etc/passwd")]),
    "link to the host": tar_of([header(b"l", b"1", 0, b"/etc/passwd")]),
    "zero byte": tar_of([pax({b"path": b"a\0b"}), FILE]),
    "name of 300 bytes": tar_of([pax({b"path": b"n" * 300}), FILE]),
}


@pytest.mark.parametrize("what", ESCAPES)
def test_name_that_leads_outside_is_refused(limited_store: Path, tmp_path: Path, what: str) -> None:
    refusal(limited_store, tmp_path, ESCAPES[what])


def test_absolute_names_links_and_devices_stay_inside_the_image(
    store: Store, tmp_path: Path
) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind in (
            ("/etc/passwd", tarfile.REGTYPE),
            ("etc/link", tarfile.SYMTYPE),
            ("dev/sda", tarfile.BLKTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../../../../etc/shadow" * (kind == b"2")
            member.devmajor, member.devminor = 8, 0
            tar.addfile(member)
    source = tmp_path / "source.tar"
    source.write_bytes(out.getvalue())
    before = sorted(tmp_path.rglob("*"))
    store.import_path(source, "image", silent)
    root = tree_of(store, "image")
    assert set(root.entries) == {b"etc", b"dev"}
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before] == []
