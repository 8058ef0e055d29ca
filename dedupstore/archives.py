"""Whether a file is a tar archive, and what of compression is around it.

Owns looking, decompressing, and what that may cost: `UNPACKING_MEMORY_BYTES_MAX` of memory and
`unpacked_bytes_max` of disk. The archive itself is read by erofs.writer. Thread-safe; a stream
belongs to one thread.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from dedupstore.errors import SourceError

Opener = Callable[[Path], Any]
"""Opens a file for reading, decompressed, as a binary stream and context manager."""

# What a damaged file makes the openers' streams raise, OSError aside.
DAMAGE = (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError)

# A file says how much of what was unpacked it wants to be remembered: xz -9 and zstd -19 want 64
# and 8 MiB, xz could want 4 GiB. zstd has a limit of its own, of 128 MiB.
UNPACKING_MEMORY_BYTES_MAX = 512 << 20

# gzip cannot pack a thousand bytes into less than one; the others pack millions of zeros into one.
_UNPACKED_PER_BYTE_MAX = 1000
_UNPACKED_BYTES_MIN = 1 << 30

_TAR_MAGIC = b"ustar"
_TAR_MAGIC_AT = 257
_HEAD_BYTES = 512
_PIECE_BYTES = 64 << 10


def unpacked_bytes_max(packed_bytes: int) -> int:
    """How large an archive of `packed_bytes` may be when it is decompressed, in bytes."""
    return packed_bytes * _UNPACKED_PER_BYTE_MAX + _UNPACKED_BYTES_MIN


def open_plain(path: Path) -> BinaryIO:
    """The opener of an archive that is not compressed."""
    return open(path, "rb")


class _XzStream(io.RawIOBase):
    """What `lzma.open` would read, in bounded memory, which that has no parameter for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = open(path, "rb")  # noqa: SIM115 - closed with the stream
        self._begin(b"")

    def _begin(self, packed: bytes) -> None:
        self._packed = packed
        self._xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=UNPACKING_MEMORY_BYTES_MAX)

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """See `io.RawIOBase.readinto`."""
        while True:
            if self._xz.eof:
                if not self._begin_next():
                    return 0
            elif self._xz.needs_input and not self._packed:
                self._packed = self._file.read(_PIECE_BYTES)
                if not self._packed:
                    raise EOFError("the archive ends too early")
            data = self._xz.decompress(self._packed, len(buffer))
            self._packed = b""
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _begin_next(self) -> bool:
        """Begin the stream behind the one that has ended; False when there is none."""
        packed = self._xz.unused_data.lstrip(b"\0")  # padding
        while not packed:
            piece = self._file.read(_PIECE_BYTES)
            if not piece:
                return False
            packed = piece.lstrip(b"\0")
        self._begin(packed)
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _open_xz(path: Path) -> BinaryIO:
    return io.BufferedReader(_XzStream(path), _PIECE_BYTES)


_COMPRESSED: dict[bytes, Opener] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": _open_xz,
    b"\x28\xb5\x2f\xfd": zstandard.open,
}


def find_opener(path: Path) -> Opener | None:
    """How to open the tar archive in a file, decompressed; None when there is none in it.

    Raises SourceError for a file that cannot be read, and for a compressed one that wants too much
    memory to tell.
    """
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD_BYTES)
        opener: Opener = open_plain
        for magic, candidate in _COMPRESSED.items():
            if head.startswith(magic):
                opener = candidate
                with opener(path) as inside:
                    head = inside.read(_HEAD_BYTES)
    except (OSError, *DAMAGE) as error:
        if "emory" in str(error):  # neither library has an error of its own for it
            raise SourceError(f"{path}: {error} (unpack it, and import the result)") from None
        if isinstance(error, OSError) and error.errno is not None:  # not the decompressor's
            raise SourceError(f"{path}: {error.strerror}") from None
        return None
    is_tar = head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + len(_TAR_MAGIC)] == _TAR_MAGIC
    return opener if is_tar else None
