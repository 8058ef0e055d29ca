"""Which frames a push sends, and the packs that it writes.

Owns the choice: a local frame whose chunks the image all needs, and the remote all lacks, goes with
the same slots; of others the chunks that are lacking are packed anew. Either is compressed anew,
harder than imports do: it is sent once, and fetched by many. Chunks of
a trace come first, in its order, in frames of their own: a host that starts by them asks for little
else. Packs are written in the image's order, several at a time; what is in memory is bounded by
that. One `Sender` belongs to one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter

import lmdb

from dedupstore import format as fmt
from dedupstore.constants import FRAME_SLOTS_MAX, MIB, PUSH_ZSTD_LEVEL
from dedupstore.env import Environment
from dedupstore.errors import ChunkDamagedError
from dedupstore.frames import Codecs, FrameBuilder, encode_new, read_head
from dedupstore.remote import layout, packs
from dedupstore.remote.remote import Remote, new_salt

# A pack is closed when it has this many bytes. Large enough that a request's cost is noise, small
# enough that a push that is killed has little to send again.
PACK_BYTES = 8 * MIB
# Packs written, and frames loaded or compressed, at a time.
_UPLOADS = 4
_FRAMES_AHEAD = 16


@dataclass(frozen=True, slots=True)
class Local:
    """A frame of the store that an image needs: its slots, which of them the image reads, and
    whether these are all."""

    slots: tuple[fmt.Slot, ...]
    read: frozenset[int]

    @property
    def whole(self) -> bool:
        """Whether the image reads every slot."""
        return len(self.read) == len(self.slots)

    def needed(self) -> Iterator[fmt.Slot]:
        """The slots that the image reads."""
        return (self.slots[i] for i in sorted(self.read))


def same_chunks(present: Sequence[fmt.Slot], slots: Sequence[fmt.Slot]) -> bool:
    """Whether all of `present` are, and are the chunks that `slots` say, wherever those are."""
    return len(present) == len(slots) and all(
        one.state == fmt.SLOT_PRESENT and one.digest == other.digest and one.length == other.length
        for one, other in zip(present, slots, strict=True)
    )


def needed_frames(
    txn: lmdb.Transaction, env: Environment, manifest: fmt.ManifestRecord
) -> dict[int, Local]:
    """The frames that an image needs, by number, in the order in which it first does. Raises
    ChunkDamagedError: one is missing. Whether the chunks' bytes are here matters only if they have
    to be sent."""
    read: dict[int, set[int]] = {}
    for ref, count in zip(manifest.refs, manifest.counts, strict=True):
        if ref != fmt.REF_HOLE:
            first = ref & fmt.REF_SLOT_MASK
            read.setdefault(ref >> fmt.REF_SLOT_BITS, set()).update(range(first, first + count))
    return {frame: _local(txn, env, frame, slots) for frame, slots in read.items()}


def _local(txn: lmdb.Transaction, env: Environment, frame: int, read: set[int]) -> Local:
    head = read_head(txn, env, frame)
    if head is None:
        raise ChunkDamagedError(frame, "is missing from the store")
    slots = fmt.decode_frame_header(head[0], frame).slots
    if max(read) >= len(slots):
        raise ChunkDamagedError(frame, "has not got this chunk", max(read))
    return Local(slots, frozenset(read))


@dataclass(frozen=True, slots=True)
class _Task:
    """A local frame to send: its number, and the slots that go, None: all of them, as a frame."""

    frame: int
    local: Local
    slots: tuple[int, ...] | None
    raw_bytes: int


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What goes of a local frame: its chunks, digests and bytes. `whole`: as a frame of their own,
    in the same slots."""

    whole: bool
    chunks: list[tuple[bytes, memoryview]]


