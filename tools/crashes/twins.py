"""Compares a store whose commands were killed with a twin whose commands were not.

The twin runs the commands that took effect, one after the other. After a gc both must hold the same
chunks, manifests, names and view records, and no drafts. Frames may differ: chunks that a killed
import had stored already lie in other frames than if it had never begun. So may the pages in use,
by what `PAGES_MORE` and `PAGES_RATIO` allow; what is free counts as free, as the file does not
shrink.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dedupstore.pages import verify_pages
from dedupstore.store import Store
from tools.crashes import far, program
from tools.crashes.model import InvariantError, Model

# Pages in use, compared with the twin's: at most this share and this many more.
PAGES_RATIO = 1.05
PAGES_MORE = 32
# Of a store from which everything was removed: the roots, and a free list that names all the rest.
EMPTY_PAGES = 16


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a store holds: sorted keys in hexadecimal, and counts."""

    chunks: list[str]
    manifests: list[str]
    images: list[str]
    views: list[str]
    elsewhere: int
    drafts: int
    frames: int
    pages: int


def take(store: Path) -> Inventory:
    """A store's inventory, taken in a fork."""
    return Inventory(**json.loads(program.in_fork(lambda: json.dumps(asdict(_take(store))))))


def _take(path: Path) -> Inventory:
    pages = verify_pages(path / "data.mdb").pages_walked
    with Store(path) as store, store.env.read() as txn:
        env = store.env

        def keys(database: object) -> list[str]:
            return [bytes(key).hex() for key in txn.cursor(db=database).iternext(values=False)]

        view = b"view".hex()
        return Inventory(
            keys(env.chunks),
            keys(env.manifests),
            keys(env.images),
            [key for key in keys(env.meta) if key.startswith(view)],
            0
            if env.remote is None
            else env.entries(txn, env.remote.places) + env.entries(txn, env.remote.distant),
            env.entries(txn, env.drafts),
            env.entries(txn, env.frames),
            pages,
        )


def compare(
    store: Path, model: Model, work: Path, remote: Path | None = None
) -> tuple[Inventory, Inventory]:
    """Collect garbage, bring what is in the remote only, and hold a store against its twin, which
    is made in `work`; returns both inventories. Raises InvariantError."""
    twin = work / "twin"
    program.must(twin, "init")
    if remote is not None:
        far.know(twin, remote)
    for words in model.history:
        _replay(twin, words, model)
    for path in (store, twin):
        program.must(path, "gc")
        far.bring(path)
        # Of frames that came whole, what nobody needs.
        program.must(path, "gc")
    ours, theirs = take(store), take(twin)
    for what in ("chunks", "manifests", "images", "views"):
        here, there = set(getattr(ours, what)), set(getattr(theirs, what))
        if here != there:
            raise InvariantError(
                f"after gc, {len(here - there)} {what} that an uncrashed twin has not, and "
                f"{len(there - here)} missing"
            )
    if ours.drafts:
        raise InvariantError(f"after gc, {ours.drafts} drafts of dead imports")
    if ours.pages > theirs.pages * PAGES_RATIO + PAGES_MORE:
        raise InvariantError(f"after gc, {ours.pages} pages in use, the twin's {theirs.pages}")
    return ours, theirs


def _replay(twin: Path, words: tuple[str, ...], model: Model) -> None:
    if words[0] == "import" and words[1] == "-":
        # The history has no standard input; the source's file is the same image.
        source = next(s for s in model.sources.values() if s.key == words[2].split(".")[0])
        words = ("import", str(source.path), words[2])
    program.must(twin, *words)


def empty(store: Path, model: Model) -> Inventory:
    """Remove everything, and expect that nothing is left. Raises InvariantError."""
    if model.names:
        program.must(store, "rm", *sorted(model.names))
    program.must(store, "gc")
    left = take(store)
    if left.chunks or left.manifests or left.drafts or left.frames or left.views or left.elsewhere:
        raise InvariantError(f"an emptied store holds {len(left.chunks)} chunks")
    if left.pages > EMPTY_PAGES:
        raise InvariantError(f"an emptied store has {left.pages} pages in use")
    return left
