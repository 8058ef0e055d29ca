"""The store: opens and wires the layers below, and is the only API for what lies above.

A `Store` belongs to one process and must not cross a fork. Thread-safe: every method may be called
from any thread; an import uses its calling thread and a pool of its own. Methods return typed
results and print nothing. Every failure that a user or a disk can cause is a DedupError.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from weakref import WeakValueDictionary

import lmdb

from dedupstore import catalog, format as fmt, origins, wishes
from dedupstore.creation import TEMPORARY_DIRECTORY, create_store
from dedupstore.env import Environment
from dedupstore.errors import (
    ImageNotFoundError,
    StoreDamagedError,
)
from dedupstore.frames import FrameLoader, count_distant, read_head, read_totals
from dedupstore.leases import Leases, image_byte
from dedupstore.manifest import Manifest

if TYPE_CHECKING:
    from dedupstore import compaction, gc
    from dedupstore.imported import Imported
    from dedupstore.imports import Importer
    from dedupstore.remote.evicting import Evicted
    from dedupstore.remote.fetching import Fetcher
    from dedupstore.remote.pulling import Pulled
    from dedupstore.remote.pushing import Pusher
    from dedupstore.remote.replaying import Replay
    from dedupstore.traces import Trace

STANDARD_INPUT = "-"


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One name and what it stands for. Bytes; `unique_bytes` are those of the image's distinct
    chunks, `zero_bytes` those in holes."""

    name: str
    size: int
    digest: str
    kind: str
    created: float
    chunks: int
    unique_bytes: int
    zero_bytes: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Sums over the store, in bytes where not counts. `file_bytes` are what data.mdb occupies on
    disk, `file_length` is how long it is: the rest are holes that compaction made. `distant_*` is
    what is in remotes and not here: of `frames` so many, with so many chunks and their bytes;
    `chunks` and `unique_bytes` are what is here."""

    images: int
    logical_bytes: int
    unique_bytes: int
    stored_bytes: int
    file_bytes: int
    file_length: int
    chunks: int
    frames: int
    distant_frames: int
    distant_chunks: int
    distant_bytes: int
    dedup_ratio: float
    compression_ratio: float


@dataclass(frozen=True, slots=True)
class Difference:
    """What two images share. Bytes of distinct chunks, except the sizes; holes do not count."""

    a: str
    b: str
    a_size: int
    b_size: int
    identical: bool
    shared_bytes: int
    only_a_bytes: int
    only_b_bytes: int
    shared_chunks: int
    only_a_chunks: int
    only_b_chunks: int


@dataclass(frozen=True, slots=True)
class Laziness:
    """What of an image is elsewhere: bytes of its chunks. `prefetch` is what servers that open it
    fetch ("none", "trace", "all"), unless it is paused; `wanted_bytes` the bytes of that (of "none"
    all), how many of these are elsewhere, and the share that is here."""

    missing_bytes: int
    prefetch: str
    paused: bool
    wanted_bytes: int
    wanted_missing_bytes: int
    done: float


@dataclass(frozen=True, slots=True)
class Prefetched:
    """What a prefetch did. Bytes of chunks: those wanted, and how many of these were elsewhere
    before and are now; and what was fetched, compressed."""

    name: str
    wanted_bytes: int
    missing_bytes: int
    fetched_bytes: int
    left_bytes: int


class Store:
    """An open store."""

    def __init__(self, path: Path, *, grows: bool = False) -> None:
        """Open the store at `path`; `grows` for what adds to it, for which a full store has no
        room when there is still some to remove things.

        Raises StoreNotFound/Access/Version/DamagedError.
        """
        self.path = path
        self.env = Environment(path, grows=grows)
        try:
            with self.env.read() as txn:
                record = txn.get(fmt.SUPERBLOCK_KEY, db=self.env.meta)
                if record is None:
                    raise StoreDamagedError(f"{self.env.path}: not a dedupstore store")
                self.superblock = fmt.decode_superblock(record)
            fmt.check_superblock(self.superblock, str(path))
            self.leases = Leases(path)
            self._manifests: WeakValueDictionary[bytes, Manifest] = WeakValueDictionary()
            self._fetcher: Fetcher | None = None
            self._fetcher_lock = threading.Lock()
            self._touched: set[int] = set()
        except BaseException:
            self.env.close()
            raise

    @classmethod
    def create(cls, path: Path) -> Store:
        """Create a store, and open it. See creation.create_store."""
        create_store(path)
        return cls(path)

    def close(self) -> None:
        """Close the store; readers and imports must have ended. What was fetched is stored first.
        Idempotent."""
        if self._fetcher is not None:
            self._fetcher.close()
            self._fetcher = None
        self.leases.close()
        self.env.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- images by name ---

    def names(self, prefix: str = "") -> list[str]:
        """The names of all images, or of those that begin with `prefix`, in order."""
        with self.env.read() as txn:
            return list(catalog.list_names(txn, self.env, prefix))

    def first_name(self, prefix: str, wanted: Callable[[str], bool]) -> str | None:
        """The first name that begins with `prefix` and is `wanted`."""
        with self.env.read() as txn:
            return next(filter(wanted, catalog.list_names(txn, self.env, prefix)), None)

    def has_name(self, name: str) -> bool:
        """Whether there is an image of this name."""
        with self.env.read() as txn:
            return txn.get(catalog.encode_name(name), db=self.env.images) is not None

    def images(self) -> list[ImageInfo]:
        """Every image, in the order of the names."""
        with self.env.read() as txn:
            return [
                _info(name, image, catalog.read_summary(txn, self.env, image.digest))
                for name, image in catalog.list_images(txn, self.env)
            ]

    def image(self, name: str) -> ImageInfo:
        """One image. Raises ImageNotFoundError."""
        with self.env.read() as txn:
            image = catalog.find_image(txn, self.env, name)
            return _info(name, image, catalog.read_summary(txn, self.env, image.digest))

    def digests_of(self, names: Iterable[str]) -> set[bytes]:
        """The digests of images by name and of their views; names that are gone do not count."""
        found = set()
        with self.env.read() as txn:
            for name in names:
                with suppress(ImageNotFoundError):
                    found.add(catalog.find_image(txn, self.env, name).digest)
            derived = {
                view for image in found for view in catalog.view_digests(txn, self.env, image)
            }
        return found | derived

    def has_digest(self, digest: bytes) -> bool:
        """Whether there is an image or view with this digest."""
        with self.env.read() as txn:
            return txn.get(digest, db=self.env.manifests) is not None

    def mounted_digests(self, image: bytes) -> set[bytes]:
        """What mounts of an image read: its digest, those of its views, and of what these need."""
        found = {image}
        with self.env.read() as txn:
            for kind in (fmt.VIEW_KERNEL, fmt.VIEW_POOL):
                view = catalog.find_view(txn, self.env, image, kind)
                if view is not None:
                    found.update((view.digest, *view.homes))
        return found

    def clone(self, source: str, target: str) -> None:
        """Give the image `source` the further name `target`: O(1), nothing is copied."""
        with self.env.write() as txn:
            image = catalog.find_image(txn, self.env, source)
            clone = fmt.ImageRecord(image.digest, image.size, time.time_ns(), image.kind)
            catalog.add_image(txn, self.env, target, clone)

    def rename(self, old: str, new: str) -> None:
        """Change an image's name. Raises ImageNotFoundError, ImageExistsError."""
        with self.env.write() as txn:
            image = catalog.remove_image(txn, self.env, old)
            catalog.add_image(txn, self.env, new, image)

    def remove(self, names: list[str]) -> None:
        """Forget names, all or none; space comes back with the next gc."""
        with self.env.write() as txn:
            for name in dict.fromkeys(names):
                catalog.forget_name(txn, self.env, name)

    # --- contents ---

    def loader(self) -> FrameLoader:
        """A loader of this store's frames, for a cache; it fetches those that are elsewhere."""
        return FrameLoader(self.env, self.fetcher, self._touched)

    def fetcher(self) -> Fetcher:
        """What brings frames that are elsewhere; one for all, closed with the store."""
        with self._fetcher_lock:
            if self._fetcher is None:
                # Only now: it loads a client for object stores, which is large.
                from dedupstore.remote.fetching import Fetcher  # noqa: PLC0415

                self._fetcher = Fetcher(self.env, self.path, self._touched)
            return self._fetcher

    @property
    def fetching(self) -> Fetcher | None:
        """`fetcher` if there is one yet."""
        return self._fetcher

    def open_manifest(self, name: str) -> Manifest:
        """The manifest of an image, leased: gc keeps its chunks until `close_manifest`.

        Raises ImageNotFoundError.
        """
        while True:
            with self.env.read() as txn:
                digest = catalog.find_image(txn, self.env, name).digest
            self.leases.take(image_byte(digest))
            try:
                # A gc may have finished between the look-up and the lease: look again.
                with self.env.read() as txn:
                    if catalog.find_image(txn, self.env, name).digest == digest:
                        return self._shared_manifest(txn, digest)
            except BaseException:
                self.leases.release(image_byte(digest))
                raise
            self.leases.release(image_byte(digest))

    def open_digest(self, digest: bytes) -> Manifest:
        """The manifest of an image or view by its digest, leased until `close_manifest`.

        Raises ImageNotFoundError.
        """
        self.leases.take(image_byte(digest))
        try:
            with self.env.read() as txn:
                if txn.get(digest, db=self.env.manifests) is None:
                    raise ImageNotFoundError(digest.hex())
                return self._shared_manifest(txn, digest)
        except BaseException:
            self.leases.release(image_byte(digest))
            raise

    def renew_manifest(self, manifest: Manifest) -> Manifest:
        """The manifest of an open image as it is now: the same object, unless damage was mended
        since. The lease stays; `close_manifest` takes either."""
        with self.env.read() as txn:
            return self._shared_manifest(txn, manifest.digest)

    def _shared_manifest(self, txn: lmdb.Transaction, digest: bytes) -> Manifest:
        """One object for all who have the image or a clone of it open. Two threads may decode the
        same manifest at once; one of the results then simply serves fewer readers."""
        # Known by the record's guard too: an image that was removed and imported again since, or
        # whose damaged chunks were, lies elsewhere in the store.
        key = digest + bytes(catalog.manifest_record(txn, self.env, digest)[: fmt.GUARD_BYTES])
        manifest = self._manifests.get(key)
        if manifest is None:
            manifest = Manifest(digest, catalog.read_manifest(txn, self.env, digest))
            self._manifests[key] = manifest
        return manifest

    def close_manifest(self, manifest: Manifest) -> None:
        """End the lease of `open_manifest`."""
        self.leases.release(image_byte(manifest.digest))

    def import_path(
        self,
        path: Path,
        name: str | None,
        on_progress: Callable[[int, int], None],
        *,
        reread: bool = False,
    ) -> tuple[str, Imported]:
        """Import a file, block device, directory or tar archive; return its name and the result.

        `name` defaults to the source's name without its suffixes. `on_progress` gets (bytes done
        since the last call, bytes in all). With `reread` also a file is read that looks unchanged
        since it was imported.
        """
        name = name or catalog.default_name(path)
        imported = None if reread else origins.import_unchanged(self.env, path, name)
        return name, imported or self._importer().import_path(path, name, on_progress)

    def import_stream(
        self, stream: BinaryIO, name: str, on_progress: Callable[[int, int], None]
    ) -> Imported:
        """Import a stream, of whatever a file could hold, by way of an unnamed temporary file."""
        return self._importer().import_stream(stream, name, on_progress)

    def _importer(self) -> Importer:
        # Only now: a server, which never imports, does without 2 MB and 20 ms.
        from dedupstore.imports import Importer  # noqa: PLC0415

        return Importer(self.env, self.leases, self.path / TEMPORARY_DIRECTORY)

    # --- the store as a whole ---

    def collect_garbage(
        self, *, dry_run: bool = False, on_progress: Callable[[int, int], None] | None = None
    ) -> gc.Collected:
        """Reclaim what no name, open image or running import needs. See gc.Collector.

        Walks every page first: damage could hide what is needed. Raises StoreDamagedError.
        """
        from dedupstore import gc  # noqa: PLC0415 - 5 ms, for gc only

        self.env.verify(skip=frozenset())
        return gc.Collector(self.env, self.path).run(dry_run=dry_run, on_progress=on_progress)

    def compact(
        self, *, on_progress: Callable[[int, int], None] | None = None
    ) -> compaction.Compacted:
        """Give the disk space of free pages back to the file system. See compaction.compact.

        Walks every page first, as gc does. Raises StoreDamagedError, and StoreAccessError where the
        file system cannot do this.
        """
        from dedupstore import compaction  # noqa: PLC0415 - for gc only

        self.env.verify(skip=frozenset())
        return compaction.compact(self.env, on_progress or (lambda _done, _all: None))

    # --- images that are elsewhere ---

    def pull(
        self,
        remote: str,
        source: str,
        name: str,
        on_progress: Callable[[int, int], None],
        *,
        lazy: bool,
        replace: bool = False,
        prefetch: int | None = None,
        trace: Trace | None = None,
        begin: bool = False,
    ) -> Pulled:
        """Have image `source` of a remote here, as `name`. See remote.pulling.Puller. `prefetch`:
        servers that open it then fetch what is elsewhere, fmt.PREFETCH_*, by a `trace` for
        PREFETCH_TRACE; None: as before, at first by the trace that the image was pushed with, if it
        has one and none is given here. With `begin` what the trace has begins to come now, and goes
        on until the store is closed."""
        from dedupstore.remote.configuration import find_remote  # noqa: PLC0415 - for remotes only

        found, _ = find_remote(self.env, remote)
        if self._fetcher is not None:
            found = self._fetcher.share(found)
        asked = found.ask_root(source)  # takes longer than the rest of the import
        from dedupstore.remote.pulling import Puller  # noqa: PLC0415

        puller = Puller(self.env, self.leases, self.fetcher().share(found), self.fetcher())

        def also(txn: lmdb.Transaction, digest: bytes, carried: Trace | None) -> None:
            if prefetch is not None:
                wishes.put_wish(txn, self.env, digest, fmt.Wish(prefetch), trace)
            elif lazy and trace is None and carried is not None:
                wishes.add_wish(txn, self.env, digest, fmt.Wish(fmt.PREFETCH_TRACE), carried)

        return puller.pull(
            asked,
            name,
            on_progress,
            lazy=lazy,
            replace=replace,
            begin=begin,
            trace=trace,
            also=also,
        )

    def require_remote(self, name: str) -> None:
        """Raise RemoteError unless the store knows a remote of this name."""
        from dedupstore.remote.configuration import find_remote  # noqa: PLC0415 - for remotes only

        find_remote(self.env, name)

    def prepare_pull(self, remote: str) -> None:
        """Load what the first pull would, so that nobody waits for that. Raises RemoteError."""
        from dedupstore.remote import pulling  # noqa: F401, PLC0415
        from dedupstore.remote.configuration import find_remote  # noqa: PLC0415

        self.fetcher().share(find_remote(self.env, remote)[0]).objects.prepare_reading()

    def pusher(self, remote: str) -> Pusher:
        """What pushes images to a remote. See remote.pushing.Pusher."""
        from dedupstore.remote.pushing import Pusher  # noqa: PLC0415 - for remotes only

        return Pusher(self.env, self.path, self.leases, self.fetcher, remote)

    def remote_images(self, remote: str) -> dict[str, str]:
        """The images in a remote: digests, in hexadecimal, by name. Raises RemoteError."""
        from dedupstore.remote.configuration import find_remote  # noqa: PLC0415

        found, _ = find_remote(self.env, remote)
        return {root.name: root.digest.hex() for root in found.roots()}

    def evict(self, limit: int, on_progress: Callable[[int, int], None]) -> Evicted:
        """Drop what remotes have until the store's file takes `limit` bytes. See
        remote.evicting.Evictor. Walks every page first, as gc does."""
        from dedupstore.remote.evicting import Evictor  # noqa: PLC0415 - for remotes only

        self.env.verify(skip=frozenset())
        return Evictor(self.env).run(limit, on_progress)

    def replay(self, name: str, trace: Trace | None) -> Replay:
        """What of a trace, or of all of it, an image has here and elsewhere. Raises
        ImageNotFoundError."""
        from dedupstore.remote.replaying import replay, survey  # noqa: PLC0415 - as above

        with self.env.read() as txn:
            image = catalog.find_image(txn, self.env, name)
            manifest = catalog.read_manifest(txn, self.env, image.digest)
        return survey(self.env, manifest) if trace is None else replay(self.env, manifest, trace)

    def prefetch(
        self, name: str, trace: Trace | None, on_progress: Callable[[int, int], None]
    ) -> Prefetched:
        """Fetch what is elsewhere of an image: all of it, or what a trace has, in its order. What
        came by then stays when this is interrupted. Raises ImageNotFoundError, RemoteError."""
        from dedupstore.remote.grouping import BULK, REPLAY  # noqa: PLC0415 - as above
        from dedupstore.remote.pulling import distant_bytes  # noqa: PLC0415

        manifest = self.open_manifest(name)  # leased meanwhile
        fetched = 0
        try:
            wanted = self.replay(name, trace)
            if wanted.missing_frames:
                counters = self.fetcher().counters
                before = counters.bytes
                pace = BULK if trace is None else REPLAY
                total = sum(distant_bytes(self.env, wanted.missing_frames).values())
                self.fetcher().fetch_all(
                    wanted.missing_frames, lambda done: on_progress(done, total), pace
                )
                fetched = counters.bytes - before
            left = self.replay(name, trace).missing_bytes
        finally:
            self.close_manifest(manifest)
        return Prefetched(name, wanted.bytes, wanted.missing_bytes, fetched, left)

    def fetch_metadata(self, name: str) -> bool:
        """Fetch what is elsewhere of an image's EROFS metadata; False: it is no EROFS. See
        remote.metadata."""
        from dedupstore.remote.metadata import fetch_metadata  # noqa: PLC0415 - as above

        manifest = self.open_manifest(name)
        try:
            return fetch_metadata(self.fetcher(), manifest, self.loader().load)
        finally:
            self.close_manifest(manifest)

    def pause(self, name: str, *, paused: bool) -> bool:
        """Pause what a `pull` has asked for, or go on with it; False: nothing is asked for. Raises
        ImageNotFoundError."""
        with self.env.write() as txn:
            image = catalog.find_image(txn, self.env, name).digest
            return wishes.set_paused(txn, self.env, image, paused=paused)

    def has_wish(self, image: bytes) -> bool:
        """Whether there is something on record for servers to fetch of an image."""
        with self.env.read() as txn:
            return wishes.find_wish(txn, self.env, image) is not None

    def laziness(self, name: str) -> Laziness | None:
        """What of an image is elsewhere, and what is asked for; None: all is here, and nothing.
        Raises ImageNotFoundError."""
        with self.env.read() as txn:
            image = catalog.find_image(txn, self.env, name).digest
            wish = wishes.find_wish(txn, self.env, image)
        if wish is None and self.env.remote is None:
            return None
        whole = self.replay(name, None)
        if wish is None and not whole.missing_bytes:
            return None
        wish = wish or fmt.Wish(fmt.PREFETCH_NONE)
        trace = None
        if wish.prefetch == fmt.PREFETCH_TRACE:
            trace = wishes.find_trace(self.env, image)
        wanted = whole if trace is None else self.replay(name, trace)
        return Laziness(
            missing_bytes=whole.missing_bytes,
            prefetch=fmt.PREFETCH_NAMES[wish.prefetch],
            paused=wish.paused,
            wanted_bytes=wanted.bytes,
            wanted_missing_bytes=wanted.missing_bytes,
            done=round(1 - wanted.missing_bytes / wanted.bytes, 4) if wanted.bytes else 1.0,
        )

    def missing_bytes(self, name: str) -> int:
        """Bytes of an image's chunks that are elsewhere. Raises ImageNotFoundError."""
        if self.env.remote is None:
            return 0
        from dedupstore.remote.pulling import missing_frames  # noqa: PLC0415 - for remotes only

        with self.env.read() as txn:
            image = catalog.find_image(txn, self.env, name)
            manifest = catalog.read_manifest(txn, self.env, image.digest)
        return sum(missing_frames(self.env, manifest).values())

    def stats(self) -> StoreStats:
        """Sums over the store."""
        with self.env.read() as txn:
            totals = read_totals(txn, self.env)
            sizes = [image.size for _, image in catalog.list_images(txn, self.env)]
            distant = count_distant(txn, self.env)
        logical = sum(sizes)
        return StoreStats(
            images=len(sizes),
            logical_bytes=logical,
            unique_bytes=totals.unique_bytes,
            stored_bytes=totals.stored_bytes,
            file_bytes=self.env.file_bytes(),
            file_length=self.env.file_length(),
            chunks=totals.chunks,
            frames=totals.frames,
            distant_frames=distant.frames,
            distant_chunks=distant.chunks,
            distant_bytes=distant.bytes,
            dedup_ratio=round(logical / totals.unique_bytes, 4) if totals.unique_bytes else 1.0,
            compression_ratio=(
                round(totals.unique_bytes / totals.stored_bytes, 4) if totals.stored_bytes else 1.0
            ),
        )

    def diff(self, a: str, b: str) -> Difference:
        """What two images share and do not share."""
        with self.env.read() as txn:
            images = [catalog.find_image(txn, self.env, name) for name in (a, b)]
            chunks = []
            for image in images:
                manifest = catalog.read_manifest(txn, self.env, image.digest)
                chunks.append(set(_chunk_refs(manifest)))
            shared, only_a, only_b = (
                chunks[0] & chunks[1],
                chunks[0] - chunks[1],
                chunks[1] - chunks[0],
            )
            return Difference(
                a,
                b,
                images[0].size,
                images[1].size,
                identical=images[0].digest == images[1].digest,
                shared_bytes=self._length_of(txn, shared),
                only_a_bytes=self._length_of(txn, only_a),
                only_b_bytes=self._length_of(txn, only_b),
                shared_chunks=len(shared),
                only_a_chunks=len(only_a),
                only_b_chunks=len(only_b),
            )

    def _length_of(self, txn: lmdb.Transaction, refs: set[int]) -> int:
        """Bytes of the chunks in `refs`, from their frames' headers."""
        total = 0
        header_of, header = 0, None
        for ref in sorted(refs):
            frame = ref >> fmt.REF_SLOT_BITS
            if frame != header_of:
                head = read_head(txn, self.env, frame)
                header_of = frame
                header = None if head is None else fmt.decode_frame_header(head[0], frame)
            slot = ref & fmt.REF_SLOT_MASK
            if header is None or slot >= len(header.slots):
                raise StoreDamagedError(f"chunk {frame}.{slot} is missing (run 'dedupstore check')")
            total += header.slots[slot].length
        return total


def _chunk_refs(manifest: fmt.ManifestRecord) -> Iterator[int]:
    for ref, count in zip(manifest.refs, manifest.counts, strict=True):
        yield from range(ref, ref + count)


def _info(name: str, image: fmt.ImageRecord, manifest: fmt.ManifestRecord) -> ImageInfo:
    return ImageInfo(
        name,
        image.size,
        image.digest.hex(),
        fmt.KIND_NAMES.get(image.kind, "unknown"),
        image.created_ns / 1e9,
        manifest.chunks,
        manifest.unique_bytes,
        manifest.zero_bytes,
    )
