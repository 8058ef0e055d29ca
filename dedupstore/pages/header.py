"""The quick look at a data file, each time before LMDB opens it.

Owns what can be known in microseconds: whether both meta pages, the roots they name and the file's
length agree. Thread-safe.

A healthy file may be shorter than its last page (`mdb.c`: "the file may be shorter if the freeDB
lists the final pages"): pages allocated and given back within one transaction are never written.
Only pages that are not on the free list must be there, and that is what we check.
"""

import contextlib
import os
from typing import Final

from dedupstore.pages.datafile import DataFile, OvertakenError, meta_faults, newest_meta
from dedupstore.pages.findings import FREE_LIST, MAIN, Fault, damaged
from dedupstore.pages.layout import (
    BRANCH,
    HEADER_BYTES,
    LEAF,
    NO_PAGE,
    Meta,
    Metas,
    Role,
    check_page,
    record_fault,
)
from dedupstore.pages.walk import EnoughError, Walk

_HEADER_ATTEMPTS: Final = 100


def verify_header(path: str | os.PathLike[str]) -> None:
    """Verify both meta pages, both root pages and the file's length, before LMDB maps the file.

    Takes microseconds whatever the store's size, except on a file shorter than its last page: then
    the free list is read to tell a healthy file from a truncated one. Damage further down the trees
    is left to `verify_pages`. Needs no lock, and gives no false alarm while others write, or while
    another process is just creating the file. May be called from any thread.

    Raises StoreDamagedError: the file is truncated or its header is damaged; the message is one
    line with the file, the reason and what to do. StoreAccessError: it cannot be opened.
    """
    with DataFile(path) as file:
        for _ in range(_HEADER_ATTEMPTS):
            with contextlib.suppress(OvertakenError):
                fault = _header_fault(file)
                if fault is None:
                    return
                raise damaged(path, fault)
        # Other processes commit faster than we read a few pages: LMDB works well on this file.


def _header_fault(file: DataFile) -> Fault | None:
    """The first thing wrong. Raises OvertakenError: it could not be trusted."""
    metas = file.metas()
    try:
        _verify_header(file, metas)
    except Fault as fault:
        file.check_intact(metas)
        return fault
    return None


def _verify_header(file: DataFile, metas: Metas) -> None:
    """Raises Fault with the first thing wrong."""
    # The length is taken after the meta pages, so a file that grows meanwhile is never too short.
    size = file.size()
    for fault in meta_faults(metas, size):
        raise fault
    meta = newest_meta(metas)
    if meta is None:
        return  # that is one of the faults
    trees = ((FREE_LIST, Role.FREE_LIST, meta.free), (MAIN, Role.MAIN, meta.main))
    for name, role, tree in trees:
        wrong = record_fault(tree, role, meta.last_page)
        if wrong is not None:
            raise Fault(f"the record of {name} {wrong}", meta.index)
    if size < (meta.last_page + 1) * meta.page_bytes:
        _check_tail(file, metas, meta, size)
    for name, _, tree in trees:
        if tree.root != NO_PAGE:
            kind = LEAF if tree.depth == 1 else BRANCH
            data = file.read(tree.root * meta.page_bytes, HEADER_BYTES)
            try:
                check_page(data, tree.root, kind, meta.page_bytes)
            except Fault as fault:
                raise Fault(f"the root of {name} {fault.reason}", tree.root) from None


def _check_tail(file: DataFile, metas: Metas, meta: Meta, size: int) -> None:
    """Raise Fault unless every page that a file of `size` bytes lacks is on the free list."""
    # Not that it is held, but our caller looks whether the snapshot stayed intact.
    walk = Walk(file, metas, size, on_progress=None, snapshot_held=True)
    with contextlib.suppress(EnoughError):
        walk.walk_free_list()
    page = meta.last_page
    while (page + 1) * meta.page_bytes > size and walk.map.is_free(page):
        page -= 1
    if (page + 1) * meta.page_bytes > size:
        raise Fault(f"truncated: has {size} bytes, needs {(page + 1) * meta.page_bytes}")
