"""Fetching an image's EROFS metadata: all that `ls -lR` reads, and nothing of files' contents but
what lies in the same frames.

Owns the way from what a walk is about to read to requests: a walk tells a directory level at a
time, and each level's frames come at once. Read one after the other, each would be a round trip.
Runs on the calling thread and the fetcher's.
"""

from __future__ import annotations

from collections.abc import Iterable

from dedupstore import format as fmt
from dedupstore.cache import FrameCache, Loader
from dedupstore.erofs import file_extents, is_erofs, read_tree
from dedupstore.errors import ErofsError
from dedupstore.manifest import Manifest
from dedupstore.reader import ImageReader, ReadCounters
from dedupstore.remote.fetching import Fetcher
from dedupstore.remote.grouping import BULK

_CACHE_BYTES = 256 << 20
_BEGINNING_BYTES = 4096


class _NoReadahead:
    """Stands for readers' threads: what comes next is known here."""

    def request(self, _frame: int) -> bool:
        return True

    def loaded(self) -> None:
        return


def fetch_metadata(fetcher: Fetcher, manifest: Manifest, load: Loader) -> bool:
    """Fetch the metadata of an image; False: it is no EROFS. Of one that is malformed, or whose
    contents are compressed, what can be found. Raises RemoteError, ChunkDamagedError."""
    cache = FrameCache(_CACHE_BYTES, load)
    reader = ImageReader(
        manifest.digest.hex()[:16],
        manifest,
        cache,
        _NoReadahead(),  # type: ignore[arg-type]
        ReadCounters(),
    )

    def read_at(offset: int, length: int) -> bytes:
        buffer = bytearray(max(0, min(length, manifest.size - offset)))
        if buffer:
            reader.read(memoryview(buffer), offset)
        return bytes(buffer)

    def bring(ranges: Iterable[tuple[int, int]]) -> None:
        runs = (run for offset, length in ranges for run in manifest.runs(offset, length))
        frames = dict.fromkeys(ref >> fmt.REF_SLOT_BITS for _, _, ref in runs if ref)
        fetcher.bring_all(frames, lambda _brought: None, BULK)

    try:
        if not is_erofs(read_at(0, _BEGINNING_BYTES)):
            return False
        try:
            read_tree(read_at, manifest.size, manifest.data_bytes, bring)
        except ErofsError:
            file_extents(read_at, manifest.size)
    except ErofsError:
        pass  # whoever mounts it will be told
    finally:
        del reader.read  # it refers back to its reader
        fetcher.keeper.flush()
    return True
