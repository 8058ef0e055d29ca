"""A tar archive as a tree, in one pass and without unpacking.

Owns names, links and PAX attributes; headers are parsed by `tarfile`, contents stay in the archive
(`archivecontents`). The tree is what GNU tar would extract as root with --numeric-owner, --xattrs
and --acls, except that nothing is looked up through symbolic links: what tar would write there is
refused. Whiteouts (".wh." files of container layers) are files like others. Thread-safe, as its
trees are.
"""

from __future__ import annotations

import io
import stat
import tarfile
from collections.abc import Mapping

from dedupstore.erofs.tree import (
    Attributes,
    Directory,
    Node,
    RegularFile,
    Special,
    Symlink,
)
from dedupstore.erofs.writer.acltext import acl_attribute
from dedupstore.erofs.writer.archivecontents import (
    Archive,
    ArchiveContent,
    ArchiveStream,
    member_parts,
)
from dedupstore.erofs.writer.xattrs import is_storable
from dedupstore.errors import SourceError

_XATTR = "SCHILY.xattr."
_ACLS = (  # (header, attribute, whether it is the default for what is made in a directory)
    ("SCHILY.acl.access", b"system.posix_acl_access", False),
    ("SCHILY.acl.default", b"system.posix_acl_default", True),
)
_BLOCK_BYTES = 512
_IMPLIED = Attributes(0o755)  # of directories that the archive does not list
_DEVICES = {tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK}


def scan_tar(file: int) -> Directory:
    """Return the tree of an uncompressed archive.

    `file`: a descriptor of a regular file, which the caller keeps open and unchanged until the
    image is made; its position is neither used nor moved. Later members replace earlier ones.
    Leading slashes are dropped; directories that are not listed are mode 755 of root, of 1970.

    Raises SourceError for damaged archives, unknown members, ACLs of unknown users, and names or
    links that lead outside or through a symbolic link.
    """
    try:
        archive = Archive(file)
        with tarfile.open(
            fileobj=io.BufferedReader(ArchiveStream(archive)),
            mode="r:",
            encoding="utf-8",
            errors="surrogateescape",
        ) as tar:
            return _scan(tar, archive)
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        raise SourceError(f"damaged archive: {error}") from None


def _scan(tar: tarfile.TarFile, archive: Archive) -> Directory:
    root = Directory(_IMPLIED)
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # they would be kept for ever
        root = _add(root, member, archive)
    # tarfile takes a damaged header for the end.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(_BLOCK_BYTES)):
        raise SourceError(f"damaged archive: no header at byte {tar.offset}")
    return root


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _parts(name: str) -> list[bytes]:
    parts = [part for part in _bytes(name).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise SourceError(f"archive member {name!r} leads outside")
    return parts


def _add(root: Directory, member: tarfile.TarInfo, archive: Archive) -> Directory:
    """Put a member into the tree; returns the root, which a member may replace, too."""
    parts = _parts(member.name)
    if not parts:
        if not member.isdir():
            raise SourceError(f"archive member {member.name!r} would replace the root")
        return Directory(_attributes(member), root.entries)
    folder = root
    for part in parts[:-1]:
        child = folder.entries.setdefault(part, Directory(_IMPLIED))
        if not isinstance(child, Directory):
            raise SourceError(f"archive member {member.name!r} lies below what is no directory")
        folder = child
    old = folder.entries.get(parts[-1])
    node = _linked(root, member) if member.islnk() else _node(member, archive, old)
    if isinstance(old, Directory) and old.entries and not isinstance(node, Directory):
        raise SourceError(f"archive member {member.name!r} would replace a directory")
    folder.entries[parts[-1]] = node
    return root


def _linked(root: Directory, member: tarfile.TarInfo) -> Node:
    node: Node | None = root
    for part in _parts(member.linkname):
        node = node.entries.get(part) if isinstance(node, Directory) else None
    if node is None or isinstance(node, Directory):
        raise SourceError(f"archive member {member.name!r} links to no file: {member.linkname!r}")
    return node


def _node(member: tarfile.TarInfo, archive: Archive, old: Node | None) -> Node:
    attributes = _attributes(member)
    if member.isdir():
        return Directory(attributes, old.entries if isinstance(old, Directory) else {})
    if member.issym():
        return Symlink(attributes, _bytes(member.linkname))
    if member.type in _DEVICES:
        return Special(attributes, _DEVICES[member.type], member.devmajor, member.devminor)
    if member.isfifo():
        return Special(attributes, stat.S_IFIFO)
    if member.type not in tarfile.REGULAR_TYPES:
        raise SourceError(f"archive member {member.name!r} is of unknown type {member.type!r}")
    return _file(member, archive, attributes)


def _file(member: tarfile.TarInfo, archive: Archive, attributes: Attributes) -> RegularFile:
    sparse: list[tuple[int, int]] | None = getattr(member, "sparse", None)
    whole = [(0, member.size)] if sparse is None else sparse
    extents = tuple((start, length) for start, length in whole if length)
    parts = member_parts(extents, member.offset_data)
    end = 0
    for start, at, length in parts:
        if start < end or length < 0:
            raise SourceError(f"archive member {member.name!r} has a damaged map of its data")
        end = start + length
        if at + length > archive.size:
            raise SourceError(f"the archive ends inside its member {member.name!r}")
    if end > member.size or member.size < 0:
        raise SourceError(f"archive member {member.name!r} has data behind its end")
    return RegularFile(
        attributes, member.size, extents, ArchiveContent(archive, parts, member.size)
    )


def _attributes(member: tarfile.TarInfo) -> Attributes:
    try:
        seconds, nanoseconds = _mtime(member)
        xattrs = _xattrs(member.pax_headers)
    except ValueError as error:
        raise SourceError(f"archive member {member.name!r}: {error}") from None
    mode = stat.S_IMODE(member.mode)
    return Attributes(mode, member.uid, member.gid, seconds, nanoseconds, xattrs)


def _mtime(member: tarfile.TarInfo) -> tuple[int, int]:
    whole, _, fraction = member.pax_headers.get("mtime", str(int(member.mtime))).partition(".")
    seconds, nanoseconds = int(whole), int(fraction[:9].ljust(9, "0"))
    if whole.startswith("-") and nanoseconds:
        return seconds - 1, 1_000_000_000 - nanoseconds
    return seconds, nanoseconds


def _xattrs(headers: Mapping[str, str]) -> dict[bytes, bytes]:
    xattrs = {}
    for key, value in headers.items():
        if key.startswith(_XATTR):
            name = _bytes(key[len(_XATTR) :].replace("%3D", "=").replace("%25", "%"))
            if is_storable(name):
                xattrs[name] = _bytes(value)
    for key, name, default in _ACLS:
        text = headers.get(key)
        acl = acl_attribute(text, default=default) if text is not None else None
        if acl is not None:
            xattrs[name] = acl
    return xattrs
