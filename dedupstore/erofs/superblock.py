"""The EROFS superblock: geometry, feature flags, and where the walk over the inodes begins.

Owns `struct erofs_super_block` (erofs_fs.h) and the list of incompatible features this parser
knows. Pure functions over `read_at`; thread-safe.
"""

import struct
from dataclasses import dataclass

from dedupstore.erofs.metadata import ReadAt
from dedupstore.errors import ErofsError

SUPERBLOCK_OFFSET = 1024  # bytes; the format leaves room for a boot sector
SUPERBLOCK_BYTES_MIN = 128
SUPERBLOCK_BYTES_MAX = 144  # what is defined today; later fields follow behind feature flags
EXTENSION_SLOT_BYTES = 16
MAGIC = 0xE0F5E1E2

BLOCK_BITS_MIN = 9
BLOCK_BITS_MAX = 16
NULL_BLOCK_32 = 0xFFFFFFFF  # "no block here": a hole
NULL_BLOCK_48 = 0xFFFFFFFFFFFF

COMPAT_CHECKSUM = 0x1

INCOMPAT_DEVICE_TABLE = 0x8  # shares its bit with COMPR_HEAD2
INCOMPAT_48BIT = 0x80
INCOMPAT_METABOX = 0x100
INCOMPAT_KNOWN = 0x1FF  # every bit up to METABOX (Linux 6.17)

METABOX_NID_FLAG = 1 << 63  # a nid with this bit lies in the metabox inode's contents

# struct erofs_super_block; in parentheses what is skipped: magic, checksum, feature_compat,
# blkszbits, sb_extslots, rootnid_2b or blocks_hi, inos, (epoch, fixed_nsec), blocks_lo,
# meta_blkaddr, (xattr_blkaddr), uuid, volume_name, feature_incompat, (compression), extra_devices,
# (devt_slotoff), dirblkbits, (xattr prefixes), packed_nid, (xattr ids, build_time), rootnid_8b,
# (reserved), metabox_nid, (reserved).
_FIELDS = struct.Struct("<IIIBBHQ12xII4x16s16sI2xH2xBx4xQ8xQ8xQ8x")
_MAGIC = struct.Struct("<I")


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C = _crc32c_table()


@dataclass(frozen=True, slots=True)
class Superblock:
    """What the superblock says, as far as placement and identity are concerned.

    `block_bits`: binary logarithm of the block size. `blocks`: of the primary device, in blocks.
    `meta_block`: where nid 0 would lie. `packed_nid` and `metabox_nid` are 0 when there is none.
    `checksum_ok` is None when the image carries no checksum, False when it does not match: the
    caller decides what that means, because EROFS covers only the superblock's own block with it.
    `extra_devices`: how many further devices hold contents; 0 without a device table.
    """

    block_bits: int
    blocks: int
    inode_count: int
    meta_block: int
    root_nid: int
    packed_nid: int
    metabox_nid: int
    feature_compat: int
    feature_incompat: int
    extra_devices: int
    checksum_ok: bool | None
    uuid: bytes
    volume_name: bytes

    @property
    def block_bytes(self) -> int:
        """The block size in bytes, 512 to 65536."""
        return 1 << self.block_bits

    @property
    def device_mask(self) -> int:
        """The bits of a chunk index's device id that are significant."""
        return (1 << self.extra_devices.bit_length()) - 1


def is_erofs(head: bytes) -> bool:
    """Whether `head`, the image's first 1028 bytes or more, carries the EROFS magic.

    Says nothing about the rest of the image; a shorter `head` is never EROFS.
    """
    if len(head) < SUPERBLOCK_OFFSET + _MAGIC.size:
        return False
    magic: int = _MAGIC.unpack_from(head, SUPERBLOCK_OFFSET)[0]
    return magic == MAGIC


