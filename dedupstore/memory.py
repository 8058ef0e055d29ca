"""Memory that is not Python's: madvise(2), and where a buffer lies.

Owns the calls and the numbers that Python lacks. Thread-safe; the GIL is released while the kernel
follows advice.
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


class _Buffer(ctypes.Structure):
    """Py_buffer, of the stable ABI since Python 3.11."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("owner", ctypes.py_object),
        ("length", ctypes.c_ssize_t),
        ("item_bytes", ctypes.c_ssize_t),
        ("is_read_only", ctypes.c_int),
        ("dimensions", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_Buffer),)
_release_buffer.restype = None


def address_of(buffer: bytes | memoryview) -> int:
    """Where a buffer's first byte lies; ctypes' own way is for buffers that may be written to."""
    found = _Buffer()
    _get_buffer(buffer, found, 0)
    address = found.address
    _release_buffer(found)
    return address or 0
