"""Chunks whose bytes are known to be damaged: lost records, and how images come to be whole again.

Owns the rules of the quarantine. A lost chunk has a record under its reference and no entry in the
index, so whoever imports its content stores it anew, under a new reference; then the manifests that
still lead to the old one are *redirected*. References keep their meaning: no frame is ever filled
in where a chunk was lost. Functions run inside the caller's transaction and are as thread-safe as
that; `redirect_all` uses transactions of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import lmdb

from dedupstore import catalog, format as fmt
from dedupstore.env import Environment
from dedupstore.errors import StoreDamagedError
from dedupstore.frames import find_chunk, read_head
from dedupstore.places import find_distant

Lost = Mapping[int, fmt.LostChunk]
"""Lost chunks by the reference that led to them."""


def note(txn: lmdb.Transaction, env: Environment, lost: Lost) -> None:
    """Put chunks into quarantine: record them, and take them out of the index if they are there
    under these references."""
    remote = env.find_remote(txn)
    databases = [env.chunks] if remote is None else [env.chunks, remote.distant]
    for ref, chunk in lost.items():
        for database in databases:
            value = txn.get(chunk.digest, db=database)
            try:
                indexed = None if value is None else fmt.decode_index(chunk.digest, value)
            except StoreDamagedError:
                indexed = ref
            if indexed == ref:
                txn.delete(chunk.digest, db=database)
        key = fmt.lost_key(ref)
        txn.put(key, fmt.encode_lost(chunk, key), db=env.meta)
    if lost:
        catalog.note_feature(txn, env, fmt.FEATURE_COMPAT_LOST)


def list_lost(
    txn: lmdb.Transaction, env: Environment
) -> Iterator[tuple[int, fmt.LostChunk | StoreDamagedError]]:
    """(reference, record or what is wrong with it) of every lost chunk."""
    cursor = txn.cursor(db=env.meta)
    if not cursor.set_range(fmt.lost_key(0)):
        return
    for key, record in cursor:
        ref = fmt.decode_lost_key(key)
        if ref is None:
            if bytes(key) > fmt.lost_key((1 << 64) - 1):
                return
            continue
        try:
            yield ref, fmt.decode_lost(record, bytes(key))
        except StoreDamagedError as error:
            yield ref, error


def read_lost(txn: lmdb.Transaction, env: Environment) -> dict[int, fmt.LostChunk]:
    """Every lost chunk with a sound record."""
    found = list_lost(txn, env)
    return {ref: chunk for ref, chunk in found if isinstance(chunk, fmt.LostChunk)}


def redirect_all(env: Environment) -> int:
    """Redirect every manifest that leads to lost chunks which have been stored anew since; return
    how many there were. One commit for each; nothing is written when there are none."""
    with env.read() as txn:
        lost = _stored_anew(txn, env, read_lost(txn, env))
        hurt = list(_hurt(txn, env, {ref >> fmt.REF_SLOT_BITS for ref in lost})) if lost else []
    for digest in hurt:
        with env.write() as txn:
            redirect(txn, env, digest, read_lost(txn, env))
    return len(hurt)


def _stored_anew(txn: lmdb.Transaction, env: Environment, lost: Lost) -> Lost:
    def stored(chunk: fmt.LostChunk) -> bool:
        try:
            return _find(txn, env, chunk.digest) is not None
        except StoreDamagedError:
            return False

    return {ref: chunk for ref, chunk in lost.items() if stored(chunk)}


def _find(txn: lmdb.Transaction, env: Environment, digest: bytes) -> int | None:
    """Reference of a chunk that is here, or else of one that a remote has."""
    here = find_chunk(txn, env, digest)
    if here is not None or env.remote is None:
        return here
    return find_distant(txn, env.remote, digest)


def _hurt(txn: lmdb.Transaction, env: Environment, frames: set[int]) -> Iterator[bytes]:
    """Digests of the manifests that lead into `frames`; damaged manifests are passed over."""
    for key, record in txn.cursor(db=env.manifests):
        digest = bytes(key)
        try:
            manifest = fmt.decode_manifest(record, digest)
        except StoreDamagedError:
            continue
        if any(ref >> fmt.REF_SLOT_BITS in frames for ref in set(manifest.refs)):
            yield digest


def redirect(txn: lmdb.Transaction, env: Environment, digest: bytes, lost: Lost) -> bool:
    """Have a manifest lead to the chunks of `lost` where they are stored now, as far as they are;
    return whether it has changed. Raises StoreDamagedError for a damaged manifest."""
    manifest = catalog.read_manifest(txn, env, digest)
    stored = _Stored(txn, env)
    runs = _Runs()
    changed = False
    for length, ref, count in zip(manifest.lengths, manifest.refs, manifest.counts, strict=True):
        pieces = _split(length, ref, count, lost, stored) if count else None
        changed = changed or pieces is not None
        for piece in pieces or ((length, ref, count),):
            runs.add(*piece)
    if changed:
        fresh = replace(manifest, lengths=runs.lengths, refs=runs.refs, counts=runs.counts)
        txn.put(digest, fmt.encode_manifest(fresh, digest), db=env.manifests)
    return changed


_Piece = tuple[int, int, int]
"""Length in bytes, reference, number of slots."""


class _Stored:
    """Where chunks are now, and how long. For one transaction; the headers last read are kept."""

    def __init__(self, txn: lmdb.Transaction, env: Environment) -> None:
        self._txn = txn
        self._env = env
        self._frame = 0
        self._slots: tuple[fmt.Slot, ...] = ()

    def find(self, digest: bytes) -> tuple[int, int] | None:
        """(reference, length) of a stored chunk."""
        try:
            ref = _find(self._txn, self._env, digest)
        except StoreDamagedError:
            return None
        if ref is None:
            return None
        slots, at = self.slots(ref >> fmt.REF_SLOT_BITS), ref & fmt.REF_SLOT_MASK
        usable = (fmt.SLOT_PRESENT, fmt.SLOT_DISTANT)
        if at < len(slots) and slots[at].digest == digest and slots[at].state in usable:
            return ref, slots[at].length
        return None

    def slots(self, frame: int) -> tuple[fmt.Slot, ...]:
        """A frame's slots, none if it is missing or malformed."""
        if frame != self._frame:
            try:
                self._slots = fmt.decode_frame_header(self._head(frame), frame).slots
            except StoreDamagedError:
                self._slots = ()
            self._frame = frame
        return self._slots

    def _head(self, frame: int) -> fmt.Buffer:
        """A frame's record as far as its header goes, or beyond. What this transaction has written
        is in no file yet, but in memory: what is not in the last snapshot is taken from there."""
        with self._env.read() as before:
            head = read_head(before, self._env, frame)
        if head is not None:
            return head[0]
        return self._txn.get(fmt.frame_key(frame), db=self._env.frames) or b""


