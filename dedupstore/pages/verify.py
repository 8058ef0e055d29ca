"""The walks callers ask for: one reports all it finds, one raises on the first thing wrong.

Owns how often a walk starts again when writers overtake it, and what becomes of its findings.
Thread-safe.
"""

import os
from typing import Final

from dedupstore.errors import StoreAccessError
from dedupstore.pages.datafile import DataFile, OvertakenError
from dedupstore.pages.findings import Fault, PageReport, damaged
from dedupstore.pages.walk import Progress, Walk

_WALK_ATTEMPTS: Final = 5


def verify_pages(
    path: str | os.PathLike[str],
    *,
    on_progress: Progress | None = None,
    snapshot_held: bool = False,
) -> PageReport:
    """Walk every tree of the newest snapshot and check that LMDB can follow it without harm.

    Checked: every page's number, flags and bounds; every node within its page and apart from the
    others; keys in order and within the bounds the parents give; depth and counts against the
    database's record; overflow runs; the free list; and that every page up to the last is used
    exactly once, by one tree or by the free list. Values are not read.

    The file may be quiescent, or in use. Whoever holds an LMDB read transaction or the write lock
    passes `snapshot_held=True`: no page of the newest snapshot is then reused during the walk.
    Without (opening a damaged file with LMDB may crash, so there may be no way to hold one) a
    finding counts only if the snapshot was still intact after it was made; if a writer was faster,
    the walk starts again, 5 times at most. May be called from any thread.

    `on_progress(done, total)`, in pages, is called now and then and once at the end (`done` falls
    when the walk starts again); what it raises ends the walk and reaches the caller. Memory: 2 bits
    a page of the file, plus one path of a tree, the databases' names and at most FINDINGS_MAX
    findings. Bad content never raises.

    Raises StoreAccessError: the file cannot be opened, or is written to too fast to be walked;
    StoreDamagedError: the disk fails to read the meta pages (other pages become findings).
    """
    with DataFile(path) as file:
        for _ in range(_WALK_ATTEMPTS):
            walk = None
            try:
                metas = file.metas()
                walk = Walk(
                    file, metas, file.size(), on_progress=on_progress, snapshot_held=snapshot_held
                )
                walk.run()
                return walk.report()
            except OvertakenError:
                if walk is not None and walk.findings:  # the snapshot was intact: they stand
                    return walk.report()
    raise StoreAccessError(
        f"{os.fspath(path)}: written to faster than it can be checked "
        "(stop the writers, or check while holding a read transaction)"
    )


def verify_trees(path: str | os.PathLike[str], *, skip: frozenset[str] = frozenset()) -> None:
    """Walk the newest snapshot's trees like `verify_pages`, except the databases named in `skip`,
    and raise on the first thing wrong. For a caller that is about to write, in LMDB's hands: a free
    list that names a page in use makes the next commit destroy it.

    The caller holds an LMDB read transaction or the write lock. May be called from any thread.

    Raises StoreDamagedError as `verify_header` does. StoreAccessError: the file cannot be opened.
    """
    with DataFile(path) as file:
        # Length after meta pages: a file that grows meanwhile is never too short.
        metas = file.metas()
        walk = Walk(file, metas, file.size(), on_progress=None, snapshot_held=True)
        walk.run(skip)
        for finding in walk.findings:
            raise damaged(path, Fault(f"(of {finding.database}) {finding.reason}", finding.page))
