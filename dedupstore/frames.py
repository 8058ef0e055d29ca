"""Chunk bytes at rest: databases `frames` and `chunks` (docs/format.md, "Frames").

Owns loading a frame with verification, and the writer's side: storing frames under fresh numbers,
looking chunks up by digest, keeping the totals. It decides nothing about caching, roots or cuts.
`FrameLoader` is thread-safe; the functions that take a write transaction run inside the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import lmdb
import zstandard

from dedupstore import format as fmt, places
from dedupstore.constants import COMPRESSION_GAIN_MIN, FRAME_BYTES_MAX, FRAME_SLOTS_MAX, ZSTD_LEVEL
from dedupstore.env import Environment
from dedupstore.errors import ChunkDamagedError, DedupError, StoreDamagedError
from dedupstore.values import read_beginning, read_value

TOTALS_KEY = b"totals"
_HEAD_BYTES_MAX = 16 + 36 * FRAME_SLOTS_MAX


class Codecs:
    """zstd contexts, which are expensive to make and not thread-safe, handed out one by one.

    Thread-safe: `list.pop` and `list.append` are atomic.
    """

    def __init__(self, level: int = ZSTD_LEVEL) -> None:
        """`level` is zstd's, of what is encoded."""
        self._level = level
        self._compressors: list[zstandard.ZstdCompressor] = []
        self._decompressors: list[zstandard.ZstdDecompressor] = []

    def encode(self, slots: Sequence[fmt.Slot], raw: bytes) -> bytearray:
        """A frame's record, unsealed. Releases the GIL while it compresses."""
        compressor = (
            self._compressors.pop()
            if self._compressors
            else zstandard.ZstdCompressor(level=self._level)
        )
        record = fmt.encode_frame(slots, raw, compressor, COMPRESSION_GAIN_MIN)
        self._compressors.append(compressor)
        return record

    def decode(self, record: fmt.Buffer, frame: int) -> bytes:
        """Raw bytes of a verified record. Releases the GIL while it decompresses."""
        decompressor = (
            self._decompressors.pop() if self._decompressors else zstandard.ZstdDecompressor()
        )
        raw = fmt.decode_frame_payload(record, frame, decompressor)
        self._decompressors.append(decompressor)
        return raw


class Fetches(Protocol):
    """What brings frames whose bytes are in a remote (remote.fetching)."""

    def fetch(self, frame: int) -> fmt.Buffer:
        """The frame's record with its bytes."""

    def reached(self, frame: int) -> None:
        """Note that the frame is about to be loaded, wherever its bytes are."""

    def is_next(self, frame: int) -> bool:
        """Whether the frame goes on where somebody reads a remote in order."""

    def want(self, frames: Sequence[int]) -> None:
        """Begin to fetch those of the frames that are elsewhere."""


class FrameLoader:
    """Loads frames for a cache. Counts what it loads; counts are exact (see `_count`)."""

    def __init__(self, env: Environment, fetcher: Callable[[], Fetches], touched: set[int]) -> None:
        """`fetcher` is asked for when a frame's bytes are in a remote. In a store that has one, the
        numbers of loaded frames go into `touched`, for whoever notes when they were last used."""
        self._env = env
        self._fetcher = fetcher
        self._touched = touched
        self._codecs = Codecs()
        self.frames_loaded = 0
        self.chunks_loaded = 0

    def load(self, frame: int) -> tuple[bytes, tuple[int, ...]]:
        """Raw bytes and slot offsets of a frame.

        Raises ChunkDamagedError when the frame is missing, cannot be read, fails its checksum or
        does not decompress, what `fetch` raises, and the translated error when LMDB fails.
        """
        if self._env.remote is not None:
            self._fetcher().reached(frame)
            self._touched.add(frame)
        record: fmt.Buffer = self._stored(frame)
        if fmt.is_distant(record):
            record = memoryview(self._fetcher().fetch(frame))
        offsets = fmt.decode_frame_offsets(record, frame)
        raw = self._codecs.decode(record, frame)
        self._count(len(offsets) - 1)
        return raw, offsets

    def _stored(self, frame: int) -> memoryview:
        """A frame's record as it is here, verified. Raises as `load` does."""
        # Apart from `load`, whose locals live on in the traceback of a failed fetch: a transaction
        # among them would keep its place in LMDB's reader table.
        env = self._env
        try:
            with env.raw.begin(buffers=True) as txn:
                record = read_frame(txn, env, frame)
            if record is None:
                raise ChunkDamagedError(frame, "is missing from the store")
        except lmdb.Error as error:
            raise env.translate(error) from error
        fmt.verify_frame(record, frame)
        return record

    def expect(self, frames: Sequence[int]) -> None:
        """Note that all of these frames are about to be loaded. Never raises."""
        if self._env.remote is not None:
            self._fetcher().want(frames)

    def is_worth_loading_ahead(self, frame: int) -> bool:
        """Whether a frame that may be needed soon should be loaded now: not across a network,
        unless somebody is reading there in order. Never raises."""
        env = self._env
        if env.remote is None:
            return True
        try:
            with env.read() as txn:
                head = read_head(txn, env, frame)
            distant = head is not None and fmt.is_distant(head[0])
            return not distant or self._fetcher().is_next(frame)
        except DedupError:
            return False

    def _count(self, chunks: int) -> None:
        # Exact without a lock: CPython (3.11 to 3.13) hands the GIL over at calls and backward
        # jumps only, and there is none between the load and the store of `+=`.
        self.frames_loaded += 1
        self.chunks_loaded += chunks


