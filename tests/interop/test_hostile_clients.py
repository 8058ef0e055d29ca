"""What clients may send: any bytes for a name, any option, any request. The server serves what it
is told to, and goes on."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from tests.interop.rig import Server, Servers, StoreDirectory

OPTION, REPLY = b"IHAVEOPT", 0x3E889045565A9
EXPORT_NAME, ABORT, LIST, GO = 1, 2, 3, 7
ACK, REFUSED = 1, 1 << 31
READ, WRITE, DISCONNECT, TRIM, CACHE = 0, 1, 2, 4, 5
REQUEST_MAGIC, RESPONSE_MAGIC = 0x25609513, 0x67446698
NAME_BYTES_MAX = 4096
BLOCK = 4096


class Connection:
    """A client that sends what it likes."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(server.socket))
        assert self.receive(18)[:8] == b"NBDMAGIC"
        self.socket.sendall(struct.pack(">I", 3))

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise ConnectionResetError
            data += part
        return data

    def option(self, number: int, payload: bytes) -> int:
        """Send an option; return the last reply's kind."""
        self.socket.sendall(OPTION + struct.pack(">II", number, len(payload)) + payload)
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self.receive(20))
            assert magic == REPLY
            self.receive(length)
            if kind == ACK or kind & REFUSED:
                return int(kind)

    def go(self, name: bytes) -> bool:
        """Open an export; False when it is refused."""
        return self.option(GO, struct.pack(">I", len(name)) + name + b"\0\0") == ACK

    def request(
        self, kind: int, offset: int, length: int, payload: bytes = b""
    ) -> tuple[int, bytes]:
        """Send a request; return errno and the data read."""
        head = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, kind, 7, offset, length)
        self.socket.sendall(head + payload)
        magic, code, _ = struct.unpack(">IIQ", self.receive(16))
        assert magic == RESPONSE_MAGIC
        return code, self.receive(length) if kind == READ and not code else b""


@contextmanager
def connected(server: Server) -> Iterator[Connection]:
    connection = Connection(server)
    try:
        yield connection
    finally:
        connection.socket.close()


HOSTILE_NAMES = (
    b"derived",  # is there, but not served
    b"base/../derived",
    b"./base",
    b"/base",
    b"//base",
    b"../store/base",
    b"/etc/passwd",
    b"*",
    b"b*",
    b"[b]ase",
    b"base\n",
    b"base ",
    b"BASE",
    b"base\\",
    b"\xff\xfe",
    b"b\xc3",
    b"\xed\xa0\x80",  # half of a surrogate pair
    b"\x1b[2J",
    b"/" + b"0" * 64,
    b"/" + b"g" * 64,
    b"a" * 256,
    b"a" * NAME_BYTES_MAX,
    b"/" * NAME_BYTES_MAX,
    "ü".encode() * 2048,
)


def test_names_that_are_no_served_image_s_are_refused_and_the_server_goes_on(
    server: Servers, store_dir: StoreDirectory
) -> None:
    running = server("image=base", "image=cl*")
    running.expect_log("no image named|not UTF-8|export name|python.*error|negotiat")
    derived = store_dir.digest("derived").encode()
    rng = random.Random(3)
    noise = [rng.randbytes(rng.randrange(1, 300)) for _ in range(40)]
    for name in (*HOSTILE_NAMES, b"/" + derived, *noise):
        with connected(running) as client:
            assert not client.go(name), name
            assert client.go(b"base"), "the same connection may ask again"
    assert max(map(len, running.log())) < 1000, "a client chooses how long lines of the log are"
    assert running.read("clone") == running.read("base") == running.read()


def test_name_longer_than_the_protocol_permits_ends_the_connection_alone(server: Servers) -> None:
    running = server()
    running.expect_log(".")
    for length in (NAME_BYTES_MAX + 1, 1 << 20, (1 << 32) - 10):
        with connected(running) as client:
            name = struct.pack(">I", length) + b"n" * 10_000
            client.socket.sendall(OPTION + struct.pack(">II", GO, length + 6) + name)
    assert running.read("base")


def test_requests_that_no_client_should_send_are_answered_with_errors(server: Servers) -> None:
    running = server()
    running.expect_log(".")
    for kind, offset, length in (
        (READ, 1 << 62, BLOCK),
        (READ, (1 << 64) - 1, BLOCK),
        (READ, 0, 0xFFFFFFFF),
        (READ, 0, 0),
        (TRIM, 0, BLOCK),
        (CACHE, 1 << 62, BLOCK),
        (99, 0, BLOCK),
    ):
        with connected(running) as client:
            assert client.go(b"base")
            try:
                code, data = client.request(kind, offset, length)
            except OSError:
                continue  # nbdkit hangs up on what it cannot follow
            assert code or not length, (kind, offset, length)
            assert not data
    with connected(running) as client:
        assert client.go(b"base")
        code, _ = client.request(WRITE, 0, BLOCK, bytes(BLOCK))
        assert code, "exports are read-only"
    assert running.read("base")
