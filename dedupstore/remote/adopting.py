"""A remote's manifest, turned into one of this store.

Owns which of an image's frames get numbers here: chunks that are here, or are known to be elsewhere
already, are used as they are; frames that have others get a number, with their bytes left in the
remote. An `Adoption` belongs to one write transaction and its thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lmdb

from dedupstore import format as fmt
from dedupstore.env import Environment
from dedupstore.errors import RemoteDamagedError
from dedupstore.frames import FrameWriter, find_chunk
from dedupstore.places import Place, PlaceRecord, find_distant, this_hour
from dedupstore.remote.grouping import Wanted
from dedupstore.remote.manifests import RemoteManifest, frames_of, image_digest
from dedupstore.remote.packs import PackIndex
from dedupstore.remote.roots import Root
from dedupstore.traces import Trace

# What every mount reads first: EROFS' superblock, and where its metadata begins.
_FIRST_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Table:
    """A frame of a remote manifest: its place, and its slots."""

    pack: bytes
    offset: int
    length: int
    slots: tuple[fmt.Slot, ...]


def tables_of(manifest: RemoteManifest, indexes: Mapping[bytes, PackIndex]) -> list[Table]:
    """The frames that a manifest lists. Raises RemoteDamagedError."""
    return [
        Table(pack, frame.offset, frame.length, frame.header.slots)
        for pack, frame in frames_of(manifest, indexes)
    ]


def verify(root: Root, manifest: RemoteManifest, tables: Sequence[Table]) -> None:
    """Raise RemoteDamagedError unless the manifest is that of the image."""
    digest = image_digest(manifest, [table.slots for table in tables])
    if manifest.size != root.size or digest != root.digest:
        raise RemoteDamagedError(
            f"image {root.name!r}: its manifest does not have the image's digest"
        )


@dataclass(frozen=True, slots=True)
class _New:
    """A frame that gets a number here: its place in the manifest's list, its slots, those dropped
    that are known already, and where its bytes are."""

    at: int
    slots: Sequence[fmt.Slot]
    where: PlaceRecord


class Adoption:
    """A remote's manifest turned into one of this store, inside one write transaction."""

    def __init__(
        self,
        txn: lmdb.Transaction,
        env: Environment,
        remote: int,
        manifest: RemoteManifest,
        tables: Sequence[Table],
    ) -> None:
        self._txn = txn
        self._env = env
        self._remote = remote
        self._manifest = manifest
        self._tables = tables
        self._databases = env.ensure_remote(txn)
        # A new host's store knows nothing that could be found.
        self._knows = bool(
            env.entries(txn, env.chunks) or env.entries(txn, self._databases.distant)
        )
        self._writer = FrameWriter(txn, env)
        self._new: list[_New] = []
        self._fresh: dict[bytes, int] = {}  # references of the chunks in those, by digest
        self._refs: list[list[int]] = []  # of the chunks of each frame of the manifest's list
        self.frames: dict[int, int] = {}
        """The numbers of the new frames by place in the manifest's list."""
        self.numbered: dict[int, int] = {}
        """The new frames by number, and the bytes of their chunks."""

    def place(self) -> None:
        """Find out which frames have something new, and give them numbers."""
        needed = self._needed()
        self._refs = [self._place(at, table, needed[at]) for at, table in enumerate(self._tables)]
        numbers = enumerate(self._new, self._writer.frame_next)
        self.frames = {new.at: frame for frame, new in numbers}

    def first(self, trace: Trace | None) -> list[Wanted]:
        """The new frames that are needed first: of the block that every mount reads, and with the
        chunks of a trace, in its order; `Wanted.frame` is the place in the manifest's list."""
        places = dict.fromkeys(self._manifest.frames_at(0, _FIRST_BYTES))
        by_number = {frame: at for at, frame in self.frames.items()}
        for digest in () if trace is None else trace.digests:
            at = by_number.get(self._fresh.get(digest, 0) >> fmt.REF_SLOT_BITS)
            if at is not None:
                places[at] = None
        news = {new.at: new for new in self._new}
        found = (news[at] for at in places if at in news)
        return [Wanted(new.at, tuple(new.slots), new.where.places) for new in found]

    def store(self) -> fmt.ManifestRecord:
        """Store the new frames; return the manifest, not stored."""
        self._writer.store_distant([(new.slots, new.where) for new in self._new])
        self._writer.close()
        for new in self._new:
            self.numbered[self.frames[new.at]] = sum(slot.length for slot in new.slots)
        source = self._manifest
        lengths, places, counts = array("Q"), array("Q"), array("I")
        for length, ref, count in zip(source.lengths, source.refs, source.counts, strict=True):
            if ref == fmt.REF_HOLE:
                _append(lengths, places, counts, length, 0, 0)
                continue
            number, first = (ref >> fmt.REF_SLOT_BITS) - 1, ref & fmt.REF_SLOT_MASK
            here = self._refs[number][first : first + count]
            if here[-1] == here[0] + count - 1 and here == [*range(here[0], here[0] + count)]:
                _append(lengths, places, counts, length, here[0], count)
                continue
            slots = self._tables[number].slots[first : first + count]
            for slot, place in zip(slots, here, strict=True):
                _append(lengths, places, counts, slot.length, place, 1)
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

    def _place(self, at: int, table: Table, needed: int) -> list[int]:
        """References of a frame's chunks here. If the image needs one that is not known, the frame
        gets a number, for all that are not: what comes with it is then not fetched again."""
        digests = [slot.digest for slot in table.slots]
        found = self._find_all(digests)
        if not any(needed >> slot & 1 and not ref for slot, ref in enumerate(found)):
            return found
        slots: Sequence[fmt.Slot] = table.slots
        if any(found):
            slots = [fmt.DROPPED if ref else slot for slot, ref in zip(slots, found, strict=True)]
        base = fmt.make_ref(self._writer.frame_next + len(self._new), 0)
        refs = [ref or base + slot for slot, ref in enumerate(found)]
        self._fresh.update(zip(digests, refs, strict=True))
        place = Place(self._remote, table.pack, table.offset, table.length)
        self._new.append(_New(at, slots, PlaceRecord((place,), this_hour())))
        return refs

    def _find_all(self, digests: Sequence[bytes]) -> list[int]:
        """References of chunks that are known here, 0 for others."""
        if self._knows or not self._fresh.keys().isdisjoint(digests):
            return [self._find(digest) for digest in digests]
        return [0] * len(digests)

    def _find(self, digest: bytes) -> int:
        return (
            self._fresh.get(digest)
            or find_chunk(self._txn, self._env, digest)
            or find_distant(self._txn, self._databases, digest)
            or 0
        )


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
