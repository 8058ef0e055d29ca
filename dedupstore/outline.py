"""The chunks of a stored image in order, as the tables of its frames name them.

Reads no payload. Thread-safe: a transaction is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator

import lmdb

from dedupstore import format as fmt
from dedupstore.env import Environment
from dedupstore.frames import read_head


def chunks_of(
    txn: lmdb.Transaction, env: Environment, manifest: fmt.ManifestRecord
) -> Iterator[tuple[int, bytes, bool]]:
    """(length in bytes, digest, whether its bytes are to be had, here or in a remote) of each
    chunk; a hole has ZERO_DIGEST.

    Raises StoreDamagedError or ChunkDamagedError at a frame that is missing or cannot be read.
    """
    for length, ref, count in zip(manifest.lengths, manifest.refs, manifest.counts, strict=True):
        if ref == fmt.REF_HOLE:
            yield length, fmt.ZERO_DIGEST, True
            continue
        frame, first = ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK
        head, _ = read_head(txn, env, frame) or (b"", 0)
        for slot in fmt.decode_frame_header(head, frame).slots[first : first + count]:
            yield slot.length, slot.digest, slot.state in (fmt.SLOT_PRESENT, fmt.SLOT_DISTANT)


def is_whole(
    txn: lmdb.Transaction, env: Environment, manifest: fmt.ManifestRecord, digest: bytes
) -> bool:
    """Whether all chunks of a manifest are to be had, as far as the tables say, and make up the
    image with that digest. Raises as `chunks_of`."""
    hasher = fmt.ImageDigest()
    for length, chunk, is_there in chunks_of(txn, env, manifest):
        if not is_there:
            return False
        hasher.add(length, chunk)
    return hasher.finish() == digest
