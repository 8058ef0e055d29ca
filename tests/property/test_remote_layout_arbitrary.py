"""Packs, bundles and manifests of remotes: what was encoded decodes to the same; no bytes do
harm."""

from __future__ import annotations

from array import array
from dataclasses import replace
from itertools import pairwise
from uuid import UUID

import pytest
from blake3 import blake3
from hypothesis import given, strategies as st

from dedupstore.errors import RemoteDamagedError
from dedupstore.frames import Codecs
from dedupstore.remote import layout, packs
from dedupstore.remote.manifests import (
    BundleRef,
    PackRef,
    RemoteManifest,
    decode_manifest,
    encode_manifest,
    index_spans,
)
from dedupstore.remote.remote import open_frame
from tests.remotes import packed_record, without_bundles
from tools.fuzzing import remotes

CHUNKS = st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=5)
SALTS = st.binary(min_size=16, max_size=16)


@given(frames=st.lists(CHUNKS, max_size=6), salt=SALTS)
def test_packs_keep_every_chunk(frames: list[list[bytes]], salt: bytes) -> None:
    pack = packs.encode_pack([packed_record(*chunks) for chunks in frames], salt)
    trailer = pack.data[-packs.TRAILER_BYTES :]
    length = packs.decode_trailer(trailer, pack.index.pack, len(pack.data))
    index = pack.data[-packs.TRAILER_BYTES - length : -packs.TRAILER_BYTES]
    decoded = packs.decode_index(index, pack.index.pack, len(pack.data))
    assert decoded == pack.index
    for chunks, frame in zip(frames, decoded.frames, strict=True):
        record = pack.data[frame.offset : frame.offset + frame.length]
        assert open_frame(frame, record, Codecs()) == b"".join(chunks)


@given(several=st.lists(st.lists(CHUNKS, max_size=3), max_size=5), salt=SALTS)
def test_bundles_keep_every_index(several: list[list[list[bytes]]], salt: bytes) -> None:
    indexes = [
        packs.encode_pack([packed_record(*chunks) for chunks in frames], bytes((at,)) * 16).index
        for at, frames in enumerate(several)
    ]
    bundle = packs.encode_bundle(indexes, salt)
    entries = packs.decode_bundle(bundle.data, bundle.bundle)
    assert entries == bundle.entries
    assert [packs.decode_bundled(bundle.data, entry) for entry in entries] == indexes


IDS = st.binary(min_size=32, max_size=32)


@st.composite
def manifests(draw: st.DrawFn) -> RemoteManifest:
    """With indexes of 300 bytes, anywhere in bundles, or in none."""
    bundles = tuple(
        draw(st.lists(st.builds(BundleRef, IDS, st.integers(300, 1 << 26)), max_size=3))
    )
    refs_to_packs = []
    for pack in draw(st.lists(IDS, min_size=1, max_size=4, unique=True)):
        bundle = draw(st.integers(0, len(bundles)))
        last = bundles[bundle - 1].length - 300 if bundle else 2**32 - 1
        lengths = draw(st.integers(500, 1 << 26)), 300
        refs_to_packs.append(PackRef(pack, *lengths, bundle, draw(st.integers(0, last))))
    there = tuple(refs_to_packs)
    frames = draw(st.lists(st.tuples(st.integers(0, len(there) - 1), st.integers(0, 2**32 - 1))))
    runs = st.tuples(st.integers(1, 1 << 40), st.integers(0, len(frames)), st.integers(0, 65535))
    lengths, refs, counts, zeros = array("Q"), array("Q"), array("I"), 0
    for length, frame, slot in draw(st.lists(runs, max_size=20)):
        lengths.append(length)
        refs.append(frame << 16 | slot if frame else 0)
        counts.append(draw(st.integers(1, 65536 - slot)) if frame else 0)
        zeros += 0 if frame else length
    return RemoteManifest(
        *(sum(lengths), sum(counts), draw(st.integers(0, 2**64 - 1)), zeros, bundles, there),
        array("I", [pack for pack, _ in frames]),
        array("I", [number for _, number in frames]),
        *(lengths, refs, counts),
    )


@given(manifest=manifests(), salt=SALTS)
def test_manifests_keep_every_column(manifest: RemoteManifest, salt: bytes) -> None:
    data = encode_manifest(manifest, salt)
    assert decode_manifest(data, blake3(data).digest()) == manifest


@given(manifest=manifests())
def test_manifests_of_version_1_keep_all_but_the_bundles(manifest: RemoteManifest) -> None:
    data = without_bundles(manifest)
    alone = tuple(PackRef(ref.pack, ref.pack_bytes, ref.index_bytes) for ref in manifest.packs)
    expected = replace(manifest, bundles=(), packs=alone)
    assert decode_manifest(data, blake3(data).digest()) == expected


@given(manifest=manifests(), gap=st.integers(0, 1 << 27))
def test_spans_have_every_bundled_index_once_and_no_gap_above_the_one_allowed(
    manifest: RemoteManifest, gap: int
) -> None:
    spans = list(index_spans(manifest.packs, manifest.bundles, gap))
    bundled = [ref for ref in manifest.packs if ref.bundle]
    assert sorted(ref.pack for _, span in spans for ref in span) == sorted(r.pack for r in bundled)
    for bundle, span in spans:
        assert {manifest.bundles[ref.bundle - 1].bundle for ref in span} == {bundle}
        for ref, after in pairwise(span):
            assert 0 <= after.offset - ref.offset <= ref.index_bytes + gap
    for (_, span), (_, after) in pairwise(spans):
        last, first = span[-1], after[0]
        assert first.bundle != last.bundle or first.offset - last.offset > 300 + gap


@given(name=st.text(min_size=1, max_size=60), other=st.text(min_size=1, max_size=60))
def test_different_names_have_different_paths_below_images(name: str, other: str) -> None:
    remotes.run(b"\x08" + f"{name}\0{other}".encode(errors="replace"))


@given(created=st.floats(0, 9e10), uuid=st.uuids())
def test_info_keeps_what_it_says(created: float, uuid: UUID) -> None:
    info = layout.RemoteInfo(uuid, created)
    assert layout.decode_info(layout.encode_info(info)) == info


@pytest.mark.parametrize("decoder", range(10))
@given(data=st.binary(max_size=400))
def test_any_bytes_give_a_result_or_one_line(decoder: int, data: bytes) -> None:
    remotes.run(bytes((decoder,)) + data)


@given(data=st.binary(max_size=200))
def test_what_has_not_its_digest_is_refused(data: bytes) -> None:
    for decode in (
        lambda: decode_manifest(data, bytes(32)),
        lambda: packs.decode_index(data, bytes(32), len(data) + 16),
        lambda: packs.decode_bundle(data, bytes(32)),
    ):
        with pytest.raises(RemoteDamagedError):
            decode()
