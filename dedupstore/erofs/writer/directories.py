"""A directory of this machine as a tree.

Owns the scan and the contents it leaves on disk: files are opened when the image is written, and
must then be what was scanned. Nothing is followed out of the directory but mount points.
Thread-safe.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
from dedupstore.erofs.writer.xattrs import is_storable
from dedupstore.errors import SourceError

_NANOSECONDS = 1_000_000_000
_PATH_SHOWN_MAX = 400  # characters in a message
_STAT_BLOCK_BYTES = 512  # st_blocks counts these, whatever the file system's blocks
# A file that became a fifo since the scan must not block; a link must not lead elsewhere.
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def scan_directory(path: str | os.PathLike[str]) -> Directory:
    """Return the tree below the directory `path`, which may itself be a symbolic link to one.

    Extended attributes that EROFS has no name for (`system.nfs4_acl`, `btrfs.*`; not POSIX ACLs)
    are left out. File contents are read when the image is written, and must not change until then.
    Raises SourceError, with the path, for whatever cannot be read; that includes paths that are
    longer than Linux takes at once, 4095 bytes.
    """
    top = os.fsencode(Path(path).absolute())
    with _errors_of(top):
        root = Directory(_attributes(top, os.stat(top), follow=True))  # noqa: PTH116 - bytes
    linked: dict[tuple[int, int], Node] = {}
    pending = [(top, root)]
    while pending:
        folder, directory = pending.pop()
        with _errors_of(folder), os.scandir(folder) as listing:
            entries = sorted(listing, key=_name)
        for entry in entries:
            with _errors_of(entry.path):
                status = entry.stat(follow_symlinks=False)
                identity = (status.st_dev, status.st_ino)
                node = linked.get(identity) if status.st_nlink > 1 else None
                if node is None:
                    node = _node(entry.path, status)
                    if isinstance(node, Directory):
                        pending.append((entry.path, node))
                    elif status.st_nlink > 1:
                        linked[identity] = node
            directory.entries[entry.name] = node
    return root


def _name(entry: os.DirEntry[bytes]) -> bytes:
    return entry.name


def _node(path: bytes, status: os.stat_result) -> Node:
    attributes = _attributes(path, status)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        size = status.st_size
        sparse = status.st_blocks * _STAT_BLOCK_BYTES < size
        extents = _data_extents(path, size) if sparse else ((0, size),) if size else ()
        return RegularFile(attributes, size, extents, FileContent(path, size, _version(status)))
    if kind == stat.S_IFDIR:
        return Directory(attributes)
    if kind == stat.S_IFLNK:
        return Symlink(attributes, os.readlink(path))  # noqa: PTH115 - bytes
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        return Special(attributes, kind, os.major(status.st_rdev), os.minor(status.st_rdev))
    return Special(attributes, kind)


def _attributes(path: bytes, status: os.stat_result, *, follow: bool = False) -> Attributes:
    xattrs = {}
    try:
        names = os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        names = []
    for name in sorted(map(os.fsencode, names)):
        if is_storable(name):
            xattrs[name] = os.getxattr(path, name, follow_symlinks=follow)
    mtime, mtime_ns = divmod(status.st_mtime_ns, _NANOSECONDS)
    permissions = stat.S_IMODE(status.st_mode)
    return Attributes(permissions, status.st_uid, status.st_gid, mtime, mtime_ns, xattrs)


def _data_extents(path: bytes, size: int) -> tuple[Extent, ...]:
    file = os.open(path, _OPEN_FLAGS)
    try:
        extents = []
        start = end = 0
        while end < size:
            try:
                start = os.lseek(file, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end
                    break
                raise
            end = min(os.lseek(file, start, os.SEEK_HOLE), size)
            if end <= start:
                break
            extents.append((start, end - start))
        return tuple(extents)
    finally:
        os.close(file)


Version = tuple[int, int, int, int, int]  # device, inode, kind, size, mtime in nanoseconds
_IDENTITY_FIELDS = 3  # the kind, too: an inode's number may be used again at once


def _version(status: os.stat_result) -> Version:
    kind = stat.S_IFMT(status.st_mode)
    return status.st_dev, status.st_ino, kind, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class FileContent:
    """The content of the file at `path`, of `size` bytes, as long as it is of that version."""

    path: bytes
    size: int
    version: Version

    @contextmanager
    def opened(self) -> Iterator[ReadInto]:
        """Open the file; see `Content`."""
        path, size = self.path, self.size
        with _errors_of(path):
            file = os.open(path, _OPEN_FLAGS)

        def read_into(offset: int, buffer: memoryview) -> int:
            with _errors_of(path):
                got = os.preadv(file, [buffer], offset)
            if not got and offset < size:
                raise SourceError(f"{_shown(path)}: became shorter while it was imported")
            return got

        try:
            self._check(
                file, fields=_IDENTITY_FIELDS
            )  # what came in its place may not even be read
            yield read_into
            self._check(file)  # last, so that a change during the reading is seen
        finally:
            os.close(file)

    def _check(self, file: int, fields: int | None = None) -> None:
        with _errors_of(self.path):
            version = _version(os.fstat(file))
        if version[:fields] != self.version[:fields]:
            raise SourceError(f"{_shown(self.path)}: changed while it was imported")


def _shown(path: bytes) -> str:
    text = os.fsdecode(path)
    return text if len(text) <= _PATH_SHOWN_MAX else f"…{text[-_PATH_SHOWN_MAX:]}"


class _errors_of:  # noqa: N801 - reads as a statement; a class, as it runs several times per file
    """Errors of the operating system become SourceError with this path."""

    __slots__ = ("_path",)

    def __init__(self, path: bytes) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError):
            raise SourceError(f"{_shown(self._path)}: {error.strerror or error}") from None
