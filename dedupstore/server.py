"""How nbdkit is run with the plugin: the command line, and nothing about who runs it.

Pure but for looking programs and files up. Thread-safe.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dedupstore.constants import SOCKET_PATH_BYTES_MAX
from dedupstore.errors import ProgramError, UsageError
from dedupstore.programs import find_program


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server serves and where. Empty `images`: all of them; `cache` in nbdkit's size
    syntax."""

    store: Path
    socket: Path
    images: Sequence[str] = ()
    cache: str | None = None
    metrics: Path | None = None
    files: Path | None = None


def plugin_path() -> Path:
    """The plugin's script, from a checkout or an installed package. Raises ProgramError."""
    spec = importlib.util.find_spec("nbdplugin")
    if spec is None or spec.origin is None:
        raise ProgramError("nbdkit", "the plugin (package nbdplugin) is not installed")
    return Path(spec.origin).with_name("dedup.py")


def server_command(options: ServerOptions, *extra: str) -> list[str]:
    """The nbdkit command line; `extra` are nbdkit's own options, put before the plugin."""
    # nbdkit's own message for it does not say so.
    if len(os.fsencode(options.socket)) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(
            f"socket {options.socket}: path is longer than {SOCKET_PATH_BYTES_MAX} bytes"
        )
    command = [find_program("nbdkit", "nbdkit"), "--unix", str(options.socket), "--readonly"]
    command += [*extra, "python", str(plugin_path()), f"store={options.store}"]
    command += [f"image={image}" for image in options.images]
    if options.cache is not None:
        command.append(f"cache={options.cache}")
    if options.metrics is not None:
        command.append(f"metrics={options.metrics}")
    if options.files is not None:
        command.append(f"files={options.files}")
    return command
