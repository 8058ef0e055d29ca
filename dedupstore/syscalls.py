"""mount(2) and umount2(2), which Python's standard library lacks. Thread-safe.

Called directly, not by mount(8): 2.38 silently puts a loop device under a regular file, which a
file-backed EROFS mount is there to avoid. OSError as the kernel says it; callers know what was
wanted and make the message.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096

_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8
_OPTIONS_BYTES_MAX = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: Path, target: Path, fstype: str | None, flags: int, options: str = "") -> None:
    """mount(2); no `fstype` for a bind mount. Options that are too long are E2BIG: the kernel would
    cut them off without a word."""
    if len(options) >= _OPTIONS_BYTES_MAX:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG), str(target))
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        None if fstype is None else fstype.encode(),
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _check(result, target)


def unmount(target: Path) -> None:
    """umount2(2), never lazily: EBUSY is how the kernel says that something is still in use.

    The last component is not followed if it is a symbolic link.
    """
    _check(_libc.umount2(os.fsencode(target), _UMOUNT_NOFOLLOW), target)


def abort_mount(target: Path) -> None:
    """Take a mount out of the file tree at once, whoever uses it. A FUSE server's threads, which
    the kernel has waiting for requests, get ENODEV; what its files are used for gets errors."""
    flags = _MNT_FORCE | _MNT_DETACH | _UMOUNT_NOFOLLOW
    _check(_libc.umount2(os.fsencode(target), flags), target)


def _check(result: int, path: Path) -> None:
    """Raise the OSError of a libc call that returned `result`, if it failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
