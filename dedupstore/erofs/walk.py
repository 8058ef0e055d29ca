"""The walk from the root directory to every inode, and the ranges collected on the way.

Owns the order of the walk and its bounds. Inodes are
visited in waves, one per directory level: all nids of a wave are sorted, so that one read (a
window) serves all inodes that lie close together. Without recursion, each inode once, hard links
and loops included. Not thread-safe; every call of `file_extents` has a walk of its own.

Bounds: at most one inode per `INODE_SLOT_BYTES` of image, and `INODES_MAX` in all; directories and
maps cost no more bytes than `metadata.Budget` allows; an inode makes at most `WINDOW_GAP_BYTES`
plus one block of window be read. Memory holds the visited nids and `2 * blocks + RANGES_MIN`
ranges, at most `RANGES_MAX`.
"""

import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice

from dedupstore.erofs import layouts
from dedupstore.erofs.inodes import (
    INODE_SLOT_BYTES,
    INODES_MAX,
    KIND_DIRECTORY,
    KINDS_WITH_CONTENTS,
    KINDS_WITHOUT_CONTENTS,
    TOO_MANY_INODES,
    chunk_addresses,
    metabox_space,
    placement,
    windows,
)
from dedupstore.erofs.metadata import Budget, ReadAt, Space
from dedupstore.erofs.ranges import Range, clipped, partition
from dedupstore.erofs.superblock import METABOX_NID_FLAG, Superblock, read_superblock
from dedupstore.errors import ErofsError

RANGES_MIN = 1 << 16  # collected ranges that are worth compacting
# 120 bytes each, thrice while they are compacted. A sparse image may claim any number of blocks.
RANGES_MAX = 1 << 23

_DIRENT = struct.Struct("<Q2xBx")  # nid, (nameoff), file_type
_DIRENT_TYPES_WITHOUT_CONTENTS = frozenset((3, 4, 5, 6))  # CHRDEV, BLKDEV, FIFO, SOCK
_NAME_OFFSET = struct.Struct("<8xH")  # of the first entry: where the entries end


def file_extents(read_at: ReadAt, size: int) -> list[Range]:
    """Return where file contents lie in an EROFS image of `size` bytes.

    Returns (start, end) ranges in bytes from the start of the image: sorted, disjoint, not empty,
    inside [0, size), on block boundaries except that the last may end at `size`. Each range is
    what one file, directory or symbolic link occupies without a gap, tails in inodes excepted;
    ranges of different files stay separate where they touch. Blocks that several files share are
    ranges of their own. What no range covers is metadata, a hole, or unused. The result depends
    only on the image's bytes.

    Not found is what lies below directories that are stored compressed (mkfs.erofs --zD, or -m
    with a compressor). Blocks on other devices are left out. Uncovered, too, is the last block of
    a few files of `-E ztailpacking` images made by mkfs.erofs 1.5, which does not count it.

    `read_at(offset, length)` returns up to `length` bytes, fewer only at the end of the image; it
    is called from this thread only. Raises `ErofsError` when the metadata is malformed, of an
    unknown kind, or needs more work than its size permits (see the module's bounds).
    """
    walk = _Walk(read_at, size, read_superblock(read_at, size))
    walk.run()
    return partition(clipped(walk.ranges, size))


