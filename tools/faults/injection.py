"""Makes one system call of a command fail, and with some kinds of fault all later ones like it.

A fault strikes the n-th call, over all threads of the command, that is about a file below a given
directory and that could fail so: the store's files, the source's and the target's, not libraries.
The call is not executed (a short write is, in part), and returns the errno. What cannot be seen
here: pages that LMDB reads or writes through its map, and errors that the kernel keeps for a later
fsync. Linux on x86-64.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tools.crashes import program, tracing
from tools.crashes.tracing import Call

# Of x86-64, by what they get a file from.
_WRITES = {1: "write", 18: "pwrite64", 20: "writev", 296: "pwritev", 328: "pwritev2"}
_READS = {0: "read", 17: "pread64", 19: "readv", 295: "preadv", 78: "getdents", 217: "getdents64"}
_SYNCS = {74: "fsync", 75: "fdatasync", 277: "sync_file_range"}
_SIZES = {77: "ftruncate", 285: "fallocate"}
_BY_PATH = {83: "mkdir", 84: "rmdir", 87: "unlink"}
_PATHS_SECOND = {82: "rename", 86: "link"}  # both paths, the second is what is made
_AT = {257: "openat", 258: "mkdirat", 263: "unlinkat"}
_AT_SECOND = {264: "renameat", 265: "linkat", 316: "renameat2"}
_FILES = _WRITES | _READS | _SYNCS | _SIZES
_NAMES = _FILES | _BY_PATH | _PATHS_SECOND | _AT | _AT_SECOND
_MAKES_NAMES = {"mkdir", "mkdirat", "link", "linkat", "rename", "renameat", "renameat2"}
_GROWS = {*_WRITES.values(), *_SIZES.values(), *_MAKES_NAMES}
_CHANGES = {*_GROWS, "punch hole", *_SYNCS.values(), "unlink", "unlinkat", "rmdir"}
_PATH_BYTES_MAX = 4096
_PUNCH_HOLE = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault. `first` is the errno of the call that it strikes, `later` that of all later
    calls that change something (0: they work). `short`: the first is a write of one half."""

    name: str
    first: int
    later: int = 0
    short: bool = False

    def may_strike(self, name: str, *, creates: bool) -> bool:
        """Whether a call could fail so."""
        if self.short:
            return name in {"write", "pwrite64"}
        if name == "punch hole":  # needs no room
            return self.first == errno.EIO
        if self.first in {errno.ENOSPC, errno.EDQUOT}:
            return name in _GROWS or creates
        return True

    def spreads_to(self, name: str, *, creates: bool) -> bool:
        """Whether a call after the one that was struck fails as well."""
        if self.later == errno.ENOSPC:
            return name in _GROWS or creates
        return bool(self.later) and (name in _CHANGES or creates)


KINDS = (
    Kind("disk full", errno.ENOSPC, errno.ENOSPC),
    Kind("disk full once", errno.ENOSPC),
    Kind("short write, then disk full", 0, errno.ENOSPC, short=True),
    Kind("quota", errno.EDQUOT),
    Kind("I/O error", errno.EIO),
    Kind("I/O error, then read-only", errno.EIO, errno.EROFS),
)


@dataclass(frozen=True, slots=True)
class Struck:
    """What became of a command: the call that failed (None: it never came to that), how many
    calls each kind of fault could have struck, its exit status and what it printed."""

    call: str | None
    could: Counter[Kind]
    status: int
    out: str
    err: str


class _Injector:
    """Sees every call of one command."""

    def __init__(self, kind: Kind, number: int, below: Path) -> None:
        self.struck: str | None = None
        self.could: Counter[Kind] = Counter()
        self._kind = kind
        self._number = number
        self._below = f"{below}/"
        self._failing: dict[int, int] = {}

    def began(self, call: Call) -> None:
        name = _NAMES.get(call.number)
        if name is None:
            return
        path = _path(call, name)
        if not path.startswith(self._below):
            return
        creates = name == "openat" and bool(call.arguments[2] & (os.O_CREAT | os.O_TRUNC))
        if name == "fallocate" and call.arguments[1] & _PUNCH_HOLE:
            name = "punch hole"
        self.could.update(kind for kind in KINDS if kind.may_strike(name, creates=creates))
        may = self._kind.may_strike(name, creates=creates)
        if may and self.could[self._kind] == self._number:
            self.struck = f"{name} {path.removeprefix(self._below)}"
            self._strike(call, self._kind.first)
        elif self.struck and self._kind.spreads_to(name, creates=creates):
            self._strike(call, self._kind.later)

    def _strike(self, call: Call, error: int) -> None:
        if error:
            tracing.skip(call.thread)
            self._failing[call.thread] = error
        else:
            tracing.shorten(call.thread, call.arguments[2] // 2)

    def ended(self, thread: int) -> None:
        error = self._failing.pop(thread, 0)
        if error:
            tracing.fail(thread, error)


def run(invocation: program.Invocation, kind: Kind, number: int, below: Path) -> Struck:
    """Run a command whose `number`-th call (from 1; 0: none) about a file `below` a directory
    fails."""
    injector = _Injector(kind, number, below)
    printed = program.Printed.open()
    child = program.fork(invocation, printed, tracing.ask_for_tracing)
    status = tracing.follow(child, injector.began, injector.ended)
    out, err = printed.read()
    return Struck(injector.struck, injector.could, os.waitstatus_to_exitcode(status), out, err)


def _path(call: Call, name: str) -> str:
    """The file that a call is about; "" if that cannot be told."""
    thread, arguments = call.thread, call.arguments
    try:
        if call.number in _FILES:
            return str(Path(f"/proc/{thread}/fd/{arguments[0]}").readlink())
        if name in _BY_PATH.values():
            return _absolute(thread, None, arguments[0])
        if name in _PATHS_SECOND.values():
            return _absolute(thread, None, arguments[1])
        if name in _AT.values():
            return _absolute(thread, arguments[0], arguments[1])
        return _absolute(thread, arguments[2], arguments[3])
    except OSError:  # a file that is not open: the call fails by itself
        return ""


def _absolute(thread: int, directory: int | None, address: int) -> str:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        path = memory.read(_PATH_BYTES_MAX).split(b"\0")[0].decode(errors="surrogateescape")
    if path.startswith("/"):
        return path
    at_fdcwd = directory is None or directory & 0xFFFFFFFF == 0xFFFFFF9C
    base = f"/proc/{thread}/cwd" if at_fdcwd else f"/proc/{thread}/fd/{directory & 0xFFFFFFFF}"
    return f"{Path(base).readlink()}/{path}"
