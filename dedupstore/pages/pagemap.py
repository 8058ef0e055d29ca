"""Which pages of the file are accounted for.

Owns the rule that every page is used exactly once, by one tree or by the free list, and the memory
that takes. Not thread-safe: a map belongs to one walk.
"""

from collections.abc import Iterator, Sequence

from dedupstore.pages.findings import Fault
from dedupstore.pages.layout import METAS


class PageMap:
    """Which pages are accounted for: two bits a page, in use and free."""

    __slots__ = ("_free", "_pages", "_used")

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._used = bytearray((pages >> 3) + 1)
        self._free = bytearray((pages >> 3) + 1)

    def is_free(self, page: int) -> bool:
        """Whether the free list has named `page`."""
        return bool(self._free[page >> 3] >> (page & 7) & 1)

    def use(self, page: int, count: int) -> None:
        """Take `count` pages from `page` on. Raises Fault: one of them is taken."""
        start, stop, shift = page >> 3, (page + count + 7) >> 3, page & 7
        span = ((1 << count) - 1) << shift
        used = int.from_bytes(self._used[start:stop], "little")
        if used & span:
            raise Fault("is used twice", page)
        if int.from_bytes(self._free[start:stop], "little") & span:
            raise Fault("is in use but also on the free list", page)
        self._used[start:stop] = (used | span).to_bytes(stop - start, "little")

    def release(self, numbers: Sequence[int], below: int) -> list[int]:
        """Mark pages as free, and return those that were taken already, by a tree or as free.

        Raises Fault: they do not descend from under `below`, or are out of range.
        """
        used, free, taken = self._used, self._free, []
        for number in numbers:
            if not METAS <= number < below:
                wrong = "out of order" if METAS <= number < self._pages else "out of range"
                raise Fault(f"lists page {number}, which is {wrong}")
            below = number
            byte, bit = number >> 3, 1 << (number & 7)
            if (used[byte] | free[byte]) & bit:
                taken.append(number)
            free[byte] |= bit
        return taken

    def missing(self) -> Iterator[int]:
        """Pages that are neither in use nor free, ascending."""
        step = 1 << 12
        for start in range(0, len(self._used), step):
            used, free = self._used[start : start + step], self._free[start : start + step]
            bits = int.from_bytes(used, "little") | int.from_bytes(free, "little")
            absent = ~bits & ((1 << 8 * len(used)) - 1)
            while absent:
                low = absent & -absent
                page = 8 * start + low.bit_length() - 1
                if page >= self._pages:
                    return
                yield page
                absent ^= low
