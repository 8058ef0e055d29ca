"""Reads lazy images while their remote is slow, silent, down, and lies, and compares every byte:
tools/remote_faults [--seconds N] [--seed N] [--json FILE].

A round has a new store that pulls an image, lazily, from an HTTP server behind a link
(`ondemand`'s), two servers of that store, and readers of both: over NBD, and through the second
one's files, which needs root. Over the link comes a storm: answers that are cut off, reset,
changed by a bit, stretched, never given, or errors; outages; silence. Meanwhile the store is
emptied with `evict` again and again, and the first server is killed (-9) and started. After the
storm every byte has to be readable, without a restart of the second server, and `check` must find
nothing.

Exit status 1: a wrong byte, an error other than EIO, a read that took longer than 90 s, something
that could not be read afterwards, a server that died by itself, or a finding of `check`. The
result means nothing about storms that last longer than a round (20 s), or about disks that fail at
the same time."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.ondemand import servers
from tools.ondemand.faults import (
    DEDUPSTORE,
    BrokenPromiseError,
    FileReader,
    NbdReader,
    Reader,
    Storm,
    serving,
)
from tools.ondemand.link import MEGABIT, Link
from tools.soaking.content import write_image

IMAGE_BYTES = 48 << 20
ROUND_SECONDS = 20.0
READERS = 3
RTT, RATE = 0.002, 200 * MEGABIT


@dataclass(slots=True)
class Figures:
    """What a run has done and seen."""

    seed: int
    rounds: int = 0
    seconds: float = 0.0
    reads: int = 0
    bytes: int = 0
    failed: int = 0
    longest_seconds: float = 0.0
    requests: int = 0
    kills: int = 0
    evictions: int = 0
    pulls_failed: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    weather: Counter[str] = field(default_factory=Counter)

    def document(self) -> dict[str, Any]:
        """The figures as JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


