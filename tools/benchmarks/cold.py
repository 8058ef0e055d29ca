"""First reads: everything cold, and a clone of what the server has read already.

Cold means: the server has just been started, and only then the kernel's caches were dropped, so
that neither what its start has read nor the time it takes counts, on either side. The clients'
programs are read back in before the clock starts.

    tools/bench cold
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tools.benchmarks.mounted import Mounts, read_tree
from tools.benchmarks.processes import (
    DEDUPSTORE,
    Server,
    drop_caches,
    metric,
    run,
    seconds,
)
from tools.benchmarks.report import Bench, alternate
from tools.benchmarks.serving import FILE, file_plugin, fio, plugin, store_with

_RANDOM_READS = 4000
_RANDOM_READS_ALONE = 1000


def cold(bench: Bench) -> None:
    """The whole image, random reads at first touch, and the second clone through the kernel."""
    image = bench.images[1]
    store = store_with(bench.work, image)
    starts = {
        "ours": plugin(bench.work / "ours", store, "image=image"),
        FILE: file_plugin(bench.work / "file", image),
    }

    def alternating(measure: Callable[[Server], float]) -> dict[str, list[float]]:
        def fresh(name: str) -> float:
            with starts[name]() as server:
                drop_caches()
                run("nbdcopy", "--version")
                run("fio", "--enghelp=nbd")
                return measure(server)

        return alternate(bench.rounds, {name: lambda name=name: fresh(name) for name in starts})

    megabytes = image.stat().st_size / 1e6
    whole = alternating(lambda server: megabytes / seconds("nbdcopy", server.uri(), "null:"))
    bench.report.compare("cold whole image", "MB/s", whole, targets={FILE: 1.0})
    deep = alternating(lambda server: _first_touch(server, 16, _RANDOM_READS))
    what = "cold 4 KiB random, depth 16"
    bench.report.compare(what, "MB/s", deep, targets={FILE: 0.7})
    alone = alternating(lambda server: _first_touch(server, 1, _RANDOM_READS_ALONE))
    bench.report.compare("cold 4 KiB random, depth 1", "MB/s", alone)
    _second_clone(bench, store)


def _first_touch(server: Server, depth: int, reads: int) -> float:
    """MB/s of reads at different places, the same ones for every server: fio's random map keeps
    it from reading a block twice, its fixed seed makes the order."""
    return fio(server.uri(), rw="randread", bs="4k", iodepth=depth, number_ios=reads)


def _second_clone(bench: Bench, store: Path) -> None:
    """Every file of a clone through the kernel, when another clone has been read before but the
    kernel has forgotten it."""
    run(DEDUPSTORE, "--store", store, "clone", "image", "second")
    directories = [bench.work / "first-mount", bench.work / "second-mount"]
    speeds: list[float] = []
    first_speeds: list[float] = []
    reads: list[float] = []
    for _ in range(bench.rounds):
        with Mounts(store) as mounts:
            mounts.mount("image", directories[0])
            first_speeds.append(_read_tree_cold(directories[0]))
            before = metric(mounts.metrics(), "dedup_store_reads_total")
            mounts.mount("second", directories[1])
            speeds.append(_read_tree_cold(directories[1]))
            reads.append(metric(mounts.metrics(), "dedup_store_reads_total") - before)
    figures = {"ours": speeds, "first clone": first_speeds}
    what = "second clone, cold kernel, warm server"
    bench.report.compare(what, "MB/s", figures, targets={"first clone": 1.5})
    bench.report.bound(f"{what}: store reads", "", reads, 0)


def _read_tree_cold(directory: Path) -> float:
    """MB/s of file contents, read in the order of the tree."""
    drop_caches()
    read_tree(Path(__file__).parent)  # the programs
    begin = time.monotonic()
    count = read_tree(directory)
    return count / 1e6 / (time.monotonic() - begin)
