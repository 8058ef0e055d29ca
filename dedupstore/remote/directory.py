"""A remote in a directory: the objects are its files.

Owns what object stores give and a file system does not: objects that appear whole and durable
(written aside, synchronised, then named), and replacing and deleting on a condition (compared under
a flock of the file `lock`). Any number of processes on hosts that share the directory may use it at
a time, where the file system's locks are shared, too. Raises OSError. Thread-safe.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blake3 import blake3

from dedupstore.durability import sync_directory

_ASIDE = "tmp"
_LOCK = "lock"
# What is being written is younger; older is what a killed process left.
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class Found:
    """An object in a listing: path, length in bytes, when it was written, by the clock of whoever
    keeps it."""

    path: str
    size: int
    written: datetime


class Directory:
    """The objects below one directory."""

    writable = True

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Bytes from `offset` on; fewer where the object ends."""
        file = os.open(self._root / path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = []
            while length > 0 and (part := os.pread(file, length, offset)):
                parts.append(part)
                offset += len(part)
                length -= len(part)
            return b"".join(parts)
        finally:
            os.close(file)

    def read_whole(self, path: str, bytes_max: int) -> tuple[bytes, str]:
        """An object of at most `bytes_max` bytes (more: one byte too many), and its version."""
        data = self.read(path, 0, bytes_max + 1)
        return data, blake3(data).hexdigest()

    def stat(self, path: str) -> Found:
        """One object."""
        return _found(path, (self._root / path).stat())

    def list(self, prefix: str) -> Iterator[Found]:
        """The objects whose paths begin with `prefix`, which ends in a slash."""
        below = [self._root / prefix]
        while below:
            directory = below.pop()
            with suppress(FileNotFoundError), os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        below.append(Path(entry.path))
                        continue
                    with suppress(FileNotFoundError):  # deleted since
                        path = Path(entry.path).relative_to(self._root).as_posix()
                        yield _found(path, entry.stat())

    def put(self, path: str, data: bytes) -> None:
        """Write an object, in the place of one that is there."""
        with self._aside(data) as aside:
            self._name(aside, path, replace=True)

    def create(self, path: str, data: bytes) -> None:
        """Write an object. Raises FileExistsError."""
        with self._locked(), self._aside(data) as aside:
            self._name(aside, path, replace=False)

    def replace(self, path: str, data: bytes, version: str) -> None:
        """Write an object in the place of this version. Raises FileExistsError: it is another."""
        with self._locked():
            self._require(path, version)
            self.put(path, data)

    def delete(self, path: str) -> None:
        """Delete an object, if it is there."""
        with suppress(FileNotFoundError):
            (self._root / path).unlink()

    def delete_version(self, path: str, version: str) -> None:
        """Delete this version of an object. Raises FileExistsError: it is another."""
        with self._locked():
            self._require(path, version)
            (self._root / path).unlink()
            sync_directory((self._root / path).parent)

    def prepare(self) -> None:
        """Make the directory, if it is not there."""
        self._root.mkdir(parents=True, exist_ok=True)

    def tidy(self) -> None:
        """Remove what killed processes left half written."""
        with suppress(FileNotFoundError), os.scandir(self._root / _ASIDE) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                        Path(entry.path).unlink()

    def _require(self, path: str, version: str) -> None:
        try:
            if blake3((self._root / path).read_bytes()).hexdigest() == version:
                return
        except FileNotFoundError:
            pass
        raise FileExistsError(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        file = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    @contextmanager
    def _aside(self, data: bytes) -> Iterator[Path]:
        """A file with `data`, on disk, that has no object's name yet."""
        aside = self._root / _ASIDE / os.urandom(16).hex()
        aside.parent.mkdir(exist_ok=True)
        try:
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield aside
        finally:
            with suppress(FileNotFoundError):
                aside.unlink()

    def _name(self, aside: Path, path: str, *, replace: bool) -> None:
        target = self._root / path
        self._make(target.parent)
        if replace:
            aside.replace(target)
        else:
            os.link(aside, target)
        sync_directory(target.parent)

    def _make(self, directory: Path) -> None:
        """Make an object's directory, on disk."""
        if directory == self._root or directory.is_dir():
            return
        self._make(directory.parent)
        with suppress(FileExistsError):
            directory.mkdir()
        sync_directory(directory.parent)


def _found(path: str, status: os.stat_result) -> Found:
    return Found(path, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))