def read_frame(txn: lmdb.Transaction, env: Environment, frame: int) -> memoryview | None:
    """A frame's record; None if there is none. Raises ChunkDamagedError: the disk does not give
    it."""
    try:
        record = read_value(txn, env, env.frames, fmt.frame_key(frame))
    except OSError as error:
        raise ChunkDamagedError(frame, f"cannot be read: {error.strerror}") from None
    return None if record is None else memoryview(record)


def read_totals(txn: lmdb.Transaction, env: Environment) -> fmt.Totals:
    """The running sums as of this snapshot."""
    record = txn.get(TOTALS_KEY, db=env.meta)
    if record is None:
        raise StoreDamagedError(f"{env.path}: totals are missing (run 'dedupstore check --repair')")
    return fmt.decode_totals(record)


def write_totals(txn: lmdb.Transaction, env: Environment, totals: fmt.Totals) -> None:
    """Replace the running sums."""
    txn.put(TOTALS_KEY, fmt.encode_totals(totals), db=env.meta)


def read_head(txn: lmdb.Transaction, env: Environment, frame: int) -> tuple[bytes, int] | None:
    """A frame's record as far as its header goes, or beyond, and the record's length; None if there
    is none. Raises ChunkDamagedError: the disk does not give it."""
    try:
        return read_beginning(txn, env, env.frames, fmt.frame_key(frame), _HEAD_BYTES_MAX)
    except OSError as error:
        raise ChunkDamagedError(frame, f"cannot be read: {error.strerror}") from None


def measure(record: fmt.Buffer, frame: int, record_bytes: int | None = None) -> fmt.Totals:
    """What one frame adds to the totals, as its header says, which need not be sound. `record` may
    end behind the header; `record_bytes` is its whole length then."""
    try:
        header = fmt.decode_frame_header(record, frame)
    except StoreDamagedError:
        return fmt.Totals(frame + 1)
    present = sum(slot.state == fmt.SLOT_PRESENT for slot in header.slots)
    return fmt.Totals(frame + 1, 1, present, header.raw_bytes, record_bytes or len(record))


def count_totals(txn: lmdb.Transaction, env: Environment, frame_next: int) -> fmt.Totals:
    """The totals as one snapshot's frames give them. A damaged frame counts as it is kept; the next
    frame number is `frame_next` or beyond the last frame."""
    counted = fmt.Totals(frame_next)
    for key in txn.cursor(db=env.frames).iternext(values=False):
        if len(key) == fmt.FRAME_KEY_BYTES:
            frame = fmt.decode_frame_key(key)
            head, record_bytes = read_head(txn, env, frame) or (b"", 0)
            one = measure(head, frame, record_bytes)
            counted = fmt.Totals(
                max(counted.frame_next, one.frame_next),
                counted.frames + one.frames,
                counted.chunks + one.chunks,
                counted.unique_bytes + one.unique_bytes,
                counted.stored_bytes + one.stored_bytes,
            )
    return counted


@dataclass(frozen=True, slots=True)
class Distant:
    """What is in remotes and not here: frames, their chunks and these chunks' bytes."""

    frames: int = 0
    chunks: int = 0
    bytes: int = 0


