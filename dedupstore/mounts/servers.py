"""The nbdkit server that a store's devices read from: found, started, stopped.

One server per store is the point: it is one cache. A running `dedupstore serve` on its default
socket is used if it serves every image; otherwise this tool starts its own in the runtime
directory, and stops it when nothing is attached any more. Callers hold the runtime's lock.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from dedupstore.errors import MountError, ProgramError
from dedupstore.mounts import kernel
from dedupstore.mounts.handshake import export_digest
from dedupstore.mounts.programs import run_program
from dedupstore.mounts.state import Export, Runtime
from dedupstore.server import ServerOptions, server_command

# Where `dedupstore serve` listens, in the store's directory.
SERVE_SOCKET = "nbd.sock"

_ANSWER_SECONDS = 20.0
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0


def start_command(runtime: Runtime, store: Path) -> list[str]:
    """The command line of this tool's own server."""
    options = ServerOptions(store, runtime.socket, metrics=runtime.metrics)
    return server_command(options, "--pidfile", str(runtime.pidfile))


def find_server(runtime: Runtime, store: Path, export: Export) -> Path | None:
    """The socket of a running server that serves the export, if there is one.

    Raises MountError when this tool's own server runs but hangs, or does not serve it.
    """
    own = runtime.socket
    for socket in (own, store / SERVE_SOCKET):
        try:
            digest = export_digest(socket, export.name, _ANSWER_SECONDS)
        except (ConnectionRefusedError, FileNotFoundError):
            continue
        except OSError as error:
            if socket == own:
                raise MountError(f"{own}: the store's server does not answer: {error}") from None
            continue
        if digest == export.digest:
            return socket
        if socket == own:
            what = f"{own}: the store's server does not serve {export.digest[:16]}"
            raise MountError(f"{what} (removed meanwhile? try again)")
    return None


def start_server(runtime: Runtime, store: Path, export: Export) -> Path:
    """Start this tool's own server where `find_server` has found none; its socket.

    Raises ProgramError when nbdkit is missing or fails, and as `find_server`.
    """
    _forget(runtime)
    # nbdkit listens before it daemonises: when this returns, connecting works.
    run_program(start_command(runtime, store), _START_SECONDS)
    found = find_server(runtime, store, export)
    if found is None:
        raise ProgramError("nbdkit", "ended as soon as it was started (see the system log)")
    return found


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
