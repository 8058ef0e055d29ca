"""Frames, their slots, references to chunks and the index <-> bytes. Pure, thread-safe."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import zstandard
from xxhash import xxh3_64_intdigest

from dedupstore.constants import FRAME_BYTES_MAX, GRID_BYTES
from dedupstore.errors import ChunkDamagedError, StoreDamagedError
from dedupstore.format.guards import GUARD, ZERO_DIGEST, Buffer

CODEC_RAW = 0
CODEC_ZSTD = 1
# No payload: the bytes are in a remote, and every slot is SLOT_DISTANT or SLOT_DROPPED.
CODEC_DISTANT = 2

SLOT_PRESENT = 0
SLOT_ABSENT = 1
SLOT_DROPPED = 2
SLOT_DISTANT = 3
NOT_HERE = 1 << 60
_SLOT_STATE_SHIFT = 30
_SLOT_LENGTH_MASK = (1 << _SLOT_STATE_SHIFT) - 1

REF_SLOT_BITS = 16
REF_SLOT_MASK = (1 << REF_SLOT_BITS) - 1
REF_HOLE = 0
_FRAME = struct.Struct("<QBBHI")
_SLOT = struct.Struct("<32sI")
_INDEX = struct.Struct("<QI")
_FRAME_KEY = struct.Struct(">Q")
FRAME_KEY_BYTES = _FRAME_KEY.size
INDEX_BYTES = _INDEX.size
assert _FRAME.size == 16
assert _SLOT.size == 36
assert _INDEX.size == 12

# A frame cannot honestly claim more than this: bounds what a damaged or hostile record makes a
# decoder allocate.
FRAME_RAW_BYTES_LIMIT = 16 << 20


def frame_key(frame: int) -> bytes:
    """Key of a frame in database `frames`."""
    return _FRAME_KEY.pack(frame)


def decode_frame_key(key: Buffer) -> int:
    """Frame number of a key of database `frames`."""
    if len(key) != _FRAME_KEY.size:
        raise StoreDamagedError(f"frame key has {len(key)} bytes")
    return int(_FRAME_KEY.unpack(key)[0])


def make_ref(frame: int, slot: int) -> int:
    """Reference to a chunk: frame number and the chunk's place in it. 0 stands for a hole."""
    return frame << REF_SLOT_BITS | slot


def encode_index(digest: bytes, ref: int) -> bytes:
    """Value of database `chunks` for a digest: the reference and a guard over both."""
    return _INDEX.pack(ref, xxh3_64_intdigest(digest, ref) & 0xFFFFFFFF)


def decode_index(digest: bytes, value: Buffer) -> int:
    """Reference of a digest. The guard keeps a flipped bit from aliasing two chunks."""
    if len(value) != _INDEX.size:
        raise StoreDamagedError(f"index entry of chunk {bytes(digest).hex()[:16]} is malformed")
    ref, guard = _INDEX.unpack(value)
    if guard != xxh3_64_intdigest(digest, ref) & 0xFFFFFFFF:
        raise StoreDamagedError(
            f"index entry of chunk {bytes(digest).hex()[:16]} fails its checksum"
        )
    return int(ref)


@dataclass(frozen=True, slots=True)
class Slot:
    """One chunk of a frame: its digest, its length in bytes and whether its bytes are here."""

    digest: bytes
    length: int
    state: int = SLOT_PRESENT


DROPPED = Slot(ZERO_DIGEST, 0, SLOT_DROPPED)


def present(slot: Slot) -> Slot:
    """A slot once its bytes are here; one that was dropped stays so."""
    return slot if slot.state == SLOT_DROPPED else Slot(slot.digest, slot.length)


def encode_frame(
    slots: Sequence[Slot], raw: bytes, compressor: zstandard.ZstdCompressor, gain_min: int
) -> bytearray:
    """Return the record of a frame, its guard still zero (see `seal_frame`).

    `raw` is the present slots' bytes in slot order. It is stored compressed when that saves at
    least one part in `gain_min`.
    """
    compressed = compressor.compress(raw)
    if len(compressed) <= len(raw) - len(raw) // gain_min:
        codec, payload = CODEC_ZSTD, compressed
    else:
        codec, payload = CODEC_RAW, raw
    record = bytearray(_FRAME.pack(0, codec, 0, len(slots), len(raw)))
    for slot in slots:
        record += _SLOT.pack(slot.digest, slot.length | slot.state << _SLOT_STATE_SHIFT)
    record += payload
    return record


