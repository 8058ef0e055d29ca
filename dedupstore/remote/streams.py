"""Which packs are being read in order, and how much one request may bring of them.

Who has read much in order is brought more at a time, and in the end before he asks, as a kernel's
readahead does it, but never more than a part of what he has read: others bring a frame and its next
neighbours. Owns that judgement and no bytes. Thread-safe.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from dedupstore.places import Place

# What one request brings beyond the frame that is wanted, up to so many bytes in all, at first and
# at most.
REQUEST_BYTES_MIN = 64 << 10
REQUEST_BYTES_MAX = 2 << 20
# After so many bytes in order a pack is read in order. Programs that start read less, of most files
# that they need: with half of it, starting Python brought 9 to 13 MB instead of 7.5, no sooner.
_ORDERLY_BYTES = 1 << 20
# A request then brings at most this part of what was read in order; and what is here already, or of
# other images, may come along where it is no longer than the gap: a request less pays for it.
_PART = 2
GAP_BYTES = 128 << 10
# After so many bytes in order, what comes next is fetched before the reader is through with what
# came.
_STEADY_BYTES = 8 << 20
# Frames that may be passed over in looking for what comes next, in the same pack or another:
# metadata, mostly, which lies elsewhere.
PASSED_FRAMES_MAX = 4


@dataclass(slots=True)
class Stream:
    """A pack that is being read: how far it has been asked for; what one request may bring; how
    many bytes were asked for one behind the other; and if that is in order, which frame is next."""

    end: int
    window: int = REQUEST_BYTES_MIN
    ordered: int = 0
    frame: int = 0

    @property
    def is_orderly(self) -> bool:
        """Whether it is being read in order."""
        return self.ordered >= _ORDERLY_BYTES

    @property
    def gap(self) -> int:
        """How much that is not wanted may come between what is."""
        return GAP_BYTES if self.is_orderly else 0

    @property
    def is_steady(self) -> bool:
        """Whether its reader is sure to go on."""
        return self.ordered >= _STEADY_BYTES

    def is_at(self, offset: int) -> bool:
        """Whether a request that begins here belongs to this reading. Several readers at once, and
        readahead, ask in no strict order."""
        return self.end - 4 * self.window <= offset <= self.end + self.window


class Streams:
    """The packs that one process is reading."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[bytes, Stream] = {}
        # What was read in order up to a frame: what follows may lie in another pack.
        self._next: dict[int, int] = {}

    def begin(self, frame: int, place: Place, window_max: int) -> Stream:
        """A request begins with this frame at this place, and may bring the stream's window, but no
        more than `window_max`."""
        with self._lock:
            stream = self._at(frame, place)
            if place.offset > stream.end + GAP_BYTES:
                stream.ordered = 0
            part = stream.ordered // _PART if stream.is_orderly else 0
            stream.window = max(min(part, window_max), REQUEST_BYTES_MIN)
            self._extend(stream, frame, place)
            return stream

    def asked(self, stream: Stream, frame: int, place: Place) -> None:
        """The request goes on to this frame's end."""
        with self._lock:
            self._extend(stream, frame, place)

    def asked_for(self, frame: int, place: Place) -> None:
        """This frame is asked for, because somebody needs it."""
        with self._lock:
            self._extend(self._at(frame, place), frame, place)

    def _at(self, frame: int, place: Place) -> Stream:
        """The stream that a frame belongs to: of its pack, or of the one whose reading goes on with
        it, or a new one."""
        stream = self._streams.get(place.pack)
        if stream is None or not stream.is_at(place.offset):
            stream = self._streams[place.pack] = Stream(place.offset)
            expected = range(frame - PASSED_FRAMES_MAX, frame + 1)
            before = next((at for at in expected if at in self._next), None)
            if before is not None:
                stream.ordered = self._next.pop(before)
        return stream

    def _extend(self, stream: Stream, frame: int, place: Place) -> None:
        end = place.offset + place.length
        if end > stream.end:
            stream.ordered += end - stream.end
            stream.end = end
            if stream.is_orderly:
                self._next.pop(stream.frame, None)
                stream.frame = frame + 1
                self._next[stream.frame] = stream.ordered

    def is_next(self, place: Place) -> bool:
        """Whether a frame that nobody waits for lies where its pack is being read in order."""
        stream = self._streams.get(place.pack)
        return stream is not None and stream.is_orderly and stream.is_at(place.offset)
