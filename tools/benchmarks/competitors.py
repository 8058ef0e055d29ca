"""The programs that store images, each behind the same few calls: dedupstore and its competitors.

Fair means: a local repository, no encryption where it can be off, zstd at the program's own default
level (borg's default is lz4; 3 is the target's), the chunker its documentation recommends for files
in general, one run per image as images arrive in turn, and caches in the work directory, empty at
first. Every program keeps its own habits of durability: dedupstore, borg and restic sync what they
store, casync and desync leave that to the kernel, which is in their favour.

desync is not in Debian 12: one on PATH is used, else `tools/fetch-desync` takes Debian sid's, with
the C library it was built for. A program that cannot be had is left out, which the suites say.

Nothing here is thread-safe. Everything raises subprocess.CalledProcessError when a program fails.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import ClassVar

from tools.benchmarks.processes import DEDUPSTORE, disk_bytes, run

_FETCH_DESYNC = Path(__file__).parents[1] / "fetch-desync"


class Tool(ABC):
    """A program and a store of its own in `directory`, which exists and is empty.

    `rounds_max` is how often suites run it at most: a program that takes many times as long as the
    others does not become more exact by it.
    """

    name: ClassVar[str]
    program: ClassVar[str]
    rounds_max: ClassVar[int] = sys.maxsize

    def __init__(self, directory: Path) -> None:
        self.target = directory / "target"
        self.cache = directory / "cache"
        self.cache.mkdir()

    @classmethod
    def available(cls) -> bool:
        """Whether the program can be run here."""
        return shutil.which(cls.program) is not None

    @classmethod
    def version(cls) -> str:
        """What the program says about itself."""
        return _first_line(cls.program, "--version")

    @abstractmethod
    def init(self) -> None:
        """Make the empty store."""

    @abstractmethod
    def store(self, image: Path, name: str) -> None:
        """Store an image under a name that is new."""

    @abstractmethod
    def extract(self, name: str, directory: Path) -> None:
        """Write a stored image to a new file, the only one in `directory` or below."""

    def disk_bytes(self) -> int:
        """Bytes on disk of the store. Not its directories, of which casync and desync have one per
        few chunks, and not the caches that the program could make again."""
        return disk_bytes(self.target)


class DedupStore(Tool):
    """This project, without options."""

    name = "ours"
    program = str(DEDUPSTORE)

    def init(self) -> None:
        self._run("init")

    def store(self, image: Path, name: str) -> None:
        self._run("import", image, name)

    def extract(self, name: str, directory: Path) -> None:
        self._run("export", name, directory / name)

    def dedup_ratio(self) -> float:
        """Bytes of all images through bytes of distinct chunks."""
        command = [str(DEDUPSTORE), "--store", str(self.target), "stats", "--json"]
        return float(json.loads(subprocess.check_output(command))["dedup_ratio"])

    def _run(self, *arguments: object) -> None:
        run(DEDUPSTORE, "--store", self.target, *arguments)


class Borg(Tool):
    """Unencrypted, with the level of zstd that the target names, and borg's default chunker: its
    fixed one, for disks that change in place, would find little in images that are built anew.

    An empty file goes with each image, as borg's documentation of `create` advises for disk
    images: its files cache does not keep the newest file of a run.
    """

    name = "borg zstd,3"
    program = "borg"

    def init(self) -> None:
        self._run("init", "-e", "none", self.target)

    def store(self, image: Path, name: str) -> None:
        newest = self.cache / "newest"
        newest.touch()
        self._run("create", "-C", "zstd,3", f"{self.target}::{name}", image, newest)

    def extract(self, name: str, directory: Path) -> None:
        archive = f"{self.target}::{name}"
        self._run("extract", "--exclude", "sh:**/newest", archive, directory=directory)

    def _run(self, *arguments: object, directory: Path = Path("/")) -> None:
        environment = {
            "BORG_BASE_DIR": str(self.cache),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        # borg extracts to where it runs.
        run("env", "-C", directory, "borg", *arguments, **environment)


class Casync(Tool):
    """Blob indexes over one chunk store, compressed with zstd, its default."""

    name = "casync"
    program = "casync"
    rounds_max = 3

    def init(self) -> None:
        self.target.mkdir()

    def store(self, image: Path, name: str) -> None:
        run("casync", "make", self._chunks(), self.target / f"{name}.caibx", image)

    def extract(self, name: str, directory: Path) -> None:
        index = self.target / f"{name}.caibx"
        run("casync", "extract", self._chunks(), index, directory / name)

    def _chunks(self) -> str:
        return f"--store={self.target / 'store.castr'}"


class Desync(Tool):
    """casync's formats in Go, in parallel by default. Extracts without seeds, as on a new host."""

    name = "desync"
    program = "desync"
    rounds_max = 3

    @classmethod
    def available(cls) -> bool:
        """Whether it is on PATH or can be fetched; says on standard error why it cannot."""
        return desync() is not None

    @classmethod
    def version(cls) -> str:
        """The Debian package's version, because the program does not tell its own."""
        program = Path(desync() or "")
        for usr in (program.parents[1], program.parent / "root/usr"):
            changelog = usr / "share/doc/desync/changelog.Debian.gz"
            if changelog.exists():
                return gzip.decompress(changelog.read_bytes()).decode().partition(";")[0]
        return f"unknown ({program})"

    def init(self) -> None:
        (self.target / "store").mkdir(parents=True)

    def store(self, image: Path, name: str) -> None:
        self._run("make", "-s", self.target / "store", self.target / f"{name}.caibx", image)

    def extract(self, name: str, directory: Path) -> None:
        index = self.target / f"{name}.caibx"
        self._run("extract", "-s", self.target / "store", index, directory / name)

    def _run(self, *arguments: object) -> None:
        run(desync(), *arguments, HOME=str(self.cache))  # for its configuration


class Restic(Tool):
    """Format 2, which compresses with zstd. Its encryption cannot be off, and every run spends
    about half a second on deriving the key from the password, by design."""

    name = "restic"
    program = "restic"
    rounds_max = 3

    @classmethod
    def version(cls) -> str:
        """Restic has a command for it, no option."""
        return _first_line("restic", "version")

    def init(self) -> None:
        self._run("init")

    def store(self, image: Path, name: str) -> None:
        self._run("backup", "--tag", name, image)

    def extract(self, name: str, directory: Path) -> None:
        self._run("restore", "latest", "--tag", name, "--target", directory)

    def _run(self, *arguments: object) -> None:
        environment = {
            "RESTIC_REPOSITORY": str(self.target),
            "RESTIC_PASSWORD": "benchmark",
            "RESTIC_CACHE_DIR": str(self.cache),
        }
        run("restic", *arguments, **environment)


TOOLS: tuple[type[Tool], ...] = (DedupStore, Borg, Casync, Restic, Desync)


@cache
def desync() -> str | None:
    """The program's path: from PATH, else as fetched; None when it cannot be had."""
    found = shutil.which("desync")
    if found is None:
        fetched = subprocess.run([_FETCH_DESYNC], stdout=subprocess.PIPE, text=True, check=False)
        found = fetched.stdout.strip() or None
    return found


def _first_line(*command: str) -> str:
    output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return output.splitlines()[0]
