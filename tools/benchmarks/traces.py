"""Block traces of real mounts: recorded once, kept beside the corpus, read back for replays.

Ten clones of the corpus' images are mounted as guests would mount them, each an EROFS with a page
cache of its own (nbdfuse, file-backed with direct I/O as `dedupstore mount` does it, else a loop
device), and programs of the images run in them. nbdkit's log filter in front of the plugin writes
down what arrives, so the product takes no part in recording. Needs root.

Workloads, each on freshly mounted clones, one after another in a fixed random order:

- list: `ls -lR` of all ten clones;
- python: numpy, scipy and standard library start-ups in the seven clones that have Python;
- build: a small C and C++ program compiled and linked, the standard library byte-compiled, a git
  commit of /usr/share; on an overlay whose lower layer is the clone;
- scan: `tar c | wc -c` of one clone of each image;
- host: three clones at a time run random ones of all these, half of them after a reboot (a fresh
  mount: the guest's page cache is empty), and now and then the kernel's caches are dropped. Its
  weights are a guess at a build host's life: half starts, a tenth backups.

What makes it meaningless: a corpus of other packages is another trace, and so is another kernel's
readahead. Order among three concurrent guests, and so the host trace, differs a little each time.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dedupstore import syscalls
from dedupstore.mounts import kernel
from tools.benchmarks.processes import DEDUPSTORE, PLUGIN, drop_caches, nbdkit, run, serving

# Raised when what is recorded changes: older traces are then recorded anew.
_VERSION = 1
_SEED = 4
# Clones of the three images, smallest image first.
_CLONES = (3, 4, 3)
_LANES = 3
_HOST_STEPS = 16
_UNMOUNT_SECONDS = 10.0
_CONNECTIONS = 4  # as many as a mount on an nbd device has
_SCRIPT_SECONDS = 120
_CONNECT = re.compile(r"connection=(\d+) Connect export=(\S+) ")
_READ = re.compile(r"connection=(\d+) Read id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+) ")

_STARTS = """
python3 -c 'import numpy'
python3 -c 'import json, email.message, asyncio, http.server, sqlite3, unittest, xml.dom.minidom'
python3 -c 'import scipy.stats' || python3 -c 'import numpy.random, numpy.fft, ctypes, decimal'
git --version
"""
_BUILD = r"""
export HOME=/tmp
cd /tmp
for i in 1 2 3; do
    printf '#include <stdio.h>\n#include <stdlib.h>\n#include <math.h>\n' > m$i.c
    printf 'double f%d(double x) { printf("%%f", x); return sin(x); }\n' $i >> m$i.c
    gcc -O2 -c m$i.c && gcc -shared -o m$i.so m$i.o -lm
done
printf '#include <iostream>\n#include <map>\n#include <regex>\nstd::map<int, int> m;\n' > p.cc
printf 'int main() { std::cout << std::regex_match("a", std::regex("a")) << m.size(); }\n' >> p.cc
g++ -O1 p.cc -o p && ./p
python3 -m compileall -q -f /usr/lib/python3.11/asyncio /usr/lib/python3.11/email
git init -q r && cd r && cp -r /usr/share/perl5 /usr/share/doc . && git add . &&
    git -c user.name=a -c user.email=a@b commit -qm a
"""
_PERL = """
perl -MPOSIX -MData::Dumper -MFile::Find -e 'print Dumper(1)'
dpkg -l; dpkg -L coreutils
find / -xdev -name '*.so*'
"""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a server was asked for, in order of arrival.

    `connections[c]` is (image, clone) of connection c; a request is (c, offset, length in bytes).
    """

    name: str
    connections: list[tuple[str, str]]
    requests: list[tuple[int, int, int]]


