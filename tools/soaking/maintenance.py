"""Everything that is done to a store while it is served, in loops, each command a real process.

Owns what the loops do and what of it failed. Each loop is a thread that runs one command after the
other; names and images that come and go belong to the one loop that made them.
"""

from __future__ import annotations

import filecmp
import random
import subprocess
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from pathlib import Path

from tools.benchmarks.processes import DEDUPSTORE
from tools.soaking.content import write_image

FRESH_BYTES = 12 << 20
FRESH_ALIVE = 3  # imported images that are there at a time
CLONES_ALIVE = 6


class Maintenance:
    """The loops of one soak. `stop` ends them and waits; the other attributes are for after that.

    `operations`: commands that were run, by kind. `errors`: what went wrong, one line each.
    `seconds`: how long each command of a kind took.
    """

    def __init__(self, store: Path, sources: Path, kept: list[str], rest: float) -> None:
        """`kept` are the contents whose names stay. A loop rests `rest` times as long as its last
        command took before it runs the next."""
        self._store = store
        self._sources = sources
        self._kept = kept
        self._rest = rest
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.operations: Counter[str] = Counter()
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.errors: list[str] = []
        self._clones: deque[str] = deque()
        self._fresh: deque[str] = deque()
        loops = (
            self._collect,
            self._compact,
            self._check,
            self._import,
            self._rename,
            self._export,
        )
        self._threads = [threading.Thread(target=self._loop, args=(loop,)) for loop in loops]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let each loop finish its command, then remove every name that came."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if names := [*self._clones, *self._fresh]:
            self._command("rm", *names)

    def _loop(self, work: Callable[[int], None]) -> None:
        number = 0
        try:
            while not self._stop.is_set():
                begin = time.monotonic()
                work(number)
                number += 1
                self._stop.wait(self._rest * (time.monotonic() - begin))
        except Exception as error:
            self.errors.append(f"{work.__name__}: {error!r}")

    def _command(self, *words: object) -> None:
        """Run one command; what it fails with is an error, and so is a word on standard error."""
        kind = "gc --compact" if "--compact" in words else str(words[0])
        begin = time.monotonic()
        result = subprocess.run(
            [str(word) for word in (DEDUPSTORE, "--store", self._store, *words)],
            capture_output=True,
            text=True,
            check=False,
        )
        with self._lock:
            self.operations[kind] += 1
            self.seconds[kind].append(time.monotonic() - begin)
            if result.returncode or result.stderr:
                said = (result.stderr or result.stdout).strip()
                self.errors.append(f"{kind}: status {result.returncode}: {said}")

    def _collect(self, _number: int) -> None:
        self._command("gc")

    def _compact(self, _number: int) -> None:
        self._command("gc", "--compact")

    def _check(self, _number: int) -> None:
        self._command("check")

    def _import(self, number: int) -> None:
        """New content under a new name; the oldest of its kind goes."""
        content = f"fresh-{number}"
        write_image(self._sources / content, 1000 + number, FRESH_BYTES, fresh=0.5)
        self._command("import", self._sources / content, f"{content}.0")
        self._fresh.append(f"{content}.0")
        if len(self._fresh) > FRESH_ALIVE:
            self._command("rm", self._fresh[0])
            # Whoever has it open has its source open, too.
            (self._sources / self._fresh.popleft().partition(".")[0]).unlink()

    def _rename(self, number: int) -> None:
        content = self._kept[number % len(self._kept)]
        self._command("clone", f"{content}.keep", f"{content}.clone-{number}")
        self._clones.append(f"{content}.clone-{number}")
        self._command("rename", self._clones[-1], f"{content}.moved-{number}")
        self._clones[-1] = f"{content}.moved-{number}"
        if len(self._clones) > CLONES_ALIVE:
            self._command("rm", self._clones[0])
            self._clones.popleft()

    def _export(self, number: int) -> None:
        content = random.Random(number).choice(self._kept)
        target = self._store.parent / "exported"
        self._command("export", f"{content}.keep", target)
        if not filecmp.cmp(target, self._sources / content, shallow=False):
            self.errors.append(f"export: {content} differs from its source")
        target.unlink()
