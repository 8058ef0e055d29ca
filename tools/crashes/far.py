"""A remote in a directory, with an image of every source, for stores whose commands are killed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dedupstore.store import Store
from tools.crashes import program
from tools.crashes.corpus import Source

NAME = "far"


def build(directory: Path, sources: Mapping[str, Source]) -> Path:
    """Make a remote with an image of every source, by its key; returns its URL."""
    store, url = directory / "origin", directory / "far"
    program.must(store, "init")
    program.must(store, "remote", "add", NAME, str(url))
    for key, source in sources.items():
        program.must(store, "import", str(source.path), key)
        program.must(store, "push", NAME, key)
    return url


def know(store: Path, url: Path) -> None:
    """Have a store know the remote."""
    program.must(store, "remote", "add", NAME, str(url))


def bring(store: Path) -> None:
    """Fetch whatever a store has there only, whether it is needed or not."""
    program.in_fork(lambda: _bring(store))


def _bring(path: Path) -> str:
    with Store(path) as store:
        if store.env.remote is not None:
            with store.env.read() as txn:
                keys = txn.cursor(db=store.env.remote.places).iternext(values=False)
                frames = [int.from_bytes(key, "big") for key in keys]
            store.fetcher().fetch_all(frames, lambda _brought: None)
    return ""
