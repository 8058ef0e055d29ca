"""One opener of a store at a time, over all processes.

LMDB's first opener locks `lock.mdb` exclusively, sets its contents up (mutexes, and 0 as the number
of the last transaction), opens the data file, enters the number that it finds there, and only then
makes its lock a shared one. Whoever opens meanwhile waits for a shared lock and takes the contents
as set up. If the first opener is killed, or fails, half way, the one that waited goes on with
transaction 0: its next commit is number 1, overwrites the last but one of the two meta pages and
pages that the last snapshot uses, and is not found again (mdb.c, mdb_env_setup_locks, LMDB 0.9.36).
Therefore nobody waits inside LMDB: openers take turns before it, and a turn begins when the one
before has its shared lock or is gone. tools/crash_loop found this.

Thread-safe. The lock is one of an open file description on the store's directory: the kernel drops
it with its holder.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# struct flock of every 64-bit Linux: type, whence, (padding) start, length, pid, (padding).
_FLOCK = struct.Struct("hhxxxxqqixxxx")
_POLL_SECONDS = 0.001


@contextmanager
def one_opener(directory: Path, lock_file: Path) -> Iterator[None]:
    """Open LMDB within. Waits for whoever is opening it; `lock_file` must exist.

    Raises OSError. The calling process must not have the environment open: closing a file releases
    all of the process's locks on it, LMDB's too.
    """
    turn = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        _await_set_up(lock_file)
        yield
    finally:
        # Before closing: a child that another thread forks meanwhile has the same open file.
        fcntl.flock(turn, fcntl.LOCK_UN)
        os.close(turn)


def _await_set_up(path: Path) -> None:
    """Wait while somebody holds LMDB's lock exclusively: an opener that was killed a moment ago and
    whose files are being closed, or one that does not take turns (LMDB's own programs)."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        ours = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 1, 0)  # only an exclusive one conflicts
        while True:
            found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, ours)
            if _FLOCK.unpack(found)[0] == fcntl.F_UNLCK:
                return
            time.sleep(_POLL_SECONDS)
    finally:
        os.close(file)
