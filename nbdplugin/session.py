"""The logic behind the nbdkit callbacks, without nbdkit: configuration, exports, open images.

Owns which images are served and under which names, and wires store, cache and readahead together.
`Config` belongs to nbdkit's main thread before the fork; a `Session` is made after it and is
thread-safe.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from dedupstore.cache import FrameCache
from dedupstore.constants import SOCKET_PATH_BYTES_MAX
from dedupstore.errors import ImageNotFoundError, UsageError
from dedupstore.manifest import Manifest
from dedupstore.reader import ImageReader, Prefetcher, ReadCounters
from dedupstore.store import Store
from nbdplugin.recordings import Recordings

if TYPE_CHECKING:
    from dedupstore.remote.background import Background

_GLOB_CHARACTER = re.compile("[*?[]")
_DIGEST_EXPORT = re.compile("/([0-9a-f]{64})")
# Without `cache=`: this part of the machine's memory, at most that much.
_CACHE_MEMORY_SHARE = 8
_CACHE_BYTES_MAX = 4 << 30


# mallopt(3): M_ARENA_MAX of glibc's malloc.h, and how many of those heaps threads share.
_M_ARENA_MAX = -8
_ARENAS = 2


def limit_arenas() -> None:
    """Have all threads allocate from few heaps, before they are started. No effect without glibc.

    The C library would give each thread a heap of its own, eight for each processor: frames are
    loaded by whichever thread misses, and each heap keeps room for the largest number of them that
    ever lay in it. Measured with 16 threads a connection: 82 MiB instead of 59 for a cache of 48,
    reached only after hundreds of connections. Next to all allocations are made under the GIL, so
    there is nobody to wait for.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


def default_cache_bytes() -> int:
    """The cache budget when the user gives none, in bytes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(memory // _CACHE_MEMORY_SHARE, _CACHE_BYTES_MAX)


@dataclass(slots=True)
class Config:
    """The plugin's parameters. Paths are absolute: nbdkit changes to / when it daemonises."""

    store: Path
    images: list[str] = field(default_factory=list)
    cache_bytes: int = field(default_factory=default_cache_bytes)
    metrics: Path | None = None
    files: Path | None = None
    connections: int | None = None
    pull: str | None = None

    def validate(self) -> None:
        """Open and close the store and look for the images, so that whoever starts the server sees
        on the terminal what is wrong. Raises DedupError."""
        with Store(self.store) as store:
            # A damaged page could crash nbdkit without a word. The index is never served from.
            store.env.verify(skip=frozenset({"chunks"}))
            if self.pull is not None:
                store.require_remote(self.pull)
            for pattern in self.images:
                if not _is_glob(pattern) and self.pull is None:
                    store.image(pattern)
        if self.metrics is not None:
            _require_socket_path(self.metrics)


def _require_socket_path(path: Path) -> None:
    """Raise UsageError when a metrics socket cannot be made: once nbdkit has daemonised, nobody
    would see why it did not start."""
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(f"metrics={path}: path is longer than {SOCKET_PATH_BYTES_MAX} bytes")
    if not path.parent.is_dir():
        raise UsageError(f"metrics={path}: no such directory")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"metrics={path}: no permission to create it")
    if path.exists() and not path.is_socket():
        raise UsageError(f"metrics={path}: exists and is not a socket")
    if _is_served(path):
        raise UsageError(f"metrics={path}: another server uses it")


