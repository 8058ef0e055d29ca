"""What tests of mounts drive: a store and a runtime directory of its own, from the command line,
and what the kernel and the process table have of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dedupstore.mounts import kernel
from tests.interop.rig import (
    StoreDirectory,
    mounts_below,
    read_metrics,
    require_nbdkit,
    wait_until,
)
from tests.programs import require_root


@dataclass(slots=True)
class MountRig:
    """A store, a runtime directory and a place to mount at, all below one short path."""

    store: StoreDirectory
    base: Path
    directories: list[Path] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.base / "run"

    @property
    def runtime(self) -> Path:
        """The store's part of the runtime directory."""
        (found,) = (path for path in self.run.iterdir() if path.is_dir())
        return found

    def directory(self, name: str = "m") -> Path:
        path = self.base / f"{name}{len(self.directories)}"
        path.mkdir()
        self.directories.append(path)
        return path

    def mount(self, name: str, share: str = "none") -> Path:
        directory = self.directory()
        assert self.store.do("mount", f"--share={share}", name, directory) == ""
        return directory

    def umount(self, directory: Path) -> None:
        assert self.store.do("umount", directory) == ""

    def attach(self, name: str) -> Path:
        return Path(self.store.do("attach", name).removesuffix("\n"))

    def listed(self) -> Any:
        return json.loads(self.store.do("mount", "--list", "--json"))

    def server(self) -> int:
        return int((self.runtime / "nbd.pid").read_text())

    def devices(self) -> list[Path]:
        """What the attachments read from."""
        return sorted(self.runtime.glob("*/img"))

    def metrics(self) -> dict[str, int]:
        return read_metrics(self.runtime / "metrics.sock")

    def assert_nothing_left(self) -> None:
        """No mount, loop, process or file but the lock files."""
        assert mounts_below(self.base) == []
        assert loops_below(self.base) == []
        files = {path.name for path in self.run.rglob("*") if not path.is_dir()}
        assert files <= {"lock", "devices.lock"}
        assert processes_with(str(self.run)) == []

    def clean(self) -> None:
        """Leave the machine as it was, whatever the product did."""
        for point in mounts_below(self.base):
            if self.run not in point.parents:
                subprocess.run(["umount", "--lazy", point], check=False)
        for loop in loops_below(self.base):
            subprocess.run(["losetup", "--detach", loop], check=False)
        for point in mounts_below(self.base):
            subprocess.run(["umount", "--lazy", point], check=False)
        for pid in processes_with(str(self.run)):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.base, ignore_errors=True)


def loops_below(directory: Path) -> list[Path]:
    found = Path("/sys/block").glob("loop*/loop/backing_file")
    return [
        Path("/dev") / path.parents[1].name
        for path in found
        if path.read_text().startswith(f"{directory}/")
    ]


def processes_with(text: str) -> list[int]:
    """The nbdkit processes with `text` in their arguments; zombies have none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if Path(os.fsdecode(arguments[0])).name == "nbdkit" and text.encode() in b"\0".join(
            arguments
        ):
            found.append(int(path.parent.name))
    return found


def is_running(pid: int) -> bool:
    return bool(kernel.command_line(pid))


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(is_running(pid) for pid in pids))


@contextmanager
def mount_rig(store: StoreDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[MountRig]:
    """A rig for a store, which leaves the machine as it was."""
    require_root()
    require_nbdkit()
    made = MountRig(store, Path(tempfile.mkdtemp(prefix="ds-", dir="/tmp")))
    monkeypatch.setenv("DEDUPSTORE_RUN", str(made.run))
    try:
        yield made
    finally:
        made.clean()
