"""Using an image's files through the kernel: `dedupstore mount` against a loop mount of the file.

What is timed is what people do with a mounted root: list it, archive it, read every file, start
python from it. Measured are the kernel's EROFS alone (`--share=none`), and with it what shares page
cache with other images (`--share=auto`: on kernels before 7.0 an overlay on top), over whatever
device `dedupstore mount` chooses here; views are derived before the clock starts, once in a store's
life. The other side is `mount -o loop` of the same image file as EROFS.

Cold: mounted, for ours with a server started for it, then the kernel's caches dropped. Every cold
figure has a mount of its own, for the server's cache cannot be dropped. Warm: the same command
again, two seconds later: right after a first reading both sides are slower for a moment, when the
kernel sorts its pages anew and the server puts its memory in order. Nothing but this module's own
runtime directory is touched, so other mounts stay as they are.

    tools/bench mounted
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from tools.benchmarks.processes import DEDUPSTORE, drop_caches, run
from tools.benchmarks.report import Bench
from tools.benchmarks.serving import store_with

_LOOP = "loop mount"
_SHARES = ("none", "auto")
_COLD, _WARM = 0.834, 0.953  # ratios of times, theirs / ours: at most 1.2 and 1.05 times as long
_WARM_RUNS = 3
_SETTLE_SECONDS = 2.0

# tar to a pipe: with /dev/null for an archive GNU tar reads no file. Shells' own failures count,
# and find's and tar's: no figure of a failed run.
_READ_ALL = 'find "$1" -xdev -size +0 -type f -exec cat {} + | wc -c'
_COMMANDS = {
    "ls -lR": 'ls -lR "$1" | wc -c',
    "tar c": 'tar -C "$1" -c . | wc -c',
    "find -exec cat": _READ_ALL,
    "python start-up": "chroot \"$1\" /usr/bin/python3 -c 'import numpy'",
}


class Mounts:
    """Mounts of a store's images with a runtime directory, and so a server, of their own.

    A context: at its end every mount made here is gone, and with the last one its server.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._ends = ExitStack()

    def __enter__(self) -> Mounts:
        # Not in the suite's work directory: the paths of sockets below have to stay short.
        runtime = tempfile.TemporaryDirectory(prefix="dedupbench-")
        self._runtime = Path(self._ends.enter_context(runtime))
        self.environment = {"DEDUPSTORE_RUN": str(self._runtime)}
        return self

    def __exit__(self, *_error: object) -> None:
        self._ends.close()

    def mount(
        self, name: str, directory: Path, share: str = "auto", options: Sequence[object] = ()
    ) -> None:
        """Mount an image on `directory`, which is made if need be. `options`: more of them."""
        directory.mkdir(exist_ok=True)
        command = [DEDUPSTORE, "--store", self._store]
        words = ["mount", f"--share={share}", *options, name, directory]
        run(*command, *words, **self.environment)
        self._ends.callback(run, *command, "umount", directory, **self.environment)

    def metrics(self) -> Path:
        """The metrics socket of the server that the first mount has started."""
        return next(self._runtime.glob("*/metrics.sock"))


def read_tree(directory: Path) -> int:
    """Read the contents of every file below; returns how many bytes they are."""
    return int(_shell(_READ_ALL, directory))


def mounted(bench: Bench) -> None:
    """Each command cold and warm on both mounts, in turn."""
    image = bench.images[1]
    store = store_with(bench.work, image)
    point = bench.work / "mnt"
    point.mkdir()
    sides: dict[str, Callable[[], AbstractContextManager[None]]] = {
        share: lambda share=share: _our_mount(store, point, share)  # type: ignore[misc]
        for share in _SHARES
    }
    sides[_LOOP] = lambda: _loop_mount(image, point)
    with sides["auto"]():  # derives the view
        pass
    for what, command in _COMMANDS.items():
        cold, warm = _times(bench.rounds, sides, command, point)
        for state, figures, target in (("cold", cold, _COLD), ("warm", warm, _WARM)):
            for share in _SHARES:
                bench.report.compare(
                    f"mounted, share {share}, {state}: {what}",
                    "s",
                    {"ours": figures[share], _LOOP: figures[_LOOP]},
                    targets={_LOOP: target},
                    lower_is_better=True,
                )


Figures = dict[str, list[float]]
Sides = Mapping[str, Callable[[], AbstractContextManager[None]]]


def _times(rounds: int, sides: Sides, command: str, point: Path) -> tuple[Figures, Figures]:
    """Seconds of a command by side: the first run of each mount, and those after it."""
    cold: Figures = {name: [] for name in sides}
    warm: Figures = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            with side():
                drop_caches()
                _bring_back_programs()
                cold[name].append(_timed(command, point))
                _timed(command, point)
                time.sleep(_SETTLE_SECONDS)
                warm[name] += [_timed(command, point) for _ in range(_WARM_RUNS)]
    return cold, warm


def _timed(command: str, directory: Path) -> float:
    begin = time.monotonic()
    _shell(command, directory)
    return time.monotonic() - begin


def _shell(command: str, directory: Path) -> str:
    """Run a command line on a directory; returns what it printed."""
    words = ["bash", "-c", f"set -euo pipefail; {command}", "bash", directory]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout


def _bring_back_programs() -> None:
    """Read the programs that are timed back in: both sides run them from this host's disk."""
    here = Path(__file__).parent
    for command in list(_COMMANDS.values())[:3]:
        _shell(command, here)
    run("chroot", "--version")


@contextmanager
def _our_mount(store: Path, point: Path, share: str) -> Iterator[None]:
    with Mounts(store) as mounts:
        mounts.mount("image", point, share)
        yield


@contextmanager
def _loop_mount(image: Path, point: Path) -> Iterator[None]:
    run("mount", "-t", "erofs", "-o", "ro,loop", image, point)
    try:
        yield
    finally:
        run("umount", point)
