"""Bringing images here: manifest and slot tables at once, contents now or when they are read.

Owns how a remote's manifest becomes one of this store. Chunks that are here, or are known to be
elsewhere already, are used as they are; frames that have others get a number, with their bytes left
in the remote. Nothing of an image is published before its digest is computed from what was pulled.
Runs on the calling thread; any number may run at once.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import lmdb

from dedupstore import catalog, format as fmt, quarantine
from dedupstore.env import Environment
from dedupstore.errors import ImageExistsError, RemoteDamagedError, StoreDamagedError
from dedupstore.frames import FrameWriter, find_chunk, read_head
from dedupstore.leases import Leases, image_byte
from dedupstore.outline import is_whole
from dedupstore.places import Place, PlaceRecord, find_distant, this_hour
from dedupstore.remote.fetching import Fetcher
from dedupstore.remote.layout import Root
from dedupstore.remote.manifests import RemoteManifest, frames_of, image_digest
from dedupstore.remote.packs import PackIndex
from dedupstore.remote.remote import Remote

Progress = Callable[[int, int], None]
"""Gets (bytes done since the last call, bytes in all)."""

Also = Callable[[lmdb.Transaction, bytes], None]
"""(transaction, image digest): writes what belongs to the image, where its name is written."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull did. Bytes: the image's size, what its distinct chunks take, and what was fetched
    of contents; `missing_bytes` are those of its chunks that are still elsewhere."""

    name: str
    digest: bytes
    size: int
    unique_bytes: int
    fetched_bytes: int
    missing_bytes: int


class Puller:
    """Pulls from one remote into one store."""

    def __init__(self, env: Environment, leases: Leases, remote: Remote, fetcher: Fetcher) -> None:
        self._env = env
        self._leases = leases
        self._remote = remote
        self._fetcher = fetcher

    def pull(
        self,
        source: str,
        name: str,
        on_progress: Progress,
        *,
        lazy: bool,
        replace: bool = False,
        also: Also = lambda _txn, _digest: None,
    ) -> Pulled:
        """Have the remote's image `source` here as `name`; unless `lazy`, with all its contents.
        `also` is committed with the name.

        Raises RemoteError, ImageExistsError for a name that stands for something else, unless it is
        to be replaced; and as the store. What was fetched by then is used by the next pull.
        """
        self._env.open_remote()
        root = self._remote.root(source)
        self._require_free(name, root.digest, replace=replace)
        before = self._fetcher.counters.bytes
        with self._leased(root.digest):
            manifest = self._known_manifest(root.digest)
            numbered: dict[int, int] = {}
            if manifest is None:
                manifest, numbered = self._adopt(root)
            missing = missing_frames(self._env, manifest, numbered)
            if not lazy and missing:
                self._bring(missing, on_progress)
                missing = missing_frames(self._env, manifest)
            self._publish(name, root, also, replace=replace)
        fetched = self._fetcher.counters.bytes - before
        left = sum(missing.values())
        return Pulled(name, root.digest, root.size, manifest.unique_bytes, fetched, left)

    def _bring(self, missing: Mapping[int, int], on_progress: Progress) -> None:
        """Fetch frames. Raises what keeps them from being stored, as soon as that is known."""
        total = sum(missing.values())

        keeper = self._fetcher.keeper
        before = keeper.unstored

        def on_brought(done: int) -> None:
            if keeper.unstored > before and keeper.failure is not None:
                raise keeper.failure
            on_progress(done, total)

        self._fetcher.fetch_all(missing, on_brought)
        on_brought(0)

    @contextmanager
    def _leased(self, digest: bytes) -> Iterator[None]:
        """Nothing of the image is reclaimed within, although it may have no name."""
        self._leases.take(image_byte(digest))
        try:
            yield
        finally:
            self._leases.release(image_byte(digest))

    def _require_free(self, name: str, digest: bytes, *, replace: bool) -> None:
        """Raise ImageExistsError, before anything is transferred, if `name` is taken."""
        key = catalog.encode_name(name)
        with self._env.read() as txn:
            record = txn.get(key, db=self._env.images)
            taken = record is not None and fmt.decode_image(record, key).digest != digest
        if taken and not replace:
            raise ImageExistsError(name)

    def _known_manifest(self, digest: bytes) -> fmt.ManifestRecord | None:
        """The manifest of an image that is here, and all of whose chunks are to be had."""
        with self._env.read() as txn:
            if txn.get(digest, db=self._env.manifests) is None:
                return None
            try:
                manifest = catalog.read_manifest(txn, self._env, digest)
                # What has been lost here is in the remote.
                whole = is_whole(txn, self._env, manifest, digest)
            except StoreDamagedError:
                return None
            return manifest if whole else None

    def _adopt(self, root: Root) -> tuple[fmt.ManifestRecord, dict[int, int]]:
        """Store the manifest of an image and the frames that are not known here; return it, and
        these frames' numbers and bytes."""
        remote_manifest = self._remote.manifest(root)
        indexes = self._remote.indexes(remote_manifest)
        tables = _tables(remote_manifest, indexes)
        _verify(root, remote_manifest, tables)
        with self._env.write() as txn:
            adoption = _Adoption(txn, self._env, self._remote.number, remote_manifest, tables)
            manifest = adoption.run()
            txn.put(root.digest, fmt.encode_manifest(manifest, root.digest), db=self._env.manifests)
        quarantine.redirect_all(self._env)
        return manifest, adoption.numbered

    def _publish(self, name: str, root: Root, also: Also, *, replace: bool) -> None:
        key = catalog.encode_name(name)
        with self._env.write() as txn:
            also(txn, root.digest)
            record = txn.get(key, db=self._env.images)
            if record is not None:
                if fmt.decode_image(record, key).digest == root.digest:
                    return
                if not replace:
                    raise ImageExistsError(name)
                txn.delete(key, db=self._env.images)
            image = fmt.ImageRecord(root.digest, root.size, time.time_ns(), root.kind)
            catalog.add_image(txn, self._env, name, image)