class Round:
    """One store, from pulling an image to checking what has become of it."""

    def __init__(self, work: Path, link: Link, source: bytes, seed: int, figures: Figures) -> None:
        self._work = work
        self._store = work / "store"
        self._link = link
        self._source = source
        self._random = random.Random(seed)
        self._figures = figures
        self._eviction = threading.Thread()
        self._broken: list[str] = []

    def run(self, seconds: float) -> None:
        """Raises BrokenPromiseError."""
        self._pull()
        with ExitStack() as stack:
            files = self._work / "files"
            files.mkdir()
            # Not in the round's directory: the paths of sockets have to stay short.
            short = tempfile.TemporaryDirectory(prefix="remote-faults-")
            runtime = Path(stack.enter_context(short))
            first = stack.enter_context(serving(self._store, runtime / "first"))
            with_files = files if os.geteuid() == 0 else None
            second = stack.enter_context(serving(self._store, runtime / "second", files=with_files))

            def die() -> None:
                self._figures.kills += 1
                first.kill()
                first.start()

            seeds = iter(range(self._random.randrange(1 << 30), 1 << 31))
            readers: list[Reader] = [
                NbdReader(server.socket, "image", self._source, next(seeds))
                for server in (first, second)
                for _ in range(READERS)
            ]
            if with_files is not None:
                digest = json.loads(self._command("info", "image", "--json"))["digest"]
                readers.append(FileReader(files / digest, self._source, next(seeds)))
            for reader in readers:
                reader.start()
            storm = Storm(self._link, next(seeds), [self._evict, self._evict, die])
            try:
                time.sleep(seconds)
            finally:
                storm.stop()
                if self._eviction.ident is not None:
                    self._eviction.join()
                seen = [reader.stop() for reader in readers]
            self._figures.weather += storm.weather
            for one in seen:
                self._figures.reads += one.reads
                self._figures.bytes += one.bytes
                self._figures.failed += one.failed
                longest = max(self._figures.longest_seconds, one.longest_seconds)
                self._figures.longest_seconds = longest
                if one.broken:
                    raise BrokenPromiseError(f"{one.broken[0]}; the log ends with: {second.said()}")
            if not second.alive():
                raise BrokenPromiseError(f"the second server has ended: {second.said()}")
            NbdReader(second.socket, "image", self._source, 0).read_all()
        self._command("check")
        if self._broken:
            raise BrokenPromiseError(self._broken[0])

    def _pull(self) -> None:
        """Under faults at first: it fails in one line, or works."""
        self._command("init")
        self._command("remote", "add", "origin", f"http://127.0.0.1:{self._link.port}/remote")
        kinds = ["500", "flip", "reset", "truncate"]
        self._link.chaos(0.3, kinds, self._random.randrange(1 << 30))
        for _ in range(3):
            pulled = self._try("pull", "origin", "image", "--lazy")
            if pulled.returncode == 0:
                break
            self._figures.pulls_failed += 1
        self._link.clear()
        if pulled.returncode:
            self._command("pull", "origin", "image", "--lazy")

    def _evict(self) -> None:
        """Empty the store, beside everything else: it asks the remote, which may take a while, or
        be in vain, in which case it says so in one line."""
        if self._eviction.is_alive():
            return
        self._figures.evictions += 1
        self._eviction = threading.Thread(target=self._try, args=("evict", "1"))
        self._eviction.start()

    def _command(self, *words: str) -> str:
        done = self._try(*words)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise BrokenPromiseError(f"{words[0]} ended with {done.returncode}: {said}")
        return done.stdout

    def _try(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [str(DEDUPSTORE), "--store", str(self._store), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and len(done.stderr.splitlines()) != 1:
            self._broken.append(f"{words[0]} did not fail with one line: {done.stderr}")
        return done


def publish(work: Path, image: Path) -> Path:
    """Push an image to a remote in a directory; returns that of a web server above it."""
    root = work / "root"
    (root / "remote").mkdir(parents=True)
    command = [str(DEDUPSTORE), "--store", str(work / "publisher")]
    for words in (
        ["init"],
        ["import", str(image), "image"],
        ["remote", "add", "origin", str(root / "remote")],
        ["push", "origin", "image"],
    ):
        subprocess.run([*command, *words], stdout=subprocess.DEVNULL, check=True)
    return root


def run(work: Path, seconds: float, figures: Figures) -> None:
    """Rounds for so long. Raises BrokenPromiseError."""
    image = work / "image"
    write_image(image, figures.seed, IMAGE_BYTES, fresh=0.5)
    root = publish(work, image)
    source = image.read_bytes()
    chance = random.Random(figures.seed)
    began = time.monotonic()
    with servers.nginx(root, work / "nginx") as server, Link(server.port) as link:
        link.shape(RTT, RATE)
        while (left := began + seconds - time.monotonic()) > 0:
            link.counters(reset=True)
            with tempfile.TemporaryDirectory(prefix="round-", dir=work) as directory:
                once = Round(Path(directory), link, source, chance.randrange(1 << 30), figures)
                once.run(min(left, ROUND_SECONDS))
            counters = link.counters()
            figures.rounds += 1
            figures.requests += counters.requests
            figures.faults += Counter(counters.faults)
            figures.seconds = time.monotonic() - began


def main() -> int:
    """Run rounds; returns the exit status: 1 if a promise was broken."""
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="tools/remote_faults", description=about)
    parser.add_argument("--seconds", type=float, default=60.0, help="start no round after this")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--directory", type=Path, help="where stores are made; default: TMPDIR")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    figures = Figures(options.seed)
    with tempfile.TemporaryDirectory(prefix="remote-faults-", dir=options.directory) as work:
        try:
            run(Path(work), options.seconds, figures)
        except BrokenPromiseError as failure:
            print(f"tools/remote_faults: {failure}", file=sys.stderr)
            return 1
    print("\n".join(_lines(figures)))
    if options.json:
        options.json.write_text(json.dumps(figures.document(), indent=2) + "\n")
    return 0


def _lines(figures: Figures) -> list[str]:
    def listed(counts: Counter[str]) -> str:
        return ", ".join(f"{name} {count}" for name, count in counts.most_common())

    return [
        f"{figures.rounds} rounds, {figures.seconds:.0f} s: {figures.reads} reads, "
        f"{figures.bytes >> 20} MiB compared, nothing wrong",
        f"{figures.failed} reads ended with EIO; the longest took {figures.longest_seconds:.1f} s",
        f"{figures.requests} requests over the link, of which failed: {listed(figures.faults)}",
        f"{figures.kills} servers killed, {figures.evictions} evictions, "
        f"{figures.pulls_failed} pulls failed in one line",
    ]


if __name__ == "__main__":
    sys.exit(main())
