"""What integration tests drive: the real nbdkit with the plugin, the command line, libnbd clients.

Owns starting, watching and ending processes; asserts nothing about the product except that a server
logs only what a test announced and ends with status 0.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dedupstore.check import check_store
from dedupstore.export import export_image
from dedupstore.store import Store
from tests.programs import require_program

CHECKOUT = Path(__file__).parents[2]
PLUGIN = CHECKOUT / "nbdplugin" / "dedup.py"
DEDUPSTORE = Path(sys.executable).with_name("dedupstore")
# libnbd's binding belongs to the distribution's interpreter, not to the virtual environment.
SYSTEM_PYTHON = "/usr/bin/python3"
PATIENCE_SECONDS = 60  # only a hang takes that long

CLIENT = """\
import hashlib, sys, threading
import nbd

uri, *arguments = sys.argv[1:]


def connect(uri=uri):
    h = nbd.NBD()
    h.connect_uri(uri)
    return h


def read_all(h, step=1 << 16):
    size = h.get_size()
    return b"".join(h.pread(min(step, size - at), at) for at in range(0, size, step))

"""


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll, in steps too short to matter, until `condition` holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def no_progress(_done: int, _all: int) -> None:
    """For the library's progress parameters."""


@dataclass(slots=True)
class StoreDirectory:
    """A store on disk, driven through the command line as users do."""

    path: Path

    def cli(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run `dedupstore --store PATH ...`, whatever comes of it."""
        return subprocess.run(
            [DEDUPSTORE, "--store", self.path, *arguments],
            capture_output=True,
            check=False,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    def do(self, *arguments: str | Path) -> str:
        """Run a command that must succeed silently; return what it printed."""
        result = self.cli(*arguments)
        assert (result.returncode, result.stderr) == (0, ""), result
        return result.stdout

    def refuse(self, *arguments: str | Path, status: int = 1) -> str:
        """Run a command that must fail with one line; return that line."""
        result = self.cli(*arguments)
        return refusal(result.returncode, result.stderr, status)

    def create(self) -> None:
        Store.create(self.path).close()

    def import_file(self, source: Path, name: str) -> None:
        with Store(self.path) as store:
            store.import_path(source, name, no_progress)

    def clone(self, source: str, target: str) -> None:
        with Store(self.path) as store:
            store.clone(source, target)

    def remove(self, *names: str) -> None:
        with Store(self.path) as store:
            store.remove(list(names))

    def gc(self) -> None:
        with Store(self.path) as store:
            store.collect_garbage()

    def names(self) -> list[str]:
        with Store(self.path) as store:
            return store.names()

    def digest(self, name: str) -> str:
        with Store(self.path) as store:
            return store.image(name).digest

    def export(self, name: str) -> bytes:
        """An image's bytes, by way of a file beside the store."""
        target = self.path.with_name("exported")
        with Store(self.path) as store:
            export_image(store, name, target, no_progress)
        data = target.read_bytes()
        target.unlink()
        return data

    def totals(self) -> tuple[int, int, int, int]:
        """Chunks, frames, unique and stored bytes."""
        with Store(self.path) as store:
            stats = store.stats()
        return stats.chunks, stats.frames, stats.unique_bytes, stats.stored_bytes

    def frames_of(self, name: str) -> set[int]:
        """The frames that an image's chunks lie in."""
        with Store(self.path) as store:
            manifest = store.open_manifest(name)
            frames = {ref >> 16 for ref in manifest.refs if ref}
            store.close_manifest(manifest)
        return frames

    def check(self) -> None:
        """The store is intact."""
        assert check_store(self.path).findings == ()


def refusal(status: int, stderr: str, wanted: int = 1) -> str:
    """The one line with which a program failed as it should."""
    assert "Traceback" not in stderr
    assert status == wanted, stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    return lines[0]


@dataclass(slots=True)
class Server:
    """A running nbdkit with the plugin, in the foreground, with a log of its own."""

    process: subprocess.Popen[bytes]
    directory: Path
    expected: list[str] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.directory / "nbd"

    def uri(self, name: str = "") -> str:
        return f"nbd+unix:///{name}?socket={self.socket}"

    def expect_log(self, *patterns: str) -> None:
        """Announce log lines: each pattern must match at least one, and no other may appear."""
        self.expected += patterns

    def log(self) -> list[str]:
        return (self.directory / "log").read_text().splitlines()

    def metrics(self) -> dict[str, int]:
        return read_metrics(self.directory / "metrics")

    def client(self, script: str, name: str = "", *arguments: str) -> str:
        """Run a libnbd script (see CLIENT for what it finds) and return what it printed."""
        result = subprocess.run(
            client_command(self.uri(name), script, *arguments),
            capture_output=True,
            check=False,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def start_client(self, script: str, name: str = "", *arguments: str) -> subprocess.Popen[str]:
        """Run a libnbd script beside the test, which talks to it over standard input and output."""
        return subprocess.Popen(
            client_command(self.uri(name), script, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self, name: str = "") -> bytes:
        """A whole image as a client of its own sees it."""
        target = self.directory / f"copy-{threading.get_ident()}"
        run("nbdcopy", self.uri(name), str(target))
        data = target.read_bytes()
        target.unlink()
        return data

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        """End the server and hold its log and its exit status against what was announced."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE_SECONDS)
        lines = self.log()
        unexpected = [x for x in lines if not any(re.search(p, x) for p in self.expected)]
        assert unexpected == []
        missing = [p for p in self.expected if not any(re.search(p, x) for x in lines)]
        assert missing == []
        assert status == 0


def client_command(uri: str, script: str, *arguments: str) -> list[str]:
    return [SYSTEM_PYTHON, "-c", CLIENT + script, uri, *arguments]


def takes_connections(path: Path) -> bool:
    """Whether a server listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


def scrape(path: Path, request: bytes) -> str:
    """What the metrics socket answers to `request`."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(str(path))
        connection.sendall(request)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    return answer.decode()


def read_metrics(path: Path) -> dict[str, int]:
    """Names and values of a scrape."""
    head, _, body = scrape(path, b"GET /metrics HTTP/1.0\r\n\r\n").partition("\r\n\r\n")
    assert " 200 " in head.splitlines()[0]
    samples = (line.split() for line in body.splitlines() if not line.startswith("#"))
    return {name: int(float(value)) for name, value in samples}


def run(*command: str | Path) -> str:
    """Run a program that must succeed; return what it printed."""
    result = subprocess.run(
        command, capture_output=True, check=False, text=True, timeout=PATIENCE_SECONDS
    )
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return result.stdout


@contextmanager
def in_foreground(*command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs until the block ends, and is then told to end."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)


class Servers:
    """Starts servers and ends them all. Sockets lie in a short path of their own: a unix socket's
    address holds 107 bytes."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._servers: list[Server] = []

    def __call__(
        self,
        *parameters: str,
        store: Path | None = None,
        metrics: bool = False,
        options: Sequence[str] = (),
        command: Sequence[str] = (),
    ) -> Server:
        """Start nbdkit with `parameters`, and return once it takes connections. `options` are
        nbdkit's own, `command` replaces `nbdkit`."""
        require_nbdkit()
        directory = Path(tempfile.mkdtemp(prefix="ds-", dir="/tmp"))
        arguments = [
            *(command or ("nbdkit",)),
            "--foreground",
            f"--unix={directory / 'nbd'}",
            f"--pidfile={directory / 'pid'}",
            *options,
            "python",
            str(PLUGIN),
            f"store={store or self._store}",
            *parameters,
            *([f"metrics={directory / 'metrics'}"] if metrics else []),
        ]
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=directory
            )
        server = Server(process, directory)
        self._servers.append(server)
        wait_until(lambda: (directory / "pid").exists() or process.poll() is not None)
        if metrics:  # nbdkit writes its pid before the plugin starts; clients may only wait
            wait_until(
                lambda: takes_connections(directory / "metrics") or process.poll() is not None
            )
        assert process.poll() is None, server.log()
        return server

    def close(self) -> None:
        try:
            for server in self._servers:
                server.stop()
        finally:
            for server in self._servers:
                server.process.kill()
                server.process.wait()
                shutil.rmtree(server.directory, ignore_errors=True)


def require_nbdkit() -> None:
    """nbdkit with its Python plugin, and libnbd's clients and binding."""
    require_program("nbdkit", "nbdcopy", SYSTEM_PYTHON)
    if not _probed:
        _probed.append(
            [
                package
                for package, probe in (
                    ("nbdkit-plugin-python", ["nbdkit", "--dump-plugin", "python"]),
                    ("python3-libnbd", [SYSTEM_PYTHON, "-c", "import nbd"]),
                )
                if subprocess.run(probe, capture_output=True, check=False).returncode
            ]
        )
    require_program(*_probed[0])


_probed: list[list[str]] = []


def mounts_below(directory: Path) -> list[Path]:
    """Mount points in or at `directory`, the innermost first."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        point = Path(line.split()[1].encode().decode("unicode_escape"))
        if point == directory or directory in point.parents:
            found.append(point)
    return sorted(found, key=lambda point: len(point.parts), reverse=True)
