"""The walk through every tree of one snapshot, and through what its free list names.

Owns the order of the walk, what a tree adds up to, the trust in a finding while others write, and
the progress told meanwhile. Without recursion. Not thread-safe: a walk belongs to one thread.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from dedupstore.pages.datafile import DataFile, last_page_max, meta_faults, newest_meta
from dedupstore.pages.findings import FREE_LIST, MAIN, META, Fault, Finding, PageReport
from dedupstore.pages.layout import (
    BRANCH,
    HEADER_BYTES,
    ID_BYTES,
    LEAF,
    METAS,
    NO_PAGE,
    NODE,
    NODE_OVERFLOW,
    NODE_RECORD,
    OVERFLOW,
    PAGE_BYTES_ALLOWED,
    PAGES_MAX,
    RECORD,
    RECORD_BYTES,
    RUN,
    U64,
    Database,
    Meta,
    Metas,
    NodeHeader,
    Role,
    Tree,
    check_keys,
    check_page,
    node_keys,
    parse_nodes,
    record_fault,
    wrong_kind,
)
from dedupstore.pages.pagemap import PageMap

FINDINGS_MAX: Final = 1000
"""A walk stops after this many findings: more would say nothing new and take memory."""

_FREE_LIST_CHUNK_BYTES: Final = 1 << 20
_PROGRESS_PAGES: Final = 4096

Progress = Callable[[int, int], None]
"""Called with pages done and pages in all."""

Freed = Callable[[int, Sequence[int]], None]
"""Called with a transaction and pages that it gave up, a part of the free list at a time."""


class EnoughError(Exception):
    """FINDINGS_MAX is reached."""


@dataclass(slots=True)
class _Counts:
    """What a walk through one tree adds up, to hold against the tree's record."""

    branch_pages: int = 0
    leaf_pages: int = 0
    overflow_pages: int = 0
    entries: int = 0


_Step = tuple[int, int, bytes, bytes | None]
"""A page still to visit: number, level (root: 1), lowest key allowed, first key not allowed."""


