"""The layout of remotes, against docs/remote-format.md."""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
import zstandard
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import RemoteDamagedError
from dedupstore.frames import Codecs, encode_new
from dedupstore.remote import layout
from dedupstore.remote.remote import open_frame
from tests.conftest import flipped, noise, text

SALT = b"sixteen bytes..."
DIGEST = blake3(b"digest").digest()
ROOT = layout.Root("lib/a", DIGEST, 4096, fmt.KIND_EROFS, 12.5, blake3(b"m").digest(), 99)


def make_frame(*chunks: bytes) -> bytearray:
    slots = tuple(fmt.Slot(blake3(chunk).digest(), len(chunk)) for chunk in chunks)
    record = encode_new(Codecs(), slots, list(chunks)).record
    fmt.seal_frame(record, layout.FRAME_SEED)
    return record


RECORDS = [make_frame(text(1), noise(2, 100)), make_frame(noise(3)), make_frame(text(4, 9))]
PACK = layout.encode_pack([memoryview(record) for record in RECORDS], SALT)
INDEX = PACK.data[-16 - PACK.index.index_bytes : -16]


def make_manifest() -> layout.RemoteManifest:
    return layout.RemoteManifest(
        *(4196 + 4096 + 1000 + 9, 4, 4196 + 4096 + 9, 1000),
        (layout.PackRef(PACK.index.pack, len(PACK.data), PACK.index.index_bytes),),
        array("I", [0, 0, 0]),
        array("I", [1, 0, 2]),
        array("Q", [4096, 1000, 4196, 9]),
        array("Q", [1 << 16, 0, 2 << 16, 3 << 16]),
        array("I", [1, 0, 2, 1]),
    )


def encoded(manifest: layout.RemoteManifest) -> tuple[bytes, bytes]:
    data = layout.encode_manifest(manifest, SALT)
    return data, blake3(data).digest()


# --- names ---


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("debian-12.5_x", "images/debian-12.5_x"),
        ("lib/a:b", "images/lib=2Fa=3Ab"),
        ("a=2Fb", "images/a=3D2Fb"),
        ("é", "images/=C3=A9"),
        ("..", "images/=2E=2E"),
        ("x" * 200, "images/" + "x" * 200),
        ("x" * 201, "images/=" + blake3(b"x" * 201).hexdigest()),
        ("é" * 100, "images/=" + blake3("é".encode() * 100).hexdigest()),
    ],
)
def test_names_become_paths(name: str, path: str) -> None:
    assert layout.image_path(name) == path


def test_paths_of_packs_and_manifests() -> None:
    pack = "ab" + "0" * 62
    assert layout.pack_path(bytes.fromhex(pack)) == f"packs/ab/{pack}"
    assert layout.manifest_path(bytes.fromhex(pack)) == f"manifests/{pack}"
    for path in (f"packs/ab/{pack}", f"manifests/{pack}"):
        assert layout.id_of(path) == bytes.fromhex(pack)
    for other in (f"packs/ac/{pack}", f"packs/{pack}", f"images/{pack}", "lock", f"{path}0"):
        assert layout.id_of(other) is None


# --- documents ---


def test_documents_are_what_the_format_says() -> None:
    assert json.loads(layout.encode_root(ROOT)) == {
        "format": 1,
        "name": "lib/a",
        "digest": DIGEST.hex(),
        "size": 4096,
        "kind": "erofs",
        "created": 12.5,
        "manifest": ROOT.manifest.hex(),
        "manifest_bytes": 99,
    }
    info = layout.RemoteInfo(UUID(int=7), 5.0)
    assert json.loads(layout.encode_info(info)) == {
        "format": 1,
        "uuid": str(UUID(int=7)),
        "created": 5.0,
    }
    assert layout.decode_info(layout.encode_info(info)) == info
    assert layout.decode_root(layout.encode_root(ROOT), "images/lib=2Fa") == ROOT


def test_an_empty_root_document_is_a_deleted_image() -> None:
    assert layout.decode_root(b"", "images/x") is None


def test_condemned_documents_name_packs_and_manifests_only() -> None:
    paths = frozenset({layout.pack_path(DIGEST), layout.manifest_path(DIGEST)})
    assert layout.decode_condemned(layout.encode_condemned(paths), "c") == paths
    for path in ("images/a", "../x", "packs/../images/a", 5, None):
        with pytest.raises(RemoteDamagedError, match="neither"):
            layout.decode_condemned(json.dumps({"format": 1, "objects": [path]}).encode(), "c")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"name": ""},
        {"name": "\ud800"},
        {"name": 5},
        {"digest": "ab"},
        {"digest": DIGEST.hex().upper()},
        {"manifest": None},
        {"size": -1},
        {"size": 1 << 63},
        {"size": True},
        {"size": 4096.0},
        {"kind": "qcow2"},
        {"created": float("nan")},
        {"created": 1e300},
        {"manifest_bytes": 1 << 40},
        {"format": 2},
        {"format": "1"},
    ],
    ids=str,
)
def test_a_root_document_that_cannot_be_is_refused_in_one_line(change: dict[str, Any]) -> None:
    document = json.loads(layout.encode_root(ROOT)) | change
    with pytest.raises(RemoteDamagedError) as caught:
        layout.decode_root(json.dumps(document).encode(), "images/lib=2Fa")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000, b"{}"])
