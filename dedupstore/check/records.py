"""Mending records from what the store itself knows: all but the contents of chunks.

A record whose guard fails may differ in a single bit from one whose guard holds: then that is what
it was. Beyond that, derived records are derived anew or forgotten. Everything runs in the caller's
write transaction; not thread-safe.
"""

from __future__ import annotations

from collections.abc import Container
from contextlib import suppress
from pathlib import Path

import lmdb

from dedupstore import catalog, format as fmt, origins, places, quarantine
from dedupstore.check.frames import judge
from dedupstore.check.scrub import Scrub
from dedupstore.env import Environment
from dedupstore.errors import ChunkDamagedError, StoreDamagedError
from dedupstore.frames import (
    TOTALS_KEY,
    Codecs,
    count_totals,
    read_frame,
    read_head,
    read_totals,
    write_totals,
)
from dedupstore.leases import Reclaim, session_byte
from dedupstore.values import has_value

# Looking for a flipped bit takes one checksum for each: a second for a record of this size.
_RECORD_BYTES_MAX = 32 << 10
# How far the next frame number jumps when it is lost. A number must never be used again, and those
# of frames that gc has reclaimed are known to nobody: no store will have written this many, which
# are a pebibyte, and there are 2^47.
FRAME_NUMBERS_SKIPPED = 1 << 32


def mend_records(txn: lmdb.Transaction, env: Environment, store: Path, scrub: Scrub) -> None:
    """Mend what the scrub has found in superblock, totals, index, names, manifests, drafts and
    derived records, as far as it can be. Raises StoreVersionError."""
    wounds = scrub.wounds
    if wounds.superblock:
        _mend_superblock(txn, env)
    for key in scrub.frames.bad_keys:
        txn.delete(key, db=env.frames)
    for key in wounds.meta:
        _mend_or_delete(txn, env.meta, key, fmt.record_seed(key))
    for name in wounds.images:
        _mend_image(txn, env, name)
    for digest in wounds.manifests:
        _mend_manifest(txn, env, digest, wounds.missing)
    for key in wounds.places:
        _mend_place(txn, env, key, scrub)
    for key in wounds.drafts:
        _mend_draft(txn, env, store, key)
    # The next import of a file has to read it, to store anew what is damaged here.
    origins.forget(txn, env)
    # Where there are remotes, not every entry that is missing is known to be.
    if wounds.index or env.remote is not None:
        rebuild_index(txn, env, scrub.frames.damaged)
    write_totals(txn, env, count_totals(txn, env, _next_frame(txn, env)))


def _mend_superblock(txn: lmdb.Transaction, env: Environment) -> None:
    record = bytes(txn.get(fmt.SUPERBLOCK_KEY, db=env.meta) or b"")
    mended = fmt.with_one_bit_mended(record, 0)
    if mended is None:
        guessed = fmt.guess_superblock(record)
        if guessed is None:
            raise StoreDamagedError(
                f"{env.path}: the superblock is damaged beyond repair (make a new store and import "
                "the images again)"
            )
        mended = fmt.encode_superblock(guessed)
    fmt.check_superblock(fmt.decode_superblock(mended), str(env.path.parent))
    if env.remote is not None:
        mended = fmt.with_incompatible(mended, fmt.FEATURE_INCOMPAT_REMOTE)
    txn.put(fmt.SUPERBLOCK_KEY, mended, db=env.meta)


def _mend_or_delete(txn: lmdb.Transaction, database: lmdb._Database, key: bytes, seed: int) -> None:
    """Mend a record that is derived from others: without it they are derived again."""
    record = txn.get(key, db=database)
    if record is None:
        return
    mended = _mended(record, seed)
    if mended is not None and mended != bytes(record):
        txn.put(key, mended, db=database)
    else:
        txn.delete(key, db=database)


def _mended(record: fmt.Buffer, seed: int) -> bytes | None:
    if len(record) > _RECORD_BYTES_MAX:
        return None
    return fmt.with_one_bit_mended(record, seed)


def _mend_image(txn: lmdb.Transaction, env: Environment, name: bytes) -> None:
    """Mend a name's record, or move it to the name that its guard is for."""
    record = bytes(txn.get(name, db=env.images) or b"")
    mended = _mended(record, fmt.record_seed(name))
    if mended is not None:
        txn.put(name, mended, db=env.images)
        return
    for bit in range(8 * len(name)):
        meant = bytearray(name)
        meant[bit >> 3] ^= 1 << (bit & 7)
        try:
            fmt.decode_image(record, bytes(meant))
        except StoreDamagedError:
            continue
        if txn.put(bytes(meant), record, db=env.images, overwrite=False):
            txn.delete(name, db=env.images)
        return
    guessed = fmt.guess_image(record)
    if guessed is None or txn.get(guessed.digest, db=env.manifests) is None:
        return
    # The digest leads to a manifest, which no damaged one does. Size and kind are checked with it.
    manifest = catalog.read_summary(txn, env, guessed.digest)
    kind = guessed.kind if guessed.kind in fmt.KIND_NAMES else fmt.KIND_RAW
    image = fmt.ImageRecord(guessed.digest, manifest.size, guessed.created_ns, kind)
    txn.put(name, fmt.encode_image(image, name), db=env.images)


