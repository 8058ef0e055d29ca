"""Mending the contents of images: from remotes that have the same frames, from what damaged frames
still hold, and from other sources.

Owns the order, and what one commit contains (docs/format.md, "check --repair"): a chunk that is
stored anew and the manifests that lead to it are committed together, so it is needed from then on.
Images whose manifests are lost are imported again from wherever they are whole. Memory is bounded
by a batch of chunks; what is lost is listed. One repair belongs to one thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import lmdb

from dedupstore import catalog, format as fmt, origins, places, quarantine
from dedupstore.check.frames import judge
from dedupstore.check.records import mend_records
from dedupstore.check.remotes import RemoteFrames
from dedupstore.check.salvage import describe, salvage
from dedupstore.check.scrub import Scrub
from dedupstore.check.sources import Origin, Place
from dedupstore.constants import BATCH_BYTES, FRAME_SLOTS_MAX
from dedupstore.env import Environment
from dedupstore.errors import DedupError, SourceError, StoreDamagedError
from dedupstore.frames import Codecs, FrameBuilder, FrameWriter, encode_new, find_chunk
from dedupstore.ingest import Ingest
from dedupstore.leases import Leases, Reclaim, image_byte
from dedupstore.outline import is_whole
from dedupstore.values import salvage_value

_FRAMES_AT_ONCE = 64


def quarantine_damage(env: Environment, scrub: Scrub) -> None:
    """Put what a scrub found damaged into quarantine, so that imports store it anew; the damaged
    bytes stay where they are. Raises what keeps a store from being written."""
    codecs = Codecs()
    with env.read() as txn:
        known = quarantine.read_lost(txn, env)
        lost = dict(scrub.frames.absent())
        for frame, indexed in _by_frame(scrub.wounds.known).items():
            held = describe(_record(txn, env, frame), frame, indexed)
            lost.update((fmt.make_ref(frame, slot), chunk) for slot, chunk in held.known.items())
    lost = {ref: chunk for ref, chunk in lost.items() if known.get(ref) != chunk}
    if not lost:
        return
    with env.write() as txn:
        # Under the write lock now: frames that a gc has removed or rewritten are no damage.
        frames = {ref >> fmt.REF_SLOT_BITS for ref in lost}
        sound = {frame for frame in frames if _is_sound(txn, env, frame, codecs)}
        absent = set(dict(scrub.frames.absent()))
        lost = {
            ref: chunk
            for ref, chunk in lost.items()
            if ref in absent or ref >> fmt.REF_SLOT_BITS not in sound
        }
        quarantine.note(txn, env, lost)
        origins.forget(txn, env)


def _is_sound(txn: lmdb.Transaction, env: Environment, frame: int, codecs: Codecs) -> bool:
    record = _record(txn, env, frame)
    return record is not None and not isinstance(judge(txn, env, record, frame, codecs), str)


def _record(txn: lmdb.Transaction, env: Environment, frame: int) -> bytes | None:
    """A frame's record, zeros in it where the disk does not give it."""
    return salvage_value(txn, env, env.frames, fmt.frame_key(frame))


def _by_frame(known: dict[int, bytes]) -> dict[int, dict[int, bytes]]:
    """Digests by frame and slot."""
    frames: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
    for ref, digest in known.items():
        frames[ref >> fmt.REF_SLOT_BITS][ref & fmt.REF_SLOT_MASK] = digest
    return frames


