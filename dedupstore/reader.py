"""The hot path: fill this buffer from this image at this offset.

Owns reads of one open image through the shared cache, sequential readahead and the counters. A hit
costs one bisect, one dictionary lookup and one copy per run, takes no lock and allocates nothing of
the request's size. Thread-safe: any number of threads may read through one `ImageReader`.
"""

from __future__ import annotations

import os
import queue
import threading
from bisect import bisect_right
from collections.abc import Callable

from dedupstore import format as fmt
from dedupstore.cache import Entry, FrameCache
from dedupstore.errors import ChunkDamagedError, DedupError, RemoteError
from dedupstore.manifest import Manifest

# Image bytes fetched ahead of a sequential reader: the window doubles from the first number to the
# second as the sequence goes on, like the kernel's.
_AHEAD_BYTES_MIN = 512 << 10
_AHEAD_BYTES_MAX = 4 << 20
# How far, in runs, a read may lie behind the last one and still belong to its sequence.
_DISORDER_RUNS = 16
_ZEROS = memoryview(bytes(1 << 20))


_NOTHING = 0  # is no frame's number

Note = Callable[[Manifest, int, int], None]
"""Gets what is about to be read: the image, offset and length in bytes. Must not raise."""


class ReadCounters:
    """Totals over all readers of a process.

    Plain `+=` is exact under the GIL of CPython 3.11 to 3.13, which changes hands only at calls and
    backward jumps: see tests/unit/test_reader.py, which hammers them.
    """

    __slots__ = ("bytes", "errors", "hits", "prefetches")

    def __init__(self) -> None:
        self.bytes = 0
        self.errors = 0
        self.hits = 0
        self.prefetches = 0


