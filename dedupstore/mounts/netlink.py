"""Generic netlink, as much as the kernel's nbd driver needs: connect, reconfigure, disconnect.

Owns the messages (linux/netlink.h, genetlink.h, nbd-netlink.h) and nothing about what they are for.
Requests are handled while they are sent, so a call returns when the kernel is done. Needs
CAP_SYS_ADMIN in the host's network namespace. Thread-safe: each request has a socket of its own.

Own code rather than pyroute2, which knows no nbd: of its 5 MB and 140 ms of import time only the
headers below would be of use.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence

_NETLINK_GENERIC = 16
_REQUEST, _ACK = 1, 4
_NLMSG_ERROR = 2
_MESSAGE = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_GENERIC = struct.Struct("=BBH")  # command, version, reserved
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_TYPE_MASK = 0x3FFF  # without the flags for nesting and byte order
_ANSWER_BYTES = 1 << 16

# The controller, which knows the number of every other family.
_CONTROLLER, _CONTROLLER_VERSION, _GET_FAMILY = 16, 1, 3
_FAMILY_ID, _FAMILY_NAME = 1, 2

_NBD, _NBD_VERSION = "nbd", 1
_CONNECT, _DISCONNECT, _RECONFIGURE = 1, 2, 3
_INDEX, _SIZE, _BLOCK_SIZE, _TIMEOUT, _SERVER_FLAGS = 1, 2, 3, 4, 5
_SOCKETS, _DEAD_TIMEOUT, _BACKEND = 7, 8, 10
_SOCKET_ITEM, _SOCKET_FD = 1, 1


def has_nbd() -> bool:
    """Whether the kernel's nbd driver can be talked to from here."""
    try:
        _family(_NBD)
    except OSError:
        return False
    return True


def connect(
    index: int,
    sockets: Sequence[socket.socket],
    *,
    size: int,
    block: int,
    flags: int,
    backend: str,
    timeout_seconds: int,
    dead_seconds: int,
) -> None:
    """Make /dev/nbd<index> a device of `size` bytes over connections to one export, which the
    kernel keeps: the caller closes its own.

    `flags` are the export's. A request without an answer goes to another connection after
    `timeout_seconds`; when all are dead, requests wait `dead_seconds` for new ones. `backend` is
    what /sys shows and `reconfigure` must repeat. Raises OSError: EBUSY if the device is in use.
    """
    attributes = (
        _u32(_INDEX, index),
        _u64(_SIZE, size),
        _u64(_BLOCK_SIZE, block),
        _u64(_TIMEOUT, timeout_seconds),
        _u64(_SERVER_FLAGS, flags),
        _u64(_DEAD_TIMEOUT, dead_seconds),
        _text(_BACKEND, backend),
        _sockets(sockets),
    )
    _nbd(_CONNECT, attributes)


def reconfigure(index: int, sockets: Sequence[socket.socket], *, backend: str) -> None:
    """Give a device new connections for those that are dead; what it does not need it leaves, so
    this may be done at any time. Raises OSError: EINVAL if it has another backend, or none."""
    _nbd(_RECONFIGURE, (_u32(_INDEX, index), _text(_BACKEND, backend), _sockets(sockets)))


def disconnect(index: int) -> None:
    """End a device; what waits for its server fails. Raises OSError."""
    _nbd(_DISCONNECT, (_u32(_INDEX, index),))


def _nbd(command: int, attributes: Sequence[bytes]) -> None:
    _ask(_family(_NBD), command, _NBD_VERSION, b"".join(attributes))


def _family(name: str) -> int:
    """A family's number. Raises OSError: ENOENT if the kernel has it not, or not here."""
    answer = _ask(_CONTROLLER, _GET_FAMILY, _CONTROLLER_VERSION, _text(_FAMILY_NAME, name))
    (number,) = struct.unpack_from("=H", dict(_attributes(answer))[_FAMILY_ID])
    return int(number)


def _ask(family: int, command: int, version: int, attributes: bytes) -> bytes:
    """Send a request; the attributes of its answer, if it has one. Raises the kernel's OSError."""
    body = _GENERIC.pack(command, version, 0) + attributes
    head = _MESSAGE.pack(_MESSAGE.size + len(body), family, _REQUEST | _ACK, 1, 0)
    answer = b""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC) as connection:
        connection.bind((0, 0))
        connection.sendall(head + body)
        while True:
            for kind, payload in _messages(connection.recv(_ANSWER_BYTES)):
                if kind != _NLMSG_ERROR:
                    answer = payload[_GENERIC.size :]
                    continue
                (number,) = struct.unpack_from("=i", payload)
                if number:
                    raise OSError(-number, os.strerror(-number))
                return answer


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        length, kind, *_ = _MESSAGE.unpack_from(data, at)
        yield kind, data[at + _MESSAGE.size : at + length]
        at += _padded(length)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += _padded(length)


def _attribute(kind: int, payload: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(_padded(length) - length)


def _u32(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _u64(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=Q", value))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, os.fsencode(value) + b"\0")


def _sockets(sockets: Sequence[socket.socket]) -> bytes:
    items = (_attribute(_SOCKET_ITEM, _u32(_SOCKET_FD, each.fileno())) for each in sockets)
    return _attribute(_SOCKETS, b"".join(items))


def _padded(length: int) -> int:
    return -(-length // 4) * 4
