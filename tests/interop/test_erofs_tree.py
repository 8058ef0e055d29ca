"""The tree that is read out of an image of mkfs.erofs is the one that it was made of."""

from __future__ import annotations

import io
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dedupstore.erofs import read_superblock, read_tree
from dedupstore.erofs.contents import ImageContent
from dedupstore.erofs.tree import Directory, Node, RegularFile, Special, Symlink
from dedupstore.erofs.writer import scan_directory, write_image
from dedupstore.errors import ErofsError
from tests.interop.test_layouts import Inode, inventory, write_tree
from tests.programs import (
    erofs_options_honoured,
    erofs_programs,
    program_path,
    require_root,
    unavailable,
)

# Options, and the bits of feature_compat and feature_incompat that show that they took effect.
OPTIONS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "default": ((), 0, 0),
    "no-tails": (("-Enoinline_data",), 0, 0),
    "chunks": (("--chunksize=4096",), 0, 0x4),
    "chunks-64K": (("--chunksize=65536",), 0, 0x4),
    "chunk-indexes": (("--chunksize=4096", "-Eforce-chunk-indexes"), 0, 0x4),
    "512-byte-blocks": (("-b512",), 0, 0),
    "extended": (("-Eforce-inode-extended",), 0, 0),
    "xattrs-inline": (("-x100",), 0, 0),
    "xattrs-shared": (("-x0",), 0, 0),
    "prefixes": (("--xattr-prefix=user.com", "--xattr-prefix=trusted.overlay."), 0x10, 0x40),
    "prefixes-packed": (("-Eall-fragments", "--xattr-prefix=user.com"), 0, 0x60),
    "fingerprints": (("--xattr-inode-digest=erofs.fingerprint.v1",), 0x20, 0x40),
    "fingerprints-visible": (("--xattr-inode-digest=trusted.digest",), 0x20, 0x40),
    "48bit": (("-E48bit",), 0, 0x80),
    "48bit-chunks": (("-E48bit", "--chunksize=4096"), 0, 0x84),
    "metazone": (("--MZ",), 0, 0),
    "metabox": (("-m4096",), 0, 0x180),
    "metabox-xattrs-inline": (("-m4096", "-x100"), 0, 0x180),
    "metabox-prefixes": (("-m4096", "-x0", "--xattr-prefix=user.com"), 0, 0x1C0),
    "metabox-plain-prefixes": (
        ("-m4096", "-Eplain-xattr-prefixes", "--xattr-prefix=user.com"),
        0x10,
        0x1C0,
    ),
    "metabox-chunks": (("-m4096", "--chunksize=4096"), 0, 0x184),
}
WHOLE_SECONDS = 0x80  # mkfs.erofs gives compact inodes of 48-bit images no nanoseconds
COMPRESSED = {"lz4hc": ("-zlz4hc",), "lz4hc-legacy": ("-zlz4hc", "-Elegacy-compress")}
REPEATED = b"user.comment.of.many"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of inode, and attributes that several of them share."""
    require_root()
    root = write_tree(tmp_path_factory.mktemp("trees") / "tree")
    for path in sorted(root.rglob("entry-with-*"))[:40]:
        status = path.stat()
        os.setxattr(path, REPEATED, b"the same")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return root


def honoured(options: tuple[str, ...], compat: int, incompat: int, image: Path) -> bool:
    """An old mkfs.erofs passes over extended options that it does not know."""
    data = image.read_bytes()
    superblock = read_superblock(reader(data), len(data))
    return (
        erofs_options_honoured(options, image)
        and superblock.feature_compat & compat == compat
        and superblock.feature_incompat & incompat == incompat
    )


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length]


def shown(root: Directory) -> dict[str, Inode]:
    """What `inventory` says of a mounted directory, of a tree."""
    nodes: dict[Path, Node] = {}
    pending: list[tuple[Path, Node]] = [(Path(), root)]
    while pending:
        path, node = pending.pop()
        nodes[path] = node
        if isinstance(node, Directory):
            pending.extend((path / os.fsdecode(n), child) for n, child in node.entries.items())
    names: dict[int, list[str]] = {}
    for path in sorted(nodes):
        names.setdefault(id(nodes[path]), []).append(str(path))
    return {str(path): _shown(node, names[id(node)]) for path, node in nodes.items()}


def _shown(node: Node, names: list[str]) -> Inode:
    content: object = None
    size = device = 0
    links = len(names)
    if isinstance(node, RegularFile):
        kind, size, content = stat.S_IFREG, node.size, contents_of(node)
    elif isinstance(node, Symlink):
        kind, size, content = stat.S_IFLNK, len(node.target), Path(os.fsdecode(node.target))
    elif isinstance(node, Special):
        kind, device = node.kind, os.makedev(node.major, node.minor)
    else:
        kind, links = stat.S_IFDIR, 0
    attributes = node.attributes
    inode = (
        content,
        oct(kind | attributes.permissions),
        (attributes.uid, attributes.gid),
        size,
        links,
        device,
        attributes.mtime * 1_000_000_000 + attributes.mtime_ns,
        {
            os.fsdecode(name): value
            for name, value in attributes.xattrs.items()
            if name != b"security.selinux"
        },
    )
    return (*inode, tuple(names)) if kind == stat.S_IFREG else inode


def contents_of(node: RegularFile) -> bytes:
    """The content, read through the model; bytes outside the extents must be zeros."""
    found = bytearray(node.size)
    at = 0
    with node.content.opened() as read_into:
        while at < node.size:
            got = read_into(at, memoryview(found)[at : at + 50_000])
            assert got
            at += got
    assert isinstance(node.content, ImageContent)
    data = sum(length for _, length, _ in node.content.pieces)
    assert data == sum(length for _, length in node.extents) <= node.size
    holes = bytearray(found)
    for start, length in node.extents:
        holes[start : start + length] = bytes(length)
    assert not any(holes)
    return bytes(found)


def in_seconds(inodes: dict[str, Inode]) -> dict[str, Inode]:
    """The same without the fractions of times."""
    return {
        path: (*inode[:6], int(str(inode[6])) // 1_000_000_000, *inode[7:])
        for path, inode in inodes.items()
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_tree_of_an_image_is_the_directory(tree: Path, tmp_path: Path, name: str) -> None:
    """By every mkfs.erofs at hand that can make such an image; one must."""
    options, compat, incompat = OPTIONS[name]
    made = 0
    for program in erofs_programs("mkfs.erofs"):
        image = tmp_path / f"image-{made}"
        command = [program, "--quiet", *options, image, tree]
        done = subprocess.run(command, check=False, capture_output=True)
        if done.returncode or not honoured(options, compat, incompat, image):
            continue
        made += 1
        data = image.read_bytes()
        found = shown(read_tree(reader(data), len(data)))
        wanted = inventory(tree, mtimes=True)
        if incompat & WHOLE_SECONDS:
            found, wanted = in_seconds(found), in_seconds(wanted)
        assert found.keys() == wanted.keys()
        for path, inode in wanted.items():
            assert found[path] == inode, path
    if not made:
        unavailable(f"no mkfs.erofs here can {name}")


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_files_are_refused(tree: Path, tmp_path: Path, name: str) -> None:
    image = tmp_path / "image"
    (program, *_) = erofs_programs("mkfs.erofs")
    command = [program, "--quiet", *COMPRESSED[name], image, tree]
    subprocess.run(command, check=True, capture_output=True)
    data = image.read_bytes()
    with pytest.raises(ErofsError, match="compressed file contents"):
        read_tree(reader(data), len(data))


def test_xattrs_that_mkfs_leaves_out_are_not_there(tree: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    program = program_path("mkfs.erofs") or unavailable("not installed: mkfs.erofs")
    subprocess.run([program, "--quiet", "-x-1", image, tree], check=True, capture_output=True)
    data = image.read_bytes()
    assert not any(inode[7] for inode in shown(read_tree(reader(data), len(data))).values())


def test_tree_that_we_wrote_comes_back_and_makes_the_same_image(tree: Path) -> None:
    out = io.BytesIO()
    write_image(scan_directory(tree), out)
    data = out.getvalue()
    found = read_tree(reader(data), len(data))
    assert shown(found) == inventory(tree, mtimes=True)
    again = io.BytesIO()
    write_image(found, again)
    assert again.getvalue() == data
