"""Values of the data file, read with pread(2) instead of through LMDB's map.

A disk block that cannot be read is an error of pread; touching it in the map ends the process
(SIGBUS), a server with all its clones. py-lmdb touches every page of a value that it returns, so
the value is found by its key, whose node in the leaf page says where the value is. Frames are read
like this, which are next to all of a data file; its trees' pages remain LMDB's business.
Thread-safe.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from itertools import pairwise

import lmdb

from dedupstore.env import Environment
from dedupstore.memory import address_of
from dedupstore.pages.layout import NODE, NODE_OVERFLOW, RUN, U64


def read_value(
    txn: lmdb.Transaction, env: Environment, database: lmdb._Database, key: bytes
) -> bytes | None:
    """The value of a key, None if there is none. It must not have been written in this transaction.
    Raises OSError: the disk does not give it."""
    found = _find(txn, env, database, key)
    return found.read(env, 0, found.length) if found else None


def read_beginning(
    txn: lmdb.Transaction, env: Environment, database: lmdb._Database, key: bytes, bytes_max: int
) -> tuple[bytes, int] | None:
    """Like `read_value`, but at most the first bytes of the value; and its length."""
    found = _find(txn, env, database, key)
    return (found.read(env, 0, min(found.length, bytes_max)), found.length) if found else None


def salvage_value(
    txn: lmdb.Transaction, env: Environment, database: lmdb._Database, key: bytes
) -> bytes | None:
    """Like `read_value`, with zeros for pages that cannot be read."""
    found = _find(txn, env, database, key)
    if found is None:
        return None
    try:
        return found.read(env, 0, found.length)
    except OSError:
        first = env.page_bytes - RUN.size
        cuts = [0, *range(first, found.length, env.page_bytes), found.length]
        return b"".join(found.read_or_zeros(env, a, b - a) for a, b in pairwise(cuts))


def has_value(txn: lmdb.Transaction, database: lmdb._Database, key: bytes) -> bool:
    """Whether there is a value, of which nothing is read."""
    return bool(txn.cursor(db=database).set_key(key))


@dataclass(frozen=True, slots=True)
class _Found:
    """Where a value is: in the leaf page, which is in memory, or else at an offset of the file."""

    length: int
    address: int
    offset: int

    def read(self, env: Environment, begin: int, length: int) -> bytes:
        if self.address:
            return ctypes.string_at(self.address + begin, length)
        data = os.pread(env.data_file, length, self.offset + begin)
        if len(data) != length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return data

    def read_or_zeros(self, env: Environment, begin: int, length: int) -> bytes:
        try:
            return self.read(env, begin, length)
        except OSError:
            return bytes(length)


def _find(
    txn: lmdb.Transaction, env: Environment, database: lmdb._Database, key: bytes
) -> _Found | None:
    cursor = txn.cursor(db=database)
    if not cursor.set_key(key):
        return None
    in_page = cursor.key()  # behind the node's header
    assert isinstance(in_page, memoryview)
    address = address_of(in_page)
    length, flags, key_bytes = NODE.unpack(ctypes.string_at(address - NODE.size, NODE.size))
    if not flags & NODE_OVERFLOW:
        return _Found(length, address + key_bytes, 0)
    (page,) = U64.unpack(ctypes.string_at(address + key_bytes, U64.size))
    return _Found(length, 0, page * env.page_bytes + RUN.size)