class Repair:
    """One repair of one store, after a scrub of it."""

    def __init__(self, env: Environment, store: Path, scrub: Scrub) -> None:
        self._env = env
        self._store = store
        self._scrub = scrub
        self._codecs = Codecs()
        self._remotes = RemoteFrames(env, self._codecs)
        # Digests of the manifests that may lead to lost chunks.
        self._hurt = set(scrub.wounds.hurt)
        # Whether there is nobody to mend from but remotes.
        self._alone = True

    def run(self, sources: Sequence[Origin]) -> None:
        """Mend what can be mended, from the store itself and then from each source in turn.

        Raises StoreVersionError, StoreFullError, and StoreDamagedError for what is beyond repair.
        """
        env, wounds = self._env, self._scrub.wounds
        with env.write() as txn:
            mend_records(txn, env, self._store, self._scrub)
        self._alone = not sources
        self._quarantine()
        quarantine.redirect_all(env)
        for source in sources:
            self._heal(source)
        for source in sources:
            self._find_names(source, wounds.images)
        self._restore_images(sources)
        quarantine.redirect_all(env)
        self._forget_unneeded()

    # --- from the store itself ---

    def _quarantine(self) -> None:
        """Replace damaged frames by tables of absent chunks, storing anew what they still hold."""
        env = self._env
        with env.read() as txn:
            noted = quarantine.read_lost(txn, env)
            lost = dict(self._scrub.frames.absent())
        known = {ref: chunk.digest for ref, chunk in noted.items()} | self._scrub.wounds.known
        indexed = _by_frame(known)
        damaged = self._scrub.frames.damaged
        for ref, digest in self._scrub.wounds.known.items():
            if ref >> fmt.REF_SLOT_BITS not in damaged:
                lost[ref] = fmt.LostChunk(digest, 0)
        with env.write() as txn:
            quarantine.note(txn, env, {r: c for r, c in lost.items() if noted.get(r) != c})
        for batch in _batches(sorted(damaged), _FRAMES_AT_ONCE):
            # Before the write lock is taken: it may take a while.
            fetched = {frame: self._fetched(frame, indexed.get(frame, {})) for frame in batch}
            with env.write() as txn:
                self._quarantine_frames(txn, fetched, indexed)

    def _fetched(self, frame: int, indexed: dict[int, bytes]) -> bytearray | None:
        """The record to put in the place of a damaged frame that a remote has: with its bytes; or,
        if the remote cannot be asked now, nothing is left here, and there is nobody else to ask,
        without."""
        if not self._remotes.places(frame):
            return None
        with self._env.read() as txn:
            record = _record(txn, self._env, frame)
        held = salvage(record or b"", frame, indexed)
        fresh = self._remotes.record(frame, held.known)
        if fresh is not None or held.found or not held.known:
            return fresh
        may_have_it = self._alone and self._remotes.is_unreachable(frame)
        if not may_have_it or not all(chunk.length for chunk in held.known.values()):
            return None
        return fmt.encode_distant_frame(_slots(held.known, fmt.SLOT_DISTANT))

    def _quarantine_frames(
        self,
        txn: lmdb.Transaction,
        fetched: dict[int, bytearray | None],
        indexed: dict[int, dict[int, bytes]],
    ) -> None:
        env = self._env
        writer = FrameWriter(txn, env)
        found: dict[bytes, bytes] = {}
        for frame, fresh in fetched.items():
            # Under the write lock now: a gc may have removed it since it was found damaged.
            record = _record(txn, env, frame)
            if record is None or not isinstance(judge(txn, env, record, frame, self._codecs), str):
                continue
            held = salvage(record, frame, indexed.get(frame, {}))
            lost = {fmt.make_ref(frame, slot): chunk for slot, chunk in held.known.items()}
            if fresh is not None:
                quarantine.note(txn, env, lost)  # out of both indexes
                writer.restore(frame, fresh)
                quarantine.forget(txn, env, lost)
                continue
            found.update((held.known[slot].digest, data) for slot, data in held.found.items())
            slots = _slots(held.known, fmt.SLOT_ABSENT)
            writer.replace(frame, self._codecs.encode(slots, b"") if slots else None)
            places.forget_places(txn, env, frame)
            quarantine.note(txn, env, lost)
        self._store_anew(txn, writer, found)

    def _store_anew(
        self, txn: lmdb.Transaction, writer: FrameWriter, chunks: dict[bytes, bytes]
    ) -> None:
        """Store chunks that are not in the store, and redirect to them what has lost them."""
        builder = FrameBuilder(FRAME_SLOTS_MAX)
        for digest, data in chunks.items():
            if find_chunk(txn, self._env, digest) is not None:
                continue
            if not builder.fits(len(data)):
                writer.store(encode_new(self._codecs, *builder.take()))
            builder.add(digest, data)
        if builder:
            writer.store(encode_new(self._codecs, *builder.take()))
        writer.close()
        lost = quarantine.read_lost(txn, self._env)
        for digest in self._hurt:
            with suppress(StoreDamagedError):
                quarantine.redirect(txn, self._env, digest, lost)

    # --- from other sources ---

    def _heal(self, source: Origin) -> None:
        """Bring back every chunk that an image has lost and the source has."""
        wanted, at = self._wanted()
        if not wanted:
            return
        chunks: dict[bytes, bytes] = {}
        held = 0
        for digest, data in source.chunks(wanted, at):
            chunks[digest] = data
            held += len(data)
            if held >= BATCH_BYTES:
                self._commit(chunks)
                chunks, held = {}, 0
        if chunks:
            self._commit(chunks)

    def _commit(self, chunks: dict[bytes, bytes]) -> None:
        with self._env.write() as txn:
            self._store_anew(txn, FrameWriter(txn, self._env), chunks)

    def _wanted(self) -> tuple[set[bytes], list[Place]]:
        """The digests of the chunks that images have lost, and where they had them."""
        env = self._env
        wanted: set[bytes] = set()
        found: set[Place] = set()
        with env.read() as txn:
            lost = quarantine.read_lost(txn, env)
            for digest in self._hurt:
                with suppress(StoreDamagedError):
                    manifest = catalog.read_manifest(txn, env, digest)
                    for place in _lost_places(manifest, lost):
                        wanted.add(place.digest)
                        if place.length:
                            found.add(place)
        return wanted, list(found)

    def _find_names(self, source: Origin, names: Iterable[bytes]) -> None:
        """Bring back records of names that are damaged."""
        env = self._env
        for name in names:
            with env.write() as txn:
                with suppress(StoreDamagedError):
                    fmt.decode_image(txn.get(name, db=env.images) or b"", name)
                    continue
                image = source.record(name)
                if image is not None:
                    txn.put(name, fmt.encode_image(image, name), db=env.images)

    def _restore_images(self, sources: Sequence[Origin]) -> None:
        """Import again the images that cannot be mended chunk by chunk."""
        for digest in self._unreadable():
            for source in sources:
                if self._restore(source, digest):
                    break

    def _restore(self, source: Origin, digest: bytes) -> bool:
        found = source.image(digest, self._env)
        if found is None:
            return False

        def publish(_: lmdb.Transaction, actual: bytes, __: fmt.ManifestRecord) -> None:
            if actual != digest:
                raise SourceError(f"image {digest.hex()[:16]}: the source is another one")

        leases = Leases(self._store)
        try:
            Ingest(self._env, leases, found[0]).run(found[1], publish, lambda _done: None)
        except SourceError:
            return False
        finally:
            leases.close()
        return True

    def _unreadable(self) -> list[bytes]:
        """Digests of images whose manifest is missing or damaged, or leads to what is not here."""
        env, wounds = self._env, self._scrub.wounds
        candidates = {*wounds.manifests, *wounds.missing, *self._hurt}
        with env.read() as txn:
            for name in wounds.images:
                with suppress(StoreDamagedError):
                    image = fmt.decode_image(txn.get(name, db=env.images) or b"", name)
                    candidates.add(image.digest)
            return [digest for digest in candidates if not _is_readable(txn, env, digest)]

    def _forget_unneeded(self) -> None:
        """Delete unreadable manifests that no name and nobody needs: views' that are forgotten, and
        those that wait for a gc."""
        env = self._env
        unreadable = self._unreadable()
        with env.write() as txn, suppress(StoreDamagedError), Reclaim(self._store) as reclaim:
            named = {image.digest for _, image in catalog.list_images(txn, env)}
            for digest in unreadable:
                if digest not in named and reclaim.claim(image_byte(digest)):
                    txn.delete(digest, db=env.manifests)


