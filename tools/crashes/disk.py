"""A real file system whose disk is an nbdkit plugin, which may record, or fail: ext4 on a loop
device on a file that nbdfuse makes. And the mounting of what such a disk holds later. Needs
root."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

DISK_BYTES = 48 << 20
_PLUGIN = Path(__file__).with_name("recording.py")
_RECORD_BYTES = 32
_PATIENCE_SECONDS = 20
# No work is left to the kernel's threads after mkfs; a small journal is used again sooner.
_MKFS = (
    "mkfs.ext4", "-q", "-m0", "-b4096", "-Jsize=4", "-Elazy_itable_init=0,lazy_journal_init=0",
)  # fmt: skip


class DiskError(Exception):
    """The machine would not make or mount a disk: nothing is known about the store."""


def run(*command: str | Path) -> str:
    """Run a program; returns what it printed. Raises DiskError."""
    result = subprocess.run(command, capture_output=True, check=False, text=True)
    if result.returncode:
        raise DiskError(f"{' '.join(map(str, command))}: {result.stderr.strip()}")
    return result.stdout


class RecordedDisk:
    """A mounted file system at `root`; `log` has what was written to its disk."""

    def __init__(self, root: Path, log: Path) -> None:
        self.root = root
        self.log = log

    def position(self) -> int:
        """How many operations the disk has done."""
        return (self.log / "index").stat().st_size // _RECORD_BYTES


@contextmanager
def recorded(work: Path) -> Iterator[RecordedDisk]:
    """Make a file system in `work`, mounted while the block runs."""
    log, root = work / "log", work / "root"
    log.mkdir()
    root.mkdir()
    with served(work, "python", str(_PLUGIN), f"size={DISK_BYTES}", f"log={log}") as disk:
        make_file_system(disk)
        with mounted(disk, root):
            yield RecordedDisk(root, log)


@contextmanager
def served(work: Path, *plugin: str) -> Iterator[Path]:
    """A file in `work` that is an nbdkit plugin's disk while the block runs. Raises DiskError."""
    point, socket = work / "fuse", work / "nbd"
    point.mkdir()
    with ExitStack() as stack:
        server = stack.enter_context(_process("nbdkit", "-f", "-U", socket, *plugin))
        _await(socket.exists, server)
        fuse = _process("nbdfuse", point / "disk", f"nbd+unix:///?socket={socket}")
        fuse_process = stack.enter_context(fuse)
        stack.callback(_unmount_fuse, point)
        _await((point / "disk").exists, fuse_process)
        yield point / "disk"


def make_file_system(disk: Path) -> None:
    """Make an empty file system on a disk. Raises DiskError."""
    run(*_MKFS, disk)


@contextmanager
def mounted(image: Path, root: Path) -> Iterator[None]:
    """Mount a file system image, which replays its journal. Raises DiskError."""
    device = run("losetup", "--find", "--show", image).strip()
    try:
        run("mount", "-t", "ext4", "-o", "errors=remount-ro", device, root)
        try:
            yield
        finally:
            run("umount", root)
    finally:
        run("losetup", "--detach", device)


def mounts_below(directory: Path) -> list[str]:
    """What is mounted in a directory."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{directory}/")]


@contextmanager
def _process(*command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


def _unmount_fuse(point: Path) -> None:
    """nbdfuse ends with its mount."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while os.path.ismount(point):
        result = subprocess.run(["umount", point], capture_output=True, check=False)
        if result.returncode and time.monotonic() > deadline:
            raise DiskError(f"{point}: {result.stderr.decode().strip()}")
        time.sleep(0.01)


def _await(ready: object, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not ready():  # type: ignore[operator]
        if process.poll() is not None or time.monotonic() > deadline:
            raise DiskError(f"{process.args!r} did not start")
        time.sleep(0.005)
