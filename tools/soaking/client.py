"""One client: reads images from one server, all of each, and compares every byte with its source.

    /usr/bin/python3 client.py SOCKET SOURCES SEED RATE

RATE is in requests a second; 0 is as many as there can be. Runs under the distribution's Python,
which has libnbd's binding, so it imports nothing of the project. Commands come on standard input, a
line each: the name of a phase to count under from now on, or the end of the input, upon which one
JSON document says what was seen in each phase.

Names are `CONTENT.WORD`, and the bytes of CONTENT lie in the file of that name in SOURCES. Only
names whose word is "keep" are there for good: another may be gone before it is opened, which counts
as `gone`, but not once it is open.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import random
import select
import sys
import time

import nbd

BLOCK = 4096
# Sizes of one request, in blocks: what a kernel asks for, most of it small.
REQUEST_BLOCKS = (1, 1, 2, 4, 8, 16, 32, 64)
# Latencies are counted in steps of 2 %.
STEPS = 1 / math.log(1.02)
MICROSECOND = 1e-6


class Phase:
    """What was seen since a phase began."""

    def __init__(self) -> None:
        self.bytes = self.wrong = self.passes = self.gone = 0
        self.errors: list[str] = []
        self.latencies: dict[int, int] = {}

    def note(self, seconds: float) -> None:
        step = int(math.log(max(seconds, MICROSECOND) / MICROSECOND) * STEPS)
        self.latencies[step] = self.latencies.get(step, 0) + 1


class Client:
    def __init__(self, socket: str, sources: str, seed: int, rate: float) -> None:
        self._socket = socket
        self._sources = sources
        self._pause = 1 / rate if rate else 0.0
        self._random = random.Random(seed)
        self._commands = b""
        self._phase = Phase()
        self._phases = {"": self._phase}
        self._ended = False

    def run(self) -> dict[str, dict[str, object]]:
        while not self._obey(0):
            try:
                self._pass()
            except (nbd.Error, OSError) as error:
                self._phase.errors.append(str(error))
        return {name: vars(phase) for name, phase in self._phases.items() if name}

    def _obey(self, timeout: float) -> bool:
        """Take commands that have come; whether the last was the end."""
        while not self._ended and select.select([0], [], [], timeout)[0]:
            data = os.read(0, 4096)
            self._ended = not data
            *lines, self._commands = (self._commands + data).split(b"\n")
            for line in lines:
                self._phase = self._phases.setdefault(line.decode(), Phase())
        return self._ended

    def _pass(self) -> None:
        """Open an image, and read all of it once: in order, or in any order."""
        handle = nbd.NBD()
        handle.set_opt_mode(True)
        handle.connect_unix(self._socket)
        names: list[str] = []

        def note(name: str, _description: str) -> int:
            names.append(name)
            return 0

        handle.opt_list(note)
        name = self._random.choice(names)
        try:
            with open(os.path.join(self._sources, name.split(".")[0]), "rb") as file:
                source = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            handle.set_export_name(name)
            handle.opt_go()
        except (OSError, nbd.Error) as error:
            number = error.errnum if isinstance(error, nbd.Error) else error.errno
            if number != errno.ENOENT or name.endswith(".keep"):
                raise
            self._phase.gone += 1
            handle.opt_abort()
            return
        with source:
            self._verify(handle, source, name)
        handle.shutdown()

    def _verify(self, handle: nbd.NBD, source: mmap.mmap, name: str) -> None:
        size = handle.get_size()
        if size != len(source):
            self._phase.errors.append(f"{name}: has {size} bytes, its source {len(source)}")
            return
        requests = list(self._requests(size))
        if self._random.random() < 0.5:
            self._random.shuffle(requests)
        for at, length in requests:
            begin = time.perf_counter()
            data = handle.pread(length, at)
            self._phase.note(time.perf_counter() - begin)
            self._phase.bytes += length
            if data != source[at : at + length]:
                expected = source[at : at + length]
                self._phase.wrong += sum(a != b for a, b in zip(data, expected, strict=True))
            if self._obey(self._pause * 2 * self._random.random()):
                return
        self._phase.passes += 1

    def _requests(self, size: int):
        at = 0
        while at < size:
            length = min(BLOCK * self._random.choice(REQUEST_BLOCKS), size - at)
            yield at, length
            at += length


if __name__ == "__main__":
    print(json.dumps(Client(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])).run()))
