"""An image's runs in memory."""

from __future__ import annotations

from array import array

import pytest

from dedupstore.format import ManifestRecord, make_ref
from dedupstore.manifest import Manifest

A, B, C = make_ref(1, 0), make_ref(1, 5), make_ref(2, 0)


def make(*runs: tuple[int, int]) -> Manifest:
    lengths = array("Q", [length for length, _ in runs])
    refs = array("Q", [ref for _, ref in runs])
    counts = array("I", [1 if ref else 0 for _, ref in runs])
    return Manifest(b"d" * 32, ManifestRecord(sum(lengths), 0, 0, 0, lengths, refs, counts))


def test_starts_end_with_the_size() -> None:
    assert list(make((4096, A), (8192, 0)).starts) == [0, 4096, 12288]


def test_run_at_finds_first_and_last_byte_of_every_run() -> None:
    manifest = make((4096, A), (8192, 0), (1, B))
    offsets = (0, 4095, 4096, 12287, 12288)
    assert [manifest.run_at(offset) for offset in offsets] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("runs", [1, 2, 1000, 5000])
def test_index_leads_every_offset_to_its_run(runs: int) -> None:
    """Runs of very different lengths, more and fewer than the index has entries."""
    lengths = [1 + (i * 7919) % 5 ** (i % 9) for i in range(runs)]
    manifest = make(*((length, A if i % 3 else 0) for i, length in enumerate(lengths)))
    assert len(manifest.index) * manifest.index.itemsize <= 4096 + 8
    for run, start in enumerate(list(manifest.starts)[:-1]):
        assert manifest.run_at(start) == run
        assert manifest.run_at(start + lengths[run] - 1) == run


def test_runs_touch_the_range_unclipped() -> None:
    manifest = make((4096, A), (8192, 0), (100, B))
    assert list(manifest.runs(4095, 2)) == [(0, 4096, A), (4096, 8192, 0)]
    assert list(manifest.runs(4096, 8192)) == [(4096, 8192, 0)]
    assert list(manifest.runs(0, 1 << 30)) == [(0, 4096, A), (4096, 8192, 0), (12288, 100, B)]


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (12388, 1), (99999, 5)])
def test_nothing_is_found_outside(offset: int, length: int) -> None:
    manifest = make((4096, A), (8192, 0), (100, B))
    assert list(manifest.runs(offset, length)) == []
    assert list(manifest.extents(offset, length)) == []


def test_empty_image_has_no_runs() -> None:
    manifest = make()
    assert manifest.size == 0
    assert list(manifest.runs(0, 4096)) == list(manifest.extents(0, 4096)) == []


def test_extents_begin_at_the_request_and_merge_neighbours_of_a_kind() -> None:
    manifest = make((4096, A), (4096, B), (8192, 0), (4096, C))
    assert list(manifest.extents(100, 20480 - 100)) == [
        (100, 8092, False),
        (8192, 8192, True),
        (16384, 4096, False),
    ]


def test_extents_inside_a_hole_are_a_hole() -> None:
    manifest = make((4096, A), (8192, 0), (4096, C))
    assert list(manifest.extents(5000, 10)) == [(5000, 7288, True)]


def test_last_extent_never_reaches_beyond_the_image() -> None:
    manifest = make((4096, A), (4096, 0))
    assert list(manifest.extents(0, 1 << 20)) == [(0, 4096, False), (4096, 4096, True)]
