"""Exports as files: what is mounted where the kernel has no nbd device to give (see `nbd`).

nbdfuse makes the file; EROFS mounts it directly or a loop device goes over it. Owns the command
lines, waiting until it is ready, and letting it go; not which image or why.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from urllib.parse import quote

from dedupstore.constants import GRID_BYTES
from dedupstore.errors import ProgramError
from dedupstore.mounts import kernel
from dedupstore.mounts.programs import last_line, wait
from dedupstore.programs import find_program

# The server answers on all of them in parallel; more did not read faster on two cores.
_CONNECTIONS = 4
_READY_SECONDS = 30.0
_EXIT_SECONDS = 5.0
_READ_SECONDS = 10.0
_SECTOR_BYTES = 512


def block_bytes(kind: str, size: int) -> int:
    """The logical block size of a device for an image, in bytes: EROFS's own where that fits; any
    other file system may be made of smaller blocks."""
    return GRID_BYTES if kind == "erofs" and size % GRID_BYTES == 0 else _SECTOR_BYTES


def fuse_file(directory: Path) -> Path:
    """The file that nbdfuse makes for the attachment in `directory`."""
    return directory / "dev" / "img"


def nbdfuse_command(directory: Path, socket: Path, export: str) -> list[str]:
    """Make the export a file, in the foreground."""
    uri = f"nbd+unix:///{quote(export, safe='')}?socket={quote(str(socket))}"
    pidfile = str(directory / "nbdfuse.pid")
    return [
        *(find_program("nbdfuse", "libnbd-bin"), "-r", "-C", str(_CONNECTIONS)),
        *("-P", pidfile, str(fuse_file(directory)), uri),
    ]


def start_nbdfuse(directory: Path, socket: Path, export: str) -> None:
    """Run nbdfuse in the background until its file is there.

    Raises ProgramError; nothing runs then, but `directory` keeps what was put there.
    """
    command = nbdfuse_command(directory, socket, export)
    fuse_file(directory).parent.mkdir(exist_ok=True)
    pidfile, log = directory / "nbdfuse.pid", directory / "nbdfuse.log"
    with log.open("wb") as errors:
        # In a session of its own, it outlives this command; nobody waits for it.
        process = subprocess.Popen(
            command,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
    try:
        wait(lambda: _has_text(pidfile) or process.poll() is not None, _READY_SECONDS)
        if not _has_text(pidfile) or process.poll() is not None:
            raise ProgramError("nbdfuse", last_line(log.read_text()) or "did not become ready")
    except BaseException:
        process.kill()
        process.wait()
        raise


def stop_nbdfuse(directory: Path, *, patience_seconds: float) -> bool:
    """Unmount nbdfuse's file, which ends nbdfuse. False: the kernel still reads from the file."""
    mountpoint = fuse_file(directory).parent
    if not wait(lambda: kernel.try_unmount(mountpoint), patience_seconds):
        return False
    try:
        pid = int((directory / "nbdfuse.pid").read_text())
    except (OSError, ValueError):
        return True

    def ended() -> bool:
        return str(fuse_file(directory)) not in kernel.command_line(pid)

    if not wait(ended, _EXIT_SECONDS):  # it waits for a server that hangs
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return True


def responds(path: Path) -> bool:
    """Whether a device or file still reads, past every cache. In a process of its own: a read from
    a device whose server is gone may never return, and could then not even be killed."""
    process = subprocess.Popen(
        ["dd", f"if={path}", "of=/dev/null", f"bs={GRID_BYTES}", "count=1", "iflag=direct"],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return process.wait(_READ_SECONDS) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        return False


def loop_command(file: Path, block: int) -> list[str]:
    """What `kernel.attach_loop` does, as a command for people."""
    options = ["--find", "--show", "--read-only", "--direct-io=on", "--sector-size", str(block)]
    return ["losetup", *options, str(file)]


def _has_text(path: Path) -> bool:
    try:
        return bool(path.read_text().strip())
    except OSError:
        return False
