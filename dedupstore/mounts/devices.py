"""The two ways to turn an export into something the kernel can mount.

nbd-client over the unix socket makes a /dev/nbdN, where the kernel has nbd and a device is free.
nbdfuse makes a file, everywhere else; EROFS mounts it directly or a loop device goes over it. Owns
their command lines, waiting until they are ready, and letting them go; not which image or why.
`Roots` are the kernel's directories, so that tests can lay out devices that this machine lacks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from dedupstore.constants import GRID_BYTES
from dedupstore.errors import ProgramError
from dedupstore.mounts import kernel
from dedupstore.mounts.programs import last_line, run_program
from dedupstore.programs import find_program

# The server answers on all of them in parallel; more did not read faster on two cores.
_CONNECTIONS = 4
# One for each image or view that is mounted at a time; what is more goes through nbdfuse.
_NBDS_MAX = 128
_READY_SECONDS = 30.0
_EXIT_SECONDS = 5.0
_READ_SECONDS = 10.0
_POLL_SECONDS = 0.005
_SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the kernel shows devices and processes."""

    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    proc: Path = Path("/proc")


def block_bytes(kind: str, size: int) -> int:
    """The logical block size of a device for an image, in bytes: EROFS's own where that fits; any
    other file system may be made of smaller blocks."""
    return GRID_BYTES if kind == "erofs" and size % GRID_BYTES == 0 else _SECTOR_BYTES


# --- nbd-client ---


def nbd_client_command(device: Path, socket: Path, export: str, block: int) -> list[str]:
    """Connect `device`. Only the ioctl way of attaching (-nonetlink) keeps a process by which a
    device can be told to be ours, and by which -persist could reconnect."""
    return [
        find_program("nbd-client", "nbd-client"),
        *("-unix", str(socket), str(device)),
        *("-N", export, "-b", str(block), "-C", str(_CONNECTIONS)),
        *("-persist", "-nonetlink"),
    ]


def load_nbd(roots: Roots) -> None:
    """Load the kernel's nbd module if there is one and it is not there yet, with room for more
    devices than its 16. Failing leaves the host without nbd devices, as it was."""
    if any((roots.sys / "block").glob("nbd*")):
        return
    with contextlib.suppress(ProgramError):
        find_program("nbd-client", "nbd-client")
        command = [find_program("modprobe", "kmod"), "--quiet", "nbd", f"nbds_max={_NBDS_MAX}"]
        run_program(command, _READY_SECONDS)


def free_nbd(roots: Roots) -> Path | None:
    """The first nbd device that nobody has; None also without nbd-client: nbdfuse then does as
    well."""
    return next(free_nbds(roots), None)


def free_nbds(roots: Roots) -> Iterator[Path]:
    """The nbd devices that nobody has: no process behind them, no size, and a node."""
    try:
        find_program("nbd-client", "nbd-client")
    except ProgramError:
        return
    found = [path for path in (roots.sys / "block").glob("nbd*") if path.name[3:].isdigit()]
    for block in sorted(found, key=lambda path: int(path.name[3:])):
        node = roots.dev / block.name
        if not (block / "pid").exists() and _sectors(block) == 0 and node.exists():
            yield node


def nbd_is_ours(device: Path, socket: Path, export: str, roots: Roots) -> bool:
    """Whether the process behind an nbd device is the nbd-client that was started for it: after a
    reboot or a disconnect the same device may be anybody's."""
    command = kernel.command_line(_nbd_pid(device, roots), roots.proc)
    return {str(device), str(socket), export} <= set(command)


def nbd_is_orphan(device: Path, roots: Roots) -> bool:
    """Whether nbd-client has died and left the device as it was: it does when its server goes, for
    its -persist does not outlive a lost connection (3.24). A device without a process of its own
    that was attached by netlink has a `backend`, and is somebody's."""
    pid = _nbd_pid(device, roots)
    by_netlink = (roots.sys / "block" / device.name / "backend").exists()
    return pid != 0 and not by_netlink and not kernel.command_line(pid, roots.proc)


def connect_nbd(
    device: Path, socket: Path, export: str, *, block: int, size: int, roots: Roots
) -> None:
    """Run nbd-client and wait until the kernel shows the device with its size in bytes.

    Raises ProgramError; the device is then disconnected.
    """
    run_program(nbd_client_command(device, socket, export, block), _READY_SECONDS)
    sectors = size // _SECTOR_BYTES
    sysfs = roots.sys / "block" / device.name
    if not _wait(lambda: (sysfs / "pid").exists() and _sectors(sysfs) == sectors, _READY_SECONDS):
        disconnect_nbd(device, roots)
        raise ProgramError("nbd-client", f"{device} did not become ready")


def disconnect_nbd(device: Path, roots: Roots) -> None:
    """Disconnect a device and wait until the kernel has let go of it. Raises ProgramError."""
    command = [find_program("nbd-client", "nbd-client"), "-d", str(device)]
    run_program(command, _READY_SECONDS)
    _wait(lambda: not (roots.sys / "block" / device.name / "pid").exists(), _EXIT_SECONDS)


def _nbd_pid(device: Path, roots: Roots) -> int:
    try:
        return int((roots.sys / "block" / device.name / "pid").read_text())
    except (OSError, ValueError):
        return 0


def _sectors(block: Path) -> int:
    try:
        return int((block / "size").read_text())
    except (OSError, ValueError):
        return 0


# --- nbdfuse ---


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
        _wait(lambda: _has_text(pidfile) or process.poll() is not None, _READY_SECONDS)
        if not _has_text(pidfile) or process.poll() is not None:
            raise ProgramError("nbdfuse", last_line(log.read_text()) or "did not become ready")
    except BaseException:
        process.kill()
        process.wait()
        raise


def stop_nbdfuse(directory: Path, *, patience_seconds: float) -> bool:
    """Unmount nbdfuse's file, which ends nbdfuse. False: the kernel still reads from the file."""
    mountpoint = fuse_file(directory).parent
    if not _wait(lambda: kernel.try_unmount(mountpoint), patience_seconds):
        return False
    try:
        pid = int((directory / "nbdfuse.pid").read_text())
    except (OSError, ValueError):
        return True

    def ended() -> bool:
        return str(fuse_file(directory)) not in kernel.command_line(pid)

    if not _wait(ended, _EXIT_SECONDS):  # it waits for a server that hangs
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return True


# --- both ---


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


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _has_text(path: Path) -> bool:
    try:
        return bool(path.read_text().strip())
    except OSError:
        return False
