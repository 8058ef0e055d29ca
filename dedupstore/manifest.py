"""An image as packed arrays: where each byte of it lies.

Owns the in-memory form that reads are served from: two arrays of 8 bytes per run, and a run has one
chunk or more, and an index of at most 4 KiB; shared by every clone of an image. Pure; immutable
after construction, so any number of threads may read it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

from dedupstore.format import REF_HOLE, ManifestRecord

# The index has at most 2 to this power entries, of 4 bytes.
_INDEX_BITS = 10


class Manifest:
    """The runs of one image, in order.

    `starts[i]` is the offset of run i in bytes from the image's start, with one entry more, the
    image's size, at the end; `refs[i]` refers to the run's first chunk, 0 for a hole. `index[b]` is
    the run that holds the byte at b << `shift`: it leaves a search few runs to look at.
    """

    __slots__ = ("__weakref__", "digest", "index", "refs", "shift", "size", "starts")

    def __init__(self, digest: bytes, record: ManifestRecord) -> None:
        self.digest = digest
        self.size = record.size
        # Copies have no room to grow, with which an array made step by step is a sixteenth larger.
        self.starts = array("Q", accumulate(record.lengths, initial=0))[:]
        self.refs = record.refs[:]
        self.shift = max(self.size.bit_length() - _INDEX_BITS, 0)
        step = 1 << self.shift
        runs = (bisect_right(self.starts, at) - 1 for at in range(0, self.size + step, step))
        last = max(len(self.refs) - 1, 0)
        self.index = array("I", (min(run, last) for run in runs))

    @property
    def data_bytes(self) -> int:
        """What of the image is no hole."""
        starts = self.starts
        return sum(starts[i + 1] - starts[i] for i, ref in enumerate(self.refs) if ref)

    def run_at(self, offset: int) -> int:
        """Index of the run that holds `offset`, which must be inside the image."""
        at = offset >> self.shift
        return bisect_right(self.starts, offset, self.index[at], self.index[at + 1] + 1) - 1

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(start, length, reference) of the runs that touch [offset, offset+length), unclipped."""
        if length <= 0 or offset >= self.size:
            return
        starts, refs = self.starts, self.refs
        for i in range(self.run_at(offset), len(refs)):
            start = starts[i]
            if start >= offset + length:
                return
            yield start, starts[i + 1] - start, refs[i]

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """(start, length, is a hole) covering [offset, offset+length), neighbours of a kind merged.

        A zero-length request yields nothing. The last extent may reach beyond the request's end,
        never beyond the image's.
        """
        begin, end, hole = offset, offset, False
        for start, run_length, ref in self.runs(offset, length):
            is_hole = ref == REF_HOLE
            if end > begin and is_hole != hole:
                yield begin, end - begin, hole
                begin = end
            hole = is_hole
            end = start + run_length
        if end > begin:
            yield begin, end - begin, hole
