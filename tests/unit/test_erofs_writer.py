"""Layout, limits and refusals of the EROFS writer, and where its trees come from."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedupstore.erofs.tree import (
    Attributes,
    Directory,
    Node,
    ReadInto,
    RegularFile,
    Special,
    Symlink,
)
from dedupstore.erofs.writer import placement, plan_image, scan_directory, scan_tar, write_image
from dedupstore.erofs.writer.acltext import acl_attribute
from dedupstore.errors import SourceError
from tests.erofs_parser import Image
from tests.programs import require_root

PLAIN = Attributes(0o755)


class Zeros:
    """A content of any size."""

    @contextmanager
    def opened(self) -> Iterator[ReadInto]:
        def read_into(_: int, buffer: memoryview) -> int:
            buffer[:] = bytes(len(buffer))
            return len(buffer)

        yield read_into


def whole(size: int) -> RegularFile:
    return RegularFile(PLAIN, size, ((0, size),) if size else (), Zeros())


def tree(**entries: Node) -> Directory:
    return Directory(PLAIN, {name.encode(): node for name, node in entries.items()})


def image_of(root: Directory, **options: object) -> bytes:
    out = io.BytesIO()
    size = write_image(root, out, **options)  # type: ignore[arg-type]
    assert size == len(out.getvalue())
    return out.getvalue()


def parsed(root: Directory, **options: object) -> Image:
    return Image(image_of(root, **options))


# Layout


def test_empty_tree_is_a_head_and_a_block_of_metadata() -> None:
    plan = plan_image(tree())
    assert (plan.size, plan.metadata_at, plan.files) == (8192, 4096, ())
    assert Image(image_of(tree())).names.keys() == {b""}


def test_contents_come_first_and_metadata_last() -> None:
    plan = plan_image(tree(a=whole(5000), b=whole(1), c=whole(0)))
    assert [(f.offset, f.length, f.spans) for f in plan.files] == [
        (4096, 8192, ((4096, 0, 5000),)),
        (12288, 4096, ((12288, 0, 1),)),
    ]
    assert plan.metadata_at == 16384


def test_root_has_a_small_number_that_is_not_zero() -> None:
    many = Directory(PLAIN, {b"%d" % i: whole(0) for i in range(100_000)})
    plan = plan_image(many)
    assert struct.unpack_from("<H", plan.head, 1024 + 14) == (1,)


def test_head_does_not_depend_on_contents_or_digests() -> None:
    root = tree(a=whole(5000))
    plan = plan_image(root, fingerprints=True)
    assert image_of(root, fingerprints=True)[:4096] == plan.head
    assert plan.metadata({0: bytes(32)}) != plan.metadata([b"\1" * 32])


@pytest.mark.parametrize("size", [1, 4096, 5000, 1 << 30, 1 << 43])
def test_file_of_holes_costs_one_map_entry(size: int) -> None:
    plan = plan_image(tree(hole=RegularFile(PLAIN, size)), fingerprints=True)
    assert (plan.size, plan.files) == (8192, ())
    assert plan.metadata().count(bytes([0xFF]) * 4) == 1


def test_largest_file_of_holes_has_a_small_map() -> None:
    plan = plan_image(tree(hole=RegularFile(PLAIN, (1 << 63) - 1)))
    assert plan.size < 5 << 20


def test_sparse_file_stores_only_its_data() -> None:
    file = RegularFile(PLAIN, 10 << 20, ((0, 100), (5 << 20, 4096)), Zeros())
    (placed,) = plan_image(tree(a=file)).files
    assert placed.spans == ((4096, 0, 4096), (8192, 5 << 20, 4096))


def test_fragmented_file_is_laid_out_in_little_time() -> None:
    extents = tuple((i * 8192, 4096) for i in range(200_000))
    file = RegularFile(PLAIN, 200_000 * 8192, extents, Zeros())
    started = time.process_time()
    plan = plan_image(tree(a=file))
    assert len(plan.files[0].spans) == 200_000
    assert time.process_time() - started < 5


def test_hard_links_share_one_place() -> None:
    node = whole(5000)
    link = Symlink(PLAIN, b"x")
    device = Special(PLAIN, stat.S_IFBLK, 8, 1)
    root = tree(a=node, b=node, c=link, d=link, e=device, f=device, g=tree(a=node))
    plan = plan_image(root)
    assert len(plan.files) == 1
    image = parsed(root)
    assert [image.names[name].links for name in (b"a", b"g/a", b"c", b"f")] == [3, 3, 2, 2]
    assert image.inodes == 5


def test_more_links_than_a_compact_inode_counts() -> None:
    node = whole(1)
    root = Directory(PLAIN, {b"%d" % i: node for i in range(70_000)})
    root.entries[b"d"] = Directory(PLAIN, {b"%d" % i: tree() for i in range(66_000)})
    image = parsed(root)
    assert image.names[b"0"].links == 70_000
    assert image.names[b"d"].links == 66_002


def test_commonest_time_makes_compact_inodes() -> None:
    often, once = Attributes(0o644, mtime=-7, mtime_ns=5), Attributes(0o644, mtime=3)
    root = Directory(once, {b"%d" % i: RegularFile(often, 0) for i in range(9)})
    image = parsed(root)
    assert (image.epoch, image.nsec) == (-7, 5)
    assert image.names[b"0"].mtime_ns == -7 * 10**9 + 5
    assert image.names[b""].mtime_ns == 3 * 10**9


def test_attribute_of_many_inodes_is_stored_once() -> None:
    value = os.urandom(1000)
    common = Attributes(0o644, xattrs={b"user.common": value})
    root = Directory(PLAIN, {b"%d" % i: RegularFile(common, 0) for i in range(50)})
    data = image_of(root)
    assert data.count(value) == 1
    assert Image(data).names[b"49"].xattrs == {b"user.common": value}


def test_inode_refers_to_at_most_255_shared_attributes() -> None:
    many = Attributes(0o644, xattrs={b"user.%03d" % i: b"v" for i in range(300)})
    image = parsed(tree(a=RegularFile(many, 0), b=RegularFile(many, 0)))
    assert image.names[b"a"].xattrs == image.names[b"b"].xattrs == dict(many.xattrs)


def test_fingerprints_are_announced_compatibly() -> None:
    image = parsed(tree(a=whole(5000)), fingerprints=True)
    assert image.compat == 0x1 | 0x2 | 0x10 | 0x20
    assert image.incompat == 0
    assert (image.prefix_count, image.fingerprint_prefix) == (1, 0)
    assert image.prefixes == [b"erofs.fingerprint.v1"]
    value = b"sha256:" + hashlib.sha256(bytes(5000)).digest()
    assert image.names[b"a"].hidden == {b"erofs.fingerprint.v1": value}


def test_file_with_huge_holes_has_no_fingerprint() -> None:
    file = RegularFile(PLAIN, 2 << 30, ((0, 4096),), Zeros())
    plan = plan_image(tree(a=file), fingerprints=True)
    assert [placed.fingerprinted for placed in plan.files] == [False]
    plan.metadata()


def test_missing_or_wrong_digest_is_refused() -> None:
    plan = plan_image(tree(a=whole(1), b=whole(1)), fingerprints=True)
    with pytest.raises(ValueError, match="no digest of file 1"):
        plan.metadata([bytes(32)])
    with pytest.raises(ValueError, match="20 bytes, no SHA-256"):
        plan.metadata([bytes(32), bytes(20)])


# Limits


@pytest.mark.parametrize("block_bytes", [0, 256, 1000, 4095, 131072, -4096])
def test_impossible_block_size_is_refused(block_bytes: int) -> None:
    with pytest.raises(ValueError, match="no power of two"):
        plan_image(tree(), block_bytes=block_bytes)


def test_uuid_has_sixteen_bytes() -> None:
    with pytest.raises(ValueError, match="UUID of 3 bytes"):
        plan_image(tree(), uuid=b"abc")
    assert plan_image(tree(), uuid=b"0123456789abcdef").head[1024 + 48 :][:16] == (
        b"0123456789abcdef"
    )


def attributed(**fields: object) -> Directory:
    return tree(a=tree(b=RegularFile(Attributes(**{"permissions": 0, **fields}), 0)))  # type: ignore[arg-type]


def with_xattr(name: bytes, value: bytes) -> Directory:
    return attributed(xattrs={name: value})


IMPOSSIBLE: dict[str, tuple[Callable[[], Directory], str]] = {
    "uid": (lambda: attributed(uid=1 << 32), "no owner"),
    "negative gid": (lambda: attributed(gid=-1), "no owner"),
    "permissions": (lambda: attributed(permissions=0o10000), "no permissions"),
    "late mtime": (lambda: attributed(mtime=1 << 63), "no time"),
    "early mtime": (lambda: attributed(mtime=-(1 << 63) - 1), "no time"),
    "nanoseconds": (lambda: attributed(mtime_ns=10**9), "no time"),
    "size": (lambda: tree(a=RegularFile(PLAIN, 1 << 63)), "no size"),
    "negative size": (lambda: tree(a=RegularFile(PLAIN, -1)), "no size"),
    "overlap": (
        lambda: tree(a=RegularFile(PLAIN, 9, ((0, 5), (4, 5)), Zeros())),
        "out of order",
    ),
    "data behind the end": (
        lambda: tree(a=RegularFile(PLAIN, 9, ((0, 10),), Zeros())),
        "behind the end",
    ),
    "too large": (lambda: tree(a=whole(1 << 44)), "too large for an EROFS image"),
    "empty link": (lambda: tree(a=Symlink(PLAIN, b"")), "1 to 4095 bytes"),
    "long link": (lambda: tree(a=Symlink(PLAIN, b"x" * 4096)), "1 to 4095 bytes"),
    "zero in link": (lambda: tree(a=Symlink(PLAIN, b"x\0")), "1 to 4095 bytes"),
    "long name": (lambda: tree(**{"x" * 256: whole(0)}), "no name"),
    "slash": (lambda: tree(**{"x/y": whole(0)}), "no name"),
    "dots": (lambda: tree(**{"..": whole(0)}), "no name"),
    "empty name": (lambda: tree(**{"": whole(0)}), "no name"),
    "major": (lambda: tree(a=Special(PLAIN, stat.S_IFCHR, 1 << 12, 0)), "device number"),
    "minor": (lambda: tree(a=Special(PLAIN, stat.S_IFCHR, 0, 1 << 20)), "device number"),
    "kind": (lambda: tree(a=Special(PLAIN, stat.S_IFREG)), "no kind of file"),
    "unknown namespace": (lambda: with_xattr(b"btrfs.compression", b""), "btrfs.compression"),
    "empty xattr name": (lambda: with_xattr(b"user.", b""), "'user.'"),
    "long xattr name": (lambda: with_xattr(b"user." + b"x" * 251, b""), "user.xxx"),
    "zero in xattr name": (lambda: with_xattr(b"user.x\0", b""), "user.x"),
    "long xattr": (lambda: with_xattr(b"user.x", bytes(1 << 16)), "of 65536 bytes"),
    "many xattrs": (
        lambda: attributed(xattrs={b"user.%d" % i: bytes(60_000) for i in range(6)}),
        "more extended attributes",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_has_no_form_is_refused(case: str) -> None:
    make, message = IMPOSSIBLE[case]
    with pytest.raises(SourceError, match=message):
        plan_image(make())


def test_map_of_a_huge_file_stays_small() -> None:
    file = RegularFile(PLAIN, 1 << 55, tuple((i << 45, 1) for i in range(1000)), Zeros())
    plan = plan_image(tree(a=file))
    assert plan.size - plan.metadata_at <= (64 << 20) + 8192


def test_metadata_that_would_fill_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "METADATA_BYTES_MAX", 1 << 16)
    root = Directory(PLAIN, {b"%d" % i: whole(0) for i in range(3000)})
    with pytest.raises(SourceError, match="metadata up to here"):
        plan_image(root)


def test_refusal_names_the_path() -> None:
    with pytest.raises(SourceError, match="'a/b': no owner"):
        plan_image(attributed(uid=-1))


def test_directory_with_two_names_is_refused() -> None:
    folder = tree()
    with pytest.raises(SourceError, match="two names"):
        plan_image(tree(a=folder, b=folder))


def test_content_that_ends_early_is_refused() -> None:
    class Short:
        @contextmanager
        def opened(self) -> Iterator[ReadInto]:
            yield lambda _offset, _buffer: 0

    with pytest.raises(SourceError, match="became shorter"):
        image_of(tree(a=RegularFile(PLAIN, 5, ((0, 5),), Short())))


# Directories


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A directory for trees that pytest itself cannot remove."""
    yield tmp_path / "deep"
    subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)


