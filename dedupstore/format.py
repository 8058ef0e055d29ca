"""Records <-> bytes: the byte tables of docs/format.md, and nothing else.

Pure functions over bytes; no I/O, no LMDB, no policy. Every decoder verifies the record's guard
first and raises StoreDamagedError (ChunkDamagedError for frames) for anything that does not hold,
whatever the bytes are. Thread-safe.

All integers are little-endian, except in keys, where big-endian keeps LMDB's order numeric.
A *guard* is XXH3-64 over the rest of the record, seeded so that a record found under another key
does not pass. It detects damage; identity is BLAKE3-256's alone.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from operator import sub

import zstandard
from blake3 import blake3
from xxhash import xxh3_64_intdigest

from dedupstore.constants import FRAME_BYTES_MAX, GRID_BYTES
from dedupstore.errors import ChunkDamagedError, StoreDamagedError, StoreVersionError

# What LMDB hands out: a memoryview of the map (declared as either by its stubs).
Buffer = bytes | memoryview

FORMAT_VERSION = 1

# Feature flags, after composefs and ext4: a release refuses a store with an incompatible flag it
# does not know, only reads one with a read-only-compatible flag, and ignores compatible flags.
# Set with the first frame whose bytes are in a remote. Incompatible: a release that does not know
# such frames takes them for damage.
FEATURE_INCOMPAT_REMOTE = 1
FEATURES_INCOMPAT_KNOWN = FEATURE_INCOMPAT_REMOTE
FEATURES_READONLY_COMPAT_KNOWN = 0
# Set with the first view record. Compatible: a release without views reclaims them like any image
# that lost its name, and leaves records that lead nowhere, which count as none.
FEATURE_COMPAT_VIEWS = 1
# Set with the first origin record. Compatible: a release without origins leaves the records alone,
# and one whose manifest is gone counts as none.
FEATURE_COMPAT_ORIGINS = 2
# Set with the first lost record. Compatible: a release without them leaves the records alone, and
# imports store a lost chunk anew whether they know of the record or not.
FEATURE_COMPAT_LOST = 4
# Set with the first remote record. Compatible: it only says where things may be had.
FEATURE_COMPAT_REMOTES = 8
FEATURES_COMPAT_KNOWN = (
    FEATURE_COMPAT_VIEWS | FEATURE_COMPAT_ORIGINS | FEATURE_COMPAT_LOST | FEATURE_COMPAT_REMOTES
)

DIGEST_BYTES = 32
ZERO_DIGEST = bytes(DIGEST_BYTES)

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

_GUARD = struct.Struct("<Q")
GUARD_BYTES = _GUARD.size
_SUPER = struct.Struct("<8sHHIII16sQ")
_TOTALS = struct.Struct("<QQQQQ")
_FRAME = struct.Struct("<QBBHI")
_SLOT = struct.Struct("<32sI")
_INDEX = struct.Struct("<QI")
_IMAGE = struct.Struct("<32sQQB")
_VIEW = struct.Struct("<32sQII")
_ORIGIN_KEY = struct.Struct("<6sQQ")
_ORIGIN = struct.Struct("<QqqB32s")
_WISH = struct.Struct("<BBHI")
_LOST_KEY = struct.Struct(">4sQ")
_LOST = struct.Struct("<32sI")
_REMOTE = struct.Struct("<I16sH")
_URL_LENGTH = struct.Struct("<H")
_MANIFEST = struct.Struct("<QHHIQQQQ")
_FRAME_KEY = struct.Struct(">Q")
_DRAFT_KEY = struct.Struct(">16sI")
FRAME_KEY_BYTES = _FRAME_KEY.size
INDEX_BYTES = _INDEX.size
IMAGE_BYTES = GUARD_BYTES + _IMAGE.size

assert _SUPER.size == 48
assert _TOTALS.size == 40
assert _FRAME.size == 16
assert _SLOT.size == 36
assert _INDEX.size == 12
assert _IMAGE.size == 49
assert _VIEW.size == 48
assert _ORIGIN_KEY.size == 22
assert _ORIGIN.size == 57
assert _WISH.size == 8
assert _LOST_KEY.size == 12
assert _LOST.size == 36
assert _REMOTE.size == 22
assert _MANIFEST.size == 48
assert array("Q").itemsize == 8
assert sys.byteorder == "little"  # arrays are written as they are in memory

SUPER_MAGIC = b"dedupSTR"
SUPERBLOCK_KEY = b"superblock"
MANIFEST_VERSION = 1
IMAGE_DIGEST_CONTEXT = "dedupstore 2026-11 image digest 1"

# A frame cannot honestly claim more than this: bounds what a damaged or hostile record makes a
# decoder allocate.
FRAME_RAW_BYTES_LIMIT = 16 << 20
MANIFEST_RAW_BYTES_LIMIT = 1 << 32


def _guarded(body: bytes, seed: int = 0) -> bytes:
    return _GUARD.pack(xxh3_64_intdigest(body, seed)) + body


def _unguarded(record: Buffer, what: str, seed: int = 0) -> memoryview:
    view = memoryview(record)
    if len(view) < _GUARD.size:
        raise StoreDamagedError(f"{what} record has only {len(view)} bytes")
    body = view[_GUARD.size :]
    if _GUARD.unpack_from(view)[0] != xxh3_64_intdigest(body, seed):
        raise StoreDamagedError(f"{what} record fails its checksum")
    return body


def _unpack(layout: struct.Struct, body: memoryview, what: str) -> tuple[object, ...]:
    if len(body) < layout.size:
        raise StoreDamagedError(f"{what} record has {len(body)} bytes, needs {layout.size}")
    return layout.unpack_from(body)


# --- superblock and totals ---


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a store is: version, feature flags, identity. Key `superblock` of database `meta`."""

    uuid: bytes
    created_ns: int
    version: int = FORMAT_VERSION
    features_compat: int = 0
    features_readonly_compat: int = 0
    features_incompat: int = 0