class Walk:
    """One walk through one snapshot of a file of `size` bytes. Used by one thread, once."""

    def __init__(
        self,
        file: DataFile,
        metas: Metas,
        size: int,
        *,
        on_progress: Progress | None,
        snapshot_held: bool,
        on_free: Freed | None = None,
    ) -> None:
        self._file = file
        self._metas = metas
        self._size = size
        self._on_progress = on_progress
        self._progress_at = _PROGRESS_PAGES
        self._snapshot_held = snapshot_held
        self._on_free = on_free
        self._meta = meta = newest_meta(metas)
        self._page_bytes = meta.page_bytes if meta else PAGE_BYTES_ALLOWED[0]
        self._last_page = min(meta.last_page, last_page_max(meta, size)) if meta else 0
        self._databases: list[Database] = []
        self._counts = _Counts()
        self._pages_walked = 0
        self._pages_free = 0
        self.map = PageMap(self._last_page + 1)
        self.entries: dict[str, int] = {}
        self.findings: list[Finding] = []

    def report(self) -> PageReport:
        """What was seen so far."""
        return PageReport(self._pages_walked, self.entries, tuple(self.findings))

    def run(self, skip: frozenset[str] = frozenset()) -> None:
        """Walk everything, except the databases in `skip`. Raises OvertakenError: a finding could
        not be trusted."""
        try:
            self._check_metas()
            if self._meta is not None:
                self.walk_free_list()
                main = Database(MAIN, Role.MAIN, self._meta.main, self._meta.index)
                self._walk_database(main)
                for database in self._databases:
                    if database.name not in skip:
                        self._walk_database(database)
                # Otherwise pages are missing where a subtree was left out.
                if not self.findings and not skip:
                    self._check_missing()
        except EnoughError:
            pass
        if self._on_progress is not None:
            self._on_progress(self._pages_walked + self._pages_free, self._last_page + 1)

    def walk_free_list(self) -> None:
        """Walk the free list's tree, and enter what it lists in `map`."""
        if self._meta is not None:
            self._walk_database(
                Database(FREE_LIST, Role.FREE_LIST, self._meta.free, self._meta.index)
            )

    def _find(self, page: int, database: str, reason: str) -> None:
        if not self._snapshot_held:
            self._file.check_intact(self._metas)
        self.findings.append(Finding(page, database, reason))
        if len(self.findings) >= FINDINGS_MAX:
            raise EnoughError

    def _advance(self, *, walked: int = 0, free: int = 0) -> None:
        self._pages_walked += walked
        self._pages_free += free
        done = self._pages_walked + self._pages_free
        if done >= self._progress_at and self._on_progress is not None:
            self._progress_at = done + _PROGRESS_PAGES
            self._on_progress(done, self._last_page + 1)

    def _check_metas(self) -> None:
        for fault in meta_faults(self._metas, self._size):
            self._find(fault.page or 0, META, fault.reason)
        for meta in self._metas:
            if isinstance(meta, Meta):
                self._advance(walked=1)
                if meta.number != meta.index:
                    self._find(meta.index, META, f"says it is page {meta.number}")
        newest = self._meta
        if newest is not None:
            # LMDB keeps the map no smaller than its pages, and cannot map more than an address.
            needed = (newest.last_page + 1) * newest.page_bytes
            if not needed <= newest.map_bytes <= PAGES_MAX * PAGE_BYTES_ALLOWED[0]:
                reason = f"names an impossible map of {newest.map_bytes} bytes"
                self._find(newest.index, META, reason)

    def _check_missing(self) -> None:
        """LMDB leaks no pages: one that is nowhere was cut off from its tree, or from the list."""
        self.map.use(0, METAS)
        missing = self.map.missing()
        first = next(missing, None)
        if first is not None:
            count = 1 + sum(1 for _ in missing)
            self._find(first, FREE_LIST, f"is in no database, nor free ({count} such pages)")

    def _claim(self, page: int, count: int) -> None:
        """Take `count` pages for the tree being walked. Raises Fault: they cannot be its own."""
        if not METAS <= page <= page + count - 1 <= self._last_page:
            raise Fault(f"is out of range (the last page is {self._last_page})", page)
        if (page + count) * self._page_bytes > self._size:
            raise Fault(f"lies beyond the end of the file, which has {self._size} bytes", page)
        self.map.use(page, count)
        self._advance(walked=count)

    def _walk_database(self, database: Database) -> None:
        """Walk one tree and hold what it adds up to against its record."""
        findings_before = len(self.findings)
        self._counts = counts = _Counts()
        tree, page = database.tree, database.record_page
        wrong = record_fault(tree, database.role, self._last_page)
        if wrong is not None:
            self._find(page, database.name, f"its record {wrong}")
        elif tree.root != NO_PAGE:
            self._walk_tree(database)
        self.entries[database.name] = counts.entries
        if len(self.findings) > findings_before:
            return  # a subtree may have been left out: the counts need not match
        for count in ("branch_pages", "leaf_pages", "overflow_pages", "entries"):
            said, has = getattr(tree, count), getattr(counts, count)
            if said != has:
                words = count.replace("_", " ")
                self._find(page, database.name, f"its record says {said} {words}, it has {has}")

    def _walk_tree(self, database: Database) -> None:
        steps: list[_Step] = [(database.tree.root, 1, b"", None)]
        while steps:
            step = steps.pop()
            try:
                # The stack is taken from its end: children are visited in key order.
                steps.extend(reversed(self._visit(database, step)))
            except Fault as fault:
                page = step[0] if fault.page is None else fault.page
                self._find(page, database.name, fault.reason)

    def _visit(self, database: Database, step: _Step) -> list[_Step]:
        """Check one page, and return its children. Raises Fault: they cannot be followed."""
        page, level, low, high = step
        kind = LEAF if level == database.tree.depth else BRANCH
        self._claim(page, 1)
        data = self._file.read(page * self._page_bytes, self._page_bytes)
        if len(data) < self._page_bytes:
            raise Fault("lies beyond the end of the file")
        check_page(data, page, kind, self._page_bytes)
        offsets, headers = parse_nodes(data, kind, self._page_bytes)
        keys = node_keys(data, kind, offsets, headers, integers=database.role is Role.FREE_LIST)
        if kind == BRANCH:
            bounds = keys[1:]
            check_keys(bounds, low, high)
            self._counts.branch_pages += 1
            spans = zip(headers, [low, *bounds], [*bounds, high], strict=True)
            return [
                (number | flags << 32, level + 1, first, end)
                for (number, flags, _), first, end in spans
            ]
        check_keys(keys, low, high)
        self._counts.leaf_pages += 1
        self._counts.entries += len(keys)
        if database.role is Role.FREE_LIST:
            self._visit_free_list(page, data, offsets, headers, keys)
        elif any(flags for _, flags, _ in headers):
            self._visit_values(page, database, data, offsets, headers)
        return []

    def _visit_values(
        self,
        page: int,
        database: Database,
        data: bytes,
        offsets: list[int],
        headers: list[NodeHeader],
    ) -> None:
        """Follow the values of a leaf that are not simply inside it."""
        for offset, (size, flags, key_bytes) in zip(offsets, headers, strict=True):
            key = offset + NODE.size
            value = key + key_bytes
            try:
                if flags == NODE_OVERFLOW:
                    self._claim_run(U64.unpack_from(data, value)[0], size)
                elif flags == NODE_RECORD and database.role is Role.MAIN:
                    if size != RECORD_BYTES:
                        raise Fault(f"has a database's record of {size} bytes")
                    name = data[key:value].decode("utf-8", "backslashreplace")
                    tree = Tree(*RECORD.unpack_from(data, value))
                    self._databases.append(Database(name, Role.NAMED, tree, page))
                elif flags:
                    raise Fault(f"has a node with unsupported flags ({flags:#x})")
            except Fault as fault:
                self._find(page if fault.page is None else fault.page, database.name, fault.reason)

    def _claim_run(self, page: int, value_bytes: int) -> None:
        """Take the overflow run at `page` for a value of `value_bytes`. Raises Fault: it cannot.

        It may be longer than the value needs: LMDB keeps the run when a value is rewritten smaller
        in the transaction that made it.
        """
        self._claim(page, 1)
        data = self._file.read(page * self._page_bytes, HEADER_BYTES)
        if len(data) < HEADER_BYTES:
            raise Fault("lies beyond the end of the file", page)
        number, _, flags, count = RUN.unpack(data)
        if number != page:
            raise Fault(f"says it is page {number}", page)
        if flags != OVERFLOW:
            raise Fault(wrong_kind(flags, OVERFLOW), page)
        needed = (HEADER_BYTES - 1 + value_bytes) // self._page_bytes + 1
        if count < needed:
            raise Fault(f"begins {count} pages, but a value of {value_bytes} bytes", page)
        if count > 1:
            try:
                self._claim(page + 1, count - 1)
            except Fault as fault:
                raise Fault(f"begins {count} pages, but the rest {fault.reason}", page) from None
        self._counts.overflow_pages += count

    def _visit_free_list(
        self,
        page: int,
        data: bytes,
        offsets: list[int],
        headers: list[NodeHeader],
        keys: list[bytes],
    ) -> None:
        """Follow one leaf of the free list: each value is a list of page numbers."""
        newest = self._meta.transaction if self._meta else 0
        for offset, (size, flags, key_bytes), key in zip(offsets, headers, keys, strict=True):
            value = offset + NODE.size + key_bytes
            at = page
            try:
                transaction = int.from_bytes(key, "big")
                if not 1 <= transaction <= newest:
                    raise Fault(f"names transaction {transaction}, the newest is {newest}")
                if flags == NODE_OVERFLOW:
                    at = U64.unpack_from(data, value)[0]
                    self._claim_run(at, size)
                    self._free_pages(transaction, at, size, self._run_chunks(at, size))
                elif flags:
                    raise Fault(f"has a node with unsupported flags ({flags:#x})")
                else:
                    listed = iter((data[value : value + size],))
                    self._free_pages(transaction, at, size, listed)
            except Fault as fault:
                self._find(at if fault.page is None else fault.page, FREE_LIST, fault.reason)

    def _run_chunks(self, page: int, size: int) -> Iterator[bytes]:
        """A value of `size` bytes in an overflow run, in pieces that keep memory small."""
        start = page * self._page_bytes + HEADER_BYTES
        for position in range(0, size, _FREE_LIST_CHUNK_BYTES):
            length = min(_FREE_LIST_CHUNK_BYTES, size - position)
            data = self._file.read(start + position, length)
            if len(data) < length:
                raise Fault("lies beyond the end of the file")
            yield data

    def _free_pages(self, transaction: int, at: int, size: int, chunks: Iterator[bytes]) -> None:
        """Enter a record of the free list, `size` bytes at page `at`, in `map`."""
        if size < ID_BYTES or size % ID_BYTES:
            raise Fault(f"holds a record of {size} bytes, which is no list of page numbers")
        room = size // ID_BYTES - 1
        below = self._last_page + 1
        first = True
        for chunk in chunks:
            numbers: Sequence[int] = struct.unpack(f"<{len(chunk) // ID_BYTES}Q", chunk)
            if first:
                first = False
                count, numbers = numbers[0], numbers[1:]
                if count == 0:
                    return  # LMDB reserves records generously, and leaves empty what it can spare
                if count != room:
                    raise Fault(f"lists {count} pages in room for {room}")
            for taken in self.map.release(numbers, below):
                self._find(at, FREE_LIST, f"lists page {taken}, which is in use or listed before")
            if self._on_free is not None:
                self._on_free(transaction, numbers)
            self._advance(free=len(numbers))
            if numbers:
                below = numbers[-1]
