"""What every command gets: the store's path, and the open store when it needs one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from dedupstore.store import Store


@dataclass(frozen=True, slots=True)
class Context:
    """The global options. `path` is absolute."""

    path: Path

    def open(self, *, grows: bool = False) -> Store:
        """Open the store, `grows` to add to it; use it as a context manager."""
        return Store(self.path, grows=grows)


pass_context = click.make_pass_decorator(Context)