def missing_frames(
    env: Environment, manifest: fmt.ManifestRecord, known: Mapping[int, int] = MappingProxyType({})
) -> dict[int, int]:
    """The frames of an image whose bytes are elsewhere, in the order in which it needs them, and
    the bytes of their chunks; those in `known` have just been put there and need no look. Raises
    ChunkDamagedError."""
    frames = dict.fromkeys(ref >> fmt.REF_SLOT_BITS for ref in manifest.refs if ref)
    found = {**known, **distant_bytes(env, (frame for frame in frames if frame not in known))}
    return {frame: found[frame] for frame in frames if frame in found}


def distant_bytes(env: Environment, frames: Iterable[int]) -> dict[int, int]:
    """Those of the frames whose bytes are elsewhere, in their order, and the bytes of their chunks.
    Raises ChunkDamagedError."""
    found: dict[int, int] = {}
    with env.read() as txn:
        for frame in frames:
            head = read_head(txn, env, frame)
            if head is not None and fmt.is_distant(head[0]):
                slots = fmt.decode_frame_header(head[0], frame).slots
                found[frame] = sum(slot.length for slot in slots)
    return found


@dataclass(frozen=True, slots=True)
class _Table:
    """A frame of a remote manifest: its place, and its slots."""

    pack: bytes
    offset: int
    length: int
    slots: tuple[fmt.Slot, ...]


def _tables(manifest: RemoteManifest, indexes: Mapping[bytes, PackIndex]) -> list[_Table]:
    """The frames that a manifest lists. Raises RemoteDamagedError."""
    return [
        _Table(pack, frame.offset, frame.length, frame.header.slots)
        for pack, frame in frames_of(manifest, indexes)
    ]