class Guest:
    """A clone as a machine of its own has it: an EROFS mount that shares no page cache."""

    def __init__(self, image: str, clone: str, directory: Path, socket: Path) -> None:
        self.image = image
        self.clone = clone
        self._directory = directory
        self._root = directory / "root"
        self._file = directory / "dev" / "img"
        for path in (self._root, self._file.parent):
            path.mkdir(parents=True)
        # Not by `dedupstore mount`, whose files share what is to be recorded request by request.
        uri = f"nbd+unix:///{clone}?socket={socket}"
        command = ["nbdfuse", "-r", "-C", str(_CONNECTIONS), str(self._file), uri]
        self._fuse = subprocess.Popen(command, cwd="/", stderr=subprocess.DEVNULL)
        while not self._file.exists():
            if self._fuse.poll() is not None:
                raise RuntimeError(f"{self._file}: nbdfuse has ended")
            time.sleep(0.02)

    @property
    def is_base(self) -> bool:
        """Whether the image has neither Python nor compilers."""
        return self.image.startswith("1")

    @property
    def has_compilers(self) -> bool:
        """Whether the image has gcc."""
        return self.image.startswith("3")

    def boot(self) -> None:
        """Mount, with an empty page cache."""
        try:
            syscalls.mount(self._file, self._root, "erofs", syscalls.MS_RDONLY, "directio")
        except OSError:
            run("mount", "-t", "erofs", "-o", "ro,loop", self._file, self._root)

    def halt(self) -> None:
        """Unmount."""
        _unmount(self._root)

    def close(self) -> None:
        """Halt and let the device go."""
        self.halt()
        _unmount(self._file.parent)
        self._fuse.wait(_UNMOUNT_SECONDS)

    def list(self) -> None:
        """Read every directory and inode."""
        _shell(f"ls -lR {self._root}")

    def scan(self) -> None:
        """Read every file, as a backup does."""
        _shell(f"tar c {self._root} | wc -c")

    def start(self) -> None:
        """Start programs."""
        _shell(_PERL if self.is_base else _STARTS, self._root)

    def build(self) -> None:
        """Build on an overlay."""
        top, upper, work = (self._directory / name for name in ("top", "upper", "work"))
        for directory in (top, upper, work):
            directory.mkdir()
        layers = f"lowerdir={self._root},upperdir={upper},workdir={work}"
        run("mount", "-t", "overlay", "-o", layers, "overlay", top)
        try:
            _shell(_BUILD, top)
        finally:
            _unmount(top)
            for directory in (top, upper, work):
                shutil.rmtree(directory)


def _shell(script: str, root: Path | None = None) -> None:
    """Run a script. What an image lacks fails, and is part of the trace."""
    command = ["sh", "-c", script] if root is None else ["chroot", str(root), "sh", "-c", script]
    subprocess.run(
        command,
        cwd="/",
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=_SCRIPT_SECONDS,
        check=False,
    )


def _unmount(directory: Path) -> None:
    deadline = time.monotonic() + _UNMOUNT_SECONDS
    while not kernel.try_unmount(directory) and time.monotonic() < deadline:
        time.sleep(0.02)


# --- workloads ---


def _each(guests: Sequence[Guest], work: Callable[[Guest], None]) -> None:
    for guest in guests:
        guest.boot()
        work(guest)
        guest.halt()


def _list(guests: Sequence[Guest]) -> None:
    _each(guests, Guest.list)


def _python(guests: Sequence[Guest]) -> None:
    _each([guest for guest in guests if not guest.is_base], Guest.start)


def _build(guests: Sequence[Guest]) -> None:
    _each([guest for guest in guests if guest.has_compilers], Guest.build)


def _scan(guests: Sequence[Guest]) -> None:
    _each(list({guest.image: guest for guest in guests}.values()), Guest.scan)


def _host(guests: Sequence[Guest]) -> None:
    with ThreadPoolExecutor(_LANES) as pool:
        # Each guest belongs to one lane, so that nobody reboots a guest that another one uses.
        list(pool.map(_lane, range(_LANES), (guests[i::_LANES] for i in range(_LANES))))


def _lane(number: int, guests: Sequence[Guest]) -> None:
    choose = random.Random(_SEED * _LANES + number)
    for guest in guests:
        guest.boot()
    for step in range(_HOST_STEPS):
        guest = choose.choice(guests)
        kinds = (Guest.start, Guest.list, Guest.build, Guest.scan)
        work = choose.choices(kinds, weights=(50, 20, 20, 10))[0]
        if choose.random() < 0.5:
            guest.halt()
            guest.boot()
        if number == 0 and step % 8 == 7:
            drop_caches()
        if work is Guest.build and not guest.has_compilers:
            work = Guest.start
        work(guest)