class Prefetcher:
    """Threads that load frames ahead of readers, so that one reader can use two cores.

    Requests beyond what the threads can keep up with are dropped: readahead that comes late is
    work done twice. Once nothing was loaded for a while, one of them tidies up: it calls `on_idle`
    and collapses the cache's slabs into huge pages. Thread-safe.
    """

    _BACKLOG_MAX = 64
    _IDLE_SECONDS = 0.5

    def __init__(
        self,
        cache: FrameCache,
        counters: ReadCounters,
        on_idle: Callable[[], None] = lambda: None,
        is_worth: Callable[[int], bool] = lambda _frame: True,
    ) -> None:
        """`is_worth` says of a frame that is not in the cache whether it is worth loading ahead."""
        self._cache = cache
        self._is_worth = is_worth
        self._counters = counters
        self._on_idle = on_idle
        self._untidy = False
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"prefetch-{i}", daemon=True)
            for i in range(len(os.sched_getaffinity(0)))
        ]
        for thread in self._threads:
            thread.start()

    def request(self, frame: int) -> bool:
        """Ask for a frame; False when it was dropped."""
        if self._queue.qsize() >= self._BACKLOG_MAX:
            return False
        self._queue.put(frame)
        return True

    def loaded(self) -> None:
        """Note that a frame was loaded, so that there is something to tidy up later."""
        if not self._untidy:
            self._untidy = True
            self._queue.put(_NOTHING)  # wakes a thread that waits without end

    def _work(self) -> None:
        while True:
            try:
                frame = self._queue.get(timeout=self._IDLE_SECONDS if self._untidy else None)
            except queue.Empty:
                self._tidy()
                continue
            if frame is None:
                return
            if frame and frame not in self._cache.entries and self._is_worth(frame):
                self._counters.prefetches += 1
                self._cache.prefetch(frame)
                self._untidy = True

    def _tidy(self) -> None:
        if not self._untidy:  # another thread does it
            return
        self._untidy = False
        self._on_idle()
        slabs = self._cache.slabs
        while slabs.collapsible and self._queue.empty():
            slabs.collapse()

    def close(self) -> None:
        """Stop the threads and wait for them."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()


class ImageReader:
    """Reads of one open image. `read(buffer, offset)` is the hot path, built by `_bind`."""

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        cache: FrameCache,
        prefetcher: Prefetcher,
        counters: ReadCounters,
        renew: Callable[[Manifest], Manifest] | None = None,
        expect: Callable[[list[int]], None] = lambda _frames: None,
    ) -> None:
        """`renew` gives the image's manifest as it is in the store now: the one it gets, unless the
        image was mended meanwhile. `expect` gets the frames of a request, if they are several, none
        of which is in the cache, before the first is loaded."""
        self.name = name
        self._renew = renew
        self._expect = expect
        self.manifest = manifest
        self._cache = cache
        self._prefetcher = prefetcher
        self._counters = counters
        # Sequential readahead: the last run used for the first time, the window in bytes, and the
        # first run not asked for yet. Races between threads of one client only blur it.
        self._last_run = 0
        self._ahead_bytes = 0
        self._ahead = 0
        self._note: Note | None = None
        self.read: Callable[[memoryview, int], None] = self._bind()

    def observe(self, note: Note | None) -> None:
        """Have `note` called before each read from now on; None: no longer. Readers that nobody
        observes do not know of it: another `read` takes the place of theirs."""
        self._note = note
        self.read = self._bind()

    @property
    def observed(self) -> bool:
        """Whether somebody observes."""
        return self._note is not None

    def _bind(self) -> Callable[[memoryview, int], None]:
        """Build `read` with all it needs in locals: attribute chains cost a third of a hit."""
        cache, counters = self._cache, self._counters
        starts, refs = self.manifest.starts, self.manifest.refs
        index, shift = self.manifest.index, self.manifest.shift
        cached = cache.entries.get
        miss, recover, fail, fill_zeros = self._miss, self._recover, _fail, _fill_zeros
        slot_bits, slot_mask = fmt.REF_SLOT_BITS, fmt.REF_SLOT_MASK
        bisect = bisect_right

        def read(buffer: memoryview, offset: int) -> None:
            """Fill `buffer` (bytes, writable, the caller's) from `offset` on, bytes from the
            image's start; the range must be inside the image. Raises DedupError; the buffer is
            then undefined."""
            length = len(buffer)
            counters.bytes += length
            if not length:
                return
            at = offset >> shift
            run = bisect(starts, offset, index[at], index[at + 1] + 1) - 1
            inside = offset - starts[run]  # of this run, what lies before the request
            done = 0
            try:
                while True:
                    end = done + starts[run + 1] - starts[run] - inside
                    if end > length:  # noqa: PLR1730 - min() would cost a call
                        end = length
                    ref = refs[run]
                    if ref:
                        entry = cached(ref >> slot_bits)
                        if entry is None or entry.epoch != cache.epoch:
                            entry = miss(entry, run, length - done)
                        else:
                            counters.hits += 1
                        try:
                            at = entry.offsets[ref & slot_mask] + inside
                            buffer[done:end] = entry.view[at : at + end - done]
                        except (ValueError, IndexError):
                            fail(ref)
                    else:
                        fill_zeros(buffer[done:end])
                    if end == length:
                        return
                    done = end
                    inside = 0
                    run += 1
            except DedupError as error:
                recover(buffer[done:], offset + done, error)

        if self._note is None:
            return read
        manifest, note = self.manifest, self._note

        def read_noted(buffer: memoryview, offset: int) -> None:
            note(manifest, offset, len(buffer))
            read(buffer, offset)

        return read_noted

    def _miss(self, entry: Entry | None, run: int, left: int) -> Entry:
        """The entry of a run whose frame is absent, or used for the first time in this epoch; of
        the request so many bytes are `left`, or a run less."""
        if entry is None:
            frame = self.manifest.refs[run] >> fmt.REF_SLOT_BITS
            if left > self.manifest.starts[run + 1] - self.manifest.starts[run]:
                self._expect_all(run, left)
            entry = self._cache.get(frame)
            self._prefetcher.loaded()
        else:
            self._counters.hits += 1
        self._cache.touch(entry)
        self._read_ahead(run)
        return entry

    def _expect_all(self, run: int, left: int) -> None:
        """Say which frames the rest of a request needs, that begins in this run: what has to come
        from afar then comes at once."""
        starts, refs, cached = self.manifest.starts, self.manifest.refs, self._cache.entries
        end = min(starts[run] + left, self.manifest.size)
        frames: dict[int, None] = {}
        while starts[run] < end:
            frame = refs[run] >> fmt.REF_SLOT_BITS
            if frame and frame not in cached:
                frames[frame] = None
            run += 1
        if len(frames) > 1:
            self._expect(list(frames))

    def _located(self, error: DedupError, offset: int) -> DedupError:
        self._counters.errors += 1
        if isinstance(error, ChunkDamagedError | RemoteError):
            error.image, error.offset = self.name, offset
        return error

    def _recover(self, buffer: memoryview, offset: int, error: DedupError) -> None:
        """Read the rest of a request again if the image was mended since it was opened: what was
        damaged is elsewhere then, and the manifest leads there. Else raise the error."""
        if not self._renewed(error):
            raise self._located(error, offset)
        self._counters.bytes -= len(buffer)
        self.read(buffer, offset)

    def _renewed(self, error: DedupError) -> bool:
        """Whether there is another manifest of this image than the one that led to damage."""
        if self._renew is None or not isinstance(error, ChunkDamagedError):
            return False
        manifest = self._renew(self.manifest)
        if manifest is self.manifest:
            return False
        self.manifest = manifest
        self.read = self._bind()
        return True

    def _read_ahead(self, run: int) -> None:
        """Ask for the frames behind `run` when reads arrive in order, or nearly: a client with
        several requests in flight overtakes itself."""
        starts, refs = self.manifest.starts, self.manifest.refs
        last, self._last_run = self._last_run, run
        if not last - _DISORDER_RUNS <= run <= max(self._ahead, last + 1):
            self._ahead_bytes = 0
            self._ahead = run + 1
            return
        self._ahead_bytes = min(max(self._ahead_bytes * 2, _AHEAD_BYTES_MIN), _AHEAD_BYTES_MAX)
        limit = min(starts[run + 1] + self._ahead_bytes, self.manifest.size)
        position = max(self._ahead, run + 1)
        while position < len(refs) and starts[position] < limit:
            frame = refs[position] >> fmt.REF_SLOT_BITS
            if frame and frame not in self._cache.entries and not self._prefetcher.request(frame):
                break
            position += 1
        self._ahead = position

    def load(self, offset: int, length: int) -> None:
        """Bring a range into the cache (NBD_CMD_CACHE). Raises DedupError."""
        for start, _, ref in self.manifest.runs(offset, length):
            if ref:
                try:
                    self._cache.get(ref >> fmt.REF_SLOT_BITS)
                except DedupError as error:
                    if self._renewed(error):
                        self.load(offset, length)
                        return
                    raise self._located(error, max(start, offset)) from error


def _fail(ref: int) -> None:
    frame, slot = ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK
    raise ChunkDamagedError(frame, "its frame does not hold it", slot)


def _fill_zeros(buffer: memoryview) -> None:
    for begin in range(0, len(buffer), len(_ZEROS)):
        part = buffer[begin : begin + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]
