"""What an NBD server says of one of its exports, and connections to it for somebody else to use.

Owns the client side of NBD_OPT_INFO and NBD_OPT_GO and nothing more (NBD's doc/proto.md): reading
is for the kernel. The plugin describes an export as `dedupstore image NAME DIGEST`, so an answer
says in one round trip that a server answers, that it serves the image, and that it means the same
content. Thread-safe.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from io import BufferedRWPair
from pathlib import Path

_OPTION_MAGIC = b"IHAVEOPT"
_REPLY_MAGIC = 0x3E889045565A9
_FLAGS_FIXED_NEWSTYLE = 1
_OPT_ABORT, _OPT_INFO, _OPT_GO = 2, 6, 7
_REP_ACK, _REP_INFO = 1, 3
_INFO_EXPORT, _INFO_DESCRIPTION = 0, 2
_REPLY_BYTES_MAX = 64 << 10
_REPLIES_MAX = 64  # nbdkit sends three; whatever sent them without end would keep us for ever
_EXPORT = struct.Struct(">QH")


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection on which an export's bytes can be asked for next; the holder closes it.

    `size` in bytes; `flags` are the export's transmission flags.
    """

    socket: socket.socket
    size: int
    flags: int


def export_digest(path: Path, export: str, timeout_seconds: float) -> str | None:
    """The hexadecimal digest of the image that the server at the unix socket `path` serves as
    `export`; None if it serves no such image.

    Raises OSError: nobody listens (ConnectionRefusedError, FileNotFoundError), no answer in time
    (TimeoutError), or what listens is no NBD server.
    """
    with _connected(path, timeout_seconds) as connection, connection.makefile("rwb") as stream:
        found = _ask(stream, _OPT_INFO, export)
        _send(stream, _OPT_ABORT, b"")
    words = (found or {}).get(_INFO_DESCRIPTION, b"").decode(errors="replace").split()
    return words[-1] if words[:2] == ["dedupstore", "image"] else None


def open_export(path: Path, export: str, timeout_seconds: float) -> Connection:
    """Connect to an export. Raises OSError as `export_digest`, and if it is not served."""
    connection = _connected(path, timeout_seconds)
    try:
        # Nothing follows the server's answer before it is asked something: nothing is read ahead.
        with connection.makefile("rwb") as stream:
            found = _ask(stream, _OPT_GO, export)
        about = (found or {}).get(_INFO_EXPORT, b"")
        if len(about) < _EXPORT.size:
            raise OSError(f"export {export!r} is not served")
        size, flags = _EXPORT.unpack_from(about)
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return Connection(connection, size, flags)


def _connected(path: Path, timeout_seconds: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout_seconds)
        connection.connect(os.fspath(path))
    except BaseException:
        connection.close()
        raise
    return connection


def _ask(stream: BufferedRWPair, option: int, export: str) -> dict[int, bytes] | None:
    """Ask about an export: what the server says of it, by kind; None if it refuses it."""
    greeting, magic, _flags = struct.unpack(">8s8sH", _read(stream, 18))
    if greeting != b"NBDMAGIC" or magic != _OPTION_MAGIC:
        raise OSError("not an NBD server")
    stream.write(struct.pack(">I", _FLAGS_FIXED_NEWSTYLE))
    name, wanted = export.encode(), struct.pack(">HH", 1, _INFO_DESCRIPTION)
    _send(stream, option, struct.pack(">I", len(name)) + name + wanted)
    found: dict[int, bytes] = {}
    for _ in range(_REPLIES_MAX):
        magic_number, _, kind, length = struct.unpack(">QIII", _read(stream, 20))
        if magic_number != _REPLY_MAGIC or length > _REPLY_BYTES_MAX:
            raise OSError("not an NBD server")
        payload = _read(stream, length)
        if kind != _REP_INFO:
            return found if kind == _REP_ACK else None
        if len(payload) >= 2:
            found[int.from_bytes(payload[:2], "big")] = payload[2:]
    raise OSError("not an NBD server")


def _send(stream: BufferedRWPair, option: int, payload: bytes) -> None:
    stream.write(_OPTION_MAGIC + struct.pack(">II", option, len(payload)) + payload)
    stream.flush()


def _read(stream: BufferedRWPair, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise ConnectionResetError("the server hung up")
    return data
