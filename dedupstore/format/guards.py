"""Guards: the checksum that every record carries, and what it can mend.

A *guard* is XXH3-64 over the rest of the record, seeded so that a record found under another key
does not pass. It detects damage; identity is BLAKE3-256's alone. Pure, thread-safe.
"""

from __future__ import annotations

import struct

from xxhash import xxh3_64_intdigest

from dedupstore.errors import StoreDamagedError

Buffer = bytes | memoryview
"""What LMDB hands out: a memoryview of the map (declared as either by its stubs)."""

DIGEST_BYTES = 32
ZERO_DIGEST = bytes(DIGEST_BYTES)

GUARD = struct.Struct("<Q")
GUARD_BYTES = GUARD.size


def guarded(body: bytes, seed: int = 0) -> bytes:
    """A record: a body behind its guard."""
    return GUARD.pack(xxh3_64_intdigest(body, seed)) + body


def unguarded(record: Buffer, what: str, seed: int = 0) -> memoryview:
    """A record's body. Raises StoreDamagedError, which says `what` it was, unless the guard
    holds."""
    view = memoryview(record)
    if len(view) < GUARD.size:
        raise StoreDamagedError(f"{what} record has only {len(view)} bytes")
    body = view[GUARD.size :]
    if GUARD.unpack_from(view)[0] != xxh3_64_intdigest(body, seed):
        raise StoreDamagedError(f"{what} record fails its checksum")
    return body


def unpack(layout: struct.Struct, body: memoryview, what: str) -> tuple[object, ...]:
    """The fields at the beginning of a body. Raises StoreDamagedError: it is too short."""
    if len(body) < layout.size:
        raise StoreDamagedError(f"{what} record has {len(body)} bytes, needs {layout.size}")
    return layout.unpack_from(body)


def with_one_bit_mended(record: Buffer, seed: int, bits: int | None = None) -> bytes | None:
    """The record as it was before one of its first `bits` bits (default: any) was flipped; None if
    no single flip explains it.

    The guard tells: that one of the n records that differ in a bit passes by chance has probability
    n / 2^64. Costs one checksum of the record for each bit.
    """
    changed = bytearray(record)
    stop = 8 * len(changed) if bits is None else min(bits, 8 * len(changed))
    if len(changed) < GUARD_BYTES:
        return None
    with memoryview(changed)[GUARD_BYTES:] as body:
        guard = GUARD.unpack_from(changed)[0]
        actual = xxh3_64_intdigest(body, seed)
        if (guard ^ actual).bit_count() <= 1:
            GUARD.pack_into(changed, 0, actual)
            return bytes(changed)
        for bit in range(8 * GUARD_BYTES, stop):
            changed[bit >> 3] ^= 1 << (bit & 7)
            if xxh3_64_intdigest(body, seed) == guard:
                return bytes(changed)
            changed[bit >> 3] ^= 1 << (bit & 7)
    return None


def record_seed(key: bytes) -> int:
    """The seed of the guards of image, view, origin, lazy, lost and remote records."""
    return xxh3_64_intdigest(key)
