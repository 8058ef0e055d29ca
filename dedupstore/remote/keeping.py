"""Storing what was fetched: filled frames and times of last use, in few commits.

A read does not wait for a commit: what is fetched is served at once and stored by a thread of its
own, which takes everything that has come since its last commit. Until then it is found here. When
the disk is full, frames are served and not stored. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from dedupstore import format as fmt, places
from dedupstore.env import Environment
from dedupstore.errors import DedupError
from dedupstore.frames import FrameWriter

# What has come is committed this long after the first of it: one fsync for many frames.
_GATHER_SECONDS = 0.03
# Beyond that many bytes waiting to be stored, whoever brings more waits.
_WAITING_BYTES_MAX = 64 << 20
# After a commit has failed, what comes is not stored for so long.
_PAUSE_SECONDS = 5.0
_USES_SECONDS = 60.0


class Keeper:
    """The frames that are to be stored. `stored` and `unstored` count frames; `failure` is why
    the last ones that were not stored could not be."""

    def __init__(self, env: Environment, touched: set[int], on_done: Callable[[int], None]) -> None:
        """`touched`: numbers of frames that were used, which are taken out when that is noted.
        `on_done` gets the number of each frame that is stored, or not to be stored, and no longer
        held here."""
        self.stored = 0
        self.unstored = 0
        self.failure: DedupError | None = None
        self._env = env
        self._touched = touched
        self._on_done = on_done
        self._changed = threading.Condition()
        self._held: dict[int, bytearray] = {}
        self._bytes = 0
        self._closing = False
        self._paused_until = 0.0
        self._uses_at = time.monotonic() + _USES_SECONDS
        self._thread = threading.Thread(target=self._work, name="keeper", daemon=True)
        self._thread.start()

    def keep(self, frame: int, record: bytearray) -> None:
        """Store a frame's sealed record, which nobody changes from now on."""
        with self._changed:
            while self._bytes > _WAITING_BYTES_MAX and not self._closing:
                self._changed.wait()
            self._held[frame] = record
            self._bytes += len(record)
            self._changed.notify_all()

    def find(self, frame: int) -> bytearray | None:
        """A frame's record if it is held here: for as long as it may not be in the store."""
        return self._held.get(frame)

    def flush(self) -> None:
        """Wait until all that was given so far is stored, or will not be."""
        with self._changed:
            while self._held:
                self._changed.wait()

    def close(self) -> None:
        """Store what is held and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._held and not self._closing:
                    if not self._changed.wait(_USES_SECONDS):
                        break
                closing = self._closing
                gather = bool(self._held) and not closing
            if gather:
                time.sleep(_GATHER_SECONDS)
            self._store(dict(self._held))
            if closing or time.monotonic() >= self._uses_at:
                self._note_uses()
            if closing and not self._held:
                return

    def _store(self, frames: dict[int, bytearray]) -> None:
        stored = False
        if frames and time.monotonic() >= self._paused_until:
            try:
                self._commit(frames)
                stored = True
            except DedupError as error:  # a full disk above all: what was fetched has been served
                self.failure = error
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
        if stored:
            self.stored += len(frames)
        else:
            self.unstored += len(frames)
        with self._changed:
            for frame, record in frames.items():
                del self._held[frame]
                self._bytes -= len(record)
            self._changed.notify_all()
        for frame in frames:
            self._on_done(frame)

    def _commit(self, frames: dict[int, bytearray]) -> None:
        now = places.this_hour()
        with self._env.write() as txn:
            writer = FrameWriter(txn, self._env)
            remote = self._env.ensure_remote(txn)
            for frame in sorted(frames):
                # A copy: it is sealed anew, while somebody may be reading this one.
                if writer.fill(frame, bytearray(frames[frame])):
                    where = places.find_places(txn, remote, frame)
                    if where is not None:
                        places.put_places(txn, remote, frame, replace(where, used=now))
            writer.close()

    def _note_uses(self) -> None:
        """Note that frames were used, those whose record says an hour ago or more."""
        self._uses_at = time.monotonic() + _USES_SECONDS
        touched, now = self._touched, places.this_hour()
        frames = [touched.pop() for _ in range(len(touched))]
        remote = self._env.remote
        if not frames or remote is None:
            return
        try:
            with self._env.read() as txn:
                found = [(frame, places.find_places(txn, remote, frame)) for frame in frames]
            stale = [(f, where) for f, where in found if where is not None and where.used < now]
            if stale:
                with self._env.write() as txn:
                    for frame, where in stale:
                        if txn.get(fmt.frame_key(frame), db=remote.places) is not None:
                            places.put_places(txn, remote, frame, replace(where, used=now))
        except DedupError:
            return  # it only makes evict's choice a worse one
