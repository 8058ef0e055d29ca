"""The entries of one directory.

Owns `struct erofs_dirent` (erofs_fs.h) with its names, and which names may be. Pure, thread-safe.
"""

import struct

from dedupstore.errors import ErofsError

Entry = tuple[bytes, int]  # (name, nid)

_DIRENT = struct.Struct("<QHxx")  # nid, nameoff, (file_type: the inode knows it better)
_NAME_OFFSET = struct.Struct("<8xH")  # of the first entry: where the entries end
_NAME_BYTES_MAX = 255
_SELF_AND_PARENT = (b".", b"..")


def directory_entries(
    contents: bytes, block_bytes: int, offset: int, names_max: int
) -> list[Entry]:
    """Return the entries of a directory with these contents, in their order.

    "." and ".." are left out. Which inodes they name is not looked at, nor whether they are there:
    the kernel follows neither. Names may come twice, which is the caller's to find. Raises
    `ErofsError` at `offset` for a malformed block, for names that no kernel takes, and as soon as
    there are clearly more than `names_max`.
    """
    entries: list[Entry] = []
    dots = []
    for at in range(0, len(contents), block_bytes):
        block = contents[at : at + block_bytes]
        end = _NAME_OFFSET.unpack_from(block)[0] if len(block) >= _DIRENT.size else 0
        if not end or end % _DIRENT.size or end > len(block):
            raise ErofsError(offset, "malformed directory block")
        records = list(_DIRENT.iter_unpack(block[:end]))
        stops = [start for _, start in records[1:]]
        stop = block.find(b"\0", records[-1][1])  # what is left of the block is padding
        stops.append(stop if stop >= 0 else len(block))
        # Names follow each other, so that one look at all of them is enough.
        names = block[end : stops[-1]]
        if b"\0" in names or b"/" in names:
            raise ErofsError(offset, "a name with a slash or a zero byte")
        for (nid, start), stop in zip(records, stops, strict=True):
            if not start < stop <= start + _NAME_BYTES_MAX:
                raise ErofsError(offset, f"a name of {stop - start} bytes")
            name = block[start:stop]
            if name in _SELF_AND_PARENT:
                dots.append(name)
            else:
                entries.append((name, nid))
        if len(entries) > names_max:
            raise ErofsError(offset, "more names than the tree of one image may have")
    if len(dots) != len(set(dots)):
        raise ErofsError(offset, 'a directory that lists "." or ".." twice')
    return entries
