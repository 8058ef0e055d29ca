"""The file of an image as a source of lost contents. See `sources.Origin`."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.check.sources import Found, Place
from dedupstore.chunker import Segment, cut
from dedupstore.env import Environment
from dedupstore.ingest import plan
from dedupstore.sources import FileSource, Source

_SEGMENTS_AHEAD = 16


class FileOrigin:
    """An image file or block device, which may hold what a damaged image held, or nearly."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self._digest: bytes | None = None

    def chunks(self, wanted: set[bytes], places: Sequence[Place]) -> Iterator[Found]:
        """See `Origin`. First where the images had them; what is not there may be anywhere: then
        the file is read as an import reads it."""
        left = set(wanted)
        for place in sorted(places, key=lambda place: place.offset):
            if place.digest in left:
                data = self._source.read_at(place.offset, place.length)
                if blake3(data).digest() == place.digest:
                    left.discard(place.digest)
                    yield place.digest, data
        if left:
            yield from self._survey(left)

    def _survey(self, wanted: set[bytes]) -> Iterator[Found]:
        """Cut and hash the whole file; yield what is wanted, and note the image's digest."""
        hasher = fmt.ImageDigest()
        position = 0
        left = set(wanted)
        for offset, hashed in self._hashed(frozenset(wanted)):
            if offset > position:
                hasher.add(offset - position, fmt.ZERO_DIGEST)
                position = offset
            for length, digest, data in hashed:
                hasher.add(length, digest)
                position += length
                if digest in left:
                    left.discard(digest)
                    yield digest, data
        if self._source.size > position:
            hasher.add(self._source.size - position, fmt.ZERO_DIGEST)
        self._digest = hasher.finish()

    def _hashed(
        self, wanted: frozenset[bytes]
    ) -> Iterator[tuple[int, list[tuple[int, bytes, bytes]]]]:
        """(offset, chunks) of every segment, in order; a chunk's bytes only if it is wanted."""

        def work(segment: Segment) -> tuple[int, list[tuple[int, bytes, bytes]]]:
            data = memoryview(self._source.read_segment(segment.offset, segment.length))
            chunks = []
            for length, piece in cut(segment, data):
                digest = fmt.ZERO_DIGEST if piece is None else blake3(piece).digest()
                is_wanted = piece is not None and digest in wanted
                chunks.append((length, digest, bytes(piece) if is_wanted and piece else b""))
            return segment.offset, chunks

        ahead: deque[Future[tuple[int, list[tuple[int, bytes, bytes]]]]] = deque()
        with _workers() as pool:
            for segment in plan(self._source)[1]:
                ahead.append(pool.submit(work, segment))
                if len(ahead) > _SEGMENTS_AHEAD:
                    yield ahead.popleft().result()
            for future in ahead:
                yield future.result()

    def image(self, digest: bytes, ours: Environment) -> tuple[Source, Iterable[Segment]] | None:  # noqa: ARG002
        """See `Origin`: the file's own bytes, if they are that image's, cut alike."""
        if self._digest is None:
            for _ in self._survey(set()):
                pass
        return (self._source, plan(self._source)[1]) if self._digest == digest else None

    def record(self, name: bytes) -> fmt.ImageRecord | None:  # noqa: ARG002
        """See `Origin`: a file knows no names."""
        return None

    def names(self) -> Iterator[tuple[bytes, fmt.ImageRecord]]:
        """See `Origin`: a file knows no names."""
        return iter(())

    def close(self) -> None:
        """See `Origin`."""
        self._source.close()


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
