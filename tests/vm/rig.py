"""What guest tests share: a tree with everything a file system can hold, and a store's server that
may be killed and started again on the same socket."""

from __future__ import annotations

import json
import mmap
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from dedupstore.server import ServerOptions, server_command
from tests.interop.rig import PATIENCE_SECONDS, read_metrics, takes_connections, wait_until
from tests.programs import require_root, unavailable
from tools.guests import inside
from tools.guests.guest import Guest
from tools.guests.sharing import Containers

Result = TypeVar("Result")

SOCKET = "/run/dedupstore.sock"  # the service's, as guests see it
PERSISTENT = ("-persist", "-nonetlink")
NANOSECONDS = 1_700_000_000_123_456_789


def build_tree(top: Path) -> Path:
    """About 20 MB: files of all lengths, hard and symbolic links, holes, modes, owners, xattrs,
    devices (made by root only) and names that are no UTF-8."""
    rng = random.Random(3)
    top.mkdir()
    for i in range(60):
        file = top / f"d{i % 7}" / f"file-{i}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(rng.randbytes(rng.choice((1, 4095, 4096, 4097, 300_000, 700_000))))
        file.chmod((0o644, 0o755, 0o400, 0o4755)[i % 4])
    (top / "empty").touch()
    (top / "large").write_bytes(rng.randbytes(8 << 20))
    with (top / "sparse").open("wb") as sparse:
        sparse.seek(3 << 20)
        sparse.write(b"end")
    (top / "name").hardlink_to(top / "large")
    (top / "d1" / "name").hardlink_to(top / "large")
    (top / "link").symlink_to("d0/file-0")
    (top / "dangling").symlink_to("/no/" + "where/" * 20)
    Path(os.fsdecode(os.fsencode(top) + b"/no-utf8-\xff\xfe")).write_bytes(b"x")
    os.setxattr(top / "large", "user.note", b"\0\1binary")
    os.setxattr(top / "d0", "user.directory", b"")
    os.mkfifo(top / "fifo")
    if os.geteuid() == 0:
        os.mknod(top / "char", 0o020640, os.makedev(10, 300))
        os.mknod(top / "block", 0o060640, os.makedev(259, 70_000))
        os.chown(top / "d2", 1000, 70_000)
        os.setxattr(top / "d2", "trusted.note", b"root's")
    for path in sorted(top.rglob("*"), reverse=True):  # directories after what is in them
        moment = NANOSECONDS + rng.randrange(10**15)
        os.utime(path, ns=(moment, moment), follow_symlinks=False)
    return top


def debian_roots() -> Path:
    """The directory with the two roots that tools/fetch-roots makes."""
    require_root()
    found = os.environ.get("DEDUPSTORE_ROOTS")
    if not found:
        unavailable("no DEDUPSTORE_ROOTS (tools/test sets it; see tools/fetch-roots)")
    return Path(found)


def new_bytes() -> int:
    """Pages of the contents that derived has and base has not, each once."""
    base, derived = (_contents(debian_roots() / name) for name in ("base", "derived"))
    return sum(pages for digest, pages in derived.items() if digest not in base)


def _contents(tree: Path) -> dict[str, int]:
    """SHA-256 of every content of a tree, with the bytes of its pages."""
    return {
        entry["sha256"]: -(-entry["size"] // mmap.PAGESIZE) * mmap.PAGESIZE
        for entry in inside.inventory(str(tree))
        if entry["type"] == "-"
    }


def at_once(work: Callable[[str], Result], suites: Iterable[str]) -> dict[str, Result]:
    """What `work` gives for every suite, on a thread each: guests have one processor each."""
    names = list(suites)
    with ThreadPoolExecutor(len(names)) as threads:
        return dict(zip(names, threads.map(work, names), strict=True))


class Service:
    """A store's server, always on one socket."""

    def __init__(self, store: Path, socket: Path, metrics: Path | None = None) -> None:
        self.socket = socket
        self._store = store
        self._metrics = metrics
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start nbdkit; returns once it takes connections. In the foreground it ends with the
        thread that has started it."""
        self.socket.unlink(missing_ok=True)
        options = ServerOptions(self._store, self.socket, metrics=self._metrics)
        command = server_command(options, "--foreground")
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=sys.stderr)
        wait_until(lambda: takes_connections(self.socket) or process.poll() is not None)
        assert process.poll() is None
        self._process = process

    def store_reads(self) -> int:
        """How many chunks the server has loaded from the store."""
        assert self._metrics is not None
        return read_metrics(self._metrics)["dedup_store_reads_total"]

    def kill(self) -> None:
        """As if it crashed."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """As for an upgrade."""
        assert self._process is not None
        self._process.terminate()
        assert self._process.wait(PATIENCE_SECONDS) == 0


def leave_nothing(guest: Guest, containers: Containers) -> None:
    """Unmount all; what is left is lock files, and no device has a size."""
    containers.umount(*(mount["directory"] for mount in containers.mounts()))
    assert guest.run("grep -E 'erofs|overlay|nbd' /proc/mounts").stdout == ""
    assert guest.do("cat /sys/block/nbd*/size | sort -u") == "0\n"
    files = guest.do("find /run/dedupstore -type f").split()
    assert {Path(file).name for file in files} <= {"lock", "devices.lock"}


class Reader:
    """Reads a tree in the guest, again and again, beside whatever else goes on there."""

    _STATE = "/tmp/reader"

    def __init__(self, guest: Guest, directory: str) -> None:
        self._guest = guest
        call = f"inside.read_again_and_again({directory!r}, {self._STATE!r})"
        program = shlex.quote(f"from tools.guests import inside; {call}")
        guest.do(["mkdir", self._STATE])
        guest.do(f"python3 -c {program} >{self._STATE}/errors 2>&1 &")

    def read_on(self) -> None:
        """Returns in the middle of a pass, after one that began after the call."""
        done = int(self._guest.run(["cat", f"{self._STATE}/begun"]).stdout or 0) + 1
        self._wait_for(f"[ $(cat {self._STATE}/begun) -gt {done} ]")

    def stop(self) -> list[dict[str, Any]]:
        """End it; what it has read, in every pass."""
        self._guest.do(["touch", f"{self._STATE}/stop"])
        self._wait_for(f"[ -e {self._STATE}/inventory ]")
        found = json.loads(self._guest.do(["cat", f"{self._STATE}/inventory"]))
        self._guest.do(["rm", "-r", self._STATE])
        return cast(list[dict[str, Any]], found)

    def _wait_for(self, test: str) -> None:
        """Wait in the guest, where asking from here would take the reader's processor."""
        errors = f"{self._STATE}/errors"
        self._guest.do(f"until {test} 2>/dev/null || [ -s {errors} ]; do sleep 0.2; done")
        assert self._guest.do(["cat", errors]) == ""


def attach(image: str, device: str, *options: str) -> list[str]:
    """The command that attaches an export of the service in a guest."""
    connection = ["nbd-client", "-unix", SOCKET, device, "-N", image]
    return [*connection, "-b", "4096", "-C", "4", *options]
