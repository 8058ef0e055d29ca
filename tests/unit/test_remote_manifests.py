"""Manifests of remotes, against docs/remote-format.md."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import zstandard
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import RemoteDamagedError
from dedupstore.remote import manifests, packs
from dedupstore.remote.manifests import BundleRef, PackRef, RemoteManifest
from tests.conftest import noise, text
from tests.remotes import packed_record, without_bundles

SALT = b"sixteen bytes..."
DIGEST = blake3(b"digest").digest()
PACK = packs.encode_pack(
    [
        packed_record(text(1), noise(2, 100)),
        packed_record(noise(3)),
        packed_record(text(4, 9)),
    ],
    SALT,
)
OTHER = packs.encode_pack([packed_record(noise(5))], SALT)
BUNDLE = packs.encode_bundle([OTHER.index, PACK.index], SALT)
REF = PackRef(PACK.index.pack, len(PACK.data), PACK.index.index_bytes, 1, BUNDLE.entries[1].offset)
MANIFEST = RemoteManifest(
    *(4196 + 4096 + 1000 + 9, 4, 4196 + 4096 + 9, 1000),
    (BundleRef(BUNDLE.bundle, len(BUNDLE.data)),),
    (REF,),
    array("I", [0, 0, 0]),
    array("I", [1, 0, 2]),
    array("Q", [4096, 1000, 4196, 9]),
    array("Q", [1 << 16, 0, 2 << 16, 3 << 16]),
    array("I", [1, 0, 2, 1]),
)


def encoded(manifest: RemoteManifest) -> tuple[bytes, bytes]:
    data = manifests.encode_manifest(manifest, SALT)
    return data, blake3(data).digest()


def test_a_manifest_is_what_the_format_says() -> None:
    data, _ = encoded(MANIFEST)
    assert data[:12] == b"dedupMAN\x02\x00\x00\x00"
    assert data[12:28] == SALT
    assert struct.unpack_from("<IIIQQQQ", data, 28) == (1, 3, 4, MANIFEST.size, 4, 8301, 1000)
    assert data[72:76] == struct.pack("<I", 1)
    assert zstandard.decompress(data[76:]) == b"".join(
        (
            BUNDLE.bundle,
            struct.pack("<I", len(BUNDLE.data)),
            PACK.index.pack,
            struct.pack("<II", len(PACK.data), PACK.index.index_bytes),
            struct.pack("<II", 1, 32 + 2 * 40 + OTHER.index.index_bytes),
            struct.pack("<3I", 0, 0, 0),
            struct.pack("<3I", 1, 0, 2),
            struct.pack("<4Q", 4096, 1000, 4196, 9),
            struct.pack("<4q", 1 << 16, -1 << 16, 2 << 16, 1 << 16),
            struct.pack("<4I", 1, 0, 2, 1),
        )
    )


def test_a_manifest_decodes_to_what_was_encoded() -> None:
    assert manifests.decode_manifest(*encoded(MANIFEST)) == MANIFEST
    nothing = RemoteManifest(
        *(0, 0, 0, 0, (), ()),
        *(array("I"), array("I"), array("Q"), array("Q"), array("I")),
    )
    assert manifests.decode_manifest(*encoded(nothing)) == nothing


def test_a_manifest_of_version_1_has_no_bundles() -> None:
    data = without_bundles(MANIFEST)
    alone = PackRef(REF.pack, REF.pack_bytes, REF.index_bytes)
    assert manifests.decode_manifest(data, blake3(data).digest()) == replace(
        MANIFEST, bundles=(), packs=(alone,)
    )


def test_the_frames_of_a_manifest_are_found_in_the_indexes() -> None:
    frames = list(manifests.frames_of(MANIFEST, {PACK.index.pack: PACK.index}))
    assert [frame for _, frame in frames] == [PACK.index.frames[i] for i in (1, 0, 2)]
    slots = [frame.header.slots for _, frame in frames]
    digest = fmt.ImageDigest()
    for data in (noise(3), bytes(1000), text(1), noise(2, 100), text(4, 9)):
        digest.add(len(data), blake3(data).digest() if any(data) else fmt.ZERO_DIGEST)
    assert manifests.image_digest(MANIFEST, slots) == digest.finish()
    with pytest.raises(RemoteDamagedError, match="fit"):
        manifests.image_digest(MANIFEST, slots[::-1])
    wrong = replace(MANIFEST, frame_numbers=array("I", [1, 0, 3]))
    with pytest.raises(RemoteDamagedError, match="no frame 3"):
        list(manifests.frames_of(wrong, {PACK.index.pack: PACK.index}))


@pytest.mark.parametrize(
    "change",
    [
        {"size": 5},
        {"zero_bytes": 5},
        {"chunks": 5},
        {"size": 1 << 63, "lengths": array("Q", [4096, 1000, 4196, (1 << 63) - 9292])},
        {"frame_packs": array("I", [0, 1, 0])},
        {"packs": (REF, REF)},
        {"packs": (replace(REF, pack_bytes=packs.PACK_BYTES_MAX + 1),)},
        {"packs": (replace(REF, index_bytes=REF.pack_bytes),)},
        {"packs": (replace(REF, pack_bytes=3),)},
        {"packs": (replace(REF, bundle=2),)},
        {"packs": (replace(REF, offset=REF.offset + 1),)},
        {"packs": (replace(REF, offset=(1 << 32) - 1),)},
        {"bundles": ()},
        {"bundles": (BundleRef(DIGEST, packs.BUNDLE_BYTES_MAX + 1),)},
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
    data, manifest_id = encoded(replace(MANIFEST, **change))
    with pytest.raises(RemoteDamagedError):
        manifests.decode_manifest(data, manifest_id)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:71],
        lambda data: data[:75],
        lambda data: b"dedupMAX" + data[8:],
        lambda data: data[:8] + b"\x00" + data[9:],
        lambda data: data[:8] + b"\x01" + data[9:],
        lambda data: data[:8] + b"\x03" + data[9:],
        lambda data: data[:76] + b"no zstd",
        lambda data: data[:76],
        lambda data: data[:76] + zstandard.compress(bytes(50)),
        lambda data: data[:28] + b"\xff" * 12 + data[40:],
        lambda data: data[:72] + b"\xff" * 4 + data[76:],
    ],
)
def test_what_is_no_manifest_is_refused(spoil: Callable[[bytes], bytes]) -> None:
    spoiled = spoil(encoded(MANIFEST)[0])
    with pytest.raises(RemoteDamagedError):
        manifests.decode_manifest(spoiled, blake3(spoiled).digest())
    with pytest.raises(RemoteDamagedError, match="digest"):
        manifests.decode_manifest(spoiled, DIGEST)


# --- where the bundles have the indexes ---


def spans(*places: tuple[int, int], gap: int = 10) -> list[tuple[bytes, list[int]]]:
    """(bundle, offsets) of the spans of indexes of 100 bytes each at (bundle's number, offset)."""
    bundles = tuple(BundleRef(bytes((number,)) * 32, 1 << 20) for number in (1, 2))
    refs = tuple(PackRef(bytes((i,)) * 32, 5000, 100, *place) for i, place in enumerate(places))
    found = manifests.index_spans(refs, bundles, gap)
    return [(bundle, [ref.offset for ref in span]) for bundle, span in found]


ONE, TWO = b"\x01" * 32, b"\x02" * 32


def test_indexes_that_lie_near_each_other_are_one_span() -> None:
    assert spans((1, 72), (1, 172), (1, 282)) == [(ONE, [72, 172, 282])]
    assert spans((1, 282), (1, 72), (1, 172)) == [(ONE, [72, 172, 282])]


def test_indexes_that_lie_far_from_each_other_are_spans_of_their_own() -> None:
    assert spans((1, 72), (1, 183), (1, 283)) == [(ONE, [72]), (ONE, [183, 283])]


def test_each_bundle_has_spans_of_its_own_and_indexes_in_none_are_in_no_span() -> None:
    assert spans((2, 72), (0, 0), (1, 100), (1, 200), (2, 172)) == [
        (ONE, [100, 200]),
        (TWO, [72, 172]),
    ]
    assert spans((0, 0), (0, 0)) == spans() == []
