"""Manifests and the digest of an image <-> bytes. Pure, thread-safe."""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import sub

import zstandard
from blake3 import blake3
from xxhash import xxh3_64_intdigest

from dedupstore.errors import StoreDamagedError, StoreVersionError
from dedupstore.format.guards import ZERO_DIGEST, Buffer, guarded, unguarded, unpack

_MANIFEST = struct.Struct("<QHHIQQQQ")
assert _MANIFEST.size == 48
assert array("Q").itemsize == 8
assert sys.byteorder == "little"  # arrays are written as they are in memory
MANIFEST_VERSION = 1
IMAGE_DIGEST_CONTEXT = "dedupstore 2026-11 image digest 1"
MANIFEST_RAW_BYTES_LIMIT = 1 << 32


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
    return guarded(header + zstandard.ZstdCompressor(level=3).compress(columns))


def decode_manifest_summary(record: Buffer, digest: bytes) -> ManifestRecord:
    """The counters alone, columns left empty; verified all the same."""
    return _decode_manifest(record, digest, columns=False)


def decode_manifest(record: Buffer, digest: bytes) -> ManifestRecord:
    """Return the manifest; its columns agree with each other and with `size`."""
    return _decode_manifest(record, digest, columns=True)


def _decode_manifest(record: Buffer, digest: bytes, *, columns: bool) -> ManifestRecord:
    what = f"manifest {digest.hex()[:16]}"
    body = unguarded(record, what)
    tag, version, _, runs, size, chunks, unique_bytes, zero_bytes = unpack(_MANIFEST, body, what)
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