def _split(length: int, ref: int, count: int, lost: Lost, stored: _Stored) -> list[_Piece] | None:
    """A run with each lost chunk that is stored anew in its new place; None: it stays as it is.

    Slots whose length nobody knows keep together, and take what the others leave; where that does
    not tell their lengths, the run stays as it is.
    """
    if not any(one in lost for one in range(ref, ref + count)):
        return None
    pieces: list[_Piece] = []
    changed = False
    for one in range(ref, ref + count):
        chunk = lost.get(one)
        now = stored.find(chunk.digest) if chunk is not None else None
        if now is not None and now[0] != one:
            pieces.append((now[1], now[0], 1))
            changed = True
        elif pieces and not pieces[-1][0] and pieces[-1][1] + pieces[-1][2] == one:
            pieces[-1] = (0, pieces[-1][1], pieces[-1][2] + 1)
        else:
            pieces.append((chunk.length if chunk is not None else 0, one, 1))
    unknown = [at for at, piece in enumerate(pieces) if not piece[0]]
    rest = length - sum(piece[0] for piece in pieces)
    if len(unknown) == 1 and rest > 0:
        pieces[unknown[0]] = (rest, *pieces[unknown[0]][1:])
    elif unknown or rest:
        return None
    return pieces if changed else None


@dataclass(slots=True)
class _Runs:
    """A manifest's columns being made: consecutive slots of one frame become one run."""

    lengths: array[int] = field(default_factory=lambda: array("Q"))
    refs: array[int] = field(default_factory=lambda: array("Q"))
    counts: array[int] = field(default_factory=lambda: array("I"))

    def add(self, length: int, ref: int, count: int) -> None:
        """Append a run."""
        if count and self.counts and self.counts[-1] and self.refs[-1] + self.counts[-1] == ref:
            self.lengths[-1] += length
            self.counts[-1] += count
        else:
            self.lengths.append(length)
            self.refs.append(ref)
            self.counts.append(count)


def forget(txn: lmdb.Transaction, env: Environment, refs: Iterable[int]) -> None:
    """Delete lost records."""
    for ref in refs:
        txn.delete(fmt.lost_key(ref), db=env.meta)
