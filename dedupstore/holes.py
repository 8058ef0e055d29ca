"""fallocate(2) with FALLOC_FL_PUNCH_HOLE, which Python's os module does not have.

Owns the call and its numbers. Thread-safe; the GIL is released meanwhile.
"""

from __future__ import annotations

import ctypes
import os

# linux/falloc.h
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch(file: int, offset: int, length: int) -> None:
    """Give the disk blocks of `length` bytes at `offset` back to the file system: the bytes are
    zeros from then on, the file keeps its length.

    Raises OSError, with EOPNOTSUPP on a file system that cannot do this.
    """
    if _fallocate(file, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
