"""Where the contents of any image lie: what every import of an EROFS image runs (`ingest.plan`).

Promises: ErofsError or ranges that are sorted, disjoint and inside the image; cuts that cover the
image exactly; bytes and calls read within the bounds that `erofs.walk` states.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from dedupstore.chunker import segments_of_extents
from dedupstore.constants import CHUNK_BYTES_MAX
from dedupstore.erofs import file_extents, is_erofs
from dedupstore.erofs.inodes import INODE_SLOT_BYTES, WINDOW_GAP_BYTES
from dedupstore.erofs.metadata import BUDGET_BYTES_MIN, BUDGET_PER_IMAGE_BYTE
from dedupstore.erofs.superblock import BLOCK_BITS_MAX
from dedupstore.errors import ErofsError
from tools.fuzzing import images
from tools.fuzzing.messages import check_message

BYTES_MAX = 1 << 16


class Reader:
    """An image that counts what is asked of it."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.calls = self.bytes_read = 0

    def read_at(self, offset: int, length: int) -> bytes:
        assert offset >= 0, offset
        assert length >= 0, length
        data = self.image[offset : offset + length]
        self.calls += 1
        self.bytes_read += len(data)
        return data

    def check_work(self, more_bytes: int = 0) -> None:
        """Assert that no more was read than an image of this size may cost."""
        size = len(self.image)
        block = 1 << min((self.image[1036:1037] or b"\0")[0], BLOCK_BITS_MAX)
        inodes = size // INODE_SLOT_BYTES + 3
        budget = max(size * BUDGET_PER_IMAGE_BYTE, BUDGET_BYTES_MIN) + 2 * block + more_bytes
        assert self.bytes_read <= budget + inodes * (WINDOW_GAP_BYTES + block), self.bytes_read
        assert self.calls <= 4 * inodes + budget // 4, self.calls


def run(data: bytes) -> None:
    reader = Reader(data)
    size = len(data)
    extents = []
    try:
        extents = file_extents(reader.read_at, size)
        assert is_erofs(data)
    except ErofsError as error:
        check_message(error)
    reader.check_work()
    assert all(0 <= start < end <= size for start, end in extents)
    assert all(left[1] <= right[0] for left, right in pairwise(extents))
    position = 0
    for segment in segments_of_extents(size, extents):
        assert segment.offset == position
        assert sum(segment.cuts) == segment.length
        assert all(0 < cut <= CHUNK_BYTES_MAX for cut in segment.cuts)
        position += segment.length
    assert position == size


def seeds() -> Mapping[str, bytes]:
    return {"written": images.written(fingerprints=True), **images.drawn()}
