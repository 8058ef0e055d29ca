"""Memory for cached frames: equal slabs, used again and again, and on huge pages before long.

Owns one anonymous mapping and which parts of it are in use. A frame's bytes in memory of their own
would cost a page fault for every 4 KiB each time a frame is loaded, as much as half of its
decompression (docs/decisions/0002-frames.md has the figures). On huge pages a read at random misses
less often in the processor's address cache; but the kernel may have to look for them, or a virtual
machine's host to fill them, for milliseconds. So slabs begin on ordinary pages, and `collapse`
turns them into huge ones when there is time. Thread-safe.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from contextlib import suppress

from dedupstore.constants import FRAME_BYTES_MAX, MIB
from dedupstore.memory import MADV_COLLAPSE, MADV_POPULATE_WRITE, advise

SLAB_BYTES = FRAME_BYTES_MAX
_HUGE_PAGE_BYTES = 2 * MIB
_SLABS_PER_HUGE_PAGE = _HUGE_PAGE_BYTES // SLAB_BYTES
# Slabs beyond the budget, for frames that were evicted while somebody still reads them.
_SPARE = 16


class Slab:
    """One slab: `view` is its memory, for whoever holds this object and only that long."""

    __slots__ = ("_free", "_index", "view")

    def __init__(self, view: memoryview, index: int, free: list[int]) -> None:
        self.view = view
        self._index = index
        self._free = free

    def __del__(self) -> None:
        # Runs in whichever thread lets go last, maybe under the cache's lock: append is atomic.
        self._free.append(self._index)


class Slabs:
    """As many slabs as `budget` bytes hold. They take memory when they are first used."""

    def __init__(self, budget: int) -> None:
        count = max(budget, 0) // SLAB_BYTES + _SPARE
        self._memory = memoryview(b"")
        self._address = 0
        self._free: list[int] = []
        # Slabs below this index have been used; huge pages below that one have been collapsed.
        self._used = 0
        self._collapsed = 0
        self._lock = threading.Lock()
        # Where the mapping is refused (a limit on memory), frames get memory of their own.
        with suppress(OSError, OverflowError, ValueError):
            size = count * SLAB_BYTES + _HUGE_PAGE_BYTES
            mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            skipped = -address % _HUGE_PAGE_BYTES
            self._memory = memoryview(mapped)[skipped:]
            self._address = address + skipped
            # Taken from the end: the lowest first, and what was used last before anything else.
            self._free = list(reversed(range(count)))

    def take(self, length: int) -> Slab | None:
        """A slab for `length` bytes; None for lengths that would waste one or do not fit, and when
        none is free."""
        if not SLAB_BYTES // 2 < length <= SLAB_BYTES:
            return None
        try:
            index = self._free.pop()
        except IndexError:
            return None
        at = index * SLAB_BYTES
        if index >= self._used:
            self._used = index + 1
            # All its page faults at once, and not while the copy holds the GIL.
            advise(self._address + at, SLAB_BYTES, MADV_POPULATE_WRITE)
        return Slab(self._memory[at : at + SLAB_BYTES], index, self._free)

    @property
    def collapsible(self) -> bool:
        """Whether there is something for `collapse` to do."""
        return (self._collapsed + 1) * _SLABS_PER_HUGE_PAGE <= self._used

    def collapse(self) -> None:
        """Put the next 2 MiB of used slabs, in use or not, on a huge page. May take milliseconds,
        without the GIL."""
        with self._lock:
            if not self.collapsible:
                return
            at = self._collapsed * _HUGE_PAGE_BYTES
            self._collapsed += 1
        advise(self._address + at, _HUGE_PAGE_BYTES, MADV_COLLAPSE)
