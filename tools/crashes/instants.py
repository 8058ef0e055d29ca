"""When a process is killed: after a time, or at one of its system calls.

A time is as blind as a real crash, but most of a command's time is compression, and the windows
between two commits, or between a commit's pages and its meta page, are a thousandth of it. So half
of the kills count the system calls that change files or locks, over all threads, with ptrace(2),
and strike as the n-th begins (it is then not executed) or has returned.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tools.crashes import tracing

# Of x86-64: what changes files, and fcntl for its locks.
_WRITES = frozenset(
    {
        1, 18, 20, 296, 328,  # write, pwrite64, writev, pwritev, pwritev2
        26, 74, 75, 277,  # msync, fsync, fdatasync, sync_file_range
        72, 73,  # fcntl, flock
        76, 77, 285,  # truncate, ftruncate, fallocate
        82, 264, 316,  # rename, renameat, renameat2
        83, 84, 87, 263,  # mkdir, rmdir, unlink, unlinkat
        257,  # openat, which creates
        91, 268,  # fchmod, fchmodat
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Never:
    """The process is let go on to its end; `count` counts its calls."""

    count: bool = False


@dataclass(frozen=True, slots=True)
class After:
    """Kill after this many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class AtCall:
    """Kill as the `number`-th counted call (from 1) begins, or once it has `returned`; before that
    let the process stand still for some seconds, with all the locks that it has."""

    number: int
    returned: bool
    linger: float = 0.0


Instant = Never | After | AtCall


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: its exit status, None if it was killed; how long it took; the counted
    calls that it made, None if they were not counted."""

    status: int | None
    seconds: float
    calls: int | None


def is_traced(instant: Instant) -> bool:
    """Whether the process has to call `tracing.ask_for_tracing` before anything else."""
    return isinstance(instant, AtCall) or (isinstance(instant, Never) and instant.count)


def await_end(
    child: int, instant: Instant, before_kill: Callable[[], None] = lambda: None
) -> Ended:
    """Wait for a child process, and kill it when `instant` has come; if that is a call,
    `before_kill` is called while the process stands still."""
    begin = time.monotonic()
    if is_traced(instant):
        at = instant if isinstance(instant, AtCall) else AtCall(0, returned=False)
        status, calls = _trace(child, at, before_kill)
    else:
        if isinstance(instant, After) and not _ends_within(child, instant.seconds):
            os.kill(child, signal.SIGKILL)
        status, calls = os.waitpid(child, 0)[1], None
    code = os.waitstatus_to_exitcode(status)
    killed = code == -signal.SIGKILL
    return Ended(None if killed else code, time.monotonic() - begin, calls)


def _ends_within(child: int, seconds: float) -> bool:
    file = os.pidfd_open(child)
    try:
        return bool(select.select([file], [], [], seconds)[0])
    finally:
        os.close(file)


def _trace(child: int, at: AtCall, before_kill: Callable[[], None]) -> tuple[int, int]:
    """Follow a process and its threads call by call. Returns (wait status, counted calls)."""
    calls, due = 0, 0

    def strike() -> None:
        time.sleep(at.linger)
        before_kill()
        os.kill(child, signal.SIGKILL)

    def began(call: tracing.Call) -> None:
        nonlocal calls, due
        if call.number in _WRITES:
            calls += 1
            if calls == at.number:
                due = call.thread
                if not at.returned:
                    strike()

    def ended(thread: int) -> None:
        nonlocal due
        if thread == due:
            due = 0
            strike()

    status = tracing.follow(child, began, ended)
    return status, calls
