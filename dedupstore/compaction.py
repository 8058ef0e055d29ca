"""Compaction: the disk space of LMDB's free pages goes back to the file system, in place.

LMDB never makes its file shorter, and a copy without the free pages could not take the file's place
under servers that have it mapped. So holes are punched where free pages lie: the file keeps its
length and its page numbers, and takes less of the disk. LMDB writes a page before it reads it
again, so it never meets a hole; the blocks come back when it does.

Only pages are taken that LMDB could itself overwrite at this moment: those that transactions older
than every reader gave up (`Environment.oldest_needed`), under the write lock. docs/format.md says
what a crash leaves, docs/concurrency.md why nobody notices. One compaction at a time is useful;
several at once are safe.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from dedupstore.constants import COMPACT_RUNS
from dedupstore.env import Environment
from dedupstore.errors import StoreAccessError
from dedupstore.frames import read_totals, write_totals
from dedupstore.holes import punch
from dedupstore.pages import read_free_pages


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction did, in bytes of disk space: given back; free, but held by read
    transactions that were running (a check, a gc) and left for the next compaction."""

    bytes: int
    bytes_held: int


def compact(env: Environment, on_progress: Callable[[int, int], None]) -> Compacted:
    """Give back what free pages occupy. `on_progress` gets (pages passed, pages in all).

    The caller has verified every page (`Environment.verify`): a free list that names a page in use
    would cost that page. Raises StoreAccessError where the file system cannot punch holes,
    StoreFullError, StoreDamagedError.
    """
    _age_free_pages(env)
    file = _open(env)
    try:
        return _punch_all(env, file, on_progress)
    finally:
        os.close(file)


def _age_free_pages(env: Environment) -> None:
    """Commit once. What the last commit gave up is needed should its meta page get lost; after
    another commit it is not, and gc's last may have given up much."""
    with env.write() as txn:
        write_totals(txn, env, read_totals(txn, env))


def _open(env: Environment) -> int:
    try:
        return os.open(env.path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise StoreAccessError(f"{env.path}: {error.strerror}") from None


def _punch_all(env: Environment, file: int, on_progress: Callable[[int, int], None]) -> Compacted:
    """Pass over the file once, letting other writers in after each COMPACT_RUNS holes."""
    given_back, passed, more = 0, 0, True
    while more:
        with env.write() as txn:
            free = read_free_pages(env.path, committed=txn.id() - 1, before=env.oldest_needed(txn))
            runs = list(islice(_beyond(free.runs, passed), COMPACT_RUNS))
            blocks = os.fstat(file).st_blocks
            for page, count in runs:
                _punch(env, file, page * free.page_bytes, count * free.page_bytes)
            given_back += blocks - os.fstat(file).st_blocks
        more = len(runs) == COMPACT_RUNS
        passed = sum(runs[-1]) if more else free.last_page + 1
        on_progress(passed, free.last_page + 1)
    return Compacted(max(given_back, 0) * 512, free.held * free.page_bytes)


def _beyond(runs: Sequence[tuple[int, int]], page: int) -> Iterator[tuple[int, int]]:
    """The runs, or their parts, from `page` on."""
    for first, count in runs:
        if first + count > page:
            start = max(first, page)
            yield start, first + count - start


def _punch(env: Environment, file: int, offset: int, length: int) -> None:
    try:
        punch(file, offset, length)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        raise StoreAccessError(
            f"{env.path}: this file system cannot punch holes into files; the space stays in the "
            "store for the next imports (gc itself is done)"
        ) from None
