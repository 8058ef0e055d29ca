"""Commands that serve images: serve."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dedupstore.cli.context import Context, pass_context
from dedupstore.listening import PORT, TLS_MODES, Tls, parse_address
from dedupstore.server import ServerOptions, server_command

SOCKET_NAME = "nbd.sock"


@click.command()
@click.argument("images", nargs=-1, metavar="[NAME|GLOB]...")
@click.option("--socket", type=click.Path(path_type=Path), help="Default: nbd.sock in the store.")
@click.option("--cache", metavar="SIZE", help="Bound of the shared cache, such as 512M.")
@click.option("--metrics", type=click.Path(path_type=Path), help="Prometheus text on this socket.")
@click.option("--connections", type=click.IntRange(min=1), help="Clients at a time.")
@click.option(
    "--tcp",
    metavar="ADDRESS[:PORT]",
    help=f"Listen here instead, port {PORT} by default, with TLS unless --tls says otherwise.",
)
@click.option("--tls", type=click.Choice(TLS_MODES), help="With --tcp, require is the default.")
@click.option(
    "--tls-certificates",
    type=click.Path(path_type=Path),
    help="Directory of ca-cert.pem, server-cert.pem, server-key.pem.",
)
@click.option("--tls-psk", type=click.Path(path_type=Path), help="File of pre-shared keys.")
@click.option("--tls-verify-peer", is_flag=True, help="Only clients with a certificate of the CA.")
@pass_context
def serve(
    context: Context,
    images: tuple[str, ...],
    socket: Path | None,
    cache: str | None,
    metrics: Path | None,
    connections: int | None,
    tcp: str | None,
    tls: str | None,
    tls_certificates: Path | None,
    tls_psk: Path | None,
    tls_verify_peer: bool,
) -> None:
    """Serve images (default: all) over NBD with nbdkit, in the foreground.

    Only this user and root can connect, unless --tcp is given.
    """
    address = None if tcp is None else parse_address(tcp)
    if address is None:
        socket = (socket or context.path / SOCKET_NAME).absolute()
    options = ServerOptions(
        context.path,
        socket,
        images,
        cache,
        metrics.absolute() if metrics else None,
        connections=connections,
        tcp=address,
        tls=Tls(tls, tls_certificates, tls_psk, tls_verify_peer),
    )
    context.open().close()  # a wrong store is reported here, in one line
    command = server_command(options, "--foreground")
    os.execv(command[0], command)  # noqa: S606 - no shell is what is wanted


COMMANDS = (serve,)
