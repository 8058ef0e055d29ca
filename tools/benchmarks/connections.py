"""How a server's memory grows with connections, and that it comes back when they end.

Clients are bare sockets: a thousand of them fit into this process. What counts is memory that only
the server has and no file backs, so not the store's pages that it maps. nbdkit takes some for each
connection and thread whatever the plugin; beside ours runs its null plugin, which has nothing, with
one thread for each connection like ours. Servers inherit this process's limit of open files, and
need one for each connection.
"""

from __future__ import annotations

import random
import resource
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from dedupstore.store import Store
from tools.benchmarks import synthetic
from tools.benchmarks.processes import PLUGIN, Server, nbdkit, serving
from tools.benchmarks.report import Bench, Curve

_CLONES = 1_000
_STEPS = 4
_KIB = 1 << 10
_CLONE_KIB_MAX = 64
_WARM_UP_CONNECTIONS = 50
_CONNECTIONS = 1_000
_LEFT_MIB_MAX = 2
_READ_BYTES = 64 << 10
_SETTLE_SECONDS_MAX = 10.0

_OPTION_MAGIC = b"IHAVEOPT"
_REQUEST_MAGIC = 0x25609513
_FLAGS_FIXED_NEWSTYLE_NO_ZEROES = 3
_OPT_GO = 7
_REP_ACK, _REP_INFO = 1, 3
_CMD_READ, _CMD_DISC = 0, 2


class Client:
    """A connection to one export of a server on a unix socket. Raises OSError when it fails."""

    def __init__(self, path: Path, export: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._receive(18)
        name = export.encode()
        go = struct.pack(">I", len(name)) + name + bytes(2)
        option = _OPTION_MAGIC + struct.pack(">II", _OPT_GO, len(go)) + go
        self._socket.sendall(struct.pack(">I", _FLAGS_FIXED_NEWSTYLE_NO_ZEROES) + option)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._receive(20))
            payload = self._receive(length)
            if kind == _REP_ACK:
                return
            if kind != _REP_INFO:
                raise OSError(f"{export}: {payload!r}")

    def read(self, offsets: Iterable[int], length: int) -> None:
        """Read `length` bytes at every offset, all requests in flight at once."""
        header = struct.Struct(">IHHQQI")
        requests = [
            header.pack(_REQUEST_MAGIC, 0, _CMD_READ, i, at, length) for i, at in enumerate(offsets)
        ]
        self._socket.sendall(b"".join(requests))
        for _ in requests:
            _, error, _ = struct.unpack(">IIQ", self._receive(16))
            if error:
                raise OSError(error, "read failed")
            self._receive(length)

    def close(self) -> None:
        """Say goodbye, and wait until the server has hung up."""
        self._socket.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _CMD_DISC, 0, 0, 0))
        self._socket.recv(1)
        self._socket.close()

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise ConnectionResetError("the server hung up")
            data += part
        return bytes(data)


def connections(bench: Bench) -> None:
    """A thousand clones open at once, then a thousand connections one after the other."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    path = bench.work / "clones"
    with Store.create(path) as store:
        synthetic.add_large_image(store, "image", 1 << 30, distinct=2_000, seed=1)
        synthetic.add_clones(store, "image", _CLONES)
        names = store.names("clone-")
    listen = bench.work / "socket"
    ours = nbdkit(listen, "python", PLUGIN, f"store={path}", "cache=64M")
    null = nbdkit(listen, "-t", 1, "null", "1G")
    _together(bench, names, {"ours": ours, "null": null})
    _in_turn(bench, names, ours)


def _together(bench: Bench, names: list[str], commands: dict[str, list[object]]) -> None:
    """Memory of each server with more and more connections, each of which has read something."""
    grown: dict[str, float] = {}
    for name, command in commands.items():
        held = [0]
        with serving(bench.work / "socket", *command) as server, ExitStack() as opened:
            for export in names[
                :_WARM_UP_CONNECTIONS
            ]:  # what first connections bring, readahead too
                _open(server, export).close()
            before, _ = _settled(server)
            step = len(names) // _STEPS
            for first in range(0, len(names), step):
                for export in names[first : first + step]:
                    opened.callback(_open(server, export).close)
                held.append(_settled(server)[0] - before)
        grown[name] = held[-1] / len(names) / _KIB
        x = tuple(step * float(i) for i in range(_STEPS + 1))
        label = "dedupstore" if name == "ours" else "nbdkit null"
        y = tuple(value / 1e6 for value in held)
        bench.report.curve(Curve("server memory", label, "connections", "MB", x, y))
    row = "server memory of each of 1,000 clones open at once"
    bench.report.bound(row, "KiB", [grown["ours"]], _CLONE_KIB_MAX)
    bench.report.note(f"{row}: nbdkit's null plugin", "KiB", [grown["null"]])
    share = [grown["ours"] - grown["null"]]
    bench.report.note(f"{row}: beyond it", "KiB", share)


def _open(server: Server, export: str) -> Client:
    """A connection that has read something."""
    client = Client(server.socket, export)
    client.read(range(0, 16 * _READ_BYTES, _READ_BYTES), 4 * _KIB)
    return client


def _in_turn(bench: Bench, names: list[str], command: list[object]) -> None:
    """Memory before and after a thousand connections."""
    with serving(bench.work / "socket", *command) as server:
        _visit(server, names[:_WARM_UP_CONNECTIONS])
        before = _settled(server)
        _visit(server, (names[i % len(names)] for i in range(_CONNECTIONS)))
        after = _settled(server)
    what = f"memory after {_CONNECTIONS:,} connections in turn"
    left = (after[0] - before[0]) / (1 << 20)
    bench.report.bound(f"{what}: change", "MiB", [abs(left)], _LEFT_MIB_MAX)
    bench.report.note(f"{what}: signed", "MiB", [left])
    bench.report.note(f"{what}: server threads left over", "", [after[1] - before[1]])


def _visit(server: Server, exports: Iterable[str]) -> None:
    """Connect, read with sixteen requests in flight, and disconnect, for each export."""
    for number, export in enumerate(exports):
        client = Client(server.socket, export)
        places = random.Random(number)
        client.read((places.randrange(256) * _READ_BYTES for _ in range(16)), _READ_BYTES)
        client.close()


def _settled(server: Server) -> tuple[int, int]:
    """Memory in bytes and threads, once ended connections' threads and readahead are done."""
    deadline = time.monotonic() + _SETTLE_SECONDS_MAX
    previous, state = (-1, -1), (server.memory_bytes(), server.threads())
    while state != previous and time.monotonic() < deadline:
        time.sleep(0.2)
        previous, state = state, (server.memory_bytes(), server.threads())
    return state
