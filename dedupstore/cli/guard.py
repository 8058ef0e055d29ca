"""Keeps a damaged store from ending a command with a signal and no word.

LMDB maps its file and follows what it reads; `dedupstore.pages` refuses what it can see from the
outside, but damage behind that, a file that is truncated while it is open, or a disk that fails to
read a page ends the process with SIGSEGV, SIGBUS or SIGABRT. So a command runs in a child process,
and the parent, which touches no store, says in one line what happened. The child dies with its
parent: killing `dedupstore` kills the command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PR_SET_PDEATHSIG = 1


def run_guarded(command: Callable[[], int]) -> int:
    """Run `command` in a child and return its exit status; a crash becomes a message and 1."""
    parent = os.getpid()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD, *_FORWARDED))
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, _interrupt)
        _die_with(parent)
        os._exit(_exit_status(command))
    status = _wait(child)
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    ended_by = signal.Signals(os.WTERMSIG(status))
    if ended_by in _CRASHES:
        name = ended_by.name
        message = f"the store's data.mdb is damaged or cannot be read ({name} inside LMDB)"
        print(f"dedupstore: {message}; run 'dedupstore check'", file=sys.stderr)
        return 1
    if ended_by != signal.SIGKILL:  # whose action cannot be set
        signal.signal(ended_by, signal.SIG_DFL)
    os.kill(os.getpid(), ended_by)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return 1


def _wait(child: int) -> int:
    """Wait for the child and return its status, passing signals on that only we were sent: those of
    the terminal (positive codes) reach the whole process group anyway."""
    while True:
        received = signal.sigwaitinfo((signal.SIGCHLD, *_FORWARDED))
        if received.si_signo != signal.SIGCHLD:
            if received.si_code <= 0:
                os.kill(child, received.si_signo)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status


def _interrupt(*_: object) -> None:
    """The first Ctrl-C ends the command, further ones do not disturb its cleaning up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def _exit_status(command: Callable[[], int]) -> int:
    try:
        status = command()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = status or 1
    return status
