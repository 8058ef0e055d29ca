"""The open data file: bounded reads, its two meta pages, and whether a writer has overtaken us.

Owns the file descriptor, the judgement of the pair of meta pages, and the races with processes that
create or write the file meanwhile. Looks at no tree. Thread-safe.

How LMDB picks a meta page (`mdb_env_read_header`, `mdb_env_pick_meta`, `mdb_txn_renew0`):
it refuses to open a file (MDB_INVALID) unless *both* have the magic, version and flag; finds page 1
by the page size in page 0; takes the higher transaction, with no checksum and no second opinion;
and while another process has the store open, it takes page (transaction % 2) instead. A flipped
transaction number therefore silently revives the snapshot before the last commit, which the next
commit makes final. Hence we ask for two valid pages that are one transaction apart, as commits
leave them (which one flip in 64 escapes: 10 and 11 may become 10 and 9). A torn meta page is no
false alarm: a commit rewrites only the *older* one, in one write of 120 bytes whose last field is
the transaction.

When pages of a snapshot can change (numbered as in `mdb_page_alloc`): pages that snapshot N uses
and N+1 gives up are reused at the earliest by transaction N+3, which begins after N+2 is committed.
So whatever was read while no meta page said N+2 or more was read from an intact snapshot N.
"""

import os
import stat
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from dedupstore.errors import StoreAccessError, StoreDamagedError
from dedupstore.pages.findings import Fault
from dedupstore.pages.layout import (
    ID_BYTES,
    META_BYTES,
    METAS,
    PAGE_BYTES_ALLOWED,
    PAGE_BYTES_AT,
    PAGES_MAX,
    Meta,
    Metas,
    parse_meta,
)

_PAGES_BEYOND_MAX: Final = 2**28  # given back in one transaction, never written: 1 TiB
_META_READS: Final = 1000
_CREATION_WAITS: Final = (0.002, 0.01, 0.05)  # seconds


class OvertakenError(Exception):
    """Writers have begun to reuse pages of the snapshot being walked."""


class DataFile:
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
        """`length` bytes at `offset`, or as many as there are. Raises Fault: the disk fails."""
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise Fault(f"cannot be read: {error.strerror}") from error

    def _await_creation(self) -> None:
        """Let another process finish the one write that creates both meta pages."""
        for wait in _CREATION_WAITS:
            if self.size() >= 2 * PAGE_BYTES_ALLOWED[0]:
                return
            time.sleep(wait)

    def metas(self) -> Metas:
        """Both meta pages as they were at one instant, each parsed, or the fault that prevents it.

        Commits between the first read and the second would pair a page with one far newer, and a
        read may meet a write half done. Transactions only grow: a pair that reads the same twice
        in a row was there, whole and together, in between.
        Raises OvertakenError: they change faster than they can be read.
        """
        data = self._read_metas()
        for _ in range(_META_READS):
            before, data = data, self._read_metas()
            if before == data:
                return _parse_metas(data)
        raise OvertakenError

    def _read_metas(self) -> list[bytes]:
        """Meta page 0, then page 1 at each place it may have: one, unless page 0 is damaged.

        Raises StoreDamagedError: the disk fails.
        """
        try:
            first = os.pread(self._fd, META_BYTES, 0)
            page_bytes = first[PAGE_BYTES_AT] if len(first) == META_BYTES else b""
            named = [at for at in PAGE_BYTES_ALLOWED if at.to_bytes(4, "little") == page_bytes]
            places = named or PAGE_BYTES_ALLOWED
            return [first, *(os.pread(self._fd, META_BYTES, place) for place in places)]
        except OSError as error:
            raise StoreDamagedError(
                f"{self._path}: the meta pages cannot be read: {error.strerror} "
                "(restore this file from a copy, on another disk)"
            ) from error

    def check_intact(self, metas: Metas) -> None:
        """Raise OvertakenError if pages of the newest snapshot in `metas` may have been reused."""
        old, new = newest_meta(metas), newest_meta(self.metas())
        if old is None or new is None:
            moved = old is not new
        else:
            moved = new.transaction - old.transaction >= 2
        if moved:
            raise OvertakenError


def _parse_metas(data: list[bytes]) -> Metas:
    """Parse page 0, and of the candidates for page 1 the one that knows its own place."""

    def parse(index: int, page: bytes) -> Meta | Fault:
        try:
            return parse_meta(index, page)
        except Fault as fault:
            fault.page = index
            return fault

    first, *candidates = data
    seconds = [parse(1, page) for page in candidates]
    if len(seconds) > 1:
        for second, page_bytes in zip(seconds, PAGE_BYTES_ALLOWED, strict=True):
            if isinstance(second, Meta) and second.page_bytes == page_bytes:
                return parse(0, first), second
    return parse(0, first), seconds[0]


def newest_meta(metas: Metas) -> Meta | None:
    """The meta page LMDB would use, or the only valid one."""
    valid = [meta for meta in metas if isinstance(meta, Meta)]
    return max(valid, key=lambda meta: (meta.transaction, -meta.index), default=None)


def meta_faults(metas: Metas, size: int) -> Iterator[Fault]:
    """What is wrong with the pair of meta pages, for a file of `size` bytes."""
    newest = newest_meta(metas)
    if newest is None:
        if size < 2 * PAGE_BYTES_ALLOWED[0]:
            yield Fault(f"truncated: has {size} bytes, needs {2 * PAGE_BYTES_ALLOWED[0]} or more")
        else:
            yield Fault("neither meta page is valid: this is no LMDB file, or its start is lost")
        return
    needed = (newest.last_page + 1) * newest.page_bytes
    if newest.last_page < METAS - 1 or newest.last_page >= PAGES_MAX:
        yield Fault(f"names an impossible last page ({newest.last_page})", newest.index)
    elif size < METAS * newest.page_bytes or newest.last_page > last_page_max(newest, size):
        yield Fault(f"truncated: has {size} bytes, needs {needed}")
    for fault in metas:
        if isinstance(fault, Fault):
            yield Fault(
                f"{fault.reason}; LMDB needs both meta pages, though the other "
                f"(transaction {newest.transaction}) is valid",
                fault.page,
            )
            return
    yield from _pair_faults(*(meta for meta in metas if isinstance(meta, Meta)))


def last_page_max(meta: Meta, size: int) -> int:
    """The highest last page that a healthy file of `size` bytes can have.

    Pages beyond the end of the file must be on the free list, whose own pages are in the file: so
    their number says how many that can be. It refuses nearly every truncated file without reading
    further, and keeps a flipped bit in `last_page` from costing us memory.
    """
    file_pages = size // meta.page_bytes
    list_pages = min(meta.free.leaf_pages + meta.free.overflow_pages, file_pages)
    beyond = min(list_pages * meta.page_bytes // ID_BYTES, _PAGES_BEYOND_MAX)
    return min(file_pages + beyond, PAGES_MAX) - 1


def _pair_faults(first: Meta, second: Meta) -> Iterator[Fault]:
    if first.page_bytes != second.page_bytes:
        yield Fault(
            f"the meta pages name different page sizes ({first.page_bytes}, {second.page_bytes})", 1
        )
    old, new = sorted((first, second), key=lambda meta: meta.transaction)
    fresh = old.transaction == new.transaction == 0
    if not fresh and (new.transaction - old.transaction != 1 or new.transaction % 2 != new.index):
        yield Fault(
            f"the meta pages are from transactions {first.transaction} and {second.transaction}, "
            "which no two commits leave behind: one number is wrong, and LMDB might use a "
            "snapshot that is not the last"
        )
