"""A remote's objects <-> bytes: the byte tables of docs/remote-format.md, and nothing else.

Pure functions over bytes; no I/O, no policy. A remote is not trusted: every decoder survives any
input, raises RemoteDamagedError (one line) for what does not hold, and bounds what it allocates by
constants of this module. Thread-safe.

Frames are records of docs/format.md under the guard's seed 0.
"""

from __future__ import annotations

import json
import re
import struct
import uuid as uuids
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import sub
from typing import Any

import zstandard
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.constants import IMAGE_NAME_BYTES_MAX
from dedupstore.errors import ChunkDamagedError, RemoteDamagedError

FORMAT_VERSION = 1
FRAME_SEED = 0

INFO_PATH = "dedupstore.json"
PACKS = "packs/"
MANIFESTS = "manifests/"
IMAGES = "images/"
CONDEMNED = "condemned/"
PROBES = "probes/"

SALT_BYTES = 16
PACK_MAGIC = b"dedupPCK"
MANIFEST_MAGIC = b"dedupMAN"

# What a decoder, or a reader of whole objects, accepts: bounds what a hostile remote makes us
# allocate. A pack is written with about 8 MiB and at most one frame more.
DOCUMENT_BYTES_MAX = 64 << 10
CONDEMNED_BYTES_MAX = 16 << 20
PACK_BYTES_MAX = 64 << 20
INDEX_BYTES_MAX = 32 << 20
MANIFEST_BYTES_MAX = 512 << 20
_COLUMNS_BYTES_MAX = 1 << 30
_IMAGE_BYTES_MAX = 1 << 63

# Names of objects beyond this many characters are replaced by a digest.
_NAME_CHARACTERS_MAX = 200

_INDEX_HEAD = struct.Struct("<16sI")
_LENGTH = struct.Struct("<I")
_TRAILER = struct.Struct("<IHH8s")
_MANIFEST = struct.Struct("<8sHH16sIIIQQQQ")
# The header of a frame record, as in docs/format.md, and a slot's size.
_FRAME = struct.Struct("<QBBHI")
_SLOT_BYTES = 36

INDEX_HEAD_BYTES = _INDEX_HEAD.size
TRAILER_BYTES = _TRAILER.size

assert _INDEX_HEAD.size == 20
assert _TRAILER.size == 16
assert _MANIFEST.size == 72

_CONDEMNABLE = re.compile(r"packs/([0-9a-f]{2})/\1[0-9a-f]{62}|manifests/[0-9a-f]{64}", re.ASCII)
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


# --- object names ---


def pack_path(pack: bytes) -> str:
    """Where the pack with this id is."""
    name = pack.hex()
    return f"{PACKS}{name[:2]}/{name}"


def manifest_path(manifest: bytes) -> str:
    """Where the manifest with this id is."""
    return f"{MANIFESTS}{manifest.hex()}"


def image_path(name: str) -> str:
    """Where the root document of an image is."""
    key = name.encode()
    written = "".join(chr(byte) if byte in _PLAIN else f"={byte:02X}" for byte in key)
    if written.strip(".") == "":  # no path may be "." or ".."
        written = written.replace(".", "=2E")
    if len(written) > _NAME_CHARACTERS_MAX:
        written = f"={blake3(key).hexdigest()}"
    return IMAGES + written


def condemned_path(salt: bytes) -> str:
    """Where a new condemned document goes."""
    return f"{CONDEMNED}{salt.hex()}"


def probe_path(salt: bytes) -> str:
    """Where a new probe goes."""
    return f"{PROBES}{salt.hex()}"


def id_of(path: str) -> bytes | None:
    """The id of a pack or manifest by its path; None if the path is of neither."""
    if _CONDEMNABLE.fullmatch(path) is None:
        return None
    return bytes.fromhex(path[-2 * fmt.DIGEST_BYTES :])


def is_pack(path: str) -> bool:
    """Whether an object is a pack, by its path."""
    return path.startswith(PACKS) and id_of(path) is not None


