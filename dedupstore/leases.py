"""Who is using what: leases that a killed process can never leave behind.

A lease is an open-file-description lock (fcntl(2), F_OFD_SETLK) on one byte of the store's empty
`locks` file; the byte's offset stands for an image digest or an import session. The kernel drops it
when its holder closes the file, exits, is killed or the machine reboots; it takes no disk space, so
that images can be opened on a full disk.

Holders take shared locks. gc takes the exclusive lock, without waiting, on what it is about to
delete and keeps it until its deletion is committed; a holder that comes meanwhile waits for that
and then looks the image up again. docs/concurrency.md has the interleavings. Two digests that share
their first 62 bits share a lease, which only keeps something longer.

`Leases` is thread-safe; one serves a whole process. It must not be used across a fork: the child
would share, and at its exit keep, the parent's locks.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections import Counter
from pathlib import Path

from dedupstore.errors import StoreAccessError

LOCK_FILE = "locks"
FETCH_LOCK_FILE = "fetches"

# struct flock of every 64-bit Linux: type, whence, (padding) start, length, pid, (padding).
_FLOCK = struct.Struct("hhxxxxqqixxxx")
_SESSION_SPACE = 1 << 62


def image_byte(digest: bytes) -> int:
    """Offset in the lock file that stands for an image digest."""
    return int.from_bytes(digest[:8], "big") >> 2


def session_byte(session: bytes) -> int:
    """Offset in the lock file that stands for an import session."""
    return _SESSION_SPACE | int.from_bytes(session[:8], "big") >> 2


def create_lock_file(store: Path) -> None:
    """Create the lock file of a new store."""
    os.close(os.open(store / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


class Leases:
    """This process's leases on one store."""

    def __init__(self, store: Path) -> None:
        """Open the lock file. Raises StoreAccessError."""
        self._path = store / LOCK_FILE
        self._mutex = threading.Lock()
        self._held: Counter[int] = Counter()
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreAccessError(f"{self._path}: {error.strerror}") from None

    def take(self, byte: int) -> None:
        """Hold `byte` shared; waits while a gc deletes what it stands for. Takings are counted."""
        with self._mutex:
            if not self._held[byte]:
                _lock(self._file, fcntl.F_OFD_SETLKW, fcntl.F_RDLCK, byte)
            self._held[byte] += 1

    def release(self, byte: int) -> None:
        """Give back one taking of `byte`."""
        with self._mutex:
            self._held[byte] -= 1
            if self._held[byte] <= 0:
                del self._held[byte]
                if self._file >= 0:
                    _lock(self._file, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        with self._mutex:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1


class Reclaim:
    """gc's exclusive locks on what it is deleting; a context manager around its transaction.

    Uses a file description of its own, so that leases of the same process count like any other's.
    Not thread-safe.
    """

    def __init__(self, store: Path) -> None:
        self._leases = Leases(store)

    def __enter__(self) -> Reclaim:
        return self

    def __exit__(self, *_: object) -> None:
        self._leases.close()

    def claim(self, byte: int) -> bool:
        """Take `byte` exclusively until the block ends; False when somebody has a lease on it."""
        return _lock(self._leases._file, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, byte)


class FetchClaims:
    """Which frames this process is fetching, so that no other process on the store fetches them
    too: exclusive locks, by frame number, on a file of their own. Thread-safe; one for a process,
    whose threads must agree among themselves."""

    def __init__(self, store: Path) -> None:
        """Open the file, which is made when it is not there. Raises StoreAccessError."""
        path = store / FETCH_LOCK_FILE
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreAccessError(f"{path}: {error.strerror}") from None

    def claim(self, frame: int) -> bool:
        """Claim a frame until `release`; False: another process has."""
        return _lock(self._file, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, frame)

    def release(self, frame: int) -> None:
        """Give a frame back."""
        _lock(self._file, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, frame)

    def close(self) -> None:
        """Give everything back."""
        os.close(self._file)


def _lock(file: int, command: int, kind: int, byte: int) -> bool:
    """Set or end a lock on one byte; False: somebody has one that it does not go with."""
    try:
        fcntl.fcntl(file, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True
