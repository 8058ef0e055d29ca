"""POSIX ACLs: the text that tar archives carry -> the attribute that Linux stores.

Owns acl(5)'s long and short text form, star's fourth field included, and version 2 of the binary
form (posix_acl_xattr.h). Numeric ids win over names, as they do for owners. Looks names up on this
machine, else pure; thread-safe.
"""

from __future__ import annotations

import grp
import pwd
import re
import struct
from collections import Counter

from dedupstore.errors import shown

_HEADER = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")  # e_tag, e_perm, e_id
_NO_ID = 0xFFFFFFFF
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_TAGS = {  # (of the owner or owning group, of a named one)
    "user": (_USER_OBJ, _USER),
    "group": (_GROUP_OBJ, _GROUP),
    "mask": (_MASK, None),
    "other": (_OTHER, None),
}
_TAGS |= {name[0]: tags for name, tags in list(_TAGS.items())}
_ONCE = (_USER_OBJ, _GROUP_OBJ, _OTHER)
_PERMISSIONS = {"r": 4, "w": 2, "x": 1, "-": 0}
_PERMISSIONS_TEXT = re.compile(r"[r-][w-][x-]|[rwx]{1,3}|-|[0-7]")

Entry = tuple[int, int, int]  # (tag, id, permissions): in the order of the attribute


def acl_attribute(text: str, *, default: bool) -> bytes | None:
    """Return the value of `system.posix_acl_access` or, of a directory, `system.posix_acl_default`.

    None where Linux stores none: of an empty text, and of an access ACL that says no more than the
    mode. Raises ValueError for what is no ACL, and for names that nobody has here.
    """
    lines = (line.partition("#")[0].strip() for line in re.split(r"[\n,]", text))
    entries = sorted(_entry(line) for line in lines if line)
    if not entries:
        return None
    tags = Counter(tag for tag, _, _ in entries)
    named = tags[_USER] + tags[_GROUP]
    if any(tags[tag] != 1 for tag in _ONCE) or tags[_MASK] > 1 or (named and not tags[_MASK]):
        raise ValueError(f"not a whole ACL: {shown(text)}")
    if len({(tag, ident) for tag, ident, _ in entries}) != len(entries):
        raise ValueError(f"an ACL with two entries for one: {shown(text)}")
    if not default and len(entries) == len(_ONCE):
        return None
    return _HEADER + b"".join(_ENTRY.pack(tag, bits, ident) for tag, ident, bits in entries)


def _entry(line: str) -> Entry:
    fields = [part.strip() for part in line.split(":")]
    if len(fields) == 2 and fields[0] in ("mask", "m", "other", "o"):
        fields.insert(1, "")
    kind, name, permissions = fields[:3] if len(fields) in (3, 4) else ("", "", "")
    unnamed, named = _TAGS.get(kind, (None, None))
    tag = named if name else unnamed
    if tag is None or not _PERMISSIONS_TEXT.fullmatch(permissions):
        raise ValueError(f"no entry of an ACL: {shown(line)}")
    if permissions.isdigit():
        bits = int(permissions)
    else:
        bits = sum(_PERMISSIONS[letter] for letter in set(permissions))
    if not name:
        return tag, _NO_ID, bits
    return tag, _id(tag, fields[3] if len(fields) == 4 and fields[3] else name), bits


def _id(tag: int, name: str) -> int:
    if name.isascii() and name.isdigit():
        number = int(name)
        if number >= _NO_ID:
            raise ValueError(f"no id of a user or group: {shown(name)}")
        return number
    try:
        return pwd.getpwnam(name).pw_uid if tag == _USER else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        kind = "user" if tag == _USER else "group"
        raise ValueError(f"an ACL names a {kind} that is unknown here: {shown(name)}") from None
