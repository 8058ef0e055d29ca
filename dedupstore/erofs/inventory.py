"""A whole tree out of an uncompressed image: every name, attribute and stretch of contents.

Owns the order of the walk and what makes a tree of inodes: each directory has one name, an inode
with several names is one node. Inodes are visited as `walk` does it, in waves that share reads.
File contents are not read. Not thread-safe; every call of `read_tree` has a walk of its own.

Bounds, besides those of `metadata.Budget`, which also counts links and attributes, and of
`contents.Placer`: one inode per `INODE_SLOT_BYTES` of image, and `INODES_MAX` in all; `NAMES_MAX`
names. The tree takes some 700 bytes of memory per inode and 200 per name.
"""

from bisect import bisect_left
from collections.abc import Callable

from dedupstore.erofs import inodes, layouts
from dedupstore.erofs.contents import ImageContent, Placer, extents
from dedupstore.erofs.inodes import Inode, read_inode
from dedupstore.erofs.listing import Entry, directory_entries
from dedupstore.erofs.metadata import PIECE_BYTES, Budget, ReadAt, Space
from dedupstore.erofs.superblock import (
    COMPAT_PLAIN_XATTR_PREFIXES,
    COMPAT_SHARED_XATTRS_IN_METABOX,
    METABOX_NID_FLAG,
    read_superblock,
)
from dedupstore.erofs.tree import Attributes, Directory, Node, RegularFile, Special, Symlink
from dedupstore.erofs.xattrs import (
    NO_XATTRS,
    PREFIXES_BYTES_MAX,
    Prefix,
    XattrReader,
    long_prefixes,
)
from dedupstore.errors import ErofsError

NAMES_MAX = 2 * inodes.INODES_MAX  # hard links have more than one; 3 GB while the tree is read
_TARGET_BYTES_MAX = 4095  # PATH_MAX of Linux, less the zero byte
_PREFIX_UNIT_BYTES = 4

_Listing = tuple[Directory, list[Entry], int]  # the entries, and where the directory's inode lies


Ahead = Callable[[list[tuple[int, int]]], None]
"""Gets (offset, length) in the image of what is about to be read, as the image claims: it may lie
outside."""


def read_tree(
    read_at: ReadAt, size: int, data_bytes: int | None = None, ahead: Ahead | None = None
) -> Directory:
    """Return the tree of an EROFS image of `size` bytes that is stored uncompressed.

    `data_bytes`: what of the image is no hole, if that is known: it bounds the sum of the contents.
    `ahead` is told what is about to be read, the inodes and the directories of a level at a time,
    where reading many things at once is cheaper than one after the other.

    Attributes are those that the kernel shows. Files have an `ImageContent`, which calls `read_at`
    whenever it is read, and tells by its `pieces` where in the image they lie. Links are not
    counted: a node has as many names as there are entries with it, whatever its inode claims.

    `read_at(offset, length)` returns up to `length` bytes, fewer only at the end of the image; it
    is called from this thread only. Raises `ErofsError` when the metadata is malformed or of an
    unknown kind, when contents are compressed or on another device, and when the tree is larger
    than the image's size permits (see the module's bounds).
    """
    return _Inventory(read_at, size, size if data_bytes is None else data_bytes, ahead).run()