def read_superblock(read_at: ReadAt, size: int) -> Superblock:
    """Read and check the superblock of an image of `size` bytes.

    `read_at(offset, length)` returns up to `length` bytes and is called at most twice.
    Raises `ErofsError` when there is no superblock, when a field is impossible, or when the image
    needs a feature that is unknown here.
    """
    raw = read_at(SUPERBLOCK_OFFSET, min(SUPERBLOCK_BYTES_MAX, max(size - SUPERBLOCK_OFFSET, 0)))
    if len(raw) < SUPERBLOCK_BYTES_MIN:
        raise ErofsError(SUPERBLOCK_OFFSET, "the image ends inside the superblock")
    (
        magic,
        checksum,
        feature_compat,
        block_bits,
        extension_slots,
        root_nid_short,
        inode_count,
        blocks_low,
        meta_block,
        uuid,
        volume_name,
        feature_incompat,
        extra_devices,
        directory_block_bits,
        packed_nid,
        root_nid_long,
        metabox_nid,
    ) = _FIELDS.unpack(raw.ljust(SUPERBLOCK_BYTES_MAX, b"\0"))
    if magic != MAGIC:
        raise ErofsError(SUPERBLOCK_OFFSET, "no EROFS magic")
    if not BLOCK_BITS_MIN <= block_bits <= BLOCK_BITS_MAX:
        raise ErofsError(SUPERBLOCK_OFFSET + 12, f"block size 2^{block_bits} is not 512 to 65536")
    if feature_incompat & ~INCOMPAT_KNOWN:
        unknown = feature_incompat & ~INCOMPAT_KNOWN
        raise ErofsError(SUPERBLOCK_OFFSET + 80, f"unknown incompatible features {unknown:#x}")
    if directory_block_bits:
        raise ErofsError(SUPERBLOCK_OFFSET + 90, "unknown directory block size")
    if meta_block << block_bits >= size:
        raise ErofsError(SUPERBLOCK_OFFSET + 40, "metadata begins behind the end of the image")

    # The same rule as the kernel's: the 16-bit field is a nid unless the long one is in use.
    wide = bool(feature_incompat & INCOMPAT_48BIT) and root_nid_long != 0
    if not feature_incompat & INCOMPAT_METABOX:
        metabox_nid = 0
    elif not extension_slots or metabox_nid & METABOX_NID_FLAG:
        raise ErofsError(SUPERBLOCK_OFFSET + 128, "the metabox inode cannot be where it claims")
    if packed_nid & METABOX_NID_FLAG:
        raise ErofsError(SUPERBLOCK_OFFSET + 96, "the packed inode cannot be in the metabox")
    return Superblock(
        block_bits=block_bits,
        blocks=blocks_low | (root_nid_short << 32 if wide else 0),
        inode_count=inode_count,
        meta_block=meta_block,
        root_nid=root_nid_long if wide else root_nid_short,
        packed_nid=packed_nid,
        metabox_nid=metabox_nid,
        feature_compat=feature_compat,
        feature_incompat=feature_incompat,
        extra_devices=extra_devices if feature_incompat & INCOMPAT_DEVICE_TABLE else 0,
        checksum_ok=_checksum_ok(read_at, 1 << block_bits, checksum)
        if feature_compat & COMPAT_CHECKSUM
        else None,
        uuid=uuid,
        volume_name=volume_name.rstrip(b"\0"),
    )


def _checksum_ok(read_at: ReadAt, block_bytes: int, expected: int) -> bool:
    """CRC-32C, seeded with all ones and not inverted at the end, over the rest of the block."""
    length = block_bytes - SUPERBLOCK_OFFSET if block_bytes > SUPERBLOCK_OFFSET else block_bytes
    covered = read_at(SUPERBLOCK_OFFSET, length)
    if len(covered) < length:
        return False
    table = _CRC32C
    value = 0xFFFFFFFF
    for byte in covered[:4] + b"\0\0\0\0" + covered[8:]:  # the checksum field counts as zero
        value = table[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value == expected
