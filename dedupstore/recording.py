"""Recording a trace: from reads of an image to chunks in the order of their first use.

Owns one recording. Reads are noted by the chunks they touch, so a read of a part of a chunk, from
the cache or not, uses the chunk. Thread-safe: any number of readers note at once.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate

import lmdb

from dedupstore import format as fmt
from dedupstore.constants import TRACE_CHUNKS_MAX
from dedupstore.env import Environment
from dedupstore.errors import DedupError
from dedupstore.frames import read_head
from dedupstore.manifest import Manifest
from dedupstore.traces import Trace, make_trace

# Slot tables that are kept at hand: reads come in no order of frames, and a table is read from the
# store in 30 us.
_TABLES_MAX = 1024


class Recorder:
    """Notes first uses of chunks of one store."""

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._lock = threading.Lock()
        self._seen: set[int] = set()  # references
        self._digests = bytearray()
        self._lengths = array("I")
        # By frame: its slots, and the offset of each in the frame's bytes, with the end.
        self._tables: dict[int, tuple[tuple[fmt.Slot, ...], list[int]]] = {}

    def note(self, manifest: Manifest, offset: int, length: int) -> None:
        """Note a read of an image. What cannot be told of damaged chunks is left out; the read
        itself will say so."""
        end = offset + length
        for start, run_bytes, ref in manifest.runs(offset, length):
            if ref:
                with suppress(DedupError, lmdb.Error, OSError), self._lock:
                    self._use(ref, max(offset - start, 0), min(end - start, run_bytes))

    def _use(self, ref: int, begin: int, end: int) -> None:
        """Note the chunks that hold the bytes from `begin` to `end` of the run that begins at
        `ref`."""
        frame, slot = ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK
        slots, offsets = self._table(frame)
        if slot >= len(slots):
            return
        begin, end = begin + offsets[slot], end + offsets[slot]
        for at in range(bisect_right(offsets, begin) - 1, len(slots)):
            if offsets[at] >= end:
                return
            used = fmt.make_ref(frame, at)
            if used not in self._seen and len(self._lengths) < TRACE_CHUNKS_MAX:
                self._seen.add(used)
                self._digests += slots[at].digest
                self._lengths.append(slots[at].length)

    def _table(self, frame: int) -> tuple[tuple[fmt.Slot, ...], list[int]]:
        table = self._tables.get(frame)
        if table is None:
            with self._env.read() as txn:
                head = read_head(txn, self._env, frame)
            slots = () if head is None else fmt.decode_frame_header(head[0], frame).slots
            if len(self._tables) >= _TABLES_MAX:
                self._tables.clear()
            offsets = list(accumulate((slot.length for slot in slots), initial=0))
            table = self._tables[frame] = slots, offsets
        return table

    @property
    def chunks(self) -> int:
        """How many chunks were noted."""
        return len(self._lengths)

    def trace(self, image: bytes) -> Trace:
        """What was noted so far, as the trace of an image's digest."""
        with self._lock:
            digests = fmt.split_digests(bytes(self._digests))
            return make_trace(image, zip(digests, self._lengths, strict=True))
