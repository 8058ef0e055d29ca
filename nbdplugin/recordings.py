"""Traces that are being recorded in this server: which, and who reads into them.

Owns what links recordings to open exports: a recording sees everybody who reads its image, whether
they came before it or come after, by name or by digest, and those who read the image's views.
Readers that no recording is interested in are as they were. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dedupstore.errors import ImageNotFoundError, RecordingError
from dedupstore.manifest import Manifest
from dedupstore.reader import ImageReader, Note
from dedupstore.store import Store

if TYPE_CHECKING:
    from dedupstore.recording import Recorder
    from dedupstore.traces import Trace

# A recording that nobody has asked about for so long has lost its recorder.
ABANDONED_SECONDS = 60.0


@dataclass(eq=False, slots=True)
class _Recording:
    recorder: Recorder
    asked_at: float  # of time.monotonic


class Recordings:
    """The recordings of one server, by their images' digests."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._readers: set[ImageReader] = set()
        self._recordings: dict[bytes, _Recording] = {}

    # --- readers ---

    def joined(self, reader: ImageReader) -> None:
        """Somebody has opened an export."""
        with self._lock:
            self._readers.add(reader)
            if self._recordings:
                self._link(reader)

    def left(self, reader: ImageReader) -> None:
        """Somebody has closed an export, and reads no more: the reader is taken apart here, so that
        nobody links it again.

        It refers back to itself: the manifest would stay until Python looks for such cycles among
        old objects, which a server that allocates next to nothing may not do for days.
        """
        with self._lock:
            self._readers.discard(reader)
            del reader.read

    def open_digests(self) -> list[bytes]:
        """The digests of what is open, one for each reader."""
        with self._lock:
            return [reader.manifest.digest for reader in self._readers]

    # --- recordings ---

    def begin(self, image: bytes) -> None:
        """Record reads of an image. Raises RecordingError: somebody does already."""
        from dedupstore.recording import Recorder  # noqa: PLC0415 - for recordings only

        with self._lock:
            known = self._recordings.get(image)
            if known is not None and not _is_abandoned(known):
                raise RecordingError("it is being recorded already")
            self._recordings[image] = _Recording(Recorder(self._store.env), time.monotonic())
            self._link_all()

    def chunks(self, image: bytes) -> int:
        """How many chunks a recording has. Raises ImageNotFoundError: there is none."""
        return self._asked(image).recorder.chunks

    def trace(self, image: bytes) -> Trace:
        """What a recording has. Raises ImageNotFoundError."""
        return self._asked(image).recorder.trace(image)

    def end(self, image: bytes) -> None:
        """Record no more. Raises ImageNotFoundError."""
        self._asked(image)
        with self._lock:
            self._recordings.pop(image, None)
            self._link_all()

    def _asked(self, image: bytes) -> _Recording:
        with self._lock:
            recording = self._recordings.get(image)
            if recording is None:
                raise ImageNotFoundError(image.hex())
            recording.asked_at = time.monotonic()
            return recording

    # --- below: the lock is held ---

    def _link_all(self) -> None:
        for reader in self._readers:
            self._link(reader)

    def _link(self, reader: ImageReader) -> None:
        """Have a reader's reads noted by the recordings that they belong to, and by no other."""
        digest = reader.manifest.digest
        wanted = [
            recording
            for image, recording in self._recordings.items()
            if digest == image or digest in self._store.mounted_digests(image)
        ]
        if wanted or reader.observed:
            reader.observe(self._noting(wanted) if wanted else None)

    def _noting(self, recordings: list[_Recording]) -> Note:
        notes = [recording.recorder.note for recording in recordings]

        def note(manifest: Manifest, offset: int, length: int) -> None:
            for each in notes:
                each(manifest, offset, length)
            if any(map(_is_abandoned, recordings)):
                self._forget_abandoned()

        return note

    # --- not held ---

    def _forget_abandoned(self) -> None:
        with self._lock:
            for image, recording in list(self._recordings.items()):
                if _is_abandoned(recording):
                    del self._recordings[image]
            self._link_all()


def _is_abandoned(recording: _Recording) -> bool:
    return time.monotonic() - recording.asked_at > ABANDONED_SECONDS
