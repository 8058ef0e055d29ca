"""How nbdkit is run with the plugin: command line and socket, and nothing about who runs it.

Thread-safe.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dedupstore.constants import SOCKET_PATH_BYTES_MAX
from dedupstore.errors import ProgramError, UsageError
from dedupstore.listening import TcpAddress, Tls
from dedupstore.programs import find_program


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server serves and where. Empty `images`: all of them; `cache` in nbdkit's size
    syntax; `connections` and `pull` as for the plugin. nbdkit listens in one place: `tcp` or
    `socket`; with neither on the sockets that systemd has opened, which it finds by itself."""

    store: Path
    socket: Path | None
    images: Sequence[str] = ()
    cache: str | None = None
    metrics: Path | None = None
    files: Path | None = None
    connections: int | None = None
    pull: str | None = None
    tcp: TcpAddress | None = None
    tls: Tls = field(default_factory=Tls)


def plugin_path() -> Path:
    """The plugin's script, from a checkout or an installed package. Raises ProgramError."""
    spec = importlib.util.find_spec("nbdplugin")
    if spec is None or spec.origin is None:
        raise ProgramError("nbdkit", "the plugin (package nbdplugin) is not installed")
    return Path(spec.origin).with_name("dedup.py")


def forget_stale_socket(path: Path) -> None:
    """Remove the unix socket that a killed server has left, on which no other could listen. One
    that somebody listens on stays, as do what is no socket and what may not be removed: nbdkit
    then says so."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        refused = probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED
    if refused:
        with suppress(OSError):
            path.unlink()


def server_command(options: ServerOptions, *extra: str) -> list[str]:
    """The nbdkit command line; `extra` are nbdkit's own options, put before the plugin."""
    command = [find_program("nbdkit", "nbdkit"), "--readonly", *_listening(options)]
    command += [*extra, "python", str(plugin_path()), f"store={options.store}"]
    command += [f"image={image}" for image in options.images]
    if options.cache is not None:
        command.append(f"cache={options.cache}")
    if options.metrics is not None:
        command.append(f"metrics={options.metrics}")
    if options.files is not None:
        command.append(f"files={options.files}")
    if options.pull is not None:
        command.append(f"pull={options.pull}")
    if options.connections is not None:
        command.append(f"connections={options.connections}")
    return command


def _listening(options: ServerOptions) -> list[str]:
    """nbdkit's options for where it listens. Raises UsageError."""
    tls = options.tls.arguments(over_tcp=options.tcp is not None)
    if options.tcp is not None:
        if options.socket is not None:
            raise UsageError("--tcp, --socket: nbdkit listens in one place only")
        return [*options.tcp.arguments(), *tls]
    if options.socket is None:
        return tls
    # nbdkit's own message for it does not say so.
    if len(os.fsencode(options.socket)) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(
            f"socket {options.socket}: path is longer than {SOCKET_PATH_BYTES_MAX} bytes"
        )
    return ["--unix", str(options.socket), *tls]
