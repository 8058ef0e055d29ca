"""Inodes: their on-disk forms, how they are read together, and where the metabox lies.

Owns `struct erofs_inode_compact` and `erofs_inode_extended` (erofs_fs.h), the window policy, and
the chunk map that an inode announces. Follows nothing: which inodes are wanted is the walks'
business. Not thread-safe, as `Space` is not; the rest is pure.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dedupstore.erofs.layouts import (
    CHUNK_48BIT,
    CHUNK_BITS_MASK,
    CHUNK_INDEXES,
    CHUNK_KNOWN,
    FLAT_PLAIN,
    aligned,
    chunk_index_blocks,
    chunk_map_blocks,
)
from dedupstore.erofs.metadata import Budget, ReadAt, Space
from dedupstore.erofs.superblock import (
    METABOX_NID_FLAG,
    NULL_BLOCK_32,
    NULL_BLOCK_48,
    Superblock,
)
from dedupstore.errors import ErofsError

INODE_SLOT_BYTES = 32  # nids count these; no two inodes of a sound image share one
INODES_MAX = 1 << 23  # over 1 GB of nids in sets; container and VM roots have under 2^21 files
TOO_MANY_INODES = "more inodes than the image has room for"

# Inodes closer than this are read at once. mkfs.erofs strews inodes between file contents; a root
# of 44,217 inodes and 1,142 MB took, best of 7, with 1 KiB 130 ms (36,927 reads, 84 MiB), 4 KiB
# 104 ms (21,079, 74), 16 KiB 99 ms (14,272, 123), 64 KiB 112 ms (7,633, 334), 128 KiB 134 ms (504).
WINDOW_GAP_BYTES = 16 << 10
WINDOW_BYTES_MAX = 256 << 10
_WINDOW_NIDS_MAX = WINDOW_BYTES_MAX // INODE_SLOT_BYTES

COMPACT_INODE_BYTES = 32
EXTENDED_INODE_BYTES = 64
# i_format, i_xattr_icount, i_mode, i_nb, i_size (low), i_size (high) or i_mtime, i_u: what both
# forms of an inode have in common.
_INODE = struct.Struct("<HHHHIII")
_COMPACT_REST = struct.Struct("<24xHH4x")  # i_uid, i_gid
_EXTENDED_REST = struct.Struct("<24xIIqI")  # i_uid, i_gid, i_mtime, i_mtime_nsec
assert _COMPACT_REST.size == COMPACT_INODE_BYTES
_FORMAT_EXTENDED = 0x1
_FORMAT_NLINK_1 = 0x10  # of a compact inode that is no directory: i_nb extends i_u to 48 bits
_FORMAT_KNOWN = 0x1F
_XATTR_HEADER_LESS_ENTRY_BYTES = 8  # a 12-byte header takes the place of the first 4-byte entry

_KIND_MASK = 0xF000
KIND_DIRECTORY = 0x4000
KIND_REGULAR = 0x8000
KIND_LINK = 0xA000
KINDS_WITH_CONTENTS = frozenset((KIND_DIRECTORY, KIND_REGULAR, KIND_LINK))
KINDS_OF_DEVICES = frozenset((0x2000, 0x6000))  # CHR, BLK
KINDS_WITHOUT_CONTENTS = KINDS_OF_DEVICES | {0x1000, 0xC000}  # and FIFO, SOCK

_MTIME_MAX = (1 << 63) - 1
_NANOSECONDS = 1_000_000_000


def placement(window: bytes, at: int, offset: int) -> tuple[int, int, int, int, int]:
    """Return layout, file type, size, i_u and bytes of the inode at `at` in `window`.

    The size is the file's in bytes; i_u is a block address, a block count or a chunk format; the
    inode's own bytes include inline xattrs and so tell where a tail or a map begins. `offset`:
    where the inode lies in the image. A plain tuple, because this runs once per inode.
    """
    form, xattrs, mode, high, size, size_high, first = _INODE.unpack_from(window, at)
    if form & ~_FORMAT_KNOWN:
        raise ErofsError(offset, f"unknown inode format {form:#x}")
    kind = mode & _KIND_MASK
    if form & _FORMAT_EXTENDED:
        inode_bytes = EXTENDED_INODE_BYTES
        size |= size_high << 32
        first |= high << 32
    else:
        inode_bytes = COMPACT_INODE_BYTES
        if form & _FORMAT_NLINK_1 and kind != KIND_DIRECTORY:
            first |= high << 32
    if xattrs:
        inode_bytes += _XATTR_HEADER_LESS_ENTRY_BYTES + 4 * xattrs
    return form >> 1 & 7, kind, size, first, inode_bytes


class Inode(NamedTuple):
    """What an inode says about itself. A tuple: a frozen dataclass takes four times as long.

    `first`: i_u, which is a block address, a chunk format or a device number; `null_block` is the
    address that means a hole. `xattrs_at` and `contents_at`: where inline xattrs, and behind them
    a tail or a map begin, in bytes from the start of the image.
    """

    layout: int
    kind: int
    permissions: int
    size: int
    first: int
    null_block: int
    uid: int
    gid: int
    mtime: int
    mtime_ns: int
    xattrs_at: int
    contents_at: int


def read_inode(window: bytes, at: int, offset: int, epoch: int, epoch_ns: int) -> Inode:
    """Return the inode at `at` in `window`, which lies at `offset` in the image.

    `epoch`, `epoch_ns`: the superblock's time, from which compact inodes count. Raises
    `ErofsError` for an unknown form, an impossible time, and when the window ends too early.
    """
    layout, kind, size, first, inode_bytes = placement(window, at, offset)
    form, _, mode, _, _, since_epoch, _ = _INODE.unpack_from(window, at)
    if form & _FORMAT_EXTENDED:
        if at + EXTENDED_INODE_BYTES > len(window):
            raise ErofsError(offset, "the image ends inside an inode")
        uid, gid, mtime, mtime_ns = _EXTENDED_REST.unpack_from(window, at)
        xattrs_at = offset + EXTENDED_INODE_BYTES
        wide = True
    else:
        uid, gid = _COMPACT_REST.unpack_from(window, at)
        mtime, mtime_ns = epoch + since_epoch, epoch_ns
        xattrs_at = offset + COMPACT_INODE_BYTES
        wide = bool(form & _FORMAT_NLINK_1) and kind != KIND_DIRECTORY
    if mtime > _MTIME_MAX or mtime_ns >= _NANOSECONDS:
        raise ErofsError(offset, f"impossible time {mtime} s and {mtime_ns} ns")
    return Inode(
        layout,
        kind,
        mode & ~_KIND_MASK,
        size,
        first,
        NULL_BLOCK_48 if wide else NULL_BLOCK_32,
        uid,
        gid,
        mtime,
        mtime_ns,
        xattrs_at,
        offset + inode_bytes,
    )


def windows(
    space: Space, nids: Sequence[int], block_bytes: int, gap_bytes: int = WINDOW_GAP_BYTES
) -> Iterator[tuple[bytes, int, Sequence[int]]]:
    """Read the inodes `nids` of one space: yield bytes, where they begin, and whose they are.

    `nids` ascend. Each window holds at least the compact form of its inodes and stays the space's
    window until the next is asked for. Inodes that lie `gap_bytes` apart share one. Raises
    `ErofsError` when an inode lies outside the space.
    """
    if not nids:
        return
    last = space.base + nids[-1] * INODE_SLOT_BYTES
    if last + COMPACT_INODE_BYTES > space.end:
        raise ErofsError(last, "an inode lies behind the end of the metadata")
    for first, behind in _batches(nids, gap_bytes):
        origin, needed, wanted = _window(space, nids[first], nids[behind - 1], block_bytes)
        yield space.load_window(origin, needed, wanted), origin, nids[first:behind]


def window_ranges(
    space: Space, nids: Sequence[int], block_bytes: int, gap_bytes: int
) -> list[tuple[int, int]]:
    """What `windows` is going to read: (offset, length)."""
    batches = _batches(nids, gap_bytes) if nids else ()
    found = (_window(space, nids[a], nids[b - 1], block_bytes) for a, b in batches)
    return [(origin, wanted) for origin, _, wanted in found]


def _window(space: Space, first: int, last: int, block_bytes: int) -> tuple[int, int, int]:
    """Where the window of these inodes and those between begins, and the bytes needed and wanted
    from there on."""
    origin = space.base + first * INODE_SLOT_BYTES
    end = space.base + last * INODE_SLOT_BYTES
    wanted = aligned(end + EXTENDED_INODE_BYTES, block_bytes) - origin
    return origin, end + COMPACT_INODE_BYTES - origin, wanted


def _batches(nids: Sequence[int], gap_bytes: int) -> Iterator[tuple[int, int]]:
    """Index ranges of ascending `nids` whose inodes are worth one read."""
    gap = gap_bytes // INODE_SLOT_BYTES
    first = 0
    start = previous = nids[0]
    for index, nid in enumerate(nids):
        if nid - previous > gap or nid - start > _WINDOW_NIDS_MAX:
            yield first, index
            first, start = index, nid
        previous = nid
    yield first, len(nids)


def metabox_space(
    image: Space, read_at: ReadAt, superblock: Superblock, size: int, budget: Budget
) -> Space | None:
    """Return the contents of the metabox inode; None without one and when they are compressed.

    nids keep their `METABOX_NID_FLAG`: the space's base makes up for it.
    """
    if not superblock.metabox_nid:
        return None
    offset = image.base + superblock.metabox_nid * INODE_SLOT_BYTES
    raw = image.bytes_at(offset, COMPACT_INODE_BYTES)
    layout, _, length, first, _ = placement(raw, 0, offset)
    if layout != FLAT_PLAIN:  # the only uncompressed form mkfs.erofs gives it
        return None
    start = first << superblock.block_bits
    base = start - METABOX_NID_FLAG * INODE_SLOT_BYTES
    return Space(read_at, base, min(start + length, size), budget)


def chunk_addresses(
    space: Space, superblock: Superblock, size: int, form: int, map_at: int, *, foreign: int | None
) -> tuple[Iterator[int], int, int]:
    """Return the first block of each chunk of a file, the address of a hole, and blocks per chunk.

    `size`: the file's in bytes, `form`: its i_u, `map_at`: where the inode and its xattrs end.
    `foreign`: what to say for a chunk on another device, None for a hole. Raises `ErofsError` for
    an unknown format, the iterator also when the map is not inside the space.
    """
    form &= 0xFFFF
    if form & ~CHUNK_KNOWN:
        raise ErofsError(map_at, f"unknown chunk format {form:#x}")
    bits = form & CHUNK_BITS_MASK
    chunks = -(-size >> superblock.block_bits + bits)  # rounded up
    if not form & CHUNK_INDEXES:
        pieces = space.pieces(aligned(map_at, 4), chunks * 4)
        return chunk_map_blocks(pieces), NULL_BLOCK_32, 1 << bits
    null_block = NULL_BLOCK_48 if form & CHUNK_48BIT else NULL_BLOCK_32
    pieces = space.pieces(aligned(map_at, 8), chunks * 8)
    blocks = chunk_index_blocks(
        pieces, null_block, superblock.device_mask, null_block if foreign is None else foreign
    )
    return blocks, null_block, 1 << bits
