"""Images by name, and drafts of running imports <-> bytes. Pure, thread-safe."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from dedupstore.errors import StoreDamagedError
from dedupstore.format.guards import GUARD_BYTES, Buffer, guarded, unguarded, unpack

KIND_RAW = 0
KIND_EROFS = 1
KIND_NAMES = {KIND_RAW: "raw", KIND_EROFS: "erofs"}

_IMAGE = struct.Struct("<32sQQB")
_DRAFT_KEY = struct.Struct(">16sI")
IMAGE_BYTES = GUARD_BYTES + _IMAGE.size
assert _IMAGE.size == 49


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What a name stands for. `kind` is a KIND_ constant; `size` repeats the manifest's."""

    digest: bytes
    size: int
    created_ns: int
    kind: int


def encode_image(image: ImageRecord, name: bytes) -> bytes:
    """Value of database `images` for a name."""
    body = _IMAGE.pack(image.digest, image.size, image.created_ns, image.kind)
    return guarded(body, xxh3_64_intdigest(name))


def decode_image(record: Buffer, name: bytes) -> ImageRecord:
    """Return the record of a name."""
    what = f"image {name.decode(errors='replace')!r}"
    body = unguarded(record, what, xxh3_64_intdigest(name))
    return ImageRecord(*unpack(_IMAGE, body, what))  # type: ignore[arg-type]


def guess_image(record: Buffer) -> ImageRecord | None:
    """What an image record whose guard fails says; nothing of it can be believed by itself."""
    if len(record) != GUARD_BYTES + _IMAGE.size:
        return None
    return ImageRecord(*_IMAGE.unpack_from(record, GUARD_BYTES))


# --- drafts ---


def draft_key(session: bytes, sequence: int) -> bytes:
    """Key of database `drafts`: an import's session id (16 bytes) and the batch's number."""
    return _DRAFT_KEY.pack(session, sequence)


def draft_session(key: Buffer) -> bytes:
    """Session id of a key of database `drafts`."""
    return bytes(key[:16])


def encode_draft(refs: Iterable[int]) -> bytes:
    """Value of database `drafts`: the references that one batch of a running import relies on."""
    return guarded(array("Q", refs).tobytes())


def decode_draft(record: Buffer) -> array[int]:
    """References of a draft."""
    body = unguarded(record, "draft")
    if len(body) % 8:
        raise StoreDamagedError("draft record has a ragged length")
    refs = array("Q")
    refs.frombytes(body)
    return refs
