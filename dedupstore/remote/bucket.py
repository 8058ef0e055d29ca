"""A remote in an object store: S3 and its like, GCS, Azure; or, to read, any HTTP server.

The one place that imports obstore, which starts threads and takes 7 MB and 12 ms: a `Bucket` is
made when it is first needed, never before a fork. obstore does the protocols, signing, the pool of
connections and the credentials, by the ecosystem's usual means; it reads the environment itself.
Each read is one try; everything else is tried again by obstore, with backoff and jitter. Raises
OSError: FileNotFoundError, FileExistsError (a condition does not hold), PermissionError,
ConnectionError and TimeoutError (it may go better the next time), or another, which is final.
Releases the GIL while it waits. Thread-safe.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import HTTPStore, from_url

from dedupstore.remote.directory import Found

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

# A try ends when nothing comes for STALL_SECONDS, or after READ_SECONDS in all (a link of 1 Mbit/s
# brings a pack's 8 MiB within that).
CONNECT_SECONDS = 5
STALL_SECONDS = 10
READ_SECONDS = 75
# Writing a pack, and how long obstore goes on trying.
WRITE_SECONDS = 300
RETRY_SECONDS = 120

_READING: ClientConfig = {
    "allow_http": True,  # where the URL or the endpoint says so
    "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
    "read_timeout": timedelta(seconds=STALL_SECONDS),
    "timeout": timedelta(seconds=READ_SECONDS),
}
_WORKING: ClientConfig = {
    "allow_http": True,
    "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
    "timeout": timedelta(seconds=WRITE_SECONDS),
}
_ONCE: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(seconds=READ_SECONDS)}
_RETRYING: RetryConfig = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=RETRY_SECONDS),
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=10),
        "base": 2,
    },
}

_STATUS = re.compile(r"status code: (\d{3}[^:\n]*)")
_KIND = re.compile(r"kind: (Connect|Timeout|Interrupted|Decode)\b")
_CAUSES = {
    "Connect": "cannot be reached",
    "Timeout": "does not answer in time",
    "Interrupted": "ended an answer early",
    "Decode": "sent what is no answer",
}
_TRANSIENT_STATUS = ("408", "429", "5")


class _BeyondEndError(Exception):
    """A range begins behind the end of its object."""


class Bucket:
    """The objects below one URL."""

    def __init__(self, url: str) -> None:
        """Raises OSError for a URL or a configuration of the environment that cannot be used."""
        self._url = url
        with _translated():
            self._reading: Any = from_url(url, client_options=_READING, retry_config=_ONCE)
        self.writable = not isinstance(self._reading, HTTPStore)

    @cached_property
    def _working(self) -> Any:
        # Only now: making it takes 5 ms, and who pulls does without.
        with _translated():
            return from_url(self._url, client_options=_WORKING, retry_config=_RETRYING)

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Bytes from `offset` on; fewer where the object ends."""
        with suppress(_BeyondEndError), _translated():
            return bytes(obstore.get_range(self._reading, path, start=offset, length=length))
        return b""

    def read_whole(self, path: str, bytes_max: int) -> tuple[bytes, Any]:
        """An object of at most `bytes_max` bytes (more: one byte too many), and its version."""
        with _translated():
            result = obstore.get(self._reading, path)
            meta = result.meta
            version = {key: meta[key] for key in ("e_tag", "version") if meta[key] is not None}
            if meta["size"] > bytes_max:
                return bytes(bytes_max + 1), version
            return bytes(result.bytes()), version

    def stat(self, path: str) -> Found:
        """One object."""
        with _translated():
            meta = obstore.head(self._working, path)
        return Found(path, meta["size"], meta["last_modified"])

    def list(self, prefix: str) -> Iterator[Found]:
        """The objects whose paths begin with `prefix`, which ends in a slash."""
        with _translated():
            for page in obstore.list(self._working, prefix):
                for meta in page:
                    yield Found(meta["path"], meta["size"], meta["last_modified"])

    def put(self, path: str, data: bytes) -> None:
        """Write an object, in the place of one that is there."""
        with _translated():
            obstore.put(self._working, path, data, mode="overwrite", use_multipart=False)

    def create(self, path: str, data: bytes) -> None:
        """Write an object. Raises FileExistsError."""
        with _translated():
            obstore.put(self._working, path, data, mode="create")

    def replace(self, path: str, data: bytes, version: Any) -> None:
        """Write an object in the place of this version. Raises FileExistsError: it is another."""
        with _translated():
            obstore.put(self._working, path, data, mode=version)

    def delete(self, path: str) -> None:
        """Delete an object, if it is there."""
        with suppress(FileNotFoundError), _translated():  # S3 does not mind, others do
            obstore.delete(self._working, path)

    def delete_version(self, path: str, version: Any) -> None:
        """Empty this version of an object: object stores do not delete on a condition. Raises
        FileExistsError: it is another."""
        self.replace(path, b"", version)

    def prepare(self) -> None:
        """Buckets are made by whoever pays for them."""

    def tidy(self) -> None:
        """Nothing is ever left half written."""


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (BaseError, ValueError) as error:
        _raise(error)


def _raise(error: Exception) -> NoReturn:
    text = str(error)
    status = _STATUS.search(text)
    kind = _KIND.search(text)
    if isinstance(error, AlreadyExistsError | PreconditionError):
        raise FileExistsError(errno.EEXIST, "has been written by another") from None
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        what = f"refuses ({status[1]})" if status else "refuses"
        raise PermissionError(errno.EACCES, f"{what}: credentials?") from None
    if status is not None:
        if status[1].startswith("416"):
            raise _BeyondEndError from None
        what = f"answers {status[1].strip()}"
        if status[1].startswith(_TRANSIENT_STATUS):
            raise ConnectionError(errno.EIO, what) from None
        raise OSError(errno.EINVAL, what) from None
    if kind is not None:
        raise ConnectionError(errno.EIO, _CAUSES[kind[1]]) from None
    first = text.partition("\n")[0]
    if "HTTP error" in first or "error sending request" in first:
        raise ConnectionError(errno.EIO, "cannot be read") from None
    raise OSError(errno.EINVAL, first.partition(": ")[2][:200] or first[:200]) from None
