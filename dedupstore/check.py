"""Scrub: verifies every byte of a store against what it claims to be, and mends what it can.

Passes, each trusting only what those before have proved: LMDB's pages (before LMDB opens the file),
every frame's bytes against its chunks' digests, the index and the totals against the frames, and
images, manifests and drafts against all of them. Returns typed findings, prints nothing.

Runs beside servers, imports and gc: pages and records are each seen in one snapshot, frames are
read one by one, and a frame that vanishes meanwhile was needed by nobody.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import lmdb
from blake3 import blake3

from dedupstore import catalog, origins
from dedupstore import format as fmt
from dedupstore.env import DATA_FILE, Environment
from dedupstore.errors import ChunkDamagedError, StoreDamagedError
from dedupstore.frames import Codecs, read_totals, write_totals
from dedupstore.pages import verify_pages
from dedupstore.store import Store

_SLOT_BYTES = 36
_FRAMES_AHEAD = 64


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong. `image` and `offset` (bytes) say what a reader loses, where that is known;
    `chunk` is "frame" or "frame.slot"; `mended` is set once a repair has dealt with it."""

    what: str
    reason: str
    image: str | None = None
    offset: int | None = None
    chunk: str | None = None
    mended: bool = False


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check looked at and what it found. `bytes` are raw bytes whose digest was verified."""

    pages: int
    frames: int
    chunks: int
    bytes: int
    images: int
    findings: tuple[Finding, ...]

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong, or all of it was mended."""
        return all(finding.mended for finding in self.findings)


Progress = Callable[[int, int], None]


def check_store(
    path: Path, *, repair: bool = False, on_progress: Progress | None = None
) -> Checked:
    """Verify the store at `path`, which must not be open in this process.

    `on_progress` gets (frames done, frames in all). Raises StoreNotFoundError and what else keeps a
    store from being opened; damage inside is returned, not raised.
    """
    if os.path.exists(path / DATA_FILE):  # noqa: PTH110 - False where one may not look, too
        report = verify_pages(path / DATA_FILE)
        if report.findings:
            # LMDB would follow these pages wherever they lead: no further pass is safe.
            found = tuple(
                Finding(f"page {page.page} of {page.database}", page.reason)
                for page in report.findings
            )
            return Checked(report.pages_walked, 0, 0, 0, 0, found)
        pages = report.pages_walked
    else:
        pages = 0
    with Store(path) as store:
        check = _Check(store.env)
        check.verify_frames(on_progress or (lambda _done, _all: None))
        with store.env.read() as txn:
            check.verify_index(txn)
            check.verify_images(txn)
            check.verify_drafts(txn)
        if repair and check.findings:
            check.repair()
        return Checked(
            pages,
            len(check.tables),
            check.chunks,
            check.bytes,
            check.images,
            tuple(check.findings),
        )


