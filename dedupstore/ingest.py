"""Reading an image into the store: cut, hash, look up, compress.

Owns the import's pipeline; `staging` owns what is written and the crash rules. Worker threads read
and hash segments and compress frames (both release the GIL); the calling thread keeps the order.
One `Ingest` serves one import and one calling thread; any number of imports, in any number of
processes, may run on one store.
"""

from __future__ import annotations

import os
import uuid
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.chunker import (
    Segment,
    cut,
    segments_of_data,
    segments_of_extents,
)
from dedupstore.constants import FRAME_SLOTS_MAX, METADATA_FRAME_BYTES_MAX
from dedupstore.env import Environment
from dedupstore.erofs import file_extents, is_erofs
from dedupstore.errors import ErofsError, SourceError
from dedupstore.frames import Codecs, FrameBuilder, NewFrame, encode_new, find_chunk
from dedupstore.imported import Imported
from dedupstore.leases import Leases, session_byte
from dedupstore.sources import FileSource, Source
from dedupstore.staging import Publish, Reused, Staging, provisional_ref

# Segments that may be hashed ahead of the calling thread, and frames that may wait for compression.
_SEGMENTS_AHEAD = 16
_FRAMES_AHEAD = 32
# Bytes of compressed metadata that are held back: those of images up to some GB.
_WAITING_BYTES_MAX = 16 << 20


@dataclass(slots=True)
class _Hashed:
    """A chunk as the workers hand it over; `data` only when the store did not know it: a part of
    its segment, which it keeps in memory until its frame is compressed."""

    length: int
    digest: bytes
    ref: int = 0
    data: fmt.Buffer = b""
    is_metadata: bool = False


@dataclass(slots=True)
class _OpenFrame:
    """A frame being collected, and its provisional number."""

    builder: FrameBuilder
    number: int = 0


def plan(source: FileSource) -> tuple[int, Iterable[Segment]]:
    """The image's kind (fmt.KIND_*) and its segments.

    An image whose EROFS metadata is malformed is imported like any other raw image.
    """
    if is_erofs(source.read_at(0, 2048)):
        try:
            extents = file_extents(source.read_at, source.size)
            segments = segments_of_extents(source.size, extents, source.data_regions())
            return fmt.KIND_EROFS, segments
        except ErofsError:
            pass
    return fmt.KIND_RAW, segments_of_data(source.data_regions())


