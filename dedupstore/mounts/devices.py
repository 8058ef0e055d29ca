"""Block devices for exports: nbd devices, and loop devices over the server's files.

nbd-client over the unix socket makes a /dev/nbdN, where the kernel has nbd and a device is free.
Owns its command lines, waiting until a device is ready, and letting it go; not which image or why.
`Roots` are the kernel's directories, so that tests can lay out devices that this machine lacks.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dedupstore.constants import GRID_BYTES
from dedupstore.errors import ProgramError
from dedupstore.mounts import kernel
from dedupstore.mounts.programs import run_program
from dedupstore.programs import find_program

# The server answers on all of them in parallel; more did not read faster on two cores.
_CONNECTIONS = 4
# One for each image or view that is mounted at a time; what is more goes through FUSE.
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
    """The first nbd device that nobody has; None also without nbd-client: a file then does as
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
    if not wait(lambda: (sysfs / "pid").exists() and _sectors(sysfs) == sectors, _READY_SECONDS):
        disconnect_nbd(device, roots)
        raise ProgramError("nbd-client", f"{device} did not become ready")


def disconnect_nbd(device: Path, roots: Roots) -> None:
    """Disconnect a device and wait until the kernel has let go of it. Raises ProgramError."""
    command = [find_program("nbd-client", "nbd-client"), "-d", str(device)]
    run_program(command, _READY_SECONDS)
    wait(lambda: not (roots.sys / "block" / device.name / "pid").exists(), _EXIT_SECONDS)


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


# --- devices and files ---


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


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Look until a condition holds, at least once; False if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
