"""Verifies the page structure of the store's LMDB data file before LMDB is trusted with it.

Owns the knowledge of LMDB's file format (0.9, 64-bit, little-endian): meta pages, B+trees,
overflow runs and the free list. It only reads, and only with pread: LMDB maps the file and follows
page numbers, node offsets and sizes as it finds them, so on a damaged or truncated file it ends the
process (SIGSEGV, SIGBUS, abort) where this module reports. It does not look inside values: those
carry checksums of their own, which other layers verify. Databases with flags (MDB_DUPSORT,
MDB_INTEGERKEY, ...) are reported as unsupported, never walked: the store has none.

Thread-safe: every call opens the file anew and shares nothing.

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

How LMDB picks a meta page (`mdb_env_read_header`, `mdb_env_pick_meta`, `mdb_txn_renew0`):
it refuses to open a file (MDB_INVALID) unless *both* have the magic, version and flag; finds page 1
by the page size in page 0; takes the higher transaction, with no checksum and no second opinion;
and while another process has the store open, it takes page (transaction % 2) instead. A flipped
transaction number therefore silently revives the snapshot before the last commit, which the next
commit makes final. Hence we ask for two valid pages that are one transaction apart, as commits
leave them (which one flip in 64 escapes: 10 and 11 may become 10 and 9). A torn meta page is no
false alarm: a commit rewrites only the *older* one, in one write of 120 bytes whose last field is
the transaction.

A healthy file may be shorter than its last page (`mdb.c`: "the file may be shorter if the freeDB
lists the final pages"): pages allocated and given back within one transaction are never written.
Only pages that are not on the free list must be there, and that is what we check.

When pages of a snapshot can change (numbered as in `mdb_page_alloc`): pages that snapshot N uses
and N+1 gives up are reused at the earliest by transaction N+3, which begins after N+2 is committed.
So whatever was read while no meta page said N+2 or more was read from an intact snapshot N.
"""

import contextlib
import enum
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from dedupstore.errors import StoreAccessError, StoreDamagedError

META: Final = "(meta)"
FREE_LIST: Final = "(free list)"
MAIN: Final = "(main)"

FINDINGS_MAX: Final = 1000
"""A walk stops after this many findings: more would say nothing new and take memory."""

PAGE_BYTES_ALLOWED: Final = (4096, 8192, 16384, 32768)

_MAGIC: Final = 0xBEEFC0DE
_VERSION: Final = 1
_NO_PAGE: Final = 2**64 - 1
_METAS: Final = 2
_DEPTH_MAX: Final = 32  # CURSOR_STACK: a deeper tree overruns LMDB's cursors
_PAGES_BEYOND_MAX: Final = 2**28  # given back in one transaction, never written: 1 TiB
_PAGES_MAX: Final = 2**35  # LMDB maps the file: 128 TiB, the address space, at 4 KiB a page
_KEY_BYTES_MAX: Final = 511
_RECORD_BYTES: Final = 48
_ID_BYTES: Final = 8
_FREE_LIST_CHUNK_BYTES: Final = 1 << 20
_PROGRESS_PAGES: Final = 4096
_WALK_ATTEMPTS: Final = 5
_HEADER_ATTEMPTS: Final = 100
_META_READS: Final = 1000
_CREATION_WAITS: Final = (0.002, 0.01, 0.05)  # seconds

_BRANCH: Final = 0x01
_LEAF: Final = 0x02
_OVERFLOW: Final = 0x04
_META_FLAG: Final = 0x08
_KINDS: Final = {
    _BRANCH: "a branch",
    _LEAF: "a leaf",
    _OVERFLOW: "an overflow",
    _META_FLAG: "a meta",
}

_NODE_OVERFLOW: Final = 0x01
_NODE_RECORD: Final = 0x02

_INTEGER_KEY: Final = 0x08
_NO_SUBDIR: Final = 0x4000  # an option of the environment, which LMDB keeps in the same field

_PAGE: Final = struct.Struct("<QHHHH")
_RUN: Final = struct.Struct("<QHHI")
_RECORD: Final = struct.Struct("<IHHQQQQQ")
_META_BODY: Final = struct.Struct("<IIQQ 48s 48s QQ")
_NODE: Final = struct.Struct("<IHH")
_U64: Final = struct.Struct("<Q")
_HEADER_BYTES: Final = _PAGE.size
_META_BYTES: Final = _HEADER_BYTES + _META_BODY.size
_PAGE_BYTES_AT: Final = slice(_HEADER_BYTES + 24, _HEADER_BYTES + 28)  # the free list's pad

if (_PAGE.size, _RUN.size, _RECORD.size, _META_BODY.size, _NODE.size) != (16, 16, 48, 136, 8):
    raise AssertionError("a format string disagrees with the tables above")

Progress = Callable[[int, int], None]
"""Called with pages done and pages in all."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong: the page's number, the database it serves, and the reason in words.

    Where a page cannot be trusted at all (out of range, used twice), `page` is its number and
    `reason` says so; where a database's own record is wrong, `page` is the page that holds it.
    """

    page: int
    database: str
    reason: str

    def __str__(self) -> str:
        return f"page {self.page} of {self.database}: {self.reason}"


