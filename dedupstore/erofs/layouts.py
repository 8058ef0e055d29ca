"""Where the contents of one inode lie: the five data layouts of EROFS and their maps.

Owns the on-disk forms of chunk maps, compression indexes (full and compact) and encoded extents.
A map comes as `pieces`: its bytes in order, each buffer a whole number of records. What goes out
is runs, in file order: each a stretch of bytes that the file occupies without a gap on the primary
device. Runs may overlap and may lie outside the image; the walk resolves and clips them.
Pure, thread-safe.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from dedupstore.erofs.ranges import Range
from dedupstore.erofs.superblock import NULL_BLOCK_32
from dedupstore.errors import ErofsError

FLAT_PLAIN = 0
COMPRESSED_FULL = 1
FLAT_INLINE = 2
COMPRESSED_COMPACT = 3
CHUNK_BASED = 4

CHUNK_BITS_MASK = 0x1F
CHUNK_INDEXES = 0x20
CHUNK_48BIT = 0x40
CHUNK_KNOWN = 0x7F

ADVISE_COMPACTED_2B = 0x1  # compact indexes: packs of 16 follow the packs of 2
ADVISE_EXTENTS = 0x1  # full indexes: encoded extents instead
ADVISE_BIG_PCLUSTER = 0x2
ADVISE_INLINE_PCLUSTER = 0x8
ADVISE_FRAGMENT = 0x20
FRAGMENT_INODE = 0x80  # in h_clusterbits: the whole file lies in the packed inode

CLUSTER_BITS_MASK = 0xF
_CLUSTER_KIND_MASK = 0x3
_CLUSTER_NONHEAD = 2
_CLUSTER_COUNT_FLAG = 0x800  # in a NONHEAD's first distance: it is the pcluster's block count
_COMPACT_LOW_BITS_MIN = 12
_CLUSTER_BITS_MAX_4B = 14
_CLUSTER_BITS_MAX_2B = 12
_PACK_4B_BYTES = 8  # two clusters and a block address
_PACK_2B_BYTES = 32  # sixteen of them and a block address
_PACK_2B_CLUSTERS = 16
_EXTENT_LENGTH_MASK = (1 << 21) - 1
_EXTENT_BYTES_WITHOUT_START = 4
_EXTENT_UNCOUNTED_BYTES_MAX = 8
_EXTENT_SIZE_SHIFT = 1  # in h_advise: log2 of a record's size, less 2
_EXTENT_SIZE_MASK = 0x3
_FULL_INDEX_GAP_BYTES = 8  # between the map header and a full index

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_MAP_HEADER = struct.Struct("<IHBB")  # h_extents_lo, h_advise, h_algorithmtype, h_clusterbits
MAP_HEADER_BYTES = _MAP_HEADER.size
COMPACT_HEAD_BYTES = MAP_HEADER_BYTES + _PACK_2B_BYTES  # the header and the largest first pack
_CHUNK_INDEX = struct.Struct("<HHI")  # startblk_hi, device_id, startblk_lo
_CLUSTER_INDEX = struct.Struct("<HHI")  # di_advise, di_clusterofs, blkaddr or distances
_EXTENT_WITH_START = {  # struct z_erofs_extent, cut off at the record's size: plen, pstart
    8: struct.Struct("<II"),
    16: struct.Struct("<IQ4x"),
    32: struct.Struct("<IQ20x"),
}


@dataclass(frozen=True, slots=True)
class FullMap:
    """The map of an inode with layout COMPRESSED_FULL: where its records lie and what they are.

    `at`, `length`: of the records, bytes in the inode's space. `record_bytes`: 0 for a full index,
    else of an encoded extent. `cluster_bytes`: of a logical cluster. `inline_tail`: the last
    physical cluster is not among the file's own blocks.
    """

    at: int
    length: int
    record_bytes: int
    cluster_bytes: int
    inline_tail: bool


def full_map(head: bytes, head_at: int, size: int, block_bits: int) -> FullMap | None:
    """Interpret the map header `head` at `head_at` of a file of `size` bytes.

    None when the file lies in the packed inode and has no blocks of its own.
    """
    low, advise, algorithms, cluster_bits = _MAP_HEADER.unpack_from(head)
    if cluster_bits & FRAGMENT_INODE:
        return None
    cluster_bytes = 1 << block_bits + (cluster_bits & CLUSTER_BITS_MASK)
    clusters = -(-size // cluster_bytes)
    records_at = head_at + MAP_HEADER_BYTES
    fragment = bool(advise & ADVISE_FRAGMENT)
    if not advise & ADVISE_EXTENTS:
        tail = fragment or (bool(advise & ADVISE_INLINE_PCLUSTER) and bool(low >> 16))
        at = records_at + _FULL_INDEX_GAP_BYTES
        return FullMap(at, clusters * _CLUSTER_INDEX.size, 0, cluster_bytes, tail)
    record_bytes = 4 << (advise >> _EXTENT_SIZE_SHIFT & _EXTENT_SIZE_MASK)
    # Only records that tell their logical offset may cover any length, and so need a count; then
    # the count's high half takes the place of the algorithms and the cluster size.
    counted = record_bytes > _EXTENT_UNCOUNTED_BYTES_MAX
    count = low | (algorithms | cluster_bits << 8) << 32 if counted else clusters
    address_bytes = _U64.size if record_bytes == _EXTENT_BYTES_WITHOUT_START else 0
    length = address_bytes + count * record_bytes
    return FullMap(aligned(records_at, record_bytes), length, record_bytes, cluster_bytes, fragment)


def aligned(offset: int, unit: int) -> int:
    """Round `offset` up to a multiple of `unit`, a power of two."""
    return (offset + unit - 1) & -unit


def chunk_map_blocks(pieces: Iterable[bytes]) -> Iterator[int]:
    """Return the first block of each chunk of a 4-byte block map, `NULL_BLOCK_32` for a hole."""
    return chain.from_iterable(struct.unpack(f"<{len(piece) // 4}I", piece) for piece in pieces)


def chunk_index_blocks(
    pieces: Iterable[bytes], null_block: int, device_mask: int, foreign: int
) -> Iterator[int]:
    """Yield the first block of each chunk of an 8-byte index.

    `null_block`: the address of a hole, which also tells whether addresses have 32 or 48 bits.
    `device_mask`: the significant bits of a device id; `foreign` takes the place of the address of
    a chunk on another device.
    """
    for piece in pieces:
        for high, device, low in _CHUNK_INDEX.iter_unpack(piece):
            block = (low | high << 32) & null_block
            yield foreign if device & device_mask and block != null_block else block


def chunk_runs(
    blocks: Iterable[int], null_block: int, chunk_blocks: int, file_blocks: int, block_bits: int
) -> Iterator[Range]:
    """Yield the runs of a file whose chunks begin at `blocks`, joined where chunks touch.

    `chunk_blocks`: of each chunk, except that the file's last one ends with its `file_blocks`.
    """
    start = end = 0  # of the run so far, in blocks
    block = null_block
    for block in blocks:
        if block != end:
            if end > start:
                yield start << block_bits, end << block_bits
            start = end = 0 if block == null_block else block
        if block != null_block:
            end += chunk_blocks
    if block != null_block:
        end -= -file_blocks % chunk_blocks
    if end > start:
        yield start << block_bits, end << block_bits


def compact_first_block(head: bytes, head_at: int, blocks: int, block_bits: int) -> int | None:
    """Return the first physical block of a file with compact indexes; its blocks are consecutive.

    `head`: `COMPACT_HEAD_BYTES` from `head_at`, fewer only at the end of the metadata. `blocks`:
    of the file, uncompressed. None when the file lies in the packed inode. Raises `ErofsError`
    when the index cannot be.
    """
    _, advise, _, cluster_bits = _MAP_HEADER.unpack_from(head)
    if cluster_bits & FRAGMENT_INODE:
        return None
    cluster_bits = block_bits + (cluster_bits & CLUSTER_BITS_MASK)
    # Packs of 2 fill up to the next 32-byte boundary; only behind them may packs of 16 come.
    packs_at = head_at + MAP_HEADER_BYTES
    aligned_packs = packs_at % _PACK_2B_BYTES == 0 and blocks >= _PACK_2B_CLUSTERS
    wide = bool(advise & ADVISE_COMPACTED_2B) and aligned_packs
    if cluster_bits > (_CLUSTER_BITS_MAX_2B if wide else _CLUSTER_BITS_MAX_4B):
        raise ErofsError(head_at, f"compact indexes of 2^{cluster_bits}-byte clusters")
    end = MAP_HEADER_BYTES + (_PACK_2B_BYTES if wide else _PACK_4B_BYTES)
    if len(head) < end:
        raise ErofsError(head_at, "the metadata ends inside a compact index")
    low_bits = max(cluster_bits, _COMPACT_LOW_BITS_MIN)
    first: int = _U32.unpack_from(head, MAP_HEADER_BYTES)[0]
    if first >> low_bits & _CLUSTER_KIND_MASK == _CLUSTER_NONHEAD:
        raise ErofsError(head_at, "a file's first cluster continues another")
    base: int = _U32.unpack_from(head, end - 4)[0]
    # Without big pclusters the pack's address counts from the block before its first HEAD.
    return base if advise & ADVISE_BIG_PCLUSTER else (base + 1) & NULL_BLOCK_32


def full_index_runs(
    pieces: Iterable[bytes], tail_offset: int, block_bits: int, *, inline_tail: bool
) -> Iterator[Range]:
    """Yield the runs of a file with a full index, deduplicated clusters included.

    `tail_offset`: of the file's last byte in its last logical cluster. `inline_tail`: the last
    physical cluster lies elsewhere, in the inode or in the packed inode.
    """
    clusters = _physical_clusters(pieces, tail_offset, block_bits)
    return _merged(_all_but_last(clusters) if inline_tail else clusters)


def _physical_clusters(
    pieces: Iterable[bytes], tail_offset: int, block_bits: int
) -> Iterator[Range]:
    start, blocks, after_head, offset = -1, 0, False, 0
    for piece in pieces:
        for advise, clusterofs, value in _CLUSTER_INDEX.iter_unpack(piece):
            if advise & _CLUSTER_KIND_MASK == _CLUSTER_NONHEAD:
                if after_head and value & _CLUSTER_COUNT_FLAG:
                    blocks = value & 0xFFFF & ~_CLUSTER_COUNT_FLAG
                after_head = False
                continue
            if start >= 0:
                yield start, start + (blocks << block_bits)
            start, blocks, after_head = value << block_bits, 1, True
            offset = clusterofs
    # A last HEAD that begins behind the end of the file only marks where its predecessor ends.
    if start >= 0 and not (after_head and offset > tail_offset):
        yield start, start + (blocks << block_bits)


def extent_runs(
    pieces: Iterable[bytes], record_bytes: int, block_bytes: int, *, inline_tail: bool
) -> Iterator[Range]:
    """Yield the runs of a file with encoded extents, widened to whole blocks.

    `record_bytes`: 4, 8, 16 or 32; with 4, one 8-byte physical address precedes the records.
    `inline_tail`: the last extent is a fragment of the packed inode.
    """
    if record_bytes == _EXTENT_BYTES_WITHOUT_START:
        extents = _consecutive_extents(pieces)
    else:
        extents = _placed_extents(pieces, _EXTENT_WITH_START[record_bytes])
    for start, end in _merged(_all_but_last(extents) if inline_tail else extents):
        yield start & -block_bytes, aligned(end, block_bytes)


def _consecutive_extents(pieces: Iterable[bytes]) -> Iterator[Range]:
    position = -1
    for piece in pieces:
        at = 0
        if position < 0:
            position = _U64.unpack_from(piece)[0]
            at = _U64.size
        for (length,) in _U32.iter_unpack(memoryview(piece)[at:]):
            end = position + (length & _EXTENT_LENGTH_MASK)
            yield position, end
            position = end


def _placed_extents(pieces: Iterable[bytes], record: struct.Struct) -> Iterator[Range]:
    for piece in pieces:
        for length, start in record.iter_unpack(piece):
            yield start, start + (length & _EXTENT_LENGTH_MASK)


def _all_but_last(runs: Iterator[Range]) -> Iterator[Range]:
    held = next(runs, None)
    for run in runs:
        if held is not None:
            yield held
        held = run


def _merged(runs: Iterable[Range]) -> Iterator[Range]:
    """Join each run to its predecessor where it begins at its end, and drop empty ones."""
    start = end = 0
    for left, right in runs:
        if left == end:
            end = right
            continue
        if end > start:
            yield start, end
        start, end = left, right
    if end > start:
        yield start, end