_WORKLOADS: dict[str, Callable[[Sequence[Guest]], None]] = {
    "list": _list,
    "python": _python,
    "build": _build,
    "scan": _scan,
    "host": _host,
}


# --- recording ---


def traces(images: Sequence[Path], store: Path, work: Path) -> Iterator[Trace]:
    """The trace of each workload, recorded when the corpus' directory does not have it.

    `store` holds the images under their stems; its clones are made here. Raises
    subprocess.CalledProcessError, DedupError.
    """
    directory = images[0].parent / "traces"
    directory.mkdir(exist_ok=True)
    key = [_VERSION, *(f"{image.name} {image.stat().st_size}" for image in images)]
    for name, workload in _WORKLOADS.items():
        path = directory / f"{name}.gz"
        trace = _load(path, name, key)
        if trace is None:
            trace = _record(name, workload, images, store, work)
            _save(path, trace, key)
        yield trace


def _record(
    name: str,
    workload: Callable[[Sequence[Guest]], None],
    images: Sequence[Path],
    store: Path,
    work: Path,
) -> Trace:
    log = work / f"{name}.log"
    clones = list(_clone(images, store))
    with _guests(clones, store, work / name, log) as guests:
        random.Random(_SEED).shuffle(guests)
        workload(guests)
    return parse(name, log.read_text(), {clone: image for image, clone in clones})


def _clone(images: Sequence[Path], store: Path) -> Iterator[tuple[str, str]]:
    for image, count in zip(images, _CLONES, strict=True):
        for i in range(count):
            clone = f"{image.stem}.{i}"
            with suppress(subprocess.CalledProcessError):  # there since the last workload
                run(DEDUPSTORE, "--store", store, "clone", image.stem, clone)
            yield image.stem, clone


@contextmanager
def _guests(
    clones: Sequence[tuple[str, str]], store: Path, directory: Path, log: Path
) -> Iterator[list[Guest]]:
    """One guest for each (image, clone), none of them booted, behind one server that logs."""
    directory.mkdir()
    socket = directory / "s"
    server = nbdkit(
        socket, "--filter=log", "python", PLUGIN, f"store={store}", "cache=2G", f"logfile={log}"
    )
    with serving(socket, *server), ExitStack() as stack:
        guests = []
        for image, clone in clones:
            guest = Guest(image, clone, directory / clone, socket)
            stack.callback(guest.close)
            guests.append(guest)
        yield guests


def parse(name: str, log: str, images: dict[str, str]) -> Trace:
    """The trace in a log of nbdkit's log filter; `images` maps export names to images."""
    connections: dict[str, int] = {}
    exports: list[tuple[str, str]] = []
    requests: list[tuple[int, int, int]] = []
    for line in log.splitlines():
        if read := _READ.search(line):
            requests.append((connections[read[1]], int(read[2], 16), int(read[3], 16)))
        elif connect := _CONNECT.search(line):
            connections[connect[1]] = len(exports)
            exports.append((images[connect[2]], connect[2]))
    return Trace(name, exports, requests)


def _save(path: Path, trace: Trace, key: Sequence[object]) -> None:
    with gzip.open(path, "wt", compresslevel=6) as file:
        print(json.dumps({"key": key, "connections": trace.connections}), file=file)
        for request in trace.requests:
            print(*request, file=file)


def _load(path: Path, name: str, key: Sequence[object]) -> Trace | None:
    if not path.exists():
        return None
    with gzip.open(path, "rt") as file:
        head = json.loads(file.readline())
        if head["key"] != key:
            return None
        requests = []
        for line in file:
            connection, offset, length = map(int, line.split())
            requests.append((connection, offset, length))
    connections = [(image, clone) for image, clone in head["connections"]]
    return Trace(name, connections, requests)