@dataclass(frozen=True, slots=True)
class PageReport:
    """What a walk saw. The structure is sound if `findings` is empty.

    `pages_walked`: meta, tree and overflow pages accounted for (pages on the free list are not
    counted). `entries`: per database, the keys in the leaves that could be read; FREE_LIST and MAIN
    are among them, MAIN's entries being the databases.
    """

    pages_walked: int
    entries: dict[str, int]
    findings: tuple[Finding, ...]


def verify_header(path: str | os.PathLike[str]) -> None:
    """Verify both meta pages, both root pages and the file's length, before LMDB maps the file.

    Takes microseconds whatever the store's size, except on a file shorter than its last page: then
    the free list is read to tell a healthy file from a truncated one. Damage further down the trees
    is left to `verify_pages`. Needs no lock, and gives no false alarm while others write, or while
    another process is just creating the file. May be called from any thread.

    Raises StoreDamagedError: the file is truncated or its header is damaged; the message is one
    line with the file, the reason and what to do. StoreAccessError: it cannot be opened.
    """
    with _DataFile(path) as file:
        for _ in range(_HEADER_ATTEMPTS):
            with contextlib.suppress(_OvertakenError):
                fault = _header_fault(file)
                if fault is None:
                    return
                raise _damaged(path, fault)
        # Other processes commit faster than we read a few pages: LMDB works well on this file.


def verify_pages(
    path: str | os.PathLike[str],
    *,
    on_progress: Progress | None = None,
    snapshot_held: bool = False,
) -> PageReport:
    """Walk every tree of the newest snapshot and check that LMDB can follow it without harm.

    Checked: every page's number, flags and bounds; every node within its page and apart from the
    others; keys in order and within the bounds the parents give; depth and counts against the
    database's record; overflow runs; the free list; and that every page up to the last is used
    exactly once, by one tree or by the free list. Values are not read.

    The file may be quiescent, or in use. Whoever holds an LMDB read transaction or the write lock
    passes `snapshot_held=True`: no page of the newest snapshot is then reused during the walk.
    Without (opening a damaged file with LMDB may crash, so there may be no way to hold one) a
    finding counts only if the snapshot was still intact after it was made; if a writer was faster,
    the walk starts again, 5 times at most. May be called from any thread.

    `on_progress(done, total)`, in pages, is called now and then and once at the end (`done` falls
    when the walk starts again); what it raises ends the walk and reaches the caller. Memory: 2 bits
    a page of the file, plus one path of a tree, the databases' names and at most FINDINGS_MAX
    findings. Bad content never raises.

    Raises StoreAccessError: the file cannot be opened, or is written to too fast to be walked;
    StoreDamagedError: the disk fails to read the meta pages (other pages become findings).
    """
    with _DataFile(path) as file:
        for _ in range(_WALK_ATTEMPTS):
            walk = None
            try:
                metas = file.metas()
                walk = _Walk(
                    file, metas, file.size(), on_progress=on_progress, snapshot_held=snapshot_held
                )
                walk.run()
                return walk.report()
            except _OvertakenError:
                if walk is not None and walk.findings:  # the snapshot was intact: they stand
                    return walk.report()
    raise StoreAccessError(
        f"{os.fspath(path)}: written to faster than it can be checked "
        "(stop the writers, or check while holding a read transaction)"
    )


def verify_trees(path: str | os.PathLike[str], *, skip: frozenset[str] = frozenset()) -> None:
    """Walk the newest snapshot's trees like `verify_pages`, except the databases named in `skip`,
    and raise on the first thing wrong. For a caller that is about to write, in LMDB's hands: a free
    list that names a page in use makes the next commit destroy it.

    The caller holds an LMDB read transaction or the write lock. May be called from any thread.

    Raises StoreDamagedError as `verify_header` does. StoreAccessError: the file cannot be opened.
    """
    with _DataFile(path) as file:
        # Length after meta pages: a file that grows meanwhile is never too short.
        metas = file.metas()
        walk = _Walk(file, metas, file.size(), on_progress=None, snapshot_held=True)
        walk.run(skip)
        for finding in walk.findings:
            raise _damaged(path, _Fault(f"(of {finding.database}) {finding.reason}", finding.page))


class _Fault(Exception):  # noqa: N818 (not an error of the program: it becomes a finding)
    """The page at hand is wrong; whoever knows the database makes a finding of it."""

    def __init__(self, reason: str, page: int | None = None) -> None:
        super().__init__(reason, page)
        self.reason = reason
        self.page = page


class _OvertakenError(Exception):
    """Writers have begun to reuse pages of the snapshot being walked."""


class _EnoughError(Exception):
    """FINDINGS_MAX is reached."""