# --- documents ---


@dataclass(frozen=True, slots=True)
class RemoteInfo:
    """What a remote is: its UUID and its creation, seconds since 1970."""

    uuid: uuids.UUID
    created: float


@dataclass(frozen=True, slots=True)
class Root:
    """What a name stands for in a remote. `kind` is a fmt.KIND_ constant, `created` in seconds
    since 1970, `manifest` the manifest's id, `manifest_bytes` its length."""

    name: str
    digest: bytes
    size: int
    kind: int
    created: float
    manifest: bytes
    manifest_bytes: int


_KINDS = {name: kind for kind, name in fmt.KIND_NAMES.items()}


def encode_info(info: RemoteInfo) -> bytes:
    """The document `dedupstore.json`."""
    return _document({"uuid": str(info.uuid), "created": info.created})


def decode_info(data: bytes) -> RemoteInfo:
    """Return what a remote is."""
    fields = _Fields(data, INFO_PATH)
    try:
        uuid = uuids.UUID(fields.text("uuid"))
    except ValueError:
        raise RemoteDamagedError(f"{INFO_PATH}: no UUID") from None
    return RemoteInfo(uuid, fields.number("created"))


def encode_root(root: Root) -> bytes:
    """The root document of an image."""
    return _document(
        {
            "name": root.name,
            "digest": root.digest.hex(),
            "size": root.size,
            "kind": fmt.KIND_NAMES[root.kind],
            "created": root.created,
            "manifest": root.manifest.hex(),
            "manifest_bytes": root.manifest_bytes,
        }
    )


def decode_root(data: bytes, path: str) -> Root | None:
    """The root document that was found at `path`; None if it says that the image was deleted."""
    if not data:
        return None
    fields = _Fields(data, path)
    name = fields.text("name")
    try:
        at_home = 1 <= len(name.encode()) <= IMAGE_NAME_BYTES_MAX and image_path(name) == path
    except UnicodeEncodeError:
        at_home = False
    if not at_home:
        raise RemoteDamagedError(f"{path}: is of another image")
    kind = _KINDS.get(fields.text("kind"))
    if kind is None:
        raise RemoteDamagedError(f"{path}: unknown kind of image (use a newer dedupstore)")
    return Root(
        name,
        fields.digest("digest"),
        fields.integer("size", _IMAGE_BYTES_MAX),
        kind,
        fields.number("created"),
        fields.digest("manifest"),
        fields.integer("manifest_bytes", MANIFEST_BYTES_MAX),
    )


def encode_condemned(paths: Collection[str]) -> bytes:
    """A document that condemns the packs and manifests at `paths`."""
    return _document({"objects": sorted(paths)})


def decode_condemned(data: bytes, path: str) -> frozenset[str]:
    """The paths that the document found at `path` condemns, all of packs and manifests."""
    found = _Fields(data, path).values.get("objects")
    if not isinstance(found, list) or not all(
        isinstance(one, str) and _CONDEMNABLE.fullmatch(one) for one in found
    ):
        raise RemoteDamagedError(f"{path}: condemns what is neither pack nor manifest")
    return frozenset(found)


def _document(fields: dict[str, Any]) -> bytes:
    return json.dumps({"format": FORMAT_VERSION, **fields}, ensure_ascii=False).encode() + b"\n"


class _Fields:
    """A JSON object of a known format version, read field by field."""

    def __init__(self, data: bytes, path: str) -> None:
        self._path = path
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise RemoteDamagedError(f"{path}: is no JSON object")
        self.values: dict[str, Any] = values
        if self.integer("format", 1 << 32) > FORMAT_VERSION:
            raise RemoteDamagedError(
                f"{path}: has format {values['format']}, this release knows up to {FORMAT_VERSION} "
                "(use a newer dedupstore)"
            )

    def _wrong(self, name: str) -> RemoteDamagedError:
        return RemoteDamagedError(f"{self._path}: {name} is missing or wrong")

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self._wrong(name)
        return value

    def integer(self, name: str, limit: int) -> int:
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
            raise self._wrong(name)
        return value

    def number(self, name: str) -> float:
        value = self.values.get(name)
        # A datetime can be made of it.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e11:
            raise self._wrong(name)
        return float(value)

    def digest(self, name: str) -> bytes:
        value = self.text(name)
        if re.fullmatch(r"[0-9a-f]{64}", value) is None:
            raise self._wrong(name)
        return bytes.fromhex(value)


