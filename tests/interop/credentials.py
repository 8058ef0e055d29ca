"""Certificates and keys for TLS tests, made with GnuTLS's own tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.interop.rig import run
from tests.programs import require_program

# Elliptic curves: RSA keys take seconds to make.
_KEY = ("certtool", "--generate-privkey", "--key-type=ecdsa", "--curve=secp256r1", "--outfile")
_DAYS = "expiration_days = 10\n"
SERVER_NAMES = 'dns_name = "localhost"\nip_address = "127.0.0.1"\nip_address = "::1"\n'


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority, which signs what it is asked to."""

    directory: Path

    @classmethod
    def create(cls, directory: Path) -> Authority:
        """Make its key and its own certificate."""
        require_program("certtool")
        directory.mkdir()
        authority = cls(directory)
        template = directory / "ca.info"
        template.write_text(f'cn = "{directory.name}"\nca\ncert_signing_key\n{_DAYS}')
        run(*_KEY, directory / "ca-key.pem")
        run(
            "certtool",
            "--generate-self-signed",
            "--load-privkey",
            directory / "ca-key.pem",
            "--template",
            template,
            "--outfile",
            authority.certificate,
        )
        return authority

    @property
    def certificate(self) -> Path:
        return self.directory / "ca-cert.pem"

    def server(self, names: str = SERVER_NAMES) -> Path:
        """A directory for a server that clients know by `names`."""
        return self._sign("server", f'cn = "server"\n{names}tls_www_server\n')

    def client(self) -> Path:
        """A directory for a client, with a certificate of its own."""
        return self._sign("client", 'cn = "client"\ntls_www_client\n')

    def anonymous(self) -> Path:
        """A directory for a client that only knows this authority."""
        return self._directory("anonymous")

    def _directory(self, name: str) -> Path:
        directory = self.directory / name
        directory.mkdir()
        (directory / "ca-cert.pem").write_bytes(self.certificate.read_bytes())
        return directory

    def _sign(self, role: str, template: str) -> Path:
        directory = self._directory(role)
        info, key = directory / "info", directory / f"{role}-key.pem"
        info.write_text(f"{template}signing_key\nencryption_key\n{_DAYS}")
        run(*_KEY, key)
        run(
            "certtool",
            "--generate-certificate",
            "--load-ca-certificate",
            self.certificate,
            "--load-ca-privkey",
            self.directory / "ca-key.pem",
            "--load-privkey",
            key,
            "--template",
            info,
            "--outfile",
            directory / f"{role}-cert.pem",
        )
        return directory


def shared_key(path: Path, user: str) -> Path:
    """A file with a new key for `user`."""
    require_program("psktool")
    run("psktool", "--username", user, "--pskfile", path)
    return path
