"""The shared buffer cache: frames by number, a byte budget, one load per miss.

Knows frame numbers and raw bytes only; where they come from is the loader's business. Because a
frame number stands for content (a store holds each chunk once), every image and clone that shares a
chunk hits the same entry.

Policy: S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): new
entries pass through a small queue that holds a fifth of the budget, and only those used again move
to the main queue, so one long scan cannot empty the cache. Two changes suit it to block reads:
uses within one *epoch* count once, because reading a frame front to back in 4 KiB requests is one
use and not 64; and a use after a prefetch is the first use, not the second.

Thread-safety: `entries` may be read without a lock (one dictionary lookup, atomic under the GIL);
everything that changes it runs under one lock, which is never held over I/O, checksums or
decompression. docs/concurrency.md, "Cache".
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from dedupstore.errors import ChunkDamagedError, RemoteError
from dedupstore.slabs import Slab, Slabs

# Shares of the budget: for entries seen once, and of what is remembered of those dropped. The paper
# has 10 and 1; docs/decisions/0004-cache-policy.md has what recorded reads say.
_SMALL_SHARE = 5
_GHOST_SHARE = 2
_FREQUENCY_MAX = 3
# An epoch lasts until this share of the budget has been loaded. A scan stays in one frame for far
# less; an entry passes through the small queue in about three.
_EPOCHS_PER_BUDGET = 32
# What an entry costs beyond its bytes: object, dictionary and queue slots, and for each offset its
# number and its place in the tuple (measured with sys.getsizeof and rounded up).
ENTRY_OVERHEAD_BYTES = 512
_OFFSET_OVERHEAD_BYTES = 40


class Entry:
    """A cached frame. `view` is its raw bytes, `offsets[slot]` where each chunk begins in them.

    Readers may keep using an entry after its eviction: it owns its bytes, which stay as they are
    for as long as somebody holds the entry. A slice of `view` alone does not hold them.
    """

    __slots__ = ("_slab", "cost", "epoch", "frame", "frequency", "offsets", "view")

    def __init__(
        self, frame: int, raw: bytes, offsets: tuple[int, ...], slab: Slab | None = None
    ) -> None:
        self.frame = frame
        self._slab = slab
        if slab is None:
            self.view = memoryview(raw)
            held = len(raw)
        else:
            slab.view[: len(raw)] = raw
            self.view = slab.view[: len(raw)].toreadonly()
            held = len(slab.view)
        self.offsets = offsets
        self.cost = held + ENTRY_OVERHEAD_BYTES + _OFFSET_OVERHEAD_BYTES * len(offsets)
        self.frequency = 0
        self.epoch = -1  # never used: a reader's first use runs `FrameCache.touch`


class _Flight:
    """A load in progress: its leader fills it in, the others wait for it."""

    __slots__ = ("done", "entry", "error")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.entry: Entry | None = None
        self.error: Exception | None = None


Loader = Callable[[int], tuple[bytes, tuple[int, ...]]]


class FrameCache:
    """Frames held in memory within `budget` bytes, entries' overhead included.

    `load(frame)` returns the frame's raw bytes and slot offsets; it is called without any lock
    held, at most once at a time per frame, and its exceptions reach every caller that waited.
    """

    def __init__(self, budget: int, load: Loader) -> None:
        self.entries: dict[int, Entry] = {}
        self.epoch = 0
        self.bytes = 0
        self.misses = 0
        self.evictions = 0
        self._budget = budget
        self._small_budget = budget // _SMALL_SHARE
        self._load = load
        self.slabs = Slabs(budget)
        self._lock = threading.Lock()
        self._flights: dict[int, _Flight] = {}
        self._small: deque[Entry] = deque()
        self._main: deque[Entry] = deque()
        self._small_bytes = 0
        self._ghosts: OrderedDict[int, int] = OrderedDict()
        self._ghost_bytes = 0
        self._epoch_bytes = max(budget // _EPOCHS_PER_BUDGET, 1)
        self._epoch_loaded = 0

    @property
    def has_room(self) -> bool:
        """Whether there is plenty of room before anything is evicted: a quarter of the budget."""
        return self.bytes < self._budget // 4 * 3

    def touch(self, entry: Entry) -> None:
        """Note a use of `entry` in the current epoch. The hot path calls this when
        `entry.epoch != cache.epoch`. Racing calls may count a use twice, which is harmless."""
        if entry.epoch >= 0 and entry.frequency < _FREQUENCY_MAX:
            entry.frequency += 1
        entry.epoch = self.epoch

    def get(self, frame: int) -> Entry:
        """The entry of `frame`, loading it when it is absent. Raises what the loader raises."""
        return self._get(frame, prefetch=False)

    def use(self, frame: int) -> Entry:
        """The entry of `frame` as `get` gives it, its use noted: for readers without a hot path."""
        entry = self.entries.get(frame) or self.get(frame)
        if entry.epoch != self.epoch:
            self.touch(entry)
        return entry

    def prefetch(self, frame: int) -> None:
        """Load `frame` unless it is here or on its way. Errors are left to the read it is for."""
        if frame in self.entries or frame in self._flights:
            return
        try:
            self._get(frame, prefetch=True)
        except Exception:
            return

    def _get(self, frame: int, *, prefetch: bool) -> Entry:
        with self._lock:
            entry = self.entries.get(frame)
            if entry is not None:
                # Between the caller's unlocked lookup and this one another thread has loaded it.
                return entry
            flight = self._flights.get(frame)
            leader = flight is None
            if flight is None:
                flight = self._flights[frame] = _Flight()
            if not prefetch:
                self.misses += 1
        if leader:
            return self._lead(frame, flight)
        flight.done.wait()
        if flight.entry is None:
            raise _copy(flight.error)
        return flight.entry

    def _lead(self, frame: int, flight: _Flight) -> Entry:
        try:
            raw, offsets = self._load(frame)
            entry = Entry(frame, raw, offsets, self.slabs.take(len(raw)))
        except Exception as error:
            flight.error = error
            with self._lock:
                del self._flights[frame]
            flight.done.set()
            raise
        flight.entry = entry
        with self._lock:
            # Inserted and taken off the flights in one step: nobody can find neither.
            self._insert(entry)
            del self._flights[frame]
        flight.done.set()
        return entry

    # --- below: the lock is held ---

    def _insert(self, entry: Entry) -> None:
        if entry.cost > self._budget:
            return
        self._advance_epoch(entry.cost)
        while self.bytes + entry.cost > self._budget:
            self._evict()
        ghost = self._ghosts.pop(entry.frame, None)
        if ghost is None:
            self._small.append(entry)
            self._small_bytes += entry.cost
        else:
            self._ghost_bytes -= ghost
            self._main.append(entry)
        self.entries[entry.frame] = entry
        self.bytes += entry.cost

    def _advance_epoch(self, cost: int) -> None:
        self._epoch_loaded += cost
        if self._epoch_loaded >= self._epoch_bytes:
            self._epoch_loaded = 0
            self.epoch += 1

    def _evict(self) -> None:
        if self._small and (self._small_bytes > self._small_budget or not self._main):
            self._evict_small()
        else:
            self._evict_main()

    def _evict_small(self) -> None:
        """Move the oldest small entry to main if it was used again, else drop and remember it."""
        entry = self._small.popleft()
        self._small_bytes -= entry.cost
        if entry.frequency:
            entry.frequency = 0
            self._main.append(entry)
            return
        self._drop(entry)
        self._ghosts[entry.frame] = entry.cost
        self._ghost_bytes += entry.cost
        while self._ghost_bytes > self._budget // _GHOST_SHARE:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    def _evict_main(self) -> None:
        """Drop the oldest main entry, or give it another round for each use it has had."""
        entry = self._main.popleft()
        if entry.frequency:
            entry.frequency -= 1
            self._main.append(entry)
        else:
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        del self.entries[entry.frame]
        self.bytes -= entry.cost
        self.evictions += 1


def _copy(error: Exception | None) -> Exception:
    """An exception of one's own for each waiter: its reader adds image and offset to it."""
    if isinstance(error, ChunkDamagedError):
        return ChunkDamagedError(error.frame, error.reason, error.slot)
    if isinstance(error, RemoteError):
        return type(error)(*error.args)
    return error if error is not None else RuntimeError("load ended without a result")