def count_distant(txn: lmdb.Transaction, env: Environment) -> Distant:
    """What a snapshot has in remotes only. Reads the head of every frame that has a place."""
    if env.remote is None:
        return Distant()
    frames = chunks = size = 0
    for key in txn.cursor(db=env.remote.places).iternext(values=False):
        frame = fmt.decode_frame_key(key)
        head, _ = read_head(txn, env, frame) or (b"", 0)
        if fmt.is_distant(head):
            slots = fmt.decode_frame_header(head, frame).slots
            there = [slot.length for slot in slots if slot.state == fmt.SLOT_DISTANT]
            frames, chunks, size = frames + 1, chunks + len(there), size + sum(there)
    return Distant(frames, chunks, size)


def find_chunk(txn: lmdb.Transaction, env: Environment, digest: bytes) -> int | None:
    """Reference of the stored chunk with this digest, or None."""
    value = txn.get(digest, db=env.chunks)
    return None if value is None else fmt.decode_index(digest, value)


@dataclass(frozen=True, slots=True)
class NewFrame:
    """A frame ready to be stored: its slots, raw length in bytes and unsealed record."""

    slots: tuple[fmt.Slot, ...]
    raw_bytes: int
    record: bytearray


@dataclass(frozen=True, slots=True)
class Dropped:
    """What `FrameWriter.retain` did: chunks removed, record bytes given back, whole frame gone."""

    chunks: int
    bytes: int
    removed: bool


