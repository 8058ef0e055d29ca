"""A file system on a disk that fails when it is told to: nbdkit's `error` filter below ext4.

Unlike `injection`, this reaches what goes through the page cache: reads of LMDB's map, and writes
that fail only when the kernel writes them back. Needs root.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.crashes import disk

DISK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class BadDisk:
    """The file system at `root`, on the disk `image`."""

    root: Path
    image: Path
    _triggers: dict[str, Path]

    @contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Every "read" or "write" of the disk fails within."""
        self._triggers[what].touch()
        try:
            yield
        finally:
            self._triggers[what].unlink()

    def forget(self, path: Path, offset: int = 0, length: int = 0) -> None:
        """Have the kernel read a file, or a part of it, from the disk again; but for pages that
        processes have mapped."""
        for each, begin, count in ((path, offset, length), (self.image, 0, 0)):
            file = os.open(each, os.O_RDONLY)
            try:
                os.fsync(file)
                os.posix_fadvise(file, begin, count, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Mount the file system, which replays its journal."""
        with disk.mounted(self.image, self.root):
            yield


@contextmanager
def bad_disk(work: Path) -> Iterator[BadDisk]:
    """Make a disk with an empty file system in `work`, not mounted. Raises disk.DiskError."""
    root = work / "root"
    root.mkdir()
    triggers = {"read": work / "reads-fail", "write": work / "writes-fail"}
    parameters = [f"size={DISK_BYTES}"]
    for call, path in (("pread", triggers["read"]), ("pwrite", triggers["write"])):
        parameters += [f"error-{call}=EIO", f"error-{call}-rate=100%", f"error-{call}-file={path}"]
    with disk.served(work, "--filter=error", "memory", *parameters) as image:
        disk.make_file_system(image)
        yield BadDisk(root, image, triggers)
