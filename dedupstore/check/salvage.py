"""What a damaged frame still holds: every chunk whose bytes have its digest.

Digests come from the index, which is another record than the frame, and from the frame's own table;
a chunk's bytes prove whichever was right. Nothing is believed that a digest does not prove. Pure
functions of the record; thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import zstandard
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.constants import FRAME_SLOTS_MAX
from dedupstore.errors import StoreDamagedError

_FEED_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Salvaged:
    """The chunks of a damaged frame by slot: those whose bytes are `found`, and all as far as they
    are `known`: digest, and length where the frame's table can be believed, else 0."""

    found: dict[int, bytes]
    known: dict[int, fmt.LostChunk]


def salvage(record: bytes, frame: int, indexed: Mapping[int, bytes]) -> Salvaged:
    """What a damaged frame's record holds; `indexed` are the digests that the index knows, by
    slot. A single flipped bit in header or table is mended first."""
    header = _header(record, frame)
    if header is None or _contradicts(header, indexed):
        table_bits = 8 * (16 + 36 * FRAME_SLOTS_MAX)
        mended = fmt.with_one_bit_mended(record, frame, table_bits)
        if mended is not None:
            record, header = mended, _header(mended, frame)
    slots = header.slots if header is not None else ()
    known = {slot: fmt.LostChunk(digest, 0) for slot, digest in indexed.items()}
    for at, slot in enumerate(slots):
        if slot.state == fmt.SLOT_DROPPED:
            continue
        if at not in known or known[at].digest == slot.digest:
            known[at] = fmt.LostChunk(slot.digest, slot.length)
    found: dict[int, bytes] = {}
    for raw in _payloads(record, header) if header is not None else ():
        position = 0
        for at, slot in enumerate(slots):
            if slot.state != fmt.SLOT_PRESENT:
                continue
            piece = raw[position : position + slot.length]
            position += slot.length
            if at in known and len(piece) == slot.length and at not in found:
                digest = blake3(piece).digest()
                if digest in (known[at].digest, slot.digest):
                    known[at] = fmt.LostChunk(digest, slot.length)
                    found[at] = piece
    return Salvaged(found, dict(sorted(known.items())))


def describe(record: bytes | None, frame: int, indexed: Mapping[int, bytes]) -> Salvaged:
    """The chunks that the index knows in a frame, with what its record, if any, says of their
    lengths; nothing is looked for."""
    header = _header(record, frame) if record is not None else None
    slots = header.slots if header is not None else ()
    known = {}
    for at, digest in sorted(indexed.items()):
        agrees = at < len(slots) and slots[at].digest == digest
        known[at] = fmt.LostChunk(digest, slots[at].length if agrees else 0)
    return Salvaged({}, known)


def _header(record: bytes, frame: int) -> fmt.FrameHeader | None:
    try:
        return fmt.decode_frame_header(record, frame)
    except StoreDamagedError:
        return None


def _contradicts(header: fmt.FrameHeader, indexed: Mapping[int, bytes]) -> bool:
    """Whether header and table show damage of their own, rather than the payload alone."""
    elsewhere = header.codec == fmt.CODEC_DISTANT
    state = fmt.SLOT_DISTANT if elsewhere else fmt.SLOT_PRESENT
    present = {at: s for at, s in enumerate(header.slots) if s.state == state}
    if not elsewhere and sum(slot.length for slot in present.values()) != header.raw_bytes:
        return True
    # What is not present is dropped: chunks are taken out of a frame all at once, or not at all.
    if present and any(s != fmt.DROPPED for s in header.slots if s.state != fmt.SLOT_PRESENT):
        return True
    return bool(indexed) and {at: slot.digest for at, slot in present.items()} != dict(indexed)


def _payloads(record: bytes, header: fmt.FrameHeader) -> Iterator[bytes]:
    """What the payload may have been, uncompressed: under either codec, whole or its beginning."""
    payload = record[header.payload_at :]
    yield b"".join(_decompressed(payload))
    yield payload


def _decompressed(payload: bytes) -> Iterator[bytes]:
    """What can be decompressed before the damage. Fed in small parts: an error loses no more."""
    with suppress(zstandard.ZstdError):
        if zstandard.frame_content_size(payload) <= fmt.FRAME_RAW_BYTES_LIMIT:
            yield zstandard.ZstdDecompressor().decompress(payload)
            return
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    total = 0
    for at in range(0, len(payload), _FEED_BYTES):
        try:
            part = decompressor.decompress(payload[at : at + _FEED_BYTES])
        except zstandard.ZstdError:
            return
        total += len(part)
        if total > fmt.FRAME_RAW_BYTES_LIMIT:
            return
        yield part
