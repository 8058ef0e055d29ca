"""The kernel's nbd devices: found, connected, given new connections, disconnected.

Connected by netlink, a device is the kernel's own: no process stands behind it, it outlives its
server, and its requests wait until somebody gives it new connections (docs/mounting.md). What says
whose it is, is the `backend` that the kernel shows for it: the attachment's directory. `Roots` are
the kernel's directories, so that tests can lay out devices that this machine lacks. Callers hold
the runtime's lock.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dedupstore.errors import MountError, ProgramError
from dedupstore.mounts import netlink
from dedupstore.mounts.handshake import Connection, open_export
from dedupstore.mounts.programs import run_program, wait
from dedupstore.programs import find_program

# The server answers on all of them in parallel; more did not read faster on two cores.
_CONNECTIONS = 4
# One for each image or view that is mounted at a time; what is more goes through FUSE.
_NBDS_MAX = 128
# What was asked of a server that died is asked again on a new connection after this long, and no
# sooner: so long a restart is felt. A request that takes a live server longer costs a connection;
# with the last one, the device waits as after a restart.
TIMEOUT_SECONDS = 5
# The same where a request may have to wait for a remote, which the server does not do for longer.
FETCH_TIMEOUT_SECONDS = 30
# How long requests wait for new connections before they fail: for whoever sees to it that the
# server comes back.
DEAD_SECONDS = 300
_ANSWER_SECONDS = 20.0
_MODPROBE_SECONDS = 30.0
_EXIT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the kernel shows devices."""

    sys: Path = Path("/sys")
    dev: Path = Path("/dev")


def load(roots: Roots) -> None:
    """Load the kernel's nbd module if there is one and it is not there yet, with room for more
    devices than its 16. Failing leaves the host without nbd devices, as it was."""
    if any((roots.sys / "block").glob("nbd*")):
        return
    with contextlib.suppress(ProgramError):
        command = [find_program("modprobe", "kmod"), "--quiet", "nbd", f"nbds_max={_NBDS_MAX}"]
        run_program(command, _MODPROBE_SECONDS)


def free_devices(roots: Roots) -> Iterator[Path]:
    """The devices that nobody has: nothing is connected, they have no size, and a node."""
    found = [path for path in (roots.sys / "block").glob("nbd*") if path.name[3:].isdigit()]
    if not found or not netlink.has_nbd():
        return
    for block in sorted(found, key=lambda path: int(path.name[3:])):
        node = roots.dev / block.name
        if not (block / "pid").exists() and _sectors(block) == 0 and node.exists():
            yield node


def is_ours(device: Path, backend: str, roots: Roots) -> bool:
    """Whether a device is the one that was connected as `backend`: after a reboot or a disconnect
    the same one may be anybody's."""
    try:
        found = (roots.sys / "block" / device.name / "backend").read_bytes()
    except OSError:
        return False
    return found.removesuffix(b"\n") == os.fsencode(backend)


def timeout_seconds(*, may_fetch: bool) -> int:
    """How long a device may wait for an answer; `may_fetch` as in `state.Target`."""
    return FETCH_TIMEOUT_SECONDS if may_fetch else TIMEOUT_SECONDS


def connect(
    device: Path,
    server: Path,
    export: str,
    *,
    backend: str,
    block: int,
    size: int,
    timeout: int,
    roots: Roots,
) -> bool:
    """Connect a free device to an export of the server at a unix socket; `block` and `size` in
    bytes, `timeout` in seconds. False: this kernel does not show whose its devices are (before
    Linux 5.14).

    Raises MountError.
    """
    with _connections(server, export, size) as connections:
        try:
            netlink.connect(
                _index(device),
                [each.socket for each in connections],
                size=size,
                block=block,
                flags=connections[0].flags,
                backend=backend,
                timeout_seconds=timeout,
                dead_seconds=DEAD_SECONDS,
            )
        except OSError as error:
            raise MountError(f"{device}: {error.strerror}") from None
    if not is_ours(device, backend, roots):
        disconnect(device, roots)
        return False
    return True


def reconnect(device: Path, server: Path, export: str, *, backend: str, size: int) -> None:
    """Give a device that is ours new connections for those that are dead, if any. Raises
    MountError."""
    with _connections(server, export, size) as connections:
        try:
            sockets = [each.socket for each in connections]
            netlink.reconfigure(_index(device), sockets, backend=backend)
        except OSError as error:
            raise MountError(f"{device}: {error.strerror}") from None


def disconnect(device: Path, roots: Roots) -> None:
    """Disconnect a device and wait until the kernel has let go of it. Raises MountError."""
    try:
        netlink.disconnect(_index(device))
    except OSError as error:
        raise MountError(f"{device}: {error.strerror}") from None
    wait(lambda: not (roots.sys / "block" / device.name / "pid").exists(), _EXIT_SECONDS)


def connect_command(device: Path, server: Path, export: str, block: int, timeout: int) -> str:
    """What `connect` does, nearly, as a command for people."""
    words = ["nbd-client", "-unix", str(server), str(device), "-N", export, "-b", str(block)]
    words += ["-C", str(_CONNECTIONS), "-timeout", str(timeout)]
    return f"{shlex.join(words)}  # but by netlink itself, to outlive the server"


@contextmanager
def _connections(server: Path, export: str, size: int) -> Iterator[Sequence[Connection]]:
    """Connections to an export, closed in the end: the kernel keeps those that it was given."""
    with ExitStack() as stack:
        found = []
        for _ in range(_CONNECTIONS):
            try:
                one = open_export(server, export, _ANSWER_SECONDS)
            except OSError as error:
                raise MountError(f"{server}: {error.strerror or error}") from None
            found.append(one)
            stack.enter_context(one.socket)
            if one.size != size:
                raise MountError(f"{server}: export {export!r} has {one.size} bytes, not {size}")
        yield found


def _index(device: Path) -> int:
    return int(device.name.removeprefix("nbd"))


def _sectors(block: Path) -> int:
    try:
        return int((block / "size").read_text())
    except (OSError, ValueError):
        return 0
