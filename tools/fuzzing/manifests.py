"""Manifest records, and the image that reads are served from (`format`, `manifest`).

An input is flags, a header of 40 bytes and the columns, which get a guard and the tag of their key;
by the flags also compression, and a header that agrees with the columns. Promises: a DedupError of
one line; or a manifest whose runs cover [0, size) without a gap, whose extents do too, and in which
every offset is found.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import zstandard
from blake3 import blake3
from xxhash import xxh3_64_intdigest

from dedupstore import format as fmt
from dedupstore.errors import DedupError
from dedupstore.manifest import Manifest
from tools.fuzzing.messages import check_message

BYTES_MAX = 2048

_DIGEST = blake3(b"image").digest()
_HEADER_BYTES = 40
_COMPRESS, _AGREE = 1, 2


def run(data: bytes) -> None:
    flags, header, columns = data[:1], data[1 : 1 + _HEADER_BYTES], data[1 + _HEADER_BYTES :]
    if not flags:
        return
    if flags[0] & _AGREE:
        runs = len(columns) // 20
        size = sum(struct.unpack_from(f"<{runs}Q", columns)) & 0xFFFFFFFFFFFFFFFF
        header = struct.pack("<HHIQ", 1, 0, runs, size) + header[16:].ljust(24, b"\0")
        columns = columns[: runs * 20]
    if flags[0] & _COMPRESS:
        columns = zstandard.compress(columns)
    body = struct.pack("<Q", xxh3_64_intdigest(_DIGEST)) + header + columns
    record = struct.pack("<Q", xxh3_64_intdigest(body)) + body
    try:
        summary = fmt.decode_manifest_summary(record, _DIGEST)
        decoded = fmt.decode_manifest(record, _DIGEST)
    except DedupError as error:
        check_message(error)
        return
    assert summary.size == decoded.size == sum(decoded.lengths)
    manifest = Manifest(_DIGEST, decoded)
    assert 0 <= manifest.data_bytes <= manifest.size
    runs = list(manifest.runs(0, manifest.size))
    position = 0
    for start, length, _ in runs:
        assert start == position
        position += length
    assert position == manifest.size
    for start, length, _ in runs[:50]:
        for offset in (start, start + length - 1):
            assert manifest.starts[manifest.run_at(offset)] == start
    extents = list(manifest.extents(0, manifest.size))
    assert sum(length for _, length, _ in extents) == manifest.size


def seeds() -> Mapping[str, bytes]:
    def columns(lengths: list[int], deltas: list[int], counts: list[int]) -> bytes:
        runs = len(lengths)
        head = struct.pack("<HHIQQQQ", 1, 0, runs, sum(lengths), sum(counts), sum(lengths), 0)
        return head + struct.pack(f"<{runs}Q{runs}q{runs}I", *lengths, *deltas, *counts)

    one = 1 << fmt.REF_SLOT_BITS
    return {
        "runs": b"\x01" + columns([4096, 8192, 100], [one, -one, 3 * one], [1, 0, 2]),
        "hole": b"\x01" + columns([1 << 62], [0], [0]),
        "empty": b"\x01" + columns([], [], []),
        "huge": b"\x01" + columns([1, (1 << 64) - 2], [one, 5], [1, 1]),
        "agreeing": b"\x03" + columns([512, 4096, 1 << 50], [one, -one, one], [3, 0, 1]),
        "not-compressed": b"\x00" + columns([4096], [one], [1]),
    }
