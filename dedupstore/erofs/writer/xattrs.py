"""Extended attributes as EROFS stores them: prefixes, entries, and the area of shared ones.

Owns `struct erofs_xattr_ibody_header` and `struct erofs_xattr_entry` (erofs_fs.h). Values that
several inodes carry are stored once; fingerprints never are, because they are not known yet when
the image is laid out. Pure but for `SharedXattrs`, which belongs to one image.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from dedupstore.erofs.writer import fingerprints
from dedupstore.errors import SourceError

_PREFIXES = (  # the longer ones first: EROFS_XATTR_INDEX_*
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
)
_INDEX_USED_ALONE = (2, 3)  # the prefix is the whole name
_HEADER = struct.Struct("<IB7x")  # h_name_filter (unused: 0), h_shared_count
_ENTRY = struct.Struct("<BBH")  # e_name_len, e_name_index, e_value_size
_ID = struct.Struct("<I")
_UNIT_BYTES = 4  # entries begin at, and ids and i_xattr_icount count, multiples of it
_SHARED_COUNT_AT = 4
_SHARED_PER_INODE_MAX = 255
_NAME_BYTES_MAX = 255  # of the whole name, prefix included: the kernel asks for no longer ones
_VALUE_BYTES_MAX = 0xFFFF
BODY_BYTES_MAX = _HEADER.size + 0xFFFE * _UNIT_BYTES

Key = tuple[bytes, bytes]  # (name, value)


def _split(name: bytes) -> tuple[int, bytes] | None:
    """The prefix's number and the rest of the name; None when EROFS has no prefix for it."""
    for prefix, index in _PREFIXES:
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            return (index, rest) if bool(rest) != (index in _INDEX_USED_ALONE) else None
    return None


def is_storable(name: bytes) -> bool:
    """Whether EROFS has a form for attributes of this name.

    It has none for `system.*` but POSIX ACLs (`system.nfs4_acl`), nor for those of one file system
    (`btrfs.*`, `ceph.*`).
    """
    return _split(name) is not None


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % _UNIT_BYTES)


def _entry(name: bytes, value: bytes) -> bytes:
    split = _split(name)
    shown = name.decode(errors="backslashreplace")
    if split is None or b"\0" in name or len(name) > _NAME_BYTES_MAX:
        raise SourceError(f"EROFS cannot hold an extended attribute named {shown!r}")
    if len(value) > _VALUE_BYTES_MAX:
        raise SourceError(
            f"EROFS cannot hold the extended attribute {shown!r} of {len(value)} bytes"
        )
    index, rest = split
    return _padded(_ENTRY.pack(len(rest), index, len(value)) + rest + value)


_FINGERPRINT = _padded(
    _ENTRY.pack(0, fingerprints.NAME_INDEX, len(fingerprints.VALUE)) + fingerprints.VALUE
)
_FINGERPRINT_ALONE = _HEADER.pack(0, 0) + _FINGERPRINT


class SharedXattrs:
    """The area of attributes that more than one inode carries, and bodies that refer to it."""

    def __init__(self, all_xattrs: Iterable[Mapping[bytes, bytes]]) -> None:
        """Take the attributes of every inode of the image; raises SourceError for impossible ones.

        Ids count from the area's first byte, so it must begin where the superblock says.
        """
        seen: set[Key] = set()
        repeated: set[Key] = set()
        for xattrs in all_xattrs:
            for key in xattrs.items():
                (repeated if key in seen else seen).add(key)
        area = bytearray()
        self._ids: dict[Key, bytes] = {}
        for key in sorted(repeated):
            self._ids[key] = _ID.pack(len(area) // _UNIT_BYTES)
            area += _entry(*key)
        self.area = bytes(area)

    def body(self, xattrs: Mapping[bytes, bytes], *, fingerprinted: bool = False) -> bytes:
        """What follows an inode with these attributes; empty without any.

        `fingerprinted`: with room for a digest at `digest_at(body)`. Raises SourceError when the
        attributes do not fit into an inode.
        """
        if not xattrs:
            return _FINGERPRINT_ALONE if fingerprinted else b""
        ids: list[bytes] = []
        entries = [_FINGERPRINT] if fingerprinted else []
        for key in sorted(xattrs.items()):
            shared = self._ids.get(key)
            if shared is None or len(ids) == _SHARED_PER_INODE_MAX:
                entries.append(_entry(*key))
            else:
                ids.append(shared)
        body = b"".join((_HEADER.pack(0, len(ids)), *ids, *entries))
        if len(body) > BODY_BYTES_MAX:
            raise SourceError("more extended attributes than an EROFS inode can hold")
        return body


def digest_at(body: bytes) -> int:
    """Where the digest lies in a fingerprinted body: its entry is the first behind the ids."""
    ids_bytes = body[_SHARED_COUNT_AT] * _ID.size
    return _HEADER.size + ids_bytes + _ENTRY.size + fingerprints.DIGEST_AT


def body_count(body: bytes) -> int:
    """The i_xattr_icount of an inode with this body."""
    return (len(body) - _HEADER.size) // _UNIT_BYTES + 1 if body else 0
