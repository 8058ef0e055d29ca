"""Cache policies for replays: LRU, SIEVE, S3-FIFO as published, and MIN, which knows the future.

Each holds frames within a budget of bytes and is told of every use; `use` says whether the frame
was there, and counts what had to be loaded. A frame larger than the budget is never kept. Not
thread-safe. The product's own policy is not here: replays run `dedupstore.cache` itself.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence


class Policy:
    """`costs` are the bytes that each frame takes in the cache, `budget` the most they may take."""

    def __init__(self, budget: int, costs: Mapping[int, int]) -> None:
        self.budget = budget
        self.costs = costs
        self.bytes = 0
        self.loads = 0
        self.loaded_bytes = 0

    def use(self, frame: int) -> bool:
        """Note a use; True for a hit. A miss loads the frame and keeps it when it fits."""
        if self.touch(frame):
            return True
        cost = self.costs[frame]
        self.loads += 1
        self.loaded_bytes += cost
        if cost <= self.budget:
            self.insert(frame)
        return False

    def touch(self, frame: int) -> bool:
        """Whether the frame is here; if so, its use is noted."""
        raise NotImplementedError

    def insert(self, frame: int) -> None:
        """Take a frame that fits the budget, dropping others for it."""
        raise NotImplementedError


class LRU(Policy):
    """Drops what has not been used for longest."""

    def __init__(self, budget: int, costs: Mapping[int, int]) -> None:
        super().__init__(budget, costs)
        self._queue: OrderedDict[int, int] = OrderedDict()

    def touch(self, frame: int) -> bool:
        if frame not in self._queue:
            return False
        self._queue.move_to_end(frame)
        return True

    def insert(self, frame: int) -> None:
        cost = self.costs[frame]
        while self.bytes + cost > self.budget:
            self.bytes -= self._queue.popitem(last=False)[1]
        self._queue[frame] = cost
        self.bytes += cost


class Sieve(Policy):
    """SIEVE (Zhang et al., NSDI 2024): one queue in order of insertion and a hand that walks from
    the oldest to the newest, forgiving what was visited and dropping the first that was not."""

    def __init__(self, budget: int, costs: Mapping[int, int]) -> None:
        super().__init__(budget, costs)
        self._visited: dict[int, bool] = {}
        self._newer: dict[int, int | None] = {}
        self._older: dict[int, int | None] = {}
        self._newest: int | None = None
        self._oldest: int | None = None
        self._hand: int | None = None

    def touch(self, frame: int) -> bool:
        if frame not in self._visited:
            return False
        self._visited[frame] = True
        return True

    def insert(self, frame: int) -> None:
        cost = self.costs[frame]
        while self.bytes + cost > self.budget:
            self._evict()
        self._visited[frame] = False
        self._older[frame], self._newer[frame] = self._newest, None
        if self._newest is None:
            self._oldest = frame
        else:
            self._newer[self._newest] = frame
        self._newest = frame
        self.bytes += cost

    def _evict(self) -> None:
        frame = self._oldest if self._hand is None else self._hand
        assert frame is not None
        while self._visited[frame]:
            self._visited[frame] = False
            newer = self._newer[frame]
            frame = self._oldest if newer is None else newer
            assert frame is not None
        self._hand = self._newer[frame]
        self._unlink(frame)
        del self._visited[frame]
        self.bytes -= self.costs[frame]

    def _unlink(self, frame: int) -> None:
        older, newer = self._older.pop(frame), self._newer.pop(frame)
        if older is None:
            self._oldest = newer
        else:
            self._newer[older] = newer
        if newer is None:
            self._newest = older
        else:
            self._older[newer] = older


class S3Fifo(Policy):
    """S3-FIFO (Yang et al., SOSP 2023), algorithm 1: a small queue of a tenth of the budget, from
    which frames used more than once since they came move to the main queue; a ghost list as long
    as the main queue; a main queue that gives another round for each use, of which 3 count."""

    _SMALL_SHARE = 10
    _FREQUENCY_MAX = 3

    def __init__(self, budget: int, costs: Mapping[int, int]) -> None:
        super().__init__(budget, costs)
        self._frequency: dict[int, int] = {}
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._small_bytes = 0
        self._ghosts: OrderedDict[int, int] = OrderedDict()
        self._ghost_bytes = 0

    def touch(self, frame: int) -> bool:
        frequency = self._frequency.get(frame)
        if frequency is None:
            return False
        self._frequency[frame] = min(frequency + 1, self._FREQUENCY_MAX)
        return True

    def insert(self, frame: int) -> None:
        cost = self.costs[frame]
        while self.bytes + cost > self.budget:
            self._evict()
        if frame in self._ghosts:
            self._ghost_bytes -= self._ghosts.pop(frame)
            self._main.append(frame)
        else:
            self._small.append(frame)
            self._small_bytes += cost
        self._frequency[frame] = 0
        self.bytes += cost

    def _evict(self) -> None:
        small_budget = self.budget // self._SMALL_SHARE
        if self._small and (self._small_bytes > small_budget or not self._main):
            self._evict_small(self.budget - small_budget)
        else:
            self._evict_main()

    def _evict_small(self, ghost_budget: int) -> None:
        frame = self._small.popleft()
        cost = self.costs[frame]
        self._small_bytes -= cost
        if self._frequency[frame] > 1:
            self._frequency[frame] = 0
            self._main.append(frame)
            return
        self._drop(frame)
        self._ghosts[frame] = cost
        self._ghost_bytes += cost
        while self._ghost_bytes > ghost_budget:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    def _evict_main(self) -> None:
        frame = self._main.popleft()
        if self._frequency[frame]:
            self._frequency[frame] -= 1
            self._main.append(frame)
        else:
            self._drop(frame)

    def _drop(self, frame: int) -> None:
        del self._frequency[frame]
        self.bytes -= self.costs[frame]


class Min(Policy):
    """Belady's MIN: drops what is used again last, the new frame included. The bound for frames of
    one size; where sizes differ, near it. `uses` is the whole sequence that `use` will be given."""

    def __init__(self, budget: int, costs: Mapping[int, int], uses: Sequence[int]) -> None:
        super().__init__(budget, costs)
        self._next = _next_uses(uses)
        self._now = -1
        self._due: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def use(self, frame: int) -> bool:
        self._now += 1
        return super().use(frame)

    def touch(self, frame: int) -> bool:
        if frame not in self._due:
            return False
        self._schedule(frame)
        return True

    def insert(self, frame: int) -> None:
        self.bytes += self.costs[frame]
        self._schedule(frame)
        while self.bytes > self.budget:
            due, last = heapq.heappop(self._heap)
            if self._due.get(last) == -due:  # else: used since it was put on the heap
                del self._due[last]
                self.bytes -= self.costs[last]

    def _schedule(self, frame: int) -> None:
        due = self._next[self._now]
        self._due[frame] = due
        heapq.heappush(self._heap, (-due, frame))


def _next_uses(uses: Sequence[int]) -> list[int]:
    """For each use, the index of the frame's next one; the sequence's length when there is none."""
    last: dict[int, int] = {}
    following = [0] * len(uses)
    for i in range(len(uses) - 1, -1, -1):
        following[i] = last.get(uses[i], len(uses))
        last[uses[i]] = i
    return following
