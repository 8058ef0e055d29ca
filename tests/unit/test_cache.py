"""The shared cache: budget, policy, and one load per miss."""

from __future__ import annotations

import sys
import threading

import pytest

from dedupstore import cache as cache_module
from dedupstore.cache import ENTRY_OVERHEAD_BYTES, Entry, FrameCache
from dedupstore.errors import ChunkDamagedError
from tests.conftest import hammered, in_threads

SIZE = 10_000
COST = Entry(0, bytes(SIZE), (0, SIZE)).cost
PATIENCE_SECONDS = 60  # only a hang takes that long


class CountingLoader:
    """Frames of one size; remembers what was asked of it."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.loads: list[int] = []

    def __call__(self, frame: int) -> tuple[bytes, tuple[int, ...]]:
        self.loads.append(frame)
        return frame.to_bytes(8, "big") + bytes(self.size - 8), (0, self.size)


def use(cache: FrameCache, frame: int) -> Entry:
    """What a reader does for one request."""
    entry = cache.entries.get(frame)
    if entry is None:
        entry = cache.get(frame)
        cache.touch(entry)
    elif entry.epoch != cache.epoch:
        cache.touch(entry)
    return entry


def assert_sound(cache: FrameCache, budget: int) -> None:
    assert cache.bytes == sum(entry.cost for entry in cache.entries.values())
    assert cache.bytes <= budget
    queued = [entry.frame for queue in (cache._small, cache._main) for entry in queue]
    assert sorted(queued) == sorted(cache.entries)
    assert cache._small_bytes == sum(entry.cost for entry in cache._small)
    assert cache._ghost_bytes == sum(cache._ghosts.values()) <= budget


def test_second_use_is_not_loaded_again() -> None:
    load = CountingLoader()
    cache = FrameCache(10 * COST, load)
    assert use(cache, 1) is use(cache, 1)
    assert load.loads == [1]
    assert cache.misses == 1


def test_entry_carries_bytes_and_offsets() -> None:
    cache = FrameCache(10 * COST, CountingLoader())
    entry = cache.get(5)
    assert bytes(entry.view[:8]) == (5).to_bytes(8, "big")
    assert entry.offsets == (0, SIZE)


def test_budget_holds_with_overhead_counted() -> None:
    budget = 10 * COST + COST // 2
    cache = FrameCache(budget, CountingLoader())
    for frame in range(1, 200):
        use(cache, frame)
        assert_sound(cache, budget)
    assert len(cache.entries) == 10
    assert cache.evictions == 199 - 10


def test_small_entries_are_charged_their_overhead() -> None:
    budget = 100 * ENTRY_OVERHEAD_BYTES
    cache = FrameCache(budget, CountingLoader(size=8))
    for frame in range(1, 1000):
        use(cache, frame)
    assert len(cache.entries) < 100


@pytest.mark.parametrize("slots", [1, 16, 96])
def test_cost_covers_what_an_entry_takes_in_memory(slots: int) -> None:
    raw = bytes(slots * 4096)
    # Numbers of their own, as in a decoded frame: those above 256 are objects.
    entry = Entry(1 << 40, raw, tuple(1000 + i * 4096 for i in range(slots + 1)))
    held = sum(map(sys.getsizeof, (entry, entry.view, raw, entry.offsets, entry.frame)))
    held += sum(map(sys.getsizeof, entry.offsets))
    assert entry.cost >= held


def test_scan_does_not_evict_what_several_epochs_used() -> None:
    budget = 100 * COST
    load = CountingLoader()
    cache = FrameCache(budget, load)
    hot = range(1, 6)
    epochs = set()
    for i in range(60):
        epochs.add(cache.epoch)
        for frame in hot:
            use(cache, frame)
        use(cache, 1000 + i)
    assert len(epochs) > 3
    for frame in range(10_000, 10_000 + 10 * 100):
        use(cache, frame)
        assert_sound(cache, budget)
    assert all(frame in cache.entries for frame in hot)
    assert all(load.loads.count(frame) == 1 for frame in hot)


def test_uses_within_one_epoch_count_once() -> None:
    cache = FrameCache(1000 * COST, CountingLoader())
    entry = use(cache, 1)
    for _ in range(64):
        use(cache, 1)
    assert entry.frequency == 0
    cache.epoch += 1
    for _ in range(64):
        use(cache, 1)
    assert entry.frequency == 1


def test_use_after_prefetch_is_the_first_use() -> None:
    cache = FrameCache(1000 * COST, CountingLoader())
    cache.prefetch(1)
    assert cache.misses == 0
    cache.epoch += 1
    assert use(cache, 1).frequency == 0
    cache.epoch += 1
    assert use(cache, 1).frequency == 1


def test_prefetched_scan_evicts_nothing_that_is_used() -> None:
    cache = FrameCache(100 * COST, CountingLoader())
    hot = use(cache, 1)
    for _ in range(3):
        cache.epoch += 1
        use(cache, 1)
    for frame in range(100, 1100):
        cache.prefetch(frame)
        use(cache, frame)
    assert cache.entries.get(1) is hot


def test_entry_that_comes_back_soon_goes_to_the_main_queue() -> None:
    cache = FrameCache(10 * COST, CountingLoader())
    use(cache, 1)
    for frame in range(2, 13):
        use(cache, frame)
    assert 1 not in cache.entries
    assert 1 in cache._ghosts
    returned = use(cache, 1)
    assert 1 not in cache._ghosts
    assert returned in cache._main
    assert_sound(cache, 10 * COST)


def test_entry_larger_than_the_budget_is_served_and_not_kept() -> None:
    load = CountingLoader()
    cache = FrameCache(COST - 1, load)
    for _ in range(2):
        assert bytes(use(cache, 3).view[:8]) == (3).to_bytes(8, "big")
    assert cache.entries == {}
    assert cache.bytes == 0
    assert load.loads == [3, 3]


def test_entry_that_just_fits_the_budget_is_kept() -> None:
    cache = FrameCache(COST, CountingLoader())
    use(cache, 1)
    use(cache, 2)
    assert list(cache.entries) == [2]


def test_evicted_entry_stays_readable_for_who_holds_it() -> None:
    cache = FrameCache(COST, CountingLoader())
    held = use(cache, 1)
    use(cache, 2)
    assert 1 not in cache.entries
    assert bytes(held.view[:8]) == (1).to_bytes(8, "big")


def test_loader_error_is_not_cached() -> None:
    failing = [True]
    good = CountingLoader()

    def load(frame: int) -> tuple[bytes, tuple[int, ...]]:
        if failing.pop():
            failing.append(False)
            raise ChunkDamagedError(frame, "bad day")
        failing.append(False)
        return good(frame)

    cache = FrameCache(10 * COST, load)
    with pytest.raises(ChunkDamagedError):
        cache.get(1)
    assert cache.bytes == 0
    assert cache.get(1).frame == 1


def test_prefetch_swallows_the_error_that_the_read_will_meet() -> None:
    def load(frame: int) -> tuple[bytes, tuple[int, ...]]:
        raise ChunkDamagedError(frame, "bad disk")

    cache = FrameCache(10 * COST, load)
    cache.prefetch(1)
    with pytest.raises(ChunkDamagedError):
        cache.get(1)


def test_prefetch_of_what_is_here_loads_nothing() -> None:
    load = CountingLoader()
    cache = FrameCache(10 * COST, load)
    cache.get(1)
    cache.prefetch(1)
    assert load.loads == [1]


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released once for each caller that begins to wait for another's load."""
    semaphore = threading.Semaphore(0)

    class CountedEvent(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            semaphore.release()
            return super().wait(timeout)

    class CountedFlight(cache_module._Flight):
        def __init__(self) -> None:
            super().__init__()
            self.done = CountedEvent()

    monkeypatch.setattr(cache_module, "_Flight", CountedFlight)
    return semaphore


def wait_for(semaphore: threading.Semaphore, count: int) -> None:
    for _ in range(count):
        assert semaphore.acquire(timeout=PATIENCE_SECONDS)


def test_ten_threads_that_miss_one_frame_load_it_once(waiting: threading.Semaphore) -> None:
    inner = CountingLoader()

    def load(frame: int) -> tuple[bytes, tuple[int, ...]]:
        wait_for(waiting, 9)  # until all the others wait for this load
        return inner(frame)

    cache = FrameCache(10 * COST, load)
    got: list[Entry] = []
    in_threads(10, lambda _: got.append(cache.get(7)))
    assert inner.loads == [7]
    assert len(got) == 10
    assert len(set(map(id, got))) == 1
    assert cache.misses == 10
    assert_sound(cache, 10 * COST)


def test_load_error_reaches_every_waiter_with_an_exception_of_its_own(
    waiting: threading.Semaphore,
) -> None:
    loads: list[int] = []

    def load(frame: int) -> tuple[bytes, tuple[int, ...]]:
        loads.append(frame)
        wait_for(waiting, 9)
        raise ChunkDamagedError(frame, "bad disk", 3)

    cache = FrameCache(10 * COST, load)
    errors: list[ChunkDamagedError] = []

    def work(_: int) -> None:
        with pytest.raises(ChunkDamagedError) as caught:
            cache.get(7)
        errors.append(caught.value)

    in_threads(10, work)
    assert loads == [7]
    assert len(set(map(id, errors))) == 10
    assert {(e.frame, e.reason, e.slot) for e in errors} == {(7, "bad disk", 3)}
    assert cache._flights == {}
    assert cache.entries == {}


def test_read_joins_the_prefetch_under_way(waiting: threading.Semaphore) -> None:
    inner = CountingLoader()
    loading = threading.Event()

    def load(frame: int) -> tuple[bytes, tuple[int, ...]]:
        loading.set()
        wait_for(waiting, 1)
        return inner(frame)

    cache = FrameCache(10 * COST, load)

    def work(i: int) -> None:
        if i == 0:
            cache.prefetch(7)
        else:
            assert loading.wait(PATIENCE_SECONDS)
            cache.prefetch(7)  # returns at once: somebody loads it
            assert cache.get(7).frame == 7

    in_threads(2, work)
    assert inner.loads == [7]
    assert cache.misses == 1


def test_other_frames_load_while_one_load_hangs() -> None:
    inner = CountingLoader()
    others_done = threading.Event()

    def load(frame: int) -> tuple[bytes, tuple[int, ...]]:
        if frame == 1:
            assert others_done.wait(PATIENCE_SECONDS)
        return inner(frame)

    cache = FrameCache(10 * COST, load)

    def work(i: int) -> None:
        if i == 0:
            cache.get(1)
        else:
            cache.get(2)
            others_done.set()

    in_threads(2, work)
    assert inner.loads == [2, 1]


def test_accounts_stay_right_under_threads() -> None:
    budget = 20 * COST
    cache = FrameCache(budget, CountingLoader())

    def work(seed: int) -> None:
        for i in range(1500):
            frame = (i * (seed + 3) * 7919) % 60 + 1
            entry = use(cache, frame)
            assert entry.frame == frame

    hammered(lambda: in_threads(4, work))
    assert_sound(cache, budget)
    assert cache._flights == {}
