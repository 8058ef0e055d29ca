"""Using an image whose bytes are behind a link: ours, desync's and casync's ways, each observed.

    ours     mount --pull; for the first byte, and to read it all, a server with pull=
    ours, laid out
             the same, of an image that was pushed with a trace of its interpreter's start
    desync   mount-index with an HTTP store and a local cache; for files a loop mount on that
    casync   mount of the index of the image's tree: it has no mounts of images without nbd

Every observation starts with nothing here, neither store nor cache, and counts from the first
command to what it is about; taking down does not count. Not thread-safe.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from tools.benchmarks import competitors
from tools.benchmarks.connections import Client
from tools.benchmarks.mounted import Mounts, read_tree
from tools.benchmarks.processes import (
    DEDUPSTORE,
    PLUGIN,
    Server,
    drop_caches,
    nbdkit,
    run,
    serving,
)
from tools.benchmarks.remotes import REMOTE, Host, Observed, Site, Watch, workplace

_MOUNT_SECONDS_MAX = 30.0
_HEAD_BYTES = 4096
IMAGE = "image"


def python_command(root: Path) -> list[object]:
    """Runs the interpreter that is in a mounted image."""
    return ["chroot", root, "/usr/bin/python3", "-c", "import sys; print(sys.version)"]


def start_python(root: Path) -> None:
    """Run the interpreter that is in a mounted image."""
    run(*python_command(root))


class Lazy(ABC):
    """One program's way. All observations are of the one image that was published."""

    name: ClassVar[str]
    rounds_max: ClassVar[int] = 3

    def __init__(self, site: Site, work: Path) -> None:
        self.site = site
        self.work = work

    @classmethod
    @abstractmethod
    def available(cls) -> bool:
        """Whether the program can be run here."""

    @abstractmethod
    def publish(self, image: Path) -> None:
        """Put the image onto the site."""

    @abstractmethod
    def python(self) -> Observed:
        """To a running Python interpreter, from the mounted image."""

    @abstractmethod
    def first_byte(self) -> Observed:
        """To the first block of the image, or a listing of its root directory."""

    @abstractmethod
    def read_through(self) -> Observed:
        """To having read all of it in order, as it comes, through the mount or export."""

    @abstractmethod
    def fetch(self) -> Observed:
        """To having all of it here, by the command that is for that."""


class Ours(Lazy):
    """This project."""

    name = "ours"
    folder: ClassVar[str] = "ours"

    @classmethod
    def available(cls) -> bool:
        return True

    def publish(self, image: Path) -> None:
        self.publisher = self.site.publisher(self.folder)
        self.publisher.do("import", image, IMAGE)
        self.publisher.do("push", REMOTE, IMAGE, *self._layout())

    def _layout(self) -> list[object]:
        """Options of the push."""
        return []

    def python(self, *options: object, near: bool = False) -> Observed:
        """`options` are more of those of the mount; `near`: without the link."""
        with workplace(self.work) as directory, self.site.fresh(self.folder, near=near) as host:
            watch = self.site.watch()
            with Mounts(host.store) as mounts:
                pull = ("--pull", REMOTE, *options)
                mounts.mount(IMAGE, directory / "point", "none", pull)
                start_python(directory / "point")
                return watch.stop()

    def python_by_steps(self) -> Observed:
        """As `python`, by a command for each step."""
        with workplace(self.work) as directory, self.site.fresh(self.folder) as host:
            watch = self.site.watch()
            host.pull(IMAGE, "--lazy")
            with Mounts(host.store) as mounts:
                mounts.mount(IMAGE, directory / "point", "none")
                start_python(directory / "point")
                return watch.stop()

    def first_byte(self) -> Observed:
        """From the host's server, which is there."""
        with self.site.fresh(self.folder) as host, served(host, f"pull={REMOTE}") as server:
            _greet(server)
            watch = self.site.watch()
            return _first_block(server, watch)

    def first_byte_of_all(self) -> Observed:
        """From a server that is started for it."""
        with self.site.fresh(self.folder) as host:
            watch = self.site.watch()
            with served(host, f"pull={REMOTE}") as server:
                return _first_block(server, watch)

    def read_through(self) -> Observed:
        with self.site.fresh(self.folder) as host:
            watch = self.site.watch()
            with served(host, f"pull={REMOTE}") as server:
                run("nbdcopy", "--connections=1", "--requests=4", server.uri(IMAGE), "null:")
                return watch.stop()

    def fetch(self) -> Observed:
        with self.site.fresh(self.folder) as host:
            watch = self.site.watch()
            host.pull(IMAGE)
            return watch.stop()


class LaidOut(Ours):
    """This project, with a push that knew what would be started."""

    name = "ours, laid out"
    folder = "laid-out"

    def _layout(self) -> list[object]:
        trace = self.work / "laid-out.trace"
        record_python(self.publisher, trace)
        return ["--trace", trace]


def record_python(host: Host, trace: Path) -> int:
    """Record the start of the interpreter of an image that a host has; the bytes of the chunks that
    it reads."""
    with workplace(trace.parent) as directory, Mounts(host.store) as mounts:
        point = directory / "point"
        mounts.mount(IMAGE, point, "none")
        drop_caches()
        command = [DEDUPSTORE, "--store", host.store, "trace", "record", IMAGE, trace]
        run(*command, "--", *python_command(point), **mounts.environment)
    return int(host.told("trace", "show", trace)["bytes"])


