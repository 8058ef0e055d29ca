"""Bringing images here: manifest and slot tables at once, contents now or when they are read.

Owns the order of a pull: `adopting` makes a manifest of this store, which then gets a name. Nothing
of an image is published before its digest is computed from what was pulled.
Runs on the calling thread; any number may run at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import lmdb

from dedupstore import catalog, format as fmt, quarantine
from dedupstore.env import Environment
from dedupstore.errors import ImageExistsError, StoreDamagedError
from dedupstore.frames import read_head
from dedupstore.leases import Leases, image_byte
from dedupstore.outline import is_whole
from dedupstore.remote.adopting import Adoption, tables_of, verify
from dedupstore.remote.ahead import Ahead
from dedupstore.remote.fetching import Fetcher
from dedupstore.remote.remote import Remote
from dedupstore.remote.roots import Root, unpack_trace
from dedupstore.traces import Trace

Progress = Callable[[int, int], None]
"""Gets (bytes done since the last call, bytes in all)."""

Also = Callable[[lmdb.Transaction, bytes, Trace | None], None]
"""(transaction, image digest, trace that it was pushed with): writes what belongs to the image,
where its name is written."""


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
        asked: Future[Root],
        name: str,
        on_progress: Progress,
        *,
        lazy: bool,
        replace: bool = False,
        begin: bool = False,
        trace: Trace | None = None,
        also: Also = lambda _txn, _digest, _trace: None,
    ) -> Pulled:
        """Have the image that the remote was `asked` for here as `name`; unless `lazy`, with all
        its contents. With `begin` what is needed first begins to come: the first
        block, and what is in a trace, `trace` or the image's own. `also` is committed with the
        name.

        Raises RemoteError, ImageExistsError for a name that stands for something else, unless it is
        to be replaced; and as the store. What was fetched by then is used by the next pull.
        """
        self._env.open_remote()
        root = asked.result()
        carried = None if root.parts is None else unpack_trace(root.parts.trace)
        self._require_free(name, root.digest, replace=replace)
        before = self._fetcher.counters.bytes
        with self._leased(root.digest):
            manifest = self._known_manifest(root.digest)
            numbered: dict[int, int] = {}
            if manifest is None:
                manifest, numbered = self._adopt(root, begin=begin, trace=trace or carried)
            missing = missing_frames(self._env, manifest, numbered)
            if not lazy and missing:
                self._bring(missing, on_progress)
                missing = missing_frames(self._env, manifest)
            self._publish(name, root, carried, also, replace=replace)
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

    def _adopt(
        self, root: Root, *, begin: bool, trace: Trace | None
    ) -> tuple[fmt.ManifestRecord, dict[int, int]]:
        """Store the manifest of an image and the frames that are not known here; return it, and
        these frames' numbers and bytes. With `begin` what is needed first, by a `trace`, begins to
        come."""
        remote_manifest = self._remote.manifest(root)
        indexes = self._remote.indexes(remote_manifest, root.parts)
        tables = tables_of(remote_manifest, indexes)
        ahead: Ahead | None = None
        try:
            with self._env.write() as txn:
                adoption = Adoption(txn, self._env, self._remote.number, remote_manifest, tables)
                adoption.place()
                if begin:
                    wanted = adoption.first(trace)
                    ahead = Ahead(self._fetcher, self._remote, wanted)
                verify(root, remote_manifest, tables)
                manifest = adoption.store()
                record = fmt.encode_manifest(manifest, root.digest)
                txn.put(root.digest, record, db=self._env.manifests)
        except BaseException:
            if ahead is not None:
                ahead.abandon()
            raise
        if ahead is not None:
            ahead.number(adoption.frames)
        quarantine.redirect_all(self._env)
        return manifest, adoption.numbered

    def _publish(
        self, name: str, root: Root, trace: Trace | None, also: Also, *, replace: bool
    ) -> None:
        key = catalog.encode_name(name)
        with self._env.write() as txn:
            also(txn, root.digest, trace)
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
