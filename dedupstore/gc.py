"""Garbage collection: reclaims what no name, no open export and no running import needs.

Mark and sweep over packed references. Marking reads a snapshot and blocks nobody. Sweeping runs in
write transactions of bounded length; each of them first marks whatever became a root since (all
roots are committed in write transactions or held as leases, so none can be missed), then deletes.
When nobody else has committed since the one before, there is nothing to look for.
Returns typed results, prints nothing. One gc at a time is useful; several at once are safe.

Partly needed frames are rewritten without their dead chunks; the others keep their slots, so no
reference ever changes. docs/concurrency.md, "gc", has the interleavings.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import lmdb

from dedupstore import catalog, format as fmt, origins, quarantine, wishes
from dedupstore.constants import FRAME_BYTES_MAX, GC_DELETE_FRAMES, GC_REWRITE_BYTES
from dedupstore.env import Environment
from dedupstore.errors import StoreAccessError
from dedupstore.frames import Codecs, FrameWriter, read_head
from dedupstore.leases import Reclaim, image_byte, session_byte


@dataclass(frozen=True, slots=True)
class Collected:
    """What a gc reclaimed, or with `dry_run` would reclaim. `bytes` are stored bytes, which the
    next writes use again; a dry run estimates them for partly needed frames."""

    manifests: int
    drafts: int
    chunks: int
    frames_removed: int
    frames_rewritten: int
    bytes: int
    dry_run: bool


class _Marks:
    """Which chunks are needed: frame number -> bit mask of slots."""

    def __init__(self) -> None:
        self.live: defaultdict[int, int] = defaultdict(int)
        # With their records' guards: a manifest may be stored anew, leading elsewhere.
        self.manifests: set[tuple[bytes, bytes]] = set()
        self.drafts: set[bytes] = set()

    def add_refs(self, refs: Iterable[int]) -> None:
        live = self.live
        for ref in refs:
            live[ref >> fmt.REF_SLOT_BITS] |= 1 << (ref & fmt.REF_SLOT_MASK)

    def add_manifest(self, manifest: fmt.ManifestRecord) -> None:
        live = self.live
        for ref, count in zip(manifest.refs, manifest.counts, strict=True):
            if ref:
                live[ref >> fmt.REF_SLOT_BITS] |= ((1 << count) - 1) << (ref & fmt.REF_SLOT_MASK)


@dataclass(frozen=True, slots=True)
class _Unneeded:
    """Keys of what nobody needs, in databases `manifests`, `drafts` and `meta`; references of lost
    chunks that nothing leads to."""

    manifests: list[bytes]
    drafts: list[bytes]
    views: list[bytes]
    lost: list[int]


class Collector:
    """One garbage collection of one store. Not thread-safe."""

    def __init__(self, env: Environment, store: Path) -> None:
        self._env = env
        self._store = store
        self._marks = _Marks()
        self._codecs = Codecs()
        self._committed = -1  # our last write transaction
        # Frames with lost chunks: nothing in the index leads there, and they may be damaged.
        self._quarantined: set[int] = set()
        self._manifests = self._drafts = self._chunks = 0
        self._removed = self._rewritten = self._bytes = 0

    def run(
        self, *, dry_run: bool = False, on_progress: Callable[[int, int], None] | None = None
    ) -> Collected:
        """Collect. `on_progress` gets (frames done, frames to do)."""
        with self._env.read() as txn, Reclaim(self._store) as reclaim:
            self._mark_roots(txn, reclaim)
            dead = self._dead_slots(txn)
        if dry_run:
            self._estimate(dead)
        else:
            self._sweep(dead, on_progress or (lambda _done, _all: None))
            self._sweep_files()
        return Collected(
            self._manifests,
            self._drafts,
            self._chunks,
            self._removed,
            self._rewritten,
            self._bytes,
            dry_run,
        )

    # --- mark ---

    def _mark_roots(self, txn: lmdb.Transaction, reclaim: Reclaim) -> _Unneeded:
        """Mark everything that is needed and not marked yet; return what nobody needs. Of that,
        manifests and drafts are claimed: nobody can come to need them while `reclaim` lives.
        """
        env, marks = self._env, self._marks
        named = {image.digest for _, image in catalog.list_images(txn, env)}
        views, view_keys = catalog.split_views(txn, env, named)
        named.update(view.digest for view in views)
        unneeded: list[bytes] = []
        for key, record in txn.cursor(db=env.manifests):
            digest, guard = bytes(key), bytes(record[: fmt.GUARD_BYTES])
            if digest not in named and reclaim.claim(image_byte(digest)):
                unneeded.append(digest)
            elif (digest, guard) not in marks.manifests:
                marks.add_manifest(fmt.decode_manifest(record, digest))
                marks.manifests.add((digest, guard))
        drafts = self._mark_drafts(txn, reclaim)
        return _Unneeded(unneeded, drafts, view_keys, self._unneeded_lost(txn))

    def _unneeded_lost(self, txn: lmdb.Transaction) -> list[int]:
        """Lost chunks that are not marked, once everything that is needed is."""
        refs = [ref for ref, _ in quarantine.list_lost(txn, self._env)]
        self._quarantined.update(ref >> fmt.REF_SLOT_BITS for ref in refs)
        live = self._marks.live.get
        return [
            ref
            for ref in refs
            if not live(ref >> fmt.REF_SLOT_BITS, 0) >> (ref & fmt.REF_SLOT_MASK) & 1
        ]

    def _mark_drafts(self, txn: lmdb.Transaction, reclaim: Reclaim) -> list[bytes]:
        marks = self._marks
        abandoned: list[bytes] = []
        for key, record in txn.cursor(db=self._env.drafts):
            draft = bytes(key)
            if reclaim.claim(session_byte(fmt.draft_session(draft))):
                abandoned.append(draft)
            elif draft not in marks.drafts:
                marks.add_refs(fmt.decode_draft(record))
                marks.drafts.add(draft)
        return abandoned

    def _dead_slots(self, txn: lmdb.Transaction) -> dict[int, int]:
        """Frame number -> bit mask of the slots that the index knows and that are not marked, for
        every frame that has one, or that has no marked slot at all."""
        # The index comes in no order of frames: a mask kept for each would be a cache miss and an
        # allocation per chunk. The marks are looked up, and only what is dead is kept.
        marked = self._marks.live.get
        frames = map(fmt.decode_frame_key, txn.cursor(db=self._env.frames).iternext(values=False))
        dead = {frame: 0 for frame in frames if not marked(frame)}
        for digest, value in txn.cursor(db=self._env.chunks):
            ref = fmt.decode_index(bytes(digest), value)
            frame, slot = ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK
            if not marked(frame, 0) >> slot & 1:
                dead[frame] = dead.get(frame, 0) | 1 << slot
        return dead

    def _estimate(self, dead: dict[int, int]) -> None:
        """Fill the counters for a dry run without changing anything."""
        env = self._env
        with env.read() as txn, Reclaim(self._store) as reclaim:
            unneeded = self._mark_roots(txn, reclaim)
            self._manifests, self._drafts = len(unneeded.manifests), len(unneeded.drafts)
            for frame, mask in dead.items():
                found = read_head(txn, env, frame)
                if found is None:
                    continue
                live = self._marks.live.get(frame, 0)
                self._chunks += (mask & ~live).bit_count()
                if not live:
                    self._removed += 1
                    self._bytes += found[1]
                else:
                    self._rewritten += 1
                    self._bytes += self._dead_share(*found, frame, mask)

    def _dead_share(self, head: fmt.Buffer, record_bytes: int, frame: int, mask: int) -> int:
        """Stored bytes of a frame in proportion to its dead chunks' raw bytes."""
        header = fmt.decode_frame_header(head, frame)
        dead = mask & ~self._marks.live.get(frame, 0)
        lost = sum(slot.length for i, slot in enumerate(header.slots) if dead >> i & 1)
        return record_bytes * lost // max(header.raw_bytes, 1)

    # --- sweep ---

    def _sweep(self, dead: dict[int, int], on_progress: Callable[[int, int], None]) -> None:
        """Delete dead frames first, which needs next to no room on a full disk, then rewrite."""
        live = self._marks.live
        self._sweep_batch([])
        whole = [frame for frame in sorted(dead) if not live.get(frame)]
        partly = [frame for frame in sorted(dead) if live.get(frame)]
        done = 0
        for size, frames in ((GC_DELETE_FRAMES, whole), (_REWRITE_FRAMES, partly)):
            for batch in _batches(frames, size):
                self._sweep_batch(batch)
                done += len(batch)
                on_progress(done, len(dead))

    def _sweep_batch(self, frames: list[int]) -> None:
        """One write transaction. Manifests and drafts that nobody needs go with or before their
        chunks, so that every manifest in the store is complete at every moment."""
        env, live = self._env, self._marks.live
        with Reclaim(self._store) as reclaim, env.write() as txn:
            # Every root then is marked, and a lease can only be taken on one of them: looking at
            # all names again for each few frames would make gc quadratic.
            if txn.id() != self._committed + 1:
                self._delete_roots(txn, self._mark_roots(txn, reclaim))
            self._committed = txn.id()
            writer = FrameWriter(txn, env)
            for frame in frames:
                if frame in self._quarantined and not live.get(frame):
                    self._bytes += writer.replace(frame, None)
                    self._removed += 1
                    continue
                dropped = writer.retain(frame, live.get(frame, 0), self._codecs)
                self._bytes += dropped.bytes
                self._chunks += dropped.chunks
                self._removed += dropped.removed
                self._rewritten += dropped.chunks > 0 and not dropped.removed
            writer.close()

    def _delete_roots(self, txn: lmdb.Transaction, unneeded: _Unneeded) -> None:
        env = self._env
        for database, keys in (
            (env.meta, unneeded.views),
            (env.manifests, unneeded.manifests),
            (env.drafts, unneeded.drafts),
        ):
            for key in keys:
                txn.delete(key, db=database)
        if unneeded.manifests:
            origins.forget(txn, env, set(unneeded.manifests))
            wishes.forget_wishes(txn, env, set(unneeded.manifests))
        quarantine.forget(txn, env, unneeded.lost)
        self._manifests += len(unneeded.manifests)
        self._drafts += len(unneeded.drafts)

    def _sweep_files(self) -> None:
        """Remove the working directories of imports that no longer run. Raises
        StoreAccessError."""
        for path in working_directories(self._store):
            with Reclaim(self._store) as reclaim:
                if reclaim.claim(session_byte(bytes.fromhex(path.name))):
                    shutil.rmtree(path, ignore_errors=True)


_REWRITE_FRAMES = GC_REWRITE_BYTES // FRAME_BYTES_MAX


def working_directories(store: Path) -> Iterator[Path]:
    """The working directories of imports, named by their session's id in hexadecimal. Raises
    StoreAccessError."""
    try:
        found = sorted((store / "tmp").glob("*"))
    except OSError as error:
        raise StoreAccessError(f"{store / 'tmp'}: {error.strerror}") from None
    for path in found:
        if len(path.name) == 32 and all(c in "0123456789abcdef" for c in path.name):
            yield path


def _batches(items: list[int], size: int) -> Iterator[list[int]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
