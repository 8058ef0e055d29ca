"""An image written front to back, by one thread.

Owns one pass over the contents. Thread-safe: no shared state; one tree may be written by several
threads at once.
"""

from __future__ import annotations

from typing import BinaryIO

from dedupstore.erofs.tree import Directory
from dedupstore.erofs.writer.fingerprints import ContentDigest
from dedupstore.erofs.writer.plan import PlacedFile, plan_image

_PIECE_BYTES = 1 << 20


def write_image(
    root: Directory,
    out: BinaryIO,
    *,
    block_bytes: int = 4096,
    uuid: bytes = bytes(16),
    fingerprints: bool = False,
) -> int:
    """Write the image of a tree to `out`, which need not seek, and return its size in bytes.

    The other arguments are those of `plan_image`. `out.write` must take all it is given, as
    buffered files do. Raises SourceError for what cannot be read or has no form in EROFS,
    ValueError, and OSError of `out`.
    """
    plan = plan_image(root, block_bytes=block_bytes, uuid=uuid, fingerprints=fingerprints)
    out.write(plan.head)
    room = memoryview(bytearray(_PIECE_BYTES))
    digests = {}
    for index, placed in enumerate(plan.files):
        digest = ContentDigest(placed.spans, placed.node.size) if placed.fingerprinted else None
        _write_contents(placed, out, room, digest)
        if digest is not None:
            digests[index] = digest.digest()
    out.write(plan.metadata(digests))
    return plan.size


def _write_contents(
    placed: PlacedFile, out: BinaryIO, room: memoryview, digest: ContentDigest | None
) -> None:
    with placed.node.content.opened() as read_into:
        for at in range(0, placed.length, len(room)):
            piece = room[: placed.length - at]
            placed.fill(read_into, at, piece)
            if digest is not None:
                digest.update(piece)
            out.write(piece)
