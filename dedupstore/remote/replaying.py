"""What a trace means for an image: which of its frames, in which order.

Owns the way from chunks by content to frames of this store; fetches nothing. Thread-safe.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

import lmdb

from dedupstore import format as fmt
from dedupstore.env import Environment
from dedupstore.frames import find_chunk, read_head
from dedupstore.places import find_distant
from dedupstore.traces import Trace


@dataclass(frozen=True, slots=True)
class Replay:
    """Chunks of an image: how many, their bytes, how many of these are elsewhere; and the frames
    with the latter, in the order in which they are needed."""

    chunks: int
    bytes: int
    missing_bytes: int
    missing_frames: tuple[int, ...]


def survey(env: Environment, manifest: fmt.ManifestRecord) -> Replay:
    """All chunks of an image, in its order. Raises ChunkDamagedError."""
    return _summed(_slots(env, manifest))


def replay(env: Environment, manifest: fmt.ManifestRecord, trace: Trace) -> Replay:
    """Those chunks of a trace that an image has, in the order of first use; others, such as those
    of another version of it, are passed over. Raises ChunkDamagedError."""
    with env.read() as txn:
        known = {digest: _find(txn, env, digest) for digest in trace.digests}
    likely = {ref >> fmt.REF_SLOT_BITS for ref in known.values() if ref}
    found = _among(env, manifest, known, likely)
    if any(ref and digest not in found for digest, ref in known.items()):
        # Of another image, or here twice: then the image may have the copy that no index knows.
        found = _among(env, manifest, known)
    return _summed(found[digest] for digest in trace.digests if digest in found)


def _find(txn: lmdb.Transaction, env: Environment, digest: bytes) -> int:
    """Reference of a chunk that is here or elsewhere, 0 for others."""
    found = find_chunk(txn, env, digest)
    if found is None and env.remote is not None:
        found = find_distant(txn, env.remote, digest)
    return found or 0


def _among(
    env: Environment,
    manifest: fmt.ManifestRecord,
    wanted: Container[bytes],
    frames: Container[int] | None = None,
) -> dict[bytes, tuple[int, fmt.Slot]]:
    """Those of the `wanted` chunks that an image has, by digest, as (frame, slot); only in these
    `frames`, if they are given: reading the heads of all takes 10 us for each."""
    slots = _slots(env, manifest, frames)
    return {slot.digest: (frame, slot) for frame, slot in slots if slot.digest in wanted}


def _slots(
    env: Environment, manifest: fmt.ManifestRecord, frames: Container[int] | None = None
) -> Iterator[tuple[int, fmt.Slot]]:
    """The distinct chunks of an image by (frame, slot), frames in the order in which it needs
    them."""
    needed: dict[int, int] = {}
    for ref, count in zip(manifest.refs, manifest.counts, strict=True):
        frame, first = ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK
        if ref and (frames is None or frame in frames):
            needed[frame] = needed.get(frame, 0) | ((1 << count) - 1) << first
    with env.read() as txn:
        for frame, mask in needed.items():
            head = read_head(txn, env, frame)
            if head is not None:
                for at, slot in enumerate(fmt.decode_frame_header(head[0], frame).slots):
                    if mask >> at & 1:
                        yield frame, slot


def _summed(found: Iterable[tuple[int, fmt.Slot]]) -> Replay:
    chunks = all_bytes = missing = 0
    frames: dict[int, None] = {}
    for frame, slot in found:
        chunks += 1
        all_bytes += slot.length
        if slot.state == fmt.SLOT_DISTANT:
            missing += slot.length
            frames[frame] = None
    return Replay(chunks, all_bytes, missing, tuple(frames))