def encode_distant_frame(slots: Sequence[Slot]) -> bytearray:
    """The record of a frame whose bytes are in a remote, its guard still zero. Slots that are not
    dropped become distant."""
    record = bytearray(_FRAME.pack(0, CODEC_DISTANT, 0, len(slots), 0))
    for slot in slots:
        state = SLOT_DROPPED if slot.state == SLOT_DROPPED else SLOT_DISTANT
        record += _SLOT.pack(slot.digest, slot.length | state << _SLOT_STATE_SHIFT)
    return record


def is_distant(record: Buffer) -> bool:
    """Whether a frame's record says that its bytes are in a remote."""
    return len(record) >= _FRAME.size and record[GUARD.size] == CODEC_DISTANT


def seal_frame(record: bytearray, frame: int) -> None:
    """Write the guard of a record that will be stored under frame number `frame`."""
    with memoryview(record) as view:
        GUARD.pack_into(record, 0, xxh3_64_intdigest(view[GUARD.size :], frame))


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A frame without its payload. `payload_at` is the payload's offset in the record, bytes."""

    codec: int
    raw_bytes: int
    slots: tuple[Slot, ...]
    payload_at: int


def decode_frame_header(record: Buffer, frame: int) -> FrameHeader:
    """Parse the header without verifying the guard: for accounting, never for serving bytes."""
    if len(record) < _FRAME.size:
        raise ChunkDamagedError(frame, f"record has only {len(record)} bytes")
    _, codec, _, count, raw_bytes = _FRAME.unpack_from(record)
    payload_at = _FRAME.size + count * _SLOT.size
    if len(record) < payload_at or codec > CODEC_DISTANT or raw_bytes > FRAME_RAW_BYTES_LIMIT:
        raise ChunkDamagedError(frame, "header is malformed")
    slots = tuple(
        Slot(digest, packed & _SLOT_LENGTH_MASK, packed >> _SLOT_STATE_SHIFT)
        for digest, packed in _SLOT.iter_unpack(record[_FRAME.size : payload_at])
    )
    return FrameHeader(codec, raw_bytes, slots, payload_at)


def verify_frame(record: Buffer, frame: int) -> None:
    """Raise ChunkDamagedError unless the guard holds. Releases the GIL for all but tiny records."""
    if len(record) < _FRAME.size:
        raise ChunkDamagedError(frame, f"record has only {len(record)} bytes")
    if GUARD.unpack_from(record)[0] != xxh3_64_intdigest(record[GUARD.size :], frame):
        raise ChunkDamagedError(frame, "stored bytes fail their checksum")


# One object for each offset that is common: a hit then finds it in the processor's cache.
_shared = {at: at for at in range(0, FRAME_BYTES_MAX + GRID_BYTES, GRID_BYTES)}.get


def decode_frame_offsets(record: Buffer, frame: int) -> tuple[int, ...]:
    """Each slot's offset in a verified record's raw bytes, and the end.

    A slot whose bytes are not here gets NOT_HERE, so that a slice taken there comes out empty and
    a reader needs no check of its own.
    """
    _, _, _, count, _ = _FRAME.unpack_from(record)
    end = _FRAME.size + count * _SLOT.size
    if end > len(record):
        raise ChunkDamagedError(frame, "header is malformed")
    offsets: list[int] = []
    position = 0
    for _, packed in _SLOT.iter_unpack(record[_FRAME.size : end]):
        if packed >> _SLOT_STATE_SHIFT:
            offsets.append(NOT_HERE)
        else:
            offsets.append(_shared(position, position))
            position += packed
    offsets.append(_shared(position, position))
    return tuple(offsets)


def decode_frame_payload(
    record: Buffer, frame: int, decompressor: zstandard.ZstdDecompressor
) -> bytes:
    """Raw bytes of a verified record: the present slots' contents, one behind the other."""
    _, codec, _, count, raw_bytes = _FRAME.unpack_from(record)
    payload = record[_FRAME.size + count * _SLOT.size :]
    if raw_bytes > FRAME_RAW_BYTES_LIMIT:
        raise ChunkDamagedError(frame, f"claims {raw_bytes} bytes")
    if codec in (CODEC_RAW, CODEC_DISTANT):
        raw = bytes(payload)
    elif codec == CODEC_ZSTD:
        try:
            if zstandard.frame_content_size(payload) != raw_bytes:
                raise ChunkDamagedError(frame, "compressed and recorded length differ")
            raw = decompressor.decompress(payload)
        except zstandard.ZstdError as error:
            raise ChunkDamagedError(frame, f"does not decompress: {error}") from None
    else:
        raise ChunkDamagedError(frame, f"unknown codec {codec}")
    if len(raw) != raw_bytes:
        raise ChunkDamagedError(frame, f"has {len(raw)} bytes instead of {raw_bytes}")
    return raw
