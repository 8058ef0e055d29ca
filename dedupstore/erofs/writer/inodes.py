"""A tree as the list of inodes that its image has, every one checked.

Owns the order of inodes and what a tree must keep to have a form in EROFS. Decides nothing about
places. Pure, thread-safe.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass

from dedupstore.erofs.layouts import FLAT_PLAIN
from dedupstore.erofs.tree import Directory, Node, RegularFile, Special, Symlink
from dedupstore.erofs.writer import ondisk
from dedupstore.erofs.writer.chunks import Chunking
from dedupstore.errors import SourceError

NAME_BYTES_MAX = 255
SYMLINK_BYTES_MAX = 4095  # PATH_MAX less its zero byte: what symlink(2) takes
FILE_BYTES_MAX = (1 << 63) - 1
LINKS_MAX = 0xFFFFFFFF
ID_MAX = 0xFFFFFFFF
DEVICE_MAJOR_MAX = 0xFFF
DEVICE_MINOR_MAX = 0xFFFFF
_MTIME_MIN, _MTIME_MAX = -(1 << 63), (1 << 63) - 1
_NANOSECONDS = 1_000_000_000
_PERMISSIONS_MAX = 0o7777
_SPECIAL_KINDS = (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)
_PATH_SHOWN_MAX = 200


@dataclass(slots=True, eq=False)
class Inode:
    """One inode on its way into the image: what it is, and where it was placed.

    `kind`: the mode's upper bits. `number`: from 1, in the image's order. `entries`: of a
    directory, sorted, with "." and "..". `chunking`: of a sparse file. `stored`: bytes of a file
    that get blocks. `body`: extended attributes, with a fingerprint's when `fingerprinted`. `at`:
    bytes from the start of the metadata. `block`: of its contents, in the image.
    """

    node: Node
    kind: int
    name: bytes
    parent: Inode | None
    number: int
    links: int = 1
    size: int = 0
    entries: Sequence[tuple[bytes, Inode]] = ()
    chunking: Chunking | None = None
    stored: int = 0
    layout: int = FLAT_PLAIN
    fingerprinted: bool = False
    body: bytes = b""
    compact: bool = False
    at: int = 0
    block: int = 0

    @property
    def head_bytes(self) -> int:
        """The inode itself and its attributes: where a tail or a map begins."""
        form = ondisk.COMPACT_INODE_BYTES if self.compact else ondisk.EXTENDED_INODE_BYTES
        return form + len(self.body)


def collect(root: Directory) -> list[Inode]:
    """Return every inode once, the root first, and what a directory names one after the other.

    The order depends on names alone. Raises SourceError, with the path, for what EROFS or Linux
    cannot hold.
    """
    top = Inode(root, stat.S_IFDIR, b"", None, 1, links=2)
    check(top)
    inodes = [top]
    known: dict[int, Inode] = {id(root): top}
    pending = [top]
    while pending:
        parent = pending.pop()
        folders = _collect_entries(parent, inodes, known)
        pending.extend(reversed(folders))
    for inode in inodes:
        if inode.links > LINKS_MAX:
            raise refusal(inode, f"more than {LINKS_MAX} links")
    return inodes


def _collect_entries(parent: Inode, inodes: list[Inode], known: dict[int, Inode]) -> list[Inode]:
    """Fill a directory's entries; returns the directories among them."""
    assert isinstance(parent.node, Directory)
    nodes = parent.node.entries
    entries = [(b".", parent), (b"..", parent.parent or parent)]
    folders = []
    for name in sorted(nodes):
        node = nodes[name]
        inode = known.get(id(node))
        if inode is None:
            inode = Inode(node, _kind(node), name, parent, len(inodes) + 1)
            check(inode)
            known[id(node)] = inode
            inodes.append(inode)
            if isinstance(node, Directory):
                inode.links = 2
                parent.links += 1
                folders.append(inode)
        elif isinstance(node, Directory):
            raise refusal(inode, "a directory with two names")
        else:
            inode.links += 1
            _check_name(name, parent)
        entries.append((name, inode))
    entries.sort(key=_entry_name)
    parent.entries = entries
    return folders


def _entry_name(entry: tuple[bytes, Inode]) -> bytes:
    return entry[0]


def _kind(node: Node) -> int:
    if isinstance(node, RegularFile):
        return stat.S_IFREG
    if isinstance(node, Special):
        return node.kind
    return stat.S_IFDIR if isinstance(node, Directory) else stat.S_IFLNK


def path_of(inode: Inode) -> str:
    """The path of an inode, for people: of several names the first; shortened when long."""
    names: list[bytes] = []
    at: Inode | None = inode
    while at is not None and at.parent is not None:
        names.append(at.name)
        at = at.parent
    path = b"/".join(reversed(names)) or b"."
    shown = path.decode(errors="backslashreplace")
    return shown if len(shown) <= _PATH_SHOWN_MAX else f"…{shown[-_PATH_SHOWN_MAX:]}"


def refusal(inode: Inode, reason: str) -> SourceError:
    """The error that says what of a tree has no form in an image."""
    return SourceError(f"{path_of(inode)!r}: {reason}")


def check(inode: Inode) -> None:
    """Take the node's size; raises SourceError for what has no form."""
    node = inode.node
    _check_attributes(inode)
    if inode.parent is not None:
        _check_name(inode.name, inode.parent)
    if isinstance(node, RegularFile):
        _check_extents(inode, node)
        inode.size = node.size
    elif isinstance(node, Symlink):
        if not 0 < len(node.target) <= SYMLINK_BYTES_MAX or b"\0" in node.target:
            raise refusal(inode, f"no target of a link: 1 to {SYMLINK_BYTES_MAX} bytes, none zero")
        inode.size = len(node.target)
    elif isinstance(node, Special):
        if node.kind not in _SPECIAL_KINDS:
            raise refusal(inode, f"no kind of file: {node.kind:#o}")
        if not (0 <= node.major <= DEVICE_MAJOR_MAX and 0 <= node.minor <= DEVICE_MINOR_MAX):
            raise refusal(inode, f"no device number of Linux: {node.major}:{node.minor}")


def _check_name(name: bytes, parent: Inode) -> None:
    if name in (b"", b".", b"..") or len(name) > NAME_BYTES_MAX or b"/" in name or b"\0" in name:
        shown = name.decode(errors="backslashreplace")
        raise refusal(parent, f"no name for an entry: {shown!r}")


def _check_attributes(inode: Inode) -> None:
    attributes = inode.node.attributes
    if not 0 <= attributes.permissions <= _PERMISSIONS_MAX:
        raise refusal(inode, f"no permissions: {attributes.permissions:#o}")
    if not (0 <= attributes.uid <= ID_MAX and 0 <= attributes.gid <= ID_MAX):
        raise refusal(inode, f"no owner or group: {attributes.uid}:{attributes.gid}")
    if not (
        _MTIME_MIN <= attributes.mtime <= _MTIME_MAX and 0 <= attributes.mtime_ns < _NANOSECONDS
    ):
        raise refusal(inode, f"no time: {attributes.mtime} s and {attributes.mtime_ns} ns")


def _check_extents(inode: Inode, node: RegularFile) -> None:
    if not 0 <= node.size <= FILE_BYTES_MAX:
        raise refusal(inode, f"no size of a file: {node.size}")
    end = 0
    for start, length in node.extents:
        if start < end or length <= 0:
            raise refusal(inode, f"data out of order at byte {start}")
        end = start + length
    if end > node.size:
        raise refusal(inode, f"data behind the end, {node.size} bytes")
