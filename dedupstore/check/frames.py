"""The scrub of frames: every frame loaded, decompressed and hashed, on every core.

Owns what the frames were found to hold. Frames are read one by one, each in a snapshot of its own;
one that vanishes meanwhile was needed by nobody. Not thread-safe.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import lmdb
from blake3 import blake3

from dedupstore import format as fmt, places
from dedupstore.check.findings import Progress
from dedupstore.env import Environment
from dedupstore.errors import ChunkDamagedError, StoreDamagedError
from dedupstore.frames import Codecs, read_frame
from dedupstore.values import read_beginning

_SLOT_BYTES = 36
_FRAMES_AHEAD = 64
# References have 48 bits for it, and an import uses the topmost for its own purposes.
_FRAME_NUMBERS = 1 << 47

_Sound = tuple[bytes, int]
"""Slot table as stored, raw bytes."""


class FrameScrub:
    """What the frames hold. `tables` has the slots of sound frames, `damaged` the reasons of the
    others by frame number, `bad_keys` the keys that are no frame's."""

    def __init__(self, env: Environment) -> None:
        self.tables: dict[int, bytes] = {}
        self.damaged: dict[int, str] = {}
        self.bad_keys: dict[bytes, str] = {}
        self.bytes = 0
        self._env = env
        self._codecs = Codecs()

    def run(self, on_progress: Progress) -> None:
        """Verify every frame."""
        with self._env.read() as txn:
            keys = [bytes(k) for k in txn.cursor(db=self._env.frames).iternext(values=False)]
        frames = [frame for frame in map(self._number, keys) if frame is not None]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for begin in range(0, len(frames), _FRAMES_AHEAD):
                part = frames[begin : begin + _FRAMES_AHEAD]
                for frame, result in zip(part, pool.map(self._verify, part), strict=True):
                    self._note(frame, result)
                on_progress(begin + len(part), len(frames))

    def _number(self, key: bytes) -> int | None:
        try:
            frame = fmt.decode_frame_key(key)
        except StoreDamagedError as error:
            self.bad_keys[key] = str(error)
            return None
        if 0 < frame < _FRAME_NUMBERS:
            return frame
        self.bad_keys[key] = f"frame has the impossible number {frame}"
        return None

    def verify(self, frame: int) -> bool:
        """Verify one frame that was not there when the others were; False: it is not there."""
        result = self._verify(frame)
        self._note(frame, result)
        return result is not None

    def _note(self, frame: int, result: _Sound | str | None) -> None:
        if isinstance(result, str):
            self.damaged[frame] = result
        elif result is not None:
            self.tables[frame], raw = result
            self.bytes += raw

    def _verify(self, frame: int) -> _Sound | str | None:
        """What a sound frame holds, else why it is not sound; None: vanished."""
        env = self._env
        try:
            with env.read() as txn:
                record = read_frame(txn, env, frame)
                if record is None:
                    return None
                elsewhere = fmt.is_distant(record)
                if elsewhere and env.remote is not None:
                    return judge(txn, env, record, frame, self._codecs)
        except ChunkDamagedError as error:
            return error.reason
        if elsewhere:  # the first one came while this process had the store open
            env.open_remote()
            return self._verify(frame)
        return verify_contents(record, frame, self._codecs)

    def distant(self) -> Iterator[int]:
        """The sound frames whose bytes are in a remote."""
        return (frame for frame, table in self.tables.items() if _is_distant(table))

    def slots(self, frame: int) -> Iterator[tuple[bytes, int, int]]:
        """(digest, length, state) of a sound frame's slots."""
        return split_table(self.tables.get(frame, b""))

    def holds(self, digest: bytes, ref: int, state: int = fmt.SLOT_PRESENT) -> bool:
        """Whether a reference leads to a sound chunk of this digest, in this state."""
        at = _SLOT_BYTES * (ref & fmt.REF_SLOT_MASK)
        slot = self.tables.get(ref >> fmt.REF_SLOT_BITS, b"")[at : at + _SLOT_BYTES]
        return slot[:32] == digest and _state(slot) == state

    def is_unchanged(self, txn: lmdb.Transaction, frame: int) -> bool:
        """Whether a frame is as it was when it was verified, no gc having changed it since."""
        table = self.tables[frame]
        found = read_beginning(
            txn, self._env, self._env.frames, fmt.frame_key(frame), 16 + len(table)
        )
        return found is not None and found[0][16:] == table

    def absent(self) -> Iterator[tuple[int, fmt.LostChunk]]:
        """(reference, chunk) of what sound frames say is not here."""
        for frame in self.tables:
            for slot, (digest, length, state) in enumerate(self.slots(frame)):
                if state == fmt.SLOT_ABSENT:
                    yield fmt.make_ref(frame, slot), fmt.LostChunk(digest, length)


def judge(
    txn: lmdb.Transaction, env: Environment, record: fmt.Buffer, frame: int, codecs: Codecs
) -> _Sound | str:
    """What a frame holds if all of it is sound, which for bytes that are elsewhere means that it is
    known where; else why it is not."""
    result = verify_contents(record, frame, codecs)
    if isinstance(result, str) or not fmt.is_distant(record):
        return result
    remote = env.remote
    try:
        found = None if remote is None else places.find_places(txn, remote, frame)
    except StoreDamagedError as error:
        return str(error)
    return result if found is not None and found.places else "nothing says where its bytes are"


def verify_contents(record: fmt.Buffer, frame: int, codecs: Codecs) -> _Sound | str:
    """What a frame's record holds if all of it is sound, else why it is not."""
    try:
        fmt.verify_frame(record, frame)
        raw = codecs.decode(record, frame)
        header = fmt.decode_frame_header(record, frame)
        offsets = fmt.decode_frame_offsets(record, frame)
    except ChunkDamagedError as error:
        return error.reason
    view = memoryview(raw)
    for i, slot in enumerate(header.slots):
        piece = view[offsets[i] : offsets[i] + slot.length]
        if slot.state == fmt.SLOT_PRESENT and blake3(piece).digest() != slot.digest:
            return f"slot {i} does not have its digest"
    if offsets[-1] != len(raw):
        return "slots and contents differ in length"
    elsewhere = {slot.state for slot in header.slots} - {fmt.SLOT_DROPPED}
    if (fmt.SLOT_DISTANT in elsewhere or fmt.is_distant(record)) and not (
        fmt.is_distant(record) and elsewhere == {fmt.SLOT_DISTANT}
    ):
        return "slots and codec disagree about where its bytes are"
    table_at = header.payload_at - _SLOT_BYTES * len(header.slots)
    return bytes(record[table_at : header.payload_at]), len(raw)


def split_table(table: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(digest, length, state) of the slots of a table as stored."""
    for at in range(0, len(table), _SLOT_BYTES):
        packed = int.from_bytes(table[at + 32 : at + 36], "little")
        yield table[at : at + 32], packed & ((1 << 30) - 1), packed >> 30


def _is_distant(table: bytes) -> bool:
    return any(state == fmt.SLOT_DISTANT for _, _, state in split_table(table))


def _state(slot: bytes) -> int:
    return slot[35] >> 6 if len(slot) == _SLOT_BYTES else -1