def _is_served(path: Path) -> bool:
    """Whether somebody listens on a unix socket: what a killed server leaves behind refuses."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _is_glob(pattern: str) -> bool:
    return _GLOB_CHARACTER.search(pattern) is not None


class Session:
    """A running server: the open store, the one cache, and the exports."""

    def __init__(self, config: Config) -> None:
        """Open the store. Raises DedupError."""
        limit_arenas()
        self._patterns = config.images
        self._pull = config.pull
        self.store = Store(config.store)
        self.loader = self.store.loader()
        if self.store.env.remote is not None:
            self.store.fetcher()  # which notes what is used, too
        if config.pull is not None:
            self.store.prepare_pull(config.pull)
        self.counters = ReadCounters()
        self.cache = FrameCache(config.cache_bytes, self.loader.load)
        self._prefetcher = Prefetcher(
            self.cache,
            self.counters,
            self._forget_cached_pages,
            self.loader.is_worth_loading_ahead,
        )
        self.recordings = Recordings(self.store)
        self.background: Background | None = None
        self._lock = threading.Lock()  # who has opened what
        self._pulls: dict[str, threading.Lock] = {}  # names that are being pulled
        self.open_exports = 0

    def close(self) -> None:
        """Stop the readahead and close the store; every export must be closed."""
        self._prefetcher.close()
        if self.background is not None:
            self.background.close()
        self.store.close()

    def _forget_cached_pages(self) -> None:
        """While the cache has room, what it holds is not needed a second time, compressed, in the
        kernel's. A full one is better off with the kernel's behind it."""
        if self.cache.has_room:
            self.store.env.forget_cached_pages()

    def exports(self) -> Iterator[str]:
        """The names that are served now, those of the first `image=` first."""
        seen: set[str] = set()
        for pattern in self._patterns or ["*"]:
            for name in self.store.names(_literal_prefix(pattern)):
                if name not in seen and _matches(name, pattern):
                    seen.add(name)
                    yield name

    def default_export(self) -> str:
        """What the empty export name stands for: the first image of the first `image=`, never one
        of the next, which would be another image's bytes. Raises ImageNotFoundError."""
        pattern = self._patterns[0] if self._patterns else "*"
        prefix = _literal_prefix(pattern)
        name = self.store.first_name(prefix, lambda name: _matches(name, pattern))
        if name is None and self._pull is not None and not _is_glob(pattern):
            return pattern
        if name is None:
            raise ImageNotFoundError(pattern)
        return name

    def open(self, export: str) -> ImageReader:
        """Open an export for a client: an image's name, or "/" and the digest of an image or view,
        which no name can be. Raises ImageNotFoundError for what is not served."""
        name = export or self.default_export()
        by_digest = _DIGEST_EXPORT.fullmatch(name)
        if by_digest is None:
            if self._patterns and not any(_matches(name, pattern) for pattern in self._patterns):
                raise ImageNotFoundError(name)
            manifest = self._open_manifest(name)
        else:
            digest = bytes.fromhex(by_digest[1])
            if self._patterns and not self.serves(digest):
                raise ImageNotFoundError(name)
            manifest = self.store.open_digest(digest)
        self.open_exports += 1
        reader = ImageReader(
            name,
            manifest,
            self.cache,
            self._prefetcher,
            self.counters,
            self.store.renew_manifest,
            self.loader.expect,
        )
        with self._lock:
            self.recordings.joined(reader)
            self._fetch_ahead(manifest.digest)
        return reader

    def _open_manifest(self, name: str) -> Manifest:
        """The manifest of an image, which is pulled if the store has none of that name."""
        if self._pull is not None and not self.store.has_name(name):
            with self._lock:
                pulling = self._pulls.setdefault(name, threading.Lock())
            try:
                with pulling:
                    if not self.store.has_name(name):
                        self.store.pull(self._pull, name, name, _silent, lazy=True, begin=True)
            finally:
                with self._lock:
                    self._pulls.pop(name, None)
        return self.store.open_manifest(name)

    def _fetch_ahead(self, image: bytes) -> None:
        """Have fetched what is wished of an image that somebody has opened. The lock is held."""
        if self.background is not None:
            self.background.opened(image)
        elif self.store.has_wish(image):
            # Only now: most servers have nothing to do with remotes.
            from dedupstore.remote.background import Background  # noqa: PLC0415

            self.background = Background(self.store.env, self.store.fetcher)
            for digest in self.recordings.open_digests():
                self.background.opened(digest)

    def serves(self, digest: bytes) -> bool:
        """Whether an image or view is served, by its digest."""
        if self._patterns:
            return digest in self.store.digests_of(self.exports())
        return self.store.has_digest(digest)

    def close_export(self, reader: ImageReader) -> None:
        """End a client's use of what `open` returned."""
        self.open_exports -= 1
        with self._lock:
            self.recordings.left(reader)
            if self.background is not None:
                self.background.closed(reader.manifest.digest)
        self.store.close_manifest(reader.manifest)


def _silent(_done: int, _all: int) -> None:
    """Who opens an image sees no progress."""


def _literal_prefix(pattern: str) -> str:
    """How every name begins that a pattern matches: what finds them among all without a scan."""
    return _GLOB_CHARACTER.split(pattern, maxsplit=1)[0]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) if _is_glob(pattern) else name == pattern
