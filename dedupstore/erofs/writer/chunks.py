"""How a sparse file is cut into chunks, and the map that says where they lie.

Owns the choice of the chunk size and the 4-byte block map of EROFS's chunk-based layout. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from dedupstore.erofs.layouts import CHUNK_BITS_MASK, aligned
from dedupstore.erofs.tree import Extent

_ENTRY_BYTES = 4
_HOLE = b"\xff" * _ENTRY_BYTES
_PIECE_ENTRIES = 1 << 16

Run = tuple[int, int]  # (first, behind): chunks, or blocks, that are no holes


@dataclass(frozen=True, slots=True)
class Chunking:
    """A sparse file in chunks of `block_bytes << bits` bytes; `runs` of those that hold data.

    `map_bytes`: the size of the map.
    """

    bits: int
    chunk_bytes: int
    runs: tuple[Run, ...]
    map_bytes: int

    def stretches(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield what is stored of a file of `size` bytes: (offset in the file, length)."""
        for first, behind in self.runs:
            start = first * self.chunk_bytes
            yield start, min(behind * self.chunk_bytes, size) - start

    def block_map(self, block: int) -> bytes:
        """Return the map when the first chunk with data begins at `block`, the others behind."""
        step = 1 << self.bits
        pieces = []
        at = 0
        for first, behind in self.runs:
            pieces.append(_HOLE * (first - at))
            for chunk in range(first, behind, _PIECE_ENTRIES):
                count = min(_PIECE_ENTRIES, behind - chunk)
                pieces.append(struct.pack(f"<{count}I", *range(block, block + count * step, step)))
                block += count * step
            at = behind
        pieces.append(_HOLE * (self.map_bytes // _ENTRY_BYTES - at))
        return b"".join(pieces)


def choose_chunking(
    size: int, extents: tuple[Extent, ...], block_bytes: int, map_bytes_max: int
) -> Chunking | None:
    """Return the chunks that take least room, map included; None when no map saves any.

    `extents`: where the file has data. Larger chunks halve the map, of at most `map_bytes_max`,
    which is held in memory, and take in more holes, which are not. Work: as chunks grow, the runs
    that touch become one, and it ends when the data alone outweigh the best so far.
    """
    if sum(length for _, length in extents) == size:
        return None
    blocks = -(-size // block_bytes)
    runs = _merged((start // block_bytes, -(-(start + n) // block_bytes)) for start, n in extents)
    best: Chunking | None = None
    room = aligned(size, block_bytes)
    for bits in range(CHUNK_BITS_MASK + 1):
        chunk_bytes = block_bytes << bits
        data = sum(min(behind << bits, blocks) - (first << bits) for first, behind in runs)
        if data * block_bytes >= room:
            break
        map_bytes = _ENTRY_BYTES * -(-size // chunk_bytes)
        if map_bytes <= map_bytes_max and data * block_bytes + map_bytes < room:
            room = data * block_bytes + map_bytes
            best = Chunking(bits, chunk_bytes, tuple(runs), map_bytes)
        if chunk_bytes >= size:
            break
        runs = _merged((first >> 1, (behind + 1) >> 1) for first, behind in runs)
    return best


def _merged(runs: Iterator[Run]) -> list[Run]:
    """Ascending runs, those that touch joined."""
    merged: list[Run] = []
    for first, behind in runs:
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(behind, merged[-1][1]))
        else:
            merged.append((first, behind))
    return merged
