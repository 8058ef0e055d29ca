"""Commands that serve images: serve."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dedupstore.cli.context import Context, pass_context
from dedupstore.listening import PORT, TLS_MODES, Tls, parse_address
from dedupstore.server import ServerOptions, forget_stale_socket, server_command

SOCKET_NAME = "nbd.sock"


@click.command()
@click.argument("images", nargs=-1, metavar="[NAME|GLOB]...")
@click.option("--socket", type=click.Path(path_type=Path), help="Default: nbd.sock in the store.")
@click.option("--cache", metavar="SIZE", help="Bound of the shared cache, such as 512M.")
@click.option("--metrics", type=click.Path(path_type=Path), help="Prometheus text on this socket.")
@click.option("--connections", type=click.IntRange(min=1), help="Clients at a time.")
@click.option(
    "--pull",
    "remote",
    metavar="REMOTE",
    help="Pull an image that the store has not from there when a client opens it, lazily.",
)
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
    remote: str | None,
    tcp: str | None,
    tls: str | None,
    tls_certificates: Path | None,
    tls_psk: Path | None,
    tls_verify_peer: bool,
) -> None:
    """Serve images (default: all) over NBD with nbdkit, in the foreground.

    Only this user and root can connect, unless --tcp is given. Started by a systemd socket, it
    serves on that. What a killed server left does not matter.
    """
    activated = _is_activated()
    if activated and (socket is not None or tcp is not None):
        raise click.UsageError("--socket, --tcp: systemd has opened the socket already")
    address = None if tcp is None else parse_address(tcp)
    if address is None and not activated:
        socket = (socket or context.path / SOCKET_NAME).absolute()
    options = ServerOptions(
        context.path,
        socket,
        images,
        cache,
        metrics.absolute() if metrics else None,
        connections=connections,
        pull=remote,
        tcp=address,
        tls=Tls(tls, tls_certificates, tls_psk, tls_verify_peer),
    )
    context.open().close()  # a wrong store is reported here, in one line
    command = server_command(options, "--foreground")
    if socket is not None:
        forget_stale_socket(socket)
    if activated:
        os.environ["LISTEN_PID"] = str(os.getpid())
    os.execv(command[0], command)  # noqa: S606 - no shell is what is wanted


def _is_activated() -> bool:
    """Whether systemd has opened sockets for this command (sd_listen_fds(3)): it started our
    parent, which only guards us (`cli.guard`)."""
    ours = {str(os.getpid()), str(os.getppid())}
    return os.environ.get("LISTEN_PID") in ours and os.environ.get("LISTEN_FDS", "0") != "0"


COMMANDS = (serve,)
