"""What can be imported, and how: files, devices, directories, archives and streams.

Owns the way from a source to an `Ingest` and the name that the image gets; `ingest` owns the import
itself. Directories and archives are laid out as EROFS images on the way, in one pass (`trees`). An
`Importer` may be used by several threads.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import lmdb

from dedupstore import archives, catalog, format as fmt, origins, quarantine, trees
from dedupstore.building import BuiltSource
from dedupstore.chunker import Segment
from dedupstore.env import Environment
from dedupstore.errors import ImageExistsError, SourceError
from dedupstore.imported import Imported
from dedupstore.ingest import Ingest, plan
from dedupstore.leases import Leases
from dedupstore.sources import FileSource, Source, open_source, spool
from dedupstore.staging import Publish

Progress = Callable[[int, int], None]
"""Gets (bytes done since the last call, bytes in all)."""


class Importer:
    """Imports into one store; `spool_directory` takes unnamed temporary files."""

    def __init__(self, env: Environment, leases: Leases, spool_directory: Path) -> None:
        self._env = env
        self._leases = leases
        self._spool_directory = spool_directory

    def import_path(self, path: Path, name: str, on_progress: Progress) -> Imported:
        """Import a file, block device, directory or tar archive."""
        self._require_new(name)
        if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for what cannot be looked at
            return self._import_built(trees.from_directory(path), name, on_progress)
        with _opened(open_source(path)) as source:
            is_file = stat.S_ISREG(path.stat().st_mode)
            return self._import_file(source, path if is_file else None, name, on_progress)

    def import_stream(self, stream: BinaryIO, name: str, on_progress: Progress) -> Imported:
        """Import a stream, of whatever a file could hold, by way of an unnamed temporary file."""
        self._require_new(name)
        with _opened(self._spool(stream, "standard input")) as source:
            path = Path(f"/proc/self/fd/{source.fileno()}")
            return self._import_file(source, path, name, on_progress)

    def _spool(self, stream: BinaryIO, what: str, bytes_max: int | None = None) -> FileSource:
        return spool(stream, self._spool_directory, what, bytes_max)

    def _require_new(self, name: str) -> None:
        """Fail before the work rather than after it when `name` cannot be given."""
        key = catalog.encode_name(name)
        with self._env.read() as txn:
            if txn.get(key, db=self._env.images) is not None:
                raise ImageExistsError(name)

    def _import_file(
        self,
        source: FileSource,
        path: Path | None,
        name: str,
        on_progress: Progress,
    ) -> Imported:
        """Import what a file holds; `path` leads to it, None if it can be no archive."""
        opener = archives.find_opener(path) if path is not None else None
        if opener is None:
            return self._import_image(source, name, on_progress)
        if opener is archives.open_plain:
            return self._import_archive(source, name, on_progress)
        assert path is not None
        bytes_max = archives.unpacked_bytes_max(source.size)
        try:
            stream = opener(path)
        except OSError as error:
            raise SourceError(f"{source.name}: {error.strerror}") from None
        with stream, _opened(self._spool(stream, source.name, bytes_max)) as unpacked:
            return self._import_archive(unpacked, name, on_progress)

    def _import_image(self, source: FileSource, name: str, on_progress: Progress) -> Imported:
        """Import a file's bytes as they are, and remember the file."""
        before, began = origins.file_state(os.fstat(source.fileno())), time.time_ns()
        kind, segments = plan(source)
        give_name = self._publish(name, kind)

        def publish(txn: lmdb.Transaction, digest: bytes, manifest: fmt.ManifestRecord) -> None:
            give_name(txn, digest, manifest)
            after = origins.file_state(os.fstat(source.fileno()))
            if before is not None and before == after and origins.is_settled(before, began):
                origins.remember(txn, self._env, fmt.OriginRecord(before, digest, kind))

        return self._ingest(source, segments, publish, on_progress)

    def _import_archive(self, source: FileSource, name: str, on_progress: Progress) -> Imported:
        built = trees.from_archive(source.fileno(), source.name)
        return self._import_built(built, name, on_progress)

    def _import_built(self, source: BuiltSource, name: str, on_progress: Progress) -> Imported:
        """Import a tree as an EROFS image with fingerprints, which is its own kernel view."""
        publish = self._publish(name, fmt.KIND_EROFS, is_view=True)
        return self._ingest(source, source.segments(), publish, on_progress)

    def _ingest(
        self,
        source: Source,
        segments: Iterable[Segment],
        publish: Publish,
        on_progress: Progress,
    ) -> Imported:
        ingest = Ingest(self._env, self._leases, source)
        imported = ingest.run(segments, publish, lambda done: on_progress(done, source.size))
        # Of what it stored some may be what other images have lost.
        quarantine.redirect_all(self._env)
        return imported

    def _publish(self, name: str, kind: int, *, is_view: bool = False) -> Publish:
        """Give the finished image its name."""

        def publish(txn: lmdb.Transaction, digest: bytes, manifest: fmt.ManifestRecord) -> None:
            created = time.time_ns()
            image = fmt.ImageRecord(digest, manifest.size, created, kind)
            catalog.add_image(txn, self._env, name, image)
            if is_view:
                view = fmt.ViewRecord(digest, created)
                catalog.put_view(txn, self._env, digest, fmt.VIEW_KERNEL, view)

        return publish


@contextmanager
def _opened(source: FileSource) -> Iterator[FileSource]:
    try:
        yield source
    finally:
        source.close()
