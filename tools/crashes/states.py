"""What a disk may hold when power is lost, given what was written to it.

The disk is one with a volatile cache, as the kernel's block layer knows them: what was written
before the last flush that was done is there, and so is what was written with FUA; of the other
writes since, any subset is, whatever their order, and of a write of several sectors any subset of
those. A sector of 512 bytes is written whole or not at all: NVMe and ATA promise that (atomic write
unit of one logical block), and LMDB's meta page needs it (its 136 bytes lie in one sector). Nothing
that was flushed is damaged.

One thing is asked of the disk beyond that, and by ext4 alone: the two sectors of its superblock,
with a checksum over both that is in the second, are written together. Torn between them, ext4
cannot be mounted before e2fsck has mended it, whatever is stored on it.

A write that was under way when a flush was begun counts as flushed by it: nobody was told that it
was done, so nobody relies on either.
"""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SECTOR_BYTES = 512
# ext4's superblock: bytes 1,024 to 2,047 of its disk.
_SECTORS_KEPT_WITH_THE_LAST = (1024 + SECTOR_BYTES,)
_RECORD = struct.Struct("<BB6xQQQ")
_WRITE, _ZERO, _FLUSH = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Operation:
    """One write, zeroing or flush. Bytes."""

    kind: int
    fua: bool
    offset: int
    length: int
    place: int


class Recording:
    """A disk's log. `flushes` are the positions right behind each flush."""

    def __init__(self, log: Path) -> None:
        index = (log / "index").read_bytes()
        self.operations = [
            Operation(kind, bool(fua), offset, length, place)
            for kind, fua, offset, length, place in _RECORD.iter_unpack(index)
        ]
        self.flushes = [i + 1 for i, op in enumerate(self.operations) if op.kind == _FLUSH]
        with (log / "data").open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def apply(self, disk: bytearray, number: int, sectors: Iterator[bool] | None = None) -> None:
        """Do an operation to `disk`; with `sectors`, only of those that it says True for."""
        op = self.operations[number]
        if op.kind == _FLUSH:
            return
        data = (
            self._data[op.place : op.place + op.length] if op.kind == _WRITE else bytes(op.length)
        )
        if sectors is None:
            disk[op.offset : op.offset + op.length] = data
            return
        kept = False
        for at in range(0, op.length, SECTOR_BYTES):
            kept = kept if op.offset + at in _SECTORS_KEPT_WITH_THE_LAST else next(sectors)
            if kept:
                part = data[at : at + SECTOR_BYTES]
                disk[op.offset + at : op.offset + at + len(part)] = part


_KEEPS: dict[str, Callable[[list[int], int, random.Random], list[int]]] = {
    "none": lambda _all, _one, _source: [],
    "all": lambda volatile, _one, _source: volatile,
    "some": lambda volatile, _one, source: [n for n in volatile if source.random() < 0.5],
    "last lost": lambda volatile, _one, _source: volatile[:-1],
    "one lost": lambda volatile, one, _source: [n for n in volatile if n != one],
    "one alone": lambda _all, one, _source: [one],
    "late ones": lambda volatile, one, _source: [n for n in volatile if n >= one],
    "torn": lambda volatile, _one, _source: volatile,
    "one torn": lambda volatile, _one, _source: volatile,
}
KINDS = tuple(_KEEPS)
"""Which of the writes since the last flush are there: none; all; each with even odds; all but the
last; all but one; one alone; one and those behind it; sectors of each with even odds; all, of one
only some sectors."""
NOTHING_TO_LOSE = "nothing to lose"
"""The kind of a crash right behind a flush."""


class Disks:
    """Makes states of one recording, of ever later crashes."""

    def __init__(self, recording: Recording, size: int) -> None:
        self._recording = recording
        self._durable = bytearray(size)
        self._flushed = 0  # operations that are in it

    def volatile(self, position: int) -> list[int]:
        """The writes that a crash at `position` (that many operations done) may lose."""
        flushed = self._last_flush(position)
        return [
            number
            for number in range(flushed, position)
            if not self._recording.operations[number].fua
        ]

    def state(self, position: int, kind: str, source: random.Random) -> bytearray:
        """The disk after a crash at `position`, which is not before the last one asked for."""
        flushed = self._last_flush(position)
        while self._flushed < flushed:
            self._recording.apply(self._durable, self._flushed)
            self._flushed += 1
        disk = bytearray(self._durable)
        volatile = self.volatile(position)
        kept, torn = _chosen(volatile, kind, source)
        for number in range(flushed, position):
            if number not in volatile:
                self._recording.apply(disk, number)
            elif number in kept:
                self._recording.apply(disk, number, _coins(source) if number in torn else None)
        return disk

    def _last_flush(self, position: int) -> int:
        return max((flush for flush in self._recording.flushes if flush <= position), default=0)


def _chosen(volatile: list[int], kind: str, source: random.Random) -> tuple[set[int], set[int]]:
    """The writes that are there, and those of which only some sectors are."""
    if not volatile:
        return set(), set()
    one = source.choice(volatile)
    torn = {"torn": set(volatile), "one torn": {one}}.get(kind, set())
    return set(_KEEPS[kind](volatile, one, source)), torn


def _coins(source: random.Random) -> Iterator[bool]:
    while True:
        yield source.random() < 0.5
