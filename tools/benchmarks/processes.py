"""Running programs under measurement: servers, whole commands, and the memory they hold.

Not thread-safe. Everything raises subprocess.CalledProcessError when a program fails: a figure of a
failed run is no figure.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_ROOT = Path(__file__).resolve().parents[2]
DEDUPSTORE = _ROOT / ".venv/bin/dedupstore"
PLUGIN = _ROOT / "nbdplugin/dedup.py"
_START_SECONDS_MAX = 10.0


def run(*command: object, **environment: str) -> None:
    """Run a program silently, `environment` added to this process's."""
    subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def seconds(*command: object, **environment: str) -> float:
    """Wall-clock seconds of `run`."""
    begin = time.monotonic()
    run(*command, **environment)
    return time.monotonic() - begin


class Server:
    """A running server on the unix socket `socket`."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self.pid = process.pid
        self.socket = socket

    def uri(self, export: str = "") -> str:
        """NBD URI of an export."""
        return f"nbd+unix:///{export}?socket={self.socket}"

    def memory_bytes(self) -> int:
        """Anonymous memory. What it has mapped of files is page cache, which is counted there."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        lines = [line.split() for line in rollup.splitlines()]
        return sum(int(fields[1]) for fields in lines if fields[0] == "Anonymous:") << 10

    def threads(self) -> int:
        """How many threads it has."""
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))


@contextmanager
def serving(
    socket: Path, *command: object, log: IO[bytes] | int = subprocess.DEVNULL
) -> Iterator[Server]:
    """A server program that makes `socket` and runs in the foreground; killed at the end. What it
    says goes to `log`."""
    socket.unlink(missing_ok=True)  # nbdkit leaves it behind
    process = subprocess.Popen([str(word) for word in command], stderr=log)
    try:
        deadline = time.monotonic() + _START_SECONDS_MAX
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise subprocess.CalledProcessError(process.poll() or 1, str(command[0]))
            time.sleep(0.01)
        yield Server(process, socket)
    finally:
        process.terminate()
        process.wait()


def nbdkit(socket: Path, *arguments: object) -> list[object]:
    """The command of an nbdkit that listens on `socket`."""
    return ["nbdkit", "-f", "-U", socket, *arguments]


def metric(path: Path, name: str) -> int:
    """One counter from the plugin's metrics socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        client.shutdown(socket.SHUT_WR)
        text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    line = next(line for line in text.splitlines() if line.startswith(name + " "))
    return int(float(line.split()[1]))


def drop_caches() -> None:
    """Empty the kernel's page cache, directory and inode caches. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def warm_up(*files: Path) -> None:
    """Read files into the page cache."""
    run("cat", *files)


def page_cache_bytes(*files: Path) -> int:
    """Bytes of these files in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, files)]
    return sum(map(int, subprocess.check_output(command).split()))


def disk_bytes(path: Path) -> int:
    """Bytes that a tree takes on disk."""
    return sum(p.lstat().st_blocks * 512 for p in path.rglob("*") if p.is_file())
