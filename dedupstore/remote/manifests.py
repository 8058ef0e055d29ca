"""Manifests of a remote's images <-> bytes, as in docs/remote-format.md, and what they lead to.

Pure functions over bytes that survive any input: see `layout`. Thread-safe.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import sub

import zstandard
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import RemoteDamagedError
from dedupstore.remote.layout import IMAGE_BYTES_MAX
from dedupstore.remote.packs import (
    BUNDLE_BYTES_MAX,
    PackedFrame,
    PackIndex,
    check_lengths,
)

MANIFEST_VERSION = 2
_WITHOUT_BUNDLES = 1
MANIFEST_MAGIC = b"dedupMAN"

_MANIFEST = struct.Struct("<8sHH16sIIIQQQQ")
_BUNDLES = struct.Struct("<I")
_COLUMNS_BYTES_MAX = 1 << 30

assert _MANIFEST.size == 72


@dataclass(frozen=True, slots=True)
class PackRef:
    """A pack that an image needs: id, length, length of its index, in bytes; and where else its
    index is: number of the bundle in the manifest's list, from 1 on, 0: in none, and the offset in
    that."""

    pack: bytes
    pack_bytes: int
    index_bytes: int
    bundle: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class BundleRef:
    """A bundle with indexes of packs that an image needs: id, length in bytes."""

    bundle: bytes
    length: int


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
    bundles: tuple[BundleRef, ...]
    packs: tuple[PackRef, ...]
    frame_packs: array[int]
    frame_numbers: array[int]
    lengths: array[int]
    refs: array[int]
    counts: array[int]

    def frames_at(self, offset: int, length: int) -> list[int]:
        """The frames, by their places in the list, that these bytes of the image are in."""
        found: dict[int, None] = {}
        at = 0
        for run, ref in zip(self.lengths, self.refs, strict=True):
            if at >= offset + length:
                break
            if ref != fmt.REF_HOLE and at + run > offset:
                found[(ref >> fmt.REF_SLOT_BITS) - 1] = None
            at += run
        return list(found)


def encode_manifest(manifest: RemoteManifest, salt: bytes) -> bytes:
    """The manifest's bytes, whose BLAKE3 is its id. `salt` is SALT_BYTES random bytes."""
    refs, packs, bundles = manifest.refs, manifest.packs, manifest.bundles
    columns = (
        b"".join(ref.bundle for ref in bundles),
        array("I", (ref.length for ref in bundles)).tobytes(),
        b"".join(ref.pack for ref in packs),
        array("I", (ref.pack_bytes for ref in packs)).tobytes(),
        array("I", (ref.index_bytes for ref in packs)).tobytes(),
        array("I", (ref.bundle for ref in packs)).tobytes(),
        array("I", (ref.offset for ref in packs)).tobytes(),
        manifest.frame_packs.tobytes(),
        manifest.frame_numbers.tobytes(),
        manifest.lengths.tobytes(),
        array("q", map(sub, refs, chain((0,), refs))).tobytes(),
        manifest.counts.tobytes(),
    )
    head = _MANIFEST.pack(
        MANIFEST_MAGIC,
        MANIFEST_VERSION,
        0,
        salt,
        len(packs),
        len(manifest.frame_packs),
        len(refs),
        manifest.size,
        manifest.chunks,
        manifest.unique_bytes,
        manifest.zero_bytes,
    )
    head += _BUNDLES.pack(len(bundles))
    return head + zstandard.ZstdCompressor(level=9).compress(b"".join(columns))


def decode_manifest(data: fmt.Buffer, manifest: bytes) -> RemoteManifest:
    """The manifest with this id. Its columns agree with each other and with its size."""
    what = f"manifest {manifest.hex()[:16]}"
    if blake3(data).digest() != manifest:
        raise RemoteDamagedError(f"{what}: does not have its digest")
    if len(data) < _MANIFEST.size or data[:8] != MANIFEST_MAGIC:
        raise RemoteDamagedError(f"{what}: is no manifest")
    _, version, _, _, packs, frames, runs, size, chunks, unique, zeros = _MANIFEST.unpack_from(data)
    bundles, at = 0, _MANIFEST.size
    if version == MANIFEST_VERSION:
        if len(data) < at + _BUNDLES.size:
            raise RemoteDamagedError(f"{what}: ends early")
        (bundles,) = _BUNDLES.unpack_from(data, at)
        at += _BUNDLES.size
    elif version != _WITHOUT_BUNDLES:
        raise RemoteDamagedError(f"{what}: has version {version} (use a newer dedupstore)")
    words = 2 if version == _WITHOUT_BUNDLES else 4  # for a pack, beside its id
    expected = 36 * bundles + (32 + 4 * words) * packs + 8 * frames + 20 * runs
    columns = _Columns(data[at:], expected, what)
    bundle_refs = tuple(map(BundleRef, columns.digests(bundles), columns.words("I", bundles)))
    pack_ids = columns.digests(packs)
    pack_refs = tuple(map(PackRef, pack_ids, *(columns.words("I", packs) for _ in range(words))))
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
        bundle_refs,
        pack_refs,
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

    def digests(self, count: int) -> list[bytes]:
        size = fmt.DIGEST_BYTES
        column = bytes(self.take(size * count))
        return [column[size * i : size * (i + 1)] for i in range(count)]

    def words(self, kind: str, count: int) -> array[int]:
        column = array(kind)
        column.frombytes(self.take(count * column.itemsize))
        return column


def _check_manifest(manifest: RemoteManifest, what: str) -> None:
    if manifest.size >= IMAGE_BYTES_MAX:
        raise RemoteDamagedError(f"{what}: claims {manifest.size} bytes")
    if any(ref.length > BUNDLE_BYTES_MAX for ref in manifest.bundles):
        raise RemoteDamagedError(f"{what}: has a bundle of impossible length")
    for pack in manifest.packs:
        check_lengths(pack.pack_bytes, pack.index_bytes, what)
        if pack.bundle > len(manifest.bundles):
            raise RemoteDamagedError(f"{what}: has an index in no bundle")
        if (
            pack.bundle
            and pack.offset + pack.index_bytes > manifest.bundles[pack.bundle - 1].length
        ):
            raise RemoteDamagedError(f"{what}: has an index beyond its bundle's end")
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


def index_spans(
    packs: Iterable[PackRef], bundles: Sequence[BundleRef], gap: int
) -> Iterator[tuple[bytes, list[PackRef]]]:
    """Where an image's `bundles` have the indexes of these of its packs: (bundle's id, packs),
    whose indexes lie in this order with at most `gap` bytes between them."""
    span: list[PackRef] = []
    for ref in sorted(packs, key=lambda ref: (ref.bundle, ref.offset)):
        if not ref.bundle:
            continue
        last = span[-1] if span else ref
        if ref.bundle != last.bundle or ref.offset - last.offset - last.index_bytes > gap:
            yield bundles[last.bundle - 1].bundle, span
            span = []
        span.append(ref)
    if span:
        yield bundles[span[-1].bundle - 1].bundle, span