class _Inventory:
    """One walk: the nodes made so far, and the directories whose entries await theirs."""

    def __init__(self, read_at: ReadAt, size: int, data_bytes: int, ahead: Ahead | None) -> None:
        self._ahead = ahead
        superblock = read_superblock(read_at, size)
        self._superblock = superblock
        # What lies between inodes is contents, which are not to be fetched with them from afar.
        self._gap_bytes = superblock.block_bytes if ahead else inodes.WINDOW_GAP_BYTES
        self._read_at = read_at
        self._placer = Placer(superblock, size, data_bytes)
        budget = Budget(size)
        meta_at = superblock.meta_block << superblock.block_bits
        self._image = Space(read_at, meta_at, size, budget)
        self._metabox = inodes.metabox_space(self._image, read_at, superblock, size, budget)
        self._xattrs = self._xattr_reader()
        self._inodes_max = min(size // inodes.INODE_SLOT_BYTES, inodes.INODES_MAX)
        self._names_left = NAMES_MAX
        self._nodes: dict[int, Node] = {}
        self._named = {superblock.root_nid}  # directories that have their one name
        self._listings: list[_Listing] = []

    def run(self) -> Directory:
        """Visit every inode that can be reached, wave by wave."""
        root_nid = self._superblock.root_nid
        wave = {root_nid}
        while wave:
            if len(self._nodes) + len(wave) > self._inodes_max:
                raise ErofsError(self._image.base, inodes.TOO_MANY_INODES)
            parents, self._listings = self._listings, []
            self._visit(wave)
            self._link(parents)
            known = self._nodes  # subtracting its keys would visit them all, once per wave
            listings = self._listings
            wave = {nid for _, entries, _ in listings for _, nid in entries if nid not in known}
        self._link(self._listings)
        root = self._nodes[root_nid]
        if not isinstance(root, Directory):
            raise ErofsError(self._image.base, "the root is no directory")
        return root

    def _visit(self, wave: set[int]) -> None:
        """Make the nodes of a wave."""
        nids = sorted(wave)
        boxed = bisect_left(nids, METABOX_NID_FLAG)
        spaces = [(self._image, nids[:boxed])]
        if boxed < len(nids):
            if self._metabox is None:
                raise ErofsError(self._image.base, "inodes in a missing or compressed metabox")
            spaces.append((self._metabox, nids[boxed:]))
        epoch, epoch_ns = self._superblock.epoch, self._superblock.epoch_ns
        block_bytes = self._superblock.block_bytes
        nodes = self._nodes
        if self._ahead is not None:
            self._announce(spaces, self._ahead)
        for space, wanted in spaces:
            for window, origin, part in inodes.windows(space, wanted, block_bytes, self._gap_bytes):
                delta = space.base - origin
                for nid in part:
                    at = delta + nid * inodes.INODE_SLOT_BYTES
                    inode = read_inode(window, at, origin + at, epoch, epoch_ns)
                    nodes[nid] = self._node(space, inode)

    def _announce(self, spaces: list[tuple[Space, list[int]]], ahead: Ahead) -> None:
        """Tell what a wave is going to read: its inodes, then its directories."""
        bits, block_bytes = self._superblock.block_bits, self._superblock.block_bytes
        ahead(
            [
                r
                for each in spaces
                for r in inodes.window_ranges(*each, block_bytes, self._gap_bytes)
            ]
        )
        blocks = []
        for space, wanted in spaces:
            for window, origin, part in inodes.windows(space, wanted, block_bytes, self._gap_bytes):
                for nid in part:
                    at = space.base - origin + nid * inodes.INODE_SLOT_BYTES
                    layout, kind, size, first, _ = inodes.placement(window, at, origin + at)
                    if kind == inodes.KIND_DIRECTORY and layout in (
                        layouts.FLAT_PLAIN,
                        layouts.FLAT_INLINE,
                    ):
                        blocks.append((first << bits, min(size, PIECE_BYTES)))
        ahead(blocks)

    def _link(self, listings: list[_Listing]) -> None:
        """Give directories their entries, all of whose nodes are there."""
        nodes = self._nodes
        for directory, entries, offset in listings:
            linked = directory.entries
            for name, nid in entries:
                node = nodes[nid]
                if type(node) is Directory:
                    if nid in self._named:
                        raise ErofsError(offset, f"a directory's second name: {name!r}")
                    self._named.add(nid)
                linked[name] = node
            if len(linked) != len(entries):
                raise ErofsError(offset, "a directory that lists a name twice")

    def _node(self, space: Space, inode: Inode) -> Node:
        xattrs = NO_XATTRS
        at = inode.xattrs_at
        if inode.contents_at != at:
            xattrs = self._xattrs.read(space, at, inode.contents_at - at)
        attributes = Attributes(
            inode.permissions, inode.uid, inode.gid, inode.mtime, inode.mtime_ns, xattrs
        )
        kind = inode.kind
        if kind == inodes.KIND_REGULAR:
            pieces = self._placer.pieces(space, inode)
            self._placer.charge(inode, pieces)
            content = ImageContent(self._read_at, inode.size, pieces)
            return RegularFile(attributes, inode.size, extents(pieces), content)
        if kind == inodes.KIND_DIRECTORY:
            directory = Directory(attributes)
            self._listings.append((directory, self._entries(space, inode), at))
            return directory
        if kind == inodes.KIND_LINK:
            return Symlink(attributes, self._target(space, inode))
        if kind not in inodes.KINDS_WITHOUT_CONTENTS:
            raise ErofsError(at, f"unknown file type {kind:#o}")
        if kind in inodes.KINDS_OF_DEVICES:
            return Special(attributes, kind, *_device(inode.first))
        return Special(attributes, kind)

    def _entries(self, space: Space, inode: Inode) -> list[Entry]:
        entries = directory_entries(
            self._contents(space, inode),
            self._superblock.block_bytes,
            inode.xattrs_at,
            self._names_left,
        )
        self._names_left -= len(entries)
        return entries

    def _target(self, space: Space, inode: Inode) -> bytes:
        if not 0 < inode.size <= _TARGET_BYTES_MAX:
            raise ErofsError(inode.xattrs_at, f"a symbolic link of {inode.size} bytes")
        target = self._contents(space, inode)
        if b"\0" in target:
            raise ErofsError(inode.xattrs_at, "a symbolic link with a zero byte")
        return target

    def _contents(self, space: Space, inode: Inode) -> bytes:
        """All of a directory or link. Charged to the budget before anything is read."""
        pieces = self._placer.pieces(space, inode)
        if sum(length for _, length, _ in pieces) != inode.size:
            raise ErofsError(inode.xattrs_at, "a directory or link with a hole")
        # A tail is in the window of the space; blocks need not be inside the metabox.
        return b"".join(
            (space if at == inode.contents_at else self._image).bytes_at(at, length)
            for _, length, at in pieces
        )

    def _xattr_reader(self) -> XattrReader:
        superblock = self._superblock
        prefixes = self._long_prefixes()
        hidden = superblock.fingerprint_prefix
        if hidden is not None and hidden >= len(prefixes):
            raise ErofsError(self._image.base, "content digests without a name")
        space, start = self._image, 0
        if superblock.feature_compat & COMPAT_SHARED_XATTRS_IN_METABOX:
            if self._metabox is None:
                raise ErofsError(self._image.base, "attributes in a missing or compressed metabox")
            space = self._metabox
            start = space.base + METABOX_NID_FLAG * inodes.INODE_SLOT_BYTES
        shared_at = start + (superblock.xattr_block << superblock.block_bits)
        return XattrReader(space, shared_at, prefixes, None if hidden is None else prefixes[hidden])

    def _long_prefixes(self) -> list[Prefix]:
        """Read the long prefixes from the image, or from the special inode that holds them."""
        superblock = self._superblock
        if not superblock.xattr_prefix_count:
            return []
        start = superblock.xattr_prefix_start * _PREFIX_UNIT_BYTES
        nid = superblock.metabox_nid or superblock.packed_nid
        if superblock.feature_compat & COMPAT_PLAIN_XATTR_PREFIXES or not nid:
            inside = max(self._image.end - start, 0)
            raw = self._read_at(start, min(PREFIXES_BYTES_MAX, inside)) if inside else b""
        else:
            raw = self._part_of(nid, start, PREFIXES_BYTES_MAX)
        return long_prefixes(raw, superblock.xattr_prefix_count, start)

    def _part_of(self, nid: int, start: int, length_max: int) -> bytes:
        """Up to `length_max` bytes of the contents of an inode, fewer at its end."""
        image = self._image
        offset = image.base + nid * inodes.INODE_SLOT_BYTES
        if offset >= image.end:
            raise ErofsError(offset, "an inode lies behind the end of the metadata")
        raw = image.load_window(offset, inodes.COMPACT_INODE_BYTES, inodes.EXTENDED_INODE_BYTES)
        inode = read_inode(raw, 0, offset, self._superblock.epoch, self._superblock.epoch_ns)
        content = ImageContent(self._read_at, inode.size, self._placer.pieces(image, inode))
        part = memoryview(bytearray(max(min(length_max, inode.size - start), 0)))
        filled = 0
        while filled < len(part):
            filled += content.read_into(start + filled, part[filled:])
        return bytes(part)


def _device(number: int) -> tuple[int, int]:
    """Return major and minor of the kernel's 32-bit form (new_decode_dev)."""
    return number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00
