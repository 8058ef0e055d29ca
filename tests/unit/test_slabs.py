"""Memory of cached frames: slabs are used again, but never while somebody holds them."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import pytest

from dedupstore import slabs as slabs_module
from dedupstore.cache import Entry, FrameCache
from dedupstore.reader import Prefetcher, ReadCounters
from dedupstore.slabs import SLAB_BYTES, Slabs
from tests.conftest import hammered, in_threads, noise

WHOLE = SLAB_BYTES
PATIENCE_SECONDS = 60  # only a hang takes that long


def numbered(frame: int) -> bytes:
    return frame.to_bytes(8, "big") * (WHOLE // 8)


def load(frame: int) -> tuple[bytes, tuple[int, ...]]:
    return numbered(frame), (0, WHOLE)


@pytest.mark.parametrize(
    ("length", "given"),
    [(0, False), (WHOLE // 2, False), (WHOLE // 2 + 1, True), (WHOLE, True), (WHOLE + 1, False)],
)
def test_only_lengths_that_fill_most_of_a_slab_get_one(length: int, given: bool) -> None:
    assert (Slabs(WHOLE).take(length) is not None) is given


def test_slabs_do_not_overlap_and_run_out() -> None:
    slabs = Slabs(4 * WHOLE)
    held = list(iter(lambda: slabs.take(WHOLE), None))
    assert len(held) == 4 + slabs_module._SPARE
    for i in range(len(held)):
        held[i].view[:] = numbered(i)
    assert all(bytes(slab.view) == numbered(i) for i, slab in enumerate(held))
    held.pop()
    assert slabs.take(WHOLE) is not None


def test_without_slabs_frames_get_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("no memory for a mapping")

    monkeypatch.setattr(slabs_module.mmap, "mmap", refused)
    cache = FrameCache(8 * WHOLE, load)
    assert bytes(cache.get(7).view) == numbered(7)


def test_negative_and_absurd_budgets_are_no_error() -> None:
    assert Slabs(-1).take(WHOLE) is not None
    assert Slabs(sys.maxsize).take(WHOLE) is None


def test_evicted_entry_keeps_its_bytes_while_it_is_held() -> None:
    cache = FrameCache(3 * WHOLE, load)
    held = [cache.get(frame) for frame in range(1, 6)]
    for frame in range(10, 200):
        cache.get(frame)
    assert not {entry.frame for entry in held} & cache.entries.keys()
    assert all(bytes(entry.view) == numbered(entry.frame) for entry in held)


def test_memory_of_evicted_entries_is_used_again() -> None:
    cache = FrameCache(3 * WHOLE, load)
    for frame in range(1, 500):
        entry = cache.get(frame)
        assert entry._slab is not None
        assert bytes(entry.view[:8]) == frame.to_bytes(8, "big")
    free = len(cache.slabs._free)
    del entry
    cache.entries.clear()
    cache._small.clear()
    cache._main.clear()
    gc.collect()
    assert len(cache.slabs._free) > free


def test_views_are_for_reading() -> None:
    entry = FrameCache(4 * WHOLE, load).get(1)
    with pytest.raises(TypeError):
        entry.view[0] = 1


def test_cost_is_what_a_frame_holds() -> None:
    raw = noise(1, WHOLE - 4096)
    slab = Slabs(WHOLE).take(len(raw))
    assert slab is not None
    assert Entry(1, raw, (0, len(raw)), slab).cost >= WHOLE


def huge_kib() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(next(line.split()[1] for line in rollup.splitlines() if "AnonHugePages" in line))


def test_collapsed_slabs_keep_their_bytes_and_lie_on_huge_pages() -> None:
    count = 4 * slabs_module._SLABS_PER_HUGE_PAGE
    slabs = Slabs(count * WHOLE)
    held = [slabs.take(WHOLE) for _ in range(count + 1)]
    for i, slab in enumerate(held):
        assert slab is not None
        slab.view[:] = numbered(i)
    before = huge_kib()
    collapsed = 0
    while slabs.collapsible:
        slabs.collapse()
        collapsed += 1
    assert collapsed == 4
    assert all(slab is not None and bytes(slab.view) == numbered(i) for i, slab in enumerate(held))
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if enabled.exists() and "[never]" not in enabled.read_text():
        assert huge_kib() >= before + 2048


def test_idle_readahead_collapses_what_reads_have_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prefetcher, "_IDLE_SECONDS", 0.01)
    cache = FrameCache(64 * WHOLE, load)
    prefetcher = Prefetcher(cache, ReadCounters())
    try:
        for frame in range(1, 30):
            cache.get(frame)
        assert cache.slabs.collapsible
        prefetcher.loaded()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while cache.slabs.collapsible and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not cache.slabs.collapsible
    finally:
        prefetcher.close()
    assert all(bytes(cache.get(frame).view) == numbered(frame) for frame in range(1, 30))


def test_slabs_that_were_not_used_are_not_collapsed() -> None:
    slabs = Slabs(64 * WHOLE)
    slab = slabs.take(WHOLE)
    assert slab is not None
    assert not slabs.collapsible


def test_threads_never_see_another_frames_bytes() -> None:
    cache = FrameCache(4 * WHOLE, load)

    def work(seed: int) -> None:
        for i in range(400):
            frame = (i * (seed + 3) * 7919) % 40 + 1
            entry = cache.get(frame)
            assert bytes(entry.view) == numbered(frame)

    hammered(lambda: in_threads(4, work))
    assert cache.bytes <= 4 * WHOLE