# --- packs ---


@dataclass(frozen=True, slots=True)
class PackedFrame:
    """A frame in a pack: where its record is, in bytes from the pack's start, and the record's
    beginning, header and slots, which the pack's id proves."""

    offset: int
    length: int
    head: bytes

    def header(self) -> fmt.FrameHeader:
        """Codec, raw length and slots, all present, of this frame's record."""
        return fmt.decode_frame_header(self.head, FRAME_SEED)


@dataclass(frozen=True, slots=True)
class PackIndex:
    """What is in a pack. `pack_bytes` is its length with index and trailer, `index_bytes` that of
    the index alone."""

    pack: bytes
    pack_bytes: int
    index_bytes: int
    frames: tuple[PackedFrame, ...]


@dataclass(frozen=True, slots=True)
class NewPack:
    """A pack to be written: its bytes, and its index."""

    data: bytes
    index: PackIndex


def encode_pack(records: Sequence[fmt.Buffer], salt: bytes) -> NewPack:
    """Make a pack of frame records sealed with seed 0. `salt` is SALT_BYTES random bytes."""
    frames, offset = [], 0
    for record in records:
        head = bytes(record[: _head_bytes(record)])
        frames.append(PackedFrame(offset, len(record), head))
        offset += len(record)
    index = _INDEX_HEAD.pack(salt, len(frames))
    index += b"".join(_LENGTH.pack(frame.length) + frame.head for frame in frames)
    data = b"".join((*records, index, _TRAILER.pack(len(index), FORMAT_VERSION, 0, PACK_MAGIC)))
    pack = blake3(index).digest()
    return NewPack(data, PackIndex(pack, len(data), len(index), tuple(frames)))


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
    if version != FORMAT_VERSION:
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
    _, count = _INDEX_HEAD.unpack_from(index)
    frames, at, offset = [], INDEX_HEAD_BYTES, 0
    for _ in range(count):  # ends with the index: each round takes some of it, or raises
        if at + _LENGTH.size + _FRAME.size > len(index):
            raise RemoteDamagedError(f"{what}: its index ends early")
        (length,) = _LENGTH.unpack_from(index, at)
        at += _LENGTH.size
        end = at + _head_bytes(index[at : at + _FRAME.size])
        if end > len(index):
            raise RemoteDamagedError(f"{what}: its index ends early")
        frame = PackedFrame(offset, length, bytes(index[at:end]))
        _check_head(frame, what)
        frames.append(frame)
        at, offset = end, offset + length
    if at != len(index) or offset + len(index) + TRAILER_BYTES != pack_bytes:
        raise RemoteDamagedError(f"{what}: its index does not fit it")
    return PackIndex(pack, pack_bytes, len(index), tuple(frames))


def _check_head(frame: PackedFrame, what: str) -> None:
    try:
        header = frame.header()
    except ChunkDamagedError as error:
        raise RemoteDamagedError(f"{what}: a frame's {error.reason}") from None
    present = all(slot.state == fmt.SLOT_PRESENT and slot.length for slot in header.slots)
    payload = frame.length - header.payload_at
    if (
        not header.slots
        or header.codec == fmt.CODEC_DISTANT
        or not present
        or sum(slot.length for slot in header.slots) != header.raw_bytes
        or payload <= 0
        or (header.codec == fmt.CODEC_RAW and payload != header.raw_bytes)
    ):
        raise RemoteDamagedError(f"{what}: a frame's header is malformed")


# --- manifests ---


