"""A remote behind a link, and hosts that use it: what the suite `ondemand` measures with.

The remote is a directory that nginx serves; it is filled as a directory, so that no time goes into
uploads, and read through the link. Not thread-safe. Raises subprocess.CalledProcessError when a
command fails: a figure of a failed run is no figure.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmarks.processes import DEDUPSTORE, drop_caches, run
from tools.ondemand import servers
from tools.ondemand.link import MEGABIT, Link

REMOTE = "origin"
"""What hosts call the remote."""
RTT, RATE = 0.020, 100 * MEGABIT
"""The link of the figures that have targets."""


class Host:
    """A store that knows a remote. `environment`: what its commands need to reach that."""

    def __init__(self, store: Path, url: str, **environment: str) -> None:
        self.store = store
        self._environment = environment
        self.do("init")
        self.do("remote", "add", REMOTE, url)

    def do(self, *words: object) -> None:
        """Run a command on the store."""
        run(DEDUPSTORE, "--store", self.store, *words, **self._environment)

    def told(self, *words: object) -> Any:
        """What a command that needs no remote answers with --json."""
        command = [DEDUPSTORE, "--store", self.store, *words, "--json"]
        return json.loads(subprocess.check_output([str(word) for word in command]))

    def pull(self, name: str, *options: object) -> None:
        """Pull an image from the remote."""
        self.do("pull", REMOTE, name, *options)

    def stored_bytes(self) -> int:
        """Compressed bytes of the chunks that are here."""
        return int(self.told("stats")["stored_bytes"])

    def unique_bytes(self) -> int:
        """Bytes of the distinct chunks that are here."""
        return int(self.told("stats")["unique_bytes"])


@dataclass(frozen=True, slots=True)
class Observed:
    """What something took: seconds, and of the link HTTP requests and bytes towards the host."""

    seconds: float
    requests: int
    bytes_down: int


class Watch:
    """Observes from construction, with the kernel's caches dropped, until `stop`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        drop_caches()
        # What every side runs from this machine's disk.
        run("chroot", "--version")
        run(DEDUPSTORE, "--version")
        run("nbdkit", "--dump-plugin", "python")
        link.counters(reset=True)
        self._begin = time.monotonic()

    def stop(self) -> Observed:
        """What it took so far."""
        seconds = time.monotonic() - self._begin
        counters = self._link.counters()
        return Observed(seconds, counters.requests, counters.bytes_down)


class Site:
    """A web server behind a link: `root` is its directory, `url` leads there over the link."""

    def __init__(self, root: Path, link: Link, work: Path) -> None:
        self.root = root
        self.link = link
        self.url = f"http://127.0.0.1:{link.port}"
        self._work = work

    def publisher(self, folder: str = "ours") -> Host:
        """A host that pushes to a remote of this site, past the link."""
        (self.root / folder).mkdir(exist_ok=True)
        return Host(self._work / f"publisher-{folder}", str(self.root / folder))

    @contextmanager
    def fresh(self, folder: str = "ours", *, near: bool = False) -> Iterator[Host]:
        """A host that has nothing yet, and is thrown away afterwards. `near`: it reads the remote
        from this machine's disk, not over the link."""
        url = str(self.root / folder) if near else f"{self.url}/{folder}"
        with workplace(self._work) as directory:
            yield Host(directory / "store", url)

    def watch(self) -> Watch:
        """Begin to observe."""
        return Watch(self.link)


@contextmanager
def site(work: Path, *, rtt: float, rate: float) -> Iterator[Site]:
    """A web server behind a link: seconds for a round trip, bytes a second."""
    root = work / "site"
    root.mkdir()
    with servers.nginx(root, work / "nginx") as server, Link(server.port) as link:
        link.shape(rtt, rate)
        yield Site(root, link, work)


@contextmanager
def workplace(parent: Path) -> Iterator[Path]:
    """A directory of its own for one run."""
    directory = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
