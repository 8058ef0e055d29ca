"""Random trees against an independent parser of the format."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings, strategies as st

from dedupstore.erofs import file_extents, read_superblock
from dedupstore.erofs.ranges import partition
from dedupstore.erofs.tree import (
    Attributes,
    Directory,
    Extent,
    Node,
    ReadInto,
    RegularFile,
    Special,
    Symlink,
)
from dedupstore.erofs.writer import ImagePlan, plan_image, scan_tar, write_image
from dedupstore.errors import SourceError
from tests.erofs_parser import Image, with_checksum

BLOCK_SIZES = (512, 1024, 4096, 65536)
SOME_TIMES = ((0, 0), (1_600_000_000, 123_456_789), (-5, 999_999_999))


@dataclass(frozen=True)
class Bytes:
    """A content that delivers a little at a time, and never behind its end."""

    data: bytes = field(repr=False)
    step: int = 1000

    @contextmanager
    def opened(self) -> Iterator[ReadInto]:
        yield self._read_into

    def _read_into(self, offset: int, buffer: memoryview) -> int:
        piece = self.data[offset : offset + min(len(buffer), self.step)]
        buffer[: len(piece)] = piece
        return len(piece)


names = st.one_of(
    st.sampled_from([b"a", b"!", b"-", b".a", b"...", b"\xff", b"z" * 255]),
    st.binary(min_size=1, max_size=255).filter(
        lambda name: name not in (b".", b"..") and not {0, 47} & set(name)
    ),
)
xattr_names = st.one_of(
    st.sampled_from([b"system.posix_acl_access", b"system.posix_acl_default"]),
    st.builds(
        lambda prefix, rest: prefix + rest,
        st.sampled_from([b"user.", b"trusted.", b"security."]),
        st.sampled_from([b"a", b"b", b"x" * 200, b"\xff\xfe"]),
    ),
)
xattrs = st.dictionaries(
    xattr_names, st.one_of(st.just(b"same"), st.binary(max_size=900)), max_size=4
)
attributes = st.builds(
    lambda permissions, uid, gid, time, found: Attributes(permissions, uid, gid, *time, found),
    st.integers(0, 0o7777),
    st.one_of(st.just(0), st.integers(0, (1 << 32) - 1)),
    st.one_of(st.just(0), st.integers(0, (1 << 32) - 1)),
    st.one_of(
        st.sampled_from(SOME_TIMES),
        st.tuples(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 999_999_999)),
    ),
    xattrs,
)


@st.composite
def files(draw: st.DrawFn) -> RegularFile:
    found: list[Extent] = []
    end = 0
    for _ in range(draw(st.integers(0, 4))):
        start = end + draw(st.sampled_from([0, 1, 511, 4096, 70_000, 300_000]))
        length = draw(st.sampled_from([1, 100, 512, 4095, 4096, 9000]))
        found.append((start, length))
        end = start + length
    size = end + draw(st.sampled_from([0, 0, 0, 1, 5000, 1 << 20]))
    data = bytearray(size)
    seed = draw(st.binary(min_size=1, max_size=3))
    for start, length in found:
        data[start : start + length] = (seed * length)[:length]
    return RegularFile(draw(attributes), size, tuple(found), Bytes(bytes(data)))


specials = st.one_of(
    st.builds(
        Special,
        attributes,
        st.sampled_from([stat.S_IFCHR, stat.S_IFBLK]),
        st.integers(0, 0xFFF),
        st.integers(0, 0xFFFFF),
    ),
    st.builds(Special, attributes, st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK])),
)
symlinks = st.builds(
    Symlink, attributes, st.binary(min_size=1, max_size=4095).filter(lambda t: b"\0" not in t)
)


@st.composite
def trees(draw: st.DrawFn) -> Directory:
    root = Directory(draw(attributes))
    folders = [root]
    links: list[Node] = []
    for _ in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(["file", "file", "directory", "link", "special", "hard"]))
        folder = draw(st.sampled_from(folders))
        name = draw(names)
        if name in folder.entries:
            continue
        if kind == "directory":
            node: Node = Directory(draw(attributes))
            folders.append(node)
        elif kind == "hard" and links:
            node = draw(st.sampled_from(links))
        else:
            node = draw({"link": symlinks, "special": specials}.get(kind, files()))
            links.append(node)
        folder.entries[name] = node
    for i in range(draw(st.sampled_from([0, 0, 0, 90]))):
        root.entries[b"filler-%d" % i] = Symlink(Attributes(0o777), b"x" * (i + 1))
    return root


def walk(root: Directory) -> Iterator[tuple[bytes, Node]]:
    pending: list[tuple[bytes, Node]] = [(b"", root)]
    while pending:
        path, node = pending.pop()
        yield path, node
        if isinstance(node, Directory):
            for name, child in node.entries.items():
                pending.append((path + b"/" * bool(path) + name, child))


def assert_same(image: Image, root: Directory, *, fingerprints: bool) -> None:
    expected = dict(walk(root))
    assert image.names.keys() == expected.keys()
    names_of: dict[int, int] = {}
    for node in expected.values():
        names_of[id(node)] = names_of.get(id(node), 0) + 1
    for path, node in expected.items():
        found = image.names[path]
        wanted = node.attributes
        assert found.mode & 0o7777 == wanted.permissions
        assert (found.uid, found.gid) == (wanted.uid, wanted.gid)
        assert found.mtime_ns == wanted.mtime * 10**9 + wanted.mtime_ns
        assert found.xattrs == dict(wanted.xattrs)
        fingerprint = {}
        if isinstance(node, Directory):
            folders = sum(isinstance(child, Directory) for child in node.entries.values())
            assert found.links == 2 + folders
        else:
            assert found.links == names_of[id(node)]
        if isinstance(node, RegularFile):
            assert isinstance(node.content, Bytes)
            assert found.content == node.content.data
            if fingerprints and node.extents:
                value = b"sha256:" + hashlib.sha256(node.content.data).digest()
                fingerprint = {b"erofs.fingerprint.v1": value}
        elif isinstance(node, Symlink):
            assert found.content == node.target
        elif isinstance(node, Special):
            assert stat.S_IFMT(found.mode) == node.kind
            assert found.rdev == (node.major, node.minor)
        assert found.hidden == fingerprint
    assert image.inodes == len(names_of) == len(image.by_nid)
    assert sorted(inode.number for inode in image.by_nid.values()) == [*range(1, len(names_of) + 1)]


def pieces(plan: ImagePlan, data: bytes, step: int) -> Iterator[tuple[bytes, bytes]]:
    """(bytes as `fill` gives them, the image's) of every file, `step` bytes at a time."""
    for placed in plan.files:
        with placed.node.content.opened() as read_into:
            for at in range(0, placed.length, step):
                buffer = bytearray(min(step, placed.length - at))
                placed.fill(read_into, at, memoryview(buffer))
                start = placed.offset + at
                yield bytes(buffer), data[start : start + len(buffer)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(trees(), st.sampled_from(BLOCK_SIZES), st.booleans())
def test_image_holds_the_tree(root: Directory, block_bytes: int, fingerprints: bool) -> None:
    out = io.BytesIO()
    size = write_image(root, out, block_bytes=block_bytes, fingerprints=fingerprints)
    data = out.getvalue()
    assert size == len(data)
    assert data == with_checksum(data)
    image = Image(data)
    assert_same(image, root, fingerprints=fingerprints)

    ranges = [block for inode in image.by_nid.values() for block in inode.blocks]
    assert partition(ranges) == sorted(ranges)  # nothing lies in two files
    assert file_extents(lambda at, length: data[at : at + length], size) == sorted(ranges)
    assert read_superblock(lambda at, length: data[at : at + length], size).checksum_ok


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(trees(), st.sampled_from(BLOCK_SIZES), st.sampled_from([1 << 9, 5000, 1 << 20]))
def test_any_range_of_a_file_can_be_made_by_itself(
    root: Directory, block_bytes: int, step: int
) -> None:
    out = io.BytesIO()
    write_image(root, out, block_bytes=block_bytes)
    plan = plan_image(root, block_bytes=block_bytes)
    for made, stored in pieces(plan, out.getvalue(), step):
        assert made == stored


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(trees(), st.sampled_from(BLOCK_SIZES), st.booleans())
def test_plan_covers_the_image_without_gaps(
    root: Directory, block_bytes: int, fingerprints: bool
) -> None:
    plan = plan_image(root, block_bytes=block_bytes, fingerprints=fingerprints)
    at = len(plan.head)
    for placed in plan.files:
        assert placed.offset == at
        assert placed.length > 0
        assert placed.length % block_bytes == 0
        end = placed.offset
        for offset, _, length in placed.spans:
            assert offset == end
            assert length > 0
            end += length
        assert 0 <= placed.offset + placed.length - end < block_bytes
        at += placed.length
    assert plan.metadata_at == at
    digests = [bytes(32)] * len(plan.files)
    assert plan.size == at + len(plan.metadata(digests))
    assert plan.size % block_bytes == 0


def small_archive(form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, kind in [("d", tarfile.DIRTYPE), ("d/" + "x" * 120, tarfile.REGTYPE)]:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.size = 700 if kind == tarfile.REGTYPE else 0
            if form == tarfile.PAX_FORMAT:
                info.pax_headers = {
                    "mtime": "1.5",
                    "SCHILY.xattr.user.a": "b",
                    "SCHILY.acl.access": "user::rwx,user:5:r--,group::r-x,mask::r-x,other::r-x",
                    "GNU.sparse.map": "0,100,500,200",
                    "GNU.sparse.size": "1000",
                }
            tar.addfile(info, io.BytesIO(bytes(700)))
        for name, kind in [("l", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "d/" + "x" * 120
            tar.addfile(info)
    return out.getvalue()


ARCHIVES = {form: small_archive(form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)}


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(list(ARCHIVES)),
    st.lists(st.tuples(st.integers(0, 8000), st.integers(1, 255)), min_size=1, max_size=3),
    st.booleans(),
)
def test_damaged_archive_gives_an_image_or_a_refusal(
    form: int, flips: list[tuple[int, int]], repaired: bool
) -> None:
    """Headers are repaired so that what their checksums cover is reached as well."""
    data = bytearray(ARCHIVES[form])
    for at, bits in flips:
        data[at % len(data)] ^= bits
    for start in range(0, len(data) if repaired else 0, tarfile.BLOCKSIZE):
        header = data[start : start + tarfile.BLOCKSIZE]
        if header[257:262] == b"ustar":
            checksum = sum(header[:148]) + sum(header[156:]) + 8 * 32
            data[start + 148 : start + 156] = b"%06o\0 " % checksum
    file = os.memfd_create("archive")
    try:
        os.pwrite(file, data, 0)
        root = scan_tar(file)
        write_image(root, io.BytesIO())
    except SourceError:
        pass
    finally:
        os.close(file)