class FrameWriter:
    """Stores and removes frames inside one write transaction, keeping index and totals in step.

    `close` writes the totals; a transaction that is rolled back needs no `close`.
    """

    def __init__(self, txn: lmdb.Transaction, env: Environment) -> None:
        self._txn = txn
        self._env = env
        self._totals = read_totals(txn, env)

    def store(self, new: NewFrame) -> int:
        """Store a frame whose digests are not in the index; return its number."""
        totals = self._totals
        frame = totals.frame_next
        fmt.seal_frame(new.record, frame)
        if not self._txn.put(fmt.frame_key(frame), new.record, db=self._env.frames, append=True):
            raise self._holds_beyond(frame)
        for slot, entry in enumerate(new.slots):
            value = fmt.encode_index(entry.digest, fmt.make_ref(frame, slot))
            self._txn.put(entry.digest, value, db=self._env.chunks)
        self._totals = replace(
            totals,
            frame_next=frame + 1,
            frames=totals.frames + 1,
            chunks=totals.chunks + len(new.slots),
            unique_bytes=totals.unique_bytes + new.raw_bytes,
            stored_bytes=totals.stored_bytes + len(new.record),
        )
        return frame

    def replace(self, frame: int, record: bytearray | None) -> int:
        """Put an unsealed record in the place of a frame that may be damaged, None: remove it;
        return the bytes that it took. The index is the caller's business."""
        key = fmt.frame_key(frame)
        old = read_head(self._txn, self._env, frame)
        before = fmt.Totals() if old is None else measure(old[0], frame, old[1])
        after = fmt.Totals() if record is None else measure(memoryview(record), frame)
        if record is not None:
            fmt.seal_frame(record, frame)
            self._txn.put(key, record, db=self._env.frames)
        elif old is not None:
            self._forget(frame, old[0])
            self._txn.delete(key, db=self._env.frames)
        totals = self._totals
        self._totals = replace(
            totals,
            frames=totals.frames - before.frames + after.frames,
            chunks=totals.chunks - before.chunks + after.chunks,
            unique_bytes=totals.unique_bytes - before.unique_bytes + after.unique_bytes,
            stored_bytes=totals.stored_bytes - before.stored_bytes + after.stored_bytes,
        )
        return before.stored_bytes

    def _forget(self, frame: int, head: fmt.Buffer) -> None:
        """Drop what leads to a frame that goes, beyond the index. Its header need not be sound."""
        with suppress(StoreDamagedError):
            places.forget_frame(self._txn, self._env, frame, fmt.decode_frame_header(head, frame))

    @property
    def frame_next(self) -> int:
        """The number of the next frame that is stored."""
        return self._totals.frame_next

    def store_distant(
        self, frames: Sequence[tuple[Sequence[fmt.Slot], places.PlaceRecord]]
    ) -> None:
        """Store frames whose bytes are in a remote, under the numbers from `frame_next` on. Slots
        that are not dropped become distant; they are in neither index."""
        totals = self._totals
        remote = self._env.ensure_remote(self._txn)
        numbered = list(enumerate(frames, totals.frame_next))
        records = []
        for frame, (slots, _) in numbered:
            record = fmt.encode_distant_frame(slots)
            fmt.seal_frame(record, frame)
            records.append((fmt.frame_key(frame), bytes(record)))
        stored, _ = self._txn.cursor(db=self._env.frames).putmulti(records, append=True)
        if stored < len(records):
            raise self._holds_beyond(totals.frame_next)
        places.add_distant(
            self._txn, remote, ((frame, slots, where) for frame, (slots, where) in numbered)
        )
        self._totals = replace(
            totals,
            frame_next=totals.frame_next + len(records),
            frames=totals.frames + len(records),
            stored_bytes=totals.stored_bytes + sum(len(record) for _, record in records),
        )

    def _holds_beyond(self, frame: int) -> StoreDamagedError:
        return StoreDamagedError(
            f"{self._env.path}: holds a frame beyond number {frame} "
            "(run 'dedupstore check --repair')"
        )

    def restore(self, frame: int, record: bytearray) -> None:
        """Put a sound unsealed record into the place of a damaged frame of which nothing is in an
        index. Chunks that are in an index already keep their entries."""
        self.replace(frame, record)
        slots = fmt.decode_frame_header(memoryview(record), frame).slots
        self._index_present(frame, slots)
        if fmt.is_distant(bytes(record)):
            places.index_distant(self._txn, self._env.ensure_remote(self._txn), frame, slots)

    def _index_present(self, frame: int, slots: Sequence[fmt.Slot]) -> None:
        for at, slot in enumerate(slots):
            if slot.state == fmt.SLOT_PRESENT:
                value = fmt.encode_index(slot.digest, fmt.make_ref(frame, at))
                self._txn.put(slot.digest, value, db=self._env.chunks, overwrite=False)

    def fill(self, frame: int, record: bytearray) -> bool:
        """Put the bytes of a frame into its place, as an unsealed record with the slots that the
        frame has; False: it has been filled or has gone meanwhile. A chunk that is here already
        keeps its index entry."""
        head = read_head(self._txn, self._env, frame)
        if head is None or not fmt.is_distant(head[0]):
            return False
        remote = self._env.ensure_remote(self._txn)
        old = fmt.decode_frame_header(head[0], frame).slots
        places.forget_distant(self._txn, remote, frame, old)
        self.replace(frame, record)
        self._index_present(frame, fmt.decode_frame_header(memoryview(record), frame).slots)
        return True

    def empty(self, frame: int) -> int:
        """Drop the bytes of a frame, which has a place; return the bytes that this frees. Raises
        ChunkDamagedError."""
        head = read_head(self._txn, self._env, frame)
        if head is None or fmt.is_distant(head[0]):
            return 0
        slots = fmt.decode_frame_header(head[0], frame).slots
        if any(slot.state == fmt.SLOT_ABSENT for slot in slots):
            return 0
        record = fmt.encode_distant_frame(slots)
        for at, slot in enumerate(slots):
            if find_chunk(self._txn, self._env, slot.digest) == fmt.make_ref(frame, at):
                self._txn.delete(slot.digest, db=self._env.chunks)
        freed = self.replace(frame, record) - len(record)
        now = fmt.decode_frame_header(memoryview(record), frame).slots
        places.index_distant(self._txn, self._env.ensure_remote(self._txn), frame, now)
        return freed

    def retain(self, frame: int, live: int, codecs: Codecs) -> Dropped:
        """Remove a frame's chunks except those in the bit mask `live`, and the frame with the last.

        The remaining chunks keep their slots, so every reference to them stays valid. Slots that
        are not present are passed over: their chunks may have been stored again elsewhere.
        """
        key = fmt.frame_key(frame)
        record = self._txn.get(key, db=self._env.frames)
        if record is None:
            return Dropped(0, 0, removed=False)
        header = fmt.decode_frame_header(record, frame)
        dead = {slot for slot in range(len(header.slots)) if not live >> slot & 1}
        gone = {slot for slot in dead if header.slots[slot].state == fmt.SLOT_PRESENT}
        kept = len(dead) < len(header.slots)
        if kept and not gone:
            return Dropped(0, 0, removed=False)
        indexed = self._indexed_slots(record, header, frame)
        before, after, raw_after = len(record), 0, 0
        fresh = None
        if kept:
            fresh, raw_after = _without(record, header, frame, dead, codecs)
            after = len(fresh)
        # `record` lies in the map and is not valid after the first change below.
        for slot in gone & indexed:
            self._txn.delete(header.slots[slot].digest, db=self._env.chunks)
        if fresh is None:
            places.forget_frame(self._txn, self._env, frame, header)
            self._txn.delete(key, db=self._env.frames)
        else:
            self._txn.put(key, fresh, db=self._env.frames)
        totals = self._totals
        self._totals = replace(
            totals,
            frames=totals.frames - (not kept),
            chunks=totals.chunks - len(gone),
            unique_bytes=totals.unique_bytes - header.raw_bytes + raw_after,
            stored_bytes=totals.stored_bytes - before + after,
        )
        return Dropped(len(gone), before - after, removed=not kept)

    def _indexed_slots(self, record: fmt.Buffer, header: fmt.FrameHeader, frame: int) -> set[int]:
        """The slots that the index knows to be in this frame.

        A damaged header would leave index entries behind that lead nowhere, and imports would rely
        on them: where header and index disagree the record must prove sound. Raises
        ChunkDamagedError. In a sound one a chunk may have been stored again elsewhere.
        """
        indexed, present, raw_bytes = set(), set(), 0
        for i, slot in enumerate(header.slots):
            if find_chunk(self._txn, self._env, slot.digest) == fmt.make_ref(frame, i):
                indexed.add(i)
            if slot.state == fmt.SLOT_PRESENT:
                present.add(i)
                raw_bytes += slot.length
        if indexed != present or raw_bytes != header.raw_bytes:
            fmt.verify_frame(record, frame)
        return indexed

    def close(self) -> None:
        """Write the totals; the last step before the transaction commits."""
        write_totals(self._txn, self._env, self._totals)


