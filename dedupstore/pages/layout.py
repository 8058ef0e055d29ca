"""The format of LMDB's data file, and the checks that need no more than one page or record of it.

Owns the knowledge of LMDB's file format (0.9, 64-bit, little-endian): meta pages, B+trees,
overflow runs and the free list. Takes bytes, and reads no file. Pure functions, thread-safe.

The file, as `mdb.c` of LMDB 0.9.36 defines it (P = page size; a page number times P is an offset):

    page  header 16 bytes: number u64, pad u16, flags u16, then lower u16, upper u16
          (in an overflow page: number of pages in the run, u32)
    meta  pages 0 and 1: header, magic u32, version u32, address u64, map size u64, record of the
          free list, record of MAIN, last page u64, transaction u64. Transaction N is in page N % 2.
    record of a database, 48 bytes: pad u32 (free list: P), flags u16, depth u16, branch pages u64,
          leaf pages u64, overflow pages u64, entries u64, root page u64 (2^64-1: empty)
    tree  page: node offsets u16 from byte 16 to `lower`, in key order; nodes fill `upper` to P
          without a gap. Node: u32, flags u16, key size u16, key, value, to an even length. In a
          leaf the u32 is the value's size; in a branch the u32 and the flags are the child.
    leaf  node flags: 1 the value is the number of an overflow run, 2 it is a database's record
    free  list: key = transaction u64, value = count u64, then page numbers u64, descending
"""

import enum
import struct
from dataclasses import dataclass
from typing import Final

from dedupstore.pages.findings import Fault

PAGE_BYTES_ALLOWED: Final = (4096, 8192, 16384, 32768)

_MAGIC: Final = 0xBEEFC0DE
_VERSION: Final = 1
NO_PAGE: Final = 2**64 - 1
METAS: Final = 2
_DEPTH_MAX: Final = 32  # CURSOR_STACK: a deeper tree overruns LMDB's cursors
PAGES_MAX: Final = 2**35  # LMDB maps the file: 128 TiB, the address space, at 4 KiB a page
_KEY_BYTES_MAX: Final = 511
RECORD_BYTES: Final = 48
ID_BYTES: Final = 8

BRANCH: Final = 0x01
LEAF: Final = 0x02
OVERFLOW: Final = 0x04
_META_FLAG: Final = 0x08
_KINDS: Final = {
    BRANCH: "a branch",
    LEAF: "a leaf",
    OVERFLOW: "an overflow",
    _META_FLAG: "a meta",
}

NODE_OVERFLOW: Final = 0x01
NODE_RECORD: Final = 0x02

_INTEGER_KEY: Final = 0x08
_NO_SUBDIR: Final = 0x4000  # an option of the environment, which LMDB keeps in the same field

_PAGE: Final = struct.Struct("<QHHHH")
RUN: Final = struct.Struct("<QHHI")
RECORD: Final = struct.Struct("<IHHQQQQQ")
_META_BODY: Final = struct.Struct("<IIQQ 48s 48s QQ")
NODE: Final = struct.Struct("<IHH")
U64: Final = struct.Struct("<Q")
HEADER_BYTES: Final = _PAGE.size
META_BYTES: Final = HEADER_BYTES + _META_BODY.size
PAGE_BYTES_AT: Final = slice(HEADER_BYTES + 24, HEADER_BYTES + 28)  # the free list's pad

if (_PAGE.size, RUN.size, RECORD.size, _META_BODY.size, NODE.size) != (16, 16, 48, 136, 8):
    raise AssertionError("a format string disagrees with the tables above")


@dataclass(frozen=True, slots=True)
class Tree:
    """A database's record. Pages and entries are counts, `root` a page number or NO_PAGE."""

    pad: int
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int


@dataclass(frozen=True, slots=True)
class Meta:
    """What meta page `index` says; `number` is its own number as its header gives it."""

    index: int
    number: int
    page_bytes: int
    map_bytes: int
    free: Tree
    main: Tree
    last_page: int
    transaction: int


class Role(enum.Enum):
    """What a tree holds, which decides how its keys and values are read."""

    FREE_LIST = 1
    MAIN = 2
    NAMED = 3


@dataclass(frozen=True, slots=True)
class Database:
    """A tree to walk. `record_page` holds its record."""

    name: str
    role: Role
    tree: Tree
    record_page: int


Metas = tuple[Meta | Fault, Meta | Fault]


def parse_meta(index: int, data: bytes) -> Meta:
    """Parse meta page `index`. Raises Fault: LMDB would not accept it."""
    if len(data) < META_BYTES:
        raise Fault("truncated: the file ends before or in this meta page")
    number, _, flags, _, _ = _PAGE.unpack_from(data)
    magic, version, _, map_bytes, free, main, last_page, transaction = _META_BODY.unpack_from(
        data, HEADER_BYTES
    )
    if magic != _MAGIC:
        raise Fault(f"is no LMDB meta page (magic {magic:#x})")
    if flags != _META_FLAG:
        raise Fault(f"is not marked as a meta page (flags {flags:#x})")
    if version != _VERSION:
        raise Fault(f"has format version {version}, where {_VERSION} is known")
    free_tree, main_tree = Tree(*RECORD.unpack(free)), Tree(*RECORD.unpack(main))
    if free_tree.pad not in PAGE_BYTES_ALLOWED:
        raise Fault(f"has an impossible page size ({free_tree.pad})")
    return Meta(
        index, number, free_tree.pad, map_bytes, free_tree, main_tree, last_page, transaction
    )


