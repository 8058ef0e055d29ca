"""An image that is laid out but not written anywhere, as the source of an import.

Its bytes are put together as they are asked for: contents from where they are, metadata from the
plan. The plan puts metadata behind all contents, so that one pass does: contents are hashed for
their fingerprints from the very bytes that are stored, and once all are known the metadata follow.
(Hashing first and reading again would let a file that changes in between claim what it is not.)

Thread-safe: segments are read on any thread. Those that share a file take turns hashing it in its
order; segments are begun in order, so the one that is waited for is always under way.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from dedupstore.chunker import Segment, segments_of_extents
from dedupstore.erofs.writer import ContentDigest, ImagePlan, PlacedFile
from dedupstore.errors import SourceError

Cuts = Callable[[PlacedFile], Iterable[int]]
"""Offsets in the image, ascending, inside a file's blocks, where chunks should begin."""


def _no_cuts(_: PlacedFile) -> Iterable[int]:
    return ()


class _FileDigest:
    """The digest of one file on its way: `position` is how much of its blocks it has."""

    __slots__ = ("digest", "position")

    def __init__(self, placed: PlacedFile) -> None:
        self.digest = ContentDigest(placed.spans, placed.node.size)
        self.position = 0


class BuiltSource:
    """The image of a plan. `name` is what messages call it; see `sources.Source`."""

    def __init__(self, plan: ImagePlan, name: str, cuts: Cuts = _no_cuts) -> None:
        """`cuts`: beside every file's start and end, which are cuts always."""
        self.name = name
        self.size = plan.size
        self._plan = plan
        self._cuts = cuts
        self._starts = [placed.offset for placed in plan.files]
        self._metadata = b""
        # Guards what follows; notified when any of it changes.
        self._changed = threading.Condition()
        self._abandoned = False
        self._digests: dict[int, bytes] = {}
        self._partial: dict[int, _FileDigest] = {}
        self._wanted = sum(placed.fingerprinted for placed in plan.files)

    def segments(self) -> Iterator[Segment]:
        """Where to cut. The iterator waits for the contents to be read before it yields the
        metadata; it ends early when reading them failed."""
        plan = self._plan
        yield from segments_of_extents(plan.metadata_at, self._extents())
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned or len(self._digests) == self._wanted)
            if self._abandoned:
                return
        self._metadata = plan.metadata(self._digests)
        start = plan.metadata_at
        for segment in segments_of_extents(self.size - start, ()):
            yield replace(segment, offset=start + segment.offset)

    def _extents(self) -> Iterator[tuple[int, int]]:
        for placed in self._plan.files:
            start = placed.offset
            for cut in self._cuts(placed):
                if cut > start:
                    yield start, cut
                    start = cut
            yield start, placed.offset + placed.length

    def read_segment(self, offset: int, length: int) -> bytes:
        """See `Source`; hashes what it returns."""
        try:
            data = self.read_at(offset, length)
            if self._wanted:
                self._hash(offset, memoryview(data))
        except BaseException:  # whatever it was, others wait for these bytes' hash
            self.abandon()
            raise
        return data

    def read_at(self, offset: int, length: int) -> bytes:
        """See `Source`. Metadata can be read once `segments` has yielded them."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        view = memoryview(buffer)
        _copy(self._plan.head, 0, view, offset)
        for index, begin, end in self._overlapping(offset, len(buffer)):
            placed = self._plan.files[index]
            at = placed.offset + begin - offset
            try:
                with placed.node.content.opened() as read_into:
                    placed.fill(read_into, begin, view[at : at + end - begin])
            except SourceError as error:
                raise SourceError(f"{self.name}: {error}") from None
        _copy(self._metadata, self._plan.metadata_at, view, offset)
        return bytes(buffer)

    def _overlapping(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(index, begin, end) of the files with blocks in a range; bytes from the file's first."""
        index = max(bisect_right(self._starts, offset) - 1, 0)
        for number in range(index, len(self._starts)):
            placed = self._plan.files[number]
            begin = max(offset - placed.offset, 0)
            end = min(offset + length - placed.offset, placed.length)
            if placed.offset >= offset + length:
                return
            if begin < end:
                yield number, begin, end

    def _hash(self, offset: int, data: memoryview) -> None:
        for index, begin, end in self._overlapping(offset, len(data)):
            placed = self._plan.files[index]
            if not placed.fingerprinted:
                continue
            at = placed.offset + begin - offset
            part = data[at : at + end - begin]
            if len(part) == placed.length:
                digest = ContentDigest(placed.spans, placed.node.size)
                digest.update(part)
                self._finish(index, digest)
            else:
                self._hash_in_turn(index, begin, part)

    def _hash_in_turn(self, index: int, begin: int, part: memoryview) -> None:
        """Hash a part of a file once all before it is hashed."""
        placed = self._plan.files[index]
        with self._changed:
            partial = self._partial.setdefault(index, _FileDigest(placed))
            self._changed.wait_for(lambda: self._abandoned or partial.position == begin)
            if self._abandoned:
                return
        partial.digest.update(part)  # nobody else's turn until the position moves
        if begin + len(part) == placed.length:
            self._finish(index, partial.digest)
        with self._changed:
            partial.position += len(part)
            self._changed.notify_all()

    def _finish(self, index: int, digest: ContentDigest) -> None:
        value = digest.digest()
        with self._changed:
            self._digests[index] = value
            self._partial.pop(index, None)
            if len(self._digests) == self._wanted:
                self._changed.notify_all()

    def abandon(self) -> None:
        """See `Source`."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()


def _copy(source: bytes, start: int, target: memoryview, offset: int) -> None:
    """Copy what of `source`, at `start` in the image, `target`, at `offset`, takes."""
    begin, end = max(start, offset), min(start + len(source), offset + len(target))
    if begin < end:
        target[begin - offset : end - offset] = source[begin - start : end - start]