def _damaged(path: str | os.PathLike[str], fault: _Fault) -> StoreDamagedError:
    where = "" if fault.page is None else f"page {fault.page}: "
    return StoreDamagedError(
        f"{os.fspath(path)}: {where}{fault.reason} "
        "(do not write to the store; restore this file from a copy)"
    )


@dataclass(frozen=True, slots=True)
class _Tree:
    """A database's record. Pages and entries are counts, `root` a page number or _NO_PAGE."""

    pad: int
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int


@dataclass(frozen=True, slots=True)
class _Meta:
    index: int
    number: int
    page_bytes: int
    map_bytes: int
    free: _Tree
    main: _Tree
    last_page: int
    transaction: int


class _Role(enum.Enum):
    FREE_LIST = 1
    MAIN = 2
    NAMED = 3


@dataclass(frozen=True, slots=True)
class _Database:
    """A tree to walk. `record_page` holds its record."""

    name: str
    role: _Role
    tree: _Tree
    record_page: int


_Metas = tuple[_Meta | _Fault, _Meta | _Fault]


class _DataFile:
    """The open file. `size` is read anew at each call: a live file grows, it never shrinks."""

    __slots__ = ("_fd", "_path")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        try:
            # Without O_NONBLOCK a FIFO in the file's place would hang us.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise StoreAccessError(f"{self._path}: cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise StoreAccessError(f"{self._path}: is not a regular file")
        self._await_creation()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def size(self) -> int:
        """Length in bytes."""
        return os.fstat(self._fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, or as many as there are. Raises _Fault: the disk fails."""
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise _Fault(f"cannot be read: {error.strerror}") from error

    def _await_creation(self) -> None:
        """Let another process finish the one write that creates both meta pages."""
        for wait in _CREATION_WAITS:
            if self.size() >= 2 * PAGE_BYTES_ALLOWED[0]:
                return
            time.sleep(wait)

    def metas(self) -> _Metas:
        """Both meta pages as they were at one instant, each parsed, or the fault that prevents it.

        Commits between the first read and the second would pair a page with one far newer, and a
        read may meet a write half done. Transactions only grow: a pair that reads the same twice
        in a row was there, whole and together, in between.
        Raises _OvertakenError: they change faster than they can be read.
        """
        data = self._read_metas()
        for _ in range(_META_READS):
            before, data = data, self._read_metas()
            if before == data:
                return _parse_metas(data)
        raise _OvertakenError

    def _read_metas(self) -> list[bytes]:
        """Meta page 0, then page 1 at each place it may have: one, unless page 0 is damaged.

        Raises StoreDamagedError: the disk fails.
        """
        try:
            first = os.pread(self._fd, _META_BYTES, 0)
            page_bytes = first[_PAGE_BYTES_AT] if len(first) == _META_BYTES else b""
            named = [at for at in PAGE_BYTES_ALLOWED if at.to_bytes(4, "little") == page_bytes]
            places = named or PAGE_BYTES_ALLOWED
            return [first, *(os.pread(self._fd, _META_BYTES, place) for place in places)]
        except OSError as error:
            raise StoreDamagedError(
                f"{self._path}: the meta pages cannot be read: {error.strerror} "
                "(restore this file from a copy, on another disk)"
            ) from error

    def check_intact(self, metas: _Metas) -> None:
        """Raise _OvertakenError if pages of the newest snapshot in `metas` may have been reused."""
        old, new = _newest(metas), _newest(self.metas())
        if old is None or new is None:
            moved = old is not new
        else:
            moved = new.transaction - old.transaction >= 2
        if moved:
            raise _OvertakenError


def _parse_meta(index: int, data: bytes) -> _Meta:
    if len(data) < _META_BYTES:
        raise _Fault("truncated: the file ends before or in this meta page")
    number, _, flags, _, _ = _PAGE.unpack_from(data)
    magic, version, _, map_bytes, free, main, last_page, transaction = _META_BODY.unpack_from(
        data, _HEADER_BYTES
    )
    if magic != _MAGIC:
        raise _Fault(f"is no LMDB meta page (magic {magic:#x})")
    if flags != _META_FLAG:
        raise _Fault(f"is not marked as a meta page (flags {flags:#x})")
    if version != _VERSION:
        raise _Fault(f"has format version {version}, where {_VERSION} is known")
    free_tree, main_tree = _Tree(*_RECORD.unpack(free)), _Tree(*_RECORD.unpack(main))
    if free_tree.pad not in PAGE_BYTES_ALLOWED:
        raise _Fault(f"has an impossible page size ({free_tree.pad})")
    return _Meta(
        index, number, free_tree.pad, map_bytes, free_tree, main_tree, last_page, transaction
    )


def _parse_metas(data: list[bytes]) -> _Metas:
    """Parse page 0, and of the candidates for page 1 the one that knows its own place."""

    def parse(index: int, page: bytes) -> _Meta | _Fault:
        try:
            return _parse_meta(index, page)
        except _Fault as fault:
            fault.page = index
            return fault

    first, *candidates = data
    seconds = [parse(1, page) for page in candidates]
    if len(seconds) > 1:
        for second, page_bytes in zip(seconds, PAGE_BYTES_ALLOWED, strict=True):
            if isinstance(second, _Meta) and second.page_bytes == page_bytes:
                return parse(0, first), second
    return parse(0, first), seconds[0]


def _newest(metas: _Metas) -> _Meta | None:
    """The meta page LMDB would use, or the only valid one."""
    valid = [meta for meta in metas if isinstance(meta, _Meta)]
    return max(valid, key=lambda meta: (meta.transaction, -meta.index), default=None)


def _meta_faults(metas: _Metas, size: int) -> Iterator[_Fault]:
    """What is wrong with the pair of meta pages, for a file of `size` bytes."""
    newest = _newest(metas)
    if newest is None:
        if size < 2 * PAGE_BYTES_ALLOWED[0]:
            yield _Fault(f"truncated: has {size} bytes, needs {2 * PAGE_BYTES_ALLOWED[0]} or more")
        else:
            yield _Fault("neither meta page is valid: this is no LMDB file, or its start is lost")
        return
    needed = (newest.last_page + 1) * newest.page_bytes
    if newest.last_page < _METAS - 1 or newest.last_page >= _PAGES_MAX:
        yield _Fault(f"names an impossible last page ({newest.last_page})", newest.index)
    elif size < _METAS * newest.page_bytes or newest.last_page > _last_page_max(newest, size):
        yield _Fault(f"truncated: has {size} bytes, needs {needed}")
    for fault in metas:
        if isinstance(fault, _Fault):
            yield _Fault(
                f"{fault.reason}; LMDB needs both meta pages, though the other "
                f"(transaction {newest.transaction}) is valid",
                fault.page,
            )
            return
    yield from _pair_faults(*(meta for meta in metas if isinstance(meta, _Meta)))


def _last_page_max(meta: _Meta, size: int) -> int:
    """The highest last page that a healthy file of `size` bytes can have.

    Pages beyond the end of the file must be on the free list, whose own pages are in the file: so
    their number says how many that can be. It refuses nearly every truncated file without reading
    further, and keeps a flipped bit in `last_page` from costing us memory.
    """
    file_pages = size // meta.page_bytes
    list_pages = min(meta.free.leaf_pages + meta.free.overflow_pages, file_pages)
    beyond = min(list_pages * meta.page_bytes // _ID_BYTES, _PAGES_BEYOND_MAX)
    return min(file_pages + beyond, _PAGES_MAX) - 1


def _pair_faults(first: _Meta, second: _Meta) -> Iterator[_Fault]:
    if first.page_bytes != second.page_bytes:
        yield _Fault(
            f"the meta pages name different page sizes ({first.page_bytes}, {second.page_bytes})", 1
        )
    old, new = sorted((first, second), key=lambda meta: meta.transaction)
    fresh = old.transaction == new.transaction == 0
    if not fresh and (new.transaction - old.transaction != 1 or new.transaction % 2 != new.index):
        yield _Fault(
            f"the meta pages are from transactions {first.transaction} and {second.transaction}, "
            "which no two commits leave behind: one number is wrong, and LMDB might use a "
            "snapshot that is not the last"
        )


def _header_fault(file: _DataFile) -> _Fault | None:
    """The first thing wrong. Raises _OvertakenError: it could not be trusted."""
    metas = file.metas()
    try:
        _verify_header(file, metas)
    except _Fault as fault:
        file.check_intact(metas)
        return fault
    return None


def _verify_header(file: _DataFile, metas: _Metas) -> None:
    """Raises _Fault with the first thing wrong."""
    # The length is taken after the meta pages, so a file that grows meanwhile is never too short.
    size = file.size()
    for fault in _meta_faults(metas, size):
        raise fault
    meta = _newest(metas)
    if meta is None:
        return  # that is one of the faults
    trees = ((FREE_LIST, _Role.FREE_LIST, meta.free), (MAIN, _Role.MAIN, meta.main))
    for name, role, tree in trees:
        wrong = _record_fault(tree, role, meta.last_page)
        if wrong is not None:
            raise _Fault(f"the record of {name} {wrong}", meta.index)
    if size < (meta.last_page + 1) * meta.page_bytes:
        _check_tail(file, metas, meta, size)
    for name, _, tree in trees:
        if tree.root != _NO_PAGE:
            kind = _LEAF if tree.depth == 1 else _BRANCH
            data = file.read(tree.root * meta.page_bytes, _HEADER_BYTES)
            try:
                _check_page(data, tree.root, kind, meta.page_bytes)
            except _Fault as fault:
                raise _Fault(f"the root of {name} {fault.reason}", tree.root) from None


def _check_tail(file: _DataFile, metas: _Metas, meta: _Meta, size: int) -> None:
    """Raise _Fault unless every page that a file of `size` bytes lacks is on the free list."""
    # Not that it is held, but our caller looks whether the snapshot stayed intact.
    walk = _Walk(file, metas, size, on_progress=None, snapshot_held=True)
    with contextlib.suppress(_EnoughError):
        walk.walk_free_list()
    page = meta.last_page
    while (page + 1) * meta.page_bytes > size and walk.map.is_free(page):
        page -= 1
    if (page + 1) * meta.page_bytes > size:
        raise _Fault(f"truncated: has {size} bytes, needs {(page + 1) * meta.page_bytes}")


def _record_fault(tree: _Tree, role: _Role, last_page: int) -> str | None:
    """Why a database's record cannot be followed; None: it can."""
    free = role is _Role.FREE_LIST
    if tree.flags & ~(_NO_SUBDIR if free else 0) != (_INTEGER_KEY if free else 0):
        return f"has unsupported flags ({tree.flags:#x})"
    if tree.pad and not free:
        return f"has a value size ({tree.pad}), which only MDB_DUPFIXED uses"
    counts = (tree.branch_pages, tree.leaf_pages, tree.overflow_pages, tree.entries)
    if tree.root == _NO_PAGE:
        return "has no root page but is not empty" if tree.depth or any(counts) else None
    if not _METAS <= tree.root <= last_page:
        return f"names root page {tree.root}, where the last page is {last_page}"
    if not 1 <= tree.depth <= _DEPTH_MAX:
        return f"has an impossible depth ({tree.depth})"
    if sum(counts[:3]) > last_page:
        return f"counts {sum(counts[:3])} pages, more than the file has"
    return None


def _check_page(data: bytes, page: int, kind: int, page_bytes: int) -> None:
    """Raise _Fault unless `data` begins with the header of tree page `page`."""
    if len(data) < _HEADER_BYTES:
        raise _Fault("lies beyond the end of the file")
    number, _, flags, lower, upper = _PAGE.unpack_from(data)
    if number != page:
        raise _Fault(f"says it is page {number}")
    if flags != kind:
        raise _Fault(_wrong_kind(flags, kind))
    if lower % 2 or not _HEADER_BYTES <= lower <= upper <= page_bytes:
        raise _Fault(f"has impossible bounds (lower {lower}, upper {upper})")
    nodes = (lower - _HEADER_BYTES) >> 1
    if nodes < (2 if kind == _BRANCH else 1):
        raise _Fault(f"holds only {nodes} nodes")


def _wrong_kind(flags: int, wanted: int) -> str:
    found = f"is {_KINDS[flags]} page" if flags in _KINDS else f"has flags {flags:#x}"
    return f"{found} where {_KINDS[wanted]} page belongs"


_Header = tuple[int, int, int]
"""Of a node: u32 (value size, or low part of the child), flags, key size in bytes."""


def _parse_nodes(data: bytes, kind: int, page_bytes: int) -> tuple[list[int], list[_Header]]:
    """Offsets and headers of a page's nodes, in key order. Raises _Fault: a node is out of place.

    LMDB packs nodes without gaps (`mdb_node_add`, `mdb_node_del`, `mdb_update_key`), so it is not
    enough that they do not overlap. Each node leads from its offset to its end; if these steps
    visit the offsets plus the page's end, and nothing twice, they are one path from `upper` to the
    end. Comparing two sets says that, at half the cost of sorting.
    """
    lower, upper = struct.unpack_from("<HH", data, 12)
    offsets = list(struct.unpack_from(f"<{(lower - _HEADER_BYTES) >> 1}H", data, _HEADER_BYTES))
    if min(offsets) < upper or max(offsets) > page_bytes - _NODE.size:
        raise _Fault("has a node outside its bounds")
    unpack = _NODE.unpack_from
    headers: list[_Header] = [unpack(data, offset) for offset in offsets]
    if kind == _BRANCH:
        ends = {offset + 9 + key & -2 for offset, (_, _, key) in zip(offsets, headers, strict=True)}
    else:
        ends = {
            offset + 9 + key + (_ID_BYTES if flags & _NODE_OVERFLOW else size) & -2
            for offset, (size, flags, key) in zip(offsets, headers, strict=True)
        }
    if max(ends) > page_bytes:
        raise _Fault("has a node that runs past its end")
    starts = set(offsets)
    if len(starts) != len(offsets) or starts | {page_bytes} != ends | {upper}:
        raise _Fault("has nodes that overlap or leave gaps")
    return offsets, headers


class _PageMap:
    """Which pages are accounted for: two bits a page, in use and free."""

    __slots__ = ("_free", "_pages", "_used")

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._used = bytearray((pages >> 3) + 1)
        self._free = bytearray((pages >> 3) + 1)

    def is_free(self, page: int) -> bool:
        return bool(self._free[page >> 3] >> (page & 7) & 1)

    def use(self, page: int, count: int) -> None:
        """Take `count` pages from `page` on. Raises _Fault: one of them is taken."""
        start, stop, shift = page >> 3, (page + count + 7) >> 3, page & 7
        span = ((1 << count) - 1) << shift
        used = int.from_bytes(self._used[start:stop], "little")
        if used & span:
            raise _Fault("is used twice", page)
        if int.from_bytes(self._free[start:stop], "little") & span:
            raise _Fault("is in use but also on the free list", page)
        self._used[start:stop] = (used | span).to_bytes(stop - start, "little")

    def release(self, numbers: Sequence[int], below: int) -> list[int]:
        """Mark pages as free, and return those that were taken already, by a tree or as free.

        Raises _Fault: they do not descend from under `below`, or are out of range.
        """
        used, free, taken = self._used, self._free, []
        for number in numbers:
            if not _METAS <= number < below:
                wrong = "out of order" if _METAS <= number < self._pages else "out of range"
                raise _Fault(f"lists page {number}, which is {wrong}")
            below = number
            byte, bit = number >> 3, 1 << (number & 7)
            if (used[byte] | free[byte]) & bit:
                taken.append(number)
            free[byte] |= bit
        return taken

    def missing(self) -> Iterator[int]:
        """Pages that are neither in use nor free, ascending."""
        step = 1 << 12
        for start in range(0, len(self._used), step):
            used, free = self._used[start : start + step], self._free[start : start + step]
            bits = int.from_bytes(used, "little") | int.from_bytes(free, "little")
            absent = ~bits & ((1 << 8 * len(used)) - 1)
            while absent:
                low = absent & -absent
                page = 8 * start + low.bit_length() - 1
                if page >= self._pages:
                    return
                yield page
                absent ^= low


@dataclass(slots=True)
class _Counts:
    """What a walk through one tree adds up, to hold against the tree's record."""

    branch_pages: int = 0
    leaf_pages: int = 0
    overflow_pages: int = 0
    entries: int = 0


_Step = tuple[int, int, bytes, bytes | None]
"""A page still to visit: number, level (root: 1), lowest key allowed, first key not allowed."""


class _Walk:
    """One walk through one snapshot of a file of `size` bytes. Used by one thread, once."""

    def __init__(
        self,
        file: _DataFile,
        metas: _Metas,
        size: int,
        *,
        on_progress: Progress | None,
        snapshot_held: bool,
    ) -> None:
        self._file = file
        self._metas = metas
        self._size = size
        self._on_progress = on_progress
        self._progress_at = _PROGRESS_PAGES
        self._snapshot_held = snapshot_held
        self._meta = meta = _newest(metas)
        self._page_bytes = meta.page_bytes if meta else PAGE_BYTES_ALLOWED[0]
        self._last_page = min(meta.last_page, _last_page_max(meta, size)) if meta else 0
        self._databases: list[_Database] = []
        self._counts = _Counts()
        self._pages_walked = 0
        self._pages_free = 0
        self.map = _PageMap(self._last_page + 1)
        self.entries: dict[str, int] = {}
        self.findings: list[Finding] = []

    def report(self) -> PageReport:
        return PageReport(self._pages_walked, self.entries, tuple(self.findings))

    def run(self, skip: frozenset[str] = frozenset()) -> None:
        """Walk everything, except the databases in `skip`. Raises _OvertakenError: a finding could
        not be trusted."""
        try:
            self._check_metas()
            if self._meta is not None:
                self.walk_free_list()
                main = _Database(MAIN, _Role.MAIN, self._meta.main, self._meta.index)
                self._walk_database(main)
                for database in self._databases:
                    if database.name not in skip:
                        self._walk_database(database)
                # Otherwise pages are missing where a subtree was left out.
                if not self.findings and not skip:
                    self._check_missing()
        except _EnoughError:
            pass
        if self._on_progress is not None:
            self._on_progress(self._pages_walked + self._pages_free, self._last_page + 1)

    def walk_free_list(self) -> None:
        """Walk the free list's tree, and enter what it lists in `map`."""
        if self._meta is not None:
            self._walk_database(
                _Database(FREE_LIST, _Role.FREE_LIST, self._meta.free, self._meta.index)
            )

    def _find(self, page: int, database: str, reason: str) -> None:
        if not self._snapshot_held:
            self._file.check_intact(self._metas)
        self.findings.append(Finding(page, database, reason))
        if len(self.findings) >= FINDINGS_MAX:
            raise _EnoughError

    def _advance(self, *, walked: int = 0, free: int = 0) -> None:
        self._pages_walked += walked
        self._pages_free += free
        done = self._pages_walked + self._pages_free
        if done >= self._progress_at and self._on_progress is not None:
            self._progress_at = done + _PROGRESS_PAGES
            self._on_progress(done, self._last_page + 1)

    def _check_metas(self) -> None:
        for fault in _meta_faults(self._metas, self._size):
            self._find(fault.page or 0, META, fault.reason)
        for meta in self._metas:
            if isinstance(meta, _Meta):
                self._advance(walked=1)
                if meta.number != meta.index:
                    self._find(meta.index, META, f"says it is page {meta.number}")
        newest = self._meta
        if newest is not None:
            # LMDB keeps the map no smaller than its pages, and cannot map more than an address.
            needed = (newest.last_page + 1) * newest.page_bytes
            if not needed <= newest.map_bytes <= _PAGES_MAX * PAGE_BYTES_ALLOWED[0]:
                reason = f"names an impossible map of {newest.map_bytes} bytes"
                self._find(newest.index, META, reason)

    def _check_missing(self) -> None:
        """LMDB leaks no pages: one that is nowhere was cut off from its tree, or from the list."""
        self.map.use(0, _METAS)
        missing = self.map.missing()
        first = next(missing, None)
        if first is not None:
            count = 1 + sum(1 for _ in missing)
            self._find(first, FREE_LIST, f"is in no database, nor free ({count} such pages)")

    def _claim(self, page: int, count: int) -> None:
        """Take `count` pages for the tree being walked. Raises _Fault: they cannot be its own."""
        if not _METAS <= page <= page + count - 1 <= self._last_page:
            raise _Fault(f"is out of range (the last page is {self._last_page})", page)
        if (page + count) * self._page_bytes > self._size:
            raise _Fault(f"lies beyond the end of the file, which has {self._size} bytes", page)
        self.map.use(page, count)
        self._advance(walked=count)

    def _walk_database(self, database: _Database) -> None:
        """Walk one tree and hold what it adds up to against its record."""
        findings_before = len(self.findings)
        self._counts = counts = _Counts()
        tree, page = database.tree, database.record_page
        wrong = _record_fault(tree, database.role, self._last_page)
        if wrong is not None:
            self._find(page, database.name, f"its record {wrong}")
        elif tree.root != _NO_PAGE:
            self._walk_tree(database)
        self.entries[database.name] = counts.entries
        if len(self.findings) > findings_before:
            return  # a subtree may have been left out: the counts need not match
        for count in ("branch_pages", "leaf_pages", "overflow_pages", "entries"):
            said, has = getattr(tree, count), getattr(counts, count)
            if said != has:
                words = count.replace("_", " ")
                self._find(page, database.name, f"its record says {said} {words}, it has {has}")

    def _walk_tree(self, database: _Database) -> None:
        steps: list[_Step] = [(database.tree.root, 1, b"", None)]
        while steps:
            step = steps.pop()
            try:
                # The stack is taken from its end: children are visited in key order.
                steps.extend(reversed(self._visit(database, step)))
            except _Fault as fault:
                page = step[0] if fault.page is None else fault.page
                self._find(page, database.name, fault.reason)

    def _visit(self, database: _Database, step: _Step) -> list[_Step]:
        """Check one page, and return its children. Raises _Fault: they cannot be followed."""
        page, level, low, high = step
        kind = _LEAF if level == database.tree.depth else _BRANCH
        self._claim(page, 1)
        data = self._file.read(page * self._page_bytes, self._page_bytes)
        if len(data) < self._page_bytes:
            raise _Fault("lies beyond the end of the file")
        _check_page(data, page, kind, self._page_bytes)
        offsets, headers = _parse_nodes(data, kind, self._page_bytes)
        keys = _keys(data, kind, offsets, headers, integers=database.role is _Role.FREE_LIST)
        if kind == _BRANCH:
            bounds = keys[1:]
            _check_keys(bounds, low, high)
            self._counts.branch_pages += 1
            spans = zip(headers, [low, *bounds], [*bounds, high], strict=True)
            return [
                (number | flags << 32, level + 1, first, end)
                for (number, flags, _), first, end in spans
            ]
        _check_keys(keys, low, high)
        self._counts.leaf_pages += 1
        self._counts.entries += len(keys)
        if database.role is _Role.FREE_LIST:
            self._visit_free_list(page, data, offsets, headers, keys)
        elif any(flags for _, flags, _ in headers):
            self._visit_values(page, database, data, offsets, headers)
        return []

    def _visit_values(
        self,
        page: int,
        database: _Database,
        data: bytes,
        offsets: list[int],
        headers: list[_Header],
    ) -> None:
        """Follow the values of a leaf that are not simply inside it."""
        for offset, (size, flags, key_bytes) in zip(offsets, headers, strict=True):
            key = offset + _NODE.size
            value = key + key_bytes
            try:
                if flags == _NODE_OVERFLOW:
                    self._claim_run(_U64.unpack_from(data, value)[0], size)
                elif flags == _NODE_RECORD and database.role is _Role.MAIN:
                    if size != _RECORD_BYTES:
                        raise _Fault(f"has a database's record of {size} bytes")
                    name = data[key:value].decode("utf-8", "backslashreplace")
                    tree = _Tree(*_RECORD.unpack_from(data, value))
                    self._databases.append(_Database(name, _Role.NAMED, tree, page))
                elif flags:
                    raise _Fault(f"has a node with unsupported flags ({flags:#x})")
            except _Fault as fault:
                self._find(page if fault.page is None else fault.page, database.name, fault.reason)

    def _claim_run(self, page: int, value_bytes: int) -> None:
        """Take the overflow run at `page` for a value of `value_bytes`. Raises _Fault: it cannot.

        It may be longer than the value needs: LMDB keeps the run when a value is rewritten smaller
        in the transaction that made it.
        """
        self._claim(page, 1)
        data = self._file.read(page * self._page_bytes, _HEADER_BYTES)
        if len(data) < _HEADER_BYTES:
            raise _Fault("lies beyond the end of the file", page)
        number, _, flags, count = _RUN.unpack(data)
        if number != page:
            raise _Fault(f"says it is page {number}", page)
        if flags != _OVERFLOW:
            raise _Fault(_wrong_kind(flags, _OVERFLOW), page)
        needed = (_HEADER_BYTES - 1 + value_bytes) // self._page_bytes + 1
        if count < needed:
            raise _Fault(f"begins {count} pages, but a value of {value_bytes} bytes", page)
        if count > 1:
            try:
                self._claim(page + 1, count - 1)
            except _Fault as fault:
                raise _Fault(f"begins {count} pages, but the rest {fault.reason}", page) from None
        self._counts.overflow_pages += count

    def _visit_free_list(
        self,
        page: int,
        data: bytes,
        offsets: list[int],
        headers: list[_Header],
        keys: list[bytes],
    ) -> None:
        """Follow one leaf of the free list: each value is a list of page numbers."""
        newest = self._meta.transaction if self._meta else 0
        for offset, (size, flags, key_bytes), key in zip(offsets, headers, keys, strict=True):
            value = offset + _NODE.size + key_bytes
            at = page
            try:
                transaction = int.from_bytes(key, "big")
                if not 1 <= transaction <= newest:
                    raise _Fault(f"names transaction {transaction}, the newest is {newest}")
                if flags == _NODE_OVERFLOW:
                    at = _U64.unpack_from(data, value)[0]
                    self._claim_run(at, size)
                    self._free_pages(at, size, self._run_chunks(at, size))
                elif flags:
                    raise _Fault(f"has a node with unsupported flags ({flags:#x})")
                else:
                    self._free_pages(at, size, iter((data[value : value + size],)))
            except _Fault as fault:
                self._find(at if fault.page is None else fault.page, FREE_LIST, fault.reason)

    def _run_chunks(self, page: int, size: int) -> Iterator[bytes]:
        """A value of `size` bytes in an overflow run, in pieces that keep memory small."""
        start = page * self._page_bytes + _HEADER_BYTES
        for position in range(0, size, _FREE_LIST_CHUNK_BYTES):
            length = min(_FREE_LIST_CHUNK_BYTES, size - position)
            data = self._file.read(start + position, length)
            if len(data) < length:
                raise _Fault("lies beyond the end of the file")
            yield data

    def _free_pages(self, at: int, size: int, chunks: Iterator[bytes]) -> None:
        """Enter a record of the free list, `size` bytes at page `at`, in `map`."""
        if size < _ID_BYTES or size % _ID_BYTES:
            raise _Fault(f"holds a record of {size} bytes, which is no list of page numbers")
        room = size // _ID_BYTES - 1
        below = self._last_page + 1
        first = True
        for chunk in chunks:
            numbers: Sequence[int] = struct.unpack(f"<{len(chunk) // _ID_BYTES}Q", chunk)
            if first:
                first = False
                count, numbers = numbers[0], numbers[1:]
                if count == 0:
                    return  # LMDB reserves records generously, and leaves empty what it can spare
                if count != room:
                    raise _Fault(f"lists {count} pages in room for {room}")
            for taken in self.map.release(numbers, below):
                self._find(at, FREE_LIST, f"lists page {taken}, which is in use or listed before")
            self._advance(free=len(numbers))
            if numbers:
                below = numbers[-1]


def _keys(
    data: bytes, kind: int, offsets: list[int], headers: list[_Header], *, integers: bool
) -> list[bytes]:
    """The nodes' keys, as bytes that compare like the keys; `integers`: they are u64.

    A branch's first key is not one: LMDB ignores it, and may leave it empty.
    Raises _Fault: a key has a size LMDB never gives it.
    """
    sizes = [size for _, _, size in headers]
    real = sizes[1:] if kind == _BRANCH else sizes
    shortest, longest = (_ID_BYTES, _ID_BYTES) if integers else (1, _KEY_BYTES_MAX)
    if min(real) < shortest or max(real) > longest:
        raise _Fault(f"has keys of {min(real)} to {max(real)} bytes")
    keys = [
        data[offset + 8 : offset + 8 + size] for offset, size in zip(offsets, sizes, strict=True)
    ]
    return [key[::-1] for key in keys] if integers else keys


def _check_keys(keys: list[bytes], low: bytes, high: bytes | None) -> None:
    """Raise _Fault unless keys ascend strictly within [low, high); None is no bound."""
    if sorted(keys) != keys or len(set(keys)) != len(keys):
        raise _Fault("has keys out of order")
    if keys[0] < low or (high is not None and keys[-1] >= high):
        raise _Fault("has keys outside the bounds its parent gives")
