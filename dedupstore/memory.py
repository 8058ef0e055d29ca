"""madvise(2), for advice that Python's mmap does not know and for mappings that are not Python's.

Owns the call and the numbers that Python lacks. Thread-safe; the GIL is released meanwhile.
"""

from __future__ import annotations

import ctypes

# linux/mman.h, since Linux 5.14 and 6.1.
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25

_madvise = ctypes.CDLL(None).madvise


def advise(address: int, length: int, advice: int) -> None:
    """Advise the kernel about `length` bytes at `address`, a multiple of the page size. Never
    raises: a kernel that cannot follow leaves everything as it is."""
    _madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)
