"""Whether a file is a tar archive, and what of compression is around it.

Owns looking and decompressing; the archive itself is read by erofs.writer. Thread-safe.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

Opener = Callable[[Path], Any]
"""Opens a file for reading, decompressed, as a binary stream and context manager."""

# What a damaged file makes the openers' streams raise, OSError aside.
DAMAGE = (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError)

_TAR_MAGIC = b"ustar"
_TAR_MAGIC_AT = 257
_HEAD_BYTES = 512


def open_plain(path: Path) -> BinaryIO:
    """The opener of an archive that is not compressed."""
    return open(path, "rb")


_COMPRESSED: dict[bytes, Opener] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": zstandard.open,
}


def find_opener(path: Path) -> Opener | None:
    """How to open the tar archive in a file, decompressed; None when there is none in it."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD_BYTES)
        opener: Opener = open_plain
        for magic, candidate in _COMPRESSED.items():
            if head.startswith(magic):
                opener = candidate
                with opener(path) as inside:
                    head = inside.read(_HEAD_BYTES)
    except (OSError, *DAMAGE):
        return None
    is_tar = head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + len(_TAR_MAGIC)] == _TAR_MAGIC
    return opener if is_tar else None
