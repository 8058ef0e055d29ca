"""Sending an image to a remote: what the remote has is not sent (docs/remote-format.md, "Push").

Owns the order of the push's writes: packs, then a look at what was condemned meanwhile, then a
bundle of the packs' indexes, then the root document with the manifest, on a condition. `sending`
makes and writes the packs, `contents` finds what is there. Any number of pushes, in any number of
processes and hosts, may run beside each other and beside gc. One `Push` belongs to one thread.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blake3 import blake3

from dedupstore import catalog, format as fmt, places
from dedupstore.env import Environment
from dedupstore.errors import (
    ChunkDamagedError,
    RemoteConflictError,
    RemoteError,
    StoreDamagedError,
    shown,
)
from dedupstore.frames import Fetches, read_frame
from dedupstore.leases import Leases, image_byte
from dedupstore.remote import manifests, roots
from dedupstore.remote.configuration import find_to_change
from dedupstore.remote.contents import ChunkPlace, Contents
from dedupstore.remote.indexcache import IndexCache
from dedupstore.remote.packs import PackIndex
from dedupstore.remote.remote import Remote, new_salt
from dedupstore.remote.sending import Sender, needed_frames, same_chunks
from dedupstore.traces import Trace, make_trace

# A root document has the indexes of older packs as well where they are no more than this part of
# what was sent, or so many bytes.
_CARRIED_PARTS = 64
_CARRIED_BYTES = 64 << 10
# How often packs may vanish under a push before it gives up: each time a gc with a grace period
# shorter than the push must have run.
_ROUNDS_MAX = 5

OnSent = Callable[[int, bytes, int, int], None]
"""Gets (local frame, pack id, offset, length) of each local frame that the remote has as it is,
with the same chunks in the same slots, once the image is there."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did. `new_bytes` and `new_chunks` are what of the image the remote had not;
    `sent_bytes` all that was written to it, in `packs` packs and a few other objects; 0, if the
    remote had the image under this name."""

    name: str
    digest: str
    size: int
    chunks: int
    new_chunks: int
    new_bytes: int
    sent_bytes: int
    packs: int


class Pusher:
    """Pushes from one store to one remote. Not thread-safe."""

    def __init__(
        self,
        env: Environment,
        store: Path,
        leases: Leases,
        fetcher: Callable[[], Fetches],
        remote: str,
    ) -> None:
        """`remote` by its name. Raises RemoteError: it is not known, cannot be written, is another
        one than it was, or keeps no conditions."""
        self._env = env
        self._leases = leases
        self._load = partial(stored_record, env, fetcher)
        self._remote, uuid = find_to_change(env, remote)
        self._remote.probe()
        self._cache = IndexCache(store, self._remote, uuid)

    def push(
        self,
        name: str,
        on_progress: Callable[[int, int], None],
        *,
        replace: bool,
        trace: Trace | None = None,
    ) -> Pushed:
        """Push an image: see `push_image`. The frames that went as they are have a further place
        from now on, so that they may be dropped here when room is needed."""
        sent: dict[int, places.Place] = {}
        number = self._remote.number
        pushed = push_image(
            self._env,
            self._leases,
            self._remote,
            self._cache,
            name,
            load=self._load,
            replace=replace,
            trace=trace,
            on_progress=on_progress,
            on_sent=lambda frame, *place: sent.update({frame: places.Place(number, *place)}),
        )
        if sent:
            places.add_places(self._env, sent, places.this_hour())
        return pushed

    def delete(self, name: str) -> None:
        """Take a name in the remote away. Raises RemoteNotFoundError, RemoteConflictError."""
        self._remote.delete_root(name)


def push_image(
    env: Environment,
    leases: Leases,
    remote: Remote,
    cache: IndexCache,
    name: str,
    *,
    load: Callable[[int], bytes],
    replace: bool = False,
    trace: Trace | None = None,
    on_progress: Callable[[int, int], None],
    on_sent: OnSent,
) -> Pushed:
    """Push the image `name`; what a `trace` has of what is sent lies together, in its order.

    `load` gives the verified record of a local frame, and may be called by several threads.
    `on_progress` gets (raw bytes sent since the last call, raw bytes to send in all).

    Raises ImageNotFoundError; RemoteConflictError: the remote has another image of that name, and
    not `replace`, or got one meanwhile; RemoteError; what `load` raises.
    """
    image = _lease(env, leases, name)
    try:
        root, version = remote.root_version(name)
        if root is not None and root.digest != image.digest and not replace:
            raise RemoteConflictError(
                f"remote {shown(remote.name)} has another image named {shown(name)} (push with "
                "--replace)"
            )
        push = Push(env, remote, cache, image, load, on_progress, trace)
        if root is not None and push.is_done(root):
            return push.nothing(name)
        root = push.make_root(name, root)
        try:
            remote.put_root(root, version)
        except RemoteConflictError:
            now, _ = remote.root_version(name)
            if now is None or now.digest != image.digest:
                raise RemoteConflictError(
                    f"remote {shown(remote.name)}: somebody else has just pushed or deleted "
                    f"{shown(name)}; nothing was changed (push again)"
                ) from None
        push.tell(on_sent)
        return push.result(name, len(roots.encode_root(root)))
    finally:
        leases.release(image_byte(image.digest))


def stored_record(env: Environment, fetcher: Callable[[], Fetches], frame: int) -> bytes:
    """The verified record of a frame, fetched if its bytes are in a remote. Raises
    ChunkDamagedError, RemoteError."""
    with env.read() as txn:
        record = read_frame(txn, env, frame)
    if record is None:
        raise ChunkDamagedError(frame, "is missing from the store")
    fmt.verify_frame(record, frame)
    return bytes(fetcher().fetch(frame) if fmt.is_distant(record) else record)


def _lease(env: Environment, leases: Leases, name: str) -> fmt.ImageRecord:
    """What a name stands for, leased: gc keeps its chunks meanwhile."""
    while True:
        with env.read() as txn:
            image = catalog.find_image(txn, env, name)
        leases.take(image_byte(image.digest))
        try:
            # A gc may have finished between the look-up and the lease: look again.
            with env.read() as txn:
                if catalog.find_image(txn, env, name).digest == image.digest:
                    return image
        except BaseException:
            leases.release(image_byte(image.digest))
            raise
        leases.release(image_byte(image.digest))


class Push:
    """One push of one image."""

    def __init__(
        self,
        env: Environment,
        remote: Remote,
        cache: IndexCache,
        image: fmt.ImageRecord,
        load: Callable[[int], bytes],
        on_progress: Callable[[int, int], None],
        trace: Trace | None,
    ) -> None:
        self._remote = remote
        self._image = image
        with env.read() as txn:
            self._manifest = catalog.read_manifest(txn, env, image.digest)
            self._frames = needed_frames(txn, env, self._manifest)
        self._contents = Contents(remote, cache)
        self._sender = Sender(remote, load, on_progress)
        chunks = {slot.digest for local in self._frames.values() for slot in local.needed()}
        used = None if trace is None else _restricted(trace, chunks)
        self._first = () if used is None else used.digests
        self._packed_trace = roots.pack_trace(used) if used and used.digests else b""

    def is_done(self, root: roots.Root) -> bool:
        """Whether this root document is what the push would make, time and places aside."""
        if root.digest != self._image.digest or not self._remote.is_whole(root):
            return False
        trace = self._packed_trace
        return not trace or (root.parts is not None and root.parts.trace == trace)

    def _send(self, first: Sequence[bytes]) -> None:
        """Have every chunk in a pack that stays, of those that are sent the `first` first."""
        for attempt in range(_ROUNDS_MAX):
            self._contents.look()
            missing = self._missing()
            if attempt and not missing:
                return
            self._contents.find(missing)
            for index in self._sender.send(self._frames, frozenset(missing), first):
                self._contents.note(index, missing)
        raise RemoteError(
            f"remote {shown(self._remote.name)}: packs vanish while they are written (is a gc with "
            "too short a grace period running?)"
        )

    def _missing(self) -> set[bytes]:
        return {
            slot.digest
            for local in self._frames.values()
            for slot in local.needed()
            if slot.digest not in self._contents.places
        }

    # --- the manifest ---

    def _make_manifest(self, first: Sequence[bytes]) -> manifests.RemoteManifest:
        """The image's runs, with references into packs instead of into the store. Frames are listed
        in the order in which they are needed: those with the `first` chunks before the others."""
        places, listing = self._contents.places, _Listing(self._contents.indexes)
        for digest in first:
            if digest in places:
                listing.number(places[digest])
        lengths, refs, counts = array("Q"), array("Q"), array("I")
        follows = -1
        local = self._manifest
        for run, ref, count in zip(local.lengths, local.refs, local.counts, strict=True):
            if ref == fmt.REF_HOLE:
                lengths.append(run)
                refs.append(fmt.REF_HOLE)
                counts.append(0)
                follows = -1
                continue
            table = self._frames[ref >> fmt.REF_SLOT_BITS].slots
            begin = ref & fmt.REF_SLOT_MASK
            for slot in table[begin : begin + count]:
                place = places[slot.digest]
                at = fmt.make_ref(listing.number(place), place.slot)
                if at == follows:
                    lengths[-1] += slot.length
                    counts[-1] += 1
                else:
                    lengths.append(slot.length)
                    refs.append(at)
                    counts.append(1)
                follows = at + 1
        bundles, pack_refs = self._contents.bundle(listing.packs)
        manifest = manifests.RemoteManifest(
            local.size,
            local.chunks,
            local.unique_bytes,
            local.zero_bytes,
            bundles,
            pack_refs,
            array("I", (listing.packs[pack] for pack, _ in listing.frames)),
            array("I", (number for _, number in listing.frames)),
            lengths,
            refs,
            counts,
        )
        digest = self._image.digest
        if manifests.image_digest(manifest, listing.slots) != digest:
            raise StoreDamagedError(
                f"image {digest.hex()[:16]} does not have its digest (run 'dedupstore check')"
            )
        return manifest

    def make_root(self, name: str, before: roots.Root | None) -> roots.Root:
        """Write all that the image needs but for its root document, which is returned. `before` is
        the one that it replaces."""
        self._send(self._first)
        manifest = self._make_manifest(self._first)
        data = manifests.encode_manifest(manifest, new_salt())
        carried_bytes_max = max(self._sender.sent_bytes // _CARRIED_PARTS, _CARRIED_BYTES)
        if before is not None and before.parts is not None:  # that gets a trace, say
            carried_bytes_max = max(carried_bytes_max, len(before.parts.indexes))
        indexes = self._contents.carried((ref.pack for ref in manifest.packs), carried_bytes_max)
        return roots.Root(
            name,
            self._image.digest,
            self._image.size,
            self._image.kind,
            time.time(),
            blake3(data).digest(),
            len(data),
            roots.Parts(data, self._packed_trace, indexes),
        )

    # --- what it did ---

    def tell(self, on_sent: OnSent) -> None:
        """Say which local frames the remote has as they are."""
        places, indexes = self._contents.places, self._contents.indexes
        for frame, local in self._frames.items():
            first = places[local.slots[0].digest] if local.whole else None
            if first is None:
                continue
            there = indexes[first.pack].frames[first.frame]
            if same_chunks(there.header.slots, local.slots):
                on_sent(frame, first.pack, there.offset, there.length)

    def nothing(self, name: str) -> Pushed:
        """The result when the remote has the image."""
        local = self._manifest
        return Pushed(name, self._image.digest.hex(), local.size, local.chunks, 0, 0, 0, 0)

    def result(self, name: str, root_bytes: int) -> Pushed:
        """The result of a push that sent something."""
        sender, local = self._sender, self._manifest
        return Pushed(
            name,
            self._image.digest.hex(),
            local.size,
            local.chunks,
            sender.chunks,
            sender.raw_bytes,
            sender.sent_bytes + self._contents.sent_bytes + root_bytes,
            sender.packs,
        )


def _restricted(trace: Trace, digests: Collection[bytes]) -> Trace:
    """What a trace has of these chunks."""
    chunks = zip(trace.digests, trace.lengths, strict=True)
    return make_trace(trace.image, (chunk for chunk in chunks if chunk[0] in digests))


class _Listing:
    """The frames and packs of a manifest in the making, by their places in its lists; and the slots
    of each frame. `indexes`: those of the packs."""

    def __init__(self, indexes: Mapping[bytes, PackIndex]) -> None:
        self._indexes = indexes
        self.packs: dict[bytes, int] = {}
        self.frames: dict[tuple[bytes, int], int] = {}
        self.slots: list[tuple[fmt.Slot, ...]] = []

    def number(self, place: ChunkPlace) -> int:
        """The number in references of the frame with this chunk, which is listed if it is not."""
        key = (place.pack, place.frame)
        at = self.frames.get(key)
        if at is None:
            at = self.frames[key] = len(self.frames)
            self.packs.setdefault(place.pack, len(self.packs))
            self.slots.append(self._indexes[place.pack].frames[place.frame].header.slots)
        return 1 + at
