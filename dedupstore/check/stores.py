"""Another store as a source of lost contents, opened for reading only. See `sources.Origin`."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from dedupstore import format as fmt
from dedupstore.check.salvage import salvage
from dedupstore.check.sources import Found, Place
from dedupstore.chunker import Segment
from dedupstore.constants import EXTENT_SEGMENT_BYTES
from dedupstore.env import DATA_FILE, Environment
from dedupstore.errors import DedupError, SourceError, StoreDamagedError
from dedupstore.frames import find_chunk, read_head
from dedupstore.outline import chunks_of
from dedupstore.pages import verify_pages
from dedupstore.sources import Source
from dedupstore.values import salvage_value

_FRAMES_CACHED = 64


class StoreOrigin:
    """Another store, of any version that can be read."""

    def __init__(self, path: Path) -> None:
        for finding in verify_pages(path / DATA_FILE).findings:
            raise SourceError(f"{path}: cannot be read, {finding} (repair it first)")
        self._env = Environment(path, read_only=True)
        try:
            with self._env.read() as txn, suppress(StoreDamagedError):
                record = txn.get(fmt.SUPERBLOCK_KEY, db=self._env.meta) or b""
                superblock = fmt.decode_superblock(record)
                fmt.check_superblock(superblock, str(path), writing=False)
        except BaseException:
            self._env.close()
            raise

    def chunks(self, wanted: set[bytes], places: Sequence[Place]) -> Iterator[Found]:  # noqa: ARG002
        """See `Origin`. By the index first, then by every frame's own table."""
        left = set(wanted)
        for frame, digests in sorted(self._indexed(wanted).items()):
            for digest, data in _contents(self._env, frame):
                if digest in digests and digest in left:
                    left.discard(digest)
                    yield digest, data
        if not left:
            return
        for frame in self._with_any(left):
            for digest, data in _contents(self._env, frame):
                if digest in left:
                    left.discard(digest)
                    yield digest, data

    def _indexed(self, wanted: set[bytes]) -> dict[int, set[bytes]]:
        frames: defaultdict[int, set[bytes]] = defaultdict(set)
        with self._env.read() as txn:
            for digest in wanted:
                with suppress(StoreDamagedError):
                    ref = find_chunk(txn, self._env, digest)
                    if ref is not None:
                        frames[ref >> fmt.REF_SLOT_BITS].add(digest)
        return frames

    def _with_any(self, wanted: set[bytes]) -> list[int]:
        """The frames whose tables name one of `wanted`."""
        found = []
        with self._env.read() as txn:
            for key in txn.cursor(db=self._env.frames).iternext(values=False):
                with suppress(StoreDamagedError):
                    frame = fmt.decode_frame_key(key)
                    head, _ = read_head(txn, self._env, frame) or (b"", 0)
                    header = fmt.decode_frame_header(head, frame)
                    if any(slot.digest in wanted for slot in header.slots):
                        found.append(frame)
        return found

    def image(self, digest: bytes, ours: Environment) -> tuple[Source, Iterable[Segment]] | None:
        """See `Origin`."""
        outline = self._outline(digest)
        if outline is None:
            return None
        source = _StoredImage(outline, _Pieces(ours), _Pieces(self._env))
        return source, source.segments()

    def _outline(self, digest: bytes) -> _Outline | None:
        """An image's chunks, if its manifest and the tables of its frames agree with its digest."""
        outline = _Outline(digest)
        with self._env.read() as txn:
            record = txn.get(digest, db=self._env.manifests)
            if record is None:
                return None
            try:
                manifest = fmt.decode_manifest(record, digest)
                for length, chunk, _ in chunks_of(txn, self._env, manifest):
                    outline.add(length, chunk)
            except DedupError:
                return None
        return outline if outline.is_right() else None

    def record(self, name: bytes) -> fmt.ImageRecord | None:
        """See `Origin`."""
        with self._env.read() as txn, suppress(StoreDamagedError):
            record = txn.get(name, db=self._env.images)
            return None if record is None else fmt.decode_image(record, name)
        return None

    def names(self) -> Iterator[tuple[bytes, fmt.ImageRecord]]:
        """See `Origin`."""
        with self._env.read() as txn:
            for key, record in txn.cursor(db=self._env.images):
                with suppress(StoreDamagedError):
                    yield bytes(key), fmt.decode_image(record, bytes(key))

    def close(self) -> None:
        """See `Origin`."""
        self._env.close()


