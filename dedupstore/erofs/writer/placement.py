"""Where everything goes: contents first, in the order of the inodes, then the metadata.

    head | contents, each file from a block boundary | inodes | shared xattrs | directories, links
                                                     ^ metadata

The contents come first because one pass over them shall give both the stored bytes and the digests,
and only the metadata holds digests. Fills in `Inode`s, which belong to one plan; else pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dedupstore.erofs.layouts import CHUNK_BASED, FLAT_INLINE, aligned
from dedupstore.erofs.superblock import NULL_BLOCK_32
from dedupstore.erofs.tree import Directory, RegularFile
from dedupstore.erofs.writer import ondisk
from dedupstore.erofs.writer.chunks import choose_chunking
from dedupstore.erofs.writer.fingerprints import Fingerprinting
from dedupstore.erofs.writer.inodes import Inode, refusal
from dedupstore.erofs.writer.xattrs import SharedXattrs
from dedupstore.errors import SourceError

# The root's number has 16 bits, so the root comes first; but 0 is what programs take for "none".
_FIRST_INODE_AT = ondisk.INODE_SLOT_BYTES
METADATA_BYTES_MAX = 1 << 30  # it is held in memory
# Of all sparse files' maps, a quarter of what is left for each: from a few bytes of an archive or
# image a map of any length can be asked for. With larger chunks it takes less.
MAPS_BYTES_MAX = 256 << 20


@dataclass(frozen=True, slots=True)
class Places:
    """`metadata_block`: where the metadata begins; `xattr_at`: its shared attributes, bytes from
    there; `end_block`: behind the image's last.
    """

    metadata_block: int
    xattr_at: int
    end_block: int


def place(
    inodes: list[Inode],
    shared: SharedXattrs,
    epoch: ondisk.Time,
    block_bytes: int,
    *,
    fingerprints: bool,
) -> Places:
    """Give every inode its form, its place and the blocks of its contents.

    Raises SourceError for what does not fit.
    """
    metadata_block = _place_files(inodes, block_bytes)
    at = _FIRST_INODE_AT
    wants = Fingerprinting().wants
    for inode in inodes:
        node = inode.node
        if fingerprints and isinstance(node, RegularFile):
            inode.fingerprinted = wants(node.size, node.data_bytes)
        _form(inode, shared, block_bytes)
        inode.compact = ondisk.fits_compact(inode.node.attributes, inode.size, inode.links, epoch)
        at = _place_inode(inode, at, block_bytes)
        if at > METADATA_BYTES_MAX:
            raise refusal(inode, "the metadata up to here are too large for an image")
    xattr_at = aligned(at, block_bytes) if shared.area else 0
    block = (
        metadata_block + aligned(max(at, xattr_at + len(shared.area)), block_bytes) // block_bytes
    )
    for inode in inodes:
        if not isinstance(inode.node, RegularFile):
            inode.block = block
            block += _own_blocks(inode, block_bytes)
    if block >= NULL_BLOCK_32:
        raise SourceError(
            f"too large for an EROFS image: {block} blocks of {block_bytes} bytes, of at most "
            f"{NULL_BLOCK_32 - 1} (larger blocks allow more)"
        )
    return Places(metadata_block, xattr_at, block)


def stretches(inode: Inode) -> Iterable[tuple[int, int]]:
    """What is stored of a file: (offset in the file, length), in bytes.

    All but the last are whole blocks.
    """
    if inode.chunking is not None:
        return inode.chunking.stretches(inode.size)
    return ((0, inode.size),) if inode.size else ()


def _place_files(inodes: list[Inode], block_bytes: int) -> int:
    """Give the files their blocks; returns the block behind them."""
    block = ondisk.head_bytes(block_bytes) // block_bytes
    maps_left = MAPS_BYTES_MAX
    for inode in inodes:
        node = inode.node
        if not isinstance(node, RegularFile):
            continue
        inode.chunking = choose_chunking(node.size, node.extents, block_bytes, maps_left // 4)
        if inode.chunking is not None:
            inode.layout = CHUNK_BASED
            maps_left -= inode.chunking.map_bytes
        inode.stored = sum(length for _, length in stretches(inode))
        if inode.stored:
            inode.block = block
            block += -(-inode.stored // block_bytes)
    return block


def _form(inode: Inode, shared: SharedXattrs, block_bytes: int) -> None:
    """Determine what an inode consists of, wherever it lies."""
    node = inode.node
    if isinstance(node, Directory):
        lengths = [len(name) for name, _ in inode.entries]
        inode.size = ondisk.directory_cuts(lengths, block_bytes)[1]
    try:
        inode.body = shared.body(node.attributes.xattrs, fingerprinted=inode.fingerprinted)
    except SourceError as error:
        raise refusal(inode, str(error)) from None


def _place_inode(inode: Inode, at: int, block_bytes: int) -> int:
    """Place an inode at `at` or soon behind; returns where the next may lie."""
    total = inode.head_bytes
    if inode.chunking is not None:
        total += inode.chunking.map_bytes
    elif inode.size and not isinstance(inode.node, RegularFile):
        tail = inode.size % block_bytes
        if tail and total + tail <= block_bytes:
            inode.layout = FLAT_INLINE
            total += tail
            if at % block_bytes + total > block_bytes:  # a tail may not cross into another block
                at = aligned(at, block_bytes)
    inode.at = at
    return aligned(at + total, ondisk.INODE_SLOT_BYTES)


def _own_blocks(inode: Inode, block_bytes: int) -> int:
    """The blocks of a directory or link; a tail in the inode needs none."""
    if inode.layout == FLAT_INLINE:
        return inode.size // block_bytes
    return -(-inode.size // block_bytes)
