"""Indexes of packs, kept on disk so that pushes need not read them again: derived data.

Files below the store's directory, `remotes/<UUID>/<id>`: bundles of indexes as in the remote, and
indexes as in their packs. The id proves each, so a damaged or missing one is only read again. Files
appear whole. A cache that cannot be written does without. Thread-safe, over processes, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from dedupstore.errors import RemoteDamagedError
from dedupstore.remote import packs
from dedupstore.remote.remote import Remote

DIRECTORY = "remotes"
_ABANDONED_SECONDS = 3600


class IndexCache:
    """The indexes of one remote's packs."""

    def __init__(self, store: Path, remote: Remote, uuid: UUID) -> None:
        self._directory = store / DIRECTORY / str(uuid)
        self._remote = remote

    def get(self, pack: bytes, pack_bytes: int) -> packs.PackIndex:
        """The index of a pack that has `pack_bytes` bytes. Raises RemoteError."""
        with suppress(OSError, RemoteDamagedError):
            return packs.decode_index(self._kept(pack), pack, pack_bytes)
        raw = self._remote.listed_index(pack, pack_bytes)
        self.put(pack, raw)
        return packs.decode_index(raw, pack, pack_bytes)

    def get_bundle(self, bundle: bytes, length: int) -> tuple[bytes, tuple[packs.Bundled, ...]]:
        """A bundle of so many bytes: its bytes, and what is in it. Raises RemoteError."""
        with suppress(OSError, RemoteDamagedError):
            raw = self._kept(bundle)
            return raw, packs.decode_bundle(raw, bundle)
        raw = self._remote.bundle(bundle, length)
        self.put(bundle, raw)
        return raw, packs.decode_bundle(raw, bundle)

    def _kept(self, name: bytes) -> bytes:
        return (self._directory / name.hex()).read_bytes()

    def put(self, name: bytes, raw: bytes) -> None:
        """Keep an index or a bundle by its id, `raw` being its bytes."""
        path = self._directory / name.hex()
        aside = path.with_name(f".{path.name[:16]}.{os.urandom(8).hex()}")
        with suppress(OSError):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                aside.write_bytes(raw)
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)

    def keep_only(self, names: Container[bytes]) -> None:
        """Forget all but these packs' indexes and bundles."""
        with suppress(OSError), os.scandir(self._directory) as entries:
            for entry in entries:
                with suppress(OSError):
                    if not self._is_of(entry, names):
                        Path(entry.path).unlink()

    def _is_of(self, entry: os.DirEntry[str], names: Container[bytes]) -> bool:
        try:
            return bytes.fromhex(entry.name) in names
        except ValueError:  # being written, or left by a killed process
            return entry.stat().st_mtime > time.time() - _ABANDONED_SECONDS