class Sender:
    """Writes packs to a remote, and counts what it wrote."""

    def __init__(
        self,
        remote: Remote,
        load: Callable[[int], bytes],
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._remote = remote
        self._load = load
        self._on_progress = on_progress
        self._codecs = Codecs(PUSH_ZSTD_LEVEL)
        self.chunks = self.raw_bytes = self.sent_bytes = self.packs = 0

    def send(
        self, frames: Mapping[int, Local], missing: frozenset[bytes], first: Sequence[bytes]
    ) -> Iterator[packs.PackIndex]:
        """Write the `missing` chunks of these frames, those that are among `first`, digests, in
        that order before the others; yield the index of each pack once it is there."""
        parts = _plan(frames, missing, first)
        total = sum(task.raw_bytes for tasks in parts for task in tasks)
        uploads = ThreadPoolExecutor(_UPLOADS, thread_name_prefix="upload")
        under_way: deque[Future[packs.NewPack]] = deque()
        try:
            for pack in self._packs(parts):
                under_way.append(uploads.submit(self._write, pack))
                if len(under_way) >= _UPLOADS:
                    yield self._count(under_way.popleft().result(), total)
            while under_way:
                yield self._count(under_way.popleft().result(), total)
        finally:
            uploads.shutdown(cancel_futures=True)

    def _write(self, pack: packs.NewPack) -> packs.NewPack:
        self._remote.objects.put(layout.pack_path(pack.index.pack), pack.data)
        return pack

    def _count(self, pack: packs.NewPack, total: int) -> packs.PackIndex:
        headers = [frame.header for frame in pack.index.frames]
        raw_bytes = sum(header.raw_bytes for header in headers)
        self.packs += 1
        self.sent_bytes += len(pack.data)
        self.raw_bytes += raw_bytes
        self.chunks += sum(len(header.slots) for header in headers)
        self._on_progress(raw_bytes, total)
        return pack.index

    def _packs(self, parts: Iterable[list[_Task]]) -> Iterator[packs.NewPack]:
        """The packs of each part: whoever reads the first in order is not sent others."""
        for tasks in parts:
            records = self._records(tasks)
            try:
                yield from _packs(records)
            finally:
                records.close()

    def _records(self, tasks: list[_Task]) -> Generator[bytearray, None, None]:
        """The records of the frames to send, sealed."""
        pool = ThreadPoolExecutor(_UPLOADS, thread_name_prefix="pack")
        ahead: deque[Future[bytearray]] = deque()
        try:
            for future in self._packed(pool, tasks):
                ahead.append(future)
                if len(ahead) >= _FRAMES_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _packed(self, pool: Executor, tasks: list[_Task]) -> Iterator[Future[bytearray]]:
        """The records of the frames to send, in the making."""
        builder = FrameBuilder(FRAME_SLOTS_MAX)
        for loaded in self._loaded(pool, tasks):
            if loaded.whole:
                slots = tuple(fmt.Slot(digest, len(data)) for digest, data in loaded.chunks)
                yield pool.submit(self._encode, slots, [data for _, data in loaded.chunks])
                continue
            for digest, data in loaded.chunks:
                if not builder.fits(len(data)):
                    yield pool.submit(self._encode, *builder.take())
                builder.add(digest, data)
        if builder:
            yield pool.submit(self._encode, *builder.take())

    def _loaded(self, pool: Executor, tasks: list[_Task]) -> Iterator[_Loaded]:
        """What goes of local frames, some of which are loaded ahead."""
        ahead: deque[Future[_Loaded]] = deque()
        for task in tasks:
            ahead.append(pool.submit(self._take, task))
            if len(ahead) >= _FRAMES_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _take(self, task: _Task) -> _Loaded:
        view = memoryview(self._load(task.frame))
        raw = memoryview(self._codecs.decode(view, task.frame))
        header = fmt.decode_frame_header(view, task.frame)
        offsets = fmt.decode_frame_offsets(view, task.frame)
        whole = task.slots is None and same_chunks(header.slots, task.local.slots)
        chunks = []
        for slot in range(len(task.local.slots)) if task.slots is None else task.slots:
            entry = task.local.slots[slot]
            data = raw[offsets[slot] : offsets[slot] + entry.length]
            if len(data) != entry.length:
                raise ChunkDamagedError(task.frame, "its bytes are not in the store", slot)
            chunks.append((entry.digest, data))
        return _Loaded(whole, chunks)

    def _encode(self, slots: tuple[fmt.Slot, ...], parts: Sequence[fmt.Buffer]) -> bytearray:
        record = encode_new(self._codecs, slots, parts).record
        fmt.seal_frame(record, packs.FRAME_SEED)
        return record


def _plan(
    frames: Mapping[int, Local], missing: frozenset[bytes], first: Sequence[bytes]
) -> tuple[list[_Task], list[_Task]]:
    """What to send of each frame, the `first` and the others. A chunk that is in two goes once. The
    others go in the order of the frames' numbers: an import's metadata then lies together."""
    left = set(missing)
    begin = _first_tasks(frames, left, first)
    tasks = []
    for frame, local in sorted(frames.items()):
        slots = []
        for i in sorted(local.read):
            if local.slots[i].digest in left:
                left.remove(local.slots[i].digest)
                slots.append(i)
        if slots:
            whole = len(slots) == len(local.slots)
            tasks.append(_task(frame, local, slots, whole=whole))
    return begin, tasks


def _first_tasks(
    frames: Mapping[int, Local], left: set[bytes], first: Sequence[bytes]
) -> list[_Task]:
    """What goes before the others, in order, taken from `left`."""
    wanted = left.intersection(first)
    found = {
        local.slots[i].digest: (frame, i)
        for frame, local in frames.items()
        for i in local.read
        if local.slots[i].digest in wanted
    }
    left -= wanted
    places = (found[digest] for digest in first if digest in wanted)
    return [
        _task(frame, frames[frame], [slot for _, slot in group], whole=False)
        for frame, group in groupby(places, key=itemgetter(0))
    ]


def _task(frame: int, local: Local, slots: list[int], *, whole: bool) -> _Task:
    raw_bytes = sum(local.slots[i].length for i in slots)
    return _Task(frame, local, None if whole else tuple(slots), raw_bytes)


def _packs(records: Iterator[bytearray]) -> Iterator[packs.NewPack]:
    """Records, collected to packs."""
    collected: list[fmt.Buffer] = []
    size = 0
    for record in chain(records, (None,)):
        if record is not None:
            collected.append(memoryview(record))
            size += len(record)
        if collected and (record is None or size >= PACK_BYTES):
            yield packs.encode_pack(collected, new_salt())
            collected, size = [], 0
