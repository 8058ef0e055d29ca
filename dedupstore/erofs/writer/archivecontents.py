"""Contents that lie in an archive: read by offset, so that any number of threads may read at once.

Owns where a member's data lie in the archive, and the check that the archive stays what was
scanned. Thread-safe: `pread` leaves the descriptor's position alone; only `ArchiveStream` has one
of its own, and so belongs to one thread.
"""

from __future__ import annotations

import io
import os
import stat
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dedupstore.erofs.tree import Extent, ReadInto
from dedupstore.errors import SourceError

Part = tuple[int, int, int]  # (offset in the file, offset in the archive, length), in bytes


class Archive:
    """An uncompressed archive: a descriptor of a regular file that stays the caller's and open."""

    def __init__(self, file: int) -> None:
        """Raises SourceError when it is no regular file, OSError when it is no descriptor."""
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError("an archive must be a regular file: contents are read out of order")
        self._file = file
        self._version = self._current_version()
        self.size = status.st_size

    def read_into(self, at: int, buffer: memoryview) -> int:
        """Read up to the buffer's length from byte `at`; 0 at the end. Raises SourceError."""
        try:
            return os.preadv(self._file, [buffer], at)
        except OSError as error:
            raise SourceError(f"the archive cannot be read: {error.strerror}") from None

    def check_unchanged(self) -> None:
        """Raise SourceError when the archive has been changed since it was taken."""
        if self._current_version() != self._version:
            raise SourceError("the archive changed while it was imported")

    def _current_version(self) -> tuple[int, int]:
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns


class ArchiveStream(io.RawIOBase):
    """An archive for readers that want a file with a position."""

    def __init__(self, archive: Archive) -> None:
        super().__init__()
        self._archive = archive
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.IOBase.seek`."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._archive.size}
        self._position = max(base[whence] + offset, 0)
        return self._position

    def tell(self) -> int:
        """See `io.IOBase.tell`."""
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """See `io.RawIOBase.readinto`."""
        got = self._archive.read_into(self._position, memoryview(buffer).cast("B"))
        self._position += got
        return got


def member_parts(extents: tuple[Extent, ...], at: int) -> tuple[Part, ...]:
    """Where the data of a member lie: its extents one behind the other from byte `at`."""
    parts = []
    for start, length in extents:
        parts.append((start, at, length))
        at += length
    return tuple(parts)


@dataclass(frozen=True, slots=True)
class ArchiveContent:
    """The content of a member of `size` bytes; between its parts are holes."""

    archive: Archive
    parts: tuple[Part, ...]
    size: int

    @contextmanager
    def opened(self) -> Iterator[ReadInto]:
        """See `Content`."""
        yield self._read_into
        self.archive.check_unchanged()

    def _read_into(self, offset: int, buffer: memoryview) -> int:
        index = bisect_right(self.parts, offset, key=_file_offset)
        if index:
            start, at, length = self.parts[index - 1]
            into = offset - start
            if into < length:
                got = self.archive.read_into(at + into, buffer[: length - into])
                if not got:
                    raise SourceError("the archive became shorter while it was imported")
                return got
        hole_end = self.parts[index][0] if index < len(self.parts) else self.size
        zeros = min(len(buffer), hole_end - offset)
        buffer[:zeros] = bytes(zeros)
        return zeros


def _file_offset(part: Part) -> int:
    return part[0]
