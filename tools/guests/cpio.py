"""Writes cpio archives of the kind that the kernel unpacks as its first root file system.

Format "newc": per entry a header of 8-digit hexadecimal fields, name and content, each padded to 4
bytes. The same entries make the same bytes: sorted, all root's, all from 1970. The kernel takes
several archives one behind the other. Pure.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass

# The kernel wants each further archive of a file to begin at a multiple of 4 bytes; a page is one
# for every loader.
_PADDING = 512


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in an archive: `mode` with its type; `data` a file's content or a link's target."""

    mode: int
    data: bytes = b""


def file(data: bytes, *, executable: bool = False) -> Entry:
    """A regular file."""
    return Entry(stat.S_IFREG | (0o755 if executable else 0o644), data)


def symlink(target: str) -> Entry:
    """A symbolic link."""
    return Entry(stat.S_IFLNK | 0o777, target.encode())


DIRECTORY = Entry(stat.S_IFDIR | 0o755)


def archive(entries: Mapping[str, Entry]) -> bytes:
    """An archive of entries by absolute path; directories above them are added."""
    complete = dict(entries)
    for path in entries:
        above = path
        while (above := above.rpartition("/")[0]) and above not in complete:
            complete[above] = DIRECTORY
    parts = []
    for number, path in enumerate(sorted(complete), 1):
        parts.append(_record(number, path.lstrip("/"), complete[path]))
    parts.append(_record(0, "TRAILER!!!", Entry(0)))
    whole = b"".join(parts)
    return whole + bytes(-len(whole) % _PADDING)


def _record(number: int, name: str, entry: Entry) -> bytes:
    encoded = name.encode(errors="surrogateescape") + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device, its own device, length of name, checksum
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return head + bytes(-len(head) % 4) + entry.data + bytes(-len(entry.data) % 4)