@contextmanager
def served(host: Host, *parameters: object) -> Iterator[Server]:
    """A server of all that a host has."""
    with workplace(Path("/tmp")) as directory:  # the paths of sockets have to be short
        path = directory / "socket"
        command = nbdkit(path, "python", PLUGIN, f"store={host.store}", *parameters)
        with serving(path, *command) as server:
            yield server


def _greet(server: Server) -> None:
    """Wait until a server says something."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(server.socket))
        probe.recv(1)


def _first_block(server: Server, watch: Watch) -> Observed:
    client = Client(server.socket, IMAGE)
    try:
        client.read([0], _HEAD_BYTES)
        return watch.stop()
    finally:
        client.close()


class Desync(Lazy):
    """casync's formats in Go, ten requests at a time."""

    name = "desync"

    @classmethod
    def available(cls) -> bool:
        return competitors.Desync.available()

    def publish(self, image: Path) -> None:
        store = self.site.root / "desync"
        store.mkdir()
        self._run("make", "-s", store, self.site.root / "desync.caibx", image)

    def python(self) -> Observed:
        with workplace(self.work) as directory:
            watch = self.site.watch()
            with self._file(directory) as file:
                point = directory / "point"
                point.mkdir()
                run("mount", "-t", "erofs", "-o", "ro,loop", file, point)
                try:
                    start_python(point)
                    return watch.stop()
                finally:
                    run("umount", point)

    def first_byte(self) -> Observed:
        with workplace(self.work) as directory:
            watch = self.site.watch()
            with self._file(directory) as file, file.open("rb", buffering=0) as opened:
                opened.read(_HEAD_BYTES)
                return watch.stop()

    def read_through(self) -> Observed:
        with workplace(self.work) as directory:
            watch = self.site.watch()
            with self._file(directory) as file:
                run("dd", f"if={file}", "of=/dev/null", "bs=1M")
                return watch.stop()

    def fetch(self) -> Observed:
        with workplace(self.work) as directory:
            watch = self.site.watch()
            self._run("extract", *self._source(), directory / "out")
            return watch.stop()

    def _source(self) -> list[object]:
        return ["-s", f"{self.site.url}/desync", f"{self.site.url}/desync.caibx"]

    @contextmanager
    def _file(self, directory: Path) -> Iterator[Path]:
        """The image as a file of a FUSE mount."""
        point, cache = directory / "file", directory / "cache"
        point.mkdir()
        cache.mkdir()
        command = [competitors.desync(), "mount-index", *self._source()[:2], "-c", cache]
        with _fuse([*command, self._source()[2], point], point, self.work):
            yield next(point.iterdir())

    def _run(self, *words: object) -> None:
        run(competitors.desync(), *words, HOME=str(self.work))  # for its configuration


class Casync(Lazy):
    """casync itself. To read it all is to read all files of the tree."""

    name = "casync"
    rounds_max = 1  # one request at a time: minutes

    @classmethod
    def available(cls) -> bool:
        return competitors.Casync.available()

    def publish(self, image: Path) -> None:
        store = f"--store={self.site.root / 'casync'}"
        with workplace(self.work) as directory:
            run("mount", "-t", "erofs", "-o", "ro,loop", image, directory)
            try:
                run("casync", "make", store, self.site.root / "casync.caidx", directory)
            finally:
                run("umount", directory)
        run("casync", "make", store, self.site.root / "casync.caibx", image)

    def python(self) -> Observed:
        with workplace(self.work) as directory:
            watch = self.site.watch()
            with self._tree(directory) as point:
                start_python(point)
                return watch.stop()

    def first_byte(self) -> Observed:
        with workplace(self.work) as directory:
            watch = self.site.watch()
            with self._tree(directory) as point:
                list(point.iterdir())
                return watch.stop()

    def read_through(self) -> Observed:
        with workplace(self.work) as directory:
            watch = self.site.watch()
            with self._tree(directory) as point:
                read_tree(point)
                return watch.stop()

    def fetch(self) -> Observed:
        with workplace(self.work) as directory:
            watch = self.site.watch()
            run("casync", "extract", *self._source("casync.caibx"), directory / "out")
            return watch.stop()

    def _source(self, index: str) -> list[str]:
        return [f"--store={self.site.url}/casync", f"{self.site.url}/{index}"]

    @contextmanager
    def _tree(self, directory: Path) -> Iterator[Path]:
        """The files of the image in a FUSE mount."""
        point = directory / "point"
        point.mkdir()
        with _fuse(["casync", "mount", *self._source("casync.caidx"), point], point, self.work):
            yield point


THEIRS: tuple[type[Lazy], ...] = (Desync, Casync)
"""What others have for it."""


@contextmanager
def _fuse(command: list[object], point: Path, home: Path) -> Iterator[None]:
    """A program that mounts `point` by FUSE and stays in the foreground."""
    words = [str(word) for word in command]
    silent = subprocess.DEVNULL
    environment = {**os.environ, "HOME": str(home)}
    process = subprocess.Popen(words, stdout=silent, stderr=silent, env=environment)
    try:
        deadline = time.monotonic() + _MOUNT_SECONDS_MAX
        while not point.is_mount():
            if process.poll() is not None or time.monotonic() > deadline:
                raise subprocess.CalledProcessError(process.poll() or 1, words)
            time.sleep(0.002)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(subprocess.CalledProcessError):
            run("umount", "-l", point)  # where it has not done so itself
