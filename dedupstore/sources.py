"""What an import reads from: any file, block device or stream, as bytes at offsets.

Owns the contract between importer and source, and the source that is a file: opening, sizing and
the map of holes. Knows nothing of formats. Reading is thread-safe (pread), everything else belongs
to the importing thread.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from dedupstore.archives import DAMAGE
from dedupstore.errors import SourceError, StoreFullError

_PIECE_BYTES = 1 << 20


class Source(Protocol):
    """The bytes of an image to import. `size` in bytes; `name` is what messages call it."""

    name: str
    size: int

    def read_segment(self, offset: int, length: int) -> bytes:
        """The bytes that are going to be stored: called once for each segment, on any thread,
        segments begun in ascending order. Short only at the end. Raises SourceError."""

    def read_at(self, offset: int, length: int) -> bytes:
        """The same bytes, once more or for a look. Thread-safe."""

    def abandon(self) -> None:
        """No segment will be read any more: whoever waits for one must give up."""


class FileSource:
    """An open file or block device to import."""

    def __init__(self, file: int, name: str) -> None:
        """Take ownership of the open file descriptor."""
        self.name = name
        self._file = file
        # Works for files and block devices alike, where st_size is zero for the latter.
        self.size = os.lseek(file, 0, os.SEEK_END)

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly the bytes there are: short only at the end of the source. Raises SourceError."""
        parts: list[bytes] = []
        try:
            while length > 0:
                part = os.pread(self._file, length, offset)
                if not part:
                    break
                parts.append(part)
                offset += len(part)
                length -= len(part)
        except OSError as error:
            raise SourceError(f"{self.name}: read at byte {offset}: {error.strerror}") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_segment(self, offset: int, length: int) -> bytes:
        """See `Source`."""
        return self.read_at(offset, length)

    def abandon(self) -> None:
        """Nobody waits: segments do not depend on each other."""

    def data_regions(self) -> Iterator[tuple[int, int]]:
        """(start, end) of what may hold data; what lies between reads as zeros."""
        position = 0
        while position < self.size:
            try:
                start = os.lseek(self._file, position, os.SEEK_DATA)
                end = os.lseek(self._file, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    # A hole up to the end; or the end has moved, and data is no longer there.
                    if os.lseek(self._file, 0, os.SEEK_END) < self.size:
                        raise SourceError(
                            f"{self.name}: became shorter while it was imported"
                        ) from None
                    return
                # No hole support here (block devices, some file systems): all of it is data.
                yield position, self.size
                return
            yield start, min(end, self.size)
            position = end

    def fileno(self) -> int:
        """The open file, still owned by the source."""
        return self._file

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def open_source(path: Path) -> FileSource:
    """Open a regular file or a block device. Raises SourceError."""
    try:
        # Not to wait for a pipe's writer: what is no file is refused below.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from None
    mode = os.fstat(file).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(file)
        raise SourceError(f"{path}: neither a file, a block device nor a directory")
    return FileSource(file, str(path))


def spool(stream: BinaryIO, directory: Path, name: str, bytes_max: int | None = None) -> FileSource:
    """Copy a stream into an unnamed file in `directory` and open that: cutting needs to seek.

    Raises SourceError, also for more than `bytes_max`, and StoreFullError.
    """
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            while piece := stream.read(_PIECE_BYTES):
                file.write(piece)
                if bytes_max is not None and file.tell() > bytes_max:
                    raise SourceError(
                        f"{name}: unpacks to more than {bytes_max} bytes, as no sound archive does "
                        "(if it is one, unpack it, and import the result)"
                    )
            file.flush()
            return FileSource(os.dup(file.fileno()), name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFullError(f"{directory}: no space left to spool {name}") from None
        raise SourceError(f"{error.filename or name}: {error.strerror or error}") from None
    except DAMAGE as error:
        raise SourceError(f"{name}: damaged archive: {error}") from None