def _without(
    record: fmt.Buffer, header: fmt.FrameHeader, frame: int, gone: set[int], codecs: Codecs
) -> tuple[bytearray, int]:
    """A sealed record without the chunks in `gone`, and its raw length."""
    fmt.verify_frame(record, frame)
    raw = codecs.decode(record, frame)
    offsets = fmt.decode_frame_offsets(record, frame)
    slots = [fmt.DROPPED if i in gone else slot for i, slot in enumerate(header.slots)]
    kept = b"".join(
        raw[offsets[i] : offsets[i] + slot.length]
        for i, slot in enumerate(slots)
        if slot.state == fmt.SLOT_PRESENT
    )
    fresh = codecs.encode(slots, kept)
    fmt.seal_frame(fresh, frame)
    return fresh, len(kept)


class FrameBuilder:
    """Collects chunks until a frame is full. Not thread-safe."""

    def __init__(self, slots_max: int, bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._slots_max = slots_max
        self._bytes_max = bytes_max
        self._slots: list[fmt.Slot] = []
        self._parts: list[fmt.Buffer] = []
        self._bytes = 0

    def fits(self, length: int) -> bool:
        """Whether another chunk of `length` bytes still belongs into this frame."""
        return len(self._slots) < self._slots_max and self._bytes + length <= self._bytes_max

    def add(self, digest: bytes, data: fmt.Buffer) -> int:
        """Append a chunk; return its slot."""
        self._slots.append(fmt.Slot(digest, len(data)))
        self._parts.append(data)
        self._bytes += len(data)
        return len(self._slots) - 1

    def __bool__(self) -> bool:
        return bool(self._slots)

    def take(self) -> tuple[tuple[fmt.Slot, ...], list[fmt.Buffer]]:
        """The collected slots and their bytes; the builder is empty afterwards."""
        taken = tuple(self._slots), self._parts
        self._slots, self._parts, self._bytes = [], [], 0
        return taken


def encode_new(
    codecs: Codecs, slots: tuple[fmt.Slot, ...], parts: Sequence[fmt.Buffer]
) -> NewFrame:
    """Compress collected chunks into a frame ready for `FrameWriter.store`."""
    raw = b"".join(parts)
    return NewFrame(slots, len(raw), codecs.encode(slots, raw))
