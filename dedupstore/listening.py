"""Where a server listens besides unix sockets, and with what TLS: nbdkit's options for it.

Owns what of TCP and TLS may be combined: over TCP, nothing is served in the clear unless that was
asked for, and what asks for TLS or for known clients is never served otherwise. Encryption itself
is nbdkit's and GnuTLS's. Pure but for looking at files. Thread-safe.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dedupstore.errors import UsageError

PORT = 10809  # IANA's for NBD
_PORT_MAX = 65535

OFF, ON, REQUIRE = TLS_MODES = ("off", "on", "require")
# What nbdkit reads of a directory of certificates. It starts without, and then refuses everybody,
# or prints several lines.
_CERTIFICATE_FILES = ("ca-cert.pem", "server-cert.pem", "server-key.pem")


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host's name or address, IPv6 without brackets, and a port."""

    host: str
    port: int = PORT

    def arguments(self) -> list[str]:
        """nbdkit's options to listen here."""
        return ["--ipaddr", self.host, "--port", str(self.port)]


def parse_address(text: str) -> TcpAddress:
    """An `ADDRESS[:PORT]`, IPv6 in brackets. Raises UsageError."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        colon, port = rest[:1], rest[1:]
        is_sound = bool(bracket) and colon in ("", ":")
    else:
        host, colon, port = text.partition(":")
        is_sound = ":" not in port
    if not is_sound or not host or host.startswith("-"):
        raise UsageError(f"--tcp {text}: not ADDRESS[:PORT] (IPv6 in brackets, as in [::1]:{PORT})")
    if not colon:
        return TcpAddress(host)
    is_number = port.isascii() and port.isdigit() and len(port) <= len(str(_PORT_MAX))
    if not is_number or not 0 < int(port) <= _PORT_MAX:
        raise UsageError(f"--tcp {text}: the port is a number from 1 to {_PORT_MAX}")
    return TcpAddress(host, int(port))


@dataclass(frozen=True, slots=True)
class Tls:
    """How clients and server prove who they are. `mode`: one of TLS_MODES, None for what the rest
    asks for; `certificates`: a directory as in nbdkit-tls(1); `psk`: a file of pre-shared keys;
    `verify_peer`: clients need a certificate of the same authority."""

    mode: str | None = None
    certificates: Path | None = None
    psk: Path | None = None
    verify_peer: bool = False

    def arguments(self, over_tcp: bool) -> list[str]:
        """nbdkit's options. Raises UsageError for what would leave clients less protected than it
        says, or could not work."""
        given = self.certificates or self.psk or self.verify_peer
        mode = self.mode or (REQUIRE if over_tcp or given else None)
        if mode is None:
            return []
        if mode == OFF:
            if given:
                raise UsageError("--tls off: together with other --tls options, which ask for TLS")
            return ["--tls=off"]
        if self.verify_peer and (self.psk or mode != REQUIRE):
            raise UsageError("--tls-verify-peer: needs --tls-certificates and --tls require")
        return [f"--tls={mode}", *self._credentials(), *["--tls-verify-peer"] * self.verify_peer]

    def _credentials(self) -> list[str]:
        if self.certificates and self.psk:
            raise UsageError("--tls-certificates, --tls-psk: a server has one of them")
        if self.certificates:
            directory = self.certificates.absolute()
            for name in _CERTIFICATE_FILES:
                _require_readable("--tls-certificates", directory / name)
            return [f"--tls-certificates={directory}"]
        if self.psk:
            _require_readable("--tls-psk", self.psk)
            return [f"--tls-psk={self.psk.absolute()}"]
        raise UsageError(
            "TLS needs --tls-certificates DIR or --tls-psk FILE (--tls off serves without)"
        )


def _require_readable(option: str, path: Path) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise UsageError(f"{option}: {path}: {error.strerror}") from None
