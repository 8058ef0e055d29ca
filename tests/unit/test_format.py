"""Records <-> bytes: round trips, and that no single flipped bit goes unnoticed."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
import zstandard
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import ChunkDamagedError, StoreDamagedError, StoreVersionError
from tests.conftest import flipped, noise, text

FRAME = 7
DIGEST = blake3(b"some chunk").digest()
NAME = b"debian/12"


def make_frame(parts: list[bytes], frame: int = FRAME) -> bytes:
    slots = [fmt.Slot(blake3(part).digest(), len(part)) for part in parts]
    record = fmt.encode_frame(slots, b"".join(parts), zstandard.ZstdCompressor(level=3), 16)
    fmt.seal_frame(record, frame)
    return bytes(record)


def make_manifest() -> fmt.ManifestRecord:
    return fmt.ManifestRecord(
        size=20480,
        chunks=3,
        unique_bytes=12288,
        zero_bytes=8192,
        lengths=array("Q", [8192, 8192, 4096]),
        refs=array("Q", [fmt.make_ref(3, 1), fmt.REF_HOLE, fmt.make_ref(1, 0)]),
        counts=array("I", [2, 0, 1]),
    )


def decode_frame(record: bytes, frame: int = FRAME) -> bytes:
    view = memoryview(record)
    fmt.verify_frame(view, frame)
    fmt.decode_frame_offsets(view, frame)
    return fmt.decode_frame_payload(view, frame, zstandard.ZstdDecompressor())


SUPERBLOCK = fmt.Superblock(b"u" * 16, 1234567890, features_compat=5)
TOTALS = fmt.Totals(9, 8, 70, 1 << 40, 1 << 39)
IMAGE = fmt.ImageRecord(DIGEST, 20480, 42, fmt.KIND_EROFS)
REFS = [fmt.make_ref(3, 1), fmt.make_ref(1 << 40, 95)]

# Each kind of record: its bytes, and what decodes them.
RECORDS: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "superblock": (fmt.encode_superblock(SUPERBLOCK), fmt.decode_superblock),
    "totals": (fmt.encode_totals(TOTALS), fmt.decode_totals),
    "index": (fmt.encode_index(DIGEST, REFS[0]), lambda r: fmt.decode_index(DIGEST, r)),
    "frame zstd": (make_frame([text(1, 300), text(2, 200)]), decode_frame),
    "frame raw": (make_frame([noise(1, 100), noise(2, 50)]), decode_frame),
    "manifest": (
        fmt.encode_manifest(make_manifest(), DIGEST),
        lambda r: fmt.decode_manifest(r, DIGEST),
    ),
    "manifest summary": (
        fmt.encode_manifest(make_manifest(), DIGEST),
        lambda r: fmt.decode_manifest_summary(r, DIGEST),
    ),
    "image": (fmt.encode_image(IMAGE, NAME), lambda r: fmt.decode_image(r, NAME)),
    "draft": (fmt.encode_draft(REFS), fmt.decode_draft),
}
EACH_RECORD = pytest.mark.parametrize(("record", "decode"), RECORDS.values(), ids=RECORDS)


@EACH_RECORD
def test_every_flipped_bit_is_detected(record: bytes, decode: Callable[[bytes], object]) -> None:
    for bit in range(len(record) * 8):
        with pytest.raises(StoreDamagedError):
            decode(flipped(record, bit))


@EACH_RECORD
def test_every_truncation_is_detected(record: bytes, decode: Callable[[bytes], object]) -> None:
    for length in range(len(record)):
        with pytest.raises(StoreDamagedError):
            decode(record[:length])


@EACH_RECORD
def test_appended_byte_is_detected(record: bytes, decode: Callable[[bytes], object]) -> None:
    with pytest.raises(StoreDamagedError):
        decode(record + b"\0")


@EACH_RECORD
def test_records_decode_from_memoryviews(record: bytes, decode: Callable[[bytes], object]) -> None:
    decode(memoryview(record))  # type: ignore[arg-type]


def test_damaged_frame_names_itself() -> None:
    record = RECORDS["frame zstd"][0]
    with pytest.raises(ChunkDamagedError) as caught:
        decode_frame(flipped(record, 1000))
    assert caught.value.frame == FRAME


def test_every_flipped_bit_of_a_digest_is_detected_by_its_index_entry() -> None:
    value = fmt.encode_index(DIGEST, REFS[0])
    for bit in range(256):
        with pytest.raises(StoreDamagedError):
            fmt.decode_index(flipped(DIGEST, bit), value)


def test_frame_under_another_number_is_refused() -> None:
    with pytest.raises(ChunkDamagedError):
        decode_frame(RECORDS["frame raw"][0], FRAME + 1)


def test_image_under_another_name_is_refused() -> None:
    with pytest.raises(StoreDamagedError):
        fmt.decode_image(fmt.encode_image(IMAGE, NAME), b"debian/13")


def test_manifest_under_another_digest_is_refused() -> None:
    record = fmt.encode_manifest(make_manifest(), DIGEST)
    with pytest.raises(StoreDamagedError, match="another image's digest"):
        fmt.decode_manifest(record, flipped(DIGEST, 0))


def test_superblock_round_trip() -> None:
    assert fmt.decode_superblock(fmt.encode_superblock(SUPERBLOCK)) == SUPERBLOCK


def test_totals_round_trip() -> None:
    assert fmt.decode_totals(fmt.encode_totals(TOTALS)) == TOTALS


def test_index_round_trip() -> None:
    for ref in REFS:
        assert fmt.decode_index(DIGEST, fmt.encode_index(DIGEST, ref)) == ref


def test_image_round_trip() -> None:
    assert fmt.decode_image(fmt.encode_image(IMAGE, NAME), NAME) == IMAGE


def test_draft_round_trip() -> None:
    assert list(fmt.decode_draft(fmt.encode_draft(REFS))) == REFS
    assert list(fmt.decode_draft(fmt.encode_draft([]))) == []


def test_draft_key_carries_its_session() -> None:
    session = bytes(range(16))
    assert fmt.draft_session(fmt.draft_key(session, 5)) == session
    assert fmt.draft_key(session, 1) < fmt.draft_key(session, 256)


def test_manifest_round_trip() -> None:
    manifest = make_manifest()
    record = fmt.encode_manifest(manifest, DIGEST)
    assert fmt.decode_manifest(record, DIGEST) == manifest
    summary = fmt.decode_manifest_summary(record, DIGEST)
    assert (summary.size, summary.chunks, summary.unique_bytes, summary.zero_bytes) == (
        20480,
        3,
        12288,
        8192,
    )
    assert not summary.lengths


def test_manifest_of_an_empty_image_round_trip() -> None:
    empty = fmt.ManifestRecord(0, 0, 0, 0, array("Q"), array("Q"), array("I"))
    assert fmt.decode_manifest(fmt.encode_manifest(empty, DIGEST), DIGEST) == empty


@pytest.mark.parametrize(
    "lengths", [[8192, 8192], [8192, 8192, 8192], [8192, 12288, 0]], ids=["short", "long", "zero"]
)
def test_manifest_whose_runs_do_not_cover_the_image_is_refused(lengths: list[int]) -> None:
    runs = len(lengths)
    wrong = fmt.ManifestRecord(
        20480, 0, 0, 0, array("Q", lengths), array("Q", [0] * runs), array("I", [0] * runs)
    )
    with pytest.raises(StoreDamagedError, match="cover"):
        fmt.decode_manifest(fmt.encode_manifest(wrong, DIGEST), DIGEST)


def test_manifest_of_a_newer_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dedupstore.format.manifests.MANIFEST_VERSION", 2)
        record = fmt.encode_manifest(make_manifest(), DIGEST)
    with pytest.raises(StoreVersionError):
        fmt.decode_manifest(record, DIGEST)


@pytest.mark.parametrize("make", [noise, text])
def test_frame_round_trip(make: Callable[[int, int], bytes]) -> None:
    parts = [make(1, 4096), make(2, 1), make(3, 70000)]
    record = make_frame(parts)
    assert decode_frame(record) == b"".join(parts)
    header = fmt.decode_frame_header(memoryview(record), FRAME)
    assert header.raw_bytes == sum(map(len, parts))
    assert [slot.length for slot in header.slots] == [4096, 1, 70000]
    assert [slot.digest for slot in header.slots] == [blake3(part).digest() for part in parts]
    assert fmt.decode_frame_offsets(memoryview(record), FRAME) == (0, 4096, 4097, 74097)


def test_frame_is_compressed_only_where_that_pays() -> None:
    def codec(part: bytes) -> int:
        return fmt.decode_frame_header(memoryview(make_frame([part])), FRAME).codec

    assert codec(text(1, 65536)) == fmt.CODEC_ZSTD
    assert codec(noise(1, 65536)) == fmt.CODEC_RAW


def test_frame_without_contents_round_trip() -> None:
    record = make_frame([])
    assert decode_frame(record) == b""
    assert fmt.decode_frame_offsets(memoryview(record), FRAME) == (0,)


def test_slots_that_are_not_here_slice_to_nothing() -> None:
    parts = [b"a" * 10, b"b" * 20]
    slots = [
        fmt.Slot(blake3(parts[0]).digest(), 10),
        fmt.DROPPED,
        fmt.Slot(DIGEST, 99, fmt.SLOT_ABSENT),
        fmt.Slot(blake3(parts[1]).digest(), 20),
    ]
    record = fmt.encode_frame(slots, b"".join(parts), zstandard.ZstdCompressor(), 16)
    fmt.seal_frame(record, FRAME)
    raw = decode_frame(bytes(record))
    offsets = fmt.decode_frame_offsets(memoryview(record), FRAME)
    assert offsets == (0, fmt.NOT_HERE, fmt.NOT_HERE, 10, 30)
    assert raw[offsets[1] : offsets[1] + 10] == b""
    header = fmt.decode_frame_header(memoryview(record), FRAME)
    assert [slot.state for slot in header.slots] == [0, fmt.SLOT_DROPPED, fmt.SLOT_ABSENT, 0]


def test_frame_that_claims_too_much_is_refused_before_it_is_decompressed() -> None:
    bomb = bytes(fmt.FRAME_RAW_BYTES_LIMIT + 1)
    with pytest.raises(ChunkDamagedError, match="claims"):
        decode_frame(make_frame([bomb]))


def test_frame_keys_sort_as_their_numbers() -> None:
    numbers = [1, 255, 256, 65535, 65536, 1 << 40]
    keys = [fmt.frame_key(number) for number in numbers]
    assert keys == sorted(keys)
    assert [fmt.decode_frame_key(key) for key in keys] == numbers


def test_frame_key_of_another_length_is_refused() -> None:
    with pytest.raises(StoreDamagedError):
        fmt.decode_frame_key(b"\0" * 7)


def test_references_hold_frame_and_slot() -> None:
    ref = fmt.make_ref(12345, 95)
    assert (ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK) == (12345, 95)
    assert fmt.make_ref(1, 0) > fmt.REF_HOLE


@pytest.mark.parametrize(
    "superblock",
    [
        fmt.Superblock(b"u" * 16, 0, version=fmt.FORMAT_VERSION + 1),
        fmt.Superblock(b"u" * 16, 0, features_incompat=1 << 31),
        fmt.Superblock(b"u" * 16, 0, features_readonly_compat=1 << 31),
    ],
    ids=["version", "incompatible", "read-only"],
)
def test_stores_that_need_a_newer_release_are_refused(superblock: fmt.Superblock) -> None:
    decoded = fmt.decode_superblock(fmt.encode_superblock(superblock))
    with pytest.raises(StoreVersionError, match="newer dedupstore"):
        fmt.check_superblock(decoded, "/store")


def test_unknown_compatible_features_are_ignored() -> None:
    fmt.check_superblock(fmt.Superblock(b"u" * 16, 0, features_compat=0xFFFFFFFF), "/store")


def test_image_digest_does_not_depend_on_how_holes_are_split() -> None:
    def digest(*chunks: tuple[int, bytes]) -> bytes:
        hasher = fmt.ImageDigest()
        for length, chunk in chunks:
            hasher.add(length, chunk)
        return hasher.finish()

    one = digest((4096, DIGEST), (12288, fmt.ZERO_DIGEST), (4096, DIGEST))
    three = digest((4096, DIGEST), *[(4096, fmt.ZERO_DIGEST)] * 3, (4096, DIGEST))
    assert one == three
    assert one != digest((4096, DIGEST), (8192, fmt.ZERO_DIGEST), (4096, DIGEST))
    assert one != digest((4096, DIGEST), (12288, fmt.ZERO_DIGEST))
    assert digest() != digest((4096, fmt.ZERO_DIGEST))


def test_sizes_of_records_are_those_of_the_format() -> None:
    assert len(RECORDS["superblock"][0]) == 8 + 48
    assert len(RECORDS["totals"][0]) == 8 + 40
    assert len(RECORDS["index"][0]) == 12
    assert len(RECORDS["image"][0]) == 8 + 49
    assert len(RECORDS["draft"][0]) == 8 + 16
    assert len(make_frame([noise(1, 100), noise(2, 50)])) == 16 + 2 * 36 + 150
