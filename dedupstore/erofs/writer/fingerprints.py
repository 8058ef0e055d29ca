"""Fingerprints: the digest by which Linux >= 7.0 (`inode_share`) knows files of equal content.

Owns the name and value of the hidden attribute that `mkfs.erofs --xattr-inode-digest` of
erofs-utils 1.9 writes, and the digest of a file from its stored bytes. Every file with data has
one, unless its holes are so large that hashing their zeros would take longer than the import: there
is no bound to the size of a file of holes, and it has nothing to share. `Fingerprinting` and
`ContentDigest` belong to one thread.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

Span = tuple[int, int, int]  # (offset in the image, offset in the file, length), in bytes

NAME_INDEX = 0x80  # EROFS_XATTR_LONG_PREFIX: of the long prefixes, the first
_KIND = b"sha256:"
DIGEST_AT = len(_KIND)
DIGEST_BYTES = 32
VALUE = _KIND + bytes(DIGEST_BYTES)  # until the digest is known
HOLES_BYTES_MAX = 1 << 30  # a second's work
HOLES_BYTES_MAX_OF_TREE = 4 << 30  # a header of 512 bytes can make a file with a gigabyte of holes

# The whole name is a long prefix (length, base index, infix), and the rest of the name is empty.
# No short prefix is named erofs.*: base index 0, so that no listxattr shows the attribute.
_NAME = b"erofs.fingerprint.v1"
PREFIX_RECORD = struct.pack("<HB", 1 + len(_NAME), 0) + _NAME

_ZEROS = bytes(1 << 16)


class Fingerprinting:
    """Which files of one tree get fingerprints, asked in the tree's order. Not thread-safe."""

    def __init__(self) -> None:
        self._holes_left = HOLES_BYTES_MAX_OF_TREE

    def wants(self, size: int, data_bytes: int) -> bool:
        """Whether the next file, of `size` bytes, gets one when all but `data_bytes` are holes."""
        holes = size - data_bytes
        if not data_bytes or holes > min(HOLES_BYTES_MAX, self._holes_left):
            return False
        self._holes_left -= holes
        return True


class ContentDigest:
    """SHA-256 of a file's whole content, fed with what an image stores of it, front to back."""

    def __init__(self, spans: Iterable[Span], size: int) -> None:
        """Take where the stored bytes lie in the file, and the file's size in bytes."""
        self._hash = hashlib.sha256()
        self._spans = iter(spans)
        self._position = 0  # in the file
        self._left = 0  # of the current span
        self._size = size

    def update(self, stored: bytes | bytearray | memoryview) -> None:
        """Take the next bytes as stored; what follows the file's last byte is padding."""
        view = memoryview(stored)
        while view:
            if not self._left:
                span = next(self._spans, None)
                if span is None:
                    return
                _, start, self._left = span
                self._skip_hole(start)
            part = view[: self._left]
            self._hash.update(part)
            self._position += len(part)
            self._left -= len(part)
            view = view[len(part) :]

    def digest(self) -> bytes:
        """Return the digest; everything stored must have been taken."""
        self._skip_hole(self._size)
        return self._hash.digest()

    def _skip_hole(self, end: int) -> None:
        while self._position < end:
            length = min(len(_ZEROS), end - self._position)
            self._hash.update(_ZEROS[:length])
            self._position += length
