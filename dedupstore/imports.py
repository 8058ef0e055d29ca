"""What can be imported, and how: files, devices, directories, archives and streams.

Owns the way from a source to an `Ingest` and the name that the image gets; `ingest` owns the import
itself. Directories and archives are laid out as EROFS images on the way, in one pass. An `Importer`
may be used by several threads.
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

from dedupstore import archives, catalog
from dedupstore import format as fmt
from dedupstore.building import BuiltSource
from dedupstore.chunker import Segment
from dedupstore.env import Environment
from dedupstore.erofs.tree import Directory
from dedupstore.erofs.writer import plan_image, scan_directory, scan_tar
from dedupstore.errors import ImageExistsError, SourceError, UsageError
from dedupstore.ingest import Imported, Ingest, plan
from dedupstore.leases import Leases
from dedupstore.sources import FileSource, Source, open_source, spool
from dedupstore.staging import Publish

Progress = Callable[[int, int], None]
"""Gets (bytes done since the last call, bytes in all)."""

_ARCHIVE_SUFFIXES = (".gz", ".xz", ".bz2", ".zst", ".tar", ".tgz", ".txz", ".tbz2", ".tzst")
_IMAGE_SUFFIXES = (".erofs", ".img", ".raw", ".iso", ".ext4", ".squashfs")


class Importer:
    """Imports into one store; `spool_directory` takes unnamed temporary files."""

    def __init__(self, env: Environment, leases: Leases, spool_directory: Path) -> None:
        self._env = env
        self._leases = leases
        self._spool_directory = spool_directory

    def import_path(
        self, path: Path, name: str | None, on_progress: Progress
    ) -> tuple[str, Imported]:
        """Import a file, block device, directory or tar archive; return its name and the result.

        `name` defaults to the source's name without its suffixes.
        """
        name = name or default_name(path)
        self._require_new(name)
        if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for what cannot be looked at
            return name, self.import_tree(scan_directory(path), str(path), name, on_progress)
        with _opened(open_source(path)) as source:
            is_file = stat.S_ISREG(path.stat().st_mode)
            return name, self._import_file(source, path if is_file else None, name, on_progress)

    def import_stream(self, stream: BinaryIO, name: str, on_progress: Progress) -> Imported:
        """Import a stream, of whatever a file could hold, by way of an unnamed temporary file."""
        self._require_new(name)
        with _opened(self._spool(stream, "standard input")) as source:
            path = Path(f"/proc/self/fd/{source.fileno()}")
            return self._import_file(source, path, name, on_progress)

    def _spool(self, stream: BinaryIO, what: str) -> FileSource:
        return spool(stream, self._spool_directory, what)

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
            kind, segments = plan(source)
            return self._ingest(source, segments, self._publish(name, kind), on_progress)
        if opener is archives.open_plain:
            return self._import_archive(source, name, on_progress)
        assert path is not None
        with opener(path) as stream, _opened(self._spool(stream, source.name)) as unpacked:
            return self._import_archive(unpacked, name, on_progress)

    def _import_archive(self, source: FileSource, name: str, on_progress: Progress) -> Imported:
        try:
            root = scan_tar(source.fileno())
        except SourceError as error:
            raise SourceError(f"{source.name}: {error}") from None
        return self.import_tree(root, source.name, name, on_progress)

    def import_tree(self, root: Directory, what: str, name: str, on_progress: Progress) -> Imported:
        """Import a tree as an EROFS image with fingerprints, which is its own kernel view."""
        try:
            source = BuiltSource(plan_image(root, fingerprints=True), what)
        except SourceError as error:
            raise SourceError(f"{what}: {error}") from None
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
        return ingest.run(segments, publish, lambda done: on_progress(done, source.size))

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


def default_name(path: Path) -> str:
    """An image name for a source: its file name without archive and image suffixes."""
    name = path.resolve().name if path.name in ("", ".", "..") else path.name
    for suffixes in (_ARCHIVE_SUFFIXES, _ARCHIVE_SUFFIXES, _IMAGE_SUFFIXES):
        stem, _, suffix = name.rpartition(".")
        if stem and f".{suffix.lower()}" in suffixes:
            name = stem
    if not name:
        raise UsageError(f"{path}: give the image a name")
    return name
