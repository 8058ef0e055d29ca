"""A frame as it came from a remote -> the record that it becomes in this store.

Owns the verification that nothing which comes is stored or served without: every chunk against its
digest. Pure; thread-safe.
"""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import ChunkDamagedError, RemoteDamagedError
from dedupstore.frames import Codecs
from dedupstore.remote.packs import FRAME_SEED


def received(sent: fmt.Buffer, frame: int, slots: Sequence[fmt.Slot], codecs: Codecs) -> bytearray:
    """The sealed record of frame number `frame`, which has these slots here, from its record in a
    pack. Raises RemoteDamagedError unless every chunk that is wanted of it has its digest."""
    try:
        fmt.verify_frame(sent, FRAME_SEED)
        header = fmt.decode_frame_header(sent, FRAME_SEED)
        raw = codecs.decode(sent, FRAME_SEED)
        offsets = fmt.decode_frame_offsets(sent, FRAME_SEED)
    except ChunkDamagedError as error:
        raise RemoteDamagedError(f"a frame in it {error.reason}") from None
    if len(header.slots) != len(slots) or offsets[-1] != len(raw):
        raise RemoteDamagedError("a frame in it has other chunks than it should")
    kept = []
    view = memoryview(raw)
    for at, (slot, has) in enumerate(zip(slots, header.slots, strict=True)):
        if slot.state == fmt.SLOT_DROPPED:
            continue
        piece = view[offsets[at] : offsets[at] + has.length]
        if has.length != slot.length or blake3(piece).digest() != slot.digest:
            raise RemoteDamagedError("a chunk in it does not have its digest")
        kept.append(piece)
    if len(kept) == len(header.slots):
        record = bytearray(sent)
    else:
        record = codecs.encode([fmt.present(slot) for slot in slots], b"".join(kept))
    fmt.seal_frame(record, frame)
    return record
