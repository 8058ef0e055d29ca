"""An import's write side: batches of frames and reused chunks into commits, and drafts.

Owns provisional references: a frame gets its number when it is committed, so until then the import
refers to it by its position. Batches are committed on a thread of their own while the import goes
on hashing; at most one is under way. One `Staging` serves one import; all but what it commits in
the background belongs to its calling thread.

Crash rules (docs/format.md, "Write order"): every batch commits its frames together with a *draft*,
the list of references that the unfinished manifest relies on. Drafts are roots for gc as long as
the import's session lease is held, and garbage as soon as it is not. The last transaction writes
manifest and name (or view) and removes the drafts, so an image exists completely or not at all.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import lmdb
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.constants import BATCH_BYTES
from dedupstore.env import Environment
from dedupstore.errors import SourceError
from dedupstore.frames import Codecs, FrameWriter, NewFrame, encode_new, find_chunk
from dedupstore.sources import Source

Publish = Callable[[lmdb.Transaction, bytes, fmt.ManifestRecord], None]
"""(transaction, image digest, manifest): makes the finished image a root, by a name or as a view;
runs inside the import's last transaction."""

# Marks a reference to a frame of this import that may have no number yet.
_PROVISIONAL = 1 << 63


def provisional_ref(frame: int, slot: int) -> int:
    """Reference to a chunk of the import's frame number `frame`, counted from 0."""
    return _PROVISIONAL | fmt.make_ref(frame, slot)


@dataclass(frozen=True, slots=True)
class Reused:
    """A stored chunk that this import relies on, and where in the source its bytes are should it
    vanish before the commit."""

    digest: bytes
    ref: int
    offset: int
    length: int


@dataclass(slots=True)
class _Batch:
    frames: list[tuple[int, NewFrame]] = field(default_factory=list)
    reused: list[Reused] = field(default_factory=list)
    bytes: int = 0


class Staging:
    """What an import has to store and has stored. `stored_bytes` are those of frame records."""

    def __init__(self, env: Environment, source: Source, codecs: Codecs, session: bytes) -> None:
        self.stored_bytes = 0
        self._env = env
        self._source = source
        self._codecs = codecs
        self._session = session
        self._batch = _Batch()
        self._drafts = 0
        self._thread = ThreadPoolExecutor(1, "commit")
        self._committing: Future[None] | None = None
        # Written by whoever commits, read once all commits are done: provisional frame -> number,
        # and the references that turned out to be others.
        self._numbers: dict[int, int] = {}
        self._moved: dict[int, int] = {}

    def reuse(self, reused: Reused) -> None:
        """Rely on a stored chunk."""
        self._batch.reused.append(reused)

    def add(self, provisional: int, frame: NewFrame) -> None:
        """Store the import's frame `provisional`; frames may come in any order.

        Raises what an earlier batch's commit raised.
        """
        self._batch.frames.append((provisional, frame))
        self._batch.bytes += len(frame.record)
        if self._batch.bytes >= BATCH_BYTES:
            self._wait()
            batch, self._batch = self._batch, _Batch()
            self._committing = self._thread.submit(self._commit, batch, self._drafts)
            self._drafts += 1

    def _wait(self) -> None:
        if self._committing is not None:
            self._committing.result()
            self._committing = None

    def commit(
        self,
        digest: bytes,
        build: Callable[[Callable[[int], int]], fmt.ManifestRecord],
        publish: Publish,
    ) -> fmt.ManifestRecord:
        """Store the rest, the manifest and what `publish` adds in one transaction; return the
        manifest.

        `build` makes the manifest; it gets the function that turns references into final ones.
        Raises what `publish` raises; nothing is committed then.
        """
        self._wait()
        with self._env.write() as txn:
            self._store(txn, self._batch)
            manifest = build(self._resolve)
            # Replaces the manifest of the same image: its references are the same, unless they
            # lead to chunks that were damaged and have just been stored anew.
            txn.put(digest, fmt.encode_manifest(manifest, digest), db=self._env.manifests)
            publish(txn, digest, manifest)
            for sequence in range(self._drafts):
                txn.delete(fmt.draft_key(self._session, sequence), db=self._env.drafts)
        return manifest

    def close(self) -> None:
        """Wait for a commit that is under way. Idempotent."""
        self._thread.shutdown(cancel_futures=True)

    def _resolve(self, ref: int) -> int:
        moved = self._moved.get(ref)
        if moved is not None:
            return moved
        if not ref & _PROVISIONAL:
            return ref
        frame = (ref & ~_PROVISIONAL) >> fmt.REF_SLOT_BITS
        return fmt.make_ref(self._numbers[frame], ref & fmt.REF_SLOT_MASK)

    # --- inside a write transaction ---

    def _commit(self, batch: _Batch, sequence: int) -> None:
        with self._env.write() as txn:
            refs = array("Q", self._store(txn, batch))
            key = fmt.draft_key(self._session, sequence)
            txn.put(key, fmt.encode_draft(refs), db=self._env.drafts)

    def _store(self, txn: lmdb.Transaction, batch: _Batch) -> list[int]:
        """Store a batch's frames and make sure of its reused chunks; return their references."""
        writer = FrameWriter(txn, self._env)
        refs = [self._confirm(txn, writer, reused) for reused in batch.reused]
        for provisional, frame in batch.frames:
            refs += self._store_frame(txn, writer, provisional, frame)
        writer.close()
        return refs

    def _confirm(self, txn: lmdb.Transaction, writer: FrameWriter, reused: Reused) -> int:
        """The chunk's reference now: a gc may have reclaimed it since a worker looked it up."""
        ref = find_chunk(txn, self._env, reused.digest)
        if ref is None:
            data = self._source.read_at(reused.offset, reused.length)
            if blake3(data).digest() != reused.digest:
                raise SourceError(f"{self._source.name}: changed while it was imported")
            ref = self._store_alone(writer, reused.digest, data)
        if ref != reused.ref:
            self._moved[reused.ref] = ref
        return ref

    def _store_frame(
        self, txn: lmdb.Transaction, writer: FrameWriter, provisional: int, frame: NewFrame
    ) -> list[int]:
        """Store a frame; return its chunks' references.

        Should another import have stored some of its chunks meanwhile, those are used and the
        others go into frames of their own: a chunk is in a store once.
        """
        found = [find_chunk(txn, self._env, slot.digest) for slot in frame.slots]
        if not any(found):
            number = self._write(writer, frame)
            self._numbers[provisional] = number
            return [fmt.make_ref(number, slot) for slot in range(len(found))]
        view = memoryview(frame.record)
        raw = self._codecs.decode(view, 0)
        offsets = fmt.decode_frame_offsets(view, 0)
        refs = []
        for i, (slot, stored) in enumerate(zip(frame.slots, found, strict=True)):
            data = raw[offsets[i] : offsets[i] + slot.length]
            ref = stored or self._store_alone(writer, slot.digest, data)
            self._moved[provisional_ref(provisional, i)] = ref
            refs.append(ref)
        return refs

    def _store_alone(self, writer: FrameWriter, digest: bytes, data: bytes) -> int:
        """Store one chunk in a frame of its own; return its reference."""
        new = encode_new(self._codecs, (fmt.Slot(digest, len(data)),), [data])
        return fmt.make_ref(self._write(writer, new), 0)

    def _write(self, writer: FrameWriter, frame: NewFrame) -> int:
        self.stored_bytes += len(frame.record)
        return writer.store(frame)