def test_deep_tree_is_scanned_and_written(deep: Path) -> None:
    deep.mkdir()
    path = os.fspath(deep)
    for _ in range(1000):
        path += "/d"
        os.mkdir(path)  # noqa: PTH102 - pathlib recurses
    Path(path, "file").write_bytes(b"found")
    image = parsed(scan_directory(deep))
    assert image.names[b"d/" * 1000 + b"file"].content == b"found"


def test_path_that_linux_does_not_take_is_refused_in_a_line(deep: Path) -> None:
    deep.mkdir()
    here = os.getcwd()  # noqa: PTH109
    os.chdir(deep)
    try:
        for _ in range(20):
            os.mkdir("x" * 250)  # noqa: PTH102
            os.chdir("x" * 250)
    finally:
        os.chdir(here)
    with pytest.raises(SourceError, match="File name too long") as caught:
        scan_directory(deep)
    assert len(str(caught.value)) < 500


def test_large_directory_comes_back(tmp_path: Path) -> None:
    for i in range(3000):
        (tmp_path / f"{i:0250}").touch()
    image = parsed(scan_directory(tmp_path))
    assert len(image.names) == 3001


def test_names_that_are_not_text_are_kept(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")).write_bytes(b"x")
    assert b"\xff\xfe" in parsed(scan_directory(tmp_path)).names


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "grown": (lambda path: path.write_bytes(bytes(20_000)), "changed while"),
    "cut": (lambda path: os.truncate(path, 3), "became shorter"),
    "touched": (lambda path: os.utime(path, ns=(0, 1)), "changed while"),
    "replaced": (
        lambda path: (
            path.rename(path.with_name("old")),
            path.write_bytes(bytes(10_000)),
            os.utime(path, ns=(0, 5)),
        ),
        "changed while",
    ),
    "removed": (lambda path: path.unlink(), "No such file"),
    "link": (lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), "symbolic link"),
    "fifo": (lambda path: (path.unlink(), os.mkfifo(path)), "changed while"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_file_that_changed_since_the_scan_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "tree" / "file"
    path.parent.mkdir()
    path.write_bytes(bytes(10_000))
    os.utime(path, ns=(0, 5))
    root = scan_directory(path.parent)
    make, message = CHANGES[change]
    make(path)
    with pytest.raises(SourceError, match=message) as caught:
        image_of(root)
    assert "file" in str(caught.value)


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        scan_directory(tmp_path / "missing")


def test_attributes_without_a_form_are_left_out_of_scans(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.setxattr(tmp_path / "a", "user.kept", b"1")
    assert parsed(scan_directory(tmp_path)).names[b"a"].xattrs == {b"user.kept": b"1"}


# Archives


def archive(path: Path, *members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info, data = member if isinstance(member, tuple) else (member, b"")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


@contextmanager
def scanned(path: Path) -> Iterator[Directory]:
    with path.open("rb") as file:
        yield scan_tar(file.fileno())


def tar_image(path: Path) -> Image:
    with scanned(path) as root:
        return parsed(root)


def test_later_members_replace_earlier_ones(tmp_path: Path) -> None:
    image = tar_image(
        archive(
            tmp_path / "tar",
            (member("a"), b"old"),
            member("kept", tarfile.LNKTYPE, linkname="./a"),
            (member("/a"), b"new"),
            member("b"),
            member("b", tarfile.DIRTYPE),
            (member("b/c"), b"below"),
            member("b", tarfile.DIRTYPE, mode=0o700),
            member("s", tarfile.SYMTYPE, linkname="a"),
            member("t", tarfile.LNKTYPE, linkname="s"),
        )
    )
    contents = {name: inode.content for name, inode in image.names.items()}
    assert (contents[b"a"], contents[b"kept"], contents[b"b/c"]) == (b"new", b"old", b"below")
    assert image.names[b"b"].mode == stat.S_IFDIR | 0o700
    assert image.names[b"s"] is image.names[b"t"]


def test_implied_directories_are_plain_and_of_1970(tmp_path: Path) -> None:
    image = tar_image(archive(tmp_path / "tar", member("x/y/z", mtime=9, uid=5)))
    for name in (b"", b"x", b"x/y"):
        inode = image.names[name]
        assert (inode.mode, inode.uid, inode.mtime_ns) == (stat.S_IFDIR | 0o755, 0, 0)


def test_whiteouts_stay_as_they_are(tmp_path: Path) -> None:
    image = tar_image(archive(tmp_path / "tar", member(".wh..wh..opq"), member(".wh.a")))
    assert {b".wh..wh..opq", b".wh.a"} < image.names.keys()


REFUSED = {
    "..": ([member("a/../../b")], "leads outside"),
    "link outside": ([member("a", tarfile.LNKTYPE, linkname="../b")], "leads outside"),
    "through a link": (
        [member("a", tarfile.SYMTYPE, linkname="/etc"), member("a/b")],
        "below what is no directory",
    ),
    "link to nothing": ([member("a", tarfile.LNKTYPE, linkname="b")], "links to no file"),
    "link to a directory": (
        [member("b", tarfile.DIRTYPE), member("a", tarfile.LNKTYPE, linkname="b")],
        "links to no file",
    ),
    "unknown type": ([member("a", b"V")], "unknown type"),
    "file over directory": ([member("a/b"), member("a")], "would replace a directory"),
    "file for the root": ([member("./")], "replace the root"),
    "unknown user": (
        [member("a", pax_headers={"SCHILY.acl.access": "user:nobody-knows:r--"})],
        "unknown here",
    ),
    "no time": ([member("a", pax_headers={"mtime": "yesterday"})], "'a'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_member_that_has_no_place_is_refused(tmp_path: Path, case: str) -> None:
    members, message = REFUSED[case]
    path = archive(tmp_path / "tar", *members)
    with pytest.raises(SourceError, match=message), scanned(path):
        pass


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "tar", (member("a"), b"x" * 3000), (member("b"), b"y"))
    good = path.read_bytes()
    for damaged in (good[:2000], good[:4000], good[:3600] + b"!" + good[3601:], b"no archive" * 99):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match="archive"), scanned(path):
            pass


def test_archive_that_changed_since_the_scan_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "tar", (member("a"), b"x" * 3000))
    with scanned(path) as root:
        os.utime(path, ns=(0, 1))
        with pytest.raises(SourceError, match="changed while"):
            image_of(root)


def test_archive_must_be_a_file() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(SourceError, match="regular file"):
            scan_tar(reading)
    finally:
        os.close(reading)
        os.close(writing)


def test_archive_is_read_by_many_threads_at_once(tmp_path: Path) -> None:
    data = [os.urandom(50_000) for _ in range(8)]
    path = archive(tmp_path / "tar", *((member(f"{i}"), each) for i, each in enumerate(data)))
    with path.open("rb") as file, ThreadPoolExecutor(8) as threads:
        file.seek(17)
        files = plan_image(scan_tar(file.fileno())).files

        def read(number: int) -> bytes:
            placed = files[number % 8]
            buffer = bytearray(placed.length)
            with placed.node.content.opened() as read_into:
                for at in range(0, len(buffer), 512):
                    placed.fill(read_into, at, memoryview(buffer)[at : at + 512])
            return bytes(buffer)[: placed.node.size]

        for number, found in enumerate(threads.map(read, range(32))):
            assert found == data[number % 8]
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 17


def test_pax_attributes_are_kept(tmp_path: Path) -> None:
    headers = {
        "mtime": "-1.25",
        "SCHILY.xattr.user.a%3Db": "v\udcff\n=",
        "SCHILY.xattr.btrfs.compression": "zstd",
    }
    image = tar_image(archive(tmp_path / "tar", member("a", pax_headers=headers, uid=1 << 31)))
    inode = image.names[b"a"]
    assert inode.mtime_ns == -1_250_000_000
    assert inode.xattrs == {b"user.a=b": b"v\xff\n="}
    assert inode.uid == 1 << 31


def entry(tag: int, bits: int, ident: int = 0xFFFFFFFF) -> bytes:
    return struct.pack("<HHI", tag, bits, ident)


def test_acl_text_becomes_the_attribute_of_linux() -> None:
    text = "user::rwx\nuser:7:rw-\nuser:root:r--:0\ngroup::r-x #effective:r--\ng:9:-"
    text += "\nmask::r--\nother::---"
    assert acl_attribute(text, default=False) == struct.pack("<I", 2) + b"".join(
        [
            entry(1, 7),
            entry(2, 4, 0),
            entry(2, 6, 7),
            entry(4, 5),
            entry(8, 0, 9),
            entry(16, 4),
            entry(32, 0),
        ]
    )


def test_acl_that_equals_the_mode_is_no_attribute() -> None:
    assert acl_attribute("user::rwx,group::r-x,other::r-x", default=False) is None
    assert acl_attribute("user::rwx,group::r-x,other::r-x", default=True) is not None
    assert acl_attribute("", default=True) is None


@pytest.mark.parametrize(
    "text",
    [
        "user::rwx",
        "user::rwx,group::r-x,other::r-x,user:5:rwx",
        "user::rwx,user::rwx,group::r-x,other::r-x",
        "user::rwx,group::r-x,other::r-x,mask::r--,user:5:r--,user:5:rw-",
        "user::rwz,group::r-x,other::r-x",
        "user::rwx,group::r-x,other:5:r-x",
        "user::rwx,group::r-x,other::r-x,mask::r--,user:4294967295:r--",
        "nonsense",
        "::",
    ],
)
def test_text_that_is_no_acl_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"ACL|id of a user"):
        acl_attribute(text, default=False)


def test_same_tree_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / name).write_bytes(name.encode() * 5000)
        os.setxattr(tmp_path / name, "user.common", b"x" * 50)
    program = (
        "import sys, hashlib, io\n"
        "from dedupstore.erofs.writer import *\n"
        "out = io.BytesIO()\n"
        "write_image(scan_directory(sys.argv[1]), out, fingerprints=True)\n"
        "print(hashlib.sha256(out.getvalue()).hexdigest())"
    )
    own = hashlib.sha256(image_of(scan_directory(tmp_path), fingerprints=True)).hexdigest()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program, tmp_path]
        assert subprocess.check_output(command, env=environment, text=True).strip() == own


def test_mount_points_below_are_part_of_the_tree(tmp_path: Path) -> None:
    require_root()
    root = scan_directory("/dev/pts")
    assert all(isinstance(node, Special) for node in root.entries.values())
