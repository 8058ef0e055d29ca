"""The bytes of superblock, inodes and directories.

Owns the encoding of `struct erofs_inode_compact`, `erofs_inode_extended` and `erofs_dirent`
(erofs_fs.h), and what stands in front of the contents; the superblock's fields are
`erofs.superblock`'s. Decides nothing but an inode's form. Pure, thread-safe.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from dedupstore.erofs.layouts import aligned
from dedupstore.erofs.superblock import (
    COMPAT_CHECKSUM,
    SUPERBLOCK_BYTES_MIN,
    SUPERBLOCK_OFFSET,
    SuperblockRecord,
    checksum_bytes,
    superblock_checksum,
)
from dedupstore.erofs.tree import Attributes

COMPAT_MTIME = 0x2  # inodes tell the time of modification, not of change
INCOMPAT_CHUNKED_FILE = 0x4
INODE_SLOT_BYTES = 32
COMPACT_INODE_BYTES = 32
EXTENDED_INODE_BYTES = 64
EXTRA_OFFSET = SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES_MIN  # in the head, behind the superblock
EXTRA_BYTES_MAX = 32
EXTRA_UNIT_BYTES = 4  # what `xattr_prefix_start` counts
_FORMAT_EXTENDED = 1
_FORMAT_LAYOUT_SHIFT = 1

# i_format, i_xattr_icount, i_mode, i_nlink, i_size, i_mtime (an offset that old kernels ignore),
# i_u, i_ino, i_uid, i_gid, (i_reserved)
_COMPACT = struct.Struct("<HHHHIIIIHH4x")
# i_format, i_xattr_icount, i_mode, i_nb, i_size, i_u, i_ino, i_uid, i_gid, i_mtime, i_mtime_nsec,
# i_nlink
_EXTENDED = struct.Struct("<HHHHQIIIIqII16x")
_DIRENT = struct.Struct("<QHBx")  # nid, nameoff, file_type
assert _COMPACT.size == COMPACT_INODE_BYTES
assert _EXTENDED.size == EXTENDED_INODE_BYTES

Time = tuple[int, int]  # seconds, nanoseconds
Entry = tuple[bytes, int, int]  # name, nid, file type


def head_bytes(block_bytes: int) -> int:
    """The size of what precedes the contents: the blocks up to and with the superblock's."""
    return aligned(EXTRA_OFFSET + EXTRA_BYTES_MAX, block_bytes)


def head(record: SuperblockRecord, extra: bytes) -> bytes:
    """Return the image's first `head_bytes`: superblock, `extra` behind it, and the checksum."""
    block_bytes = 1 << record.block_bits
    assert len(extra) <= EXTRA_BYTES_MAX
    raw = bytearray(head_bytes(block_bytes))

    def put(checksum: int) -> None:
        compat = record.feature_compat | COMPAT_CHECKSUM
        packed = record._replace(feature_compat=compat, checksum=checksum).pack()
        raw[SUPERBLOCK_OFFSET:EXTRA_OFFSET] = packed

    raw[EXTRA_OFFSET : EXTRA_OFFSET + len(extra)] = extra
    put(0)
    covered = raw[SUPERBLOCK_OFFSET : SUPERBLOCK_OFFSET + checksum_bytes(block_bytes)]
    put(superblock_checksum(bytes(covered)))
    return bytes(raw)


def fits_compact(attributes: Attributes, size: int, links: int, epoch: Time) -> bool:
    """Whether the small form of an inode holds all of this."""
    return (
        (attributes.mtime, attributes.mtime_ns) == epoch
        and attributes.uid <= 0xFFFF
        and attributes.gid <= 0xFFFF
        and links <= 0xFFFF
        and size <= 0xFFFFFFFF
    )


def inode(
    attributes: Attributes,
    kind: int,
    size: int,
    links: int,
    *,
    compact: bool,
    layout: int,
    xattr_count: int,
    union: int,
    number: int,
) -> bytes:
    """Return an inode. `kind`: the mode's upper bits. `union`: i_u, whose meaning depends on the
    kind and layout. `number`: a 32-bit inode number for programs that need one.
    """
    form = layout << _FORMAT_LAYOUT_SHIFT
    mode = kind | attributes.permissions
    owners = (attributes.uid, attributes.gid)
    if compact:
        return _COMPACT.pack(form, xattr_count, mode, links, size, 0, union, number, *owners)
    form |= _FORMAT_EXTENDED
    time = (attributes.mtime, attributes.mtime_ns)
    return _EXTENDED.pack(form, xattr_count, mode, 0, size, union, number, *owners, *time, links)


def device_number(major: int, minor: int) -> int:
    """Return the kernel's 32-bit form of a device number (new_encode_dev)."""
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def directory_cuts(name_bytes: Sequence[int], block_bytes: int) -> tuple[list[int], int]:
    """Return where a directory's blocks end, as indexes into its entries, and its size in bytes.

    `name_bytes`: the lengths of the sorted names, "." and ".." included. The last block is counted
    as far as it is filled.
    """
    cuts = []
    filled = 0
    for index, length in enumerate(name_bytes):
        wanted = _DIRENT.size + length
        if filled + wanted > block_bytes:
            cuts.append(index)
            filled = 0
        filled += wanted
    size = len(cuts) * block_bytes + filled
    cuts.append(len(name_bytes))
    return cuts, size


def directory(entries: Sequence[Entry], block_bytes: int) -> bytes:
    """Return a directory's contents; `entries` sorted by name, "." and ".." included."""
    cuts, size = directory_cuts([len(name) for name, _, _ in entries], block_bytes)
    contents = bytearray(size)
    at = first = 0
    for behind in cuts:
        block = entries[first:behind]
        entry_at = at
        name_at = len(block) * _DIRENT.size
        for name, nid, file_type in block:
            _DIRENT.pack_into(contents, entry_at, nid, name_at, file_type)
            entry_at += _DIRENT.size
            name_at += len(name)
        contents[entry_at : at + name_at] = b"".join([name for name, _, _ in block])
        first = behind
        at += block_bytes
    return bytes(contents)
