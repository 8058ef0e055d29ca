"""Where cuts fall."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from dedupstore import chunker
from dedupstore.chunker import (
    Segment,
    cut_by_content,
    is_zero,
    segments_of_data,
    segments_of_extents,
)
from dedupstore.constants import CDC_BYTES_MIN, CHUNK_BYTES_MAX, GRID_BYTES, SEGMENT_BYTES
from tests.conftest import blocks, noise


def cuts(data: bytes) -> list[int]:
    return list(cut_by_content(memoryview(data)))


def extent_cuts(size: int, extents: Iterable[tuple[int, int]]) -> list[int]:
    return [cut for segment in segments_of_extents(size, extents) for cut in segment.cuts]


def test_zero_is_recognised_only_where_every_byte_is_zero() -> None:
    assert is_zero(bytes(CHUNK_BYTES_MAX))
    assert is_zero(memoryview(bytes(7)))
    assert not is_zero(b"")
    for at in (0, 100, 4095):
        data = bytearray(4096)
        data[at] = 1
        assert not is_zero(bytes(data))


def test_extents_are_cut_at_their_edges() -> None:
    assert extent_cuts(40960, [(4096, 12288), (12288, 16384), (20480, 28672)]) == [
        4096,
        8192,
        4096,
        4096,
        8192,
        12288,
    ]


def test_long_extents_are_cut_at_the_longest_chunk() -> None:
    size = 2 * CHUNK_BYTES_MAX + 4096
    assert extent_cuts(size, [(0, size)]) == [CHUNK_BYTES_MAX, CHUNK_BYTES_MAX, 4096]


def test_image_without_extents_is_cut_like_one() -> None:
    assert extent_cuts(4096 + CHUNK_BYTES_MAX, []) == [CHUNK_BYTES_MAX, 4096]


def test_empty_image_has_no_segments() -> None:
    assert list(segments_of_extents(0, [])) == []
    assert list(segments_of_data([])) == []
    assert cuts(b"") == []


def test_segments_of_extents_follow_each_other_and_stay_near_their_size() -> None:
    size = 3 * SEGMENT_BYTES + 12345
    extents = [(at, at + 8192) for at in range(4096, size - 8192, 98304)]
    position = 0
    for segment in segments_of_extents(size, extents):
        assert segment.offset == position
        assert segment.length == sum(segment.cuts) < SEGMENT_BYTES + CHUNK_BYTES_MAX
        position += segment.length
    assert position == size


def test_segments_of_data_lie_on_the_segment_grid() -> None:
    regions = [(4096, SEGMENT_BYTES + 4096), (3 * SEGMENT_BYTES - 4096, 3 * SEGMENT_BYTES)]
    assert list(segments_of_data(regions)) == [
        Segment(4096, SEGMENT_BYTES - 4096),
        Segment(SEGMENT_BYTES, 4096),
        Segment(3 * SEGMENT_BYTES - 4096, 4096),
    ]


def test_zero_blocks_are_holes_and_end_chunks() -> None:
    assert cuts(blocks(1, 0, 0, 2, 0)) == [4096, -8192, 4096, -4096]


def test_partial_last_block_belongs_to_the_last_chunk() -> None:
    assert cuts(blocks(1) + noise(2, 100)) == [4196]


def test_partial_last_block_of_zeros_is_a_hole_as_in_a_sparse_file() -> None:
    assert cuts(blocks(1) + bytes(100)) == [4096, -100]


def test_no_chunk_is_longer_than_allowed_without_any_content_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunker, "xxh3_64_intdigest", lambda _: chunker.CDC_MASK)
    assert cuts(noise(1, 2 * CHUNK_BYTES_MAX + 4096)) == [CHUNK_BYTES_MAX, CHUNK_BYTES_MAX, 4096]


def test_content_cuts_keep_the_shortest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunker, "xxh3_64_intdigest", lambda _: 0)
    assert set(cuts(noise(1, 10 * CDC_BYTES_MIN))) == {CDC_BYTES_MIN}


def test_block_that_hashes_like_zeros_is_not_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunker, "xxh3_64_intdigest", lambda _: chunker._ZERO_BLOCK_HASH)
    found = cuts(blocks(1, 0, 2))
    assert sum(cut for cut in found if cut > 0) == 2 * GRID_BYTES
    assert [cut for cut in found if cut < 0] == [-GRID_BYTES]


def test_cuts_depend_on_content_alone() -> None:
    data = noise(3, 1 << 20)
    assert cuts(data) == cuts(bytes(data))
    assert len(cuts(data)) > 8


def test_cuts_outside_every_extent_are_metadata() -> None:
    extents = [(8192, 20_000), (24_576, 24_577), (24_577, 2_000_000), (2_500_000, 3_000_000)]
    size = 3_500_000
    metadata, contents = [], []
    for segment in segments_of_extents(size, extents):
        at = segment.offset
        for number, length in enumerate(segment.cuts):
            (metadata if number in segment.metadata else contents).append((at, at + length))
            at += length
        assert max(segment.metadata, default=0) < len(segment.cuts)
    assert all(any(a <= start and end <= b for a, b in extents) for start, end in contents)
    assert all(all(end <= a or b <= start for a, b in extents) for start, end in metadata)
    assert sum(end - start for start, end in metadata + contents) == size
