"""Packs and bundles of their indexes, against docs/remote-format.md."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import RemoteDamagedError
from dedupstore.frames import Codecs
from dedupstore.remote import packs
from dedupstore.remote.remote import open_frame
from tests.conftest import flipped, noise, text
from tests.remotes import packed_record

SALT = b"sixteen bytes..."
DIGEST = blake3(b"digest").digest()
RECORDS = [
    packed_record(text(1), noise(2, 100)),
    packed_record(noise(3)),
    packed_record(text(4, 9)),
]
PACK = packs.encode_pack(RECORDS, SALT)
INDEX = PACK.data[-16 - PACK.index.index_bytes : -16]
OTHER = packs.encode_pack([packed_record(noise(5))], b"another 16 bytes")


# --- packs ---


def test_a_pack_is_its_frames_its_index_and_its_trailer() -> None:
    assert PACK.data.startswith(b"".join(RECORDS))
    index_bytes, version, zero, magic = struct.unpack("<IHH8s", PACK.data[-16:])
    assert (version, zero, magic) == (1, 0, b"dedupPCK")
    index = PACK.data[-16 - index_bytes : -16]
    assert index[:16] == SALT
    assert struct.unpack_from("<I", index, 16) == (3,)
    assert index[20:24] == len(RECORDS[0]).to_bytes(4, "little")
    assert index[24 : 24 + 16 + 72] == RECORDS[0][: 16 + 72]
    assert PACK.index.pack == blake3(index).digest()


def test_a_decoded_index_is_the_encoded_one_and_leads_to_the_frames() -> None:
    assert packs.decode_trailer(PACK.data[-16:], PACK.index.pack, len(PACK.data)) == len(INDEX)
    index = packs.decode_index(INDEX, PACK.index.pack, len(PACK.data))
    assert index == PACK.index
    assert index.encode() == INDEX
    frame = index.frames[0]
    record = PACK.data[frame.offset : frame.offset + frame.length]
    assert open_frame(frame, record, Codecs()) == text(1) + noise(2, 100)


def test_any_flipped_bit_of_a_frame_or_an_index_is_noticed() -> None:
    frame = PACK.index.frames[2]
    record = PACK.data[frame.offset : frame.offset + frame.length]
    for bit in range(8 * len(record)):
        with pytest.raises(RemoteDamagedError):
            open_frame(frame, flipped(record, bit), Codecs())
    for bit in range(0, 8 * len(INDEX), 7):
        with pytest.raises(RemoteDamagedError, match="digest"):
            packs.decode_index(flipped(INDEX, bit), PACK.index.pack, len(PACK.data))


def test_a_frame_whose_chunk_is_another_is_refused() -> None:
    lying = packed_record(noise(3))
    lying[16:48] = DIGEST
    head = bytes(lying[:52])
    frame = packs.PackedFrame(0, len(lying), head, fmt.decode_frame_header(head, 0))
    with pytest.raises(RemoteDamagedError, match="digest"):
        open_frame(frame, bytes(lying), Codecs())


def index_of(*heads: bytes, lengths: list[int] | None = None) -> tuple[bytes, bytes, int]:
    index = SALT + struct.pack("<I", len(heads))
    sizes = lengths or [len(head) + 50 for head in heads]
    for head, size in zip(heads, sizes, strict=True):
        index += struct.pack("<I", size) + head
    return index, blake3(index).digest(), sum(sizes) + len(index) + 16


def head(codec: int, raw: int, *slots: tuple[int, int]) -> bytes:
    packed = b"".join(DIGEST + struct.pack("<I", size | state << 30) for size, state in slots)
    return struct.pack("<QBBHI", 0, codec, 0, len(slots), raw) + packed


@pytest.mark.parametrize(
    ("index", "pack", "pack_bytes"),
    [
        index_of(head(1, 5, (5, 1))),
        index_of(head(1, 5, (5, 2))),
        index_of(head(1, 5, (5, 3))),
        index_of(head(1, 6, (5, 0))),
        index_of(head(1, 5, (5, 0), (0, 0))),
        index_of(head(1, 0)),
        index_of(head(2, 5, (5, 0))),
        index_of(head(0, 5, (5, 0))),
        index_of(head(1, 17 << 20, (17 << 20, 0))),
        index_of(head(1, 5, (5, 0)), lengths=[52]),
        index_of(head(1, 5, (5, 0)), lengths=[10]),
        (*index_of(head(1, 5, (5, 0)))[:2], 500),
    ],
)
def test_an_index_that_cannot_be_is_refused_whatever_its_id(
    index: bytes, pack: bytes, pack_bytes: int
) -> None:
    with pytest.raises(RemoteDamagedError):
        packs.decode_index(index, pack, pack_bytes)
    packs.decode_index(*index_of(head(1, 5, (5, 0))))


def test_an_index_that_claims_more_frames_than_it_has_is_refused_at_once() -> None:
    index = SALT + struct.pack("<I", 0xFFFFFFFF)
    with pytest.raises(RemoteDamagedError, match="ends early"):
        packs.decode_index(index, blake3(index).digest(), len(index) + 16)


@pytest.mark.parametrize(
    "trailer",
    [
        b"",
        struct.pack("<IHH8s", 100, 1, 0, b"dedupPCX"),
        struct.pack("<IHH8s", 100, 2, 0, b"dedupPCK"),
        struct.pack("<IHH8s", 3, 1, 0, b"dedupPCK"),
        struct.pack("<IHH8s", 5000, 1, 0, b"dedupPCK"),
    ],
)
def test_a_trailer_that_cannot_be_is_refused(trailer: bytes) -> None:
    with pytest.raises(RemoteDamagedError):
        packs.decode_trailer(trailer, DIGEST, 4096)


# --- bundles ---


BUNDLE = packs.encode_bundle([PACK.index, OTHER.index], SALT)


def bundle_of(*packed: tuple[int, int], rest: bytes = bytes(100)) -> bytes:
    """A bundle that claims packs of these (bytes, bytes of the index), and what follows."""
    table = b"".join(DIGEST + struct.pack("<II", *lengths) for lengths in packed)
    return struct.pack("<8sHH16sI", b"dedupIDX", 1, 0, SALT, len(packed)) + table + rest


def test_a_bundle_is_a_table_and_the_indexes_as_they_are_in_their_packs() -> None:
    data = BUNDLE.data
    assert data[:12] == b"dedupIDX\x01\x00\x00\x00"
    assert data[12:28] == SALT
    assert data[28:32] == struct.pack("<I", 2)
    lengths = struct.pack("<II", len(PACK.data), len(INDEX))
    assert data[32:72] == PACK.index.pack + lengths
    lengths = struct.pack("<II", len(OTHER.data), OTHER.index.index_bytes)
    assert data[72:112] == OTHER.index.pack + lengths
    assert data[112:] == INDEX + OTHER.data[-16 - OTHER.index.index_bytes : -16]
    assert BUNDLE.bundle == blake3(data).digest()


def test_a_decoded_bundle_leads_to_the_indexes() -> None:
    entries = packs.decode_bundle(BUNDLE.data, BUNDLE.bundle)
    assert entries == BUNDLE.entries
    assert [packs.decode_bundled(BUNDLE.data, entry) for entry in entries] == [
        PACK.index,
        OTHER.index,
    ]
    nothing = packs.encode_bundle([], SALT)
    assert packs.decode_bundle(nothing.data, nothing.bundle) == ()


def test_any_flipped_bit_of_a_bundle_is_noticed() -> None:
    for bit in range(0, 8 * len(BUNDLE.data), 7):
        with pytest.raises(RemoteDamagedError, match="digest"):
            packs.decode_bundle(flipped(BUNDLE.data, bit), BUNDLE.bundle)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda data: b"", "no bundle"),
        (lambda data: data[:31], "no bundle"),
        (lambda data: b"dedupPCK" + data[8:], "no bundle"),
        (lambda data: data[:8] + b"\x02" + data[9:], "version 2"),
        (lambda data: data[:111], "ends early"),
        (lambda data: data[:28] + b"\xff" * 4 + data[32:], "ends early"),
        (lambda data: data[:-1], "fill"),
        (lambda data: data + b"\0", "fill"),
        (lambda data: bundle_of((5000, 99)), "fill"),
        (lambda data: bundle_of((5000, 101)), "fill"),
        (lambda data: bundle_of((5000, 19), rest=bytes(19)), "length"),
        (lambda data: bundle_of((115, 100)), "length"),
        (lambda data: bundle_of((0, 100)), "length"),
        (lambda data: bundle_of((packs.PACK_BYTES_MAX + 1, 100)), "length"),
        (lambda data: bundle_of((packs.PACK_BYTES_MAX, packs.INDEX_BYTES_MAX + 1)), "length"),
    ],
)
def test_a_bundle_that_cannot_be_is_refused_whatever_its_id(
    spoil: Callable[[bytes], bytes], why: str
) -> None:
    spoiled = spoil(BUNDLE.data)
    with pytest.raises(RemoteDamagedError, match=why) as caught:
        packs.decode_bundle(spoiled, blake3(spoiled).digest())
    assert str(caught.value).isprintable()


def test_a_bundle_says_nothing_of_what_is_in_its_indexes() -> None:
    """Each has a digest of its own, which is looked at when it is used."""
    data = bundle_of((116, 100))
    (entry,) = packs.decode_bundle(data, blake3(data).digest())
    assert entry == packs.Bundled(DIGEST, 116, 72, 100)
    with pytest.raises(RemoteDamagedError, match="digest"):
        packs.decode_index(data[entry.offset :], entry.pack, entry.pack_bytes)
