"""What the free list names, as runs of pages.

Owns reading the list out; which of its pages nobody can need is LMDB's rule, and the caller's to
ask by a transaction number. Thread-safe.
"""

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dedupstore.pages.datafile import DataFile, newest_meta
from dedupstore.pages.findings import Fault, damaged
from dedupstore.pages.walk import Walk


@dataclass(frozen=True, slots=True)
class FreePages:
    """Pages on the free list of one snapshot: `runs` of those that nobody needs, as (first page,
    number of pages), ascending and never adjacent; `held`, how many of the others the last
    transaction did not give up, so that a reader must be what keeps them."""

    page_bytes: int
    last_page: int
    runs: tuple[tuple[int, int], ...]
    held: int


def read_free_pages(path: str | os.PathLike[str], *, committed: int, before: int) -> FreePages:
    """The free list of the snapshot `committed`, which must be the newest: runs of the pages that
    transactions older than `before` gave up.

    The caller holds LMDB's write lock. The list itself is verified on the way, as far as it can be
    without the other trees: no page twice, none of its own, all in range.

    Raises StoreDamagedError, and StoreAccessError: the file cannot be opened.
    """
    pages, held = array("Q"), 0

    def collect(transaction: int, numbers: Sequence[int]) -> None:
        nonlocal held
        if transaction < before:
            pages.extend(numbers)
        elif transaction < committed:
            held += len(numbers)

    with DataFile(path) as file:
        metas = file.metas()
        meta = newest_meta(metas)
        if meta is None or meta.transaction != committed:
            raise damaged(path, Fault("the meta pages do not have the last transaction"))
        walk = Walk(file, metas, file.size(), on_progress=None, snapshot_held=True, on_free=collect)
        walk.walk_free_list()
        for finding in walk.findings:
            raise damaged(path, Fault(f"(of {finding.database}) {finding.reason}", finding.page))
    return FreePages(meta.page_bytes, meta.last_page, tuple(_runs(sorted(pages))), held)


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as (first, count)."""
    if not pages:
        return
    first = last = pages[0]
    for page in pages[1:]:
        if page != last + 1:
            yield first, last + 1 - first
            first = page
        last = page
    yield first, last + 1 - first
