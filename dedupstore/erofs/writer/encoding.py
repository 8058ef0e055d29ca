"""Placed inodes as the bytes of the metadata.

Owns what goes into each inode, directory, link and map; where they go is `placement`'s, how their
fields are packed `ondisk`'s. Pure, thread-safe.
"""

from __future__ import annotations

import stat

from dedupstore.erofs.layouts import FLAT_INLINE
from dedupstore.erofs.tree import Directory, Special, Symlink
from dedupstore.erofs.writer import ondisk
from dedupstore.erofs.writer.inodes import Inode
from dedupstore.erofs.writer.placement import Places
from dedupstore.erofs.writer.xattrs import SharedXattrs, body_count

_TYPES = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5}
_TYPES |= {stat.S_IFSOCK: 6, stat.S_IFLNK: 7}


def nid(inode: Inode) -> int:
    """The number by which directories and the superblock name an inode."""
    return inode.at // ondisk.INODE_SLOT_BYTES


def metadata(
    inodes: list[Inode], places: Places, shared: SharedXattrs, block_bytes: int
) -> bytearray:
    """Return everything behind the contents, with zeros where digests go."""
    raw = bytearray((places.end_block - places.metadata_block) * block_bytes)
    raw[places.xattr_at : places.xattr_at + len(shared.area)] = shared.area
    for inode in inodes:
        at = inode.at
        tail_at = at + inode.head_bytes
        raw[at:tail_at] = _inode(inode) + inode.body
        if inode.chunking is not None:
            block_map = inode.chunking.block_map(inode.block)
            raw[tail_at : tail_at + len(block_map)] = block_map
        contents = _contents(inode, block_bytes)
        outside = len(contents)
        if inode.layout == FLAT_INLINE:
            outside -= outside % block_bytes
            raw[tail_at : tail_at + len(contents) - outside] = contents[outside:]
        if outside:
            start = (inode.block - places.metadata_block) * block_bytes
            raw[start : start + outside] = contents[:outside]
    return raw


def _inode(inode: Inode) -> bytes:
    node = inode.node
    union = inode.block
    if inode.chunking is not None:
        union = inode.chunking.bits
    elif isinstance(node, Special):
        union = ondisk.device_number(node.major, node.minor)
    return ondisk.inode(
        node.attributes,
        inode.kind,
        inode.size,
        inode.links,
        compact=inode.compact,
        layout=inode.layout,
        xattr_count=body_count(inode.body),
        union=union,
        number=inode.number,
    )


def _contents(inode: Inode, block_bytes: int) -> bytes:
    """The contents of what is metadata as a whole: directories and links."""
    if isinstance(inode.node, Symlink):
        return inode.node.target
    if not isinstance(inode.node, Directory):
        return b""
    entries = [(name, nid(entry), _TYPES[entry.kind]) for name, entry in inode.entries]
    return ondisk.directory(entries, block_bytes)
