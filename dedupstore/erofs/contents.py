"""The bytes of one inode: which stretches of the image they are, and how they are read.

Owns pieces, their bounds, and the content of regular files that the tree model asks for. Nothing
is decompressed, and nothing is read from other devices: both are refused. `Placer` belongs to one
walk; `ImageContent` may be read by as many threads as its `read_at` permits.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dedupstore.erofs import layouts
from dedupstore.erofs.inodes import Inode, chunk_addresses
from dedupstore.erofs.metadata import ReadAt, Space
from dedupstore.erofs.superblock import Superblock
from dedupstore.erofs.tree import Extent, ReadInto
from dedupstore.errors import ErofsError, SourceError

Piece = tuple[int, int, int]
"""(offset in the file, length, offset in the image), in bytes; the length is not 0."""

# Chunks may be shared, so a sound image may hold more file contents than it is large. One that
# holds many times more was made to fill a disk.
CONTENTS_PER_IMAGE_BYTE = 64
CONTENTS_BYTES_MIN = 1 << 20
# A piece costs Python some 170 bytes, and chunked files make one from 4 bytes of map. One for
# every smallest block that the image could have is enough for files that share nothing.
IMAGE_BYTES_PER_PIECE = 512
PIECES_MIN = 1 << 16
PIECES_MAX = 1 << 23  # a sparse image may claim any size

_FILE_BYTES_MAX = (1 << 63) - 1
_FOREIGN = -1
_COMPRESSED = (layouts.COMPRESSED_FULL, layouts.COMPRESSED_COMPACT)


@dataclass(frozen=True, slots=True, eq=False)
class ImageContent:
    """The contents of a regular file of `size` bytes inside an image that `read_at` reads.

    `pieces` are ascending and lie inside the image; neighbours that touch in the file and in the
    image are one piece, but a tail in the inode is always a piece of its own, so that callers may
    cut there. What they leave out is a hole.
    """

    read_at: ReadAt
    size: int
    pieces: tuple[Piece, ...]

    @contextmanager
    def opened(self) -> Iterator[ReadInto]:
        """Return the reader; see `Content`. There is nothing to open or close."""
        yield self.read_into

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer`, or a part of it, from `offset` in the file; see `ReadInto`.

        A call reads at most one piece or hole. Raises SourceError when the image became shorter,
        and whatever `read_at` raises.
        """
        wanted = min(len(buffer), self.size - offset)
        if wanted <= 0:
            return 0
        index = bisect_right(self.pieces, offset, key=_piece_start)
        if index:
            start, length, at = self.pieces[index - 1]
            if offset < start + length:
                data = self.read_at(at + offset - start, min(wanted, start + length - offset))
                if not data:
                    raise SourceError(f"the image ends before byte {at + offset - start}")
                buffer[: len(data)] = data
                return len(data)
        if index < len(self.pieces):
            wanted = min(wanted, self.pieces[index][0] - offset)
        buffer[:wanted] = bytes(wanted)
        return wanted


def _piece_start(piece: Piece) -> int:
    return piece[0]


def extents(pieces: tuple[Piece, ...]) -> tuple[Extent, ...]:
    """Return where a file has data: its pieces, joined where they touch in the file."""
    if len(pieces) == 1:
        return (pieces[0][:2],)
    joined: list[Extent] = []
    start = end = 0
    for offset, length, _ in pieces:
        if offset != end:
            if end > start:
                joined.append((start, end - start))
            start = offset
        end = offset + length
    if end > start:
        joined.append((start, end - start))
    return tuple(joined)


class Placer:
    """Finds the pieces of inodes of one image, and bounds them in sum."""

    def __init__(self, superblock: Superblock, size: int, data_bytes: int) -> None:
        """`size`: of the image, `data_bytes`: what of it is no hole."""
        self._superblock = superblock
        self._bits = superblock.block_bits
        self._size = size
        # Of the data: whoever reads the contents would be busy for ever with those that are holes
        # of an image, which may claim any size.
        self._contents_left = data_bytes * CONTENTS_PER_IMAGE_BYTE + CONTENTS_BYTES_MIN
        self._pieces_left = min(size // IMAGE_BYTES_PER_PIECE + PIECES_MIN, PIECES_MAX)

    def charge(self, inode: Inode, pieces: tuple[Piece, ...]) -> None:
        """Count the contents of a regular file; raises `ErofsError` when they are too many."""
        for _, length, _ in pieces:
            self._contents_left -= length
        if self._contents_left < 0:
            raise ErofsError(
                inode.xattrs_at,
                f"more file contents than {CONTENTS_PER_IMAGE_BYTE} times the image's data",
            )

    def pieces(self, space: Space, inode: Inode) -> tuple[Piece, ...]:
        """Return the pieces of an inode that lies in `space`.

        Raises `ErofsError` when they are compressed, on another device or outside the image.
        """
        size = inode.size
        layout = inode.layout
        if layout in _COMPRESSED:
            raise ErofsError(inode.contents_at, "compressed file contents")
        if not size:
            return ()
        if size > _FILE_BYTES_MAX:
            raise ErofsError(inode.contents_at, f"a file of {size} bytes")
        if layout == layouts.FLAT_PLAIN:
            if inode.first == inode.null_block:
                return ()
            return (self._inside(0, size, inode.first << self._bits),)
        if layout == layouts.FLAT_INLINE:
            return self._inline(inode)
        if layout == layouts.CHUNK_BASED:
            return self._chunked(space, inode)
        raise ErofsError(inode.contents_at, f"unknown inode layout {layout}")

    def _inside(self, offset: int, length: int, at: int) -> Piece:
        if at + length > self._size:
            raise ErofsError(at, f"{length} bytes of file contents reach behind the image's end")
        return offset, length, at

    def _inline(self, inode: Inode) -> tuple[Piece, ...]:
        outside = (inode.size - 1) >> self._bits << self._bits
        tail = self._inside(outside, inode.size - outside, inode.contents_at)
        if not outside:
            return (tail,)
        return self._inside(0, outside, inode.first << self._bits), tail

    def _chunked(self, space: Space, inode: Inode) -> tuple[Piece, ...]:
        blocks, null_block, chunk_blocks = chunk_addresses(
            space, self._superblock, inode.size, inode.first, inode.contents_at, foreign=_FOREIGN
        )
        bits = self._bits
        chunk_bytes = chunk_blocks << bits
        pieces: list[Piece] = []
        start = position = 0  # of the run so far, and of the next chunk, in the file
        first = end = null_block  # of the run so far, in blocks
        for block in blocks:
            # A run that reaches the address that means a hole is not continued by it.
            if block != end or block == null_block:
                if first != null_block:
                    self._add(pieces, start, position - start, first << bits)
                if block == _FOREIGN:
                    raise ErofsError(inode.contents_at, "file contents on another device")
                start, first, end = position, block, block
            if block != null_block:
                end += chunk_blocks
            position += chunk_bytes
        if first != null_block:
            self._add(pieces, start, inode.size - start, first << bits)
        return tuple(pieces)

    def _add(self, pieces: list[Piece], offset: int, length: int, at: int) -> None:
        self._pieces_left -= 1
        if self._pieces_left < 0:
            raise ErofsError(at, "more pieces of files than the image has room for")
        pieces.append(self._inside(offset, length, at))
