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
from dedupstore.errors import SourceError, shown

_XATTR = "SCHILY.xattr."
_ACLS = (  # (header, attribute, whether it is the default for what is made in a directory)
    ("SCHILY.acl.access", b"system.posix_acl_access", False),
    ("SCHILY.acl.default", b"system.posix_acl_default", True),
)
_BLOCK_BYTES = 512
# What headers may make of memory. Those of one member hold its name, attributes and the map of a
# sparse file; tarfile keeps all of them, some 25 bytes for one of theirs.
_HEADERS_BYTES_MAX = 16 << 20
_EXTENTS_MAX = 1 << 20  # of all sparse files, 300 bytes each
_NODES_MAX = 1 << 21  # listed or implied, 1 KB and 30 us each; roots have fewer files
_GLOBAL_RECORDS_MAX = 100  # every member is looked through all of them
_IMPLIED = Attributes(0o755)  # of directories that the archive does not list
_DEVICES = {tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK}


def scan_tar(file: int) -> Directory:
    """Return the tree of an uncompressed archive.

    `file`: a descriptor of a regular file, which the caller keeps open and unchanged until the
    image is made; its position is neither used nor moved. Later members replace earlier ones.
    Leading slashes are dropped; directories that are not listed are mode 755 of root, of 1970.

    Raises SourceError for damaged archives, unknown members, ACLs of unknown users, names or links
    that lead outside or through a symbolic link, and for more than memory should be spent on.
    """
    try:
        archive = Archive(file)
        headers = _Headers(archive)
        with tarfile.open(
            fileobj=headers,  # type: ignore[call-overload]
            mode="r:",
            encoding="utf-8",
            errors="surrogateescape",
        ) as tar:
            return _Scan(archive, headers).run(tar)
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        raise SourceError(f"damaged archive: {error}") from None
    except RecursionError:  # tarfile calls itself for a header that announces another
        raise SourceError("damaged archive: headers of headers without end") from None


class _Headers:
    """What tarfile reads of an archive, which is headers alone: bounded for each member, whatever
    length they claim."""

    def __init__(self, archive: Archive) -> None:
        self._stream = io.BufferedReader(ArchiveStream(archive))
        self.seek = self._stream.seek
        self.tell = self._stream.tell
        self.begin()

    def begin(self) -> None:
        """Another member begins."""
        self._left = _HEADERS_BYTES_MAX

    def read(self, length: int) -> bytes:
        """See `io.BufferedReader.read`."""
        self._left -= length
        if length < 0 or self._left < 0:
            raise SourceError(f"damaged archive: headers of more than {_HEADERS_BYTES_MAX} bytes")
        return self._stream.read(length)


class _Scan:
    """One pass over the members of an archive, and what it may still hold in memory."""

    def __init__(self, archive: Archive, headers: _Headers) -> None:
        self._archive = archive
        self._headers = headers
        self._extents_left = _EXTENTS_MAX
        self._nodes_left = _NODES_MAX

    def run(self, tar: tarfile.TarFile) -> Directory:
        root = Directory(_IMPLIED)
        position = -1
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # they would be kept for ever
            if tar.offset <= position or len(tar.pax_headers) > _GLOBAL_RECORDS_MAX:
                raise SourceError(f"damaged archive: an impossible header before {tar.offset}")
            position = tar.offset
            root = self._add(root, member)
            self._headers.begin()
        # tarfile takes a damaged header for the end.
        self._headers.seek(tar.offset)
        if any(self._headers.read(_BLOCK_BYTES)):
            raise SourceError(f"damaged archive: no header at byte {tar.offset}")
        return root

    def _add(self, root: Directory, member: tarfile.TarInfo) -> Directory:
        """Put a member into the tree; returns the root, which a member may replace, too."""
        parts = _parts(member.name)
        if not parts:
            if not member.isdir():
                raise SourceError(f"archive member {shown(member.name)} would replace the root")
            return Directory(_attributes(member), root.entries)
        folder = root
        for part in parts[:-1]:
            child = folder.entries.get(part)
            if child is None:
                self._count_node()
                child = folder.entries[part] = Directory(_IMPLIED)
            elif not isinstance(child, Directory):
                raise SourceError(
                    f"archive member {shown(member.name)} lies below what is no directory"
                )
            folder = child
        old = folder.entries.get(parts[-1])
        self._count_node()
        node = _linked(root, member) if member.islnk() else self._node(member, old)
        if isinstance(old, Directory) and old.entries and not isinstance(node, Directory):
            raise SourceError(f"archive member {shown(member.name)} would replace a directory")
        folder.entries[parts[-1]] = node
        return root

    def _count_node(self) -> None:
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise SourceError(f"more than {_NODES_MAX} files (unpack it and import the directory)")

    def _node(self, member: tarfile.TarInfo, old: Node | None) -> Node:
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
            raise SourceError(
                f"archive member {shown(member.name)} is of unknown type {member.type!r}"
            )
        return self._file(member, attributes)

    def _file(self, member: tarfile.TarInfo, attributes: Attributes) -> RegularFile:
        sparse: list[tuple[int, int]] | None = getattr(member, "sparse", None)
        whole = [(0, member.size)] if sparse is None else sparse
        if sparse is not None:
            self._extents_left -= len(sparse)
            if self._extents_left < 0:
                raise SourceError(f"sparse files of more than {_EXTENTS_MAX} pieces")
        extents = tuple((start, length) for start, length in whole if length)
        parts = member_parts(extents, member.offset_data)
        end = 0
        for start, at, length in parts:
            if start < end or length < 0:
                raise SourceError(
                    f"archive member {shown(member.name)} has a damaged map of its data"
                )
            end = start + length
            if at < 0 or at + length > self._archive.size:
                raise SourceError(f"the archive ends inside its member {shown(member.name)}")
        if end > member.size or member.size < 0:
            raise SourceError(f"archive member {shown(member.name)} has data behind its end")
        content = ArchiveContent(self._archive, parts, member.size)
        return RegularFile(attributes, member.size, extents, content)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _parts(name: str) -> list[bytes]:
    parts = [part for part in _bytes(name).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise SourceError(f"an archive member's name or link leads outside: {shown(name)}")
    return parts


def _linked(root: Directory, member: tarfile.TarInfo) -> Node:
    node: Node | None = root
    for part in _parts(member.linkname):
        node = node.entries.get(part) if isinstance(node, Directory) else None
    if node is None or isinstance(node, Directory):
        raise SourceError(
            f"archive member {shown(member.name)} links to no file: {shown(member.linkname)}"
        )
    return node


def _attributes(member: tarfile.TarInfo) -> Attributes:
    try:
        seconds, nanoseconds = _mtime(member)
        xattrs = _xattrs(member.pax_headers)
    except ValueError as error:
        raise SourceError(f"archive member {shown(member.name)}: {error}") from None
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
