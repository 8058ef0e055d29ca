"""What an NBD server says of one of its exports, asked without opening a device.

Owns the client side of NBD_OPT_INFO and nothing more (NBD's doc/proto.md). The plugin describes an
export as `dedupstore image NAME DIGEST`, so the answer says in one round trip that a server
answers, that it serves the image, and that it means the same content. Thread-safe.
"""

from __future__ import annotations

import os
import socket
import struct
from io import BufferedRWPair
from pathlib import Path

_OPTION_MAGIC = b"IHAVEOPT"
_REPLY_MAGIC = 0x3E889045565A9
_FLAGS_FIXED_NEWSTYLE = 1
_OPT_ABORT, _OPT_INFO = 2, 6
_REP_ACK, _REP_INFO = 1, 3
_INFO_DESCRIPTION = 2
_REPLY_BYTES_MAX = 64 << 10
_REPLIES_MAX = 64  # nbdkit sends three; whatever sent them without end would keep us for ever


def export_digest(path: Path, export: str, timeout_seconds: float) -> str | None:
    """The hexadecimal digest of the image that the server at the unix socket `path` serves as
    `export`; None if it serves no such image.

    Raises OSError: nobody listens (ConnectionRefusedError, FileNotFoundError), no answer in time
    (TimeoutError), or what listens is no NBD server.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_seconds)
        connection.connect(os.fspath(path))
        with connection.makefile("rwb") as stream:
            words = _description(stream, export.encode()).split()
    return words[-1] if words[:2] == ["dedupstore", "image"] else None


def _description(stream: BufferedRWPair, export: bytes) -> str:
    """Ask for the export's description; empty when the server refuses the export."""
    greeting, magic, _flags = struct.unpack(">8s8sH", _read(stream, 18))
    if greeting != b"NBDMAGIC" or magic != _OPTION_MAGIC:
        raise OSError("not an NBD server")
    stream.write(struct.pack(">I", _FLAGS_FIXED_NEWSTYLE))
    wanted = struct.pack(">HH", 1, _INFO_DESCRIPTION)
    _send(stream, _OPT_INFO, struct.pack(">I", len(export)) + export + wanted)
    description = b""
    for _ in range(_REPLIES_MAX):
        magic_number, _, kind, length = struct.unpack(">QIII", _read(stream, 20))
        if magic_number != _REPLY_MAGIC or length > _REPLY_BYTES_MAX:
            raise OSError("not an NBD server")
        payload = _read(stream, length)
        if kind == _REP_INFO:
            if payload[:2] == struct.pack(">H", _INFO_DESCRIPTION):
                description = payload[2:]
            continue
        _send(stream, _OPT_ABORT, b"")
        return description.decode(errors="replace") if kind == _REP_ACK else ""
    raise OSError("not an NBD server")


def _send(stream: BufferedRWPair, option: int, payload: bytes) -> None:
    stream.write(_OPTION_MAGIC + struct.pack(">II", option, len(payload)) + payload)
    stream.flush()


def _read(stream: BufferedRWPair, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise ConnectionResetError("the server hung up")
    return data
