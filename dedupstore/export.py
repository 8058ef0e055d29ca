"""Writing an image back: byte for byte, holes as holes, decompressed on every core.

Frames are loaded ahead on a pool and written in image order, through a cache of their own: an image
that shares chunks with others goes back and forth between its frames and theirs. A file appears
under its name only when it is complete. As after cp, it is on disk when the kernel has written it
back: syncing would double the time. Runs on the calling thread and a pool of its own; any number
may run at once.
"""

from __future__ import annotations

import os
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dedupstore import format as fmt
from dedupstore.cache import Entry, FrameCache
from dedupstore.errors import ChunkDamagedError, TargetError
from dedupstore.manifest import Manifest
from dedupstore.store import Store

_FRAMES_AHEAD = 16
# Image order wanders: with this much, an image is loaded 1.0 times, without any 2.4 to 2.9 times.
_CACHE_BYTES = 128 << 20
_ZEROS = bytes(1 << 20)

Progress = Callable[[int, int], None]
"""Gets (bytes done since the last call, bytes in all)."""


def export_image(store: Store, name: str, target: Path | None, on_progress: Progress) -> None:
    """Write image `name` to `target`, or to standard output for None.

    Raises ImageNotFoundError, TargetError, ChunkDamagedError. An unfinished file is removed.
    """
    manifest = store.open_manifest(name)
    try:
        with _opened(target) as file:
            if target is not None and stat.S_ISREG(os.fstat(file).st_mode):
                _write_file(store, name, manifest, file, on_progress)
            else:
                _write_stream(store, name, manifest, file, on_progress)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        where = "standard output" if target is None else str(target)
        raise TargetError(f"{where}: {error.strerror}") from None
    finally:
        store.close_manifest(manifest)


@contextmanager
def _opened(target: Path | None) -> Iterator[int]:
    """The file to write to. A new regular file is written beside its name and renamed at the end;
    devices, pipes and the like are written in place."""
    if target is None:
        yield sys.stdout.fileno()
        return
    if target.exists() and not target.is_file():
        file = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
        try:
            yield file
        finally:
            os.close(file)
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield file
        os.close(file)
        file = -1
        partial.replace(target)
    finally:
        if file >= 0:
            os.close(file)
            partial.unlink(missing_ok=True)


def _write_file(
    store: Store, name: str, manifest: Manifest, file: int, on_progress: Progress
) -> None:
    """Write an image into a regular file: each worker loads a frame and writes where its contents
    belong; holes are left out."""
    cache = FrameCache(_CACHE_BYTES, store.loader().load)
    starts, refs = manifest.starts, manifest.refs

    def write(runs: range) -> int:
        entry = _use(cache, refs[runs[0]] >> fmt.REF_SLOT_BITS, name, starts[runs[0]])
        for run in runs:
            start, length = starts[run], starts[run + 1] - starts[run]
            _write(file, _slice(entry, refs[run], length, name, start), start)
        return starts[runs[-1] + 1] - starts[runs[0]]

    def finish(written: Future[int]) -> None:
        on_progress(written.result(), manifest.size)

    under_way: deque[Future[int]] = deque()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            for runs in _visits(manifest):
                if refs[runs[0]] == fmt.REF_HOLE:
                    on_progress(starts[runs[-1] + 1] - starts[runs[0]], manifest.size)
                    continue
                under_way.append(pool.submit(write, runs))
                if len(under_way) > _FRAMES_AHEAD:
                    finish(under_way.popleft())
            for written in under_way:
                finish(written)
        except BaseException:  # whatever it was, what has not begun need not be written
            pool.shutdown(cancel_futures=True)
            raise
    os.ftruncate(file, manifest.size)


def _visits(manifest: Manifest) -> Iterator[range]:
    """The runs of an image, those that follow each other in one frame, or are holes, together."""
    begin, frame = 0, 0
    for run, ref in enumerate(manifest.refs):
        if ref >> fmt.REF_SLOT_BITS != frame:
            if run > begin:
                yield range(begin, run)
            begin, frame = run, ref >> fmt.REF_SLOT_BITS
    if begin < len(manifest.refs):
        yield range(begin, len(manifest.refs))


def _write_stream(
    store: Store, name: str, manifest: Manifest, file: int, on_progress: Progress
) -> None:
    """Write an image in order, holes as zeros: into pipes and devices."""
    cache = FrameCache(_CACHE_BYTES, store.loader().load)
    starts, refs = manifest.starts, manifest.refs
    visits = list(_visits(manifest))
    upcoming = (runs for runs in visits if refs[runs[0]] != fmt.REF_HOLE)
    ahead: deque[Future[Entry]] = deque()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for runs in visits:
            start, end = starts[runs[0]], starts[runs[-1] + 1]
            while len(ahead) < _FRAMES_AHEAD and (following := next(upcoming, None)):
                at = following[0]
                ahead.append(
                    pool.submit(_use, cache, refs[at] >> fmt.REF_SLOT_BITS, name, starts[at])
                )
            if refs[runs[0]] == fmt.REF_HOLE:
                _write_zeros(file, end - start)
            else:
                entry = ahead.popleft().result()
                for run in runs:
                    length = starts[run + 1] - starts[run]
                    _write(file, _slice(entry, refs[run], length, name, starts[run]), None)
            on_progress(end - start, manifest.size)


def _use(cache: FrameCache, frame: int, name: str, offset: int) -> Entry:
    try:
        return cache.use(frame)
    except ChunkDamagedError as error:
        error.image, error.offset = name, offset
        raise


def _slice(entry: Entry, ref: int, length: int, name: str, offset: int) -> memoryview:
    slot = ref & fmt.REF_SLOT_MASK
    at = entry.offsets[slot] if slot < len(entry.offsets) else fmt.NOT_HERE
    piece = entry.view[at : at + length]
    if len(piece) != length:
        error = ChunkDamagedError(
            ref >> fmt.REF_SLOT_BITS, "its frame does not hold it", ref & fmt.REF_SLOT_MASK
        )
        error.image, error.offset = name, offset
        raise error
    return piece


def _write(file: int, data: memoryview, offset: int | None) -> None:
    while data:
        written = os.write(file, data) if offset is None else os.pwrite(file, data, offset)
        data = data[written:]
        if offset is not None:
            offset += written


def _write_zeros(file: int, length: int) -> None:
    while length > 0:
        part = min(length, len(_ZEROS))
        _write(file, memoryview(_ZEROS)[:part], None)
        length -= part
