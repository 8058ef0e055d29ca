"""Making room here by dropping what a remote has: frames with a place, the coldest first.

A frame is dropped only after its remote was asked, now, whether it still has the pack and is not
about to delete it; what has no place is never touched. Space comes back to the file system at once.
Runs on the calling thread, beside servers, imports and other evictions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from dedupstore import format as fmt, places
from dedupstore.compaction import compact
from dedupstore.env import Environment
from dedupstore.errors import DedupError, StoreDamagedError
from dedupstore.frames import FrameWriter, read_head
from dedupstore.places import PlaceRecord
from dedupstore.remote.configuration import find_number
from dedupstore.remote.layout import pack_path
from dedupstore.remote.remote import Remote

# Frames that one write transaction drops.
_BATCH_FRAMES = 256
# Pages that were dropped and come back only with a later commit: a second round takes the rest.
_ROUNDS = 3

Progress = Callable[[int, int], None]
"""Gets (bytes done since the last call, bytes to do)."""


@dataclass(frozen=True, slots=True)
class Evicted:
    """What an eviction did: frames dropped, the bytes of their records, and what the store's file
    takes on disk now."""

    frames: int
    freed_bytes: int
    file_bytes: int


class Evictor:
    """One eviction of one store. Not thread-safe."""

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._frames = self._freed = 0
        self._safe: dict[tuple[int, bytes], bool] = {}
        # Why a remote could not be asked: told when nothing could be dropped for that.
        self._refused: DedupError | None = None
        self._refusing: set[int] = set()
        self._remotes: dict[int, Remote] = {}
        self._condemned: dict[int, set[str]] = {}

    def run(self, limit: int, on_progress: Progress) -> Evicted:
        """Drop frames until the store's file takes `limit` bytes on disk or less, or nothing is
        left that may be dropped. Raises RemoteError if nothing was, because a remote could not be
        asked; StoreFullError."""
        for _ in range(_ROUNDS):
            excess = self._env.file_bytes() - limit
            if excess <= 0 or not self._drop(excess, on_progress):
                break
            compact(self._env, lambda _done, _all: None)
        if not self._frames and self._refused is not None and self._env.file_bytes() > limit:
            raise self._refused
        return Evicted(self._frames, self._freed, self._env.file_bytes())

    def _drop(self, excess: int, on_progress: Progress) -> bool:
        """Drop the coldest frames, `excess` bytes of them if there are as many; whether any."""
        done = 0
        candidates = iter(self._candidates())
        while done < excess and (batch := list(islice(candidates, _BATCH_FRAMES))):
            freed = self._drop_batch(batch, excess - done)
            done += freed
            on_progress(freed, excess)
        return done > 0

    def _drop_batch(self, frames: list[int], bytes_max: int) -> int:
        freed = 0
        with self._env.write() as txn:
            writer = FrameWriter(txn, self._env)
            for frame in frames:
                if freed >= bytes_max:
                    break
                with contextlib.suppress(StoreDamagedError):  # check's business
                    one = writer.empty(frame)
                    self._frames += one > 0
                    freed += one
            writer.close()
        self._freed += freed
        return freed

    def _candidates(self) -> Iterator[int]:
        """The frames that are here and may be dropped, the one that was unused for longest first;
        of the same age, what came last in its image first."""
        remote = self._env.remote
        if remote is None:
            return
        here: list[tuple[int, int, PlaceRecord]] = []
        with self._env.read() as txn:
            for frame, record in places.list_places(txn, remote):
                if isinstance(record, PlaceRecord) and record.places:
                    head = read_head(txn, self._env, frame)
                    if head is not None and not fmt.is_distant(head[0]):
                        here.append((record.used, -frame, record))
        here.sort(key=lambda one: one[:2])
        for _, frame, record in here:
            if any(self._has(place.remote, place.pack) for place in record.places):
                yield -frame

    def _has(self, number: int, pack: bytes) -> bool:
        """Whether a remote has a pack, and is going to keep it. One that cannot be asked is not
        asked again."""
        known = self._safe.get((number, pack))
        if known is None:
            try:
                known = number not in self._refusing and self._ask(number, pack)
            except DedupError as error:
                self._refused = error
                self._refusing.add(number)
                known = False
            self._safe[number, pack] = known
        return known

    def _ask(self, number: int, pack: bytes) -> bool:
        if number not in self._remotes:
            remote = find_number(self._env, number)
            documents = remote.condemned().values() if remote.objects.listable else ()
            self._condemned[number] = {path for _, paths in documents for path in paths}
            self._remotes[number] = remote
        condemned = pack_path(pack) in self._condemned[number]
        return not condemned and self._remotes[number].has_pack(pack)
