"""Extended attributes, as the kernel would list them.

Owns `struct erofs_xattr_ibody_header`, `erofs_xattr_entry` and `erofs_xattr_long_prefix`
(erofs_fs.h). What the kernel hides is left out: entries whose prefix has no name, and the digests
of contents that an image may carry for the kernel's own use (ISHARE_XATTRS), which nobody should
believe of an image from anywhere. Not thread-safe: a reader belongs to one walk.
"""

import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from dedupstore.erofs.layouts import aligned
from dedupstore.erofs.metadata import Space
from dedupstore.errors import ErofsError

NO_XATTRS: Mapping[bytes, bytes] = MappingProxyType({})

_SHORT_PREFIXES = {  # EROFS_XATTR_INDEX_*; 5 was kept for Lustre, and no kernel shows it
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
_WHOLE_NAMES = (2, 3)  # prefixes that nothing may follow
_LONG_PREFIX = 0x80  # in e_name_index: the rest numbers a long prefix
_HEADER = struct.Struct("<4xB7x")  # (h_name_filter), h_shared_count
_ENTRY = struct.Struct("<BBH")  # e_name_len, e_name_index, e_value_size
_ID = struct.Struct("<I")
_LENGTH = struct.Struct("<H")
_UNIT_BYTES = 4  # entries begin at multiples of it, and ids count them
_INFIX_BYTES_MAX = 255
_NAME_BYTES_MAX = 255  # XATTR_NAME_MAX of Linux
_LONG_PREFIXES_MAX = 255
PREFIXES_BYTES_MAX = _LONG_PREFIXES_MAX * aligned(_LENGTH.size + 1 + _INFIX_BYTES_MAX, _UNIT_BYTES)
_PAGE_BYTES = 4096

# A shared attribute costs an inode 4 bytes and Python, in a dictionary, some 50. One for each slot
# that could be an inode is plenty: inodes with the same attributes are decoded once.
IMAGE_BYTES_PER_ATTRIBUTE = 32
ATTRIBUTES_MIN = 1 << 16
ATTRIBUTES_MAX = 1 << 24  # a sparse image may claim any size

Prefix = tuple[int, bytes]  # (number of the short prefix, what follows it)


def long_prefixes(raw: bytes, count: int, offset: int) -> list[Prefix]:
    """Decode `count` long prefixes, which begin at `raw`; `offset` tells errors where.

    Raises `ErofsError` when one is malformed or `raw` ends too early.
    """
    prefixes = []
    at = 0
    for _ in range(count):
        end = at + _LENGTH.size
        length = _LENGTH.unpack_from(raw, at)[0] if end <= len(raw) else 0
        if not 1 <= length <= 1 + _INFIX_BYTES_MAX or end + length > len(raw):
            raise ErofsError(offset + at, "malformed prefix of extended attributes")
        prefixes.append((raw[end], raw[end + 1 : end + length]))
        at = aligned(end + length, _UNIT_BYTES)
    return prefixes


class XattrReader:
    """Reads the attributes of the inodes of one image."""

    def __init__(
        self, shared: Space, shared_at: int, prefixes: Sequence[Prefix], hidden: Prefix | None
    ) -> None:
        """Take what the superblock tells.

        `shared`: what holds the shared attributes, `shared_at`: where id 0 would lie. `hidden`:
        the name of content digests.
        """
        self._shared = shared
        self._shared_at = shared_at
        self._prefixes = prefixes
        self._hidden = hidden
        room = shared.end // IMAGE_BYTES_PER_ATTRIBUTE + ATTRIBUTES_MIN
        self._left = min(room, ATTRIBUTES_MAX)
        self._pages: dict[int, bytes] = {}
        # A tree has few different names, shared attributes and bodies; one object serves them all.
        self._names: dict[tuple[int, bytes], bytes | None] = {}
        self._entries: dict[int, tuple[bytes | None, bytes]] = {}
        self._bodies: dict[bytes, Mapping[bytes, bytes]] = {}

    def read(self, space: Space, offset: int, length: int) -> Mapping[bytes, bytes]:
        """Return the attributes of an inode with `length` bytes of them at `offset` in `space`.

        The mapping is shared between inodes and must not be changed. Charged to the budget, and
        every shared attribute once. Raises `ErofsError` when they are malformed, or more than an
        image of this size has room for.
        """
        body = space.bytes_at(offset, length)
        known = self._bodies.get(body)
        if known is None:
            known = self._bodies[body] = self._decoded(body, offset)
        return known

    def _decoded(self, body: bytes, offset: int) -> Mapping[bytes, bytes]:
        at = _HEADER.size
        if len(body) > at:
            at += _ID.size * _HEADER.unpack_from(body)[0]
        else:
            at += _ID.size  # a header alone means nothing yet
        if at > len(body):
            raise ErofsError(offset, "malformed extended attributes")
        found: dict[bytes, bytes] = {}
        entries_at = at
        while at < len(body):
            name, value, at = self._entry(body, at, offset)
            if name is not None:
                found.setdefault(name, value)  # as in the kernel, the first one counts
        for (number,) in _ID.iter_unpack(body[_HEADER.size : entries_at]):
            name, value = self._entries.get(number) or self._shared_entry(number)
            if name is not None:
                found.setdefault(name, value)
        self._left -= len(found)
        if self._left < 0:
            raise ErofsError(offset, "more extended attributes than the image has room for")
        return found or NO_XATTRS

    def _entry(self, raw: bytes, at: int, offset: int) -> tuple[bytes | None, bytes, int]:
        """Return name, value and end of the entry at `at`; no name when the kernel hides it."""
        name_bytes, index, value_bytes = _ENTRY.unpack_from(raw, at)
        name_at = at + _ENTRY.size
        value_at = name_at + name_bytes
        end = value_at + value_bytes
        if end > len(raw):
            raise ErofsError(offset + at, "an extended attribute reaches behind its inode's")
        key = (index, raw[name_at:value_at])
        if key in self._names:
            name = self._names[key]
        else:
            name = self._names[key] = self._name(*key, offset + at)
        return name, raw[value_at:end], aligned(end, _UNIT_BYTES)

    def _name(self, index: int, rest: bytes, offset: int) -> bytes | None:
        if index & _LONG_PREFIX:
            number = index ^ _LONG_PREFIX
            if number >= len(self._prefixes):
                return None
            index, infix = self._prefixes[number]
            rest = infix + rest
        prefix = _SHORT_PREFIXES.get(index)
        if prefix is None or (index, rest) == self._hidden:
            return None
        name = prefix + rest
        if bool(rest) == (index in _WHOLE_NAMES) or b"\0" in rest or len(name) > _NAME_BYTES_MAX:
            raise ErofsError(offset, f"impossible name of an extended attribute: {name!r}")
        return name

    def _shared_entry(self, number: int) -> tuple[bytes | None, bytes]:
        at = self._shared_at + number * _UNIT_BYTES
        name_bytes, _, value_bytes = _ENTRY.unpack(self._bytes(at, _ENTRY.size))
        length = _ENTRY.size + name_bytes + value_bytes
        # Every fourth byte may begin another one, so that a small area could hold gigabytes.
        self._shared.charge(at, length)
        name, value, _ = self._entry(self._bytes(at, length), 0, at)
        self._entries[number] = name, value
        return name, value

    def _bytes(self, offset: int, length: int) -> bytes:
        """Return bytes of the shared attributes, from pages that are each read once."""
        end = offset + length
        if end > self._shared.end:
            raise ErofsError(offset, "a shared extended attribute lies behind the end")
        numbers = range(offset // _PAGE_BYTES, -(-end // _PAGE_BYTES))
        found = b"".join(self._page(number) for number in numbers)
        at = offset % _PAGE_BYTES
        return found[at : at + length]

    def _page(self, number: int) -> bytes:
        page = self._pages.get(number)
        if page is None:
            at = number * _PAGE_BYTES
            page = self._shared.bytes_at(at, min(_PAGE_BYTES, self._shared.end - at))
            self._pages[number] = page
        return page
