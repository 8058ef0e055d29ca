"""Byte ranges of an image, made disjoint.

Owns the rule by which overlapping ranges are resolved. Pure functions, thread-safe.
"""

from collections.abc import Iterable
from itertools import pairwise

Range = tuple[int, int]  # (start, end), bytes from the start of the image, start < end


def partition(ranges: Iterable[Range]) -> list[Range]:
    """Sort `ranges` and cut them at each other's edges until none overlap.

    Exactly the bytes that were covered stay covered, and every start and end of an input range is
    an edge of the result. Contents that two files share (deduplicated clusters) thereby become
    ranges of their own. The result is independent of the input's order, and partitioning a
    partition together with further ranges equals partitioning everything at once: a caller that
    must bound its memory may compact at any time.
    """
    ordered = sorted(ranges)
    if all(left[1] <= right[0] for left, right in pairwise(ordered)):
        return ordered
    edges = sorted({edge for both in ordered for edge in both})
    pieces = []
    reach = 0  # the furthest end of the ranges that start at or before the current piece
    pending = iter(ordered)
    upcoming = next(pending, None)
    for start, end in pairwise(edges):
        while upcoming is not None and upcoming[0] <= start:
            reach = max(reach, upcoming[1])
            upcoming = next(pending, None)
        if reach >= end:
            pieces.append((start, end))
    return pieces


def clipped(ranges: Iterable[Range], size: int) -> list[Range]:
    """Return `ranges` without what lies at or behind `size` bytes."""
    return [
        (start, end if end <= size else size)  # min() takes twice as long
        for start, end in ranges
        if start < size
    ]
