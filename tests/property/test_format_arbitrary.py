"""Decoders survive any bytes: a result or a DedupError, nothing else."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, strategies as st
from xxhash import xxh3_64_intdigest

from dedupstore import catalog, format as fmt
from dedupstore.errors import DedupError

KEY = blake3(b"key").digest()
NAME = b"name"
FRAME = 3


def decode_frame(record: bytes) -> None:
    view = memoryview(record)
    fmt.verify_frame(view, FRAME)
    fmt.decode_frame_header(view, FRAME)
    fmt.decode_frame_offsets(view, FRAME)
    fmt.decode_frame_payload(view, FRAME, zstandard.ZstdDecompressor())


def guard(body: bytes, seed: int = 0) -> bytes:
    return struct.pack("<Q", xxh3_64_intdigest(body, seed)) + body


# Each decoder, and how to make a body pass its guard.
DECODERS: dict[str, tuple[Callable[[bytes], object], Callable[[bytes], bytes]]] = {
    "superblock": (fmt.decode_superblock, guard),
    "totals": (fmt.decode_totals, guard),
    "index": (
        lambda record: fmt.decode_index(KEY, record),
        lambda b: b + struct.pack("<I", xxh3_64_intdigest(KEY, len(b)) & 0xFFFFFFFF),
    ),
    "frame": (decode_frame, lambda body: guard(body, FRAME)),
    "manifest": (
        lambda record: fmt.decode_manifest(record, KEY),
        lambda body: guard(struct.pack("<Q", xxh3_64_intdigest(KEY)) + body),
    ),
    "summary": (
        lambda record: fmt.decode_manifest_summary(record, KEY),
        lambda body: guard(struct.pack("<Q", xxh3_64_intdigest(KEY)) + body),
    ),
    "image": (
        lambda record: fmt.decode_image(record, NAME),
        lambda body: guard(body, xxh3_64_intdigest(NAME)),
    ),
    "lazy": (
        lambda record: fmt.decode_wish(record, fmt.wish_key(KEY)),
        lambda body: guard(body, xxh3_64_intdigest(fmt.wish_key(KEY))),
    ),
    "draft": (fmt.decode_draft, guard),
    "frame key": (fmt.decode_frame_key, bytes),
    "name": (catalog.decode_name, bytes),
}
EACH = pytest.mark.parametrize(("decode", "seal"), DECODERS.values(), ids=DECODERS)


def survives(decode: Callable[[bytes], object], record: bytes) -> None:
    message = ""
    try:
        decode(record)
    except DedupError as error:
        message = str(error)
    assert "\n" not in message


@EACH
@given(record=st.binary(max_size=300))
def test_arbitrary_records(
    decode: Callable[[bytes], object], seal: Callable[[bytes], bytes], record: bytes
) -> None:
    survives(decode, record)


@EACH
@given(body=st.binary(max_size=300))
def test_arbitrary_records_that_pass_their_guard(
    decode: Callable[[bytes], object], seal: Callable[[bytes], bytes], body: bytes
) -> None:
    survives(decode, seal(body))


@given(
    codec=st.integers(0, 3),
    count=st.integers(0, 8) | st.integers(0, 65535),
    raw_bytes=st.integers(0, 64) | st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, 40) | st.integers(0, 2**32 - 1), max_size=8),
    payload=st.binary(max_size=64) | st.binary(max_size=64).map(zstandard.compress),
)
def test_frames_with_any_header(
    codec: int, count: int, raw_bytes: int, lengths: list[int], payload: bytes
) -> None:
    body = struct.pack("<BBHI", codec, 0, count, raw_bytes)
    body += b"".join(KEY + struct.pack("<I", length) for length in lengths) + payload
    survives(decode_frame, guard(body, FRAME))


@given(
    version=st.sampled_from([0, 1, 1, 1, 2]),
    runs=st.integers(0, 6) | st.integers(0, 2**32 - 1),
    size=st.integers(0, 100) | st.integers(0, 2**64 - 1),
    columns=st.binary(max_size=120),
    packed=st.booleans(),
)
def test_manifests_with_any_header(
    version: int, runs: int, size: int, columns: bytes, packed: bool
) -> None:
    body = struct.pack("<QHHIQQQQ", xxh3_64_intdigest(KEY), version, 0, runs, size, 0, 0, 0)
    body += zstandard.compress(columns) if packed else columns
    survives(lambda record: fmt.decode_manifest(record, KEY), guard(body))


@given(st.lists(st.integers(0, 2**64 - 1), max_size=5), st.lists(st.integers(0, 2**63), max_size=5))
def test_manifests_with_any_columns(lengths: list[int], deltas: list[int]) -> None:
    runs = len(lengths)
    deltas = (deltas + [0] * runs)[:runs]
    columns = struct.pack(
        f"<{runs}Q{runs}q{runs}I", *lengths, *[d - 2**62 for d in deltas], *[1] * runs
    )
    size = sum(lengths) % 2**64
    body = struct.pack("<QHHIQQQQ", xxh3_64_intdigest(KEY), 1, 0, runs, size, 0, 0, 0)
    survives(
        lambda record: fmt.decode_manifest(record, KEY), guard(body + zstandard.compress(columns))
    )
