"""Commands that serve images: serve."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dedupstore.cli.context import Context, pass_context
from dedupstore.server import ServerOptions, server_command

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
    """Serve images (default: all) over NBD with nbdkit, in the foreground."""
    options = ServerOptions(
        context.path,
        (socket or context.path / SOCKET_NAME).absolute(),
        images,
        cache,
        metrics.absolute() if metrics else None,
    )
    context.open().close()  # a wrong store is reported here, in one line
    command = server_command(options, "--foreground")
    os.execv(command[0], command)  # noqa: S606 - no shell is what is wanted


COMMANDS = (serve,)
