"""Reading the records of a file whose pages are damaged, without its trees.

Owns finding them: every leaf page in the file that is not free holds records, whichever tree has
lost its way to it. What comes out may be torn, or stale where the free list cannot be read: whoever
takes it must be able to tell, as the store's records can by their guards. Only reads, with pread;
bad content never raises. A reader belongs to one thread.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from dedupstore.pages.datafile import DataFile, last_page_max, meta_faults, newest_meta
from dedupstore.pages.findings import Fault
from dedupstore.pages.layout import (
    HEADER_BYTES,
    LEAF,
    METAS,
    NODE,
    NODE_OVERFLOW,
    NODE_RECORD,
    OVERFLOW,
    PAGE_BYTES_ALLOWED,
    RECORD,
    RECORD_BYTES,
    RUN,
    U64,
    Tree,
    check_page,
    parse_nodes,
)
from dedupstore.pages.walk import EnoughError, Walk

VALUE_BYTES_MAX: Final = 64 << 20
"""Longer values than that are not looked for: no record of the store is."""


class RecordReader:
    """What can be read of a data file that must not be written to meanwhile. `trees` has, after the
    records were read, how many keys each named database had, as far as that is still known."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.trees: dict[bytes, int] = {}
        self._path = path

    def records(self) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, value) that is found, of all databases, in no order.

        Raises StoreAccessError: the file cannot be opened; StoreDamagedError: its start cannot be
        read.
        """
        with DataFile(self._path) as file:
            metas = file.metas()
            meta, size = newest_meta(metas), file.size()
            page_bytes = meta.page_bytes if meta is not None else PAGE_BYTES_ALLOWED[0]
            pages = size // page_bytes
            walk = Walk(file, metas, size, on_progress=None, snapshot_held=True)
            with contextlib.suppress(EnoughError):
                walk.walk_free_list()
            # With a meta page damaged, the other's free list may be that of the commit before.
            doubtful = walk.findings or next(meta_faults(metas, size), None) is not None
            free = None if meta is None or doubtful else walk.map
            if free is not None and meta is not None:
                pages = min(pages, last_page_max(meta, size) + 1, meta.last_page + 1)
            seen = bytearray(pages)
            for page in range(METAS, pages):
                if free is not None and free.is_free(page):
                    seen[page] = 1
                elif not seen[page]:
                    yield from self._sound_page(file, page, page_bytes, seen)
            # Of the others, a value's page needs no look; what is left may be a damaged leaf.
            for page in range(METAS, pages):
                if not seen[page]:
                    yield from self._damaged_page(file, page, page_bytes)

    def _sound_page(
        self, file: DataFile, page: int, page_bytes: int, seen: bytearray
    ) -> Iterator[tuple[bytes, bytes]]:
        try:
            data = file.read(page * page_bytes, page_bytes)
            check_page(data, page, LEAF, page_bytes)
            offsets, _ = parse_nodes(data, LEAF, page_bytes)
        except Fault:
            return
        seen[page] = 1
        for offset in offsets:
            yield from self._node(file, data, offset, page_bytes, seen)

    def _damaged_page(
        self, file: DataFile, page: int, page_bytes: int
    ) -> Iterator[tuple[bytes, bytes]]:
        """The nodes of a leaf whose header, or one of whose nodes, is damaged: each by itself."""
        try:
            data = file.read(page * page_bytes, page_bytes)
        except Fault:
            return
        # Offsets come first and end before the lowest node: where that is damaged, header says it.
        lower = int.from_bytes(data[12:14], "little")
        lowest = len(data) - NODE.size
        found = set()
        for at in range(HEADER_BYTES, len(data) - NODE.size, 2):
            if at >= lowest and at >= lower:
                return
            offset = int.from_bytes(data[at : at + 2], "little")
            if at < offset <= len(data) - NODE.size and offset not in found:
                found.add(offset)
                lowest = min(lowest, offset)
                yield from self._node(file, data, offset, page_bytes, None)

    def _node(
        self, file: DataFile, data: bytes, offset: int, page_bytes: int, seen: bytearray | None
    ) -> Iterator[tuple[bytes, bytes]]:
        size, flags, key_bytes = NODE.unpack_from(data, offset)
        key_at = offset + NODE.size
        value_at = key_at + key_bytes
        key = data[key_at:value_at]
        if flags == NODE_OVERFLOW and value_at + U64.size <= len(data):
            first = U64.unpack_from(data, value_at)[0]
            with contextlib.suppress(Fault):
                yield key, _run_value(file, first, size, page_bytes)
                if seen is not None:
                    last = first + (HEADER_BYTES - 1 + size) // page_bytes
                    seen[first : last + 1] = bytes([1]) * (min(last + 1, len(seen)) - first)
        elif flags == NODE_RECORD and size == RECORD_BYTES and value_at + size <= len(data):
            self.trees[key] = Tree(*RECORD.unpack_from(data, value_at)).entries
        elif not flags and value_at + size <= len(data):
            yield key, data[value_at : value_at + size]


def _run_value(file: DataFile, page: int, size: int, page_bytes: int) -> bytes:
    """A value in an overflow run. Raises Fault: it is not there."""
    if size > VALUE_BYTES_MAX or page >= file.size() // page_bytes:
        raise Fault("is out of range", page)
    data = file.read(page * page_bytes, HEADER_BYTES + size)
    if len(data) < HEADER_BYTES + size:
        raise Fault("lies beyond the end of the file", page)
    number, _, flags, _ = RUN.unpack_from(data)
    if number != page and flags != OVERFLOW:  # one of the two may be what is damaged
        raise Fault("is no overflow page", page)
    return data[HEADER_BYTES:]