@dataclass(frozen=True, slots=True)
class PackRef:
    """A pack that an image needs: id, length, length of its index, in bytes."""

    pack: bytes
    pack_bytes: int
    index_bytes: int


@dataclass(frozen=True, slots=True)
class RemoteManifest:
    """An image as runs of frames in packs.

    Frame number 1 + i of a reference is frame `frame_numbers[i]` of pack `packs[frame_packs[i]]`.
    The rest is as in fmt.ManifestRecord.
    """

    size: int
    chunks: int
    unique_bytes: int
    zero_bytes: int
    packs: tuple[PackRef, ...]
    frame_packs: array[int]
    frame_numbers: array[int]
    lengths: array[int]
    refs: array[int]
    counts: array[int]


def encode_manifest(manifest: RemoteManifest, salt: bytes) -> bytes:
    """The manifest's bytes, whose BLAKE3 is its id. `salt` is SALT_BYTES random bytes."""
    refs = manifest.refs
    columns = (
        b"".join(ref.pack for ref in manifest.packs),
        array("I", (ref.pack_bytes for ref in manifest.packs)).tobytes(),
        array("I", (ref.index_bytes for ref in manifest.packs)).tobytes(),
        manifest.frame_packs.tobytes(),
        manifest.frame_numbers.tobytes(),
        manifest.lengths.tobytes(),
        array("q", map(sub, refs, chain((0,), refs))).tobytes(),
        manifest.counts.tobytes(),
    )
    head = _MANIFEST.pack(
        MANIFEST_MAGIC,
        FORMAT_VERSION,
        0,
        salt,
        len(manifest.packs),
        len(manifest.frame_packs),
        len(refs),
        manifest.size,
        manifest.chunks,
        manifest.unique_bytes,
        manifest.zero_bytes,
    )
    return head + zstandard.ZstdCompressor(level=9).compress(b"".join(columns))


def decode_manifest(data: fmt.Buffer, manifest: bytes) -> RemoteManifest:
    """The manifest with this id. Its columns agree with each other and with its size."""
    what = f"manifest {manifest.hex()[:16]}"
    if blake3(data).digest() != manifest:
        raise RemoteDamagedError(f"{what}: does not have its digest")
    if len(data) < _MANIFEST.size or data[:8] != MANIFEST_MAGIC:
        raise RemoteDamagedError(f"{what}: is no manifest")
    _, version, _, _, packs, frames, runs, size, chunks, unique, zeros = _MANIFEST.unpack_from(data)
    if version != FORMAT_VERSION:
        raise RemoteDamagedError(f"{what}: has version {version} (use a newer dedupstore)")
    columns = _Columns(data[_MANIFEST.size :], 40 * packs + 8 * frames + 20 * runs, what)
    ids = columns.take(32 * packs)
    pack_bytes, index_bytes = columns.words("I", packs), columns.words("I", packs)
    refs = tuple(
        PackRef(bytes(ids[32 * i : 32 * i + 32]), *lengths)
        for i, lengths in enumerate(zip(pack_bytes, index_bytes, strict=True))
    )
    frame_packs, frame_numbers = columns.words("I", frames), columns.words("I", frames)
    lengths, steps = columns.words("Q", runs), columns.words("q", runs)
    counts = columns.words("I", runs)
    try:
        places = array("Q", accumulate(steps))
    except OverflowError:
        raise RemoteDamagedError(f"{what}: has references out of range") from None
    decoded = RemoteManifest(
        size,
        chunks,
        unique,
        zeros,
        refs,
        frame_packs,
        frame_numbers,
        lengths,
        places,
        counts,
    )
    _check_manifest(decoded, what)
    return decoded


