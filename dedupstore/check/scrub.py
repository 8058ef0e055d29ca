"""The scrub of a store's records, each pass trusting only what those before have proved.

Frames first, then the index and the totals against them, then images, manifests and drafts against
all of it. Owns what was found, in words for people and as keys for the repair; mends nothing. Pages
are verified before (`run`). Records are seen in one snapshot. Not thread-safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import lmdb

from dedupstore import catalog, format as fmt, places
from dedupstore.check.findings import Finding, Progress
from dedupstore.check.frames import FrameScrub
from dedupstore.env import Environment, RemoteDatabases
from dedupstore.errors import StoreDamagedError
from dedupstore.frames import count_totals, read_totals
from dedupstore.remote.configuration import list_remotes
from dedupstore.values import has_value


@dataclass(slots=True)
class Wounds:
    """What is damaged, for the repair. Keys, except `hurt`: the digests of manifests that lead to
    damaged or missing chunks, or whose contents are not theirs, and `missing`: digests of images
    without a manifest; and `known`: by reference, what the index knows of chunks that are not in a
    sound frame."""

    index: bool = False
    totals: bool = False
    superblock: bool = False
    meta: list[bytes] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    manifests: list[bytes] = field(default_factory=list)
    drafts: list[bytes] = field(default_factory=list)
    places: list[bytes] = field(default_factory=list)
    hurt: set[bytes] = field(default_factory=set)
    missing: set[bytes] = field(default_factory=set)
    known: dict[int, bytes] = field(default_factory=dict)


class Scrub:
    """One scrub of an open store: what it looked at, and what it found."""

    def __init__(self, env: Environment) -> None:
        self.env = env
        self.frames = FrameScrub(env)
        self.findings: list[Finding] = []
        self.wounds = Wounds()
        self.chunks = self.images = 0
        # Manifests that are views, each with its keys.
        self._views: dict[bytes, list[bytes]] = {}

    def run(self, on_progress: Progress) -> None:
        """Verify everything. Raises StoreVersionError for a store of another release."""
        with self.env.read() as txn:
            self._verify_superblock(txn)
        self.frames.run(on_progress)
        for reason in self.frames.bad_keys.values():
            self._find("frames", reason)
        with self.env.read() as txn:
            self._verify_index(txn)
            self._verify_totals(txn)
            self._verify_places(txn)
            self._verify_meta(txn)
            self._verify_images(txn)
            self._verify_drafts(txn)

    def _find(self, what: str, reason: str, **where: object) -> None:
        self.findings.append(Finding(what, reason, **where))  # type: ignore[arg-type]

    # --- database meta ---

    def _verify_superblock(self, txn: lmdb.Transaction) -> None:
        record = txn.get(fmt.SUPERBLOCK_KEY, db=self.env.meta)
        if record is None:
            raise StoreDamagedError(f"{self.env.path}: not a dedupstore store")
        try:
            superblock = fmt.decode_superblock(record)
            fmt.check_superblock(superblock, str(self.env.path.parent))
            if self.env.remote and not superblock.features_incompat & fmt.FEATURE_INCOMPAT_REMOTE:
                raise StoreDamagedError("superblock does not say that frames may be in remotes")
        except StoreDamagedError as error:
            self.wounds.superblock = True
            self._find("superblock", str(error))

    def _verify_totals(self, txn: lmdb.Transaction) -> None:
        try:
            totals = read_totals(txn, self.env)
        except StoreDamagedError as error:
            self.wounds.totals = True
            self._find("totals", str(error))
            return
        counted = count_totals(txn, self.env, totals.frame_next)
        if counted != totals:
            self.wounds.totals = True
            self._find("totals", f"are {totals} but the frames give {counted}")

    def _verify_meta(self, txn: lmdb.Transaction) -> None:
        """Origins, lost and lazy records, remotes, and that there is nothing else. Views come with
        the images."""
        decoders: dict[str | None, tuple[str, Callable[[fmt.Buffer, bytes], object]]] = {
            "origin": ("origins", fmt.decode_origin),
            "lost": ("lost", fmt.decode_lost),
            "lazy": ("lazy", fmt.decode_wish),
            "remote": ("remotes", fmt.decode_remote),
        }
        for key, record in txn.cursor(db=self.env.meta):
            kind = fmt.meta_kind(key)
            try:
                if kind in decoders:
                    decoders[kind][1](record, bytes(key))
                elif kind is None and not self._has_unknown_features(txn):
                    raise StoreDamagedError(f"record {bytes(key)!r} is of no known kind")
            except StoreDamagedError as error:
                self.wounds.meta.append(bytes(key))
                self._find(decoders[kind][0] if kind else "meta", str(error))

    def _has_unknown_features(self, txn: lmdb.Transaction) -> bool:
        """Whether a newer release may have put records here that this one does not know."""
        if self.wounds.superblock:
            return True
        superblock = fmt.decode_superblock(txn.get(fmt.SUPERBLOCK_KEY, db=self.env.meta) or b"")
        return bool(superblock.features_compat & ~fmt.FEATURES_COMPAT_KNOWN)

    # --- index ---

    def _verify_index(self, txn: lmdb.Transaction) -> None:
        """Every chunk is indexed that is here, or known to be elsewhere; every index entry leads to
        its chunk."""
        env, frames = self.env, self.frames
        for frame in frames.tables:
            for slot, (digest, _, state) in enumerate(frames.slots(frame)):
                self.chunks += state == fmt.SLOT_PRESENT
                if state not in (fmt.SLOT_PRESENT, fmt.SLOT_DISTANT):
                    continue
                database = env.chunks if state == fmt.SLOT_PRESENT else self._remote().distant
                try:
                    known = self._is_indexed(txn, database, digest, state)
                except StoreDamagedError as error:
                    self.wounds.index = True
                    self._find("index", str(error), chunk=f"{frame}.{slot}")
                    continue
                if not known and not self._is_second(txn, frame, digest, state):
                    self.wounds.index = True
                    self._find("index", "does not know a stored chunk", chunk=f"{frame}.{slot}")
        self._verify_no_dangling(txn, env.chunks, fmt.SLOT_PRESENT)
        if env.remote is not None:
            self._verify_no_dangling(txn, env.remote.distant, fmt.SLOT_DISTANT)

    def _remote(self) -> RemoteDatabases:
        assert self.env.remote is not None  # or the frame would be damaged
        return self.env.remote

    def _is_indexed(
        self, txn: lmdb.Transaction, database: lmdb._Database, digest: bytes, state: int
    ) -> bool:
        """Whether the index leads to a chunk. Another sound copy will do: a frame may be filled
        whose chunks an import has stored since, and damage to the index may make one store a chunk
        twice. Raises StoreDamagedError."""
        value = txn.get(digest, db=database)
        return value is not None and self.frames.holds(
            digest, fmt.decode_index(digest, value), state
        )

    def _is_second(self, txn: lmdb.Transaction, frame: int, digest: bytes, state: int) -> bool:
        """Whether a chunk need not be in the index: the other copy, which was, has been reclaimed
        since, or its bytes have come. Or its frame has changed since it was verified."""
        env = self.env
        if state == fmt.SLOT_DISTANT:
            second = has_value(txn, env.chunks, digest)
        else:
            key = fmt.frame_key(frame)
            second = env.remote is not None and has_value(txn, env.remote.places, key)
        return second or not self.frames.is_unchanged(txn, frame)

    def _verify_no_dangling(
        self, txn: lmdb.Transaction, database: lmdb._Database, state: int
    ) -> None:
        for key, value in txn.cursor(db=database):
            digest = bytes(key)
            try:
                ref = fmt.decode_index(digest, value)
            except StoreDamagedError as error:
                self.wounds.index = True
                self._find("index", str(error))
                continue
            frame = ref >> fmt.REF_SLOT_BITS
            if frame in self.frames.damaged:
                self.wounds.known[ref] = digest
            elif frame in self.frames.tables:
                sound = self.frames.holds(digest, ref, state)
                if not sound and self.frames.is_unchanged(txn, frame):
                    chunk = f"{frame}.{ref & fmt.REF_SLOT_MASK}"
                    self.wounds.index = True
                    self._find("index", "leads to a chunk that is not there", chunk=chunk)
            elif not has_value(txn, self.env.frames, fmt.frame_key(frame)):
                self.wounds.known[ref] = digest
                self.wounds.index = True
                self._find("index", "leads to a frame that is not there", chunk=str(frame))

    # --- places ---

    def _verify_places(self, txn: lmdb.Transaction) -> None:
        """Every place record is sound and of a frame that is there, and of each frame that is
        elsewhere a remote is known that has it. What frames lack is found with them."""
        if self.env.remote is None:
            return
        known = {
            record.number
            for _, record in list_remotes(txn, self.env)
            if isinstance(record, fmt.RemoteRecord)
        }
        unknown: Counter[int] = Counter()
        distant = set(self.frames.distant())
        for key, value in txn.cursor(db=self.env.remote.places):
            where = {}
            try:
                frame = fmt.decode_frame_key(key)
                where = {"chunk": str(frame)}
                record = places.decode_places(value, frame)
                if not has_value(txn, self.env.frames, bytes(key)):
                    raise StoreDamagedError("place record of a frame that is not there")
            except StoreDamagedError as error:
                self.wounds.places.append(bytes(key))
                self._find("places", str(error), **where)
                continue
            numbers = {place.remote for place in record.places}
            if frame in distant and not numbers & known:
                unknown[min(numbers)] += 1
        for number, frames in unknown.items():
            self._find(
                "remotes",
                f"{frames} frames are in remote number {number:08x}, which is not known any more "
                "(add it again: 'dedupstore remote add')",
            )

    # --- images, manifests, drafts ---

    def _verify_images(self, txn: lmdb.Transaction) -> None:
        """Every name has its manifest, every manifest its chunks and its digest."""
        names = self._verify_views(txn)
        for key, record in txn.cursor(db=self.env.images):
            self.images += 1
            name = None
            try:
                name = catalog.decode_name(key)
                image = fmt.decode_image(record, bytes(key))
            except StoreDamagedError as error:
                self.wounds.images.append(bytes(key))
                self._find("images", str(error), image=name)
                continue
            names.setdefault(image.digest, []).append(name)
            if txn.get(image.digest, db=self.env.manifests) is None:
                self.wounds.missing.add(image.digest)
                self._find("images", "has no manifest", image=name)
        for key, record in txn.cursor(db=self.env.manifests):
            self._verify_manifest(txn, bytes(key), record, names.get(bytes(key)) or [None])
        self._find_unread_damage(txn)

    def _verify_views(self, txn: lmdb.Transaction) -> dict[bytes, list[str | None]]:
        """Note which manifests are views; return what findings call them."""
        names: dict[bytes, list[str | None]] = {}
        for image, kind, view in catalog.list_views(txn, self.env):
            key = fmt.view_key(image, kind)
            if isinstance(view, fmt.ViewRecord):
                self._views.setdefault(view.digest, []).append(key)
                if view.digest != image:
                    names.setdefault(view.digest, []).append(f"view of {image.hex()[:16]}")
            else:
                self.wounds.meta.append(key)
                self._find("views", str(view))
        return names

    def _verify_manifest(
        self,
        txn: lmdb.Transaction,
        digest: bytes,
        record: fmt.Buffer,
        called: list[str | None],
    ) -> None:
        try:
            manifest = fmt.decode_manifest(record, digest)
        except StoreDamagedError as error:
            self.wounds.manifests.append(digest)
            for image in called:
                self._find("manifests", str(error), image=image)
            return
        hasher = fmt.ImageDigest()
        offset = 0
        sound = True
        columns = zip(manifest.lengths, manifest.refs, manifest.counts, strict=True)
        for length, ref, count in columns:
            reason = self._verify_run(txn, hasher, length, ref, count)
            if reason is not None:
                sound = False
                chunk = f"{ref >> fmt.REF_SLOT_BITS}.{ref & fmt.REF_SLOT_MASK}"
                for image in called:
                    self._find("chunk", reason, image=image, offset=offset, chunk=chunk)
            offset += length
        if sound and hasher.finish() != digest:
            sound = False
            for image in called:
                self._find("manifests", "contents do not have the image's digest", image=image)
        if not sound:
            self.wounds.hurt.add(digest)
            # Views are forgotten rather than mended.
            self.wounds.meta += self._views.get(digest, [])

    def _verify_run(
        self, txn: lmdb.Transaction, hasher: fmt.ImageDigest, length: int, ref: int, count: int
    ) -> str | None:
        """Feed a run's chunks to the image's digest; say what is wrong with it."""
        if ref == fmt.REF_HOLE:
            hasher.add(length, fmt.ZERO_DIGEST)
            return None
        frame, slot = ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK
        if frame in self.frames.damaged:
            return self.frames.damaged[frame]
        if frame not in self.frames.tables:
            # Stored after the frames were listed: verify it now.
            if not self.frames.verify(frame):
                return "is missing from the store"
            return self._verify_run(txn, hasher, length, ref, count)
        slots = list(self.frames.slots(frame))[slot : slot + count]
        if any(state not in (fmt.SLOT_PRESENT, fmt.SLOT_DISTANT) for _, _, state in slots):
            return "its bytes are not in the store"
        if len(slots) != count or sum(size for _, size, _ in slots) != length:
            return "frame and manifest disagree"
        for chunk, size, _ in slots:
            hasher.add(size, chunk)
        return None

    def _find_unread_damage(self, txn: lmdb.Transaction) -> None:
        """Damaged frames that no image reads yet: the next import would rely on their chunks."""
        reported = {finding.chunk.partition(".")[0] for finding in self.findings if finding.chunk}
        for frame, reason in self.frames.damaged.items():
            there = has_value(txn, self.env.frames, fmt.frame_key(frame))
            if there and str(frame) not in reported:
                self._find("frames", reason, chunk=str(frame))

    def _verify_drafts(self, txn: lmdb.Transaction) -> None:
        """Drafts decode; what they refer to is their import's business."""
        for key, record in txn.cursor(db=self.env.drafts):
            try:
                fmt.decode_draft(record)
            except StoreDamagedError as error:
                self.wounds.drafts.append(bytes(key))
                self._find("drafts", str(error))
