"""What a trace means for an image: which of its frames, in which order.

Owns the way from chunks by content to frames of this store; fetches nothing. Thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dedupstore import format as fmt
from dedupstore.env import Environment
from dedupstore.frames import read_head
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
    wanted = frozenset(trace.digests)
    found = {
        slot.digest: (frame, slot) for frame, slot in _slots(env, manifest) if slot.digest in wanted
    }
    return _summed(found[digest] for digest in trace.digests if digest in found)


def _slots(env: Environment, manifest: fmt.ManifestRecord) -> Iterator[tuple[int, fmt.Slot]]:
    """The distinct chunks of an image by (frame, slot), frames in the order in which it needs
    them."""
    needed: dict[int, int] = {}
    for ref, count in zip(manifest.refs, manifest.counts, strict=True):
        if ref:
            frame, first = ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK
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
