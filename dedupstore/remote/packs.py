"""Packs and bundles of their indexes <-> bytes, as in docs/remote-format.md, and nothing else.

Pure functions over bytes that survive any input: see `layout`. Frames are records of docs/format.md
under the guard's seed 0. Thread-safe.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import ChunkDamagedError, RemoteDamagedError

FRAME_SEED = 0
PACK_VERSION = 1
PACK_MAGIC = b"dedupPCK"
BUNDLE_VERSION = 1
BUNDLE_MAGIC = b"dedupIDX"

# What is accepted: a pack is written with about 8 MiB and at most one frame more, a bundle with at
# most 16 MiB, or one index.
PACK_BYTES_MAX = 64 << 20
INDEX_BYTES_MAX = 32 << 20
BUNDLE_BYTES_MAX = 64 << 20

_INDEX_HEAD = struct.Struct("<16sI")
_LENGTH = struct.Struct("<I")
_TRAILER = struct.Struct("<IHH8s")
_BUNDLE_HEAD = struct.Struct("<8sHH16sI")
_BUNDLED = struct.Struct("<32sII")
# The header of a frame record, as in docs/format.md, and a slot's size.
_FRAME = struct.Struct("<QBBHI")
_SLOT_BYTES = 36

INDEX_HEAD_BYTES = _INDEX_HEAD.size
TRAILER_BYTES = _TRAILER.size

assert _INDEX_HEAD.size == 20
assert _TRAILER.size == 16
assert _BUNDLE_HEAD.size == 32
assert _BUNDLED.size == 40


@dataclass(frozen=True, slots=True)
class PackedFrame:
    """A frame in a pack: where its record is, in bytes from the pack's start, and the record's
    beginning, which the pack's id proves, as bytes and as what they say: codec, raw length and
    slots, all present."""

    offset: int
    length: int
    head: bytes
    header: fmt.FrameHeader


@dataclass(frozen=True, slots=True)
class PackIndex:
    """What is in a pack. `pack_bytes` is its length with index and trailer, `index_bytes` that of
    the index alone, `salt` its random bytes."""

    pack: bytes
    pack_bytes: int
    index_bytes: int
    salt: bytes
    frames: tuple[PackedFrame, ...]

    def encode(self) -> bytes:
        """The index as it is in the pack."""
        return _encode_index(self.salt, self.frames)


@dataclass(frozen=True, slots=True)
class NewPack:
    """A pack to be written: its bytes, and its index."""

    data: bytes
    index: PackIndex


def encode_pack(records: Sequence[fmt.Buffer], salt: bytes) -> NewPack:
    """Make a pack of frame records sealed with seed 0. `salt` is layout.SALT_BYTES random bytes."""
    frames, offset = [], 0
    for record in records:
        head = bytes(record[: _head_bytes(record)])
        header = fmt.decode_frame_header(head, FRAME_SEED)
        frames.append(PackedFrame(offset, len(record), head, header))
        offset += len(record)
    index = _encode_index(salt, frames)
    data = b"".join((*records, index, _TRAILER.pack(len(index), PACK_VERSION, 0, PACK_MAGIC)))
    pack = blake3(index).digest()
    return NewPack(data, PackIndex(pack, len(data), len(index), salt, tuple(frames)))


def _encode_index(salt: bytes, frames: Sequence[PackedFrame]) -> bytes:
    heads = (_LENGTH.pack(frame.length) + frame.head for frame in frames)
    return _INDEX_HEAD.pack(salt, len(frames)) + b"".join(heads)


def _head_bytes(record: fmt.Buffer) -> int:
    return _FRAME.size + _SLOT_BYTES * int(_FRAME.unpack_from(record)[3])


def decode_trailer(trailer: fmt.Buffer, pack: bytes, pack_bytes: int) -> int:
    """Length of the index of a pack with `pack_bytes` bytes, by its last TRAILER_BYTES bytes."""
    what = f"pack {pack.hex()[:16]}"
    if len(trailer) != TRAILER_BYTES:
        raise RemoteDamagedError(f"{what}: has no trailer")
    index_bytes, version, _, magic = _TRAILER.unpack(trailer)
    if magic != PACK_MAGIC:
        raise RemoteDamagedError(f"{what}: has no trailer")
    if version != PACK_VERSION:
        raise RemoteDamagedError(f"{what}: has version {version} (use a newer dedupstore)")
    if not INDEX_HEAD_BYTES <= index_bytes <= min(INDEX_BYTES_MAX, pack_bytes - TRAILER_BYTES):
        raise RemoteDamagedError(f"{what}: claims an index of {index_bytes} bytes")
    return int(index_bytes)


def decode_index(index: fmt.Buffer, pack: bytes, pack_bytes: int) -> PackIndex:
    """The index of the pack with this id and length. Whatever it says was said by whoever wrote the
    pack; its frames fill the pack up to the index."""
    what = f"pack {pack.hex()[:16]}"
    if blake3(index).digest() != pack:
        raise RemoteDamagedError(f"{what}: its index does not have its digest")
    if len(index) < INDEX_HEAD_BYTES or len(index) > INDEX_BYTES_MAX:
        raise RemoteDamagedError(f"{what}: has an index of {len(index)} bytes")
    salt, count = _INDEX_HEAD.unpack_from(index)
    frames, at, offset = [], INDEX_HEAD_BYTES, 0
    for _ in range(count):  # ends with the index: each round takes some of it, or raises
        if at + _LENGTH.size + _FRAME.size > len(index):
            raise RemoteDamagedError(f"{what}: its index ends early")
        (length,) = _LENGTH.unpack_from(index, at)
        at += _LENGTH.size
        end = at + _head_bytes(index[at : at + _FRAME.size])
        if end > len(index):
            raise RemoteDamagedError(f"{what}: its index ends early")
        head = bytes(index[at:end])
        frames.append(PackedFrame(offset, length, head, _decode_head(head, length, what)))
        at, offset = end, offset + length
    if at != len(index) or offset + len(index) + TRAILER_BYTES != pack_bytes:
        raise RemoteDamagedError(f"{what}: its index does not fit it")
    return PackIndex(pack, pack_bytes, len(index), salt, tuple(frames))


def _decode_head(head: bytes, length: int, what: str) -> fmt.FrameHeader:
    """The header of a frame whose record has `length` bytes."""
    try:
        header = fmt.decode_frame_header(head, FRAME_SEED)
    except ChunkDamagedError as error:
        raise RemoteDamagedError(f"{what}: a frame's {error.reason}") from None
    present = all(slot.state == fmt.SLOT_PRESENT and slot.length for slot in header.slots)
    payload = length - header.payload_at
    if (
        not header.slots
        or header.codec == fmt.CODEC_DISTANT
        or not present
        or sum(slot.length for slot in header.slots) != header.raw_bytes
        or payload <= 0
        or (header.codec == fmt.CODEC_RAW and payload != header.raw_bytes)
    ):
        raise RemoteDamagedError(f"{what}: a frame's header is malformed")
    return header


# --- bundles ---


@dataclass(frozen=True, slots=True)
class Bundled:
    """A pack whose index is in a bundle: id, length, and where in the bundle its index is."""

    pack: bytes
    pack_bytes: int
    offset: int
    index_bytes: int


@dataclass(frozen=True, slots=True)
class NewBundle:
    """A bundle to be written: its id, its bytes, and what is in it."""

    bundle: bytes
    data: bytes
    entries: tuple[Bundled, ...]


def encode_bundle(indexes: Sequence[PackIndex], salt: bytes) -> NewBundle:
    """Make a bundle of indexes. `salt` is layout.SALT_BYTES random bytes."""
    entries, offset = [], _BUNDLE_HEAD.size + _BUNDLED.size * len(indexes)
    for index in indexes:
        entries.append(Bundled(index.pack, index.pack_bytes, offset, index.index_bytes))
        offset += index.index_bytes
    head = _BUNDLE_HEAD.pack(BUNDLE_MAGIC, BUNDLE_VERSION, 0, salt, len(indexes))
    table = (_BUNDLED.pack(one.pack, one.pack_bytes, one.index_bytes) for one in entries)
    data = b"".join((head, *table, *(index.encode() for index in indexes)))
    return NewBundle(blake3(data).digest(), data, tuple(entries))


def decode_bundle(data: fmt.Buffer, bundle: bytes) -> tuple[Bundled, ...]:
    """What is in the bundle with this id. Its indexes, which have digests of their own, fill it."""
    what = f"bundle {bundle.hex()[:16]}"
    if blake3(data).digest() != bundle:
        raise RemoteDamagedError(f"{what}: does not have its digest")
    if len(data) < _BUNDLE_HEAD.size or data[:8] != BUNDLE_MAGIC:
        raise RemoteDamagedError(f"{what}: is no bundle of indexes")
    _, version, _, _, count = _BUNDLE_HEAD.unpack_from(data)
    if version != BUNDLE_VERSION:
        raise RemoteDamagedError(f"{what}: has version {version} (use a newer dedupstore)")
    offset = _BUNDLE_HEAD.size + _BUNDLED.size * count
    if offset > len(data):
        raise RemoteDamagedError(f"{what}: ends early")
    entries = []
    for pack, pack_bytes, index_bytes in _BUNDLED.iter_unpack(data[_BUNDLE_HEAD.size : offset]):
        check_lengths(pack_bytes, index_bytes, what)
        entries.append(Bundled(pack, pack_bytes, offset, index_bytes))
        offset += index_bytes
    if offset != len(data):
        raise RemoteDamagedError(f"{what}: its indexes do not fill it")
    return tuple(entries)


def decode_bundled(data: fmt.Buffer, entry: Bundled) -> PackIndex:
    """One of the indexes in a bundle, `data` being the bundle's bytes."""
    index = data[entry.offset : entry.offset + entry.index_bytes]
    return decode_index(index, entry.pack, entry.pack_bytes)


def decode_indexes(data: fmt.Buffer) -> dict[bytes, PackIndex]:
    """All indexes in a bundle, by pack: of one whose bytes are known to be right."""
    entries = decode_bundle(data, blake3(data).digest()) if data else ()
    return {entry.pack: decode_bundled(data, entry) for entry in entries}


def check_lengths(pack_bytes: int, index_bytes: int, what: str) -> None:
    """Raise RemoteDamagedError unless a pack may have these lengths."""
    most = min(pack_bytes - TRAILER_BYTES, INDEX_BYTES_MAX)
    if pack_bytes > PACK_BYTES_MAX or not INDEX_HEAD_BYTES <= index_bytes <= most:
        raise RemoteDamagedError(f"{what}: has a pack of impossible length")
