"""Kills and restarts a server again and again under clients that read and verify every byte.

    tools/restarts [--rounds N] [--seed N] [--json FILE]

A round waits until every client has read on, ends the server at a random instant (by kill -9 and,
every second time, by SIGTERM, as for an upgrade) and starts `dedupstore serve` again on the same
socket. The clients are what reconnects out there:

libnbd   an application that connects again itself, and asks again
retry    one that knows nothing of it, behind `nbdkit --filter=retry nbd`
qemu     one that knows nothing of it, behind qemu's nbd driver with reconnect-delay

Reads are of random places and lengths, compared with the image. An error is what the application
sees; connections that libnbd's client makes again are none. Exit status 1 if there were errors or
wrong bytes. What a mount sees is in tests/vm/test_restart.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbd

DEDUPSTORE = Path(sys.executable).with_name("dedupstore")
IMAGE_BYTES = 64 << 20
READ_BYTES_MAX = 256 << 10
READS_A_ROUND = 40
PATIENCE_SECONDS = 60.0
DELAY_SECONDS_MAX = 0.3
RETRY_PARAMETERS = ("retries=60", "retry-delay=1", "retry-exponential=no")


@dataclass
class Figures:
    """What one client has seen. `longest_seconds` is the longest that a read took."""

    reads: int = 0
    bytes: int = 0
    errors: int = 0
    wrong: int = 0
    reconnects: int = 0
    longest_seconds: float = 0.0


class Client:
    """Reads on a thread of its own, from construction to `stop`."""

    def __init__(self, uri: str, image: bytes, seed: int, *, reconnects: bool) -> None:
        self.figures = Figures()
        self._uri, self._image, self._reconnects = uri, image, reconnects
        self._random = random.Random(seed)
        self._stopping = threading.Event()
        self._handle = self._connect()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _connect(self) -> Any:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            handle = nbd.NBD()
            try:
                handle.connect_uri(self._uri)
            except nbd.Error:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return handle

    def _run(self) -> None:
        figures = self.figures
        while not self._stopping.is_set():
            offset = self._random.randrange(len(self._image))
            length = min(self._random.randrange(1, READ_BYTES_MAX), len(self._image) - offset)
            began = time.monotonic()
            try:
                found = self._read(offset, length)
            except nbd.Error as error:
                print(f"{self._uri}: {error}", file=sys.stderr)
                figures.errors += 1
                self._handle = self._connect()
                continue
            figures.longest_seconds = max(figures.longest_seconds, time.monotonic() - began)
            figures.wrong += found != self._image[offset : offset + length]
            figures.bytes += length
            figures.reads += 1

    def _read(self, offset: int, length: int) -> bytes:
        while True:
            try:
                return bytes(self._handle.pread(length, offset))
            except nbd.Error:
                if not self._reconnects:
                    raise
                self._handle = self._connect()
                self.figures.reconnects += 1


class Server:
    """`dedupstore serve` on one socket."""

    def __init__(self, store: Path, socket_path: Path) -> None:
        self.socket = socket_path
        self._command = [DEDUPSTORE, "--store", store, "serve", "--socket", socket_path]
        self.start()

    def start(self) -> None:
        # nbdkit says on standard error which clients went away.
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        wait_until(lambda: listens(self.socket))

    def end(self, how: signal.Signals) -> None:
        # nbdkit itself; the parent, which the command runs under, then ends likewise.
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(children[0]), how)
        self._process.wait()
        wait_until(lambda: not listens(self.socket))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("waited in vain")
        time.sleep(0.005)


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def proxy(command: list[str | Path], path: Path) -> Iterator[str]:
    """A program that serves what it reads from the server. Yields its URI."""
    process = subprocess.Popen(command)
    try:
        wait_until(lambda: listens(path))
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.kill()
        process.wait()


def make_image(path: Path, seed: int) -> bytes:
    """An image that compresses by half, with holes."""
    rng = random.Random(seed)
    parts = (rng.randbytes(1 << 19) + bytes(1 << 19) for _ in range(IMAGE_BYTES >> 20))
    image = b"".join(parts)
    path.write_bytes(image)
    return image


def run(rounds: int, seed: int) -> dict[str, Any]:
    """Restart a server `rounds` times; the figures. Raises TimeoutError when a client stands
    still."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        # Short, for its sockets.
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp")))
        image = make_image(base / "image", seed)
        for arguments in (["init"], ["import", base / "image", "base"]):
            command = [DEDUPSTORE, "--store", base / "store", *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        server = Server(base / "store", base / "s")
        stack.callback(server.end, signal.SIGTERM)
        retry, qemu = base / "retry", base / "qemu"
        retry_uri = stack.enter_context(
            proxy(
                [
                    *("nbdkit", "--foreground", "--unix", retry, "--filter=retry"),
                    *("nbd", f"socket={server.socket}", "export=base", *RETRY_PARAMETERS),
                ],
                retry,
            )
        )
        opened = f"driver=nbd,server.type=unix,server.path={server.socket},export=base"
        qemu_uri = stack.enter_context(
            proxy(
                [
                    *("qemu-nbd", "--read-only", "--persistent", "--shared=0", "--socket", qemu),
                    *("--image-opts", f"{opened},reconnect-delay={PATIENCE_SECONDS:.0f}"),
                ],
                qemu,
            )
        )
        direct_uri = f"nbd+unix:///base?socket={server.socket}"
        clients: dict[str, Client] = {}
        for name, uri in (("libnbd", direct_uri), ("retry", retry_uri), ("qemu", qemu_uri)):
            clients[name] = Client(uri, image, rng.randrange(1 << 32), reconnects=name == "libnbd")
            stack.callback(clients[name].stop)
        killed = 0
        for number in range(rounds):
            read_on(clients)
            time.sleep(rng.uniform(0, DELAY_SECONDS_MAX))
            how = signal.SIGTERM if number % 2 else signal.SIGKILL
            killed += how == signal.SIGKILL
            server.end(how)
            time.sleep(rng.uniform(0, DELAY_SECONDS_MAX))
            server.start()
        read_on(clients)
    figures = {name: asdict(client.figures) for name, client in clients.items()}
    return {"killed": killed, "stopped": rounds - killed, "clients": figures}


def read_on(clients: dict[str, Client]) -> None:
    """Wait until every client has read some more."""
    goals = {name: client.figures.reads + READS_A_ROUND for name, client in clients.items()}
    wait_until(lambda: all(clients[name].figures.reads >= goal for name, goal in goals.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    found = run(options.rounds, options.seed)
    print(f"killed {found['killed']}, stopped {found['stopped']} times")
    for name, figures in found["clients"].items():
        print(f"{name}: {figures}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    bad = sum(each["errors"] + each["wrong"] for each in found["clients"].values())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
