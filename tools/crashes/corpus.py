"""The images that are imported while commands are killed: small, real, and mostly alike.

Trees of the Python library that nbdkit embeds, each a part of it with a few files changed, as
directories, tar archives, and EROFS images of mkfs.erofs; and a raw image with holes. What an
import of a directory or archive must yield is taken from a store that nothing ever happened to; for
files it is the file.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

from tools.crashes import program

_LIBRARY = Path(sysconfig.get_path("stdlib"))
_PARTS = [
    "asyncio",
    "concurrent",
    "ctypes",
    "collections",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "re",
    "sqlite3",
    "tomllib",
    "unittest",
    "urllib",
    "venv",
    "wsgiref",
    "xml",
    "xmlrpc",
    "zoneinfo",
]
_TREES = 5
_TREE_PARTS = 6
_NOISE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """Something to import. `sha256` is of the image that it becomes."""

    key: str
    path: Path
    sha256: str
    streamed: bool = False


def build(directory: Path) -> dict[str, Source]:
    """Write all sources into `directory`; deterministic but for the machine's Python library."""
    directory.mkdir()
    made: dict[str, tuple[Path, bool]] = {}
    for number in range(_TREES):
        tree = _tree(directory / f"tree{number}", number)
        if number == 0:
            made["tree0"] = tree, False
            made["tar0"] = _archive(tree, "w:"), True
        elif number == 1:
            made["tree1"] = tree, False
            made["targz1"] = _archive(tree, "w:gz"), False
        else:
            made[f"erofs{number}"] = _erofs(tree), number == 4
    made["raw"] = _raw(directory / "raw.img"), False
    for path in directory.rglob("*"):  # "unchanged since it was imported" needs files of some age
        os.utime(path, (1e9, 1e9))
    store = directory / "reference"
    program.must(store, "init")
    sources = {}
    for key, (path, streamed) in made.items():
        target = directory / "image"
        program.must(store, "import", str(path), key)
        program.must(store, "export", key, str(target))
        sources[key] = Source(key, path, sha256(target), streamed)
        if path.suffix in {".erofs", ".img"}:
            assert sources[key].sha256 == sha256(path), f"{path}: a plain import changed it"
        target.unlink()
    shutil.rmtree(store)
    return sources


def sha256(path: Path) -> str:
    """A file's digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tree(path: Path, number: int) -> Path:
    source = random.Random(number)
    for part in source.sample(_PARTS, _TREE_PARTS):
        shutil.copytree(
            _LIBRARY / part, path / part, ignore=shutil.ignore_patterns("__pycache__", "test*")
        )
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for file in source.sample(files, len(files) // 10):
        file.write_bytes(file.read_bytes() + source.randbytes(source.randrange(20_000)))
    for file in path.rglob("*"):
        os.utime(file, (0, 0))
    os.utime(path, (0, 0))
    return path


def _archive(tree: Path, mode: str) -> Path:
    path = tree.with_suffix(".tar" if mode == "w:" else ".tar.gz")
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        archive.add(tree, ".")
    return path


def _erofs(tree: Path) -> Path:
    image = tree.with_suffix(".erofs")
    subprocess.run(["mkfs.erofs", "--quiet", "-T0", image, tree], check=True, capture_output=True)
    return image


def _raw(path: Path) -> Path:
    """Noise, a hole, text; its end on no boundary."""
    source = random.Random(77)
    with path.open("wb") as file:
        file.write(source.randbytes(_NOISE_BYTES))
        file.seek(2 * _NOISE_BYTES)
        file.write(b"".join(b"line %d\n" % i for i in range(60_000)))
        file.seek(3 * _NOISE_BYTES + 1237)
        file.write(b"end")
    return path
