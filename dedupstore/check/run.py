"""A check from end to end: pages, records, then the repair and a second look.

Owns the order, and what is said about it. What a repair has mended is found out by scrubbing again,
not by trusting the repair. Thread-safe: a call shares nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from dedupstore.check.files import FileOrigin
from dedupstore.check.findings import Checked, Finding, Progress, compared
from dedupstore.check.rebuild import name_lost, rebuild
from dedupstore.check.repair import Repair, quarantine_damage
from dedupstore.check.scrub import Scrub
from dedupstore.check.sources import Origin
from dedupstore.check.stores import StoreOrigin
from dedupstore.env import DATA_FILE, Environment
from dedupstore.errors import DedupError, SourceError
from dedupstore.pages import verify_pages
from dedupstore.sources import open_source

_FOUND = (
    "run 'dedupstore check --repair', with '--from' and another store or an image's file if there "
    "is one; what is damaged is in quarantine, and importing its contents again stores it anew"
)
_LEFT = (
    "repair again with '--from' and another store or the file of a damaged image, or import what "
    "was in it again; 'dedupstore rm' gives an image up"
)
_PAGES = (
    "nothing can be trusted behind a damaged page: end all servers and mounts of the store and run "
    "'dedupstore check --repair', which copies what can be read into a new data.mdb, or put a copy "
    "of data.mdb in its place"
)


def check_store(
    path: Path,
    *,
    repair: bool = False,
    sources: Sequence[Path] = (),
    on_progress: Progress | None = None,
) -> Checked:
    """Verify the store at `path`, which must not be open in this process; with `repair` mend what
    can be, from itself and from `sources`: directories of other stores, image files, devices.
    Damaged pages are mended by a new data file, for which nobody may have the store open.

    `on_progress` gets (frames done, frames in all). Raises StoreNotFoundError and what else keeps a
    store or a source from being opened; damage inside is returned, not raised.
    """
    on_progress = on_progress or (lambda _done, _all: None)
    pages, damage = _verified_pages(path)
    if damage and not repair:
        # LMDB would follow these pages wherever they lead: no further pass is safe.
        return Checked(pages, 0, 0, 0, 0, damage, _PAGES)
    with ExitStack() as stack:
        origins = [stack.enter_context(closing(_opened(source))) for source in sources]
        names_lost = rebuild(path) if damage else 0
        env = stack.enter_context(closing(Environment(path)))
        names = name_lost(env, origins, names_lost) if damage else ()
        scrub = _scrubbed(env, on_progress)
        findings = (*damage, *scrub.findings)
        if findings and repair:
            Repair(env, path, scrub).run(origins)
            scrub = _scrubbed(env, on_progress)
            findings = (*compared(findings, scrub.findings), *names)
        elif findings:
            # A report all the same when the store cannot be written to.
            with suppress(DedupError):
                quarantine_damage(env, scrub)
        left = any(not finding.mended for finding in findings)
        return Checked(
            pages,
            len(scrub.frames.tables),
            scrub.chunks,
            scrub.frames.bytes,
            scrub.images,
            findings,
            (_LEFT if repair else _FOUND) if left else "",
        )


def _scrubbed(env: Environment, on_progress: Progress) -> Scrub:
    scrub = Scrub(env)
    scrub.run(on_progress)
    return scrub


def _verified_pages(path: Path) -> tuple[int, tuple[Finding, ...]]:
    """How many pages there are, and which are damaged."""
    if not os.path.exists(path / DATA_FILE):  # noqa: PTH110 - False where one may not look, too
        return 0, ()
    report = verify_pages(path / DATA_FILE)
    return report.pages_walked, tuple(
        Finding(f"page {page.page} of {page.database}", page.reason) for page in report.findings
    )


def _opened(path: Path) -> Origin:
    """Open a store's directory, an image file or a block device. Raises SourceError for what is
    neither, and what keeps a store from being opened."""
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for what cannot be looked at
        if not os.path.exists(path / DATA_FILE):  # noqa: PTH110 - as above
            raise SourceError(f"{path}: neither a store nor an image file")
        return StoreOrigin(path)
    return FileOrigin(open_source(path))
