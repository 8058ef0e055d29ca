"""The model of a file tree that the writer takes.

Owns the records and the contract of a file's content; knows neither where trees come from nor how
they are stored. A node that several entries name is one file with several links: identity counts,
which is why nodes compare by it. Directories must be named once. Thread-safe: nodes are not
changed once their tree is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

ReadInto = Callable[[int, memoryview], int]
"""(offset in the file, buffer) -> bytes read, from 1 to the buffer's length; 0 at the file's end.
Holes read as zeros."""

Extent = tuple[int, int]  # (offset, length) of data, in bytes

_NO_XATTRS: Mapping[bytes, bytes] = MappingProxyType({})


class Content(Protocol):
    """Where the bytes of a regular file come from. Several readers may be open at once."""

    def opened(self) -> AbstractContextManager[ReadInto]:
        """Open the file for one reader.

        This, reading and closing raise SourceError: for what cannot be read, for a file that ends
        before its size, and for one that changed since its size was taken.
        """


class NoContent:
    """The content of a file without data: nothing may ask for it."""

    def opened(self) -> AbstractContextManager[ReadInto]:
        """Raise AssertionError; see `Content`."""
        raise AssertionError("a file without data was opened")


NO_CONTENT = NoContent()


@dataclass(frozen=True, slots=True)
class Attributes:
    """What every kind of node has.

    `permissions`: the lower twelve bits of the mode. `mtime`: seconds since 1970, may be negative;
    `mtime_ns`: nanoseconds on top, 0 to 999,999,999. `xattrs`: full names to values.
    """

    permissions: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    mtime_ns: int = 0
    xattrs: Mapping[bytes, bytes] = field(default_factory=lambda: _NO_XATTRS)


@dataclass(frozen=True, slots=True, eq=False)
class Directory:
    """A directory; `entries` by name, in any order, without "." and ".."."""

    attributes: Attributes
    entries: dict[bytes, Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class RegularFile:
    """A regular file of `size` bytes; what lies outside `extents` is a hole and reads as zeros.

    `extents` are ascending, disjoint and not empty. `content` is not asked for a file of holes: a
    size alone makes one, which is what an overlay's "metacopy" is.
    """

    attributes: Attributes
    size: int
    extents: tuple[Extent, ...] = ()
    content: Content = NO_CONTENT

    @property
    def data_bytes(self) -> int:
        """What of `size` is data."""
        return sum(length for _, length in self.extents)


@dataclass(frozen=True, slots=True, eq=False)
class Symlink:
    """A symbolic link."""

    attributes: Attributes
    target: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Special:
    """A device, fifo or socket: `kind` is S_IFCHR, S_IFBLK, S_IFIFO or S_IFSOCK."""

    attributes: Attributes
    kind: int
    major: int = 0
    minor: int = 0


Node = Directory | RegularFile | Symlink | Special
