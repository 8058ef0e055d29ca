"""Where to cut an image into chunks. Pure; thread-safe.

Images share content file by file, and a file that grows shifts everything behind it, so chunks must
begin where files begin. EROFS says where that is. For any other image cuts are content-defined on
the 4 KiB grid: a block whose hash ends in zeros ends a chunk wherever it lies. Whole zero chunks,
and in images without extents every zero block, become holes. docs/decisions/0001-cuts.md has the
measurements.

A *segment* is the unit of parallel work: a stretch of the image that is read and hashed at once.
Cuts never cross a segment, which costs one cut per SEGMENT_BYTES and lets every core cut its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from dedupstore.constants import (
    CDC_BYTES_MIN,
    CDC_MASK,
    CHUNK_BYTES_MAX,
    EXTENT_SEGMENT_BYTES,
    GRID_BYTES,
    SEGMENT_BYTES,
)

_ZEROS = bytes(CHUNK_BYTES_MAX)
_ZERO_BLOCK_HASH = xxh3_64_intdigest(_ZEROS[:GRID_BYTES])


@dataclass(frozen=True, slots=True)
class Segment:
    """`length` bytes of the image from `offset` on.

    `cuts` are the lengths of its chunks; empty when they are to be found by content. `metadata` has
    the numbers of those that are no file's contents.
    """

    offset: int
    length: int
    cuts: tuple[int, ...] = ()
    metadata: frozenset[int] = frozenset()


def is_zero(data: bytes | memoryview) -> bool:
    """Whether a chunk of at most CHUNK_BYTES_MAX bytes is all zeros."""
    if not data or data[0] or data[-1]:
        return False
    return bytes(data) == _ZEROS[: len(data)]


def segments_of_extents(
    size: int,
    extents: Iterable[tuple[int, int]],
    data: Iterable[tuple[int, int]] | None = None,
) -> Iterator[Segment]:
    """Cut at every extent's start and end, and every CHUNK_BYTES_MAX inside.

    `extents` are sorted, disjoint (start, end) byte ranges; what lies between them is metadata and
    is cut the same way. `data` are such ranges of what may be no zeros, if that is known: chunks
    that lie outside are left out, however many they are, and the others are the same.
    """
    cuts: list[int] = []
    metadata: list[int] = []
    begin = position = 0
    regions = iter(((0, size),) if data is None else data)
    start = end = 0  # of the region that is at `position`, or comes next
    for edge, is_metadata in _edges(size, extents):
        while position < edge:
            while end <= position:
                start, end = next(regions, (size, size))
            hole = edge - position
            if start < edge:
                hole = max(start - position, 0) // CHUNK_BYTES_MAX * CHUNK_BYTES_MAX
            if hole:
                if cuts:
                    yield Segment(begin, position - begin, tuple(cuts), frozenset(metadata))
                cuts, metadata, begin = [], [], position + hole
                position = begin
                continue
            length = min(CHUNK_BYTES_MAX, edge - position)
            if is_metadata:
                metadata.append(len(cuts))
            cuts.append(length)
            position += length
            if position - begin >= EXTENT_SEGMENT_BYTES:
                yield Segment(begin, position - begin, tuple(cuts), frozenset(metadata))
                cuts, metadata, begin = [], [], position
    if cuts:
        yield Segment(begin, position - begin, tuple(cuts), frozenset(metadata))


def _edges(size: int, extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bool]]:
    """Where cuts must be, and whether what lies before is metadata."""
    for start, end in extents:
        yield start, True
        yield end, False
    yield size, True


def segments_of_data(regions: Iterable[tuple[int, int]]) -> Iterator[Segment]:
    """Segments to be cut by content, covering the (start, end) regions that hold data.

    Segment borders are multiples of SEGMENT_BYTES from the image's start, so that the same image
    is cut the same way whether or not its file is sparse.
    """
    for start, end in regions:
        position = start
        while position < end:
            stop = min(end, position - position % SEGMENT_BYTES + SEGMENT_BYTES)
            yield Segment(position, stop - position)
            position = stop


def cut(segment: Segment, data: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """(length, bytes) of the chunks of a segment whose bytes are `data`; None for a hole."""
    position = 0
    for length in segment.cuts or cut_by_content(data):
        if length < 0:
            yield -length, None
            position -= length
            continue
        piece = data[position : position + length]
        position += length
        yield length, None if is_zero(piece) else piece


def cut_by_content(data: memoryview) -> Iterator[int]:
    """Lengths of a segment's chunks, in order, negative for holes. The sum of their sizes is
    len(data).

    The hash only chooses cuts; that a block is zero is confirmed by comparing it.
    """
    length = hole = 0
    for position in range(0, len(data), GRID_BYTES):
        block = data[position : position + GRID_BYTES]
        hashed = xxh3_64_intdigest(block)
        # A partial last block of zeros is a hole as well: in a sparse file it is one already.
        if (hashed == _ZERO_BLOCK_HASH or len(block) < GRID_BYTES) and is_zero(block):
            if length:
                yield length
                length = 0
            hole += len(block)
            continue
        if hole:
            yield -hole
            hole = 0
        length += len(block)
        if length >= CHUNK_BYTES_MAX or (length >= CDC_BYTES_MIN and not hashed & CDC_MASK):
            yield length
            length = 0
    if length:
        yield length
    if hole:
        yield -hole