def test_what_is_no_document_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteDamagedError):
        layout.decode_info(data)


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
    assert layout.decode_trailer(PACK.data[-16:], PACK.index.pack, len(PACK.data)) == len(INDEX)
    index = layout.decode_index(INDEX, PACK.index.pack, len(PACK.data))
    assert index == PACK.index
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
            layout.decode_index(flipped(INDEX, bit), PACK.index.pack, len(PACK.data))


def test_a_frame_whose_chunk_is_another_is_refused() -> None:
    lying = make_frame(noise(3))
    lying[16:48] = DIGEST
    frame = layout.PackedFrame(0, len(lying), bytes(lying[:52]))
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
        layout.decode_index(index, pack, pack_bytes)
    layout.decode_index(*index_of(head(1, 5, (5, 0))))


def test_an_index_that_claims_more_frames_than_it_has_is_refused_at_once() -> None:
    index = SALT + struct.pack("<I", 0xFFFFFFFF)
    with pytest.raises(RemoteDamagedError, match="ends early"):
        layout.decode_index(index, blake3(index).digest(), len(index) + 16)


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
        layout.decode_trailer(trailer, DIGEST, 4096)


# --- manifests ---


def test_a_manifest_decodes_to_what_was_encoded() -> None:
    manifest = make_manifest()
    data, manifest_id = encoded(manifest)
    assert data[:12] == b"dedupMAN\x01\x00\x00\x00"
    assert data[12:28] == SALT
    assert struct.unpack_from("<IIIQQQQ", data, 28) == (1, 3, 4, manifest.size, 4, 8301, 1000)
    assert len(zstandard.decompress(data[72:])) == 40 + 8 * 3 + 20 * 4
    assert layout.decode_manifest(data, manifest_id) == manifest


def test_the_frames_of_a_manifest_are_found_in_the_indexes() -> None:
    manifest = make_manifest()
    frames = list(layout.frames_of(manifest, {PACK.index.pack: PACK.index}))
    assert [frame for _, frame in frames] == [PACK.index.frames[i] for i in (1, 0, 2)]
    slots = [frame.header().slots for _, frame in frames]
    digest = fmt.ImageDigest()
    for data in (noise(3), bytes(1000), text(1), noise(2, 100), text(4, 9)):
        digest.add(len(data), blake3(data).digest() if any(data) else fmt.ZERO_DIGEST)
    assert layout.image_digest(manifest, slots) == digest.finish()
    with pytest.raises(RemoteDamagedError, match="fit"):
        layout.image_digest(manifest, slots[::-1])
    wrong = replace(manifest, frame_numbers=array("I", [1, 0, 3]))
    with pytest.raises(RemoteDamagedError, match="no frame 3"):
        list(layout.frames_of(wrong, {PACK.index.pack: PACK.index}))


REF = make_manifest().packs[0]


@pytest.mark.parametrize(
    "change",
    [
        {"size": 5},
        {"zero_bytes": 5},
        {"chunks": 5},
        {"size": 1 << 63, "lengths": array("Q", [4096, 1000, 4196, (1 << 63) - 9292])},
        {"frame_packs": array("I", [0, 1, 0])},
        {"packs": (REF, REF)},
        {"packs": (replace(REF, pack_bytes=layout.PACK_BYTES_MAX + 1),)},
        {"packs": (replace(REF, index_bytes=REF.pack_bytes),)},
        {"packs": (replace(REF, pack_bytes=3),)},
        {"refs": array("Q", [1 << 16, 0, 2 << 16, 4 << 16])},
        {"refs": array("Q", [5, 0, 2 << 16, 3 << 16])},
        {"counts": array("I", [1, 1, 2, 0])},
        {"counts": array("I", [1, 0, 3, 0])},
        {"refs": array("Q", [(1 << 16) + 65535, 0, (2 << 16) + 65535, 3 << 16])},
        {"lengths": array("Q", [0, 1000, 8292, 9])},
    ],
    ids=" ".join,
)
def test_a_manifest_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    data, manifest_id = encoded(replace(make_manifest(), **change))
    with pytest.raises(RemoteDamagedError):
        layout.decode_manifest(data, manifest_id)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:71],
        lambda data: b"dedupMAX" + data[8:],
        lambda data: data[:8] + b"\x02" + data[9:],
        lambda data: data[:72] + b"no zstd",
        lambda data: data[:72],
        lambda data: data[:72] + zstandard.compress(bytes(50)),
        lambda data: data[:28] + b"\xff" * 12 + data[40:],
    ],
)
def test_what_is_no_manifest_is_refused(spoil: Callable[[bytes], bytes]) -> None:
    spoiled = spoil(encoded(make_manifest())[0])
    with pytest.raises(RemoteDamagedError):
        layout.decode_manifest(spoiled, blake3(spoiled).digest())
    with pytest.raises(RemoteDamagedError, match="digest"):
        layout.decode_manifest(spoiled, DIGEST)
