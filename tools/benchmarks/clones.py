"""Many clones at once: one store against as many copies of the raw image.

Each clone is read front to back over a connection of its own, 128 KiB at a time with four requests
in flight, by jobs of a single fio process: sixteen clients with buffers of their own would cost
more of two cores than either server does. The other server is one `nbdkit file dir=`, its best
case: one process, so one set of libraries and buffers for all copies. The copies are real ones;
sharing their blocks on disk (reflinks) would share no page cache.

Memory is the server's anonymous memory and the page cache of the files behind it (the store's
data.mdb; the copies that were read), after caches were dropped and exactly these clones were read,
and two idle seconds later: what a server keeps, on either side.

    tools/bench clones
"""

from __future__ import annotations

import time
from pathlib import Path

from tools.benchmarks.processes import (
    DEDUPSTORE,
    Server,
    disk_bytes,
    drop_caches,
    page_cache_bytes,
    run,
)
from tools.benchmarks.report import Bench, Curve, alternate
from tools.benchmarks.serving import FILE, file_plugin, fio, plugin, store_with

_COUNTS = (1, 2, 4, 8, 16)
_MEMORY_RATIO = 12.0
_IDLE_SECONDS = 2


def clones(bench: Bench) -> None:
    """Throughput of 16 warm clones; memory and disk of 1, 2, 4, 8 and 16."""
    image = bench.images[1]
    names = [f"clone{number}" for number in range(_COUNTS[-1])]
    store = store_with(bench.work, image)
    copies = bench.work / "copies"
    copies.mkdir()
    disk: dict[str, list[float]] = {"ours": [], FILE: []}
    for number, name in enumerate(names, start=1):
        run(DEDUPSTORE, "--store", store, "clone", "image", name)
        run("cp", "--reflink=never", image, copies / name)
        if number in _COUNTS:
            disk["ours"].append(disk_bytes(store) / 1e6)
            disk[FILE].append(disk_bytes(copies) / 1e6)

    starts = {
        "ours": plugin(bench.work / "ours", store),
        FILE: file_plugin(bench.work / "file", f"dir={copies}"),
    }
    memory: dict[str, list[float]] = {name: [] for name in starts}
    for count in _COUNTS:
        files = {"ours": [store / "data.mdb"], FILE: [copies / name for name in names[:count]]}
        for name, start in starts.items():
            with start() as server:
                memory[name].append(_memory(server, names[:count], files[name]) / 1e6)
    _draw(bench, "memory", memory)
    _draw(bench, "disk", disk)
    _compare_last(bench, "memory for 16 clones", memory, _MEMORY_RATIO)
    _compare_last(bench, "disk for 16 clones", disk, None)

    with starts["ours"]() as ours, starts[FILE]() as theirs:
        runs = {"ours": lambda: _read(ours, names), FILE: lambda: _read(theirs, names)}
        alternate(1, runs)  # into memory
        figures = alternate(bench.rounds, runs)
    bench.report.compare("16 clones at once, warm", "MB/s", figures, targets={FILE: 1.0})


def _memory(server: Server, names: list[str], files: list[Path]) -> float:
    drop_caches()
    _read(server, names)
    time.sleep(_IDLE_SECONDS)
    return server.memory_bytes() + page_cache_bytes(*files)


def _read(server: Server, names: list[str]) -> float:
    """MB/s of reading all of these exports at once."""
    uris = [server.uri(name) for name in names]
    return fio(*uris, rw="read", bs="128k", iodepth=4)


def _compare_last(
    bench: Bench, what: str, figures: dict[str, list[float]], target: float | None
) -> None:
    last = {name: values[-1:] for name, values in figures.items()}
    targets = {} if target is None else {FILE: target}
    bench.report.compare(what, "MB", last, targets=targets, lower_is_better=True)


def _draw(bench: Bench, what: str, figures: dict[str, list[float]]) -> None:
    for name, values in figures.items():
        bench.report.curve(
            Curve(
                plot="memory and disk against number of clones",
                label=f"{what}, {'dedupstore' if name == 'ours' else name}",
                x_label="clones",
                y_label="MB",
                x=tuple(map(float, _COUNTS)),
                y=tuple(values),
            )
        )
