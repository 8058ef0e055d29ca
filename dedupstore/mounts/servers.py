"""The nbdkit server that a store's devices read from: found, started, stopped.

One server per store is the point: it is one cache. A running `dedupstore serve` on its default
socket is used for nbd devices if it serves every image; otherwise this tool starts its own in the
runtime directory, and stops it when nothing is attached any more. Only its own makes exports files,
for where there is no nbd. Callers hold the runtime's lock.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from dedupstore.errors import MountError, ProgramError
from dedupstore.mounts import kernel
from dedupstore.mounts.handshake import export_digest
from dedupstore.mounts.programs import run_program
from dedupstore.mounts.state import Export, Runtime
from dedupstore.server import ServerOptions, server_command
from dedupstore.syscalls import abort_mount

# Where `dedupstore serve` listens, in the store's directory.
SERVE_SOCKET = "nbd.sock"

_FUSE = Path("/dev/fuse")
_ANSWER_SECONDS = 20.0
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0


def start_command(runtime: Runtime, store: Path) -> list[str]:
    """The command line of this tool's own server; `runtime.files` has to be there."""
    options = ServerOptions(
        store,
        runtime.socket,
        metrics=runtime.metrics,
        files=runtime.files if _FUSE.exists() else None,
    )
    return server_command(options, "--pidfile", str(runtime.pidfile))


def find_server(runtime: Runtime, store: Path, export: Export) -> Path | None:
    """The socket of a running server that serves the export, if there is one.

    Raises MountError when this tool's own server runs but hangs, or does not serve it.
    """
    if _own_serves(runtime, export):
        return runtime.socket
    try:
        served = export_digest(store / SERVE_SOCKET, export.name, _ANSWER_SECONDS)
    except OSError:
        return None
    return store / SERVE_SOCKET if served == export.digest else None


def start_early(runtime: Runtime, store: Path) -> None:
    """Start this tool's own server if no server of the store listens: for an export that is not
    there yet. Raises ProgramError."""
    if not (_listens(runtime.socket) or _listens(store / SERVE_SOCKET)):
        _start(runtime, store)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(os.fspath(path)) == 0


def _start(runtime: Runtime, store: Path) -> None:
    _forget(runtime)
    runtime.files.mkdir(mode=0o700)
    # nbdkit listens before it daemonises: when this returns, connecting works.
    run_program(start_command(runtime, store), _START_SECONDS)


def start_server(runtime: Runtime, store: Path, export: Export) -> Path:
    """Start this tool's own server where `find_server` has found none; its socket.

    Raises ProgramError when nbdkit is missing or fails, and as `find_server`.
    """
    _start(runtime, store)
    if not _own_serves(runtime, export):
        raise ProgramError("nbdkit", "ended as soon as it was started (see the system log)")
    return runtime.socket


def ensure_file(runtime: Runtime, store: Path, export: Export) -> Path:
    """The export as a file of this tool's own server, started if need be. Raises as
    `start_server`, and MountError where this machine has no FUSE."""
    if not _own_serves(runtime, export):
        start_server(runtime, store, export)
    if not kernel.is_mounted(runtime.files):
        raise MountError(f"no nbd device is free and there is no {_FUSE} (modprobe nbd or fuse)")
    return runtime.files / export.digest


def _own_serves(runtime: Runtime, export: Export) -> bool:
    """Whether this tool's own server runs. Raises MountError if it does not serve the export."""
    path = runtime.socket
    try:
        digest = export_digest(path, export.name, _ANSWER_SECONDS)
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError as error:
        raise MountError(f"{path}: the store's server does not answer: {error}") from None
    if digest != export.digest:
        what = f"{path}: the store's server does not serve {export.digest[:16]}"
        raise MountError(f"{what} (removed meanwhile? try again)")
    return True


def stop_server(runtime: Runtime) -> None:
    """Stop this tool's own server if it runs, and remove what a killed one left."""
    pid = _own_pid(runtime)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if pid is None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + _STOP_SECONDS
        while pid is not None and time.monotonic() < deadline:
            time.sleep(0.005)
            pid = _own_pid(runtime)
    _forget(runtime)


def _own_pid(runtime: Runtime) -> int | None:
    try:
        pid = int(runtime.pidfile.read_text())
    except (OSError, ValueError):
        return None
    return pid if str(runtime.socket) in kernel.command_line(pid) else None


def _forget(runtime: Runtime) -> None:
    for path in (runtime.socket, runtime.pidfile, runtime.metrics):
        path.unlink(missing_ok=True)
    # What is mounted from a dead server's files keeps them; it is no longer in the way here.
    if kernel.is_mounted(runtime.files):
        abort_mount(runtime.files)
    if runtime.files.exists():
        runtime.files.rmdir()