class _Walk:
    """One walk: the spaces in which inodes lie, what was visited, what was found."""

    def __init__(self, read_at: ReadAt, size: int, superblock: Superblock) -> None:
        self._superblock = superblock
        self._bits = superblock.block_bits
        self._block_bytes = superblock.block_bytes
        self._size = size
        self._read_at = read_at
        self._budget = Budget(size)
        self._image = Space(read_at, superblock.meta_block << self._bits, size, self._budget)
        self._inodes_max = min(size // INODE_SLOT_BYTES, INODES_MAX)
        self._ranges_max = min(2 * (size >> self._bits) + RANGES_MIN, RANGES_MAX)
        self._visited: set[int] = set()
        self._found: set[int] = set()
        self.ranges: list[Range] = []

    def run(self) -> None:
        """Visit every inode that can be reached, wave by wave."""
        superblock = self._superblock
        metabox = metabox_space(self._image, self._read_at, superblock, self._size, self._budget)
        wave = {superblock.root_nid}
        wave.update(nid for nid in (superblock.packed_nid, superblock.metabox_nid) if nid)
        while wave:
            self._visited |= wave
            if len(self._visited) > self._inodes_max:
                raise ErofsError(self._image.base, TOO_MANY_INODES)
            nids = sorted(wave)
            boxed = bisect_left(nids, METABOX_NID_FLAG) if superblock.metabox_nid else len(nids)
            self._visit(self._image, nids[:boxed])
            if metabox is not None:
                self._visit(metabox, nids[boxed:])
            wave, self._found = self._found - self._visited, set()

    def _visit(self, space: Space, nids: Sequence[int]) -> None:
        """Visit the inodes `nids`, ascending, of one space."""
        for window, origin, part in windows(space, nids, self._block_bytes):
            self._visit_window(space, window, origin, part)
            self._limit_ranges()

    def _visit_window(self, space: Space, window: bytes, origin: int, nids: Sequence[int]) -> None:
        """Visit inodes that lie in `window`, which begins at `origin`. The hot loop."""
        delta = space.base - origin
        bits = self._bits
        mask = self._block_bytes - 1
        add = self.ranges.append
        for nid in nids:
            at = delta + nid * INODE_SLOT_BYTES
            layout, kind, size, first, inode_bytes = placement(window, at, origin + at)
            if kind not in KINDS_WITH_CONTENTS:
                if kind not in KINDS_WITHOUT_CONTENTS:
                    raise ErofsError(origin + at, f"unknown file type {kind:#o}")
            elif layout in (layouts.FLAT_PLAIN, layouts.FLAT_INLINE):
                blocks = (size + mask) >> bits
                if layout == layouts.FLAT_INLINE and blocks:
                    blocks -= 1
                if blocks:  # a hole's block address lies behind any image, and is clipped
                    add((first << bits, (first + blocks) << bits))
                if kind == KIND_DIRECTORY:
                    self._read_flat_directory(space, origin + at + inode_bytes, size, first, blocks)
            else:
                self._visit_mapped(space, layout, kind, size, first, origin + at + inode_bytes)
                add = self.ranges.append  # the list may be another one after a compaction

    def _read_flat_directory(
        self, space: Space, tail_at: int, size: int, first: int, blocks: int
    ) -> None:
        outside = min(size, blocks << self._bits)
        self._read_directory_blocks(first << self._bits, outside)
        if size > outside:
            self._read_entries(space.bytes_at(tail_at, size - outside), tail_at)

    def _read_directory_blocks(self, offset: int, length: int) -> None:
        for piece in self._image.pieces(offset, length):
            self._read_entries(piece, offset)
            offset += len(piece)

    def _read_entries(self, piece: bytes, offset: int) -> None:
        """Note the nids in `piece`, whole directory blocks but for the last, at `offset`."""
        view = memoryview(piece)
        for at in range(0, len(piece), self._block_bytes):
            block = view[at : at + self._block_bytes]
            end = _NAME_OFFSET.unpack_from(block)[0] if len(block) >= _DIRENT.size else 0
            if not end or end % _DIRENT.size or end > len(block):
                raise ErofsError(offset + at, "malformed directory block")
            self._found.update(
                nid
                for nid, kind in _DIRENT.iter_unpack(block[:end])
                if kind not in _DIRENT_TYPES_WITHOUT_CONTENTS
            )
        if len(self._found) > self._inodes_max:  # here, so that one directory cannot fill memory
            raise ErofsError(offset, TOO_MANY_INODES)

    def _visit_mapped(
        self, space: Space, layout: int, kind: int, size: int, first: int, map_at: int
    ) -> None:
        """Collect the runs of an inode whose contents are chunked or compressed."""
        if layout == layouts.CHUNK_BASED:
            self._collect(self._chunk_runs(space, size, first, map_at))
            if kind == KIND_DIRECTORY:
                # Directory blocks stand alone: neither their order nor holes matter.
                for start, end in self._chunk_runs(space, size, first, map_at):
                    self._read_directory_blocks(start, end - start)
        elif layout == layouts.COMPRESSED_COMPACT:
            self._visit_compact(space, size, first, map_at)
        elif layout == layouts.COMPRESSED_FULL:
            self._visit_full(space, size, map_at)
        else:
            raise ErofsError(map_at, f"unknown inode layout {layout}")

    def _chunk_runs(self, space: Space, size: int, form: int, map_at: int) -> Iterator[Range]:
        blocks, null_block, chunk_blocks = chunk_addresses(
            space, self._superblock, size, form, map_at, foreign=None
        )
        file_blocks = (size + self._block_bytes - 1) >> self._bits
        return layouts.chunk_runs(blocks, null_block, chunk_blocks, file_blocks, self._bits)

    def _visit_compact(self, space: Space, size: int, file_blocks: int, map_at: int) -> None:
        if not file_blocks:  # all in the inode or in the packed inode
            return
        head_at = layouts.aligned(map_at, 8)
        head = self._map_head(space, head_at, layouts.COMPACT_HEAD_BYTES)
        clusters = (size + self._block_bytes - 1) >> self._bits
        first = layouts.compact_first_block(head, head_at, clusters, self._bits)
        if first is not None:
            self.ranges.append((first << self._bits, (first + file_blocks) << self._bits))

    def _visit_full(self, space: Space, size: int, map_at: int) -> None:
        head_at = layouts.aligned(map_at, 8)
        head = self._map_head(space, head_at, layouts.MAP_HEADER_BYTES)
        full = layouts.full_map(head, head_at, size, self._bits)
        if full is None or not size:
            return
        pieces = space.pieces(full.at, full.length)
        if full.record_bytes:
            runs = layouts.extent_runs(
                pieces, full.record_bytes, self._block_bytes, inline_tail=full.inline_tail
            )
        else:
            tail_offset = (size - 1) & (full.cluster_bytes - 1)
            runs = layouts.full_index_runs(
                pieces, tail_offset, self._bits, inline_tail=full.inline_tail
            )
        self._collect(runs)

    def _map_head(self, space: Space, head_at: int, length: int) -> bytes:
        """Up to `length` bytes of a map, at least its header."""
        inside = min(length, space.end - head_at)
        if inside < layouts.MAP_HEADER_BYTES:
            raise ErofsError(head_at, "the metadata ends before a compression map")
        return space.bytes_at(head_at, inside)

    def _collect(self, runs: Iterator[Range]) -> None:
        """Add the runs of one file, in bounded memory."""
        exhausted = False
        while not exhausted:
            filled = len(self.ranges) + RANGES_MIN
            self.ranges.extend(islice(runs, RANGES_MIN))
            exhausted = len(self.ranges) < filled
            self._limit_ranges()

    def _limit_ranges(self) -> None:
        """Resolve what was collected when it is more than a sound image could need."""
        if len(self.ranges) > self._ranges_max:
            self.ranges = partition(clipped(self.ranges, self._size))
            # Else there would soon be as many again, and each time all are compacted.
            if len(self.ranges) > RANGES_MAX // 2:
                raise ErofsError(self._image.base, "more stretches of contents than can be held")
