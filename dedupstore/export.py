"""Writing an image back: byte for byte, holes as holes, decompressed on every core.

Stretches of the image are put together ahead on a pool, each written by one call, from a cache of
their own: an image goes back and forth between frames, those of metadata and of contents it shares
with others. A file appears under its name only when it is complete. As after cp, it is on disk when
the kernel has written it back: syncing would double the time. Runs on the calling thread and a pool
of its own; any number may run at once.
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

_STRETCHES_AHEAD = 16
# A stretch ends with the run that makes it so long, or has so many runs: fewer than IOV_MAX.
_STRETCH_BYTES = 1 << 20
_STRETCH_RUNS = 1000
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
    source = _Source(store, name, manifest)

    def write(runs: range) -> int:
        start, length = source.bounds(runs)
        _write(file, source.pieces(runs), start)
        return length

    under_way: deque[Future[int]] = deque()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            for runs in _stretches(manifest):
                if source.is_hole(runs):
                    on_progress(source.bounds(runs)[1], manifest.size)
                    continue
                under_way.append(pool.submit(write, runs))
                if len(under_way) > _STRETCHES_AHEAD:
                    on_progress(under_way.popleft().result(), manifest.size)
            for written in under_way:
                on_progress(written.result(), manifest.size)
        except BaseException:  # whatever it was, what has not begun need not be written
            pool.shutdown(cancel_futures=True)
            raise
    os.ftruncate(file, manifest.size)


def _stretches(manifest: Manifest) -> Iterator[range]:
    """The runs of an image, those that lie between holes in stretches, each hole alone."""
    starts, begin = manifest.starts, 0
    for run, ref in enumerate(manifest.refs):
        hole = ref == fmt.REF_HOLE
        if hole and run > begin:
            yield range(begin, run)
            begin = run
        long = starts[run + 1] - starts[begin] >= _STRETCH_BYTES
        if hole or long or run + 1 - begin >= _STRETCH_RUNS:
            yield range(begin, run + 1)
            begin = run + 1
    if begin < len(manifest.refs):
        yield range(begin, len(manifest.refs))


def _write_stream(
    store: Store, name: str, manifest: Manifest, file: int, on_progress: Progress
) -> None:
    """Write an image in order, holes as zeros: into pipes and devices."""
    source = _Source(store, name, manifest)
    stretches = list(_stretches(manifest))
    upcoming = (runs for runs in stretches if not source.is_hole(runs))
    ahead: deque[Future[list[_Piece]]] = deque()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for runs in stretches:
            while len(ahead) < _STRETCHES_AHEAD and (following := next(upcoming, None)):
                ahead.append(pool.submit(source.pieces, following))
            length = source.bounds(runs)[1]
            if source.is_hole(runs):
                _write_zeros(file, length)
            else:
                _write(file, ahead.popleft().result(), None)
            on_progress(length, manifest.size)


_Piece = tuple[Entry, memoryview]
"""Bytes of an image, and the entry that owns them."""


class _Source:
    """An image, and the frames that were loaded for it. Thread-safe."""

    def __init__(self, store: Store, name: str, manifest: Manifest) -> None:
        self._cache = FrameCache(_CACHE_BYTES, store.loader().load)
        self._name = name
        self._starts, self._refs = manifest.starts, manifest.refs

    def is_hole(self, runs: range) -> bool:
        """Whether a stretch is a hole."""
        return self._refs[runs[0]] == fmt.REF_HOLE

    def bounds(self, runs: range) -> tuple[int, int]:
        """Offset in the image and length of a stretch, in bytes."""
        start = self._starts[runs[0]]
        return start, self._starts[runs[-1] + 1] - start

    def pieces(self, runs: range) -> list[_Piece]:
        """The bytes of a stretch that is no hole. Raises ChunkDamagedError."""
        entries: dict[int, Entry] = {}
        pieces = []
        for run in runs:
            frame = self._refs[run] >> fmt.REF_SLOT_BITS
            entry = entries.get(frame)
            try:
                if entry is None:
                    entry = entries[frame] = self._cache.use(frame)
                pieces.append((entry, self._slice(entry, run)))
            except ChunkDamagedError as error:
                error.image, error.offset = self._name, self._starts[run]
                raise
        return pieces

    def _slice(self, entry: Entry, run: int) -> memoryview:
        slot = self._refs[run] & fmt.REF_SLOT_MASK
        length = self._starts[run + 1] - self._starts[run]
        at = entry.offsets[slot] if slot < len(entry.offsets) else fmt.NOT_HERE
        piece = entry.view[at : at + length]
        if len(piece) != length:
            raise ChunkDamagedError(entry.frame, "its frame does not hold it", slot)
        return piece


def _write(file: int, pieces: list[_Piece], offset: int | None) -> None:
    """Write pieces one behind the other: at an offset, or where the file is."""
    data = [piece for _, piece in pieces]
    done = 0
    while done < len(data):
        if offset is None:
            written = os.writev(file, data[done:])
        else:
            written = os.pwritev(file, data[done:], offset)
            offset += written
        while done < len(data) and written >= len(data[done]):
            written -= len(data[done])
            done += 1
        if written:
            data[done] = data[done][written:]


def _write_zeros(file: int, length: int) -> None:
    while length > 0:
        length -= os.write(file, memoryview(_ZEROS)[:length])
