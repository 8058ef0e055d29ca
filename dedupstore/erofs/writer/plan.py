"""A tree -> its image, laid out before a byte of content is read.

Owns the plan: the size of the image, where every file goes, and everything that is not content.
The layout depends on names, attributes and sizes alone, never on contents, so that any range of the
image can be made at any time, by any thread, in any order. Only digests wait for the contents, and
they lie behind all of them. A plan is not changed once made; thread-safe.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dedupstore.erofs.superblock import (
    BLOCK_BITS_MAX,
    BLOCK_BITS_MIN,
    COMPAT_FINGERPRINTS,
    COMPAT_PLAIN_XATTR_PREFIXES,
    SuperblockRecord,
)
from dedupstore.erofs.tree import Directory, ReadInto, RegularFile
from dedupstore.erofs.writer import encoding, ondisk
from dedupstore.erofs.writer.fingerprints import DIGEST_BYTES, PREFIX_RECORD, Span
from dedupstore.erofs.writer.inodes import Inode, collect
from dedupstore.erofs.writer.placement import Places, place, stretches
from dedupstore.erofs.writer.xattrs import SharedXattrs, digest_at
from dedupstore.errors import SourceError

_UUID_BYTES = 16


@dataclass(frozen=True, slots=True, eq=False)
class PlacedFile:
    """A file with blocks of its own.

    `offset`: in the image, on a block boundary; `length`: of its blocks, padding included; both in
    bytes. `spans`: what of the file lies there, (offset in the image, offset in the file, length)
    in bytes, one behind the other; a file that is not sparse has one. What follows the last is
    padding, below a block. `fingerprinted`: whether the metadata needs the file's digest.
    """

    offset: int
    length: int
    spans: tuple[Span, ...]
    node: RegularFile
    fingerprinted: bool

    def fill(self, read_into: ReadInto, at: int, buffer: memoryview) -> None:
        """Fill the caller's buffer with the image's bytes from `offset + at`.

        `read_into`: of the node's opened content. The buffer must end within the file's blocks.
        May run concurrently when `read_into` may. Raises SourceError, also for a file cut short.
        """
        start = self.offset + at
        index = bisect_right(self.spans, start, key=_span_offset) - 1
        while buffer and index < len(self.spans):
            offset, position, length = self.spans[index]
            into = start - offset
            wanted = min(length - into, len(buffer))
            if wanted > 0:
                _read_exactly(read_into, position + into, buffer[:wanted])
                start += wanted
                buffer = buffer[wanted:]
            index += 1
        buffer[:] = bytes(len(buffer))


def _span_offset(span: Span) -> int:
    return span[0]


def _read_exactly(read_into: ReadInto, position: int, buffer: memoryview) -> None:
    while buffer:
        got = read_into(position, buffer)
        if not got:
            raise SourceError("a file became shorter while it was imported")
        position += got
        buffer = buffer[got:]


@dataclass(frozen=True, slots=True, eq=False)
class ImagePlan:
    """An image: `head`, then `files`, ascending and without gaps, then the metadata.

    `size`: of the image, a multiple of the block size; `metadata_at`: where the metadata begins, up
    to the end; both in bytes. `head` is complete: it depends on no content.
    """

    size: int
    head: bytes
    files: tuple[PlacedFile, ...]
    metadata_at: int
    _metadata: bytes = field(repr=False)
    _digest_ats: tuple[tuple[int, int], ...] = field(repr=False)  # (index in files, in metadata)

    def metadata(self, digests: Mapping[int, bytes] | Sequence[bytes] = ()) -> bytes:
        """Return the metadata. `digests`: the SHA-256 of each fingerprinted file's whole content,
        by the file's index in `files`; others are not looked at. An image without fingerprints
        needs none.

        Raises ValueError when one is missing or no SHA-256.
        """
        if not self._digest_ats:
            return self._metadata
        raw = bytearray(self._metadata)
        for index, at in self._digest_ats:
            try:
                digest = digests[index]
            except LookupError:
                raise ValueError(f"no digest of file {index}") from None
            if len(digest) != DIGEST_BYTES:
                raise ValueError(f"digest of file {index}: {len(digest)} bytes, no SHA-256")
            raw[at : at + DIGEST_BYTES] = digest
        return bytes(raw)


def plan_image(
    root: Directory,
    *,
    block_bytes: int = 4096,
    uuid: bytes = bytes(_UUID_BYTES),
    fingerprints: bool = False,
) -> ImagePlan:
    """Lay out the image of a tree, which must not be changed any more.

    `block_bytes`: a power of two, 512 to 65536; Linux mounts what is not larger than its pages,
    before 6.4 only what equals them, and erofs-utils 1.5 take only 4096. `fingerprints`: with
    digests for page cache sharing (see `fingerprints`); older systems pass over them. No content is
    opened.

    Raises SourceError, with the path, for what has no form in EROFS, ValueError for other
    arguments that have none.
    """
    if block_bytes not in [1 << bits for bits in range(BLOCK_BITS_MIN, BLOCK_BITS_MAX + 1)]:
        raise ValueError(f"block size {block_bytes} is no power of two from 512 to 65536")
    if len(uuid) != _UUID_BYTES:
        raise ValueError(f"a UUID of {len(uuid)} bytes, not {_UUID_BYTES}")
    inodes = collect(root)
    epoch = _commonest_time(inodes)
    shared = SharedXattrs(inode.node.attributes.xattrs for inode in inodes)
    places = place(inodes, shared, epoch, block_bytes, fingerprints=fingerprints)
    stored = [inode for inode in inodes if inode.stored]
    return ImagePlan(
        size=places.end_block * block_bytes,
        head=_head(inodes, places, epoch, block_bytes, uuid, fingerprints=fingerprints),
        files=tuple(_placed(inode, block_bytes) for inode in stored),
        metadata_at=places.metadata_block * block_bytes,
        _metadata=bytes(encoding.metadata(inodes, places, shared, block_bytes)),
        _digest_ats=tuple(
            (index, inode.at + inode.head_bytes - len(inode.body) + digest_at(inode.body))
            for index, inode in enumerate(stored)
            if inode.fingerprinted
        ),
    )


def _commonest_time(inodes: list[Inode]) -> ondisk.Time:
    """The time of the superblock, which an inode needs no larger form to have; the earliest of
    equally common ones."""
    times = Counter((i.node.attributes.mtime, i.node.attributes.mtime_ns) for i in inodes)
    return min(times, key=lambda time: (-times[time], time))


def _placed(inode: Inode, block_bytes: int) -> PlacedFile:
    assert isinstance(inode.node, RegularFile)
    offset = inode.block * block_bytes
    spans = []
    end = offset
    for start, length in stretches(inode):
        spans.append((end, start, length))
        end += length
    occupied = -(-inode.stored // block_bytes) * block_bytes
    return PlacedFile(offset, occupied, tuple(spans), inode.node, inode.fingerprinted)


def _head(
    inodes: list[Inode],
    places: Places,
    epoch: ondisk.Time,
    block_bytes: int,
    uuid: bytes,
    *,
    fingerprints: bool,
) -> bytes:
    # The prefix's record stands in the head because its address, in units of 4 bytes, cannot reach
    # behind 16 GiB of contents. INCOMPAT bit 0x40, which says that there are prefixes, stays clear:
    # Linux 6.1 refuses it, and 7.2 and erofs-utils 1.9 look at the count alone.
    compat = ondisk.COMPAT_MTIME
    if fingerprints:
        compat |= COMPAT_PLAIN_XATTR_PREFIXES | COMPAT_FINGERPRINTS
    chunked = any(inode.chunking is not None for inode in inodes)
    record = SuperblockRecord(
        feature_compat=compat,
        block_bits=block_bytes.bit_length() - 1,
        root_nid_short=encoding.nid(inodes[0]),
        inode_count=len(inodes),
        epoch=epoch[0],
        fixed_nsec=epoch[1],
        blocks_low=places.end_block,
        meta_block=places.metadata_block,
        xattr_block=places.metadata_block + places.xattr_at // block_bytes,
        uuid=uuid,
        feature_incompat=ondisk.INCOMPAT_CHUNKED_FILE if chunked else 0,
        xattr_prefix_count=int(fingerprints),
        xattr_prefix_start=ondisk.EXTRA_OFFSET // ondisk.EXTRA_UNIT_BYTES if fingerprints else 0,
    )
    return ondisk.head(record, PREFIX_RECORD if fingerprints else b"")
