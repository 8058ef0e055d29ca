"""Indexes of packs, kept on disk so that pushes need not read them again: derived data.

One file for each pack below the store's directory, `remotes/<UUID>/<pack id>`, which is the index
as in the pack. The id proves it, so a damaged or missing one is only read again. Files appear
whole. A cache that cannot be written does without. Thread-safe, over processes, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from dedupstore.errors import RemoteDamagedError
from dedupstore.remote import layout
from dedupstore.remote.remote import Remote

DIRECTORY = "remotes"
_ABANDONED_SECONDS = 3600


class IndexCache:
    """The indexes of one remote's packs."""

    def __init__(self, store: Path, remote: Remote, uuid: UUID) -> None:
        self._directory = store / DIRECTORY / str(uuid)
        self._remote = remote

    def get(self, pack: bytes, pack_bytes: int) -> layout.PackIndex:
        """The index of a pack that has `pack_bytes` bytes. Raises RemoteError."""
        path = self._directory / pack.hex()
        with suppress(OSError, RemoteDamagedError):
            return layout.decode_index(path.read_bytes(), pack, pack_bytes)
        raw = self._remote.listed_index(pack, pack_bytes)
        self.put(pack, raw)
        return layout.decode_index(raw, pack, pack_bytes)

    def put(self, pack: bytes, raw: bytes) -> None:
        """Keep an index, `raw` being its bytes."""
        path = self._directory / pack.hex()
        aside = path.with_name(f".{path.name[:16]}.{os.urandom(8).hex()}")
        with suppress(OSError):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                aside.write_bytes(raw)
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)

    def keep_only(self, packs: Container[bytes]) -> None:
        """Forget the indexes of all packs but these."""
        with suppress(OSError), os.scandir(self._directory) as entries:
            for entry in entries:
                with suppress(OSError):
                    if not self._is_of(entry, packs):
                        Path(entry.path).unlink()

    def _is_of(self, entry: os.DirEntry[str], packs: Container[bytes]) -> bool:
        try:
            return bytes.fromhex(entry.name) in packs
        except ValueError:  # being written, or left by a killed process
            return entry.stat().st_mtime > time.time() - _ABANDONED_SECONDS
