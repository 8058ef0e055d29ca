"""Space, import and export: dedupstore against casync and borg on the same images."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from tools.benchmarks.processes import DEDUPSTORE, disk_bytes, run, seconds, warm_up
from tools.benchmarks.report import Bench, alternate

_BLOCK = 4096


def _dedupstore(images: list[Path], store: Path) -> None:
    run(DEDUPSTORE, "--store", store, "init")
    for image in images:
        run(DEDUPSTORE, "--store", store, "import", image)


def _borg(images: list[Path], repository: Path) -> None:
    environment = {
        "BORG_BASE_DIR": f"{repository}.base",
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
    }
    run("borg", "init", "-e", "none", repository, **environment)
    for image in images:
        run("borg", "create", "-C", "zstd,3", f"{repository}::{image.stem}", image, **environment)


def _casync(images: list[Path], directory: Path) -> None:
    directory.mkdir()
    for image in images:
        index = directory / f"{image.stem}.caibx"
        run("casync", "make", f"--store={directory / 'store.castr'}", index, image)


_TOOLS: dict[str, Callable[[list[Path], Path], None]] = {
    "ours": _dedupstore,
    "borg zstd,3": _borg,
    "casync": _casync,
}


def ingest(bench: Bench) -> None:
    """Seconds to import the whole corpus into an empty store, sources in the page cache."""
    warm_up(*bench.images)

    def timed(name: str) -> float:
        target = bench.work / f"ingest-{name.split(maxsplit=1)[0]}"
        begin = time.monotonic()
        _TOOLS[name](bench.images, target)
        taken = time.monotonic() - begin
        shutil.rmtree(target)
        shutil.rmtree(f"{target}.base", ignore_errors=True)
        return taken

    figures = alternate(bench.rounds, {name: lambda name=name: timed(name) for name in _TOOLS})
    targets = {"borg zstd,3": 2.5, "casync": 4}
    bench.report.compare(
        "import of the corpus", "s", figures, targets=targets, lower_is_better=True
    )


def known(bench: Bench) -> None:
    """Seconds to import an image that the store has."""
    store = bench.work / "known"
    _dedupstore(bench.images, store)
    names = (f"again-{i}" for i in range(bench.rounds))
    source = bench.images[-1]
    runs = {
        "ours": lambda: seconds(DEDUPSTORE, "--store", store, "import", source, next(names)),
        "cp to /dev/null": lambda: seconds("cp", source, "/dev/null"),
    }
    figures = alternate(bench.rounds, runs)
    bench.report.compare(
        "import of a known image",
        "s",
        figures,
        targets={"cp to /dev/null": 0.5},
        lower_is_better=True,
    )


def export(bench: Bench) -> None:
    """Seconds to write an image back to a file."""


def space(bench: Bench) -> None:
    """Bytes on disk for the whole corpus, and the dedup ratio against fixed 4 KiB chunks."""
    sizes: dict[str, list[float]] = {}
    ratio = 0.0
    for name, tool in _TOOLS.items():
        target = bench.work / f"space-{name.split()[0]}"
        tool(bench.images, target)
        sizes[name] = [disk_bytes(target) / 1e6]
        if name == "ours":
            command = [str(DEDUPSTORE), "--store", str(target), "stats", "--json"]
            stats = json.loads(subprocess.check_output(command))
            ratio = stats["dedup_ratio"]
        shutil.rmtree(target)
        shutil.rmtree(f"{target}.base", ignore_errors=True)
    bench.report.compare("corpus on disk", "MB", sizes, lower_is_better=True)
    share = ratio / _fixed_ratio(bench.images)
    bench.report.floor("dedup ratio, share of fixed 4 KiB chunks'", "", [share], 0.96)


def _fixed_ratio(images: list[Path]) -> float:
    seen: set[bytes] = set()
    blocks = 0
    for image in images:
        with image.open("rb") as stream:
            while block := stream.read(_BLOCK):
                blocks += 1
                seen.add(blake3(block).digest())
    return blocks / len(seen)
