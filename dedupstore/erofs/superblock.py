"""The EROFS superblock: geometry, feature flags, and where the walk over the inodes begins.

Owns `struct erofs_super_block` (erofs_fs.h), its checksum, and the list of incompatible features
this parser knows. Pure functions over `read_at`; thread-safe.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

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
COMPAT_SHARED_XATTRS_IN_METABOX = 0x8
COMPAT_PLAIN_XATTR_PREFIXES = 0x10
COMPAT_FINGERPRINTS = 0x20  # ISHARE_XATTRS: inodes carry digests of their contents

INCOMPAT_DEVICE_TABLE = 0x8  # shares its bit with COMPR_HEAD2
INCOMPAT_48BIT = 0x80
INCOMPAT_METABOX = 0x100
INCOMPAT_KNOWN = 0x1FF  # every bit up to METABOX (Linux 6.17)

METABOX_NID_FLAG = 1 << 63  # a nid with this bit lies in the metabox inode's contents

_RECORD = struct.Struct("<IIIBBHQqIIII16s16sIHHHBBIQBB2xIQ8xQ8x")
assert _RECORD.size == SUPERBLOCK_BYTES_MAX


class SuperblockRecord(NamedTuple):
    """`struct erofs_super_block`, field by field; what is left out is zero on disk.

    `root_nid_short` is the upper half of the block count where INCOMPAT_48BIT puts the root's
    number into `root_nid`. `metabox_nid` lies behind the first 128 bytes, in the first extension.
    """

    magic: int = MAGIC
    checksum: int = 0
    feature_compat: int = 0
    block_bits: int = 0
    extension_slots: int = 0
    root_nid_short: int = 0
    inode_count: int = 0
    epoch: int = 0  # seconds: the mtime of compact inodes
    fixed_nsec: int = 0
    blocks_low: int = 0
    meta_block: int = 0
    xattr_block: int = 0
    uuid: bytes = b""
    volume_name: bytes = b""
    feature_incompat: int = 0
    compression: int = 0
    extra_devices: int = 0
    device_table: int = 0
    directory_block_bits: int = 0
    xattr_prefix_count: int = 0
    xattr_prefix_start: int = 0  # counts 4 bytes
    packed_nid: int = 0
    xattr_filter: int = 0
    fingerprint_prefix: int = 0  # ishare_xattr_prefix_id
    build_time: int = 0
    root_nid: int = 0
    metabox_nid: int = 0

    @classmethod
    def unpack(cls, raw: bytes) -> "SuperblockRecord":
        """Take apart `SUPERBLOCK_BYTES_MAX` bytes or fewer; what is missing counts as zero."""
        return cls._make(_RECORD.unpack(raw.ljust(SUPERBLOCK_BYTES_MAX, b"\0")))

    def pack(self) -> bytes:
        """Return the `SUPERBLOCK_BYTES_MIN` bytes of a superblock without extensions."""
        return _RECORD.pack(*self)[:SUPERBLOCK_BYTES_MIN]


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
    """What the superblock says, as far as placement, identity and attributes are concerned.

    `block_bits`: binary logarithm of the block size. `blocks`: of the primary device, in blocks.
    `meta_block`: where nid 0 would lie. `packed_nid` and `metabox_nid` are 0 when there is none.
    `checksum_ok` is None when the image carries no checksum, False when it does not match: the
    caller decides what that means, because EROFS covers only the superblock's own block with it.
    `extra_devices`: how many further devices hold contents; 0 without a device table. `epoch`, in
    seconds since 1970, and `epoch_ns` are as found, from which compact inodes count.
    `xattr_block`: where id 0 of the shared xattrs would lie. `xattr_prefix_start` counts units of 4
    bytes. `fingerprint_prefix`: which prefix is the name of content digests; None without any.
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
    epoch: int
    epoch_ns: int
    xattr_block: int
    xattr_prefix_start: int
    xattr_prefix_count: int
    fingerprint_prefix: int | None

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
    record = SuperblockRecord.unpack(raw)
    block_bits, feature_incompat = record.block_bits, record.feature_incompat
    if record.magic != MAGIC:
        raise ErofsError(SUPERBLOCK_OFFSET, "no EROFS magic")
    if not BLOCK_BITS_MIN <= block_bits <= BLOCK_BITS_MAX:
        raise ErofsError(SUPERBLOCK_OFFSET + 12, f"block size 2^{block_bits} is not 512 to 65536")
    if feature_incompat & ~INCOMPAT_KNOWN:
        unknown = feature_incompat & ~INCOMPAT_KNOWN
        raise ErofsError(SUPERBLOCK_OFFSET + 80, f"unknown incompatible features {unknown:#x}")
    if record.directory_block_bits:
        raise ErofsError(SUPERBLOCK_OFFSET + 90, "unknown directory block size")
    if record.meta_block << block_bits >= size:
        raise ErofsError(SUPERBLOCK_OFFSET + 40, "metadata begins behind the end of the image")

    # The same rule as the kernel's: the 16-bit field is a nid unless the long one is in use.
    wide = bool(feature_incompat & INCOMPAT_48BIT) and record.root_nid != 0
    metabox_nid = record.metabox_nid
    if not feature_incompat & INCOMPAT_METABOX:
        metabox_nid = 0
    elif not record.extension_slots or metabox_nid & METABOX_NID_FLAG:
        raise ErofsError(SUPERBLOCK_OFFSET + 128, "the metabox inode cannot be where it claims")
    if record.packed_nid & METABOX_NID_FLAG:
        raise ErofsError(SUPERBLOCK_OFFSET + 96, "the packed inode cannot be in the metabox")
    return Superblock(
        block_bits=block_bits,
        blocks=record.blocks_low | (record.root_nid_short << 32 if wide else 0),
        inode_count=record.inode_count,
        meta_block=record.meta_block,
        root_nid=record.root_nid if wide else record.root_nid_short,
        packed_nid=record.packed_nid,
        metabox_nid=metabox_nid,
        feature_compat=record.feature_compat,
        feature_incompat=feature_incompat,
        extra_devices=record.extra_devices if feature_incompat & INCOMPAT_DEVICE_TABLE else 0,
        checksum_ok=_checksum_ok(read_at, 1 << block_bits, record.checksum)
        if record.feature_compat & COMPAT_CHECKSUM
        else None,
        uuid=record.uuid,
        volume_name=record.volume_name.rstrip(b"\0"),
        epoch=record.epoch,
        epoch_ns=record.fixed_nsec,
        xattr_block=record.xattr_block,
        xattr_prefix_start=record.xattr_prefix_start,
        xattr_prefix_count=record.xattr_prefix_count,
        fingerprint_prefix=record.fingerprint_prefix
        if record.feature_compat & COMPAT_FINGERPRINTS
        else None,
    )


def checksum_bytes(block_bytes: int) -> int:
    """How many bytes from `SUPERBLOCK_OFFSET` the checksum covers: the rest of their block."""
    return block_bytes - SUPERBLOCK_OFFSET if block_bytes > SUPERBLOCK_OFFSET else block_bytes


def superblock_checksum(covered: bytes) -> int:
    """CRC-32C, seeded with all ones and not inverted at the end; its own field counts as zero."""
    table = _CRC32C
    value = 0xFFFFFFFF
    for byte in covered[:4] + b"\0\0\0\0" + covered[8:]:
        value = table[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value


def _checksum_ok(read_at: ReadAt, block_bytes: int, expected: int) -> bool:
    length = checksum_bytes(block_bytes)
    covered = read_at(SUPERBLOCK_OFFSET, length)
    return len(covered) == length and superblock_checksum(covered) == expected
