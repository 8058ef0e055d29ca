"""Objects by path in one remote, which has one URL or several mirrors.

Owns which URL is asked, for how long and how often: reads try the mirrors in order, one that failed
recently last; writes, listings and whatever must be up to date go to the first. Knows nothing of
what is in the objects: a reader passes `accept`, which raises a DedupError when the bytes are
wrong, and the next mirror is asked. Every wait is bounded. Nothing is opened before it is needed,
so an `Objects` that was not used may cross a fork. Thread-safe.

URLs: s3://BUCKET/PREFIX, gs://, az://CONTAINER/PREFIX, http:// and https:// (to read),
file:///DIRECTORY or an absolute path.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from dedupstore.errors import (
    DedupError,
    RemoteConflictError,
    RemoteDamagedError,
    RemoteError,
    RemoteNotFoundError,
    UsageError,
    shown,
)
from dedupstore.remote.directory import Directory, Found

if TYPE_CHECKING:
    from dedupstore.remote.bucket import Bucket

__all__ = ["Found", "Objects", "Version"]

_T = TypeVar("_T")
Accept = Callable[[bytes], object]
Version = Any
"""A version of an object, to be handed back: nothing else may be done with it."""

# No try of a read begins later than this after the first; with the timeout of one (`bucket`), every
# read ends within 90 seconds, and within 23 where nothing comes at all.
TRY_SECONDS = 12
TRIES_MAX = 8
BACKOFF_SECONDS = 0.1
BACKOFF_SECONDS_MAX = 4.0
# How long a URL that failed is asked after the others.
AVOID_SECONDS = 30
# What is written on a condition is smaller.
_DOCUMENT_BYTES = 64 << 10

_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https")
_TRANSIENT = frozenset(
    {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.ENETDOWN, errno.EHOSTDOWN}
)


def check_url(url: str) -> str:
    """The URL as it is kept. Raises UsageError for one of no known kind."""
    parts = urlsplit(url) if "://" in url else None
    if parts is None:
        if not url:
            raise UsageError("a remote's URL must not be empty")
        return str(Path(url).absolute())
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise UsageError(f"remote {shown(url)}: file:// needs an absolute path")
    elif parts.scheme not in _SCHEMES or not parts.netloc:
        raise UsageError(f"remote {shown(url)}: is none of {', '.join(_SCHEMES)}, file, a path")
    if parts.query or parts.fragment:
        raise UsageError(f"remote {shown(without_credentials(url))}: has a query or fragment")
    return url


def without_credentials(url: str) -> str:
    """A URL as it may be shown."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(slots=True)
class _Mirror:
    """One URL; what is behind it is opened when it is first asked."""

    url: str
    shown: str
    backend: Directory | Bucket | None = None
    failed_at: float = -AVOID_SECONDS


