"""Readers of lazy images, and a storm over the link to where their bytes are.

A `Reader` compares every byte that it reads with the image's source; a `Storm` makes the link lose,
spoil and withhold answers, at random but from a seed, and empties the store now and then, so that
there is always something to fetch. What must hold, whatever the storm does: no wrong byte, no error
but EIO, no wait without end (`READ_SECONDS_MAX`), and everything readable again once it is over
(`read_all`), with no restart.

Reads go over NBD (libnbd) or through a file of the server's FUSE mount, whose pages are dropped
before each read. Not thread-safe, except where something says so."""

from __future__ import annotations

import errno
import os
import random
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbd

from tools.ondemand.link import Link
from tools.ondemand.mischief import KINDS

DEDUPSTORE = Path(sys.executable).with_name("dedupstore")
PLUGIN = Path(__file__).resolve().parents[2] / "nbdplugin" / "dedup.py"
READ_BYTES_MAX = 256 << 10
READ_SECONDS_MAX = 90.0
"""How long one read may take: a fetch's deadline, with those of the mirrors and of who else has
it."""
_RECOVERY_SECONDS = 60.0
_PATIENCE_SECONDS = 30.0


class BrokenPromiseError(Exception):
    """Something that must hold did not; says what."""


@dataclass(slots=True)
class Seen:
    """What a reader has seen. `failed`: reads that ended with EIO; `lost`: with a server that was
    killed. `longest_seconds`: of one read."""

    reads: int = 0
    bytes: int = 0
    failed: int = 0
    lost: int = 0
    longest_seconds: float = 0.0
    broken: list[str] = field(default_factory=list)


class Reader(ABC):
    """Reads random ranges on a thread of its own, from `start` until `stop`."""

    def __init__(self, source: bytes, seed: int) -> None:
        self.seen = Seen()
        self._source = source
        self._random = random.Random(seed)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> Seen:
        """Read no more; returns what was seen. A read that does not end is a broken promise."""
        self._stopping.set()
        self._thread.join(READ_SECONDS_MAX)
        if self._thread.is_alive():
            self.seen.broken.append(f"a read has not ended within {READ_SECONDS_MAX:.0f} s")
        return self.seen

    def read_all(self) -> None:
        """Read and compare everything, in order, as long as it takes for that to work: a minute at
        most. Raises BrokenPromiseError."""
        deadline = time.monotonic() + _RECOVERY_SECONDS
        at = 0
        while at < len(self._source):
            if self._once(at, min(READ_BYTES_MAX, len(self._source) - at)):
                at += READ_BYTES_MAX
            elif time.monotonic() > deadline:
                raise BrokenPromiseError(f"offset {at} cannot be read after the storm")
            else:
                time.sleep(0.1)
            if self.seen.broken:
                raise BrokenPromiseError(self.seen.broken[0])

    @abstractmethod
    def _read(self, offset: int, length: int) -> bytes:
        """Bytes of the image. Raises OSError; ConnectionError: the server is gone."""

    def _run(self) -> None:
        while not self._stopping.is_set() and not self.seen.broken:
            offset = self._random.randrange(len(self._source))
            length = min(self._random.randrange(1, READ_BYTES_MAX), len(self._source) - offset)
            if not self._once(offset, length):
                self._stopping.wait(0.01)

    def _once(self, offset: int, length: int) -> bool:
        """One read; whether it brought the bytes."""
        seen = self.seen
        began = time.monotonic()
        try:
            found = self._read(offset, length)
        except ConnectionError:
            seen.lost += 1
            return False
        except OSError as error:
            seen.failed += 1
            if error.errno != errno.EIO:
                seen.broken.append(f"a read of {length} bytes at {offset} ended with {error}")
            return False
        finally:
            seconds = time.monotonic() - began
            seen.longest_seconds = max(seen.longest_seconds, seconds)
            if seconds > READ_SECONDS_MAX:
                seen.broken.append(f"a read took {seconds:.0f} s")
        seen.reads += 1
        seen.bytes += length
        if found != self._source[offset : offset + length]:
            seen.broken.append(f"wrong bytes in {length} at {offset}")
        return True


