"""Where else a frame is: databases `places` and `distant` (docs/format.md, "Images that are
elsewhere").

Owns place records and the index of chunks whose bytes are not here. Every function runs inside the
caller's transaction and is as thread-safe as that; the encodings are pure.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import lmdb
from xxhash import xxh3_64_intdigest

from dedupstore import format as fmt
from dedupstore.env import Environment, RemoteDatabases
from dedupstore.errors import StoreDamagedError
from dedupstore.values import has_value, read_beginning

_GUARD = struct.Struct("<Q")
_HEAD = struct.Struct("<I")
_PLACE = struct.Struct("<I32sQIQ")
assert _PLACE.size == 56
# Remotes that one frame is known to be in; a frame has an origin and few mirrors of it.
_PLACES_MAX = 8


@dataclass(frozen=True, slots=True)
class Place:
    """A frame's record in a pack of a remote: the remote's number, the pack's id, and offset and
    length in bytes."""

    remote: int
    pack: bytes
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class PlaceRecord:
    """All places of one frame, and when it was last used: hours since 1970."""

    places: tuple[Place, ...]
    used: int


def this_hour() -> int:
    """Now, as `PlaceRecord.used` counts."""
    return int(time.time()) // 3600


def encode_places(record: PlaceRecord, frame: int) -> bytes:
    """Value of database `places` for a frame."""
    body = _HEAD.pack(record.used) + b"".join(
        _PLACE.pack(place.remote, place.pack, place.offset, place.length, 0)
        for place in record.places
    )
    return _GUARD.pack(xxh3_64_intdigest(body, frame)) + body


def decode_places(value: fmt.Buffer, frame: int) -> PlaceRecord:
    """Return the record of a frame. Raises StoreDamagedError."""
    body = memoryview(value)[_GUARD.size :]
    ragged = len(body) < _HEAD.size or (len(body) - _HEAD.size) % _PLACE.size
    if ragged or _GUARD.unpack_from(value)[0] != xxh3_64_intdigest(body, frame):
        raise StoreDamagedError(f"place record of frame {frame} fails its checksum")
    fields = list(_PLACE.iter_unpack(body[_HEAD.size :]))
    if any(reserved for *_, reserved in fields):
        raise StoreDamagedError(f"place record of frame {frame} is malformed")
    return PlaceRecord(tuple(Place(*place) for *place, _ in fields), _HEAD.unpack_from(body)[0])


def find_places(txn: lmdb.Transaction, remote: RemoteDatabases, frame: int) -> PlaceRecord | None:
    """The places of a frame; None if it has none. Raises StoreDamagedError."""
    value = txn.get(fmt.frame_key(frame), db=remote.places)
    return None if value is None else decode_places(value, frame)


def put_places(
    txn: lmdb.Transaction, remote: RemoteDatabases, frame: int, record: PlaceRecord
) -> None:
    """Record the places of a frame, instead of those it had."""
    txn.put(fmt.frame_key(frame), encode_places(record, frame), db=remote.places)


def add_places(env: Environment, sent: Mapping[int, Place], used: int) -> None:
    """Record further places of frames, in a transaction of its own: where they were sent to. A
    frame that has none so far counts as `used` at that hour."""
    remote = env.open_remote()
    with env.write() as txn:
        for frame, place in sent.items():
            if not has_value(txn, env.frames, fmt.frame_key(frame)):
                continue
            known = find_places(txn, remote, frame) or PlaceRecord((), used)
            if place not in known.places and len(known.places) < _PLACES_MAX:
                put_places(txn, remote, frame, replace(known, places=(*known.places, place)))


def needs_remote(txn: lmdb.Transaction, env: Environment, number: int) -> str | None:
    """Says what has its bytes in the remote with this number alone, None: nothing."""
    if env.remote is None:
        return None
    frames = 0
    for frame, record in list_places(txn, env.remote):
        if isinstance(record, StoreDamagedError):
            continue
        if {place.remote for place in record.places} == {number}:
            head = read_beginning(txn, env, env.frames, fmt.frame_key(frame), 16)
            frames += head is not None and fmt.is_distant(head[0])
    return f"{frames} frames whose bytes are only there ('dedupstore prefetch')" if frames else None


def list_places(
    txn: lmdb.Transaction, remote: RemoteDatabases
) -> Iterator[tuple[int, PlaceRecord | StoreDamagedError]]:
    """(frame, its places or what is wrong with the record), in the order of frame numbers."""
    for key, value in txn.cursor(db=remote.places):
        frame = fmt.decode_frame_key(key)
        try:
            yield frame, decode_places(value, frame)
        except StoreDamagedError as error:
            yield frame, error


def find_distant(txn: lmdb.Transaction, remote: RemoteDatabases, digest: bytes) -> int | None:
    """Reference of the chunk with this digest whose bytes are elsewhere, or None."""
    value = txn.get(digest, db=remote.distant)
    return None if value is None else fmt.decode_index(digest, value)


def add_distant(
    txn: lmdb.Transaction,
    remote: RemoteDatabases,
    frames: Iterable[tuple[int, Sequence[fmt.Slot], PlaceRecord]],
) -> None:
    """Record the places of new frames, whose numbers rise, and have the index lead to the slots
    that are not dropped. In the order of the keys: what comes by thousands then shares pages."""
    where, index = [], []
    for frame, slots, record in frames:
        where.append((fmt.frame_key(frame), encode_places(record, frame)))
        for at, slot in enumerate(slots):
            if slot.state != fmt.SLOT_DROPPED:
                value = fmt.encode_index(slot.digest, fmt.make_ref(frame, at))
                index.append((slot.digest, value))
    txn.cursor(db=remote.places).putmulti(where)
    index.sort()
    txn.cursor(db=remote.distant).putmulti(index, overwrite=False)


def index_distant(
    txn: lmdb.Transaction, remote: RemoteDatabases, frame: int, slots: Sequence[fmt.Slot]
) -> None:
    """Have the index lead to the slots of a frame whose bytes are elsewhere."""
    for at, slot in enumerate(slots):
        if slot.state == fmt.SLOT_DISTANT:
            value = fmt.encode_index(slot.digest, fmt.make_ref(frame, at))
            txn.put(slot.digest, value, db=remote.distant, overwrite=False)


def forget_distant(
    txn: lmdb.Transaction, remote: RemoteDatabases, frame: int, slots: Sequence[fmt.Slot]
) -> None:
    """Take a frame's slots out of the index of what is elsewhere."""
    for at, slot in enumerate(slots):
        ref = fmt.make_ref(frame, at)
        if slot.state == fmt.SLOT_DISTANT and find_distant(txn, remote, slot.digest) == ref:
            txn.delete(slot.digest, db=remote.distant)


def forget_places(txn: lmdb.Transaction, env: Environment, frame: int) -> None:
    """Forget where a frame is."""
    remote = env.find_remote(txn)
    if remote is not None:
        txn.delete(fmt.frame_key(frame), db=remote.places)


def forget_frame(
    txn: lmdb.Transaction, env: Environment, frame: int, header: fmt.FrameHeader
) -> None:
    """Drop what leads to a frame that is about to be deleted, but for the index of what is here."""
    distant = header.codec == fmt.CODEC_DISTANT
    remote = env.find_remote(txn)
    if remote is None:
        return
    if distant:
        forget_distant(txn, remote, frame, header.slots)
    txn.delete(fmt.frame_key(frame), db=remote.places)