class Objects:
    """The objects of one remote."""

    def __init__(self, urls: Sequence[str]) -> None:
        """`urls` as `check_url` gave them, the first being the one that is written to."""
        self.urls = tuple(urls)
        self._mirrors = [_Mirror(url, without_credentials(url)) for url in urls]
        self._opening = threading.Lock()

    @property
    def where(self) -> str:
        """The first URL, for messages."""
        return self._mirrors[0].shown

    # --- reading, from any mirror ---

    def read_range(
        self, path: str, offset: int, length: int, accept: Accept | None = None
    ) -> bytes:
        """`length` bytes of an object. Raises RemoteNotFoundError; RemoteDamagedError when
        `accept` was content with nobody's; RemoteError."""

        def read(backend: Directory | Bucket) -> bytes:
            data = backend.read(path, offset, length)
            if len(data) != length:
                raise RemoteDamagedError(f"{path}: ends at byte {offset + len(data)}")
            if accept is not None:
                accept(data)
            return data

        return self._ask(self._mirrors, path, read)

    def read(self, path: str, bytes_max: int, accept: Accept | None = None) -> bytes:
        """An object of at most `bytes_max` bytes. Raises as `read_range`."""

        def read(backend: Directory | Bucket) -> bytes:
            data = _whole(backend, path, bytes_max)[0]
            if accept is not None:
                accept(data)
            return data

        return self._ask(self._mirrors, path, read)

    def _ask(
        self, mirrors: list[_Mirror], path: str, read: Callable[[Directory | Bucket], _T]
    ) -> _T:
        """Ask mirrors in turn, again and again while it may help."""
        begun = time.monotonic()
        backoff = BACKOFF_SECONDS
        hopeless: dict[str, RemoteError] = {}
        wrong: set[str] = set()
        failed: RemoteError | None = None
        for _ in range(TRIES_MAX):
            for mirror in _in_order(mirrors):
                late = failed is not None and time.monotonic() - begun > TRY_SECONDS
                if mirror.url in hopeless or late:
                    continue
                try:
                    return read(self._backend(mirror))
                except OSError as error:
                    if not _is_transient(error):
                        hopeless[mirror.url] = _failure(mirror, path, error)
                        continue
                    failed = _failure(mirror, path, error)
                except DedupError as error:
                    failed = RemoteDamagedError(f"{mirror.shown}: {error}")
                    if mirror.url in wrong:  # not on the way, then
                        hopeless[mirror.url] = failed
                    wrong.add(mirror.url)
                mirror.failed_at = time.monotonic()
            if len(hopeless) == len(mirrors) or time.monotonic() - begun > TRY_SECONDS:
                break
            time.sleep(backoff * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            backoff = min(2 * backoff, BACKOFF_SECONDS_MAX)
        if failed is None:
            # Of several, one that refuses says more than one that does not have it.
            failed = min(hopeless.values(), key=lambda e: isinstance(e, RemoteNotFoundError))
        raise failed

    def _backend(self, mirror: _Mirror) -> Directory | Bucket:
        if mirror.backend is None:
            with self._opening:
                if mirror.backend is None:
                    mirror.backend = _open(mirror.url)
        return mirror.backend

    # --- what must be up to date: the first URL ---

    @property
    def listable(self) -> bool:
        """Whether the first URL can be listed and written, which an HTTP server cannot."""
        return bool(self._do("", lambda backend: backend).writable)

    def read_version(self, path: str, bytes_max: int) -> tuple[bytes, Version] | None:
        """An object of at most `bytes_max` bytes as it is now, and its version; None: there is
        none."""
        first = self._mirrors[:1]
        try:
            return self._ask(first, path, lambda backend: _whole(backend, path, bytes_max))
        except RemoteNotFoundError:
            return None

    def read_beginning(self, path: str, length: int) -> bytes:
        """The first `length` bytes of an object as it is now, fewer where it is shorter; none where
        there is none."""
        first = self._mirrors[:1]
        try:
            return self._ask(first, path, lambda backend: backend.read(path, 0, length))
        except RemoteNotFoundError:
            return b""

    def list(self, prefix: str) -> list[Found]:
        """The objects whose paths begin with `prefix`, which ends in a slash, in order."""

        def collect(backend: Directory | Bucket) -> list[Found]:
            if not backend.writable:
                raise RemoteError(f"{self.where}: an HTTP server does not list (name the images)")
            return sorted(backend.list(prefix), key=lambda found: found.path)

        return self._do(prefix, collect)

    def prepare_reading(self) -> None:
        """Load the clients; nothing is asked. What is wrong with a URL shows when it is."""
        for mirror in self._mirrors:
            with suppress(OSError):
                self._backend(mirror)

    def prepare(self) -> bool:
        """Make a directory that is not there yet; False for what can only be read."""
        backend = self._do("", lambda backend: backend)
        if backend.writable:
            self._do("", lambda backend: backend.prepare())
        return backend.writable

    def put(self, path: str, data: bytes) -> None:
        """Write an object whose path nobody else writes to."""
        self._do(path, lambda backend: backend.put(path, data))

    def create(self, path: str, data: bytes) -> None:
        """Write an object if there is none. Raises RemoteConflictError."""
        self._write(path, data, lambda backend: backend.create(path, data))

    def replace(self, path: str, data: bytes, version: Version) -> None:
        """Write an object if it is still this version. Raises RemoteConflictError."""
        self._write(path, data, lambda backend: backend.replace(path, data, version))

    def _write(self, path: str, data: bytes, write: Callable[[Directory | Bucket], None]) -> None:
        """Write on a condition. A try whose answer was lost may have written: look."""
        try:
            self._do(path, write)
        except RemoteError:
            try:
                now = self.read_version(path, max(len(data), _DOCUMENT_BYTES))
            except RemoteError:
                now = None
            if now is None or now[0] != data:
                raise

    def delete(self, path: str) -> None:
        """Delete an object that nobody writes again, if it is there."""
        self._do(path, lambda backend: backend.delete(path))

    def delete_version(self, path: str, version: Version) -> None:
        """Delete, or make empty, an object if it is still this version. Raises
        RemoteConflictError."""
        self._write(path, b"", lambda backend: backend.delete_version(path, version))

    def probe(self, path: str) -> datetime:
        """Make sure that the first URL can be written and keeps conditions, on which everything
        that several do at a time rests; return its time. Writes and deletes an object at `path`.
        """
        backend = self._do(path, lambda backend: backend)
        if not backend.writable:
            raise RemoteError(f"{self.where}: HTTP remotes are for reading (push to its store)")
        self.create(path, b"probe")
        try:
            now = self._do(path, lambda backend: backend.stat(path)).written
            try:
                self._do(path, lambda backend: backend.create(path, b"second"))
            except RemoteConflictError:
                pass
            else:
                raise RemoteError(
                    f"{self.where}: does not honour 'If-None-Match: *', so pushes could overwrite "
                    "each other's images (use a store that has conditional writes)"
                )
        finally:
            with suppress(RemoteError):  # who may only add has no need to delete
                self.delete(path)
        self._do(path, lambda backend: backend.tidy())
        return now

    def _do(self, path: str, work: Callable[[Directory | Bucket], _T]) -> _T:
        mirror = self._mirrors[0]
        try:
            return work(self._backend(mirror))
        except OSError as error:
            raise _failure(mirror, path, error) from None


def _in_order(mirrors: list[_Mirror]) -> list[_Mirror]:
    now = time.monotonic()
    return sorted(mirrors, key=lambda mirror: now - mirror.failed_at < AVOID_SECONDS)


def _open(url: str) -> Directory | Bucket:
    parts = urlsplit(url)
    if "://" not in url or parts.scheme == "file":
        return Directory(Path(unquote(parts.path) if "://" in url else url))
    from dedupstore.remote.bucket import Bucket  # noqa: PLC0415 - see there

    return Bucket(url)


def _whole(backend: Directory | Bucket, path: str, bytes_max: int) -> tuple[bytes, Version]:
    data, version = backend.read_whole(path, bytes_max)
    if len(data) > bytes_max:
        raise RemoteDamagedError(f"{path}: has more than {bytes_max} bytes")
    return data, version


def _is_transient(error: OSError) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or error.errno in _TRANSIENT


def _failure(mirror: _Mirror, path: str, error: OSError) -> RemoteError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return RemoteNotFoundError(f"{mirror.shown}: has no {path}")
    if isinstance(error, FileExistsError):
        return RemoteConflictError(f"{mirror.shown}: {path} has been written by another meanwhile")
    reason = (error.strerror or str(error)).replace("\n", " ")
    advice = " (try again later)" if _is_transient(error) else ""
    return RemoteError(f"{mirror.shown}: {path}: {reason}{advice}")
