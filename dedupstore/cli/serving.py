"""Commands that serve images: serve."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dedupstore.cli.context import Context, pass_context
from dedupstore.server import ServerOptions, forget_stale_socket, server_command

SOCKET_NAME = "nbd.sock"


@click.command()
@click.argument("images", nargs=-1, metavar="[NAME|GLOB]...")
@click.option("--socket", type=click.Path(path_type=Path), help="Default: nbd.sock in the store.")
@click.option("--cache", metavar="SIZE", help="Bound of the shared cache, such as 512M.")
@click.option("--metrics", type=click.Path(path_type=Path), help="Prometheus text on this socket.")
@pass_context
def serve(
    context: Context,
    images: tuple[str, ...],
    socket: Path | None,
    cache: str | None,
    metrics: Path | None,
) -> None:
    """Serve images (default: all) over NBD with nbdkit, in the foreground.

    Started by a systemd socket, it serves on that. What a killed server left does not matter.
    """
    activated = _is_activated()
    if activated and socket is not None:
        raise click.UsageError("--socket: systemd has opened the socket already")
    path = None if activated else (socket or context.path / SOCKET_NAME).absolute()
    options = ServerOptions(
        context.path, path, images, cache, metrics.absolute() if metrics else None
    )
    context.open().close()  # a wrong store is reported here, in one line
    command = server_command(options, "--foreground")
    if path is not None:
        forget_stale_socket(path)
    if activated:
        os.environ["LISTEN_PID"] = str(os.getpid())
    os.execv(command[0], command)  # noqa: S606 - no shell is what is wanted


def _is_activated() -> bool:
    """Whether systemd has opened sockets for this command (sd_listen_fds(3)): it started our
    parent, which only guards us (`cli.guard`)."""
    ours = {str(os.getpid()), str(os.getppid())}
    return os.environ.get("LISTEN_PID") in ours and os.environ.get("LISTEN_FDS", "0") != "0"


COMMANDS = (serve,)
