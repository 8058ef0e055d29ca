"""Packs and manifests of remotes: what was encoded decodes to the same; no bytes do harm."""

from __future__ import annotations

from array import array
from uuid import UUID

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from dedupstore import format as fmt
from dedupstore.errors import RemoteDamagedError
from dedupstore.frames import Codecs, encode_new
from dedupstore.remote import layout
from dedupstore.remote.remote import open_frame
from tools.fuzzing import remotes

CHUNKS = st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=5)
SALTS = st.binary(min_size=16, max_size=16)


@given(frames=st.lists(CHUNKS, max_size=6), salt=SALTS)
def test_packs_keep_every_chunk(frames: list[list[bytes]], salt: bytes) -> None:
    records = []
    for chunks in frames:
        slots = tuple(fmt.Slot(blake3(chunk).digest(), len(chunk)) for chunk in chunks)
        record = encode_new(Codecs(), slots, chunks).record
        fmt.seal_frame(record, layout.FRAME_SEED)
        records.append(memoryview(record))
    pack = layout.encode_pack(records, salt)
    trailer = pack.data[-layout.TRAILER_BYTES :]
    length = layout.decode_trailer(trailer, pack.index.pack, len(pack.data))
    index = pack.data[-layout.TRAILER_BYTES - length : -layout.TRAILER_BYTES]
    decoded = layout.decode_index(index, pack.index.pack, len(pack.data))
    assert decoded == pack.index
    for chunks, frame in zip(frames, decoded.frames, strict=True):
        record = pack.data[frame.offset : frame.offset + frame.length]
        assert open_frame(frame, record, Codecs()) == b"".join(chunks)


@st.composite
def manifests(draw: st.DrawFn) -> layout.RemoteManifest:
    ids = draw(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4, unique=True))
    packs = tuple(layout.PackRef(pack, draw(st.integers(500, 1 << 26)), 300) for pack in ids)
    frames = draw(st.lists(st.tuples(st.integers(0, len(packs) - 1), st.integers(0, 2**32 - 1))))
    runs = st.tuples(st.integers(1, 1 << 40), st.integers(0, len(frames)), st.integers(0, 65535))
    lengths, refs, counts, zeros = array("Q"), array("Q"), array("I"), 0
    for length, frame, slot in draw(st.lists(runs, max_size=20)):
        lengths.append(length)
        refs.append(frame << 16 | slot if frame else 0)
        counts.append(draw(st.integers(1, 65536 - slot)) if frame else 0)
        zeros += 0 if frame else length
    return layout.RemoteManifest(
        *(sum(lengths), sum(counts), draw(st.integers(0, 2**64 - 1)), zeros, packs),
        array("I", [pack for pack, _ in frames]),
        array("I", [number for _, number in frames]),
        *(lengths, refs, counts),
    )


@given(manifest=manifests(), salt=SALTS)
def test_manifests_keep_every_column(manifest: layout.RemoteManifest, salt: bytes) -> None:
    data = layout.encode_manifest(manifest, salt)
    assert layout.decode_manifest(data, blake3(data).digest()) == manifest


@given(name=st.text(min_size=1, max_size=60), other=st.text(min_size=1, max_size=60))
def test_different_names_have_different_paths_below_images(name: str, other: str) -> None:
    remotes.run(b"\x08" + f"{name}\0{other}".encode(errors="replace"))


@given(created=st.floats(0, 9e10), uuid=st.uuids())
def test_info_keeps_what_it_says(created: float, uuid: UUID) -> None:
    info = layout.RemoteInfo(uuid, created)
    assert layout.decode_info(layout.encode_info(info)) == info


@pytest.mark.parametrize("decoder", range(9))
@given(data=st.binary(max_size=400))
def test_any_bytes_give_a_result_or_one_line(decoder: int, data: bytes) -> None:
    remotes.run(bytes((decoder,)) + data)


@given(data=st.binary(max_size=200))
def test_what_has_not_its_digest_is_refused(data: bytes) -> None:
    for decode in (
        lambda: layout.decode_manifest(data, bytes(32)),
        lambda: layout.decode_index(data, bytes(32), len(data) + 16),
    ):
        with pytest.raises(RemoteDamagedError):
            decode()