def _verify(root: Root, manifest: RemoteManifest, tables: Sequence[_Table]) -> None:
    """Raise RemoteDamagedError unless the manifest is that of the image."""
    digest = image_digest(manifest, [table.slots for table in tables])
    if manifest.size != root.size or digest != root.digest:
        raise RemoteDamagedError(
            f"image {root.name!r}: its manifest does not have the image's digest"
        )


class _Adoption:
    """A remote's manifest turned into one of this store, inside one write transaction."""

    def __init__(
        self,
        txn: lmdb.Transaction,
        env: Environment,
        remote: int,
        manifest: RemoteManifest,
        tables: Sequence[_Table],
    ) -> None:
        self._txn = txn
        self._env = env
        self._remote = remote
        self._manifest = manifest
        self._tables = tables
        self._databases = env.ensure_remote(txn)
        self.numbered: dict[int, int] = {}
        """The new frames by number, and the bytes of their chunks."""

    def run(self) -> fmt.ManifestRecord:
        """Store the frames that have something new; return the manifest, not stored."""
        writer = FrameWriter(self._txn, self._env)
        needed = self._needed()
        refs = [
            self._place(writer, table, needed[number]) for number, table in enumerate(self._tables)
        ]
        writer.close()
        source = self._manifest
        lengths, places, counts = array("Q"), array("Q"), array("I")
        for length, ref, count in zip(source.lengths, source.refs, source.counts, strict=True):
            if ref == fmt.REF_HOLE:
                _append(lengths, places, counts, length, 0, 0)
                continue
            number, first = (ref >> fmt.REF_SLOT_BITS) - 1, ref & fmt.REF_SLOT_MASK
            slots = self._tables[number].slots
            for slot in range(first, first + count):
                _append(lengths, places, counts, slots[slot].length, refs[number][slot], 1)
        return fmt.ManifestRecord(
            source.size,
            source.chunks,
            source.unique_bytes,
            source.zero_bytes,
            lengths,
            places,
            counts,
        )

    def _needed(self) -> list[int]:
        """A bit mask for each frame: the slots that the image needs."""
        needed = [0] * len(self._tables)
        for ref, count in zip(self._manifest.refs, self._manifest.counts, strict=True):
            if ref:
                mask = ((1 << count) - 1) << (ref & fmt.REF_SLOT_MASK)
                needed[(ref >> fmt.REF_SLOT_BITS) - 1] |= mask
        return needed

    def _place(self, writer: FrameWriter, table: _Table, needed: int) -> list[int]:
        """References of a frame's chunks here. If the image needs one that is not known, the frame
        gets a number, for all that are not: what comes with it is then not fetched again."""
        found = [self._find(slot.digest) for slot in table.slots]
        if not any(needed >> at & 1 and not ref for at, ref in enumerate(found)):
            return [ref or 0 for ref in found]
        slots = [
            fmt.DROPPED if ref else fmt.Slot(slot.digest, slot.length, fmt.SLOT_DISTANT)
            for slot, ref in zip(table.slots, found, strict=True)
        ]
        place = Place(self._remote, table.pack, table.offset, table.length)
        where = PlaceRecord((place,), this_hour())
        frame = writer.store_distant(slots, where)
        self.numbered[frame] = sum(slot.length for slot in slots)
        return [ref or fmt.make_ref(frame, at) for at, ref in enumerate(found)]

    def _find(self, digest: bytes) -> int | None:
        here = find_chunk(self._txn, self._env, digest)
        return here or find_distant(self._txn, self._databases, digest)


def _append(
    lengths: array[int], refs: array[int], counts: array[int], length: int, ref: int, count: int
) -> None:
    """Append a run, to the last one if it goes on there."""
    follows = counts and (counts[-1] and count and refs[-1] + counts[-1] == ref)
    if follows or (counts and not counts[-1] and not count):
        lengths[-1] += length
        counts[-1] += count
    else:
        lengths.append(length)
        refs.append(ref)
        counts.append(count)