class Ingest:
    """One import of one source."""

    def __init__(self, env: Environment, leases: Leases, source: Source) -> None:
        self._env = env
        self._leases = leases
        self._source = source
        self._session = uuid.uuid4().bytes
        self._codecs = Codecs()
        # The image so far: one entry per chunk, holes merged, references maybe provisional.
        self._lengths = array("Q")
        self._refs = array("Q")
        self._position = 0
        self._digest = fmt.ImageDigest()
        self._known: dict[bytes, int] = {}
        self._unique_bytes = self._zero_bytes = 0
        # Metadata lies in frames of its own: looking at many files takes few of them then. In
        # images of mkfs.erofs it lies between the contents.
        self._contents = _OpenFrame(FrameBuilder(FRAME_SLOTS_MAX))
        self._metadata = _OpenFrame(FrameBuilder(FRAME_SLOTS_MAX, METADATA_FRAME_BYTES_MAX))
        self._frames_begun = 0
        # Metadata's frames wait for the end, and so lie one behind the other: in the store's file,
        # and in packs.
        self._waiting: list[tuple[int, NewFrame]] = []
        self._waiting_bytes = 0
        self._encoding: deque[tuple[_OpenFrame, int, Future[NewFrame]]] = deque()
        self._staging = Staging(env, source, self._codecs, self._session)
        self._new_chunks = self._new_bytes = 0

    def run(
        self,
        segments: Iterable[Segment],
        publish: Publish,
        on_progress: Callable[[int], None],
    ) -> Imported:
        """Store the source, cut into `segments` (ascending; what lies between them are zeros), and
        `publish` it; `on_progress` gets the bytes done since the last call.

        Raises what `publish` raises, SourceError, StoreFullError; the store is then as it was,
        except for chunks that the next gc reclaims.
        """
        self._leases.take(session_byte(self._session))
        pool = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)))
        try:
            for offset, hashed in self._hash_ahead(pool, segments):
                self._absorb_hole(offset - self._position)
                for chunk in hashed:
                    self._absorb(pool, chunk)
                on_progress(self._position - offset)
            self._absorb_hole(self._source.size - self._position)
            self._finish_frames(pool)
            return self._commit(publish)
        finally:
            self._source.abandon()
            pool.shutdown(cancel_futures=True)
            self._staging.close()
            self._leases.release(session_byte(self._session))

    # --- workers ---

    def _hash_ahead(
        self, pool: ThreadPoolExecutor, segments: Iterable[Segment]
    ) -> Iterator[tuple[int, list[_Hashed]]]:
        """Hash segments on the pool, a few ahead, and yield (offset, chunks) in image order."""
        ahead: deque[tuple[int, Future[list[_Hashed]]]] = deque()
        for segment in segments:
            ahead.append((segment.offset, pool.submit(self._hash, segment)))
            if len(ahead) > _SEGMENTS_AHEAD:
                offset, future = ahead.popleft()
                yield offset, future.result()
        for offset, future in ahead:
            yield offset, future.result()

    def _hash(self, segment: Segment) -> list[_Hashed]:
        """Read, cut, hash and look up one segment. Runs on a worker."""
        data = memoryview(self._source.read_segment(segment.offset, segment.length))
        if len(data) != segment.length:
            raise SourceError(
                f"{self._source.name}: became shorter while it was imported "
                f"({segment.offset + len(data)} bytes)"
            )
        known = self._known
        chunks: list[_Hashed] = []
        with self._env.read() as txn:
            for number, (length, piece) in enumerate(cut(segment, data)):
                if piece is None:
                    chunks.append(_Hashed(length, fmt.ZERO_DIGEST))
                    continue
                digest = blake3(piece).digest()
                if digest in known:
                    chunks.append(_Hashed(length, digest))
                elif ref := find_chunk(txn, self._env, digest):
                    chunks.append(_Hashed(length, digest, ref))
                else:
                    is_metadata = number in segment.metadata
                    chunks.append(_Hashed(length, digest, 0, piece, is_metadata))
        return chunks

    # --- the calling thread: image order ---

    def _absorb_hole(self, length: int) -> None:
        if length <= 0:
            return
        self._digest.add(length, fmt.ZERO_DIGEST)
        self._zero_bytes += length
        self._position += length
        if self._refs and self._refs[-1] == fmt.REF_HOLE:
            self._lengths[-1] += length
        else:
            self._lengths.append(length)
            self._refs.append(fmt.REF_HOLE)

    def _absorb(self, pool: ThreadPoolExecutor, chunk: _Hashed) -> None:
        """Append a chunk to the image, to the reused ones or to the frame being built."""
        if chunk.digest == fmt.ZERO_DIGEST:
            self._absorb_hole(chunk.length)
            return
        ref = self._known.get(chunk.digest)
        if ref is None:
            ref = chunk.ref
            if ref:
                self._staging.reuse(Reused(chunk.digest, ref, self._position, chunk.length))
            else:
                ref = self._add_new(pool, chunk)
            self._known[chunk.digest] = ref
            self._unique_bytes += chunk.length
        self._digest.add(chunk.length, chunk.digest)
        self._lengths.append(chunk.length)
        self._refs.append(ref)
        self._position += chunk.length

    def _add_new(self, pool: ThreadPoolExecutor, chunk: _Hashed) -> int:
        frame = self._metadata if chunk.is_metadata else self._contents
        if not frame.builder.fits(chunk.length):
            self._submit_frame(pool, frame)
        if not frame.builder:
            frame.number = self._frames_begun
            self._frames_begun += 1
        slot = frame.builder.add(chunk.digest, chunk.data)
        self._new_chunks += 1
        self._new_bytes += chunk.length
        return provisional_ref(frame.number, slot)

    def _submit_frame(self, pool: ThreadPoolExecutor, frame: _OpenFrame) -> None:
        slots, parts = frame.builder.take()
        future = pool.submit(encode_new, self._codecs, slots, parts)
        self._encoding.append((frame, frame.number, future))
        while self._encoding and (
            len(self._encoding) > _FRAMES_AHEAD or self._encoding[0][2].done()
        ):
            self._stage(*self._encoding.popleft())

    def _stage(self, frame: _OpenFrame, number: int, encoding: Future[NewFrame]) -> None:
        encoded = encoding.result()
        if frame is self._contents:
            self._staging.add(number, encoded)
            return
        self._waiting.append((number, encoded))
        self._waiting_bytes += len(encoded.record)
        if self._waiting_bytes > _WAITING_BYTES_MAX:
            self._stage_waiting()

    def _stage_waiting(self) -> None:
        for number, encoded in self._waiting:
            self._staging.add(number, encoded)
        self._waiting, self._waiting_bytes = [], 0

    def _finish_frames(self, pool: ThreadPoolExecutor) -> None:
        for frame in (self._metadata, self._contents):
            if frame.builder:
                self._submit_frame(pool, frame)
        while self._encoding:
            self._stage(*self._encoding.popleft())
        self._stage_waiting()

    def _commit(self, publish: Publish) -> Imported:
        digest = self._digest.finish()
        manifest = self._staging.commit(digest, self._manifest, publish)
        return Imported(
            digest,
            manifest.size,
            manifest.chunks,
            manifest.unique_bytes,
            manifest.zero_bytes,
            self._new_chunks,
            self._new_bytes,
            self._staging.stored_bytes,
        )

    def _manifest(self, resolve: Callable[[int], int]) -> fmt.ManifestRecord:
        """The finished image's columns: final references, consecutive slots merged into runs."""
        lengths, refs, counts = array("Q"), array("Q"), array("I")
        follows = -1
        for length, ref in zip(self._lengths, map(resolve, self._refs), strict=True):
            if ref == follows:
                lengths[-1] += length
                counts[-1] += 1
            else:
                lengths.append(length)
                refs.append(ref)
                counts.append(1 if ref else 0)
            follows = ref + 1 if ref else -1
        return fmt.ManifestRecord(
            self._source.size,
            sum(counts),
            self._unique_bytes,
            self._zero_bytes,
            lengths,
            refs,
            counts,
        )
