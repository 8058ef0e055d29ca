"""Which packs are being read in order, and how much one request may bring of them.

Requests that follow one another in a pack may bring more and more, as a kernel's readahead does;
others bring a frame and its next neighbours. Owns that judgement and no bytes. Thread-safe.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from dedupstore.places import Place

# What one request brings beyond the frame that is wanted, up to so many bytes in all, at first and
# at most.
REQUEST_BYTES_MIN = 64 << 10
REQUEST_BYTES_MAX = 2 << 20
# From this window on a pack is read in order: what comes next may come before it is asked for, and
# what is here already, or of other images, may come along where it is no longer than the gap: a
# request less pays for it.
_ORDERLY_BYTES = 512 << 10
GAP_BYTES = 128 << 10
# After so many bytes in order, what comes next is fetched before the reader is through with what
# came. Programs that start read less than that in order, of what they need.
_STEADY_BYTES = 8 << 20


@dataclass(slots=True)
class Stream:
    """A pack that is being read: how far it has been asked for, what one request may bring, and how
    many bytes were asked for one behind the other."""

    end: int
    window: int = REQUEST_BYTES_MIN
    ordered: int = 0

    @property
    def gap(self) -> int:
        """How much that is not wanted may come between what is."""
        return GAP_BYTES if self.window >= _ORDERLY_BYTES else 0

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

    def begin(self, place: Place, window_max: int, follows: Stream | None = None) -> Stream:
        """A request begins at this place. `follows`: what was read before, in another pack, of
        which this is known to be the continuation."""
        with self._lock:
            stream = self._streams.get(place.pack)
            if stream is None or not stream.is_at(place.offset):
                stream = self._streams[place.pack] = Stream(place.offset)
            elif place.offset >= stream.end:
                stream.window = max(min(2 * stream.window, window_max), REQUEST_BYTES_MIN)
                if place.offset > stream.end + GAP_BYTES:
                    stream.ordered = 0
            if follows is not None:
                stream.window = max(stream.window, follows.window)
                stream.ordered = max(stream.ordered, follows.ordered)
            self._extend(stream, place.offset + place.length)
            return stream

    def asked(self, stream: Stream, end: int) -> None:
        """The request goes on to here."""
        with self._lock:
            self._extend(stream, end)

    def _extend(self, stream: Stream, end: int) -> None:
        if end > stream.end:
            stream.ordered += end - stream.end
            stream.end = end

    def is_next(self, place: Place) -> bool:
        """Whether a frame that nobody waits for lies where its pack is being read in order."""
        stream = self._streams.get(place.pack)
        return stream is not None and stream.window >= _ORDERLY_BYTES and stream.is_at(place.offset)
