"""Mounts, loop devices and block devices: system calls, /proc/self/mountinfo and /sys/block.

Owns no state and no policy. Functions raise OSError as the kernel does; callers know what was
wanted and make the message. Thread-safe.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from dedupstore.syscalls import MS_NODEV, MS_NOEXEC, MS_NOSUID, unmount

# What one mount of a file system may forbid, by mount(8)'s names.
RESTRICTIONS = {"nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC}

_FSOPEN, _FSCONFIG = 430, 431  # the same numbers on every architecture
_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING = 0, 1

_LOOP_CONTROL = "/dev/loop-control"
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CLR_FD = 0x4C01
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_DIRECT_IO = 16
# struct loop_config: fd, block size, struct loop_info64 (flags and file name are what is set), 8
# reserved words.
_LOOP_CONFIG = struct.Struct("=II 5Q 4I 64s 64s 32s 2Q 8Q")
assert _LOOP_CONFIG.size == 304

_OCTAL = re.compile(r"\\([0-7]{3})")
_libc = ctypes.CDLL(None, use_errno=True)


def try_unmount(directory: Path) -> bool:
    """Unmount a directory if something is mounted on it; False if that is in use."""
    if not is_mounted(directory):
        return True
    try:
        unmount(directory)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    return True


def knows_option(fstype: str, option: str, value: str | None = None) -> bool:
    """Whether the kernel has a file system, and it takes a mount option; nothing is mounted.

    Needs CAP_SYS_ADMIN; without it the answer is False.
    """
    context = _libc.syscall(_FSOPEN, fstype.encode(), _FSOPEN_CLOEXEC)
    if context < 0:
        return False
    try:
        command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
        raw = None if value is None else value.encode()
        return bool(_libc.syscall(_FSCONFIG, context, command, option.encode(), raw, 0) == 0)
    finally:
        os.close(context)


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo. `device` is the superblock's "major:minor"; two mounts with the same
    one share inodes and page cache. `source` is the device or file as given to mount(2), `options`
    are the superblock's."""

    device: str
    directory: Path
    fstype: str
    source: str
    options: str


def mount_table() -> list[MountPoint]:
    """The mounts of this mount namespace; of several on one directory the last one is visible."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as stream:
        return [_parse_mount(line) for line in stream]


def _parse_mount(line: str) -> MountPoint:
    fields = line.rstrip("\n").split(" ")
    fstype, source, options = fields[fields.index("-", 6) + 1 :][:3]
    return MountPoint(fields[2], Path(_unescape(fields[4])), fstype, _unescape(source), options)


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def is_mounted(directory: Path) -> bool:
    """Whether something is mounted on exactly this (absolute, resolved) directory."""
    return any(point.directory == directory for point in mount_table())


def read_ahead_knobs(fstype: str, sys: Path = Path("/sys")) -> set[Path]:
    """Where the kernel keeps the readahead, in KiB, of each mount of a type that has no device: the
    name does not say which mount, but that of a new mount is new."""
    return set((sys / "class/bdi").glob(f"{fstype}-*/read_ahead_kb"))


def device_number(device: Path) -> str:
    """A block device's "major:minor", as in `MountPoint.device`."""
    number = device.stat().st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def is_claimed(device: Path) -> bool:
    """Whether a mount in any namespace, device mapper or the like holds a block device."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise
    return False


def attach_loop(file: Path, block_bytes: int) -> Path:
    """Put a read-only loop device with direct I/O over a file; it stays until `detach_loop`."""
    backing = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = _LO_FLAGS_READ_ONLY | _LO_FLAGS_DIRECT_IO
        name = os.fsencode(file)[:63]
        config = _LOOP_CONFIG.pack(
            *(backing, block_bytes), *(0,) * 5, *(0, 0, 0, flags), name, b"", b"", *(0,) * 10
        )
        while True:
            device = _free_loop()
            try:
                _ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as error:
                if error.errno != errno.EBUSY:  # somebody else was faster with this one
                    raise
            else:
                return device
    finally:
        os.close(backing)


def _free_loop() -> Path:
    control = os.open(_LOOP_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        return Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
    finally:
        os.close(control)


def detach_loop(device: Path) -> None:
    """Take a loop device off its file. Check `is_claimed` first: the kernel puts it off silently
    while a device is mounted."""
    _ioctl(device, _LOOP_CLR_FD, b"")


def _ioctl(device: Path, request: int, argument: bytes) -> None:
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, request, argument or 0)
    finally:
        os.close(descriptor)


def loops_over(file: Path, sys: Path = Path("/sys")) -> list[Path]:
    """The loop devices whose backing file is `file` (absolute, resolved)."""
    found = []
    for backing in sorted(sys.glob("block/loop*/loop/backing_file")):
        try:
            name = backing.read_text(errors="surrogateescape").rstrip("\n")
        except OSError:  # detached since the glob
            continue
        if name == str(file):
            found.append(Path("/dev") / backing.parents[1].name)
    return found


def command_line(pid: int) -> list[str]:
    """A process's arguments; none if it has ended. They tell ours from one that got its id."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(part) for part in raw.split(b"\0")[:-1]]
