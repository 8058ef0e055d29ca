"""Views: images derived from an image, whose mounts share page cache with others'.

An image comes from anywhere, and is exported byte for byte as it came. What is mounted to be shared
is therefore never the image but a view of it, whose metadata this project wrote:

    kernel   the same tree with fingerprints, for Linux 7.0's inode_share
    pool     metadata and objects for an overlay (pooling.py)

The kernel believes a fingerprint, and an overlay a redirect, so they are computed here from the
contents themselves; what the image says of them is dropped. A view's data are chunks that the image
has too: it costs the disk its metadata (docs/decisions/0005-views.md). Images that were built here
from a directory or archive have fingerprints already and are their own kernel view.

Views are derived data: gc forgets them with their image, and the next mount derives them anew.
Thread-safe; two at once for one image do the work twice.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import lmdb

from dedupstore import catalog, format as fmt
from dedupstore.building import BuiltSource
from dedupstore.cache import FrameCache
from dedupstore.erofs import read_tree
from dedupstore.erofs.contents import ImageContent
from dedupstore.erofs.tree import Directory, RegularFile
from dedupstore.erofs.writer import PlacedFile, plan_image
from dedupstore.erofs.writer.fingerprints import Fingerprinting
from dedupstore.errors import ErofsError, NotShareableError, SourceError
from dedupstore.ingest import Ingest
from dedupstore.manifest import Manifest
from dedupstore.pooling import Home, Pooled, pool, require_poolable, walk_files
from dedupstore.reader import ImageReader, Prefetcher, ReadCounters
from dedupstore.staging import Publish
from dedupstore.store import Store

Progress = Callable[[int, int], None]

# A derivation reads the image's contents twice, nearly in order.
_CACHE_BYTES = 256 << 20
_PIECE_BYTES = 1 << 20
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class View:
    """A view that can be mounted. Sizes in bytes; `homes` are (digest, size) of the further views
    that a pool view needs mounted."""

    digest: bytes
    size: int
    homes: tuple[tuple[bytes, int], ...] = ()


class _HomeGoneError(Exception):
    """A gc forgot a home while a view that needs it was derived."""


def ensure_view(store: Store, image: bytes, kind: int, on_progress: Progress) -> View:
    """The view of `kind` (fmt.VIEW_*) of an image's digest; derived if there is none.

    `on_progress` gets (bytes done since the last call, bytes in all) of a derivation. Raises
    ImageNotFoundError, NotShareableError, StoreFullError, ChunkDamagedError.
    """
    found = _find(store, image, kind)
    if found is not None:
        return found
    manifest = store.open_digest(image)
    try:
        with _reading(store, manifest) as read_at:
            try:
                root = read_tree(read_at, manifest.size, manifest.data_bytes)
            except ErofsError as error:
                raise NotShareableError(error.reason) from None
            derivation = _Derivation(store, image, root, on_progress)
            if kind == fmt.VIEW_KERNEL:
                derivation.kernel()
            else:
                derivation.pool()
    except SourceError as error:
        raise NotShareableError(str(error)) from None
    finally:
        store.close_manifest(manifest)
    found = _find(store, image, kind)
    if found is None:
        raise NotShareableError("removed while its view was derived")
    return found


def _find(store: Store, image: bytes, kind: int) -> View | None:
    with store.env.read() as txn:
        view = catalog.find_view(txn, store.env, image, kind)
        if view is None:
            return None

        def size(digest: bytes) -> int:
            return catalog.read_summary(txn, store.env, digest).size

        homes = tuple((home, size(home)) for home in view.homes)
        return View(view.digest, size(view.digest), homes)


@contextmanager
def _reading(store: Store, manifest: Manifest) -> Iterator[Callable[[int, int], bytes]]:
    """A thread-safe function that reads the image: up to `length` bytes, fewer at its end."""
    counters = ReadCounters()
    cache = FrameCache(_CACHE_BYTES, store.loader().load)
    prefetcher = Prefetcher(cache, counters)
    reader = ImageReader(manifest.digest.hex()[:16], manifest, cache, prefetcher, counters)

    def read_at(offset: int, length: int) -> bytes:
        buffer = bytearray(max(0, min(length, manifest.size - offset)))
        if buffer:
            reader.read(memoryview(buffer), offset)
        return bytes(buffer)

    try:
        yield read_at
    finally:
        prefetcher.close()


class _Derivation:
    """The derivation of one view of one image."""

    def __init__(self, store: Store, image: bytes, root: Directory, on_progress: Progress) -> None:
        self._store = store
        self._image = image
        self._name = f"view of {image.hex()[:16]}"
        self._root = root
        self._on_progress = on_progress

    def kernel(self) -> None:
        """Store the tree with fingerprints."""
        plan = plan_image(self._root, uuid=self._image[:16], fingerprints=True)
        source = BuiltSource(plan, self._name, _source_cuts)

        def publish(txn: lmdb.Transaction, digest: bytes, _: fmt.ManifestRecord) -> None:
            self._put(txn, fmt.VIEW_KERNEL, fmt.ViewRecord(digest, time.time_ns()))

        self._ingest(source, source.size, publish)

    def pool(self) -> None:
        """Store the tree and the objects that no home has."""
        require_poolable(self._root, self._image)
        wants = Fingerprinting().wants
        files = [f for f in walk_files(self._root) if wants(f.size, f.data_bytes)]
        all_bytes = 2 * sum(file.data_bytes for file in files)
        fingerprints = self._fingerprint(files, all_bytes)
        for _ in range(_ATTEMPTS):
            pooled = pool(self._root, self._image, fingerprints, self._candidates())
            try:
                self._store_pool(pooled, all_bytes)
            except _HomeGoneError:
                continue
            return
        raise NotShareableError("gc is faster; try again")

    def _fingerprint(self, files: list[RegularFile], all_bytes: int) -> dict[int, bytes]:
        """SHA-256 of every file's content, on every core."""
        found = {}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for file, digest in zip(files, threads.map(_fingerprint, files), strict=True):
                found[id(file)] = digest
                self._on_progress(file.data_bytes, all_bytes)
        return found

    def _candidates(self) -> list[Home]:
        """Pool views of images that have a name, the oldest first."""
        env = self._store.env
        with env.read() as txn:
            named = {image.digest for _, image in catalog.list_images(txn, env)}
            found = [
                (view.created_ns, Home(view.digest, image, view.objects))
                for image, kind, view in catalog.list_views(txn, env)
                if kind == fmt.VIEW_POOL
                and isinstance(view, fmt.ViewRecord)
                and image in named - {self._image}
                and view.objects
            ]
        found.sort(key=lambda each: (each[0], each[1].view))
        return [home for _, home in found]

    def _store_pool(self, pooled: Pooled, all_bytes: int) -> None:
        plan = plan_image(pooled.root, uuid=self._image[:16])
        source = BuiltSource(plan, self._name, _source_cuts)
        homes = tuple(home.view for home in pooled.homes)

        def publish(txn: lmdb.Transaction, digest: bytes, _: fmt.ManifestRecord) -> None:
            for home in pooled.homes:
                there = catalog.find_view(txn, self._store.env, home.image, fmt.VIEW_POOL)
                if there is None or there.digest != home.view:
                    raise _HomeGoneError
            record = fmt.ViewRecord(digest, time.time_ns(), homes, pooled.objects)
            self._put(txn, fmt.VIEW_POOL, record)

        self._ingest(source, all_bytes, publish)

    def _put(self, txn: lmdb.Transaction, kind: int, view: fmt.ViewRecord) -> None:
        catalog.put_view(txn, self._store.env, self._image, kind, view)

    def _ingest(self, source: BuiltSource, all_bytes: int, publish: Publish) -> None:
        ingest = Ingest(self._store.env, self._store.leases, source)
        ingest.run(
            source.segments(),
            publish,
            lambda done: self._on_progress(done, all_bytes),
        )


def _source_cuts(placed: PlacedFile) -> Iterator[int]:
    """Where the image's own chunks begin: a tail in an inode is not stored again with the rest."""
    content = placed.node.content
    if isinstance(content, ImageContent):
        starts = iter(sorted(offset for offset, _, _ in content.pieces))
        start = next(starts, None)
        for at, offset, length in placed.spans:
            while start is not None and start < offset + length:
                if start > offset:
                    yield at + start - offset
                start = next(starts, None)


def _fingerprint(file: RegularFile) -> bytes:
    """SHA-256 of a file's content, holes as zeros."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_PIECE_BYTES, file.size)))
    with file.content.opened() as read_into:
        offset = 0
        while offset < file.size:
            count = read_into(offset, buffer[: file.size - offset])
            digest.update(buffer[:count])
            offset += count
    return digest.digest()