def _slots(known: Mapping[int, fmt.LostChunk], state: int) -> list[fmt.Slot]:
    """A frame's table with what is known of its chunks."""
    slots = [fmt.DROPPED] * (max(known, default=-1) + 1)
    for slot, chunk in known.items():
        slots[slot] = fmt.Slot(chunk.digest, chunk.length, state)
    return slots


def _lost_places(manifest: fmt.ManifestRecord, lost: quarantine.Lost) -> Iterator[Place]:
    """Each lost chunk that a manifest leads to, with its place; length 0: place unknown."""
    offset = 0
    for length, ref, count in zip(manifest.lengths, manifest.refs, manifest.counts, strict=True):
        chunks = [lost.get(one) for one in range(ref, ref + count)]
        sizes = [chunk.length if chunk is not None else 0 for chunk in chunks]
        if sizes.count(0) == 1:
            sizes[sizes.index(0)] = max(length - sum(sizes), 0)
        at: int | None = offset
        for chunk, size in zip(chunks, sizes, strict=True):
            if chunk is not None:
                yield Place(at or 0, size if at is not None else 0, chunk.digest)
            at = at + size if at is not None and size else None
        offset += length


def _is_readable(txn: lmdb.Transaction, env: Environment, digest: bytes) -> bool:
    """Whether a manifest is here and leads to present chunks of the image's digest."""
    try:
        return is_whole(txn, env, catalog.read_manifest(txn, env, digest), digest)
    except DedupError:
        return False


def _batches(items: list[int], size: int) -> Iterator[list[int]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
