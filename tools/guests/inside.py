"""What is measured in a guest, and on this machine for comparison: page cache, bytes, inventories.

Needs Python's library only. Everything returns what JSON can carry; paths are text with surrogates
for what is no UTF-8.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_READ_BYTES = 128 << 10
_SECTOR_BYTES = 512


def drop_caches() -> None:
    """Empty the page cache of everything that is clean, and the caches of inodes and names."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def cached_bytes() -> int:
    """Page cache of the whole machine: Cached and Buffers of /proc/meminfo. Only growth counts."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = dict(line.split(":") for line in lines)
    return sum(int(sizes[key].split()[0]) * 1024 for key in ("Cached", "Buffers"))


def nbd_bytes_read(device: str) -> int:
    """Bytes that a block device has read since it exists ("nbd0" or "/dev/nbd0")."""
    fields = Path(f"/sys/block/{Path(device).name}/stat").read_text().split()
    return int(fields[2]) * _SECTOR_BYTES


def read_all(directory: str) -> int:
    """Read every regular file below with read(2); how many bytes that were."""
    total = 0
    buffer = bytearray(_READ_BYTES)
    for path in _files(directory):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def map_all(directory: str) -> int:
    """Touch every page of every regular file below through mmap(2); how many bytes that were."""
    total = 0
    for path in _files(directory):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size:
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
                    sum(pages[:: mmap.PAGESIZE])
            total += size
    return total


def read_again_and_again(directory: str, state: str) -> None:
    """Take the inventory of a tree, nothing of it cached, until there is a file `state`/stop; then
    write it to `state`/inventory. `state`/begun and `state`/done count the passes. Raises whatever
    reading does, and ValueError when a pass finds something else than the one before."""
    found: list[dict[str, Any]] = []
    done = 0
    while not Path(state, "stop").exists():
        Path(state, "begun").write_text(str(done + 1))
        drop_caches()
        again = inventory(directory)
        if done and again != found:
            raise ValueError(f"pass {done + 1} differs")
        found, done = again, done + 1
        Path(state, "done").write_text(str(done))
    Path(state, "new").write_text(json.dumps(found))
    Path(state, "new").rename(Path(state, "inventory"))


def inventory(directory: str) -> list[dict[str, Any]]:
    """All there is to see of a tree, itself included, by path: what two trees that cannot be told
    apart have in common. Of directories not size and link count, which are the file system's own.

    `group` is the first path of a file that has several names, where both are in the tree.
    """
    first: dict[tuple[int, int], str] = {}
    return [_describe(Path(directory), path, first) for path in _paths(directory)]


def _describe(top: Path, path: Path, first: dict[tuple[int, int], str]) -> dict[str, Any]:
    status = path.lstat()
    mode = status.st_mode
    found: dict[str, Any] = {
        "path": str(path.relative_to(top)),
        "type": stat.filemode(mode)[0],
        "mode": stat.S_IMODE(mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime_ns": status.st_mtime_ns,
        "xattrs": _xattrs(path),
    }
    if not stat.S_ISDIR(mode):
        found |= {"size": status.st_size, "nlink": status.st_nlink}
        group = first.setdefault((status.st_dev, status.st_ino), found["path"])
        found["group"] = group if status.st_nlink > 1 else None
    if stat.S_ISLNK(mode):
        found["target"] = str(path.readlink())
    elif stat.S_ISREG(mode):
        found["sha256"] = _sha256(path)
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        found["rdev"] = [os.major(status.st_rdev), os.minor(status.st_rdev)]
    return found


def _xattrs(path: Path) -> dict[str, str]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _paths(directory: str) -> Iterator[Path]:
    """A directory and everything below it, in one order everywhere."""
    yield Path(directory)
    for top, directories, files in os.walk(directory, onerror=_raise):
        directories.sort()
        yield from sorted(Path(top, name) for name in (*directories, *files))


def _files(directory: str) -> Iterator[Path]:
    return (path for path in _paths(directory) if stat.S_ISREG(path.lstat().st_mode))


def _raise(error: OSError) -> None:
    """An unreadable directory is no empty one."""
    raise error