class _Columns:
    """The compressed rest of a manifest, taken column by column."""

    def __init__(self, payload: fmt.Buffer, expected: int, what: str) -> None:
        try:
            claimed = zstandard.frame_content_size(payload)
            if claimed != expected or claimed > _COLUMNS_BYTES_MAX:
                raise RemoteDamagedError(f"{what}: has columns of the wrong length")
            raw = zstandard.ZstdDecompressor().decompress(payload) if expected else b""
        except zstandard.ZstdError as error:
            raise RemoteDamagedError(f"{what}: does not decompress: {error}") from None
        if len(raw) != expected:
            raise RemoteDamagedError(f"{what}: has columns of the wrong length")
        self._rest = memoryview(raw)

    def take(self, length: int) -> memoryview:
        taken, self._rest = self._rest[:length], self._rest[length:]
        return taken

    def words(self, kind: str, count: int) -> array[int]:
        column = array(kind)
        column.frombytes(self.take(count * column.itemsize))
        return column


def _check_manifest(manifest: RemoteManifest, what: str) -> None:
    if manifest.size >= _IMAGE_BYTES_MAX:
        raise RemoteDamagedError(f"{what}: claims {manifest.size} bytes")
    for pack in manifest.packs:
        most = min(pack.pack_bytes - TRAILER_BYTES, INDEX_BYTES_MAX)
        if pack.pack_bytes > PACK_BYTES_MAX or not INDEX_HEAD_BYTES <= pack.index_bytes <= most:
            raise RemoteDamagedError(f"{what}: has a pack of impossible length")
    if len({pack.pack for pack in manifest.packs}) != len(manifest.packs):
        raise RemoteDamagedError(f"{what}: has a pack twice")
    if max(manifest.frame_packs, default=-1) >= len(manifest.packs):
        raise RemoteDamagedError(f"{what}: has a frame in no pack")
    if sum(manifest.lengths) != manifest.size or 0 in manifest.lengths:
        raise RemoteDamagedError(f"{what}: does not cover its image")
    frames, holes = len(manifest.frame_packs), 0
    for length, ref, count in zip(manifest.lengths, manifest.refs, manifest.counts, strict=True):
        if ref == fmt.REF_HOLE and count == 0:
            holes += length
        elif (
            not 1 <= ref >> fmt.REF_SLOT_BITS <= frames
            or not 1 <= count <= fmt.REF_SLOT_MASK + 1 - (ref & fmt.REF_SLOT_MASK)
        ):
            raise RemoteDamagedError(f"{what}: has references out of range")
    if holes != manifest.zero_bytes or sum(manifest.counts) != manifest.chunks:
        raise RemoteDamagedError(f"{what}: its counters are not its own")


def frames_of(
    manifest: RemoteManifest, indexes: Mapping[bytes, PackIndex]
) -> Iterator[tuple[bytes, PackedFrame]]:
    """(pack id, frame) of each frame of an image, in the manifest's order: the frame with number
    1 + i in references comes i-th. `indexes` has those of all its packs."""
    for pack_number, number in zip(manifest.frame_packs, manifest.frame_numbers, strict=True):
        pack = manifest.packs[pack_number].pack
        index = indexes[pack]
        if number >= len(index.frames):
            raise RemoteDamagedError(f"pack {pack.hex()[:16]}: has no frame {number}")
        yield pack, index.frames[number]


def image_digest(manifest: RemoteManifest, slots: Sequence[Sequence[fmt.Slot]]) -> bytes:
    """The digest of an image (docs/format.md) as a function of its runs and of its frames' slots,
    in the manifest's order. Raises RemoteDamagedError where they do not fit."""
    digest = fmt.ImageDigest()
    for length, ref, count in zip(manifest.lengths, manifest.refs, manifest.counts, strict=True):
        if ref == fmt.REF_HOLE:
            digest.add(length, fmt.ZERO_DIGEST)
            continue
        first = ref & fmt.REF_SLOT_MASK
        run = slots[(ref >> fmt.REF_SLOT_BITS) - 1][first : first + count]
        if len(run) != count or sum(slot.length for slot in run) != length:
            raise RemoteDamagedError("the image's manifest does not fit its packs")
        for slot in run:
            digest.add(slot.length, slot.digest)
    return digest.finish()