def encode_superblock(sb: Superblock) -> bytes:
    """Return the record, guard included."""
    body = _SUPER.pack(
        SUPER_MAGIC,
        sb.version,
        0,
        sb.features_compat,
        sb.features_readonly_compat,
        sb.features_incompat,
        sb.uuid,
        sb.created_ns,
    )
    return _guarded(body)


def decode_superblock(record: Buffer) -> Superblock:
    """Return the superblock; the caller decides with `check_superblock` whether it may go on."""
    body = _unguarded(record, "superblock")
    magic, version, _, compat, readonly_compat, incompat, uuid, created = _unpack(
        _SUPER, body, "superblock"
    )
    if magic != SUPER_MAGIC:
        raise StoreDamagedError("superblock has no dedupstore magic")
    return Superblock(uuid, created, version, compat, readonly_compat, incompat)  # type: ignore[arg-type]


def with_incompatible(record: Buffer, features: int) -> bytes:
    """A superblock with incompatible feature flags set. Raises StoreDamagedError."""
    sb = decode_superblock(record)
    return encode_superblock(replace(sb, features_incompat=sb.features_incompat | features))


def guess_superblock(record: Buffer) -> Superblock | None:
    """The superblock of a record whose guard fails, if magic, version and flags are such that this
    release wrote it; identity and creation are then as they are found."""
    if len(record) != GUARD_BYTES + _SUPER.size:
        return None
    magic, version, _, compat, readonly_compat, incompat, uuid, created = _SUPER.unpack_from(
        record, GUARD_BYTES
    )
    known = magic == SUPER_MAGIC and version == FORMAT_VERSION
    unknown = incompat & ~FEATURES_INCOMPAT_KNOWN or compat & ~FEATURES_COMPAT_KNOWN
    if not known or readonly_compat or unknown:
        return None
    return Superblock(uuid, created, version, compat, 0, incompat)


