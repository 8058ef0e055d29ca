"""Fetching what nobody waits for: what images that a server has open are wished to have here.

Owns when that happens, not how: all of an image by one request at a time, none while a reader waits
for one; a trace by several at a time, ahead of the readers. One image after the other, until it is
done, paused or no longer open. A remote that fails, and a disk that is full, are tried again later.
Wishes are looked up once a second, so a pause or the end of it is noticed soon. One thread, which a
server has only if it opens an image with a wish. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from dedupstore import catalog, format as fmt, wishes
from dedupstore.env import Environment
from dedupstore.errors import DedupError, StoreFullError
from dedupstore.remote.fetching import Fetcher
from dedupstore.remote.grouping import IDLE, REPLAY
from dedupstore.remote.replaying import replay, survey

_LOOK_SECONDS = 1.0
# After an image could not be fetched: doubled each time up to the second number.
_RETRY_SECONDS = 2.0
_RETRY_SECONDS_MAX = 60.0
# Frames that are stored before it is looked whether they were: on a full disk they are not, and
# fetching all the rest would be for nothing.
_SLICE_FRAMES = 256
# How long a server that ends waits for a remote that does not answer.
_STOP_SECONDS = 2.0


@dataclass(eq=False, slots=True)
class _Image:
    """An open image: by how many, and what is known of it."""

    digest: bytes
    readers: int = 0
    wish: fmt.Wish | None = None  # what `left` was made for
    left: deque[int] = field(default_factory=deque)
    done: fmt.Wish | None = None  # the wish that was fulfilled
    retry_at: float = 0.0  # of time.monotonic
    retry_seconds: float = _RETRY_SECONDS
    stop: threading.Event = field(default_factory=threading.Event)


class Background:
    """The fetching of one server."""

    def __init__(self, env: Environment, fetcher: Callable[[], Fetcher]) -> None:
        self.bytes = 0
        self._env = env
        self._fetcher = fetcher
        self._changed = threading.Condition()
        self._images: dict[bytes, _Image] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="background", daemon=True)
        self._thread.start()

    def opened(self, digest: bytes) -> None:
        """Somebody has opened an image."""
        with self._changed:
            image = self._images.setdefault(digest, _Image(digest))
            image.readers += 1
            self._changed.notify_all()

    def closed(self, digest: bytes) -> None:
        """Somebody has closed an image."""
        with self._changed:
            image = self._images[digest]
            image.readers -= 1
            if not image.readers:
                del self._images[digest]
                image.stop.set()

    def close(self) -> None:
        """End the thread, after the requests that are under way unless these take long."""
        with self._changed:
            self._closing = True
            for image in self._images.values():
                image.stop.set()
            self._changed.notify_all()
        self._thread.join(_STOP_SECONDS)

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._closing:
                    return
                images = list(self._images.values())
            more = [self._attend(image) for image in images]
            with self._changed:
                # Who came meanwhile has not been attended to.
                if not any(more) and not self._closing and images == list(self._images.values()):
                    self._changed.wait(_LOOK_SECONDS if images else None)

    def _attend(self, image: _Image) -> bool:
        """Fetch a part of what is wished of an image; whether there is more to fetch now."""
        if time.monotonic() < image.retry_at:
            return False
        try:
            wish = self._wish(image)
            if wish is None or wish == image.done:
                return False
            if wish != image.wish:
                image.left, image.wish = deque(self._frames(image, wish)), wish
            self._fetch(image, wish)
        except DedupError:
            image.wish = None
            image.retry_at = time.monotonic() + image.retry_seconds
            image.retry_seconds = min(2 * image.retry_seconds, _RETRY_SECONDS_MAX)
            return False
        image.retry_seconds = _RETRY_SECONDS
        if image.wish and not image.left:
            image.done, image.wish = wish, None
        return image.wish is not None

    def _wish(self, image: _Image) -> fmt.Wish | None:
        """What is to be fetched of an image now; None: nothing."""
        with self._env.read() as txn:
            wish = wishes.find_wish(txn, self._env, image.digest)
        if wish is None or wish.paused or wish.prefetch == fmt.PREFETCH_NONE:
            return None
        return wish

    def _frames(self, image: _Image, wish: fmt.Wish) -> tuple[int, ...]:
        with self._env.read() as txn:
            manifest = catalog.read_manifest(txn, self._env, image.digest)
        if wish.prefetch == fmt.PREFETCH_ALL:
            return survey(self._env, manifest).missing_frames
        trace = wishes.find_trace(self._env, image.digest)
        return () if trace is None else replay(self._env, manifest, trace).missing_frames

    def _fetch(self, image: _Image, wish: fmt.Wish) -> None:
        """Fetch the next frames of an image, as long as it is open and the wish is the same. Raises
        DedupError."""
        looked_at = time.monotonic()

        def on_progress(brought: int) -> None:
            nonlocal looked_at
            self.bytes += brought
            if time.monotonic() - looked_at >= _LOOK_SECONDS:
                looked_at = time.monotonic()
                if self._wish(image) != wish:
                    image.stop.set()

        frames = [image.left.popleft() for _ in range(min(_SLICE_FRAMES, len(image.left)))]
        fetcher = self._fetcher()
        _, unstored = fetcher.kept
        # A trace is what its readers are about to need.
        pace = REPLAY if wish.prefetch == fmt.PREFETCH_TRACE else IDLE
        fetcher.fetch_all(frames, on_progress, pace, image.stop)
        if fetcher.kept[1] > unstored:
            raise StoreFullError("no room for what was fetched")
        if image.stop.is_set():
            image.wish = None
            image.stop.clear()  # whoever closes an image takes it off the list as well