def _mend_manifest(
    txn: lmdb.Transaction, env: Environment, digest: bytes, missing: set[bytes]
) -> None:
    """Mend a manifest, or move it to the image whose it is."""
    record = bytes(txn.get(digest, db=env.manifests) or b"")
    for meant in missing:
        try:
            fmt.decode_manifest(record, meant)
        except StoreDamagedError:
            continue
        txn.delete(digest, db=env.manifests)
        txn.put(meant, record, db=env.manifests)
        return
    mended = _mended(record, 0)
    if mended is not None:
        try:
            fmt.decode_manifest(mended, digest)
        except StoreDamagedError:
            return
        txn.put(digest, mended, db=env.manifests)


def _mend_draft(txn: lmdb.Transaction, env: Environment, store: Path, key: bytes) -> None:
    """Mend a draft; delete it if its import is dead."""
    record = txn.get(key, db=env.drafts)
    mended = None if record is None else _mended(record, 0)
    if mended is not None:
        txn.put(key, mended, db=env.drafts)
        return
    with Reclaim(store) as reclaim:
        if reclaim.claim(session_byte(fmt.draft_session(key))):
            txn.delete(key, db=env.drafts)


def _mend_place(txn: lmdb.Transaction, env: Environment, key: bytes, scrub: Scrub) -> None:
    """Mend a place record, or delete it: of what then nobody knows where it is, chunks are lost."""
    remote = env.ensure_remote(txn)
    if len(key) != fmt.FRAME_KEY_BYTES or not has_value(txn, env.frames, key):
        txn.delete(key, db=remote.places)
        return
    frame = fmt.decode_frame_key(key)
    _mend_or_delete(txn, remote.places, key, frame)
    with suppress(ChunkDamagedError):
        record = read_frame(txn, env, frame)
        if record is not None and not isinstance(judge(txn, env, record, frame, Codecs()), str):
            # It was in quarantine for its place only, if it was.
            scrub.frames.damaged.pop(frame, None)
            scrub.wounds.index = True
            slots = fmt.decode_frame_header(record, frame).slots
            quarantine.forget(txn, env, (fmt.make_ref(frame, at) for at in range(len(slots))))


def rebuild_index(
    txn: lmdb.Transaction, env: Environment, damaged: Container[int] = frozenset()
) -> None:
    """Write both indexes anew from the frames as they were before this transaction, but for those
    that are damaged, or cannot be read. Of two copies of a chunk the index knows the one that no
    remote has, which stays here."""
    remote = env.find_remote(txn)
    txn.drop(env.chunks, delete=False)
    if remote is not None:
        txn.drop(remote.distant, delete=False)
    for key in txn.cursor(db=env.frames).iternext(values=False):
        frame = fmt.decode_frame_key(key)
        if frame in damaged:
            continue
        try:
            head, _ = read_head(txn, env, frame) or (b"", 0)
            slots = fmt.decode_frame_header(head, frame).slots
        except ChunkDamagedError:
            continue
        placed = remote is not None and has_value(txn, remote.places, bytes(key))
        if fmt.is_distant(head):
            places.index_distant(txn, env.ensure_remote(txn), frame, slots)
            continue
        for slot, entry in enumerate(slots):
            if entry.state == fmt.SLOT_PRESENT:
                value = fmt.encode_index(entry.digest, fmt.make_ref(frame, slot))
                txn.put(entry.digest, value, db=env.chunks, overwrite=not placed)


def _next_frame(txn: lmdb.Transaction, env: Environment) -> int:
    """The next frame number, as the totals have it, or one that was certainly never used."""
    last = 0
    cursor = txn.cursor(db=env.frames)
    if cursor.last():
        last = fmt.decode_frame_key(cursor.key())
    try:
        frame_next = read_totals(txn, env).frame_next
    except StoreDamagedError:
        record = txn.get(TOTALS_KEY, db=env.meta)
        mended = None if record is None else _mended(record, 0)
        frame_next = 0 if mended is None else fmt.decode_totals(mended).frame_next
    if frame_next > last:
        return frame_next
    return last + FRAME_NUMBERS_SKIPPED
