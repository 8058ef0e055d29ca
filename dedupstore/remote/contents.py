"""What a remote has of the chunks that a push needs, and where: packs, indexes and bundles.

Owns the look-up, which reads indexes a few at a time (memory grows with what is looked for, not
with the remote), and the bundles that spare others the same reading. What it knows holds as of the
last `look`. Belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from dedupstore.constants import MIB
from dedupstore.errors import RemoteDamagedError, RemoteNotFoundError
from dedupstore.remote import layout, packs
from dedupstore.remote.indexcache import IndexCache
from dedupstore.remote.manifests import BundleRef, PackRef
from dedupstore.remote.packs import NewBundle, PackIndex
from dedupstore.remote.remote import Remote, in_parallel, new_salt

# Indexes, and bundles, that are read at a time, so that as many are in memory.
_INDEXES_AT_ONCE = 64
_BUNDLES_AT_ONCE = 4
# A bundle is closed before it has more bytes than this.
_BUNDLE_BYTES = 16 * MIB


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Where a chunk is in a remote: pack id, number of the frame in it, slot."""

    pack: bytes
    frame: int
    slot: int


class Contents:
    """Chunks of one remote. `places` has those that were found, by digest; `indexes` the indexes of
    their packs, by id."""

    def __init__(self, remote: Remote, cache: IndexCache) -> None:
        self._remote = remote
        self._cache = cache
        self.places: dict[bytes, ChunkPlace] = {}
        self.indexes: dict[bytes, PackIndex] = {}
        self._packs: dict[bytes, int] = {}
        self._bundles: dict[bytes, int] = {}
        self._bundled: dict[bytes, tuple[BundleRef, int]] = {}  # by pack; and the offset in it
        self._new: set[bytes] = set()  # packs whose indexes are in bundles of this push
        self.sent_bytes = 0

    def look(self) -> None:
        """Learn which packs are there and not condemned, in this order: one that is condemned after
        the first look is deleted a grace period later. Forgets what is in others."""
        condemned = {path for _, paths in self._remote.condemned().values() for path in paths}
        self._packs, self._bundles = (
            {name: one.size for name, one in found.items() if one.path not in condemned}
            for found in (self._remote.packs(), self._remote.bundles())
        )
        self.places = {d: p for d, p in self.places.items() if p.pack in self._packs}
        self._bundled = {
            pack: (ref, offset)
            for pack, (ref, offset) in self._bundled.items()
            if ref.bundle in self._bundles
        }

    def find(self, missing: set[bytes]) -> None:
        """Take from `missing` the digests of chunks that are in packs. Raises RemoteError."""
        self._cache.keep_only(self._packs.keys() | self._bundles.keys())
        if not missing:
            return
        for index in self._all_indexes():
            self.note(index, missing)
            if not missing:
                return

    def note(self, index: PackIndex, missing: set[bytes]) -> None:
        """Take from `missing` what is in a pack."""
        for number, frame in enumerate(index.frames):
            for slot, entry in enumerate(frame.header.slots):
                if entry.digest in missing:
                    missing.discard(entry.digest)
                    self.places[entry.digest] = ChunkPlace(index.pack, number, slot)
                    self.indexes[index.pack] = index

    def _all_indexes(self) -> Iterator[PackIndex]:
        """The indexes of all packs, those first that are in bundles. A bundle only spares requests:
        what it does not give is read from the packs."""
        seen: set[bytes] = set()
        for names in _parts(list(self._bundles), _BUNDLES_AT_ONCE):
            found = in_parallel(self._get_bundle, names)
            for name, (raw, entries) in zip(names, found, strict=True):
                fresh = [entry for entry in entries if entry.pack not in seen]
                for index in self._bundled_indexes(BundleRef(name, len(raw)), raw, fresh):
                    seen.add(index.pack)
                    yield index
        for names in _parts([pack for pack in self._packs if pack not in seen], _INDEXES_AT_ONCE):
            yield from in_parallel(self._get_index, names)

    def _bundled_indexes(
        self, bundle: BundleRef, raw: bytes, entries: Iterable[packs.Bundled]
    ) -> Iterator[PackIndex]:
        """Those of a bundle's indexes that hold for packs as they are."""
        for entry in entries:
            # One of another length than it had has been damaged: its own index tells.
            if self._packs.get(entry.pack) != entry.pack_bytes:
                continue
            with suppress(RemoteDamagedError):
                decoded = packs.decode_bundled(raw, entry)
                self._bundled[entry.pack] = bundle, entry.offset
                yield decoded

    def _get_bundle(self, name: bytes) -> tuple[bytes, tuple[packs.Bundled, ...]]:
        """A bundle's bytes, and what is in it: nothing, if it cannot be read."""
        with suppress(RemoteNotFoundError, RemoteDamagedError):
            return self._cache.get_bundle(name, self._bundles[name])
        return b"", ()

    def _get_index(self, name: bytes) -> PackIndex:
        return self._cache.get(name, self._packs[name])

    def bundle(self, names: Iterable[bytes]) -> tuple[tuple[BundleRef, ...], tuple[PackRef, ...]]:
        """References to these packs, in their order, and to the bundles that have their indexes;
        those that are in none are put into new ones. Raises RemoteError."""
        needed = [self.indexes[name] for name in names]
        for bundle in _bundles([one for one in needed if one.pack not in self._bundled]):
            self._remote.objects.put(layout.bundle_path(bundle.bundle), bundle.data)
            self._cache.put(bundle.bundle, bundle.data)
            self.sent_bytes += len(bundle.data)
            ref = BundleRef(bundle.bundle, len(bundle.data))
            self._new.update(entry.pack for entry in bundle.entries)
            self._bundled.update({entry.pack: (ref, entry.offset) for entry in bundle.entries})
        numbers: dict[BundleRef, int] = {}
        refs = []
        for index in needed:
            bundled, offset = self._bundled[index.pack]
            number = numbers.setdefault(bundled, 1 + len(numbers))
            refs.append(PackRef(index.pack, index.pack_bytes, index.index_bytes, number, offset))
        return tuple(numbers), tuple(refs)

    def carried(self, names: Iterable[bytes], bytes_max: int) -> bytes:
        """A bundle of indexes for a root document that needs these packs: of all of them, or if
        that would be more than `bytes_max`, so that a small change of a large image stays small, of
        those that `bundle` has put into new ones."""
        needed = [self.indexes[name] for name in names]
        if sum(index.index_bytes for index in needed) > bytes_max:
            needed = [index for index in needed if index.pack in self._new]
        if not needed or sum(index.index_bytes for index in needed) > _BUNDLE_BYTES:
            return b""
        return packs.encode_bundle(needed, new_salt()).data


def _parts(names: list[bytes], size: int) -> Iterator[list[bytes]]:
    return (names[at : at + size] for at in range(0, len(names), size))


def _bundles(indexes: list[PackIndex]) -> Iterator[NewBundle]:
    """Indexes, collected to bundles."""
    some: list[PackIndex] = []
    for index in indexes:
        if some and sum(one.index_bytes for one in some) + index.index_bytes > _BUNDLE_BYTES:
            yield packs.encode_bundle(some, new_salt())
            some = []
        some.append(index)
    if some:
        yield packs.encode_bundle(some, new_salt())