class _Outline:
    """The chunks of an image in order, holes left out: offsets, lengths and digests."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.size = 0
        self.chunks: list[tuple[int, int, bytes]] = []
        self._hasher = fmt.ImageDigest()

    def add(self, length: int, digest: bytes) -> None:
        """Append a chunk, or a hole (ZERO_DIGEST)."""
        self._hasher.add(length, digest)
        if digest != fmt.ZERO_DIGEST:
            self.chunks.append((self.size, length, digest))
        self.size += length

    def is_right(self) -> bool:
        """Whether it is the outline of its image; asked once, at the end."""
        return self._hasher.finish() == self.digest


class _StoredImage:
    """An image of another store as what an import reads, taken from our own store where it can be:
    either of them may have lost what the other has."""

    def __init__(self, outline: _Outline, *stores: _Pieces) -> None:
        self.name = f"image {outline.digest.hex()[:16]}"
        self.size = outline.size
        self._chunks = outline.chunks
        self._stores = stores

    def segments(self) -> Iterator[Segment]:
        """Cut as it was cut when it was imported first."""
        begin, cuts = 0, list[int]()
        for offset, length, _ in self._chunks:
            if cuts and (begin + sum(cuts) != offset or sum(cuts) >= EXTENT_SEGMENT_BYTES):
                yield Segment(begin, sum(cuts), tuple(cuts))
                cuts = []
            if not cuts:
                begin = offset
            cuts.append(length)
        if cuts:
            yield Segment(begin, sum(cuts), tuple(cuts))

    def read_segment(self, offset: int, length: int) -> bytes:
        """See `Source`. Raises SourceError for a chunk that neither store has."""
        parts = []
        at = bisect_right(self._chunks, offset, key=lambda chunk: chunk[0]) - 1
        while length > 0:
            _, size, digest = self._chunks[at]
            found = (store.find(digest) for store in self._stores)
            data = next((data for data in found if data is not None), None)
            if data is None:
                raise SourceError(f"{self.name}: chunk at byte {offset} is nowhere")
            parts.append(data)
            offset, length, at = offset + size, length - size, at + 1
        return b"".join(parts)

    def read_at(self, offset: int, length: int) -> bytes:
        """See `Source`: an import asks for whole chunks."""
        return self.read_segment(offset, length)

    def abandon(self) -> None:
        """Nobody waits."""


class _Pieces:
    """Single chunks of a store by digest, through a cache of a few frames. Thread-safe."""

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._frame = lru_cache(_FRAMES_CACHED)(self._load)

    def find(self, digest: bytes) -> bytes | None:
        """The chunk's bytes, if they are here and sound."""
        with self._env.read() as txn, suppress(StoreDamagedError):
            ref = find_chunk(txn, self._env, digest)
            return None if ref is None else self._frame(ref >> fmt.REF_SLOT_BITS).get(digest)
        return None

    def _load(self, frame: int) -> dict[bytes, bytes]:
        return dict(_contents(self._env, frame))


def _contents(env: Environment, frame: int) -> Iterator[Found]:
    """The chunks of a frame that are sound."""
    with env.read() as txn:
        record = salvage_value(txn, env, env.frames, fmt.frame_key(frame))
    if record is not None:
        held = salvage(record, frame, {})
        for slot, data in held.found.items():
            yield held.known[slot].digest, data
