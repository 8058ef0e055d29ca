"""The cache against a dictionary: any sequence of requests, any budget."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dedupstore.cache import ENTRY_OVERHEAD_BYTES, FrameCache
from dedupstore.errors import ChunkDamagedError
from tests.conftest import noise

# What the loader holds: frames of very different sizes.
MODEL = {frame: noise(frame, 1 + (frame * 7919) % 5000) for frame in range(1, 30)}
BROKEN = 99
frames = st.sampled_from(sorted(MODEL))


class CacheMachine(RuleBasedStateMachine):
    """Requests in any order; after each step the accounts must be right."""

    @initialize(budget=st.integers(0, 40_000))
    def start(self, budget: int) -> None:
        self.budget = budget
        self.loads = 0
        self.misses = 0
        self.cache = FrameCache(budget, self.load)

    def load(self, frame: int) -> tuple[bytes, tuple[int, ...]]:
        if frame == BROKEN:
            raise ChunkDamagedError(frame, "broken")
        self.loads += 1
        return MODEL[frame], (0, len(MODEL[frame]))

    @rule(frame=frames)
    def read(self, frame: int) -> None:
        entry = self.cache.entries.get(frame)
        if entry is None:
            self.misses += 1
            entry = self.cache.get(frame)
            self.cache.touch(entry)
        elif entry.epoch != self.cache.epoch:
            self.cache.touch(entry)
        assert entry.frame == frame
        assert bytes(entry.view) == MODEL[frame]
        assert entry.offsets == (0, len(MODEL[frame]))

    @rule(frame=frames)
    def prefetch(self, frame: int) -> None:
        present = frame in self.cache.entries
        loads = self.loads
        self.cache.prefetch(frame)
        assert self.loads == loads + (not present)

    @rule()
    def read_broken(self) -> None:
        self.misses += 1
        try:
            self.cache.get(BROKEN)
        except ChunkDamagedError:
            return
        raise AssertionError("the loader's error was lost")

    @rule()
    def prefetch_broken(self) -> None:
        self.cache.prefetch(BROKEN)

    @invariant()
    def budget_holds(self) -> None:
        cache = self.cache
        assert cache.bytes <= self.budget
        assert cache.bytes == sum(entry.cost for entry in cache.entries.values())
        assert all(
            entry.cost >= len(entry.view) + ENTRY_OVERHEAD_BYTES for entry in cache.entries.values()
        )

    @invariant()
    def queues_and_ghosts_agree_with_the_entries(self) -> None:
        cache = self.cache
        queued = [entry.frame for queue in (cache._small, cache._main) for entry in queue]
        assert sorted(queued) == sorted(cache.entries)
        assert all(cache.entries[entry.frame] is entry for entry in (*cache._small, *cache._main))
        assert cache._small_bytes == sum(entry.cost for entry in cache._small)
        assert cache._ghost_bytes == sum(cache._ghosts.values()) <= max(self.budget, 0)
        assert not cache._ghosts.keys() & cache.entries.keys()
        assert cache._flights == {}

    @invariant()
    def counters_are_exact(self) -> None:
        assert self.cache.misses == self.misses
        kept = self.cache.evictions + len(self.cache.entries)
        assert kept <= self.loads


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=40, stateful_step_count=60)


@given(st.lists(frames, max_size=200), st.integers(20_000, 60_000))
def test_what_fits_the_budget_is_loaded_once(requests: list[int], budget: int) -> None:
    loads: list[int] = []

    def load(frame: int) -> tuple[bytes, tuple[int, ...]]:
        loads.append(frame)
        return MODEL[frame], (0, len(MODEL[frame]))

    cache = FrameCache(10 * budget, load)
    for frame in requests:
        assert bytes(cache.get(frame).view) == MODEL[frame]
    assert sorted(loads) == sorted(set(requests))