def guess_image(record: Buffer) -> ImageRecord | None:
    """What an image record whose guard fails says; nothing of it can be believed by itself."""
    if len(record) != GUARD_BYTES + _IMAGE.size:
        return None
    return ImageRecord(*_IMAGE.unpack_from(record, GUARD_BYTES))


def check_superblock(sb: Superblock, where: str, *, writing: bool = True) -> None:
    """Raise StoreVersionError unless this release may read, and if `writing` write, the store."""
    if sb.version > FORMAT_VERSION:
        raise StoreVersionError(
            f"{where}: store has format version {sb.version}, this release knows up to "
            f"{FORMAT_VERSION} (use a newer dedupstore)"
        )
    unknown = sb.features_incompat & ~FEATURES_INCOMPAT_KNOWN
    if writing:
        unknown |= sb.features_readonly_compat & ~FEATURES_READONLY_COMPAT_KNOWN
    if unknown:
        raise StoreVersionError(
            f"{where}: store uses features {unknown:#x} that this release does not know "
            "(use a newer dedupstore)"
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """Running sums over `frames` and the next frame number. Key `totals` of database `meta`.

    `frame_next` only grows: a number is never used twice, so that a server which still caches a
    reclaimed frame can never mistake a new one for it.
    """

    frame_next: int = 1
    frames: int = 0
    chunks: int = 0
    unique_bytes: int = 0
    stored_bytes: int = 0


def encode_totals(totals: Totals) -> bytes:
    """Return the record, guard included."""
    return _guarded(
        _TOTALS.pack(
            totals.frame_next,
            totals.frames,
            totals.chunks,
            totals.unique_bytes,
            totals.stored_bytes,
        )
    )


def decode_totals(record: Buffer) -> Totals:
    """Return the totals."""
    return Totals(*_unpack(_TOTALS, _unguarded(record, "totals"), "totals"))  # type: ignore[arg-type]


# --- references and keys ---


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


# --- frames ---


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
    return len(record) >= _FRAME.size and record[_GUARD.size] == CODEC_DISTANT


def seal_frame(record: bytearray, frame: int) -> None:
    """Write the guard of a record that will be stored under frame number `frame`."""
    with memoryview(record) as view:
        _GUARD.pack_into(record, 0, xxh3_64_intdigest(view[_GUARD.size :], frame))


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
    if _GUARD.unpack_from(record)[0] != xxh3_64_intdigest(record[_GUARD.size :], frame):
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


# --- manifests ---


@dataclass(frozen=True, slots=True)
class ManifestRecord:
    """An image as stored: counters and three columns with one entry per run.

    A run is `lengths[i]` bytes of the image, held by `counts[i]` consecutive slots from `refs[i]`
    on; a hole has reference and count 0. `chunks` counts chunks with repetition, `unique_bytes`
    the bytes of distinct chunks, `zero_bytes` the bytes in holes.
    """

    size: int
    chunks: int
    unique_bytes: int
    zero_bytes: int
    lengths: array[int]
    refs: array[int]
    counts: array[int]


def _delta(values: array[int]) -> bytes:
    """Signed differences: neighbouring references become runs of equal small numbers."""
    return array("q", map(sub, values, chain((0,), values))).tobytes()


def _undelta(raw: memoryview) -> array[int]:
    return array("Q", accumulate(raw.cast("q")))


def encode_manifest(manifest: ManifestRecord, digest: bytes) -> bytes:
    """Return the record stored under `digest`."""
    columns = manifest.lengths.tobytes() + _delta(manifest.refs) + manifest.counts.tobytes()
    header = _MANIFEST.pack(
        xxh3_64_intdigest(digest),
        MANIFEST_VERSION,
        0,
        len(manifest.lengths),
        manifest.size,
        manifest.chunks,
        manifest.unique_bytes,
        manifest.zero_bytes,
    )
    return _guarded(header + zstandard.ZstdCompressor(level=3).compress(columns))


def decode_manifest_summary(record: Buffer, digest: bytes) -> ManifestRecord:
    """The counters alone, columns left empty; verified all the same."""
    return _decode_manifest(record, digest, columns=False)


def decode_manifest(record: Buffer, digest: bytes) -> ManifestRecord:
    """Return the manifest; its columns agree with each other and with `size`."""
    return _decode_manifest(record, digest, columns=True)


def _decode_manifest(record: Buffer, digest: bytes, *, columns: bool) -> ManifestRecord:
    what = f"manifest {digest.hex()[:16]}"
    body = _unguarded(record, what)
    tag, version, _, runs, size, chunks, unique_bytes, zero_bytes = _unpack(_MANIFEST, body, what)
    if tag != xxh3_64_intdigest(digest):
        raise StoreDamagedError(f"{what} is stored under another image's digest")
    if version != MANIFEST_VERSION:
        raise StoreVersionError(f"{what} has version {version} (use a newer dedupstore)")
    empty = array("Q")
    head = (size, chunks, unique_bytes, zero_bytes)
    if not columns:
        return ManifestRecord(*head, empty, empty, empty)  # type: ignore[arg-type]
    raw = _decompress_columns(body[_MANIFEST.size :], int(runs) * 20, what)  # type: ignore[call-overload]
    width = int(runs) * 8  # type: ignore[call-overload]
    lengths, counts = array("Q"), array("I")
    lengths.frombytes(raw[:width])
    counts.frombytes(raw[2 * width :])
    try:
        refs = _undelta(raw[width : 2 * width])
    except OverflowError:
        raise StoreDamagedError(f"{what} has references out of range") from None
    if sum(lengths) != size or 0 in lengths:
        raise StoreDamagedError(f"{what} does not cover its image")
    return ManifestRecord(*head, lengths, refs, counts)  # type: ignore[arg-type]


def _decompress_columns(payload: memoryview, expected: int, what: str) -> memoryview:
    try:
        claimed = zstandard.frame_content_size(payload)
        if claimed != expected or claimed > MANIFEST_RAW_BYTES_LIMIT:
            raise StoreDamagedError(f"{what} has columns of the wrong length")
        return memoryview(zstandard.ZstdDecompressor().decompress(payload))
    except zstandard.ZstdError as error:
        raise StoreDamagedError(f"{what} does not decompress: {error}") from None


class ImageDigest:
    """The digest of an image as a function of its chunks: BLAKE3 over (length, digest) pairs.

    Feed the chunks in image order, holes with ZERO_DIGEST; neighbouring holes count as one, so
    that the result does not depend on how a hole was found. Not thread-safe.
    """

    def __init__(self) -> None:
        self._hash = blake3(derive_key_context=IMAGE_DIGEST_CONTEXT)
        self._hole = 0
        self._size = 0

    def add(self, length: int, digest: bytes) -> None:
        """Append a chunk of `length` bytes."""
        self._size += length
        if digest == ZERO_DIGEST:
            self._hole += length
            return
        self._flush_hole()
        self._hash.update(length.to_bytes(8, "little") + digest)

    def _flush_hole(self) -> None:
        if self._hole:
            self._hash.update(self._hole.to_bytes(8, "little") + ZERO_DIGEST)
            self._hole = 0

    def finish(self) -> bytes:
        """The digest; nothing may be added afterwards."""
        self._flush_hole()
        self._hash.update(self._size.to_bytes(8, "little"))
        return self._hash.digest()


# --- images and drafts ---


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What a name stands for. `kind` is a KIND_ constant; `size` repeats the manifest's."""

    digest: bytes
    size: int
    created_ns: int
    kind: int


KIND_RAW = 0
KIND_EROFS = 1
KIND_NAMES = {KIND_RAW: "raw", KIND_EROFS: "erofs"}


def encode_image(image: ImageRecord, name: bytes) -> bytes:
    """Value of database `images` for a name."""
    body = _IMAGE.pack(image.digest, image.size, image.created_ns, image.kind)
    return _guarded(body, xxh3_64_intdigest(name))


def decode_image(record: Buffer, name: bytes) -> ImageRecord:
    """Return the record of a name."""
    what = f"image {name.decode(errors='replace')!r}"
    body = _unguarded(record, what, xxh3_64_intdigest(name))
    return ImageRecord(*_unpack(_IMAGE, body, what))  # type: ignore[arg-type]


# --- views ---

VIEW_KERNEL = 1
VIEW_POOL = 2
_VIEW_KEY_PREFIX = b"view"


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """An image derived from another, for mounts that share. `digest` is the manifest it is stored
    as; `homes` the digests of further views whose objects it needs; `objects` the SHA-256 of each
    file content that is an object of its own, by number, packed: gc decodes every view in each of
    its transactions. `created_ns` as in `ImageRecord`.
    """

    digest: bytes
    created_ns: int
    homes: tuple[bytes, ...] = ()
    objects: bytes = b""


def view_key(image: bytes, kind: int) -> bytes:
    """Key of database `meta`: the view of `kind` (VIEW_*) of the image with digest `image`."""
    return _VIEW_KEY_PREFIX + bytes((kind,)) + image


def decode_view_key(key: Buffer) -> tuple[bytes, int] | None:
    """(image digest, kind) of a key of database `meta`; None if it is no view's."""
    raw = bytes(key)
    if len(raw) != len(_VIEW_KEY_PREFIX) + 1 + DIGEST_BYTES or raw[:4] != _VIEW_KEY_PREFIX:
        return None
    return raw[5:], raw[4]


def encode_view(view: ViewRecord, key: bytes) -> bytes:
    """Value of a view's key."""
    counts = (len(view.homes), len(view.objects) // DIGEST_BYTES)
    body = _VIEW.pack(view.digest, view.created_ns, *counts)
    return _guarded(body + b"".join((*view.homes, view.objects)), xxh3_64_intdigest(key))


def decode_view(record: Buffer, key: bytes) -> ViewRecord:
    """Return the record of a view's key."""
    what = f"view {key[5:13].hex()}"
    body = _unguarded(record, what, xxh3_64_intdigest(key))
    digest, created_ns, homes, objects = _unpack(_VIEW, body, what)
    assert isinstance(digest, bytes)
    assert isinstance(created_ns, int)
    assert isinstance(homes, int)
    assert isinstance(objects, int)
    digests = bytes(body[_VIEW.size :])
    if len(digests) != (homes + objects) * DIGEST_BYTES:
        raise StoreDamagedError(f"{what} record has a ragged length")
    objects_at = homes * DIGEST_BYTES
    split = tuple(split_digests(digests[:objects_at]))
    return ViewRecord(digest, created_ns, split, digests[objects_at:])


def split_digests(packed: bytes) -> Iterator[bytes]:
    """The digests, or SHA-256, that were packed one behind the other."""
    return (packed[at : at + DIGEST_BYTES] for at in range(0, len(packed), DIGEST_BYTES))


# --- origins ---

_ORIGIN_KEY_PREFIX = b"origin"


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells an unchanged file from a changed one. Times in nanoseconds since 1970."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class OriginRecord:
    """A file, as it was when it was imported, and the image it held: digest and kind (KIND_*)."""

    file: FileState
    digest: bytes
    kind: int


def origin_key(file: FileState) -> bytes:
    """Key of database `meta`: the origin record of a file."""
    return _ORIGIN_KEY.pack(_ORIGIN_KEY_PREFIX, file.device, file.inode)


def is_origin_key(key: Buffer) -> bool:
    """Whether a key of database `meta` is an origin record's."""
    return len(key) == _ORIGIN_KEY.size and bytes(key[:6]) == _ORIGIN_KEY_PREFIX


def encode_origin(origin: OriginRecord) -> bytes:
    """Value of an origin's key."""
    file = origin.file
    body = _ORIGIN.pack(file.size, file.mtime_ns, file.ctime_ns, origin.kind, origin.digest)
    return _guarded(body, xxh3_64_intdigest(origin_key(file)))


def decode_origin(record: Buffer, key: bytes) -> OriginRecord:
    """Return the record of an origin's key."""
    body = _unguarded(record, "origin", xxh3_64_intdigest(key))
    size, mtime_ns, ctime_ns, kind, digest = _unpack(_ORIGIN, body, "origin")
    _, device, inode = _ORIGIN_KEY.unpack(key)
    file = FileState(device, inode, size, mtime_ns, ctime_ns)  # type: ignore[arg-type]
    return OriginRecord(file, digest, kind)  # type: ignore[arg-type]


# --- lost chunks ---

_LOST_KEY_PREFIX = b"lost"


@dataclass(frozen=True, slots=True)
class LostChunk:
    """What is known of a chunk whose bytes are damaged: digest, and length in bytes, 0: unknown."""

    digest: bytes
    length: int


def lost_key(ref: int) -> bytes:
    """Key of database `meta`: the lost record of the chunk that a reference led to."""
    return _LOST_KEY.pack(_LOST_KEY_PREFIX, ref)


def decode_lost_key(key: Buffer) -> int | None:
    """The reference of a key of database `meta`; None if it is no lost record's."""
    if len(key) != _LOST_KEY.size:
        return None
    prefix, ref = _LOST_KEY.unpack(key)
    return int(ref) if prefix == _LOST_KEY_PREFIX else None


def encode_lost(lost: LostChunk, key: bytes) -> bytes:
    """Value of a lost chunk's key."""
    return _guarded(_LOST.pack(lost.digest, lost.length), xxh3_64_intdigest(key))


def decode_lost(record: Buffer, key: bytes) -> LostChunk:
    """Return the record of a lost chunk's key."""
    body = _unguarded(record, "lost", xxh3_64_intdigest(key))
    return LostChunk(*_unpack(_LOST, body, "lost"))  # type: ignore[arg-type]


# --- what to fetch of an image that is elsewhere ---

_WISH_KEY_PREFIX = b"lazy"
PREFETCH_NONE, PREFETCH_TRACE, PREFETCH_ALL = 0, 1, 2
PREFETCH_NAMES = {PREFETCH_NONE: "none", PREFETCH_TRACE: "trace", PREFETCH_ALL: "all"}
_WISH_PAUSED = 1


@dataclass(frozen=True, slots=True)
class Wish:
    """What servers are to fetch of an image that they have open, without anybody reading it:
    `prefetch` is PREFETCH_*; and not now, if `paused`."""

    prefetch: int
    paused: bool = False


def wish_key(image: bytes) -> bytes:
    """Key of database `meta`: the wish for an image digest."""
    return _WISH_KEY_PREFIX + image


def decode_wish_key(key: Buffer) -> bytes | None:
    """The image digest of a key of database `meta`; None if it is no wish's."""
    raw = bytes(key)
    prefix = len(_WISH_KEY_PREFIX)
    return (
        raw[prefix:]
        if len(raw) == prefix + DIGEST_BYTES and raw[:prefix] == _WISH_KEY_PREFIX
        else None
    )


def encode_wish(wish: Wish, key: bytes) -> bytes:
    """Value of a wish's key."""
    body = _WISH.pack(wish.prefetch, _WISH_PAUSED * wish.paused, 0, 0)
    return _guarded(body, xxh3_64_intdigest(key))


def decode_wish(record: Buffer, key: bytes) -> Wish:
    """Return the record of a wish's key."""
    prefetch, flags, _, _ = _unpack(
        _WISH, _unguarded(record, "lazy", xxh3_64_intdigest(key)), "lazy"
    )
    if prefetch not in PREFETCH_NAMES:
        raise StoreDamagedError(f"lazy record asks for {prefetch}")
    return Wish(prefetch, bool(flags & _WISH_PAUSED))  # type: ignore[operator]


# --- remotes ---

_REMOTE_KEY_PREFIX = b"remote"
REMOTE_NAME_BYTES_MAX = 64


@dataclass(frozen=True, slots=True)
class RemoteRecord:
    """A remote that the store knows: its number in place records, its UUID, the URLs of it and of
    its mirrors, at least one."""

    number: int
    uuid: bytes
    urls: tuple[str, ...]


def remote_key(name: str) -> bytes:
    """Key of database `meta`: the remote of this name."""
    return _REMOTE_KEY_PREFIX + name.encode()


def decode_remote_key(key: Buffer) -> str | None:
    """The name in a key of database `meta`; None if it is no remote's."""
    raw = bytes(key)
    name = raw[len(_REMOTE_KEY_PREFIX) :]
    if not raw.startswith(_REMOTE_KEY_PREFIX) or not 1 <= len(name) <= REMOTE_NAME_BYTES_MAX:
        return None
    try:
        return name.decode()
    except UnicodeDecodeError:
        return None


def encode_remote(remote: RemoteRecord, key: bytes) -> bytes:
    """Value of a remote's key."""
    urls = [url.encode() for url in remote.urls]
    body = _REMOTE.pack(remote.number, remote.uuid, len(urls))
    body += b"".join(_URL_LENGTH.pack(len(url)) + url for url in urls)
    return _guarded(body, xxh3_64_intdigest(key))


def decode_remote(record: Buffer, key: bytes) -> RemoteRecord:
    """Return the record of a remote's key."""
    body = _unguarded(record, "remote", xxh3_64_intdigest(key))
    number, uuid, count = _unpack(_REMOTE, body, "remote")
    rest, urls = bytes(body[_REMOTE.size :]), []
    while len(rest) >= _URL_LENGTH.size:
        end = _URL_LENGTH.size + int(_URL_LENGTH.unpack_from(rest)[0])
        urls.append(rest[_URL_LENGTH.size : end].decode(errors="replace"))
        if end > len(rest):
            break
        rest = rest[end:]
    if rest or not urls or len(urls) != count:
        raise StoreDamagedError("remote record has a ragged length")
    return RemoteRecord(number, uuid, tuple(urls))  # type: ignore[arg-type]


# --- what is in database `meta`, and mending ---


def meta_kind(key: Buffer) -> str | None:
    """What kind of record a key of database `meta` stands for; None: this release knows none."""
    if bytes(key) in (SUPERBLOCK_KEY, b"totals"):
        return bytes(key).decode()
    if decode_view_key(key) is not None:
        return "view"
    if is_origin_key(key):
        return "origin"
    if decode_wish_key(key) is not None:
        return "lazy"
    if decode_lost_key(key) is not None:
        return "lost"
    return None if decode_remote_key(key) is None else "remote"


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
        guard = _GUARD.unpack_from(changed)[0]
        actual = xxh3_64_intdigest(body, seed)
        if (guard ^ actual).bit_count() <= 1:
            _GUARD.pack_into(changed, 0, actual)
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


# --- drafts ---


def draft_key(session: bytes, sequence: int) -> bytes:
    """Key of database `drafts`: an import's session id (16 bytes) and the batch's number."""
    return _DRAFT_KEY.pack(session, sequence)


def draft_session(key: Buffer) -> bytes:
    """Session id of a key of database `drafts`."""
    return bytes(key[:16])


def encode_draft(refs: Iterable[int]) -> bytes:
    """Value of database `drafts`: the references that one batch of a running import relies on."""
    return _guarded(array("Q", refs).tobytes())


def decode_draft(record: Buffer) -> array[int]:
    """References of a draft."""
    body = _unguarded(record, "draft")
    if len(body) % 8:
        raise StoreDamagedError("draft record has a ragged length")
    refs = array("Q")
    refs.frombytes(body)
    return refs