class NbdReader(Reader):
    """Over a connection to a server's unix socket, made again when it breaks."""

    def __init__(self, socket_path: Path, export: str, source: bytes, seed: int) -> None:
        super().__init__(source, seed)
        self._uri = f"nbd+unix:///{export}?socket={socket_path}"
        self._handle: Any = None

    def _read(self, offset: int, length: int) -> bytes:
        try:
            if self._handle is None:
                handle = nbd.NBD()
                handle.connect_uri(self._uri)
                self._handle = handle
            return bytes(self._handle.pread(length, offset))
        except nbd.Error as error:
            if self._handle is not None and self._handle.aio_is_ready():
                raise OSError(error.errnum or errno.EIO, str(error)) from None
            self._handle = None
            raise ConnectionError(str(error)) from None


class FileReader(Reader):
    """Through the file of a server's FUSE mount."""

    def __init__(self, path: Path, source: bytes, seed: int) -> None:
        super().__init__(source, seed)
        self._file = os.open(path, os.O_RDONLY)

    def _read(self, offset: int, length: int) -> bytes:
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        found = b""
        while len(found) < length:
            part = os.pread(self._file, length - len(found), offset + len(found))
            if not part:
                raise OSError(errno.ENODATA, "the file ends early")
            found += part
        return found

    def stop(self) -> Seen:
        """As for all; closes the file."""
        seen = super().stop()
        if not seen.broken:
            os.close(self._file)
        return seen


class Server:
    """nbdkit with the plugin, serving a store on a unix socket; it can be killed and started again.
    `files`: a directory on which the exports are to be files as well."""

    def __init__(self, store: Path, directory: Path, *, files: Path | None = None) -> None:
        self.socket = directory / "nbd.sock"
        self._log = directory / "log"
        parameters = [f"store={store}", "cache=8M"] + ([f"files={files}"] if files else [])
        self._command = ["nbdkit", "-f", "-U", str(self.socket), "python", str(PLUGIN)]
        self._command += parameters
        self.start()

    def start(self) -> None:
        """Start it, on the same socket as ever."""
        self.socket.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stderr=log)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not _listens(self.socket):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BrokenPromiseError(f"the server does not start: {self.said()}")
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait()

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End it in order."""
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise BrokenPromiseError("the server does not end when told to") from None

    def said(self) -> str:
        """The last line of its log."""
        lines = self._log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "nothing"


@contextmanager
def serving(store: Path, directory: Path, *, files: Path | None = None) -> Iterator[Server]:
    """A server that ends with the context."""
    directory.mkdir(exist_ok=True)
    server = Server(store, directory, files=files)
    try:
        yield server
    finally:
        with suppress(BrokenPromiseError):
            server.stop()


class Storm:
    """Bad weather on a link from construction to `stop`, on a thread of its own. `also` are done in
    between, at random: the store's emptying, a server's death."""

    def __init__(self, link: Link, seed: int, also: list[Callable[[], None]]) -> None:
        self.weather: Counter[str] = Counter()
        self._link = link
        self._also = also
        self._random = random.Random(seed)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it; the link is as good as new then. Raises what `also` has raised."""
        self._stopping.set()
        self._thread.join()
        self._link.clear()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._blow(self._random.uniform(0.1, 1.5))
        except BaseException as error:  # told by `stop`
            self._error = error

    def _blow(self, seconds: float) -> None:
        source = self._random
        kind = source.choice(("calm", "chaos", "chaos", "chaos", "down", "freeze", *["also"] * 4))
        self.weather[kind] += 1
        if kind == "chaos":
            kinds = source.sample(sorted(KINDS), source.randrange(1, len(KINDS)))
            self._link.chaos(source.uniform(0.1, 0.8), kinds, source.randrange(1 << 30))
        elif kind == "down":
            self._link.down(seconds)
        elif kind == "freeze":
            self._link.freeze(seconds)
        elif kind == "also":
            source.choice(self._also)()
            return
        elif kind == "calm":
            self._link.clear()
        self._stopping.wait(seconds)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(os.fspath(path)) == 0