def record_fault(tree: Tree, role: Role, last_page: int) -> str | None:
    """Why a database's record cannot be followed; None: it can."""
    free = role is Role.FREE_LIST
    if tree.flags & ~(_NO_SUBDIR if free else 0) != (_INTEGER_KEY if free else 0):
        return f"has unsupported flags ({tree.flags:#x})"
    if tree.pad and not free:
        return f"has a value size ({tree.pad}), which only MDB_DUPFIXED uses"
    counts = (tree.branch_pages, tree.leaf_pages, tree.overflow_pages, tree.entries)
    if tree.root == NO_PAGE:
        return "has no root page but is not empty" if tree.depth or any(counts) else None
    if not METAS <= tree.root <= last_page:
        return f"names root page {tree.root}, where the last page is {last_page}"
    if not 1 <= tree.depth <= _DEPTH_MAX:
        return f"has an impossible depth ({tree.depth})"
    if sum(counts[:3]) > last_page:
        return f"counts {sum(counts[:3])} pages, more than the file has"
    return None


def check_page(data: bytes, page: int, kind: int, page_bytes: int) -> None:
    """Raise Fault unless `data` begins with the header of tree page `page`."""
    if len(data) < HEADER_BYTES:
        raise Fault("lies beyond the end of the file")
    number, _, flags, lower, upper = _PAGE.unpack_from(data)
    if number != page:
        raise Fault(f"says it is page {number}")
    if flags != kind:
        raise Fault(wrong_kind(flags, kind))
    if lower % 2 or not HEADER_BYTES <= lower <= upper <= page_bytes:
        raise Fault(f"has impossible bounds (lower {lower}, upper {upper})")
    nodes = (lower - HEADER_BYTES) >> 1
    if nodes < (2 if kind == BRANCH else 1):
        raise Fault(f"holds only {nodes} nodes")


def wrong_kind(flags: int, wanted: int) -> str:
    """The reason for a page with `flags` where the kind `wanted` belongs."""
    found = f"is {_KINDS[flags]} page" if flags in _KINDS else f"has flags {flags:#x}"
    return f"{found} where {_KINDS[wanted]} page belongs"


NodeHeader = tuple[int, int, int]
"""Of a node: u32 (value size, or low part of the child), flags, key size in bytes."""


def parse_nodes(data: bytes, kind: int, page_bytes: int) -> tuple[list[int], list[NodeHeader]]:
    """Offsets and headers of a page's nodes, in key order. Raises Fault: a node is out of place.

    LMDB packs nodes without gaps (`mdb_node_add`, `mdb_node_del`, `mdb_update_key`), so it is not
    enough that they do not overlap. Each node leads from its offset to its end; if these steps
    visit the offsets plus the page's end, and nothing twice, they are one path from `upper` to the
    end. Comparing two sets says that, at half the cost of sorting.
    """
    lower, upper = struct.unpack_from("<HH", data, 12)
    offsets = list(struct.unpack_from(f"<{(lower - HEADER_BYTES) >> 1}H", data, HEADER_BYTES))
    if min(offsets) < upper or max(offsets) > page_bytes - NODE.size:
        raise Fault("has a node outside its bounds")
    unpack = NODE.unpack_from
    headers: list[NodeHeader] = [unpack(data, offset) for offset in offsets]
    if kind == BRANCH:
        ends = {offset + 9 + key & -2 for offset, (_, _, key) in zip(offsets, headers, strict=True)}
    else:
        ends = {
            offset + 9 + key + (ID_BYTES if flags & NODE_OVERFLOW else size) & -2
            for offset, (size, flags, key) in zip(offsets, headers, strict=True)
        }
    if max(ends) > page_bytes:
        raise Fault("has a node that runs past its end")
    starts = set(offsets)
    if len(starts) != len(offsets) or starts | {page_bytes} != ends | {upper}:
        raise Fault("has nodes that overlap or leave gaps")
    return offsets, headers


def node_keys(
    data: bytes, kind: int, offsets: list[int], headers: list[NodeHeader], *, integers: bool
) -> list[bytes]:
    """The nodes' keys, as bytes that compare like the keys; `integers`: they are u64.

    A branch's first key is not one: LMDB ignores it, and may leave it empty.
    Raises Fault: a key has a size LMDB never gives it.
    """
    sizes = [size for _, _, size in headers]
    real = sizes[1:] if kind == BRANCH else sizes
    shortest, longest = (ID_BYTES, ID_BYTES) if integers else (1, _KEY_BYTES_MAX)
    if min(real) < shortest or max(real) > longest:
        raise Fault(f"has keys of {min(real)} to {max(real)} bytes")
    keys = [
        data[offset + 8 : offset + 8 + size] for offset, size in zip(offsets, sizes, strict=True)
    ]
    return [key[::-1] for key in keys] if integers else keys


def check_keys(keys: list[bytes], low: bytes, high: bytes | None) -> None:
    """Raise Fault unless keys ascend strictly within [low, high); None is no bound."""
    if sorted(keys) != keys or len(set(keys)) != len(keys):
        raise Fault("has keys out of order")
    if keys[0] < low or (high is not None and keys[-1] >= high):
        raise Fault("has keys outside the bounds its parent gives")
