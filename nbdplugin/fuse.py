"""FUSE's protocol, as far as files that are only read need it: messages to and from the kernel.

After include/uapi/linux/fuse.h, protocol 7.31, which every kernel since 5.4 speaks. Pure and
thread-safe. Numbers are the machine's own byte order; sizes are bytes, times are not kept.
"""

from __future__ import annotations

import os
import stat
import struct

# What the kernel may ask. Not named here, and so answered with ENOSYS: anything that changes.
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 14, 15, 17, 18
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = 25, 26, 27, 28, 29
INTERRUPT, DESTROY, BATCH_FORGET = 36, 38, 42

ROOT = 1  # the root directory's node id
# What one READ asks for at most; FUSE_MAX_PAGES of a kernel's 4 KiB pages.
READ_BYTES_MAX = 1 << 20
# Room for one request: the kernel demands 8 KiB, and a file name is the longest thing in one.
REQUEST_BYTES_MAX = 16 << 10

# struct fuse_in_header: length, opcode, unique, node id, user, group, process, extensions, padding.
IN_HEADER = struct.Struct("=IIQQIIIHH")
# struct fuse_out_header: length, error (negative), unique.
OUT_HEADER = struct.Struct("=IiQ")
# struct fuse_read_in: handle, offset, size, flags; lock owner and open flags follow.
READ_IN = struct.Struct("=QQII")
# fuse_release_in and fuse_forget_in begin with the handle, or how many look-ups are forgotten.
ONE_NUMBER = struct.Struct("=Q")
# struct fuse_batch_forget_in: count, padding; then pairs of node id and look-ups.
BATCH_FORGET_IN = struct.Struct("=II")
FORGET_ONE = struct.Struct("=QQ")

_MAJOR, _MINOR = 7, 31
_ASYNC_READ, _ASYNC_DIO, _MAX_PAGES = 1 << 0, 1 << 15, 1 << 22
_KEEP_CACHE = 1 << 1
_PAGE_BYTES = 4096
_FOR_EVER_SECONDS = 1 << 30
_BACKGROUND_MAX, _CONGESTION = 64, 48

_INIT_IN = struct.Struct("=IIII")  # major, minor, readahead, flags
# fuse_init_out: those four; requests in the background, congestion at; largest write, time grain;
# pages in a request, map alignment; more flags, stack depth, reserved.
_INIT_OUT = struct.Struct("=IIIIHHIIHHII24x")
# fuse_attr: inode, size, 512-byte blocks, three times; their nanoseconds, mode, links, user, group,
# device, block size, flags.
_ATTR = struct.Struct("=6Q10I")
_ENTRY_OUT = struct.Struct("=4Q2I")  # node, generation, how long name and attributes are valid
_ATTR_OUT = struct.Struct("=QII")
_OPEN_OUT = struct.Struct("=QII")  # handle, flags
# fuse_kstatfs: blocks, free, available, files, free files; block size, name length, fragment size.
_STATFS_OUT = struct.Struct("=5Q4I24x")
assert (_INIT_OUT.size, _ATTR.size, _ENTRY_OUT.size, _STATFS_OUT.size) == (64, 88, 40, 80)

_NAME_BYTES_MAX = 255


def init(request: memoryview) -> bytes:
    """The answer to INIT: reads of up to a megabyte, several at a time."""
    _, _, readahead, flags = _INIT_IN.unpack_from(request, IN_HEADER.size)
    wanted = flags & (_ASYNC_READ | _ASYNC_DIO | _MAX_PAGES)
    pages = READ_BYTES_MAX // _PAGE_BYTES
    return _INIT_OUT.pack(
        *(_MAJOR, _MINOR, readahead, wanted, _BACKGROUND_MAX, _CONGESTION),
        *(_PAGE_BYTES, 1, pages, 0, 0, 0),
    )


def name(request: memoryview, length: int) -> str:
    """The file name that a LOOKUP of `length` bytes asks for."""
    return os.fsdecode(bytes(request[IN_HEADER.size : length]).rstrip(b"\0"))


def entry(node: int, size: int) -> bytes:
    """The answer to LOOKUP: a file. The kernel asks for the name anew each time, and may keep what
    else it knows, for a file never changes."""
    return _ENTRY_OUT.pack(node, 0, 0, _FOR_EVER_SECONDS, 0, 0) + _attributes(node, size)


def attributes(node: int, size: int) -> bytes:
    """The answer to GETATTR; of the root directory the size is 0."""
    return _ATTR_OUT.pack(_FOR_EVER_SECONDS, 0, 0) + _attributes(node, size)


def _attributes(node: int, size: int) -> bytes:
    mode = stat.S_IFDIR | 0o500 if node == ROOT else stat.S_IFREG | 0o400
    blocks = -(-size // 512)
    return _ATTR.pack(node, size, blocks, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, _PAGE_BYTES, 0)


def opened(handle: int) -> bytes:
    """The answer to OPEN and OPENDIR. Cached pages stay valid: a file never changes."""
    return _OPEN_OUT.pack(handle, _KEEP_CACHE, 0)


def statfs() -> bytes:
    """The answer to STATFS: a file system without room."""
    return _STATFS_OUT.pack(0, 0, 0, 0, 0, _PAGE_BYTES, _NAME_BYTES_MAX, _PAGE_BYTES, 0)


def forgets(request: memoryview, opcode: int, node: int) -> list[tuple[int, int]]:
    """(node, look-ups) that a FORGET or BATCH_FORGET takes back."""
    if opcode == FORGET:
        return [(node, ONE_NUMBER.unpack_from(request, IN_HEADER.size)[0])]
    count, _ = BATCH_FORGET_IN.unpack_from(request, IN_HEADER.size)
    begin = IN_HEADER.size + BATCH_FORGET_IN.size
    pairs = request[begin : begin + count * FORGET_ONE.size]
    return [(which, times) for which, times in FORGET_ONE.iter_unpack(pairs)]
