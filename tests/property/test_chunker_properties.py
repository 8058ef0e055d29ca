"""Cuts of arbitrary images and extents."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

from hypothesis import given, strategies as st

from dedupstore.chunker import cut_by_content, is_zero, segments_of_data, segments_of_extents
from dedupstore.constants import CDC_BYTES_MIN, CHUNK_BYTES_MAX, GRID_BYTES, SEGMENT_BYTES
from tests.conftest import noise

# Blocks by number; 0 is the block of zeros, a partial one may end the image.
BLOCK = {number: noise(number) if number else bytes(GRID_BYTES) for number in range(40)}
numbers = st.lists(st.sampled_from([0, 0, *range(40)]), max_size=120)
tails = st.binary(max_size=60) | st.just(b"") | st.integers(1, 60).map(bytes)


def image(parts: list[int], tail: bytes = b"") -> bytes:
    return b"".join(BLOCK[part] for part in parts) + tail


def cuts(data: bytes) -> list[int]:
    return list(cut_by_content(memoryview(data)))


def ranges(size: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Sorted, disjoint, non-empty byte ranges below `size`."""
    edges = st.lists(st.integers(0, size), unique=True, max_size=40).map(sorted)
    return edges.map(lambda e: list(zip(e[::2], e[1::2], strict=False)))


@given(numbers, tails)
def test_content_cuts_cover_the_segment_exactly(parts: list[int], tail: bytes) -> None:
    data = image(parts, tail)
    found = cuts(data)
    assert 0 not in found
    assert sum(map(abs, found)) == len(data)


@given(numbers, tails)
def test_content_cuts_lie_on_the_grid_and_hold_the_longest_length(
    parts: list[int], tail: bytes
) -> None:
    data = image(parts, tail)
    position = 0
    for cut in cuts(data):
        assert position % GRID_BYTES == 0
        assert cut <= CHUNK_BYTES_MAX
        position += abs(cut)


@given(numbers, tails)
def test_holes_are_exactly_the_blocks_of_zeros(parts: list[int], tail: bytes) -> None:
    data = image(parts, tail)
    position = 0
    for cut in cuts(data):
        for at in range(position, position + abs(cut), GRID_BYTES):
            assert is_zero(data[at : at + GRID_BYTES]) == (cut < 0)
        position += abs(cut)


@given(numbers)
def test_two_holes_never_touch(parts: list[int]) -> None:
    found = cuts(image(parts))
    assert not any(a < 0 and b < 0 for a, b in pairwise(found))


@given(st.lists(st.sampled_from(range(1, 40)), min_size=1, max_size=120))
def test_chunks_end_early_only_at_holes_or_the_end(parts: list[int]) -> None:
    found = cuts(image(parts))
    assert all(cut >= CDC_BYTES_MIN for cut in found[:-1])


@given(numbers, numbers)
def test_a_hole_makes_what_follows_independent_of_what_precedes(
    before: list[int], after: list[int]
) -> None:
    with_before = cuts(image([*before, 0, *after]))
    alone = cuts(image([0, *after]))
    # The first hole may be longer, the rest is the same.
    assert with_before[len(with_before) - len(alone) + 1 :] == alone[1:]


@given(st.data())
def test_segments_of_data_cover_their_regions_independently(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 4 * SEGMENT_BYTES))
    regions = data.draw(ranges(size))
    found = list(segments_of_data(regions))
    one_by_one = [s for region in regions for s in segments_of_data([region])]
    assert found == one_by_one
    assert sum(segment.length for segment in found) == sum(b - a for a, b in regions)
    for segment in found:
        assert 0 < segment.length <= SEGMENT_BYTES
        last = segment.offset + segment.length - 1
        assert segment.offset // SEGMENT_BYTES == last // SEGMENT_BYTES
        assert any(a <= segment.offset and last < b for a, b in regions)


@given(st.data())
def test_extent_cuts_cover_the_image_and_fall_on_every_edge(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 3 * SEGMENT_BYTES))
    extents = data.draw(ranges(size))
    position = 0
    edges = {0}
    for segment in segments_of_extents(size, extents):
        assert segment.offset == position
        assert segment.length == sum(segment.cuts) > 0
        assert all(0 < cut <= CHUNK_BYTES_MAX for cut in segment.cuts)
        edges.update(position + end for end in accumulate(segment.cuts))
        position += segment.length
    assert position == size
    assert edges >= {edge for extent in extents for edge in extent}


@given(st.data())
def test_extent_cuts_of_data_are_those_of_the_whole_image(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 3 * SEGMENT_BYTES))
    extents = data.draw(ranges(size))
    regions = data.draw(ranges(size))

    def chunks(*holes: list[tuple[int, int]]) -> set[tuple[int, int]]:
        return {
            (segment.offset + end - cut, segment.offset + end)
            for segment in segments_of_extents(size, extents, *holes)
            for cut, end in zip(segment.cuts, accumulate(segment.cuts), strict=True)
        }

    everything, some = chunks(), chunks(regions)
    assert some <= everything
    for start, end in everything - some:
        assert not any(a < end and start < b for a, b in regions), "a chunk with data is left out"


def test_holes_of_any_size_cost_nothing() -> None:
    size = 1 << 63
    data = [(0, 100), (1 << 62, (1 << 62) + 1), (size - 1, size)]
    segments = list(segments_of_extents(size, [(4096, size - 4096)], data))
    assert sum(segment.length for segment in segments) <= 4 * CHUNK_BYTES_MAX


@given(st.integers(0, 1 << 32), st.integers(1, 64))
def test_most_cuts_move_along_with_inserted_blocks(seed: int, inserted: int) -> None:
    generator = random.Random(seed)
    data = generator.randbytes(256 * GRID_BYTES)
    shifted = generator.randbytes(inserted * GRID_BYTES) + data
    before = set(accumulate(cuts(data)))
    after = {end - inserted * GRID_BYTES for end in accumulate(cuts(shifted))}
    assert len(before & after) >= 0.7 * len(before)
