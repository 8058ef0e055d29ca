"""Follows a child process and its threads system call by system call, with ptrace(2). Linux on
x86-64; a kernel of 5.3 or later."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass

_WALL = 0x40000000
_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO, _POKEUSER = 0, 24, 0x4200, 0x420E, 6
_OPTIONS = 1 | 8 | 0x100000  # TRACESYSGOOD, TRACECLONE, EXITKILL
_ENTRY = 1
_ENTRY_INFO = struct.Struct("<24x7Q")
# struct user_regs_struct.
_RAX, _RDX, _ORIG_RAX = 80, 96, 120

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that is about to begin: the thread that makes it, its number and arguments."""

    thread: int
    number: int
    arguments: tuple[int, ...]


def ask_for_tracing() -> None:
    """Called in the process that will be traced."""
    if _libc.ptrace(_TRACEME, 0, None, None):
        raise OSError(ctypes.get_errno(), "ptrace")
    os.kill(os.getpid(), signal.SIGSTOP)


def follow(child: int, began: Callable[[Call], None], ended: Callable[[int], None]) -> int:
    """Follow a process, a leader of a process group, that has asked for it, to its end; return its
    wait status. Its thread stands still while `began` gets a call and `ended` the thread whose
    call has ended."""
    os.waitpid(child, _WALL)
    _ptrace(_SETOPTIONS, child, _OPTIONS)
    _ptrace(_SYSCALL, child, 0)
    info = ctypes.create_string_buffer(88)
    result = -1
    while True:
        try:
            thread, status = os.waitpid(-child, _WALL)  # of its process group
        except ChildProcessError:
            return result
        if not os.WIFSTOPPED(status):
            if thread == child:
                result = status
            continue
        deliver = os.WSTOPSIG(status)
        if deliver == signal.SIGTRAP | 0x80:
            deliver = 0
            _libc.ptrace(_GET_SYSCALL_INFO, thread, len(info), ctypes.addressof(info))
            if info[0] == bytes([_ENTRY]):
                number, *arguments = _ENTRY_INFO.unpack_from(info)
                began(Call(thread, number, tuple(arguments)))
            else:
                ended(thread)
        elif status >> 16 or deliver == signal.SIGSTOP:  # a new thread
            deliver = 0
        _ptrace(_SYSCALL, thread, deliver)


def skip(thread: int) -> None:
    """Within `began`: the call is not executed. Its result is ENOSYS, unless `fail` follows."""
    _ptrace(_POKEUSER, thread, (1 << 64) - 1, _ORIG_RAX)


def fail(thread: int, error: int) -> None:
    """Within `ended`: the call's result is this errno."""
    _ptrace(_POKEUSER, thread, (1 << 64) - error, _RAX)


def shorten(thread: int, length: int) -> None:
    """Within `began` of write(2) or pwrite(2): only `length` bytes are written."""
    _ptrace(_POKEUSER, thread, length, _RDX)


def _ptrace(request: int, thread: int, data: int, address: int | None = None) -> None:
    """A thread that is just being killed is no error (ESRCH)."""
    _libc.ptrace(request, thread, address, data)
