"""Kills servers: nbdkit with the plugin, while clients read from it and check what they read.

A server writes nothing but LMDB's lock file (reader slots) and leases, which must not outlive it in
any way that matters: gc has to be able to reclaim what it had open, and its snapshots.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tools.crashes.program import CHECKOUT

_PLUGIN = CHECKOUT / "nbdplugin" / "dedup.py"
_CLIENTS = 2
_READ_BYTES = 64 << 10
_PATIENCE_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Served:
    """What clients of a server that was killed had read by then. `wrong` should be empty."""

    bytes: int
    images: int
    wrong: list[str]
    seconds: float


def serve(store: Path, images: Mapping[str, str], after: float, seed: str) -> Served:
    """Serve `images` (name -> SHA-256) and kill the server `after` seconds. For a process without
    threads, which has no other children."""
    with tempfile.TemporaryDirectory(prefix="ds-", dir="/tmp") as directory:
        socket = Path(directory) / "s"
        command = ["nbdkit", "-f", "-U", socket, "python", _PLUGIN, f"store={store}", "cache=8M"]
        log = Path(directory) / "log"
        begin = time.monotonic()
        with log.open("wb") as errors:
            server = subprocess.Popen(command, stdout=errors, stderr=errors, cwd=directory)
        clients = [_Client(socket, images, f"{seed}/{n}", server.pid) for n in range(_CLIENTS)]
        time.sleep(after)
        early = server.poll()
        server.kill()
        server.wait()
        reports = [client.finish() for client in clients]
        wrong = [line for report in reports for line in report.wrong]
        if early is not None:
            wrong.append(f"nbdkit ended with {early}: {log.read_text()}")
        return Served(
            sum(r.bytes for r in reports),
            sum(r.images for r in reports),
            wrong,
            time.monotonic() - begin,
        )


class _Client:
    """A process that reads images until its server is gone."""

    def __init__(self, socket: Path, images: Mapping[str, str], seed: str, server: int) -> None:
        read, write = os.pipe()
        self._read = read
        self._child = os.fork()
        if self._child == 0:
            try:
                os.close(read)
                report = _read_until_killed(socket, images, seed, server)
                os.write(write, json.dumps(asdict(report)).encode())
            finally:
                os._exit(0)
        os.close(write)

    def finish(self) -> Served:
        with open(self._read, encoding="utf-8") as answer:
            report = answer.read()
        os.waitpid(self._child, 0)
        return Served(**json.loads(report)) if report else Served(0, 0, ["a client died"], 0)


def _read_until_killed(socket: Path, images: Mapping[str, str], seed: str, server: int) -> Served:
    import nbd  # noqa: PLC0415 - only in the child

    signal.alarm(_PATIENCE_SECONDS)  # a client that hangs dies, which is reported
    source = random.Random(seed)
    total, whole, wrong = 0, 0, []
    while True:
        name = source.choice(sorted(images))
        handle = _connect(socket, name, server)
        if handle is None:
            break
        try:
            digest = hashlib.sha256()
            size = handle.get_size()
            for at in range(0, size, _READ_BYTES):
                part = handle.pread(min(_READ_BYTES, size - at), at)
                digest.update(part)
                total += len(part)
            whole += 1
            if digest.hexdigest() != images[name]:
                wrong.append(f"image {name!r} was served differently")
            handle.shutdown()
        except nbd.Error:
            if not handle.aio_is_dead() and not handle.aio_is_closed():
                wrong.append(f"image {name!r}: an error from a living server")
            break
    return Served(total, whole, wrong, 0)


def _connect(socket: Path, name: str, server: int) -> Any:
    """A connection, as soon as the server listens; None when it is gone."""
    import nbd  # noqa: PLC0415

    while True:
        handle = nbd.NBD()  # one that failed to connect is of no more use
        try:
            handle.connect_uri(f"nbd+unix:///{quote(name)}?socket={socket}")
            return handle
        except nbd.Error:
            try:
                os.kill(server, 0)  # its parent waits for it as soon as it is dead
            except ProcessLookupError:
                return None
            time.sleep(0.005)
