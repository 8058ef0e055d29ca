"""Space and import speed: dedupstore against casync and borg on the same images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from tools.benchmarks.report import Report, alternate

DEDUPSTORE = Path(__file__).resolve().parents[2] / ".venv/bin/dedupstore"
_BLOCK = 4096


def _run(*command: object, **environment: str) -> None:
    subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def _disk_bytes(path: Path) -> int:
    return sum(p.lstat().st_blocks * 512 for p in path.rglob("*") if p.is_file())


def _dedupstore(images: list[Path], store: Path) -> None:
    _run(DEDUPSTORE, "--store", store, "init")
    for image in images:
        _run(DEDUPSTORE, "--store", store, "import", image)


def _borg(images: list[Path], repository: Path) -> None:
    environment = {
        "BORG_BASE_DIR": f"{repository}.base",
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
    }
    _run("borg", "init", "-e", "none", repository, **environment)
    for image in images:
        _run("borg", "create", "-C", "zstd,3", f"{repository}::{image.stem}", image, **environment)


def _casync(images: list[Path], directory: Path) -> None:
    directory.mkdir()
    for image in images:
        index = directory / f"{image.stem}.caibx"
        _run("casync", "make", f"--store={directory / 'store.castr'}", index, image)


_TOOLS: dict[str, Callable[[list[Path], Path], None]] = {
    "ours": _dedupstore,
    "borg zstd,3": _borg,
    "casync": _casync,
}


def ingest(images: list[Path], work: Path, rounds: int, report: Report) -> None:
    """Seconds to import the whole corpus into an empty store, sources in the page cache."""
    for image in images:
        _run("cat", image)

    def timed(name: str) -> float:
        target = work / f"ingest-{name.split(maxsplit=1)[0]}"
        begin = time.monotonic()
        _TOOLS[name](images, target)
        seconds = time.monotonic() - begin
        shutil.rmtree(target)
        shutil.rmtree(f"{target}.base", ignore_errors=True)
        return seconds

    figures = alternate(rounds, {name: lambda name=name: timed(name) for name in _TOOLS})
    report.add("import of the corpus", "s", figures, target="(borg: >= 2)", lower_is_better=True)
    store = work / "known"
    _dedupstore(images, store)

    def known(count: list[int]) -> float:
        count[0] += 1
        begin = time.monotonic()
        _run(DEDUPSTORE, "--store", store, "import", images[-1], f"again-{count[0]}")
        return time.monotonic() - begin

    def copied() -> float:
        begin = time.monotonic()
        _run("cp", images[-1], "/dev/null")
        return time.monotonic() - begin

    count = [0]
    figures = alternate(rounds, {"ours": lambda: known(count), "cp to /dev/null": copied})
    report.add("import of a known image", "s", figures, lower_is_better=True)
    shutil.rmtree(store)


def space(images: list[Path], work: Path, _rounds: int, report: Report) -> None:
    """Bytes on disk for the whole corpus, and the dedup ratio against fixed 4 KiB chunks."""
    sizes: dict[str, list[float]] = {}
    ratio = 0.0
    for name, tool in _TOOLS.items():
        target = work / f"space-{name.split()[0]}"
        tool(images, target)
        sizes[name] = [_disk_bytes(target) / 1e6]
        if name == "ours":
            command = [str(DEDUPSTORE), "--store", str(target), "stats", "--json"]
            stats = json.loads(subprocess.check_output(command))
            ratio = stats["dedup_ratio"]
            report.note("file_bytes", f"{stats['file_bytes'] / 1e6:,.1f} MB", "(target < 395)")
        shutil.rmtree(target)
        shutil.rmtree(f"{target}.base", ignore_errors=True)
    report.add("corpus on disk", "MB", sizes, lower_is_better=True)
    ideal = _fixed_ratio(images)
    share = f"{ratio:.3f} of {ideal:.3f} = {ratio / ideal:.1%}"
    report.note("dedup ratio, of fixed 4 KiB chunks'", share, "(target >= 96%)")


def _fixed_ratio(images: list[Path]) -> float:
    seen: set[bytes] = set()
    blocks = 0
    for image in images:
        with image.open("rb") as stream:
            while block := stream.read(_BLOCK):
                blocks += 1
                seen.add(blake3(block).digest())
    return blocks / len(seen)