class _Check:
    """The state of one check: what the frames really hold, and the findings so far."""

    def __init__(self, env: Environment) -> None:
        self.env = env
        self.findings: list[Finding] = []
        # Frame number -> its verified slot table as stored, 36 bytes a slot.
        self.tables: dict[int, bytes] = {}
        self.damaged: dict[int, str] = {}
        self._bad_keys: list[bytes] = []
        # Manifests that are views, each with its keys; the keys of those that are damaged.
        self._views: dict[bytes, list[bytes]] = {}
        self._bad_views: list[bytes] = []
        self.chunks = self.bytes = self.images = 0
        self._stored_bytes = 0
        self._raw_bytes = 0
        self._codecs = Codecs()
        self._index_wrong = self._totals_wrong = False

    def _find(self, what: str, reason: str, **where: object) -> None:
        self.findings.append(Finding(what, reason, **where))  # type: ignore[arg-type]

    # --- frames ---

    def verify_frames(self, on_progress: Progress) -> None:
        """Load, decompress and hash every frame, on every core."""
        with self.env.read() as txn:
            keys = [bytes(k) for k in txn.cursor(db=self.env.frames).iternext(values=False)]
        frames = []
        for key in keys:
            try:
                frames.append(fmt.decode_frame_key(key))
            except StoreDamagedError as error:
                self._bad_keys.append(key)
                self._find("frames", str(error))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for begin in range(0, len(frames), _FRAMES_AHEAD):
                part = frames[begin : begin + _FRAMES_AHEAD]
                for frame, result in zip(part, pool.map(self._verify_frame, part), strict=True):
                    self._note_frame(frame, result)
                on_progress(begin + len(part), len(frames))

    def _verify_frame(self, frame: int) -> tuple[bytes, int, int] | str | None:
        """(slot table, raw bytes, record bytes) of a sound frame, else why not; None: vanished."""
        with self.env.read() as txn:
            record = txn.get(fmt.frame_key(frame), db=self.env.frames)
            if record is None:
                return None
            try:
                fmt.verify_frame(record, frame)
                raw = self._codecs.decode(record, frame)
                header = fmt.decode_frame_header(record, frame)
                offsets = fmt.decode_frame_offsets(record, frame)
                view = memoryview(raw)
                for i, slot in enumerate(header.slots):
                    piece = view[offsets[i] : offsets[i] + slot.length]
                    if slot.state == fmt.SLOT_PRESENT and blake3(piece).digest() != slot.digest:
                        return f"slot {i} does not have its digest"
                if offsets[-1] != len(raw):
                    return "slots and contents differ in length"
            except ChunkDamagedError as error:
                return error.reason
            table = bytes(record[header.payload_at - _SLOT_BYTES * len(header.slots) :])
            return table[: _SLOT_BYTES * len(header.slots)], len(raw), len(record)

    def _note_frame(self, frame: int, result: tuple[bytes, int, int] | str | None) -> None:
        if isinstance(result, str):
            self.damaged[frame] = result
        elif result is not None:
            self.tables[frame], raw, stored = result
            self.bytes += raw
            self._raw_bytes += raw
            self._stored_bytes += stored

    def _slots(self, frame: int) -> Iterator[tuple[bytes, int, int]]:
        """(digest, length, state) of a sound frame's slots."""
        table = self.tables.get(frame, b"")
        for at in range(0, len(table), _SLOT_BYTES):
            packed = int.from_bytes(table[at + 32 : at + 36], "little")
            yield table[at : at + 32], packed & ((1 << 30) - 1), packed >> 30

    # --- index and totals ---

    def verify_index(self, txn: lmdb.Transaction) -> None:
        """Every present chunk is indexed, every index entry leads to its chunk."""
        env = self.env
        for frame in self.tables:
            for slot, (digest, _, state) in enumerate(self._slots(frame)):
                if state != fmt.SLOT_PRESENT:
                    continue
                self.chunks += 1
                try:
                    value = txn.get(digest, db=env.chunks)
                    ref = None if value is None else fmt.decode_index(digest, value)
                except StoreDamagedError as error:
                    self._index_wrong = True
                    self._find("index", str(error), chunk=f"{frame}.{slot}")
                    continue
                if ref is not None and self._is_copy(digest, ref):
                    continue
                if ref != fmt.make_ref(frame, slot) and self._still_there(txn, frame):
                    self._index_wrong = True
                    self._find("index", "does not know a stored chunk", chunk=f"{frame}.{slot}")
        self._verify_no_dangling(txn)
        self._verify_totals(txn)

    def _is_copy(self, digest: bytes, ref: int) -> bool:
        """Whether a reference leads to a sound chunk of this digest: damage to the index may have
        made an import store a chunk twice."""
        slots = list(self._slots(ref >> fmt.REF_SLOT_BITS))
        slot = ref & fmt.REF_SLOT_MASK
        return slot < len(slots) and slots[slot][::2] == (digest, fmt.SLOT_PRESENT)

    def _still_there(self, txn: lmdb.Transaction, frame: int) -> bool:
        """Whether a frame is as it was when it was verified, no gc having changed it since."""
        record = txn.get(fmt.frame_key(frame), db=self.env.frames)
        return (
            record is not None
            and bytes(record[16 : 16 + len(self.tables[frame])]) == (self.tables[frame])
        )

    def _verify_no_dangling(self, txn: lmdb.Transaction) -> None:
        for key, value in txn.cursor(db=self.env.chunks):
            digest = bytes(key)
            try:
                ref = fmt.decode_index(digest, value)
            except StoreDamagedError as error:
                self._index_wrong = True
                self._find("index", str(error))
                continue
            frame = ref >> fmt.REF_SLOT_BITS
            if frame in self.damaged or frame in self.tables:
                continue
            if txn.get(fmt.frame_key(frame), db=self.env.frames) is None:
                self._index_wrong = True
                self._find("index", "leads to a frame that is not there", chunk=str(frame))

    def _verify_totals(self, txn: lmdb.Transaction) -> None:
        try:
            totals = read_totals(txn, self.env)
        except StoreDamagedError as error:
            self._totals_wrong = True
            self._find("totals", str(error))
            return
        counted = self._count_totals(txn, totals.frame_next)
        if counted != totals:
            self._totals_wrong = True
            self._find("totals", f"are {totals} but the frames give {counted}")

    def _count_totals(self, txn: lmdb.Transaction, frame_next: int) -> fmt.Totals:
        """The totals as one snapshot's frames give them. A damaged frame counts as it is kept."""
        counted = fmt.Totals(frame_next)
        for key, record in txn.cursor(db=self.env.frames):
            try:
                frame = fmt.decode_frame_key(key)
                header = fmt.decode_frame_header(record, frame)
            except StoreDamagedError:
                continue
            present = sum(slot.state == fmt.SLOT_PRESENT for slot in header.slots)
            counted = replace(
                counted,
                frame_next=max(counted.frame_next, frame + 1),
                frames=counted.frames + 1,
                chunks=counted.chunks + present,
                unique_bytes=counted.unique_bytes + header.raw_bytes,
                stored_bytes=counted.stored_bytes + len(record),
            )
        return counted

    # --- images, manifests, drafts ---

    def verify_images(self, txn: lmdb.Transaction) -> None:
        """Every name has its manifest, every manifest its chunks and its digest."""
        names = self._verify_views(txn)
        for key, record in txn.cursor(db=self.env.images):
            self.images += 1
            name = None
            try:
                name = catalog.decode_name(key)
                image = fmt.decode_image(record, bytes(key))
            except StoreDamagedError as error:
                self._find("images", str(error), image=name)
                continue
            names.setdefault(image.digest, []).append(name)
            if txn.get(image.digest, db=self.env.manifests) is None:
                self._find("images", "has no manifest", image=name)
        for key, record in txn.cursor(db=self.env.manifests):
            digest = bytes(key)
            before = len(self.findings)
            for called in names.get(digest) or (None,):
                self._verify_manifest(txn, digest, record, called)
            if len(self.findings) > before:
                self._bad_views += self._views.get(digest, [])
        self._find_unread_damage(txn)

    def _verify_views(self, txn: lmdb.Transaction) -> dict[bytes, list[str]]:
        """Note which manifests are views; return what findings call them."""
        names: dict[bytes, list[str]] = {}
        for image, kind, view in catalog.list_views(txn, self.env):
            key = fmt.view_key(image, kind)
            if isinstance(view, fmt.ViewRecord):
                self._views.setdefault(view.digest, []).append(key)
                if view.digest != image:
                    names.setdefault(view.digest, []).append(f"view of {image.hex()[:16]}")
            else:
                self._bad_views.append(key)
                self._find("views", str(view))
        return names

    def _find_unread_damage(self, txn: lmdb.Transaction) -> None:
        """Damaged frames that no image reads yet: the next import would rely on their chunks."""
        reported = {finding.chunk.partition(".")[0] for finding in self.findings if finding.chunk}
        for frame, reason in self.damaged.items():
            there = txn.get(fmt.frame_key(frame), db=self.env.frames) is not None
            if there and str(frame) not in reported:
                self._find("frames", reason, chunk=str(frame))

    def _verify_manifest(
        self, txn: lmdb.Transaction, digest: bytes, record: fmt.Buffer, image: str | None
    ) -> None:
        try:
            manifest = fmt.decode_manifest(record, digest)
        except StoreDamagedError as error:
            self._find("manifests", str(error), image=image)
            return
        hasher = fmt.ImageDigest()
        sound = True
        offset = 0
        columns = zip(manifest.lengths, manifest.refs, manifest.counts, strict=True)
        for length, ref, count in columns:
            reason = self._verify_run(txn, hasher, length, ref, count)
            if reason is not None:
                sound = False
                frame, slot = ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK
                chunk = f"{frame}.{slot}"
                self._find("chunk", reason, image=image, offset=offset, chunk=chunk)
            offset += length
        if sound and hasher.finish() != digest:
            self._find("manifests", "contents do not have the image's digest", image=image)

    def _verify_run(
        self, txn: lmdb.Transaction, hasher: fmt.ImageDigest, length: int, ref: int, count: int
    ) -> str | None:
        """Feed a run's chunks to the image's digest; or say what is wrong with it."""
        if ref == fmt.REF_HOLE:
            hasher.add(length, fmt.ZERO_DIGEST)
            return None
        frame, slot = ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK
        if frame in self.damaged:
            return self.damaged[frame]
        if frame not in self.tables:
            # Stored after the frames were listed: verify it now.
            result = self._verify_frame(frame)
            if result is None:
                return "is missing from the store"
            self._note_frame(frame, result)
            return self._verify_run(txn, hasher, length, ref, count)
        slots = list(self._slots(frame))[slot : slot + count]
        if any(state != fmt.SLOT_PRESENT for _, _, state in slots):
            return "its bytes are not in the store"
        if len(slots) != count or sum(size for _, size, _ in slots) != length:
            return "frame and manifest disagree"
        for chunk, size, _ in slots:
            hasher.add(size, chunk)
        return None

    def verify_drafts(self, txn: lmdb.Transaction) -> None:
        """Drafts decode; what they refer to is their import's business."""
        for _, record in txn.cursor(db=self.env.drafts):
            try:
                fmt.decode_draft(record)
            except StoreDamagedError as error:
                self._find("drafts", str(error))

    # --- repair ---

    def repair(self) -> None:
        """Mend index and totals from the frames; take damaged frames out of the index, so that the
        next import of their contents stores them anew instead of relying on them; and forget
        damaged views, so that the next mount derives them anew."""
        env = self.env
        with env.write() as txn:
            for key in self._bad_keys:
                txn.delete(key, db=env.frames)
            for frame in self.damaged:
                # Under the write lock now: a gc may have removed it since it was found damaged.
                if isinstance(self._verify_frame(frame), str):
                    self._quarantine(txn, frame)
            for key in self._bad_views:
                txn.delete(key, db=env.meta)
            if self._index_wrong:
                self._rebuild_index(txn)
            if self.findings:
                # The next import of a file has to read it, to store anew what is damaged here.
                origins.forget(txn, env)
            try:
                frame_next = read_totals(txn, env).frame_next
            except StoreDamagedError:
                frame_next = 1
            write_totals(txn, env, self._count_totals(txn, frame_next))
        mendable = ("index", "totals", "frames", "views")
        self.findings = [
            replace(finding, mended=True) if finding.what in mendable else finding
            for finding in self.findings
        ]

    def _quarantine(self, txn: lmdb.Transaction, frame: int) -> None:
        """Replace a damaged frame by its table of absent chunks, as far as the index still knows
        them: reads of them fail as before, imports no longer believe that they are here."""
        known: dict[int, bytes] = {}
        for key, value in txn.cursor(db=self.env.chunks):
            digest = bytes(key)
            try:
                ref = fmt.decode_index(digest, value)
            except StoreDamagedError:
                continue
            if ref >> fmt.REF_SLOT_BITS == frame:
                known[ref & fmt.REF_SLOT_MASK] = digest
        for digest in known.values():
            txn.delete(digest, db=self.env.chunks)
        if not known:
            txn.delete(fmt.frame_key(frame), db=self.env.frames)
            return
        slots = [
            fmt.Slot(known[i], 0, fmt.SLOT_ABSENT) if i in known else fmt.DROPPED
            for i in range(max(known, default=-1) + 1)
        ]
        record = self._codecs.encode(slots, b"")
        fmt.seal_frame(record, frame)
        txn.put(fmt.frame_key(frame), record, db=self.env.frames)

    def _rebuild_index(self, txn: lmdb.Transaction) -> None:
        """Write the index anew from the frames as they are now."""
        env = self.env
        txn.drop(env.chunks, delete=False)
        for key, record in txn.cursor(db=env.frames):
            frame = fmt.decode_frame_key(key)
            header = fmt.decode_frame_header(record, frame)
            present = [
                (slot, entry.digest)
                for slot, entry in enumerate(header.slots)
                if entry.state == fmt.SLOT_PRESENT
            ]
            for slot, digest in present:
                ref = fmt.make_ref(frame, slot)
                txn.put(digest, fmt.encode_index(digest, ref), db=env.chunks)
